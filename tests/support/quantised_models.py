"""Small models as ONNX Runtime's quantiser writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SHAPE = (1, 3, 12, 12)


def small_model(opset: int = 17) -> onnx.ModelProto:
    """A convolution with Relu, pooling, a depthwise one with Clip, a residual, a mean and a product."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, array: npt.ArrayLike) -> str:
        constants.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def node(op: str, *inputs: str, output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def conv(x: str, name: str, oc: int, ic: int, k: int, **attributes: Any) -> str:
        weights = constant(f"{name}_w", rng.standard_normal((oc, ic, k, k)) / (k * np.sqrt(ic)))
        bias = constant(f"{name}_b", rng.standard_normal(oc))
        return node("Conv", x, weights, bias, output=name, kernel_shape=(k, k), **attributes)

    x = node("Relu", conv("x", "first", 8, 3, 3, strides=(2, 2), pads=(1, 1, 1, 1)), output="first_relu")
    x = node("MaxPool", x, output="pooled", kernel_shape=(2, 2))
    y = node(
        "Clip",
        conv(x, "depthwise", 8, 1, 3, pads=(1, 1, 1, 1), group=8),
        constant("low", 0.0),
        constant("high", 1.5),
        output="clipped",
    )
    x = node("Add", x, conv(y, "pointwise", 8, 8, 1), output="added")
    x = node("Flatten", node("GlobalAveragePool", x, output="mean"), output="flat")
    weights, bias = constant("product_w", rng.standard_normal((8, 5))), constant("product_b", rng.standard_normal(5))
    node("Gemm", x, weights, bias, output="y")
    given, made = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, size) for n, size in (("x", SHAPE), ("y", (1, 5)))
    )
    graph = helper.make_graph(nodes, "small", [given], [made], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def inputs(count: int) -> Iterator[npt.NDArray[np.float32]]:
    for seed in range(count):
        yield np.random.default_rng(seed).standard_normal(SHAPE, np.float32)


class _Calibration:
    def __init__(self) -> None:
        self._left = inputs(4)

    def get_next(self) -> dict[str, Any] | None:
        x = next(self._left, None)
        return None if x is None else {"x": x}


#: All that the quantiser makes of types that networks have.
FORMATS = (
    *(
        f"{layout} {types}{channel}"
        for layout in ("QDQ", "QOperator")
        for types in ("u8 i8", "u8 u8", "i8 i8")
        for channel in ("", " channel")
    ),
    *("QDQ u8 i8 reduced", "QOperator u8 i8 channel reduced", "QDQ u8 i4 channel", "QDQ u16 i8", "QDQ i16 i8 channel"),
    *("dynamic u8", "dynamic i8", "dynamic i8 channel"),
)


def quantised(folder: Path, kind: str, opset: int = 17) -> Path:
    """The model as ``kind`` says: ``dynamic`` or a format, the types of activations, unless these are dynamic, and of
    weights, and whether per channel or with 7 bits, such as ``QDQ u8 i8 channel``, ``dynamic u8 reduced``.
    """
    from onnxruntime import quantization

    types = {dtype: quantization.QuantType[f"Q{word}"] for dtype, word in _TYPES.items()}
    source, path = folder / "small.onnx", folder / "quantised.onnx"
    onnx.save(small_model(opset), source)
    layout, *words = kind.split()
    *activations, weights = [word for word in words if word in types]
    how = {"per_channel": "channel" in words, "reduce_range": "reduced" in words, "weight_type": types[weights]}
    if layout == "dynamic":
        quantization.quantize_dynamic(source, path, **how)
        return path
    reader = type("Reader", (_Calibration, quantization.CalibrationDataReader), {})()
    layout_of, (activation,) = quantization.QuantFormat[layout], activations
    quantization.quantize_static(source, path, reader, quant_format=layout_of, activation_type=types[activation], **how)
    return path


_TYPES = {"u8": "UInt8", "i8": "Int8", "u16": "UInt16", "i16": "Int16", "i4": "Int4"}


def run(path: Path, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What ONNX Runtime computes, nothing fused."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    found: npt.NDArray[np.float32] = session.run(None, {"x": x})[0]
    return found
