"""Winograd convolution: 3-tap kernels at stride 1 with fewer multiplications than taps.

Applies to  dense convolutions whose last axes have 3 taps at stride 1 without dilation: 3×3, 1-D k3,
            and 3-D with a 3×3 plane (the depth stays direct). NCHW and NHWC.
Strategy    F(m, 3) along the last one or two axes (Lavin & Gray, CVPR 2016): of m + 2 inputs make m
            outputs with m + 2 products instead of 3m.
            1. Pack weights transformed, as [tap][oc/t][ic][t].
            2. A task is a block of rows of tiles. Gather its input with its padding into
               [ic/16][row][col][16]; transform it along each axis with channels in the lanes.
            3. One matrix product per transformed position: a tile of `tile_px` tiles × `tile_oc`
               channels in registers, ic innermost.
            4. Transform back with channels in the lanes; bias, residual, activation, store.
            5. `parallel="oc"`: with few tiles the input is transformed first, in parallel over ic,
               and the products are parallel over channel blocks.
Accuracy    m = 2 is as accurate as plain summation (strict); m = 4 stays within the bound of
            `standard`; m = 6 needs `relaxed`.
Why not     strided or dilated kernels: the transform has no gain there.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

from tvm import te, tirx

from convgen.compute import (
    ACCUMULATOR,
    Operands,
    ceildiv,
    copied,
    dst_loops,
    epilogue,
    finished,
    flat,
    round_up,
    unflat,
    vectorize_finished,
)
from convgen.schedule import Picks, Program, Schedule, Space, require

#: Output pixels per tile and axis that an accuracy class admits.
TILES = {"strict": (2,), "standard": (2, 4), "relaxed": (2, 4, 6)}


class CpuWinograd(Schedule):
    id, version = "cpu_winograd", 3
    transforms = True

    def applies(self, spec, target):
        lanes = target.lanes
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed and spec.groups == 1, "needs groups 1, not transposed")
        axes = _axes(spec)
        require(all(spec.kernel[a] == 3 for a in axes), "needs 3 taps along the transformed axes")
        require(all(spec.stride[a] == spec.dilation[a] == 1 for a in axes), "needs stride and dilation 1")
        require(any(spec.out_spatial[a] > 2 for a in axes), "needs more than 2 output pixels along a transformed axis")
        # Where a window lies in nothing but padding the exact result admits no error; a transform has one.
        require(all(max(spec.padding[a]) <= 2 for a in axes), "needs a padding of at most 2")
        require(spec.ic >= lanes and spec.oc >= lanes, f"needs at least {lanes} input and output channels")

    def space(self, spec, target):
        lanes = target.lanes
        tiles = ceildiv(spec.out_spatial[_axes(spec)[0]], 2)
        return Space(
            tile=list(TILES[spec.accuracy]),
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if v == 1 or lanes * (v - 1) < spec.oc],
            tile_px=[2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16],
            block_rows=_blocks(spec, tiles),
            parallel=["rows", "oc"],
        )

    def valid(self, spec, target, picks):
        most = target.most_pixels(picks.tile_oc // target.lanes)
        require(picks.tile_px <= most, f"{picks.tile_px} tiles in a register tile, registers for {most}")
        g = _Geometry(spec, picks)
        require(picks.block_rows <= g.tiles[0], "block_rows exceeds the rows of tiles")
        require(picks.tile_px <= g.block_tiles, "fewer tiles in a block than tile_px")

    def default(self, spec, target):
        lanes = target.lanes
        tile = max(TILES[spec.accuracy]) if spec.accuracy != "relaxed" else 4
        if min(spec.out_spatial[a] for a in _axes(spec)) <= 2 * tile and tile > 2:
            tile = 4 if min(spec.out_spatial[a] for a in _axes(spec)) > 7 else 2
        vectors = 2 if spec.oc > lanes else 1
        room = min(14, target.most_pixels(vectors))
        base = Picks(tile=tile, tile_oc=vectors * lanes, tile_px=1, block_rows=1, parallel="rows")
        g = _Geometry(spec, base)
        rows = g.tiles[0]
        blocks = [b for b in _blocks(spec, ceildiv(spec.out_spatial[_axes(spec)[0]], 2)) if b <= rows]
        # Enough tiles for the weights to be worth loading, enough blocks for every core.
        wanted = 14 if spec.ic * spec.oc <= 1 << 14 else 28 if spec.ic * spec.oc <= 1 << 17 else 56
        block = min((b for b in blocks if b * g.tiles[1] >= wanted), default=blocks[-1])
        split = spec.n * math.prod(g.outer) * ceildiv(rows, block) >= 2 * target.cores
        picks = base.replace(block_rows=block, parallel="rows" if split else "oc")
        tiles = _Geometry(spec, picks).block_tiles
        sizes = [p for p in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16) if p <= min(room, tiles)] or [2]
        return picks.replace(tile_px=min(sizes, key=lambda p: (round_up(tiles, p) / p * (p + 2), -p)))

    def cost(self, spec, target):
        picks = self.default(spec, target)
        g = _Geometry(spec, picks)
        tiles = spec.n * math.prod(g.outer) * g.blocks * g.block_tiles
        products = 2 * tiles * g.positions * math.prod(g.direct) * spec.ic * round_up(spec.oc, picks.tile_oc)
        moved = tiles * g.positions * (3 * spec.ic + 3 * spec.oc)
        weights = g.positions * math.prod(g.direct) * spec.ic * spec.oc * 4
        # Weights that outgrow a core's cache come from the shared one, again for every block of rows.
        streamed = weights * (spec.n * g.blocks if weights > target.l2 else 1)
        return products / (0.8 * target.peak_flops) + moved / (target.cores * 8e9) + streamed / (target.cores * 40e9)

    def program(self, spec, target, picks):
        ops, dtype = Operands(spec), ACCUMULATOR
        lanes, t, m = target.lanes, picks.tile_oc, picks.tile
        g = _Geometry(spec, picks)
        back_rows, weight_rows, input_rows = transforms(m, 3)
        ic_blocks, oc_blocks, alpha, axes = ceildiv(spec.ic, lanes), ceildiv(spec.oc, t), m + 2, len(g.axes)
        zero = tirx.const(0, dtype)

        def combine(coefficients, position, read):
            """Row ``position`` of a constant matrix times ``read(0), read(1), …``; folds when unrolled."""
            values = [
                sum((tirx.const(c, dtype) * read(k) for k, c in enumerate(row) if c), zero) for row in coefficients
            ]
            chosen = values[-1]
            for index in range(len(values) - 2, -1, -1):
                chosen = tirx.Select(position == index, values[index], chosen)
            return chosen

        # Weights: one transform pass per axis, then [position][direct taps][oc/t][ic][t].
        def transformed(axis, read):
            """(oc, ic, direct taps, positions so far + kernel taps) -> one more axis transformed."""
            shape = (spec.oc, spec.ic, *g.direct, *[alpha] * (axis + 1), *[3] * (axes - axis - 1))
            at = 2 + len(g.direct) + axis

            def value(*index):
                return combine(weight_rows, index[at], lambda k: read(*index[:at], k, *index[at + 1 :]))

            return te.compute(shape, value, name=f"weights_{axis}")

        stage = ops.weights
        for axis in range(axes):
            stage = transformed(axis, lambda *index, stage=stage: stage[index])
        packed_shape = (g.positions, math.prod(g.direct), oc_blocks, ic_blocks * lanes, t)

        def packed_weights(position, tap, b, c, lane):
            o = b * t + lane
            index = (o, c, *unflat(tap, g.direct), *unflat(position, [alpha] * axes))
            inside = tirx.all(o < spec.oc, c < spec.ic)
            return tirx.if_then_else(inside, stage[index], zero)

        packed = [te.compute(packed_shape, packed_weights, name="weights_packed")]
        packed += [copied(p, oc_blocks * t) for p in ops.parameters[1:]]
        w, *vectors = [te.placeholder(p.shape, p.dtype, f"{p.op.name}_in") for p in packed]

        # Input: gathered with its padding, channels last, one block of rows of tiles after another.
        rows, cols = g.rows_in, g.cols_in
        batch = (spec.n, *g.outer_in)

        def gathered(*index):
            *at, block, cb, row, col, lane = index
            n, depth = at[0], at[1:]
            start = block * g.block_rows * m
            where = [*depth, *([start + row, col] if axes == 2 else [start + col])]
            where = [p - b for p, (b, _) in zip(where, spec.padding, strict=True)]
            c = cb * lanes + lane
            value = ops.read_src(n, c, where, always=True)
            return value if spec.ic % lanes == 0 else tirx.if_then_else(c < spec.ic, value, zero)

        x0 = te.compute((*batch, g.blocks, ic_blocks, rows, cols, lanes), gathered, name="gathered")
        if axes == 2:

            def vertical(*index):
                *at, i, row, col, lane = index
                return combine(input_rows, i, lambda k: x0[(*at, row * m + k, col, lane)])

            x1 = te.compute((*batch, g.blocks, ic_blocks, alpha, g.rows_read, cols, lanes), vertical, name="vertical")

            def horizontal(*index):
                *at, position, cb, tile, lane = index
                row, col = tirx.floordiv(tile, g.tiles[1]), tirx.floormod(tile, g.tiles[1])
                i, j = tirx.floordiv(position, alpha), tirx.floormod(position, alpha)
                return combine(input_rows, j, lambda k: x1[(*at, cb, i, row, col * m + k, lane)])
        else:

            def horizontal(*index):
                *at, position, cb, tile, lane = index
                return combine(input_rows, position, lambda k: x0[(*at, cb, 0, tile * m + k, lane)])

        v = te.compute(
            (*batch, g.blocks, g.positions, ic_blocks, g.padded_tiles, lanes), horizontal, name="transformed"
        )

        # One matrix product per position.
        cb = te.reduce_axis((0, ic_blocks), "cb")
        cl = te.reduce_axis((0, lanes), "cl")
        taps = [te.reduce_axis((0, k), f"k{axis}") for axis, k in enumerate(g.direct)]
        batch_out = (spec.n, *g.outer)

        def product(*index):
            n, *rest = index
            depth, (block, ob, position, tile, lane) = rest[: len(g.outer)], rest[len(g.outer) :]
            depth_in = [
                p * s + k * d
                for p, k, s, d in zip(depth, taps, spec.stride[:-axes], spec.dilation[:-axes], strict=True)
            ]
            return te.sum(
                v[(n, *depth_in, block, position, cb, tile, cl)]
                * w[position, flat(taps, g.direct), ob, cb * lanes + cl, lane],
                [*taps, cb, cl],
            )

        acc = te.compute((*batch_out, g.blocks, oc_blocks, g.positions, g.padded_tiles, t), product, name="acc")

        # And back.
        if axes == 2:

            def back_vertical(*index):
                *at, p, j, tile, lane = index
                return combine(back_rows, p, lambda k: acc[(*at, k * alpha + j, tile, lane)])

            y1 = te.compute(
                (*batch_out, g.blocks, oc_blocks, m, alpha, g.block_tiles, t), back_vertical, name="back_vertical"
            )

            def back(*index):
                *at, p, q, tile, lane = index
                return combine(back_rows, q, lambda k: y1[(*at, p, k, tile, lane)])

            y = te.compute((*batch_out, g.blocks, oc_blocks, m, m, g.block_tiles, t), back, name="back")
        else:

            def back(*index):
                *at, _, q, tile, lane = index
                return combine(back_rows, q, lambda k: acc[(*at, k, tile, lane)])

            y = te.compute((*batch_out, g.blocks, oc_blocks, 1, m, g.block_tiles, t), back, name="back")

        sums, done = finished(ops, y, vectors, lambda index: index[-5] * t + index[-1])

        def value(n, o, pixel):
            depth, first, last = pixel[:-axes], pixel[-axes], pixel[-1]
            height = g.block_rows * m
            block, inner = tirx.floordiv(first, height), tirx.floormod(first, height)
            row, p = tirx.floordiv(inner, m), tirx.floormod(inner, m)
            tile = row * g.tiles[1] + tirx.floordiv(last, m) if axes == 2 else row
            position = (p, tirx.floormod(last, m)) if axes == 2 else (0, p)
            total = sums[(n, *depth, block, tirx.floordiv(o, t), *position, tile, tirx.floormod(o, t))]
            residual = ops.residual[ops.order(n, o, pixel)] if spec.residual else None
            return total if done else epilogue(spec, total, residual=residual, **ops.per_channel(vectors, o))

        return Program(pack=ops.pack(*packed), main=ops.main([w, *vectors], ops.store(value)))

    def apply(self, sch, spec, target, picks):
        lanes, m = target.lanes, picks.tile
        g = _Geometry(spec, picks)
        axes = len(g.axes)
        acc, back = sch.get_sblock("acc"), sch.get_sblock("back")
        n, spatial, oc = dst_loops(sch, spec)
        depth, plane = spatial[:-axes], spatial[-axes:]
        channel_block, channel = sch.split(oc, [None, picks.tile_oc])
        block, first = sch.split(plane[0], [None, g.block_rows * m])
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
        if axes == 2:
            vertical = sch.get_sblock("back_vertical")
            sch.compute_at(vertical, channel_block, preserve_unit_loops=True)
            p, j, tile, lane = sch.get_loops(vertical)[-4:]
            sch.reorder(j, tile, p, lane)
            unrolled_lanes(vertical, [p], picks.tile_oc)

        # The matrix products.
        sch.compute_at(acc, channel_block, preserve_unit_loops=True)
        reductions = 2 + len(g.direct)
        position, tile, channel, *reduce = sch.get_loops(acc)[-3 - reductions :]
        tile_block, tile = sch.split(tile, [None, picks.tile_px])
        vector, lane = sch.split(channel, [None, lanes])
        sch.reorder(position, tile_block, *reduce, tile, vector, lane)
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
        transformed, gathered = sch.get_sblock("transformed"), sch.get_sblock("gathered")
        if task is not None:
            sch.compute_at(transformed, task, preserve_unit_loops=True)
        position, cb, tile, lane = sch.get_loops(transformed)[-4:]
        row_tile, col_tile = sch.split(tile, [None, g.tiles[1]]) if g.padded_tiles % g.tiles[1] == 0 else (None, tile)
        if axes == 2:
            i, j = sch.split(position, [None, m + 2])
        else:
            i, j = None, position
        order = [loop for loop in (cb, i, row_tile, col_tile, j, lane) if loop is not None]
        sch.reorder(*order)
        if task is None:
            outers = list(sch.get_loops(transformed))[: -len(order)]
            cb = sch.fuse(*outers, cb)
            sch.parallel(cb)
        unrolled_lanes(transformed, [j], lanes)
        if axes == 2:
            vertical = sch.get_sblock("vertical")
            sch.compute_at(vertical, cb, preserve_unit_loops=True)
            i, row, col, lane = sch.get_loops(vertical)[-4:]
            sch.reorder(row, col, i, lane)
            unrolled_lanes(vertical, [i], lanes)
        sch.compute_at(gathered, cb, preserve_unit_loops=True)


class _Geometry:
    """Sizes of a candidate: tiles per axis, blocks, positions; the depth of 3-D stays direct."""

    def __init__(self, spec, picks):
        m = picks.tile
        self.axes = _axes(spec)
        count = len(self.axes)
        self.outer = spec.out_spatial[:-count]
        self.outer_in = spec.padded_spatial[:-count]
        self.direct = spec.kernel[:-count]
        self.positions = (m + 2) ** count
        spatial = spec.out_spatial[-count:]
        # A row of tiles; in 1-D every tile is a row of its own.
        self.tiles = (ceildiv(spatial[0], m), ceildiv(spatial[1], m) if count == 2 else 1)
        self.block_rows = picks.block_rows
        self.blocks = ceildiv(self.tiles[0], self.block_rows)
        self.block_tiles = self.block_rows * self.tiles[1]
        self.padded_tiles = round_up(self.block_tiles, picks.tile_px)
        # The tiles that round a block up to whole register tiles read rows of their own.
        self.rows_read = ceildiv(self.padded_tiles, self.tiles[1])
        height = self.rows_read * m + 2
        self.rows_in, self.cols_in = (height, self.tiles[1] * m + 2) if count == 2 else (1, height)


def _blocks(spec, rows):
    """Rows of tiles per block; in 1-D, tiles."""
    sizes = (1, 2, 4, 7, 8, 14) if spec.rank > 1 else (7, 14, 28, 56, 112, 224)
    return sorted(
        {b for b in sizes if b <= rows}
        | {
            ceildiv(spec.out_spatial[_axes(spec)[0]], m)
            for m in TILES[spec.accuracy]
            if spec.out_spatial[_axes(spec)[0]] <= 14 * m
        }
    )


def _axes(spec):
    """The axes that are transformed: the last two, in 1-D the only one."""
    return tuple(range(spec.rank))[-2:]


#: Interpolation points besides infinity: small, in pairs of opposite sign.
POINTS = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))


@cache
def transforms(m, r):
    """Rows of Aᵀ (back), G (weights) and Bᵀ (input) of F(m, r), as floats: y = Aᵀ[(G g) · (Bᵀ d)].

    Toom-Cook interpolation, transposed (Winograd, *Arithmetic Complexity of Computations*, 1980;
    Blahut, *Fast Algorithms for Signal Processing*, §5): computed exactly, rounded once.
    """
    points = [Fraction(p) for p in POINTS[: m + r - 2]]

    def expanded(roots):
        """Coefficients of the product of (x - root), lowest power first."""
        poly = [Fraction(1)]
        for root in roots:
            poly = [a - root * b for a, b in zip([Fraction(0), *poly], [*poly, Fraction(0)], strict=True)]
        return poly

    others = [[q for q in points if q != p] for p in points]
    back = [[p**i for p in points] + [Fraction(i == m - 1)] for i in range(m)]
    weights = [
        [p**k / math.prod(p - q for q in rest) for k in range(r)] for p, rest in zip(points, others, strict=True)
    ]
    weights.append([Fraction(k == r - 1) for k in range(r)])
    inputs = [[*expanded(rest), Fraction(0)] for rest in others] + [expanded(points)]
    return tuple([[float(v) for v in row] for row in rows] for rows in (back, weights, inputs))
