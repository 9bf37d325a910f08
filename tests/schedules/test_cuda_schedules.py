"""Schedules for NVIDIA GPUs, without one: run serially on the CPU, and compiled for devices.

What is run are the statements of a candidate, its loops over blocks and threads one after the other
(``convgen.check.emulation.serial``): index maps, tails, types and epilogues, but neither barriers nor device code.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convgen.check.bounds import reference, tolerance, worst
from convgen.check.data import exact_data, float_data
from convgen.check.emulation.serial import serialised
from convgen.check.sandbox import run_guarded
from convgen.cuda.code import compile_images, generate
from convgen.hardware.target import Target, resolve
from convgen.kernel.kernel import compile_lowered
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedules_of
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate, Picks, Schedule
from convgen.problem.dtypes import distance
from convgen.problem.spec import ConvSpec

TARGET = resolve("cuda:sm_80")
#: Instructions of tensor cores are not plain statements; gradients of weights are no layers (test_cuda_gradient.py).
OTHERS = ("cuda_gemm", "cuda_wgmma", "cuda_gradient")
SCHEDULES = [s for s in schedules_of("cuda").values() if not s.id.startswith(OTHERS)]
#: Between them: every rank, layout, dtype and feature; channels and pixels beside the tiles.
SMOKE = [
    "conv2d n1 ic3 oc17 i9x10 k3x3 s2 p0_1x1_0 relu",
    "conv2d n2 ic16 oc31 i7x6 k3x3 s1 p1 residual silu",
    "conv2d n1 ic17 oc33 i6x6 k3x3 s1 p1x0_2 nhwc prelu",
    "conv2d n2 ic16 oc32 i7x6 k3x3 s1 p1 residual relu nhwc f16",
    "conv2d n1 ic32 oc24 i8x8 k1x1 s1 p0 residual relu6 bf16",
    "conv2d n1 ic33 oc16 i4x4 k1x1 s1 p0 nhwc nobias",
    "conv2d n1 ic8 oc12 i11x11 k2x2 s3x4 p0 d2x1 clip(-1,2.5) bf16 nhwc",
    "conv2d n1 ic17 oc18 i7x9 k3x3 s1 p1 residual mish bf16",
    "conv2d n1 ic16 oc16 i5x9 k2x3 s1 p0x1 relu strict nhwc",
    "conv1d n1 ic16 oc17 i33 k3 s1 p2_0 elu(0.5) strict",
    "conv1d n2 ic6 oc12 g3 i20 k5 s2 p2 d2 hardswish",
    "conv2d n1 ic16 oc24 g4 i9x7 k3x3 s1 p1 nhwc relu residual bf16",
    "conv2d n2 ic24 oc24 g3 i6x7 k3x3 s2 p1 prelu f16",
    "conv2d n1 ic15 oc15 g15 i9x9 k3x3 s1 p1 relu6",
    "conv2d n1 ic4 oc8 g4 i8x8 k5x5 s2x1 p2 residual leaky_relu(0.25)",
    "conv2d n1 ic16 oc16 g16 i6x5 k3x3 s1 p1 d1x2 nhwc residual relu bf16",
    "conv1d n2 ic8 oc8 g8 i70 k40 s2 p3_9 f16",
    "conv3d n1 ic16 oc16 i3x4x5 k3x3x3 s1 p1 sigmoid",
    "conv3d n1 ic3 oc6 g3 i4x5x4 k2x3x1 s1x2x1 p0_1x1x0 nhwc hardsigmoid",
    "conv2d n1 ic17 oc18 i2x3 k2x2 s1x2 p5_4x4_6",  # more padding than input
    "conv2d n1 ic8 oc12 i8x9 k3x3 s1 p1 nhwc i8",
    "conv2d n1 ic8 oc8 g8 i9x8 k3x3 s2 p1 relu i8",
    "convtranspose2d n1 ic5 oc6 i4x5 k3x3 s2 p1x0_1 op1x0 tanh",
    "convtranspose2d n1 ic16 oc16 i5x5 k4x4 s2 p1 relu nhwc f16",  # the stride divides the kernel
    "convtranspose2d n1 ic16 oc18 i4x5 k3x3 s2 p1 relu",  # phases with fewer taps
    "convtranspose1d n2 ic4 oc6 g2 i6 k4 s3 p1 d2 op2 nhwc gelu_tanh residual",
    "convtranspose1d n2 ic4 oc6 i6 k5 s4 p0 d6 op2",  # strides and dilations with a common factor
    "convtranspose2d n1 ic4 oc8 i5x4 k2x2 s3x4 p0 relu bf16",  # strides past the kernel
    "convtranspose3d n1 ic3 oc2 i2x3x2 k2x2x3 s2x1x2 p0 nobias",
    "convtranspose2d n4 ic9 oc5 i1x1 k4x3 s1 p0x1_0 residual relu bf16",
]
#: Layers of the sizes of real ones.
REAL = [
    "conv2d n8 ic64 oc128 i56x56 k3x3 s1 p1 relu",
    "conv2d n8 ic64 oc128 i56x56 k3x3 s1 p1 nhwc residual relu bf16",
    "conv2d n8 ic64 oc64 i56x56 k3x3 s1 p1 nhwc relu f16",
    "conv2d n1 ic3 oc64 i224x224 k7x7 s2 p3 relu",
    "conv2d n8 ic256 oc64 i56x56 k1x1 s1 p0 silu",
    "conv2d n8 ic128 oc128 g32 i56x56 k3x3 s1 p1 relu",
    "conv2d n8 ic96 oc96 g96 i112x112 k3x3 s2 p1 relu6",
    "conv2d n8 ic96 oc96 g96 i112x112 k3x3 s1 p1 relu6 nhwc bf16",
    "conv1d n4 ic256 oc256 g256 i1000 k31 s1 p15 nhwc",
    "conv3d n1 ic32 oc64 i16x28x28 k3x3x3 s1 p1",
    "convtranspose2d n1 ic512 oc256 i16x16 k4x4 s2 p1 relu",
    "convtranspose2d n8 ic64 oc32 i64x64 k3x3 s2 p1 op1 nhwc bf16",
    "convtranspose3d n1 ic64 oc32 i8x16x16 k3x3x3 s2 p1 op1",
]
ARCHITECTURES = ("sm_75", "sm_80", "sm_90a")


def applicable(spec: ConvSpec, target: Target = TARGET) -> list[Schedule]:
    return [s for s in SCHEDULES if s.reason_against(spec.core, target) is None]


def pairs(descriptors: list[str]) -> list[Any]:
    """Every descriptor with every schedule that applies to it, as parameters."""
    found = [(s, f) for s in descriptors for f in applicable(ConvSpec.parse(s))]
    return [pytest.param(s, f, id=f"{f.id}-{s.replace(' ', '-')}") for s, f in found]


def random_picks(schedule: Schedule, spec: ConvSpec, count: int) -> list[Picks]:
    """Up to ``count`` valid points other than the default."""
    rng, core = random.Random(spec.descriptor), spec.core
    space, default = schedule.space(core, TARGET), schedule.default(core, TARGET)
    drawn = dict.fromkeys(space.sample(rng) for _ in range(100))
    return [p for p in drawn if p != default and schedule.reason_against(core, TARGET, p) is None][:count]


def run_serially(spec: ConvSpec, candidate: Candidate, cases: dict[str, Any]) -> list[tuple[str, Any]]:
    """Outputs of a candidate by case, between guard pages, flush with either."""
    with tempfile.TemporaryDirectory() as folder:
        lowered = serialised(lower(spec, TARGET, candidate))
        interface, _, library = compile_lowered(lowered, Path(folder))
        outputs = run_guarded(library, interface.name, spec, cases, 1, Path(folder), 60)
        return [(run.case, out) for run, out in outputs.items()]


def check_serially(spec: ConvSpec, schedule: Schedule, chosen: Iterable[Picks]) -> None:
    """The outputs of these points are right, and their device code can be generated."""
    cases = {"exact": exact_data(spec), "float": float_data(spec)}
    expected = {case: reference(spec, data) for case, data in cases.items()}
    for picks in chosen:
        candidate = Candidate(schedule, picks)
        for case, out in run_serially(spec, candidate, cases):
            if case == "exact" and spec.activation_op.exact and not schedule.transforms:
                np.testing.assert_array_equal(out, expected[case], err_msg=str(candidate))
            assert worst(distance(out, expected[case]), tolerance(spec, cases[case])) <= 1, (case, candidate)
        assert "main_kernel" in generate(lower(spec, TARGET, candidate)).text


def points(schedule: Schedule, spec: ConvSpec) -> list[Picks]:
    """The default, and a drawn point where there are others."""
    return [schedule.default(spec.core, TARGET), *random_picks(schedule, spec, 1)]


@pytest.mark.parametrize(("descriptor", "schedule"), pairs(SMOKE))
def test_statements_run_serially_are_right(descriptor: str, schedule: Schedule) -> None:
    """The default for every other problem, else a point drawn from the space."""
    spec = ConvSpec.parse(descriptor)
    chosen = points(schedule, spec)
    check_serially(spec, schedule, chosen[-1:] if SMOKE.index(descriptor) % 2 else chosen[:1])


@pytest.mark.parametrize(
    "descriptor",
    [
        "conv2d n2 ic16 oc32 g2 i5x6 k3x2 p1 residual nchw8c dst_nchw16c f16",
        "conv1d n2 ic16 oc8 i9 k1 nhwc dst_nchw8c",
        "convtranspose2d n1 ic16 oc8 i3x4 k3x3 s2 nchw16c dst_nchw",
    ],
)
def test_the_reference_run_serially_is_right_in_layouts_of_blocks(descriptor: str) -> None:
    check_serially(ConvSpec.parse(descriptor), schedules_of("cuda")["reference"], [Picks()])


@pytest.mark.slow
@pytest.mark.parametrize(("descriptor", "schedule"), pairs(SMOKE))
def test_defaults_and_drawn_points_run_serially_are_right(descriptor: str, schedule: Schedule) -> None:
    spec = ConvSpec.parse(descriptor)
    check_serially(spec, schedule, points(schedule, spec))


def test_what_is_run_serially_is_compared() -> None:
    """One wrong element of the weights is found."""
    spec = ConvSpec.parse(SMOKE[0])
    schedule = schedules_of("cuda")["cuda_direct"]
    data = exact_data(spec)
    expected = reference(spec, data)
    data["weights"].flat[5] += 1
    candidate = Candidate(schedule, schedule.default(spec.core, TARGET))
    for _, out in run_serially(spec, candidate, {"exact": data}):
        assert (out != expected).any()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.id)
def test_problems_exercise_every_schedule_in_every_dtype(schedule: Schedule) -> None:
    assert {s.dtype for s in map(ConvSpec.parse, SMOKE) if schedule in applicable(s)} >= {"f32", "f16", "bf16"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("descriptor", [*SMOKE, *REAL])
def test_defaults_are_valid_points_of_the_space(descriptor: str, arch: str) -> None:
    spec, target = ConvSpec.parse(descriptor).core, resolve(f"cuda:{arch}")
    found = applicable(spec, target)
    assert len(found) > 1, "only the reference applies"
    for schedule in found:
        default = schedule.default(spec, target)
        assert default in schedule.space(spec, target)
        assert schedule.reason_against(spec, target, default) is None
        assert schedule.cost(spec, target) > 0
    assert default_candidate(ConvSpec.parse(descriptor), target).schedule.id != "reference"


@pytest.mark.parametrize(("descriptor", "schedule"), pairs(REAL))
def test_real_layers_compile_without_spills(descriptor: str, schedule: Schedule) -> None:
    """For every architecture by the default; registers and shared memory are the device's."""
    pytest.importorskip("cuda.bindings.nvrtc")
    spec = ConvSpec.parse(descriptor)
    for arch in ARCHITECTURES:
        target = resolve(f"cuda:{arch}")
        lowered = lower(spec, target, Candidate(schedule, schedule.default(spec.core, target)))
        _, resources = compile_images(generate(lowered), target)
        for found in resources:
            assert not found.spilled, f"{arch}: {found}"
            assert found.shared <= target.shared_memory
            assert found.threads <= 1024
            assert found.threads * found.registers <= 1 << 16


