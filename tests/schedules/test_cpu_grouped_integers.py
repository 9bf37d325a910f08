"""Grouped and depthwise layers of integers by words of rows: against ONNX Runtime, on every instruction set here."""

from __future__ import annotations

import random

import pytest
from drawn_points import random_picks

from convgen.check.validate import validate
from convgen.cpu.row_words import geometry_of
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec

SCHEDULE = find_schedule("cpu_grouped_integers")
#: Between them: ranks, layouts, types and zero points; strides, dilations, padding past the image; kernels of fewer and
#: more rows than a word has; groups of several channels, vectors that overlap and that are not full.
LAYERS = [
    "conv2d n1 ic32 oc32 g32 i9x10 k3x3 p1 nhwc i8 src_u8 dst_u8 src_zero dst_zero relu",
    "conv2d n2 ic32 oc32 g32 i11x9 k3x3 s2 p0_1x1_0 nchw16c i8 src_u8 dst_u8",
    "conv2d n1 ic24 oc24 g24 i8x7 k5x5 p2 nhwc i8 src_zero clip(-3,40)",
    "conv2d n1 ic16 oc16 g16 i9x9 k3x3 p2 d2x1 nhwc i8 src_u8 weights_u8 src_zero weights_zero dst_u8 dst_zero",
    "conv2d n1 ic48 oc48 g48 i7x8 k7x2 s1x2 p3x1 nhwc i8 nobias dst_i32 src_u8",
    "conv2d n1 ic20 oc20 g20 i3x2 k3x3 p4 nhwc i8 src_u8 src_zero dst_f32 relu",
    "conv2d n1 ic16 oc16 g16 i9x9 k3x3 p1 nchw dst_nhwc i8 src_zero",
    "conv2d n1 ic32 oc32 g32 i9x9 k3x3 p1 nchw16c dst_nhwc i8 src_u8 dst_zero",
    "conv2d n1 ic32 oc32 g8 i6x9 k3x3 p1 nhwc i8 src_u8 dst_u8 src_zero relu",
    "conv2d n1 ic12 oc24 g12 i6x7 k3x3 s2 p1 nhwc i8 src_zero",
    "conv2d n1 ic28 oc35 g7 i6x7 k2x3 nhwc i8 src_u8 weights_u8 weights_zero dst_u8",
    "conv1d n2 ic16 oc16 g16 i40 k5 s2 p2 nhwc i8 src_u8 dst_u8 src_zero dst_zero",
    "conv1d n1 ic18 oc18 g18 i33 k9 p12_3 d2 nhwc i8 src_zero",
    "conv2d n1 ic20 oc20 g20 i9x19 k3x3 s1x1 p1 nchw i8 src_u8 dst_u8 src_zero dst_zero",
    "conv2d n1 ic32 oc32 g32 i9x9 k3x3 p1 nhwc dst_nchw i8 src_zero relu",
    "conv1d n2 ic16 oc16 g16 i40 k5 s2 p2 nchw i8 src_u8 dst_u8 src_zero",
    "conv3d n1 ic16 oc16 g16 i3x5x6 k3x2x3 s1x2x1 p1 d2x1x1 nhwc i8 src_u8 dst_u8 src_zero",
]
MODELS = ("znver4", "alderlake", "skylake-avx512", "haswell", "x86-64-v2")


def check(model: str, spec: ConvSpec, points: int) -> None:
    """Kernels of the default and of random points pass validation: they have the bits of ONNX Runtime."""
    target = resolve(f"cpu:{model}")
    if not target.native:
        pytest.skip(f"this machine does not run code for {target}")
    if why := SCHEDULE.reason_against(spec.core, target):
        pytest.skip(why)
    rng = random.Random(f"{model} {spec}")
    default = SCHEDULE.default(spec.core, target)
    for picks in [default, *random_picks(SCHEDULE, spec, target, points, rng)]:
        report = validate(compile_candidate(spec, target, Candidate(SCHEDULE, picks), 2))
        report.raise_if_failed()
        assert report.error_factor == report.worst_error == 0
        assert {"integers", "exact", "memory", "threads"} <= {found.name for found in report.checks}


@pytest.mark.parametrize("text", LAYERS)
def test_kernels_have_the_bits_of_onnx_runtime(text: str) -> None:
    spec = ConvSpec.parse(text)
    targets = {model: resolve(f"cpu:{model}") for model in MODELS}
    models = [model for model, t in targets.items() if t.native and not SCHEDULE.reason_against(spec.core, t)]
    assert models
    check(models[LAYERS.index(text) % len(models)], spec, 1)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("text", LAYERS)
def test_more_kernels_have_the_bits_of_onnx_runtime(text: str, model: str) -> None:
    check(model, ConvSpec.parse(text), 4)


def test_words_are_used_by_all_rows_that_have_some_of_theirs() -> None:
    """A 3x3 kernel's rows are one word of four, for two output rows; of pairs, two words for one."""
    spec = ConvSpec.parse(LAYERS[0])
    quads, pairs = (geometry_of(spec, resolve(f"cpu:{model}")) for model in ("znver4", "haswell"))
    assert quads.uses(2) == [(0, 0), (0, 1)]
    assert pairs.uses(1) == [(0, 0), (1, 0)]
    assert pairs.uses(2) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("model", ["znver4", "haswell"])
def test_depthwise_layers_of_mobilenet_are_its(model: str) -> None:
    for text in (
        "conv2d n1 ic96 oc96 g96 i112x112 k3x3 s2 p1 nhwc i8 src_u8 dst_u8",
        "conv2d n1 ic960 oc960 g960 i7x7 k3x3 p1 nhwc i8 src_u8 dst_u8 src_zero",
    ):
        spec = ConvSpec.parse(text)
        assert default_candidate(spec, resolve(f"cpu:{model}")).schedule is SCHEDULE


def test_numbers_that_are_no_integers_are_refused() -> None:
    spec = ConvSpec.parse("conv2d n1 ic16 oc16 g16 i9x9 k3x3 nhwc")
    why = SCHEDULE.reason_against(spec, resolve("cpu:znver4"))
    assert why is not None
    assert "needs a layer of integers" in why
