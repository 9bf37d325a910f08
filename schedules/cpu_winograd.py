"""Winograd convolution: fewer multiplications than taps.

Applies to  dense convolutions with small kernels, strided or dilated, and strided transposed ones:
            3×3 at stride 1 and 2, 2×2, 5×5, 1×7, 1-D k3, 3-D with a 3×3 plane (the depth stays
            direct), transposed 4×4 at stride 2. NCHW and NHWC.
Strategy    F(m, r) along the last one or two axes (Lavin & Gray, CVPR 2016): of m + r - 1 inputs
            make m outputs of an r-tap kernel with m + r - 1 products instead of m·r. At stride s an
            axis' input falls into s phases, each under every s-th tap at stride 1: F(m, ⌈r/s⌉) each,
            and the sum of all. In a transposed convolution it is the output that falls into phases.
            Either way it is one bilinear algorithm, y = Aᵀ[(G g) · (Bᵀ d)], for the steps below.
            1. Pack weights transformed, as [position][oc/t][ic][t].
            2. A task is a block of rows of tiles. Copy its input with its padding, line by line, and
               transpose that in registers into [ic/16][row][col][16]; transform it along each axis with
               channels in the lanes.
            3. One matrix product per transformed position: a tile of `tile_px` tiles × `tile_oc`
               channels in registers, ic innermost.
            4. Transform back with channels in the lanes, along the rows as soon as a column of positions
               is there; bias, residual, activation, store.
            5. `parallel="oc"`: with few tiles the input is transformed first, in parallel over ic,
               and the products are parallel over channel blocks.
Accuracy    falls with m. On data of one scale the error stays within a quarter of the bound of `standard` up to
            m = 4; m > 4 needs `relaxed`. A pixel that is much larger than others costs its tile their precision.
Why not     small planes with many channels: the transformed weights are several times larger, and all
            of them are read for a few tiles. Kernels no larger than their stride: no gain.

This file is long because a schedule is one file: it has a page for each of the expressions, the loops, the tiles of an
axis, and the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import te, tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as script

from convgen.cpu.vector import Block, interleave
from convgen.hardware.target import Target
from convgen.lowering.compute import (
    ACCUMULATOR,
    Expr,
    Index,
    Operands,
    ceildiv,
    copied,
    dst_loops,
    epilogue,
    finished,
    flat,
    partition_edges,
    read_whole,
    round_up,
    row_times,
    unflat,
    vectorize_finished,
)
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Scheduled, Space, require
from convgen.lowering.winograd import admitted, magnitudes, phases, strided, transposed
from convgen.problem.spec import ConvSpec

#: Products per output, against the taps, that a transform must save to be worth its passes.
MOST_PRODUCTS = 0.85
#: Products per tile and axis: code is written out for all of them.
MOST_POSITIONS = 16
#: Tiles of a register tile.
PIXELS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16)

# Seconds per gigabyte that one core moves, beyond what the products take; fitted to measurements of 14 layers on Zen 4.
#: Weights that come from the shared cache, and what is added where they come from memory.
WEIGHTS_FROM_L3 = 0.0045
WEIGHTS_FROM_MEMORY = 0.012
#: Transformed input that outgrows a core's cache: every block of channels reads it from the shared one.
TRANSFORMED_FROM_L3 = 0.01
#: Transformed input that other cores made and that outgrows a core's cache.
TRANSFORMED_ELSEWHERE = 0.05
#: The passes: the input's transform, its copy and transposition, the output's transform, and the store.
TRANSFORM = 0.01
COPY = 0.027
BACK = 0.043
STORE = 0.25


class CpuWinograd(Scheduled):
    id, version = "cpu_winograd", 4
    transforms = True

    def applies(self, spec: ConvSpec, target: Target) -> None:
        lanes = target.lanes
        require(target.kind == "cpu", "needs a CPU")
        require(spec.groups == 1, "needs groups 1")
        axes = _axes(spec)
        require(all(1 in (spec.stride[a], spec.dilation[a]) for a in axes), "dilated and strided")
        if spec.transposed:
            require(spec.rank <= 2, "needs at most two axes where transposed")
            require(all(d == 1 for d in spec.dilation), "needs dilation 1 where transposed")
        require(bool(_tiles(spec)), f"no transform of an axis saves enough products at accuracy {spec.accuracy}")
        # Where a window lies in nothing but padding the exact result admits no error; a transform has one.
        require(all(_covered(spec, a) for a in axes), "needs windows with half of their taps inside the input")
        require(spec.ic >= lanes and spec.oc >= lanes, f"needs at least {lanes} input and output channels")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes = target.lanes
        tiles = _tiles(spec)
        return Space(
            tile=tiles,
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if v == 1 or lanes * (v - 1) < spec.oc],
            tile_px=list(PIXELS),
            block_rows=sorted({b for m in tiles for b in _blocks(spec, m)}),
            parallel=["rows", "oc"],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most = target.most_pixels(picks.tile_oc // target.lanes)
        require(picks.tile_px <= most, f"{picks.tile_px} tiles in a register tile, registers for {most}")
        g = _Geometry(spec, picks)
        require(picks.block_rows * g.rows.period <= g.rows.tiles, "block_rows exceeds the rows of tiles")
        require(picks.tile_px <= g.block_tiles, "fewer tiles in a block than tile_px")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return min(_defaults(spec, target), key=lambda picks: _seconds(spec, target, picks))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return _seconds(spec, target, self.default(spec, target))

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        return magnitudes(spec, src, weights, {axis: _tile(spec, axis, picks.tile) for axis in _axes(spec)})

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        steps = _Steps(spec, target.lanes, picks)
        ops = steps.ops
        packed = [steps.packed_weights()]
        packed += [copied(p, steps.oc_blocks * picks.tile_oc) for p in ops.parameters[1:]]
        weights, *vectors = [te.placeholder(p.shape, p.dtype, f"{p.op.name}_in") for p in packed]
        sums = steps.products(steps.transformed(steps.gathered()), weights)
        dst = steps.stored(steps.transformed_back(sums), vectors)
        return Program(pack=ops.pack(*packed), main=ops.main([weights, *vectors], dst))

    def apply(self, sch: Any, spec: ConvSpec, target: Target, picks: Picks) -> None:
        lanes, g = target.lanes, _Geometry(spec, picks)
        if not g.two_passes:
            sch.compute_inline(sch.get_sblock("vertical"))
            sch.compute_inline(sch.get_sblock("back_vertical"))
        task, channel_block = _split_dst(sch, spec, picks, g)
        if not spec.residual and spec.activation_op.costly:
            vectorize_finished(sch, channel_block, lanes)
        column = _schedule_back(sch, picks, g, lanes, channel_block)
        _schedule_products(sch, picks, g, lanes, column)
        _schedule_input(sch, spec, g, lanes, task)


class _Steps:
    """The tensor expressions of a candidate, a step per method."""

    def __init__(self, spec: ConvSpec, lanes: int, picks: Picks) -> None:
        self.spec, self.ops, self.geometry = spec, Operands(spec), _Geometry(spec, picks)
        self.lanes, self.tile_oc = lanes, picks.tile_oc
        self.ic_blocks, self.oc_blocks = ceildiv(spec.ic, lanes), ceildiv(spec.oc, picks.tile_oc)
        self.zero = tirx.const(0, ACCUMULATOR)

    def packed_weights(self) -> te.Tensor:
        """Transformed weights ``[position][direct taps][oc/t][ic][t]``, zeros past the last channels."""
        spec, g = self.spec, self.geometry

        def taps_of(oc: Expr, ic: Expr, *taps: Expr) -> Expr:
            return self.ops.weights[(ic, oc, *taps) if spec.transposed else (oc, ic, *taps)]

        transformed: Any = taps_of
        for axis in range(len(g.axes)):
            transformed = self._transformed_weights(axis, transformed)
        positions = [axis.positions for axis in g.axes]

        def value(position: Expr, tap: Expr, b: Expr, ic: Expr, lane: Expr) -> Expr:
            oc = b * self.tile_oc + lane
            inside = tirx.all(oc < spec.oc, ic < spec.ic)
            index = (oc, ic, *unflat(tap, g.direct), *unflat(position, positions))
            return tirx.if_then_else(inside, transformed(*index), self.zero)

        shape = (g.positions, math.prod(g.direct), self.oc_blocks, self.ic_blocks * self.lanes, self.tile_oc)
        return te.compute(shape, value, name="weights_packed")

    def _transformed_weights(self, axis: int, read: Callable[..., Expr]) -> te.Tensor:
        """One more axis transformed: ``[oc][ic][direct taps][positions of axes so far][taps of the others]``."""
        spec, g = self.spec, self.geometry
        done = [a.positions for a in g.axes[: axis + 1]]
        shape = (spec.oc, spec.ic, *g.direct, *done, *spec.kernel[len(g.direct) + axis + 1 :])
        at = 2 + len(g.direct) + axis

        def value(*index: Expr) -> Expr:
            return row_times(g.axes[axis].weights, index[at], lambda k: read(*index[:at], k, *index[at + 1 :]))

        return te.compute(shape, value, name=f"weights_{axis}")

    def gathered(self) -> te.Tensor:
        """The input of a block of rows of tiles with its padding, ``[…][block][ic/lanes][line][place][lane]``.

        A line runs along the columns, in 1-D along the rows. Where it is read ``by_lines``, places are
        ``[group][lane]``, and a tensor ``padded`` comes first, with pixels in the lanes.
        """
        g, lanes = self.geometry, self.lanes
        shape = (self.spec.n, *g.outer_in, g.blocks, self.ic_blocks, g.lines)
        if not g.by_lines:
            return te.compute(
                (*shape, g.length, lanes), lambda *index: self._read(index[:-5], index[-5:]), name="gathered"
            )
        padded = te.compute(
            (*shape, lanes, round_up(g.length, lanes)),
            lambda *index: self._read(index[:-5], [*index[-5:-2], index[-1], index[-2]]),
            name="padded",
        )

        def transposed_line(*index: Expr) -> Expr:
            *at, group, place, lane = index
            return padded[(*at, lane, group * lanes + place)]

        return te.compute((*shape, ceildiv(g.length, lanes), lanes, lanes), transposed_line, name="gathered")

    def _read(self, outer: Index, index: Index) -> Expr:
        """The element of src at ``[block, ic/lanes, line, place, lane]``; zero in padding and past the last channel."""
        block, ic_block, line, place, lane = index
        spec, g, rows = self.spec, self.geometry, self.geometry.rows
        n, depth = outer[0], [p - begin for p, (begin, _) in zip(outer[1:], spec.padding, strict=False)]
        row, column = (line, place) if len(g.axes) == 2 else (place, line)
        plane = [rows.first + block * g.block_rows * rows.period * rows.step + row, g.columns.first + column]
        ic = ic_block * self.lanes + lane
        value = self.ops.read_src(n, ic, [*depth, *plane[: len(g.axes)]], always=True)
        return value if spec.ic % self.lanes == 0 else tirx.if_then_else(ic < spec.ic, value, self.zero)

    def transformed(self, gathered: te.Tensor) -> te.Tensor:
        """The transformed input, ``[…][block][position][ic/lanes][tile][lane]``: along the rows first."""
        g, lanes, rows, columns = self.geometry, self.lanes, self.geometry.rows, self.geometry.columns

        def pixel(outer: Index, row: Expr, column: Expr, lane: Expr) -> Expr:
            line, place = (row, column) if len(g.axes) == 2 else (0, row)
            if not g.by_lines:
                return gathered[(*outer, line, place, lane)]
            index = (*outer, line, tirx.floordiv(place, lanes), tirx.floormod(place, lanes), lane)
            # The intrinsic transposes whole groups; scheduling would trim a single group to the places that are read.
            return read_whole(gathered, index, [-2]) if g.length < lanes else gathered[index]

        def vertical_value(*index: Expr) -> Expr:
            *outer, i, row, column, lane = index
            return row_times(rows.inputs, i, lambda k: pixel(outer, rows.input(row, k), column, lane))

        batch = (self.spec.n, *g.outer_in, g.blocks)
        reach = columns.reach(columns.tiles)
        shape = (*batch, self.ic_blocks, rows.positions, g.block_rows * rows.period, reach, lanes)
        vertical = te.compute(shape, vertical_value, name="vertical")

        def value(*index: Expr) -> Expr:
            *outer, position, ic_block, tile, lane = index
            row, column = tirx.floordiv(tile, columns.tiles), tirx.floormod(tile, columns.tiles)
            i, j = tirx.floordiv(position, columns.positions), tirx.floormod(position, columns.positions)
            return row_times(
                columns.inputs, j, lambda k: vertical[(*outer, ic_block, i, row, columns.input(column, k), lane)]
            )

        shape = (*batch, g.positions, self.ic_blocks, g.block_tiles, lanes)
        return te.compute(shape, value, name="transformed")

    def products(self, transformed: te.Tensor, weights: te.Tensor) -> te.Tensor:
        """A matrix product per position, ``[…][block][oc/t][position of rows][position of columns][tile][t]``."""
        spec, g, lanes = self.spec, self.geometry, self.lanes
        ic_block = te.reduce_axis((0, self.ic_blocks), "cb")
        ic_lane = te.reduce_axis((0, lanes), "cl")
        met = [te.reduce_axis((0, k), f"k{axis}") for axis, k in enumerate(g.met)]

        def value(*index: Expr) -> Expr:
            n, *rest = index
            depth, (block, oc_block, i, j, tile, lane) = rest[: len(g.outer)], rest[len(g.outer) :]
            taps = [_first_met(spec, axis, p) + k for axis, (p, k) in enumerate(zip(depth, met, strict=True))]
            depth_in = [p * s + k * d for p, k, s, d in zip(depth, taps, spec.stride, spec.dilation, strict=False)]
            position = i * g.columns.positions + j
            source = transformed[(n, *depth_in, block, position, ic_block, tile, ic_lane)]
            weight = weights[position, flat(taps, g.direct), oc_block, ic_block * lanes + ic_lane, lane]
            return te.sum(source * weight, [*met, ic_block, ic_lane])

        shape = (*self._blocks_out, g.rows.positions, g.columns.positions, g.block_tiles, self.tile_oc)
        return te.compute(shape, value, name="acc")

    @property
    def _blocks_out(self) -> tuple[int, ...]:
        """The leading dimensions of what comes after the products."""
        return (self.spec.n, *self.geometry.outer, self.geometry.blocks, self.oc_blocks)

    def transformed_back(self, sums: te.Tensor) -> te.Tensor:
        """Outputs of tiles, ``[…][block][oc/t][row of a tile][column of a tile][tile][t]``: along the rows first."""
        g, rows, columns = self.geometry, self.geometry.rows, self.geometry.columns

        def vertical_value(*index: Expr) -> Expr:
            *outer, p, j, tile, lane = index
            return row_times(rows.back, p, lambda k: sums[(*outer, k, j, tile, lane)])

        shape = (*self._blocks_out, rows.outputs, columns.positions, g.block_tiles, self.tile_oc)
        vertical = te.compute(shape, vertical_value, name="back_vertical")

        def value(*index: Expr) -> Expr:
            *outer, p, q, tile, lane = index
            return row_times(columns.back, q, lambda k: vertical[(*outer, p, k, tile, lane)])

        shape = (*self._blocks_out, rows.outputs, columns.outputs, g.block_tiles, self.tile_oc)
        return te.compute(shape, value, name="back")

    def stored(self, outputs: te.Tensor, vectors: Sequence[te.Tensor]) -> te.Tensor:
        """dst with the epilogue; ``vectors`` are the packed parameters of channels."""
        spec, ops, g, tile_oc = self.spec, self.ops, self.geometry, self.tile_oc
        sums, is_finished = finished(ops, outputs, vectors, lambda index: index[-5] * tile_oc + index[-1])

        def value(n: Expr, oc: Expr, pixel: Index) -> Expr:
            depth, plane = pixel[: len(g.outer)], pixel[len(g.outer) :]
            block, inner = tirx.floordiv(plane[0], g.block_pixels), tirx.floormod(plane[0], g.block_pixels)
            row, p = g.rows.locate(inner)
            column, q = g.columns.locate(plane[1]) if len(g.axes) == 2 else (0, 0)
            tile = row * g.columns.tiles + column
            total = sums[(n, *depth, block, tirx.floordiv(oc, tile_oc), p, q, tile, tirx.floormod(oc, tile_oc))]
            residual = ops.residual[ops.order(n, oc, pixel)] if ops.residual else None
            if is_finished:
                return total
            return epilogue(spec, total, residual=residual, **ops.per_channel(vectors, oc))

        return ops.store(value)


def _split_dst(sch: Any, spec: ConvSpec, picks: Picks, g: _Geometry) -> tuple[Any, Any]:
    """Split dst's loops into tasks and blocks of channels.

    Returns the loop over tasks, under which the input is transformed, and the loop over blocks of channels. Where
    both are parallel, ``parallel="oc"``, the first is None: the input is transformed before.
    """
    n, spatial, oc = dst_loops(sch, spec)
    depth, plane = spatial[: len(g.outer)], spatial[len(g.outer) :]
    channel_block, channel = sch.split(oc, [None, picks.tile_oc])
    block, first = sch.split(plane[0], [None, g.block_pixels])
    pixels = [first, *plane[1:]]
    inner = [channel, *pixels] if spec.layout == "nchw" else [*pixels, channel]
    sch.reorder(n, *depth, block, channel_block, *inner)
    task = sch.fuse(n, *depth, block)
    if picks.parallel == "rows":
        sch.parallel(task)
    else:
        task, channel_block = None, sch.fuse(task, channel_block)
        sch.parallel(channel_block)
    if spec.layout == "nhwc" and spec.oc % picks.tile_oc == 0:
        sch.vectorize(channel)
    return task, channel_block


def _unroll(sch: Any, block: Any, positions: Sequence[Any], channels: int, lanes: int) -> None:
    """Of a transform's block: unroll the loops over positions, and vectorise the innermost one, over ``channels``."""
    *_, lane = sch.get_loops(block)
    if channels > lanes:
        _, lane = sch.split(lane, [None, lanes])
    sch.vectorize(lane)
    for loop in positions:
        sch.unroll(loop)


