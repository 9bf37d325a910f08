"""Convolutions as products of matrices that are nowhere in memory: their sizes, and what they read and write as tensor
expressions.

Rows are pixels, columns output channels, and the reduction is over taps and input channels, in vectors of 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..deferred import te, tirx
from ..lowering.compute import ACCUMULATOR, Expr, Operand, Operands, ceildiv, epilogue, flat, narrow, round_up, unflat
from ..lowering.schedule import Picks
from ..problem.dtypes import BYTES
from ..problem.spec import ConvSpec
from . import tensorize
from .operands import is_whole

#: Pixels of a piece: what a warpgroup multiplies at once.
PIECE_ROWS = 64


class Products(NamedTuple):
    """The products of a candidate, one for each phase and group; `merge_g` groups of the layer are one group here.

    Attributes:
        batch: how many products.
        groups, ic, oc: groups, and the channels of a group.
        taps: the most taps of a phase, per axis.
        lanes: elements of a vector of 16 bytes.
        depth: vectors of channels that a tap has.
        pixels: outputs of a phase.
        rows, columns, vectors: pixels, output channels and vectors of the reduction, in whole tiles.
    """

    batch: int
    groups: int
    ic: int
    oc: int
    taps: tuple[int, ...]
    lanes: int
    depth: int
    pixels: int
    rows: int
    columns: int
    vectors: int

    def element(self, spec: ConvSpec, item: Expr, vector: Expr, lane: Expr) -> Element:
        """What an element of the reduction of product ``item`` is."""
        phase, group = (
            (tirx.floordiv(item, self.groups), tirx.floormod(item, self.groups)) if phases(spec) > 1 else (0, item)
        )
        tap, channel = tirx.floordiv(vector, self.depth), tirx.floormod(vector, self.depth) * self.lanes + lane
        return Element(phase_of(spec, phase), group, unflat(tap, self.taps), channel)


class Element(NamedTuple):
    """An element of the reduction: the phase and its tap per axis, the group, and the channel of the group."""

    phase: list[Expr]
    group: Expr
    tap: list[Expr]
    channel: Expr


# ---- sizes -------------------------------------------------------------------------------------


def lanes_of(spec: ConvSpec) -> int:
    """Elements of a vector of 16 bytes."""
    return tensorize.VECTOR // BYTES[spec.dtype]


def needs_layout(spec: ConvSpec, picks: Picks) -> bool:
    """Whether a first launch lays out src: channels last, and whole vectors of them."""
    return not is_whole(spec.src_blocks, spec.groups // picks.merge_g, lanes_of(spec))


# ---- tensor expressions ------------------------------------------------------------------------


def packed_weights(spec: ConvSpec, products: Products, host: Operands, merge_g: int) -> te.Tensor:
    """Weights ``[product][output channel][vector][lane]``, zeros where a phase or a group has none."""
    ic_group, oc_group = products.ic // merge_g, products.oc // merge_g

    def packed(item: Expr, column: Expr, vector: Expr, lane: Expr) -> Expr:
        phase, group, tap, channel = products.element(spec, item, vector, lane)
        kernel_tap = [_kernel_tap(spec, axis, phase, t) for axis, t in enumerate(tap)]
        inside = [column < products.oc, vector < math.prod(products.taps) * products.depth, channel < products.ic]
        inside += [t < size for t, size in zip(kernel_tap, spec.kernel, strict=True)]
        if merge_g > 1:
            inside.append(tirx.floordiv(column, oc_group) == tirx.floordiv(channel, ic_group))
        oc, ic = group * products.oc + column, group * products.ic + channel
        channels = (ic, tirx.floormod(oc, oc_group)) if spec.transposed else (oc, tirx.floormod(ic, ic_group))
        value = host.weights.tensor(*host.weights.place((*channels, *kernel_tap)))
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, value.ty.dtype))

    shape = (products.batch, products.columns, products.vectors, products.lanes)
    return te.compute(shape, packed, name="weights_packed")


def gathered(spec: ConvSpec, products: Products, source: Callable[..., Expr]) -> te.Tensor:
    """The patches ``[product][pixel][vector][lane]``, of which memory only ever has tiles."""
    whole_ic = round_up(products.ic, products.lanes)

    def patch(item: Expr, pixel: Expr, vector: Expr, lane: Expr) -> Expr:
        phase, group, tap, channel = products.element(spec, item, vector, lane)
        image, *out = unflat(pixel, (spec.n, *grid(spec)))
        position, inside = [], []
        for axis, (o, t) in enumerate(zip(out, tap, strict=True)):
            y, conditions = _read(spec, axis, phase, o, t)
            position.append(y)
            inside += conditions
        if products.rows != products.pixels:
            inside.append(pixel < products.pixels)
        if products.vectors != math.prod(products.taps) * products.depth:
            inside.append(vector < math.prod(products.taps) * products.depth)
        if products.depth > ceildiv(products.ic, products.lanes):
            inside.append(channel < whole_ic)
        value = source(image, *position, group * whole_ic + channel)
        zero = tirx.const(0, tensorize.STORED[spec.dtype])
        return tirx.if_then_else(tirx.all(*inside), value, zero) if inside else value

    return te.compute((products.batch, products.rows, products.vectors, products.lanes), patch, name="gathered")


def sums(spec: ConvSpec, products: Products, patches: te.Tensor, weights: te.Tensor, split_k: int) -> te.Tensor:
    """The products' sums ``[part][product][pixel][output channel]``, in ``split_k`` parts."""
    summed, length = tensorize.sums_of(spec.dtype), products.vectors // split_k
    outer = te.reduce_axis((0, length), "vector")
    inner = te.reduce_axis((0, products.lanes), "lane")

    def product(part: Expr, number: Expr, row: Expr, column: Expr) -> Expr:
        vector = part * length + outer
        left, right = patches[number, row, vector, inner], weights[number, column, vector, inner]
        return te.sum(left.astype(summed) * right.astype(summed), [outer, inner])

    return te.compute((split_k, products.batch, products.rows, products.columns), product, name="tile_sums")


