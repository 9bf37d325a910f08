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
Accuracy    falls with m. Up to 4 interpolation points are as accurate as plain summation (strict), up
            to m = 4 the error stays within a quarter of the bound of `standard`; m > 4 needs `relaxed`.
Why not     small planes with many channels: the transformed weights are several times larger, and all
            of them are read for a few tiles. Kernels no larger than their stride: no gain.
"""

from __future__ import annotations

import math
from functools import cache

from tvm import te, tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as script

from convgen.cpu.vector import Block, interleave
from convgen.lowering.compute import (
    ACCUMULATOR,
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
from convgen.lowering.schedule import Picks, Program, Scheduled, Space, require
from convgen.lowering.winograd import admitted, phases, strided, transposed

#: Products per output, against the taps, that a transform must save to be worth its passes.
MOST_PRODUCTS = 0.85
#: Products per tile and axis: all of them are written out.
MOST_POSITIONS = 16
#: Tiles of a register tile.
PIXELS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16)


class CpuWinograd(Scheduled):
    id, version = "cpu_winograd", 4
    transforms = True

    def applies(self, spec, target):
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

    def space(self, spec, target):
        lanes = target.lanes
        tiles = _tiles(spec)
        return Space(
            tile=tiles,
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if v == 1 or lanes * (v - 1) < spec.oc],
            tile_px=list(PIXELS),
            block_rows=sorted({b for m in tiles for b in _blocks(spec, m)}),
            parallel=["rows", "oc"],
        )

    def valid(self, spec, target, picks):
        most = target.most_pixels(picks.tile_oc // target.lanes)
        require(picks.tile_px <= most, f"{picks.tile_px} tiles in a register tile, registers for {most}")
        g = _Geometry(spec, picks)
        require(picks.block_rows * g.rows.period <= g.rows.tiles, "block_rows exceeds the rows of tiles")
        require(picks.tile_px <= g.block_tiles, "fewer tiles in a block than tile_px")

    def default(self, spec, target):
        return min(_defaults(spec, target), key=lambda picks: _seconds(spec, target, picks))

    def cost(self, spec, target):
        return _seconds(spec, target, self.default(spec, target))

    def program(self, spec, target, picks):
        ops, dtype = Operands(spec), ACCUMULATOR
        lanes, t = target.lanes, picks.tile_oc
        g = _Geometry(spec, picks)
        rows, cols = g.rows, g.cols
        ic_blocks, oc_blocks = ceildiv(spec.ic, lanes), ceildiv(spec.oc, t)
        zero = tirx.const(0, dtype)

        # Weights: one transform pass per axis, then [position][direct taps][oc/t][ic][t].
        def transformed(axis, read):
            """(oc, ic, direct taps, positions so far + kernel taps) -> one more axis transformed."""
            done = [a.positions for a in g.axes[: axis + 1]]
            shape = (spec.oc, spec.ic, *g.direct, *done, *spec.kernel[len(g.direct) + axis + 1 :])
            at = 2 + len(g.direct) + axis

            def value(*index):
                return row_times(g.axes[axis].weights, index[at], lambda k: read(*index[:at], k, *index[at + 1 :]))

            return te.compute(shape, value, name=f"weights_{axis}")

        def taps_of(o, c, *taps):
            return ops.weights[(c, o, *taps) if spec.transposed else (o, c, *taps)]

        stage = taps_of
        for axis in range(len(g.axes)):
            stage = transformed(axis, stage)
        packed_shape = (g.positions, math.prod(g.direct), oc_blocks, ic_blocks * lanes, t)

        def packed_weights(position, tap, b, c, lane):
            o = b * t + lane
            index = (o, c, *unflat(tap, g.direct), *unflat(position, [a.positions for a in g.axes]))
            inside = tirx.all(o < spec.oc, c < spec.ic)
            return tirx.if_then_else(inside, stage(*index), zero)

        packed = [te.compute(packed_shape, packed_weights, name="weights_packed")]
        packed += [copied(p, oc_blocks * t) for p in ops.parameters[1:]]
        w, *vectors = [te.placeholder(p.shape, p.dtype, f"{p.op.name}_in") for p in packed]

        # Input: lines of a block of rows of tiles with their padding, then channels last. A line runs along the
        # columns, in 1-D along the rows.
        batch = (spec.n, *g.outer_in)

        def read(at, block, cb, line, place, lane):
            n, depth = at[0], [p - b for p, (b, _) in zip(at[1:], spec.padding, strict=False)]
            row, col = (line, place) if len(g.axes) == 2 else (place, line)
            plane = [rows.first + block * g.block_rows * rows.period * rows.step + row, cols.first + col]
            c = cb * lanes + lane
            value = ops.read_src(n, c, [*depth, *plane[: len(g.axes)]], always=True)
            return value if spec.ic % lanes == 0 else tirx.if_then_else(c < spec.ic, value, zero)

        if g.by_lines:
            shape = (*batch, g.blocks, ic_blocks, g.lines, lanes, round_up(g.length, lanes))
            padded = te.compute(shape, lambda *i: read(i[:-5], *i[-5:-2], i[-1], i[-2]), name="padded")

            def gathered(*index):
                *at, group, place, lane = index
                return padded[(*at, lane, group * lanes + place)]

            shape = (*batch, g.blocks, ic_blocks, g.lines, ceildiv(g.length, lanes), lanes, lanes)
        else:

            def gathered(*index):
                return read(index[:-5], *index[-5:])

            shape = (*batch, g.blocks, ic_blocks, g.lines, g.length, lanes)
        x0 = te.compute(shape, gathered, name="gathered")

        def pixel_of(at, row, col, lane):
            line, place = (row, col) if len(g.axes) == 2 else (0, row)
            if not g.by_lines:
                return x0[(*at, line, place, lane)]
            index = (*at, line, tirx.floordiv(place, lanes), tirx.floormod(place, lanes), lane)
            # One group of places, and the intrinsic below would not find all of it.
            return read_whole(x0, index, [-2]) if g.length < lanes else x0[index]

        def vertical(*index):
            *at, i, row, col, lane = index
            return row_times(rows.inputs, i, lambda k: pixel_of(at, rows.input(row, k), col, lane))

        shape = (*batch, g.blocks, ic_blocks, rows.positions, g.block_rows * rows.period, cols.reach(cols.tiles), lanes)
        x1 = te.compute(shape, vertical, name="vertical")

        def horizontal(*index):
            *at, position, cb, tile, lane = index
            row, col = tirx.floordiv(tile, cols.tiles), tirx.floormod(tile, cols.tiles)
            i, j = tirx.floordiv(position, cols.positions), tirx.floormod(position, cols.positions)
            return row_times(cols.inputs, j, lambda k: x1[(*at, cb, i, row, cols.input(col, k), lane)])

        shape = (*batch, g.blocks, g.positions, ic_blocks, g.block_tiles, lanes)
        v = te.compute(shape, horizontal, name="transformed")

        # One matrix product per position.
        cb = te.reduce_axis((0, ic_blocks), "cb")
        cl = te.reduce_axis((0, lanes), "cl")
        met = [te.reduce_axis((0, k), f"k{axis}") for axis, k in enumerate(g.met)]
        batch_out = (spec.n, *g.outer)

        def product(*index):
            n, *rest = index
            depth, (block, ob, i, j, tile, lane) = rest[: len(g.outer)], rest[len(g.outer) :]
            position = i * cols.positions + j
            taps = [_first_met(spec, axis, p) + k for axis, (p, k) in enumerate(zip(depth, met, strict=True))]
            depth_in = [p * s + k * d for p, k, s, d in zip(depth, taps, spec.stride, spec.dilation, strict=False)]
            return te.sum(
                v[(n, *depth_in, block, position, cb, tile, cl)]
                * w[position, flat(taps, g.direct), ob, cb * lanes + cl, lane],
                [*met, cb, cl],
            )

        shape = (*batch_out, g.blocks, oc_blocks, rows.positions, cols.positions, g.block_tiles, t)
        acc = te.compute(shape, product, name="acc")

        # And back.
        def back_vertical(*index):
            *at, p, j, tile, lane = index
            return row_times(rows.back, p, lambda k: acc[(*at, k, j, tile, lane)])

        shape = (*batch_out, g.blocks, oc_blocks, rows.outputs, cols.positions, g.block_tiles, t)
        y1 = te.compute(shape, back_vertical, name="back_vertical")

        def back(*index):
            *at, p, q, tile, lane = index
            return row_times(cols.back, q, lambda k: y1[(*at, p, k, tile, lane)])

        shape = (*batch_out, g.blocks, oc_blocks, rows.outputs, cols.outputs, g.block_tiles, t)
        y = te.compute(shape, back, name="back")
        sums, done = finished(ops, y, vectors, lambda index: index[-5] * t + index[-1])

        def value(n, o, pixel):
            depth, plane = pixel[: len(g.outer)], pixel[len(g.outer) :]
            block, inner = tirx.floordiv(plane[0], g.block_pixels), tirx.floormod(plane[0], g.block_pixels)
            (row, p), (col, q) = rows.locate(inner), cols.locate(plane[1]) if len(g.axes) == 2 else (0, 0)
            at = (n, *depth, block, tirx.floordiv(o, t), p, q, row * cols.tiles + col, tirx.floormod(o, t))
            residual = ops.residual[ops.order(n, o, pixel)] if spec.residual else None
            return sums[at] if done else epilogue(spec, sums[at], residual=residual, **ops.per_channel(vectors, o))

        return Program(pack=ops.pack(*packed), main=ops.main([w, *vectors], ops.store(value)))

    def apply(self, sch, spec, target, picks):
        lanes = target.lanes
        g = _Geometry(spec, picks)
        acc, back, back_vertical = (sch.get_sblock(name) for name in ("acc", "back", "back_vertical"))
        transformed, vertical, gathered = (sch.get_sblock(name) for name in ("transformed", "vertical", "gathered"))
        both = g.rows.positions > 1 and g.cols.positions > 1
        if not both:  # one pass does it
            sch.compute_inline(vertical)
            sch.compute_inline(back_vertical)
        n, spatial, oc = dst_loops(sch, spec)
        depth, plane = spatial[: len(g.outer)], spatial[len(g.outer) :]
        channel_block, channel = sch.split(oc, [None, picks.tile_oc])
        block, first = sch.split(plane[0], [None, g.block_pixels])
        pixels = [first, *plane[1:]]
        inner = [channel, *pixels] if spec.layout == "nchw" else [*pixels, channel]
        sch.reorder(n, *depth, block, channel_block, *inner)
        outer = sch.fuse(n, *depth, block)
        if picks.parallel == "rows":
            sch.parallel(outer)
            task = outer
        else:
            task = None
            channel_block = sch.fuse(outer, channel_block)
            sch.parallel(channel_block)
        if spec.layout == "nhwc" and spec.oc % picks.tile_oc == 0:
            sch.vectorize(channel)

        def unrolled_lanes(block, positions, keep):
            """Innermost: the transformed positions unrolled, then the lanes vectorised."""
            *_, lane = sch.get_loops(block)
            if keep > lanes:
                _, lane = sch.split(lane, [None, lanes])
            sch.vectorize(lane)
            for loop in positions:
                sch.unroll(loop)

        # Output transforms, for one channel block at a time.
        if not spec.residual and spec.activation_op.costly:
            vectorize_finished(sch, channel_block, lanes)
        sch.compute_at(back, channel_block, preserve_unit_loops=True)
        p, q, tile, lane = sch.get_loops(back)[-4:]
        sch.reorder(tile, p, q, lane)
        unrolled_lanes(back, [p, q], picks.tile_oc)
        if both:
            sch.compute_at(back_vertical, channel_block, preserve_unit_loops=True)
            p, column, tile, lane = sch.get_loops(back_vertical)[-4:]
            sch.reorder(column, tile, p, lane)
            unrolled_lanes(back_vertical, [p], picks.tile_oc)

        # The matrix products: of a column of positions, which is transformed while it is in the cache.
        sch.compute_at(acc, column if both else channel_block, preserve_unit_loops=True)
        reductions = 2 + len(g.direct)
        i, j, tile, channel, *reduce = sch.get_loops(acc)[-4 - reductions :]
        tile_block, tile = sch.split(tile, [None, picks.tile_px])
        vector, lane = sch.split(channel, [None, lanes])
        sch.reorder(i, j, tile_block, *reduce, tile, vector, lane)
        sch.vectorize(lane)
        sch.unroll(vector)
        sch.unroll(tile)
        local = sch.cache_write(acc, 0, "global")
        sch.reverse_compute_at(local, tile_block, preserve_unit_loops=True)
        tile, channel = sch.get_loops(local)[-2:]
        vector, lane = sch.split(channel, [None, lanes])
        sch.vectorize(lane)
        sch.decompose_reduction(acc, reduce[0])

        # Input transforms.
        if task is not None:
            sch.compute_at(transformed, task, preserve_unit_loops=True)
        position, cb, tile, lane = sch.get_loops(transformed)[-4:]
        row_tile, col_tile = sch.split(tile, [None, g.cols.tiles])
        i, j = sch.split(position, [None, g.cols.positions])
        sch.reorder(cb, i, row_tile, col_tile, j, lane) if both else sch.reorder(cb, row_tile, col_tile, i, j, lane)
        if task is None:
            cb = sch.fuse(*sch.get_loops(transformed)[:-5])
            sch.parallel(cb)
        unrolled_lanes(transformed, [j] if both else [i, j], lanes)
        if both:
            sch.compute_at(vertical, cb, preserve_unit_loops=True)
            i, row, col, lane = sch.get_loops(vertical)[-4:]
            sch.reorder(row, col, i, lane)
            unrolled_lanes(vertical, [i], lanes)
        sch.compute_at(gathered, cb, preserve_unit_loops=True)
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

    def let(self, value):
        return script.bind(value)


@cache
def _transposition(lanes):
    """The name of the intrinsic that transposes ``lanes`` vectors, in registers."""
    name = f"convgen.transposition_{lanes}"

    def shuffled(a, b):
        row = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)
        vectors = [tirx.BufferLoad(a, [tirx.const(i, "int32"), row]) for i in range(lanes)]
        for i, vector in enumerate(interleave(_Script(), vectors, lanes)):
            script.buffer_store(b, vector, [tirx.const(i, "int32"), row])

    @script.prim_func(s_tir=True)
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

    @script.prim_func(s_tir=True)
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


class _Axis:
    """A transformed axis: its bilinear algorithm, and where the tiles lie.

    A tile makes ``outputs`` pixels of ``extent`` inputs with ``positions`` products. Under a dilation d
    its pixels are d apart, and d tiles interleave: the ``period``.
    """

    def __init__(self, spec, axis, m):
        kernel, stride, begin = spec.kernel[axis], spec.stride[axis], spec.padding[axis][0]
        self.period = spec.dilation[axis] if kernel > 1 else 1
        if spec.transposed:
            *matrices, self.first = transposed(m, kernel, stride, begin)
            self.step = m
        else:
            matrices, self.first, self.step = strided(m, kernel, stride), -begin, m * stride
        self.back, self.weights, self.inputs = ([[float(v) for v in row] for row in rows] for rows in matrices)
        self.outputs, self.positions, self.extent = len(self.back), len(self.inputs), len(self.inputs[0])
        self.tiles = ceildiv(spec.out_spatial[axis], self.outputs * self.period) * self.period

    def input(self, tile, k):
        """Where the k-th input of a tile is, counted from the first tile's first."""
        if self.period == 1:
            return tile * self.step + k
        group, inner = tirx.floordiv(tile, self.period), tirx.floormod(tile, self.period)
        return group * (self.step * self.period) + inner + k * self.period

    def reach(self, tiles):
        """Inputs of the first tiles."""
        groups = ceildiv(tiles, self.period)
        return ((groups - 1) * self.step + self.extent) * self.period

    def locate(self, pixel):
        """The tile of an output pixel, and its place there."""
        if self.period == 1:
            return tirx.floordiv(pixel, self.outputs), tirx.floormod(pixel, self.outputs)
        size = self.outputs * self.period
        tile = tirx.floordiv(pixel, size) * self.period + tirx.floormod(pixel, self.period)
        return tile, tirx.floordiv(tirx.floormod(pixel, size), self.period)


