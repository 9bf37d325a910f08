"""Grouped and depthwise convolution of channels-last data: output channels of whole groups in the vector lanes.

Applies to  NHWC (NWC, NDHWC) convolutions with groups that are not transposed, of any rank, kernel, stride,
            dilation and number of channels per group.
Strategy    1. A vector is the output channels of as many whole groups as there is room for, or a part of one
               group's. The last one overlaps its neighbour where they do not divide: all are the same code.
            2. Pack weights as [vector][rows of the kernel][ic][k][lanes]: in the order they are used.
            3. Keep a tile of `tile_ow` pixels × one vector of one output row in registers. Nothing is copied: src is
               loaded where it lies, and columns at the edge are code of their own, without the taps that miss it.
            4. Loop over those rows of the kernel that meet the image, then over the group's input channels,
               `unroll_c` at a time. A pixel's vector has in each lane the c-th channel of the lane's group: loaded
               as it is (depthwise), broadcast (one group) or permuted; all taps of the row use it.
            5. `block_c` vectors for one tile before the next tile, so that src is read in the order it lies.
            6. One parallel loop over batch × blocks of vectors × parts of the rows (in 1-D of the tiles).
Why not     pixels in the lanes (cpu_masked, cpu_rows): channels-last data would have to be transposed.
"""

from __future__ import annotations

import math
from contextlib import ExitStack

from tvm import te, tirx

from convgen.compute import ACCUMULATOR, Operands, ceildiv, copied, flat, unflat, widen
from convgen.schedule import Picks, Schedule, Space, require
from convgen.vector import Block, finish, gathered, load, meeting, runs, written

#: Unrolled multiply-adds of all tiles that are written out.
MOST_UNROLLED = 4096


class CpuGroupedLast(Schedule):
    id, version = "cpu_grouped_last", 1

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nhwc", "needs NHWC")
        require(spec.groups > 1, "needs groups")
        require(spec.kernel[-1] <= 64, "needs at most 64 taps along the row")

    def space(self, spec, target):
        rows, width = _output(spec)
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * spec.oc)]
        depth = spec.ic // spec.groups
        return Space(
            lanes=lanes,
            tile_ow=sorted({w for w in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28) if w <= width}),
            unroll_c=[c for c in range(1, 17) if depth % c == 0],
            block_c=[b for b in (1, 2, 4, 8, 16, 32, 64) if b == 1 or b * lanes[0] < 2 * spec.oc],
            parallel_oh=[p for p in (1, 2, 4, 8, 16, 32) if p <= (rows if spec.rank > 1 else width)],
        )

    def valid(self, spec, target, picks):
        used = picks.tile_ow + spec.kernel[-1] + 1 + (target.vector_bits != 512)
        require(picks.tile_ow == 1 or used <= target.vector_registers, f"{used} vectors, {target.vector_registers} registers")
        require(picks.block_c == 1 or picks.block_c < 2 * _Lanes(spec, picks.lanes).vectors, "block_c exceeds the vectors")
        if spec.rank == 1:
            require(picks.parallel_oh <= ceildiv(spec.out_spatial[0], picks.tile_ow), "fewer tiles than parallel_oh")
        tiles = _tiles(spec, picks.tile_ow)
        unrolled = sum(len(uses) for *_, tile in tiles for _, uses in tile[1]) * picks.unroll_c
        require(unrolled <= MOST_UNROLLED or picks.tile_ow == picks.unroll_c == 1, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec, target):
        return next(iter(self.space(spec, target)))

    def cost(self, spec, target):
        return 1.0

    def program(self, spec, target, picks):
        ops, vectors = Operands(spec), _Lanes(spec, picks.lanes)
        rows, width = spec.kernel[:-1], spec.kernel[-1]

        def packed_weights(v, row, c, kx, t):
            o = tirx.min(vectors.first(v) + t, spec.oc - 1) if vectors.count < picks.lanes else vectors.first(v) + t
            value = ops.weights[(o, c, *unflat(row, rows), kx)]
            if vectors.count == picks.lanes:
                return value
            return tirx.if_then_else(t < vectors.count, value, tirx.const(0, ACCUMULATOR))

        shape = (vectors.vectors, math.prod(rows), vectors.depth, width, picks.lanes)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p, spec.oc + picks.lanes) for p in ops.parameters[1:]]  # whole vectors from any channel
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, vectors, *buffers))

    def apply(self, sch, spec, target, picks):
        pass  # the statements are final


