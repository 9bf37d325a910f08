"""Winograd convolution: fewer multiplications than taps.

Applies to  dense convolutions with small kernels, strided or dilated, and strided transposed ones:
            3×3 at stride 1 and 2, 2×2, 5×5, 1×7, 1-D k3, 3-D with a 3×3 plane (the depth stays
            direct), transposed 4×4 at stride 2. Any layout.
Strategy    F(m, r) along the last one or two axes (Lavin & Gray, CVPR 2016): of m + r - 1 inputs
            make m outputs of an r-tap kernel with m + r - 1 products instead of m·r. At stride s an
            axis' input falls into s phases, each under every s-th tap at stride 1: F(m, ⌈r/s⌉) each,
            and the sum of all. In a transposed convolution it is the output that falls into phases.
            Either way it is one bilinear algorithm, y = Aᵀ[(G g) · (Bᵀ d)], for the steps below.
            1. Pack weights transformed, as [oc/t][position][taps of the depth][ic][t]: in the order of their use.
            2. A task is a block of rows of tiles (in 1-D of tiles; in 3-D of so many planes). A vector of its channels
               at a time, copy its input with its padding, NCHW transposed in registers, to [line][column][lanes];
               transform it along the columns, then the rows, to [position][tile][ic].
            3. Per block of `tile_oc` channels and position, products: `tile_px` tiles × `tile_oc` channels in
               registers, ic innermost, while the next position's weights are fetched into the L2 cache.
            4. Transform back a tile at a time, channels in the lanes; bias, residual, activation, store. NCHW: through
               the block's plane of pixels, transposed in registers.
            5. `parallel="oc"`: with few tiles the input is transformed first, in parallel over ic, and the products
               are parallel over channel blocks, so that weights are shared out.
Accuracy    falls with m. On data of one scale the error stays within a quarter of the bound of `standard` up to
            m = 4; m > 4 needs `relaxed`. A pixel that is much larger than others costs its tile their precision.
Why not     small planes with many channels: the transformed weights are several times larger, and all
            of them are read for a few tiles. Kernels no larger than their stride: no gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from tvm import te, tirx

from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TILE, Ahead, Even, most_pixels, multiply, steps
from convgen.cpu.vector import (
    Block,
    finish,
    interleave,
    load,
    load_parameters,
    load_within,
    meeting,
    spread_parameters,
    store,
    written,
    zeros,
)
from convgen.cpu.winograd import (
    NO_AXIS,
    Axis,
    covered,
    operations,
    outputs_of,
    tile_sizes,
    transformed,
    transformed_axes,
    transformed_axis,
)
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, copied, round_up, row_times, unflat
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Space, Written, busiest, require
from convgen.lowering.winograd import magnitudes
from convgen.problem.spec import ConvSpec

#: Rows of tiles of a block, in 1-D its tiles; planes of a block.
ROWS, TILES, PLANES = (1, 2, 4, 7, 8, 14), (1, 2, 4, 7, 14, 28, 56, 112, 224), (1, 2, 4)


class CpuWinograd(Written):
    id, version = "cpu_winograd", 5
    transforms = True

    def applies(self, spec: ConvSpec, target: Target) -> None:
        lanes = target.lanes
        require(target.kind == "cpu", "needs a CPU")
        require(spec.groups == 1, "needs groups 1")
        axes = transformed_axes(spec)
        require(all(1 in (spec.stride[a], spec.dilation[a]) for a in axes), "dilated and strided")
        if spec.transposed:
            require(spec.rank <= 2, "needs at most two axes where transposed")
            require(all(d == 1 for d in spec.dilation), "needs dilation 1 where transposed")
        require(bool(tile_sizes(spec)), f"no transform of an axis saves enough products at accuracy {spec.accuracy}")
        # Where a window lies in nothing but padding the exact result admits no error; a transform has one.
        require(all(covered(spec, a) for a in axes), "needs windows with half of their taps inside the input")
        require(spec.ic >= lanes and spec.oc >= lanes, f"needs at least {lanes} input and output channels")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes = target.lanes
        tiles = tile_sizes(spec)
        return Space(
            tile=tiles,
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if v == 1 or lanes * (v - 1) < spec.oc],
            tile_px=list(range(1, 15)),
            block_rows=sorted({b for m in tiles for b in _blocks(spec, m)}),
            block_planes=[p for p in PLANES if p == 1 or (spec.rank > 2 and p <= spec.out_spatial[0])],
            parallel=["rows", "oc"],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most = most_pixels(target, picks.tile_oc // target.lanes)
        require(picks.tile_px <= most, f"{picks.tile_px} tiles in a register tile, registers for {most}")
        g = _Geometry(spec, target, picks)
        require(picks.block_rows <= g.blocked.groups, "block_rows exceeds the rows of tiles")
        require(picks.tile_px <= g.most_tiles, "fewer tiles in a block than tile_px")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        tiles = {axis: outputs_of(spec, axis, picks.tile) for axis in transformed_axes(spec)}
        return magnitudes(spec, src, weights, tiles)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g = Operands(spec), _Geometry(spec, target, picks)

        def statement(
            src: tirx.Buffer, residual: tirx.Buffer, parameters: dict[str, tirx.Buffer], dst: tirx.Buffer
        ) -> tirx.Stmt:
            weights = parameters.pop("weights")
            return _Kernel(spec, g, picks, target.lanes, src, weights, residual, parameters, dst).statement()

        return written(ops, [_packed_weights(ops, g, picks), *map(copied, ops.parameters[1:])], statement)


def _packed_weights(ops: Operands, g: _Geometry, picks: Picks) -> te.Tensor:
    """Transformed weights ``[oc/t][position][taps of the depth][ic][t]``, zeros past the last channel."""
    spec, axes = ops.spec, [g.rows, g.columns][-len(transformed_axes(ops.spec)) :]
    direct = spec.kernel[: -len(axes)]

    def taps_of(oc: Expr, ic: Expr, *taps: Expr) -> Expr:
        return ops.weights[(ic, oc, *taps) if spec.transposed else (oc, ic, *taps)]

    read: Callable[..., Expr] = taps_of
    for i, axis in enumerate(axes):
        done, left = [a.positions for a in axes[: i + 1]], spec.kernel[len(direct) + i + 1 :]
        read = _transformed_taps(read, axis, (spec.oc, spec.ic, *direct, *done, *left), 2 + len(direct) + i)

    def packed(b: Expr, position: Expr, tap: Expr, ic: Expr, lane: Expr) -> Expr:
        oc = b * picks.tile_oc + lane
        index = (oc, ic, *unflat(tap, direct), *unflat(position, [a.positions for a in axes]))
        return tirx.if_then_else(oc < spec.oc, read(*index), tirx.const(0, "float32"))

    shape = (ceildiv(spec.oc, picks.tile_oc), g.positions, math.prod(direct), spec.ic, picks.tile_oc)
    return te.compute(shape, packed, name="weights_packed")


def _transformed_taps(read: Callable[..., Expr], axis: Axis, shape: Sequence[int], at: int) -> te.Tensor:
    """One more axis transformed: positions in place of taps, at a place of the index."""

    def value(*index: Expr) -> Expr:
        return row_times(axis.weights, index[at], lambda k: read(*index[:at], k, *index[at + 1 :]))

    return te.compute(shape, value, name=f"weights_{at}")


def _block(layout: str, channels: int) -> int:
    """Channels that lie innermost."""
    return {"nchw": 1, "nhwc": channels, "nchw8c": 8, "nchw16c": 16}[layout]


def _blocks(spec: ConvSpec, m: int) -> list[int]:
    """Choices for the rows of tiles of a block; in 1-D, its tiles. Those that interleave count as one."""
    groups = transformed_axis(spec, transformed_axes(spec)[0], m).groups
    return sorted({b for b in (ROWS if spec.rank > 1 else TILES) if b <= groups} | ({groups} if groups <= 14 else set()))


class _Geometry:
    """Sizes of a candidate. The depth of 3-D stays direct; layers without one have a single plane.

    Attributes:
        rows, columns: the transformed axes.
        blocked: that of them which is cut into blocks of so many ``groups``.
        positions: products of a tile.
        most_tiles: of a plane of a block.
        lines, length: of the input of a plane of a block.
        planes, planes_in: of dst and src. window: planes of src that a block reads.
        channels: numbers from a tile's transformed input to the next one's. A power of two would put them in few sets
            of the cache.
    """

    def __init__(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        axes = [transformed_axis(spec, axis, picks.tile) for axis in transformed_axes(spec)]
        self.rows, self.columns = axes if len(axes) == 2 else (NO_AXIS, axes[0])
        self.blocked = axes[0]
        self.groups = Even(self.blocked.groups, picks.block_rows)
        self.positions = self.rows.positions * self.columns.positions
        of_rows, of_columns = (
            self.groups.full if axis is self.blocked else axis.groups for axis in (self.rows, self.columns)
        )
        self.lines, self.length = self.rows.reach(of_rows), self.columns.reach(of_columns)
        self.tile_columns = of_columns * self.columns.period
        self.most_tiles = self.tiles(self.groups.full)
        deep = spec.rank > 2
        self.planes, self.planes_in = (spec.out_spatial[0], spec.in_spatial[0]) if deep else (1, 1)
        self.depth = (spec.stride[0], spec.dilation[0], spec.padding[0][0], spec.kernel[0]) if deep else (1, 1, 0, 1)
        self.plane_blocks = Even(self.planes, picks.block_planes)
        stride, dilation, _, taps = self.depth
        self.window = (self.plane_blocks.full - 1) * stride + (taps - 1) * dilation + 1
        self.src_block = _block(spec.layout, spec.ic)
        self.dst_block = _block(getattr(spec, "dst_layout", spec.layout), spec.oc)
        self.channels = round_up(spec.ic, target.lanes) + target.lanes

    def tiles(self, groups: int) -> int:
        """Of a plane of a block of so many groups."""
        return groups * self.blocked.period * (self.tile_columns if self.blocked is self.rows else 1)

    def pixels(self, groups: int) -> int:
        """Pixels of dst at most."""
        return groups * self.blocked.period * self.blocked.outputs * (self.columns.size if self.blocked is self.rows else 1)


# ---- the kernel -----------------------------------------------------------------------------------


class _Task(NamedTuple):
    """A block: its image; its planes of dst; its tiles of each, from a group on."""

    image: Expr
    plane: Expr
    planes: Expr
    block: Expr
    group: Expr
    groups: Expr


class _Values(NamedTuple):
    """Transformed input ``[image][block][plane][position][tile and ic]``, and where in it a task's is."""

    buffer: tirx.Buffer
    image: Expr
    block: Expr
    first_plane: Expr


