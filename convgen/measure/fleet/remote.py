"""The build machine: a runner that has all devices of one key measure."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import MeasureError
from ...hardware.machine import Machine
from ...interrupts import interrupts_blocked, interrupts_held
from ...processes import end_with
from ...records.outcome import INTERRUPTED, Result
from ..standalone.words import one_line
from ..trial import Expected
from ..workers import Runner, Samples, as_result
from .device import version
from .session import call, measure_there, open_session
from .tracker import parse_address, status

#: Seconds that an unused session is kept, and that one is kept while others wait for a device.
IDLE, SHARE = 30.0, 20.0
#: Seconds for sending a candidate to a device and getting the answer back, besides the trial itself.
TRANSFER = 60.0
#: Seconds between looks at the tracker.
_LOOK = 2.0

_log = logging.getLogger(__name__)


@dataclass
class _Job:
    """A question to any device; the future gets (what was answered, the device's name).

    Attributes:
        patience: seconds to wait for the answer.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    patience: float
    answer: Future[Any] = field(default_factory=Future)
    attempts: int = 0


class _Lost(Exception):  # noqa: N818
    """A device does not answer any more."""


class RemoteRunner(Runner):
    """All devices that a tracker has under one key, each with a session and a process here that holds it.

    Where a device dies, its trial is tried again on another one; a candidate that crashes on a device costs its
    trial only. A session is given back when there was nothing to measure for a while, or when other programs wait
    for a device.

    Args:
        tracker: ``host:port`` of TVM's RPC tracker.
        key: of the devices; they must be alike.
        timeout: seconds after which a candidate is killed on its device.
        retries: how often a trial is tried again when its device was lost.
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
        counts = {devices.key: devices.devices for devices in status(tracker)}
        if not counts.get(key):
            known = ", ".join(other for other, count in counts.items() if count) or "none"
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
        self._grow(counts[key])
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    # ---- the interface ------------------------------------------------------------------------

    @property
    def devices(self) -> int:  # type: ignore[override]
        """The largest number of devices that the tracker has known at one time."""
        return len(self._links)

    def machine(self) -> Machine:
        """The facts of the devices, for ``resolve(spelling, machine=…)``; waits for the first device.

        Raises:
            MeasureError: no device answers, or they differ.
        """
        if self._machine is None:
            self._submit(_Job(call, ("describe", None), TRANSFER)).result()
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
        inner = self._submit(_Job(measure_there, arguments, self.timeout + TRANSFER))
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
        """Answer all jobs that wait with an error, and where it is for good those to come as well."""
        with self._changed:
            self._error = error if for_good else self._error
            waiting = list(self._jobs)
            self._jobs.clear()
        for job in waiting:
            job.answer.set_exception(error)

    def _again(self, job: _Job, reason: str) -> None:
        """Try a job again before all others, unless it was tried often enough."""
        job.attempts += 1
        _log.warning("key %s: %s; try %d of %d", self.key, one_line(reason), job.attempts, self.retries + 1)
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
        """What each thread does: ask for a device when there is work, and give it the jobs."""
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
                        _log.warning("%s", one_line(f"key {self.key}: device {device} is lost: {lost}"))
                    device = self._disconnect(worker)
                    time.sleep(0 if self._closing else 0.5)
                if device and not self._jobs and time.monotonic() - last > IDLE:
                    device = self._disconnect(worker)
        finally:
            worker.kill()

    def _work_waits(self, until: float | None) -> bool:
        """Wait for a job, at most until ``until``; false when the runner is closing."""
        with self._changed:
            while not self._jobs and not self._closing:
                if until is not None and time.monotonic() >= until:
                    break
                self._changed.wait(None if until is None else max(0.0, until - time.monotonic()))
            return not self._closing

    def _connect(self, worker: Any) -> str:
        """Open a session with a device, which may take as long as others use it; returns the device's name."""
        said = self._exchange(worker, open_session, (self._address, self.key), None)
        name = str(said.get("name"))
        if said.get("convgen") != version():
            text = f"convgen on device {name}: expected {version()}, as here, found {said.get('convgen')}"
            self._fail(MeasureError(text), for_good=True)
            raise _Lost(text)
        try:
            there = Machine.from_dict(said.get("machine"), f"device {name}")
        except MeasureError as error:
            self._fail(error, for_good=True)
            raise _Lost(str(error)) from error
        with self._changed:
            self._machine = known = self._machine or there
            there = replace(there, memory=known.memory)  # devices of a kind differ by some pages
            if there == known:
                self._connected.add(id(worker))
        if there != known:
            fact = next(n for n in ("fingerprint", *known.to_dict()) if getattr(there, n) != getattr(known, n))
            text = f"device {name} of key {self.key}: {fact}: expected {getattr(known, fact)}, as the others have"
            self._fail(MeasureError(f"{text}, found {getattr(there, fact)}"), for_good=True)
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
            if "caught from RPC call" in str(error) and function is not open_session:
                raise
            raise _Lost(_last_line(error)) from error

    def _others_wait(self) -> bool:
        """Whether other programs wait for a device of this key, and none is free."""
        try:
            return any(d.key == self.key and d.queued and not d.free for d in status(self.tracker))
        except MeasureError:
            return False

    def _watch(self) -> None:
        """What the watcher's thread does: use devices that are new, and fail all jobs when none is left."""
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
    """The last line of an error's text: of TVM's errors, which quote a traceback, the only one that matters."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
