"""Grouped and depthwise convolution of channels-last data: output channels of whole groups in the vector lanes.

Applies to  NHWC (NWC, NDHWC) convolutions with groups that are not transposed, of any rank, kernel, stride,
            dilation and number of channels per group.
Strategy    1. A vector is the output channels of as many whole groups as there is room for, or a part of one
               group's. Where they do not divide, the last one overlaps its neighbour, so that all share their code.
            2. Pack weights as [vector][rows of the kernel][ic][k][lanes]: in the order they are used.
            3. Keep a tile of `tile_ow` pixels of one output row × `tile_c` vectors in registers. Nothing is copied: src
               is loaded where it lies, and columns at the edge are code of their own, without the taps that miss it.
            4. Loop over those rows of the kernel that meet the image, then over the group's input channels,
               `unroll_c` at a time. A pixel's vector has in each lane the c-th channel of the lane's group: loaded
               as it is (depthwise), broadcast (one group) or permuted; all taps of the row use it.
            5. Compute `block_c` tiles of vectors for one tile of pixels before the next pixels, so that src is read in
               the order it lies.
            6. One parallel loop over batch × blocks of vectors × parts of the rows (in 1-D of the tiles).
Why not     pixels in the lanes (cpu_masked, cpu_rows): channels-last data would have to be transposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from tvm import te, tirx

from convgen.cpu.vector import Block, finish, load, load_parameters, meeting, runs, written, zeros
from convgen.hardware.target import Target
from convgen.lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv, copied, flat, unflat, widen
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import ConvSpec

#: Unrolled multiply-adds of all tiles that are written out.
MOST_UNROLLED = 4096
#: Bytes after which addresses meet in the same set of the L1 cache: 64 sets of lines of 64 bytes.
L1_WAY = 4096
#: Pixels in a tile of the default: each is a place of its own in memory, in several rows.
MOST_PIXELS = 8
#: Input channels that the default unrolls.
MOST_CHANNELS = 8
#: Taps of a row that are written out; with more each is a pass of a loop.
MOST_TAPS = 64

# What `cost` counts. Fitted to measured kernels.
#: Cycles from one FMA to the next on the same sum.
FMA_LATENCY = 4
#: Cycles that a load adds, although products go on beside it.
UNHIDDEN_LOAD = 0.12
#: Cycles of a pass of the loop over channels; to store a sum; of a tile.
PASS, STORE, TILE = 2, 2, 8
#: Times the cycles of vectors narrower than the target's.
NARROW = 1.1
#: Times the cycles of a tile of whose input pixels more than ``PLACES`` meet in one set of the L1 cache.
CROWDED, PLACES = 1.3, 9
#: Times the cycles of a tile whose permuted vectors exceed the registers.
SPILLED = 1.1
#: All of it, against what other schedules predict.
SCALE = 0.8
#: Bytes per second of memory traffic, for each core.
BANDWIDTH = 80e9


class CpuGroupedLast(Written):
    id, version = "cpu_grouped_last", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nhwc", "needs NHWC")
        require(spec.groups > 1, "needs groups")

    def space(self, spec: ConvSpec, target: Target) -> Space:
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

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        vectors = _Vectors(spec, picks)
        # Beside the sums: the weights of the taps that a pixel meets, and the pixel.
        used = picks.tile_c * (picks.tile_ow + min(picks.tile_ow, _row(spec).kernel)) + 1
        small = picks.tile_ow == picks.tile_c == picks.unroll_c == 1
        require(small or used <= target.vector_registers, f"{used} vectors, {target.vector_registers} registers")
        require(vectors.parts % picks.tile_c == 0, "tile_c does not divide the vectors of a group")
        require(picks.block_c < 2 * vectors.tiles, "block_c exceeds the vectors")
        if not _outer(spec):
            require(picks.parallel_oh <= ceildiv(_row(spec).out, picks.tile_ow), "fewer tiles than parallel_oh")
        products = sum(len(uses) for *_, pattern in _tiles(_row(spec), picks.tile_ow) for _, uses in pattern.inputs)
        unrolled = products * picks.unroll_c * picks.tile_c
        require(small or unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        space = self.space(spec, target).domains
        small = Picks(lanes=space["lanes"][0], tile_ow=1, tile_c=1, unroll_c=1, block_c=1, parallel_oh=1)
        tiles = [
            small.replace(lanes=n, tile_ow=w, tile_c=c)
            for n in space["lanes"]
            for w in space["tile_ow"]
            for c in space["tile_c"]
            if w <= MOST_PIXELS
        ]
        options: list[Picks] = []
        for unroll_c in sorted((c for c in space["unroll_c"] if c <= MOST_CHANNELS), reverse=True):
            options = [tile.replace(unroll_c=unroll_c) for tile in tiles]
            options = [p for p in options if self.reason_against(spec, target, p) is None]
            if options:
                break
        picks = min(options, key=lambda p: self._cycles(spec, target, p), default=small)
        # All vectors where their weights, which the next tile reads again, leave room in the L1 cache: src is then
        # read as it lies.
        vectors = _Vectors(spec, picks)
        fitting = target.l1 // (4 * picks.lanes * picks.tile_c * vectors.depth * math.prod(spec.kernel))
        most = vectors.tiles if vectors.tiles <= fitting // 2 else max(1, fitting // 4)
        block_c = min((b for b in space["block_c"] if b >= most), default=space["block_c"][-1])
        picks = picks.replace(block_c=block_c)
        tasks = spec.n * ceildiv(vectors.tiles, block_c)
        splits = [picks.replace(parallel_oh=p) for p in space["parallel_oh"]]
        splits = [p for p in splits if self.reason_against(spec, target, p) is None]
        enough = [p for p in splits if tasks * p.parallel_oh >= 4 * target.cores]
        return enough[0] if enough else splits[-1]

    def _cycles(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Cycles of an image: its products, and what they do not hide of loads and shuffles."""
        vectors, row = _Vectors(spec, picks), _row(spec)
        # What a vector takes of a cycle: those of 256 bits go in pairs where there are larger ones, and narrower ones
        # take as long.
        share = max(picks.lanes, min(8, target.lanes)) / target.lanes * (1 if picks.lanes == target.lanes else NARROW)
        taps = row.kernel
        steps = math.prod(spec.kernel) // taps * vectors.depth
        # Whether the weights of a register tile exceed the L1 cache, and come from the L2 cache.
        far = 4 * picks.lanes * picks.tile_c * math.prod(spec.kernel) * vectors.depth > target.l1
        # The share of the input pixels that meet in one set of the L1 cache.
        crowd = math.gcd(4 * spec.ic, L1_WAY) / L1_WAY

        def tile(pixels: int) -> float:
            sums = pixels * picks.tile_c
            offsets = {p * row.stride + k * row.dilation for p in range(pixels) for k in range(taps)}
            loads = len(offsets) + taps * picks.tile_c * (2 if far else 1)
            products = sums * taps * max(1.0, FMA_LATENCY / (sums * share))
            step = share * (max(products, loads) + UNHIDDEN_LOAD * loads) + PASS / picks.unroll_c
            if len(offsets) * crowd > PLACES:
                step *= CROWDED
            # Permuted vectors are kept for all channels that they hold.
            if vectors.permuted and pixels + len(offsets) + taps > target.vector_registers:
                step *= SPILLED
            return float(steps * step + STORE * sums * share + TILE)

        full, rest = divmod(row.out, picks.tile_ow)
        tiles = full * tile(picks.tile_ow) + (tile(rest) if rest else 0)
        return float(math.prod(_outer(spec)) * vectors.tiles * tiles)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        cycles = self._cycles(spec, target, self.default(spec, target)) * spec.n
        traffic = sum(spec.bytes.values()) / (target.cores * BANDWIDTH)
        return SCALE * cycles * 2 * target.lanes / target.peak_flops + traffic

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, vectors = Operands(spec), _Vectors(spec, picks)
        looped, taps = spec.kernel[: len(_outer(spec))], _row(spec).kernel

        def packed_weights(b: Expr, row: Expr, c: Expr, kx: Expr, v: Expr, t: Expr) -> Expr:
            o = vectors.first(b * picks.tile_c + v) + t
            o = o if vectors.count == picks.lanes else tirx.min(o, spec.oc - 1)
            value = ops.weights[(o, c, *unflat(row, looped), kx)[: 2 + spec.rank]]
            if vectors.count == picks.lanes:
                return value
            return tirx.if_then_else(t < vectors.count, value, tirx.const(0, ACCUMULATOR))

        def statement(
            src: tirx.Buffer, residual: tirx.Buffer, parameters: dict[str, tirx.Buffer], dst: tirx.Buffer
        ) -> tirx.Stmt:
            weights = parameters.pop("weights")
            return _Kernel(spec, picks, vectors, src, weights, residual, parameters, dst).statement()

        shape = (vectors.tiles, math.prod(looped), vectors.depth, taps, picks.tile_c, picks.lanes)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p, spec.oc + picks.lanes) for p in ops.parameters[1:]]  # whole vectors from any channel
        return written(ops, packed, statement)


