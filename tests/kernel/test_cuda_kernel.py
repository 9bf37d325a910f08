"""Kernels for GPUs from spec to export, on a machine without one: built for real, run by emulation."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_tensors import Tensor
from naive import compile_naive, convolve, operands

import convgen
from convgen.check.data import exact_data
from convgen.check.emulation.emulate import compile_emulated, emulated_driver
from convgen.check.emulation.standin import emulated_library
from convgen.check.sandbox import run_guarded
from convgen.check.validate import validate
from convgen.cli import main
from convgen.cuda.driver import Stream, device
from convgen.errors import KernelError, MeasureError, UnsupportedError
from convgen.formats.entries import SpecEntry
from convgen.hardware.target import check_threads, resolve
from convgen.kernel.cuda_library import CudaLibrary
from convgen.kernel.export import write_library
from convgen.kernel.kernel import CpuKernel, CudaKernel, Kernel, compile_candidate
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.interface import DeviceCode, Launch
from convgen.lowering.link import link
from convgen.problem.spec import ConvSpec
from convgen.report.rows import measure
from convgen.tuning.bundle import pack

pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install '.[cuda]'")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate")

TEXT = "conv2d n1 ic8 oc8 i7x6 k3x3 p1 relu residual"
TARGET = "cuda:sm_80"
#: The program of this environment, which need not be on the path.
CONVGEN = Path(sys.executable).parent / "convgen"


@pytest.fixture(scope="module", autouse=True)
def _no_device() -> Iterator[None]:
    """Also where there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVGEN_CUDA_DRIVER", "/none")
        yield


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return convgen.build(TEXT, target=TARGET, threads=5, records=False, name="layer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda_kernel")


@pytest.fixture(scope="module")
def emulated(kernel: Kernel, folder: Path) -> tuple[Path, Path]:
    """The kernel's library with emulated code, and the driver."""
    return emulated_library(kernel.lowered, kernel.interface, kernel.object_file, folder)


# ---- building ----------------------------------------------------------------------------------


def test_a_kernel_is_built_without_a_device(kernel: Kernel) -> None:
    assert isinstance(kernel, CudaKernel)
    assert not isinstance(kernel, CpuKernel)
    assert kernel.threads == 1
    assert kernel.target.arch == "sm_80"
    assert kernel.schedule.startswith("cuda_")
    assert kernel.interface.device is not None
    assert {what for what, _ in kernel.interface.device.images} == {"sm_80", "compute_80"}


def test_running_it_without_a_driver_says_so(kernel: Kernel) -> None:
    given = operands(kernel.spec)
    with pytest.raises(KernelError, match="expected a CUDA driver, found none: /none"):
        kernel.bind(given["weights"], given["bias"])
    with pytest.raises(KernelError, match="expected a CUDA driver"):
        kernel(given["src"], given["weights"], given["bias"], residual=given["residual"])


def test_threads_mean_nothing_on_a_gpu() -> None:
    target = resolve(TARGET)
    assert [check_threads(threads, target) for threads in (None, 1, 8)] == [1, 1, 1]
    with pytest.raises(convgen.ConvgenError, match="threads: expected an integer between 1 and 1024"):
        check_threads(0, target)


@pytest.mark.parametrize(
    ("kind", "shows"),
    [("tir", "T.prim_func"), ("cuda", '#include "device.h"'), ("ptx", ".target sm_80"), ("sass", "EF_CUDA_SM80")],
)
def test_the_source_is_text(kernel: Kernel, kind: str, shows: str) -> None:
    assert shows in kernel.source(kind)


def test_another_kind_of_source_is_refused(kernel: Kernel) -> None:
    with pytest.raises(UnsupportedError, match="source: expected one of tir, cuda, ptx, sass, found 'asm'"):
        kernel.source("asm")


