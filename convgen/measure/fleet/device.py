"""A device: TVM's RPC server with the functions that measure."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...cuda.driver import device as gpu
from ...errors import MeasureError, SpecError
from ...folders import TemporaryFolder
from ...hardware.machine import machine
from ...hardware.processor import system_processor
from ...interrupts import interrupts_blocked
from ...processes import end_with
from ...records.outcome import OUTCOME_KEY, Result
from ..trial import digest_of, memory_limit, run_artifact, run_duel
from ..workers import LocalRunner
from .tracker import parse_address

#: Where servers listen: the first free one of ``PORTS`` ports.
SERVER_PORT, PORTS = 9090, 100
#: Bytes of layers' data that a device keeps.
KEPT_BYTES = 4 << 30


def serve(
    tracker: str | None,
    key: str,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    proxy: str | None = None,
    threads_limit: int | None = None,
    name: str = "",
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Measure for others until interrupted; a server that ends is started again.

    Args:
        tracker: ``host:port`` to report to.
        key: what kind of device this is; all devices of a key must be alike.
        host, port: where to listen; the first free port from 9090 on where None.
        proxy: ``host:port`` of TVM's RPC proxy, instead of a tracker, for a device that cannot be reached.
        threads_limit: threads a candidate may have at most.
        name: this device's name in records; the host's name where empty.
        note: called with a line of text about what happens.

    Raises:
        SpecError: an address is malformed, or the key is not a word.
        MeasureError: the port is taken or not allowed.
    """
    from tvm.rpc.server import Server

    if not re.fullmatch(r"[\w.+-]+", key):
        raise SpecError("key", "a word", repr(key))
    if (tracker is None) == (proxy is None):
        raise SpecError("tracker", "either a tracker or a proxy", "both" if tracker else "none")
    where: dict[str, Any] = {"tracker_addr": parse_address("tracker", tracker) if tracker else None}
    if proxy:
        proxy_host, proxy_port = parse_address("proxy", proxy)
        where |= {"host": proxy_host, "port": proxy_port, "is_proxy": True}
    else:
        first = SERVER_PORT if port is None else port
        where |= {"host": host, "port": first, "port_end": first + (PORTS if port is None else 1)}
    with TemporaryFolder() as kept, TemporaryFolder(runs=True) as sessions:
        prepare = partial(
            _prepare_server, os.getpid(), str(kept), str(sessions), threads_limit, name or socket.gethostname()
        )
        while True:
            try:
                with interrupts_blocked():
                    server = Server(key=key, silent=True, server_init_callback=prepare, **where)
            except (OSError, ValueError) as error:
                raise MeasureError(f"port: expected a free one, found {str(error).strip().splitlines()[-1]}") from error
            try:
                at = f"through the proxy at {proxy}" if proxy else f"at {host}:{server.port}"
                note(f"measuring for key {key} {at}, process {server.proc._proc.pid}")
                while server.proc.is_alive():
                    time.sleep(0.2)
                note(f"the server has ended, as when no tracker answers at {tracker or proxy}: starting it again")
                time.sleep(1.0)
            finally:
                server.terminate()


def _prepare_server(parent: int, kept: str, sessions: str, threads_limit: int | None, name: str) -> None:
    """Runs first in the process of TVM's server."""
    import tvm_ffi
    from tvm.rpc.server import PopenRPCServerState

    end_with(parent)
    tempfile.tempdir = sessions  # where TVM makes a folder for each, which a killed one leaves
    # Sessions must be forks of this process, as TVM means them to be, to find the functions registered below.
    multiprocessing.set_start_method("fork", force=True)
    device = Device(Path(kept), threads_limit, name)
    for function in (device.describe, device.has, device.keep, device.trial, device.duel):
        tvm_ffi.register_global_func(f"convgen.{function.__name__}", partial(_answer, function), override=True)

    def end_with_listener() -> None:
        """End the process with its listening thread: without it the server would still be there, and deaf."""
        while not (state := PopenRPCServerState.current):
            time.sleep(0.1)
        state.thread.join()
        os._exit(1)

    threading.Thread(target=end_with_listener, daemon=True).start()


