"""Kernels of every pair of layouts: the reference computes what ONNX Runtime does, other schedules say no."""

from __future__ import annotations

import itertools

import pytest
from layouts import LAYOUTS

from convgen.check.validate import validate
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.discover import schedules
from convgen.lowering.schedule import Schedule
from convgen.problem.dtypes import DTYPES
from convgen.problem.spec import ConvSpec

PAIRS = list(itertools.product(LAYOUTS, LAYOUTS))
LAYERS = [
    "conv1d n2 ic32 oc48 i9 k3 p1_2 d2 prelu residual",
    "conv2d n2 ic32 oc48 g2 i5x4 k3x2 s1x2 p1x0 silu residual",
    "conv2d n2 ic16 oc32 i3x4 k1x1 relu residual",  # flat pixels
    "convtranspose3d n1 ic16 oc32 i2x3x3 k2x2x3 s2 p0x1x0 residual",
]


def layer(words: str, src: str, dst: str) -> ConvSpec:
    """The layer in these layouts, of one of the dtypes in turn."""
    spec = ConvSpec.parse(words).with_(layout=src, dst_layout=dst)
    dtype = DTYPES[(LAYOUTS.index(src) + LAYOUTS.index(dst) + LAYERS.index(words)) % len(DTYPES)]
    if dtype == "i8":
        return spec.with_(dtype=dtype, residual=False, activation="relu", transposed=False)
    return spec.with_(dtype=dtype)


def test_every_dtype_has_its_turn() -> None:
    for words in LAYERS:
        assert {layer(words, *pair).dtype for pair in PAIRS} == set(DTYPES)


@pytest.mark.parametrize(("src", "dst"), PAIRS)
@pytest.mark.parametrize("words", LAYERS)
def test_the_reference_passes_validation(words: str, src: str, dst: str) -> None:
    spec, target = layer(words, src, dst), resolve()
    kernel = compile_candidate(spec, target, parse_candidate(spec, target, "reference"), 2)
    validate(kernel).raise_if_failed()


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90a"])
@pytest.mark.parametrize(
    "words", [*LAYERS, "conv2d n1 ic64 oc64 i28x28 k3x3 p1", "conv2d ic64 oc64 g64 i28x28 k3x3 p1"]
)
def test_a_schedule_is_not_given_layouts_that_it_does_not_know(words: str, target: str) -> None:
    """Each says itself what it knows, and is refused otherwise, before it is asked for anything."""
    for src, dst in PAIRS:
        core = ConvSpec.parse(words).with_(layout=src, dst_layout=dst).core
        for schedule in schedules().values():
            if core.direction not in schedule.directions:
                continue
            why = schedule.reason_against(core, resolve(target))
            if not schedule.takes_layouts(src, dst):
                assert why == f"does not know src as {src} with dst as {dst}"
            elif schedule.is_reference:
                assert why is None
        assert default_candidate(core, resolve(target)).schedule.takes_layouts(src, dst)


def test_a_schedule_knows_plain_layouts_unless_it_says_otherwise() -> None:
    for schedule in schedules().values():
        if type(schedule).takes_layouts is Schedule.takes_layouts:
            assert [pair for pair in PAIRS if schedule.takes_layouts(*pair)] == [("nchw", "nchw"), ("nhwc", "nhwc")]
