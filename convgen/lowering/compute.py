"""What a convolution computes, as TVM tensor expressions: the one readable definition.

Every rank, layout and epilogue; direct and transposed. Schedules share :class:`Operands` (the
tensors at the user's boundary, addressed as ``(n, channel, spatial)`` whatever their layouts) and
:func:`epilogue`; the `reference` schedule lowers :func:`convolution` as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..deferred import te, tirx
from ..problem.activation import Activation
from ..problem.dtypes import RANGES
from ..problem.spec import ConvSpec

#: TVM's names of what sums are kept in, and of the storage types. bf16 is moved as bits: TVM would
#: legalise it anew in every expression.
ACCUMULATOR = "float32"
STORAGE = {"f32": "float32", "f16": "float16", "bf16": "uint16", "i8": "int8", "u8": "uint8", "i32": "int32"}
STORAGE |= {"i64": "int64", "bool": "uint8"}  # 0 or 1; true is whatever is not 0
#: What exact sums of integers are kept in.
INTEGER = "int32"
#: Added to it, a number below 2**22 is rounded to a whole one, ties to even, which the lowest bits of the sum hold.
SHIFT = 1.5 * 2**23

#: TVM's name of a type -> the storage type.
STORED = {tvm: name for name, tvm in STORAGE.items()}

Expr = Any  # a TVM expression; TVM's own Python classes for them are untyped
Index = Sequence[Expr]


def ceildiv(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """``a`` rounded up to a multiple of ``b``."""
    return ceildiv(a, b) * b


def flat(index: Index, shape: Sequence[int]) -> Expr:
    """The row-major position of ``index`` in ``shape``."""
    position: Expr = 0
    for i, size in zip(index, shape, strict=True):
        position = position * size + i
    return position


def unflat(position: Expr, shape: Sequence[int]) -> list[Expr]:
    """The inverse of :func:`flat`: the index of an element in ``shape`` from its row-major position."""
    index: list[Expr] = []
    for size in reversed(shape):
        index.insert(0, tirx.floormod(position, size))
        position = tirx.floordiv(position, size)
    return index


def of_lanes(dtype: str, lanes: int) -> str:
    """TVM's name of a vector type, or of the scalar type where there is one lane."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def widen(value: Expr, dtype: str, lanes: int = 1) -> Expr:
    """A stored value of ``dtype`` as f32; an i32 stays one."""
    if dtype == "i32":
        return value
    if dtype == "bf16":  # the upper half of an f32
        bits = value.astype(of_lanes("uint32", lanes)) << tirx.const(16, "uint32")
        return tirx.reinterpret(of_lanes("float32", lanes), bits)
    return value.astype(of_lanes(ACCUMULATOR, lanes))


def narrow(value: Expr, dtype: str, lanes: int = 1) -> Expr:
    """An f32 value as it is stored in ``dtype``: rounded to nearest, ties to even; to integers, saturated too."""
    if dtype in RANGES:
        value = quantised_bits(value, dtype, lanes=lanes)
    elif dtype == "bf16":
        value = _bf16_bits(value, lanes)
    return value.astype(of_lanes(STORAGE[dtype], lanes))


def _bf16_bits(value: Expr, lanes: int) -> Expr:
    """The bits of bf16 as the lowest ones of integers of 32."""

    def const(number: int) -> Expr:
        return tirx.const(number, "uint32")

    f32 = tirx.Var("f32", of_lanes(ACCUMULATOR, lanes))
    bits = tirx.reinterpret(of_lanes("uint32", lanes), f32)
    rounded = bits + const(0x7FFF) + ((bits >> const(16)) & const(1))
    # Keep a NaN, as a quiet one. Not by x != x: the simplifier would take that for false.
    kept = tirx.Select(tirx.isnan(f32), bits | const(0x400000), rounded)
    return tirx.Let(f32, value, kept >> const(16))