def _schedule_back(sch: Any, picks: Picks, g: _Geometry, lanes: int, channel_block: Any) -> Any:
    """Transform one block of channels back at a time. Returns the loop under which its products are to be made."""
    back = sch.get_sblock("back")
    sch.compute_at(back, channel_block, preserve_unit_loops=True)
    p, q, tile, lane = sch.get_loops(back)[-4:]
    sch.reorder(tile, p, q, lane)
    _unroll(sch, back, [p, q], picks.tile_oc, lanes)
    if not g.two_passes:
        return channel_block
    vertical = sch.get_sblock("back_vertical")
    sch.compute_at(vertical, channel_block, preserve_unit_loops=True)
    p, column, tile, lane = sch.get_loops(vertical)[-4:]
    sch.reorder(column, tile, p, lane)
    _unroll(sch, vertical, [p], picks.tile_oc, lanes)
    return column  # of positions: transformed back while it is in the cache


def _schedule_products(sch: Any, picks: Picks, g: _Geometry, lanes: int, column: Any) -> None:
    """The matrix products of a pass of the loop ``column``, a tile in registers at a time."""
    acc = sch.get_sblock("acc")
    sch.compute_at(acc, column, preserve_unit_loops=True)
    reductions = 2 + len(g.direct)
    i, j, tile, channel, *reduce = sch.get_loops(acc)[-4 - reductions :]
    tile_block, tile = sch.split(tile, [None, picks.tile_px])
    vector, lane = sch.split(channel, [None, lanes])
    sch.reorder(i, j, tile_block, *reduce, tile, vector, lane)
    sch.vectorize(lane)
    sch.unroll(vector)
    sch.unroll(tile)
    registers = sch.cache_write(acc, 0, "global")
    sch.reverse_compute_at(registers, tile_block, preserve_unit_loops=True)
    _, lane = sch.split(sch.get_loops(registers)[-1], [None, lanes])
    sch.vectorize(lane)
    sch.decompose_reduction(acc, reduce[0])


