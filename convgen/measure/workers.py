"""Who compiles and who measures candidates: worker processes here, or machines elsewhere.

A :class:`Builder` turns a candidate's module into a library, a :class:`Runner` verifies and times it.
Both answer with futures, so that any number of processes or devices can be at work; :class:`Pools`
is a pair of them that serves any number of specs. A candidate that crashes, hangs or computes
something else ends as an outcome, never as an exception of the tuning process.

The local ones are TVM's own process pools, others :mod:`convgen.measure.fleet` (measuring on devices) and
:mod:`convgen.measure.cluster` (compiling on many machines).
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MeasureError
from ..interrupts import Interrupts, interrupts_blocked, interrupts_held
from ..records.outcome import INTERRUPTED, OUTCOME_KEY, Result
from .compare import run_comparison
from .trial import Expected, build_artifact, run_artifact, run_duel

if TYPE_CHECKING:
    from tvm.support.popen_pool import PopenPoolExecutor, PopenWorker

Samples = list[list[float]]
#: Those of libraries, and of ONNX Runtime where it took part.
Compared = tuple[Samples, list[float] | None]

_log = logging.getLogger(__name__)

#: Seconds between looks at the memory of a worker: what it can get hold of in the meantime is little.
_LOOK = 0.05
_PR_SET_PDEATHSIG = 1
#: Share of a worker's time limit that the turns of a comparison may take.
COMPARE_SHARE = 0.5


class Builder(ABC):
    """Compiles modules, several at once.

    Attributes:
        workers: how many at once.
        root: the folder of the artifacts, removed by :meth:`close`.
    """

    workers: int
    root: Path

    @abstractmethod
    def submit(self, module: str) -> Future[str | Result]:
        """The path of the library of a serialised module, below :attr:`root`, or how it failed."""

    @abstractmethod
    def close(self) -> None:
        """End the workers, whatever they are doing, and remove every artifact."""


class Runner(ABC):
    """Verifies and times libraries, on one or several devices of the same kind.

    Attributes:
        devices: how many candidates are measured at once.
        isolated: whether compiling meanwhile does not disturb what is timed: the devices are other machines.
    """

    devices: int
    isolated: bool

    @abstractmethod
    def submit(
        self, path: str, expected: Expected, threads: int, *, seconds: float, hopeless: float = 0.0
    ) -> Future[Result]:
        """Verify and time one library; see :func:`convgen.measure.trial.run_artifact`."""

    @abstractmethod
    def duel(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Future[Samples | Result]:
        """Time several libraries in turn, on one device; a Result where that failed."""

    def compare(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Future[Compared | Result]:
        """Time several libraries in turn, and ONNX Runtime with them where it can run the layer; here it takes no
        part: a device need not have it.
        """
        answer: Future[Compared | Result] = Future()

        def hand_on(done: Future[Samples | Result]) -> None:
            samples = done.result()
            answer.set_result(samples if isinstance(samples, Result) else (samples, None))

        self.duel(paths, expected, threads, rounds).add_done_callback(hand_on)
        return answer

    @abstractmethod
    def close(self) -> None:
        """End the workers, whatever they are doing."""


# ---- worker processes of this machine -----------------------------------------------------------


def end_with(parent: int) -> None:
    """Let the system kill this process when the one that started it, ``parent``, ends, however that is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def _pool(workers: int, timeout: float, uses: int, forgiving: bool) -> PopenPoolExecutor:
    """TVM's pool of processes, which end with this one. A job's keyword ``memory`` is a limit in bytes of what
    the job may add: a process that exceeds it is killed, and the job raises MemoryError. Unless ``forgiving``,
    a process whose job raised is replaced.
    """
    from tvm.support.popen_pool import PopenPoolExecutor

    class Pool(PopenPoolExecutor):  # type: ignore[misc]
        def _worker_run(self, function: Any, arguments: Any, keywords: Any) -> Any:
            """Runs in a thread that has a worker process of its own."""
            try:
                return self._held(function, arguments, keywords)
            except Exception:
                if not forgiving and (worker := self._worker_map.get(threading.get_ident())):
                    worker.kill()
                raise

        def _held(self, function: Any, arguments: Any, keywords: Any) -> Any:
            """Runs a job within its memory."""
            limit = keywords.pop("memory", 0)
            if not limit:
                return super()._worker_run(function, arguments, keywords)
            me, ended, found = threading.get_ident(), threading.Event(), [0]
            worker = self._worker_map.get(me)
            before = _resident(worker) if worker else 0  # what earlier jobs have left there: libraries, caches

            def watch() -> None:
                while not ended.wait(_LOOK):
                    if (worker := self._worker_map.get(me)) and (added := _resident(worker) - before) > limit:
                        found[0] = added
                        worker._proc.kill()
                        return

            watcher = threading.Thread(target=watch, daemon=True)
            watcher.start()
            try:
                return super()._worker_run(function, arguments, keywords)
            except ChildProcessError:
                if found[0]:
                    text = f"killed with {found[0] >> 20} MiB; a candidate of this layer may use {limit >> 20} MiB"
                    raise MemoryError(text) from None
                raise
            finally:
                ended.set()
                watcher.join()

    return Pool(
        max_workers=workers,
        timeout=timeout,
        initializer=end_with,
        initargs=(os.getpid(),),
        maximum_process_uses=uses or None,
    )


