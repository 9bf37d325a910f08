"""Tensor cores without a device: kernels run in emulation, their instructions are looked at.

The emulator runs the CUDA source that is compiled for devices, with fragments, asynchronous copies and barriers
as PTX describes them. It is no device: what hardware does beyond that description is not tested here.
"""

from __future__ import annotations

import builtins
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from convgen.check.bounds import reference, tolerance
from convgen.check.data import exact_data
from convgen.check.emulation.serial import serialised
from convgen.check.sandbox import run_guarded
from convgen.check.validate import validate
from convgen.cuda import code, tensorize
from convgen.errors import BuildError, UnsupportedError
from convgen.hardware.target import Target, resolve
from convgen.kernel.kernel import compile_candidate, compile_lowered
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedules_of
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate, Picks, Schedule
from convgen.problem.dtypes import distance
from convgen.problem.spec import ConvSpec

pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install '.[cuda]'")

SCHEDULES = {name: s for name, s in schedules_of("cuda").items() if name.startswith(("cuda_gemm", "cuda_wgmma"))}
#: Between them: every rank, layout, dtype and feature; pixels and channels beside the tiles; a reduction of one
#: step and of many; groups; phases.
SMOKE = [
    "conv2d n1 ic16 oc24 i9x8 k3x3 s1 p1 relu f16 nhwc",
    "conv2d n2 ic19 oc33 i7x6 k3x3 s2 p1x0_2 residual clip(-2,3) bf16",
    "conv2d n1 ic8 oc12 i11x11 k2x2 s3x4 p0 d2x1 nhwc nobias tf32",
    "conv2d n1 ic256 oc17 i5x5 k3x3 s1 p1 prelu f16",
    "conv2d n1 ic64 oc64 i5x4 k1x1 s1 p0 residual relu nhwc bf16",
    "conv1d n2 ic16 oc17 i33 k3 s1 p2_0 gelu nhwc f16",
    "conv3d n1 ic8 oc16 i3x4x5 k3x3x3 s1 p1 f16",
    "conv2d n1 ic20 oc24 i9x7 k3x3 s1 p1 nhwc relu residual",
    "conv2d n1 ic16 oc24 g4 i9x7 k3x3 s1 p1 nhwc relu residual bf16",
    "conv2d n2 ic24 oc24 g3 i6x7 k3x3 s2 p1 silu tf32",
    "conv2d n1 ic12 oc18 g6 i6x7 k3x3 s1 p1 relu6 f16",
    "conv2d n1 ic16 oc32 g2 i7x5 k3x3 s1 p1 relu nhwc i8",
    "conv2d n2 ic259 oc33 i4x5 k3x3 s2 p1x0_2 nobias i8",
    "conv1d n2 ic256 oc40 g2 i37 k3 s2 p2 d2 relu nhwc i8",
    "conv2d n1 ic72 oc264 i1x1 k1x1 s1 p0 prelu residual nhwc f16",
    "convtranspose2d n2 ic16 oc24 g2 i4x5 k3x3 s2 p1 op1 residual f16",
    "convtranspose1d n1 ic24 oc12 i10 k16 s8 p4 relu bf16 nhwc",
    "convtranspose3d n1 ic8 oc12 i2x3x4 k2 s1 p0 d2 relaxed prelu",
]
#: Layers of the sizes of real ones, and an instruction that only matrix units of their type have.
REAL = [
    ("conv2d n16 ic64 oc64 i56x56 k3x3 s1 p1 relu nhwc f16", "16816.F32"),
    ("conv2d n16 ic256 oc512 i28x28 k1x1 s2 p0 nhwc bf16", "16816.F32.BF16"),
    ("conv2d n1 ic512 oc512 i7x7 k3x3 s1 p1 relu f16", "16816.F32"),
    ("conv2d n1 ic3 oc64 i224x224 k7x7 s2 p3 relu tf32", "1688.F32.TF32"),
    ("conv3d n1 ic64 oc128 i16x56x56 k3x3x3 s1 p1 relu nhwc f16", "16816.F32"),
    ("conv1d n1 ic512 oc512 i3000 k3 s2 p1 gelu f16", "16816.F32"),
    ("convtranspose2d n1 ic512 oc256 i16x16 k4x4 s2 p1 relu nhwc bf16", "16816.F32.BF16"),
    ("conv2d n16 ic128 oc128 g32 i56x56 k3x3 s1 p1 relu nhwc f16", "16816.F32"),
    ("conv2d n8 ic128 oc128 i28x28 k3x3 s1 p1 nhwc", "1688.F32.TF32"),
    ("conv2d n16 ic64 oc64 i56x56 k3x3 s1 p1 relu nhwc i8", "16832.S8.S8"),
]
emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate")


