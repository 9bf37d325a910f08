"""How good the predictions are that choose a default: measured against predicted, and what a wrong choice costs.

    python bench/regret.py                                  # layers of bench/problems and of the networks; one thread
    python bench/regret.py --minutes 20                     # as many as that takes; again: the next ones
    python bench/regret.py --models light_resnet50 --threads 1,2 --layout nchw
    python bench/regret.py --target cpu:haswell             # as that processor is known, in a file of its own
    python bench/regret.py --tables                         # the tables of the rows that are there

Each layer is built by every schedule that applies, at its default, and timed as in a network: with cold weights that
rotate through more memory than the last cache holds, its input and output where the last call left them. In turn, in
this process. A row is appended to ``results/<processor>/regret.jsonl`` the moment it is known (of a target but ``cpu``
to ``regret.<target>.jsonl``). A row that is there is not measured again as long as the same candidates would be: where
only predictions are others, these are put in their place. *Regret* is the time of the schedule that is chosen over that
of the fastest one.

The order is drawn, always the same: what a limit of time leaves behind is a sample of all layers.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.command import exit_status, listed, threads_listed
from bench.networks import NAMES, check_models, network_model
from bench.networks.layouts import CHOICES, between_layers
from convgen.check.data import float_data
from convgen.errors import BuildError, ConvgenError
from convgen.folders import TemporaryFolder
from convgen.formats.onnx.reader import instances_from_onnx
from convgen.formats.sources import read_specs, write_text
from convgen.hardware.machine import machine, pinned
from convgen.hardware.target import Target, check_threads, resolve
from convgen.kernel.kernel import compile_candidate
from convgen.kernel.library import Library
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedules_of
from convgen.lowering.schedule import Candidate
from convgen.lowering.versions import versions
from convgen.measure.rotation import rotating
from convgen.measure.standalone.timing import alternate
from convgen.problem.spec import ConvSpec
from convgen.report.markdown import code, markdown_table
from convgen.report.networks import processor_slug
from convgen.report.rows import KeyedFile
from convgen.report.words import plural

HERE = Path(__file__).parent
#: Schedules predicted to take longer than the chosen one by this factor are not measured.
HOPELESS = 2.5


@dataclass(frozen=True)
class RegretRow:
    """A layer: ``predicted`` and ``measured`` seconds by schedule, and the one that is ``chosen``.

    What could not be built is among ``failed``, and the reference, which predicts nothing, not among ``predicted``.
    """

    values: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, int]:
        return str(self.values["spec"]), int(self.values["threads"])

    @property
    def regret(self) -> float:
        """Time of the chosen schedule over that of the fastest: 1 where it is the fastest."""
        measured = self.values["measured"]
        return float(measured.get(self.values["chosen"], math.inf) / min(measured.values(), default=1.0))

    @property
    def fastest(self) -> str:
        return str(min(self.values["measured"], key=self.values["measured"].__getitem__, default=""))

    @property
    def ratios(self) -> dict[str, float]:
        """Measured over predicted time, by schedule."""
        measured, predicted = self.values["measured"], self.values["predicted"]
        return {name: measured[name] / predicted[name] for name in measured if name in predicted}


def layers(options: argparse.Namespace, folder: Path) -> list[ConvSpec]:
    """The layers, each once: of files of layers as they are there, of networks as they are inside one."""
    found: dict[ConvSpec, None] = {}
    for problem in options.problems:
        found |= dict.fromkeys(entry.spec for entry in between_layers(read_specs(problem), options.layout))
    for name in options.models:
        model = network_model(name, folder)
        instances = between_layers(instances_from_onnx(model.path, model.dims), options.layout)
        found |= dict.fromkeys(entry.spec for entry in instances)
    return list(found)


def drawn(specs: Iterable[ConvSpec]) -> list[ConvSpec]:
    """Layers in an order that has nothing to do with what they are, and in which others change no place."""
    return sorted(specs, key=lambda spec: hashlib.sha256(spec.descriptor.encode()).digest())


@dataclass(frozen=True)
class Question:
    """What is asked about a layer.

    Attributes:
        target: with the threads it runs on.
        chosen: id of the schedule that is the default.
        predicted: seconds by schedule, but of the reference.
        candidates: what is measured: every schedule's default that may be the fastest.
    """

    spec: ConvSpec
    target: Target
    threads: int
    chosen: str
    predicted: Mapping[str, float]
    candidates: Sequence[Candidate]

    @classmethod
    def of(cls, spec: ConvSpec, target: Target, threads: int) -> Question:
        target = target.on(threads)
        chosen = default_candidate(spec, target).schedule
        applicable = [s for s in schedules_of("cpu").values() if s.reason_against(spec.core, target) is None]
        predicted = {s.id: s.cost(spec.core, target) for s in applicable if not s.is_reference}
        limit = HOPELESS * predicted.get(chosen.id, math.inf)
        hopeful = [s for s in applicable if s is chosen or predicted.get(s.id, math.inf) <= limit]
        candidates = [Candidate(s, s.default(spec.core, target)) for s in hopeful]
        return cls(spec, target, threads, chosen.id, predicted, candidates)

    @property
    def picks(self) -> dict[str, dict[str, Any]]:
        """What is measured, by schedule: its version and picks."""
        return {made.schedule.id: {"version": made.schedule.version, **made.picks} for made in self.candidates}

    def answered(self, row: RegretRow | None) -> RegretRow | None:
        """A row as an answer to this question; None where something else was measured."""
        if row is None or any(row.values.get("picks", {}).get(name) != picks for name, picks in self.picks.items()):
            return None
        return RegretRow({**row.values, "chosen": self.chosen, "predicted": dict(self.predicted)})


def measure(question: Question, rounds: int) -> RegretRow:
    """Build and time every candidate."""
    spec, threads = question.spec, question.threads
    data = float_data(spec, 0)
    calls, failed = {}, {}
    for candidate in question.candidates:
        try:
            kernel = compile_candidate(spec, question.target, candidate, threads)
        except BuildError as error:
            failed[candidate.schedule.id] = str(error)
            continue
        assert isinstance(kernel, Library)
        packed = kernel.pack(**{name: data[name] for name in spec.parameters})
        dst = np.empty(spec.dst_shape, data["src"].dtype)
        calls[candidate.schedule.id] = rotating(kernel, data["src"], packed, dst, data.get("residual"), threads)
    with pinned(threads):
        samples = alternate(list(calls.values()), rounds=rounds)
    facts = {"date": datetime.now(UTC).date().isoformat(), "cpu": machine().cpu, "versions": versions()}
    measured = {name: statistics.median(taken) for name, taken in zip(calls, samples, strict=True)}
    values = {"spec": spec.descriptor, "threads": threads, "chosen": question.chosen, "picks": question.picks}
    return RegretRow({**values, "predicted": dict(question.predicted), "measured": measured, "failed": failed, **facts})


# ---- tables ---------------------------------------------------------------------------------------


def page(rows: Sequence[RegretRow]) -> str:
    """The tables over all rows, for each number of threads."""
    parts = ["# Predictions\n"]
    cpus, dates = (sorted({row.values[name] for row in rows}) for name in ("cpu", "date"))
    parts.append(f"{', '.join(cpus)}; {', '.join(dates)}. What a row is: `bench/regret.py`.\n")
    for threads in sorted({row.values["threads"] for row in rows}):
        group = [row for row in rows if row.values["threads"] == threads]
        parts += [
            f"\n## {plural(threads, 'thread')}, {plural(len(group), 'layer')}\n\n",
            *_regrets(group),
            "\n",
            _schedules(group),
        ]
    return "".join(parts)


def _regrets(rows: Sequence[RegretRow]) -> Iterable[str]:
    """How often a choice costs how much, and the layers where it costs most."""
    regrets = [row.regret - 1 for row in rows]
    yield f"Regret of the default: mean {100 * statistics.mean(regrets):.1f} %, largest {100 * max(regrets):.0f} %.\n\n"
    bounds = [0.0, 0.01, 0.03, 0.1, math.inf]
    counts = [sum(regret <= bound for regret in regrets) for bound in bounds]
    steps = [count - before for before, count in zip([0, *counts], counts, strict=False)]
    heads = ["none>", "≤ 1 %>", "≤ 3 %>", "≤ 10 %>", "more>"]
    yield table(heads, [[str(step) for step in steps]])
    worst = sorted(rows, key=lambda row: -row.regret)[:15]
    cells = [
        [code(row.values["spec"]), row.values["chosen"], row.fastest, f"{100 * (row.regret - 1):.0f} %"]
        for row in worst
        if row.regret > 1.03
    ]
    if cells:
        yield "\n" + table(["layer", "default", "fastest", "regret>"], cells)


def _schedules(rows: Sequence[RegretRow]) -> str:
    """Measured over predicted time by schedule: geometric mean, and the spread around it."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        for name, ratio in row.ratios.items():
            ratios.setdefault(name, []).append(math.log(ratio))
    cells = [
        [name, str(len(logs)), f"{math.exp(statistics.mean(logs)):.2f}", f"×{math.exp(statistics.pstdev(logs)):.2f}"]
        for name, logs in sorted(ratios.items())
    ]
    return table(["schedule", "layers>", "measured / predicted>", "spread>"], cells)