def _schedule_input(sch: Any, spec: ConvSpec, g: _Geometry, lanes: int, task: Any) -> None:
    """Gather and transform the input, a vector of channels at a time: under ``task``, or before all tasks if None."""
    transformed, gathered = sch.get_sblock("transformed"), sch.get_sblock("gathered")
    if task is not None:
        sch.compute_at(transformed, task, preserve_unit_loops=True)
    position, ic_block, tile, lane = sch.get_loops(transformed)[-4:]
    row_tile, column_tile = sch.split(tile, [None, g.columns.tiles])
    i, j = sch.split(position, [None, g.columns.positions])
    if g.two_passes:
        sch.reorder(ic_block, i, row_tile, column_tile, j, lane)
    else:
        sch.reorder(ic_block, row_tile, column_tile, i, j, lane)
    if task is None:
        ic_block = sch.fuse(*sch.get_loops(transformed)[:-5])
        sch.parallel(ic_block)
    _unroll(sch, transformed, [j] if g.two_passes else [i, j], lanes, lanes)
    if g.two_passes:
        vertical = sch.get_sblock("vertical")
        sch.compute_at(vertical, ic_block, preserve_unit_loops=True)
        i, row, column, lane = sch.get_loops(vertical)[-4:]
        sch.reorder(row, column, i, lane)
        _unroll(sch, vertical, [i], lanes, lanes)
    sch.compute_at(gathered, ic_block, preserve_unit_loops=True)
    if g.by_lines:
        line, _, place, _ = sch.get_loops(gathered)[-4:]
        padded = sch.get_sblock("padded")
        sch.compute_at(padded, line, preserve_unit_loops=True)
        if len(g.axes) == 2:  # in 1-D the edges move with the block
            partition_edges(sch, sch.get_loops(padded)[-1])
        sch.tensorize(place, _transposition(lanes))
    elif spec.layout == "nhwc" and spec.ic % lanes == 0:
        sch.vectorize(sch.get_loops(gathered)[-1])


