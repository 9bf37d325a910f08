"""Models of f16 and bf16: computed in f32, their inputs, outputs and casts rounded as the model says."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

import convgen
from convgen.formats.onnx.halves import as_f32

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((16, 3, 3, 3), np.float32) / 4,
    "b": RNG.standard_normal(16, np.float32),
    "v": RNG.standard_normal((16, 16, 3, 3), np.float32) / 8,
    "m": RNG.standard_normal((10, 16), np.float32),
}
X = RNG.standard_normal((1, 3, 12, 12), np.float32)


def f32_model() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["c"], pads=[1] * 4),
        helper.make_node("Add", ["c", "r"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "m"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 10))],
        [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def onnxruntime_of(model: onnx.ModelProto, **inputs: Any) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def as_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with all of its tensors bf16."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for tensor in model.graph.initializer:
        rounded = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
        tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.BFLOAT16, tensor.dims, rounded.tobytes(), raw=True))
    return model


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_model_of_halves(tmp_path: Path, dtype: str) -> None:
    """What comes out is the f32 network's output with the same weights, rounded once: to the bit."""
    model = convert_float_to_float16(f32_model()) if dtype == "f16" else as_bf16(f32_model())
    stored = np.dtype(np.float16 if dtype == "f16" else ml_dtypes.bfloat16)
    x, path = X.astype(stored), tmp_path / "half.onnx"
    onnx.save(model, path)
    network = convgen.compile(path, threads=1)
    assert (network.inputs["x"].dtype, network.outputs["y"].dtype) == (dtype, dtype)
    found = network(x)
    assert found.dtype == stored
    wide = as_f32(model)
    assert wide is not None
    assert as_f32(wide) is None
    np.testing.assert_array_equal(found, convgen.compile(wide, threads=1)(x.astype(np.float32)).astype(stored))
    exact = onnxruntime_of(wide, x=x.astype(np.float32))
    np.testing.assert_allclose(found.astype(np.float32), exact, rtol=2.0 ** (-10 if dtype == "f16" else -7), atol=1e-4)
    report = network.validate(path)
    assert report.passed, report
    assert report.worst_error > 0  # not equal to ONNX Runtime's: it was compared with what is not rounded


def test_what_onnxruntime_makes_of_f16() -> None:
    """It rounds after every node, which is as far as the two are apart."""
    model = convert_float_to_float16(f32_model())
    x = X.astype(np.float16)
    wanted = onnxruntime_of(model, x=x).astype(np.float32)
    found = convgen.compile(model, threads=1)(x).astype(np.float32)
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2)


def test_inputs_and_outputs_that_stay_f32() -> None:
    """The casts of such models round: what goes in, and what comes out."""
    model = convert_float_to_float16(f32_model(), keep_io_types=True)
    network = convgen.compile(model, threads=1)
    assert (network.inputs["x"].dtype, network.outputs["y"].dtype) == ("f32", "f32")
    found = network(X)
    np.testing.assert_array_equal(found, network(X.astype(np.float16).astype(np.float32)))
    np.testing.assert_allclose(found, onnxruntime_of(model, x=X), rtol=2e-2, atol=2e-2)
    assert network.validate(model).passed


@pytest.mark.parametrize(
    ("number", "rounded"), [(TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)]
)
def test_a_cast_rounds(number: int, rounded: Any) -> None:
    """In a model of f32 too, to nearest, ties to even; what is too large becomes infinite, NaN stays."""
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=number),
        helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
    ]
    odd = np.array([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 7e4, -3.4e38, np.nan, 6e-8], np.float32)
    x = np.concatenate([X.reshape(-1), odd])
    graph = helper.make_graph(
        nodes,
        "rounds",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(convgen.compile(model, threads=1)(x), x.astype(rounded).astype(np.float32))


def test_weights_beside_the_model(tmp_path: Path) -> None:
    """Those of f16 that are too large to stay with the graph, in a file of their own or in the model's."""
    model = convert_float_to_float16(f32_model())
    onnx.save(model, tmp_path / "one.onnx")
    x = X.astype(np.float16)
    wanted = convgen.compile(model, threads=1)(x)
    onnx.save_model(model, tmp_path / "two.onnx", save_as_external_data=True, location="data", size_threshold=0)
    for name in ("one.onnx", "two.onnx"):
        np.testing.assert_array_equal(convgen.compile(tmp_path / name, threads=1)(x), wanted)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_library_of_halves_in_c(tmp_path: Path, dtype: str) -> None:
    model = convert_float_to_float16(f32_model()) if dtype == "f16" else as_bf16(f32_model())
    network = convgen.compile(model, threads=1)
    manifest = network.export(tmp_path / "out")
    assert [one["dtype"] for one in manifest["sizes"][0]["outputs"]] == [dtype]
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "example.c", f"lib{network.name}.a", "-lm", "-lpthread"]
    subprocess.run(["cc", *flags, "-o", "example"], cwd=tmp_path / "out", check=True)
    ran = subprocess.run(["./example"], cwd=tmp_path / "out", check=True, capture_output=True, text=True)
    assert "ok" in ran.stdout
    source = (tmp_path / "out" / "example.c").read_text()
    (tmp_path / "out" / "example.c").write_text(source.replace("tolerance = 0.0", "tolerance = 0x1p-6"))
    output = tmp_path / "out" / "example.output0"
    stored = np.dtype(np.float16 if dtype == "f16" else ml_dtypes.bfloat16)
    values = np.frombuffer(output.read_bytes(), stored).astype(np.float32)
    for factor, status in ((1.005, 0), (1.1, 1)):  # read by the program as the numbers that they are
        output.write_bytes((values * np.float32(factor)).astype(stored).tobytes())
        subprocess.run(["cc", *flags, "-o", "example"], cwd=tmp_path / "out", check=True)
        assert (
            subprocess.run(["./example"], cwd=tmp_path / "out", check=False, capture_output=True).returncode == status
        )


def test_halves_inside_onnxruntime(tmp_path: Path) -> None:
    """Parts take and give what the model has between its nodes."""
    model = f32_model()
    model.graph.node.insert(4, helper.make_node("CumSum", ["s", "axis"], ["t"]))
    model.graph.node[5].input[0] = "t"
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.int64), "axis"))
    half = convert_float_to_float16(model)
    source, out = tmp_path / "half.onnx", tmp_path / "fast.onnx"
    onnx.save(half, source)
    made = convgen.for_onnxruntime(source, out)
    assert made.parts
    assert any("CumSum" in name for name in made.outside)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(made.library))
    session = onnxruntime.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": X.astype(np.float16)})
    assert found.dtype == np.float16
    wanted = onnxruntime_of(half, x=X.astype(np.float16)).astype(np.float32)
    np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=3e-2, atol=3e-2)