def finished(
    spec: ConvSpec, products: Products, ops: Operands, parts: te.Tensor, per_channel: Sequence[te.Tensor]
) -> te.Tensor:
    """The outputs ``[phase per axis][group][pixel][output channel]``: all parts of a sum, and the epilogue."""
    strides = spec.stride if spec.transposed else ()

    def value(*index: Expr) -> Expr:
        *phase, group, pixel, column = index
        item = flat((*phase, group), (*strides, products.groups))
        total = parts[0, item, pixel, column]
        for part in range(1, int(parts.shape[0])):
            total = total + parts[part, item, pixel, column]
        image, channel, out = output(spec, index, products.oc)
        residual = ops.residual[ops.order(image, channel, out)] if ops.residual is not None else None
        return _stored(spec, epilogue(spec, total, residual=residual, **ops.per_channel(per_channel, channel)))

    return te.compute((*strides, products.groups, products.pixels, products.oc), value, name="finished")


def _stored(spec: ConvSpec, value: Expr) -> Expr:
    """An output as it is stored."""
    return narrow(value, spec.dtype) if spec.dtype == "i8" else value.astype(tensorize.STORED[spec.dtype])


def padded(parameter: Operand, products: Products) -> te.Tensor:
    """A parameter packed for whole tiles ``[group × output channels]``, in the type its elements read as; zeros where a
    group has no channel.
    """

    def value(i: Expr) -> Expr:
        group, column = tirx.floordiv(i, products.columns), tirx.floormod(i, products.columns)
        read = parameter[group * products.oc + column]
        return tirx.if_then_else(column < products.oc, read, tirx.const(0, read.ty.dtype))

    return te.compute((products.groups * products.columns,), value, name=f"{parameter.name}_packed")