class _Unit:
    """The second axis of a 1-D layer."""

    back = weights = inputs = ((1,),)
    first = 0
    outputs = positions = tiles = 1

    def input(self, tile, k):
        return tile

    def reach(self, tiles):
        return tiles


class _Geometry:
    """Sizes of a candidate: tiles per axis, blocks, positions; the depth of 3-D stays direct."""

    def __init__(self, spec, picks):
        self.axes = [_Axis(spec, axis, _tile(spec, axis, picks.tile)) for axis in _axes(spec)]
        self.rows, self.cols = self.axes if len(self.axes) == 2 else (self.axes[0], _Unit())
        count = len(self.axes)
        self.outer = spec.out_spatial[:-count]
        self.outer_in = spec.padded_spatial[:-count]
        self.direct = spec.kernel[:-count]
        # Of these taps, those that can meet the input at once: it may be shorter than the kernel.
        self.met = tuple(_met(spec, axis) for axis in range(len(self.direct)))
        self.positions = self.rows.positions * self.cols.positions
        rows, self.block_rows = self.rows, picks.block_rows
        self.block_pixels = self.block_rows * rows.period * rows.outputs
        self.blocks = ceildiv(rows.tiles, self.block_rows * rows.period)
        self.block_tiles = self.block_rows * rows.period * self.cols.tiles
        inputs = rows.reach(self.block_rows * rows.period), self.cols.reach(self.cols.tiles)
        # Where channels are far apart, lines are read along the pixels, and transposed. (Not in 3-D: TVM 0.27 does not
        # recognise the transposition under the overlapping windows of a depth.)
        self.by_lines = spec.layout == "nchw" and spec.rank <= 2
        self.lines, self.length = inputs if count == 2 else inputs[::-1]


