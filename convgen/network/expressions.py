"""What the operators between convolutions compute that need an element, or a few, for each of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from ..deferred import tirx
from ..lowering.compute import (
    ACCUMULATOR,
    INTEGER,
    Expr,
    Index,
    activate,
    erf,
    exponential,
    flat,
    quantise,
    rounded,
    unflat,
)
from ..problem.activation import Activation
from ..problem.dtypes import LONG_RANGES, RANGES
from .graph import Shape
from .lazy import Kind, Operation, Stage, const

# ---- element by element ------------------------------------------------------------------------


def _elementwise(function: Callable[[Operation, list[Expr]], Expr]) -> Kind:
    def formula(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
        return lambda index: function(op, [operand.broadcast(index) for operand in op.operands])

    return Kind(formula, elementwise=True, lanes="any")


def _unary(function: Callable[[Expr], Expr]) -> Kind:
    return _elementwise(lambda op, values: function(values[0]))


def _function(name: str) -> Kind:
    """A function of TIR's, looked up when it is used: not every process needs TVM."""
    return _unary(lambda x: getattr(tirx, name)(x))


def _folded(function: Callable[[Expr, Expr], Expr]) -> Kind:
    return _elementwise(lambda op, values: reduce(function, _of_one_type(op, values)))


def _of_one_type(op: Operation, values: list[Expr]) -> list[Expr]:
    """Operands of i32 where one of them is: a number that is written into the code is of no type."""
    if all(value.ty.dtype == ACCUMULATOR for value in values):
        return values
    return [
        value.astype(INTEGER) if operand.scalar is None else tirx.const(int(operand.scalar), INTEGER)
        for operand, value in zip(op.operands, values, strict=True)
    ]


def _power(op: Operation, values: list[Expr]) -> Expr:
    """Powers that are often asked for without a logarithm."""
    base, exponent = values
    known = op.operands[1].scalar
    if known is not None and known in (1, 2, 3, 4):
        return reduce(lambda a, b: a * b, [base] * int(known))
    if known in _QUARTERS:  # whose roots of -0 and -inf would be other numbers
        base = tirx.Select(tirx.any(base.equal(const(0)), base.equal(const(-math.inf))), tirx.abs(base), base)
    return power(base, known if known is not None else exponent)


#: Exponents whose powers are square roots.
_QUARTERS = (0.25, 0.5, 0.75, -0.25, -0.5, -0.75)


def power(base: Expr, exponent: Any) -> Expr:
    """``base ** exponent``, by square roots where the exponent is a number of quarters below 1; of no negative base."""
    quarters = {0.25: 1, 0.5: 2, 0.75: 3}.get(abs(exponent)) if isinstance(exponent, float) else None
    if quarters is None:
        return tirx.power(base, const(exponent) if isinstance(exponent, float) else exponent)
    half = tirx.sqrt(base)
    value = {1: tirx.sqrt(half), 2: half, 3: half * tirx.sqrt(half)}[quarters]
    return const(1) / value if exponent < 0 else value


def _softplus(x: Expr) -> Expr:
    """log(1 + exp(x)) without an overflow."""
    return tirx.max(x, const(0)) + tirx.log(const(1) + exponential(-tirx.abs(x)))


def _compared(function: Callable[[Expr, Expr], Expr]) -> Kind:
    """A truth value: 1 or 0."""
    return _elementwise(lambda op, values: tirx.Select(function(*values), const(1), const(0)))


def _sign(x: Expr) -> Expr:
    return tirx.Select(x > const(0), const(1), tirx.Select(x < const(0), const(-1), x))


def _quantised(op: Operation, values: list[Expr]) -> Expr:
    """``saturate(round(x / scale) + zero)``, a whole number; QuantizeLinear."""
    x, scale, *zero = values
    if op["dtype"] in LONG_RANGES:
        steps = tirx.nearbyint(x / scale)
        return _between(steps + zero[0] if zero else steps, *LONG_RANGES[op["dtype"]])
    whole = quantise(x / scale, op["dtype"], zero[0].astype(INTEGER) if zero else None)
    return whole.astype(ACCUMULATOR)


def _between(x: Expr, low: float, high: float) -> Expr:
    """The nearest number of a range; of NaN the least."""
    dtype = x.ty.dtype
    return tirx.min(tirx.max(x, tirx.const(low, dtype)), tirx.const(high, dtype))


def _clamped(op: Operation, values: list[Expr]) -> Expr:
    """Integers of any type between two of them."""
    (x,), low, high = values, op["low"], op["high"]
    return _between(x, low, high)


def _truncated(op: Operation, values: list[Expr]) -> Expr:
    """An f32 without what is behind its point, as an integer: of i32 the nearest that f32 has."""
    low, high = RANGES.get(op["dtype"], (-(2.0**31), 2.0**31 - 2.0**7))
    whole = _between(tirx.trunc(values[0]), low, high)
    return whole.astype(INTEGER) if op["dtype"] == "i32" else whole


