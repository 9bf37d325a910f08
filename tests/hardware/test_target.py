"""Targets: what a spelling names, and the facts that schedules read."""

from __future__ import annotations

import dataclasses
import importlib
import json
import platform
from pathlib import Path

import pytest

from convgen.errors import BuildError, MeasureError, UnsupportedError
from convgen.hardware.discover import target_families
from convgen.hardware.machine import Machine, machine
from convgen.hardware.target import Target, resolve
from convgen.lowering.lower import Lowered, lower, source
from convgen.lowering.schedule import Candidate
from convgen.measure.trial import build_artifact, serialised
from convgen.problem.spec import ConvSpec
from convgen.schedules.reference import Reference
from convgen.targets import cpu, cuda

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64 processors")


def test_cpu_is_this_machine() -> None:
    target = resolve("cpu")
    assert target == resolve()
    assert target.kind == "cpu"
    assert target.native
    assert target.hardware == machine().fingerprint
    assert target.cores == machine().cores
    assert set(target.isa) <= set(machine().features)
    assert target.spelling.startswith("cpu:")
    assert str(target) == target.spelling


@pytest.mark.parametrize("spelling", cpu.known())
def test_the_spelling_names_the_same_target_again(spelling: str) -> None:
    target = resolve(spelling)
    assert resolve(target.spelling) == target
    assert resolve(target) is target
    assert target.l1 > 0
    assert target.l2 >= target.l1
    assert target.l3 >= target.l2
    assert target.cores >= 1
    assert target.peak_flops > 0


@x86_only
@pytest.mark.parametrize(
    ("model", "bits", "registers", "has", "lacks"),
    [
        ("x86-64-v2", 128, 16, {"sse4.2"}, {"avx", "avx2", "fma", "avx512f"}),
        ("haswell", 256, 16, {"avx", "avx2", "fma"}, {"avx512f"}),
        ("x86-64-v3", 256, 16, {"avx2", "fma"}, {"avx512f"}),
        ("znver4", 512, 32, {"avx2", "fma", "avx512f", "avx512vnni"}, set()),
    ],
)
def test_facts_of_x86_processors(model: str, bits: int, registers: int, has: set[str], lacks: set[str]) -> None:
    target = resolve(f"cpu:{model}")
    assert (target.vector_bits, target.vector_registers) == (bits, registers)
    assert target.lanes == bits // 32
    assert has <= set(target.isa)
    assert not lacks & set(target.isa)
    assert target.native == (set(target.isa) <= set(machine().features))
    assert (target.hardware == machine().fingerprint) == target.native


def test_another_architecture_is_not_native() -> None:
    target = resolve("cpu:aarch64-cortex-a72")
    assert not target.native
    assert target.isa == ("asimd",)
    assert (target.vector_bits, target.vector_registers) == (128, 32)
    assert target.hardware == "unknown"
    assert json.loads(target.tvm_config)["mtriple"].startswith("aarch64")


@pytest.mark.parametrize("name", ["cortex-a72", "neoverse-n1", "a64fx"])
def test_a_processor_is_found_without_its_architecture(name: str) -> None:
    assert resolve(f"cpu:{name}") == resolve(f"cpu:aarch64-{name}")


