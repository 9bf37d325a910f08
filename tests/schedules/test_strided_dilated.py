"""Axes both strided and dilated, by numbers that share a factor, in batches: their indices are remainders that TVM
divides by a multiple.
"""

from __future__ import annotations

import pytest

from convgen.check.validate import validate
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.discover import schedules
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec

TARGET = resolve()
SPECS = [
    "conv2d n2 ic17 oc16 i9x20 k5x3 s2x1 p4_10x1 d4x1",
    "conv2d n2 ic16 oc16 g16 i9x20 k5x3 s2x1 p4_10x1 d4x1 nhwc",
    "conv2d n2 ic8 oc8 g2 i11x20 k4x3 s4x1 p6_9x1 d6x1",
    "conv3d n2 ic1 oc1 i9x8x20 k5x5x3 s2x1x1 p4_10x2_3x0 d4x3x1",
]
CASES = [
    (descriptor, schedule.id)
    for descriptor in SPECS
    for schedule in schedules().values()
    if schedule.reason_against(ConvSpec.parse(descriptor).core, TARGET) is None
]


@pytest.mark.parametrize(("descriptor", "name"), CASES)
def test_every_tap_that_meets_the_image_is_multiplied_and_no_other(descriptor: str, name: str) -> None:
    spec = ConvSpec.parse(descriptor)
    schedule = schedules()[name]
    picks = schedule.default(spec.core, TARGET)
    validate(compile_candidate(spec, TARGET, Candidate(schedule, picks), 2)).raise_if_failed()