def _wrapped(op: Operation, values: list[Expr]) -> Expr:
    """The lowest bits of an integer, as one of another type."""
    bits = values[0].astype(INTEGER)
    if op["dtype"] == "i32":
        return bits
    unused = tirx.const(24, INTEGER)
    low = bits & tirx.const(255, INTEGER) if op["dtype"] == "u8" else (bits << unused) >> unused
    return low.astype(ACCUMULATOR)


def _dequantised(op: Operation, values: list[Expr]) -> Expr:
    """``(x - zero) * scale``; DequantizeLinear. An i32 is rounded to f32 first."""
    x, scale, *zero = values
    return (x.astype(ACCUMULATOR) - zero[0] if zero else x.astype(ACCUMULATOR)) * scale


def _centred(op: Operation, values: list[Expr]) -> Expr:
    """Sums of products, less a zero point times the sums of what it was multiplied by; all i32."""
    sums, zero, totals = values
    return sums - zero.astype(INTEGER) * totals.astype(INTEGER)


def _prelu(op: Operation, values: list[Expr]) -> Expr:
    x, slope = values
    return tirx.Select(x < const(0), x * slope, x)


def larger(a: Expr, b: Expr) -> Expr:
    """The larger of two; NaN where one of them is."""
    return tirx.Select(tirx.any(a > b, tirx.isnan(a)), a, b)


def smaller(a: Expr, b: Expr) -> Expr:
    return tirx.Select(tirx.any(a < b, tirx.isnan(a)), a, b)


ELEMENTWISE: dict[str, Kind] = {
    "activate": _elementwise(lambda op, values: activate(Activation.parse(op["activation"]), values[0])),
    "identity": _unary(lambda x: x),
    "exp": _unary(exponential),
    "log": _function("log"),
    "sqrt": _function("sqrt"),
    "abs": _function("abs"),
    "neg": _unary(lambda x: -x),
    "reciprocal": _unary(lambda x: const(1) / x),
    "floor": _function("floor"),
    "ceil": _function("ceil"),
    "erf": _unary(erf),
    "softplus": _unary(_softplus),
    "softsign": _unary(lambda x: x / (const(1) + tirx.abs(x))),
    "sin": _function("sin"),
    "cos": _function("cos"),
    "add": _folded(lambda a, b: a + b),
    "sub": _folded(lambda a, b: a - b),
    "mul": _folded(lambda a, b: a * b),
    "div": _folded(lambda a, b: a / b),
    "max": _folded(larger),
    "min": _folded(smaller),
    "pow": _elementwise(_power),
    "prelu": _elementwise(_prelu),
    "threshold": _elementwise(lambda op, values: tirx.Select(values[0] > values[1], values[0], const(0))),
    "round": _function("nearbyint"),
    "sign": _unary(_sign),
    "greater": _compared(lambda a, b: a > b),
    "greater_equal": _compared(lambda a, b: a >= b),
    "less": _compared(lambda a, b: a < b),
    "less_equal": _compared(lambda a, b: a <= b),
    "equal": _compared(lambda a, b: a.equal(b)),
    # The opposite of equal, which TVM's "unlike" is not: of NaN neither holds.
    "not_equal": _elementwise(lambda op, values: tirx.Select(values[0].equal(values[1]), const(0), const(1))),
    "not": _unary(lambda x: const(1) - x),
    "where": _elementwise(lambda op, values: tirx.Select(values[0] > const(0), values[1], values[2])),
    "quantise": _elementwise(_quantised),
    "dequantise": _elementwise(_dequantised),
    "centre": _elementwise(_centred),
    "clamp": _elementwise(_clamped),
    "truncate": _elementwise(_truncated),
    "wrap": _elementwise(_wrapped),
    "cast": _elementwise(lambda op, x: rounded(x[0].astype(ACCUMULATOR), op.attributes.get("dtype", "f32"))),
    "scale_shift": _elementwise(lambda op, values: values[0] * values[1] + values[2]),
}


# ---- from one place to another -----------------------------------------------------------------


