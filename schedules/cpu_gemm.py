"""1×1 convolution as a matrix product with pixels in the vector lanes.

Applies to  dense 1×1 kernels without padding, NCHW, at least one vector of pixels.
Strategy    1. Pack weights as [oc/t][ic][t], so that the t scalars of one step lie together.
            2. Keep a tile of `tile_oc` channels × `tile_px` pixels in registers: one vector load of
               src per `lanes` pixels, broadcast weights. The last vector of the image is masked, the
               last channels are a smaller tile: both are code of their own.
            3. Reduce over ic innermost, not unrolled.
            4. Bias, residual and activation on the tile; the store is contiguous: no transposition.
            5. `copy_src`: a tile's pixels are first copied to [ic][tile_px], where many channel blocks
               read them again: rows lie far apart, each in a page of its own.
            6. One parallel loop over batch × blocks of tiles × parts of the channels; within it the channels come
               first, so that a channel's stores follow each other: rows of dst lie in a page each, too.
Why not     channels in the lanes (cpu_gemm_channels): better with many channels, or few pixels.
"""

from __future__ import annotations

import itertools

from tvm import tirx

from convgen.cpu.vector import Block, finish, load, outer_products, spread_parameters, store, subsampled, written
from convgen.lowering.compute import Operands, ceildiv, pack_channels, round_up
from convgen.lowering.schedule import Picks, Space, Written, require

#: Tiles of pixels in a task.
BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)


class CpuGemm(Written):
    id, version = "cpu_gemm", 4

    def applies(self, spec, target):
        lanes = target.lanes
        require(target.kind == "cpu", "needs a CPU")
        require(spec.has_unit_kernel and spec.groups == 1, "needs a dense 1×1 kernel, no padding, not transposed")
        require(spec.stride[-1] <= 8, "needs a stride along the row of at most 8")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.out_pixels >= lanes, f"needs at least {lanes} pixels")

    def space(self, spec, target):
        lanes = target.lanes
        return Space(
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14) if c <= spec.oc],
            tile_px=[lanes * v for v in (1, 2, 3, 4, 6) if lanes * (v - 1) < spec.out_pixels],
            parallel_oc=[1, 2, 3, 4, 8],
            copy_src=[False, True],
            block_px=list(BLOCKS),
        )

    def valid(self, spec, target, picks):
        most = target.most_pixels(picks.tile_px // target.lanes)  # here: channels
        require(picks.tile_oc <= most, f"{picks.tile_oc} channels in a tile, registers for {most}")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec, target):
        lanes = target.lanes
        vectors = 2 if spec.out_pixels > lanes else 1
        most = min(spec.oc, 8 if target.vector_registers > 16 else 6)
        loads = 0.3 if target.vector_registers > 16 else 0.5
        tile_oc = min(range(1, most + 1), key=lambda c: (round_up(spec.oc, c) * (1 + loads / c), -c))
        tiles = ceildiv(spec.out_pixels, vectors * lanes)
        splits = [p for p in (1, 2, 3, 4, 8) if p <= ceildiv(spec.oc, tile_oc)]

        copy_src = spec.oc >= 6 * tile_oc

        def penalty(option):
            """What the busiest core has to do; the copy, of about three products, which each part repeats; short rows
            of stores.
            """
            block, parts = option
            tasks = spec.n * parts * ceildiv(tiles, block)
            share = ceildiv(tasks, target.cores) * target.cores / tasks * ceildiv(tiles, block) * block / tiles
            share *= round_up(ceildiv(spec.oc, tile_oc), parts) / ceildiv(spec.oc, tile_oc)
            return share + parts * (3 / spec.oc if copy_src else 0.01) + 0.08 / block

        # What a task copies has to stay in its core's cache.
        most = max(1, target.l2 // 2 // (4 * spec.ic * vectors * lanes))
        blocks = [b for b in BLOCKS if b == 1 or (b <= most and b <= tiles)]
        block_px, parallel_oc = min(itertools.product(blocks, splits), key=penalty)
        return Picks(
            tile_oc=tile_oc,
            tile_px=vectors * lanes,
            parallel_oc=parallel_oc,
            copy_src=copy_src,
            block_px=block_px,
        )

    def cost(self, spec, target):
        lanes = target.lanes
        # A short reduction leaves the tile's prologue and store uncovered, few channels the copy.
        efficiency = 0.95 * spec.ic / (spec.ic + 3.2) * spec.out_pixels / round_up(spec.out_pixels, lanes)
        if self.default(spec, target).copy_src:
            efficiency *= spec.oc / (spec.oc + 6 * spec.ic / (spec.ic + 32))
        return spec.flops / (target.peak_flops * efficiency)

    def program(self, spec, target, picks):
        ops = Operands(spec)
        packed, _ = pack_channels(ops, picks.tile_oc)
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, target.lanes, *buffers))


