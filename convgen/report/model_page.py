"""A whole model's time before and after tuning, step by step, as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .profile import NetworkProfile, StepTime
from .render import Bar, render
from .words import factor, microseconds, milliseconds, plural

#: What a step is counted under: the convolutions, and the operators between them.
_KINDS = ("convolutions", "what is between them")


def model_page(profiles: Sequence[NetworkProfile], facts: str = "") -> str:
    """The page of a model, with a section for each of its sizes.

    Args:
        facts: what is said of all of it, such as the machine.
    """
    sections = [_section(profile) for profile in profiles]
    return render("model.html", title=profiles[0].title, facts=facts, sections=sections)


def _section(profile: NetworkProfile) -> dict[str, Any]:
    longest = max((max(step.seconds, step.before or 0.0) for step in profile.steps), default=0.0) or 1.0
    return {
        "heading": f"{profile.title}, {plural(profile.threads, 'thread')}",
        "headline": f"{profile.headline}.",
        "totals": _totals(profile),
        "has_before": profile.before is not None,
        "steps": [_step(step, profile, longest) for step in profile.steps],
    }


def _totals(profile: NetworkProfile) -> list[Bar]:
    """The whole, then each kind of steps; of each what it takes, and before it what it took with the defaults."""
    groups = {"the model": profile.steps}
    groups |= {kind: tuple(step for step in profile.steps if _kind(step) == kind) for kind in _KINDS}
    longest = max(profile.seconds, profile.before or 0.0) or 1.0
    bars = []
    for number, (name, steps) in enumerate(groups.items()):
        colour = ("own", "p0", "p1")[number]
        seconds, before = sum(step.seconds for step in steps), [step.before for step in steps]
        if steps and None not in before:
            took = sum(filter(None, before))
            bars.append(Bar(f"{name}, defaults", f"{milliseconds(took)} ms", "track", took / longest))
        bars.append(Bar(name, f"{milliseconds(seconds)} ms", colour, seconds / longest))
    return bars


def _kind(step: StepTime) -> str:
    return _KINDS[0] if step.schedule else _KINDS[1]


def _step(step: StepTime, profile: NetworkProfile, longest: float) -> dict[str, Any]:
    def wide(seconds: float) -> str:
        return f"{100 * seconds / longest:.2f}%"

    gained = step.before / step.seconds if step.before is not None and step.seconds else None
    return {
        "name": step.name,
        "computes": step.computes,
        "schedule": step.schedule,
        "kind": "p0" if step.schedule else "p1",
        "width": wide(step.seconds),
        "before": wide(step.before) if step.before is not None else "",
        "share": f"{step.seconds / profile.seconds:.1%}" if profile.seconds else "",
        "time": microseconds(step.seconds),
        "took": microseconds(step.before),
        "gained": f"{factor(gained)}×" if gained is not None else "",
    }