class _Script(Block):
    """Statements of the function that is being parsed."""

    def let(self, value: Expr) -> Expr:
        return script.bind(value)


@cache
def _transposition(lanes: int) -> str:
    """The name of the intrinsic that transposes ``lanes`` vectors, in registers."""
    name = f"convgen.transposition_{lanes}"

    def shuffled(a: Any, b: Any) -> None:
        row = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)
        vectors = [tirx.BufferLoad(a, [tirx.const(i, "int32"), row]) for i in range(lanes)]
        for i, vector in enumerate(interleave(_Script(), vectors, lanes)):
            script.buffer_store(b, vector, [tirx.const(i, "int32"), row])

    @script.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def meaning(x: script.handle, y: script.handle) -> None:
        stride = script.int32()
        a = script.match_buffer(x, (lanes, lanes), "float32", strides=[stride, 1], offset_factor=1)
        b = script.match_buffer(y, (lanes, lanes), "float32", offset_factor=1)
        with script.sblock("root"):
            script.reads(a[0:lanes, 0:lanes])
            script.writes(b[0:lanes, 0:lanes])
            for i, j in script.grid(lanes, lanes):
                with script.sblock("element"):
                    row, col = script.axis.remap("SS", [i, j])
                    b[row, col] = a[col, row]

    @script.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def code(x: script.handle, y: script.handle) -> None:
        stride = script.int32()
        a = script.match_buffer(x, (lanes, lanes), "float32", strides=[stride, 1], offset_factor=1)
        b = script.match_buffer(y, (lanes, lanes), "float32", offset_factor=1)
        with script.sblock("root"):
            script.reads(a[0:lanes, 0:lanes])
            script.writes(b[0:lanes, 0:lanes])
            shuffled(a, b)

    TensorIntrin.register(name, meaning, code)
    return name


