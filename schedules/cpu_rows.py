"""Convolution with few channels per group, pixels in the vector lanes: rows in registers, masks instead of padding.

Applies to  NCHW convolutions of any rank that are not transposed, with few channels per group: depthwise with any
            multiplier, grouped, and dense layers with few products per output (stems).
Strategy    1. Pack weights as [group][oc/t][rows of the kernel][ic][k][t]: in the order they are used.
            2. A vector is `lanes` neighbouring output pixels of a row. Keep a tile of `tile_oc` channels × `tile_oh`
               rows × `tile_ow` vectors in registers. Nothing is copied: input rows are loaded where they lie, those
               above and below the image are left out, and edges are masked (code of their own).
            3. Loop over the input rows, then over the group's input channels. What a row's taps read is loaded once
               and used by all rows and channels of the tile; weights are broadcast.
            4. Where there is a stride, as many vectors are loaded and shuffled apart by phase.
            5. One parallel loop over batch × groups × channel tiles × parts of the rows.
Why not     a padded copy: for small planes the copying costs more than the arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from tvm import te, tirx

from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TILE, finishing
from convgen.cpu.vector import Block, Columns, Registers, Taps, finish, load, load_within, spread_parameters, written
from convgen.cpu.window import Lines, Met, copies, heights, is_short, kernel_rows, output_rows, readers
from convgen.hardware.target import Target
from convgen.lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv, copied, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import ConvSpec

#: Taps of a row that are written out; more are passes of a loop.
MOST_TAPS = 64
#: Multiply-adds written out in all tiles together, in any and in the default; more take long to compile.
MOST_UNROLLED, MOST_DEFAULT = 2048, 1024
#: Vectors of pixels in a tile of the default: more leave no registers for what they read.
ROW_SUMS = 16
#: Taps from which products, and not memory, take a 1-D depthwise layer's time. With fewer, half as wide vectors are
#: faster: half as many lie in two lines of the cache.
LONG = 8
#: Cycles of an input row of a tile: each lies at another place in memory.
ROW = 2


class CpuRows(Written):
    id, version = "cpu_rows", 3
    merged = ("cpu_masked",)

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        few = spec.oc // spec.groups <= 32 or spec.reduction_length <= 160
        require(few, "needs at most 32 output channels per group, or at most 160 products per output")
        most = 8 if spec.oc // spec.groups <= 4 else 4  # more shuffles than cpu_direct has broadcasts
        require(spec.stride[-1] <= most, f"needs a stride along the row of at most {most}")
        long = spec.kernel[-1] > MOST_TAPS
        require(not long or spec.stride[-1] == 1, f"needs at most {MOST_TAPS} taps along the row, or stride 1")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        rows, width = math.prod(spec.out_spatial[:-1]), spec.out_spatial[-1]
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * width)]
        tall = spec.rank > 1 and spec.dilation[-2] == 1
        return Space(
            lanes=lanes,
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16) if c <= spec.oc // spec.groups],
            tile_oh=[h for h in (1, 2, 3, 4, 5, 6, 7, 8) if h == 1 or (tall and h <= spec.out_spatial[-2])],
            tile_ow=[v for v in (1, 2, 3, 4, 6) if v == 1 or lanes[0] * (v - 1) < width],
            parallel_oh=[p for p in (1, 2, 4, 8, 16, 32) if p <= rows],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        sums = picks.tile_oc * picks.tile_oh * picks.tile_ow
        used = sums + picks.tile_ow * spec.stride[-1] + 2
        require(sums == 1 or used <= target.vector_registers, f"{used} vectors, {target.vector_registers} registers")
        require(picks.lanes * (picks.tile_ow - 1) < spec.out_spatial[-1], "tile_ow exceeds the row")
        require(picks.parallel_oh <= _rows(spec, picks.tile_oh), "fewer rows of tiles than parallel_oh")
        unrolled = _unrolled(spec, picks)
        require(unrolled <= MOST_UNROLLED or sums == 1, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, per_group, tile = Operands(spec), spec.oc // spec.groups, picks.tile_oc
        tiles, rows = ceildiv(per_group, tile), spec.kernel[:-1]

        def packed_weights(block: Expr, row: Expr, c: Expr, kx: Expr, t: Expr) -> Expr:
            group, channel = block // tiles, block % tiles * tile + t
            value = ops.weights[(group * per_group + channel, c, *unflat(row, rows), kx)]
            if per_group % tile == 0:
                return value
            return tirx.if_then_else(channel < per_group, value, tirx.const(0, ACCUMULATOR))

        shape = (spec.groups * tiles, math.prod(rows), spec.ic // spec.groups, spec.kernel[-1], tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p) for p in ops.parameters[1:]]
        columns = _columns(spec, picks.lanes, picks.tile_ow)
        return written(ops, packed, lambda *buffers: _Kernel(spec, picks, columns, *buffers).statement())


def _rows(spec: ConvSpec, height: int) -> int:
    """Rows of tiles."""
    *front, lines = (1, *spec.out_spatial[:-1])
    return math.prod(front) * ceildiv(lines, height)


@lru_cache(maxsize=256)
def _columns(spec: ConvSpec, lanes: int, vectors: int) -> Columns:
    return Columns(spec, lanes, vectors)


# ---- the default --------------------------------------------------------------------------------


def _unrolled(spec: ConvSpec, picks: Picks) -> int:
    """Multiply-adds that are written out."""
    taps = spec.kernel[-1] if spec.kernel[-1] <= MOST_TAPS else 1
    tiles = len(_columns(spec, picks.lanes, picks.tile_ow).runs) if taps > 1 or any(spec.padding[-1]) else 2
    sizes = heights((1, *spec.out_spatial)[-2], picks.tile_oh)
    down = sum(rows for height, _ in sizes for _, rows in readers(spec, spec.rank - 1, height))
    channels = picks.tile_oc + spec.oc // spec.groups % picks.tile_oc
    return int(channels * down * picks.tile_ow * tiles * taps) * copies(spec, spec.rank - 1)


@lru_cache(maxsize=1024)
def _default(schedule: CpuRows, spec: ConvSpec, target: Target) -> Picks:
    space, core = schedule.space(spec, target).domains, core_of(target)
    small = Picks(lanes=space["lanes"][0], tile_oc=1, tile_oh=1, tile_ow=1, parallel_oh=1)
    most, widths = target.vector_registers - 2, space["lanes"][-2:]
    apart, row_sums = (2 * spec.stride[-1], 8) if spec.stride[-1] > 1 else (1, ROW_SUMS)
    if spec.rank == 1 and spec.ic == spec.groups == spec.oc and spec.kernel[-1] < LONG:
        widths, row_sums = widths[:1], 4
    points = [
        small.replace(lanes=n, tile_oc=c, tile_oh=h, tile_ow=v)
        for n in widths
        for c in space["tile_oc"]
        for h in space["tile_oh"]
        for v in space["tile_ow"]
        if c * h * v + v * apart <= most and h * v <= row_sums
    ]
    points.sort(key=lambda p: core.cycles(Counts(_counts(spec, target, p).work)))
    good = (p for p in points if _unrolled(spec, p) <= MOST_DEFAULT and not schedule.reason_against(spec, target, p))
    picks = next(good, small)
    tasks = spec.n * spec.groups * ceildiv(spec.oc // spec.groups, picks.tile_oc)
    splits = [p for p in space["parallel_oh"] if p <= _rows(spec, picks.tile_oh)]
    return picks.replace(parallel_oh=next((p for p in splits if tasks * p >= 4 * target.cores), splits[-1]))


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    per_group, taps, stride, lanes = spec.oc // spec.groups, spec.kernel[-1], spec.stride[-1], picks.lanes
    channels, groups = ceildiv(per_group, picks.tile_oc), ceildiv(spec.window[-1], stride)
    tasks = spec.n * spec.groups * channels * picks.parallel_oh
    share = ceildiv(tasks, target.cores) / tasks
    planes, depth = math.prod(spec.kernel[:-2]), spec.ic // spec.groups
    passes = planes * depth
    vectors = ceildiv(spec.out_spatial[-1], lanes)
    columns = ceildiv(vectors, picks.tile_ow)
    wide = vectors / columns
    # Most vectors of neighbouring pixels lie in two lines of the cache.
    read, shuffled = taps * (1 + lanes / target.lanes), 0.0
    if stride > 1:
        shuffled = taps * max(1.0, math.log2(stride))
        # Indices of more than a few shuffles are read, too.
        read = groups * stride * (1 + lanes / target.lanes) + (shuffled if stride > 2 else 0)
    work = []
    for height, lines in heights((1, *spec.out_spatial)[-2], picks.tile_oh):
        rows = readers(spec, spec.rank - 1, height)
        times = spec.n * spec.groups * channels * math.prod(spec.out_spatial[:-2]) * lines * columns * share
        uses, inputs = sum(count * served for count, served in rows), sum(count for count, _ in rows)
        oc = per_group / channels
        sums = oc * height * wide
        # Runs of a loop: over rows with the same readers, or over channels, each of which lies in another page.
        loops = passes * len(rows) if depth > 1 else planes * sum(count > 1 for count, _ in rows)
        # Where all rows of a single channel are written out, they share the weights that they read.
        short = spec.ic == spec.groups and spec.rank > 1 and is_short(spec, spec.rank - 2)
        weights = spec.kernel[-2] if short else uses
        alone = bool(loops) and not short  # else tiles overlap
        work.append(
            Work(
                times,
                fmas=passes * oc * uses * wide * taps,
                loads=passes * (inputs * read * wide + weights * taps * oc),
                shuffles=passes * inputs * shuffled * wide,
                stores=sums,
                chain=passes * taps * uses / height if alone else 0,
                cycles=BEGIN_TILE * alone + BEGIN_RUN * loops + ROW * passes * inputs * (spec.rank > 1),
            )
        )
    # Beside products there are units for half of it.
    work.append(finishing(spec, picks.lanes, share if alone else share / 2))
    images, own_src = sum(spec.bytes[name] for name in ("src", "dst")), spec.bytes["src"] / (spec.n * spec.groups)
    again = (channels - 1) * spec.bytes["src"] if own_src > target.l1 else 0  # by every tile of channels
    streams = [
        Stream(spec.bytes["weights"] * share, weights=True),
        Stream(images * share, ahead=True, footprint=images),
        Stream(again * share, ahead=True, footprint=own_src),
    ]
    return Counts(work, streams)


# ---- the kernel -----------------------------------------------------------------------------------


class _Channels(NamedTuple):
    """A tile of output channels: its image, its group, its index in the group, and how many channels it has."""

    image: Expr
    group: Expr
    tile: Expr
    size: int


class _Pixels(NamedTuple):
    """A tile of pixels: its rows, its first pixel there, and what of the image its vectors meet (:class:`Columns`)."""

    lines: Lines
    x: Expr
    pattern: dict[Any, Any]


@dataclass(frozen=True)
class _Kernel:
    """The statements of the whole layer."""

    spec: ConvSpec
    picks: Picks
    columns: Columns
    src: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer

    def statement(self) -> tirx.Stmt:
        """The parallel loop over images, groups, tiles of channels and parts of the rows, around what a task does."""
        spec, parts, tile_oc = self.spec, self.picks.parallel_oh, self.picks.tile_oc
        per_group, rows = spec.oc // spec.groups, _rows(spec, self.picks.tile_oh)
        tasks = (spec.n, spec.groups, ceildiv(per_group, tile_oc), parts)
        full, rest = divmod(per_group, tile_oc)
        whole = Block()
        with whole.loop(math.prod(tasks), parallel=True) as (body, index):
            image, group, tile, part = map(body.let, unflat(index, tasks))
            start, end = (body.let(p * rows // parts) for p in (part, part + 1))
            for case, size in body.cases(tile, full, tile_oc, rest):
                channels = _Channels(image, group, tile, size)
                for tile_body, pixels in self.tiles(case, start, end):
                    self.product(tile_body, channels, pixels)
        return whole.statement()

    def tiles(self, body: Block, start: Expr, end: Expr) -> Iterator[tuple[Block, _Pixels]]:
        """Code for the tiles of the rows from ``start`` to ``end``; those that meet the same of the image share it."""
        for inner, lines in output_rows(body, self.spec, self.spec.rank - 1, self.picks.tile_oh, start, end):
            for first, count, pattern in self.columns.runs:
                with inner.loop(count) as (one, i):
                    yield one, _Pixels(lines, one.let((i + first) * self.columns.step), pattern)

    def product(self, body: Block, channels: _Channels, pixels: _Pixels) -> None:
        """The sums of a tile of channels for a tile of pixels, their epilogue and store."""
        spec, lanes = self.spec, self.picks.lanes
        vectors = [v for v in range(self.picks.tile_ow) if pixels.pattern["stored", v] > 0]
        keys = list(itertools.product(range(channels.size), range(pixels.lines.height), vectors))
        sums = body.registers(keys, lanes)
        for inner, met in kernel_rows(body, spec, pixels.lines):
            with inner.loop(spec.ic // spec.groups) as (step, c):
                self.step(step, channels, pixels, sums, c, met)
        first = channels.group * (spec.oc // spec.groups)
        for t in range(channels.size):
            channel = body.let(first + channels.tile * self.picks.tile_oc + t)
            given = spread_parameters(body, self.parameters, channel, lanes)
            for r, v in itertools.product(range(pixels.lines.height), vectors):
                place, count = (
                    [channels.image, channel, *pixels.lines.row(r), pixels.x + v * lanes],
                    pixels.pattern["stored", v],
                )
                value = body.let(self.columns.in_order(sums[t, r, v]))
                finish(body, spec, self.dst, self.residual, place, value, lanes, count, **given)

    def step(self, body: Block, channels: _Channels, pixels: _Pixels, sums: Registers, c: Expr, met: Met) -> None:
        """The products of an input row of a channel."""
        spec, lanes = self.spec, self.picks.lanes
        source = [channels.image, body.let(channels.group * (spec.ic // spec.groups) + c), *met.where]
        block = channels.group * ceildiv(spec.oc // spec.groups, self.picks.tile_oc) + channels.tile

        def add(inner: Block, kx: Expr, values: dict[int, Expr]) -> None:
            for t, (r, kernel_row) in itertools.product(range(channels.size if values else 0), met.uses):
                weight = self.parameters["weights"][block, kernel_row, c, kx, t]
                spread = inner.let(tirx.Broadcast(weight, lanes))
                for v, value in values.items():
                    sums.add(inner, (t, r, v), value * spread)

        vectors = dict.fromkeys(v for _, _, v in sums.keys)
        if spec.kernel[-1] > MOST_TAPS:
            with body.loop(spec.kernel[-1]) as (inner, kx):
                x = inner.let(pixels.x + kx * spec.dilation[-1] - spec.padding[-1][0])
                row = {v: [*source, x + v * lanes] for v in vectors}
                values = {v: inner.let(load_within(self.src, spec.dtype, at, lanes, lanes)) for v, at in row.items()}
                add(inner, kx, values)
            return

        def read(offset: int, count: int, shift: int) -> Expr:
            return load(self.src, spec.dtype, [*source, pixels.x * spec.stride[-1] + offset], lanes, count, shift)

        inputs = Taps(body, self.columns, pixels.pattern, read)
        for kx in range(spec.kernel[-1]):
            add(body, kx, {v: value for v in vectors if (value := inputs[v, kx]) is not None})
