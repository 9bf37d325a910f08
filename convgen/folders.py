"""Temporary folders: private, unpredictable, and gone in the end even where their process was killed.

A process has one folder in the system's temporary one, ``convgen-<machine>-<random>``, and all its others inside that;
what is to be renamed into place has a hidden one beside. A lock on the folder goes with its process, however that
ends: where it is free, nobody is left who needs the folder, and the next process of the same user removes it.
(systemd-tmpfiles, too, leaves alone what has a lock.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import stat
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from .errors import FolderError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: The machine is in the name, because locks may be a machine's own where several share a file system.
_PREFIX = f"convgen-{zlib.crc32(os.uname().nodename.encode()):08x}-"
_NAME = re.compile(rf"\.?{_PREFIX}[a-z0-9_]{{8}}")


class TemporaryFolder:
    """A new folder at ``path``, which goes with the object, with the ``with`` block, or with ``close()``.

    Args:
        beside: where it lies, hidden, for what is to be renamed into place there; the system's temporary one if None.
        runs: whether what is in it will be loaded or run.

    Raises:
        FolderError: the system's temporary folder cannot be used; says why, and what helps.
        OSError: the folder ``beside`` cannot be written.
    """

    close: Callable[[], object]

    def __init__(self, beside: Path | None = None, *, runs: bool = False) -> None:
        self._is_systems = beside is None
        if beside is not None:
            self._owned = _Owned(os.path.abspath(beside), ".")
            self.path, self.close = self._owned.path, self._owned.close
            return
        parent = _systems()
        try:
            owned = _own.get(key := (os.getpid(), os.geteuid(), parent))
            if owned is None or not owned.path.exists():
                owned = _own[key] = _Owned(parent)
            if runs and is_noexec(owned.path):
                hint = "set TMPDIR to a folder on another file system"
                raise FolderError(f"{parent}: nothing can be loaded from there: it is mounted noexec; {hint}")
            self.path = Path(tempfile.mkdtemp(prefix="", dir=owned.path))
        except OSError as error:
            raise FolderError(f"{parent}: cannot be written: {error.strerror}; {_WRITABLE}") from error
        self.close = weakref.finalize(self, _remove, self.path, os.getpid(), owned)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What is done in it; where that fails as the file system is full, this says so.

        Raises:
            FolderError: there is no space left.
            OSError: there is none in the folder beside, which a compiler says in text.
        """
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError | FolderError) and not self._is_systems and _is_full(error, self.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path.parent)) from error
            if self._is_systems and not isinstance(error, FolderError) and _is_full(error, self.path):
                hint = "set TMPDIR to a folder with more, or make room there"
                raise FolderError(f"{self.path.parent.parent}: no space left; {hint}") from error
            raise

    def __enter__(self) -> Path:
        self._writing = self.writing()
        self._writing.__enter__()
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writing.__exit__(kind, error, trace)
        finally:
            self.close()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file's new contents, under its name: at the end of the block they take its place, whole or not
    at all, with its permissions.

    Of a link, what it leads to is replaced. A device, a pipe, or what is open already (``/dev/stdout``) stays what it
    is: the contents are written to it.

    Raises:
        OSError: it, or its folder, cannot be written.
    """
    if not _is_replaceable(path):
        with TemporaryFolder() as folder:
            yield folder / path.name
            with (folder / path.name).open("rb") as made, _opened(path) as out:
                shutil.copyfileobj(made, out)
        return
    real = Path(os.path.realpath(path))
    with TemporaryFolder(real.parent) as folder:
        yield folder / path.name
        if real.exists():
            shutil.copymode(real, folder / path.name)
        os.replace(folder / path.name, real)


def _is_replaceable(path: Path) -> bool:
    """Whether a path leads to a file in a folder, or to nothing yet."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return True
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder is refused where it would be replaced
        return False
    return not os.path.islink(_end(path))


def _end(path: Path) -> str:
    """What a path leads to by links, but for those of open files in ``/proc``, which are no names of theirs."""
    at = os.path.abspath(path)
    while os.path.islink(at) and not os.path.realpath(os.path.dirname(at)).startswith("/proc/"):
        at = os.path.join(os.path.dirname(at), os.readlink(at))
    return at


