"""What is added to products of integers in networks is added where these are stored, to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

import convgen
from convgen.network.integers import scales_of_sum
from convgen.problem.dtypes import RANGES


def model(
    path: Path, *, after: str = "", scale: float = 0.0517311, other: str = "u8", read_twice: bool = False
) -> Path:
    """A convolution between DequantizeLinear and QuantizeLinear, and its sum with src, quantised."""
    rng = np.random.default_rng(0)
    types = {"u8": np.uint8, "i8": np.int8}
    constants: dict[str, Any] = {
        "w": rng.integers(-90, 90, (8, 8, 3, 3)).astype(np.int8),
        "w_scale": np.float32(0.004),
        "w_zero": np.int8(0),
        "x_scale": np.float32(0.0213741),
        "x_zero": types[other](100),
        "p_scale": np.float32(0.0431937),
        "p_zero": np.uint8(120),
        "y_scale": np.float32(scale),
        "y_zero": np.uint8(0 if after == "Relu" else 90),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "p_scale", "p_zero"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "p_scale", "p_zero"], ["cd"]),
        helper.make_node("Add", ["xd", "cd"], ["sum"]),
        *([helper.make_node(after, ["sum"], ["act"])] if after else []),
        helper.make_node("QuantizeLinear", ["act" if after else "sum", "y_scale", "y_zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "y_scale", "y_zero"], ["y"]),
    ]
    shape, outputs = [1, 8, 14, 14], ["y", *(["cd"] if read_twice else [])]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def as_written(path: Path, x: Any) -> Any:
    """What ONNX Runtime computes node by node."""
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    return InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]


@pytest.mark.parametrize(("after", "other"), [("", "u8"), ("Relu", "u8"), ("", "i8")])
def test_a_product_takes_in_the_sum(tmp_path: Path, after: str, other: str) -> None:
    path = model(tmp_path / "sums.onnx", after=after, other=other)
    network = convgen.compile(path, threads=1)
    specs = [convgen.ConvSpec.parse(layer["spec"]) for layer in network.layers() if "spec" in layer]
    assert [(spec.residual, spec.residual_dtype, spec.dst_dtype) for spec in specs] == [(True, other, "u8")]
    assert not any("add" in layer.get("operators", "") for layer in network.layers())
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal((1, 8, 14, 14), np.float32)
        found = network(x)
        np.testing.assert_array_equal(found, as_written(path, x))
    assert len(np.unique(found)) > 50


def test_a_product_that_is_read_twice_stays(tmp_path: Path) -> None:
    network = convgen.compile(model(tmp_path / "sums.onnx", read_twice=True), threads=1)
    assert not any("residual" in layer.get("spec", "") for layer in network.layers())


def test_networks_with_sums_are_valid_and_exported(tmp_path: Path) -> None:
    path = model(tmp_path / "sums.onnx")
    network = convgen.compile(path, threads=1)
    network.validate(path).raise_if_failed()
    network.export(tmp_path / "out")
    x = np.random.default_rng(9).standard_normal((1, 8, 14, 14), np.float32)
    np.testing.assert_array_equal(convgen.load(tmp_path / "out")(x), network(x))


def test_scales_of_a_sum_give_what_a_quotient_does() -> None:
    rng, found = np.random.default_rng(1), 0
    for _ in range(20):
        one, other, total = (np.float32(2.0 ** rng.uniform(-6, -2)) for _ in range(3))
        scales, zeros = (one, other, total), (int(rng.integers(128)), int(rng.integers(128)), int(rng.integers(128)))
        products = scales_of_sum(scales, zeros, ("u8", "i8", "u8"))
        if products is None:
            continue
        found += 1
        a, b = (np.arange(low, high + 1, dtype=np.float32) for low, high in (RANGES["u8"], RANGES["i8"]))
        a, b = a[:, None] - np.float32(zeros[0]), b - np.float32(zeros[1])
        quotient, near = (a * scales[0] + b * scales[1]) / scales[2], a * products[0] + b * products[1]
        stored = [np.clip(np.rint(value) + zeros[2], 0, 255) for value in (quotient, near)]
        np.testing.assert_array_equal(*stored)
    assert found > 15


@pytest.mark.parametrize("seed", range(6))
def test_what_is_quantised_anew_is_the_same_for_all_numbers(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    constants: dict[str, Any] = {
        "a_scale": np.float32(rng.uniform(0.01, 0.1)),
        "a_zero": np.uint8(rng.integers(256)),
        "b_scale": np.float32(rng.uniform(0.01, 0.1)),
        "b_zero": np.int8(rng.integers(-128, 128)),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "a_scale", "a_zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["a", "a_scale", "a_zero"], ["between"]),
        helper.make_node("QuantizeLinear", ["between", "b_scale", "b_zero"], ["b"]),
        helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "anew",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 256])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    path = tmp_path / "anew.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    x = (np.arange(256) - float(constants["a_zero"])).astype(np.float32) * constants["a_scale"]
    network = convgen.compile(path, threads=1)
    np.testing.assert_array_equal(network(x.reshape(1, 256)), as_written(path, x.reshape(1, 256)))