def _kernel(spec, picks, lanes, src, residual, parameters, dst):
    """All of the layer: a loop over blocks of pixels and of channels."""
    width, pixels = picks.tile_px, spec.out_pixels
    vectors = width // lanes
    tiles, per_task = ceildiv(pixels, width), ceildiv(ceildiv(spec.oc, picks.tile_oc), picks.parallel_oc)
    whole = Block()
    origin = [0] * (spec.rank - 1)  # pixels are flat: as if all in the first row
    blocks = ceildiv(tiles, picks.block_px)
    with (
        subsampled(whole, spec, src, lanes) as (batch, images, image, src, stored),
        batch.loop(images * picks.parallel_oc * blocks, parallel=True) as (task, index),
    ):
        block, outer = task.let(index % blocks), index // blocks
        part, n = task.let(outer % picks.parallel_oc), task.let(image + outer // picks.parallel_oc)
        panels = task.buffer((picks.block_px, spec.ic, width)) if picks.copy_src else None
        first = task.let(block * picks.block_px)
        count = task.let(tirx.min(picks.block_px, tiles - first)) if picks.block_px > 1 else 1

        def copied(inside, i, x, counts):
            """The tile's pixels, one channel after another."""
            with inside.loop(spec.ic) as (step, c):
                for v, there in enumerate(counts):
                    value = load(src, stored, [n - image, c, x + v * lanes], lanes, there)
                    step.add(store(panels, "f32", [i, c, v * lanes], value, lanes, lanes))

        def product(inside, i, b, channels, x, counts):
            """``channels`` of block b times the pixels from x on; ``counts`` says how many there are per vector."""
            live = [v for v, there in enumerate(counts) if there > 0]
            sums = inside.registers([(t, v) for t in range(channels) for v in live], lanes)

            def vector(v, c):
                if panels is None:
                    return load(src, stored, [n - image, c, x + v * lanes], lanes, counts[v])
                return load(panels, "f32", [i, c, v * lanes], lanes, lanes)

            outer_products(inside, sums, spec.ic, lambda t, c: parameters["weights"][b, 0, c, t], vector)
            for t in range(channels):
                o = inside.let(b * picks.tile_oc + t)
                given = spread_parameters(inside, parameters, o, lanes)
                for v in live:
                    at = [n, o, *origin, x + v * lanes]
                    finish(inside, spec, dst, residual, at, sums[t, v], lanes, counts[v], **given)

        full, rest = [lanes] * vectors, pixels % width
        edge = [max(0, min(lanes, rest - v * lanes)) for v in range(vectors)] if rest else None

        def tiles_of(block):
            """Code for each of the block's tiles: ``(block, i, x, counts)``."""
            with block.loop(count) as (one, i):
                tile = one.let(first + i)
                for these, counts in one.cases(tile, pixels // width, full, edge):
                    yield these, i, these.let(tile * width), counts

        if panels is not None:
            for these, i, x, counts in tiles_of(task):
                copied(these, i, x, counts)
        with task.loop(per_task) as (inside, j):
            b = inside.let(part * per_task + j)
            full_blocks, remaining = divmod(spec.oc, picks.tile_oc)
            for those, channels in inside.cases(b, full_blocks, picks.tile_oc, remaining):
                for these, i, x, counts in tiles_of(those):
                    product(these, i, b, channels, x, counts)
    return whole.statement()
