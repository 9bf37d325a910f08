"""The run over the specs of a seed: each candidate is checked in a worker process, and what fails is shrunk.

How fast a machine is decides only how many of the specs are checked.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any, Protocol

from ...hardware.target import Target
from .kernels import Kernels
from .outcome import Examined, Outcome
from .shrinking import Step, shrink
from .worker import LIMIT, Worker

#: Seconds spent on shrinking one finding, and findings shrunk that are of one kind and schedule.
SHRINK_SECONDS, MOST_SHRUNK = 120.0, 2


class Drawn(Protocol):
    """What was drawn at once: cases, and what it is counted as."""

    @property
    def cases(self) -> Sequence[Examined]: ...

    @property
    def operators(self) -> Sequence[str]: ...

    @property
    def dtypes(self) -> Sequence[str]: ...

    @property
    def features(self) -> Sequence[str]: ...

    @property
    def skipped(self) -> Sequence[str]:
        """What could not be drawn, and why."""


class Subject(Protocol):
    """What is fuzzed."""

    target: Target

    @property
    def options(self) -> str:
        """What the command says to draw the same, besides seed and numbers."""

    def draw(self, seed: int, index: int) -> Drawn:
        """The cases of a number; they depend on the seed and the number alone."""

    def steps(self) -> list[Step[Any]]:
        """What a failing case is made simpler by."""


@dataclass
class Finding:
    """A failure: its kind, what was found, the spec's index, the case as drawn and as shrunk.

    ``repeats`` says whether it failed in the same way when it was checked again, and is None where it was not
    checked again.
    """

    kind: str
    message: str
    index: int
    drawn: Examined | None
    command: str
    repeats: bool | None = None

    @property
    def schedule(self) -> str:
        """What it was found of: a schedule's id."""
        return self.drawn.group if self.drawn else "default"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, the drawn case as its command."""
        return {**vars(self), "schedule": self.schedule, "drawn": self.drawn.command if self.drawn else None}


@dataclass
class Summary:
    """What a run has done so far."""

    seed: int
    target: str
    start: int = 0
    seconds: float = 0.0
    specs: int = 0
    candidates: int = 0
    interrupted: bool = False
    operators: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    #: Of layers of integers, what tells those apart that were checked.
    layers: set[str] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)
    #: Candidates by schedule, and by schedule and operator.
    schedules: dict[str, Counter[str]] = field(default_factory=dict)
    #: The largest error by schedule, as a fraction of its bound.
    errors: dict[str, float] = field(default_factory=dict)
    #: What took longest to build and validate: seconds, and the command.
    slowest: tuple[float, str] = (0.0, "")
    findings: list[Finding] = field(default_factory=list)

    def add_spec(self, drawn: Drawn) -> None:
        """Count a spec, and what could not be drawn for it."""
        self.specs += 1
        self.operators.update(drawn.operators)
        self.dtypes.update(drawn.dtypes)
        self.features.update(drawn.features)
        self.skipped.update(drawn.skipped)

    def add_candidate(self, case: Examined, outcome: Outcome, seconds: float) -> None:
        """Count a candidate that took so long to check."""
        name = case.group
        self.candidates += 1
        self.checks.update(outcome.checks)
        self.layers.update(outcome.layers)
        self.schedules.setdefault(name, Counter())[case.operator] += 1
        self.errors[name] = max(self.errors.get(name, 0.0), outcome.error)
        self.slowest = max(self.slowest, (seconds, case.command))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, of the layers how many there are."""
        findings = [finding.to_dict() for finding in self.findings]
        return {**vars(self), "layers": len(self.layers), "findings": findings}


