"""Grouped and depthwise convolution with output channels of whole groups in the vector lanes.

Applies to  convolutions with groups that are not transposed, of any rank, kernel, stride, dilation and number of
            channels per group, whose channels lie in blocks innermost: NHWC (NWC, NDHWC: all of them), nchw16c, nchw8c.
Strategy    1. A vector is the output channels of as many whole groups as there is room for, or a part of one
               group's. Where they do not divide, the last one overlaps its neighbour, so that all share their code.
            2. Pack weights as [vector][rows of the kernel][ic][k][lanes]: in the order they are used.
            3. Keep a tile of `tile_oh` × `tile_ow` pixels × `tile_c` vectors in registers. Nothing is copied: src is
               loaded where it lies, rows outside it are left out, and columns at the edge are code of their own.
            4. Loop over the input rows, then over the group's input channels. A pixel's vector has in each lane the
               c-th channel of the lane's group: loaded as it is (depthwise), broadcast (one group) or permuted. All
               rows and taps that read the pixel use it.
            5. Compute `block_c` tiles of vectors for one tile of pixels before the next pixels, so that src is read
               in the order it lies. Several rows share what they read: it comes from the L2 cache.
            6. One parallel loop over batch × blocks of vectors × parts of the rows (in 1-D of the tiles).
Why not     pixels in the lanes (cpu_rows): channels that lie innermost would have to be transposed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

from convgen.cpu.groups import GroupVectors
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TILE, Even, finishing, pieces
from convgen.cpu.tasks import Buffers, TaskKernel
from convgen.cpu.vector import Block, Registers, finish, load, load_parameters, written
from convgen.cpu.window import (
    Lines,
    Met,
    Pattern,
    copies,
    is_short,
    kernel_rows,
    output_rows,
    readers,
    row_tiles,
)
from convgen.deferred import te, tirx
from convgen.hardware.target import Target
from convgen.lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv, copied, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import ConvSpec

#: Taps of a row that are written out; a row with more is a column of pixels, whose taps are passes of a loop.
MOST_TAPS = 32
#: Multiply-adds written out in all tiles together; more take long to compile.
MOST_UNROLLED = 2048
#: Those of the default, and its sums in registers.
MOST_DEFAULT, MOST_SUMS = 900, 16
#: Bytes after which addresses meet in the same set of the L1 cache, and how many pixels of a tile may.
L1_WAY, PLACES = 4096, 9
#: What narrower vectors cost, which work hardly counts: twice as many tiles begin.
NARROW = 1.15


class CpuGrouped(Written):
    id, version = "cpu_grouped", 3
    merged = ("cpu_grouped_last",)

    def takes_layouts(self, src: str, dst: str) -> bool:
        return "nchw" not in (src, dst)

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups > 1, "needs groups")
        require(bool(_lanes(spec, target)), "needs vectors of whole groups within blocks of channels")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        g, lanes = _Geometry(spec), _lanes(spec, target)
        return Space(
            lanes=lanes,
            tile_oh=[h for h in (1, 2, 3, 4, 5, 6, 7, 8) if h == 1 or (h <= g.lines and g.line_dilation == 1)],
            tile_ow=[w for w in (*range(1, 11), 12, 14, 16, 20, 24, 28) if w <= g.width],
            tile_c=[t for t in (1, 2, 3, 4) if t == 1 or (t - 1) * lanes[0] < spec.oc // spec.groups],
            block_c=[b for b in (1, 2, 4, 8, 16, 32, 64) if b == 1 or b * lanes[0] < 2 * spec.oc],
            parallel_oh=[p for p in (1, 2, 4, 8, 16, 32) if p <= (g.rows(1) if g.outer else g.width)],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        vectors, g = GroupVectors(spec, picks.lanes), _Geometry(spec)
        pixels = picks.tile_oh * picks.tile_ow
        # Beside the sums: the weights of the taps that a pixel meets, and the pixel.
        used = picks.tile_c * (pixels + min(pixels, g.taps)) + 1
        small = pixels == picks.tile_c == 1
        require(small or used <= target.vector_registers, f"{used} vectors, {target.vector_registers} registers")
        require(vectors.parts % picks.tile_c == 0, "tile_c does not divide the vectors of a group")
        require(picks.block_c < 2 * vectors.number // picks.tile_c, "block_c exceeds the vectors")
        tiles = g.rows(picks.tile_oh) if g.outer else ceildiv(g.width, picks.tile_ow)
        require(picks.parallel_oh <= tiles, "fewer tiles than parallel_oh")
        unrolled = g.unrolled(picks)
        require(small or unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g, vectors, tile_c = Operands(spec), _Geometry(spec), GroupVectors(spec, picks.lanes), picks.tile_c
        looped = spec.kernel[: len(g.outer)]

        def packed_weights(b: Expr, row: Expr, c: Expr, kx: Expr, v: Expr, t: Expr) -> Expr:
            o = vectors.first(b * tile_c + v) + t
            o = o if vectors.count == picks.lanes else tirx.min(o, spec.oc - 1)
            value = ops.weights[(o, c, *unflat(row, looped), kx)[: 2 + spec.rank]]
            if vectors.count == picks.lanes:
                return value
            return tirx.if_then_else(t < vectors.count, value, tirx.const(0, ACCUMULATOR))

        shape = (vectors.number // tile_c, math.prod(looped), vectors.depth, g.taps, tile_c, picks.lanes)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p, spec.oc + picks.lanes) for p in ops.parameters[1:]]  # whole vectors from any channel
        return written(ops, packed, lambda *buffers: _Kernel(Buffers(*buffers), spec, picks, g, vectors).statement())


class _Geometry:
    """How the output is walked: rows of lines of tiles.

    Attributes:
        outer: the output's axes but the last, or all of them where a row's taps are passes of a loop.
        lines: the output's pixels along the last of ``outer``, which tiles have `tile_oh` of.
        width, taps: the pixels of a row and the taps that are written out.
        src_block, dst_block: channels that lie innermost.
    """

    def __init__(self, spec: ConvSpec) -> None:
        self.spec = spec
        self.written = spec.kernel[-1] <= MOST_TAPS
        self.outer = spec.out_spatial[:-1] if self.written else spec.out_spatial
        self.axis = len(self.outer) - 1
        self.lines = self.outer[-1] if self.outer else 1
        self.line_dilation = spec.dilation[self.axis] if self.outer else 0
        self.width, self.taps = (spec.out_spatial[-1], spec.kernel[-1]) if self.written else (1, 1)
        self.src_block, self.dst_block = spec.src_blocks.size, spec.dst_blocks.size

    def rows(self, height: int) -> int:
        """Rows of tiles."""
        return math.prod(self.outer[:-1]) * ceildiv(self.lines, height)

    def tiles(self, size: int) -> list[tuple[int, int, Pattern]]:
        """The tiles of a row (:func:`row_tiles`)."""
        return row_tiles(self.spec, size) if self.written else [(0, 1, Pattern(1, ((0, ((0, 0),)),)))]

    def unrolled(self, picks: Picks) -> int:
        """Multiply-adds that are written out."""
        across = sum(len(uses) for *_, pattern in self.tiles(picks.tile_ow) for _, uses in pattern.inputs)
        sizes = pieces(self.lines, picks.tile_oh)
        down = sum(rows for height, _ in sizes for _, rows in readers(self.spec, len(self.outer), height))
        return across * down * int(picks.tile_c) * copies(self.spec, len(self.outer))


def _lanes(spec: ConvSpec, target: Target) -> list[int]:
    """Lanes that vectors can have."""
    g, found = _Geometry(spec), []
    for lanes in (4, 8, 16):
        vectors = GroupVectors(spec, lanes)
        fits = vectors.within(g.src_block, spec.ic, True) and vectors.within(g.dst_block, spec.oc, False)
        if lanes <= target.lanes and (lanes == 4 or lanes < 2 * spec.oc) and fits:
            found.append(lanes)
    return found


# ---- the default --------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _default(schedule: CpuGrouped, spec: ConvSpec, target: Target) -> Picks:
    space, g, core = schedule.space(spec, target).domains, _Geometry(spec), core_of(target)
    small = Picks(lanes=space["lanes"][0], tile_oh=1, tile_ow=1, tile_c=1, block_c=1, parallel_oh=1)
    crowd = math.gcd(4 * g.src_block, L1_WAY) / L1_WAY
    points = [
        small.replace(lanes=n, tile_oh=h, tile_ow=w, tile_c=c)
        for n in space["lanes"][-2:]
        for h in space["tile_oh"]
        for w in sorted({Even(g.width, w).full for w in space["tile_ow"]})
        for c in space["tile_c"]
        if h * w * c <= MOST_SUMS
        and GroupVectors(spec, n).parts % c == 0
        and max(h * w, len(_offsets(spec, w, g.taps))) * crowd <= PLACES
        and (w <= 8 or crowd <= 1 / 4)
    ]

    def cycles(p: Picks) -> float:
        return core.cycles(Counts(_counts(spec, target, p).work)) * (1 if p.lanes == space["lanes"][-1] else NARROW)

    points.sort(key=cycles)
    good = (p for p in points if g.unrolled(p) <= MOST_DEFAULT and not schedule.reason_against(spec, target, p))
    picks = next(good, small)
    # All vectors where their weights, which the next tile reads again, leave room in the L1 cache: src is then
    # read as it lies.
    vectors = GroupVectors(spec, picks.lanes)
    tiles = vectors.number // picks.tile_c
    fitting = target.l1 // (4 * picks.lanes * picks.tile_c * vectors.depth * math.prod(spec.kernel))
    most = tiles if tiles <= fitting // 2 else max(1, fitting // 4)
    if g.src_block < spec.ic:
        most = 1
    picks = picks.replace(block_c=min((b for b in space["block_c"] if b >= most), default=space["block_c"][-1]))
    splits = [picks.replace(parallel_oh=p) for p in space["parallel_oh"]]
    splits = [p for p in splits if schedule.reason_against(spec, target, p) is None]
    tasks = spec.n * ceildiv(tiles, picks.block_c)
    return next((p for p in splits if tasks * p.parallel_oh >= 4 * target.cores), splits[-1])


def _offsets(spec: ConvSpec, width: int, taps: int) -> set[int]:
    """The pixels of an input row that so many output pixels read."""
    return {p * spec.stride[-1] + k * spec.dilation[-1] for p in range(width) for k in range(taps)}


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    g, vectors = _Geometry(spec), GroupVectors(spec, picks.lanes)
    number, front = vectors.number // picks.tile_c, math.prod(spec.kernel[: max(0, g.axis)])
    tasks = spec.n * ceildiv(number, picks.block_c) * picks.parallel_oh
    share = ceildiv(tasks, target.cores) / tasks
    times = spec.n * number * math.prod(g.outer[:-1]) * share
    passes = front * vectors.depth
    work = []
    for height, lines in pieces(g.lines, picks.tile_oh):
        rows = readers(spec, len(g.outer), height)
        for width, tiles in Even(g.width, picks.tile_ow).sizes:
            sums = height * width * picks.tile_c
            products = sums * g.taps * (spec.kernel[g.axis] if g.outer else 1)
            pixels = _offsets(spec, width, g.taps)
            read = sum(count for count, _ in rows) * len(pixels)
            shuffled = read if vectors.permuted else 0
            loads = read * vectors.loaded
            # A pixel's channels come from the L2 cache once, and then, one after another, from the L1 cache: unless a
            # row's pixels displace each other there. What is permuted takes as long each time.
            once = not vectors.permuted and len(pixels) <= target.places(4 * g.src_block) // 2
            fetched = 4 * front * vectors.depth * vectors.groups * read if once else 4 * passes * picks.lanes * loads
            # Where all rows of a single channel are written out, they share the weights that they read.
            short = vectors.depth == 1 and bool(g.outer) and is_short(spec, g.axis)
            uses = spec.kernel[g.axis] if short else sum(count * served for count, served in rows)
            weights = uses * g.taps * picks.tile_c
            work.append(
                Work(
                    times * lines * tiles,
                    fmas=passes * products,
                    loads=passes * (loads + weights),
                    shuffles=passes * shuffled,
                    stores=sums,
                    near=fetched * width * spec.stride[-1] / len(pixels),
                    chain=passes * products / sums,
                    cycles=BEGIN_TILE + (0 if short else BEGIN_RUN * front * len(rows) * vectors.depth),
                )
            )
    work.append(finishing(spec, picks.lanes, share))
    images = sum(spec.bytes[name] for name in ("src", "dst"))
    streams = [
        Stream(spec.bytes["weights"] * share, weights=True),
        Stream(images * share, ahead=True, footprint=images),
    ]
    return Counts(work, streams)


# ---- the kernel -----------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """A tile of pixels × vectors: its image, its rows, its first pixel there, its index among the tiles of vectors, and
    what of the image its pixels meet.
    """

    image: Expr
    lines: Lines
    x: Expr
    vectors: Expr
    pattern: Pattern

    @property
    def pixels(self) -> list[tuple[int, int]]:
        return [(r, p) for r in range(self.lines.height) for p in range(self.pattern.pixels)]


@dataclass(frozen=True)
class _Kernel(TaskKernel):
    """The statements of the whole layer: tasks are images, blocks of vectors, and parts of the rows."""

    g: _Geometry
    vectors: GroupVectors

    @property
    def number(self) -> int:
        """How many times ``tile_c`` vectors there are."""
        return self.vectors.number // int(self.picks.tile_c)

    @property
    def tasks(self) -> tuple[int, ...]:
        return self.spec.n, ceildiv(self.number, self.picks.block_c), self.picks.parallel_oh

    def work(self, body: Block, place: Sequence[Expr]) -> None:
        picks, number, (_, blocks, parts), (image, block, part) = self.picks, self.number, self.tasks, place
        rows = self.g.rows(picks.tile_oh) if self.g.outer else ceildiv(self.g.width, picks.tile_ow)
        size = ceildiv(number, blocks)  # all alike, or the last one is smaller
        first = body.let(block * size)
        count = size
        if number % size:
            count = body.let(tirx.max(tirx.min(size, number - first), 0))
        start, end = (body.let(p * rows // parts) for p in (part, part + 1))
        for pixels_body, lines, x, pattern in self.tiles(body, start, end):
            with pixels_body.loop(count) as (tile_body, j):
                vectors = tile_body.let(first + j)
                self.product(tile_body, _Tile(image, lines, x, vectors, pattern))

    def tiles(self, body: Block, start: Expr, end: Expr) -> Iterator[tuple[Block, Lines, Expr, Pattern]]:
        """Code for the tiles of a task: ``(its body, its rows, its first pixel, its pattern)``.

        The task has the rows of tiles, or in 1-D the tiles, from ``start`` to ``end``.
        """
        for row_body, lines in output_rows(body, self.spec, len(self.g.outer), self.picks.tile_oh, start, end):
            for inner, x, pattern in self.columns(row_body, *(() if lines.first else (start, end))):
                yield inner, lines, x, pattern

    def columns(self, body: Block, start: Expr = 0, end: Expr = None) -> Iterator[tuple[Block, Expr, Pattern]]:
        """Code for the tiles along a row, or those from ``start`` to ``end``: ``(its body, first pixel, pattern)``."""
        for first, count, pattern in self.g.tiles(self.picks.tile_ow):
            low, number = first, count
            if end is not None and self.picks.parallel_oh > 1:
                low = body.let(tirx.max(first, start))
                number = body.let(tirx.max(tirx.min(first + count, end) - low, 0))
            with body.loop(number) as (inner, i):
                yield inner, inner.let((low + i) * self.picks.tile_ow), pattern

    def product(self, body: Block, tile: _Tile) -> None:
        """The sums of a tile, their epilogue and store."""
        spec, lanes, tile_c, vectors = self.spec, self.picks.lanes, self.picks.tile_c, self.vectors
        numbers = [body.let(tile.vectors * tile_c + v) for v in range(tile_c)]
        source = body.let(vectors.source(numbers[0]))
        sums = body.registers([(p, v) for p in tile.pixels for v in range(tile_c)], lanes)
        for inner, met in kernel_rows(body, spec, tile.lines):
            with inner.loop(vectors.depth) as (step, c):
                self.step(step, tile, sums, c, source, met)
        for v in range(tile_c):
            channel = body.let(vectors.first(numbers[v]))
            given = load_parameters(body, self.parameters, channel, lanes, lanes)
            for r, p in tile.pixels:
                place = spec.dst_blocks.order(tile.image, channel, [*tile.lines.row(r), tile.x + p][: spec.rank])
                finish(body, spec, self.dst, self.residual, place, sums[(r, p), v], lanes, vectors.count, **given)

    def step(self, body: Block, tile: _Tile, sums: Registers, c: Expr, source: Expr, met: Met) -> None:
        """The products of an input row with a channel of each group."""
        spec, lanes = self.spec, self.picks.lanes
        begin = tile.x * spec.stride[-1] - spec.padding[-1][0]
        weights: dict[tuple[int, int, int], Expr] = {}
        for offset, readers_of in tile.pattern.inputs:
            pixel = [*met.where, begin + offset][: spec.rank]
            place = partial(spec.src_blocks.order, tile.image, spatial=pixel)
            value = body.let(self.vectors.read(self.src, spec.dtype, place, source, c))
            for (p, kx), (r, kernel_row), v in itertools.product(readers_of, met.uses, range(self.picks.tile_c)):
                if (r, kx, v) not in weights:
                    at = [tile.vectors, kernel_row, c, kx, v, 0]
                    weights[r, kx, v] = body.let(load(self.parameters["weights"], "f32", at, lanes, lanes))
                sums.add(body, ((r, p), v), value * weights[r, kx, v])
