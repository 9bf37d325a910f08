"""The store of tuning records: one SQLite file.

Any number of processes and threads may write it at once. A record is on the disk when :meth:`RecordStore.add`
returns.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import reprlib
import sqlite3
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..errors import RecordError
from ..folders import TemporaryFolder, user_cache
from . import salvage
from .record import FIELDS, RECORD_SCHEMA, TuningRecord, dump, read_lines, write_lines

#: Version of the database (its ``user_version``).
STORE_SCHEMA = 1

T = TypeVar("T")

_APPLICATION_ID = 0x43564752  # "CVGR": tells a store from other programs' databases
_BUSY_SECONDS = 60.0
_HASH = re.compile(r"[0-9a-f]{64}\Z")
_HINT = "RecordStore.recover(damaged, into) saves what is readable"

# Rows are numbered from 1 without a gap: RecordStore.recover counts gaps. They are added, never changed, and
# removed by RecordStore.remove alone. The fields that no query asks for are one column of JSON, `detail`:
# parsing it is most of the time that listing takes.
_DETAIL = {"picks", "samples", "versions", "note"}
_PLAIN = tuple(name for name in FIELDS if name not in _DETAIL)
_COLUMNS = ", ".join(f'"{name}"' for name in ("detail", *_PLAIN))  # quoted: `when` is an SQL word
_ID = len(_PLAIN)  # the last column
_INSERT = f"INSERT INTO records ({_COLUMNS}) VALUES (?{', ?' * _ID}) ON CONFLICT (id) DO NOTHING"
_TABLE = """
CREATE TABLE records (
    detail TEXT NOT NULL, spec TEXT NOT NULL, target TEXT NOT NULL, hardware TEXT NOT NULL,
    threads INTEGER NOT NULL, schedule TEXT NOT NULL, schedule_version INTEGER NOT NULL,
    outcome TEXT NOT NULL, seconds REAL, error TEXT NOT NULL, "when" TEXT NOT NULL,
    trial_key TEXT NOT NULL, id TEXT NOT NULL PRIMARY KEY
);
CREATE INDEX by_trial ON records (trial_key);
CREATE INDEX by_speed ON records (spec, target, hardware, threads, outcome, seconds);
"""
_SCHEMA = {" ".join(statement.split()) for statement in _TABLE.split(";")} - {""}

Row = Sequence[Any]

#: Decodes a column of text. A damaged one need not be UTF-8; the damage shows in the record's hash.
_column_text = functools.partial(str, encoding="utf-8", errors="backslashreplace")


def _encode(record: TuningRecord) -> Row:
    """A record as a row of the table."""
    detail = {name: getattr(record, name) for name in _DETAIL}
    return [dump(detail), *(getattr(record, name) for name in _PLAIN)]


def _decode(row: Row) -> dict[str, Any]:
    """A row as the values of a record's fields.

    Raises:
        RecordError: the column that holds JSON does not.
    """
    try:
        detail = json.loads(row[0])
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(f"detail: not JSON: {error}") from None
    if not isinstance(detail, dict) or detail.keys() != _DETAIL or not isinstance(detail["samples"], list):
        raise RecordError(
            f"detail: expected a JSON object of {', '.join(sorted(_DETAIL))}, found {reprlib.repr(detail)}"
        )
    detail.update(zip(_PLAIN, row[1:], strict=True))
    return detail


def _checked(row: Row) -> TuningRecord:
    """A row as a record, every field checked and its hashes computed again."""
    return TuningRecord.from_dict({"schema": RECORD_SCHEMA, **_decode(row)})


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


class RecordStore:
    """Records in one SQLite file, created where it is missing.

    Safe for several processes and threads at once, and against their sudden end: when :meth:`add` has returned,
    killing the writer loses nothing. Every commit is flushed to the disk (``synchronous=FULL``, about 0.6 ms), so a
    power cut loses nothing either. Added records are in the file itself, not in the log beside it, so a lost or
    damaged log loses nothing.

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
        # A connection must not cross a fork: every process opens its own, with its own lock.
        self._handles: dict[int, tuple[threading.RLock, sqlite3.Connection]] = {}
        self._closed = False
        self._handle()

    # -- writing ---------------------------------------------------------------------------------

    def add(self, record: TuningRecord) -> bool:
        """Keep a record for good; returns whether it was new."""
        return self._insert([record]) == 1

    def add_all(self, records: Iterable[TuningRecord]) -> int:
        """Keep several records for good, all or none; returns how many were new."""
        return self._insert(records)

    def merge(self, other: Path | str) -> int:
        """Add another store's records, each checked; returns how many were new.

        Stores merge as sets: in any order, any number of times.
        """
        with RecordStore(other, readonly=True) as source:
            known = {row[0] for row in self._run(lambda db: db.execute("SELECT id FROM records").fetchall())}
            missing = [source._record(row) for row in source._rows() if row[_ID] not in known]
        return self._insert(missing)

    def import_(self, path: Path | str) -> int:
        """Add the records of a JSON-lines file, all or none; returns how many were new.

        Raises:
            RecordError: a line is not a record; names the file, line and field.
        """
        return self._insert(read_lines(path))

    def _insert(self, records: Iterable[TuningRecord]) -> int:
        rows = [_encode(record) for record in records]
        if not rows:
            return 0

        def insert(db: sqlite3.Connection) -> int:
            before = db.total_changes
            with db:  # commits, or rolls back where anything is raised
                db.execute("BEGIN IMMEDIATE")
                db.executemany(_INSERT, rows)
            return db.total_changes - before

        added = self._run(insert)
        self._flush()
        return added

    def remove(self, ids: Iterable[str]) -> int:
        """Take records out for good; returns how many of them there were.

        In place and in one transaction, because other processes may have the store open: a new file in its place
        would lose what they add to the old one. Writers wait, readers see the store before or after, and a sudden
        end leaves one of the two. For the sake of :meth:`recover`, the rows that stay are numbered anew, because it
        counts gaps, and those that go are overwritten, because it reads whatever looks like a row.
        """
        wanted = [(id_,) for id_ in ids]

        def remove(db: sqlite3.Connection) -> int:
            db.execute("PRAGMA secure_delete = ON").fetchall()
            with db:
                db.execute("BEGIN IMMEDIATE")
                before = db.total_changes
                db.executemany("DELETE FROM records WHERE id = ?", wanted)
                removed = db.total_changes - before
                rows = db.execute("SELECT rowid FROM records ORDER BY rowid").fetchall()
                moved = [(number, row) for number, (row,) in enumerate(rows, 1) if number != row]
                db.executemany("UPDATE records SET rowid = ? WHERE rowid = ?", moved)
            return removed

        removed = self._run(remove)
        self._flush()
        return removed

    def compact(self) -> None:
        """Give the space of removed records back to the system; whole or not at all."""
        self._run(lambda db: db.execute("VACUUM"))
        self._flush()

    def _flush(self) -> None:
        """Move committed rows from the log into the file, and wait for other processes that do the same.

        They stay in the log where another process has been reading for a minute.
        """
        deadline = time.monotonic() + _BUSY_SECONDS
        while self._run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]):
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)

    # -- reading ---------------------------------------------------------------------------------

    def has(self, trial_key: str) -> bool:
        """Whether this trial has been measured, whatever its outcome."""
        query = "SELECT 1 FROM records WHERE trial_key = ? LIMIT 1"
        return self._run(lambda db: db.execute(query, (trial_key,)).fetchone()) is not None

    def trials(
        self,
        *,
        spec: str | None = None,
        target: str | None = None,
        hardware: str | None = None,
        threads: int | None = None,
        schedule: str | None = None,
        outcome: str | None = None,
        trial_key: str | None = None,
    ) -> list[TuningRecord]:
        """The records that match what is given, oldest first."""
        wanted = {
            "spec": spec,
            "target": target,
            "hardware": hardware,
            "threads": threads,
            "schedule": schedule,
            "outcome": outcome,
            "trial_key": trial_key,
        }
        return [self._record(row) for row in self._rows(**{k: v for k, v in wanted.items() if v is not None})]

    def problems(self) -> list[tuple[str, str, str, int]]:
        """Each spec, target, hardware and number of threads that there are records of, once."""
        query = "SELECT DISTINCT spec, target, hardware, threads FROM records"
        return self._run(lambda db: db.execute(query).fetchall())

    def find(self, prefix: str) -> TuningRecord:
        """The record whose id begins with ``prefix``.

        Raises:
            RecordError: the prefix is not hexadecimal, or begins no id, or several.
        """
        if not re.fullmatch(r"[0-9a-f]{1,64}", prefix):
            raise RecordError(f"id: expected the first hexadecimal digits, found {reprlib.repr(prefix)}")
        query = f"SELECT {_COLUMNS} FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT 9"
        rows = self._run(lambda db: db.execute(query, (prefix, prefix + "g")).fetchall())
        if len(rows) != 1:
            found = ", ".join(row[_ID][:16] for row in rows[:8]) + (" …" if len(rows) > 8 else "")
            raise RecordError(f"{self.path}: id {prefix}: expected it to begin one record's, found {found or 'none'}")
        return self._record(rows[0])

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
        query = (
            f"SELECT {_COLUMNS} FROM records"
            " WHERE spec = ? AND target = ? AND hardware = ? AND threads = ? AND outcome = 'ok' ORDER BY seconds, id"
        )

        def search(db: sqlite3.Connection) -> TuningRecord | None:
            for row in db.execute(query, (spec, target, hardware, threads)):
                record = self._record(row)
                same = all(record.versions.get(name) == version for name, version in (versions or {}).items())
                if same and (accept is None or accept(record)):
                    return record
            return None

        return self._run(search)

    def export(self, path: Path | str) -> int:
        """Write every record to a JSON-lines file, oldest first; returns how many.

        The file appears whole or not at all. Equal sets of records give equal files.
        """
        records = self.trials()
        write_lines(path, records)
        return len(records)

    def __len__(self) -> int:
        """How many records there are."""
        return int(self._run(lambda db: db.execute("SELECT count(*) FROM records").fetchone())[0])

    def _rows(self, **wanted: object) -> list[Row]:
        where = " AND ".join(f'"{name}" = ?' for name in wanted)
        query = f"SELECT {_COLUMNS} FROM records" + (f" WHERE {where}" if where else "") + ' ORDER BY "when", id'
        return self._run(lambda db: db.execute(query, tuple(wanted.values())).fetchall())

    def _record(self, row: Row) -> TuningRecord:
        """A row as a record, every field checked and its hashes computed again."""
        try:
            return _checked(row)
        except RecordError as error:
            raise RecordError(f"{self.path}: record {row[_ID]}: {error}; {_HINT}") from None

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
                for row in db.execute(f"SELECT {_COLUMNS} FROM records"):
                    count += 1
                    try:
                        _checked(row)
                    except RecordError as error:
                        problems.append(f"{self.path}: record {row[_ID]}: {error}")
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if not _is_damage(error):
                    raise
                problems.append(f"{self.path}: after {count} records: {error}")

        self._run(examine)
        return Integrity(count, tuple(problems))

    @staticmethod
    def recover(damaged: Path | str, into: Path | str) -> Recovery:
        """Save what can be read of a damaged store into another one, new or not.

        Only records that match their own hash are saved. The damaged file stays as it is.

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
            elif len(values) == 1 + len(_PLAIN):
                try:
                    record = _checked(values)
                except RecordError:
                    bad.add(rowid)
                else:
                    saved[record.id] = record
                    seen.add(rowid)
        if not mentions and not file.has_header:
            raise RecordError(f"{damaged}: expected what is left of a record store, found no trace of one")
        keys = saved.keys() | {record.trial_key for record in saved.values()}
        seen |= {rowid for rowid, key in entries if key in saved}
        lost = (bad | {rowid for rowid, key in entries if key not in keys}) - seen
        # Rows are numbered from 1 without a gap. A damaged number stands in one place, a real one in several.
        last = max((rowid for rowid, count in mentions.items() if count > 1), default=0)
        gaps = last - sum(1 <= rowid <= last for rowid in seen | lost)
        with RecordStore(into) as store:
            store._insert(saved.values())
        return Recovery(len(saved), len(lost) + gaps, file.missing_pages)

    # -- the connection --------------------------------------------------------------------------

    def close(self) -> None:
        """Close the file; the store cannot be used after it."""
        self._closed = True
        lock, db = self._handles.pop(os.getpid(), (None, None))
        if lock is not None and db is not None:
            with lock:
                db.close()

    def __enter__(self) -> RecordStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RecordStore({str(self.path)!r})"

    def _run(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``action`` on this process's connection, and again as long as other writers hold the file: SQLite
        itself does not wait in every state of a write-ahead log.
        """
        lock, db = self._handle()
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                with lock:
                    return action(db)
            except sqlite3.Error as error:
                if _code(error) not in _CONTENTION or time.monotonic() > deadline:
                    raise self._failure(error) from error
            except UnicodeDecodeError as error:  # from a message that quotes damaged text
                raise self._failure(error) from error
            time.sleep(0.01)

    def _handle(self) -> tuple[threading.RLock, sqlite3.Connection]:
        if self._closed:
            raise RecordError(f"{self.path}: the store is closed")
        pid = os.getpid()
        if pid not in self._handles:
            self._handles[pid] = (threading.RLock(), self._connect())
        return self._handles[pid]

    def _connect(self) -> sqlite3.Connection:
        deadline = time.monotonic() + _BUSY_SECONDS
        mode = "mode=ro" if self.readonly else "mode=rw"
        while True:
            try:
                if not self._exists():
                    self._create()
                return self._opened(mode)
            except sqlite3.Error as error:
                if _code(error) in _NO_ACCESS and mode == "mode=ro" and not self._has_log():
                    mode = "immutable=1"  # a folder where SQLite cannot make the log's index: nobody writes there
                elif _code(error) not in _CONTENTION or time.monotonic() > deadline:
                    raise self._failure(error) from error
            except UnicodeDecodeError as error:
                raise self._failure(error) from error
            except (OSError, ValueError) as error:  # ValueError: a path with a null character
                raise RecordError(f"{self.path}: {getattr(error, 'strerror', error)}") from error
            time.sleep(0.01)

    def _exists(self) -> bool:
        """Whether there is a file.

        Raises:
            RecordError: the file is empty, is no file, or is missing though it must exist.
        """
        has_log = self._has_log()  # first: a store that is made right now has its file before its log
        try:
            status = self.path.stat()
        except FileNotFoundError:
            if has_log:
                raise RecordError(f"{self.path}: no such file, but the log of one beside it; {_HINT}") from None
            if self.readonly:
                raise RecordError(f"{self.path}: no such file") from None
            return False
        if not stat.S_ISREG(status.st_mode):
            raise RecordError(f"{self.path}: expected a file, found something else")
        if not status.st_size:
            raise RecordError(f"{self.path}: expected a record store or no file, found an empty file")
        return True

    def _has_log(self) -> bool:
        try:
            return os.path.getsize(f"{os.path.realpath(self.path)}-wal") > 0
        except FileNotFoundError:
            return False

    def _create(self) -> None:
        """Make an empty store, whole or not at all: other processes may do the same right now."""
        path = Path(os.path.realpath(self.path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFolder(path.parent) as folder:
            part = folder / "new.sqlite"
            with contextlib.closing(sqlite3.connect(part)) as db:
                db.executescript(
                    f"{_TABLE} PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {STORE_SCHEMA};"
                )
            try:
                os.link(part, path)
            except FileExistsError:
                pass  # another process was faster
            except OSError:  # a file system without links
                if not path.exists():
                    os.rename(part, path)

    def _opened(self, mode: str) -> sqlite3.Connection:
        """A connection to the file, which must be a store of this version."""
        db = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?{mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,  # transactions begin and end where this module says
            check_same_thread=False,  # the lock beside it serves threads one by one
        )
        try:
            db.text_factory = _column_text
            db.execute("BEGIN")  # one snapshot
            application, version = (
                db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            schema = {
                " ".join(sql.split())
                for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE tbl_name = 'records' AND sql IS NOT NULL")
            }
            db.execute("COMMIT")
            self._check_version(application, version)
            if schema != _SCHEMA:
                raise RecordError(f"{self.path}: expected the table of a record store, found another; {_HINT}")
            if not self.readonly:
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            db.close()
            raise
        return db

    def _check_version(self, application: int, version: int) -> None:
        if application != _APPLICATION_ID:
            raise RecordError(f"{self.path}: an SQLite database, but not a record store")
        if version > STORE_SCHEMA:
            raise RecordError(
                f"{self.path}: written by a newer convgen: expected store version {STORE_SCHEMA}, found {version}"
            )
        if version < STORE_SCHEMA:
            raise RecordError(f"{self.path}: expected store version {STORE_SCHEMA}, found {version}, which never was")

    def _failure(self, error: Exception) -> RecordError:
        return RecordError(f"{self.path}: {error}" + (f"; {_HINT}" if _is_damage(error) else ""))


def _code(error: Exception) -> int:
    """SQLite's primary result code; 0 where the error is Python's."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


_CONTENTION = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_NO_ACCESS = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


def _is_damage(error: Exception) -> bool:
    damaged = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return isinstance(error, UnicodeDecodeError) or _code(error) in damaged