class _Row(NamedTuple):
    """The axis whose taps are written out."""

    kernel: int
    stride: int
    dilation: int
    before: int
    size: int
    out: int


def _outer(spec: ConvSpec) -> tuple[int, ...]:
    """The output's other axes, along which the taps are passes of loops: all of them where a row has many taps."""
    return spec.out_spatial if spec.kernel[-1] > MOST_TAPS else spec.out_spatial[:-1]


def _row(spec: ConvSpec) -> _Row:
    """The last axis, or where it is among the others, a single pixel."""
    if spec.kernel[-1] > MOST_TAPS:
        return _Row(1, 1, 1, 0, 1, 1)
    begin, _ = spec.padding[-1]
    taps = spec.kernel[-1], spec.stride[-1], spec.dilation[-1]
    return _Row(*taps, begin, spec.in_spatial[-1], spec.out_spatial[-1])


class _Pattern(NamedTuple):
    """What of the image a tile of pixels meets."""

    pixels: int
    #: ``(offset, ((pixel, kx), …))`` of each input pixel: its distance from the tile's first, counted with padding, and
    #: which taps of which output pixels read it.
    inputs: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


def _tiles(row: _Row, size: int) -> list[tuple[int, int, _Pattern]]:
    """A row of output pixels as tiles of ``size``: runs of tiles that are alike, ``(first, count, pattern)``."""

    def pattern(i: int) -> _Pattern:
        pixels = min(size, row.out - i * size)
        inputs: dict[int, list[tuple[int, int]]] = {}
        for pixel in range(pixels):
            for kx in range(row.kernel):
                offset = pixel * row.stride + kx * row.dilation
                if 0 <= i * size * row.stride + offset - row.before < row.size:
                    inputs.setdefault(offset, []).append((pixel, kx))
        return _Pattern(pixels, tuple((offset, tuple(inputs[offset])) for offset in sorted(inputs)))

    advance = size * row.stride
    start = min(ceildiv(row.out, size), ceildiv(row.before, advance))
    reach = (size - 1) * row.stride + (row.kernel - 1) * row.dilation + 1
    end = max(start, min(row.out // size, (row.size + row.before - reach) // advance + 1))
    left, right = (runs([pattern(i) for i in edge]) for edge in (range(start), range(end, ceildiv(row.out, size))))
    middle = [(start, end - start, pattern(start))] if end > start else []
    return [*left, *middle, *((first + end, times, edge) for first, times, edge in right)]


class _Vectors:
    """Which channels the lanes of a vector hold: ``count`` of them, of ``groups`` groups or a part of one."""

    def __init__(self, spec: ConvSpec, picks: Picks) -> None:
        self.lanes: int = picks.lanes
        self._all = spec.groups
        self.depth, self._outputs = spec.ic // spec.groups, spec.oc // spec.groups
        self.groups = min(max(1, self.lanes // self._outputs), spec.groups)
        #: Vectors of a group that has more channels than a vector has lanes; else 1.
        self.parts = ceildiv(self._outputs, self.lanes)
        self.count = min(self.lanes, self.groups * self._outputs)
        #: Whether a vector of inputs is permuted from loaded ones: else it is loaded as it is, or broadcast.
        self.permuted = self.groups > 1 and self.depth * self._outputs > 1
        #: Tiles of ``tile_c`` vectors.
        self.tiles: int = ceildiv(spec.groups, self.groups) * self.parts // picks.tile_c

    def _group(self, v: Expr) -> Expr:
        """The first group of a vector."""
        return tirx.min(v // self.parts * self.groups, self._all - self.groups)

    def first(self, v: Expr) -> Expr:
        """The first output channel."""
        within = tirx.min(v % self.parts * self.lanes, self._outputs - self.count) if self.parts > 1 else 0
        return self._group(v) * self._outputs + within

    def source(self, v: Expr) -> Expr:
        """The first input channel."""
        return self._group(v) * self.depth

    def read(self, src: tirx.Buffer, dtype: str, pixel: Sequence[Expr], channel: Expr, c: int, channels: int) -> Expr:
        """A vector of a pixel's inputs: in each lane the one with number ``channel + c`` of the lane's group.

        ``channels`` are read of each group, from ``channel`` on.
        """
        if self.groups == 1:
            return tirx.Broadcast(widen(src[(*pixel, channel + c)], dtype), self.lanes)
        length = (self.groups - 1) * self.depth + channels
        if not self.permuted:
            return load(src, dtype, [*pixel, channel], self.lanes, length)
        order = [min(t // self._outputs, self.groups - 1) * self.depth + c for t in range(self.lanes)]
        width = min(self.lanes, 1 << (length - 1).bit_length())
        used = sorted({e // width for e in order})
        loaded = [load(src, dtype, [*pixel, channel + i * width], width, length - i * width) for i in used]
        loaded += [zeros(width)] * (self.lanes // width - len(used))  # shuffles take no fewer lanes than they give
        return tirx.Shuffle(loaded, [used.index(e // width) * width + e % width for e in order])


class _Tile(NamedTuple):
    """A tile of pixels × vectors: its image, its output row and first pixel there, its index among the tiles of
    vectors, and what of the image its pixels meet.
    """

    image: Expr
    row: list[Expr]
    x: Expr
    vectors: Expr
    pattern: _Pattern


class _Step(NamedTuple):
    """A pass of the loops over the kernel and the channels of a group.

    It has the row of the kernel; where that meets src, less the last axis; the first channel in the group and of src.
    """

    kernel_row: Expr
    where: list[Expr]
    c: Expr
    channel: Expr


@dataclass(frozen=True)
class _Kernel:
    """The statements of the whole layer."""

    spec: ConvSpec
    picks: Picks
    vectors: _Vectors
    src: tirx.Buffer
    weights: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer

    def statement(self) -> tirx.Stmt:
        """The parallel loop over images, blocks of vectors and parts of the rows, around what a task does."""
        spec, picks, vector_tiles, parts = self.spec, self.picks, self.vectors.tiles, self.picks.parallel_oh
        outer = _outer(spec)
        rows = math.prod(outer) if outer else ceildiv(_row(spec).out, picks.tile_ow)
        blocks = ceildiv(vector_tiles, picks.block_c)
        size = ceildiv(vector_tiles, blocks)  # all alike, or the last one is smaller
        whole = Block()
        with whole.loop(spec.n * blocks * parts, parallel=True) as (body, index):
            rest, part = index // parts, body.let(index % parts)
            image, first = body.let(rest // blocks), body.let(rest % blocks * size)
            count = size
            if vector_tiles % size:
                count = body.let(tirx.max(tirx.min(size, vector_tiles - first), 0))
            start, end = (body.let(p * rows // parts) for p in (part, part + 1))
            with body.loop(end - start if outer else 1) as (row_body, i):
                row = [row_body.let(y) for y in unflat(start + i, outer)]
                for pixels_body, x, pattern in self.pixels(row_body, start, end):
                    with pixels_body.loop(count) as (tile_body, j):
                        vectors = tile_body.let(first + j)
                        self.product(tile_body, _Tile(image, row, x, vectors, pattern))
        return whole.statement()

    def pixels(self, body: Block, start: Expr, end: Expr) -> Iterator[tuple[Block, Expr, _Pattern]]:
        """Code for the tiles of an output row: ``(its body, its first pixel, its pattern)``.

        In 1-D those from tile ``start`` to ``end``, which are what tasks share; else all.
        """
        for first, count, pattern in _tiles(_row(self.spec), self.picks.tile_ow):
            low, number = first, count
            if not _outer(self.spec) and self.picks.parallel_oh > 1:
                low = body.let(tirx.max(first, start))
                number = body.let(tirx.max(tirx.min(first + count, end) - low, 0))
            with body.loop(number) as (inner, i):
                yield inner, inner.let((low + i) * self.picks.tile_ow), pattern

    def product(self, body: Block, tile: _Tile) -> None:
        """The sums of a tile, their epilogue and store."""
        spec, lanes, tile_c, vectors = self.spec, self.picks.lanes, self.picks.tile_c, self.vectors
        pixels = tile.pattern.pixels
        numbers = [body.let(tile.vectors * tile_c + v) for v in range(tile_c)]
        sums = body.registers([(p, v) for p in range(pixels) for v in range(tile_c)], lanes)
        with self.steps(body, tile, numbers[0]) as (inner, step):
            for c in range(self.picks.unroll_c):
                weights: dict[tuple[int, int], Expr] = {}
                for offset, uses in tile.pattern.inputs:
                    value = inner.let(self.read(tile, step, offset, c))
                    for p, kx in uses:
                        for v in range(tile_c):
                            if (kx, v) not in weights:
                                place = [tile.vectors, step.kernel_row, step.c + c, kx, v, 0]
                                weights[kx, v] = inner.let(load(self.weights, "f32", place, lanes, lanes))
                            sums.add(inner, (p, v), value * weights[kx, v])
        for v in range(tile_c):
            channel = body.let(vectors.first(numbers[v]))
            given = load_parameters(body, self.parameters, channel, lanes, lanes)
            for p in range(pixels):
                place = [*[tile.image, *tile.row, tile.x + p][: 1 + spec.rank], channel]
                finish(body, spec, self.dst, self.residual, place, sums[p, v], lanes, vectors.count, **given)

    @contextmanager
    def steps(self, body: Block, tile: _Tile, first_vector: Expr) -> Iterator[tuple[Block, _Step]]:
        """Loops over the rows of the kernel that meet the image, and a group's channels, ``unroll_c`` at a time."""
        spec, unroll_c = self.spec, self.picks.unroll_c
        with ExitStack() as loops:
            inner, taps, where = body, [], []
            for axis, y in enumerate(tile.row):
                first, count = meeting(spec, axis, y)
                inner, k = loops.enter_context(inner.loop(count))
                taps.append(inner.let(first + k))
                where.append(inner.let(y * spec.stride[axis] + taps[-1] * spec.dilation[axis] - spec.padding[axis][0]))
            kernel_row = inner.let(flat(taps, spec.kernel[: len(taps)]))
            inner, chunk = loops.enter_context(inner.loop(self.vectors.depth // unroll_c))
            c = inner.let(chunk * unroll_c)
            yield inner, _Step(kernel_row, where, c, inner.let(self.vectors.source(first_vector) + c))

    def read(self, tile: _Tile, step: _Step, offset: int, c: int) -> Expr:
        """The inputs of a tile's vectors at a pixel, the c-th channel of the step."""
        spec, row = self.spec, _row(self.spec)
        begin = tile.x * row.stride - row.before
        pixel = [tile.image, *step.where, begin + offset][: 1 + spec.rank]
        return self.vectors.read(self.src, spec.dtype, pixel, step.channel, c, self.picks.unroll_c)