def _axes(spec):
    """The axes that are transformed: the last two, in 1-D the only one."""
    return tuple(range(spec.rank))[-2:]


def _met(spec, axis):
    """How many taps of an axis meet the input at most, from :func:`_first_met` on."""
    return min(spec.kernel[axis], spec.in_spatial[axis]) if spec.dilation[axis] == 1 else spec.kernel[axis]


def _first_met(spec, axis, pixel):
    spare = spec.kernel[axis] - _met(spec, axis)
    if not spare:
        return 0
    return tirx.max(tirx.min(spec.padding[axis][0] - pixel * spec.stride[axis], spare), 0)


def _tile(spec, axis, m):
    """Pixels of a phase per tile: 1 where an axis has no gain."""
    return m if spec.kernel[axis] > spec.stride[axis] else 1


def _tiles(spec):
    """The tile sizes that the accuracy class admits and that save enough products."""
    axes = _axes(spec)
    of_axis = {a: phases(spec.kernel[a], spec.stride[a]) for a in axes}
    found = []
    for m in admitted(spec.accuracy, max(max(taps) for taps in of_axis.values())):
        per_axis = {a: [_tile(spec, a, m) + taps - 1 for taps in of_axis[a]] for a in axes}
        share = math.prod(sum(per_axis[a]) / (_tile(spec, a, m) * spec.kernel[a]) for a in axes)
        if share <= MOST_PRODUCTS and all(sum(points) <= MOST_POSITIONS for points in per_axis.values()):
            found.append(m)
    return found


