"""Measuring on other machines, through TVM's own RPC tracker and servers.

A device runs :func:`serve`: TVM's RPC server, which also answers ``convgen.…`` functions and reports
to TVM's tracker. The build machine's :class:`RemoteRunner` asks the tracker for every device of a
key and sends candidates to all of them. What is done to a candidate there is what
:mod:`convgen.measure.trial` does here, in a worker process of the device: a candidate that crashes costs a
trial and not the server.

A candidate's library and ``candidate.json`` travel with each trial; the inputs and the expected
output of a layer once per device, which keeps them by their digest.

TVM's RPC has no authentication: whoever reaches a server can run any program there.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import json
import logging
import multiprocessing
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..cuda.driver import device
from ..errors import MeasureError, SpecError
from ..hardware.machine import Machine, machine
from ..interrupts import interrupts_blocked, interrupts_held
from ..processes import end_with
from ..records.outcome import INTERRUPTED, OUTCOME_KEY, Result
from .trial import Expected, digest_of, memory_limit, run_artifact, run_duel
from .workers import LocalRunner, Runner, Samples, as_result

TRACKER_PORT, SERVER_PORT, PORTS = 9190, 9090, 100

#: Bytes of layers' data that a device keeps.
KEPT_BYTES = 4 << 30
#: Seconds that an unused session is kept, and that one is kept while others wait for a device.
IDLE, SHARE = 30.0, 20.0
#: Seconds for sending a candidate to a device and getting the answer back, besides the trial itself.
TRANSFER = 60.0
_LOOK = 2.0

_log = logging.getLogger(__name__)


# ---- addresses --------------------------------------------------------------------------------


def parse_address(field_name: str, text: str) -> tuple[str, int]:
    """``host:port``, an IPv6 host in brackets.

    Raises:
        SpecError: it is none; names the field.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise SpecError(field_name, "HOST:PORT", repr(text))
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at ``host``."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host or "0.0.0.0", None)}
        return bool(found) and all(ipaddress.ip_address(address).is_loopback for address in found)
    except (OSError, ValueError):
        return False


# ---- the tracker ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Devices:
    """The devices of one key: how many there are, how many nobody uses, how many requests wait for one."""

    key: str
    devices: int
    free: int
    queued: int

    @property
    def busy(self) -> int:
        return max(0, self.devices - self.free)


