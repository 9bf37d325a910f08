"""The zero-trial default of a layer, and candidates from text."""

from __future__ import annotations

from typing import Any

from ..errors import Inapplicable, UnsupportedError
from ..hardware.target import Target
from ..problem.spec import ConvSpec
from .discover import reference_schedule, schedules
from .discover import schedule as find_schedule
from .schedule import Candidate, Picks

#: How many times the predicted seconds of what transforms (Winograd) count: its sums round worse, so it has to gain
#: more than predictions of close schedules can tell apart. Of 132 layers that several schedules take
#: (`bench/regret.py`) the wrong choice cost 0.5 % in the mean without it, and 0.4 % with it.
TRANSFORM = 1.02


def default_candidate(spec: ConvSpec, target: Target, *, repacked: bool = False) -> Candidate:
    """The zero-trial answer: the applicable schedule that predicts the shortest time, at its default; one that
    transforms only where it gains :data:`TRANSFORM`.

    Args:
        repacked: weights are packed at every call, as training does.

    Raises:
        UnsupportedError: no schedule applies on this target; says why each does not.
    """
    return predicted(spec, target, repacked=repacked)[1]


def predicted(spec: ConvSpec, target: Target, *, repacked: bool = False) -> tuple[float, Candidate]:
    """The zero-trial answer with the seconds that are predicted for it; of weights that are ``repacked``, with those of
    :meth:`~convgen.lowering.schedule.Schedule.repacked`.

    Raises:
        UnsupportedError: no schedule applies on this target; says why each does not.
    """
    core = spec.core
    reasons, ranked = [], []
    for schedule in schedules().values():
        reason = schedule.reason_against(core, target)
        if reason is not None:
            reasons.append(f"{schedule.id}: {reason}")
            continue
        seconds = schedule.repacked(core, target)[1] if repacked else schedule.cost(core, target)
        weight = TRANSFORM if schedule.transforms else 1.0
        ranked.append((seconds * weight, schedule.id, seconds, schedule))
    if not ranked:
        raise UnsupportedError(f"{spec.descriptor} on {target}: no schedule applies ({'; '.join(reasons)})")
    *_, seconds, best = min(ranked, key=lambda entry: entry[:2])
    picks = best.repacked(core, target)[0] if repacked else best.default(core, target)
    return seconds, Candidate(best, picks)


def reference_candidate(spec: ConvSpec, target: Target) -> Candidate:
    """The slow candidate that is always right."""
    schedule = reference_schedule()
    return Candidate(schedule, schedule.default(spec.core, target))


def is_last_resort(spec: ConvSpec, target: Target) -> bool:
    """Whether no schedule but the slow reference applies."""
    core = spec.core
    return all(made.is_reference or made.reason_against(core, target) is not None for made in schedules().values())


def parse_candidate(spec: ConvSpec, target: Target, schedule_id: str, picks: str | None = None) -> Candidate:
    """A candidate from text such as ``tile_oc=32 tile_ow=14``; the default picks where none are given.

    Raises:
        UnsupportedError: no such schedule.
        Inapplicable: it does not apply, or the picks are malformed or not valid.
    """
    schedule = find_schedule(schedule_id)
    core = spec.core
    schedule.check(core, target)
    if picks is None:
        return Candidate(schedule, schedule.default(core, target))
    domains = schedule.space(core, target).domains
    chosen: dict[str, Any] = {}
    for part in picks.split():
        key, separator, text = part.partition("=")
        values = {str(value): value for value in domains.get(key, ())}
        if not separator or text not in values or key in chosen:
            known = "; ".join(f"{k}={'|'.join(map(str, v))}" for k, v in domains.items())
            raise Inapplicable(f"picks: expected each of {known} once, found {part!r}")
        chosen[key] = values[text]
    if missing := [key for key in domains if key not in chosen]:
        raise Inapplicable(f"picks: expected a value for {', '.join(missing)}, found none")
    candidate = Candidate(schedule, Picks(**{key: chosen[key] for key in domains}))
    schedule.valid(core, target, candidate.picks)
    return candidate