@dataclass(frozen=True)
class _Axis:
    """A transformed axis: its bilinear algorithm, and where the tiles lie.

    A tile makes ``outputs`` pixels of ``extent`` inputs with ``positions`` products. Under a dilation d
    its pixels are d apart, and d tiles interleave: the ``period``.

    Attributes:
        back, weights, inputs: the matrices Aᵀ, G and Bᵀ.
        first: the first input of the first tile.
        step: inputs from a tile to the next.
        period: tiles that interleave.
        tiles: how many cover the output.
    """

    back: Sequence[Sequence[float]]
    weights: Sequence[Sequence[float]]
    inputs: Sequence[Sequence[float]]
    first: int
    step: int
    period: int
    tiles: int

    @property
    def outputs(self) -> int:
        return len(self.back)

    @property
    def positions(self) -> int:
        return len(self.inputs)

    @property
    def extent(self) -> int:
        return len(self.inputs[0])

    def input(self, tile: Expr, k: int) -> Expr:
        """Where the k-th input of a tile is, counted from the first tile's first."""
        if self.period == 1:
            return tile * self.step + k
        group, inner = tirx.floordiv(tile, self.period), tirx.floormod(tile, self.period)
        return group * (self.step * self.period) + inner + k * self.period

    def reach(self, tiles: int) -> int:
        """Inputs of the first ``tiles`` tiles."""
        groups = ceildiv(tiles, self.period)
        return ((groups - 1) * self.step + self.extent) * self.period

    def locate(self, pixel: Expr) -> tuple[Expr, Expr]:
        """The tile of an output pixel, and its place there."""
        if self.period == 1:
            return tirx.floordiv(pixel, self.outputs), tirx.floormod(pixel, self.outputs)
        size = self.outputs * self.period
        tile = tirx.floordiv(pixel, size) * self.period + tirx.floormod(pixel, self.period)
        return tile, tirx.floordiv(tirx.floormod(pixel, size), self.period)