def _resident(worker: PopenWorker) -> int:
    """Bytes of memory a worker process has; 0 where it has ended."""
    process = worker._proc
    try:
        with open(f"/proc/{process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError, IndexError):  # none yet, or none any more
        return 0


class _Workers:
    """A pool of TVM's worker processes.

    Args:
        failure: outcome of a job that raises.
        timeout: seconds after which a worker is killed.
        uses: jobs after which a worker is replaced; 0: never.
        forgiving: whether a worker is kept whose job raised.
    """

    def __init__(self, workers: int, failure: str, timeout: float, uses: int = 0, *, forgiving: bool = True) -> None:
        self.failure, self.timeout = failure, timeout
        self._pool = _pool(workers, timeout, uses, forgiving)
        self._pending: set[Future[Any]] = set()

    def submit(self, function: Callable[..., Any], *arguments: Any, memory: int = 0) -> Future[Any]:
        """The function's answer, or how it failed as a Result.

        The worker never sees an interrupt from the terminal. Ctrl-C reaches every process of the
        foreground group, and workers would print tracebacks; but a process starts with the signals
        blocked that its starter blocks, and the pool's threads, which start the workers, are
        themselves started here.

        Args:
            memory: bytes the worker may have; 0: no limit.
        """
        with interrupts_blocked():
            job: Future[Any] = self._pool.submit(function, *arguments, **({"memory": memory} if memory else {}))
        self._pending = {other for other in self._pending if not other.done()} | {job}
        answer: Future[Any] = Future()
        job.add_done_callback(lambda done: answer.set_result(self._outcome(done)))
        return answer

    def _outcome(self, job: Future[Any]) -> Any:
        if job.cancelled():
            return INTERRUPTED
        try:
            return job.result()
        except TimeoutError:
            return Result("timeout", error=f"killed after {self.timeout:.0f} s")
        except MemoryError as error:
            return Result("memory", error=str(error)[-2000:])
        except ChildProcessError as error:
            return Result("crash", error=f"the worker process died: {error}".strip())
        except Exception as error:  # whatever the worker raised is this trial's outcome
            return Result(self.failure, error=f"{type(error).__name__}: {error}"[-2000:])

    def close(self) -> None:
        with interrupts_held():
            for job in self._pending:
                job.cancel()
            # TVM's shutdown waits for the answer of a busy worker; a dead one has none to give.
            for worker in list(self._pool._worker_map.values()):
                if process := worker._proc:
                    process.kill()
            wait(self._pending, timeout=10)
            self._pool.shutdown(wait=False)


class LocalBuilder(Builder):
    """Processes of this machine."""

    def __init__(self, workers: int, *, timeout: float = 60.0) -> None:
        self.workers = workers
        self.root = Path(tempfile.mkdtemp(prefix="convgen-"))
        # Replaced now and then: TVM leaks a little with every compilation.
        self._workers = _Workers(workers, "build_error", timeout, uses=64)

    def submit(self, module: str) -> Future[str | Result]:
        return self._workers.submit(build_artifact, module, str(self.root))

    def close(self) -> None:
        with interrupts_held():
            self._workers.close()
            shutil.rmtree(self.root, ignore_errors=True)


class LocalRunner(Runner):
    """One process of this machine: what is timed has it for itself."""

    devices = 1
    isolated = False

    def __init__(self, *, timeout: float = 60.0) -> None:
        # Replaced now and then: every library stays loaded. And at once where a candidate failed: what a GPU's
        # kernel has done wrong fails every later call of the process.
        self._workers = _Workers(1, "run_error", timeout, uses=256, forgiving=False)
        #: Seconds of the reference kernel in the first trial; it outlives the worker.
        self._reference: float | None = None
        self._warned = False

    def submit(
        self, path: str, expected: Expected, threads: int, *, seconds: float, hopeless: float = 0.0
    ) -> Future[Result]:
        arguments = (path, str(expected.directory), threads, seconds, hopeless)
        job = self._workers.submit(run_artifact, *arguments, memory=expected.memory)
        answer: Future[Result] = Future()
        job.add_done_callback(lambda done: answer.set_result(self._result(done.result(), threads)))
        return answer

    def _result(self, answer: Any, threads: int) -> Result:
        if isinstance(answer, dict) and answer.get("reference"):
            self._reference = self._reference or answer["reference"]
            if not (self._warned or answer.get("pinned", True)):
                self._warned = True
                _log.warning("%d threads cannot be kept on CPUs of their own here: times will vary more", threads)
        return as_result(answer, self._reference)

    def duel(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Future[Samples | Result]:
        arguments = (list(paths), str(expected.directory), threads, rounds)
        return self._workers.submit(run_duel, *arguments, memory=len(paths) * expected.memory)

    def compare(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Future[Compared | Result]:
        arguments = (list(paths), str(expected.directory), threads, rounds, COMPARE_SHARE * self._workers.timeout)
        return self._workers.submit(run_comparison, *arguments, memory=(len(paths) + 2) * expected.memory)

    def close(self) -> None:
        self._workers.close()


def as_result(answer: Any, reference: float | None = None, device: str = "") -> Result:
    """What :func:`convgen.measure.trial.run_artifact` answered, as a Result; one is left as it is.

    ``reference`` is the time of the reference kernel after the runner's first trial.
    """
    if isinstance(answer, Result):
        return answer
    drift = answer["reference"] / reference if reference and answer.get("reference") else None
    return Result(answer[OUTCOME_KEY], tuple(answer.get("samples", ())), answer.get("error", ""), drift, device)


# ---- the pair -----------------------------------------------------------------------------------


class Pools:
    """A builder and a runner, and how to wait for them: until they answer or Ctrl-C comes.

    Args:
        builder, runner: closed with the pools.
    """

    def __init__(self, builder: Builder, runner: Runner) -> None:
        self.builder, self.runner = builder, runner
        #: Of the block that uses the pools.
        self.interrupts = Interrupts()

    def build(self, modules: Sequence[str]) -> list[str | Result]:
        """Library paths of serialised modules; a failure is a Result."""
        return [self._wait(future) for future in [self.builder.submit(module) for module in modules]]

    def run(self, path: str, expected: Expected, threads: int, *, seconds: float, hopeless: float = 0.0) -> Result:
        """Verify and time one library."""
        answer: Result = self._wait(self.runner.submit(path, expected, threads, seconds=seconds, hopeless=hopeless))
        return answer

    def duel(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Samples:
        """Time several libraries in turn.

        Raises:
            MeasureError: the worker failed.
        """
        samples: Samples = self._times(self.runner.duel(paths, expected, threads, rounds))
        return samples

    def compare(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Compared:
        """Time several libraries in turn, and ONNX Runtime where it can take part.

        Raises:
            MeasureError: the worker failed.
        """
        compared: Compared = self._times(self.runner.compare(paths, expected, threads, rounds))
        return compared

    def _times(self, future: Future[Any]) -> Any:
        answer = self._wait(future)
        if isinstance(answer, Result):
            raise MeasureError(f"re-measuring: {answer.outcome}: {answer.error}")
        return answer

    def discard(self, path: str) -> None:
        """Remove an artifact's private folder."""
        shutil.rmtree(Path(path).parent, ignore_errors=True)

    def close(self) -> None:
        """End the workers, whatever they are doing, and remove every artifact."""
        with interrupts_held():
            self.runner.close()
            self.builder.close()

    def _wait(self, future: Future[Any]) -> Any:
        """The answer; INTERRUPTED where Ctrl-C came first."""
        while not wait([future], timeout=0.1).done:
            if self.interrupts.came:
                return INTERRUPTED
        return future.result()
