"""A fleet of real processes on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convgen.errors import MeasureError
from convgen.measure.fleet import Devices, status

KEY = "board"


#: For processes to start on a busy machine.
LONG = 120.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for a condition; its value."""
    end = time.monotonic() + LONG
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.1)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


class Fleet:
    """A tracker and servers, started by the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.tracker = f"127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start("tracker", "tracker", "--port", str(self.port))

    def start(self, name: str, *words: str) -> None:
        with open(self.folder / name, "wb") as log:
            command = [sys.executable, "-m", "convgen", "fleet", *words]
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def serve(self, name: str, *words: str) -> None:
        self.start(name, "serve", "--tracker", self.tracker, "--key", KEY, "--name", name, *words)

    def said(self, name: str) -> str:
        return (self.folder / name).read_text()

    def devices(self) -> Devices:
        try:
            found = {devices.key: devices for devices in status(self.tracker)}
        except MeasureError:  # not there yet
            found = {}
        return found.get(KEY, Devices(KEY, 0, 0, 0))

    def wait_for(self, count: int) -> None:
        until(lambda: self.devices().devices == count, f"expected {count} devices, found {self.devices()}")

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(LONG)