@pytest.mark.parametrize("name", [name for names in cpu.CALLED.values() for name in names])
def test_what_people_mean_by_a_name_is_a_target(name: str) -> None:
    assert resolve(f"cpu:{name}").spelling == (f"cpu:{name}" if name != "aarch64" else "cpu:aarch64-generic")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("m1", ["cpu:aarch64-apple-a14"]),
        ("apple-m1", ["cpu:aarch64-apple-a14"]),
        ("aarch64-M2", ["cpu:aarch64-apple-a15"]),
        ("aarch64-apple-m3", ["cpu:aarch64-apple-a16"]),
        ("m4", ["cpu:aarch64-apple-m4"]),
        ("raspberry-pi-4", ["cpu:aarch64-cortex-a72"]),
        ("rpi5", ["cpu:aarch64-cortex-a76"]),
        ("Graviton3", ["cpu:aarch64-neoverse-v1"]),
        ("AVX2", ["cpu:x86-64-v3", "cpu:haswell"]),
        ("zen4", ["cpu:znver4"]),
        ("x86_64-v3", ["cpu:x86-64-v3"]),
        ("amd64", ["cpu:x86-64"]),
        ("arm64", ["cpu:aarch64"]),
        ("native", ["cpu"]),
        ("quite another thing", []),
    ],
)
def test_names_that_people_try(name: str, meant: list[str]) -> None:
    assert cpu.close(name) == meant or (cpu.close(name)[:1] == meant and len(meant) == 1)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("h100", "cuda:sm_90a"),
        ("NVIDIA H200 NVL", "cuda:sm_90a"),
        ("A100-SXM4-40GB", "cuda:sm_80"),
        ("Tesla V100", "cuda:sm_70"),
        ("rtx 4090 Ti", "cuda:sm_89"),
        ("RTX3080Ti", "cuda:sm_86"),
        ("Jetson AGX Orin", "cuda:sm_87"),
        ("8.6", "cuda:sm_86"),
        ("compute_90", "cuda:sm_90a"),
        ("sm90", "cuda:sm_90a"),
        ("90", "cuda:sm_90a"),
        ("sm_91", "cuda:sm_90"),
        ("gpu", "cuda"),
    ],
)
def test_devices_that_people_name(name: str, meant: str) -> None:
    assert meant in cuda.close(name)
    if ":" in meant:
        with pytest.raises(UnsupportedError, match=f"did you mean.* {meant}"):
            resolve(f"cuda:{name}")


def test_every_device_that_has_a_name_has_an_architecture() -> None:
    assert {arch for _, arch in cuda.CALLED} <= cuda.ARCHITECTURES.keys()


def test_native_is_this_machine() -> None:
    """As C compilers have it."""
    assert resolve("cpu:native") == resolve("cpu:host") == resolve("cpu")


def test_an_architecture_is_a_target_as_llvm_has_it_in_general() -> None:
    assert resolve("cpu:aarch64") == resolve("cpu:aarch64-generic")


ARM = Machine(
    "Neoverse-N1", "0x41-0xd0c-0x3-1-4", frozenset({"asimd", "asimdrdm", "asimddp", "asimdhp", "atomics", "fp"}),
    cores=3, logical=4, l1=64 << 10, l2=1 << 20, l3=None, memory=1 << 33, arch="aarch64", llvm="neoverse-n1",
)  # fmt: skip
INTEL = Machine(
    "Xeon", "GenuineIntel-6-63-2-4", frozenset(
        {"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "movbe", "lzcnt", "avx", "f16c", "avx2", "fma", "bmi", "bmi2"}
    ),
    cores=2, logical=4, l1=32 << 10, l2=1 << 18, l3=1 << 23, memory=1 << 33, arch="x86_64", llvm="haswell",
)  # fmt: skip


def test_a_target_for_another_machine_has_its_facts() -> None:
    target = resolve("cpu", machine=ARM)
    assert (target.spelling, target.native, target.hardware) == ("cpu:aarch64-neoverse-n1", True, ARM.fingerprint)
    assert (target.cores, target.l1, target.l2) == (3, 64 << 10, 1 << 20)
    assert json.loads(target.tvm_config)["num-cores"] == 3
    assert resolve(target.spelling, machine=ARM) == target
    assert resolve("cpu", machine=machine_with_llvm()) == resolve("cpu")


def machine_with_llvm() -> Machine:
    """This machine, as a device describes itself."""
    return dataclasses.replace(machine(), llvm=resolve().spelling.removeprefix("cpu:").removeprefix("aarch64-"))


@pytest.mark.parametrize(
    ("spelling", "where", "native"),
    [
        ("cpu:haswell", INTEL, True),
        ("cpu:x86-64-v2", INTEL, True),
        ("cpu:znver4", INTEL, False),
        ("cpu:aarch64-cortex-a72", INTEL, False),
        ("cpu:aarch64-cortex-a72", ARM, True),
        ("cpu:aarch64-neoverse-v1", ARM, False),  # SVE
        ("cpu:haswell", ARM, False),
    ],
)
def test_native_is_decided_against_the_machine(spelling: str, where: Machine, native: bool) -> None:
    target = resolve(spelling, machine=where)
    assert target.native is native
    assert target.hardware == (where.fingerprint if native else "unknown")


def test_a_machines_facts_travel_as_json() -> None:
    for one in (ARM, INTEL, machine()):
        assert Machine.from_dict(json.loads(json.dumps(one.to_dict())), "device a") == one


@pytest.mark.parametrize(
    "change", [{"cores": 0}, {"cores": "2"}, {"l1": -1}, {"fingerprint": ""}, {"features": None}, {"memory": True}]
)
def test_what_is_no_machine_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(MeasureError, match="device a: expected the facts of a machine, found"):
        Machine.from_dict(ARM.to_dict() | change, "device a")
    with pytest.raises(MeasureError, match="'cores'"):
        Machine.from_dict({"cpu": "x", "fingerprint": "y", "features": []}, "device a")


def test_a_candidate_is_compiled_for_the_machine_it_was_lowered_for(tmp_path: Path) -> None:
    """Also where that is decided by what the compiling one knows only from the module."""
    schedule, spec = Reference(), ConvSpec.parse("conv1d n1 ic2 oc3 i9 k3")
    target = dataclasses.replace(resolve(), isa=("sse4.2",), hardware="elsewhere")
    lowered = lower(spec, target, Candidate(schedule, schedule.default(spec, target)))
    seen: list[Target] = []

    def compiled(lowered: Lowered, *_: object) -> None:
        seen.append(lowered.target)
        raise BuildError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("convgen.measure.trial"), "compile_lowered", compiled)
        with pytest.raises(BuildError, match="enough"):
            build_artifact(serialised(lowered), str(tmp_path))
    assert seen == [target]


