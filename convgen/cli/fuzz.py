"""``convgen fuzz``: random layers and candidates, or whole networks, through the full validation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ..errors import meant
from ..problem.tokens import DIRECTIONS
from ..report.words import plural
from .common import (
    FAILED,
    INTERRUPTED,
    NON_NEGATIVE,
    OK,
    duration,
    emit,
    json_option,
    note,
    say,
    schedule_option,
    target_option,
    threads_option,
)
from .completion import list_of
from .tables import table
from .view import LOG_SECONDS

if TYPE_CHECKING:
    from collections import Counter

    from ..check.fuzz.run import Finding, Summary


def parse_numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Numbers joined by commas."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise click.BadParameter(f"expected numbers such as 0,3, found {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def parse_directions(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    """Directions joined by commas."""
    parts = tuple(dict.fromkeys(text.split(","))) if text is not None else ()
    for part in parts:
        if part not in DIRECTIONS:
            known = ", ".join(DIRECTIONS)
            raise click.BadParameter(f"expected some of {known}, found {part!r}{meant(part, DIRECTIONS)}")
    return parts


#: Seconds of a run that neither --seconds nor --specs limits.
SECONDS = 60.0


@click.command(short_help="Check random layers and candidates; shrink what fails.")
@click.option(
    "--seconds",
    type=NON_NEGATIVE,
    metavar="S",
    help="How long to run.  [default: 60, or no limit with --specs]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything that is drawn."
)
@click.option(
    "--start", type=click.IntRange(min=0), default=0, show_default=True, help="Number of the first spec to check."
)
@click.option("--specs", type=click.IntRange(min=1), metavar="N", help="How many specs to check.")
@target_option
@threads_option("Threads that a kernel runs on.  [default: drawn]")
@schedule_option("Draw candidates of this schedule only.")
@click.option(
    "--directions",
    callback=parse_directions,
    shell_complete=list_of(DIRECTIONS),
    metavar="D,D",
    help="Draw layers of these alone: forward, data, weights.  [default: mostly forward]",
)
@click.option(
    "--integers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Draw layers of integers alone; check the values of each candidate with the data of N seeds.",
)
@click.option("--networks", is_flag=True, help="Draw small networks of all operators that compile takes.")
@click.option(
    "--nodes", callback=parse_numbers, metavar="N,N", help="With --networks: keep only nodes with these numbers."
)
@click.option(
    "--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="How many candidates to check at once."
)
@json_option
def fuzz(
    seconds: float | None,
    seed: int,
    start: int,
    specs: int | None,
    target: str,
    threads: int | None,
    schedule: str | None,
    directions: tuple[str, ...],
    integers: int | None,
    networks: bool,
    nodes: tuple[int, ...] | None,
    workers: int,
    as_json: bool,
) -> int:
    """Check random layers and candidates as validate does; shrink what fails.

    Draws small layers of every kind, mostly with sizes that differ by one from a schedule's tiles, and
    builds each with the default and with random picks of the schedules that apply. What fails, crashes
    or hangs is simplified as long as it still fails in the same way, and printed as the command that
    repeats it. A spec and its candidates depend on --seed and the spec's number alone: to see a spec
    again, give its number to --start, with --specs 1.

    With --integers it checks less of more layers: it compares values alone, in one process, and with many zero points
    and scales for each candidate. How many layers differ in these or their specs is counted.

    With --networks the same with small networks, which are compiled whole: --specs and --start count those. One that
    fails is simplified to those of its nodes that are needed for that.

    The exit status is 1 where anything was found. Ctrl-C ends the run and prints what was found so far.
    """
    from ..check.fuzz.kernels import Kernels
    from ..check.fuzz.run import Fuzzer, Subject

    if (networks and (schedule or directions or integers)) or (nodes and not networks):
        raise click.UsageError(
            "--networks takes no --schedule, --directions and --integers, and --nodes is of networks"
        )
    if integers and directions not in ((), ("forward",)):
        raise click.UsageError("--integers takes no --directions: layers of integers are forward")
    if seconds is None and specs is None:
        seconds = SECONDS
    subject: Subject
    if networks:
        from ..network.check.fuzz import Networks  # imports ONNX Runtime

        subject = Networks(target, threads=threads, nodes=nodes)
    else:
        subject = Kernels(target, threads=threads, schedule=schedule, directions=directions, seeds=integers or 0)
    fuzzer = Fuzzer(seed, subject, workers=workers)
    with _progress() as show:
        summary = fuzzer.run(seconds=seconds, specs=specs, start=start, progress=show)
    if as_json:
        emit(summary.to_dict())
    else:
        say(_text(summary, networks))
    if summary.interrupted:
        note("convgen: interrupted")
    if summary.findings:
        return FAILED
    return INTERRUPTED if summary.interrupted else OK


@contextmanager
def _progress() -> Iterator[Callable[[Summary], None]]:
    """Gives what shows how far a run is: a status line on a terminal, log lines anywhere else.

    What is found is said at once, not to be lost where a long run is killed.
    """
    said = 0

    def news(summary: Summary) -> list[str]:
        nonlocal said
        found, said = summary.findings[said:], len(summary.findings)
        return [f"found: {finding.kind}: {finding.message}; {finding.command}" for finding in found]

    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True, highlight=False).status("") as status:

            def draw(summary: Summary) -> None:
                for line in news(summary):
                    note(line)  # above the status line, which takes in what is written to stderr
                status.update(_line(summary))

            yield draw
        return
    last = time.monotonic()

    def log(summary: Summary) -> None:
        nonlocal last
        for line in news(summary):
            note(line)
        if time.monotonic() - last >= LOG_SECONDS:
            last = time.monotonic()
            note(_line(summary))

    yield log


def _line(summary: Summary) -> str:
    counts = {"spec": summary.specs, "candidate": summary.candidates, "finding": len(summary.findings)}
    texts = [plural(count, name) for name, count in counts.items()]
    return f"{', '.join(texts)} in {summary.seconds:.0f} s"


def _text(summary: Summary, networks: bool) -> str:
    """What was checked: of kernels a table by schedule and operator; the other counts, and every finding."""
    if networks:
        worst = summary.errors.get("network", 0.0)
        lines = [f"operators: {_counts(summary.operators)}", f"largest error: {worst:.3f} of its bound"]
    else:
        lines = [_candidates(summary), ""]
    for name, counts in (("dtypes", summary.dtypes), ("features", summary.features), ("checks", summary.checks)):
        lines.append(f"{name}: {_counts(counts)}")
    if summary.layers:
        lines.append(f"layers that differ in spec, zero points or scales: {len(summary.layers)}")
    lines += [f"skipped {count}×: {why}" for why, count in sorted(summary.skipped.items())]
    lines.append(f"slowest: {duration(summary.slowest[0])} {summary.slowest[1]}")
    lines += [f"seed {summary.seed} from {summary.start} on {summary.target}: {_line(summary)}"]
    lines += [_finding(finding) for finding in summary.findings]
    return "\n".join(lines)


def _candidates(summary: Summary) -> str:
    """A table of candidates by schedule and operator."""
    operators = sorted(summary.operators)
    rows: list[list[object]] = [
        [name, *(counts[operator] for operator in operators), counts.total(), f"{summary.errors[name]:.3f}"]
        for name, counts in sorted(summary.schedules.items())
    ]
    rows.append(["specs", *(summary.operators[operator] for operator in operators), summary.specs, ""])
    header = ["candidates", *(f"{operator}>" for operator in operators), "all>", "error/bound>"]
    return table(header, rows)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _finding(finding: Finding) -> str:
    """What was found, and the command that repeats it."""
    from ..check.fuzz.outcome import KINDS

    lines = [f"\n{finding.kind}: {KINDS[finding.kind]}", f"  {finding.message}", f"  repeat with: {finding.command}"]
    if finding.drawn and finding.drawn.command != finding.command:
        lines.append(f"  shrunk from: {finding.drawn.command} (spec {finding.index})")
    if finding.repeats is False:
        lines.append("  it did not fail when it was checked again")
    return "\n".join(lines)