def _moved(source: Callable[[Operation, Index], Index]) -> Kind:
    """Each element is one of the first operand."""

    def formula(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
        return lambda index: op.operands[0].at(source(op, index))

    return Kind(formula, moves=True)


def reshaped(index: Index, shape: Shape, source: Shape) -> list[Expr]:
    """An index of a shape, as one of another shape with the same elements.

    Axes are taken together as few at a time as possible: there is nothing to divide where both have the same axes.
    """
    result: list[Expr] = []
    i = j = 0
    while i < len(shape) or j < len(source):
        mine, other = list(range(i, min(i + 1, len(shape)))), list(range(j, min(j + 1, len(source))))
        sizes, others = math.prod(shape[k] for k in mine), math.prod(source[k] for k in other)
        while sizes != others:
            if sizes < others:
                mine.append(mine[-1] + 1 if mine else i)
                sizes *= shape[mine[-1]]
            else:
                other.append(other[-1] + 1 if other else j)
                others *= source[other[-1]]
        sized = [k for k in mine if shape[k] != 1]
        position = flat([index[k] for k in sized], [shape[k] for k in sized])
        result += _spread(position, [source[k] for k in other])
        i, j = i + len(mine), j + len(other)
    return result


def _spread(position: Expr, shape: Sequence[int]) -> list[Expr]:
    """An index of a shape from its position; axes of one element are 0."""
    sized = [size for size in shape if size != 1]
    values = iter([position] if len(sized) == 1 else unflat(position, sized))
    return [0 if size == 1 else next(values) for size in shape]


def _transposed(op: Operation, index: Index) -> Index:
    source: list[Expr] = [0] * len(index)
    for axis, taken in enumerate(op["perm"]):
        source[taken] = index[axis]
    return source


def _sliced(op: Operation, index: Index) -> Index:
    return [i * step + start for i, start, step in zip(index, op["starts"], op["steps"], strict=True)]


def _expanded(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
    return op.operands[0].broadcast


def _concatenated(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
    axis, ends, total = op["axis"], [], 0
    for operand in op.operands:
        total += operand.shape[axis]
        ends.append(total)

    def at(index: Index) -> Expr:
        def part(number: int) -> Expr:
            start = ends[number - 1] if number else 0
            return op.operands[number].at([*index[:axis], index[axis] - start, *index[axis + 1 :]])

        value = part(len(ends) - 1)
        for number in range(len(ends) - 2, -1, -1):
            value = tirx.if_then_else(index[axis] < ends[number], part(number), value)
        return value

    return at


def _padded(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
    (operand, *given), begins, mode = op.operands, op["begins"], op["mode"]

    def at(index: Index) -> Expr:
        own = [i - begin for i, begin in zip(index, begins, strict=True)]
        if mode == "constant":
            inside = [c for i, size in zip(own, operand.shape, strict=True) for c in (i >= 0, i < size)]
            value = operand.at(own)
            number = op["value"] if value.ty.dtype == ACCUMULATOR else int(op["value"])
            around = given[0].at(()) if given else tirx.const(number, value.ty.dtype)
            return tirx.if_then_else(tirx.all(*inside), value, around)
        kept = zip(own, operand.shape, op.shape, begins, strict=True)
        return operand.at(
            [
                i if (size, begin) == (grown, 0) else _kept_inside(i, size, begin, grown, mode)
                for i, size, grown, begin in kept
            ]
        )

    return at


def _kept_inside(i: Expr, size: int, begin: int, grown: int, mode: str) -> Expr:
    """An index outside an axis as one inside: the nearest, its reflection, or as if what is kept were repeated."""
    if mode == "edge":
        return tirx.max(0, tirx.min(size - 1, i))
    if mode == "wrap":
        first = max(0, -begin)  # padding below 0 cuts off
        return first + tirx.floormod(i - first, size - first - max(0, size + begin - grown))
    positive = tirx.abs(i)
    return size - 1 - tirx.abs(size - 1 - positive)


def _resized(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
    """Each axis that changes has tables: of the nearest element, or of two elements and the share of the second."""
    source, *tables = op.operands

    def along(index: Index, axis: int, at: int, chosen: list[Expr]) -> Expr:
        if axis == len(index):
            return source.at(chosen)
        way = op["axes"][axis]
        if way == "same":
            return along(index, axis + 1, at, [*chosen, index[axis]])
        if isinstance(way, int):  # each element is repeated so often
            return along(index, axis + 1, at, [*chosen, tirx.floordiv(index[axis], way)])
        first = tables[at].at([index[axis]]).astype("int32")
        if way == "nearest":
            return along(index, axis + 1, at + 1, [*chosen, first])
        second, share = tables[at + 1].at([index[axis]]).astype("int32"), tables[at + 2].at([index[axis]])
        low, high = (along(index, axis + 1, at + 3, [*chosen, i]) for i in (first, second))
        return low * (const(1) - share) + high * share

    return lambda index: along(index, 0, 0, [])


MOVES: dict[str, Kind] = {
    "reshape": _moved(lambda op, index: reshaped(index, op.shape, op.operands[0].shape)),
    "transpose": _moved(_transposed),
    "slice": _moved(_sliced),
    "concat": Kind(_concatenated, moves=True),
    "pad": Kind(_padded, moves=True),
    "expand": Kind(_expanded, lanes="any"),
    "resize": Kind(_resized, lanes="channels"),
}
