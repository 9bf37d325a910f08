"""A worker process: it runs functions one after another, under limits of time and memory, and may crash.

Pools of :mod:`concurrent.futures` and of ``pebble`` start their processes through :mod:`multiprocessing`, which runs
the caller's script once more in every worker unless the script has an ``if __name__ == "__main__"`` guard; scripts
that tune need none. Nor do they say which process has which job, as a limit of memory must know. So a worker is a
fresh interpreter, ``python -m convgen.processes``, that is told through a pipe which function to import and call.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import ModuleType
from typing import IO, Any

from .deferred import keep_torch_out
from .errors import ConvgenError

#: Seconds between looks at the memory of a worker: what it can get hold of in the meantime is little.
LOOK = 0.05
_PR_SET_PDEATHSIG = 1
#: What a worker says: a job has begun; the value it returned; it raised MemoryError; it raised something else.
_BEGUN, _VALUE, _NO_MEMORY, _ERROR = "begun", "value", "no memory", "error"


class JobError(Exception):
    """A job raised an exception: its type and its traceback, or what a :class:`ConvgenError` says, as text."""


class MemoryLimitError(MemoryError):
    """A job took ``added`` bytes, more than it may, and was killed."""

    def __init__(self, added: int) -> None:
        super().__init__(f"killed with {added >> 20} MiB")
        self.added = added


class Worker:
    """A process that runs one job at a time, until it is stopped, crashes, or exceeds a limit.

    It ends with the thread that made it, however that ends; it does not see Ctrl-C, being in a process group of its
    own; and it imports nothing from the working directory. Only :meth:`kill` may be called from other threads.

    Args:
        log: a file for what it prints; by default that goes where this process's goes.
        environment: variables besides this process's.
    """

    def __init__(self, *, log: IO[bytes] | None = None, environment: Mapping[str, str] | None = None) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "convgen.processes", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        self._lock, self._ended = threading.Lock(), False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status once it is stopped: 0 or more, or minus the signal that ended it."""
        return self._process.returncode

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float = math.inf, memory: int = 0) -> Any:
        """The value of a function, which the worker must be able to import; see :func:`call_in_file` for others.

        Args:
            seconds: after which the worker is stopped; importing the function does not count.
            memory: bytes that the job may add to the worker's before it is stopped; 0: no limit.

        Raises:
            JobError: the function raised something. The worker is ready for the next job.
            MemoryError: the function raised it.
            MemoryLimitError, TimeoutError: it exceeded a limit. The worker is stopped.
            ChildProcessError: the process has ended. The worker is stopped.
        """
        try:
            self._pipe.send((function, arguments))
            said, value = self._pipe.recv()
            if said == _BEGUN:
                said, value = self._answer(seconds, memory)
        except (EOFError, ConnectionError):
            with suppress(subprocess.TimeoutExpired):  # its end of the pipe closes a moment before it ends
                self._process.wait(timeout=10)
            self.stop()
            raise ChildProcessError("Subprocess terminated") from None
        if said == _NO_MEMORY:
            raise MemoryError(value)
        if said == _ERROR:
            raise JobError(value)
        return value

    def _answer(self, seconds: float, memory: int) -> Any:
        before, end = self._resident(), time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            pause = min(left, LOOK) if memory else left
            if self._pipe.poll(None if pause == math.inf else pause):
                return self._pipe.recv()
            if memory and (added := self._resident() - before) > memory:
                self.stop()
                raise MemoryLimitError(added)
            if time.monotonic() >= end:
                self.stop()
                raise TimeoutError

    def _resident(self) -> int:
        """Bytes of memory the process has; 0 where it has ended."""
        try:
            with open(f"/proc/{self.pid}/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            return 0

    def kill(self) -> None:
        """End the process and what it has started, from any thread: a call in progress raises ChildProcessError."""
        with self._lock:
            if not self._ended:
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the process and what it has started, for good."""
        self.kill()
        with self._lock:
            if not self._ended:
                with suppress(subprocess.TimeoutExpired):  # a driver may hold it for a while
                    self._process.wait(timeout=10)
                self._pipe.close()
                self._ended = True


def call_in_file(path: str, name: str, *arguments: Any) -> Any:
    """Call the function ``name`` of a Python file that workers cannot import as a module, such as a script."""
    return getattr(_module(path), name)(*arguments)


@cache
def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_file_of_a_job", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"expected a Python file, found {path}")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- in the process -------------------------------------------------------------------------------


def end_with(parent: int) -> None:
    """Let the system kill this process when the one that started it, ``parent``, ends, however that is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def _serve(pipe: Connection) -> None:
    """Run jobs until the other end of the pipe is closed."""
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, arguments = pickle.loads(request)
            pipe.send((_BEGUN, None))
            pipe.send((_VALUE, function(*arguments)))
        except MemoryError:
            pipe.send((_NO_MEMORY, traceback.format_exc()))
        except Exception as error:  # whatever a job raises is its answer
            # Errors of this package say what is wrong; of any other the place is worth knowing.
            said = str(error) if isinstance(error, ConvgenError) else traceback.format_exc()
            pipe.send((_ERROR, f"{type(error).__name__}: {said}"))


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    os.set_inheritable(int(sys.argv[1]), False)
    keep_torch_out()
    with suppress(ConnectionError):  # the starter is gone
        _serve(Connection(int(sys.argv[1])))
