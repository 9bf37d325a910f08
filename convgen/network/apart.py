"""Models that another process compiles, one after another, while this one goes on.

TVM and the planning of a model hold Python's lock most of the time, so that a thread which compiled would keep all
others waiting. Here a thread waits for a process, and loads what that leaves in a folder. Both are there only while
there is something to compile, and end with this process whenever it does.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..errors import BuildError, SpecError, UnsupportedError
from ..folders import TemporaryFolder
from ..processes import JobError, Worker
from .library import NetworkLibrary

if TYPE_CHECKING:
    from onnx import ModelProto

#: Why a model is not compiled: what its reader alone can tell.
Refused: TypeAlias = UnsupportedError | SpecError


@dataclass(frozen=True)
class Files:
    """What the process leaves: a network's name, its library and its weights."""

    name: str
    library: Path
    weights: Path


@dataclass(frozen=True)
class _Order:
    models: Sequence[ModelProto]
    threads: int
    accuracy: str
    made: Future[list[NetworkLibrary | Refused]] = field(default_factory=Future)


class _Handed(NetworkLibrary):
    """A network whose files go with it."""

    def __init__(self, folder: TemporaryFolder, files: Files, threads: int) -> None:
        self._folder = folder
        super().__init__(files.library, files.name, files.weights, threads)


class Compiler:
    """Compiles in another process; any thread may ask it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Order] = deque()
        self._is_running = False
        self._unfinished: set[Future[list[NetworkLibrary | Refused]]] = set()

    def submit(
        self, models: Sequence[ModelProto], threads: int, accuracy: str
    ) -> Future[list[NetworkLibrary | Refused]]:
        """Networks of models, for this machine's CPU, once they are compiled: each, or why it is not taken.

        The result raises BuildError where TVM, LLVM or the C compiler failed, or the process ended; what else keeps a
        network from being loaded; and CancelledError in a process that was forked meanwhile.
        """
        order = _Order(models, threads, accuracy)
        with self._lock:
            self._waiting.append(order)
            self._unfinished.add(order.made)
            order.made.add_done_callback(self._unfinished.discard)
            if not self._is_running:
                # A daemon: nobody waits for it when this process ends.
                threading.Thread(target=self._run, name="convgen-background", daemon=True).start()
                self._is_running = True
        return order.made

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all that was asked for before is there, or has failed; whether it is within so many seconds."""
        return not wait_for(list(self._unfinished), seconds).not_done

    def forget(self) -> None:
        """In a process that was forked, whose parent alone goes on to compile."""
        unfinished = list(self._unfinished)
        self.__init__()  # type: ignore[misc]  # the lock may have been another thread's
        for made in unfinished:
            made.cancel()

    def _run(self) -> None:
        worker: Worker | None = None
        while (order := self._next()) is not None:
            try:
                if worker is None:
                    worker = Worker()
                    atexit.register(worker.kill)  # before this process's folders go
                found = [_compiled(worker, model, order) for model in order.models]
            except Exception as error:  # whoever asked is told
                if worker is not None and worker.status is not None:
                    atexit.unregister(worker.kill)
                    worker = None
                order.made.set_exception(error)
            else:
                order.made.set_result(found)
        if worker is not None:
            atexit.unregister(worker.kill)
            worker.stop()

    def _next(self) -> _Order | None:
        with self._lock:
            self._is_running = bool(self._waiting)
            return self._waiting.popleft() if self._waiting else None


#: This process's.
compiler = Compiler()
os.register_at_fork(after_in_child=compiler.forget)


def wait(seconds: float | None = None) -> bool:
    """Wait until all that is being compiled in the background is there, or has failed.

    Returns:
        whether it is, within so many seconds.
    """
    return compiler.wait(seconds)


def _compiled(worker: Worker, model: ModelProto, order: _Order) -> NetworkLibrary | Refused:
    import onnx

    folder = TemporaryFolder(runs=True)
    try:
        with folder.writing():
            path = folder.path / f"{model.graph.name}.onnx"
            data = path.with_suffix(".data")
            onnx.save_model(model, path, save_as_external_data=True, location=data.name)
            made = _told(worker, path, order)
            for written in (path, data):
                written.unlink(missing_ok=True)  # of small models no data lie apart
        if isinstance(made, Files):
            return _Handed(folder, made, order.threads)
    except BaseException:
        folder.close()
        raise
    folder.close()
    return made


def _told(worker: Worker, path: Path, order: _Order) -> Files | Refused:
    try:
        made: Files | Refused = worker.call(compile_files, path, order.threads, order.accuracy)
    except JobError as error:
        raise BuildError(str(error)) from error
    except ChildProcessError as error:
        raise BuildError(f"the process that compiles ended: {error}") from error
    return made


def compile_files(path: Path, threads: int, accuracy: str) -> Files | Refused:
    """Compile a model for this machine's CPU into the folder that it lies in: what the process runs.

    Raises:
        BuildError: TVM, LLVM or the C compiler failed.
    """
    from .choice import network_target, recorded_choice  # here: who only waits needs none of it
    from .compile import compile_plans
    from .helpers import Helpers
    from .network import plan_model

    target, threads = network_target("cpu", threads)
    try:
        with recorded_choice(None, target, threads) as choose, Helpers() as helpers:
            plans = plan_model(path, target, accuracy=accuracy, choose=choose, helpers=helpers)
            built = compile_plans(plans, target, path.parent, helpers=helpers)
    except (UnsupportedError, SpecError) as error:
        return error
    return Files(built.code.name, built.library, built.weights)
