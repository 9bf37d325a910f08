"""Transposed convolution by stride phases, each a product of patches and weights on a GPU's ordinary units.

Applies to  transposed convolutions of any rank, stride, dilation, groups, layout and dtype.
Strategy    1. Output pixels that are the same modulo the stride form a phase: an ordinary convolution at
               stride 1 with the taps that meet them, every stride-th one where the kernel is not dilated.
            2. Phases and groups are a batch of products; weights are packed for each, as cuda_direct's.
            3. Thread blocks, slices and registers as in cuda_direct. Where the stride does not divide the
               kernel, some phases have fewer taps than others: the slices of taps they lack are skipped.
            4. Bias, residual and activation in registers; stores are a stride of pixels apart.
Why not     a product over all taps and col2im: it writes each product, and adds them up again in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from convgen.cpu.vector import Block, written
from convgen.cuda import tiles
from convgen.cuda.simt import LANES, Buffers, Product, all_of, finish, multiply, packed, read, stores, where
from convgen.cuda.tiles import Size, Tile
from convgen.deferred import tirx
from convgen.lowering.compute import Expr, Operands, ceildiv, copied, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, require

if TYPE_CHECKING:
    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec


class CudaTransposed(Written):
    id, version = "cuda_transposed", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cuda", "needs a GPU")
        require(spec.transposed, "needs a transposed convolution")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        return tiles.space(_size(spec))

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        tiles.check(target, tiles.of(picks))

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return tiles.default(target, _size(spec), _gather(spec))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        skipped = spec.ic // spec.groups % self.default(spec, target).tile_k == 0
        met = math.prod(axis.kernel / (axis.period * axis.taps * axis.common) for axis in _axes(spec))
        return tiles.cost(spec, target, _size(spec), _gather(spec), met if skipped else 1)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, tile, size, axes = Operands(spec), tiles.of(picks), _size(spec), _axes(spec)
        channels = spec.ic // spec.groups

        def weight(item: Expr, k: Expr, column: Expr) -> Expr:
            (phases, group), steps = _phases_and_group(spec, item), unflat(k // channels, [axis.taps for axis in axes])
            taps = [axis.tap(phase, step) for axis, phase, step in zip(axes, phases, steps, strict=True)]
            inside = _conditions(axes, phases, taps)
            return where(inside, ops.weights[(group * channels + k % channels, column, *taps)])

        weights = [packed(size, tile, weight), *map(copied, ops.parameters[1:])]

        def kernel(*buffers: Any) -> Any:
            product = _product(ops, tile, Buffers(*buffers))
            return multiply(product, tile, Buffers(*buffers).parameters["weights"])

        return written(ops, weights, kernel, offsets=False)


def _phases_and_group(spec: ConvSpec, item: Expr) -> tuple[list[Expr], Expr]:
    """Of a product of the batch: its phase per axis, and its group."""
    *phases, group = unflat(item, (*spec.stride, spec.groups))
    return phases, group if spec.groups > 1 else 0


def _product(ops: Operands, tile: Tile, buffers: Buffers) -> Product:
    """The products of patches, fetched from src, and weights: one for each phase and group."""
    spec, size, axes = ops.spec, _size(ops.spec), _axes(ops.spec)
    channels, most_taps = spec.ic // spec.groups, [axis.taps for axis in axes]
    grid = (spec.n, *(axis.pixels for axis in axes))
    one_tap = channels % tile.tile_k == 0  # a slice is of one tap

    def fetch(block: Block, item: Expr, row: Expr, start: Expr, offset: Expr, lanes: int) -> Expr:
        phases, group = _phases_and_group(spec, item)
        image, *pixel = unflat(row, grid)
        if one_tap:
            tap, channel = block.let(start // channels), start % channels + offset
        else:
            k = block.let(start + offset)
            tap, channel = block.let(k // channels), k % channels
        inside = [row < size.rows] * (size.rows % tile.tile_m != 0)
        inside += [start + offset < size.depth] * (size.depth % tile.tile_k != 0)
        position = []
        for axis, phase, q, step in zip(axes, phases, pixel, unflat(tap, most_taps), strict=True):
            y = block.let(q + axis.first_input(phase) - step * axis.step)
            inside += [y >= 0, y < axis.inputs]
            inside += [] if one_tap else axis.meets(phase, axis.tap(phase, step))
            position.append(y)
        index = ops.order(image, group * channels + channel, position)
        return where(inside, read(buffers.src, spec.dtype, index, lanes), lanes)

    def needed(item: Expr, start: Expr) -> list[Expr]:
        if not one_tap:
            return []
        (phases, _), steps = _phases_and_group(spec, item), unflat(start // channels, most_taps)
        taps = [axis.tap(phase, step) for axis, phase, step in zip(axes, phases, steps, strict=True)]
        return _conditions(axes, phases, taps)

    def store(block: Block, item: Expr, row: Expr, column: Expr, sums: Any, count: int) -> None:
        phases, group = _phases_and_group(spec, item)
        image, *pixel = unflat(row, grid)
        position = [block.let(q * axis.stride + phase) for axis, q, phase in zip(axes, pixel, phases, strict=True)]
        inside = [y < axis.outputs for axis, y in zip(axes, position, strict=True) if axis.outputs % axis.stride]
        channel, along_channels = group * size.columns + column, spec.layout == "nhwc"
        with block.when(all_of(inside)) as within:
            place = ops.order(image, channel, position)
            finish(within, spec, buffers, place, lambda e: channel + e * along_channels, sums, count)

    return Product(size, fetch, _vectors(spec), store, *_stores(spec), needed)


class _Axis(NamedTuple):
    """One axis of the phases.

    Output ``stride * q + phase`` takes input ``i`` times tap ``t`` where
    ``stride * q + phase + pad = stride * i + dilation * t``. So a phase meets every ``period``-th tap, from a first
    one on that depends on the phase; from one of these taps to the next, the input moves back by ``step``.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    pad: int

    @property
    def common(self) -> int:
        """The greatest common divisor of stride and dilation."""
        return math.gcd(self.stride, self.dilation)

    @property
    def period(self) -> int:
        return self.stride // self.common

    @property
    def step(self) -> int:
        return self.dilation // self.common

    @property
    def taps(self) -> int:
        """Taps of a phase, at most."""
        return ceildiv(self.kernel, self.period)

    @property
    def pixels(self) -> int:
        """Outputs of a phase, at most."""
        return ceildiv(self.outputs, self.stride)

    def _first_tap(self, phase: int) -> int:
        """The first tap that a phase, a number, meets; it may lie past the kernel's end."""
        inverse = pow(self.step, -1, self.period) if self.period > 1 else 0
        return (phase + self.pad) // self.common * inverse % self.period

    def tap(self, phase: Expr, number: Expr) -> Expr:
        """The kernel's tap that is a phase's tap of this number."""
        return phase + _stepwise([self._first_tap(p) - p for p in range(self.stride)], phase) + number * self.period

    def first_input(self, phase: Expr) -> Expr:
        """The input that output ``q = 0`` of a phase takes at the phase's first tap."""
        inputs = [(p + self.pad - self._first_tap(p) * self.dilation) // self.stride for p in range(self.stride)]
        return _stepwise(inputs, phase)

    def meets(self, phase: Expr, tap: Expr) -> list[Expr]:
        """The conditions under which a phase meets that tap, without those that always hold."""
        conditions = [(phase + self.pad) % self.common == 0] * (self.common > 1)
        return conditions + [tap < self.kernel] * (self.kernel % self.period != 0)


def _conditions(axes: Sequence[_Axis], phases: Sequence[Expr], taps: Sequence[Expr]) -> list[Expr]:
    """When phases meet taps, along all axes."""
    return [c for axis, phase, tap in zip(axes, phases, taps, strict=True) for c in axis.meets(phase, tap)]


def _stepwise(values: Sequence[int], index: Expr) -> Expr:
    """``values[index]``, as a sum over where they change, which is seldom.

    Arithmetic will not do: TVM 0.27 simplifies ``(b // s % s + pad) // s`` to another value.
    """
    changes = [(i, values[i] - values[i - 1]) for i in range(1, len(values)) if values[i] != values[i - 1]]
    return sum((tirx.Select(index >= i, delta, 0) for i, delta in changes), values[0])


def _axes(spec: ConvSpec) -> list[_Axis]:
    pads = [begin for begin, _ in spec.padding]
    sizes = (spec.in_spatial, spec.out_spatial, spec.kernel, spec.stride, spec.dilation, pads)
    return [_Axis(*values) for values in zip(*sizes, strict=True)]


def _size(spec: ConvSpec) -> Size:
    """Of the products, one for each phase and group: rows are a phase's pixels, columns a group's output channels."""
    axes = _axes(spec)
    rows = spec.n * math.prod(axis.pixels for axis in axes)
    depth = spec.ic // spec.groups * math.prod(axis.taps for axis in axes)
    return Size(spec.groups * math.prod(spec.stride), rows, spec.oc // spec.groups, depth)


def _vectors(spec: ConvSpec) -> str:
    """The axis along which four elements of a patch are neighbours, in whole vectors."""
    return "depth" if spec.layout == "nhwc" and spec.ic // spec.groups % LANES == 0 else ""


def _stores(spec: ConvSpec) -> tuple[bool, int]:
    """``by_row`` and ``piece`` of the stores: a phase's neighbouring pixels are neighbours in dst at stride 1 only."""
    by_row, piece = stores(spec, spec.oc // spec.groups)
    return by_row, piece if by_row or set(spec.stride) == {1} else 1


def _gather(spec: ConvSpec) -> int:
    """Instructions that fetch an element of a patch, counted about."""
    return 4 if _vectors(spec) else 15
