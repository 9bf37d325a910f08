"""Who compiles and who measures candidates: worker processes here, or machines elsewhere.

A :class:`Builder` turns a candidate's module into a library, a :class:`Runner` verifies and times it.
Both answer with futures, so that any number of processes or devices can be at work; :class:`Pools`
is a pair of them that serves any number of specs. A candidate that crashes, hangs or computes
something else ends as an outcome, never as an exception of the tuning process.

The local ones are TVM's own process pools, and :func:`metaschedule_pools` shows a pair to MetaSchedule.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from .errors import MeasureError
from .interrupts import Interrupts, interrupts_blocked, interrupts_held
from .measure import INTERRUPTED, OUTCOME_KEY, TRIAL_SECONDS, Expected, Result, build_artifact, run_artifact, run_duel

Samples = list[list[float]]


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
        """Verify and time one library; see :func:`convgen.measure.run_artifact`."""

    @abstractmethod
    def duel(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Future[Samples | Result]:
        """Time several libraries in turn, on one device; a Result where that failed."""

    @abstractmethod
    def close(self) -> None:
        """End the workers, whatever they are doing."""


# ---- worker processes of this machine -----------------------------------------------------------


class _Workers:
    """A pool of TVM's worker processes.

    Args:
        failure: outcome of a job that raises.
        timeout: seconds after which a worker is killed.
        uses: jobs after which a worker is replaced; 0: never.
    """

    def __init__(self, workers: int, failure: str, timeout: float, uses: int = 0) -> None:
        from tvm.support.popen_pool import PopenPoolExecutor

        self.failure, self.timeout = failure, timeout
        self._pool = PopenPoolExecutor(max_workers=workers, timeout=timeout, maximum_process_uses=uses or None)
        self._pending: set[Future[Any]] = set()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """The function's answer, or how it failed as a Result.

        The worker never sees an interrupt from the terminal. Ctrl-C reaches every process of the
        foreground group, and workers would print tracebacks; but a process starts with the signals
        blocked that its starter blocks, and the pool's threads, which start the workers, are
        themselves started here.
        """
        with interrupts_blocked():
            job: Future[Any] = self._pool.submit(function, *arguments)
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
        self._workers = _Workers(1, "run_error", timeout)

    def submit(
        self, path: str, expected: Expected, threads: int, *, seconds: float, hopeless: float = 0.0
    ) -> Future[Result]:
        job = self._workers.submit(run_artifact, path, str(expected.directory), threads, seconds, hopeless)
        answer: Future[Result] = Future()
        job.add_done_callback(lambda done: answer.set_result(as_result(done.result())))
        return answer

    def duel(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Future[Samples | Result]:
        return self._workers.submit(run_duel, list(paths), str(expected.directory), threads, rounds)

    def close(self) -> None:
        self._workers.close()


def as_result(answer: Any) -> Result:
    """What :func:`convgen.measure.run_artifact` answered, as a Result; one is left as it is."""
    if isinstance(answer, Result):
        return answer
    return Result(answer[OUTCOME_KEY], tuple(answer.get("samples", ())), answer.get("error", ""))


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
        answer = self._wait(self.runner.duel(paths, expected, threads, rounds))
        if isinstance(answer, Result):
            raise MeasureError(f"re-measuring {len(paths)} candidates: {answer.outcome}: {answer.error}")
        return list(answer)

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


def metaschedule_pools(
    pools: Pools, expected: Expected, threads: int, hopeless: Callable[[], float]
) -> tuple[Any, Any]:
    """The pools as MetaSchedule's Builder and Runner, for one spec.

    An error text begins with the outcome's name (see :func:`outcome`): that is how it travels through
    MetaSchedule's results. ``hopeless`` is asked before each run: the time that is not worth more
    than one sample.
    """
    from tvm.ir import save_json
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
    from tvm.s_tir.meta_schedule.runner import PyRunner, PyRunnerFuture, RunnerResult

    @derived_object
    class TrialBuilder(PyBuilder):  # type: ignore[misc]
        def build(self, build_inputs: list[Any]) -> list[Any]:
            answers = pools.build([save_json(given.mod) for given in build_inputs])
            return [
                BuilderResult(None, f"{a.outcome}: {a.error}") if isinstance(a, Result) else BuilderResult(a, None)
                for a in answers
            ]

    @derived_object
    class TrialFuture(PyRunnerFuture):  # type: ignore[misc]
        def __init__(self, path: str) -> None:
            super().__init__()
            self._path = path

        def done(self) -> bool:
            return True

        def result(self) -> Any:
            answer = pools.run(self._path, expected, threads, seconds=TRIAL_SECONDS, hopeless=hopeless())
            pools.discard(self._path)
            if answer.outcome == "ok":
                return RunnerResult(list(answer.samples), None)
            return RunnerResult(None, f"{answer.outcome}: {answer.error}")

    @derived_object
    class TrialRunner(PyRunner):  # type: ignore[misc]
        def run(self, runner_inputs: list[Any]) -> list[Any]:
            return [TrialFuture(str(given.artifact_path)) for given in runner_inputs]

    return TrialBuilder(), TrialRunner()


def outcome(runner_result: Any) -> Result:
    """A MetaSchedule RunnerResult back as a Result."""
    if runner_result.run_secs is not None:
        return Result("ok", tuple(float(seconds) for seconds in runner_result.run_secs))
    kind, _, text = str(runner_result.error_msg).partition(": ")
    return Result(kind, error=text)