@dataclass(frozen=True)
class _Kernel:
    """The statements of the whole layer."""

    spec: ConvSpec
    g: _Geometry
    picks: Picks
    lanes: int
    src: tirx.Buffer
    weights: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer

    def statement(self) -> tirx.Stmt:
        """One parallel region over tasks, or one for the input and one for the products."""
        spec, g, whole = self.spec, self.g, Block()
        vectors, oc_blocks = ceildiv(spec.ic, self.lanes), ceildiv(spec.oc, self.picks.tile_oc)
        tasks, inner = (spec.n, g.plane_blocks.count, g.groups.count), (g.positions, g.most_tiles * g.channels)
        if self.picks.parallel == "rows":
            with whole.loop(math.prod(tasks), parallel=True) as (body, index):
                task = self.task(body, *unflat(index, tasks))
                stride, _, begin, _ = g.depth
                values = _Values(body.buffer((1, 1, g.window, *inner)), 0, 0, body.let(task.plane * stride - begin))
                scratch = self.input_scratch(body)
                with body.loop(g.window) as (plane_body, z):
                    plane = plane_body.let(values.first_plane + z)
                    with plane_body.when(True if g.window == 1 else tirx.all(plane >= 0, plane < g.planes_in)) as inside:
                        with inside.loop(vectors) as (part, c):
                            self.input(part, task, values, plane, c, scratch)
                sums, pixels = self.output_scratch(body)
                with body.loop(oc_blocks) as (part, b):
                    self.output(part, task, values, b, sums, pixels)
            return whole.statement()
        everything = whole.buffer((spec.n, g.groups.count, g.planes_in, *inner))
        of_input = (spec.n, g.groups.count, g.planes_in, vectors)
        with whole.loop(math.prod(of_input), parallel=True) as (body, index):
            image, block, plane, c = map(body.let, unflat(index, of_input))
            task = self.task(body, image, 0, block)
            self.input(body, task, _Values(everything, image, block, 0), plane, c, self.input_scratch(body))
        with whole.loop(oc_blocks * math.prod(tasks), parallel=True) as (body, index):
            b, *where = unflat(index, (oc_blocks, *tasks))
            task = self.task(body, *where)
            values = _Values(everything, task.image, task.block, 0)
            self.output(body, task, values, body.let(b), *self.output_scratch(body))
        return whole.statement()

    def task(self, body: Block, image: Expr, plane_block: Expr, block: Expr) -> _Task:
        image, plane_block, block = map(body.let, (image, plane_block, block))
        (plane, planes), (group, groups) = (
            (body.let(e.start(i)), e.full if e.many == e.count else body.let(tirx.Select(i < e.many, e.full, e.full - 1)))
            for e, i in ((self.g.plane_blocks, plane_block), (self.g.groups, block))
        )
        return _Task(image, plane, planes, block, group, groups)

    def input_scratch(self, body: Block) -> tuple[tirx.Buffer, tirx.Buffer]:
        """For a vector of channels: the input ``[line][column]``, and a row of tiles transformed along the columns."""
        g, lanes = self.g, self.lanes
        lines = body.buffer((g.lines, round_up(g.length, lanes), lanes))
        return lines, body.buffer((g.length, g.rows.positions, lanes)) if g.rows is not NO_AXIS else None

    def output_scratch(self, body: Block) -> tuple[tirx.Buffer, tirx.Buffer | None]:
        """For a block of channels: sums ``[plane][position][tile][t]``; for NCHW, pixels ``[pixel][lane]``."""
        g, lanes = self.g, self.lanes
        sums = body.buffer((g.plane_blocks.full, g.positions, g.most_tiles, self.picks.tile_oc))
        pixels = round_up(g.pixels(g.groups.full), lanes)
        return sums, body.buffer((pixels, lanes)) if g.dst_block == 1 else None

    def rows_columns(self, task: _Task) -> tuple[Expr, Expr, Expr, Expr]:
        """A task's first row and column of tiles, and how many it has of each."""
        g = self.g
        first, count = task.group * g.blocked.period, task.groups * g.blocked.period
        return (first, 0, count, g.tile_columns) if g.blocked is g.rows else (0, first, 1, count)

    # ---- the input ----------------------------------------------------------------------------

    def input(
        self, body: Block, task: _Task, values: _Values, plane: Expr, c: Expr, scratch: tuple[tirx.Buffer, tirx.Buffer]
    ) -> None:
        """Transform the c-th vector of channels of a plane's block."""
        g, lanes, (lines, half) = self.g, self.lanes, scratch
        rows, columns = g.rows, g.columns
        _, _, row_count, column_count = self.rows_columns(task)
        rest = self.spec.ic % lanes if g.src_block > 1 else 0
        for case, channels in body.cases(c, self.spec.ic // lanes, lanes, rest) if rest else [(body, lanes)]:
            self.gather(case, task, plane, c, channels, lines)
        with body.loop(row_count) as (row_body, r):
            if half is not None:
                with row_body.loop(g.length) as (one, x):
                    read = [one.let(load(lines, "f32", [rows.input(r, k), x, 0], lanes, lanes)) for k in range(rows.extent)]
                    for i, value in enumerate(transformed(one, rows.inputs, read)):
                        one.add(store(half, "f32", [x, i, 0], value, lanes, lanes))
            with row_body.loop(rows.positions) as (i_body, i), i_body.loop(column_count) as (one, t):
                places = [columns.input(t, k) for k in range(columns.extent)]
                source = [(lines, [r, x, 0]) if half is None else (half, [x, i, 0]) for x in places]
                read = [one.let(load(buffer, "f32", place, lanes, lanes)) for buffer, place in source]
                index = [values.image, values.block, plane - values.first_plane]
                for j, value in enumerate(transformed(one, columns.inputs, read)):
                    place = [*index, i * columns.positions + j, (r * g.tile_columns + t) * g.channels + c * lanes]
                    one.add(store(values.buffer, "f32", place, value, lanes, lanes))

    def gather(self, body: Block, task: _Task, plane: Expr, c: Expr, channels: int, lines: tirx.Buffer) -> None:
        """Copy a block's input of a vector of ``channels`` channels, with zeros in its padding."""
        g, lanes, spec = self.g, self.lanes, self.spec
        row, column, *_ = self.rows_columns(task)
        y0, x0 = (body.let(a.first + a.input(t, 0)) for a, t in ((g.rows, row), (g.columns, column)))
        height, width = spec.in_spatial[-2] if spec.rank > 1 else 1, spec.in_spatial[-1]
        with body.loop(g.lines) as (line_body, line):
            y = line_body.let(y0 + line)
            inside = tirx.all(y >= 0, y < height)
            with line_body.when(inside) as case:
                if g.src_block == 1:
                    self.gather_transposed(case, [task.image, plane, y, x0], c, lines, line)
                else:
                    start = case.let(tirx.max(0, tirx.min(-x0, g.length)))
                    end = case.let(tirx.max(start, tirx.min(width - x0, g.length)))
                    for first, last, real in ((0, start, False), (start, end, True), (end, g.length, False)):
                        with case.loop(last - first) as (one, i):
                            x = one.let(first + i)
                            place = [task.image, plane, y, x0 + x]
                            value = self.channels_of(place, c, channels) if real else zeros(lanes)
                            one.add(store(lines, "f32", [line, x, 0], value, lanes, lanes))
            with line_body.when(tirx.Not(inside)) as case, case.loop(g.length) as (one, x):
                one.add(store(lines, "f32", [line, x, 0], zeros(lanes), lanes, lanes))

    def gather_transposed(
        self, body: Block, place: Sequence[Expr], c: Expr, lines: tirx.Buffer, line: Expr
    ) -> None:
        """A line of NCHW, from ``place`` on, which may lie outside the image. Past the last channel is any, not read."""
        lanes, spec = self.lanes, self.spec
        image, *where, x0 = place
        with body.loop(ceildiv(self.g.length, lanes)) as (one, i):
            x = one.let(x0 + i * lanes)
            square = []
            for t in range(lanes):
                channel = c * lanes + t if spec.ic % lanes == 0 else tirx.min(c * lanes + t, spec.ic - 1)
                index = self.place([image, *where, x], channel, 1, spec.ic)
                square.append(one.let(load_within(self.src, spec.dtype, index, lanes, lanes)))
            for t, vector in enumerate(interleave(one, square, lanes)):
                one.add(store(lines, "f32", [line, i * lanes + t, 0], vector, lanes, lanes))

    def channels_of(self, place: Sequence[Expr], c: Expr, channels: int) -> Expr:
        """A pixel's c-th vector of channels, where they lie side by side, in blocks at least."""
        lanes, block = self.lanes, self.g.src_block
        if block >= lanes:
            return load(self.src, self.spec.dtype, self.place(place, c * lanes, block, self.spec.ic), lanes, channels)
        parts = [
            load(self.src, self.spec.dtype, self.place(place, c * lanes + t, block, self.spec.ic), block, block)
            if t < channels
            else zeros(block)
            for t in range(0, lanes, block)
        ]
        return tirx.Shuffle(parts, list(range(lanes)))

    def place(self, pixel: Sequence[Expr], channel: Expr, block: int, channels: int) -> list[Expr]:
        """The index of a channel of a pixel ``(image, plane, row, column)``."""
        image, *where = pixel
        where = where[3 - self.spec.rank :]
        if block == 1:
            return [image, channel, *where]
        if block == channels:
            return [image, *where, channel]
        return [image, channel // block, *where, channel % block]

    # ---- the products -------------------------------------------------------------------------

    def output(
        self, body: Block, task: _Task, values: _Values, b: Expr, sums: tirx.Buffer, pixels: tirx.Buffer | None
    ) -> None:
        """Products of a block of channels, transformed back and stored."""
        spec, lanes, tile_oc = self.spec, self.lanes, self.picks.tile_oc
        width, blocks = tile_oc // lanes, ceildiv(spec.oc, tile_oc)
        last = ceildiv(spec.oc - (blocks - 1) * tile_oc, lanes)
        full, rest = (blocks, None) if last == width else (blocks - 1, last)
        for case, vectors in body.cases(b, full, width, rest):
            self.products(case, task, values, b, vectors, sums)
        vectors = width if rest is None else body.let(tirx.Select(b < full, width, last))
        tail = spec.oc % lanes if pixels is None else 0
        with body.loop(task.planes) as (plane_body, z), plane_body.loop(vectors) as (one, v):
            channel = one.let(b * tile_oc + v * lanes)
            for part, count in one.cases(channel, spec.oc - tail, lanes, tail) if tail else [(one, lanes)]:
                self.back(part, task, z, channel, count, (sums, v * lanes), pixels)

    def products(self, body: Block, task: _Task, values: _Values, b: Expr, vectors: int, sums: tirx.Buffer) -> None:
        """The sums of a block of channels, a position after another."""
        spec, g, lanes, tile_oc = self.spec, self.g, self.lanes, self.picks.tile_oc
        stride, dilation, begin, taps = g.depth
        with body.loop(g.positions) as (position_body, position), position_body.loop(task.planes) as (plane_body, z):
            first, count = meeting(spec, 0, plane_body.let(task.plane + z)) if taps > 1 else (0, 1)
            first, count = plane_body.let(first), plane_body.let(count)
            source = plane_body.let((task.plane + z) * stride - begin - values.first_plane + first * dilation)
            for case, start, pixels, index, tiles in self.register_tiles(plane_body, task):
                registers = case.registers([(t, v) for t in range(pixels) for v in range(vectors)], lanes)
                next_slab = case.let(((b * g.positions + position + 1) * taps + first) * (spec.ic * tile_oc))
                ahead = Ahead(
                    self.weights,
                    next_slab,
                    count * spec.ic,
                    tile_oc // lanes,
                    z * tiles + index,
                    tiles * g.plane_blocks.full,
                )
                origin = ahead.origin(case)
                with case.loop(count) as (tap_body, tap):

                    def scalar(t: int, k: Expr) -> Expr:
                        plane = source + tap * dilation
                        return values.buffer[values.image, values.block, plane, position, (start + t) * g.channels + k]

                    def vector(v: int, k: Expr) -> Expr:
                        return load(self.weights, "f32", [b, position, first + tap, k, v * lanes], lanes, lanes)

                    def fetch(step: Block, k: Expr) -> None:
                        ahead.fetch(step, origin, tap * spec.ic + k)

                    multiply(tap_body, registers, spec.ic, scalar, vector, fetch)
                for t, v in registers.keys:
                    case.add(store(sums, "f32", [z, position, start + t, v * lanes], registers[t, v], lanes, lanes))

    def register_tiles(self, body: Block, task: _Task) -> Iterator[tuple[Block, Expr, int, Expr, int]]:
        """Code for each register tile of a plane: ``(block, first tile, size, index, how many there are)``."""
        g = self.g
        for size, _ in g.groups.sizes:
            with body.when(True if len(g.groups.sizes) == 1 else task.groups == size) as case:
                tiles = Even(g.tiles(size), self.picks.tile_px)
                with case.loop(tiles.count) as (one, index):
                    for inner, pixels in tiles.cases(one, index):
                        yield inner, inner.let(tiles.start(index)), pixels, index, tiles.count

    # ---- the output ---------------------------------------------------------------------------

    def back(
        self,
        body: Block,
        task: _Task,
        z: Expr,
        channel: Expr,
        count: int,
        sums: tuple[tirx.Buffer, Expr],
        pixels: tirx.Buffer | None,
    ) -> None:
        """Transform a vector of channels of a plane back, and store it."""
        g, lanes, (buffer, lane) = self.g, self.lanes, sums
        rows, columns = g.rows, g.columns
        row, column, row_count, column_count = self.rows_columns(task)
        y0, x0 = (body.let(a.output(t, 0)) for a, t in ((rows, row), (columns, column)))
        given = {} if pixels is not None else load_parameters(body, self.parameters, channel, lanes, count)
        with body.loop(row_count) as (row_body, r), row_body.loop(column_count) as (one, c):
            tile = one.let(r * g.tile_columns + c)
            half = []
            for j in range(columns.positions):
                read = [
                    one.let(load(buffer, "f32", [z, i * columns.positions + j, tile, lane], lanes, lanes))
                    for i in range(rows.positions)
                ]
                half.append(transformed(one, rows.back, read))
            found = [transformed(one, columns.back, [column[p] for column in half]) for p in range(rows.outputs)]
            ys = [one.let(rows.output(row + r, p)) for p in range(rows.outputs)]
            xs = [one.let(columns.output(column + c, q)) for q in range(columns.outputs)]
            for case, is_whole in self.whole_or_not(one, ys[-1], xs[-1]):
                for (y, line), (q, x) in ((a, b) for a in zip(ys, found, strict=True) for b in enumerate(xs)):
                    exists = [c for i, a in ((y, rows), (x, columns)) if a.ragged and not is_whole for c in [i < a.size]]
                    with case.when(tirx.all(*exists) if exists else True) as pixel:
                        if pixels is None:
                            self.store_channels(pixel, [task.image, task.plane + z, y, x], channel, line[q], count, given)
                        else:
                            at = (y - y0) * columns.size + (x - x0)
                            pixel.add(store(pixels, "f32", [at, 0], line[q], lanes, lanes))
        if pixels is not None:
            self.store_transposed(body, task, [task.image, task.plane + z, 0, y0 * columns.size + x0], channel, pixels)

    def whole_or_not(self, body: Block, y: Expr, x: Expr) -> Iterator[tuple[Block, bool]]:
        """Code for tiles whose last pixel, ``(y, x)``, is in dst, and for others."""
        conditions = [i < a.size for i, a in ((y, self.g.rows), (x, self.g.columns)) if a.ragged]
        if not conditions:
            yield body, True
            return
        is_whole = body.let(tirx.all(*conditions))
        for condition, answer in ((is_whole, True), (tirx.Not(is_whole), False)):
            with body.when(condition) as case:
                yield case, answer

    def store_channels(
        self, body: Block, pixel: Sequence[Expr], channel: Expr, value: Expr, count: int, given: dict[str, Expr]
    ) -> None:
        """The epilogue and store of a pixel's vector of channels, which may be several blocks of theirs."""
        spec, block = self.spec, self.g.dst_block
        width = min(self.lanes, block)
        for t in range(0, min(count, self.lanes), width):

            def part(vector: Expr, t: int = t) -> Expr:
                return vector if width == self.lanes else tirx.Shuffle([vector], list(range(t, t + width)))

            place = self.place(pixel, channel + t, block, spec.oc)
            parts = {name: body.let(part(vector)) for name, vector in given.items()}
            finish(body, spec, self.dst, self.residual, place, part(value), width, min(count - t, width), **parts)

    def store_transposed(
        self, body: Block, task: _Task, first: Sequence[Expr], channel: Expr, pixels: tirx.Buffer
    ) -> None:
        """The epilogue and store of a block's pixels in NCHW, side by side in dst from ``first`` on."""
        spec, g, lanes = self.spec, self.g, self.lanes
        line = g.columns.size if g.blocked is g.rows else 1
        starts = [i * (g.groups.full - 1) + min(i, g.groups.many) for i in range(g.groups.count)] + [g.blocked.groups]
        sizes = {min(g.pixels(b - a), line * g.blocked.size - g.pixels(a)) for a, b in pairwise(starts)}
        total: Expr = max(sizes)
        if len(sizes) > 1:
            whole = line * g.blocked.size - task.group * g.pixels(1)
            total = body.let(tirx.min(task.groups * g.pixels(1), whole))
        # The last vector of pixels may have some of the one before, where a block has as many; else only what there is.
        parts = [(True, lanes)] if min(sizes) >= lanes else [(total >= lanes, lanes)]
        parts += [(total == size, size) for size in sorted(sizes) if size < lanes]
        for condition, stored in parts:
            with body.when(condition) as case, case.loop((total + lanes - 1) // lanes) as (one, i):
                at = one.let(tirx.max(0, tirx.min(i * lanes, total - lanes)))
                vectors = [one.let(load(pixels, "f32", [at + t, 0], lanes, lanes)) for t in range(lanes)]
                *where, x = first
                for t, row in enumerate(interleave(one, vectors, lanes)):
                    with one.when(True if spec.oc % lanes == 0 else channel + t < spec.oc) as exists:
                        given = spread_parameters(exists, self.parameters, channel + t, lanes)
                        place = self.place([*where, x + at], channel + t, 1, spec.oc)
                        finish(exists, spec, self.dst, self.residual, place, row, lanes, stored, **given)


# ---- the default ----------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _default(schedule: CpuWinograd, spec: ConvSpec, target: Target) -> Picks:
    core = core_of(target)
    return min(_points(schedule, spec, target), key=lambda picks: core.cycles(_counts(spec, target, picks)))


def _points(schedule: CpuWinograd, spec: ConvSpec, target: Target) -> Iterator[Picks]:
    """A few points worth comparing: the best register tile of each block, where tasks are few in both orders."""
    domains, lanes, core = schedule.space(spec, target).domains, target.lanes, core_of(target)
    base = Picks(tile=0, tile_oc=0, tile_px=0, block_rows=0, block_planes=1, parallel="rows")
    for m in domains["tile"]:
        for block in _blocks(spec, m):
            tiles = []
            for tile_oc in domains["tile_oc"]:
                picks = base.replace(tile=m, tile_oc=tile_oc, block_rows=block)
                g = _Geometry(spec, target, picks)
                picks = picks.replace(tile_px=Even(g.most_tiles, min(14, most_pixels(target, tile_oc // lanes))).full)
                tiles.append((core.cycles(Counts(_of_products(spec, target, g, picks))), picks))
            fastest = min(cycles for cycles, _ in tiles)
            for picks in (picks for cycles, picks in tiles if cycles < 1.05 * fastest):
                for planes in domains["block_planes"]:
                    tasks = spec.n * g.groups.count * ceildiv(g.planes, planes)
                    for parallel in domains["parallel"] if 1 < target.cores and tasks < 4 * target.cores else ["rows"]:
                        yield picks.replace(block_planes=planes, parallel=parallel)


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    g, lanes, by_channels = _Geometry(spec, target, picks), target.lanes, picks.parallel == "oc"
    stride, dilation, begin, taps = g.depth
    oc_blocks = ceildiv(spec.oc, picks.tile_oc)
    tasks = spec.n * g.plane_blocks.count * g.groups.count * (oc_blocks if by_channels else 1)
    sizes = [float(a * b) for a, n in g.plane_blocks.sizes for b, m in g.groups.sizes for _ in range(n * m)]
    # Of many tasks, each core has about its share.
    loads = sizes * (tasks // len(sizes)) if tasks <= 64 * target.cores else [1.0] * target.cores
    share, own = busiest(loads, target.cores) / sum(loads), ceildiv(tasks, target.cores)
    met = sum(0 <= z * stride - begin + k * dilation < g.planes_in for z in range(g.planes) for k in range(taps))
    made = g.planes_in if by_channels else min(g.planes_in, g.window) * g.plane_blocks.count
    work = [
        replace(part, times=part.times * share * spec.n * times)
        for parts, times in (
            (_of_products(spec, target, g, picks), met),
            (_of_input(spec, target, g), made),
            (_of_output(spec, target, g), g.planes),
        )
        for part in parts
    ]
    slab = 4 * taps * spec.ic * picks.tile_oc
    weights = slab * g.positions * oc_blocks
    values = 4 * g.positions * g.most_tiles * g.channels * min(g.window, g.planes_in)
    near = values + 4 * g.positions * g.most_tiles * picks.tile_oc * g.plane_blocks.full + 2 * slab
    read = own * (weights / oc_blocks if by_channels else weights)
    images = sum(spec.bytes[name] for name in ("src", "dst"))
    streams = [
        # Weights: once from memory, then from where they stay between tasks.
        Stream(min(weights, read), weights=True, ahead=True),
        Stream(max(0, read - weights), ahead=True, footprint=weights),
        Stream(images * share, ahead=True, footprint=images),
    ]
    if by_channels or near > target.l2 * 3 // 4:  # transformed input comes from beyond the L2 cache, for every block
        streams.append(Stream(own * (1 if by_channels else oc_blocks) * values, footprint=max(near, target.l2 + 1)))
    return Counts(work, streams, 1 + by_channels, target.l2, target.l3)


def _of_products(spec: ConvSpec, target: Target, g: _Geometry, picks: Picks) -> list[Work]:
    """Work of a plane's products with one tap of the depth."""
    lanes, width, found = target.lanes, picks.tile_oc // target.lanes, list[Work]()
    full, rest = divmod(ceildiv(spec.oc, lanes), width)
    for size, blocks in g.groups.sizes:
        tiles = Even(g.tiles(size), picks.tile_px)
        for vectors, channel_blocks in ((width, full), (rest, min(rest, 1))):
            near = 4 * lanes * vectors if 4 * spec.ic * vectors * lanes > target.l1 // 2 else 0
            for pixels, count in tiles.sizes if channel_blocks else ():
                times = blocks * channel_blocks * count * g.positions
                fetched = ceildiv(width, tiles.count)
                found.append(steps(times * spec.ic, pixels, vectors, near=near, fetched=fetched))
                found.append(Work(times, stores=pixels * vectors, cycles=BEGIN_RUN + BEGIN_TILE))
    return found


def _of_input(spec: ConvSpec, target: Target, g: _Geometry) -> list[Work]:
    """Work of copying and transforming a plane of src."""
    rows, columns, vectors = g.rows, g.columns, ceildiv(spec.ic, target.lanes)
    shuffles = math.log2(target.lanes) if g.src_block == 1 else 0
    copied_pixels = g.groups.count * g.lines * g.length
    found = [Work(copied_pixels * vectors, loads=1, stores=1, shuffles=shuffles, cycles=0.5)]
    for axis, times in ((rows, rows.tiles * g.length), (columns, rows.tiles * rows.positions * columns.tiles)):
        if axis is not NO_AXIS:
            work = Work(times * vectors, operations(axis.inputs), axis.extent, axis.positions, cycles=2)
            found.append(work)
    return found


def _of_output(spec: ConvSpec, target: Target, g: _Geometry) -> list[Work]:
    """Work of transforming a plane of dst back, and of its store."""
    rows, columns, vectors = g.rows, g.columns, ceildiv(spec.oc, target.lanes)
    outputs = rows.outputs * columns.outputs
    sums = operations(rows.back) * columns.positions + operations(columns.back) * rows.outputs
    near, loads = 4 * target.lanes * g.positions, g.positions + outputs * spec.residual
    found = [Work(rows.tiles * columns.tiles * vectors, sums + 2 * outputs, loads, outputs, near=near, cycles=10)]
    if g.dst_block == 1:
        shuffles = math.log2(target.lanes)
        found.append(Work(rows.size * columns.size * vectors, fmas=2, loads=2, stores=1, shuffles=shuffles))
    return found
