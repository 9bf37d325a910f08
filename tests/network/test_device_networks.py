"""Networks for a GPU: compiled here, run on an emulated device, exported, and refused what they do not take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from device_tensors import Tensor
from network_models import model_of
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

import convgen
from convgen.cuda.driver import Stream, synchronize
from convgen.errors import ExportError, KernelError, NotTakenError, SpecError, UnsupportedError
from convgen.hardware.target import resolve
from convgen.network.check.device import emulated_network, run_on_device
from convgen.network.check.validate import run_onnxruntime
from convgen.network.cuda_library import CudaNetworkLibrary
from convgen.network.network import DeviceNetwork, plan_model
from convgen.network.plan import Product

pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'convgen[cuda]'")
emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate")
TARGET = "cuda:sm_80"


def small(batch: int | str = 1) -> onnx.ModelProto:
    """Convolutions with and without matrix units, a residual, pooling, a concatenation, a product."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (16, 3, 3, 3), "w1": (16, 1, 3, 3), "w2": (24, 32, 3, 3), "b": (16,), "fc": (24, 10)}
    constants = {name: rng.standard_normal(shape, np.float32) * np.float32(0.2) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["ar"]),
        helper.make_node("Conv", ["ar", "w1"], ["d"], pads=[1] * 4, group=16),
        helper.make_node("Add", ["d", "ar"], ["s"]),
        helper.make_node("MaxPool", ["s"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("AveragePool", ["s"], ["v"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["m", "v"], ["k"], axis=1),
        helper.make_node("Conv", ["k", "w2"], ["c"], pads=[1] * 4),
        helper.make_node("Sigmoid", ["c"], ["cs"]),
        helper.make_node("GlobalAveragePool", ["cs"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "fc"], ["y"]),
    ]
    model = model_of(nodes, {"x": (1, 3, 12, 12)}, ["y", "cs"], constants)
    if isinstance(batch, str):
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = batch
    return model


@pytest.fixture(scope="module")
def network() -> DeviceNetwork:
    made = convgen.compile(small(), TARGET, records=False)
    assert isinstance(made, DeviceNetwork)
    return made


@emulated
def test_a_network_is_right_in_emulation(network: DeviceNetwork) -> None:
    report = network.validate(small())
    report.raise_if_failed()
    assert {check.name for check in report.checks} == {"places", "memory", "threads", "float"}
    assert 0 < report.worst_error < 1


def test_weights_that_were_changed_are_refused(network: DeviceNetwork) -> None:
    data = bytearray(network.built.weights.read_bytes())
    data[200] ^= 1
    with pytest.raises(ExportError, match="the weights are another library's, or damaged"):
        CudaNetworkLibrary(network.built.library, network.name, _aligned(bytes(data)), 1)


@emulated
@pytest.mark.parametrize("accuracy", ["tf32", "bf16", "f16"])
def test_networks_of_other_accuracies_are_right_in_emulation(accuracy: str) -> None:
    convgen.compile(small(), TARGET, accuracy=accuracy, records=False).validate(small()).raise_if_failed()


@emulated
@pytest.mark.parametrize("accuracy", ["standard", "f16"])
def test_a_model_of_f16_is_given_and_gives_f16(accuracy: str) -> None:
    model = convert_float_to_float16(small())
    made = convgen.compile(model, TARGET, accuracy=accuracy, records=False)
    assert {made.inputs["x"].dtype, made.outputs["y"].dtype, made.outputs["cs"].dtype} == {"f16"}
    report = made.validate(model)
    report.raise_if_failed()
    assert not any("nothing is promised" in check.found for check in report.checks)


@emulated
def test_a_network_of_several_sizes_computes_with_each() -> None:
    made = convgen.compile(small("N"), TARGET, dims={"N": (1, 3)}, records=False)
    made.validate(small("N")).raise_if_failed()


def test_without_a_device_it_is_exported_and_not_called(network: DeviceNetwork, tmp_path: Path) -> None:
    with pytest.raises((KernelError, UnsupportedError)):
        network(np.zeros((1, 3, 12, 12), np.float32))
    with pytest.raises(UnsupportedError, match="steps on a GPU are not timed"):
        network.step_seconds()
    manifest = network.export(tmp_path / "out", example=False)
    assert manifest["kind"] == "device network"
    assert set(manifest["files"]) >= {"libsmall.so", "libsmall.a", "small.h", "small.weights"}
    assert "example.c" not in manifest["files"]
    (tmp_path / "use.c").write_text(
        '#include "small.h"\n#include <stdio.h>\n#include <string.h>\n'
        "int main(void) {\n"
        "    convgen_network_sizes sizes;\n"
        "    if (small_sizes(1, &sizes) != CONVGEN_DEVICE_NO_SUCH_SIZE) return 1;\n"
        "    if (small_sizes(0, &sizes) != CONVGEN_OK) return 1;\n"
        "    if (sizes.workspace != small_WORKSPACE_BYTES || sizes.weights != small_WEIGHTS_BYTES) return 2;\n"
        "    convgen_network_cuda_args args = {0};\n"
        "    if (small_run(&args) != CONVGEN_NULL_POINTER) return 3;\n"
        "    for (int status = 1; status < 64; ++status)\n"
        '        if (strstr(small_error(status), "layer") != NULL) return 4;\n'
        '    if (strstr(small_error(CONVGEN_WRONG_SIZE), "network") == NULL) return 5;\n'
        "    puts(small_error(CONVGEN_DEVICE_WRONG_WEIGHTS));\n    return 0;\n}\n"
    )
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-I", "out", "-o", "use"]
    libraries = ["out/libsmall.a", "-lm", "-lpthread", "-ldl"]
    subprocess.run(["cc", *flags, "use.c", *libraries], cwd=tmp_path, check=True)
    said = subprocess.check_output([tmp_path / "use"], text=True)
    assert said == "the weights are another library's, or damaged\n"

    loaded = convgen.load(tmp_path / "out")
    assert isinstance(loaded, CudaNetworkLibrary)
    assert loaded.inputs == network.inputs
    assert loaded.memory == network.memory
    (tmp_path / "out" / "small.weights").write_bytes(bytes(loaded.sizes().weights))
    with pytest.raises(ExportError, match="the weights are another library's, or damaged"):
        convgen.load(tmp_path / "out")


def emulated_export(network: DeviceNetwork, folder: Path) -> dict[str, str]:
    """An export whose library has emulated code; the environment that it runs in."""
    network.export(folder)
    library, driver = emulated_network(network.built, network.plans, network.target, folder)
    assert library.name == f"lib{network.name}.so"
    return {**os.environ, "CONVGEN_CUDA_DRIVER": str(driver), "LD_LIBRARY_PATH": "."}


@emulated
def test_the_example_runs_every_size_and_sees_what_is_wrong(tmp_path: Path) -> None:
    made = convgen.compile(small("N"), TARGET, dims={"N": (1, 2)}, accuracy="f16", records=False)
    assert isinstance(made, DeviceNetwork)
    environment = emulated_export(made, tmp_path / "out")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "example.c", "-L.", "-lsmall", "-lm", "-lpthread", "-ldl"]
    subprocess.run(["cc", *flags, "-o", "example"], cwd=tmp_path / "out", check=True)

    def run() -> tuple[int, str]:
        program, how = ["./example"], {"cwd": tmp_path / "out", "env": environment, "capture_output": True}
        done: Any = subprocess.run(program, check=False, text=True, **how)  # type: ignore[call-overload]
        return done.returncode, done.stdout + done.stderr

    assert run() == (0, "small: 4 outputs as expected; ok\n")
    path = tmp_path / "out" / "example.output1.N2"
    numbers = np.fromfile(path, np.float32)
    numbers[-1] += 0.1 * np.abs(numbers).max()
    numbers.tofile(path)
    assert run() == (1, "size 1, output 1, run 1: other numbers than expected\n")


def test_what_f16_cannot_hold_is_refused() -> None:
    model = small()
    large = numpy_helper.from_array(np.full((16, 3, 3, 3), 1e5, np.float32), "w0")
    model.graph.initializer[0].CopyFrom(large)
    with pytest.raises(
        SpecError, match=r"accuracy: expected weights of at most 65504 for f16, found 100000 among weigh"
    ):
        convgen.compile(model, TARGET, accuracy="f16")
    with pytest.raises(SpecError, match=r"accuracy: expected one of strict, .*, bf16 for a CPU, found 'f16'"):
        convgen.compile(small(), accuracy="f16", records=False)


def test_what_lies_between_the_steps_is_f16() -> None:
    (plan,) = plan_model(small(), resolve(TARGET), accuracy="f16")
    specs = [step.function.spec for step in plan.steps if isinstance(step.function, Product)]
    assert {(spec.dtype, spec.accuracy) for spec in specs} == {("f16", "standard"), ("f32", "tf32")}
    kept = {name for name in plan.graph.dtypes if plan.graph.dtype(name) == "f32"}
    assert kept.isdisjoint({"ar", "s", "m", "v", "k"})


@emulated
def test_runs_have_the_same_bits_wherever_buffers_lie(network: DeviceNetwork) -> None:
    runs = run_on_device(network.built, network.plans, network.target, [{"x": np.zeros((1, 3, 12, 12), np.float32)}])
    first, second = runs[0].values()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert np.isfinite(first["y"]).all()


@emulated
def test_a_network_is_called_with_arrays_on_a_device(
    network: DeviceNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, driver = emulated_network(network.built, network.plans, network.target, tmp_path)
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", str(driver))
    loaded = CudaNetworkLibrary(library, network.name, network.built.weights, 1)
    x = Tensor((1, 3, 12, 12))
    x.array[...] = np.random.default_rng(1).standard_normal(x.array.shape, np.float32)
    wanted = run_onnxruntime(small(), {"x": x.array.copy()})
    own, stream = Tensor((1, 10)), Stream()
    found = loaded(x, out={"y": own}, stream=stream.handle)
    stream.synchronize()
    assert found["y"] is own
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name].array, array, rtol=1e-4, atol=1e-4)
    again = loaded({"x": x})
    synchronize(0)
    assert again["cs"].array.tobytes() == found["cs"].array.tobytes()
    with pytest.raises(KernelError, match=r"x: expected shape \(1, 3, 12, 12\), found \(1, 3, 12, 11\)"):
        loaded(Tensor((1, 3, 12, 11)))
    with pytest.raises(KernelError, match="out: expected names among y, cs, found 'z'"):
        loaded(x, out={"z": own})


