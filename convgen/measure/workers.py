"""Who compiles and who measures candidates: worker processes here, or machines elsewhere.

A :class:`Builder` turns a lowered candidate into a library, a :class:`Runner` verifies and times it.
Both answer with futures, so that any number of processes or devices can be at work; :class:`Pools`
is a pair of them that serves any number of specs. A candidate that crashes, hangs or computes
something else ends as an outcome, never as an exception of the tuning process.

The local ones are processes of this machine (:mod:`convgen.processes`), others :mod:`convgen.measure.fleet`
(measuring on devices) and :mod:`convgen.measure.cluster` (compiling on many machines).
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FolderError, MeasureError
from ..folders import TemporaryFolder
from ..interrupts import Interrupts, interrupts_held
from ..problem.spec import ConvSpec
from ..processes import JobError, MemoryLimitError, Worker
from ..records.outcome import INTERRUPTED, OUTCOME_KEY, Result
from .busy import BusyWatch
from .chain import run_chains
from .compare import run_comparison
from .trial import (
    CandidateModule,
    Expected,
    build_artifact,
    check_compilers,
    memory_limit,
    run_artifact,
    run_duel,
)

Samples = list[list[float]]
#: Of each choice of a network's kernels, round by round, the seconds of each instance.
ChainSamples = list[list[list[float]]]
#: Those of libraries, and of ONNX Runtime where it took part.
Compared = tuple[Samples, list[float] | None]

_log = logging.getLogger(__name__)

#: Share of a worker's time limit that the turns of a comparison may take.
COMPARE_SHARE = 0.5


def then(future: Future[Any], function: Callable[[Any], Any]) -> Future[Any]:
    """What a function makes of a future's result."""
    answer: Future[Any] = Future()

    def hand_on(done: Future[Any]) -> None:
        try:
            answer.set_result(function(done.result()))
        except Exception as error:
            answer.set_exception(error)

    future.add_done_callback(hand_on)
    return answer


class Builder(ABC):
    """Compiles candidates, several at once.

    Attributes:
        workers: how many at once.
        root: the folder of the artifacts, removed by :meth:`close`.
    """

    workers: int
    root: Path

    @abstractmethod
    def submit(self, module: CandidateModule) -> Future[str | Result]:
        """The path of the candidate's library, below :attr:`root`, or how it failed.

        Raises (here, or from the future):
            UnsupportedError, BuildError: nothing can be compiled for the target: see
                :func:`~convgen.measure.trial.check_compilers`.
        """

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

        def without_peer(samples: Samples | Result) -> Compared | Result:
            return samples if isinstance(samples, Result) else (samples, None)

        return then(self.duel(paths, expected, threads, rounds), without_peer)

    def chains(
        self, order: Sequence[ConvSpec], choices: Sequence[Mapping[ConvSpec, str]], threads: int, rounds: int
    ) -> Future[ChainSamples | Result]:
        """Time a network's layers one after another with several choices of libraries, in turn; here nothing does."""
        answer: Future[ChainSamples | Result] = Future()
        answer.set_result(Result("run_error", error="these devices run single layers"))
        return answer

    @abstractmethod
    def close(self) -> None:
        """End the workers, whatever they are doing."""


# ---- worker processes of this machine -----------------------------------------------------------


class Workers:
    """A pool of worker processes; each is started when there is a job for it.

    Args:
        workers: how many at most.
        failure: outcome of a job that raises.
        timeout: seconds after which a worker is killed.
        uses: jobs after which a worker is replaced; 0: never.
        forgiving: whether a worker is kept whose job raised.
        folder: where jobs write. That it is full is no outcome of a job: its future raises FolderError.
    """

    def __init__(
        self,
        workers: int,
        failure: str,
        timeout: float,
        uses: int = 0,
        *,
        forgiving: bool = True,
        folder: TemporaryFolder | None = None,
    ) -> None:
        self.failure, self.timeout = failure, timeout
        self._writing = folder.writing if folder else nullcontext
        self._uses, self._forgiving = uses or math.inf, forgiving
        # A thread for each worker: the worker ends with the thread that made it.
        self._threads = ThreadPoolExecutor(workers)
        self._lock = threading.Lock()
        #: Every worker, and how many jobs it has had; those without a job, the last one used last.
        self._jobs: dict[Worker, int] = {}
        self._idle: list[Worker] = []
        self._closed = False

    def submit(self, function: Callable[..., Any], *arguments: Any, memory: int = 0) -> Future[Any]:
        """The function's answer, or how it failed as a Result; INTERRUPTED where the pool was closed before.

        Args:
            function: one that workers can import.
            memory: bytes the job may have; 0: no limit.
        """
        return self._threads.submit(self._run, function, arguments, memory)

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...], memory: int) -> Any:
        """Runs in a thread: a job, in a worker that is idle or a new one."""
        with self._lock:
            if self._closed:
                return INTERRUPTED
            worker = self._idle.pop() if self._idle else Worker()
            self._jobs[worker] = self._jobs.get(worker, 0) + 1
        keep = False
        try:
            with self._writing():
                answer = worker.call(function, *arguments, seconds=self.timeout, memory=memory)
            keep = True
        except FolderError as error:
            answer = error
        except TimeoutError:
            answer = Result("timeout", error=f"killed after {self.timeout:.0f} s")
        except MemoryLimitError as error:
            text = f"{error}; a candidate of this layer may use {memory >> 20} MiB"
            answer = Result("memory", error=text)
        except MemoryError as error:
            answer, keep = Result("memory", error=str(error)[-2000:]), self._forgiving
        except ChildProcessError as error:
            answer = INTERRUPTED if self._closed else Result("crash", error=f"the worker process died: {error}")
        except JobError as error:
            answer, keep = Result(self.failure, error=str(error)[-2000:]), self._forgiving
        except Exception as error:  # a job or an answer that cannot be sent is this trial's outcome as well
            answer = Result(self.failure, error=f"{type(error).__name__}: {error}"[-2000:])
        with self._lock:
            if keep and self._jobs[worker] < self._uses and not self._closed:
                self._idle.append(worker)
                return answer
            del self._jobs[worker]
        worker.stop()
        if isinstance(answer, FolderError):
            raise answer
        return answer

    def close(self) -> None:
        """End the workers, whatever they are doing; jobs that have not ended are INTERRUPTED."""
        with interrupts_held():
            with self._lock:
                self._closed = True
                busy, idle = self._jobs.keys() - set(self._idle), self._idle
                self._idle = []
            for worker in busy:
                worker.kill()
            for worker in idle:
                worker.stop()
            self._threads.shutdown()


