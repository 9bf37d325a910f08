"""Quantised models of every kind: each is computed as what it says, or refused by a name; nothing in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beside_onnxruntime import same, written
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import convgen
from convgen.errors import NotTakenError, UnsupportedError
from convgen.formats.onnx.layers import read_layers

SHAPE = (1, 4, 6, 5)


def network(
    nodes: list[NodeProto], constants: dict[str, Any], *, opset: int = 21, result: int = TensorProto.FLOAT
) -> ModelProto:
    """From ``x`` to ``y``; constants are arrays, or tensors."""
    tensors = []
    for name, value in constants.items():
        tensor = value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value))
        tensor.name = name
        tensors.append(tensor)
    graph = helper.make_graph(
        nodes,
        "kinds",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", result, None)],
        tensors,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def packed(dtype: int, shape: tuple[int, ...]) -> TensorProto:
    """A few different numbers of a type, whatever it is."""
    numbers = (np.arange(np.prod(shape)) * 5 % 7 - (3 if dtype == TensorProto.INT4 else 0)).astype(np.float32)
    return helper.make_tensor("", dtype, shape, numbers.tolist())


def node(op: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name, **attributes)


def activations(dtype: int, opset: int = 21) -> ModelProto:
    """A convolution between integers of a type; weights are of i8."""
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "a"),
        node("DequantizeLinear", "w t", "k"),
        node("Conv", "a k", "c", "layer"),
        node("QuantizeLinear", "c u z", "p"),
        node("DequantizeLinear", "p u z", "y"),
    ]
    weights = np.arange(-12, 12, dtype=np.int8).reshape(6, 4, 1, 1)
    scales = {name: np.float32(value) for name, value in (("s", 2**-6), ("t", 2**-5), ("u", 2**-4))}
    return network(nodes, {"w": weights, **scales, "z": helper.make_tensor("", dtype, (), [3.0])}, opset=opset)


def weights(dtype: int, quantised: bool, block: int = 0) -> ModelProto:
    """A convolution with dequantised weights of a type, of f32 or of u8."""
    scales = np.array([0.25, 0.5, 0.125, 0.5, 1, 2], np.float32)
    attributes: dict[str, Any] = {"axis": 0}
    if block:
        scales = np.resize(scales, (6, 4 // block, 1, 1))
        attributes = {"axis": 1, "block_size": block}
    nodes = [node("DequantizeLinear", "w t", "k", **attributes)]
    if quantised:
        nodes += [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "a")]
        nodes += [node("Conv", "a k", "c", "layer"), node("QuantizeLinear", "c u z", "p")]
        nodes += [node("DequantizeLinear", "p u z", "y")]
    else:
        nodes.append(node("Conv", "x k", "y", "layer"))
    constants = {"w": packed(dtype, (6, 4, 1, 1)), "t": scales, "s": np.float32(2**-4), "u": np.float32(0.25)}
    return network(nodes, {**constants, "z": np.uint8(120)})


def alone(*more: NodeProto, result: int = TensorProto.UINT8) -> ModelProto:
    """A QuantizeLinear without DequantizeLinear, and what reads its integers."""
    nodes = [node("QuantizeLinear", "x s z", "q" if more else "y"), *more]
    return network(nodes, {"s": np.float32(0.05), "z": np.uint8(100)}, opset=17, result=result)


def blocks() -> ModelProto:
    """Activations with a scale for each two channels."""
    scales = np.full((1, 2, 6, 5), 0.05, np.float32)
    how: dict[str, Any] = {"axis": 1, "block_size": 2}
    nodes = [node("QuantizeLinear", "x s z", "q", "blocked", **how), node("DequantizeLinear", "q s z", "y", **how)]
    return network(nodes, {"s": scales, "z": np.full(scales.shape, 100, np.uint8)})


def runtime(op: str, inputs: str, constants: dict[str, Any], **attributes: Any) -> ModelProto:
    """An operator of ONNX Runtime's own behind a QuantizeLinear."""
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node(op, inputs, "m", "own", domain="com.microsoft", **attributes),
        node("Identity", "m", "y"),
    ]
    given = {"s": np.float32(0.05), "z": np.uint8(100), "u": np.float32(0.1), "v": np.uint8(90)}
    return network(nodes, given | constants, opset=17)


