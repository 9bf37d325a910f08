"""``convgen records``: the store of tuning records."""

from __future__ import annotations

import random
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RecordError, SpecError, meant
from ..measure.standalone.words import printable
from ..problem.spec import ConvSpec
from ..report.words import picks_text
from .common import (
    FAILED,
    NON_NEGATIVE,
    OK,
    TROUBLE,
    duration,
    emit,
    emit_each,
    emit_text,
    json_option,
    note,
    rate,
    say,
    store_option,
    tidy,
)
from .completion import one_of, outcomes_beginning
from .databases import measured_again, prune_database
from .tables import Table, say_table, table
from .wanted import Wanted, filters, separable

if TYPE_CHECKING:
    from ..records.answer import Answer
    from ..records.record import TuningRecord
    from ..records.store import Filters, RecordStore
    from ..tuning.recheck import Checked

#: Records that a table shows at most, where nobody says how many.
SHOWN = 1000


@click.group()
def records() -> None:
    """Look at tuning records, and move them between machines."""


def _open(path: Path | None, *, write: bool = False) -> RecordStore:
    """A store to read, or to change: one that was named must exist."""
    from ..records.store import RecordStore

    if path is not None and write and not path.exists():
        raise RecordError(f"{path}: no such file")
    return RecordStore(path, readonly=path is not None and not write)


# ---- how they are shown -----------------------------------------------------------------------


def _gflops(record: TuningRecord) -> str:
    try:
        return rate((separable(record.spec) or ConvSpec.parse(record.spec)).flops, record.seconds)
    except SpecError:  # of another version
        return "–"


def _rows(records: Iterable[TuningRecord], origins: Iterable[str] = ()) -> Table:
    rows = []
    for record in records:
        time = duration(record.seconds) if record.outcome == "ok" else record.outcome
        candidate = f"{record.schedule}({picks_text(record.picks)})"
        rows.append([record.id[:12], record.spec, record.threads, time, _gflops(record), candidate])
    for row, origin in zip(rows, origins, strict=False):
        row.append(origin)
    header = ["id", "spec", "threads>", "time>", "GFLOP/s>", "candidate", *(["origin"] if origins else [])]
    return table(header, rows)


def _say(document: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        emit(document)
    else:
        say(text)


# ---- looking ----------------------------------------------------------------------------------


@records.command("list", short_help="List the records, those added last at the end.")
@filters
@click.option(
    "--outcome",
    shell_complete=one_of(outcomes_beginning),
    metavar="NAME",
    help="Only this outcome: ok, build_error, crash, timeout, memory, wrong or run_error.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help=f"Only the N added last.  [default: {SHOWN}; with --json all]",
)
@store_option("path")
@json_option
def list_(path: Path | None, outcome: str | None, limit: int | None, as_json: bool, **wanted: Any) -> int:
    """List the records of some layers or of all, in the order in which they were added."""
    from ..records.record import OUTCOMES

    if outcome is not None and outcome not in OUTCOMES:
        raise click.UsageError(
            f"--outcome: expected one of {', '.join(OUTCOMES)}, found {outcome!r}{meant(outcome, OUTCOMES)}"
        )
    asked = Wanted.of(**wanted)
    with _open(path) as store:
        which: Filters = {**asked.among(store).filters, "outcome": outcome}
        if as_json:
            found = store.each(**which) if limit is None else store.trials(limit=limit, **which)
            emit_each(record.to_dict() for record in found)
            return asked.status()
        shown = store.trials(limit=limit or SHOWN, **which)
        outcomes = store.outcomes(**which)
    if shown:
        say_table(_rows(shown))
    kinds = f": {', '.join(f'{count} {kind}' for kind, count in outcomes.most_common())}" if outcomes else ""
    rest = outcomes.total() - len(shown)
    older = f"; {rest} added before these are not shown (--limit N shows more)" if rest > 0 else ""
    hint = "" if outcomes else asked.hint
    note(f"{outcomes.total()} records in {tidy(store.path)}{kinds}{older}{hint}")
    return asked.status()


@records.command(short_help="Show the records that builds would use here.")
@filters
@store_option("path")
@json_option
def best(path: Path | None, as_json: bool, **wanted: Any) -> int:
    """Show which records builds on this machine would use, for some layers or for all in the store.

    For layers that are named, the records that ship with convgen count too. A record of other versions
    of convgen, TVM or LLVM is not shown: a build would measure it again first.
    """
    which = Wanted.of(**wanted)
    with _open(path) as store:
        answers = list(which.among(store).answers(store))
    for answer in answers:
        if answer.doubted:
            note(f"convgen: {answer.note}")
    found = [answer for answer in answers if answer.record]
    chosen = [answer.record for answer in found if answer.record]
    if as_json:
        emit([record.to_dict() for record in chosen])
    elif found:
        say_table(_rows(chosen, [answer.origin for answer in found]))
    else:
        note(f"no record for this machine and these versions in {tidy(store.path)}{which.hint}")
    return which.status()


@records.command(short_help="Show all of one record.")
@click.argument("prefix", metavar="ID")
@store_option("path")
@json_option
def show(prefix: str, path: Path | None, as_json: bool) -> None:
    """Show everything about the record whose id begins with ID, and the command that builds its kernel."""
    from ..records.answer import reason_against
    from ..records.doubt import disbelief
    from ..records.strips import is_height

    with _open(path) as store:
        record = store.find(prefix.lower())
        reason = reason_against(record) or disbelief(record, store)
    command = ["convgen", "build", *record.spec.split(), "--target", record.target, "--threads", str(record.threads)]
    if is_height(record):
        command += ["--strips", str(record.picks.get("rows"))]
    else:
        command += ["--schedule", record.schedule, *(["--picks", picks_text(record.picks)] if record.picks else [])]
    if as_json:
        emit(record.to_dict() | {"command": shlex.join(command), "reason_against": reason or None})
        return
    lines = {
        "record": record.id,
        "trial": record.trial_key,
        "spec": record.spec,
        "target": record.target,
        "hardware": record.hardware,
        "threads": record.threads,
        "candidate": f"{record.schedule} version {record.schedule_version} ({picks_text(record.picks)})",
        "outcome": record.outcome + (f": {record.error}" if record.error else ""),
        "time": f"{duration(record.seconds)}, {_gflops(record)} GFLOP/s" if record.seconds else "",
        "samples": " ".join(duration(seconds).replace(" ", "") for seconds in record.samples),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items())),
        "when": record.when,
        **{f"  {printable(name)}": value for name, value in sorted((record.note or {}).items()) if value is not None},
        "answers here": f"no: {reason}" if reason else "yes, where no other record is preferred",
        "build it": shlex.join(command),
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        if value != "":
            below = "\n" + " " * (width + 2)  # so that no value looks like another line
            say(f"{name:<{width}}  {str(value).replace(chr(10), below)}")