class LocalBuilder(Builder):
    """Processes of this machine."""

    def __init__(self, workers: int, *, timeout: float = 60.0) -> None:
        self.workers = workers
        self._folder = TemporaryFolder(runs=True)
        self.root = self._folder.path
        # Replaced now and then: TVM leaks a little with every compilation.
        self.pool = Workers(workers, "build_error", timeout, uses=64, folder=self._folder)

    def submit(self, module: CandidateModule) -> Future[str | Result]:
        check_compilers(module.target)
        return self.pool.submit(build_artifact, module, str(self.root))

    def close(self) -> None:
        with interrupts_held():
            self.pool.close()
            self._folder.close()


class LocalRunner(Runner):
    """One process of this machine: what is timed has it for itself."""

    devices = 1
    isolated = False

    def __init__(self, *, timeout: float = 60.0) -> None:
        # Replaced now and then, with whatever candidates have left in it. And at once where one failed: what a
        # GPU's kernel has done wrong fails every later call of the process.
        self.pool = Workers(1, "run_error", timeout, uses=256, forgiving=False)
        #: Seconds of the reference kernel in the first trial; it outlives the worker.
        self._reference: float | None = None
        self._warned = False

    def submit(
        self, path: str, expected: Expected, threads: int, *, seconds: float, hopeless: float = 0.0
    ) -> Future[Result]:
        arguments = (path, str(expected.directory), threads, seconds, hopeless)
        watch = BusyWatch()
        job = self.pool.submit(run_artifact, *arguments, memory=expected.memory)

        def result(answer: Any) -> Result:
            found = self._result(answer, threads)
            return replace(found, busy=watch.share()) if found.outcome == "ok" else found

        return then(job, result)

    def _result(self, answer: Any, threads: int) -> Result:
        if isinstance(answer, dict) and answer.get("reference"):
            self._reference = self._reference or answer["reference"]
            if not (self._warned or answer.get("pinned", True)):
                self._warned = True
                _log.warning("%d threads cannot be kept on CPUs of their own here: times will vary more", threads)
        return as_result(answer, self._reference)

    def duel(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Future[Samples | Result]:
        arguments = (list(paths), str(expected.directory), threads, rounds)
        return self.pool.submit(run_duel, *arguments, memory=len(paths) * expected.memory)

    def compare(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Future[Compared | Result]:
        arguments = (list(paths), str(expected.directory), threads, rounds, COMPARE_SHARE * self.pool.timeout)
        return self.pool.submit(run_comparison, *arguments, memory=(len(paths) + 2) * expected.memory)

    def chains(
        self, order: Sequence[ConvSpec], choices: Sequence[Mapping[ConvSpec, str]], threads: int, rounds: int
    ) -> Future[ChainSamples | Result]:
        paths = [{spec.descriptor: path for spec, path in choice.items()} for choice in choices]
        arguments = ([spec.descriptor for spec in order], paths, threads, rounds, COMPARE_SHARE * self.pool.timeout)
        sizes = sum(math.prod(spec.shapes[name]) for spec in order for name in spec.parameters)
        largest = max(math.prod(shape) for spec in order for shape in (spec.src_shape, spec.dst_shape))
        return self.pool.submit(run_chains, *arguments, memory=memory_limit(len(choices) * 4 * (sizes + 3 * largest)))

    def close(self) -> None:
        self.pool.close()


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

    def build(self, modules: Sequence[CandidateModule]) -> list[str | Result]:
        """Library paths of candidates; a failure is a Result."""
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

    def chains(
        self, order: Sequence[ConvSpec], choices: Sequence[Mapping[ConvSpec, str]], threads: int, rounds: int
    ) -> ChainSamples:
        """Time a network's layers one after another with several choices of libraries, in turn.

        Raises:
            MeasureError: the worker failed, or nothing here can.
        """
        samples: ChainSamples = self._times(self.runner.chains(order, choices, threads, rounds))
        return samples

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
