"""A copy beside a store, for as long as the store is rewritten in place.

SQLite writes a change to the log, and then moves it page by page into the file. Until the last page has arrived
neither is whole without the other. Adding appends, so that what was there before stays readable; removing and
compacting move every row. Until such a change is in the file a copy lies beside it, STORE.copy, made
while nobody may move anything into the file: all that was there before is in the copy, and what comes later is not
acknowledged before the file is whole again. Whoever opens a store and finds a copy that no living process holds
puts back what the store has lost (:class:`~convgen.records.store.RecordStore`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import RecordError
from .database import Database


def copy_path(store: Path) -> Path:
    """Where the copy of a store is; links to the store lead to the same."""
    return Path(f"{os.path.realpath(store)}.copy")


@contextlib.contextmanager
def rewriting(database: Database, flush: Callable[[], bool]) -> Iterator[None]:
    """Keep a copy of the store while the body changes it, and until ``flush`` says that the file has the change.

    Raises:
        RecordError: the copy cannot be made, or one was left since the store was opened; nothing has changed then.
    """
    copy = copy_path(database.path)
    with _locked_part(database.path) as file:
        part = Path(f"{copy}.part")
        try:
            with contextlib.closing(_snapshot(database)):  # nobody moves anything into the file
                database.run(lambda db: db.execute("VACUUM INTO ?", (str(part),)))
                os.fsync(file)
                part.rename(copy)
                _sync_folder(copy.parent)
                yield
        except OSError as error:
            raise RecordError(f"{copy}: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)
            if copy.exists() and flush():  # where the file does not have it yet, the next to open the store looks
                copy.unlink()


@contextlib.contextmanager
def left_copy(store: Path) -> Iterator[Path | None]:
    """The copy that a process left which ended while it rewrote a store, held; None where there is none.

    Waits for a living process that is rewriting the store.
    """
    copy = copy_path(store)
    found = None
    with contextlib.ExitStack() as held:
        for path in (Path(f"{copy}.part"), copy):
            try:
                file = held.enter_context(_opened(path, os.O_RDONLY))
            except FileNotFoundError:
                continue
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is(file, path):
                continue  # the process that held it has finished
            if path == copy:
                found = path
            else:
                with contextlib.suppress(OSError):  # in a folder that this process may not change
                    path.unlink()
        yield found


@contextlib.contextmanager
def _locked_part(store: Path) -> Iterator[int]:
    """The file that becomes the copy, empty and held: one process at a time rewrites a store."""
    copy = copy_path(store)
    part = Path(f"{copy}.part")
    while True:
        try:
            with _opened(part, os.O_RDWR | os.O_CREAT) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is(file, part):
                    continue  # the process that held it has made it its copy, or removed it
                if not copy.exists():
                    os.ftruncate(file, 0)
                    yield file
                    return
                part.unlink()
        except OSError as error:
            raise RecordError(f"{part}: {error.strerror}") from error
        with left_copy(store) as left:
            if left is not None:
                raise RecordError(f"{store}: rewriting it ended suddenly in another process; open it again")


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _is(file: int, path: Path) -> bool:
    """Whether a path still leads to an opened file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _snapshot(database: Database) -> Database:
    """A reader that has begun to read: the file stays as it is until it is closed."""
    reader = Database(database.path, readonly=True)
    try:
        reader.run(lambda db: db.execute("BEGIN"))
        reader.run(lambda db: db.execute("SELECT 1 FROM records LIMIT 1").fetchone())
    except BaseException:
        reader.close()
        raise
    return reader


def _sync_folder(folder: Path) -> None:
    with _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as file:
        os.fsync(file)
