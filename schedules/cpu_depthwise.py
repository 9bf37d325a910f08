"""Depthwise convolution of channels-last data: channels in the vector lanes.

Applies to  NHWC (NWC, NDHWC) convolutions with one channel per group, any kernel, stride, dilation.
Strategy    1. Pack weights as [taps][c], so that a tap's weights are one load like its pixels.
            2. Copy a block of rows with its padding, rounded up to whole tiles.
            3. Keep a tile of `tile_ow` pixels × `tile_c` channels in registers, taps unrolled:
               neighbouring pixels share the loads of their overlapping windows.
            4. Bias, residual and activation on the tile; the store is contiguous.
            5. One parallel loop over batch × blocks of rows × blocks of channels.
Why not     pixels in the lanes (cpu_grouped): channels-last data would have to be transposed.
"""

from __future__ import annotations

import math

from tvm import te, tirx

from convgen.compute import ACCUMULATOR, Operands, ceildiv, copied, epilogue, flat, partition_edges, round_up, unflat
from convgen.schedule import Picks, Program, Schedule, Space, require

#: Unrolled multiply-adds of one tile; more makes the code outgrow the instruction cache.
MOST_UNROLLED = 1024


class CpuDepthwise(Schedule):
    id, version = "cpu_depthwise", 2

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nhwc", "needs NHWC")
        require(spec.groups == spec.ic == spec.oc, "needs one input and one output channel per group")
        require(math.prod(spec.kernel) <= MOST_UNROLLED // 2, f"needs at most {MOST_UNROLLED // 2} taps")

    def space(self, spec, target):
        lanes = target.lanes
        width = spec.out_spatial[-1]
        rows = _rows(spec)
        return Space(
            tile_c=[lanes * v for v in (1, 2, 4) if v == 1 or lanes * (v - 1) < spec.oc],
            tile_ow=sorted({w for w in (1, 2, 3, 4, 5, 6, 7, 8, 12, 14, 16) if w <= width}),
            block=sorted({b for b in (1, 2, 4, 7, 8, 14, 28) if b < rows} | {rows}),
            parallel_c=[1, 2, 4, 8],
        )

    def valid(self, spec, target, picks):
        vectors = picks.tile_c // target.lanes * picks.tile_ow
        require(vectors + 2 <= target.vector_registers, f"{vectors} sums, {target.vector_registers} registers")
        unrolled = vectors * math.prod(spec.kernel)
        require(unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")
        require(picks.parallel_c <= ceildiv(spec.oc, picks.tile_c), "fewer channel blocks than parallel_c")

    def default(self, spec, target):
        lanes, width, rows = target.lanes, spec.out_spatial[-1], _rows(spec)
        space = self.space(spec, target).domains
        most = max(1, min(8, MOST_UNROLLED // math.prod(spec.kernel)))
        tile_ow = min((w for w in space["tile_ow"] if w <= most), key=lambda w: (round_up(width, w) * (w + 2) / w, -w))
        tasks = 4 * target.cores
        block = max((b for b in space["block"] if spec.n * ceildiv(rows, b) >= tasks), default=1)
        splits = [p for p in space["parallel_c"] if p <= ceildiv(spec.oc, lanes)]
        parallel_c = next((p for p in splits if spec.n * ceildiv(rows, block) * p >= tasks), splits[-1])
        return Picks(tile_c=lanes, tile_ow=tile_ow, block=block, parallel_c=parallel_c)

    def cost(self, spec, target):
        moved = 2 * spec.bytes["src"] + 2 * spec.bytes["dst"]
        return spec.flops / (0.25 * target.peak_flops) + moved / (target.cores * 8e9)

    def program(self, spec, target, picks):
        ops, tile, dtype = Operands(spec), picks.tile_c, ACCUMULATOR
        channels = round_up(spec.oc, tile)
        zero = tirx.const(0, dtype)

        def packed_weights(tap, c):
            value = ops.weights[(c, 0, *unflat(tap, spec.kernel))]
            return value if channels == spec.oc else tirx.if_then_else(c < spec.oc, value, zero)

        packed = [te.compute((math.prod(spec.kernel), channels), packed_weights, name="weights_packed")]
        packed += [copied(p) for p in ops.parameters[1:]]
        w, *vectors = [te.placeholder(p.shape, p.dtype, f"{p.op.name}_in") for p in packed]

        width = round_up(spec.out_spatial[-1], picks.tile_ow)
        pixels = [*spec.out_spatial[:-1], width]
        extent = [(p - 1) * s + k for p, s, k in zip(pixels, spec.stride, spec.window, strict=True)]

        def gathered(n, *index):
            *where, c = index
            where = [p - b for p, (b, _) in zip(where, spec.padding, strict=True)]
            value = ops.read_src(n, c, where, always=True)
            return value if channels == spec.oc else tirx.if_then_else(c < spec.oc, value, zero)

        padded = te.compute((spec.n, *extent, channels), gathered, name="padded")
        taps = [te.reduce_axis((0, k), f"k{axis}") for axis, k in enumerate(spec.kernel)]

        def product(n, *index):
            *pixel, block, c = index
            where = [p * s + k * d for p, k, s, d in zip(pixel, taps, spec.stride, spec.dilation, strict=True)]
            channel = block * tile + c
            return te.sum(padded[(n, *where, channel)] * w[flat(taps, spec.kernel), channel], taps)

        acc = te.compute((spec.n, *pixels, channels // tile, tile), product, name="acc")

        def value(n, o, pixel):
            residual = ops.residual[(n, *pixel, o)] if spec.residual else None
            total = acc[(n, *pixel, tirx.floordiv(o, tile), tirx.floormod(o, tile))]
            return epilogue(spec, total, residual=residual, **ops.per_channel(vectors, o))

        return Program(pack=ops.pack(*packed), main=ops.main([w, *vectors], ops.store(value)))

    def apply(self, sch, spec, target, picks):
        lanes = target.lanes
        dst, acc, padded = sch.get_sblock("dst"), sch.get_sblock("acc"), sch.get_sblock("padded")
        n, *spatial, oc = sch.get_loops(dst)
        channel_block, channel = sch.split(oc, [None, picks.tile_c])
        channel_task, channel_block = sch.split(channel_block, [picks.parallel_c, None])
        pixel_tile, pixel = sch.split(spatial[-1], [None, picks.tile_ow])
        rows = spatial[:-1]
        if rows:
            block, rows[0] = sch.split(rows[0], [None, picks.block])
        else:
            block, pixel_tile = sch.split(pixel_tile, [None, ceildiv(picks.block, picks.tile_ow)])
        sch.reorder(n, channel_task, block, *rows, pixel_tile, channel_block, pixel, channel)
        task = sch.fuse(n, channel_task, block)
        sch.parallel(task)
        if spec.oc % picks.tile_c == 0:
            vector, lane = sch.split(channel, [None, lanes])
            sch.vectorize(lane)

        sch.compute_at(acc, channel_block, preserve_unit_loops=True)
        loops = sch.get_loops(acc)
        *_, pixel, _, channel = loops[: -spec.rank]
        taps = loops[-spec.rank :]
        vector, lane = sch.split(channel, [None, lanes])
        sch.reorder(*taps, pixel, vector, lane)
        sch.vectorize(lane)
        for loop in (vector, pixel, *reversed(taps)):
            sch.unroll(loop)
        sch.decompose_reduction(acc, taps[0])
        sch.compute_at(padded, task, preserve_unit_loops=True)
        if spec.rank > 1:  # in 1-D the width is what tasks divide
            partition_edges(sch, sch.get_loops(padded)[-2])


def _rows(spec):
    """What a task takes a block of: rows of the first axis; in 1-D pixels."""
    return spec.out_spatial[0]
