"""How good the predictions are that choose a default: measured against predicted, and what a wrong choice costs.

    python bench/regret.py                                  # layers of bench/problems and of the networks; one thread
    python bench/regret.py --models light_resnet50 --threads 1,2 --layout nchw
    python bench/regret.py --target cpu:haswell             # as that processor is known, in a file of its own
    python bench/regret.py --tables                         # the tables of the rows that are there

Each layer is built by every schedule that applies, at its default, and timed as in a network: with cold weights that
rotate through more memory than the last cache holds, its input and output where the last call left them. In turn, in
this process. A row is appended to ``results/<processor>/regret.jsonl`` the moment it is known (of a target but ``cpu``
to ``regret.<target>.jsonl``); a row that is there is not measured again. *Regret* is the time of the schedule that is
chosen over that of the fastest one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
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


def measure(spec: ConvSpec, target: Target, threads: int, rounds: int) -> RegretRow:
    """Build and time every schedule's default that may be the fastest."""
    target = target.on(threads)
    chosen = default_candidate(spec, target)
    applicable = [s for s in schedules_of("cpu").values() if s.reason_against(spec.core, target) is None]
    predicted = {s.id: s.cost(spec.core, target) for s in applicable if not s.is_reference}
    limit = HOPELESS * predicted.get(chosen.schedule.id, math.inf)
    data = float_data(spec, 0)
    calls, failed = {}, {}
    for schedule in applicable:
        if schedule is not chosen.schedule and predicted.get(schedule.id, math.inf) > limit:
            continue
        try:
            candidate = Candidate(schedule, schedule.default(spec.core, target))
            kernel = compile_candidate(spec, target, candidate, threads)
        except BuildError as error:
            failed[schedule.id] = str(error)
            continue
        assert isinstance(kernel, Library)
        packed = kernel.pack(**{name: data[name] for name in spec.parameters})
        dst = np.empty(spec.dst_shape, data["src"].dtype)
        calls[schedule.id] = rotating(kernel, data["src"], packed, dst, data.get("residual"), threads)
    with pinned(threads):
        samples = alternate(list(calls.values()), rounds=rounds)
    facts = {"date": datetime.now(UTC).date().isoformat(), "cpu": machine().cpu, "versions": versions()}
    measured = {name: statistics.median(taken) for name, taken in zip(calls, samples, strict=True)}
    values = {"spec": spec.descriptor, "threads": threads, "chosen": chosen.schedule.id}
    return RegretRow({**values, "predicted": predicted, "measured": measured, "failed": failed, **facts})


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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not console.is_terminal
    try:
        with (
            TemporaryFolder() as folder,
            Progress(*columns, console=console, auto_refresh=False, transient=True, disable=quiet) as progress,
        ):
            specs = [] if options.tables else layers(options, folder)
            todo = [(spec, threads) for threads in options.threads for spec in specs]
            task = progress.add_task("layers", total=len(todo))
            for spec, threads in todo:
                progress.update(task, description=f"{threads}T {spec}", refresh=True)
                if options.fresh or (spec.descriptor, threads) not in kept.rows:
                    row = measure(spec, target, threads, options.rounds)
                    kept.add(row)
                    chosen = row.values["chosen"]
                    ratio = row.ratios.get(chosen, math.nan)
                    said = f"regret {100 * (row.regret - 1):.0f} %, {chosen}, fastest {row.fastest or 'none'}"
                    progress.print(f"{threads}T {spec}: {said}; measured / predicted {ratio:.2f}")
                progress.advance(task)
    finally:
        if kept.rows:
            kept.compact()
            write_text(page(list(kept.rows.values())), here / f"{name}.md")
            console.print(f"wrote {here / name}.md")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda console: run(options, console))


if __name__ == "__main__":
    sys.exit(main())