def nearest_bf16(value: Expr) -> Expr:
    """f32 as bf16, by what TVM makes vectors of: neither a binding nor a test for NaN."""

    def const(number: int) -> Expr:
        return tirx.const(number, "uint32")

    bits = tirx.reinterpret("uint32", value)
    nearest = bits + const(0x7FFF) + ((bits >> const(16)) & const(1))
    is_nan = (bits & const(0x7FFFFFFF)) > const(0x7F800000)
    kept = tirx.Select(is_nan, bits | const(0x400000), nearest)  # as a quiet one
    return (kept >> const(16)).astype(STORAGE["bf16"])


def rounded(value: Expr, dtype: str) -> Expr:
    """An f32 value as one of f16 or bf16 has it, as f32; of f32 itself."""
    if dtype == "f16":
        return value.astype(STORAGE[dtype]).astype(ACCUMULATOR)
    return widen(nearest_bf16(value), dtype) if dtype == "bf16" else value


def quantise(value: Expr, dtype: str, zero: Expr | None = None, lanes: int = 1) -> Expr:
    """``saturate(round(value) + zero)`` of an f32 value: rounded to nearest, ties to even.

    Args:
        zero: the zero point, an i32; with lanes, a vector of them.
    """
    return quantised_bits(value, dtype, zero, lanes).astype(of_lanes(STORAGE[dtype], lanes))


def quantised_bits(
    value: Expr, dtype: str, zero: Expr | None = None, lanes: int = 1, within: tuple[float, float] | None = None
) -> Expr:
    """The same as the lowest bits of integers of 32 bits. ``within``: least and largest value; of NaN the least."""
    offset = None if zero is None else zero.astype(of_lanes(ACCUMULATOR, lanes))
    whole = whole_bits(value, dtype, offset, lanes, within)
    return whole if zero is None else whole + zero


def whole_bits(
    value: Expr, dtype: str, offset: Expr | None, lanes: int, within: tuple[float, float] | None = None
) -> Expr:
    """The same before the zero point, here f32, is added."""
    bounded = saturated(value, dtype, offset, lanes, within)
    return tirx.reinterpret(of_lanes(INTEGER, lanes), bounded + tirx.const(SHIFT, ACCUMULATOR))


def saturated(
    value: Expr, dtype: str, offset: Expr | None, lanes: int, within: tuple[float, float] | None = None
) -> Expr:
    """The same before it is rounded: bounds are whole numbers."""
    low, high = (tirx.const(bound, ACCUMULATOR) for bound in RANGES[dtype])
    if offset is not None:  # bounds of the rounded number: saturating before rounding is the same
        low, high = low - offset, high - offset
    if within is not None:

        def nearest(bound: float, end: Expr) -> Expr:
            inside = tirx.max(low, tirx.min(high, tirx.const(bound, ACCUMULATOR)))
            return inside if math.isfinite(bound) else end

        low, high = nearest(within[0], low), nearest(within[1], high)
        least = low if lanes == 1 or low.ty.dtype.lanes == lanes else tirx.Broadcast(low, lanes)
        number = tirx.Var("number", of_lanes(ACCUMULATOR, lanes))
        # In this order a single instruction, whose answer to NaN is its second operand.
        return tirx.Let(number, value, tirx.min(high, tirx.Select(number > least, number, least)))
    return tirx.max(low, tirx.min(high, value))


def less(value: Expr, zero: Expr | None) -> Expr:
    """A stored integer without its zero point, where there is one."""
    return value if zero is None else value - zero


class Operand:
    """A tensor at the user's boundary. Its elements read as f32, however they are stored; i32 as itself, and i8 and u8
    as i32 where ``integers``.
    """

    def __init__(self, name: str, shape: Sequence[int], dtype: str, storage: str, integers: bool = False) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self._integers = integers and dtype in RANGES
        self.tensor = te.placeholder(shape, storage, name)

    def place(self, index: Index) -> tuple[Expr, ...]:
        """Where an element lies in the tensor."""
        return tuple(index)

    def __getitem__(self, index: Any) -> Expr:
        value = self.tensor(*self.place(index if isinstance(index, tuple) else (index,)))
        if self._integers:
            return value.astype(INTEGER)
        return value.astype(ACCUMULATOR) if self.tensor.dtype == "bfloat16" else widen(value, self.dtype)


