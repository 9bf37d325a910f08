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
from typing import NamedTuple

from tvm import te, tirx

from convgen.cpu.vector import Block, finish, load, load_parameters, meeting, runs, written, zeros
from convgen.lowering.compute import ACCUMULATOR, Operands, ceildiv, copied, flat, unflat, widen
from convgen.lowering.schedule import Picks, Space, Written, require

#: Unrolled multiply-adds of all tiles that are written out.
MOST_UNROLLED = 4096
#: Bytes after which addresses meet in the same set of the L1 cache.
L1_WAY = 4096
#: Pixels in a tile of the default: each is a place of its own in memory, in several rows.
MOST_PIXELS = 8
#: Input channels that the default unrolls.
MOST_CHANNELS = 8
#: Taps of a row that are written out; with more each is a pass of a loop.
MOST_TAPS = 64


class CpuGroupedLast(Written):
    id, version = "cpu_grouped_last", 1

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nhwc", "needs NHWC")
        require(spec.groups > 1, "needs groups")

    def space(self, spec, target):
        rows, width = math.prod(_outer(spec)), _row(spec).out
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * spec.oc)]
        depth = spec.ic // spec.groups
        return Space(
            lanes=lanes,
            tile_ow=[w for w in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28) if w <= width],
            tile_c=[t for t in (1, 2, 3, 4) if t == 1 or (t - 1) * lanes[0] < spec.oc // spec.groups],
            unroll_c=[c for c in range(1, 17) if depth % c == 0],
            block_c=[b for b in (1, 2, 4, 8, 16, 32, 64) if b == 1 or b * lanes[0] < 2 * spec.oc],
            parallel_oh=[p for p in (1, 2, 4, 8, 16, 32) if p <= (rows if _outer(spec) else width)],
        )

    def valid(self, spec, target, picks):
        vectors = _Vectors(spec, picks)
        # Beside the sums the weights of the taps that a pixel meets, and the pixel.
        used = picks.tile_c * (picks.tile_ow + min(picks.tile_ow, _row(spec).kernel)) + 1
        small = picks.tile_ow == picks.tile_c == picks.unroll_c == 1
        require(small or used <= target.vector_registers, f"{used} vectors, {target.vector_registers} registers")
        require(vectors.parts % picks.tile_c == 0, "tile_c needs as many vectors in a group, or a multiple")
        require(picks.block_c < 2 * vectors.tiles, "block_c exceeds the vectors")
        if not _outer(spec):
            require(picks.parallel_oh <= ceildiv(_row(spec).out, picks.tile_ow), "fewer tiles than parallel_oh")
        products = sum(len(uses) for *_, tile in _tiles(_row(spec), picks.tile_ow) for _, uses in tile[1])
        unrolled = products * picks.unroll_c * picks.tile_c
        require(small or unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec, target):
        space = self.space(spec, target).domains
        small = Picks(lanes=space["lanes"][0], tile_ow=1, tile_c=1, unroll_c=1, block_c=1, parallel_oh=1)
        wide = [
            small.replace(lanes=n, tile_ow=w, tile_c=c)
            for n in space["lanes"]
            for w in space["tile_ow"]
            for c in space["tile_c"]
            if w <= MOST_PIXELS
        ]
        for unroll_c in sorted((c for c in space["unroll_c"] if c <= MOST_CHANNELS), reverse=True):
            options = [
                p for p in (w.replace(unroll_c=unroll_c) for w in wide) if self.reason_against(spec, target, p) is None
            ]
            if options:
                break
        picks = min(options, key=lambda p: self._cycles(spec, target, p), default=small)
        # All vectors where their weights, which the next tile reads again, leave room in the L1 cache: src is then
        # read as it lies.
        vectors = _Vectors(spec, picks)
        fits = target.l1 // (4 * picks.lanes * picks.tile_c * vectors.depth * math.prod(spec.kernel))
        most = vectors.tiles if vectors.tiles <= fits // 2 else max(1, fits // 4)
        block_c = min((b for b in space["block_c"] if b >= most), default=space["block_c"][-1])
        picks = picks.replace(block_c=block_c)
        tasks = spec.n * ceildiv(vectors.tiles, block_c)
        splits = [picks.replace(parallel_oh=p) for p in space["parallel_oh"]]
        splits = [p for p in splits if self.reason_against(spec, target, p) is None]
        enough = [p for p in splits if tasks * p.parallel_oh >= 4 * target.cores]
        return enough[0] if enough else splits[-1]

    def _cycles(self, spec, target, picks):
        """Cycles of an image: products, and in their shade loads and shuffles; the factors were measured."""
        vectors, row = _Vectors(spec, picks), _row(spec)
        # Of a cycle: vectors of 256 bits go in pairs where there are larger ones; narrower ones gain nothing.
        share = max(picks.lanes, min(8, target.lanes)) / target.lanes * (1 if picks.lanes == target.lanes else 1.1)
        taps = row.kernel
        steps = math.prod(spec.kernel) // taps * vectors.depth
        # Of a register tile that exceeds the L1 cache weights come from the L2 cache.
        far = 4 * picks.lanes * picks.tile_c * math.prod(spec.kernel) * vectors.depth > target.l1
        # Pixels a power of two apart meet in the same sets of the L1 cache.
        crowd = math.gcd(4 * spec.ic, L1_WAY) / L1_WAY

        def tile(pixels):
            sums = pixels * picks.tile_c
            offsets = {p * row.stride + k * row.dilation for p in range(pixels) for k in range(taps)}
            loads = len(offsets) + taps * picks.tile_c * (2 if far else 1)
            products = sums * taps * max(1.0, 4 / (sums * share))
            step = share * (max(products, loads) + 0.12 * loads) + 2 / picks.unroll_c
            if len(offsets) * crowd > 9:
                step *= 1.3
            # Permuted vectors are kept for all channels that they hold.
            if vectors.permuted and pixels + len(offsets) + taps > target.vector_registers:
                step *= 1.1
            return steps * step + 2 * sums * share + 8

        full, rest = divmod(row.out, picks.tile_ow)
        tiles = full * tile(picks.tile_ow) + (tile(rest) if rest else 0)
        return math.prod(_outer(spec)) * vectors.tiles * tiles

    def cost(self, spec, target):
        cycles = self._cycles(spec, target, self.default(spec, target)) * spec.n
        return 0.8 * cycles * 2 * target.lanes / target.peak_flops + sum(spec.bytes.values()) / (target.cores * 80e9)

    def program(self, spec, target, picks):
        ops, vectors = Operands(spec), _Vectors(spec, picks)
        looped, taps = spec.kernel[: len(_outer(spec))], _row(spec).kernel

        def packed_weights(b, row, c, kx, v, t):
            o = vectors.first(b * picks.tile_c + v) + t
            o = o if vectors.count == picks.lanes else tirx.min(o, spec.oc - 1)
            value = ops.weights[(o, c, *unflat(row, looped), kx)[: 2 + spec.rank]]
            if vectors.count == picks.lanes:
                return value
            return tirx.if_then_else(t < vectors.count, value, tirx.const(0, ACCUMULATOR))

        shape = (vectors.tiles, math.prod(looped), vectors.depth, taps, picks.tile_c, picks.lanes)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p, spec.oc + picks.lanes) for p in ops.parameters[1:]]  # whole vectors from any channel
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, vectors, *buffers))


