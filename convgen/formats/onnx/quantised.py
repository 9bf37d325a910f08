"""Convolutions of 8-bit integers in an ONNX graph: QLinearConv, ConvInteger, and Conv and ConvTranspose between
DequantizeLinear and QuantizeLinear.

What they mean is in ``docs/quantised.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from ...errors import SpecError, UnsupportedError
from ...problem.activation import Activation
from ...problem.dtypes import RANGES, numpy_dtype
from ...problem.spec import ConvSpec
from .constants import ROOTS
from .fold import F64, Fold, Reader, attributes_of, enum_name
from .graph import Array, Scope, static
from .node import convolution_fields

#: ONNX's numbers of the types of 8-bit integers.
INTEGERS = {TensorProto.INT8: "i8", TensorProto.UINT8: "u8"}
#: Types that constant weights may have, and in which they are read.
WEIGHTS = {**INTEGERS, TensorProto.INT4: "i8", TensorProto.UINT4: "u8"}
#: How far a bias's scale may be from the product of those of src and weights, relatively: it is rounded.
_SAME_SCALE = 2.0**-20


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored: the names of its integers, of its scale and of its zero point.

    ``scale`` is empty where it is 1, ``zero`` where it is 0. ``axis`` is along which they lie, if there are several.
    """

    name: str
    scale: str = ""
    zero: str = ""
    axis: int = 1


def dequantised(scope: Scope, name: str) -> Stored | None:
    """What a value was before the DequantizeLinear that computes it; None where another node does, or where constants
    are scaled block by block: what these give are floats, which no layer of integers has.
    """
    index = scope.producers.get(name)
    node = scope.nodes[index] if index is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.domain not in ROOTS:
        return None
    if _is_blocked(node) and scope.constant(node.input[0]):
        return None
    return _stored(node, node.input[0])


