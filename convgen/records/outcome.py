"""How a trial ended: what runners answer, and records keep."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

OUTCOME_KEY = "outcome"


@dataclass(frozen=True)
class Result:
    """How a trial ended: one of the outcomes of :class:`~convgen.records.record.TuningRecord`.

    Attributes:
        samples: seconds per call, each over many calls.
        drift: the reference kernel's time after this trial over its time after the runner's first trial:
            1.1 means that the machine has become 10 % slower. None where nothing was timed.
        device: name of the machine that measured; empty for this one.
        busy: the share of this machine's CPUs that other programs used meanwhile; None where it is not known, or
            nothing was timed.
    """

    outcome: str
    samples: tuple[float, ...] = ()
    error: str = ""
    drift: float | None = None
    device: str = ""
    busy: float | None = None

    @property
    def seconds(self) -> float | None:
        """The median: a few disturbed samples do not move it."""
        return statistics.median(self.samples) if self.outcome == "ok" else None


#: A trial that was never finished, which no record keeps.
INTERRUPTED = Result("interrupted")