def status(tracker: str) -> list[Devices]:
    """What the tracker at ``host:port`` knows, by key.

    Raises:
        SpecError: that is no address.
        MeasureError: no tracker answers there.
    """
    from tvm.rpc import base

    address = parse_address("tracker", tracker)
    try:
        with socket.create_connection(address, timeout=5.0) as connection:
            connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            if struct.unpack("<i", base.recvall(connection, 4))[0] != base.RPC_TRACKER_MAGIC:
                raise ValueError("another answer")
            base.sendjson(connection, [base.TrackerCode.SUMMARY])
            code, summary = base.recvjson(connection)
        servers = [str(server["key"]).removeprefix("server:") for server in summary["server_info"]]
        queues = {str(key): (int(q["free"]), int(q["pending"])) for key, q in summary["queue_info"].items()}
        if code != base.TrackerCode.SUCCESS:
            raise ValueError(f"code {code}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise MeasureError(f"tracker: expected TVM's RPC tracker at {tracker}, found {error}") from error
    found: dict[str, int] = dict.fromkeys(queues, 0)
    for server in servers:  # a proxy reports all its keys in one
        inner = re.fullmatch(r"proxy\[(.*)\]", server)
        for key in inner[1].split(",") if inner else [server]:
            found[key] = found.get(key, 0) + 1
    rows = [(key, count, *queues.get(key, (0, 0))) for key, count in sorted(found.items())]
    return [Devices(key, max(count, free), free, queued) for key, count, free, queued in rows if key]


def run_tracker(host: str, port: int, ready: Callable[[int], None] = lambda port: None) -> None:
    """Be TVM's tracker until interrupted; ``ready`` is told the port.

    Raises:
        MeasureError: the port cannot be had.
    """
    from tvm.rpc import base
    from tvm.rpc.tracker import PopenTrackerServerState

    try:
        with interrupts_blocked():
            state = PopenTrackerServerState(host, port, port + 1, silent=True)
    except (OSError, ValueError) as error:
        raise MeasureError(f"tracker: expected a free port at {host}:{port}, found {error}") from error
    try:
        ready(state.port)
        while state.thread.is_alive():
            state.thread.join(0.5)
    finally:
        with socket.create_connection((host, state.port), timeout=5.0) as connection:
            connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            base.recvall(connection, 4)
            base.sendjson(connection, [base.TrackerCode.STOP, state.stop_key])


# ---- a device ---------------------------------------------------------------------------------


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
    """Measure for others until interrupted; the server is started again where it ends.

    Args:
        tracker: ``host:port`` to report to.
        key: what kind of device this is; all devices of a key must be alike.
        host, port: where to listen; the first free port from 9090 on where None.
        proxy: of a device that cannot be reached: ``host:port`` of TVM's RPC proxy, instead of a tracker.
        threads_limit: threads a candidate may have at most.
        name: of this device in records; the host's where empty.
        note: told what happens.

    Raises:
        SpecError: an address is none, or the key is not a word.
        MeasureError: the port cannot be had.
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
    with tempfile.TemporaryDirectory(prefix="convgen-fleet-") as kept:
        prepare = partial(_prepare_server, os.getpid(), kept, threads_limit, name or socket.gethostname())
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


def _prepare_server(parent: int, kept: str, threads_limit: int | None, name: str) -> None:
    """Runs first in the process of TVM's server."""
    import tvm_ffi
    from tvm.rpc.server import PopenRPCServerState

    end_with(parent)
    # Sessions must be forks, as TVM means them to be: they find these functions.
    multiprocessing.set_start_method("fork", force=True)
    device = _Device(Path(kept), threads_limit, name)
    for function in (device.describe, device.has, device.keep, device.trial, device.duel):
        tvm_ffi.register_global_func(f"convgen.{function.__name__}", partial(_answer, function), override=True)

    def end_with_listener() -> None:
        """A server whose listening thread has failed would be deaf, but there."""
        while not (state := PopenRPCServerState.current):
            time.sleep(0.1)
        state.thread.join()
        os._exit(1)

    threading.Thread(target=end_with_listener, daemon=True).start()


def _answer(function: Callable[[Any], Any], request: str) -> str:
    return json.dumps(function(json.loads(request)))


class _Device:
    """What a device does: its methods answer the functions ``convgen.…`` of an RPC session.

    TVM gives each session a process, a fork of the server, in a folder of its own, where uploaded
    files lie.
    """

    def __init__(self, kept: Path, threads_limit: int | None, name: str) -> None:
        self.kept, self.name, self.server = kept, name, os.getpid()
        found = machine()
        limit = min(threads_limit or found.logical, found.logical)
        self.machine = replace(
            found, cores=min(found.cores, limit), logical=limit, llvm=_llvm_processor(), gpu=device()
        )
        self._runner: LocalRunner | None = None

    def describe(self, request: Any) -> dict[str, Any]:
        end_with(self.server)
        return {"name": self.name, "convgen": _version(), "machine": self.machine.to_dict()}

    def has(self, digest: str) -> bool:
        """Whether a layer's data are kept."""
        return self._folder(digest).is_dir()

    def keep(self, request: dict[str, Any]) -> None:
        """Keep uploaded files, whose names are those of the request's and whose digest is its digest."""
        names = [name for name in request["names"] if re.fullmatch(r"\w+\.npy", name)]
        folder = Path(tempfile.mkdtemp(dir=self.kept))
        for name in names:
            shutil.move(name, folder / name)
        if (found := digest_of([folder / name for name in sorted(names)])) != request["digest"]:
            shutil.rmtree(folder)
            raise MeasureError(f"data of a layer: expected the digest {request['digest']}, found {found}")
        os.replace(folder, self._folder(request["digest"]))
        others = sorted(self.kept.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for other in others:
            total += _bytes(other)
            if total > KEPT_BYTES and other != self._folder(request["digest"]):
                shutil.rmtree(other, ignore_errors=True)

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


def _version() -> str:
    return importlib.metadata.version("convgen")


def _llvm_processor() -> str:
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*"))


# ---- the build machine's side of a session, in a process of its own -----------------------------

_session: Any = None


def _open_session(address: tuple[str, int], key: str) -> dict[str, Any]:
    """Wait for a device of that key; what it says of itself."""
    global _session
    from tvm.rpc import connect_tracker

    _session = None
    _session = connect_tracker(*address).request(key, max_retry=1)
    return dict(_call("describe", None))


def _call(function: str, request: Any) -> Any:
    return json.loads(str(_session.get_function(f"convgen.{function}")(json.dumps(request))))


def _measure_there(function: str, paths: list[str], directory: str, digest: str, request: dict[str, Any]) -> Any:
    """Send what the device lacks, then the candidates, and measure."""
    if not _call("has", digest):
        names = sorted(path.name for path in Path(directory).glob("*.npy"))
        for name in names:
            _session.upload(str(Path(directory) / name), name)
        _call("keep", {"digest": digest, "names": names})
    for index, path in enumerate(paths):
        _session.upload(path, f"{index}.so")
        _session.upload(str(Path(path).with_name("candidate.json")), f"{index}.json")
    return _call(function, request | {"digest": digest, "candidates": len(paths)})


# ---- the build machine --------------------------------------------------------------------------


@dataclass
class _Job:
    """A question to any device, and who waits for the answer: (what was answered, the device's name)."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    patience: float
    answer: Future[Any] = field(default_factory=Future)
    attempts: int = 0


class _Lost(Exception):  # noqa: N818
    """A device that does not answer any more."""


class RemoteRunner(Runner):
    """All devices that a tracker has under one key, each with a session and a process here that holds it.

    A device that dies meanwhile costs another try, on whichever device is there; a candidate that
    crashes there costs its trial. A session is given back when nothing was to be measured for a
    while, or when others wait for a device.

    Args:
        tracker: ``host:port`` of TVM's RPC tracker.
        key: of the devices; they must be alike.
        timeout: seconds after which a candidate is killed on its device.
        retries: how often a trial is tried again whose device was lost.
        patience: seconds to wait for a device where the tracker knows none.

    Raises:
        SpecError: ``tracker`` is no address.
        MeasureError: there is no tracker, or it knows no device of that key.
    """

    isolated = True

    def __init__(
        self, tracker: str, key: str, *, timeout: float = 60.0, retries: int = 3, patience: float = 60.0
    ) -> None:
        self.tracker, self.key, self.timeout, self.retries, self.patience = tracker, key, timeout, retries, patience
        self._address = parse_address("tracker", tracker)
        found = {devices.key: devices.devices for devices in status(tracker)}
        if not found.get(key):
            known = ", ".join(k for k, count in found.items() if count) or "none"
            raise MeasureError(f"tracker {tracker}: expected devices of key {key!r}, found {known}")
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._error: MeasureError | None = None
        self._closing = False
        #: Workers that hold a session.
        self._connected: set[int] = set()
        self._machine: Machine | None = None
        self._references: dict[str, float] = {}
        self._links: list[tuple[threading.Thread, Any]] = []
        self._grow(found[key])
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    # ---- the interface ------------------------------------------------------------------------

    @property
    def devices(self) -> int:  # type: ignore[override]
        """How many the tracker has known of."""
        return len(self._links)

    def machine(self) -> Machine:
        """The facts of the devices, for ``resolve(spelling, machine=…)``; waits for the first one.

        Raises:
            MeasureError: no device answers, or they differ.
        """
        if self._machine is None:
            self._submit(_Job(_call, ("describe", None), TRANSFER)).result()
        if self._machine is None:
            raise MeasureError(f"key {self.key}: closed before a device has answered")
        return self._machine

    @property
    def hardware(self) -> str:
        """Fingerprint of the devices."""
        return self.machine().fingerprint

    def submit(
        self, path: str, expected: Expected, threads: int, *, seconds: float, hopeless: float = 0.0
    ) -> Future[Result]:
        request = {"threads": threads, "seconds": seconds, "hopeless": hopeless}
        return self._measure("trial", [path], expected, request, self._result)

    def duel(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Future[Samples | Result]:
        def samples(answer: Any, device: str) -> Samples | Result:
            return as_result(answer, device=device) if isinstance(answer, dict) else answer

        return self._measure("duel", list(paths), expected, {"threads": threads, "rounds": rounds}, samples)

    def close(self) -> None:
        with interrupts_held():
            with self._changed:
                self._closing = True
                waiting = list(self._jobs)
                self._jobs.clear()
                self._changed.notify_all()
            for job in waiting:
                job.answer.set_result((INTERRUPTED, ""))
            for thread, worker in self._links:
                while thread.is_alive():  # it may just have started a process
                    if process := worker._proc:
                        process.kill()
                    thread.join(0.1)

    # ---- jobs -----------------------------------------------------------------------------------

    def _measure(
        self,
        function: str,
        paths: list[str],
        expected: Expected,
        request: dict[str, Any],
        read: Callable[[Any, str], Any],
    ) -> Future[Any]:
        arguments = (function, paths, str(expected.directory), expected.digest, request | {"timeout": self.timeout})
        inner = self._submit(_Job(_measure_there, arguments, self.timeout + TRANSFER))
        outer: Future[Any] = Future()

        def done(inner: Future[Any]) -> None:
            if error := inner.exception():
                outer.set_exception(error)
                return
            answer, device = inner.result()
            outer.set_result(answer if isinstance(answer, Result) else read(answer, device))

        inner.add_done_callback(done)
        return outer

    def _result(self, answer: Any, device: str) -> Result:
        reference = answer.get("reference")
        first = self._references.setdefault(device, reference) if reference else None
        return as_result(answer, first, device)

    def _submit(self, job: _Job) -> Future[Any]:
        with self._changed:
            if self._error:
                job.answer.set_exception(self._error)
            elif self._closing:
                job.answer.set_result((INTERRUPTED, ""))
            else:
                self._jobs.append(job)
                self._changed.notify_all()
        return job.answer

    def _fail(self, error: MeasureError, *, for_good: bool = False) -> None:
        """All that wait get the error; those to come as well where it is for good."""
        with self._changed:
            self._error = error if for_good else self._error
            waiting = list(self._jobs)
            self._jobs.clear()
        for job in waiting:
            job.answer.set_exception(error)

    def _again(self, job: _Job, reason: str) -> None:
        """Another try, before all other jobs, unless there were enough."""
        job.attempts += 1
        _log.warning("key %s: %s; try %d of %d", self.key, reason, job.attempts, self.retries + 1)
        with self._changed:
            if self._closing:
                job.answer.set_result((INTERRUPTED, ""))
            elif self._error:
                job.answer.set_exception(self._error)
            elif job.attempts <= self.retries:
                self._jobs.appendleft(job)
                self._changed.notify_all()
            else:
                text = f"key {self.key}: expected an answer of a device, found none in {job.attempts} tries: {reason}"
                job.answer.set_exception(MeasureError(text))

    # ---- devices --------------------------------------------------------------------------------

    def _grow(self, count: int) -> None:
        from tvm.support.popen_pool import PopenWorker

        while len(self._links) < count and not self._closing:
            quiet = subprocess.DEVNULL  # of TVM's own words on lost connections
            worker = PopenWorker(end_with, (os.getpid(),), stdout=quiet, stderr=quiet)
            thread = threading.Thread(target=self._use_device, args=(worker,), daemon=True)
            self._links.append((thread, worker))
            with interrupts_blocked():
                thread.start()

    def _use_device(self, worker: Any) -> None:
        """A thread with a session: ask for a device when there is work, and give it the jobs."""
        device = ""
        since = last = 0.0
        try:
            while self._work_waits(until=last + IDLE if device else None):
                try:
                    if not device:
                        device = self._connect(worker)
                        since = last = time.monotonic()
                    with self._changed:
                        job = self._jobs.popleft() if self._jobs and not self._closing else None
                    if job:
                        self._ask(worker, job, device)
                        last = time.monotonic()
                    if time.monotonic() - since > SHARE and self._others_wait():
                        device = self._disconnect(worker)
                except _Lost as lost:
                    if device:
                        _log.warning("key %s: device %s is lost: %s", self.key, device, lost)
                    device = self._disconnect(worker)
                    time.sleep(0 if self._closing else 0.5)
                if device and not self._jobs and time.monotonic() - last > IDLE:
                    device = self._disconnect(worker)
        finally:
            worker.kill()

    def _work_waits(self, until: float | None) -> bool:
        """Wait for a job, or until then; false when it is time to end."""
        with self._changed:
            while not self._jobs and not self._closing:
                if until is not None and time.monotonic() >= until:
                    break
                self._changed.wait(None if until is None else max(0.0, until - time.monotonic()))
            return not self._closing

    def _connect(self, worker: Any) -> str:
        """A session with a device, which may take as long as others use it; its name."""
        said = self._exchange(worker, _open_session, (self._address, self.key), None)
        name = str(said.get("name"))
        if said.get("convgen") != _version():
            text = f"convgen on device {name}: expected {_version()}, as here, found {said.get('convgen')}"
            self._fail(MeasureError(text), for_good=True)
            raise _Lost(text)
        try:
            found = Machine.from_dict(said.get("machine"), f"device {name}")
        except MeasureError as error:
            self._fail(error, for_good=True)
            raise _Lost(str(error)) from error
        with self._changed:
            self._machine = known = self._machine or found
            found = replace(found, memory=known.memory)  # devices of a kind differ by some pages
            if found == known:
                self._connected.add(id(worker))
        if found != known:
            name_of = next(n for n in ("fingerprint", *known.to_dict()) if getattr(found, n) != getattr(known, n))
            text = f"device {name} of key {self.key}: {name_of}: expected {getattr(known, name_of)}, as the others have"
            self._fail(MeasureError(f"{text}, found {getattr(found, name_of)}"), for_good=True)
            raise _Lost(text)
        return name

    def _disconnect(self, worker: Any) -> str:
        worker.kill()
        with self._changed:
            self._connected.discard(id(worker))
        return ""

    def _ask(self, worker: Any, job: _Job, device: str) -> None:
        """Give a device a job; where it is lost, the job goes to another one.

        Raises:
            _Lost: the session is over.
        """
        try:
            answer = self._exchange(worker, job.function, job.arguments, job.patience)
        except _Lost as lost:
            self._again(job, f"device {device}: {lost}")
            raise
        except Exception as error:  # said by the device: asking again would not help
            job.answer.set_exception(MeasureError(f"device {device}: {_last_line(error)}"))
            return
        job.answer.set_result((answer, device))

    def _exchange(self, worker: Any, function: Callable[..., Any], arguments: Any, patience: float | None) -> Any:
        """A function's answer in the process that holds the session.

        Raises:
            _Lost: the device or that process is gone, or takes too long.
            Exception: what a device said of a request that it refuses.
        """
        try:
            worker.send(function, arguments, timeout=patience)
            return worker.recv()
        except TimeoutError as error:
            raise _Lost(f"no answer in {patience:.0f} s") from error
        except Exception as error:
            if "caught from RPC call" in str(error) and function is not _open_session:
                raise
            raise _Lost(_last_line(error)) from error

    def _others_wait(self) -> bool:
        try:
            return any(d.key == self.key and d.queued and not d.free for d in status(self.tracker))
        except MeasureError:
            return False

    def _watch(self) -> None:
        """Notice devices that come, and that none is left."""
        missing_since: float | None = None
        while not self._closing:
            with self._changed:
                self._changed.wait(_LOOK)
                idle = not self._jobs or bool(self._connected)
            if self._closing or idle:
                missing_since = None
                continue
            try:
                count = sum(d.devices for d in status(self.tracker) if d.key == self.key)
                reason = f"none at tracker {self.tracker}"
            except MeasureError as error:
                count, reason = 0, str(error)
            if count:
                missing_since = None
                self._grow(count)
                time.sleep(_LOOK)
            else:
                missing_since = missing_since or time.monotonic()
                if time.monotonic() - missing_since > self.patience:
                    self._fail(MeasureError(f"key {self.key}: expected a device, found {reason}"))
                time.sleep(min(_LOOK, self.patience))


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
