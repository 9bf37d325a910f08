"""The schedules that a processor has the instructions for."""

from __future__ import annotations

from convgen.hardware.target import Target
from convgen.lowering.discover import schedules_of
from convgen.lowering.schedule import Schedule
from convgen.problem.spec import ConvSpec

#: Layers of all types that schedules multiply by instructions of their own.
LAYERS = [ConvSpec.parse(f"conv2d n1 ic4 oc4 i8x8 k3x3 {dtype}") for dtype in ("f32", "bf16", "i8")]


def runnable(target: Target) -> dict[str, Schedule]:
    """The schedules for CPUs whose own instructions a target has, by id."""
    has, known = set(target.isa), schedules_of("cpu").items()
    return {i: s for i, s in known if all(set(s.instructions(spec)) <= has for spec in LAYERS)}


def usable(target: Target) -> dict[str, Schedule]:
    """Those of them that are not for integers alone."""
    return {i: s for i, s in runnable(target).items() if not s.only_integers}