def _is_blocked(node: NodeProto) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear node has a scale for each block."""
    return any(a.name == "block_size" and a.i for a in node.attribute)


def _stored(node: NodeProto, name: str) -> Stored:
    """The integers ``name`` of a QuantizeLinear or DequantizeLinear node."""
    attributes = {a.name: a.i for a in node.attribute}
    if _is_blocked(node):
        raise UnsupportedError(f"{node.op_type} {node.name!r}: scales of blocks are not supported")
    return Stored(name, node.input[1], node.input[2] if len(node.input) > 2 else "", attributes.get("axis", 1))


def is_quantised(scope: Scope, node: NodeProto) -> bool:
    """Whether a Conv or ConvTranspose node multiplies dequantised integers by constant ones."""
    found = [dequantised(scope, name) for name in node.input[:2]]
    src, weights = (scope.dtype(stored.name) if stored is not None else 0 for stored in found)
    return src in INTEGERS and weights in WEIGHTS and found[1] is not None and scope.constant(found[1].name)


def refuse_other_integers(scope: Scope, node: NodeProto, where: str) -> None:
    """Raise UnsupportedError where a Conv or ConvTranspose node multiplies dequantised numbers that no layer of
    integers has: ones of other types, and constants that are scaled block by block.
    """
    producers = [scope.producers.get(name) for name in node.input[:2]]
    found = [scope.nodes[index] for index in producers if index is not None]
    if len(found) < 2 or any(made.op_type != "DequantizeLinear" or made.domain not in ROOTS for made in found):
        return
    for what, made in zip(("src", "weights"), found, strict=True):
        name, dtype = made.input[0], scope.dtype(made.input[0])
        if dtype not in INTEGERS:
            known, other = ", ".join(INTEGERS.values()), enum_name(TensorProto.DataType, dtype)
            alone = "; in the whole model, as compile takes it, it is a layer of f32"
            raise UnsupportedError(f"{where}: {what} has the dtype of {name!r}, {other}; supported are {known}{alone}")
        if _is_blocked(made):
            raise UnsupportedError(f"{where}: {what} {name!r} have scales of blocks; one for each channel is supported")


class QuantisedFold(Fold):
    """A convolution of integers. What it stores is its src and dst; zeros around src, a Relu or a Clip are taken in.

    Attributes:
        stored: src, weights, dst where it has a scale, and the bias, whose scale is empty where it is in steps of the
            sums, or f32.
    """

    def __init__(self, reader: Reader, node: NodeProto, where: str) -> None:
        self.stored: dict[str, Stored] = {}
        self.dst_dtype = "i32"
        super().__init__(reader, node, where)

    # ---- what is stored ----

    def _operands(self, node: NodeProto) -> tuple[str, str, str]:
        getattr(self, f"_{node.op_type.lower()}")(node)
        bias = self.stored.get("bias")
        return self.stored["src"].name, self.stored["weights"].name, bias.name if bias else ""

    def _qlinearconv(self, node: NodeProto) -> None:
        if not 8 <= len(node.input) <= 9:
            raise SpecError("inputs", "8 or 9", len(node.input))
        x, x_scale, x_zero, weights, w_scale, w_zero, y_scale, y_zero, *bias = node.input
        self.stored = {"src": Stored(x, x_scale, x_zero), "weights": Stored(weights, w_scale, w_zero, 0)}
        self.stored["dst"] = Stored(node.output[0], y_scale, y_zero)
        self.dst_dtype = self._integer_type("dst", y_zero)
        if bias and bias[0]:
            self.stored["bias"] = Stored(bias[0])

    def _convinteger(self, node: NodeProto) -> None:
        zeros = [*node.input[2:], "", ""]
        self.stored = {"src": Stored(node.input[0], "", zeros[0]), "weights": Stored(node.input[1], "", zeros[1], 0)}

    def _conv(self, node: NodeProto) -> None:
        """Integers from DequantizeLinear; dst as QuantizeLinear stores it, if that is what follows."""
        for name, value in zip(("src", "weights"), node.input, strict=False):
            stored = dequantised(self.scope, value)
            assert stored is not None  # is_quantised
            self.stored[name] = stored
        if len(node.input) > 2 and node.input[2]:
            self.stored["bias"] = dequantised(self.scope, node.input[2]) or Stored(node.input[2])
            if not self.scope.constant(self.stored["bias"].name):
                raise UnsupportedError(f"{self.where}: bias {node.input[2]!r} is no constant; constants are supported")
        self.dst_dtype = "f32"

    _convtranspose = _conv

    def _integer_type(self, what: str, name: str) -> str:
        if (dtype := self.scope.dtype(name)) not in INTEGERS:
            found = enum_name(TensorProto.DataType, dtype)
            supported = ", ".join(INTEGERS.values())
            raise UnsupportedError(
                f"{self.where}: {what} has the dtype of {name!r}, {found}; supported are {supported}"
            )
        return INTEGERS[dtype]

    # ---- the spec ----

    def _convolution(self) -> ConvSpec:
        src, weights = self._integers_shape("src"), self._integers_shape("weights")
        bias = "bias" in self.stored
        fields = convolution_fields(self.node.op_type, attributes_of(self.node), src, weights, bias, self.where)
        spec = ConvSpec(**fields, dtype="i8", src_dtype=self._type("src"), dst_dtype=self.dst_dtype)
        if bias and (shape := self.scope.shape(self.stored["bias"].name)) != (spec.oc,):
            raise SpecError("bias", f"shape [{spec.oc}]", shape)
        dtype = self.scope.dtype(self.bias) if bias else 0
        if bias and self.node.op_type == "QLinearConv" and dtype != TensorProto.INT32:
            raise SpecError("bias", "dtype int32", enum_name(TensorProto.DataType, dtype))
        self.spec = spec
        for name in self.stored.keys() & {"src", "weights", "dst"}:
            self._check_quantisation(name, spec.oc if name == "weights" else 1)
        weights_dtype, has_zero = self._weights_type()
        has_zeros = {"src_zero": self._has_zero("src"), "weights_zero": has_zero, "dst_zero": self._has_zero("dst")}
        return spec.with_(weights_dtype=weights_dtype, **has_zeros)

    def _integers_shape(self, what: str) -> tuple[int, ...]:
        name = self.stored[what].name
        self._type(what)
        shape = self.scope.shape(name)
        return shape if static(shape) else self._unknown(what, name)

    def _type(self, what: str) -> str:
        if what == "weights" and (dtype := WEIGHTS.get(self.scope.dtype(self.stored[what].name))) is not None:
            return dtype
        return self._integer_type(what, self.stored[what].name)

    def _check_quantisation(self, what: str, most: int) -> None:
        """Raise unless scale and zero point are constants of one element, or of one for each output channel."""
        stored = self.stored[what]
        if stored.scale and not self.scope.constant(stored.scale):
            raise UnsupportedError(f"{self.where}: scale {stored.scale!r} is no constant; constants are supported")
        for kind, name in (("scale", stored.scale), ("zero point", stored.zero)):
            if not name or not self.scope.constant(name):
                continue
            values = self.scope.value(name)
            per_channel = self.spec.oc // self.spec.groups if self.spec.transposed else self.spec.oc
            if values.size not in (1, per_channel if most > 1 else 1):
                raise SpecError(f"{kind} {name!r}", f"{most} elements" if most > 1 else "one element", values.size)
            if values.size > 1 and stored.axis % (self.spec.rank + 2) != int(self.spec.transposed):
                expected = "scales and zero points along output channels"
                raise UnsupportedError(f"{self.where}: {kind} {name!r} is along axis {stored.axis}; {expected}")
            if kind == "scale" and not (np.isfinite(values).all() and (values > 0).all()):
                raise SpecError(f"scale {name!r}", "positive numbers", values.min())

    def _has_zero(self, what: str) -> bool:
        """Whether a tensor's zero point is another than 0, or not known."""
        zero = self.stored[what].zero if what in self.stored else ""
        return bool(zero) and not (self.scope.constant(zero) and not self._value(zero).any())

    def _value(self, name: str) -> Array:
        """The elements of a constant, integers of 4 bits as such of 8."""
        value, dtype = self.scope.value(name), WEIGHTS.get(self.scope.dtype(name))
        return value if dtype is None else value.astype(numpy_dtype(dtype), copy=False)

    def _weights_type(self) -> tuple[str, bool]:
        """How weights are stored, and whether with zero points: as i8 without, wherever that holds them."""
        dtype, name = self._type("weights"), self.stored["weights"].name
        has_zero = self._has_zero("weights")
        if not has_zero and dtype == "i8":
            return "i8", False
        zero = self.stored["weights"].zero
        if not self.scope.constant(name) or (zero and not self.scope.constant(zero)):
            return dtype, has_zero
        moved = self._centred()
        return ("i8", False) if _fits(moved, "i8") else (dtype, has_zero)

    def _centred(self) -> Array:
        """Weights less their zero points."""
        values = self._value(self.stored["weights"].name).astype(np.int32)
        zeros = self._by_channel("weights", "zero", 0)
        if zeros.any():
            by_channel = zeros.astype(np.int32)
            if self.spec.transposed:
                by_channel = by_channel[: self.spec.oc // self.spec.groups].reshape(1, -1, *(1,) * self.spec.rank)
            else:
                by_channel = by_channel.reshape(-1, *(1,) * (self.spec.rank + 1))
            values = values - by_channel
        return values

    def _by_channel(self, what: str, part: str, default: float) -> Array:
        """The scales or zero points of a tensor, one for each output channel."""
        name = getattr(self.stored[what], part) if what in self.stored else ""
        values = self._value(name).reshape(-1) if name else np.array([default])
        if self.spec.transposed and values.size > 1:
            values = np.tile(values, self.spec.groups)
        return np.broadcast_to(values, (self.spec.oc,))

    # ---- what surrounds it ----

    def _take_padding(self) -> None:
        if not self.spec.src_zero:  # else zeros are no padding
            super()._take_padding()

    def _src_shape(self) -> tuple[int, ...]:
        return (self.spec.n, self.spec.ic, *self.spec.in_spatial)

    def _take_what_follows(self) -> None:
        """Relu and Clip, the QuantizeLinear behind them, and Relu and Clip of the integers themselves."""
        low, high = -math.inf, math.inf
        while self._alone(self.dst) and self.dst_dtype != "i32":
            node = self.scope.nodes[next(iter(self.scope.users[self.dst]))]
            if node.domain not in ROOTS or node.input[0] != self.dst:
                break
            if node.op_type in ("Relu", "Clip"):
                if (bounds := self._bounds(node)) is None:
                    break
                low, high = max(low, bounds[0]), min(max(high, bounds[0]), bounds[1])
                low = min(low, high)
            elif node.op_type == "QuantizeLinear" and self.dst_dtype == "f32" and self._store(node):
                scale = np.float32(self.scope.value(self.stored["dst"].scale).reshape(()))
                low, high = self._in_steps(low, high, scale)
            else:
                break
            self.dst = node.output[0]
        self.spec = self.spec.with_(activation=clipped(low, high))

    def _bounds(self, node: NodeProto) -> tuple[float, float] | None:
        """What a Relu or Clip lets through, of integers less their zero point; None where that is not known."""
        bounds = (0.0, math.inf) if node.op_type == "Relu" else self._clip(node)
        if bounds is None or self.dst_dtype == "f32":
            return bounds
        if (zero := self.stored["dst"].zero) and not self.scope.constant(zero):
            return None
        at = int(self._by_channel("dst", "zero", 0)[0])
        return self._in_steps(bounds[0] - at, bounds[1] - at, np.float32(1))

    def _clip(self, node: NodeProto) -> tuple[float, float] | None:
        low, high = (self._bound(node, index) for index in (1, 2))
        return None if low is None or high is None or low > high else (float(low), float(high))

    def _store(self, node: NodeProto) -> bool:
        """Take in a QuantizeLinear; False where dst would not be of 8-bit integers with one scale that is known."""
        stored = _stored(node, node.output[0])
        dtype = self.scope.dtype(stored.name)
        if dtype not in INTEGERS or not self.scope.constant(stored.scale):
            return False
        values = self.scope.value(stored.scale)
        known = not stored.zero or self.scope.constant(stored.zero)
        if values.size != 1 or not known or not np.isfinite(values).all() or (values <= 0).any():
            return False
        self.stored["dst"], self.dst_dtype = stored, INTEGERS[dtype]
        self.spec = self.spec.with_(dst_dtype=self.dst_dtype, dst_zero=self._has_zero("dst"))
        return True

    def _in_steps(self, low: float, high: float, scale: np.float32) -> tuple[float, float]:
        """Bounds of numbers without their zero point, in steps of what is stored."""
        zero = int(self._by_channel("dst", "zero", 0)[0])
        op = Activation.parse(stored_activation(clipped(low, high), scale, zero, self.dst_dtype))
        least, most = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf)}.get(op.name, op.params)
        return least, most

    # ---- arrays ----

    def arrays(self) -> dict[str, Array]:
        """The spec's parameters; empty where one is given at run time, but for a ``src_zero`` that is not known."""
        spec = self.spec
        if self.reason([*self.parameters, *(stored.zero for what, stored in self.stored.items() if what != "src")]):
            return {}
        found: dict[str, Array] = {"weights": self._value(self.weights)}
        if spec.weights_dtype == "i8" and not spec.weights_zero:
            found["weights"] = self._centred().astype(np.int8)
        src, weights, dst = (
            self._by_channel(what, "scale", 1).astype(np.float32) for what in ("src", "weights", "dst")
        )
        if spec.bias:
            found["bias"] = self._bias(src, weights)
        if spec.dst_dtype != "i32":
            with np.errstate(over="ignore", under="ignore"):
                found["scale"] = src * weights / dst
        for what in ("src", "weights", "dst"):
            if f"{what}_zero" in spec.shapes and self.scope.constant(self.stored[what].zero):
                values = self._by_channel(what, "zero", 0)
                found[f"{what}_zero"] = np.array(values[: spec.shapes[f"{what}_zero"][0]])
        return found

    def unknown(self) -> str:
        return self.reason([*self.parameters, *(stored.zero for stored in self.stored.values())])

    def _bias(self, src: Array, weights: Array) -> Array:
        """The bias as i32, in steps of the products' scale; rounded to them where it is stored otherwise."""
        stored, steps = self.stored["bias"], src.astype(np.float64) * weights.astype(np.float64)
        values = self.scope.value(stored.name)
        if self._has_zero("bias"):
            raise UnsupportedError(f"{self.where}: the bias has a zero point; none is supported")
        own: F64 = self._by_channel("bias", "scale", 1).astype(np.float64) if stored.scale else np.ones(self.spec.oc)
        if values.dtype == np.int32 and (not stored.scale or (abs(own - steps) <= _SAME_SCALE * steps).all()):
            return values
        rounded = np.rint(values.astype(np.float64) * own / steps)
        if not _fits(rounded, "i32"):
            raise UnsupportedError(f"{self.where}: bias leaves the range of i32 in steps of the products' scale")
        return rounded.astype(np.int32)


def _fits(values: Array, dtype: str) -> bool:
    low, high = RANGES.get(dtype, (-(2**31), 2**31 - 1))
    return not values.size or bool(values.min() >= low and values.max() <= high)


def stored_activation(activation: str, scale: np.float32, zero: int, dtype: str) -> str:
    """Relu, a clip or none before QuantizeLinear, in steps of what it stores: bounds before rounding are bounds after
    it, and none where the type's own are as narrow.
    """
    op = Activation.parse(activation)
    bounds = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf)}.get(op.name, op.params)
    with np.errstate(over="ignore"):
        low, high = (b if math.isinf(b) else float(np.rint(np.float32(b) / scale)) for b in bounds)
    least, most = (bound - zero for bound in RANGES[dtype])
    return clipped(-math.inf if low <= least else low, math.inf if high >= most else high)


def clipped(low: float, high: float) -> str:
    """The activation that bounds are."""
    if math.isinf(high):
        return "none" if math.isinf(low) else "relu" if low == 0 else f"clip({low!r},inf)"
    return f"clip({low!r},{high!r})"
