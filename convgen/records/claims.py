"""Who is measuring which trial right now, so that two jobs on one store do not measure the same.

A claim is a lock on one byte of a file beside the store, at an offset made from the trial's key. The
operating system holds it, so that it ends with the process that took it, however that ends. The
locks belong to the opened file, not to the process: two jobs in one process keep out of each other's
way as well.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from types import TracebackType

from ..errors import RecordError

#: C's ``struct flock``: type, whence, start, length, process (0 for locks of an opened file), padding.
_FLOCK = struct.Struct("hhqqi0q")
_OFFSET_BITS = 63


def claims_path(store: Path | str) -> Path:
    """The lock file of a store; links to the store lead to the same."""
    return Path(f"{os.path.realpath(store)}.claims")


class Claims:
    """The trials that one job has claimed.

    A child process that inherits the opened file keeps the claims alive; it is closed on ``exec``.

    Args:
        path: the lock file, see :func:`claims_path`; made where it is missing, always empty.

    Raises:
        RecordError: the file cannot be opened, or its file system has no such locks.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._held: set[str] = set()
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RecordError(f"{self.path}: {error.strerror}") from error

    def take(self, trial_key: str) -> bool:
        """Claim a trial; False where another job has it.

        Args:
            trial_key: see :func:`convgen.records.record.trial_key`.
        """
        if trial_key not in self._held:
            if not self._lock(fcntl.F_WRLCK, trial_key):
                return False
            self._held.add(trial_key)
        return True

    def drop(self, trial_key: str) -> None:
        """Give a claim back; one that is not held is none."""
        if trial_key in self._held:
            self._held.discard(trial_key)
            self._lock(fcntl.F_UNLCK, trial_key)

    def __len__(self) -> int:
        """How many are held."""
        return len(self._held)

    def close(self) -> None:
        """Give all claims back."""
        self._held.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self, kind: int, trial_key: str) -> bool:
        offset = int(trial_key[:16], 16) >> (64 - _OFFSET_BITS)
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise RecordError(f"{self.path}: locking: {error.strerror}") from error
        return True
