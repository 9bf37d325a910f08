"""Exported programs on processors that have or lack something: they compute, or say why not."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import convgen
from convgen.errors import UnsupportedError
from convgen.hardware.machine import machine
from convgen.hardware.target import resolve
from convgen.kernel.export import write_library
from convgen.lowering.candidates import default_candidate
from convgen.lowering.interface import Interface
from convgen.lowering.lower import compile_object, lower
from convgen.problem.accuracy import error_factor
from convgen.problem.spec import ConvSpec

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="makes programs for x86-64")

SPEC = ConvSpec.parse("conv2d n1 ic16 oc16 i9x9 k3x3 p1 relu")
REFUSAL = "check_cpu: this CPU lacks instructions the library was compiled for"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    if not shutil.which("qemu-x86_64"):
        pytest.skip("qemu-x86_64 is not installed")
    return tmp_path


def example(model: str, dtype: str, folder: Path) -> Path:
    """``example.c`` of a layer for a processor, compiled."""
    target, spec = resolve(f"cpu:{model}"), SPEC.with_(dtype=dtype)
    lowered = lower(spec, target, default_candidate(spec, target))
    workspace = compile_object(lowered, folder / "kernel.o")
    interface = Interface("kernel", spec, lowered.packed, workspace.main, workspace.task, target.isa)
    write_library(folder / "out", interface, folder / "kernel.o", {"threads": 1, "error_factor": error_factor(spec)})
    command = ["cc", "-O1", "example.c", "libkernel.a", "-lm", "-lpthread", "-o", "example"]
    subprocess.run(command, cwd=folder / "out", check=True)
    return folder / "out" / "example"


def on(processor: str, program: Path) -> tuple[int, str]:
    command = ["qemu-x86_64", "-cpu", processor, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("model", "dtype", "runs", "refuses"),
    [
        ("x86-64", "f32", "qemu64", ""),
        ("x86-64-v2", "f16", "Nehalem", "core2duo"),
        ("sandybridge", "f32", "SandyBridge", "SandyBridge,-xsave"),  # no system that saves its registers
        ("haswell", "f16", "Haswell", "Haswell,-f16c"),
        ("haswell", "i8", "Haswell", "Haswell,-abm"),
        ("bdver4", "f32", "EPYC", "EPYC,-sse4a"),  # without the XOP, FMA4 and TBM that no later one has
        ("sapphirerapids", "f16", "", "max"),
        ("alderlake", "i8", "", "max"),
    ],
)
def test_a_program_runs_where_its_instructions_are(
    model: str, dtype: str, runs: str, refuses: str, programs: Path
) -> None:
    program = example(model, dtype, programs)
    if runs:
        status, said = on(runs, program)
        assert re.search(r"outputs checked, .*; ok", said), said
        assert status == 0
    if refuses:
        status, said = on(refuses, program)
        assert REFUSAL in said
        assert status == 1


def test_nothing_is_called_that_this_machine_cannot_run() -> None:
    model, lacks = ("znver4", "sse4a") if "avx512fp16" in machine().features else ("sapphirerapids", "avx512fp16")
    assert not resolve(f"cpu:{model}").native
    kernel = convgen.build(SPEC, target=f"cpu:{model}", records=False)  # to be exported
    with pytest.raises(UnsupportedError, match=lacks):
        kernel.bind(np.zeros(SPEC.weights_shape, np.float32), np.zeros(SPEC.oc, np.float32))
