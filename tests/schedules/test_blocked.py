"""Kernels that read one layout and write another: every schedule that knows blocks of channels, in every pair of
layouts, against ONNX Runtime.
"""

from __future__ import annotations

import itertools
import random

import pytest
from drawn_points import random_picks
from layouts import LAYOUTS
from usable import runnable

from convgen.check.validate import validate
from convgen.hardware.target import Target, resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.discover import schedules_of
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec

NATIVE, HASWELL = resolve(), resolve("cpu:haswell")
THREADS = 3
#: Tiles, rows and vectors of channels with tails; strides, dilation, padding of one side, one pixel, groups.
LAYERS = {
    "cpu_direct": [
        "conv2d n2 ic32 oc48 i9x19 k3x3 s1 p1 residual relu",
        "conv2d n1 ic48 oc80 i7x5 k1x1 s1 p0 prelu f16",
        "conv2d n1 ic16 oc32 i11x9 k5x3 s2 p2_0x1 gelu residual",
        "conv2d n2 ic64 oc64 g2 i6x7 k3x3 s1x2 p1 d2x1 residual silu bf16",
        "conv3d n1 ic16 oc32 i4x5x6 k3x1x3 s1 p1x0x1 residual",
        "conv1d n3 ic32 oc16 i40 k7 s3 p3_1 f16 relu6",
        "conv2d n1 ic16 oc64 i1x1 k1x1 s1 p0 nobias",
    ],
    "cpu_grouped": [
        "conv2d n2 ic32 oc32 g32 i9x13 k3x3 s1 p1 residual relu6",
        "conv2d n1 ic48 oc48 g48 i10x7 k5x5 s2 p2 silu f16",
        "conv2d n1 ic32 oc32 g8 i7x9 k3x3 s1 p1 prelu residual",
        "conv1d n2 ic64 oc32 g16 i30 k3 s1 p2 d2 residual",
        "conv3d n1 ic16 oc16 g16 i3x4x5 k3x3x3 s1x2x1 p1 hardswish bf16",
    ],
    "cpu_grouped_integers": [
        "conv2d n2 ic32 oc32 g32 i9x13 k3x3 s1 p1 relu i8",
        "conv2d n1 ic32 oc32 g8 i7x9 k3x3 s2 p1 i8",
        "conv1d n2 ic64 oc64 g64 i30 k3 s1 p2 d2 i8",
    ],
    "cpu_winograd_integers": [
        "conv2d n2 ic32 oc48 i9x13 k3x3 s1 p1 relu i8",
        "conv2d n1 ic16 oc16 i7x4 k3x3 s1 p0_2 src_u8 src_zero i8",
    ],
    "cpu_winograd_pairs": [
        "conv2d n2 ic32 oc48 i9x13 k3x3 s1 p1 residual relu accuracy_bf16",
        "conv2d n1 ic16 oc16 i7x4 k3x3 s1 p0_2 prelu bf16 accuracy_bf16",
    ],
    "cpu_gradient": [
        "conv2d n2 ic32 oc48 i9x7 k3x3 s1 p1 nobias weights",
        "conv2d n1 ic64 oc32 g2 i7x8 k3x2 s2x1 p1x0 weights",
    ],
    "cpu_gradient_winograd": [
        "conv2d n2 ic32 oc48 i9x7 k3x3 s1 p1 nobias weights",
    ],
    "cpu_winograd": [
        "conv2d n2 ic32 oc48 i9x14 k3x3 s1 p1 residual relu",
        "conv2d n1 ic16 oc32 i13x7 k5x5 s1 p2 f16",
        "conv2d n1 ic48 oc32 i12x9 k3x3 s2 p1_0 residual prelu",
        "conv1d n2 ic32 oc16 i50 k3 s1 p1 gelu bf16",
        "conv3d n1 ic16 oc32 i4x6x5 k3x3x3 s1 p1 residual",
        "conv2d n2 ic32 oc64 g2 i9x10 k3x3 s1 p1 residual hardswish f16",
        "convtranspose2d n1 ic32 oc16 i5x6 k4x4 s2 p1 relu",
    ],
    "cpu_matrix": [
        "conv2d n2 ic32 oc48 i9x19 k3x3 s1 p1 residual relu bf16",
        "conv2d n1 ic48 oc80 i7x5 k1x1 s1 p0 prelu bf16",
        "conv2d n1 ic16 oc32 i11x9 k5x3 s2 p2_0x1 gelu residual accuracy_bf16",
        "conv1d n1 ic16 oc48 i1 k1 s1 p0 nobias bf16",
    ],
    "cpu_transposed": [
        "convtranspose2d n2 ic32 oc48 i5x7 k4x4 s2 p1 residual relu",
        "convtranspose2d n1 ic16 oc32 i6x3 k3x5 s2x3 p1x0_2 op1x0 prelu f16",
        "convtranspose1d n1 ic48 oc16 i21 k8 s4 p2 residual silu",
        "convtranspose2d n2 ic64 oc32 g2 i4x5 k3x3 s1x2 p1 d2x1 residual bf16",
        "convtranspose3d n1 ic16 oc32 i2x3x4 k2x3x2 s2x1x2 p0 relu",
        "convtranspose2d n1 ic32 oc32 i1x1 k4x4 s1 p0 nobias",
    ],
}
PAIRS = list(itertools.product(LAYOUTS, LAYOUTS))


