"""``convgen bench``: kernels beside other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BuildError, MeasureError
from ..formats.entries import AccuracyRule, SpecEntry
from ..formats.sources import write_text
from ..report.words import plural
from .common import (
    FAILED,
    INTERRUPTED,
    candidate_options,
    check_names,
    check_page,
    check_picks,
    chosen_records,
    duration,
    emit,
    forced_candidates,
    json_option,
    label,
    layers_argument,
    layers_of,
    note,
    note_busy,
    records_options,
    say,
    skip_option,
    status_of,
    target_option,
    thread_counts_option,
    tidy,
)
from .completion import list_of
from .generate import Work, chosen, describe, working
from .separable import bench_separable
from .separable_options import separable_of
from .tables import table

if TYPE_CHECKING:
    from ..kernel.kernel import Kernel
    from ..lowering.schedule import Candidate
    from ..report.rows import Row

#: Names in :data:`convgen.measure.peers.PEERS`, which is not imported for a wrong argument.
PEER_NAMES = ("onnxruntime", "torch", "openvino", "ncnn")


@click.command()
@layers_argument
@skip_option
@target_option
@thread_counts_option("Thread counts, such as 1,2.  [default: all cores]")
@click.option(
    "--peers",
    default=",".join(PEER_NAMES),
    show_default=True,
    shell_complete=list_of(PEER_NAMES),
    metavar="NAME,…",
    help="Libraries to compare with.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=7,
    show_default=True,
    help="Rounds of timing; up to three times as many while the ratio is not clear.",
)
@click.option("--cold", is_flag=True, help="Empty the caches before every call that is timed.")
@click.option("--whole", is_flag=True, help="Time whole models, each compiled to one library, not their layers.")
@click.option(
    "--rows",
    "kept_rows",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.jsonl",
    help="With --whole: keep what is measured in a file; what it has already is not measured again.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_page,
    metavar="FILE",
    help="Also write the figures to a file: FILE.md as tables, FILE.html as a page, which is of layers only.",
)
@records_options
@candidate_options
@json_option
def bench(
    spec: tuple[str, ...],
    dims: dict[str, int],
    accuracy: tuple[AccuracyRule, ...],
    skip: bool,
    target: str,
    threads: tuple[int, ...] | None,
    peers: str,
    repeats: int,
    cold: bool,
    whole: bool,
    kept_rows: Path | None,
    report: Path | None,
    records: Path | None,
    no_records: bool,
    schedule: str | None,
    picks: str | None,
    as_json: bool,
) -> int:
    """Time kernels beside ONNX Runtime, PyTorch, OpenVINO and ncnn.

    All get the same data and threads, and run in turn for several rounds; a time is the median of the
    rounds. A ratio is the best peer's time over convgen's, above 1 where convgen is faster, with its
    95 % confidence interval. The limit is the roofline of `convgen show`. A peer is timed only after its
    output was checked; one that is far behind after two rounds is not timed any further.

    Each layer's kernel comes from its best record, and its default is timed beside it. Without a record
    the kernel is the default.

    With --whole models are compiled as `convgen compile` does, and timed as wholes; the ratio is about the fastest
    peer that computes in f32. So is a separable problem.
    """
    check_picks(schedule, picks)
    names = check_names("--peers", peers, PEER_NAMES)
    kept = chosen_records(records, no_records)
    separable = separable_of(spec, accuracy)
    if whole or separable is not None:
        from .whole import bench_whole, whole_bench

        if cold or schedule or (report is not None and report.suffix != ".md"):
            raise click.UsageError("--whole: expected neither --cold nor --schedule, and FILE.md for --report")
        if separable is not None:
            rules = [AccuracyRule(separable.depthwise.accuracy)]
            measured = whole_bench(rules, target, threads, names, repeats, kept, strips=None)
            return bench_separable(separable, measured, kept_rows, report, as_json)
        measured = whole_bench(accuracy, target, threads, names, repeats, kept)
        return bench_whole(spec, dims, measured, kept_rows, report, as_json)
    if kept_rows is not None:
        raise click.UsageError("--rows needs --whole")
    (entries,), left_out = layers_of([" ".join(spec)], dims, accuracy)
    rows: list[Row] = []
    kernels: list[Kernel] = []
    failed: list[dict[str, Any]] = []
    interrupted = False
    counts: list[int | None] = [*threads] if threads else [None]
    for count in counts:
        with working(entries, target, count, kept) as work:
            forced = forced_candidates(entries, work.target, schedule, picks)
            for entry, candidate in zip(work.layers(), forced, strict=True):
                try:
                    kernel, row = _bench_layer(work, entry, candidate, names, repeats, cold)
                except (BuildError, MeasureError) as error:
                    failed.append({**describe(entry), "threads": work.threads, "error": str(error)})
                    work.view.finish(f"failed: {error}")
                    continue
                kernels.append(kernel)
                rows.append(row)
                work.view.finish(_line(row))
        interrupted = work.interrupted
        if interrupted:
            break

    if report is not None and rows:
        _write_report(report, " ".join(spec), rows)
    if as_json:
        facts = {"target": work.target.spelling, "interrupted": interrupted}
        emit(facts | _document(kernels, rows) | {"failed": failed, "skipped": left_out})
    elif rows:
        say(_text(entries, rows))
    note_busy((row.busy for row in rows), [kernel.threads for kernel in kernels])
    if interrupted:
        note(f"convgen: interrupted: {len(rows)} of {len(entries) * len(counts)} comparisons made")
        return INTERRUPTED
    return _status(failed) or status_of(left_out, skip)


def _status(failed: list[dict[str, Any]]) -> int:
    """The exit status of what failed, which is said."""
    for result in failed:
        note(f"convgen: {result['spec']}: {result['error']}")
    return FAILED if failed else 0


def _document(kernels: list[Kernel], rows: list[Row]) -> dict[str, Any]:
    """The comparisons as JSON values."""
    layers = [_layer(kernel, row) for kernel, row in zip(kernels, rows, strict=True)]
    return {"layers": layers, "totals": _totals(rows)}


def _bench_layer(
    work: Work, entry: SpecEntry, forced: Candidate | None, peers: list[str], repeats: int, cold: bool
) -> tuple[Kernel, Row]:
    from ..hardware.target import check_native
    from ..kernel.kernel import compile_candidate
    from ..lowering.candidates import default_candidate
    from ..report.rows import measure

    if not work.target.on_device:
        check_native(work.target)
    kernels = {"convgen": work.kernel(entry, forced)}
    default = default_candidate(entry.spec, work.target)
    if kernels["convgen"].lowered.candidate != default:
        kernels["default"] = compile_candidate(entry.spec, work.target, default, work.threads)
    work.view.phase(f"timing {', '.join([*kernels, *peers])} on {work.threads} threads")
    return kernels["convgen"], measure(entry, kernels, peers, work.threads, rounds=repeats, cold=cold)


def _layer(kernel: Kernel, row: Row) -> dict[str, Any]:
    """A row as JSON values, with how the kernel was made and what it reaches."""
    return {
        **row.values,
        **chosen(kernel),
        "seconds": row.seconds,
        "gflops": row.gflops,
        "percent_of_limit": None if row.of_limit is None else 100 * row.of_limit,
    }


def _totals(rows: list[Row]) -> list[dict[str, Any]]:
    """Per thread count, as JSON values: the time of all layers with their counts (convgen's, and each peer's that ran
    them all) and the geometric mean of the ratios.
    """
    from ..report.tables import Totals, by_threads

    totals_by_threads = []
    for threads, group in by_threads(rows).items():
        totals = Totals.of(group)
        peers = {name: seconds for name, seconds in totals.peers.items() if seconds}
        totals_by_threads.append(
            {"threads": threads, "convgen": totals.seconds, "peers": peers, "mean_ratio": totals.mean}
        )
    return totals_by_threads


def _line(row: Row) -> str:
    from ..report.tables import limit, rated

    facts = f"{duration(row.seconds)}  {row.gflops:.4g} GFLOP/s  {limit(row)}"
    return f"{facts}  {rated(row)} {row.values['best_peer'] or ''}".rstrip()


def _text(entries: list[SpecEntry], rows: list[Row]) -> str:
    """Per thread count a row per layer and the totals; then why peers were not timed."""
    from ..report.tables import ABOVE_NOTE, Totals, by_threads, layers, problems

    names = {
        entry.spec.descriptor: label(entry) if entry.names else f"{entry.spec} {label(entry)}".rstrip()
        for entry in entries
    }
    lines = []
    for threads, group in by_threads(rows).items():
        header, cells = layers(group, lambda row: names[row.values["spec"]])
        lines += [f"{plural(threads, 'thread')}, times in µs", "", table(header, cells)]
        lines += Totals.of(group).sentences() if len(group) > 1 else []
        lines.append("")
    if any((row.of_limit or 0) > 1 for row in rows):
        lines.append(ABOVE_NOTE)
    return "\n".join([*lines, *problems(rows)]).rstrip()


def _write_report(path: Path, title: str, rows: list[Row]) -> None:
    from importlib.metadata import version  # loads email and zipfile, a seventh of the start-up time

    from ..report.bench_page import page
    from ..report.tables import network

    written = network if path.suffix == ".md" else page
    write_text(written(f"{title}: convgen {version('convgen')}", rows), path)
    note(f"wrote {tidy(path)}")