def test_kernels_for_a_gpu_are_not_compared_with_libraries_of_the_cpu(kernel: Kernel) -> None:
    with pytest.raises(UnsupportedError, match="expected kernels for the CPU to compare, found some for a GPU"):
        measure(SpecEntry(kernel.spec), {"convgen": kernel}, [], 1)


def test_a_bundle_is_for_cpus_or_for_gpus(kernel: Kernel, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"CPUs or GPUs in a bundle, not both, found cpu:.*, cuda:sm_80"):
        pack([kernel.spec], [resolve("cpu"), kernel.target], [1], tmp_path / "b.zip")


def test_what_is_exported_says_what_it_is_for(kernel: Kernel, tmp_path: Path) -> None:
    manifest = kernel.export(tmp_path / "out")
    assert manifest["threads"] == 1
    assert manifest["target"] == TARGET
    assert manifest["device"]["architectures"] == ["sm_80", "compute_80"]
    made = convgen.load(tmp_path / "out")
    assert isinstance(made, CudaLibrary)
    given = operands(kernel.spec)
    packed = made.pack(given["weights"], given["bias"])
    assert kernel.verify_packed(packed)


# ---- running -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target"),
    [
        (TEXT, TARGET),
        ("conv2d n2 ic16 oc24 i6x5 k3x3 p1 prelu f16 nhwc", "cuda:sm_90a"),
        ("conv1d n1 ic5 oc7 i33 k5 s2 nobias", "cuda:sm_70"),
    ],
)
def test_kernels_are_validated_by_emulation(text: str, target: str) -> None:
    spec, resolved = ConvSpec.parse(text), resolve(target)
    report = validate(compile_candidate(spec, resolved, default_candidate(spec, resolved), 1))
    report.raise_if_failed()
    found = {check.name: check.found for check in report.checks}
    assert "in device memory, nothing else written, emulated" in found["memory"]
    assert found["threads"] == "the same bits in every run"
    assert "refusal" not in found


def test_launches_hand_their_workspace_to_each_other() -> None:
    spec, target = ConvSpec.parse("conv2d n1 ic16 oc16 i10x10 k3x3 p1"), resolve(TARGET)
    kernel = compile_candidate(spec, target, parse_candidate(spec, target, "cuda_winograd"), 1)
    device_code = kernel.interface.device
    assert device_code is not None
    assert len(device_code.launches) == 3
    assert kernel.sizes().workspace >= sum(device_code.workspace) > 0
    validate(kernel).raise_if_failed()