def target_for(src: str) -> Target:
    """AVX2 reads the blocks that are its own; others have narrower or wider vectors than a block has channels."""
    return HASWELL if src == "nchw8c" else NATIVE


def pairs_of(schedule: str) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if find_schedule(schedule).takes_layouts(*pair)]


def check(schedule_id: str, spec: ConvSpec, points: int) -> None:
    """The default's kernel and those of random points pass validation."""
    schedule, targets = find_schedule(schedule_id), [target_for(spec.layout).on(THREADS), HASWELL.on(THREADS)]
    # Some write blocks of whole vectors alone.
    target = next((target for target in targets if schedule.reason_against(spec.core, target) is None), targets[0])
    if schedule_id not in runnable(target) or (schedule.only_integers and schedule.reason_against(spec.core, NATIVE)):
        pytest.skip(f"{target} lacks instructions of {schedule_id}")
    assert schedule.reason_against(spec.core, target) is None
    rng = random.Random(f"{schedule_id} {spec}")
    default = schedule.default(spec.core, target)
    for picks in [default, *random_picks(schedule, spec, target, points, rng)]:
        kernel = compile_candidate(spec, target, Candidate(schedule, picks), THREADS)
        validate(kernel).raise_if_failed()


def cases() -> list[tuple[str, str, str, str]]:
    """Each schedule in each pair of layouts with one of its layers, which take turns, and each layer at least once."""
    found = []
    for schedule, layers in LAYERS.items():
        pairs = pairs_of(schedule)
        for i in range(max(len(pairs), len(layers))):
            found.append((schedule, layers[i % len(layers)], *pairs[i % len(pairs)]))
    return found


@pytest.mark.skipif(not HASWELL.native, reason="needs a CPU with AVX2")
@pytest.mark.parametrize(("schedule", "words", "src", "dst"), cases())
def test_kernels_from_one_layout_to_another_pass_validation(schedule: str, words: str, src: str, dst: str) -> None:
    check(schedule, ConvSpec.parse(words).with_(layout=src, dst_layout=dst), 1)


@pytest.mark.parametrize(
    "words",
    [
        "conv2d n1 ic48 oc120 g3 i15x33 k5x3 s4x1 p0_2x0 d2x2 nchw8c",
        "conv2d n2 ic192 oc32 g4 i3x11 k5x3 s2 p3_0x1 nchw16c",
        "conv3d n2 ic136 oc256 g8 i8x8x8 k7x3x3 s2x4x1 p1x0_2x0_1 d1x1x3 nobias bf16 nchw8c",
    ],
)
def test_groups_whose_inputs_are_in_several_blocks(words: str) -> None:
    spec, schedule = ConvSpec.parse(words), find_schedule("cpu_grouped")
    kernel = compile_candidate(spec, NATIVE, Candidate(schedule, schedule.default(spec.core, NATIVE)), THREADS)
    validate(kernel).raise_if_failed()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not HASWELL.native, reason="needs a CPU with AVX2")
@pytest.mark.parametrize("schedule", LAYERS)
def test_more_kernels_from_one_layout_to_another_pass_validation(schedule: str) -> None:
    for words, (src, dst) in itertools.product(LAYERS[schedule], pairs_of(schedule)):
        check(schedule, ConvSpec.parse(words).with_(layout=src, dst_layout=dst), 3)


def test_every_schedule_that_knows_blocks_has_its_layers_here() -> None:
    """Also those of which only one side may be in blocks."""
    blocked = {
        name
        for name, schedule in schedules_of("cpu").items()
        if any(schedule.takes_layouts(*pair) for pair in PAIRS if pair != ("nchw", "nchw") and pair != ("nhwc", "nhwc"))
    }
    assert blocked - {"reference"} == set(LAYERS)