def target_of(schedule: Schedule) -> Target:
    return resolve("cuda:sm_90a" if schedule.id.startswith("cuda_wgmma") else "cuda:sm_80")


def applicable(spec: ConvSpec) -> list[Schedule]:
    return [s for s in SCHEDULES.values() if s.reason_against(spec.core, target_of(s)) is None]


def pairs(descriptors: list[Any]) -> list[Any]:
    found = [(s, f) for s in descriptors for f in applicable(ConvSpec.parse(s if isinstance(s, str) else s[0]))]
    return [pytest.param(s, f, id=f"{f.id}-{str(s).replace(' ', '-')}") for s, f in found]


def drawn(schedule: Schedule, spec: ConvSpec) -> Picks:
    """A valid point other than the default."""
    rng, core, target = random.Random(spec.descriptor), spec.core, target_of(schedule)
    space, default = schedule.space(core, target), schedule.default(core, target)
    for _ in range(2000):
        picks = space.sample(rng)
        if picks != default and schedule.reason_against(core, target, picks) is None:
            return picks
    return default


def compiled(text: str, schedule: Schedule, picks: Picks | None = None) -> tuple[Any, Any, str]:
    """A candidate's source, what it takes of the device, and its instructions."""
    spec, target = ConvSpec.parse(text), target_of(schedule)
    picks = picks or schedule.default(spec.core, target)
    source = code.generate(lower(spec, target, Candidate(schedule, picks)))
    images, resources = code.compile_images(source, target)
    return source, resources, code.disassembled(images[0][1])


@emulated
@pytest.mark.parametrize(("text", "schedule"), pairs(SMOKE))
def test_kernels_are_right_in_emulation(text: str, schedule: Schedule) -> None:
    """Integers bit for bit, floats within their bound, NaN and infinities; whatever order threads run in.

    The default for every other problem, else a point drawn from the space.
    """
    spec, target = ConvSpec.parse(text), target_of(schedule)
    picks = drawn(schedule, spec) if SMOKE.index(text) % 2 else schedule.default(spec.core, target)
    report = validate(compile_candidate(spec, target, Candidate(schedule, picks), 1))
    assert report.passed, report.to_dict()


@pytest.mark.parametrize(("text", "schedule"), pairs([text for text in SMOKE if "bf16" not in text]))
def test_what_intrinsics_describe_runs_serially(text: str, schedule: Schedule, tmp_path: Path) -> None:
    """The scheduled program with its intrinsics' descriptions in their place, threads one after the other.

    Not bf16: programs for devices have TVM's type for it, ones for CPUs its bits.
    """
    spec, target = ConvSpec.parse(text), target_of(schedule)
    with tensorize.described():
        lowered = lower(spec, target, Candidate(schedule, drawn(schedule, spec)))
    interface, _, library = compile_lowered(serialised(lowered), tmp_path)
    data = exact_data(spec)
    outputs = run_guarded(library, interface.name, spec, {"exact": data}, 1, tmp_path, 120)
    expected, bound = reference(spec, data), tolerance(spec, data)
    for output in outputs.values():
        error = distance(output, expected)
        assert (error <= bound).all()
        assert spec.activation_op.exact is False or not error.any()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_problems_exercise_every_schedule(schedule: Schedule) -> None:
    specs = [spec for spec in map(ConvSpec.parse, SMOKE) if schedule in applicable(spec)]
    assert len(specs) >= 2
    if schedule.id != "cuda_gemm_tf32x3":
        assert {"f16", "bf16", "i8"} <= {spec.dtype for spec in specs}


