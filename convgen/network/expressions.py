"""What the operators between convolutions compute, as tensor expressions of single elements.

A :class:`Lazy` tensor is a shape and a function from a logical index to an expression: whatever layout its elements lie
in, and whether it lies in memory at all. So chains of operators are one expression, and every operator reads and writes
every layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any, Protocol

from ..deferred import te, tirx
from ..errors import BuildError
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
from .graph import ROW_MAJOR, Attributes, Shape

#: Neighbours that are computed side by side: as many as the widest vector has.
BLOCK = 16
#: The least number there is: what a maximum begins with.
LOWEST = -math.inf


@dataclass(frozen=True)
class Lazy:
    """A tensor by its elements.

    Attributes:
        shape: logical.
        at: the element at a logical index.
        scalar: its value, where it is a constant of one element.
    """

    shape: Shape
    at: Callable[[Index], Expr]
    scalar: float | None = None

    def broadcast(self, index: Index) -> Expr:
        """The element that stands at an index of a larger tensor."""
        own = index[len(index) - len(self.shape) :]
        return self.at([0 if size == 1 else i for i, size in zip(own, self.shape, strict=True)])


@dataclass(frozen=True)
class Operation:
    """One operator with its operands, as what computes it sees it; the layout that it is computed in."""

    attributes: Attributes
    operands: Sequence[Lazy]
    shape: Shape
    layout: str = ROW_MAJOR

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]


class Stage(Protocol):
    """Gives a tensor that is computed beforehand, from its shape and its elements; ``lanes`` of its last axis alike."""

    def __call__(self, shape: Shape, at: Callable[..., Expr], lanes: bool = False) -> Lazy: ...


#: The element at an index; what is to be computed beforehand by stages.
Formula = Callable[[Operation, Stage], Callable[[Index], Expr]]


@dataclass(frozen=True)
class Kind:
    """How an operator computes.

    Attributes:
        formula: gives its elements.
        reduces: whether an element is a sum or maximum over many, which must stand alone in a tensor expression.
        elementwise: whether an element depends on the elements at its own index only.
        moves: whether elements are those of operands, each read at most once.
        lanes: along which axes neighbours are computed alike, without a condition that only some meet, from neighbours:
            ``channels``, what is innermost in row-major order (``rows``), or ``any``; empty where along neither;
            ``blocks`` along channels where these are whole blocks.
    """

    formula: Formula
    reduces: bool = False
    elementwise: bool = False
    moves: bool = False
    lanes: str = ""


def const(value: float) -> Expr:
    return tirx.const(value, ACCUMULATOR)


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
    return _elementwise(lambda op, values: reduce(function, values))


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
    whole = quantise(x / scale, op["dtype"], zero[0].astype(INTEGER) if zero else None)
    return whole.astype(ACCUMULATOR)


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


def _larger(a: Expr, b: Expr) -> Expr:
    """The larger of two; NaN where one of them is."""
    return tirx.Select(tirx.any(a > b, tirx.isnan(a)), a, b)


def _smaller(a: Expr, b: Expr) -> Expr:
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
    "max": _folded(_larger),
    "min": _folded(_smaller),
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


# ---- over many elements ------------------------------------------------------------------------


#: Ways to reduce by which parts of a result may be reduced again.
_EXTREMES = ("max", "min")


@cache
def _reducers() -> dict[str, Any]:
    """What combines elements, beside TVM's sums; made when it is first asked for, as not every process needs TVM.

    Of f32, TVM's own maxima begin with the largest finite numbers, and forget a NaN at the next number. Of a window
    there is one comparison, which NaN does not win; whether it should is not agreed on, see docs/decisions.md.
    """
    return {
        "max": te.comm_reducer(_larger, lambda dtype: const(LOWEST), name="largest"),
        "min": te.comm_reducer(_smaller, lambda dtype: const(-LOWEST), name="smallest"),
        "window": te.comm_reducer(
            lambda most, x: tirx.Select(x > most, x, most), lambda dtype: const(LOWEST), name="largest_number"
        ),
        "product": te.comm_reducer(lambda a, b: a * b, lambda dtype: tirx.const(1, dtype), name="product"),
    }


def _pool(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
    """The maximum of a window, or its mean: a sum of elements times what one of the window's counts."""
    (operand,), rank = op.operands, len(op["kernel"])
    taps = [te.reduce_axis((0, k), f"k{axis}") for axis, k in enumerate(op["kernel"])]
    sizes = operand.shape[-rank:]
    bounds = list(zip(sizes, op["kernel"], op["strides"], op["dilations"], op["begins"], op["ends"], strict=True))

    def at(index: Index) -> Expr:
        pixel = index[-rank:]
        where = [p * s + t * d - b for p, t, (_, _, s, d, b, _) in zip(pixel, taps, bounds, strict=True)]
        reaches = zip(op.shape[-rank:], bounds, strict=True)
        padded = [b > 0 or (out - 1) * s + (k - 1) * d - b >= size for out, (size, k, s, d, b, _) in reaches]
        kept = zip(where, sizes, padded, strict=True)
        inside = [c for i, size, needed in kept if needed for c in (i >= 0, i < size)]
        value = operand.at([*index[:-rank], *where])
        if op["mode"] == "max":
            is_f32 = value.ty.dtype == ACCUMULATOR
            lowest = const(LOWEST) if is_f32 else te.min_value(value.ty.dtype)
            largest = _reducers()["window"] if is_f32 else te.max
            return largest(tirx.if_then_else(tirx.all(*inside), value, lowest) if inside else value, taps)
        share = _share(op, pixel, bounds)
        value = value * share
        return te.sum(tirx.if_then_else(tirx.all(*inside), value, const(0)) if inside else value, taps)

    return at


