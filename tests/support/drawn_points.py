"""Points of a schedule's space, drawn at random."""

from __future__ import annotations

import random

from convgen.hardware.target import Target
from convgen.lowering.schedule import Picks, Schedule
from convgen.problem.spec import ConvSpec


def random_picks(schedule: Schedule, spec: ConvSpec, target: Target, count: int, rng: random.Random) -> list[Picks]:
    """Up to ``count`` distinct valid points other than the default."""
    space, found = schedule.space(spec.core, target), {schedule.default(spec.core, target): None}
    for picks in (space.sample(rng) for _ in range(300)):
        if len(found) <= count and schedule.reason_against(spec.core, target, picks) is None:
            found[picks] = None
    return list(found)[1:]
