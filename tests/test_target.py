"""Targets: what a spelling names, and the facts that schedules read."""

from __future__ import annotations

import dataclasses
import json
import platform

import pytest
from convgen.schedules.reference import Reference
from convgen.targets import cpu

from convgen.discover import target_families
from convgen.errors import UnsupportedError
from convgen.lower import lower, source
from convgen.machine import machine
from convgen.schedule import Candidate
from convgen.spec import ConvSpec
from convgen.target import resolve

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
    assert target.isa == ()
    assert (target.vector_bits, target.vector_registers) == (128, 32)
    assert target.hardware == "unknown"
    assert json.loads(target.tvm_config)["mtriple"].startswith("aarch64")


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
        ("CPU", r"found 'CPU'"),
        ("cpu:pdp11", r"target: expected a processor LLVM knows, found 'pdp11'"),
        ("cpu:aarch64-pdp11", r"expected a processor LLVM knows, found 'pdp11'"),
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