#: The second axis of a 1-D layer.
_NO_AXIS = _Axis(back=[[1]], weights=[[1]], inputs=[[1]], first=0, step=1, period=1, tiles=1)


def _transformed_axis(spec: ConvSpec, axis: int, m: int) -> _Axis:
    """An axis of a layer in tiles of ``m`` outputs of a phase."""
    kernel, stride, begin = spec.kernel[axis], spec.stride[axis], spec.padding[axis][0]
    if spec.transposed:
        *matrices, first = transposed(m, kernel, stride, begin)
        step = m
    else:
        matrices, first, step = [*strided(m, kernel, stride)], -begin, m * stride
    back, weights, inputs = ([[float(v) for v in row] for row in rows] for rows in matrices)
    period = spec.dilation[axis] if kernel > 1 else 1
    tiles = ceildiv(spec.out_spatial[axis], len(back) * period) * period
    return _Axis(back, weights, inputs, first, step, period, tiles)


class _Geometry:
    """Sizes of a candidate: tiles per axis, blocks, positions. The depth of 3-D stays direct.

    Attributes:
        axes: the transformed axes. ``rows`` and ``columns`` are the same; 1-D layers have one column.
        two_passes: whether both axes save products; where only one does, one pass transforms it.
        outer, outer_in, direct: sizes of the other axes, of dst, of padded src, and of the kernel.
        met: how many of the direct taps can meet the input at once: not all where it is shorter than the kernel.
        positions: products of a tile.
        block_rows, block_pixels, block_tiles: of a block, the rows of tiles (rows that interleave count as one), the
            rows of dst, and the tiles.
        blocks: how many blocks there are.
        by_lines: whether the input is read along the pixels, and transposed, as channels lie far apart. Not in 3-D:
            TVM 0.27 does not recognise the transposition under the overlapping windows of a depth.
        lines, length: how many lines a block's input has, and how long they are.
    """

    def __init__(self, spec: ConvSpec, picks: Picks) -> None:
        self.axes = [_transformed_axis(spec, axis, _tile(spec, axis, picks.tile)) for axis in _axes(spec)]
        self.rows, self.columns = self.axes if len(self.axes) == 2 else (self.axes[0], _NO_AXIS)
        self.two_passes = self.rows.positions > 1 and self.columns.positions > 1
        count = len(self.axes)
        self.outer, self.outer_in = spec.out_spatial[:-count], spec.padded_spatial[:-count]
        self.direct = spec.kernel[:-count]
        self.met = tuple(_met(spec, axis) for axis in range(len(self.direct)))
        self.positions = self.rows.positions * self.columns.positions
        self.block_rows = int(picks.block_rows)
        tile_rows = self.block_rows * self.rows.period
        self.block_pixels = tile_rows * self.rows.outputs
        self.blocks = ceildiv(self.rows.tiles, tile_rows)
        self.block_tiles = tile_rows * self.columns.tiles
        self.by_lines = spec.layout == "nchw" and spec.rank <= 2
        inputs = self.rows.reach(tile_rows), self.columns.reach(self.columns.tiles)
        self.lines, self.length = inputs if count == 2 else inputs[::-1]


