"""What the operators between convolutions compute that need many elements for each of their own: windows, reductions,
and what is normalised by these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any

from ..deferred import te, tirx
from ..lowering.compute import ACCUMULATOR, Expr, Index, exponential
from .expressions import larger, power, smaller
from .graph import ROW_MAJOR
from .lazy import BLOCK, LOWEST, Kind, Lazy, Operation, Stage, const

#: Ways to reduce by which parts of a result may be reduced again.
_EXTREMES = ("max", "min")
#: Elements that are added one after another at most: longer sums are sums of such sums, whose roundings grow with the
#: length of a run, not with that of the whole (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
_RUN = 1024


@cache
def _reducers() -> dict[str, Any]:
    """What combines elements, beside TVM's sums; made when it is first asked for, as not every process needs TVM.

    Of f32, TVM's own maxima begin with the largest finite numbers, and forget a NaN at the next number. Of a window
    there is one comparison, which NaN does not win; whether it should is not agreed on, see docs/decisions.md.
    """
    return {
        "max": te.comm_reducer(larger, lambda dtype: const(LOWEST), name="largest"),
        "min": te.comm_reducer(smaller, lambda dtype: const(-LOWEST), name="smallest"),
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
    if op["mode"] in ("sum", "mean", "square") and math.prod(operand.shape[axis] for axis in axes) > _RUN:
        total = _over_blocks(operand, axes, op["mode"], stage, op.layout)

        def of_total(index: Index) -> Expr:
            own = iter(index)
            gone = () if op["keepdims"] else axes
            return total.broadcast([0 if axis in gone else next(own) for axis in range(len(total.shape))])

        return of_total
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


def _over_blocks(operand: Lazy, axes: Sequence[int], mode: str, stage: Stage, layout: str) -> Lazy:
    """:func:`_over`, of channels that are neighbours in memory those of a block alike."""
    if layout == ROW_MAJOR or 1 in axes or operand.shape[1] % BLOCK:
        return _over(operand, axes, mode, stage)
    n, channels, *pixels = operand.shape

    def at(index: Index) -> Expr:
        return operand.at([index[0], index[1] * BLOCK + index[-1], *index[2:-1]])

    total = _over(Lazy((n, channels // BLOCK, *pixels, BLOCK), at), axes, mode, stage, lanes=True)
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(operand.shape))
    return Lazy(shape, lambda index: total.at([index[0], index[1] // BLOCK, *index[2:], index[1] % BLOCK]))


def _over(operand: Lazy, axes: Sequence[int], mode: str, stage: Stage, lanes: bool = False) -> Lazy:
    """A reduction that is computed beforehand; its axes have one element then.

    Args:
        lanes: elements of the last axis, which is not reduced, are computed alike.
    """
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(operand.shape))
    *rows, last = operand.shape
    sums = mode not in _EXTREMES
    if tuple(axes) == (len(rows),) and last % BLOCK == 0 and BLOCK < last <= (_RUN if sums else last) * BLOCK:
        parts = (last // BLOCK, BLOCK)
        parted = Lazy((*rows, *parts), lambda index: operand.at([*index[:-2], index[-2] * BLOCK + index[-1]]))
        inner = Operation({"axes": (len(rows),), "keepdims": False, "mode": mode}, [parted], (*rows, BLOCK))
        at = _reduced(inner, stage)
        sides = stage(inner.shape, lambda *index: at(index), lanes=True)
        again = mode if mode in (*_EXTREMES, "mean") else "sum"
        inner = Operation({"axes": (len(rows),), "keepdims": True, "mode": again}, [sides], shape)
        final = _reduced(inner, stage)
        return stage(shape, lambda *index: final(index))
    if len(axes) > 1 and sums:  # sums of sums: roundings of alike terms add up over each alone
        inside = _over(operand, axes[-1:], mode, stage, lanes)
        return _over(inside, axes[:-1], "mean" if mode == "mean" else "sum", stage, lanes)
    if sums and operand.shape[axes[0]] > _RUN:
        share = const(1 / operand.shape[axes[0]])
        total = _over(_runs(operand, axes[0], mode, stage, lanes), axes, "sum", stage, lanes)
        return Lazy(shape, lambda index: total.at(index) * share) if mode == "mean" else total
    inner = Operation({"axes": tuple(axes), "keepdims": True, "mode": mode}, [operand], shape)
    at = _reduced(inner, stage)
    return stage(shape, lambda *index: at(index), lanes)


def _runs(operand: Lazy, axis: int, mode: str, stage: Stage, lanes: bool) -> Lazy:
    """An axis as the sums of runs of its elements; where it is the innermost, of vectors of them."""
    size = operand.shape[axis]
    side = BLOCK if axis == len(operand.shape) - 1 and size % BLOCK == 0 else 1
    length = size // side
    parts = -(-length // _RUN)
    each = -(-length // parts)
    step = te.reduce_axis((0, each), "step")

    def run(*index: Expr) -> Expr:
        place = index[axis] * each + step
        lane = index[-1] if side > 1 else 0
        value = operand.at([*index[:axis], place * side + lane, *index[axis + 1 : len(operand.shape)]])
        value = value * value if mode == "square" else value
        return te.sum(tirx.if_then_else(place < length, value, const(0)) if parts * each > length else value, step)

    shape = (*operand.shape[:axis], parts, *operand.shape[axis + 1 :])
    sums = stage((*shape, side) if side > 1 else shape, run, lanes or side > 1)

    def at(index: Index) -> Expr:
        if side == 1:
            return sums.at(index)
        return sums.at([*index[:axis], index[axis] // side, index[axis] % side])

    return Lazy((*operand.shape[:axis], parts * side, *operand.shape[axis + 1 :]), at)


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
