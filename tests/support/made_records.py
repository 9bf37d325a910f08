"""Records of a layer as if it had been tuned."""

from __future__ import annotations

from typing import Any

from convgen import ConvSpec
from convgen.hardware.target import resolve
from convgen.lowering.candidates import parse_candidate
from convgen.lowering.schedule import Candidate
from convgen.lowering.versions import versions
from convgen.records.record import TuningRecord

TEXT = "conv2d n1 ic3 oc17 i6x7 k3x3 s1x1 p1x1 relu"


SPEC = ConvSpec.parse(TEXT)


def record(candidate: Candidate | None = None, seconds: float | None = 1e-3, **changes: Any) -> TuningRecord:
    """A record of :data:`SPEC` on this machine, on two threads."""
    target = resolve()
    candidate = candidate or parse_candidate(SPEC, target, "reference")
    fields: dict[str, Any] = {
        "spec": SPEC.descriptor,
        "target": target.spelling,
        "hardware": target.hardware,
        "threads": 2,
        "schedule": candidate.schedule.id,
        "schedule_version": candidate.schedule.version,
        "picks": dict(candidate.picks),
        "outcome": "ok",
        "seconds": seconds,
        "versions": versions(),
    }
    return TuningRecord(**fields | changes)