def _axes(spec: ConvSpec) -> tuple[int, ...]:
    """The axes that are transformed: the last two, in 1-D the only one."""
    return tuple(range(spec.rank))[-2:]


def _met(spec: ConvSpec, axis: int) -> int:
    """How many taps of an axis meet the input at most, from :func:`_first_met` on."""
    return min(spec.kernel[axis], spec.in_spatial[axis]) if spec.dilation[axis] == 1 else spec.kernel[axis]


def _first_met(spec: ConvSpec, axis: int, pixel: Expr) -> Expr:
    """The first of the taps of an axis that are multiplied, for an output pixel."""
    spare = spec.kernel[axis] - _met(spec, axis)
    if not spare:
        return 0
    return tirx.max(tirx.min(spec.padding[axis][0] - pixel * spec.stride[axis], spare), 0)


def _tile(spec: ConvSpec, axis: int, m: int) -> int:
    """Output pixels of a phase per tile: 1 along an axis where no transform saves products."""
    return m if spec.kernel[axis] > spec.stride[axis] else 1


def _tiles(spec: ConvSpec) -> list[int]:
    """The tile sizes that the accuracy class admits and that save enough products."""
    axes = _axes(spec)
    of_axis = {a: phases(spec.kernel[a], spec.stride[a]) for a in axes}
    sizes = []
    for m in admitted(spec.accuracy, max(max(taps) for taps in of_axis.values())):
        per_axis = {a: [_tile(spec, a, m) + taps - 1 for taps in of_axis[a]] for a in axes}
        share = math.prod(sum(per_axis[a]) / (_tile(spec, a, m) * spec.kernel[a]) for a in axes)
        if share <= MOST_PRODUCTS and all(sum(points) <= MOST_POSITIONS for points in per_axis.values()):
            sizes.append(m)
    return sizes


def _covered(spec: ConvSpec, axis: int) -> bool:
    """Whether the windows at the edges have half of their taps, or one less, inside the input."""
    kernel, stride = spec.kernel[axis], spec.stride[axis]
    begin, end = spec.padding[axis]
    if not spec.transposed:
        return 2 * max(begin, end) <= (kernel + 1) * spec.dilation[axis]
    taps = ceildiv(kernel, stride)
    inside = 1 + min(begin, end - spec.output_padding[axis]) // stride
    return 2 * (taps - inside) <= taps + 1


