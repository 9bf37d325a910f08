"""The process that checks candidates: a compiler that crashes or hangs ends that process only, and is a finding."""

from __future__ import annotations

from ... import processes
from ...folders import TemporaryFolder
from .outcome import Examined, Outcome

#: Seconds a worker has for one candidate.
LIMIT = 100.0
#: Candidates after which a worker is replaced: TVM leaks a little with every compilation.
WORKER_USES = 200


class Worker:
    """A process that checks one case after the other; another takes its place when it dies or hangs."""

    def __init__(self, limit: float = LIMIT) -> None:
        self._limit, self._uses = limit, 0
        self._process: processes.Worker | None = None
        self._folder = TemporaryFolder(runs=True)

    def check(self, case: Examined) -> Outcome:
        """How the case ends; where it ends the process, that is a ``crash`` or a ``hang``."""
        if self._uses >= WORKER_USES:
            self.stop()
        process = self._process = self._process or self._start()
        self._uses += 1
        try:
            outcome: Outcome = process.call(case.job(), seconds=self._limit)
            return outcome
        except TimeoutError:
            self.stop()
            return Outcome("hang", f"no answer within {self._limit:.0f} s")
        except ChildProcessError:
            self.stop()
        said = (self._folder.path / "stderr").read_text(errors="replace").strip()[-500:]
        status = process.status or 0
        return Outcome("crash", f"{f'signal {-status}' if status < 0 else f'exit status {status}'}: {said}")

    def _start(self) -> processes.Worker:
        self._folder.close()  # with what a killed process left behind
        self._folder = TemporaryFolder(runs=True)
        folder = self._folder.path
        with self._folder.writing(), (folder / "stderr").open("wb") as log:
            return processes.Worker(log=log, environment={"TMPDIR": str(folder), "PYTHONFAULTHANDLER": "1"})

    def kill(self) -> None:
        """End the process and whatever it started; from any thread. A check that waits for it sees a crash."""
        if process := self._process:
            process.kill()

    def stop(self) -> None:
        """End the process; the next check starts another."""
        if self._process:
            self._process.stop()
        self._process, self._uses = None, 0

    def close(self) -> None:
        """End for good."""
        self.stop()
        self._folder.close()
