"""The SQLite file under a store: its table, how it is made and opened, and waiting for others.

A store is made whole or not at all, and refused where it is another program's, another version's or damaged.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import reprlib
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import RecordError
from ..folders import TemporaryFolder
from .kinds import STORE, found_instead
from .record import FIELDS, RECORD_SCHEMA, TuningRecord, dump

#: Version of the database (its ``user_version``).
STORE_SCHEMA = 1

_APPLICATION_ID = 0x43564752  # "CVGR": tells a store from other programs' databases
#: How long to wait for other processes.
BUSY_SECONDS = 60.0
#: What to do about damage.
HINT = "`convgen records recover DAMAGED INTO` saves what is readable, in Python RecordStore.recover(damaged, into)"

# Rows are numbered from 1 without a gap: RecordStore.recover counts gaps. They are added, never changed, and
# removed by RecordStore.remove alone. The fields that no query asks for are one column of JSON, `detail`:
# parsing it is most of the time that listing takes.
_DETAIL = {"picks", "samples", "versions", "note"}
PLAIN = tuple(name for name in FIELDS if name not in _DETAIL)
COLUMNS = ", ".join(f'"{name}"' for name in ("detail", *PLAIN))  # quoted: `when` is an SQL word
#: The place of the id in a row: the last.
ID = len(PLAIN)
INSERT = f"INSERT INTO records ({COLUMNS}) VALUES (?{', ?' * ID}) ON CONFLICT (id) DO NOTHING"
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
T = TypeVar("T")

#: Decodes a column of text. A damaged one need not be UTF-8; the damage shows in the record's hash.
_column_text = functools.partial(str, encoding="utf-8", errors="backslashreplace")


def encode(record: TuningRecord) -> Row:
    """A record as a row of the table."""
    detail = {name: getattr(record, name) for name in _DETAIL}
    return [dump(detail), *(getattr(record, name) for name in PLAIN)]


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
    detail.update(zip(PLAIN, row[1:], strict=True))
    return detail


def checked(row: Row) -> TuningRecord:
    """A row as a record, every field checked and its hashes computed again."""
    return TuningRecord.from_dict({"schema": RECORD_SCHEMA, **_decode(row)})


def refused(path: Path) -> str:
    """Why a store cannot be written, as far as permissions and file systems say; empty where they let it."""
    name = os.path.realpath(path)
    for place, what in ((name, "the file"), (os.path.dirname(name), "its folder, where SQLite keeps a log,")):
        if os.path.exists(place) and not os.access(place, os.W_OK, effective_ids=True):
            other = "give another one as --records, or as CONVGEN_RECORDS"
            return f"cannot be written: {what} is read-only for this user; {other}"
    return ""


def put_in_place(made: Path, path: Path) -> bool:
    """Give a new store its name, unless a file has it by now; whether it got it."""
    try:
        os.link(made, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if path.exists():
            return False
        os.rename(made, path)
    return True


class Database:
    """The file of a store: a connection for each process, and its lock.

    Args:
        path: the file, made where it is missing.
        readonly: the file must exist, in a folder that need not be writable.

    Raises:
        RecordError: the file cannot be opened, or is no record store.
    """

    def __init__(self, path: Path, *, readonly: bool) -> None:
        self.path, self.readonly = path, readonly
        # A connection must not cross a fork: every process opens its own, with its own lock.
        self._handles: dict[int, tuple[threading.RLock, sqlite3.Connection]] = {}
        self._closed = False
        self._handle()

    def close(self) -> None:
        """Close the file; it cannot be used after it."""
        self._closed = True
        lock, db = self._handles.pop(os.getpid(), (None, None))
        if lock is not None and db is not None:
            with lock:
                db.close()

    def run(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``action`` on this process's connection, and again as long as other writers hold the file: SQLite
        itself does not wait in every state of a write-ahead log.
        """
        lock, db = self._handle()
        deadline = time.monotonic() + BUSY_SECONDS
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

    def flush(self) -> bool:
        """Move committed rows from the log into the file, and wait for other processes that do the same.

        They stay in the log, and it answers False, where another process has been reading for a minute.
        """

        def move(db: sqlite3.Connection) -> bool:
            # SQLite would hold up all writers for as long as it waits for a reader.
            db.execute("PRAGMA busy_timeout = 0")
            try:
                return not db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                db.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")

        deadline = time.monotonic() + BUSY_SECONDS
        while not self.run(move):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def _handle(self) -> tuple[threading.RLock, sqlite3.Connection]:
        if self._closed:
            raise RecordError(f"{self.path}: the store is closed")
        pid = os.getpid()
        if pid not in self._handles:
            self._handles[pid] = (threading.RLock(), self._connect())
        return self._handles[pid]

    def _connect(self) -> sqlite3.Connection:
        deadline = time.monotonic() + BUSY_SECONDS
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
                raise RecordError(f"{self.path}: no such file, but the log of one beside it; {HINT}") from None
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
            put_in_place(part, path)  # unless another process was faster

    def _opened(self, mode: str) -> sqlite3.Connection:
        """A connection to the file, which must be a store of this version."""
        db = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?{mode}",
            uri=True,
            timeout=BUSY_SECONDS,
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
                raise RecordError(f"{self.path}: expected the table of a record store, found another; {HINT}")
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
        if _code(error) in _NO_ACCESS and not self.readonly and (reason := refused(self.path)):
            return RecordError(f"{self.path}: {reason}")
        if _code(error) == sqlite3.SQLITE_NOTADB and (instead := found_instead(self.path, STORE)):
            return RecordError(f"{self.path}: expected {STORE.name}, {instead}")
        return RecordError(f"{self.path}: {error}" + (f"; {HINT}" if is_damage(error) else ""))


def _code(error: Exception) -> int:
    """SQLite's primary result code; 0 where the error is Python's."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


_CONTENTION = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_NO_ACCESS = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


def is_damage(error: Exception) -> bool:
    damaged = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return isinstance(error, UnicodeDecodeError) or _code(error) in damaged