def table(heads: list[str], cells: list[list[str]]) -> str:
    return "\n".join(markdown_table((heads, cells))) + "\n"


# ---- command line -----------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--problems", type=Path, nargs="*", default=sorted((HERE / "problems").glob("*.json")))
    parser.add_argument("--models", type=listed, default=list(NAMES))
    parser.add_argument("--threads", type=threads_listed, default=[1])
    parser.add_argument("--target", default="cpu", help="a CPU target whose code runs here")
    parser.add_argument("--layout", choices=CHOICES, default="blocked", help="between layers")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no other layer is begun")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where results are kept")
    parser.add_argument("--fresh", action="store_true", help="measure known rows again")
    parser.add_argument("--tables", action="store_true", help="write the tables, measure nothing")
    options = parser.parse_args(arguments)
    try:
        target = resolve(options.target)
        if target.kind != "cpu":
            parser.error(f"--target: expected a CPU, found {options.target!r}")
        for count in options.threads:
            check_threads(count, target)
        check_models(parser, options.models)
    except ConvgenError as error:
        parser.error(str(error))
    return options


def run(options: argparse.Namespace, console: Console) -> None:
    here = options.results / processor_slug(machine())
    here.mkdir(parents=True, exist_ok=True)
    target = resolve(options.target)
    name = "regret" if options.target == "cpu" else f"regret.{options.target.replace(':', '-')}"
    kept = KeyedFile(here / f"{name}.jsonl", RegretRow)
    try:
        if not options.tables:
            _answer(options, target, kept, console)
    finally:
        if kept.rows:
            kept.compact()
            write_text(page(list(kept.rows.values())), here / f"{name}.md")
            console.print(f"wrote {here / name}.md")