#: What the graph says, to the bit.
COMPUTED: dict[str, Callable[[], ModelProto]] = {
    "u8": lambda: activations(TensorProto.UINT8),
    "i8": lambda: activations(TensorProto.INT8),
    "weights of i8 alone": lambda: weights(TensorProto.INT8, False),
    "weights of i8 in blocks": lambda: weights(TensorProto.INT8, False, 2),
    "weights of i8 in blocks, u8 between": lambda: weights(TensorProto.INT8, True, 2),
    "integers as output": alone,
    "integers cast": lambda: alone(node("Cast", "q", "y", to=TensorProto.FLOAT), result=TensorProto.FLOAT),
}
#: To the bit, or refused by this name.
EITHER: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "u16": (lambda: activations(TensorProto.UINT16), "QuantizeLinear"),
    "i16": (lambda: activations(TensorProto.INT16), "QuantizeLinear"),
    "weights of i4 alone": (lambda: weights(TensorProto.INT4, False), "int4"),
    "weights of i4": (lambda: weights(TensorProto.INT4, True), "int4"),
    "weights of u4 in blocks": (lambda: weights(TensorProto.UINT4, True, 2), "uint4|blocks"),
}
REFUSED: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "f8": (lambda: activations(TensorProto.FLOAT8E4M3FN), "QuantizeLinear .*to another type than i8, u8"),
    "i4": (lambda: activations(TensorProto.INT4), "QuantizeLinear .*to another type than i8, u8"),
    "blocks": (blocks, "QuantizeLinear 'blocked': scales of blocks"),
    "arithmetic of integers": (lambda: alone(node("Mul", "q q", "y", "own")), "Mul 'own': mul of u8; f32"),
    "QLinearReduceMean": (
        lambda: runtime("QLinearReduceMean", "q s z u v", {}, axes=[2], keepdims=1),
        "QLinearReduceMean 'own': it is of the domain 'com.microsoft'",
    ),
    "QLinearWhere": (
        lambda: runtime("QLinearWhere", "which q s z q s z u v", {"which": np.ones(SHAPE, bool)}),
        "QLinearWhere 'own': it is of the domain 'com.microsoft'",
    ),
    "MatMulIntegerToFloat": (
        lambda: runtime("MatMulIntegerToFloat", "q w s t", {"w": np.ones((5, 3), np.int8), "t": np.float32(0.1)}),
        "MatMulIntegerToFloat 'own': it is of the domain 'com.microsoft'",
    ),
    "DynamicQuantizeMatMul": (
        lambda: runtime("DynamicQuantizeMatMul", "x w t", {"w": np.ones((5, 3), np.int8), "t": np.float32(0.1)}),
        "DynamicQuantizeMatMul 'own': it is of the domain 'com.microsoft'",
    ),
    "MatMulNBits": (
        lambda: runtime(
            "MatMulNBits",
            "x w t",
            {"w": np.ones((3, 1, 8), np.uint8), "t": np.ones(3, np.float32)},
            K=5,
            N=3,
            bits=4,
            block_size=16,
        ),
        "MatMulNBits 'own': it is of the domain 'com.microsoft'",
    ),
    "QLinearConv with an attribute that is not known": (
        lambda: runtime("QLinearConv", "q s z w t o u v", {"w": np.ones((3, 4, 1, 1), np.int8), "t": np.float32(0.1),
                        "o": np.int8(0)}, beta=2.0),
        "QLinearConv 'own': ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_taken_is_what_the_graph_says(tmp_path: Path, name: str) -> None:
    same(tmp_path, COMPUTED[name](), SHAPE)


@pytest.mark.parametrize("name", EITHER)
def test_other_integers_are_exact_or_named(tmp_path: Path, name: str) -> None:
    make, named = EITHER[name]
    said = ""
    try:
        same(tmp_path, make(), SHAPE)
    except NotTakenError as error:
        said = str(error)
    assert not said or re.search(named, said), said


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_taken_is_named(tmp_path: Path, name: str) -> None:
    make, named = REFUSED[name]
    with pytest.raises(NotTakenError, match=named):
        convgen.compile(written(tmp_path, make()), threads=1)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (activations(TensorProto.UINT16), r"Conv 'layer': src has the dtype of 'q', uint16; supported are i8, u8"),
        (activations(TensorProto.INT16), r"Conv 'layer': src has the dtype of 'q', int16; supported are i8, u8"),
        (weights(TensorProto.INT8, True, 2), r"Conv 'layer': weights 'w' have scales of blocks"),
    ],
    ids=["u16", "i16", "blocks"],
)
def test_a_layer_between_integers_is_none_of_floats(model: ModelProto, named: str) -> None:
    """Where one is read by itself: what is dequantised before it is no part of it."""
    (layer,) = read_layers(model, {}, True)
    assert layer.spec is None
    with pytest.raises(UnsupportedError, match=named):
        raise layer.refusal or AssertionError


def test_weights_alone_are_floats_of_a_layer_of_floats() -> None:
    model = weights(TensorProto.INT8, False, 2)
    (layer,) = read_layers(model, {}, True)
    assert layer.spec is not None
    assert (layer.spec.dtype, layer.src) == ("f32", "x")
    stored = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float32)
    scales = numpy_helper.to_array(model.graph.initializer[1])
    np.testing.assert_array_equal(layer.arrays["weights"], stored * np.repeat(scales, 2, axis=1))