@records.command(short_help="Compare two stores.")
@click.argument("first", type=click.Path(dir_okay=False, path_type=Path), metavar="STORE_A")
@click.argument("second", type=click.Path(dir_okay=False, path_type=Path), metavar="STORE_B")
@filters
@json_option
def diff(first: Path, second: Path, as_json: bool, **wanted: Any) -> int:
    """Compare two stores: the records that only one of them has, and the best of each problem.

    A ratio is the time of A's best over that of B's: above 1, B's is faster.
    """
    from ..records.answer import preferred
    from ..records.store import RecordStore

    which = Wanted.of(**wanted)
    only: list[list[dict[str, Any]]] = [[], []]
    counts, common, rows = [0, 0], 0, list[dict[str, Any]]()
    with RecordStore(first, readonly=True) as a, RecordStore(second, readonly=True) as b:
        which = which.among(a, b)
        for place in sorted({*a.problems(**which.filters), *b.problems(**which.filters)}):
            problem = dict(zip(("spec", "target", "hardware", "threads"), place, strict=True))
            sides = [which.trials(store, *place) for store in (a, b)]
            ids = [{record.id for record in side} for side in sides]
            common += len(ids[0] & ids[1])
            for i in (0, 1):
                counts[i] += len(ids[i] - ids[1 - i])
                if as_json:
                    only[i] += [record.to_dict() for record in sides[i] if record.id not in ids[1 - i]]
            best = [preferred(side) for side in sides]
            seconds = [record.seconds if record else None for record in best]
            rows.append(
                problem
                | {"a": best[0].id if best[0] else None, "b": best[1].id if best[1] else None, "seconds": seconds}
                | {"ratio": seconds[0] / seconds[1] if seconds[0] and seconds[1] else None}
            )
    if as_json:
        emit({"only": dict(zip("ab", only, strict=True)), "common": common, "problems": rows})
        return which.status()
    if rows:
        hardware = len({row["hardware"] for row in rows}) > 1
        cells = [
            [row["spec"], row["target"], row["hardware"] if hardware else "", row["threads"]]
            + [duration(seconds) for seconds in row["seconds"]]
            + [f"{row['ratio']:.3f}" if row["ratio"] else "–"]
            for row in rows
        ]
        say_table(table(["spec", "target", "hardware", "threads>", "A>", "B>", "A/B>"], cells))
    note(f"{counts[0]} records only in {tidy(first)}, {counts[1]} only in {tidy(second)}")
    note(f"{common} records in both")
    return which.status()