def _covered(spec, axis):
    """Whether the windows at the edges have half of their taps, or one less, inside the input."""
    kernel, stride = spec.kernel[axis], spec.stride[axis]
    begin, end = spec.padding[axis]
    if not spec.transposed:
        return 2 * max(begin, end) <= (kernel + 1) * spec.dilation[axis]
    taps = ceildiv(kernel, stride)
    inside = 1 + min(begin, end - spec.output_padding[axis]) // stride
    return 2 * (taps - inside) <= taps + 1


def _blocks(spec, m):
    """Rows of tiles per block; in 1-D, tiles. A row is as many tiles as interleave."""
    axis = _Axis(spec, _axes(spec)[0], _tile(spec, _axes(spec)[0], m))
    rows = axis.tiles // axis.period
    sizes = (1, 2, 4, 7, 8, 14) if spec.rank > 1 else (1, 2, 4, 7, 14, 28, 56, 112, 224)
    return sorted({b for b in sizes if b <= rows} | ({rows} if rows <= 14 else set()))


def _defaults(spec, target):
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


def _product_cost(target, tiles, tile_px, vectors):
    """What the products of a block cost, against their number at the peak: weights are loaded for every register
    tile, and one that is not whole has its conditions. Narrow vectors are multiplied two at a time: fewer than
    eight sums do not hide the latency, and a tile that is not whole costs its whole.
    """
    parts = ceildiv(tiles, tile_px)
    cost = 0.9 + 0.25 * parts / tiles
    if target.fmas == 1:
        return cost + (0.08 if tiles % tile_px else 0)
    return (cost + parts * tile_px / tiles - 1) * max(1, 8 / (vectors * tile_px))


