"""Measure networks against the other libraries, layer by layer; stops and resumes anywhere.

    python bench/run.py bench/problems/resnet50.json --threads 1,2 --seconds 30
    python bench/run.py bench/problems/*.json --recorded --records job.sqlite   # what a tuning job has found
    python bench/run.py --quick      # 24 layers of all kinds, zero-trial, one thread: two minutes
    python bench/run.py --quick --dtype u8    # the same of integers; --accuracy bf16: with products of bf16
    python bench/run.py --summary    # what all results on this processor together say

For each layer and thread count: tune it (``--seconds 0``: don't; ``--recorded``: take what the store
answers), then time the tuned kernel, the zero-trial one and every peer in turn, in this process. Each row
is appended to a file in ``results/<processor>/layers`` the moment it is known; a row that is there is not measured
again. At the end, or when interrupted, the tables and the picture are written beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import convgen
from bench.command import console_of_bench, exit_status, threads_listed
from convgen.errors import ConvgenError, SpecError
from convgen.formats.entries import SpecEntry
from convgen.formats.sources import read_specs, write_text
from convgen.hardware.machine import machine
from convgen.hardware.target import check_threads, resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import default_candidate
from convgen.lowering.versions import versions
from convgen.measure.busy import busy_warning
from convgen.measure.peers import PEERS, find_peer
from convgen.measure.standalone.command import finite
from convgen.problem.layout import BLOCKS
from convgen.problem.spec import ConvSpec
from convgen.problem.tokens import ACCURACIES
from convgen.records.answer import best_record, record_candidate
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.report import bench_page, figure
from convgen.report import tables as report
from convgen.report.networks import processor_slug
from convgen.report.rows import Row, RowFile, measure
from convgen.tuning.tuner import Tuner

HERE = Path(__file__).parent
SAMPLE = HERE / "sample.json"

#: Measures one layer; what tests replace.
Measurer = Callable[[SpecEntry, Tuner, argparse.Namespace], Row]


def tune_and_measure(entry: SpecEntry, tuner: Tuner, options: argparse.Namespace) -> Row:
    """One row: the layer's tuned kernel (unless that is the default), the default, and the peers."""
    spec, target, threads = entry.spec, tuner.target, tuner.threads
    default = default_candidate(spec, target)
    kernels = {}
    record, seconds = None, options.seconds
    if options.recorded:
        record, seconds = recorded(entry, tuner)
    elif seconds:
        record = tuner.tune(spec, seconds=seconds)
    if record is not None and (best := record_candidate(record, spec, target)) and best != default:
        kernels["tuned"] = compile_candidate(spec, target, best, threads, record=record)
    kernels["default"] = compile_candidate(spec, target, default, threads)
    row = measure(entry, kernels, options.peers, threads, rounds=options.rounds, cold=options.cold)
    return Row({**row.values, "tuning_seconds": seconds})


def recorded(entry: SpecEntry, tuner: Tuner) -> tuple[TuningRecord | None, float]:
    """The record that answers a build of the layer, and the seconds that were spent on finding it."""
    if tuner.records is None:
        return None, 0.0
    known = tuner.records.trials(
        spec=entry.spec.descriptor,
        target=tuner.target.spelling,
        hardware=tuner.target.hardware,
        threads=tuner.threads,
    )
    costs = [(record.note or {}).get("cost", 0.0) for record in known if record.versions == versions()]
    return best_record(tuner.records, entry.spec, tuner.target, tuner.threads), round(sum(costs), 1)