def _blocks(spec: ConvSpec, m: int) -> list[int]:
    """Choices for the rows of tiles of a block; in 1-D, its tiles. Those that interleave count as one."""
    first = _axes(spec)[0]
    axis = _transformed_axis(spec, first, _tile(spec, first, m))
    rows = axis.tiles // axis.period
    sizes = (1, 2, 4, 7, 8, 14) if spec.rank > 1 else (1, 2, 4, 7, 14, 28, 56, 112, 224)
    return sorted({b for b in sizes if b <= rows} | ({rows} if rows <= 14 else set()))


def _defaults(spec: ConvSpec, target: Target) -> Iterator[Picks]:
    """A few points worth comparing."""
    lanes = target.lanes
    widths = [1] if spec.oc <= lanes else [2] if target.fmas == 1 else [2, 3]
    for m in _tiles(spec):
        for block in _blocks(spec, m):
            for vectors in widths:
                base = Picks(tile=m, tile_oc=vectors * lanes, tile_px=1, block_rows=block, parallel="rows")
                g = _Geometry(spec, base)
                sizes = [p for p in PIXELS if p <= min(14, target.most_pixels(vectors), g.block_tiles)]
                tile_px = min(sizes, key=lambda p: _product_cost(target, g.block_tiles, p, vectors))
                for parallel in ("rows", "oc"):
                    yield base.replace(tile_px=tile_px, parallel=parallel)


def _product_cost(target: Target, tiles: int, tile_px: int, vectors: int) -> float:
    """The time that a block's products take, as a multiple of their time at the nominal peak.

    Weights are loaded for every register tile, and a last tile that is not full has conditions. On cores that begin two
    FMAs a cycle fewer than eight sums do not hide the latency, and a tile that is not full costs as much as a full one.
    """
    parts = ceildiv(tiles, tile_px)
    cost = 0.9 + 0.25 * parts / tiles
    if target.fmas == 1:
        return cost + (0.08 if tiles % tile_px else 0)
    return (cost + parts * tile_px / tiles - 1) * max(1, 8 / (vectors * tile_px))


def _seconds(spec: ConvSpec, target: Target, picks: Picks) -> float:
    """Predicted seconds: the products against the nominal peak, and what is moved besides."""
    g = _Geometry(spec, picks)
    blocks = spec.n * math.prod(g.outer) * g.blocks
    oc, direct = round_up(spec.oc, picks.tile_oc), math.prod(g.direct)
    ic = round_up(spec.ic, target.lanes)
    tiles, met = blocks * g.block_tiles, math.prod(g.met)
    products = 2 * tiles * g.positions * met * ic * oc / (target.peak_flops / target.cores)
    seconds = products * _product_cost(target, g.block_tiles, picks.tile_px, picks.tile_oc // target.lanes)
    # Gigabytes of a float that every block moves. The nominal peak is of one FMA a cycle: in its units all else takes
    # longer on a core that begins two.
    gigabytes = 4e-9 * blocks * target.fmas
    # Weights that outgrow a core's cache come from the shared one, again for every block; or from memory.
    weights = g.positions * direct * ic * oc
    if 4 * weights > target.l2 / 2:
        seconds += WEIGHTS_FROM_L3 * gigabytes * weights
    if 4 * weights > 0.75 * target.l3:
        seconds += WEIGHTS_FROM_MEMORY * gigabytes * weights
    gigabytes = 4e-9 * blocks * (1 if target.fmas == 1 else 1.6)
    transformed = g.positions * g.block_tiles * ic
    if 4 * transformed > 0.6 * target.l2:
        seconds += TRANSFORMED_FROM_L3 * gigabytes * transformed * met * (oc // picks.tile_oc)
    if picks.parallel == "rows":  # each task makes what it reads
        made = met
    else:  # made once, then read from the shared cache
        made = 1
        if 4 * transformed * blocks > target.l2:
            seconds += TRANSFORMED_ELSEWHERE * gigabytes * transformed
    seconds += TRANSFORM * gigabytes * made * transformed
    seconds += COPY * gigabytes * made * g.lines * round_up(g.length, target.lanes) * ic
    seconds += BACK * gigabytes * g.positions * g.block_tiles * oc
    seconds += STORE * gigabytes * g.block_pixels * g.columns.tiles * g.columns.outputs * spec.oc
    tasks = blocks * (oc // picks.tile_oc if picks.parallel == "oc" else 1)
    return float(seconds * round_up(tasks, target.cores) / tasks / target.cores)
