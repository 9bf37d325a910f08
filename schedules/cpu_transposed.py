"""Transposed convolution by stride phases: no multiplication by an inserted zero, no scatter.

Applies to  transposed convolutions of any rank with groups 1, dilated only where the stride is 1.
Strategy    1. Output pixels whose distance to the first one is the same modulo the stride form a
               phase. Each phase is an ordinary convolution at stride 1 with every stride-th tap:
               tap k = p + s·t of phase p reads input pixel q - t.
            2. Pack weights as [phase][tap][oc/t][ic][t].
            3. Copy the input with zeros around it; a task is a block of output rows.
            4. Per phase keep a tile of `tile_px` pixels × `tile_oc` channels in registers; channels
               in the lanes, broadcast src scalars, ic innermost.
            5. Store the phases interleaved, with bias, residual and activation.
Why not     GEMM and col2im: it writes each product, and adds them up again in memory.
"""

from __future__ import annotations

import math

from tvm import te, tirx

from convgen.compute import DTYPES, Operands, ceildiv, copied, epilogue, flat, read_whole, round_up, unflat
from convgen.schedule import Picks, Program, Schedule, Space, require


class CpuTransposed(Schedule):
    id, version = "cpu_transposed", 1

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        require(spec.groups == 1, "needs groups 1")
        require(all(s == 1 or d == 1 for s, d in zip(spec.stride, spec.dilation, strict=True)), "dilated and strided")
        require(math.prod(spec.stride) <= 256, "needs at most 256 phases")

    def space(self, spec, target):
        lanes = target.vector_lanes(spec.dtype)
        g = _Geometry(spec)
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if v == 1 or lanes * (v - 1) < spec.oc],
            tile_px=sorted({p for p in (2, 4, 6, 7, 8, 10, 12, 14, 16, 20, 24) if p <= g.pixels[-1]} | {min(g.pixels[-1], 14)}),
            block_rows=sorted({b for b in (1, 2, 4, 8, 16, 32, 64, 128) if b < g.pixels[0]} | {g.pixels[0]}),
            parallel_oc=[1, 2, 4, 8],
        )

    def valid(self, spec, target, picks):
        vectors = picks.tile_oc // target.vector_lanes(spec.dtype)
        used = vectors * (picks.tile_px + 1) + (0 if target.vector_bits == 512 else 1)
        require(used <= target.vector_registers, f"{used} vectors in a tile, {target.vector_registers} registers")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec, target):
        lanes, g = target.vector_lanes(spec.dtype), _Geometry(spec)
        vectors = 2 if spec.oc > lanes else 1
        room = (target.vector_registers - (0 if target.vector_bits == 512 else 1)) // vectors - 1
        space = self.space(spec, target).domains
        width = g.pixels[-1]
        tile_px = min((p for p in space["tile_px"] if p <= room), key=lambda p: (round_up(width, p) / p * (p + 2), -p))
        tasks, blocks = 4 * target.cores, space["block_rows"]
        row_bytes = 4 * math.prod(g.pixels[1:]) * math.prod(spec.stride) * vectors * lanes
        fitting = [b for b in blocks if b * row_bytes <= target.l2 // 2] or blocks[:1]
        busy = [b for b in fitting if spec.n * ceildiv(g.pixels[0], b) >= tasks]
        block = max(busy, default=min(fitting))
        parallel_oc = 1
        if spec.n * ceildiv(g.pixels[0], block) < tasks:
            parallel_oc = max(p for p in space["parallel_oc"] if p <= ceildiv(spec.oc, vectors * lanes))
        return Picks(tile_oc=vectors * lanes, tile_px=tile_px, block_rows=block, parallel_oc=parallel_oc)

    def cost(self, spec, target):
        picks, g = self.default(spec, target), _Geometry(spec)
        lanes = target.vector_lanes(spec.dtype)
        pixels = math.prod(g.pixels[:-1]) * round_up(g.pixels[-1], picks.tile_px)
        taps = math.prod(spec.kernel)  # over all phases
        products = 2 * spec.n * pixels * taps * spec.ic * round_up(spec.oc, picks.tile_oc)
        tile = picks.tile_px * picks.tile_oc // lanes
        efficiency = 0.85 * min(1.0, tile / 10)
        return products / (efficiency * target.peak_flops) + 3 * spec.bytes["dst"] / (target.cores * 8e9)

    def program(self, spec, target, picks):
        ops, g, dtype, tile = Operands(spec), _Geometry(spec), DTYPES[spec.dtype], picks.tile_oc
        zero = tirx.const(0, dtype)
        oc_blocks = ceildiv(spec.oc, tile)

        def tap(phase, t):
            """The kernel's tap per axis, and whether there is one."""
            if g.phases == 1:
                return list(t), []
            taps = [p + s * i for p, s, i in zip(phase, spec.stride, t, strict=True)]
            return taps, [k < size for k, size in zip(taps, spec.kernel, strict=True)]

        def packed_weights(phase, position, b, c, lane):
            taps, inside = tap(unflat(phase, spec.stride), unflat(position, g.taps))
            o = b * tile + lane
            inside = [*inside, o < spec.oc]
            return tirx.if_then_else(tirx.all(*inside), ops.weights[(c, o, *taps)], zero)

        shape = (g.phases, math.prod(g.taps), oc_blocks, spec.ic, tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p, f"{p.op.name}_packed") for p in ops.parameters[1:]]
        w, *vectors = [te.placeholder(p.shape, p.dtype, f"{p.op.name}_in") for p in packed]

        width = round_up(g.pixels[-1], picks.tile_px)
        extent = [q + r for q, r in zip([*g.pixels[:-1], width], g.reach, strict=True)]

        def gathered(*index):
            n, c, where = ops.logical(index)
            where = [p - r + first for p, r, first in zip(where, g.reach, g.first, strict=True)]
            inside = [i for p, size in zip(where, spec.in_spatial, strict=True) for i in (p >= 0, p < size)]
            return tirx.if_then_else(tirx.all(*inside), ops.src[ops.order(n, c, where)], zero)

        padded = te.compute(ops.order(spec.n, spec.ic, extent), gathered, name="padded")

        c = te.reduce_axis((0, spec.ic), "c")
        t = [te.reduce_axis((0, count), f"t{axis}") for axis, count in enumerate(g.taps)]

        def product(n, b, phase, *rest):
            *pixel, lane = rest
            if len(pixel) > spec.rank:  # 1-D has an axis of one row
                pixel = pixel[1:]
            where = [p + r - i * d for p, r, i, d in zip(pixel, g.reach, t, spec.dilation, strict=True)]
            value = padded[ops.order(n, c, where)] * w[phase, flat(t, g.taps), b, c, lane]
            # Where the stride does not divide the kernel, the last tap of some phases is not there.
            _, inside = tap(unflat(phase, spec.stride), t)
            if g.whole:
                inside = []
            return te.sum(tirx.if_then_else(tirx.all(*inside), value, zero) if inside else value, [*t, c])

        pixels = (*((1,) if spec.rank == 1 else ()), *g.pixels[:-1], width)
        acc = te.compute((spec.n, oc_blocks, g.phases, *pixels, tile), product, name="acc")

        def value(n, o, pixel):
            shifted = [p + b for p, (b, _) in zip(pixel, spec.padding, strict=True)]
            phase = flat([tirx.floormod(p, s) for p, s in zip(shifted, spec.stride, strict=True)], spec.stride)
            where = [
                tirx.floordiv(p, s) - first for p, s, first in zip(shifted, spec.stride, g.first, strict=True)
            ]
            where = [0, *where] if spec.rank == 1 else where
            total = read_whole(acc, (n, tirx.floordiv(o, tile), phase, *where, tirx.floormod(o, tile)))
            residual = ops.residual[ops.order(n, o, pixel)] if spec.residual else None
            return epilogue(spec, total, residual=residual, **ops.per_channel(vectors, o))

        return Program(pack=ops.pack(*packed), main=ops.main([w, *vectors], ops.store(value)))

    def apply(self, sch, spec, target, picks):
        lanes, g = target.vector_lanes(spec.dtype), _Geometry(spec)
        dst, acc, padded = sch.get_sblock("dst"), sch.get_sblock("acc"), sch.get_sblock("padded")
        loops = sch.get_loops(dst)
        n, *spatial, oc = loops if spec.layout == "nhwc" else [loops[0], *loops[2:], loops[1]]
        channel_block, channel = sch.split(oc, [None, picks.tile_oc])
        channel_task, channel_block = sch.split(channel_block, [picks.parallel_oc, None])
        block, row = sch.split(spatial[0], [None, picks.block_rows * spec.stride[0]])
        inner = [channel, row, *spatial[1:]] if spec.layout == "nchw" else [row, *spatial[1:], channel]
        sch.reorder(n, channel_task, block, channel_block, *inner)
        task = sch.fuse(n, channel_task, block)
        sch.parallel(task)

        sch.compute_at(acc, channel_block, preserve_unit_loops=True)
        count = len(g.taps) + 1
        loops = sch.get_loops(acc)
        axes, reduce = loops[:-count], loops[-count:]
        phase, pixel, channel = axes[-2 - max(2, spec.rank)], axes[-2], axes[-1]
        tile, pixel = sch.split(pixel, [None, picks.tile_px])
        vector, lane = sch.split(channel, [None, lanes])
        sch.reorder(tile, *reduce, pixel, vector, lane)
        sch.vectorize(lane)
        sch.unroll(vector)
        sch.unroll(pixel)
        if not g.whole:
            sch.unroll(phase)
            for loop in reduce[:-1]:
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
        # First and last phase pixel that an output pixel belongs to.
        self.first = tuple(b // s for (b, _), s in zip(spec.padding, spec.stride, strict=True))
        last = [(o - 1 + b) // s for o, (b, _), s in zip(spec.out_spatial, spec.padding, spec.stride, strict=True)]
        self.pixels = tuple(b - a + 1 for a, b in zip(self.first, last, strict=True))
        self.reach = tuple((t - 1) * d for t, d in zip(self.taps, spec.dilation, strict=True))
