"""Layers of 8-bit integers in ONNX's own operators: QLinearConv where ONNX Runtime has it for their types, else the
formula that defines them, from ConvInteger on.

Like all of :mod:`convgen.check.onnx_model` it shares nothing with :mod:`convgen.lowering.compute`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from ..problem.dtypes import RANGES, numpy_dtype
from ..problem.spec import MOST_SUM_SCALE, SUM, ConvSpec

#: Storage type -> ONNX's number for it.
ELEMENTS = {
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "i8": TensorProto.INT8,
    "u8": TensorProto.UINT8,
    "i32": TensorProto.INT32,
}
Emit = Callable[..., str]  # (operator, *inputs, output=name, **attributes) -> name
Constant = Callable[[str, npt.ArrayLike], str]  # (name, value) -> name


def conv_attributes(spec: ConvSpec) -> dict[str, Any]:
    """The attributes of a convolution node."""
    begins, ends = (list(side) for side in zip(*spec.padding, strict=True))
    return {
        "kernel_shape": spec.kernel,
        "strides": spec.stride,
        "dilations": spec.dilation,
        "pads": begins + ends,
        "group": spec.groups,
    }


def quantised(spec: ConvSpec, src: str, emit: Emit, constant: Constant) -> str:
    """dst in channels-first order, of the parameters by their names and ``src`` in that order; with a residual, the
    product that it is added to (:func:`sum_quantised`).

    ONNX Runtime's QLinearConv takes src and dst of one type, weights of u8 with src of u8 only, and one zero point for
    all weights.
    """
    is_of_types = spec.src_dtype == spec.dst_dtype and (spec.src_dtype, spec.weights_dtype) != ("i8", "u8")
    whole = is_of_types and not spec.transposed and not spec.weights_zero and not spec.residual
    if whole and (spec.activation == "none" or (spec.activation == "relu" and spec.is_plainly_quantised)):
        x = _qlinear(spec, src, emit, constant)
        return emit("Relu", x, output="act") if spec.activation == "relu" else x
    sums = _sums(spec, src, emit, constant)
    if spec.bias:
        sums = emit("Add", sums, _by_channel(spec, "bias", emit, constant), output="biased")
    if spec.residual:
        plain = spec.with_(residual=False, residual_dtype="", activation="none")
        return _requantised(plain, sums, _addend_zero("product", spec.dst_dtype, emit, constant), emit, constant)
    zero = _zero(spec, "dst", emit, constant) if spec.dst_dtype in RANGES else ""
    return sums if spec.dst_dtype == "i32" else _requantised(spec, sums, zero, emit, constant)


def _zero(spec: ConvSpec, tensor: str, emit: Emit, constant: Constant) -> str:
    """A tensor's zero point as a scalar; 0 where it has none."""
    if not getattr(spec, f"{tensor}_zero"):
        return constant(f"{tensor}_is_at", np.zeros((), numpy_dtype(getattr(spec, f"{tensor}_dtype"))))
    axes = constant(f"{tensor}_axes", np.array([], np.int64))
    return emit("Reshape", f"{tensor}_zero", axes, output=f"{tensor}_is_at")


def _qlinear(spec: ConvSpec, src: str, emit: Emit, constant: Constant) -> str:
    """QLinearConv of scales 1 but for the weights', one for each channel."""
    one = constant("one", np.ones((), np.float32))
    src_zero, dst_zero = (_zero(spec, tensor, emit, constant) for tensor in ("src", "dst"))
    zeros = constant("zeros", np.zeros(spec.oc, numpy_dtype(spec.weights_dtype)))
    operands = [src, one, src_zero, "weights", "scale", zeros, one, dst_zero] + ["bias"] * spec.bias
    return emit("QLinearConv", *operands, output="conv", **conv_attributes(spec))


def _by_channel(spec: ConvSpec, parameter: str, emit: Emit, constant: Constant) -> str:
    """A vector of output channels, to be broadcast to dst."""
    shape = constant(f"{parameter}_shape", np.array([spec.oc] + [1] * spec.rank, np.int64))
    return emit("Reshape", parameter, shape, output=f"{parameter}_nchw")