class Fuzzer:
    """A run over the specs of a seed.

    Args:
        subject: what is drawn and checked; kernels of this machine's CPU where None.
        workers: candidates checked at once, each in a process of its own.
        limit: seconds for one candidate.
    """

    def __init__(self, seed: int, subject: Subject | None = None, *, workers: int = 1, limit: float = LIMIT) -> None:
        self.subject: Subject = Kernels() if subject is None else subject
        self.summary = Summary(seed, self.subject.target.spelling)
        self._workers, self._limit = workers, limit
        self._lock, self._stopped = Lock(), Event()

    def run(
        self,
        *,
        seconds: float | None = None,
        specs: int | None = None,
        start: int = 0,
        progress: Callable[[Summary], None] = lambda summary: None,
    ) -> Summary:
        """Check specs from ``start`` on, for some seconds, or so many, whichever ends first.

        An interrupt ends the run and is noted in the summary. ``progress`` is called a few times a
        second, from this thread.
        """
        began = time.monotonic()
        self.summary.start = start
        self._indices = iter(range(start, sys.maxsize if specs is None else start + specs))
        self._end = math.inf if seconds is None else began + seconds
        workers = [Worker(self._limit) for _ in range(self._workers)]
        with ThreadPoolExecutor(len(workers)) as pool:
            try:
                jobs = {pool.submit(self._work, worker) for worker in workers}
                while jobs:
                    done, jobs = wait(jobs, timeout=0.2, return_when=FIRST_COMPLETED)
                    for job in done:
                        job.result()
                    self.summary.seconds = time.monotonic() - began
                    with self._lock:
                        progress(self.summary)
            except KeyboardInterrupt:
                self.summary.interrupted = True
            finally:
                self._stopped.set()
                for worker in workers:
                    worker.kill()
        return self.summary

    def _work(self, worker: Worker) -> None:
        """One spec after the other, until the end."""
        try:
            while not self._stopped.is_set() and time.monotonic() < self._end:
                with self._lock:
                    index = next(self._indices, None)
                if index is None:
                    return
                self._check_spec(index, worker)
        finally:
            worker.close()

    def _check_spec(self, index: int, worker: Worker) -> None:
        summary = self.summary
        try:
            drawn = self.subject.draw(summary.seed, index)
        except Exception as error:  # of a schedule that was asked whether it applies, or for its space or default
            finding = Finding("error", f"{type(error).__name__}: {error}", index, None, self._draw_again(index))
            with self._lock:
                if finding.message in (known.message for known in summary.findings):
                    summary.skipped[finding.message] += 1
                else:
                    summary.findings.append(finding)
            return
        with self._lock:
            summary.add_spec(drawn)
        for case in drawn.cases:
            began = time.monotonic()
            outcome = _outcome(case, worker)
            if self._stopped.is_set():
                return
            with self._lock:
                summary.add_candidate(case, outcome, time.monotonic() - began)
            if outcome.kind != "ok":
                self._add_finding(index, case, outcome, worker)

    def _add_finding(self, index: int, case: Examined, outcome: Outcome, worker: Worker) -> None:
        """Note a failure, and shrink it where it is among the first of its kind and schedule."""
        finding = Finding(outcome.kind, outcome.message, index, case, self._check_again(index, case, outcome))
        kind = finding.kind, finding.schedule
        with self._lock:
            alike = sum((known.kind, known.schedule) == kind for known in self.summary.findings)
            self.summary.findings.append(finding)
        if alike >= MOST_SHRUNK:
            return
        last = outcome

        def fails(simpler: Examined) -> bool:
            nonlocal last
            simpler_outcome = _outcome(simpler, worker)
            if simpler_outcome.kind != outcome.kind or self._stopped.is_set():
                return False
            last = simpler_outcome
            return True

        repeats = fails(case)
        if repeats:
            shrunk = shrink(case, self.subject.steps(), fails, time.monotonic() + SHRINK_SECONDS)
            finding.command, finding.message = self._check_again(index, shrunk, outcome), last.message
        finding.repeats = None if self._stopped.is_set() and not repeats else repeats

    def _check_again(self, index: int, case: Examined, outcome: Outcome) -> str:
        """The command that repeats a check."""
        return self._draw_again(index) if outcome.kind == "descriptor" else case.command

    def _draw_again(self, index: int) -> str:
        """The command that draws a spec again and checks its candidates."""
        return f"convgen fuzz --seed {self.summary.seed} --start {index} --specs 1{self.subject.options}"


def _outcome(case: Examined, worker: Worker) -> Outcome:
    return case.flaw() or worker.check(case)
