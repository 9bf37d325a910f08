"""Gradients on GPUs, without a device: kernels run in emulation, their instructions are looked at."""

from __future__ import annotations

import random
import shutil
from typing import Any

import pytest

from convgen.check.validate import validate
from convgen.cuda import code
from convgen.hardware.target import Target, resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedules_of
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate, Picks, Schedule
from convgen.problem.spec import ConvSpec

pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'convgen[cuda]'")
emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate")

SCHEDULES = {name: s for name, s in schedules_of("cuda").items() if name.startswith("cuda_gradient")}
#: Between them: every rank, layout, dtype; channels that are no vectors; groups; pixels beside the steps; both biases.
WEIGHTS = [
    "conv2d n2 ic16 oc24 i9x8 k3x3 s1 p1 nobias weights f16 nhwc",
    "conv2d n1 ic19 oc33 i7x6 k3x3 s2 p1x0_2 weights bf16",
    "conv2d n2 ic8 oc12 i11x11 k2x2 s3x4 p0 d2x1 nobias weights nhwc tf32",
    "conv2d n2 ic12 oc20 i6x5 k1x1 s1 p0 weights nhwc",
    "conv2d n1 ic40 oc72 i6x5 k1x1 s2 p0 nobias weights f16",
    "conv1d n3 ic16 oc17 i33 k3 s1 p2_0 nobias weights nhwc f16",
    "conv3d n1 ic8 oc16 i3x4x5 k3x3x3 s1 p1 weights f16",
    "conv2d n1 ic16 oc24 g4 i9x7 k3x3 s1 p1 nobias weights nhwc bf16",
    "conv2d n2 ic6 oc12 g6 i6x7 k3x3 s2 p1 weights nhwc",
    "conv2d n2 ic8 oc8 g8 i9x7 k5x5 s1 p2 nobias weights f16",
    "conv2d n1 ic6 oc10 i8x9 k7x7 s2 p3 weights strict",
    "convtranspose2d n2 ic16 oc24 g2 i4x5 k3x3 s2 p1 op1 weights f16 nhwc",
    "convtranspose1d n1 ic24 oc12 i10 k4 s2 p1 nobias weights tf32",
]
#: Gradients of src: of convolutions at stride 1 and others, of transposed ones.
DATA = [
    "conv2d n1 ic24 oc16 i9x8 k3x3 s1 p1 data f16 nhwc",
    "conv2d n1 ic16 oc24 i8x8 k3x3 s2 p1 data bf16 nhwc",
    "conv2d n1 ic10 oc12 i7x9 k3x3 s2 p1 data",
    "conv2d n1 ic8 oc8 g8 i7x6 k3x3 s1 p1 data nhwc f16",
    "convtranspose2d n1 ic16 oc8 i4x5 k4x4 s2 p1 data tf32",
]
#: Layers of the sizes of real ones.
REAL = [
    "conv2d n16 ic64 oc64 i56x56 k3x3 s1 p1 nobias weights nhwc f16",
    "conv2d n16 ic256 oc512 i28x28 k1x1 s2 p0 nobias weights nhwc bf16",
    "conv2d n16 ic512 oc512 i7x7 k3x3 s1 p1 weights f16",
    "conv2d n8 ic3 oc64 i224x224 k7x7 s2 p3 nobias weights tf32",
    "conv2d n8 ic128 oc128 i28x28 k3x3 s1 p1 nobias weights nhwc",
]


def target_of(spec: ConvSpec) -> Target:
    return resolve("cuda:sm_90a" if len(spec.descriptor) % 2 else "cuda:sm_80")


def drawn(schedule: Schedule, spec: ConvSpec, target: Target) -> Picks:
    """A valid point other than the default, where one is found."""
    rng, core, default = random.Random(spec.descriptor), spec.core, schedule.default(spec.core, target)
    points = (schedule.space(core, target).sample(rng) for _ in range(2000))
    fitting = (p for p in points if p != default and schedule.reason_against(core, target, p) is None)
    return next(fitting, default)


def pairs() -> list[Any]:
    found = []
    for text in WEIGHTS:
        spec = ConvSpec.parse(text)
        for schedule in SCHEDULES.values():
            if schedule.reason_against(spec.core, target_of(spec)) is None:
                found.append(pytest.param(text, schedule, id=f"{schedule.id}-{text.replace(' ', '-')}"))
    return found


@emulated
@pytest.mark.parametrize(("text", "schedule"), pairs())
def test_gradients_of_weights_are_right_in_emulation(text: str, schedule: Schedule) -> None:
    """Integers bit for bit, floats within their bound, NaN and infinities; whatever order threads run in.

    The default for every other problem, else a point drawn from the space.
    """
    spec = ConvSpec.parse(text)
    target = target_of(spec)
    picks = drawn(schedule, spec, target) if WEIGHTS.index(text) % 2 else schedule.default(spec.core, target)
    report = validate(compile_candidate(spec, target, Candidate(schedule, picks), 1))
    assert report.passed, report.to_dict()


@emulated
@pytest.mark.parametrize("text", DATA)
def test_gradients_of_src_are_right_in_emulation(text: str) -> None:
    spec = ConvSpec.parse(text)
    target = target_of(spec)
    candidate = default_candidate(spec, target)
    assert not candidate.schedule.is_reference
    report = validate(compile_candidate(spec, target, candidate, 1))
    assert report.passed, report.to_dict()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("text", REAL)
def test_real_layers_use_matrix_units_and_spill_nothing(text: str, arch: str) -> None:
    spec, target = ConvSpec.parse(text), resolve(f"cuda:{arch}")
    candidate = default_candidate(spec, target)
    assert candidate.schedule.id in ("cuda_gradient", "cuda_gradient_tf32x3")
    source = code.generate(lower(spec, target, candidate))
    images, resources = code.compile_images(source, target)
    assert [taken.spilled for taken in resources] == [0] * len(resources)
    instructions = code.disassembled(images[0][1])
    assert "HMMA.1688.F32.TF32" in instructions if spec.dtype == "f32" else "HMMA.16816.F32" in instructions
    assert "LDGSTS" in instructions
    assert spec.dtype == "f32" or "LDSM.16.MT88" in instructions
    assert "ATOM" not in instructions
    assert "RED." not in instructions


def test_every_real_gradient_has_a_schedule_that_is_not_the_definition() -> None:
    """On every architecture: plain loops over all images would take seconds."""
    depthwise = "conv2d n16 ic144 oc144 g144 i56x56 k3x3 s1 p1"
    layers = [*REAL, *(f"{depthwise} {word} {REAL[0].split()[-1]}" for word in ("data", "nobias weights"))]
    for arch in ("sm_70", "sm_75", "sm_80", "sm_90a", "sm_120"):
        target = resolve(f"cuda:{arch}")
        for text in layers:
            spec = ConvSpec.parse(text).with_(dtype="f32", accuracy="standard")
            assert not default_candidate(spec, target).schedule.is_reference, (arch, text)
