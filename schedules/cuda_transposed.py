"""Transposed convolution by stride phases, each a product of patches and weights on a GPU's ordinary units.

Applies to  transposed convolutions of any rank, stride, dilation, groups, layout and dtype.
Strategy    1. Output pixels that are the same modulo the stride form a phase: an ordinary convolution at
               stride 1 with the taps that meet them, every stride-th one where the kernel is not dilated.
            2. Phases and groups are a batch of products; weights are packed for each, as cuda_direct's.
            3. Thread blocks, slices and registers as in cuda_direct. Where the stride does not divide the
               kernel some phases have fewer taps: the slices of the others are skipped.
            4. Bias, residual and activation in registers; stores are a stride of pixels apart.
Why not     a product over all taps and col2im: it writes each product, and adds them up again in memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tvm import tirx

from convgen.cpu.vector import written
from convgen.cuda import tiles
from convgen.cuda.simt import LANES, Product, all_of, finish, multiply, packed, read, stores, where
from convgen.cuda.tiles import Size
from convgen.lowering.compute import Operands, ceildiv, copied, unflat
from convgen.lowering.schedule import Written, require


class CudaTransposed(Written):
    id, version = "cuda_transposed", 1

    def applies(self, spec, target):
        require(target.kind == "cuda", "needs a GPU")
        require(spec.transposed, "needs a transposed convolution")

    def space(self, spec, target):
        return tiles.space(_size(spec))

    def valid(self, spec, target, picks):
        tiles.check(target, tiles.of(picks))

    def default(self, spec, target):
        return tiles.default(target, _size(spec), _gather(spec))

    def cost(self, spec, target):
        skipped = spec.ic // spec.groups % self.default(spec, target).tile_k == 0
        met = math.prod(axis.kernel / (axis.period * axis.taps * axis.common) for axis in _axes(spec))
        return tiles.cost(spec, target, _size(spec), _gather(spec), met if skipped else 1)

    def program(self, spec, target, picks):
        ops, tile, size, axes = Operands(spec), tiles.of(picks), _size(spec), _axes(spec)
        channels, columns = spec.ic // spec.groups, size.columns
        one_tap = channels % tile.tile_k == 0  # in a slice

        def split(b):
            """Phase per axis, and group, of a product of the batch."""
            *phase, g = unflat(b, (*spec.stride, spec.groups))
            return phase, g if spec.groups > 1 else 0

        def weight(b, k, o):
            (phase, g), positions = split(b), unflat(k // channels, [axis.taps for axis in axes])
            taps = [axis.tap(r, j) for axis, r, j in zip(axes, phase, positions, strict=True)]
            inside = [c for axis, r, t in zip(axes, phase, taps, strict=True) for c in axis.meets(r, t)]
            return where(inside, ops.weights[(g * channels + k % channels, o, *taps)])

        weights = [packed(size, tile, weight), *map(copied, ops.parameters[1:])]

        def kernel(src, residual, parameters, dst):
            def fetch(block, b, row, start, offset, lanes):
                phase, g = split(b)
                n, *pixel = unflat(row, (spec.n, *(axis.pixels for axis in axes)))
                if one_tap:
                    tap, c = block.let(start // channels), start % channels + offset
                else:
                    k = block.let(start + offset)
                    tap, c = block.let(k // channels), k % channels
                positions = unflat(tap, [axis.taps for axis in axes])
                inside = [row < size.rows] * (size.rows % tile.tile_m != 0)
                inside += [start + offset < size.depth] * (size.depth % tile.tile_k != 0)
                at = []
                for axis, r, q, j in zip(axes, phase, pixel, positions, strict=True):
                    i = block.let(q + axis.first(r) - j * axis.step)
                    inside += [i >= 0, i < axis.inputs]
                    inside += [] if one_tap else axis.meets(r, axis.tap(r, j))
                    at.append(i)
                index = ops.order(n, g * channels + c, at)
                return where(inside, read(src, spec.dtype, index, lanes), lanes)

            def needed(b, start):
                if not one_tap:
                    return []
                phase, _ = split(b)
                positions = unflat(start // channels, [axis.taps for axis in axes])
                each = zip(axes, phase, positions, strict=True)
                return [c for axis, r, j in each for c in axis.meets(r, axis.tap(r, j))]

            def store(block, b, row, column, sums, count):
                phase, g = split(b)
                n, *pixel = unflat(row, (spec.n, *(axis.pixels for axis in axes)))
                at = [block.let(q * axis.stride + r) for axis, q, r in zip(axes, pixel, phase, strict=True)]
                inside = [y < axis.outputs for axis, y in zip(axes, at, strict=True) if axis.outputs % axis.stride]
                o, by_row = g * columns + column, spec.layout == "nhwc"
                with block.when(all_of(inside)) as within:
                    place = ops.order(n, o, at)
                    finish(within, spec, (dst, residual, parameters), place, lambda e: o + e * by_row, sums, count)

            product = Product(size, fetch, _vectors(spec), store, *_stores(spec), needed)
            return multiply(product, tile, parameters["weights"])

        return written(ops, weights, kernel, offsets=False)


class _Axis(NamedTuple):
    """One axis of the phases. Output ``stride * q + r`` meets tap ``t`` of input ``i`` where
    ``stride * q + r + pad = stride * i + dilation * t``: of phase ``r`` every ``period``-th tap, from one on that
    depends on ``r``, and inputs ``step`` apart.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    pad: int

    @property
    def common(self):
        return math.gcd(self.stride, self.dilation)

    @property
    def period(self):
        return self.stride // self.common

    @property
    def step(self):
        return self.dilation // self.common

    @property
    def taps(self):
        """Of a phase, at most."""
        return ceildiv(self.kernel, self.period)

    @property
    def pixels(self):
        """Of a phase, at most."""
        return ceildiv(self.outputs, self.stride)

    def _least(self, r):
        """The first tap that phase ``r``, a number, meets, were the kernel long enough."""
        inverse = pow(self.step, -1, self.period) if self.period > 1 else 0
        return (r + self.pad) // self.common * inverse % self.period

    def tap(self, r, j):
        return r + _stepwise([self._least(i) - i for i in range(self.stride)], r) + j * self.period

    def first(self, r):
        """The input that meets output ``q = 0`` of a phase at its first tap."""
        inputs = [(i + self.pad - self._least(i) * self.dilation) // self.stride for i in range(self.stride)]
        return _stepwise(inputs, r)

    def meets(self, r, tap):
        """The conditions under which a phase meets that tap: of those there may be, the ones not always true."""
        return [(r + self.pad) % self.common == 0] * (self.common > 1) + [tap < self.kernel] * (
            self.kernel % self.period != 0
        )


def _stepwise(values, r):
    """``values[r]``, of values that change seldom. (TVM 0.27 simplifies ``(b // s % s + pad) // s`` to a wrong one.)"""
    changes = [(i, values[i] - values[i - 1]) for i in range(1, len(values)) if values[i] != values[i - 1]]
    return sum((tirx.Select(r >= i, delta, 0) for i, delta in changes), values[0])


def _axes(spec):
    pads = [begin for begin, _ in spec.padding]
    sizes = (spec.in_spatial, spec.out_spatial, spec.kernel, spec.stride, spec.dilation, pads)
    return [_Axis(*values) for values in zip(*sizes, strict=True)]


def _size(spec):
    axes = _axes(spec)
    rows = spec.n * math.prod(axis.pixels for axis in axes)
    depth = spec.ic // spec.groups * math.prod(axis.taps for axis in axes)
    return Size(spec.groups * math.prod(spec.stride), rows, spec.oc // spec.groups, depth)


def _vectors(spec):
    """The axis along which four elements of a patch are neighbours, in whole vectors."""
    return "depth" if spec.layout == "nhwc" and spec.ic // spec.groups % LANES == 0 else ""


def _stores(spec):
    """How sums are stored: neighbouring pixels of a phase are neighbours at stride 1 alone."""
    by_row, piece = stores(spec, spec.oc // spec.groups)
    return by_row, piece if by_row or set(spec.stride) == {1} else 1


def _gather(spec):
    """Instructions that fetch an element of a patch."""
    return 4 if _vectors(spec) else 15