def _sums(spec: ConvSpec, src: str, emit: Emit, constant: Constant) -> str:
    """The sums of products, i32. ConvInteger takes src as u8: of i8 it is moved by 128, its zero point too.

    With zero points of weights, ``w``: ``sum((x - z)(y - w)) = sum((x - z) y) - w sum(x - z)``.
    """
    zero, weights, attributes = _zero(spec, "src", emit, constant), "weights", conv_attributes(spec)
    if spec.src_dtype == "i8":
        src, zero = (_moved(name, emit, constant) for name in (src, zero))
    if spec.transposed:
        src, weights, attributes = _stuffed(spec, src, zero, emit, constant)
    sums = emit("ConvInteger", src, weights, zero, output="sums", **attributes)
    if spec.weights_zero:
        shape = (spec.oc, spec.ic // spec.groups, *spec.kernel)
        ones = constant("ones", np.ones(shape, numpy_dtype(spec.weights_dtype)))
        total = emit("ConvInteger", src, ones, zero, output="totals", **attributes)
        centres = emit("Cast", "weights_zero", output="weights_zero_i32", to=TensorProto.INT32)
        shaped = _by_channel(spec, centres, emit, constant)
        sums = emit("Sub", sums, emit("Mul", total, shaped, output="share"), output="centred")
    return sums


def _moved(name: str, emit: Emit, constant: Constant) -> str:
    """An i8 tensor plus 128, as u8."""
    wide = emit("Cast", name, output=f"{name}_i32", to=TensorProto.INT32)
    added = emit("Add", wide, constant(f"{name}_128", np.array(128, np.int32)), output=f"{name}_plus_128")
    return emit("Cast", added, output=f"{name}_u8", to=TensorProto.UINT8)


def _stuffed(spec: ConvSpec, src: str, zero: str, emit: Emit, constant: Constant) -> tuple[str, str, dict[str, Any]]:
    """A transposed convolution as one of stride 1: src with zeros between its pixels, weights with channels exchanged
    and mirrored, and attributes.
    """
    rank, groups = spec.rank, spec.groups

    def reshaped(name: str, shape: list[int], output: str) -> str:
        return emit("Reshape", name, constant(f"{output}_shape", np.array(shape, np.int64)), output=output)

    def padded(name: str, begins: list[int], ends: list[int], output: str) -> str:
        pads = constant(f"{output}_pads", np.array(begins + ends, np.int64))
        return emit("Pad", name, pads, zero, output=output)

    parted = reshaped(src, [spec.n, spec.ic, *(size for s in spec.in_spatial for size in (s, 1))], "parted")
    gaps = [gap for stride in spec.stride for gap in (0, stride - 1)]
    filled = padded(parted, [0] * (2 + 2 * rank), [0, 0, *gaps], "filled")
    sizes = [size * stride for size, stride in zip(spec.in_spatial, spec.stride, strict=True)]
    spread = reshaped(filled, [spec.n, spec.ic, *sizes], "spread")
    axes = list(zip(spec.window, spec.padding, spec.stride, spec.output_padding, strict=True))
    before = [window - 1 - begin for window, (begin, _), _, _ in axes]
    after = [window - 1 - end + extra - (stride - 1) for window, (_, end), stride, extra in axes]
    src = padded(spread, [0, 0, *before], [0, 0, *after], "stuffed")

    ic, oc = spec.ic // groups, spec.oc // groups
    grouped = reshaped("weights", [groups, ic, oc, *spec.kernel], "grouped")
    turned = emit("Transpose", grouped, output="turned", perm=(0, 2, 1, *range(3, 3 + rank)))
    joined = reshaped(turned, [spec.oc, ic, *spec.kernel], "joined")
    ends = {
        "starts": [-1] * rank,
        "stops": [np.iinfo(np.int64).min] * rank,
        "axes": list(range(2, rank + 2)),
        "steps": [-1] * rank,
    }
    bounds = [constant(f"mirror_{name}", np.array(value, np.int64)) for name, value in ends.items()]
    mirrored = emit("Slice", joined, *bounds, output="mirrored")
    ones, none = [1] * rank, [0] * (2 * rank)
    attributes = conv_attributes(spec) | {"strides": ones, "pads": none}
    return src, mirrored, attributes


def _activated(spec: ConvSpec, value: str, emit: Emit, constant: Constant) -> str:
    if spec.activation_op.name == "relu":
        return emit("Relu", value, output="act")
    if spec.activation_op.name == "none":
        return value
    words = zip(("min", "max"), spec.activation_op.params, strict=True)
    bounds = [constant(f"clip_{word}", np.array(bound, np.float32)) for word, bound in words]
    return emit("Clip", value, *bounds, output="act")


def _requantised(spec: ConvSpec, sums: str, zero: str, emit: Emit, constant: Constant) -> str:
    """f32 times the scale, the activation, and QuantizeLinear of scale 1, which rounds, adds and saturates."""
    value = emit("Cast", sums, output="sums_f32", to=TensorProto.FLOAT)
    value = emit("Mul", value, _by_channel(spec, "scale", emit, constant), output="scaled")
    if spec.activation != "none" and spec.dst_dtype != "f32":  # NaN is less than every number
        least = constant("least", np.array(-512, np.float32))
        value = emit("Where", emit("IsNaN", value, output="is_nan"), least, value, output="ordered")
    value = _activated(spec, value, emit, constant)
    if spec.dst_dtype == "f32":
        return value
    one = constant("one", np.ones((), np.float32))
    return emit("QuantizeLinear", value, one, zero, output="quantised")


def _addend(name: str, emit: Emit, constant: Constant) -> str:
    """A number of the parameter ``sum``, a scalar."""
    return emit("Gather", "sum", constant(f"{name}_at", np.array(SUM.index(name))), output=name)


def _addend_zero(tensor: str, dtype: str, emit: Emit, constant: Constant) -> str:
    zero = _addend(f"{tensor}_zero", emit, constant)
    return emit("Cast", zero, output=f"{tensor}_is_at", to=ELEMENTS[dtype])


def sum_quantised(spec: ConvSpec, product: str, residual: str, emit: Emit, constant: Constant) -> str:
    """What QLinearAdd is documented to be, of the ``product`` that is stored and the residual; dst's scale is 1."""
    residual_zero = _addend_zero("residual", spec.residual_dtype, emit, constant)
    bounds = [
        constant(f"{word}_scale", np.array(bound, np.float32))
        for word, bound in (("least", -MOST_SUM_SCALE), ("most", MOST_SUM_SCALE))
    ]

    def scale(tensor: str) -> str:
        return emit("Clip", _addend(f"{tensor}_scale", emit, constant), *bounds, output=f"{tensor}_step")

    operands = [
        emit("DequantizeLinear", name, scale(tensor), zero, output=f"{tensor}_f32")
        for tensor, name, zero in (("product", product, "product_is_at"), ("residual", residual, residual_zero))
    ]
    steps = _activated(spec, emit("Add", *operands, output="added"), emit, constant)
    one = constant("step", np.ones((), np.float32))
    return emit("QuantizeLinear", steps, one, _zero(spec, "dst", emit, constant), output="stored")