@pytest.mark.parametrize(
    ("descriptor", "arch", "schedule", "picks"),
    [
        (
            "conv2d n1 ic3 oc32 i224x224 k3x3 s2 p1 clip(0,6) f16 nhwc",
            "sm_80",
            "cuda_direct",
            {"thread_m": 4, "thread_n": 8, "tile_k": 16, "tile_m": 128, "tile_n": 32},
        ),
        (
            "conv3d n1 ic64 oc128 i16x56x56 k3x3x3 s1 p1 relu i8 nhwc",
            "sm_90a",
            "cuda_gemm",
            {
                "tile_m": 128,
                "tile_n": 128,
                "tile_k": 32,
                "warps_m": 2,
                "warps_n": 2,
                "stages": 4,
                "split_k": 1,
                "merge_g": 1,
            },
        ),
    ],
    ids=["as few as the compiler likes", "fewer than a third of what there is"],
)
def test_no_register_is_saved_at_the_price_of_a_spill(
    descriptor: str, arch: str, schedule: str, picks: dict[str, int]
) -> None:
    """The compiler would spill some registers so that another block fits."""
    pytest.importorskip("cuda.bindings.nvrtc")
    spec, target = ConvSpec.parse(descriptor), resolve(f"cuda:{arch}")
    source = generate(lower(spec, target, Candidate(schedules_of("cuda")[schedule], Picks(**picks))))
    _, (used,) = compile_images(source, target)
    assert used.spilled == 0