class Mirrored(Operand):
    """Weights that are stored as those of the layer whose gradient of src this is, read as a convolution's own:
    ``[oc, ic/groups, *kernel]``.
    """

    def __init__(self, spec: ConvSpec, storage: str) -> None:
        super().__init__("weights", spec.shapes["weights"], spec.weights_dtype, storage)
        self._spec, self.shape = spec, spec.weights_shape

    def place(self, index: Index) -> tuple[Expr, ...]:
        spec, (o, c, *taps) = self._spec, index
        own, group = spec.ic // spec.groups, spec.oc // spec.groups
        return (o // group * own + c, o % group, *(k - 1 - t for k, t in zip(spec.kernel, taps, strict=True)))


class Operands:
    """A spec's tensors, those it has; the others are None.

    Args:
        native: they are of TVM's own type for bf16: code generators that have one may use it.
        integers: elements of i8 and u8 read as i32, of which sums are exact however long they are.
    """

    def __init__(self, spec: ConvSpec, *, native: bool = False, integers: bool = False) -> None:
        self.spec = spec
        dtypes = spec.dtypes

        def operand(name: str) -> Operand:
            storage = "bfloat16" if native and dtypes[name] == "bf16" else STORAGE[dtypes[name]]
            if name == "weights" and spec.mirrored:
                return Mirrored(spec, storage)
            return Operand(name, spec.shapes[name], dtypes[name], storage, integers)

        self.src = operand("src")
        self.residual = operand("residual") if "residual" in spec.shapes else None
        #: What ``pack`` takes, in the order of :data:`~convgen.problem.spec.PARAMETERS`.
        self.parameters = [operand(name) for name in spec.parameters]

    @property
    def weights(self) -> Operand:
        """The first of the parameters; a gradient of weights has none."""
        return self.parameters[0]

    def order(self, n: Expr, channel: Expr, spatial: Index) -> tuple[Expr, ...]:
        """``(n, channel, spatial)`` as an index of src; of dst too where both have one layout."""
        return self.spec.src_blocks.order(n, channel, spatial)

    def logical(self, index: Index) -> tuple[Expr, Expr, tuple[Expr, ...]]:
        """The inverse of :meth:`order`."""
        return self.spec.src_blocks.logical(index)

    def dst_order(self, n: Expr, channel: Expr, spatial: Index) -> tuple[Expr, ...]:
        """``(n, channel, spatial)`` as an index of dst and residual."""
        return self.spec.dst_blocks.order(n, channel, spatial)

    def dst_logical(self, index: Index) -> tuple[Expr, Expr, tuple[Expr, ...]]:
        """The inverse of :meth:`dst_order`."""
        return self.spec.dst_blocks.logical(index)

    def zero(self, name: str) -> Operand:
        """The zero point of a tensor that has one."""
        return next(parameter for parameter in self.parameters if parameter.name == f"{name}_zero")

    def pack(self, *packed: te.Tensor) -> list[te.Tensor]:
        """Arguments of the pack function."""
        return [*(p.tensor for p in self.parameters), *packed]

    def main(self, packed: Sequence[te.Tensor], dst: te.Tensor) -> list[te.Tensor]:
        """Arguments of the main function."""
        return [o.tensor for o in (self.src, self.residual) if o is not None] + [*packed, dst]

    def per_channel(self, vectors: Sequence[te.Tensor], channel: Expr) -> dict[str, Expr]:
        """What :func:`epilogue` takes of a channel, from what is packed of the parameters but weights."""
        names = [parameter.name for parameter in self.parameters[1:]]
        return {name: vector[channel] for name, vector in zip(names, vectors, strict=True)}

    def read_src(
        self, n: Expr, channel: Expr, spatial: Index, *, always: bool = False, zero: Expr | None = None
    ) -> Expr:
        """src there less its zero point, 0 outside it; checked only where the spec has padding, or ``always``."""
        sizes = self.spec.src_spatial
        inside = [c for i, size in zip(spatial, sizes, strict=True) for c in (i >= 0, i < size)]
        value = less(self.src[self.order(n, channel, spatial)], zero)
        if not always and not any(b or e for b, e in self.spec.padding):
            return value
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, value.ty.dtype))

    def store(self, value: Callable[[Expr, Expr, tuple[Expr, ...]], Expr], *, stored: bool = False) -> te.Tensor:
        """dst in its layout: ``value(n, channel, spatial)``, epilogue included; f32, or as it is ``stored``."""

        def element(*index: Expr) -> Expr:
            computed = value(*self.dst_logical(index))
            return computed if stored else narrow(computed, self.spec.dtype)

        return te.compute(self.spec.dst_shape, element, name="dst")


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """``c0 + c1 x + c2 x**2 + …`` by Horner's rule."""
    *lower, value = (tirx.const(c, ACCUMULATOR) for c in coefficients)
    for c in reversed(lower):
        value = value * x + c
    return value