def test_the_exported_example_checks_the_kernel(
    kernel: Kernel, emulated: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compile_emulated(kernel.source("cuda"), tmp_path).read_bytes()
    device_code = kernel.interface.device
    assert device_code is not None
    interface = dataclasses.replace(
        kernel.interface, device=dataclasses.replace(device_code, images=(("sm_80", code),))
    )
    out = tmp_path / "out"
    write_library(out, interface, kernel.object_file, {"threads": 1})
    command = ["cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "example.c", "liblayer.a"]
    subprocess.run([*command, "-lm", "-lpthread", "-ldl", "-o", "example"], cwd=out, check=True)
    environment = {**os.environ, "CONVGEN_CUDA_DRIVER": str(emulated[1])}
    done = subprocess.run(["./example"], cwd=out, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "outputs checked" in done.stdout


def test_a_layer_computes_on_device_memory(
    kernel: Kernel, emulated: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, driver = emulated
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", str(driver))
    found = device()
    assert found is not None
    assert found.emulated
    assert found.capability == (8, 0)
    given = operands(kernel.spec)
    layer = CudaLibrary(library, kernel.spec, "layer").bind(given["weights"], given["bias"])
    x, z = Tensor(kernel.spec.src_shape), Tensor(kernel.spec.dst_shape)
    x.array[...], z.array[...] = given["src"], given["residual"]
    stream, expected = Stream(), convolve(kernel.spec, given)
    y = layer(x, residual=z, stream=stream.handle)
    stream.synchronize()
    np.testing.assert_array_equal(y.array, expected)
    out = Tensor(kernel.spec.dst_shape)
    assert layer(x, residual=z, out=out) is out
    np.testing.assert_array_equal(out.array, expected)


# ---- what must be noticed ----------------------------------------------------------------------

SPEC = ConvSpec.parse("conv1d n1 ic1 oc1 i64 k1 nobias")
COPY = """#include "device.h"
extern "C" __global__ void __launch_bounds__(64) copy(float* __restrict__ src, float* __restrict__ dst) {
    const int i = threadIdx.x;
    %s
}
"""


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("dst[i] = src[i];", ""),
        ("dst[i] = src[i]; if (i == 0) src[5] = 1;", r"src: expected \d bytes to stay, found them written: 2[0-3]"),
        ("dst[i] = src[i]; if (i == 0) dst[-2] = 1;", r"dst: expected \d bytes to stay, found them written: -[5-8]"),
        ("dst[i] = src[i]; if (i == 0) dst[66] = 1;", "expected a clean run, found"),
    ],
)
def test_a_write_where_none_may_be_is_found(tmp_path: Path, statement: str, message: str) -> None:
    code = compile_emulated(COPY % statement, tmp_path).read_bytes()
    launch = Launch("copy", (1, 1, 1), (64, 1, 1), 0, ("src", "dst"))
    interface, object_file = compile_naive(SPEC, tmp_path, name="copy")
    interface = dataclasses.replace(interface, device=DeviceCode((("sm_80", code),), (launch,)))
    library = link(interface, object_file, tmp_path / "libcopy.so")
    driver = emulated_driver(tmp_path)
    data = exact_data(SPEC)

    def run() -> Any:
        variables = {"CONVGEN_CUDA_DRIVER": str(driver)}
        cases = {"exact": data}
        return run_guarded(library, "copy", SPEC, cases, 1, tmp_path, 60, on_device=True, environment=variables)

    if message:
        with pytest.raises(MeasureError, match=message):
            run()
        return
    outputs = run()
    assert len(outputs) == 2
    for output in outputs.values():
        np.testing.assert_array_equal(output, data["src"])


# ---- the command line --------------------------------------------------------------------------


def invoke(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """What a command prints, and its notes."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


def test_the_command_line_builds_for_a_gpu_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = invoke(capsys, "build", TEXT, "--target", TARGET, "--no-records", "--out", tmp_path / "out", "--json")
    assert "not validated: no such GPU here" in err
    layer = json.loads(out)["layers"][0]
    assert layer["validation"] is None
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["device"]["architectures"][0] == "sm_80"


def test_the_command_line_explains_targets_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {each["target"]: each for each in json.loads(invoke(capsys, "targets", "--json")[0])}
    assert not listed["cuda:sm_90a"]["native"]
    assert listed["cuda:sm_90a"]["resolved"] == "cuda:sm_90a"
    text, _ = invoke(capsys, "show", "conv1d n1 ic2 oc3 i9 k3", "--target", TARGET, "--ir", "cuda")
    assert 'extern "C" __global__' in text
    facts = json.loads(invoke(capsys, "show", TEXT, "--target", TARGET, "--json")[0])
    assert facts["roofline"] is None


def test_the_command_line_validates_by_emulation(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = invoke(capsys, "validate", "conv1d n1 ic3 oc4 i9 k3", "--target", TARGET, "--no-records")
    assert "emulated" in out
    assert "FAIL" not in out


def test_targets_are_completed() -> None:
    environment = {
        **os.environ,
        "_CONVGEN_COMPLETE": "zsh_complete",
        "COMP_WORDS": "convgen build --target cuda:sm_9",
        "COMP_CWORD": "3",
    }
    done = subprocess.run([CONVGEN], env=environment, capture_output=True, text=True, check=False)
    assert "cuda:sm_90a" in done.stdout
    assert "cuda:sm_80" not in done.stdout