def _opened(path: Path) -> BinaryIO:
    """What is no replaceable file, to write to: of what is open here after what was written, with what comes after."""
    folder, name = os.path.split(_end(path))
    if os.path.realpath(folder) == f"/proc/{os.getpid()}/fd":
        return os.fdopen(os.dup(int(name)), "wb")
    return path.open("ab")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone in a folder, of all who come by this; not on a file system without locks.

    Raises:
        OSError: it cannot be opened.
    """
    lock = os.open(os.path.realpath(folder), _FOLDER)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _systems() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:  # it tries several
        raise FolderError(f"{error.strerror}; {_WRITABLE}") from error


_WRITABLE = "set TMPDIR to a folder that can be written"


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether something failed as there was no space in a folder; compilers say it in text, or nothing at all."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if any(os.strerror(number) in str(error) for number in _FULL):
        return True
    with contextlib.suppress(OSError):
        left = os.statvfs(folder)
        return left.f_bavail * left.f_frsize < 1 << 16
    return False


def is_noexec(path: str | os.PathLike[str]) -> bool:
    """Whether no library can be loaded, and no program run, from the file system that a path is on."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except OSError:
        return False


def user_cache() -> Path | None:
    """Where this user's caches lie; None where the user has no home directory."""
    import platformdirs  # here: an exported library loads with NumPy alone

    path = platformdirs.user_cache_path("convgen")
    return path if path.is_absolute() else None


def open_shared(name: str) -> int:
    """A descriptor of the folder of that name that all processes of this user share, in the system's temporary one.

    Others know the name as well, and may put something else in its place.

    Raises:
        OSError: it is something else, such as a link, or others may write into it.
        FolderError: there is no temporary folder.
    """
    path = Path(_systems()) / f"{name}-{os.geteuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    folder = os.open(path, _FOLDER)
    if not _is_private(folder):
        os.close(folder)
        raise PermissionError(errno.EPERM, "expected a folder of this user's alone", str(path))
    return folder


# ---- owners ------------------------------------------------------------------------------------


class _Owned:
    """A folder with a lock that this process has."""

    close: Callable[[], object]

    def __init__(self, parent: str, hidden: str = "") -> None:
        _sweep(parent, os.getpid())
        self.path, lock = _claimed(parent, hidden)
        self.close = weakref.finalize(self, _remove, self.path, os.getpid(), lock)


#: Each process's folder in the system's, by its number, its user and where that is; kept by the folders inside.
_own: weakref.WeakValueDictionary[tuple[int, int, str], _Owned] = weakref.WeakValueDictionary()


def _claimed(parent: str, hidden: str) -> tuple[Path, int]:
    """A new folder and its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=hidden + _PREFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, _FOLDER)
            with contextlib.suppress(OSError):  # a file system without locks, where no process removes another's
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(path, lock):
                return path, lock
            os.close(lock)  # a process that looked for what others left was faster


def _remove(path: Path, process: int, owner: _Owned | int) -> None:
    """Remove a folder, unless it is the parent's of a forked process; then let go of its lock, or of what has it."""
    if process == os.getpid():
        shutil.rmtree(path, ignore_errors=True)
    if isinstance(owner, int):
        os.close(owner)


@functools.lru_cache(maxsize=64)
def _sweep(parent: str, _process: int) -> None:
    """Remove the folders of killed processes: of this user's and this machine's those whose lock is free."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for path in [entry.path for entry in entries if _NAME.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                _remove_if_left(path)


def _remove_if_left(path: str) -> None:
    folder = os.open(path, _FOLDER)
    try:
        if _is_private(folder):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, folder):
                shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(folder)


def _is_private(folder: int) -> bool:
    status = os.fstat(folder)
    return status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077


def _is_at(path: str | Path, folder: int) -> bool:
    """Whether an open folder is still in its place."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(folder))
    except FileNotFoundError:
        return False