def _exponential(x: Expr) -> tuple[Expr, Expr]:
    """``(series, power)`` with ``exp(x) - 1 = series * power + (power - 1)``, for ``x`` from -88 to 89.

    ``x = n ln 2 + r`` with ``|r| <= ln 2 / 2``; the series is of ``exp(r) - 1``, the power ``2**n``: 0 at
    ``n = -127``, infinite at 128.

    Coefficients: least largest relative error of ``exp(r) - 1`` by reweighted least squares in float64,
    rounded to f32 one after the other, those left fitted anew: 2**-26, of ``exp(r)`` 2**-27.
    """

    def const(value: float) -> Expr:
        return tirx.const(value, ACCUMULATOR)

    lanes = x.ty.dtype.lanes
    # Added to 1.5 * 2**23 a number is rounded to a whole one, which the lowest bits hold. As an integer in
    # between, or the simplifier would take (a + b) - b for a.
    shift = const(1.5 * 2**23 + 127)
    bits = tirx.reinterpret(of_lanes("int32", lanes), x * const(1 / math.log(2)) + shift)
    n = tirx.reinterpret(of_lanes(ACCUMULATOR, lanes), bits) - shift
    r = x - n * const(0.693359375) - n * const(math.log(2) - 0.693359375)  # the first has 9 bits: exact
    series = _polynomial(r, (1, 0.49999997, 0.16666546, 0.04166744, 0.008366256, 0.001387032)) * r
    return series, tirx.reinterpret(of_lanes(ACCUMULATOR, lanes), bits << tirx.const(23, "int32"))


def _odd(x: Expr, largest: float, numerator: Sequence[float], denominator: Sequence[float], limit: float) -> Expr:
    """An odd function that saturates: ``x`` times a quotient of polynomials of ``x**2``, within ``±limit``.

    The numerator starts with 1. Beyond ``largest`` the quotient stays, and the limit takes over. Coefficients:
    least largest error by reweighted least squares in float64, rounded to f32 as in :func:`_exponential`.
    """

    def const(value: float) -> Expr:
        return tirx.const(value, ACCUMULATOR)

    square = tirx.min(const(largest * largest), x * x)
    value = x + x * square * _polynomial(square, numerator[1:])
    return tirx.max(const(-limit), tirx.min(const(limit), value / _polynomial(square, denominator)))


