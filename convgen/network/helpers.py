"""Processes that compile some of a network's functions, beside the one that asks."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from ..processes import Worker

#: Functions for which it is worth while to have one process more.
_FEW = 6


class Helpers:
    """Processes that are stopped in the end.

    Args:
        processes: how many compile at most, this one included; as many as there are CPUs to run on where None.

    Attributes:
        ready: each worker, once it is.
    """

    def __init__(self, processes: int | None = None) -> None:
        self._most = processes or len(os.sched_getaffinity(0))
        self._workers: list[Worker] = []
        self._executor = ThreadPoolExecutor(self._most)
        self.ready: list[Future[Worker]] = []

    def begin(self, functions: int) -> None:
        """Start as many as so many functions are worth. They are ready a second later: meanwhile there is a model to
        plan.
        """
        count = min(self._most, -(-functions // _FEW)) - 1
        for _ in range(count - len(self._workers)):
            self._workers.append(Worker())
            self.ready.append(self._executor.submit(_begun, self._workers[-1]))

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._workers:
            worker.kill()  # which ends the calls that wait for it
        self._executor.shutdown()
        for worker in self._workers:
            worker.stop()


def _begun(worker: Worker) -> Worker:
    worker.call(_import_compiler)
    return worker


def _import_compiler() -> None:
    """What a worker takes a second for."""
    import tvm  # noqa: F401