def is_known(row: Row | None, options: argparse.Namespace) -> bool:
    """Whether a row need not be measured (again)."""
    if row is None or ((options.seconds or options.recorded) and not row.is_tuned):
        return False
    low, high = row.interval or (1.0, 1.0)
    return bool(high <= options.unsteady * low)


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of every layer that are other than in its file."""
    wanted = {"accuracy": options.accuracy, "n": options.batch, "layout": options.layout}
    return {name: value for name, value in wanted.items() if value is not None}


def stored_as(spec: ConvSpec, dtype: str | None) -> ConvSpec:
    """A layer as networks of another type have it; itself where that is None.

    Of integers, ``i8`` throughout or with src and dst of ``u8``: without zero points and residual, which libraries
    round differently, and with no activation but relu, as a bound of 6 is the type's own, and others stand apart there.
    """
    if dtype not in ("i8", "u8"):
        return spec.with_(dtype=dtype or spec.dtype)
    activation = "relu" if spec.activation_op.name in ("relu", "clip") else "none"
    types = {"src_dtype": dtype, "dst_dtype": dtype}
    return spec.with_(dtype="i8", activation=activation, residual=False, **types)


def variant(stem: str, options: argparse.Namespace) -> str:
    """The name of the files that rows are kept in: another batch, layout, type or target, and cold caches, have their
    own.
    """
    batch = None if options.batch is None else f"n{options.batch}"
    target = options.target.replace(":", "-") if options.target != "cpu" else None
    marks = [batch, options.layout, options.dtype, target, "cold" if options.cold else None]
    return ".".join([stem, *(mark for mark in marks if mark)])


def run(problem: Path, options: argparse.Namespace, console: Console, measurer: Measurer) -> None:
    """Measure what is missing of one file of layers, and write its tables and picture."""
    entries = []
    for entry in read_specs(problem):
        try:
            spec = stored_as(entry.spec, options.dtype).with_(**changes(options))
            entries.append(SpecEntry(spec, entry.count, entry.names))
        except SpecError as error:
            if error.field not in ("ic", "oc"):  # such as three channels in blocks of 16
                raise
            console.print(f"left out {entry.spec}: {error}", markup=False, highlight=False)
    if not entries:
        return
    name = variant(problem.stem, options)
    kept = RowFile(options.results / f"{name}.jsonl")
    wanted = [(entry, threads) for threads in options.threads for entry in entries]
    missing = [
        (entry, threads)
        for entry, threads in wanted
        if options.fresh or not is_known(kept.rows.get((entry.spec.descriptor, threads)), options)
    ]
    # Nothing draws while a layer is timed: the display changes between two of them only.
    quiet = not console.is_terminal
    measured: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, auto_refresh=False, transient=True, disable=quiet) as progress:
            task = progress.add_task(name, total=len(missing))
            for threads in options.threads:
                part = [entry for entry, count in missing if count == threads]
                if part:
                    with Tuner(resolve(options.target), threads, RecordStore(options.records)) as tuner:
                        for entry in part:
                            progress.update(task, description=f"{name} {threads}T {entry.spec}", refresh=True)
                            row = measurer(entry, tuner, options)
                            kept.add(row)
                            measured.append(row)
                            progress.advance(task)
                            done = round(progress.tasks[task].completed)
                            said = f"{report.rated(row)}  {report.limit(row)}  {row.schedule}"
                            progress.print(f"{name} {threads}T {done}/{len(missing)} {entry.spec}: {said}")
    finally:
        if warning := busy_warning(row.busy for row in measured):
            console.print(f"{name}: {warning}")
        if kept.rows:
            in_order = dict.fromkeys(
                (spec.descriptor, threads)
                for accuracy in ACCURACIES
                for spec in (e.spec if e.spec.is_quantised else e.spec.with_(accuracy=accuracy) for e in entries)
                for threads in sorted({key[1] for key in kept.rows})
            )
            kept.compact(in_order)
            rows = [kept.rows[key] for key in in_order if key in kept.rows]
            write_reports(options.results / name, rows)
            console.print(f"wrote {options.results / name}.md and .html")


def write_reports(path: Path, rows: Sequence[Row]) -> None:
    """The tables and the picture of a network, beside its rows."""
    title = f"{path.name}: convgen {convgen.__version__}"
    write_text(report.network(title, rows), path.with_name(path.name + ".md"))
    write_text(bench_page.page(title, rows), path.with_name(path.name + ".html"))


def summarise(results: Path, console: Console) -> None:
    """Write README.md and summary.svg over all rows. The sample's rows, whose layers are in the networks too, and rows
    of another batch, layout or target have a table of their own.
    """
    networks: dict[str, list[Row]] = {}
    checks: dict[str, list[Row]] = {}
    for path in sorted(results.glob("*.jsonl")):
        name, *marks = path.stem.split(".")
        own = networks if name != SAMPLE.stem and marks in ([], ["cold"]) else checks
        own[path.stem] = list(RowFile(path).rows.values())
    write_text(report.summary(networks, checks), results / "README.md")
    write_text(figure.summary(networks), results / "summary.svg")
    console.print(f"wrote {results / 'README.md'} and summary.svg")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("problems", type=Path, nargs="*", help="spec files or ONNX models")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="measure the sample anew, where not given with --threads 1 --seconds 0 --rounds 5",
    )
    parser.add_argument("--summary", action="store_true", help="write this processor's README.md and summary.svg")
    parser.add_argument("--threads", type=threads_listed, default=[1, 2])
    parser.add_argument("--seconds", type=finite, default=30.0, help="tuning time per layer; 0: defaults only")
    parser.add_argument("--recorded", action="store_true", help="take the kernels that --records has instead of tuning")
    parser.add_argument("--accuracy", choices=ACCURACIES, help="accuracy of every layer, instead of its own")
    parser.add_argument("--batch", type=int, metavar="N", help="batch of every layer, instead of its own")
    parser.add_argument("--layout", choices=tuple(BLOCKS), help="layout of every layer, instead of its own")
    parser.add_argument(
        "--dtype",
        choices=("i8", "u8", "bf16"),
        help="how every layer is stored, instead of its own: as integers, of i8 or with src and dst of u8, or as bf16",
    )
    parser.add_argument(
        "--target", default="cpu", help="such as cpu:haswell: the libraries are kept to its vectors too"
    )
    parser.add_argument("--cold", action="store_true", help="empty caches before every timed call")
    parser.add_argument("--peers", type=lambda s: s.split(","), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing; more while a ratio is not clear")
    parser.add_argument("--records", type=Path, help="record store; the default one unless given")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where results are kept")
    parser.add_argument("--fresh", action="store_true", help="measure known rows again")
    parser.add_argument(
        "--unsteady",
        type=float,
        default=math.inf,
        metavar="F",
        help="measure rows again whose ratio's interval spans more than a factor of F: the machine was disturbed",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        if options.problems:
            parser.error("--quick: expected no problems beside it, the sample is what it measures")
        parser.set_defaults(problems=[SAMPLE], fresh=True, threads=[1], seconds=0.0, rounds=5)
        options = parser.parse_args(arguments)
    try:
        for name in options.peers:
            find_peer(name)
        for count in options.threads:
            check_threads(count, resolve())
    except ConvgenError as error:
        parser.error(str(error))
    if not options.problems and not options.summary:
        parser.error("nothing to do: name problems, or give --quick or --summary")
    return options


def main(arguments: Sequence[str] | None = None, measurer: Measurer = tune_and_measure) -> int:
    options = parse(arguments)
    options.results = options.results / processor_slug(machine()) / "layers"
    options.results.mkdir(parents=True, exist_ok=True)

    def work(console: Console) -> None:
        for problem in options.problems:
            run(problem, options, console, measurer)

    if status := exit_status(work):
        return status
    if options.quick:
        print((options.results / f"{variant(SAMPLE.stem, options)}.md").read_text())
    if options.summary:
        summarise(options.results, console_of_bench())
    return 0


if __name__ == "__main__":
    sys.exit(main())