def _seconds(spec, target, picks):
    """Predicted seconds; rates per core were fitted to measurements of 14 layers on Zen 4."""
    g = _Geometry(spec, picks)
    blocks = spec.n * math.prod(g.outer) * g.blocks
    oc, direct = round_up(spec.oc, picks.tile_oc), math.prod(g.direct)
    ic = round_up(spec.ic, target.lanes)
    tiles, met = blocks * g.block_tiles, math.prod(g.met)
    products = 2 * tiles * g.positions * met * ic * oc / (target.peak_flops / target.cores)
    seconds = products * _product_cost(target, g.block_tiles, picks.tile_px, picks.tile_oc // target.lanes)
    # The nominal peak is of one FMA a cycle: against it, with two all else takes longer.
    gigabytes = 4e-9 * blocks * target.fmas
    # Weights that outgrow a core's cache come from the shared one, again for every block; or from memory.
    weights = g.positions * direct * ic * oc
    if 4 * weights > target.l2 / 2:
        seconds += 0.0045 * gigabytes * weights
    if 4 * weights > 0.75 * target.l3:
        seconds += 0.012 * gigabytes * weights
    gigabytes = 4e-9 * blocks * (1 if target.fmas == 1 else 1.6)
    transformed = g.positions * g.block_tiles * ic
    if 4 * transformed > 0.6 * target.l2:
        seconds += 0.01 * gigabytes * transformed * met * (oc // picks.tile_oc)
    if picks.parallel == "rows":  # each task makes what it reads
        made = met
    else:  # once, and then from the shared cache
        made = 1
        if 4 * transformed * blocks > target.l2:
            seconds += 0.05 * gigabytes * transformed
    seconds += 0.01 * gigabytes * made * transformed
    seconds += 0.027 * gigabytes * made * g.lines * round_up(g.length, target.lanes) * ic
    seconds += 0.043 * gigabytes * g.positions * g.block_tiles * oc
    seconds += 0.25 * gigabytes * g.block_pixels * g.cols.tiles * g.cols.outputs * spec.oc
    tasks = blocks * (oc // picks.tile_oc if picks.parallel == "oc" else 1)
    return seconds * round_up(tasks, target.cores) / tasks / target.cores
