"""Convolution with few channels per group: pixels in the vector lanes, rows strung together.

Applies to  NCHW convolutions that are not transposed, with few channels per group: depthwise with any
            multiplier, grouped, and dense layers with few output channels or few products per output.
Strategy    1. Copy a block of rows (in 1-D a stretch of the row) of one group's input with its padding,
               split by stride phase, so that neighbouring output pixels read neighbouring elements.
            2. Treat the padded rows as one flat row: an output pixel `f` reads `f + offset` for each
               tap, the row ends compute a few pixels nobody wants, and short rows still fill vectors.
            3. Keep a tile of `tile_oc` channels × `tile_px` flat pixels in registers; taps unrolled,
               weights broadcast.
            4. Copy the wanted pixels out, with bias, residual and activation.
            5. One parallel loop over batch × groups × blocks of rows.
Why not     channels in the lanes: NCHW would have to be transposed in and out.
"""

from __future__ import annotations

import math

from tvm import te, tirx

from convgen.lowering.compute import Operands, ceildiv, copied, epilogue, partition_edges, read_whole
from convgen.lowering.schedule import Picks, Program, Scheduled, Space, require

#: Unrolled multiply-adds of one tile; more makes the code outgrow the instruction cache.
MOST_UNROLLED = 1024


class CpuGrouped(Scheduled):
    id, version = "cpu_grouped", 2

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        few = spec.oc // spec.groups <= 32 or spec.reduction_length <= 160
        require(few, "needs at most 32 output channels per group, or at most 160 products per output")
        require(math.prod(spec.kernel) <= MOST_UNROLLED, f"needs at most {MOST_UNROLLED} taps")

    def space(self, spec, target):
        lanes = target.lanes
        per_group = spec.oc // spec.groups
        return Space(
            tile_oc=[c for c in (1, 2, 3, 4, 6, 8) if per_group % c == 0],
            tile_oh=[1, 2, 4] if spec.rank > 1 else [1],
            tile_px=[lanes * v for v in (1, 2, 3, 4, 6, 8, 12, 16)],
            block=_blocks(spec),
        )

    def valid(self, spec, target, picks):
        lanes = target.lanes
        vectors = picks.tile_px // lanes * picks.tile_oh
        used = vectors * picks.tile_oc + min(vectors, 2) + 1
        require(used <= target.vector_registers, f"{used} vectors in a tile, {target.vector_registers} registers")
        unrolled = vectors * picks.tile_oc * math.prod(spec.kernel)
        require(unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")
        g = _Geometry(spec, picks)
        width = g.wanted if picks.tile_oh == 1 else spec.out_spatial[-1]
        require(vectors == 1 or picks.tile_px - lanes < width, "tile_px exceeds the pixels there are")
        require(spec.rank == 1 or picks.block % picks.tile_oh == 0, "block is not whole tiles")

    def default(self, spec, target):
        lanes, rows = target.lanes, _rows(spec)
        space = self.space(spec, target).domains
        tile_oc = max(c for c in space["tile_oc"] if c <= (8 if spec.oc // spec.groups > 16 else 4))

        # The block's input should stay in the L1 cache; and there must be tasks for every core.
        def block_bytes(b):
            g = _Geometry(spec, Picks(tile_oc=1, tile_oh=1, tile_px=lanes, block=b))
            return 4 * g.phases * g.copied_rows * g.pitch * (spec.ic // spec.groups)

        room = target.l1 if spec.oc // spec.groups <= 16 else target.l2 // 4
        fitting = [b for b in space["block"] if block_bytes(b) <= room or b == space["block"][0]]
        busy = [b for b in fitting if spec.n * spec.groups * ceildiv(rows, b) >= 4 * target.cores]
        base = Picks(tile_oc=tile_oc, tile_oh=1, tile_px=lanes, block=max(busy, default=min(fitting)))
        options = [base.replace(tile_oh=h, tile_px=px) for h in space["tile_oh"] for px in space["tile_px"]]
        # More independent sums hide no more latency, they only outgrow the load buffers.
        most = (8 if tile_oc == 1 else 12) * lanes
        options = [
            p for p in options if p.tile_oh <= (2 if tile_oc == 1 else 1) and p.tile_oc * p.tile_oh * p.tile_px <= most
        ]
        good = [p for p in options if self.reason_against(spec, target, p) is None]
        return min(good, key=lambda p: self._work(spec, target, p), default=base.replace(tile_oc=1))

    def _work(self, spec, target, picks):
        """Loads and multiply-adds of one channel's block, in vectors: what there is to compare."""
        g, lanes = _Geometry(spec, picks), target.lanes
        vectors, taps = picks.tile_px // lanes, math.prod(spec.kernel)
        rows_read = picks.tile_oh if g.axes == 1 else (picks.tile_oh - 1) + spec.kernel[-2]
        loads = rows_read * vectors * taps // (spec.kernel[-2] if g.axes == 2 else 1) / picks.tile_oc
        products = picks.tile_oh * vectors * taps
        chains = picks.tile_oc * picks.tile_oh * vectors
        return math.prod(g.tiles) * (2 * loads + products) * max(1.0, 8 / chains)

    def cost(self, spec, target):
        picks = self.default(spec, target)
        g = _Geometry(spec, picks)
        vectors = self._work(spec, target, picks) * spec.n * spec.oc * g.blocks * (spec.ic // spec.groups)
        vectors *= math.prod(spec.out_spatial[: spec.rank - g.axes])
        moved = spec.bytes["src"] * g.copied_rows / (picks.block * g.phases**0.5) + 2 * spec.bytes["dst"]
        cycles = 2 * target.lanes / target.peak_flops  # seconds of a vector operation
        return vectors * cycles + moved / (target.cores * 8e9)

    def program(self, spec, target, picks):
        ops, g = Operands(spec), _Geometry(spec, picks)
        per_group_in, per_group = spec.ic // spec.groups, spec.oc // spec.groups
        packed = [copied(p) for p in ops.parameters]
        w, *vectors = [te.placeholder(p.shape, p.dtype, f"{p.op.name}_in") for p in packed]
        depth_in, depth = spec.padded_spatial[: spec.rank - g.axes], spec.out_spatial[: spec.rank - g.axes]
        stride, dilation = spec.stride[-g.axes :], spec.dilation[-g.axes :]

        # Copied with its padding, and then, where there is a stride, split by phase.
        def gathered(*index):
            n, c, block, *at, row, x = index
            y = [block * picks.block * stride[0] + row] if g.axes == 2 else []
            x = x if g.axes == 2 else block * picks.block * stride[0] + x
            where = [p - b for p, (b, _) in zip([*at, *y, x], spec.padding, strict=True)]
            return ops.read_src(n, c, where, always=True)

        front = (spec.n, spec.ic, g.blocks, *depth_in)
        steps = stride if g.axes == 2 else (1, *stride)
        padded = te.compute((*front, g.copied_rows * steps[0], g.pitch * steps[1]), gathered, name="padded")

        def phase_of(*index):
            *at, phase, row, col = index
            y, x = row * steps[0] + tirx.floordiv(phase, steps[1]), col * steps[1] + tirx.floormod(phase, steps[1])
            return padded[(*at, y, x)]

        if g.phases > 1:
            source = te.compute((*front, g.phases, g.copied_rows, g.pitch), phase_of, name="phases")
        else:
            source = padded

        c = te.reduce_axis((0, per_group_in), "c")
        taps = [te.reduce_axis((0, k), f"k{axis}") for axis, k in enumerate(spec.kernel)]

        def product(*index):
            n, o, block, *at, row_tile, tile, row, p = index
            f = (row_tile * picks.tile_oh + row) * g.pitch + tile * picks.tile_px + p
            inner = [t * d for t, d in zip(taps[-g.axes :], dilation, strict=True)]
            phase, offset = 0, f
            for position, s, step in zip(inner, stride, ([g.pitch, 1])[-g.axes :], strict=True):
                phase = phase * s + tirx.floormod(position, s)
                offset = offset + tirx.floordiv(position, s) * step
            deep = [p * s + t * d for p, t, s, d in zip(at, taps, spec.stride, spec.dilation, strict=False)]
            where = (tirx.floordiv(offset, g.pitch), tirx.floormod(offset, g.pitch))
            where = (phase, *where) if g.phases > 1 else where
            channel = tirx.floordiv(o, per_group) * per_group_in + c
            return te.sum(source[(n, channel, block, *deep, *where)] * w[(o, c, *taps)], [c, *taps])

        shape = (spec.n, spec.oc, g.blocks, *depth, *g.tiles, picks.tile_oh, picks.tile_px)
        acc = te.compute(shape, product, name="acc")

        def value(n, o, pixel):
            at, plane = pixel[: spec.rank - g.axes], pixel[spec.rank - g.axes :]
            block, row = tirx.floordiv(plane[0], picks.block), tirx.floormod(plane[0], picks.block)
            row, x = (row, plane[-1]) if g.axes == 2 else (0, row)
            if picks.tile_oh == 1:  # one long row
                row, x = 0, row * g.pitch + x
            where = (row // picks.tile_oh, x // picks.tile_px, row % picks.tile_oh, x % picks.tile_px)
            total = read_whole(acc, (n, o, block, *at, *where))
            residual = ops.residual[(n, o, *pixel)] if spec.residual else None
            return epilogue(spec, total, residual=residual, **ops.per_channel(vectors, o))

        return Program(pack=ops.pack(*packed), main=ops.main([w, *vectors], ops.store(value)))

    def apply(self, sch, spec, target, picks):
        lanes, per_group = target.lanes, spec.oc // spec.groups
        g = _Geometry(spec, picks)
        dst, acc, padded = sch.get_sblock("dst"), sch.get_sblock("acc"), sch.get_sblock("padded")
        n, oc, *spatial = sch.get_loops(dst)
        depth, plane = spatial[: spec.rank - g.axes], spatial[spec.rank - g.axes :]
        group, channel = sch.split(oc, [spec.groups, per_group])
        block, plane[0] = sch.split(plane[0], [None, picks.block])
        channel_tile, channel = sch.split(channel, [None, picks.tile_oc])
        sch.reorder(n, group, block, channel_tile, *depth, channel, *plane)
        task = sch.fuse(n, group, block)
        sch.parallel(task)

        sch.compute_at(acc, depth[-1] if depth else channel_tile, preserve_unit_loops=True)
        axes = 7 + len(depth)
        loops = sch.get_loops(acc)[-(axes + 1 + spec.rank) :]
        (n, channel, *units, row_tile, tile, row, pixel), (c, *taps) = loops[:axes], loops[axes:]
        vector, lane = sch.split(pixel, [None, lanes])
        sch.reorder(n, *units, row_tile, tile, c, *taps, channel, row, vector, lane)
        sch.vectorize(lane)
        for loop in (vector, row, channel, *reversed(taps)):
            sch.unroll(loop)
        result = sch.cache_write(acc, 0, "global")
        sch.reverse_compute_at(result, tile, preserve_unit_loops=True)
        *_, pixel = sch.get_loops(result)
        vector, lane = sch.split(pixel, [None, lanes])
        sch.vectorize(lane)
        sch.decompose_reduction(acc, c)
        source = padded
        if g.phases > 1:
            source = sch.get_sblock("phases")
            sch.compute_at(source, task, preserve_unit_loops=True)
            if g.phases <= 4:  # with a constant phase the strided reads become shuffles
                sch.unroll(sch.get_loops(source)[-3])
        sch.compute_at(padded, task, preserve_unit_loops=True)
        if g.axes == 2 or g.blocks == 1:  # else the edges move with the block
            partition_edges(sch, sch.get_loops(padded)[-1])
        # Rows strung together: now `f + offset` is one address, however many rows it spans.
        sch.transform_layout(source, ("write", 0), lambda *index: [*index[:-2], index[-2] * g.pitch + index[-1]])


class _Geometry:
    """Sizes of the flattened rows of one block."""

    def __init__(self, spec, picks):
        self.axes = axes = min(spec.rank, 2)
        width = spec.out_spatial[-1] if axes == 2 else picks.block
        stride, window = spec.stride[-axes:], spec.window[-axes:]
        reach = [(w - 1) // s for w, s in zip(window, stride, strict=True)]  # in elements of one phase
        self.phases = math.prod(stride)
        self.pitch = width + reach[-1]
        self.blocks = ceildiv(_rows(spec), picks.block)
        self.wanted = (picks.block - 1) * self.pitch + width if axes == 2 else width
        # Tiles of one long row, or of the block's rows.
        rows, row = (1, self.wanted) if picks.tile_oh == 1 else (picks.block, width)
        self.tiles = ceildiv(rows, picks.tile_oh), ceildiv(row, picks.tile_px)
        self.computed = math.prod(self.tiles) * picks.tile_oh * picks.tile_px
        # Rows whose elements the last tile reads, though nobody wants what it makes of them.
        last = (self.tiles[0] * picks.tile_oh - 1) * self.pitch + self.tiles[1] * picks.tile_px - 1
        last += reach[-1] + (reach[0] * self.pitch if axes == 2 else 0)
        self.copied_rows = last // self.pitch + 1


def _blocks(spec):
    """Sizes of a block: rows; in 1-D pixels, equal parts of the row where it can be had."""
    rows = _rows(spec)
    if spec.rank == 1:
        return sorted({ceildiv(rows, parts) for parts in (1, 2, 4, 8, 16, 32, 64)})
    return sorted({b for b in (1, 2, 4, 7, 8, 14, 16, 28, 56) if b < rows} | {rows})


def _rows(spec):
    """What a task takes a block of: rows; in 1-D pixels."""
    return spec.out_spatial[max(-2, -spec.rank)]
