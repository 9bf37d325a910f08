"""Bundles for another architecture: compiled here, run in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import run

from convgen.errors import BuildError
from convgen.hardware.target import resolve
from convgen.kernel.export import write_library
from convgen.lowering import toolchain
from convgen.lowering.candidates import default_candidate
from convgen.lowering.interface import Interface
from convgen.lowering.lower import compile_object, lower
from convgen.problem.accuracy import error_factor
from convgen.problem.spec import ConvSpec
from convgen.tuning.bundle import (
    pack,
    unpacked,
)

# ---- compiling for another architecture ----------------------------------------------------------

AARCH64 = "aarch64-linux-gnu-gcc"


@pytest.fixture
def emulated() -> Callable[..., str]:
    """Runs a program for aarch64."""
    for tool in (AARCH64, "qemu-aarch64"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")

    def run(*command: object, cwd: Path) -> str:
        full = ["qemu-aarch64", "-cpu", "cortex-a72", "-L", "/usr/aarch64-linux-gnu", *map(str, command)]
        done = subprocess.run(full, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
        return done.stdout + done.stderr

    return run


def export(spec: ConvSpec, folder: Path, isa: tuple[str, ...] = ()) -> None:
    target = resolve("cpu:aarch64-cortex-a72")
    lowered = lower(spec, target, default_candidate(spec, target))
    workspace = compile_object(lowered, folder / "kernel.o")
    interface = Interface("kernel", spec, lowered.packed, workspace.main, workspace.task, isa)
    facts = {"threads": 2, "error_factor": error_factor(spec)}
    write_library(folder / "out", interface, folder / "kernel.o", facts)


@pytest.mark.parametrize(
    "text",
    ["conv2d ic16 oc24 i14x14 k3x3 p1 relu", "conv2d ic32 oc8 i9x7 k1x1 residual", "conv1d ic6 oc6 g6 i50 k5 p2"],
)
def test_a_kernel_for_aarch64_computes_what_it_should(text: str, tmp_path: Path, emulated: Callable[..., str]) -> None:
    export(ConvSpec.parse(text), tmp_path, isa=("asimd",))
    subprocess.run(
        [AARCH64, "-std=c11", "-O1", "-o", "static", "out/example.c", "out/libkernel.a", "-lm", "-pthread"],
        cwd=tmp_path,
        check=True,
    )
    assert "outputs checked" in emulated("./static", cwd=tmp_path)
    subprocess.run(
        [AARCH64, "-std=c11", "-O1", "-o", "shared", "out/example.c", "-Lout", "-lkernel"], cwd=tmp_path, check=True
    )
    said = subprocess.run(
        ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-E", "LD_LIBRARY_PATH=out", "./shared"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "; ok" in said.stdout, said.stdout + said.stderr


@pytest.mark.parametrize("feature", ["sve", "i8mm"])
def test_a_processor_without_the_instructions_is_told(
    feature: str, tmp_path: Path, emulated: Callable[..., str]
) -> None:
    export(ConvSpec.parse("conv2d ic4 oc4 i5x5 k1x1"), tmp_path, isa=("asimd", feature))
    subprocess.run(
        [AARCH64, "-std=c11", "-O1", "-o", "static", "out/example.c", "out/libkernel.a", "-lm", "-pthread"],
        cwd=tmp_path,
        check=True,
    )
    assert "CPU" in emulated("./static", cwd=tmp_path)


def test_a_bundle_for_aarch64(tmp_path: Path) -> None:
    if not shutil.which(AARCH64):
        pytest.skip(f"{AARCH64} is not installed")
    target = resolve("cpu:aarch64-cortex-a72")
    packed = pack([ConvSpec.parse("conv2d ic4 oc8 i5x5 k1x1")], [target], [1], tmp_path / "b.zip", candidates=1)
    assert (packed.trials, packed.failed) == (1, 0)
    with unpacked(tmp_path / "b.zip") as folder:
        libraries = [path.read_bytes() for path in folder.glob("lib/*.so")]
        assert {toolchain.architecture(data) for data in libraries} == {"aarch64"}
        if toolchain.NATIVE != "aarch64":
            assert "left out: for aarch64" in run(folder, status=3)


def test_without_a_compiler_the_ways_to_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC_RISCV64", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"C compiler for riscv64, .*riscv64-linux-gnu-gcc .*ziglang.*CC_RISCV64"):
        toolchain.compiler("riscv64")
    monkeypatch.setenv("CC_RISCV64", "some-cc -march=rv64gcv")
    assert toolchain.compiler("riscv64") == ("some-cc", "-march=rv64gcv")
