"""1×1 convolution as a matrix product with pixels in the vector lanes.

Applies to  dense 1×1 kernels at stride 1 without padding, NCHW, at least one vector of pixels.
Strategy    1. Pack weights as [oc/t][ic][t], so that the t scalars of one step lie together.
            2. Keep a tile of `tile_oc` channels × `tile_px` pixels in registers: one vector load of
               src per `lanes` pixels, broadcast weights.
            3. Reduce over ic innermost, not unrolled.
            4. Bias, residual and activation on the tile; the store is contiguous: no transposition.
            5. `copy_src`: a tile's pixels are first copied to [ic][tile_px], where many channel blocks
               read them again or rows lie far apart; needed where pixels are not whole tiles.
            6. One parallel loop over batch × blocks of pixels (× channel blocks).
Why not     channels in the lanes (cpu_direct): better with many channels and few pixels.
"""

from __future__ import annotations

from tvm import te, tirx

from convgen.compute import ACCUMULATOR, Operands, ceildiv, epilogue, pack_channels
from convgen.schedule import Picks, Program, Schedule, Space, require


class CpuGemm(Schedule):
    id, version = "cpu_gemm", 2

    def applies(self, spec, target):
        lanes = target.lanes
        require(target.kind == "cpu", "needs a CPU")
        require(spec.is_pointwise and spec.groups == 1, "needs a dense 1×1 kernel, stride 1, no padding")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.out_pixels >= lanes, f"needs at least {lanes} pixels")

    def space(self, spec, target):
        lanes = target.lanes
        channels = {c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14) if c <= spec.oc}
        return Space(
            tile_oc=sorted(channels),
            tile_px=[lanes * v for v in (1, 2, 3, 4, 6) if lanes * v <= spec.out_pixels],
            block_px=[1, 2, 4, 8, 16, 32],
            order=["oc", "pixels"],
            parallel_oc=[1, 2, 4, 8],
            copy_src=[False, True],
        )

    def valid(self, spec, target, picks):
        most = target.most_pixels(picks.tile_px // target.lanes)  # here: channels
        require(picks.tile_oc <= most, f"{picks.tile_oc} channels in a tile, registers for {most}")
        require(
            picks.copy_src or spec.out_pixels % picks.tile_px == 0, "pixels are not whole tiles, so copy_src is needed"
        )
        require(picks.block_px < 2 * ceildiv(spec.out_pixels, picks.tile_px), "block_px exceeds the tiles there are")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec, target):
        lanes, wide = target.lanes, target.vector_bits == 512
        vectors = 2 if spec.out_pixels >= 2 * lanes else 1
        limit = min(spec.oc, 8 if wide else 6)
        tile_oc = max(
            (c for c in (8, 7, 6, 5, 4, 3, 2, 1) if c <= limit), key=lambda c: (-(ceildiv(spec.oc, c) * c), c)
        )
        tiles = ceildiv(spec.out_pixels, vectors * lanes)
        tasks, blocks = 4 * target.cores, (1, 2, 4, 8, 16, 32)
        block_px = max((b for b in blocks if spec.n * ceildiv(tiles, b) >= tasks), default=1)
        parallel_oc = 1
        if spec.n * ceildiv(tiles, block_px) < tasks:
            channel_blocks = ceildiv(spec.oc, tile_oc)
            parallel_oc = max(p for p in (1, 2, 4, 8) if p <= channel_blocks)
        return Picks(
            tile_oc=tile_oc,
            tile_px=vectors * lanes,
            block_px=block_px,
            order="pixels",
            parallel_oc=parallel_oc,
            copy_src=spec.oc >= 4 * tile_oc or spec.out_pixels % (vectors * lanes) != 0,
        )

    def cost(self, spec, target):
        lanes = target.lanes
        # Short reductions and few pixels leave the tile's prologue and store uncovered.
        efficiency = 0.9 * spec.ic / (spec.ic + 12) * min(1.0, spec.out_pixels / (32 * lanes))
        return spec.flops / (target.peak_flops * efficiency)

    def program(self, spec, target, picks):
        ops, dtype, tile, width = Operands(spec), ACCUMULATOR, picks.tile_oc, picks.tile_px
        pixels, tiles = spec.out_pixels, ceildiv(spec.out_pixels, picks.tile_px)
        packed, (w, *vectors) = pack_channels(ops, tile)

        def read(n, c, b, p):
            return ops.src[n, c, b * width + p]

        def read_checked(n, c, b, p):
            # Only the last tile asks pixel by pixel; LLVM moves the outer condition out of the loop.
            edge = tirx.if_then_else(b * width + p < pixels, read(n, c, b, p), tirx.const(0, dtype))
            return edge if tiles == 1 else tirx.if_then_else(b < tiles - 1, read(n, c, b, p), edge)

        source = read
        if picks.copy_src:
            copy = read if pixels % width == 0 else read_checked
            copied = te.compute((spec.n, tiles, spec.ic, width), lambda n, b, c, p: copy(n, c, b, p), name="copied")

            def source(n, c, b, p):
                return copied[n, b, c, p]

        c = te.reduce_axis((0, spec.ic), "c")
        shape = (spec.n, ceildiv(spec.oc, tile), tiles, tile, width)
        acc = te.compute(shape, lambda n, o, b, t, p: te.sum(source(n, c, b, p) * w[o, 0, c, t], c), name="acc")

        def value(n, o, pixel):
            (p,) = pixel
            total = acc[n, o // tile, p // width, o % tile, p % width]
            return epilogue(
                spec, total, residual=ops.residual[n, o, p] if spec.residual else None, **ops.per_channel(vectors, o)
            )

        return Program(pack=ops.pack(*packed), main=ops.main([w, *vectors], ops.store(value)))

    def apply(self, sch, spec, target, picks):
        lanes = target.lanes
        acc, dst = sch.get_sblock("acc"), sch.get_sblock("dst")
        n, oc, px = sch.get_loops(dst)
        channel_block, channel = sch.split(oc, [None, picks.tile_oc])
        channel_task, channel_block = sch.split(channel_block, [picks.parallel_oc, None])
        pixel_block, pixel_tile, pixel = sch.split(px, [None, picks.block_px, picks.tile_px])
        tiles = [channel_block, pixel_tile] if picks.order == "oc" else [pixel_tile, channel_block]
        sch.reorder(n, channel_task, pixel_block, *tiles, channel, pixel)
        task = sch.fuse(n, channel_task, pixel_block)
        sch.parallel(task)
        if spec.out_pixels % picks.tile_px == 0:
            vector, lane = sch.split(pixel, [None, lanes])
            sch.vectorize(lane)

        sch.compute_at(acc, tiles[-1], preserve_unit_loops=True)
        *units, channel, pixel, reduce = sch.get_loops(acc)[-6:]
        vector, lane = sch.split(pixel, [None, lanes])
        sch.reorder(reduce, *units, channel, vector, lane)
        sch.vectorize(lane)
        sch.unroll(vector)
        sch.unroll(channel)
        sch.decompose_reduction(acc, reduce)
        if picks.copy_src:
            copied = sch.get_sblock("copied")
            sch.compute_at(copied, task if picks.order == "oc" else pixel_tile, preserve_unit_loops=True)
            if spec.out_pixels % picks.tile_px == 0:
                vector, lane = sch.split(sch.get_loops(copied)[-1], [None, lanes])
                sch.vectorize(lane)
