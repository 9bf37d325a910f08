"""Transposed convolution by stride phases: no multiplication by an inserted zero, no scatter.

Applies to  transposed convolutions of any rank with groups 1, dilated only where the stride is 1.
Strategy    1. Output pixels whose distance to the first one is the same modulo the stride form a
               phase. Each phase is an ordinary convolution at stride 1 with every stride-th tap:
               output s·q + r takes tap (r + pad) mod s + s·t of input pixel q + (r + pad) div s - t.
            2. Pack weights as [phase…][tap][oc/t][ic][t].
            3. Copy the input with zeros around it; a task is a block of rows of tiles.
            4. Per phase keep a tile of `tile_px` pixels × `tile_oc` channels in registers; channels
               in the lanes, broadcast src scalars, ic innermost.
            5. Store the phases interleaved, with bias, residual and activation.
Why not     GEMM and col2im: it writes each product, and adds them up again in memory.
"""

from __future__ import annotations

import math

from tvm import te, tirx

from convgen.lowering.compute import (
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
from convgen.lowering.schedule import Picks, Program, Scheduled, Space, require

#: Unrolled multiply-adds of one input channel.
MOST_UNROLLED = 1024


class CpuTransposed(Scheduled):
    id, version = "cpu_transposed", 3

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        require(spec.groups == 1, "needs groups 1")
        require(all(s == 1 or d == 1 for s, d in zip(spec.stride, spec.dilation, strict=True)), "dilated and strided")
        g = _Geometry(spec)
        require(g.whole or g.phases <= 64, "needs at most 64 phases where the stride does not divide the kernel")

    def space(self, spec, target):
        lanes = target.lanes
        pixels = _Geometry(spec).pixels
        tiles = {p for p in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 20, 24, 28) if p < pixels[-1]}
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if v == 1 or lanes * (v - 1) < spec.oc],
            tile_px=sorted(tiles | {min(pixels[-1], 28)}),
            block=[1, 2, 4, 8, 16, 32],
            order=["oc", "pixels"],
            parallel_oc=[1, 2, 4, 8],
        )

    def valid(self, spec, target, picks):
        g = _Geometry(spec)
        most = target.most_pixels(picks.tile_oc // target.lanes)
        require(picks.tile_px <= most, f"{picks.tile_px} pixels in a tile, registers for {most}")
        require(picks.block < 2 * g.blockable(picks.tile_px), "block exceeds what there is")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec, target):
        lanes, g = target.lanes, _Geometry(spec)
        vectors = 2 if spec.oc > lanes else 1
        room = target.most_pixels(vectors)
        space = self.space(spec, target).domains
        width = g.pixels[-1]
        tile_px = min((p for p in space["tile_px"] if p <= room), key=lambda p: (round_up(width, p) / p * (p + 2), -p))
        tasks, count = 4 * target.cores, g.blockable(tile_px)
        blocks = [b for b in space["block"] if b < 2 * count]
        block = max((b for b in blocks if spec.n * ceildiv(count, b) >= tasks), default=1)
        parallel_oc = 1
        if spec.n * ceildiv(count, block) < tasks:
            parallel_oc = max(p for p in space["parallel_oc"] if p <= ceildiv(spec.oc, vectors * lanes))
        return Picks(tile_oc=vectors * lanes, tile_px=tile_px, block=block, order="oc", parallel_oc=parallel_oc)

    def cost(self, spec, target):
        picks, g = self.default(spec, target), _Geometry(spec)
        lanes = target.lanes
        pixels = math.prod(g.pixels[:-1]) * round_up(g.pixels[-1], picks.tile_px)
        taps = math.prod(spec.kernel)  # over all phases
        products = 2 * spec.n * pixels * taps * spec.ic * round_up(spec.oc, picks.tile_oc)
        tile = picks.tile_px * picks.tile_oc // lanes
        efficiency = 0.85 * min(1.0, tile / 10)
        return products / (efficiency * target.peak_flops) + 3 * spec.bytes["dst"] / (target.cores * 8e9)

    def program(self, spec, target, picks):
        ops, g, dtype, tile = Operands(spec), _Geometry(spec), ACCUMULATOR, picks.tile_oc
        zero = tirx.const(0, dtype)
        oc_blocks = ceildiv(spec.oc, tile)

        def tap(phase, t):
            """The kernel's tap per axis, and whether there is one."""
            if g.phases == 1:
                return list(t), []
            pads = [b for b, _ in spec.padding]
            taps = [tirx.floormod(p + b, s) + s * i for p, b, s, i in zip(phase, pads, spec.stride, t, strict=True)]
            return taps, [k < size for k, size in zip(taps, spec.kernel, strict=True)]

        def packed_weights(*index):
            *phase, position, b, c, lane = index
            taps, inside = tap(phase, unflat(position, g.taps))
            o = b * tile + lane
            inside = [*inside, o < spec.oc]
            return tirx.if_then_else(tirx.all(*inside), ops.weights[(c, o, *taps)], zero)

        shape = (*spec.stride, math.prod(g.taps), oc_blocks, spec.ic, tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p, oc_blocks * tile) for p in ops.parameters[1:]]
        w, *vectors = [te.placeholder(p.shape, p.dtype, f"{p.op.name}_in") for p in packed]

        width = round_up(g.pixels[-1], picks.tile_px)
        extent = [q + r for q, r in zip([*g.pixels[:-1], width], g.reach, strict=True)]

        def gathered(*index):
            n, c, where = ops.logical(index)
            where = [p + first for p, first in zip(where, g.first, strict=True)]
            return ops.read_src(n, c, where, always=True)

        padded = te.compute(ops.order(spec.n, spec.ic, extent), gathered, name="padded")

        c = te.reduce_axis((0, spec.ic), "c")
        t = [te.reduce_axis((0, count), f"t{axis}") for axis, count in enumerate(g.taps)]

        def product(n, b, *rest):
            phase, pixel, lane = rest[: spec.rank], rest[-1 - spec.rank : -1], rest[-1]
            where = [
                p + tirx.floordiv(r + pad, s) - i * d - first
                for p, r, i, s, d, (pad, _), first in zip(
                    pixel, phase, t, spec.stride, spec.dilation, spec.padding, g.first, strict=True
                )
            ]
            value = padded[ops.order(n, c, where)] * w[(*phase, flat(t, g.taps), b, c, lane)]
            # Where the stride does not divide the kernel, the last tap of some phases is not there.
            _, inside = tap(phase, t)
            return te.sum(value if g.whole else tirx.if_then_else(tirx.all(*inside), value, zero), [*t, c])

        rows = g.pixels[:-1] or (1,)
        # One axis per axis' phase: TVM 0.27 simplifies (flat_phase // s % s + pad) // s to the wrong value.
        acc = te.compute((spec.n, oc_blocks, *spec.stride, *rows, width, tile), product, name="acc")
        sums, done = finished(ops, acc, vectors, lambda index: index[1] * tile + index[-1])

        def value(n, o, pixel):
            phase = [tirx.floormod(p, s) for p, s in zip(pixel, spec.stride, strict=True)]
            where = [tirx.floordiv(p, s) for p, s in zip(pixel, spec.stride, strict=True)]
            where = [0, *where] if spec.rank == 1 else where
            total = sums[(n, tirx.floordiv(o, tile), *phase, *where, tirx.floormod(o, tile))]
            residual = ops.residual[ops.order(n, o, pixel)] if spec.residual else None
            return total if done else epilogue(spec, total, residual=residual, **ops.per_channel(vectors, o))

        return Program(pack=ops.pack(*packed), main=ops.main([w, *vectors], ops.store(value)))

    def apply(self, sch, spec, target, picks):
        lanes, g = target.lanes, _Geometry(spec)
        acc, padded = sch.get_sblock("acc"), sch.get_sblock("padded")
        n, spatial, oc = dst_loops(sch, spec)
        channel_block, channel = sch.split(oc, [None, picks.tile_oc])
        channel_task, channel_block = sch.split(channel_block, [picks.parallel_oc, None])
        split = [sch.split(axis, [None, s]) for axis, s in zip(spatial[:-1], spec.stride[:-1], strict=True)]
        pixel_tile, pixel = sch.split(spatial[-1], [None, picks.tile_px * spec.stride[-1]])
        rows, steps = [q for q, _ in split], [r for _, r in split]
        if spec.rank == 1:
            block, pixel_tile = sch.split(pixel_tile, [None, picks.block])
        else:
            block, rows[0] = sch.split(rows[0], [None, picks.block])
        rows += steps
        tiles = [channel_block, *rows, pixel_tile] if picks.order == "oc" else [*rows, pixel_tile, channel_block]
        inner = [channel, pixel] if spec.layout == "nchw" else [pixel, channel]
        sch.reorder(n, channel_task, block, *tiles, *inner)
        task = sch.fuse(n, channel_task, block)
        sch.parallel(task)

        if not spec.residual and spec.activation_op.costly:
            vectorize_finished(sch, tiles[-1], lanes)
        sch.compute_at(acc, tiles[-1], preserve_unit_loops=True)
        count = len(g.taps) + 1
        loops = sch.get_loops(acc)
        axes, reduce = loops[:-count], loops[-count:]
        outer = 2 + max(2, spec.rank) - 1  # rows, pixel, channel
        phases, (*_, pixel, channel) = axes[-outer - spec.rank : -outer], axes
        vector, lane = sch.split(channel, [None, lanes])
        tile = axes[-3]
        sch.reorder(*reduce, pixel, vector, lane)
        sch.vectorize(lane)
        sch.unroll(vector)
        sch.unroll(pixel)
        # Where taps are missing, the condition is one of constants, unless that is too much code.
        unrolled = g.phases * math.prod(g.taps) * picks.tile_px * picks.tile_oc // lanes
        if not g.whole and unrolled <= MOST_UNROLLED:
            for loop in (*phases, *reduce[:-1], *steps):
                sch.unroll(loop)
        local = sch.cache_write(acc, 0, "global")
        sch.reverse_compute_at(local, tile, preserve_unit_loops=True)
        vector, lane = sch.split(sch.get_loops(local)[-1], [None, lanes])
        sch.vectorize(lane)
        sch.decompose_reduction(acc, reduce[0])

        if picks.parallel_oc == 1:
            sch.compute_at(padded, task, preserve_unit_loops=True)
        else:
            sch.parallel(sch.fuse(*sch.get_loops(padded)[:2]))


class _Geometry:
    """Phases, taps per phase and the pixels of one phase, per axis."""

    def __init__(self, spec):
        self.phases = math.prod(spec.stride)
        self.taps = tuple(ceildiv(k, s) for k, s in zip(spec.kernel, spec.stride, strict=True))
        self.whole = all(k % s == 0 for k, s in zip(spec.kernel, spec.stride, strict=True))
        self.pixels = tuple(ceildiv(o, s) for o, s in zip(spec.out_spatial, spec.stride, strict=True))
        # Input pixels that phase pixel 0 reads, first and last, over all phases and taps.
        pads = [b for b, _ in spec.padding]
        back = [(t - 1) * d for t, d in zip(self.taps, spec.dilation, strict=True)]
        self.first = tuple(b // s - r for b, s, r in zip(pads, spec.stride, back, strict=True))
        last = [(s - 1 + b) // s for b, s in zip(pads, spec.stride, strict=True)]
        self.reach = tuple(b - a for a, b in zip(self.first, last, strict=True))

    def blockable(self, tile_px):
        """What a task takes a block of: rows of the first axis; in 1-D, tiles."""
        return ceildiv(self.pixels[0], tile_px) if len(self.pixels) == 1 else self.pixels[0]