def _kernel(spec, picks, vectors, src, residual, parameters, dst):
    """All of the layer: a loop over images, blocks of vectors and parts of the rows."""
    lanes, tiles = picks.lanes, _tiles(spec, picks.tile_ow)
    outer = spec.out_spatial[:-1]
    rows = math.prod(outer) if outer else ceildiv(spec.out_spatial[0], picks.tile_ow)
    blocks, parts = ceildiv(vectors.vectors, picks.block_c), picks.parallel_oh
    weights = parameters.pop("weights")
    whole = Block()

    def tile_of(block, n, v, at, x0, tile):
        """A vector of channels × the pixels from x0 on, in the row ``at``."""
        pixels, met = tile
        sums = block.registers(range(pixels), lanes)
        begin = x0 * spec.stride[-1] - spec.padding[-1][0]
        with ExitStack() as loops:
            inner, taps, where = block, [], []
            for axis, y in enumerate(at):
                first, count = meeting(spec, axis, y)
                inner, k = loops.enter_context(inner.loop(count))
                taps.append(inner.let(first + k))
                where.append(inner.let(y * spec.stride[axis] + taps[-1] * spec.dilation[axis] - spec.padding[axis][0]))
            inner, chunk = loops.enter_context(inner.loop(vectors.depth // picks.unroll_c))
            c0 = inner.let(chunk * picks.unroll_c)
            row = inner.let(flat(taps, spec.kernel[:-1]))
            channel = inner.let(vectors.source(v) + c0)
            for c in range(picks.unroll_c):
                factors = {}
                for offset, uses in met:
                    value = inner.let(vectors.read(src, spec, [n, *where, begin + offset], channel, c, picks.unroll_c))
                    for pixel, kx in uses:
                        if kx not in factors:
                            factors[kx] = inner.let(load(weights, "f32", [v, row, c0 + c, kx, 0], lanes, lanes))
                        sums.add(inner, pixel, value * factors[kx])
        o = block.let(vectors.first(v))
        given = {k: block.let(load(p, "f32", [o], lanes, lanes)) for k, p in parameters.items()}
        for pixel in range(pixels):
            finish(block, spec, dst, residual, [n, *at, x0 + pixel, o], sums[pixel], lanes, vectors.count, **given)

    with whole.loop(spec.n * blocks * parts, parallel=True) as (task, index):
        rest, part = index // parts, task.let(index % parts)
        n, first = task.let(rest // blocks), task.let(rest % blocks * picks.block_c)
        count = picks.block_c
        if vectors.vectors % count:
            count = task.let(tirx.min(count, vectors.vectors - first))
        start, end = (task.let(p * rows // parts) for p in (part, part + 1))
        with task.loop(end - start if outer else 1) as (row, i):
            at = [row.let(y) for y in unflat(start + i, outer)]
            for begin, number, tile in tiles:
                if not outer and parts > 1:
                    low = row.let(tirx.max(begin, start))
                    number = row.let(tirx.max(tirx.min(begin + number, end) - low, 0))
                    begin = low
                with row.loop(number) as (inside, j):
                    x0 = inside.let((begin + j) * picks.tile_ow)
                    with inside.loop(count) as (one, v):
                        tile_of(one, n, one.let(first + v), at, x0, tile)
    return whole.statement()


class _Lanes:
    """Which channels the lanes of a vector hold: ``count`` of them, of ``groups`` groups or a part of one."""

    def __init__(self, spec, lanes):
        self.lanes, self._all = lanes, spec.groups
        self.depth, self._outputs = spec.ic // spec.groups, spec.oc // spec.groups
        self.groups = min(max(1, lanes // self._outputs), spec.groups)
        self._parts = ceildiv(self._outputs, lanes)
        self.count = min(lanes, self.groups * self._outputs)
        self.vectors = ceildiv(spec.groups, self.groups) * self._parts

    def _group(self, v):
        """The first group of a vector."""
        return tirx.min(v // self._parts * self.groups, self._all - self.groups)

    def first(self, v):
        """The first output channel."""
        within = tirx.min(v % self._parts * self.lanes, self._outputs - self.count) if self._parts > 1 else 0
        return self._group(v) * self._outputs + within

    def source(self, v):
        """The first input channel."""
        return self._group(v) * self.depth

    def read(self, src, spec, pixel, channel, c, several):
        """The c-th input channel of each lane's group; ``several`` are read of each from ``channel`` on."""
        order = [min(t // self._outputs, self.groups - 1) * self.depth + c for t in range(self.lanes)]
        if self.groups == 1:
            return tirx.Broadcast(widen(src[(*pixel, channel + c)], spec.dtype), self.lanes)
        length = (self.groups - 1) * self.depth + several
        if self.depth == self._outputs == 1:
            return load(src, spec.dtype, [*pixel, channel], self.lanes, length)
        width = min(self.lanes, 1 << (length - 1).bit_length())
        loaded = {
            i: load(src, spec.dtype, [*pixel, channel + i * width], width, length - i * width)
            for i in sorted({e // width for e in order})
        }
        return gathered([loaded.get(i) for i in range(max(loaded) + 1)], order, width)


def _tiles(spec, size):
    """A row of output pixels as tiles of ``size``: runs of equal ones, ``(first, count, tile)``.

    A tile is the number of its pixels and what of the image they meet: ``(offset, ((pixel, kx), …))``, the offset
    counted from the tile's first input pixel, padding included.
    """
    kernel, stride, dilation = spec.kernel[-1], spec.stride[-1], spec.dilation[-1]
    before, width, out = spec.padding[-1][0], spec.in_spatial[-1], spec.out_spatial[-1]

    def tile(i):
        pixels, met = min(size, out - i * size), {}
        for pixel in range(pixels):
            for kx in range(kernel):
                offset = pixel * stride + kx * dilation
                if 0 <= i * size * stride + offset - before < width:
                    met.setdefault(offset, []).append((pixel, kx))
        return pixels, tuple((offset, tuple(met[offset])) for offset in sorted(met))

    count = ceildiv(out, size)
    start = min(count, ceildiv(before, size * stride))
    reach = (size - 1) * stride + (kernel - 1) * dilation + 1
    end = max(start, min(out // size, (width + before - reach) // (size * stride) + 1))
    left, right = (runs([tile(i) for i in edge]) for edge in (range(start), range(end, count)))
    middle = [(start, end - start, tile(start))] if end > start else []
    return [*left, *middle, *((first + end, times, found) for first, times, found in right)]


def _output(spec):
    """(rows, width) of the output."""
    return math.prod(spec.out_spatial[:-1]), spec.out_spatial[-1]