def _kernel(spec, picks, vectors, src, residual, parameters, dst):
    """All of the layer: a loop over images, blocks of vectors and parts of the rows."""
    lanes, outer, line = picks.lanes, _outer(spec), _row(spec)
    tiles = _tiles(line, picks.tile_ow)
    rows = math.prod(outer) if outer else ceildiv(line.out, picks.tile_ow)
    blocks, parts = ceildiv(vectors.tiles, picks.block_c), picks.parallel_oh
    size = ceildiv(vectors.tiles, blocks)  # all alike, or the last one is smaller
    weights = parameters.pop("weights")
    whole = Block()

    def tile_of(block, n, b, at, x0, tile):
        """``tile_c`` vectors of channels × the pixels from x0 on, in the row ``at``."""
        pixels, met = tile
        each = [block.let(b * picks.tile_c + v) for v in range(picks.tile_c)]
        sums = block.registers([(p, v) for p in range(pixels) for v in range(picks.tile_c)], lanes)
        begin = x0 * line.stride - line.before
        with ExitStack() as loops:
            inner, taps, where = block, [], []
            for axis, y in enumerate(at):
                first, count = meeting(spec, axis, y)
                inner, k = loops.enter_context(inner.loop(count))
                taps.append(inner.let(first + k))
                where.append(inner.let(y * spec.stride[axis] + taps[-1] * spec.dilation[axis] - spec.padding[axis][0]))
            row = inner.let(flat(taps, spec.kernel[: len(outer)]))
            inner, chunk = loops.enter_context(inner.loop(vectors.depth // picks.unroll_c))
            c0 = inner.let(chunk * picks.unroll_c)
            channel = inner.let(vectors.source(each[0]) + c0)

            for c in range(picks.unroll_c):
                factors = {}
                for offset, uses in met:
                    pixel = [n, *where, begin + offset][: 1 + spec.rank]
                    factor = inner.let(vectors.read(src, spec, pixel, channel, c, picks.unroll_c))
                    for p, kx in uses:
                        for v in range(picks.tile_c):
                            if (kx, v) not in factors:
                                place = [b, row, c0 + c, kx, v, 0]
                                factors[kx, v] = inner.let(load(weights, "f32", place, lanes, lanes))
                            sums.add(inner, (p, v), factor * factors[kx, v])
        for v in range(picks.tile_c):
            o = block.let(vectors.first(each[v]))
            given = load_parameters(block, parameters, o, lanes, lanes)
            for p in range(pixels):
                place = [*[n, *at, x0 + p][: 1 + spec.rank], o]
                finish(block, spec, dst, residual, place, sums[p, v], lanes, vectors.count, **given)

    with whole.loop(spec.n * blocks * parts, parallel=True) as (task, index):
        rest, part = index // parts, task.let(index % parts)
        n, first = task.let(rest // blocks), task.let(rest % blocks * size)
        count = size if vectors.tiles % size == 0 else task.let(tirx.max(tirx.min(size, vectors.tiles - first), 0))
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
                    with inside.loop(count) as (one, b):
                        tile_of(one, n, one.let(first + b), at, x0, tile)
    return whole.statement()


class _Vectors:
    """Which channels the lanes of a vector hold: ``count`` of them, of ``groups`` groups or a part of one."""

    def __init__(self, spec, picks):
        self.lanes, self._all = picks.lanes, spec.groups
        self.depth, self._outputs = spec.ic // spec.groups, spec.oc // spec.groups
        self.groups = min(max(1, self.lanes // self._outputs), spec.groups)
        self.parts = ceildiv(self._outputs, self.lanes)
        self.count = min(self.lanes, self.groups * self._outputs)
        #: Whether a vector of inputs is made of loaded ones, neither loaded nor broadcast.
        self.permuted = self.groups > 1 and self.depth * self._outputs > 1
        self.tiles = ceildiv(spec.groups, self.groups) * self.parts // picks.tile_c

    def _group(self, v):
        """The first group of a vector."""
        return tirx.min(v // self.parts * self.groups, self._all - self.groups)

    def first(self, v):
        """The first output channel."""
        within = tirx.min(v % self.parts * self.lanes, self._outputs - self.count) if self.parts > 1 else 0
        return self._group(v) * self._outputs + within

    def source(self, v):
        """The first input channel."""
        return self._group(v) * self.depth

    def read(self, src, spec, pixel, channel, c, several):
        """The c-th input channel of each lane's group; ``several`` are read of each from ``channel`` on."""
        if self.groups == 1:
            return tirx.Broadcast(widen(src[(*pixel, channel + c)], spec.dtype), self.lanes)
        length = (self.groups - 1) * self.depth + several
        if not self.permuted:
            return load(src, spec.dtype, [*pixel, channel], self.lanes, length)
        order = [min(t // self._outputs, self.groups - 1) * self.depth + c for t in range(self.lanes)]
        width = min(self.lanes, 1 << (length - 1).bit_length())
        used = sorted({e // width for e in order})
        loaded = [load(src, spec.dtype, [*pixel, channel + i * width], width, length - i * width) for i in used]
        loaded += [zeros(width)] * (self.lanes // width - len(used))  # shuffles take no fewer lanes than they give
        return tirx.Shuffle(loaded, [used.index(e // width) * width + e % width for e in order])


class _Row(NamedTuple):
    """The axis whose taps are written out."""

    kernel: int
    stride: int
    dilation: int
    before: int
    size: int
    out: int


def _outer(spec):
    """The output's other axes, along which the taps are passes of loops: all of them where a row has many taps."""
    return spec.out_spatial if spec.kernel[-1] > MOST_TAPS else spec.out_spatial[:-1]


def _row(spec):
    """The last axis, or where it is among the others, a single pixel."""
    if spec.kernel[-1] > MOST_TAPS:
        return _Row(1, 1, 1, 0, 1, 1)
    along = (spec.kernel, spec.stride, spec.dilation, [begin for begin, _ in spec.padding])
    return _Row(*(axis[-1] for axis in along), spec.in_spatial[-1], spec.out_spatial[-1])


def _tiles(row, size):
    """A row of output pixels as tiles of ``size``: runs of equal ones, ``(first, count, tile)``.

    A tile is the number of its pixels and what of the image they meet: ``(offset, ((pixel, kx), …))``, the offset
    counted from the tile's first input pixel, padding included.
    """

    def tile(i):
        pixels, met = min(size, row.out - i * size), {}
        for pixel in range(pixels):
            for kx in range(row.kernel):
                offset = pixel * row.stride + kx * row.dilation
                if 0 <= i * size * row.stride + offset - row.before < row.size:
                    met.setdefault(offset, []).append((pixel, kx))
        return pixels, tuple((offset, tuple(met[offset])) for offset in sorted(met))

    advance = size * row.stride
    start = min(ceildiv(row.out, size), ceildiv(row.before, advance))
    reach = (size - 1) * row.stride + (row.kernel - 1) * row.dilation + 1
    end = max(start, min(row.out // size, (row.size + row.before - reach) // advance + 1))
    left, right = (runs([tile(i) for i in edge]) for edge in (range(start), range(end, ceildiv(row.out, size))))
    middle = [(start, end - start, tile(start))] if end > start else []
    return [*left, *middle, *((first + end, times, found) for first, times, found in right)]
