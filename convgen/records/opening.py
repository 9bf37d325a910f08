"""Opening the record store that a caller means: the default one, a path, an open one or none."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import RecordError
from ..folders import TemporaryFolder
from .database import put_in_place, refused
from .store import RecordStore, default_path

#: What a caller may say of the store; see :func:`open_store`.
Records = RecordStore | str | Path | bool | None


@contextmanager
def open_store(records: Records, *, write: bool = True) -> Iterator[RecordStore | None]:
    """The store that ``records`` means, open inside the ``with`` block.

    Args:
        records: None or True: the default store; False: no store; a path; or an open store, which stays open.
        write: whether the caller writes to it. Otherwise a store that this process may only read will do, or a copy
            of one on a full disk; and an empty one, where there is no default store and none can be made.
    """
    if isinstance(records, RecordStore):
        yield records
    elif records is False:
        yield None
    elif write:
        with RecordStore(None if records is True else records) as store:
            yield store
    else:
        with ExitStack() as stack:
            path = _default() if records is None or records is True else Path(records)
            refused = False
            if path is not None and _is_writable(path):
                try:
                    store = stack.enter_context(RecordStore(path))
                except RecordError as error:
                    if not _is_systems(error) or not (records in (None, True) or os.path.exists(path)):
                        raise
                    path, refused = (path if os.path.exists(path) else None), True
                else:
                    yield store
                    return
            if path is None or refused or _needs_log(path):
                path = _copied(path, stack.enter_context(TemporaryFolder()))
            yield stack.enter_context(RecordStore(path, readonly=True))


@contextmanager
def open_to_fill(path: Path | None) -> Iterator[RecordStore]:
    """The store at a path, the default one where None, to add records to inside the ``with`` block.

    Where there is none, one beside is filled, and gets its name in the end: a block that fails or adds nothing leaves
    none.
    """
    path = default_path() if path is None else path
    if _is_there(path):
        with RecordStore(path) as store:
            yield store
        return
    with ExitStack() as stack:
        try:
            folder = TemporaryFolder(_existing_folder(path))
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror}") from error
        stack.callback(folder.close)
        made = folder.path / path.name
        try:
            with RecordStore(made) as store:
                yield store
                is_empty = not len(store)
        except RecordError as error:
            raise RecordError(str(error).replace(str(made), str(path))) from error
        if not is_empty and not _is_placed(made, path):  # another process has made one meanwhile
            with RecordStore(path) as store:
                store.merge(made)


def _is_placed(made: Path, path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return put_in_place(made, path)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error


def _is_there(path: Path) -> bool:
    """Whether there is a store, or what is left of one: its log, which is no new one's."""
    return os.path.exists(path) or os.path.exists(f"{os.path.realpath(path)}-wal")


def _existing_folder(path: Path) -> Path:
    """The folder that a file would be in, or the nearest one above it that there is."""
    return next(parent for parent in path.resolve().parents if os.path.lexists(parent))


def expect_writable(records: Records) -> None:
    """See that the store that ``records`` means can be written, or made, without making it.

    Raises:
        RecordError: neither can be, or it is no store; says why.
    """
    if isinstance(records, RecordStore) or records is False:
        return
    path = default_path() if records is None or records is True else Path(records)
    if _is_there(path):
        RecordStore(path).close()
        if reason := refused(path):
            raise RecordError(f"{path}: {reason}")
        return
    try:
        TemporaryFolder(_existing_folder(path)).close()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error


def _default() -> Path | None:
    """The default store; None where there is none, and none can be made."""
    try:
        path = default_path()
    except RecordError:  # there is no home directory
        return None
    return path if os.path.exists(path) or _is_writable(path) else None


def refused_default() -> Path | None:
    """The store that the environment names, where there is none and none can be made; None where that is well."""
    path = default_path() if os.environ.get("CONVGEN_RECORDS") else None
    return None if path is None or os.path.exists(path) or _is_writable(path) else path


def _copied(path: Path | None, folder: Path) -> Path:
    """A store in a folder: a copy, or a new one."""
    copy = folder / "records.sqlite"
    if path is not None:
        try:
            for end in ("", "-wal"):
                if not end or os.path.exists(f"{os.path.realpath(path)}{end}"):
                    shutil.copyfile(f"{os.path.realpath(path)}{end}", f"{copy}{end}")
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror}") from error
    RecordStore(copy).close()  # which makes a store, or what the log says part of it
    return copy


def _is_systems(error: RecordError) -> bool:
    """Whether the system refused to write, as on a full disk, whatever the permissions say."""
    cause = error.__cause__
    return isinstance(cause, OSError) or getattr(cause, "sqlite_errorcode", 0) & 0xFF in _REFUSED


_REFUSED = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


def _is_writable(path: Path) -> bool:
    """Whether this process may write to a store, and to its folder, where SQLite writes the log; or may make them."""
    path = path.resolve()
    folder = _existing_folder(path)
    needed = [folder, path] if os.path.exists(path) else [folder]
    return folder.is_dir() and all(os.access(each, os.W_OK, effective_ids=True) for each in needed)


def _needs_log(path: Path) -> bool:
    """Whether a killed process has left a log, and SQLite cannot make its index where the store lies."""
    name = os.path.realpath(path)
    return os.path.exists(name) and os.path.exists(f"{name}-wal") and not os.path.exists(f"{name}-shm")
