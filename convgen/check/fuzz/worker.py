"""The process that checks candidates: a compiler that crashes or hangs ends that process only, and is a finding."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from .cases import Case, Outcome

#: Seconds a worker has for one candidate.
LIMIT = 100.0
#: Candidates after which a worker is replaced: TVM leaks a little with every compilation.
WORKER_USES = 200


class Worker:
    """A process that checks one case after the other; another takes its place when it dies or hangs."""

    def __init__(self, limit: float = LIMIT) -> None:
        self._limit, self._uses = limit, 0
        self._process: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="convgen-"))

    def check(self, case: Case) -> Outcome:
        """How the case ends; where it ends the process, that is a ``crash`` or a ``hang``."""
        if self._uses >= WORKER_USES:
            self.stop()
        starts = self._process is None
        process, pipe = self._process = self._process or self._start()
        self._uses += 1
        with suppress(EOFError, ConnectionError):
            if starts:
                pipe.recv()  # "ready": the start does not count as time of the case
            pipe.send(case.to_dict())
            if pipe.poll(self._limit):
                return Outcome(**pipe.recv())
            self.stop()
            return Outcome("hang", f"no answer within {self._limit:.0f} s")
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)  # its pipe ends a moment before it does
        self.stop()
        said = (self._folder / "stderr").read_text(errors="replace").strip()[-500:]
        status = process.returncode
        return Outcome("crash", f"{f'signal {-status}' if status < 0 else f'exit status {status}'}: {said}")

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        shutil.rmtree(self._folder, ignore_errors=True)  # what a killed process left behind
        self._folder.mkdir()
        with theirs, (self._folder / "stderr").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "convgen.check.fuzz.checking", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self._folder)},
                start_new_session=True,  # Ctrl-C is not for it, and what it started ends with it
            )
        return process, ours

    def kill(self) -> None:
        """End the process and whatever it started; from any thread. A check that waits for it sees a crash."""
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process[0].pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the process; the next check starts another."""
        self.kill()
        if self._process:
            process, pipe = self._process
            process.wait()
            pipe.close()
        self._process, self._uses = None, 0

    def close(self) -> None:
        """End for good."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
