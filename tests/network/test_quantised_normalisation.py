"""What is normalised between integers is normalised in steps of these, to the bits of what the graph says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

import convgen
from convgen.network.graph import Operator

CHANNELS = 48
TYPES: dict[str, Any] = {"u8": np.uint8, "i8": np.int8}


def model(path: Path, dtype: str, after: str = "", read_twice: bool = False, seed: int = 0) -> dict[str, Any]:
    """BatchNormalization between DequantizeLinear and QuantizeLinear, and its constants."""
    rng = np.random.default_rng(seed)
    constants: dict[str, Any] = {
        "x_scale": np.float32(rng.uniform(0.01, 0.1)),
        "x_zero": TYPES[dtype](rng.integers(100)),
        "gamma": rng.uniform(-2, 2, CHANNELS).astype(np.float32),
        "beta": rng.standard_normal(CHANNELS).astype(np.float32),
        "mean": rng.standard_normal(CHANNELS).astype(np.float32),
        "variance": rng.uniform(0.5, 2, CHANNELS).astype(np.float32),
        "low": np.float32(-0.7),
        "high": np.float32(1.9),
        "y_scale": np.float32(rng.uniform(0.01, 0.04)),
        "y_zero": TYPES[dtype](np.iinfo(TYPES[dtype]).min if after == "Relu" else 33),
    }
    inputs = {"Relu": ["n"], "Clip": ["n", "low", "high"]}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("BatchNormalization", ["xd", "gamma", "beta", "mean", "variance"], ["n"], epsilon=1e-5),
        *([helper.make_node(after, inputs[after], ["act"])] if after else []),
        helper.make_node("QuantizeLinear", ["act" if after else "n", "y_scale", "y_zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "y_scale", "y_zero"], ["y"]),
        *([helper.make_node("Neg", ["xd"], ["again"])] if read_twice else []),
    ]
    shape, outputs = [1, CHANNELS, 16, 16], ["y", *(["again"] if read_twice else [])]
    graph = helper.make_graph(
        nodes,
        "normalised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return constants


def every_number(constants: dict[str, Any]) -> Any:
    """Each number that is stored, in each channel."""
    info = np.iinfo(constants["x_zero"].dtype)
    numbers = np.arange(info.min, info.max + 1) - int(constants["x_zero"])
    x = numbers.astype(np.float32) * constants["x_scale"]
    return np.ascontiguousarray(np.broadcast_to(x.reshape(1, 1, 16, 16), (1, CHANNELS, 16, 16)))


def as_said(constants: dict[str, Any], after: str, x: Any) -> Any:
    """The graph's formula in f32, one rounding after another."""
    shape = (1, -1, 1, 1)
    scale = constants["gamma"].astype(np.float64) / np.sqrt(constants["variance"].astype(np.float64) + np.float32(1e-5))
    shift = constants["beta"] - constants["mean"] * scale
    value = x * scale.astype(np.float32).reshape(shape) + shift.astype(np.float32).reshape(shape)
    low = {"Relu": 0, "Clip": constants["low"]}.get(after, -np.inf)
    value = np.clip(value, low, constants["high"] if after == "Clip" else np.inf)
    info, zero = np.iinfo(constants["y_zero"].dtype), int(constants["y_zero"])
    stored = np.clip(np.rint(value / constants["y_scale"]) + zero, info.min, info.max)
    return ((stored - zero) * constants["y_scale"]).astype(np.float32)


@pytest.mark.parametrize("dtype", ["u8", "i8"])
@pytest.mark.parametrize("after", ["", "Relu", "Clip"])
@pytest.mark.parametrize("seed", range(2))
def test_numbers_are_normalised_in_steps(tmp_path: Path, dtype: str, after: str, seed: int) -> None:
    path = tmp_path / "normalised.onnx"
    constants = model(path, dtype, after, seed=seed)
    network = convgen.compile(path, threads=1)
    (quantised,) = [
        node
        for node in network.plan.graph.nodes
        if isinstance(node, Operator) and node.kind == "quantise" and "scale_shift" in _behind(network, node)
    ]
    assert network.plan.graph.constants[quantised.inputs[1]] == 1  # a step: nothing is divided
    x = every_number(constants)
    found = network(x)
    np.testing.assert_array_equal(found, as_said(constants, after, x))
    # ONNX Runtime has another order of the same operations: a number in a few thousand may be rounded another way.
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    (wanted,) = InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(["y"], {"x": x})
    assert (found != wanted).mean() < 1e-3
    assert abs(found - wanted).max() <= 1.01 * constants["y_scale"]
    assert len(np.unique(found)) > 50


def _behind(network: convgen.Network, node: Operator) -> set[str]:
    """The operators between the last step of integers and a node."""
    producers, kinds, name = network.plan.graph.producers(), set[str](), node.inputs[0]
    while isinstance(made := producers.get(name), Operator) and made.kind in ("activate", "scale_shift"):
        kinds.add(made.kind)
        name = made.inputs[0]
    return kinds


def test_what_is_read_twice_is_dequantised_twice(tmp_path: Path) -> None:
    path = tmp_path / "normalised.onnx"
    constants = model(path, "u8", "Relu", read_twice=True)
    network = convgen.compile(path, threads=1)
    passes = [layer["operators"] for layer in network.layers()]
    assert [text.split()[0] for text in passes].count("dequantise") == len(passes) - 1  # after that of the input
    x = every_number(constants)
    found = network(x)
    np.testing.assert_array_equal(found["y"], as_said(constants, "Relu", x))
    np.testing.assert_array_equal(found["again"], -x)
    network.validate(path).raise_if_failed()