def test_what_launches_hand_to_each_other_is_workspace() -> None:
    spec = ConvSpec.parse("conv2d n1 ic16 oc32 i8x8 k3x3 s1 p1")
    schedule = schedules_of("cuda")["cuda_winograd"]
    picks = schedule.default(spec, TARGET)
    source = generate(lower(spec, TARGET, Candidate(schedule, picks)))
    tiles, positions = 16, 16  # of 2 x 2 outputs, and their products
    rows = -(-tiles // picks.tile_m) * picks.tile_m
    assert source.workspace == (4 * positions * 16 * rows, 4 * positions * 32 * rows)
    first, second, last = (set(launch.arguments) for launch in source.launches)
    assert first == {"src", "workspace0"}
    assert second == {"workspace0", "packed0", "workspace1"}
    assert last == {"workspace1", "packed1", "dst"}


def test_schedules_for_gpus_refuse_cpus() -> None:
    layer, gradient = ConvSpec.parse(SMOKE[0]), ConvSpec.parse("conv2d n1 ic8 oc8 i8x8 k3x3 weights")
    for name, schedule in schedules_of("cuda").items():
        if name != "reference":
            spec = gradient if name.startswith("cuda_gradient") else layer
            assert schedule.reason_against(spec.core, resolve("cpu")) == "needs a GPU"
