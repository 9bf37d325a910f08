"""How a trial ended, as whatever measured it says and records keep it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

OUTCOME_KEY = "outcome"


@dataclass(frozen=True)
class Result:
    """How a trial ended: one of the outcomes of :class:`~convgen.records.record.TuningRecord`.

    Attributes:
        samples: seconds per call, each over many calls.
        drift: the reference kernel's time after this trial over its time after the runner's first:
            1.1 is a machine that has become 10 % slower. None where nothing was timed.
        device: name of the machine that measured; empty for this one.
    """

    outcome: str
    samples: tuple[float, ...] = ()
    error: str = ""
    drift: float | None = None
    device: str = ""

    @property
    def seconds(self) -> float | None:
        """The median: a few disturbed samples do not move it."""
        return statistics.median(self.samples) if self.outcome == "ok" else None


#: Not an outcome of the trial: it was never finished.
INTERRUPTED = Result("interrupted")