@pytest.mark.parametrize(("case", "schedule"), pairs(REAL))
def test_real_layers_use_matrix_units(case: tuple[str, str], schedule: Schedule) -> None:
    """Defaults: no spills, what the schedule says of shared memory, and the instructions it is named for."""
    text, shape = case
    spec, target = ConvSpec.parse(text), target_of(schedule)
    picks = schedule.default(spec.core, target)
    source, resources, sass = compiled(text, schedule)
    found = Counter(re.findall(r"\b([A-Z]\w*(?:\.\w+)*)", sass))
    main = max(source.launches, key=lambda launch: launch.shared)
    assert main.shared <= schedule.shared_memory(spec.core, picks) <= target.shared_memory  # type: ignore[attr-defined]
    for each in resources:
        assert not each.spilled, each
        assert each.registers * each.threads <= 1 << 16
    kind, depth, lanes = ("I", "x32.S8.S8", 16) if spec.dtype == "i8" else ("H", "x16.F32", 8)
    if schedule.id.startswith("cuda_wgmma"):
        assert any(name.startswith(f"{kind}GMMA.64x{picks.tile_n}{depth}") for name in found), found
    else:
        assert found[f"{kind}MMA.{shape}"], found
        assert any(name.startswith("LDSM.16.M88") for name in found)
    if schedule.id in ("cuda_wgmma_tma", "cuda_wgmma_persistent"):
        assert found[f"UTMALDG.{spec.rank + 2}D.IM2COL"], "no patches fetched"
        assert found["UTMALDG.2D"] + found["UTMALDG.2D.MULTICAST"], "no weights fetched"
    else:
        assert any(name.startswith("LDGSTS") and ".128" in name for name in found), "no asynchronous copies of 16 bytes"
    if spec.layout == "nhwc" and spec.oc // spec.groups * picks.merge_g % lanes == 0:
        assert found["STG.E.128"] or any(name.startswith("UTMASTG") for name in found), "no stores of 16 bytes"


#: Layers of one or two pixels and many channels.
FEW_PIXELS = [
    f"conv2d n1 {case} {layout} {dtype}"
    for layout in ("nchw", "nhwc")
    for case in (
        "ic128 oc1000 i1x1 k1x1",
        "ic128 oc1000 i2x1 k2x1",
        "ic128 oc1000 i1x2 k1x1",
        "ic128 oc1000 g2 i1x1 k1x1",
        "ic512 oc1024 g64 i1x1 k1x1",
    )
    for dtype in ("f16", "f32")
]


@pytest.mark.parametrize(("text", "schedule"), pairs(FEW_PIXELS))
def test_few_pixels_take_no_more_shared_memory(text: str, schedule: Schedule) -> None:
    """However many channels they have."""
    spec, target = ConvSpec.parse(text), target_of(schedule)
    picks = schedule.default(spec.core, target)
    made = code.generate(lower(spec, target, Candidate(schedule, picks)))
    assert max(launch.shared for launch in made.launches) <= schedule.shared_memory(spec.core, picks)  # type: ignore[attr-defined]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_few_pixels_exercise_every_schedule(schedule: Schedule) -> None:
    assert any(schedule in applicable(ConvSpec.parse(text)) for text in FEW_PIXELS)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"expected one of .*cuda:sm_70, .*found 'cuda:sm_12'"):
        resolve("cuda:sm_12")


def test_accuracy_decides_how_f32_is_multiplied() -> None:
    plain = "conv2d n1 ic16 oc16 i8x8 k3x3 p1"
    ids = {text: {s.id for s in applicable(ConvSpec.parse(f"{plain} {text}"))} for text in ("strict", "", "tf32")}
    assert ids == {"strict": set(), "": {"cuda_gemm_tf32x3"}, "tf32": {"cuda_gemm"}}


def test_the_compiler_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("cuda"):
            raise ImportError("No module named 'cuda'")
        return imported(name, *args, **kwargs)

    code._compiler.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match="pip install 'cuda-bindings<13' nvidia-cuda-nvrtc-cu12"):
        code._compiler()


def test_source_the_compiler_refuses_is_quoted() -> None:
    source = code.DeviceSource('#include "device.h"\nextern "C" __global__ void f() { nonsense; }', ())
    with pytest.raises(BuildError, match="nonsense"):
        code.compile_images(source, resolve("cuda:sm_80"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", ["f16 nhwc", "f32 nchw"])
@pytest.mark.parametrize("network", sorted((ROOT / "bench" / "problems").glob("*.json")), ids=lambda path: path.stem)
def test_every_layer_compiles_without_spills(network: Path, dtype: str, arch: str) -> None:
    """The default of every layer of every network."""
    target = resolve(f"cuda:{arch}")
    stored, layout = dtype.split()
    for text in sorted({layer["spec"] for layer in json.loads(network.read_text())["layers"]}):
        spec = ConvSpec.parse(text).with_(dtype=stored, layout=layout)
        candidate = default_candidate(spec, target)
        _, resources = code.compile_images(code.generate(lower(spec, target, candidate)), target)
        for each in resources:
            assert not each.spilled, (spec.descriptor, candidate, each)
            assert each.registers * each.threads <= 1 << 16
            assert each.shared <= target.shared_memory, (spec.descriptor, candidate, each)
