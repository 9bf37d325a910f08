"""The file of results: a journal of JSON lines, each with a digest."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import platform
from typing import Any, Sequence

from .devices import Cpu
from .errors import Trouble

#: Version of the manifest and of the results.
FORMAT = 2


def digest(line: dict[str, Any]) -> str:
    """SHA-256 of a line of the results without its own ``digest``."""
    rest = {name: value for name, value in line.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def now() -> str:
    """ISO 8601, UTC, microseconds."""
    utc = datetime.timezone.utc
    return datetime.datetime.now(utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Results:
    """The file of results: one JSON object per line, each on the disk before the next trial begins.

    The first line says which bundle and machine they are of. An unfinished last line, which a kill may leave, is
    cut off.

    Args:
        path: the file, new or to be continued.
        manifest: SHA-256 of the bundle's manifest.
        machine: the facts of this machine.
        same: the names of those facts that must be the same in a file that is continued.

    Raises:
        Trouble: it cannot be written, another process writes it, or it is of another bundle or machine.
    """

    def __init__(
        self, path: str, manifest: str, machine: dict[str, Any], same: Sequence[str] = Cpu.machine_facts
    ) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise Trouble(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Trouble(f"{path}: another process is writing it") from None
        self._size = self._resume()
        if not self.lines:
            run = {"kind": "run", "format": FORMAT, "manifest": manifest, "facts": machine, "when": now()}
            self.add({**run, "python": platform.python_version()})
        header: dict[str, Any] = self.lines[0]
        self.run: str = header["digest"]
        if header.get("manifest") != manifest:
            raise Trouble(f"{path}: expected results of this bundle, found those of another one: name a new file")
        if any(header["facts"].get(name) != machine[name] for name in same):
            raise Trouble(f"{path}: expected results of this machine, found those of another one: name a new file")

    def _resume(self) -> int:
        """Read the whole lines, and cut off an unfinished one; returns the size of the file."""
        data = b""
        while True:
            part = os.read(self._file, 1 << 20)
            if not part:
                break
            data += part
        end = data.rfind(b"\n") + 1
        for number, text in enumerate(data[:end].splitlines(), 1):
            try:
                line = json.loads(text)
                is_whole = line["digest"] == digest(line)
            except (ValueError, TypeError, KeyError):
                is_whole = False
            if not is_whole:
                raise Trouble(f"{self.path}: line {number}: expected a line of results, found a damaged one")
            self.lines.append(line)
        if end < len(data):
            os.ftruncate(self._file, end)
        return end

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; it is on the disk when this returns, or there is nothing of it.

        Raises:
            Trouble: it cannot be written.
        """
        if self.lines:
            line = {**line, "run": self.run}
        line = {**line, "digest": digest(line)}
        data = json.dumps(line, sort_keys=True).encode() + b"\n"
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._size + written)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise Trouble(f"{self.path}: {error.strerror}; what was measured before is kept") from None
        self._size += len(data)
        self.lines.append(line)
