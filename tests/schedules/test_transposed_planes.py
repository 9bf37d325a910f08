"""Periods of rows of strided transposed planes: what they meet, and kernels at every point of small spaces."""

from __future__ import annotations

import random

import pytest

from convgen.check.validate import validate
from convgen.cpu.periods import Periods
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec

NATIVE = resolve("cpu")
PLANES = find_schedule("cpu_transposed_planes")
LAYERS = [
    "conv2d n2 ic9 oc9 g9 i14x14 k3x3 s2 p1 nobias data",
    "conv2d n1 ic6 oc6 g6 i9x40 k5x5 s2 p2x2_1 nobias data",
    "convtranspose2d n1 ic6 oc9 g3 i5x9 k3x4 s2x3 p1x0_1 op1x0 residual prelu",
    "convtranspose2d n2 ic4 oc4 g4 i1x1 k3x3 s2 p0 relu",  # one pixel of src
    "convtranspose2d n1 ic3 oc3 g3 i6x5 k2x2 s3 p0 op2x1",  # phases that no tap meets
    "convtranspose2d n1 ic4 oc2 g2 i7x8 k3x3 s1x2 p2x1 d2x1 f16",
    "convtranspose2d n1 ic2 oc2 g2 i3x4 k3x3 s2 p2x3 op1x0",  # cropped past its first rows
]


@pytest.mark.parametrize("descriptor", LAYERS)
def test_periods_meet_what_the_definition_says(descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor).core
    stride, dilation, (begin, _) = spec.stride[0], spec.dilation[0], spec.padding[0]
    size, out = spec.in_spatial[0], spec.out_spatial[0]
    expected = {
        (i * stride + k * dilation - begin, i, k)
        for i in range(size)
        for k in range(spec.kernel[0])
        if 0 <= i * stride + k * dilation - begin < out
    }
    found, rows = [], []
    for first, count, period in Periods(spec).runs:
        for p in range(first, first + count):
            rows += [p * stride + j for j in range(period.rows)]
            found += [(p * stride + j, p + offset, k) for offset, readers in period.met for j, k in readers]
    assert sorted(found) == sorted(expected)
    assert rows == list(range(out))


@pytest.mark.parametrize("descriptor", LAYERS)
def test_kernels_are_right_at_any_point(descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor)
    core, rng = spec.core, random.Random(descriptor)
    points = [p for p in PLANES.space(core, NATIVE) if PLANES.reason_against(core, NATIVE, p) is None]
    for picks in {PLANES.default(core, NATIVE), *rng.sample(points, min(3, len(points)))}:
        validate(compile_candidate(spec, NATIVE, Candidate(PLANES, picks), 2)).raise_if_failed()


def test_gradients_of_strided_depthwise_layers_are_planes() -> None:
    target = resolve("cpu:znver4").on(1)
    for layer in ("576 14x14", "192 28x28", "144 56x56", "96 112x112"):
        channels, size = layer.split()
        spec = ConvSpec.parse(f"conv2d n16 ic{channels} oc{channels} g{channels} i{size} k3x3 s2 p1 nobias data")
        assert default_candidate(spec, target).schedule is PLANES