# ---- upkeep -----------------------------------------------------------------------------------


@records.command(short_help="Check the store and every record.")
@filters
@click.option("--measure", type=click.IntRange(1), metavar="N", help="Also measure N of the best records again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the choice of these N records.")
@store_option("path")
@json_option
def check(path: Path | None, measure: int | None, seed: int, as_json: bool, **wanted: Any) -> int:
    """Check the store's structure, and every record against its hashes.

    Records that would answer builds here and are not believed are listed: those dated after now, or far too slow.
    A build measures them again.

    With --measure, N of the records that builds of the layers asked for would use here are built again,
    validated against ONNX Runtime, and timed in turn with the defaults of their layers. The exit status is 1
    where such a kernel is wrong or certainly slower than the default, and 3 where the store is damaged.
    """
    which = Wanted.of(**wanted)
    with _open(path) as store:
        found = store.check()
        which = which.among(store) if found.ok else which
        answers = list(which.answers(store)) if found.ok else []
        checked = _measured(which, answers, measure, seed) if measure else []
    doubted = [record for answer in answers for record in answer.doubted]
    document = {"file": str(store.path), "rows": found.rows, "ok": found.ok, "problems": list(found.problems)}
    document["not_believed"] = [{"id": id_, "reason": reason} for id_, reason in doubted]
    if measure:
        document["measured"] = [asdict(result) | {"record": result.record.to_dict()} for result in checked]
    state = "damaged" if not found.ok else f"all whole, {len(doubted)} not believed" if doubted else "all whole"
    _say(document, f"{found.rows} records in {tidy(store.path)}: {state}", as_json)
    for id_, reason in doubted:
        note(f"convgen: record {id_[:12]} is not believed: it is {reason}")
    if not found.ok:
        for problem in found.problems:
            note(f"convgen: {problem}")
        note("convgen: `convgen records recover DAMAGED INTO` saves what is readable")
        return TROUBLE
    bad = [result for result in checked if result.outcome != "ok"]
    if measure and not as_json:
        say(f"{len(checked)} measured again: {len(checked) - len(bad)} right and no slower than the default")
    return FAILED if bad else which.status()


def _measured(which: Wanted, answers: Sequence[Answer], count: int, seed: int) -> list[Checked]:
    from ..hardware.target import resolve
    from ..records.strips import is_height

    best = [answer.record for answer in answers if answer.record and not is_height(answer.record)]
    sample = random.Random(seed).sample(best, min(count, len(best)))
    return measured_again(sample, resolve(which.target or "cpu"))


@records.command(short_help="Drop records that can no longer answer.")
@filters
@click.option("--keep", type=click.IntRange(1), default=16, show_default=True, help="How many of each problem stay.")
@click.option(
    "--days",
    type=NON_NEGATIVE,
    default=180,
    show_default=True,
    help="Age in days at which records of other versions go.",
)
@click.option(
    "--database",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Prune FILE, which `export --note` wrote, instead of a store: what no build takes goes.",
)
@click.option("--measure", is_flag=True, help="With --database: measure again; what is slower than the default goes.")
@click.option("--yes", is_flag=True, help="Drop them; without it, only say what would go.")
@store_option("path")
@json_option
def prune(
    path: Path | None,
    keep: int,
    days: float,
    database: Path | None,
    measure: bool,
    yes: bool,
    as_json: bool,
    **wanted: Any,
) -> int:
    """Drop records that no build will use, now or later.

    A record goes if its schedule has another version now; if it is of another version of convgen, TVM or LLVM
    and failed or is older than --days; or if it is not among the --keep fastest of its problem (layer, target,
    machine, threads). The final comparisons and the failures of the present versions stay. Dropped trials no
    longer count as trials of a job.
    """
    from ..records.pruning import prunable
    from ..records.record import now

    if database is not None:
        if path is not None or any(wanted.values()):
            raise click.UsageError("--database prunes all of a file: expected neither --records nor layers beside it")
        _say_pruned(database, *prune_database(database, measure, yes), as_json)
        return OK
    if measure:
        raise click.UsageError("--measure needs --database FILE")
    which = Wanted.of(**wanted)
    with _open(path, write=yes) as store:
        which = which.among(store)
        counts, dropped = Counter[str](), list[str]()
        for problem in which.problems(store):
            for reason, found in prunable(problem, keep=keep, days=days, now=now()).items():
                counts[reason] += len(found)
                dropped += [record.id for record in found]
        removed = store.remove(dropped, compact=True) if yes and dropped else 0
        total = len(store)
    _say_pruned(store.path, counts, total, removed if yes else None, as_json)
    return which.status()