def _tanh(x: Expr) -> Expr:
    """Relative error of the quotient 2**-25."""
    numerator = (1, 0.13382743, 0.0034975365, 2.0637422e-05, 1.3386597e-08)
    return _odd(x, 9.02, numerator, (1, 0.46716064, 0.02588463, 0.00032886624, 7.7911994e-07), 1)


def _half_erf(x: Expr) -> Expr:
    """``erf(x / sqrt(2)) / 2``: the normal distribution less a half. Absolute error of the quotient 2**-27."""
    numerator = (1, 0.08432457, 0.01169432, 0.0004181272, 1.5923184e-05, 5.7678356e-08)
    denominator = (2.5066285, 0.62914014, 0.07150739, 0.0046950164, 0.00018316589, 3.0207673e-06)
    return _odd(x, 5.46, numerator, denominator, 0.5)


def exponential(x: Expr) -> Expr:
    """``exp(x)``; infinite from 89 on, and 0 below -88."""
    clipped = tirx.max(tirx.const(-88, ACCUMULATOR), tirx.min(tirx.const(89, ACCUMULATOR), x))
    series, power = _exponential(clipped)
    return (series + tirx.const(1, ACCUMULATOR)) * power


def erf(x: Expr) -> Expr:
    """The error function, within 2**-26 of it."""
    return tirx.const(2, ACCUMULATOR) * _half_erf(x * tirx.const(math.sqrt(2), ACCUMULATOR))


def activate(op: Activation, x: Expr, slope: Expr | None = None) -> Expr:
    """The activation of ``x``. The order of operands in min and max lets NaN through.

    exp, tanh and erf are written out: what TVM has for them calls the C library, an element at a time.
    Largest errors found among every 101st float, in units in the last place: elu 1.5, sigmoid and silu 2.4
    (to -80), mish 4.2, tanh 4.6, without FMA 6.4; gelu and gelu_tanh, absolute, 2.9 * 2**-24 * (1 + |x|).
    """

    def const(value: float) -> Expr:
        return tirx.const(value, ACCUMULATOR)

    def clip(value: Expr, low: float, high: float) -> Expr:
        if low > -math.inf:
            value = tirx.max(const(low), value)
        return tirx.min(const(high), value) if high < math.inf else value

    def plus_exp(value: Expr) -> Expr:
        """``1 + exp(value)``, for values from -88 to 89; infinite at the end."""
        series, power = _exponential(value)
        return (series + one) * power + one

    zero, one, p = const(0), const(1), op.params
    match op.name:
        case "none":
            return x
        case "relu":
            return tirx.max(zero, x)
        case "leaky_relu":
            return tirx.Select(x < zero, x * const(p[0]), x)
        case "prelu":
            return tirx.Select(x < zero, x * slope, x)
        case "clip":
            return clip(x, *p)
        case "sigmoid":
            return one / plus_exp(clip(-x, -88, 89))
        case "tanh":
            return _tanh(x)
        case "silu":
            return x / plus_exp(clip(-x, -88, 89))
        case "mish":  # x tanh(log(1 + e^x)), where (1 + e^x)^2 - 1 = n; from e^20 on the factor is 1
            series, power = _exponential(clip(x, -88, 20))
            e = (series + one) * power
            n = e * (e + const(2))
            return x * (n / (n + const(2)))
        case "hardswish":
            return x * clip(x * const(1 / 6) + const(0.5), 0, 1)
        case "hardsigmoid":
            return clip(x * const(p[0]) + const(p[1]), 0, 1)
        case "elu":
            series, power = _exponential(clip(x, -88, math.inf))
            return tirx.Select(x < zero, const(p[0]) * (series * power + (power - one)), x)
        case "gelu":
            return x * (_half_erf(x) + const(0.5))
        case "gelu_tanh":
            k = -2 * math.sqrt(2 / math.pi)
            return x / plus_exp(clip(x * (x * x * const(0.044715 * k) + const(k)), -88, 89))
    raise AssertionError(f"activation {op.name} has no expression")


