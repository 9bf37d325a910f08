"""The store of tuning records: one SQLite file.

Any number of processes and threads may write it at once. A record is on the disk when :meth:`RecordStore.add`
returns. Whatever reads or writes many records does so a thousand at a time: nobody waits for long, and a million
take little more memory than a thousand.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import sqlite3
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, Unpack

from ..errors import RecordError
from ..folders import user_cache
from . import salvage
from .database import COLUMNS, HINT, ID, INSERT, PLAIN, Database, Row, T, checked, encode, is_damage
from .record import TuningRecord, dump, read_lines, write_lines
from .rewriting import copy_path, left_copy, rewriting

#: Records that are read or written at once.
CHUNK = 1000
_HASH = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Integrity:
    """What :meth:`RecordStore.check` found: rows read, and one line per problem."""

    rows: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


@dataclass(frozen=True)
class Recovery:
    """What :meth:`RecordStore.recover` did: records saved, records known to be lost, and pages missing from the
    file. Where pages are missing, more may be lost than is known.
    """

    saved: int
    lost: int
    missing_pages: int


def default_path() -> Path:
    """``$CONVGEN_RECORDS``, else ``records.sqlite`` in the user's cache directory.

    Raises:
        RecordError: the user has neither.
    """
    if given := os.environ.get("CONVGEN_RECORDS"):
        return Path(os.path.expanduser(given))
    if (cache := user_cache()) is None:
        raise RecordError("expected a home directory, found none: name the store in CONVGEN_RECORDS")
    return cache / "records.sqlite"


class Filters(TypedDict, total=False):
    """What records must have: a value, or one of several; None: anything."""

    spec: str | Collection[str] | None
    target: str | None
    hardware: str | Collection[str] | None
    threads: int | None
    schedule: str | None
    outcome: str | None
    trial_key: str | None


#: Filters that the index ``by_speed`` can answer alone: it is a tenth of the table.
_INDEXED = {"spec", "target", "hardware", "threads", "outcome"}


def _where(wanted: Mapping[str, Any]) -> tuple[str, list[object]]:
    """:class:`Filters` as SQL, and its parameters."""
    parts, values = [], list[object]()
    for name, value in wanted.items():
        if value is None:
            continue
        if isinstance(value, str | int):
            parts.append(f'"{name}" = ?')
            values.append(value)
        else:
            parts.append(f'"{name}" IN (SELECT value FROM json_each(?))')
            values.append(json.dumps(list(value)))
    return (f" WHERE {' AND '.join(parts)}" if parts else ""), values


class RecordStore:
    """Records in one SQLite file, created where it is missing.

    Safe for several processes and threads at once, and against their sudden end: when :meth:`add` has returned,
    killing the writer loses nothing. Every commit is flushed to the disk (``synchronous=FULL``, about 0.6 ms), so a
    power cut loses nothing either. Added records are in the file itself, not in the log beside it, so a lost or
    damaged log loses nothing; while :meth:`remove` and :meth:`compact` rewrite the file, a copy beside it has them.

    Every record that is read is checked against its hash.

    Args:
        path: the file; :func:`default_path` unless given.
        readonly: read only: the file must exist, in a folder that need not be writable.

    Raises:
        RecordError: the file cannot be opened or is no record store; names the path and the reason.
            Every method raises it where reading or writing fails.
    """

    path: Path

    def __init__(self, path: Path | str | None = None, *, readonly: bool = False) -> None:
        self.path = default_path() if path is None else Path(path)
        self.readonly = readonly
        self._database = Database(self.path, readonly=readonly)
        try:
            self._restore()
        except BaseException:
            self._database.close()
            raise

    # -- writing ---------------------------------------------------------------------------------

    def add(self, record: TuningRecord) -> bool:
        """Keep a record for good; returns whether it was new."""
        return self._insert([record]) == 1

    def add_all(self, records: Iterable[TuningRecord]) -> int:
        """Keep several records for good, all or none; returns how many were new."""
        return self._insert(records)

    def merge(self, other: Path | str) -> int:
        """Add another store's records, each checked, all or none; returns how many were new.

        Stores merge as sets: in any order, any number of times.
        """
        with RecordStore(other, readonly=True) as source:
            return self._insert(source._each("", [], "rowid", known=self._known))

    def import_(self, path: Path | str) -> int:
        """Add the records of a JSON-lines file, all or none; returns how many were new.

        Raises:
            RecordError: a line is not a record; names the file, line and field.
        """
        return self._insert(read_lines(path))

    def _insert(self, records: Iterable[TuningRecord]) -> int:
        """Add any number of records, all or none.

        Many wait in a temporary table, so that other writers wait no longer than copying them takes.
        """
        records = iter(records)
        rows = [encode(record) for record in islice(records, CHUNK)]
        if not rows:
            return 0
        if len(rows) < CHUNK:
            added = self._change(INSERT, rows)
        else:
            table = f"incoming_{threading.get_ident()}"
            self._run(lambda db: db.execute(f"CREATE TEMP TABLE {table} AS SELECT {COLUMNS} FROM records LIMIT 0"))
            try:
                while rows:
                    self._change(f"INSERT INTO {table} VALUES (?{', ?' * ID})", rows, "DEFERRED")
                    rows = [encode(record) for record in islice(records, CHUNK)]
                copy = f"SELECT {COLUMNS} FROM {table} WHERE true ORDER BY rowid"
                added = self._change(f"INSERT INTO records ({COLUMNS}) {copy} ON CONFLICT (id) DO NOTHING", [()])
            finally:
                self._run(lambda db: db.execute(f"DROP TABLE {table}"))
        self._flush()
        return added

    def _change(self, statement: str, rows: Sequence[Row], mode: str = "IMMEDIATE") -> int:
        """Run a statement for each row in one transaction; returns how many rows of the table it changed."""

        def change(db: sqlite3.Connection) -> int:
            before = db.total_changes
            with db:  # commits, or rolls back where anything is raised
                db.execute(f"BEGIN {mode}")
                db.executemany(statement, rows)
            return db.total_changes - before

        return self._run(change)

    def remove(self, ids: Iterable[str], *, compact: bool = False) -> int:
        """Take records out for good; returns how many of them there were.

        In place and in one transaction, because other processes may have the store open: a new file in its place
        would lose what they add to the old one. Writers wait, readers see the store before or after, and a sudden
        end leaves one of the two (:mod:`convgen.records.rewriting`). For the sake of :meth:`recover`, the rows that
        stay are numbered anew, because it counts gaps, and those that go are overwritten, because it reads whatever
        looks like a row.

        Args:
            compact: give their space back to the system, too.
        """
        wanted = [(id_,) for id_ in ids]

        def remove(db: sqlite3.Connection) -> int:
            db.execute("PRAGMA secure_delete = ON").fetchall()
            with db:
                db.execute("BEGIN IMMEDIATE")
                before = db.total_changes
                db.executemany("DELETE FROM records WHERE id = ?", wanted)
                removed = db.total_changes - before
                numbers = array("q", (row for (row,) in db.execute("SELECT rowid FROM records ORDER BY rowid")))
                moved = ((number, row) for number, row in enumerate(numbers, 1) if number != row)
                db.executemany("UPDATE records SET rowid = ? WHERE rowid = ?", moved)
            return removed

        with rewriting(self._database, self._flush):
            removed = self._run(remove)
            if compact and removed:
                self._run(lambda db: db.execute("VACUUM"))
        return removed

    def compact(self) -> None:
        """Give the space of removed records back to the system; whole or not at all."""
        with rewriting(self._database, self._flush):
            self._run(lambda db: db.execute("VACUUM"))

    def _flush(self) -> bool:
        """See :meth:`~convgen.records.database.Database.flush`."""
        return self._database.flush()

    def _restore(self) -> None:
        """Put back what a removal or a compaction that ended suddenly has lost, together with the log.

        Raises:
            RecordError: the file is damaged; :meth:`recover` saves what it and the copy have.
        """
        try:
            with left_copy(self.path) as copy:
                if copy is not None:
                    self._put_back(copy)
        except OSError as error:
            raise RecordError(f"{copy_path(self.path)}: {error.strerror}") from error

    def _put_back(self, copy: Path) -> None:
        mine, self._database = self._database, Database(self.path, readonly=False)
        try:
            if problems := self.check().problems:
                raise RecordError(f"{self.path}: rewriting it ended suddenly: {problems[0]}; {HINT}")
            self.merge(copy)
            if self._flush():
                copy.unlink()
        finally:
            self._database.close()
            self._database = mine

    # -- reading ---------------------------------------------------------------------------------

    def has(self, trial_key: str) -> bool:
        """Whether this trial has been measured, whatever its outcome."""
        query = "SELECT 1 FROM records WHERE trial_key = ? LIMIT 1"
        return self._run(lambda db: db.execute(query, (trial_key,)).fetchone()) is not None

    def trials(
        self, *, limit: int | None = None, skip: Callable[[str], bool] | None = None, **wanted: Unpack[Filters]
    ) -> list[TuningRecord]:
        """The records that match what is given, in the order in which they were added.

        Args:
            limit: only so many, those that were added last.
            skip: whether to leave out the record with an id; it is not even decoded.
        """
        where, values = _where(wanted)
        if limit is not None:
            asked = {name for name, value in wanted.items() if value is not None}
            indexed = " INDEXED BY by_speed" if asked and asked <= _INDEXED else ""
            where = (
                f" WHERE rowid IN (SELECT rowid FROM records{indexed}{where} ORDER BY rowid DESC LIMIT {int(limit)})"
            )
        query = f"SELECT {COLUMNS} FROM records{where} ORDER BY rowid"
        rows = self._run(lambda db: db.execute(query, values).fetchall())
        return [self._record(row) for row in rows if skip is None or not skip(row[ID])]

    def each(self, *, oldest_first: bool = False, **wanted: Unpack[Filters]) -> Iterator[TuningRecord]:
        """The records that match what is given, one after the other: for any number of them.

        In the order in which they were added, or with ``oldest_first`` by their time. What is added meanwhile is
        left out, and so is what is removed.
        """
        return self._each(*_where(wanted), '"when", id' if oldest_first else "rowid")

    def _each(
        self, where: str, values: Sequence[object], order: str, known: Callable[[list[str]], set[str]] | None = None
    ) -> Iterator[TuningRecord]:
        """The records of :meth:`each`, without those whose ids are ``known``."""
        places, ids = array("q"), list[str]()

        def look(db: sqlite3.Connection) -> None:
            del places[:], ids[:]
            for place, id_ in db.execute(f"SELECT rowid, id FROM records{where} ORDER BY {order}", values):
                places.append(place)
                ids.append(id_)

        self._run(look)
        for start in range(0, len(ids), CHUNK):
            asked = ids[start : start + CHUNK]
            skipped = known(asked) if known else set()
            rows = self._select("rowid", list(places[start : start + CHUNK]), lambda row: row[0])
            for place, id_ in zip(places[start : start + CHUNK], asked, strict=True):
                row = rows.get(place)
                if row is None or row[1 + ID] != id_:  # rows were removed meanwhile, and the others numbered anew
                    row = self._select("id", [id_], lambda row: row[1 + ID]).get(id_)
                if row is not None and id_ not in skipped:
                    yield self._record(row[1:])

    def _select(self, name: str, wanted: Sequence[object], key: Callable[[Row], T]) -> dict[T, Row]:
        """Rows by a key, with their numbers before the columns."""
        query = f"SELECT rowid, {COLUMNS} FROM records WHERE {name} IN (SELECT value FROM json_each(?))"
        rows = self._run(lambda db: db.execute(query, (json.dumps(wanted),)).fetchall())
        return {key(row): row for row in rows}

    def _known(self, ids: list[str]) -> set[str]:
        """Which of some ids the store has."""
        query = "SELECT id FROM records WHERE id IN (SELECT value FROM json_each(?))"
        return {id_ for (id_,) in self._run(lambda db: db.execute(query, (json.dumps(ids),)).fetchall())}

    def outcomes(self, **wanted: Unpack[Filters]) -> Counter[str]:
        """How many of the records that match what is given ended how."""
        where, values = _where(wanted)
        query = f"SELECT outcome, count(*) FROM records{where} GROUP BY outcome"
        return Counter(dict(self._run(lambda db: db.execute(query, values).fetchall())))

    def problems(self, *, last: int | None = None, **wanted: Unpack[Filters]) -> list[tuple[str, str, str, int]]:
        """Each spec, target, hardware and number of threads that there are such records of, once.

        Args:
            last: only so many, those of which a record was added last.
        """
        where, values = _where(wanted)
        query = f"SELECT spec, target, hardware, threads FROM records{where} GROUP BY spec, target, hardware, threads"
        if last is not None:
            query += f" ORDER BY max(rowid) DESC LIMIT {int(last)}"
        return self._run(lambda db: db.execute(query, values).fetchall())

    def find(self, prefix: str) -> TuningRecord:
        """The record whose id begins with ``prefix``.

        Raises:
            RecordError: the prefix is not hexadecimal, or begins no id, or several.
        """
        if not re.fullmatch(r"[0-9a-f]{1,64}", prefix):
            raise RecordError(f"id: expected the first hexadecimal digits, found {reprlib.repr(prefix)}")
        query = f"SELECT {COLUMNS} FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT 9"
        rows = self._run(lambda db: db.execute(query, (prefix, prefix + "g")).fetchall())
        if len(rows) != 1:
            found = ", ".join(row[ID][:16] for row in rows[:8]) + (" …" if len(rows) > 8 else "")
            raise RecordError(f"{self.path}: id {prefix}: expected it to begin one record's, found {found or 'none'}")
        return self._record(rows[0])

    def first(
        self,
        accept: Callable[[TuningRecord], bool],
        *,
        newest: bool = False,
        latest: bool = False,
        marked: Sequence[str] = (),
        versions: Mapping[str, str] | None = None,
        other_versions: bool = False,
        schedules: Collection[str] | None = None,
        **wanted: Unpack[Filters],
    ) -> TuningRecord | None:
        """The first ``ok`` record that is accepted, the fastest first, or with ``newest`` the one added last; or None.

        Only the records up to it are decoded.

        Args:
            latest: only the last record of each trial.
            marked: names that its note says are true.
            versions: exactly those that made it; with ``other_versions`` exactly not those.
            schedules: its schedule and version, as ``"cpu_gemm 3"``, one of these.
        """
        where, values = _where({**wanted, "outcome": "ok"})
        if latest:
            where += " AND NOT EXISTS (SELECT 1 FROM records AS later WHERE later.trial_key = records.trial_key"
            where += " AND later.outcome = 'ok' AND later.rowid > records.rowid)"
        for name in marked:
            where += " AND instr(detail, ?)"
            values.append(f'"{name}":true')
        if versions is not None:  # JSON's last field, in the one spelling that this module writes
            where += f" AND substr(detail, -length(?)) {'<>' if other_versions else '='} ?"
            values += [f'"versions":{dump(versions)}}}'] * 2
        if schedules is not None:
            where += " AND schedule || ' ' || schedule_version IN (SELECT value FROM json_each(?))"
            values.append(json.dumps(list(schedules)))
        query = f"SELECT {COLUMNS} FROM records{where} ORDER BY {'rowid DESC' if newest else 'seconds, id'}"

        def is_marked(record: TuningRecord) -> bool:  # not something inside of its note
            return all((record.note or {}).get(name) is True for name in marked)

        def search(db: sqlite3.Connection) -> TuningRecord | None:
            found = map(self._record, db.execute(query, values))
            return next((record for record in found if is_marked(record) and accept(record)), None)

        return self._run(search)

    def expect_whole(
        self, *, saying: Sequence[str] = (), faster: float | None = None, limit: int = -1, **wanted: Unpack[Filters]
    ) -> None:
        """Check ``ok`` records that :meth:`first` may pass over, because what it looks for is damaged in them.

        Args:
            saying: only those whose note has one of these names.
            faster: only those that take fewer seconds.
            limit: only so many, the fastest; below 0: all.

        Raises:
            RecordError: some are damaged; says how many.
        """
        where, values = _where({**wanted, "outcome": "ok"})
        if saying:
            where += f" AND ({' OR '.join(['instr(detail, ?)'] * len(saying))})"
            values += [f'"{name}":' for name in saying]
        if faster is not None:
            where += " AND seconds < ?"
            values.append(faster)
        query = f"SELECT {COLUMNS} FROM records{where} ORDER BY seconds LIMIT {int(limit)}"
        damaged = []
        for row in self._run(lambda db: db.execute(query, values).fetchall()):
            try:
                checked(row)
            except RecordError as error:
                damaged.append(f"record {row[ID]}: {error}")
        if damaged:
            count = f"{len(damaged)} damaged record{'s' * (len(damaged) > 1)} among those that may answer"
            raise RecordError(f"{self.path}: {count}, `convgen records check` lists all: {damaged[0]}; {HINT}")

    def best(
        self,
        spec: str,
        target: str,
        hardware: str,
        threads: int,
        versions: Mapping[str, str] | None = None,
        accept: Callable[[TuningRecord], bool] | None = None,
    ) -> TuningRecord | None:
        """The fastest ``ok`` record for a problem on a machine, or None.

        Args:
            spec: the problem's descriptor.
            target, hardware, threads: where it runs; all must match.
            versions: versions that the record must have; those not named may differ.
            accept: a further condition, e.g. that the schedule still has the record's version.
        """

        def fits(record: TuningRecord) -> bool:
            same = all(record.versions.get(name) == version for name, version in (versions or {}).items())
            return same and (accept is None or accept(record))

        return self.first(fits, spec=spec, target=target, hardware=hardware, threads=threads)

    def export(self, path: Path | str) -> int:
        """Write every record to a JSON-lines file, oldest first; returns how many.

        The file appears whole or not at all. Equal sets of records give equal files.
        """
        count = 0

        def counted() -> Iterator[TuningRecord]:
            nonlocal count
            for count, record in enumerate(self.each(oldest_first=True), 1):  # noqa: B007
                yield record

        write_lines(path, counted())
        return count

    def __len__(self) -> int:
        """How many records there are."""
        return int(self._run(lambda db: db.execute("SELECT count(*) FROM records").fetchone())[0])

    def last(self) -> int:
        """The number of the row added last, at once: how many records there are, since rows have no gaps."""
        return int(self._run(lambda db: db.execute("SELECT max(rowid) FROM records").fetchone())[0] or 0)

    def _record(self, row: Row) -> TuningRecord:
        """A row as a record, every field checked and its hashes computed again."""
        try:
            return checked(row)
        except RecordError as error:
            raise RecordError(f"{self.path}: record {row[ID]}: {error}; {HINT}") from None

    # -- upkeep ----------------------------------------------------------------------------------

    def check(self) -> Integrity:
        """Check the file's structure, and every record against its own hashes."""
        problems: list[str] = []
        count = 0

        def examine(db: sqlite3.Connection) -> None:
            nonlocal count
            problems.clear()
            count = 0
            try:
                problems.extend(text for (text,) in db.execute("PRAGMA integrity_check") if text != "ok")
                for row in db.execute(f"SELECT {COLUMNS} FROM records"):
                    count += 1
                    try:
                        checked(row)
                    except RecordError as error:
                        problems.append(f"{self.path}: record {row[ID]}: {error}")
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if not is_damage(error):
                    raise
                problems.append(f"{self.path}: after {count} records: {error}")

        self._run(examine)
        return Integrity(count, tuple(problems))

    @staticmethod
    def recover(damaged: Path | str, into: Path | str) -> Recovery:
        """Save what can be read of a damaged store into another one, new or not.

        Only records that match their own hash are saved, and those of the copy that is beside a store while it is
        rewritten. The damaged file stays as it is.

        Raises:
            RecordError: ``damaged`` cannot be read or holds nothing of a store, or ``into`` cannot be
                written or is the same file.
        """
        damaged, into = Path(damaged), Path(into)
        try:
            if into.exists() and damaged.samefile(into):
                raise RecordError(f"{into}: expected another file than the damaged one, found the same")
            file = salvage.read(damaged)
        except OSError as error:
            raise RecordError(f"{damaged}: {error.strerror}") from error
        saved: dict[str, TuningRecord] = {}
        seen: set[int] = set()  # rows that are saved
        bad: set[int] = set()  # rows that do not match their hash
        entries: set[tuple[int, str]] = set()  # entries of the indexes of id and trial_key
        mentions: Counter[int] = Counter()
        for rowid, values in file.cells():
            mentions[rowid] += 1
            if len(values) == 1 and isinstance(values[0], str) and _HASH.match(values[0]):
                entries.add((rowid, values[0]))
            elif len(values) == 1 + len(PLAIN):
                try:
                    record = checked(values)
                except RecordError:
                    bad.add(rowid)
                else:
                    saved[record.id] = record
                    seen.add(rowid)
        if not mentions and not file.has_header:
            raise RecordError(f"{damaged}: expected what is left of a record store, found no trace of one")
        copy = copy_path(damaged)
        if is_moved := copy.exists():  # it was being rewritten
            with RecordStore(copy, readonly=True) as other:
                saved |= {record.id: record for record in other.each()}
        keys = saved.keys() | {record.trial_key for record in saved.values()}
        seen |= {rowid for rowid, key in entries if key in saved}
        lost = (bad | {rowid for rowid, key in entries if key not in keys}) - seen
        # Rows are numbered from 1 without a gap. A damaged number stands in one place, a real one in several.
        last = max((rowid for rowid, count in mentions.items() if count > 1), default=0)
        gaps = 0 if is_moved else last - sum(1 <= rowid <= last for rowid in seen | lost)
        if saved or into.exists():  # nothing makes no store
            with RecordStore(into) as store:
                store._insert(saved.values())
        return Recovery(len(saved), len(lost) + gaps, file.missing_pages)

    # -- the connection --------------------------------------------------------------------------

    def close(self) -> None:
        """Close the file; the store cannot be used after it."""
        self._database.close()

    def __enter__(self) -> RecordStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RecordStore({str(self.path)!r})"

    def _run(self, action: Callable[[sqlite3.Connection], T]) -> T:
        return self._database.run(action)