def _say_pruned(path: Path, counts: Counter[str], total: int, removed: int | None, as_json: bool) -> None:
    """Say what went, or would go where nothing was ``removed``, for which reasons; ``total`` records are there now."""
    if not as_json:
        for reason, count in sorted(counts.items()):
            note(f"{count} {reason}")
    would = counts.total()
    said = f"{would} to drop (--yes does it), {total - would}" if removed is None else f"{removed} dropped, {total}"
    reasons = dict(sorted(counts.items()))
    document = {"file": str(path), "reasons": reasons, "removed": removed or 0, "records": total}
    _say(document, f"{said} stay in {tidy(path)}", as_json)


@records.command()
@click.argument("damaged", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("into", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def recover(damaged: Path, into: Path, as_json: bool) -> None:
    """Save what can be read of a DAMAGED store INTO another store."""
    from ..records.store import RecordStore

    found = RecordStore.recover(damaged, into)
    text = f"{found.saved} records saved in {tidy(into)}, {found.lost} lost"
    if found.missing_pages:
        text += f"; {found.missing_pages} pages of the file are missing: there may have been more"
    document = {"saved": found.saved, "lost": found.lost, "missing_pages": found.missing_pages, "into": str(into)}
    _say(document, text, as_json)


# ---- travelling -------------------------------------------------------------------------------


@records.command(short_help="Add the records of other stores (SQLite files).")
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="STORE…")
@store_option("path")
@json_option
def merge(stores: tuple[Path, ...], path: Path | None, as_json: bool) -> None:
    """Add the records of other stores, SQLite files as --records names them; a record that is in several stays once.

    Lines of JSON, as `convgen records export` writes them, are for `convgen records import`; the results of a bundle,
    .results.jsonl, for `convgen fleet import`.
    """
    from ..records.opening import open_to_fill
    from ..records.store import default_path

    where = path or default_path()
    with open_to_fill(where) as store:
        added = {str(other): store.merge(other) for other in stores}
        total = len(store)
    _say({"added": added, "records": total}, f"{sum(added.values())} added, {total} in {tidy(where)}", as_json)


@records.command(short_help="Write records as lines of JSON.")
@filters
@click.option("--best", "best_only", is_flag=True, help="Only the records that builds on this machine would use.")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    metavar="FILE",
    help="File to write.  [default: -, standard output]",
)
@click.option(
    "--note",
    "about",
    metavar="TEXT",
    help="Describe FILE in a .json beside it, as the records that ship with convgen are described.",
)
@store_option("path")
@json_option
def export(
    best_only: bool, out: Path | None, about: str | None, path: Path | None, as_json: bool, **wanted: Any
) -> int:
    """Write records, one JSON object per line: all, those of some layers, or the best.

    `convgen records export --best MODEL.onnx > tuned.jsonl` makes a file that, imported on another machine of
    the same kind, lets builds of the model's layers reach the same kernels without a search.
    """
    from ..records import shipped
    from ..records.record import write_lines

    to_file = out is not None and str(out) != "-"
    if not to_file and (as_json or about is not None):
        raise click.UsageError(f"{'--json' if as_json else '--note'} needs --out FILE")
    which = Wanted.of(**wanted)
    with _open(path) as store:
        which = which.among(store)
        found: Iterable[TuningRecord] = store.each(oldest_first=True, **which.filters)
        if best_only:
            best = {answer.record for answer in which.answers(store) if answer.record}
            found = sorted(best, key=lambda record: (record.when, record.id))
        count = 0

        def counted() -> Iterator[TuningRecord]:
            nonlocal count
            for record in found:
                count += 1
                yield record

        if out is None or not to_file:
            for record in counted():
                emit_text(record.to_json())
            note(f"{count} records{'' if count else which.hint}")
            return which.status()
        if about is None:
            write_lines(out, counted())
        else:
            kept = list(counted())
            shipped.write(out, kept, shipped.Origin.of(kept, wanted["sources"], about))
    hint = "" if count else which.hint
    _say({"exported": count, "file": str(out)}, f"{count} records in {tidy(out)}{hint}", as_json)
    return which.status()


@records.command("import", short_help="Add the records of a file of JSON lines, all or none.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@store_option("path")
@json_option
def import_(file: Path, path: Path | None, as_json: bool) -> None:
    """Add the records of FILE, lines of JSON as `convgen records export` writes them. Each is checked; where one is
    wrong, none is added.

    Whole stores, SQLite files, are for `convgen records merge`; the results of a bundle, .results.jsonl, for `convgen
    fleet import`.
    """
    from ..records.opening import open_to_fill
    from ..records.store import default_path

    where = path or default_path()
    with open_to_fill(where) as store:
        added, total = store.import_(file), len(store)
    _say({"added": added, "records": total}, f"{added} added, {total} in {tidy(where)}", as_json)
