"""What was computed before, in this process or in another one of the same user: compiled functions, predictions.

A value is known by the digest of all that it depends on: who asks says what that is, and the text of the package's
Python files and the versions of Python, TVM and LLVM are added, so that nothing is ever out of date. The values lie in
one SQLite file in the user's cache folder, which any number of processes share; of one that has grown too large what
was used least recently goes. Where there is no such file, or it cannot be used, everything is computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from functools import cache
from pathlib import Path

import numpy as np

from ..folders import user_cache
from .versions import versions

log = logging.getLogger("convgen.lowering")
#: Names the file; an empty text means that nothing is kept.
VARIABLE = "CONVGEN_CODE_CACHE"
#: Bytes of values above which the least recently used half goes.
MOST_BYTES = 1 << 29
#: Seconds that a process waits for another one that writes.
BUSY_SECONDS = 5.0
#: Seconds after which it is written down again that a value is used.
USED_SECONDS = 86400
#: What generates code.
_PACKAGES = ("convgen", "convgen.schedules", "convgen.targets")
_TABLE = (
    "CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value BLOB NOT NULL, digest BLOB NOT NULL, "
    "used INTEGER NOT NULL)"
)


@cache
def sources_digest() -> bytes:
    """Of the text of every Python file that code is made by."""
    digest = hashlib.sha256()
    for name in _PACKAGES:
        for folder in importlib.import_module(name).__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(b"\0".join((str(path.relative_to(folder)).encode(), path.read_bytes(), b"")))
    return digest.digest()


def key_of(*parts: object) -> bytes:
    """What a value is known by.

    Args:
        parts: all that it depends on besides the versions: numbers, texts, and tuples, mappings, sets and dataclasses
            of such. Every field counts, whatever an object's ``repr`` shows.

    Raises:
        TypeError: something else is among them.
    """
    everything = (sorted(versions().items()), sys.version, sources_digest(), parts)
    return hashlib.sha256(repr(_plain(everything)).encode()).digest()


def _plain(part: object) -> object:
    """A part as text, numbers and tuples, from which it could be made again."""
    if part is None or type(part) in (bool, int, float, str, bytes):
        return part
    if isinstance(part, np.generic):
        return (part.dtype.str, part.item())
    if isinstance(part, Enum):
        return (type(part).__qualname__, part.name)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        values = tuple((field.name, _plain(getattr(part, field.name))) for field in dataclasses.fields(part))
        return (type(part).__qualname__, values)
    if isinstance(part, tuple | list):
        return (type(part).__qualname__, tuple(map(_plain, part)))
    if isinstance(part, Mapping):
        return ("mapping", tuple(sorted((str(key), _plain(key), _plain(value)) for key, value in part.items())))
    if isinstance(part, Set):
        return ("set", tuple(sorted(map(repr, map(_plain, part)))))
    raise TypeError(f"key: expected text, numbers and what consists of them, found {type(part).__qualname__}")


class Kept:
    """Values in a file.

    Args:
        path: of the file, which is made where it is missing.
        most: bytes of values above which the least recently used half goes.
    """

    def __init__(self, path: Path, most: int = MOST_BYTES) -> None:
        self.path, self._most = path, most

    def find(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of the keys that have one."""
        found: dict[bytes, bytes] = {}
        now = int(time.time())
        with self._left_undone("read"), self._opened() as db:
            for key in keys:
                row = db.execute("SELECT value, digest, used FROM kept WHERE key = ?", (key,)).fetchone()
                if row is None or hashlib.sha256(row[0]).digest() != row[1]:
                    continue
                found[key] = row[0]
                if now - row[2] > USED_SECONDS:
                    db.execute("UPDATE kept SET used = ? WHERE key = ?", (now, key))
        return found

    def add(self, values: Mapping[bytes, bytes]) -> None:
        """Keep values."""
        if not values:
            return
        now = int(time.time())
        rows = [(key, value, hashlib.sha256(value).digest(), now) for key, value in values.items()]
        with self._left_undone("written"), self._opened() as db:
            db.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?)", rows)
            (total,) = db.execute("SELECT COALESCE(SUM(LENGTH(value)), 0) FROM kept").fetchone()
            if total > self._most:
                _prune(db, self._most // 2)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection, whose changes are committed together."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as db, db:
            db.execute("PRAGMA synchronous = OFF")  # what a power failure damages has another digest
            db.execute(_TABLE)
            yield db

    @contextlib.contextmanager
    def _left_undone(self, what: str) -> Iterator[None]:
        """In which what fails is left undone: it costs time only. A file that is damaged goes."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            log.info("%s: cannot be %s: %s", self.path, what, error)
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                self.path.unlink(missing_ok=True)


class _Nothing(Kept):
    """Where nothing is kept."""

    def __init__(self) -> None:
        super().__init__(Path())

    def find(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return {}

    def add(self, values: Mapping[bytes, bytes]) -> None:
        pass


def _prune(db: sqlite3.Connection, left: int) -> None:
    """Leave so many bytes of what was used last."""
    for key, size in db.execute("SELECT key, LENGTH(value) FROM kept ORDER BY used DESC, rowid DESC").fetchall():
        left -= size
        if left < 0:
            db.execute("DELETE FROM kept WHERE key = ?", (key,))


def kept() -> Kept:
    """The values of this user."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Kept(Path(named)) if named else _Nothing()
    folder = user_cache()
    return Kept(folder / "code.sqlite") if folder else _Nothing()
