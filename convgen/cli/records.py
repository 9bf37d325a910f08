"""``convgen records``: the store of tuning records."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import (
    TROUBLE,
    duration,
    emit,
    json_option,
    note,
    rate,
    read_layers,
    table,
    target_option,
    tidy,
)

if TYPE_CHECKING:
    from ..records import RecordStore, TuningRecord

store_option = click.option(
    "--records",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Record store.  [default: $CONVGEN_RECORDS, or one in the user's cache]",
)


@click.group()
def records() -> None:
    """Look at tuning records, and move them between machines."""


def _open(path: Path | None) -> RecordStore:
    """A store to read: one that was named must exist."""
    from ..records import RecordStore

    return RecordStore(path, readonly=path is not None)


def _gflops(record: TuningRecord) -> str:
    from ..errors import SpecError
    from ..spec import ConvSpec

    try:
        return rate(ConvSpec.parse(record.spec).flops, record.seconds)
    except SpecError:  # of another version
        return "–"


def _rows(found: list[TuningRecord]) -> str:
    rows = []
    for record in found:
        picks = " ".join(f"{name}={value}" for name, value in record.picks.items())
        time = duration(record.seconds) if record.outcome == "ok" else record.outcome
        candidate = f"{record.schedule}({picks})"
        rows.append([record.id[:12], record.spec, record.threads, time, _gflops(record), candidate])
    return table(["id", "spec", "threads>", "time>", "GFLOP/s>", "candidate"], rows)


@records.command("list")
@store_option
@click.option("--spec", metavar="SPEC", help="Only of this layer.")
@click.option("--schedule", metavar="ID", help="Only of this schedule.")
@click.option("--outcome", metavar="NAME", help="Only these: ok, build_error, crash, timeout, wrong, run_error.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Only for so many threads.")
@json_option
def list_(
    path: Path | None, spec: str | None, schedule: str | None, outcome: str | None, threads: int | None, as_json: bool
) -> None:
    """List the records, oldest first."""
    from ..records import OUTCOMES

    if outcome is not None and outcome not in OUTCOMES:
        raise click.UsageError(f"--outcome: expected one of {', '.join(OUTCOMES)}, found {outcome!r}")
    descriptor = read_layers([spec])[0].spec.descriptor if spec else None
    with _open(path) as store:
        found = store.trials(spec=descriptor, schedule=schedule, outcome=outcome, threads=threads)
    if as_json:
        emit([record.to_dict() for record in found])
        return
    if found:
        click.echo(_rows(found))
    outcomes = Counter(record.outcome for record in found)
    kinds = f": {', '.join(f'{count} {kind}' for kind, count in outcomes.most_common())}" if found else ""
    note(f"{len(found)} records in {tidy(store.path)}{kinds}")


@records.command(short_help="Show the records that builds would use here.")
@click.argument("spec", nargs=-1, metavar="[SPEC|FILE|MODEL.onnx]")
@store_option
@target_option
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Only for so many threads.")
@json_option
def best(spec: tuple[str, ...], path: Path | None, target: str, threads: int | None, as_json: bool) -> None:
    """Show the record a build on this machine would use, of some layers or of all in the store."""
    wanted = [entry.spec.descriptor for entry in read_layers(spec)] if spec else None
    with _open(path) as store:
        found = _best(store, wanted, target, threads)
    if as_json:
        emit([record.to_dict() for record in found])
    elif found:
        click.echo(_rows(found))
    else:
        note(f"no record for this machine and these versions in {tidy(store.path)}")


def _best(store: RecordStore, wanted: list[str] | None, target: str, threads: int | None) -> list[TuningRecord]:
    from ..build import best_record
    from ..spec import ConvSpec
    from ..target import resolve

    resolved = resolve(target)
    known = store.trials(target=resolved.spelling, hardware=resolved.hardware, threads=threads, outcome="ok")
    problems = dict.fromkeys((record.spec, record.threads) for record in known)
    chosen = [
        best_record(store, ConvSpec.parse(spec), resolved, count)
        for spec, count in problems
        if wanted is None or spec in wanted
    ]
    return [record for record in chosen if record is not None]


@records.command(short_help="Add the records of other stores.")
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="STORE…")
@store_option
@json_option
def merge(stores: tuple[Path, ...], path: Path | None, as_json: bool) -> None:
    """Add the records of other stores; what is there already stays once."""
    from ..records import RecordStore

    with RecordStore(path) as store:
        added = {str(other): store.merge(other) for other in stores}
        total = len(store)
    _say({"added": added, "records": total}, f"{sum(added.values())} added, {total} in {tidy(store.path)}", as_json)


@records.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@store_option
@json_option
def export(file: Path, path: Path | None, as_json: bool) -> None:
    """Write all records to FILE, one JSON object per line."""
    with _open(path) as store:
        count = store.export(file)
    _say({"exported": count, "file": str(file)}, f"{count} records in {tidy(file)}", as_json)


@records.command("import", short_help="Add the records of FILE, all or none.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@store_option
@json_option
def import_(file: Path, path: Path | None, as_json: bool) -> None:
    """Add the records of FILE, each checked; all of them or, where one is wrong, none."""
    from ..records import RecordStore

    with RecordStore(path) as store:
        added, total = store.import_(file), len(store)
    _say({"added": added, "records": total}, f"{added} added, {total} in {tidy(store.path)}", as_json)


@records.command(short_help="Check the store and every record.")
@store_option
@json_option
@click.pass_context
def check(context: click.Context, path: Path | None, as_json: bool) -> None:
    """Check the store's structure, and every record against its hashes."""
    with _open(path) as store:
        found = store.check()
    document = {"file": str(store.path), "rows": found.rows, "ok": found.ok, "problems": list(found.problems)}
    _say(document, f"{found.rows} records in {tidy(store.path)}: {'all whole' if found.ok else 'damaged'}", as_json)
    if not found.ok:
        for problem in found.problems:
            note(f"convgen: {problem}")
        note("convgen: `convgen records recover DAMAGED INTO` saves what is readable")
        context.exit(TROUBLE)


@records.command()
@click.argument("damaged", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("into", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def recover(damaged: Path, into: Path, as_json: bool) -> None:
    """Save what can be read of a DAMAGED store INTO another one."""
    from ..records import RecordStore

    found = RecordStore.recover(damaged, into)
    text = f"{found.saved} records saved in {tidy(into)}, {found.lost} lost"
    if found.missing_pages:
        text += f"; {found.missing_pages} pages of the file are missing: there may have been more"
    document = {"saved": found.saved, "lost": found.lost, "missing_pages": found.missing_pages, "into": str(into)}
    _say(document, text, as_json)


def _say(document: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        emit(document)
    else:
        click.echo(text)
