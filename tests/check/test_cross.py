"""Kernels for another processor: built here, validated in QEMU, and called there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import c_kernel

import convgen
from convgen.check.cross import emulator
from convgen.check.validate import validate
from convgen.cli import main
from convgen.errors import UnsupportedError
from convgen.hardware.machine import machine
from convgen.kernel.kernel import CrossKernel

CROSS = "aarch64" if machine().arch == "x86_64" else "x86_64"
TARGET = "cpu:cortex-a72" if CROSS == "aarch64" else "cpu:x86-64-v2"


@pytest.fixture
def tools() -> None:
    for tool in (f"{CROSS}-linux-gnu-gcc", f"qemu-{CROSS}"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")


def built(text: str, target: str = TARGET) -> CrossKernel:
    kernel = convgen.build(text, target, 2, records=False)
    assert isinstance(kernel, CrossKernel)
    return kernel


def test_a_kernel_for_another_processor_is_exported_and_not_called(tmp_path: Path, tools: None) -> None:
    kernel = built("conv2d ic3 oc4 i6x6 k3x3")
    assert kernel.spec.oc == 4
    assert not hasattr(kernel, "nonsense")
    calls = (kernel.sizes, kernel.check_cpu, lambda: kernel.bind(np.ones((4, 3, 3, 3), "f4"), np.ones(4, "f4")))
    for call in calls:
        with pytest.raises(UnsupportedError, match=f"{kernel.target}: expected a target that runs on this machine"):
            call()
    manifest = kernel.export(tmp_path / "out")
    assert manifest["needs"]["triple"] == f"{CROSS}-linux-gnu"
    wrong = f"needs: expected a library for .*, found one for {CROSS}-linux-gnu"
    with pytest.raises(convgen.ConvgenError, match=wrong):
        convgen.load(tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        "conv2d ic8 oc12 i10x9 k3x3 p1 relu",
        "conv2d ic8 oc12 i10x9 k1x1 residual bf16",
        "conv2d ic8 oc12 i10x9 k3x3 i8",
        "conv1d ic6 oc6 g6 i50 k5 p2 silu nobias",
    ],
)
def test_kernels_for_another_processor_are_validated_as_all_are(text: str, tools: None) -> None:
    report = validate(built(text))
    report.raise_if_failed()
    assert {check.name for check in report.checks} >= {"memory", "threads", "exact"}
    assert "emulated by QEMU" in report.checks[0].found


@pytest.mark.skipif(CROSS != "aarch64", reason="this machine is of the architecture that has the instruction")
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("types", ["src_u8 src_zero dst_u8 dst_zero", "src_u8", "src_zero", ""])
def test_products_of_four_bytes_are_exact_of_all_types(types: str, depthwise: bool, tools: None) -> None:
    """Of src of u8 128 is taken off, and padding has what then stands for its zero point."""
    layer = "ic24 oc24 g24 i8x7 k3x3 p1" if depthwise else "ic21 oc24 g3 i9x7 k3x3 s2x1 p1_0x1 relu"
    kernel = built(f"conv2d {layer} nhwc i8 {types}", "cpu:cortex-a76")
    schedule = "cpu_grouped_integers" if depthwise else "cpu_direct"
    assert kernel.lowered.candidate.schedule.id == schedule
    report = validate(kernel)
    report.raise_if_failed()
    assert report.worst_error == 0


@pytest.mark.parametrize(
    ("fault", "check", "found"),
    [
        ({}, "", ""),
        ({"store": "t.dst[at] = v + (at == 7)"}, "exact", "expected"),
        ({"store": "t.dst[at] = v; t.dst[DST] = 0"}, "memory", "signal 11"),
        ({"before": "t.src[0] = 1"}, "memory", "signal 11"),
        ({"store": "if (at != 5) t.dst[at] = v"}, "float", "largest error inf"),
        ({"store": "t.dst[at] = v + group->num_task"}, "threads", "found others"),
    ],
    ids=["none", "value", "beyond dst", "into src", "unwritten", "threads"],
)
def test_faults_of_kernels_for_another_processor_are_found(
    fault: dict[str, Any], check: str, found: str, tmp_path: Path, tools: None
) -> None:
    report = validate(c_kernel(tmp_path, **fault, target=TARGET, compiler=f"{CROSS}-linux-gnu-gcc"))
    failures = {check.name: check.found for check in report.checks if not check.passed}
    assert (check in failures) == bool(fault)
    assert found in failures.get(check, "")


def test_without_an_emulator_it_is_said(
    tmp_path: Path, tools: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"QEMU_{CROSS.upper()}", "no-such-program")
    with pytest.raises(UnsupportedError, match=r"expected no-such-program, .*apt install qemu-user"):
        emulator(CROSS)
    command = ["build", "conv2d ic3 oc4 i6x6 k3x3", "--target", TARGET, "--no-records", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "not validated: expected no-such-program" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["validation"] is None


def test_an_emulator_without_the_instructions_is_no_failure(tmp_path: Path, tools: None) -> None:
    program = tmp_path / "small"
    program.write_text(f'#!/bin/sh\nshift 2\nexec qemu-{CROSS} -cpu cortex-a53 "$@"\n')
    program.chmod(0o755)
    if CROSS != "aarch64":
        pytest.skip("for QEMU's names of Arm's processors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEMU_AARCH64", str(program))
        with pytest.raises(UnsupportedError, match=r"expected an emulator that has .*asimddp.*, found"):
            validate(built("conv2d ic3 oc4 i6x6 k3x3", "cpu:neoverse-n1"))


def test_a_program_that_dies_is_a_failure(tmp_path: Path, tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "dying"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setenv(f"QEMU_{CROSS.upper()}", str(program))
    report = validate(built("conv2d ic3 oc4 i6x6 k3x3"))
    assert not report.passed
    assert "signal 9" in report.checks[0].found


def test_what_measures_refuses_other_processors(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["bench"], ["build", "--trials", "2"], ["tune", "--trials", "2"]):
        name, *options = command
        assert main([name, "conv2d ic3 oc4 i6x6 k3x3", "--target", TARGET, "--no-records", *options]) == 2
        assert "expected a target that runs on this machine" in capsys.readouterr().err