def test_code_for_another_architecture_compiles() -> None:
    schedule = Reference()
    spec, target = ConvSpec.parse("conv1d n1 ic2 oc3 i9 k3"), resolve("cpu:aarch64-cortex-a72")
    candidate = Candidate(schedule, schedule.default(spec, target))
    assert "ret" in source(lower(spec, target, candidate), "asm")


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("tpu", r"target: expected one of .*cpu.*, found 'tpu'"),
        ("", r"target: expected one of .*cpu.*, found ''"),
        ("CPU", r"found 'CPU'; did you mean cpu\?"),
        ("cortex-a72", r"found 'cortex-a72'; did you mean cpu:aarch64-cortex-a72\?"),
        ("cpu:heswell", r"found 'heswell'; did you mean cpu:haswell\?"),
        ("cpu:aarch64-neoverse-n0", r"did you mean cpu:aarch64-neoverse-n\d or cpu:aarch64-neoverse-\w+\?"),
        ("cpu:pentium4", r"found 'pentium4'($|; did you mean (?!cpu:pentium))"),
        ("cpu:pdp11", r"target: expected a 64-bit processor LLVM knows, found 'pdp11'"),
        ("cpu:aarch64-pdp11", r"expected a 64-bit processor LLVM knows, found 'pdp11'"),
        ("cpu:haswell -x", r"found 'haswell -x'"),
    ],
)
def test_an_unknown_target_is_refused(spelling: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        resolve(spelling)


def test_the_key_is_of_what_code_generation_depends_on() -> None:
    here = resolve()
    assert dataclasses.replace(here, cores=here.cores + 1, hardware="elsewhere").key == here.key
    assert dataclasses.replace(here, vector_bits=64).key != here.key
    keys = [resolve(spelling).key for spelling in ("cpu:x86-64-v2", "cpu:x86-64-v3", "cpu:aarch64-cortex-a72")]
    assert len(set(keys)) == 3


def test_tvm_takes_the_target() -> None:
    for spelling in cpu.known():
        assert resolve(spelling).tvm().kind.name == "llvm"


def test_families_are_found() -> None:
    families = target_families()
    assert families["cpu"] is cpu
    for family in families.values():
        assert all(resolve(spelling).kind for spelling in family.known())


def test_a_target_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().cores = 3  # type: ignore[misc]