def epilogue(
    spec: ConvSpec,
    value: Expr,
    *,
    bias: Expr | None = None,
    residual: Expr | None = None,
    slope: Expr | None = None,
    scale: Expr | None = None,
    lanes: int = 1,
) -> Expr:
    """``activation(value + bias + residual)`` as f32; what the spec lacks is None.

    With a scale, ``activation((value + bias) * scale)``: of i8, whose sums are added to the bias as i32. NaN is then
    less than every integer, as ONNX Runtime has it.
    """
    if scale is not None:
        value = value.astype(of_lanes(INTEGER, lanes))
    for term in (bias, residual):
        if term is not None:
            value = value + term
    if scale is not None:
        value = value.astype(of_lanes(ACCUMULATOR, lanes)) * scale
        if spec.dst_dtype in RANGES:
            scaled = tirx.Var("scaled", of_lanes(ACCUMULATOR, lanes))
            smallest = tirx.const(RANGES[spec.dst_dtype][0] - 255 * spec.dst_zero, ACCUMULATOR)  # less a zero point
            number = smallest if lanes == 1 else tirx.Broadcast(smallest, lanes)
            value = tirx.Let(scaled, value, tirx.Select(tirx.isnan(scaled), number, scaled))
    return activate(spec.activation_op, value, slope)


def copied(parameter: Operand, channels: int = 0) -> te.Tensor:
    """A vector packed as it is, in the type its elements read as; with zeros up to ``channels`` elements."""
    name = f"{parameter.name}_packed"
    if channels <= parameter.shape[0]:
        return te.compute(parameter.shape, lambda *i: parameter[i], name=name)

    def value(o: Expr) -> Expr:
        read = parameter[o]
        return tirx.if_then_else(o < parameter.shape[0], read, tirx.const(0, read.ty.dtype))

    return te.compute((channels,), value, name=name)


def row_times(matrix: Sequence[Sequence[Any]], position: Expr, read: Callable[[int], Expr]) -> Expr:
    """Row ``position`` of a constant matrix times ``read(0), read(1), …``; folds where the position is known."""
    zero = tirx.const(0, ACCUMULATOR)
    values = [
        sum((tirx.const(float(c), ACCUMULATOR) * read(k) for k, c in enumerate(row) if c), zero) for row in matrix
    ]
    chosen = values[-1]
    for index in range(len(values) - 2, -1, -1):
        chosen = tirx.Select(position == index, values[index], chosen)
    return chosen


