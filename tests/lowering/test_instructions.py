"""A kernel's code has no instruction but those that its CPU check asks for, and those of every CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from instructions import beyond
from naive import link_naive
from processors import spellings
from usable import usable

from convgen.hardware.target import Target, resolve
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.discover import schedules_of
from convgen.lowering.lower import compile_object, lower
from convgen.lowering.schedule import Candidate
from convgen.lowering.toolchain import NATIVE
from convgen.problem.spec import ConvSpec

LAYERS = [
    "conv2d n1 ic16 oc24 i9x9 k3x3 p1 relu",
    "conv2d n1 ic128 oc16 i6x7 k3x3 p1 nhwc",
    "conv2d n1 ic32 oc40 i7x7 k1x1 silu",
    "conv2d n1 ic24 oc24 g24 i9x8 k3x3 s2 p1 hardswish",
    "conv2d n1 ic32 oc32 g4 i9x9 k3x3 p1 relu6",
    "conv2d n1 ic16 oc32 i6x5 k3x3 p1 nhwc accuracy_bf16",
    "conv2d n1 ic16 oc16 g16 i6x5 k3x3 p1 nhwc leaky_relu",
    "conv2d n1 ic64 oc64 i8x8 k1x1 relaxed prelu",
    "convtranspose2d n1 ic5 oc18 i4x5 k4x4 s2 p1 tanh",
    "convtranspose2d n1 ic6 oc6 g6 i5x6 k3x3 s2 p1",
    "convtranspose2d n4 ic9 oc5 i1x1 k4x3",
    "conv2d n2 ic16 oc24 i9x9 k3x3 p1 weights",
]


def stored(layer: str, dtype: str) -> ConvSpec | None:
    """A layer with tensors of ``dtype``; integers take relu only, sum exactly, and have no transposed ones."""
    spec = ConvSpec.parse(layer)
    if dtype != "i8":
        return spec.with_(dtype=dtype)
    return (
        None
        if spec.transposed or spec.direction != "forward"
        else spec.with_(dtype=dtype, activation="relu", accuracy="standard")
    )


def arch_of(target: Target) -> str:
    return "aarch64" if "aarch64" in target.spelling else "x86_64"


def unasked(spec: ConvSpec, target: Target, candidate: Candidate, folder: Path) -> list[str]:
    """The instructions of a candidate's code that its library would not ask for."""
    made = lower(spec, target, candidate)
    compile_object(made, folder / "kernel.o")
    found = beyond(folder / "kernel.o", made.isa, arch_of(target))
    return [f"{target} {spec.descriptor} {candidate}: {line}" for line in found]


def defaults(target: Target, dtype: str) -> Iterator[tuple[ConvSpec, Candidate]]:
    """The default of each schedule that applies to a layer at all, for the first of them."""
    specs = [spec for layer in LAYERS if (spec := stored(layer, dtype))]
    for schedule in schedules_of("cpu").values():
        spec = next((spec for spec in specs if not schedule.reason_against(spec.core, target)), None)
        if spec:
            yield spec, Candidate(schedule, schedule.default(spec.core, target))


@pytest.mark.parametrize(
    ("target", "dtype", "schedule"),
    [
        ("x86-64", "f32", "cpu_direct"),
        ("x86-64-v2", "f16", "cpu_direct"),
        ("sandybridge", "f32", "cpu_direct"),
        ("bdver4", "f32", "cpu_direct"),  # XOP, FMA4, TBM
        ("haswell", "f16", "cpu_direct"),  # F16C
        ("alderlake", "i8", "cpu_direct"),  # AVX-VNNI, GFNI
        ("skylake-avx512", "bf16", "cpu_direct"),
        ("sapphirerapids", "f16", "cpu_direct"),  # AVX512-FP16
        ("sapphirerapids", "f32", "cpu_direct"),
        ("sapphirerapids", "i8", "cpu_matrix"),  # AMX
        ("diamondrapids", "f32", "cpu_winograd"),  # AVX10.2, APX
        ("znver4", "i8", "cpu_direct"),
        ("aarch64-generic", "f32", "cpu_direct"),
        ("aarch64-neoverse-n1", "f16", "cpu_direct"),
        ("aarch64-neoverse-v1", "bf16", "cpu_winograd"),
        ("aarch64-apple-m5", "f32", "cpu_winograd"),  # CSSC
    ],
)
def test_code_keeps_to_what_is_asked_for(target: str, dtype: str, schedule: str, tmp_path: Path) -> None:
    resolved, spec = resolve(f"cpu:{target}"), ConvSpec.parse(LAYERS[0]).with_(dtype=dtype)
    picks = find_schedule(schedule).default(spec.core, resolved)
    assert not unasked(spec, resolved, Candidate(find_schedule(schedule), picks), tmp_path)


def test_every_schedule_has_a_layer() -> None:
    for spelling, dtype in (("cpu:haswell", "f32"), ("cpu:sapphirerapids", "bf16")):
        target = resolve(spelling)
        assert {made.schedule.id for _, made in defaults(target, dtype)} == set(usable(target))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i8"])
@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_code_of_all_schedules_for_all_processors_keeps_to_it(arch: str, dtype: str, tmp_path: Path) -> None:
    """One processor stands for those that have the same instructions."""
    kinds = {target.isa: target for target in map(resolve, spellings(arch))}
    for target in kinds.values():
        for spec, candidate in defaults(target, dtype):
            assert not unasked(spec, target, candidate, tmp_path)


def test_an_instruction_that_is_not_asked_for_is_seen(tmp_path: Path) -> None:
    target, spec = resolve("cpu:haswell"), ConvSpec.parse(LAYERS[0])
    compile_object(lower(spec, target, default_candidate(spec, target)), tmp_path / "kernel.o")
    asked = [name for name in target.isa if name != "fma"]
    found = beyond(tmp_path / "kernel.o", asked, "x86_64")
    assert found
    assert all("vfm" in line or "vfnm" in line for line in found)


@pytest.mark.skipif(NATIVE != "x86_64", reason="gcc's functions for Arm choose among instructions when they run")
def test_the_c_runtime_runs_on_every_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some distributions' compilers make code for later processors unless told otherwise, and use checked functions."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    monkeypatch.setenv("CC", "gcc -march=x86-64-v4 -O3 -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2")
    _, library = link_naive(ConvSpec.parse(LAYERS[0]), tmp_path)
    assert not beyond(library, (), NATIVE)