def held_shape(products: Products, channels: int) -> tuple[int, ...]:
    """Of sums by who holds them: ``[product][piece along pixels][along channels][warp][lane][sum]``.

    Args:
        channels: of a piece.
    """
    pieces = products.rows // PIECE_ROWS, products.columns // channels
    return (products.batch, *pieces, 4, 32, channels // 2)


def finished_pieces(
    spec: ConvSpec,
    products: Products,
    ops: Operands,
    held: te.Tensor,
    added: te.Tensor | None,
    per_channel: Sequence[te.Tensor],
) -> te.Tensor:
    """The outputs of sums in the order in which threads hold them, with those that whole tiles have besides:
    ``[group][piece along pixels][along channels][warp][lane / 4][lane % 4][8 channels][upper or lower row][of two]``.

    Source of the order: PTX ISA, "Register Fragments and Shared Memory Matrix Layouts" of wgmma, matrix D.

    Args:
        held: sums of :func:`held_shape`.
        added: elements of the residual that are added to these; None where there is none.
        per_channel: what :func:`padded` packs.
    """
    *outer, _, lanes, sums = map(int, held.shape)
    channels = 2 * sums

    def value(*index: Expr) -> Expr:
        group, block, column_block, warp, row, pair, chunk, lower, one = index
        column = column_block * channels + chunk * 8 + pair * 2 + one
        place = (group, block, column_block, warp, row * 4 + pair, chunk * 4 + lower * 2 + one)
        total = held[place]
        residual = added[place].astype(ACCUMULATOR) if added is not None else None
        parameters = ops.per_channel(per_channel, group * products.columns + column)
        return _stored(spec, epilogue(spec, total, residual=residual, **parameters))

    return te.compute((*outer, 4, lanes // 4, 4, channels // 8, 2, 2), value, name="dst")


# ---- taps and pixels of a product --------------------------------------------------------------


def phases(spec: ConvSpec) -> int:
    """Outputs whose positions differ by whole strides are a phase: how many phases there are."""
    return math.prod(spec.stride) if spec.transposed else 1


def phase_of(spec: ConvSpec, phase: Expr) -> list[Expr]:
    """A phase per axis."""
    return unflat(phase, spec.stride) if spec.transposed else [0] * spec.rank


def grid(spec: ConvSpec) -> tuple[int, ...]:
    """Outputs of a phase per axis."""
    if not spec.transposed:
        return spec.out_spatial
    return tuple(o // s for o, s in zip(spec.out_spatial, spec.stride, strict=True))


def pixels(spec: ConvSpec) -> int:
    """Outputs of a phase, of all images."""
    return spec.n * math.prod(grid(spec))


def taps(spec: ConvSpec) -> tuple[int, ...]:
    """The most taps of a phase, per axis."""
    if not spec.transposed:
        return spec.kernel
    return tuple(ceildiv(k, s) for k, s in zip(spec.kernel, spec.stride, strict=True))


def _by_phase(spec: ConvSpec, axis: int, phase: Sequence[Expr], value: Callable[[int], int]) -> Expr:
    """``value(phase)`` of an axis as a choice among constants: TVM's simplifier has wrong rules for the arithmetic."""
    last = spec.stride[axis] - 1
    chosen = tirx.const(value(last), "int32")
    for i in reversed(range(last)):
        chosen = tirx.Select(phase[axis] == i, tirx.const(value(i), "int32"), chosen)
    return chosen


def _first_tap(spec: ConvSpec, axis: int, phase: int) -> int:
    """The first tap that an output of a phase meets: ``phase + padding - tap * dilation`` is whole strides."""
    stride = spec.stride[axis]
    return (phase + spec.padding[axis][0]) * pow(spec.dilation[axis], -1, stride) % stride if stride > 1 else 0


def _kernel_tap(spec: ConvSpec, axis: int, phase: Sequence[Expr], tap: Expr) -> Expr:
    """The tap of the kernel that a tap of a phase is."""
    if not spec.transposed:
        return tap
    return _by_phase(spec, axis, phase, lambda p: _first_tap(spec, axis, p)) + spec.stride[axis] * tap


def _read(spec: ConvSpec, axis: int, phase: Sequence[Expr], out: Expr, tap: Expr) -> tuple[Expr, list[Expr]]:
    """Where output ``out`` of a phase reads src for a tap, along an axis; and the conditions for that to be inside."""
    (begin, end), size = spec.padding[axis], spec.in_spatial[axis]
    stride, dilation = spec.stride[axis], spec.dilation[axis]
    if not spec.transposed:
        y = out * stride + tap * dilation - begin
        return y, [y >= 0] * bool(begin) + [y < size] * bool(end)
    start = _by_phase(spec, axis, phase, lambda p: (p + begin - _first_tap(spec, axis, p) * dilation) // stride)
    y = out + start - tap * dilation
    inside = [y >= 0, y < size]
    if spec.kernel[axis] % stride:
        inside.append(_kernel_tap(spec, axis, phase, tap) < spec.kernel[axis])
    return y, inside


def output(spec: ConvSpec, index: Sequence[Expr], oc: int) -> tuple[Expr, Expr, list[Expr]]:
    """Image, channel and position in dst of an index ``[phase per axis][group][pixel][one of oc channels]``."""
    *phase, group, pixel, column = index
    image, *out = unflat(pixel, (spec.n, *grid(spec)))
    if spec.transposed:
        out = [q * s + p for q, s, p in zip(out, spec.stride, phase, strict=True)]
    return image, group * oc + column, out