def convolution(
    spec: ConvSpec,
    ops: Operands,
    weights: te.Tensor,
    src_zero: te.Tensor | None = None,
    weights_zero: te.Tensor | None = None,
) -> te.Tensor:
    """Sums of products ``[n, channels, *spatial]`` of dst, whatever the layout; no bias yet. Not of direction weights.

    Zero points are packed as they are, i32, and taken off what is read; padding is 0 after that.

    Transposed convolution is the convolution of the zero-stuffed input: an output pixel takes the
    taps whose distance to it is a whole number of strides. The gradient of src is a convolution's where the layer is
    transposed, and the other way round.
    """
    rank, reads, writes = spec.rank, spec.src_blocks.channels // spec.groups, spec.dst_blocks.channels // spec.groups
    c = te.reduce_axis((0, reads), "c")
    taps = [te.reduce_axis((0, k), f"k{axis}") for axis, k in enumerate(spec.kernel)]
    zero = None if src_zero is None else src_zero[0]

    def weight(o: Expr, index: Index) -> Expr:
        return less(weights[index], None if weights_zero is None else weights_zero[o])

    def direct(n: Expr, o: Expr, *pixel: Expr) -> Expr:
        where = [
            p * s + t * d - b
            for p, t, s, d, (b, _) in zip(pixel, taps, spec.stride, spec.dilation, spec.padding, strict=True)
        ]
        value = ops.read_src(n, o // writes * reads + c, where, zero=zero)
        return te.sum(value * weight(o, (o, c, *taps)), [c, *taps])

    def transposed(n: Expr, o: Expr, *pixel: Expr) -> Expr:
        stuffed = [p + b - t * d for p, t, d, (b, _) in zip(pixel, taps, spec.dilation, spec.padding, strict=True)]
        conditions, where = [], []
        for axis in range(rank):
            position, stride, size = stuffed[axis], spec.stride[axis], spec.src_spatial[axis]
            conditions += [position >= 0, position < size * stride, tirx.floormod(position, stride) == 0]
            where.append(tirx.floordiv(position, stride))
        channel = o // writes * reads + c
        value = less(ops.src[ops.order(n, channel, where)], zero) * weight(o, (channel, o % writes, *taps))
        nothing = tirx.const(0, value.ty.dtype)
        return te.sum(tirx.if_then_else(tirx.all(*conditions), value, nothing), [c, *taps])

    shape = (spec.n, spec.dst_blocks.channels, *spec.dst_spatial)
    return te.compute(shape, transposed if spec.transposed != (spec.direction == "data") else direct, name="acc")


def weights_gradient(spec: ConvSpec, ops: Operands) -> list[te.Tensor]:
    """Sums of products of a layer's src and the gradient of its dst: the gradient of weights, of their shape, and
    where there is a bias, that of bias ``[oc]``.
    """
    gradient: Any = ops.residual
    own, group = spec.ic // spec.groups, spec.oc // spec.groups
    pixels = spec.in_spatial if spec.transposed else spec.out_spatial
    n = te.reduce_axis((0, spec.n), "n")
    pixel = [te.reduce_axis((0, size), f"p{axis}") for axis, size in enumerate(pixels)]

    def element(outer: Expr, inner: Expr, *taps: Expr) -> Expr:
        far = [
            p * s + t * d - b
            for p, t, s, d, (b, _) in zip(pixel, taps, spec.stride, spec.dilation, spec.padding, strict=True)
        ]
        if not spec.transposed:
            value = ops.read_src(n, outer // group * own + inner, far)
            return te.sum(value * gradient[ops.dst_order(n, outer, pixel)], [n, *pixel])
        inside = tirx.all(*(c for x, size in zip(far, spec.out_spatial, strict=True) for c in (x >= 0, x < size)))
        passed = gradient[ops.dst_order(n, outer // own * group + inner, far)]
        product = ops.src[ops.order(n, outer, pixel)] * passed
        return te.sum(tirx.if_then_else(inside, product, tirx.const(0, ACCUMULATOR)), [n, *pixel])

    made = [te.compute(spec.weights_shape, element, name="acc")]
    if spec.bias:
        image = te.reduce_axis((0, spec.n), "n")
        where = [te.reduce_axis((0, size), f"q{axis}") for axis, size in enumerate(spec.out_spatial)]
        made.append(
            te.compute(
                (spec.oc,),
                lambda o: te.sum(gradient[ops.dst_order(image, o, where)], [image, *where]),
                name="bias_acc",
            )
        )
    return made


def nothing_packed() -> te.Tensor:
    """What a gradient of weights packs, as a kernel packs something."""
    return te.compute((1,), lambda i: tirx.const(0, ACCUMULATOR), name="nothing_packed")


def store_gradients(spec: ConvSpec, made: Sequence[te.Tensor]) -> te.Tensor:
    """What :func:`weights_gradient` gives as dst: of weights, then of bias."""
    weights = math.prod(spec.weights_shape)

    def element(*index: Expr) -> Expr:
        if len(made) == 1:
            return narrow(made[0][index], spec.dtype)
        at = index[0]
        place = unflat(tirx.min(at, weights - 1), spec.weights_shape)
        value = tirx.if_then_else(at < weights, made[0][tuple(place)], made[1][tirx.max(at - weights, 0)])
        return narrow(value, spec.dtype)

    return te.compute(spec.dst_shape, element, name="dst")
