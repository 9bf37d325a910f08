"""Quantised convolutions read from ONNX: their specs, and that their arrays give ONNX Runtime's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import quantised_models
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from convgen.check.reference import run_onnxruntime
from convgen.errors import SpecError, UnsupportedError
from convgen.formats.onnx.layers import read_layers
from convgen.formats.onnx.node import OnnxLayer

Array = npt.NDArray[Any]


def between(
    op: str = "Conv",
    follows: tuple[str, ...] = (),
    *,
    weights: Array,
    weights_zero: Array | None = None,
    dst_zero: int = 128,
    src_scale: float = 0.5,
    bias: Array | None = None,
) -> onnx.ModelProto:
    """``op`` and what follows it, between DequantizeLinear and QuantizeLinear, of u8 and a src ``[1, 2, 4, 4]``."""
    axis = int(op == "ConvTranspose")
    channels = weights.shape[axis]
    arrays = {
        "x_scale": np.float32(src_scale),
        "x_zero": np.uint8(3),
        "w": weights,
        "w_scale": np.full(channels, 0.25, np.float32),
        "w_zero": weights_zero if weights_zero is not None else np.zeros(channels, weights.dtype),
        "y_scale": np.float32(0.5),
        "y_zero": np.uint8(dst_zero),
        "low": np.float32(-2),
        "high": np.float32(3.3),
        "b_scale": np.full(channels, 0.125, np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], axis=axis),
    ]
    operands = ["xf", "wf"]
    if bias is not None:
        arrays["b"] = bias
        if bias.dtype == np.int32:
            nodes.append(helper.make_node("DequantizeLinear", ["b", "b_scale"], ["bf"], axis=0))
        operands.append("bf" if bias.dtype == np.int32 else "b")
    nodes.append(helper.make_node(op, operands, ["f0"], "layer"))
    for number, name in enumerate(follows):
        bounds = ["low", "high"] if name == "Clip" else []
        nodes.append(helper.make_node(name, [f"f{number}", *bounds], [f"f{number + 1}"]))
    nodes.append(helper.make_node("QuantizeLinear", [f"f{len(follows)}", "y_scale", "y_zero"], ["y"]))
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, (1, 2, 4, 4))
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def read(model: onnx.ModelProto | Path) -> OnnxLayer:
    (layer,) = read_layers(model, {}, True)
    return layer


def weights_of(dtype: type, shape: tuple[int, ...] = (3, 2, 2, 2)) -> Array:
    info = np.iinfo(dtype)
    return np.random.default_rng(0).integers(info.min, info.max, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("follows", [(), ("Relu",), ("Clip",), ("Relu", "Clip")])
@pytest.mark.parametrize("dst_zero", [0, 128])
def test_a_convolution_between_integers_is_one_of_integers(op: str, follows: tuple[str, ...], dst_zero: int) -> None:
    shape = (2, 3, 2, 2) if op == "ConvTranspose" else (3, 2, 2, 2)
    bias = np.array([5, -70, 30], np.int32)
    model = between(op, follows, weights=weights_of(np.int8, shape) // 16, bias=bias, dst_zero=dst_zero)
    layer = read(model)
    assert layer.spec is not None
    bounds = {(): "none", ("Relu",): "relu", ("Clip",): "clip(-4,7)", ("Relu", "Clip"): "clip(0,7)"}[follows]
    if dst_zero == 0:  # as the least number is
        bounds = {"relu": "none", "clip(0,7)": "clip(-inf,7)", "clip(-4,7)": "clip(-inf,7)"}.get(bounds, bounds)
    assert layer.spec.activation == bounds
    assert (layer.src, layer.dst, layer.spec.dst_zero) == ("x", "y", dst_zero > 0)
    assert layer.spec.dtypes["bias"] == "i32"
    x = np.random.default_rng(1).integers(0, 8, (1, 2, 4, 4)).astype(np.uint8)
    arrays: dict[str, Any] = layer.arrays
    found = run_onnxruntime(layer.spec, x, **arrays)
    session = ReferenceEvaluator(model)
    expected = session.run(None, {"x": x})[0]
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("zero", "stored"), [(128, ("i8", False)), (0, ("u8", False)), (90, ("u8", True))], ids=["i8", "u8", "zero point"]
)
def test_weights_are_stored_as_i8_where_they_fit(zero: int, stored: tuple[str, bool]) -> None:
    layer = read(between(weights=weights_of(np.uint8), weights_zero=np.full(3, zero, np.uint8)))
    assert layer.spec is not None
    assert (layer.spec.weights_dtype, layer.spec.weights_zero) == stored


def test_a_bias_of_floats_is_rounded_to_steps_of_the_products() -> None:
    layer = read(between(weights=weights_of(np.int8), bias=np.array([1.0, 0.19, -0.07], np.float32)))
    np.testing.assert_array_equal(layer.arrays["bias"], [8, 2, -1])


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_not_positive_are_refused(scale: float) -> None:
    refusal = read(between(weights=weights_of(np.int8), src_scale=scale)).refusal
    assert isinstance(refusal, SpecError)
    assert "x_scale" in refusal.field


def test_nothing_quantised_is_read_as_f32_in_silence() -> None:
    model = between(weights=weights_of(np.int8), weights_zero=np.zeros(3, np.int8))
    for initializer in model.graph.initializer:
        if initializer.name == "x_scale":
            initializer.CopyFrom(numpy_helper.from_array(np.array([0.5, 0.25], np.float32), "x_scale"))
        if initializer.name == "x_zero":
            initializer.CopyFrom(numpy_helper.from_array(np.zeros(2, np.uint8), "x_zero"))
    refusal = read(model).refusal
    assert isinstance(refusal, SpecError | UnsupportedError)
    assert "x_scale" in str(refusal)


@pytest.mark.parametrize("kind", ["QDQ u8 i8 channel", "QDQ i8 i8", "QOperator u8 i8", "QOperator i8 i8 channel"])
def test_layers_of_models_of_the_quantiser(tmp_path: Path, kind: str) -> None:
    layers = read_layers(quantised_models.quantised(tmp_path, kind), {}, True)
    assert [layer.refusal for layer in layers] == [None] * 3
    for layer in layers:
        assert layer.spec is not None
        assert layer.spec.is_quantised
        assert layer.spec.weights_dtype == "i8"
        assert {*layer.arrays} == {*layer.spec.parameters}
        assert not layer.spec.weights_zero
        assert layer.spec.activation == "none"