def _answer(function: Callable[[Any], Any], request: str) -> str:
    return json.dumps(function(json.loads(request)))


class Device:
    """What a device does: each method answers the function ``convgen.<its name>`` of an RPC session.

    TVM gives each session a process, a fork of the server, in a folder of its own, where uploaded
    files lie.
    """

    def __init__(self, kept: Path, threads_limit: int | None, name: str) -> None:
        self.kept, self.name, self.server = kept, name, os.getpid()
        here = machine()
        limit = min(threads_limit or here.logical, here.logical)
        self.machine = replace(here, cores=min(here.cores, limit), logical=limit, llvm=system_processor(), gpu=gpu())
        self._runner: LocalRunner | None = None

    def describe(self, request: Any) -> dict[str, Any]:
        """The device's name, version of convgen and machine; the session's process ends with the server from now on."""
        end_with(self.server)
        return {"name": self.name, "convgen": version(), "machine": self.machine.to_dict()}

    def has(self, digest: str) -> bool:
        """Whether a layer's data are kept."""
        return self._folder(digest).is_dir()

    def keep(self, request: dict[str, Any]) -> None:
        """Keep the uploaded files that a request names, if their digest is the one it says."""
        names = [name for name in request["names"] if re.fullmatch(r"\w+\.npy", name)]
        folder = Path(tempfile.mkdtemp(dir=self.kept))
        for name in names:
            shutil.move(name, folder / name)
        digest = digest_of([folder / name for name in sorted(names)])
        if digest != request["digest"]:
            shutil.rmtree(folder)
            raise MeasureError(f"data of a layer: expected the digest {request['digest']}, found {digest}")
        os.replace(folder, self._folder(request["digest"]))
        layers = sorted(self.kept.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for layer in layers:
            total += _bytes(layer)
            if total > KEPT_BYTES and layer != self._folder(digest):
                shutil.rmtree(layer, ignore_errors=True)

    def trial(self, request: dict[str, Any]) -> Any:
        """:func:`convgen.measure.trial.run_artifact` on an uploaded library."""
        return self._measure(request, lambda paths, folder: (
            run_artifact, paths[0], folder, request["threads"], request["seconds"], request["hopeless"]
        ))  # fmt: skip

    def duel(self, request: dict[str, Any]) -> Any:
        """:func:`convgen.measure.trial.run_duel` on uploaded libraries."""
        return self._measure(
            request, lambda paths, folder: (run_duel, paths, folder, request["threads"], request["rounds"])
        )

    def _measure(self, request: dict[str, Any], job: Callable[[list[str], str], tuple[Any, ...]]) -> Any:
        """Run a job, a function and its arguments made from the libraries' paths and the data's folder, in a worker."""
        if not 1 <= (threads := request["threads"]) <= self.machine.logical:
            raise MeasureError(f"threads: expected at most {self.machine.logical} on {self.name}, found {threads}")
        data = self._folder(request["digest"])
        os.utime(data)
        if self._runner is None or self._runner.pool.timeout != request["timeout"]:
            self.close()
            self._runner = LocalRunner(timeout=request["timeout"])
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            paths = []
            for index in range(request["candidates"]):
                place = Path(folder) / str(index)
                place.mkdir()
                shutil.move(f"{index}.json", place / "candidate.json")
                paths.append(shutil.move(f"{index}.so", place / "lib.so"))
            memory = len(paths) * memory_limit(_bytes(data))
            answer = self._runner.pool.submit(*job([str(p) for p in paths], str(data)), memory=memory).result()
        return {OUTCOME_KEY: answer.outcome, "error": answer.error} if isinstance(answer, Result) else answer

    def close(self) -> None:
        if self._runner:
            self._runner.close()
            self._runner = None

    def _folder(self, digest: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise MeasureError(f"digest: expected 64 hexadecimal digits, found {digest!r}")
        return self.kept / digest


def version() -> str:
    return importlib.metadata.version("convgen")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*"))