def _share(op: Operation, pixel: Index, bounds: Sequence[tuple[int, ...]]) -> Expr:
    """One over the elements that a mean is of, at a pixel: those inside, or those inside the padding too."""
    counts: list[Expr] = []
    constant = 1
    for p, out, (size, k, s, d, b, e) in zip(pixel, op.shape[-len(bounds) :], bounds, strict=True):
        low, high = (-b, size + e) if op["include_pad"] else (0, size)
        covers = -b >= low and (out - 1) * s - b + (k - 1) * d < high
        if covers:
            constant *= k
            continue
        start = p * s - b
        first = tirx.max(0, tirx.floordiv(low - start + d - 1, d))
        last = tirx.min(k - 1, tirx.floordiv(high - 1 - start, d))
        counts.append((last - first + 1).astype(ACCUMULATOR))
    return const(1) / reduce(lambda a, b: a * b, counts, const(constant)) if counts else const(1 / constant)


def _reduced(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
    """A sum, product, mean, maximum or minimum over axes; axes that are reduced have one element, or are gone."""
    (operand,), axes = op.operands, op["axes"]
    taps = {axis: te.reduce_axis((0, operand.shape[axis]), f"r{axis}") for axis in axes}
    kept = [axis for axis in range(len(operand.shape)) if axis not in taps]

    def at(index: Index) -> Expr:
        places = dict(zip(kept, [index[axis] for axis in kept] if op["keepdims"] else index, strict=True))
        value = operand.at([taps[axis] if axis in taps else places[axis] for axis in range(len(operand.shape))])
        if op["mode"] in ("product", *_EXTREMES):
            return _reducers()[op["mode"]](value, list(taps.values()))
        if op["mode"] == "mean":
            value = value * const(1 / math.prod(operand.shape[axis] for axis in axes))
        return te.sum(value * value if op["mode"] == "square" else value, list(taps.values()))

    return at


def _over(operand: Lazy, axes: Sequence[int], mode: str, stage: Stage) -> Lazy:
    """A reduction that is computed beforehand; its axes have one element then."""
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(operand.shape))
    *rows, last = operand.shape
    if tuple(axes) == (len(rows),) and last % BLOCK == 0 and last > BLOCK:
        parts = (last // BLOCK, BLOCK)
        parted = Lazy((*rows, *parts), lambda index: operand.at([*index[:-2], index[-2] * BLOCK + index[-1]]))
        inner = Operation({"axes": (len(rows),), "keepdims": False, "mode": mode}, [parted], (*rows, BLOCK))
        at = _reduced(inner, stage)
        sides = stage(inner.shape, lambda *index: at(index), lanes=True)
        again = mode if mode in (*_EXTREMES, "mean") else "sum"
        inner = Operation({"axes": (len(rows),), "keepdims": True, "mode": again}, [sides], shape)
        final = _reduced(inner, stage)
        return stage(shape, lambda *index: final(index))
    if len(axes) > 1 and mode not in _EXTREMES:  # sums of sums: roundings of alike terms add up over each alone
        inside = _over(operand, axes[-1:], mode, stage)
        return _over(inside, axes[:-1], "mean" if mode == "mean" else "sum", stage)
    inner = Operation({"axes": tuple(axes), "keepdims": True, "mode": mode}, [operand], shape)
    at = _reduced(inner, stage)
    return stage(shape, lambda *index: at(index))


def _softmax(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
    (operand,), axes = op.operands, op["axes"]
    largest = _over(operand, axes, "max", stage)
    raised = stage(op.shape, lambda *index: exponential(operand.at(index) - largest.broadcast(index)))
    total = _over(raised, axes, "sum", stage)
    if op["log"]:
        logarithm = stage(total.shape, lambda *index: tirx.log(total.at(index)))
        return lambda index: operand.at(index) - largest.broadcast(index) - logarithm.broadcast(index)
    share = stage(total.shape, lambda *index: const(1) / total.at(index))
    return lambda index: raised.at(index) * share.broadcast(index)


def _normalised(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
    """To mean 0 and variance 1 over axes, then times scale plus shift, which are broadcast."""
    operand, *affine = op.operands
    mean = _over(operand, op["axes"], "mean", stage)
    apart = stage(operand.shape, lambda *index: operand.at(index) - mean.broadcast(index))
    squares = _over(apart, op["axes"], "square", stage)
    count = math.prod(operand.shape[axis] for axis in op["axes"])
    epsilon = const(op["epsilon"])
    factor = stage(squares.shape, lambda *index: const(1) / tirx.sqrt(squares.at(index) * const(1 / count) + epsilon))

    def at(index: Index) -> Expr:
        value = apart.at(index) * factor.broadcast(index)
        if affine:
            value = value * affine[0].broadcast(index)
        return value + affine[1].broadcast(index) if len(affine) > 1 else value

    return at


def _lrn(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
    """Divided by what the squares of neighbouring channels sum up to.

    Where channels are neighbours in memory, their squares are laid between blocks of zeros first: then no vector has a
    condition.
    """
    (operand,), size = op.operands, op["size"]
    channels, before = operand.shape[1], (size - 1) // 2
    squares = None
    if op.layout != ROW_MAJOR and channels % BLOCK == 0 and size // 2 < BLOCK:
        blocks, (n, _, *pixels) = channels // BLOCK, operand.shape

        def square(*index: Expr) -> Expr:
            value = operand.at([index[0], (index[-2] - 1) * BLOCK + index[-1], *index[1:-2]])
            return tirx.if_then_else(tirx.all(index[-2] >= 1, index[-2] <= blocks), value * value, const(0))

        squares = stage((n, *pixels, blocks + 2, BLOCK), square, lanes=True)

    def total(index: Index) -> Expr:
        """The sum, written out: windows are a few channels."""
        terms = []
        for offset in range(-before, size - before):
            channel = index[1] + offset
            if squares is not None:
                at = channel + BLOCK
                terms.append(squares.at([index[0], *index[2:], at // BLOCK, at % BLOCK]))
                continue
            value = operand.at([index[0], channel, *index[2:]])
            terms.append(tirx.if_then_else(tirx.all(channel >= 0, channel < channels), value * value, const(0)))
        return reduce(lambda a, b: a + b, terms)

    def at(index: Index) -> Expr:
        base = const(op["bias"]) + const(op["alpha"] / size) * total(index)
        return operand.at(index) * power(base, -op["beta"])

    return at


def _product(op: Operation, stage: Stage) -> Callable[[Index], Expr]:
    """Of matrices, the axes before them broadcast."""
    left, right = op.operands
    depth = te.reduce_axis((0, left.shape[-2 if op["trans_a"] else -1]), "k")

    def at(index: Index) -> Expr:
        *outer, row, column = index
        a = (depth, row) if op["trans_a"] else (row, depth)
        b = (column, depth) if op["trans_b"] else (depth, column)
        return te.sum(_matrix(left, outer, a) * _matrix(right, outer, b), [depth])

    return at


def _matrix(operand: Lazy, outer: Sequence[Expr], inner: tuple[Expr, Expr]) -> Expr:
    own = operand.shape[:-2]
    places = [0 if size == 1 else i for i, size in zip(outer[len(outer) - len(own) :], own, strict=True)]
    return operand.at([*places, *inner])


REDUCES: dict[str, Kind] = {
    "pool": Kind(_pool, reduces=True, lanes="channels"),
    "reduce": Kind(_reduced, reduces=True, lanes="channels"),
    "product": Kind(_product, reduces=True, lanes="rows"),
    "softmax": Kind(_softmax, lanes="any"),
    "normalise": Kind(_normalised, lanes="any"),
    "lrn": Kind(_lrn, lanes="blocks"),
}

#: Those that take integers and give what they took.
INTEGER_KINDS = frozenset({*MOVES, "identity", "pool"} - {"resize"})
#: Every operator by its name.
KINDS: dict[str, Kind] = {**ELEMENTWISE, **MOVES, **REDUCES}


def kind(name: str) -> Kind:
    """The operator of that name.

    Raises:
        BuildError: there is none.
    """
    if name not in KINDS:
        raise BuildError(f"operator: expected one of {', '.join(sorted(KINDS))}, found {name!r}")
    return KINDS[name]