def _answer(options: argparse.Namespace, target: Target, kept: KeyedFile[RegretRow], console: Console) -> None:
    """Measure what is missing, until the time is over."""
    end = time.monotonic() + 60 * options.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        TemporaryFolder() as folder,
        Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal) as bar,
    ):
        todo = [(spec, threads) for spec in drawn(layers(options, folder)) for threads in options.threads]
        task = bar.add_task("layers", total=len(todo))
        for done, (spec, threads) in enumerate(todo):
            if time.monotonic() >= end:
                console.print(f"bench: the time is over after {done} of {plural(len(todo), 'layer')}")
                break
            bar.update(task, description=f"{threads}T {spec}", refresh=True)
            question = Question.of(spec, target, threads)
            known = None if options.fresh else kept.rows.get((spec.descriptor, threads))
            row = question.answered(known) or measure(question, options.rounds)
            if known is None or row.values != known.values:
                kept.add(row)
                bar.print(f"{threads}T {spec}: {_line(row)}")
            bar.advance(task)


def _line(row: RegretRow) -> str:
    chosen = row.values["chosen"]
    said = f"regret {100 * (row.regret - 1):.0f} %, {chosen}, fastest {row.fastest or 'none'}"
    return f"{said}; measured / predicted {row.ratios.get(chosen, math.nan):.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda console: run(options, console))


if __name__ == "__main__":
    sys.exit(main())