def test_strips_and_integers_are_refused() -> None:
    with pytest.raises(SpecError, match="strips: expected 0 for a GPU"):
        convgen.compile(small(), TARGET, strips=2)
    with pytest.raises(NotTakenError) as error:
        convgen.compile(_quantised(), TARGET)
    assert all("found integers" in reason for reason in error.value.nodes.values())
    assert error.value.nodes


def test_other_ways_to_run_a_model_want_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="for a GPU models are compiled to a library, no more"):
        convgen.for_onnxruntime(small(), tmp_path / "fast.onnx", TARGET)


@emulated
def test_the_command_line_compiles_and_checks(tmp_path: Path) -> None:
    """In processes of their own: in this one an emulated driver may have been loaded, which then is the machine's."""
    onnx.save(small(), tmp_path / "small.onnx")

    def run(*arguments: str) -> tuple[Any, str]:
        command = [sys.executable, "-m", "convgen", *arguments, "--target", TARGET, "--json", "--no-records"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    made, said = run("compile", str(tmp_path / "small.onnx"), "--out", str(tmp_path / "out"))
    assert (made["manifest"]["target"], made["manifest"]["validation"]) == (TARGET, None)
    assert "no such GPU here; `convgen validate --whole` emulates one" in said
    report, _ = run("validate", str(tmp_path / "small.onnx"), "--whole")
    assert report["passed"]


def _quantised() -> onnx.ModelProto:
    """A convolution between QuantizeLinear and DequantizeLinear."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["dw"]),
        helper.make_node("Conv", ["d", "dw"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["e"]),
        helper.make_node("DequantizeLinear", ["e", "s", "z"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {"s": np.float32(0.1), "z": np.uint8(128), "wz": np.int8(0)}
    constants["w"] = rng.integers(-100, 100, (4, 3, 1, 1)).astype(np.int8)
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def _aligned(data: bytes) -> Any:
    memory = np.zeros(len(data) + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    memory[begin : begin + len(data)] = np.frombuffer(data, np.uint8)
    return memory[begin : begin + len(data)]
