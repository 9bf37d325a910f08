"""``convgen bench --whole``: whole models beside other libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..formats.entries import AccuracyRule
from ..formats.sources import write_text
from ..report.words import plural
from .common import INTERRUPTED, emit, note, note_busy, say, tidy, whole_accuracy
from .tables import table

if TYPE_CHECKING:
    from ..measure.network_model import NetworkModel
    from ..network.network import Network
    from ..network.plan import Plan
    from ..records.opening import Records
    from ..report.whole import Bench, WholeRow


def whole_bench(
    accuracy: Sequence[AccuracyRule],
    target: str,
    threads: Sequence[int] | None,
    peers: Sequence[str],
    rounds: int,
    records: Records,
    strips: int | None = 0,
) -> Bench:
    """What the options say is measured of each model; ``strips`` as :func:`convgen.compile` takes them."""
    from ..api import compile as compile_network
    from ..hardware.target import check_threads, resolve
    from ..network.network import plan_recorded
    from ..report.whole import Bench

    chosen, resolved = whole_accuracy(accuracy), resolve(target)

    def compiled(model: NetworkModel, count: int) -> Network:
        how: dict[str, Any] = {"accuracy": chosen, "strips": strips, "records": records}
        network: Network = compile_network(model.path, target, count, dims=model.dims, **how)
        return network

    def planned(model: NetworkModel, count: int) -> list[Plan]:
        return plan_recorded(model.path, target, count, model.dims, chosen, strips, records)

    counts = [check_threads(count, resolved) for count in threads or (None,)]
    return Bench(compiled, peers, counts, chosen, resolved.spelling, rounds, planned)


def bench_whole(
    models: Sequence[str], dims: dict[str, int], bench: Bench, rows: Path | None, report: Path | None, as_json: bool
) -> int:
    """Measure models, print what was found, and return the exit status.

    Args:
        rows: a file that keeps them.
        report: a page to write.
    """
    from ..measure.network_model import NetworkModel
    from ..report.whole import whole_file, whole_page

    paths = [existing_model(word) for word in models]
    known, measured, interrupted = whole_file(rows) if rows is not None else None, list[Any](), False
    kept: list[bool] = []
    comparisons = len(paths) * len(bench.threads)
    try:
        with _bar(comparisons, as_json) as advance:
            for path in paths:
                for row, is_new in bench.rows(path.stem, NetworkModel(path, dims), known, partial(advance, path.stem)):
                    measured.append(row)
                    kept.append(not is_new)
                    advance(path.stem, "measured", 1)
    except KeyboardInterrupt:
        interrupted = True
    if report is not None and measured:
        write_text(whole_page(measured), report)
        note(f"wrote {tidy(report)}")
    if as_json:
        emit({"interrupted": interrupted, "rows": [dict(row.values) for row in measured], "kept": kept})
    else:
        _print(measured, [_origin(row, rows if was else None) for row, was in zip(measured, kept, strict=True)])
    note_busy((row.busy for row in measured), [row.threads for row in measured])
    if interrupted:
        note(f"convgen: interrupted: {len(measured)} of {comparisons} comparisons made")
        return INTERRUPTED
    return 0


def existing_model(word: str) -> Path:
    """The file of a model."""
    path = Path(word)
    if not path.is_file():
        raise click.UsageError(f"--whole: expected files of ONNX models, found {word!r}")
    return path


@contextmanager
def _bar(total: int, quiet: bool) -> Iterator[Any]:
    """A bar on a terminal; gives what is told a model's name, what happens next, and how many comparisons are made."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..measure.standalone.words import one_line

    # It is drawn only when something is told: what is timed meanwhile is not disturbed.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    off = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False, disable=off) as bar:
        task = bar.add_task("", total=total)

        def advance(name: str, phase: str, made: int = 0) -> None:
            bar.update(task, description=one_line(f"{name}: {phase}"), advance=made, refresh=True)

        yield advance


def _origin(row: WholeRow, file: Path | None) -> str:
    """From where a row's figures are, behind its model; nothing where they were measured now."""
    return "" if file is None else f"; of {row.values['date']}, from {tidy(file)}"


def _print(rows: Sequence[WholeRow], origins: Sequence[str]) -> None:
    """For each model and number of threads, and from where its figures are, a line per library; then the geometric
    mean.
    """
    from ..report.whole import lines_of, summary

    header = ["library", "in", "ms>", "of convgen>", "not timed"]
    for row, origin in zip(rows, origins, strict=True):
        say(f"{row.model}, {plural(row.threads, 'thread')}{origin}\n\n{table(header, lines_of(row))}\n")
    for threads in dict.fromkeys(row.threads for row in rows):
        chosen = [row for row in rows if row.threads == threads]
        if len(chosen) > 1:
            for line in summary(chosen):
                say(f"{plural(threads, 'thread')}: {line}")
