"""1×1 convolution as a matrix product with output channels in the vector lanes.

Applies to  dense 1×1 kernels without padding, NCHW, several pixels, more than half a vector of
            output channels.
Strategy    1. Pack weights as [oc/lanes][ic][lanes]: a block may begin at any vector of channels.
            2. Keep a tile of `tile_oc` channels × `tile_px` pixels in registers: vector loads of weights, broadcast
               pixels. The last pixels and the last vectors of channels are smaller tiles, with code of their own.
            3. Reduce over ic innermost, not unrolled.
            4. Transpose the sums in registers; bias, residual and activation; rows of pixels are stored.
            5. `copy_src`: a block's pixels are first copied to [ic][lanes] as f32: narrow ones are converted once
               then, not at every product.
            6. One parallel loop over batch × parts of the channels × blocks of tiles. Parts have as many vectors
               as any other, or one less.
Why not     pixels in the lanes (cpu_gemm): no transposition, so better with few products per output or where the last
            vector of channels is mostly empty; but its tiles are whole vectors of pixels, and 49 of them are not.
"""

from __future__ import annotations

import math

from tvm import tirx

from convgen.cpu.vector import (
    Block,
    finish,
    interleave,
    load,
    outer_products,
    spread_parameters,
    store,
    subsampled,
    written,
    zeros,
)
from convgen.lowering.compute import Operands, ceildiv, pack_channels, widen
from convgen.lowering.schedule import Picks, Space, Written, busiest, require

#: Parts of the channels, and tiles of pixels in a task.
PARTS, BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 4, 8, 16)


class CpuGemmChannels(Written):
    id, version = "cpu_gemm_channels", 1

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(spec.has_unit_kernel and spec.groups == 1, "needs a dense 1×1 kernel, no padding, not transposed")
        require(spec.stride[-1] <= 8, "needs a stride along the row of at most 8")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.out_pixels > 1, "needs several pixels, or weights are loaded for a product each")
        require(spec.oc > target.lanes // 2, f"needs more than {target.lanes // 2} output channels")

    def space(self, spec, target):
        lanes = target.lanes
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if lanes * (v - 1) < spec.oc],
            tile_px=[p for p in range(1, lanes + 1) if p <= spec.out_pixels],
            parallel_oc=list(PARTS),
            block_px=list(BLOCKS),
            copy_src=[False, True],
        )

    def valid(self, spec, target, picks):
        most = target.most_pixels(picks.tile_oc // target.lanes)
        require(picks.tile_px <= most, f"{picks.tile_px} pixels in a tile, registers for {most}")
        vectors = ceildiv(spec.oc, target.lanes)
        require(picks.parallel_oc <= vectors, "fewer vectors of channels than parallel_oc")
        require(picks.tile_oc <= target.lanes * ceildiv(vectors, picks.parallel_oc), "tile_oc exceeds the largest part")
        require(picks.block_px < 2 * ceildiv(spec.out_pixels, picks.tile_px), "block_px exceeds what there is")

    def default(self, spec, target):
        lanes, space = target.lanes, self.space(spec, target).domains
        vectors = ceildiv(spec.oc, lanes)
        copy_src = spec.is_pointwise and spec.dtype != "f32"  # or they were converted at every product
        base = Picks(tile_oc=lanes, tile_px=1, parallel_oc=1, block_px=1, copy_src=copy_src)
        tiles = [base.replace(tile_oc=o, tile_px=p) for o in space["tile_oc"] for p in space["tile_px"]]

        def fits(picks):
            """Four registers beside the sums, or the transposition spills them."""
            wide = picks.tile_oc // lanes
            return picks.tile_px <= min((target.vector_registers - 4) // wide, target.most_pixels(wide))

        tiles = [picks for picks in tiles if fits(picks)]
        base = min(tiles, key=lambda picks: sum(map(math.prod, _blocks(spec, target, picks, vectors))))
        # What a task reads for every block of channels has to stay in its core's cache, beside weights that pass.
        most = max(1, target.l2 // 8 // (4 * spec.ic * base.tile_px))
        splits = [
            base.replace(tile_oc=min(base.tile_oc, lanes * ceildiv(vectors, p)), parallel_oc=p, block_px=b)
            for p in PARTS
            for b in BLOCKS
            if b <= most
        ]
        splits = [picks for picks in splits if self.reason_against(spec, target, picks) is None]

        def penalty(picks):
            """Time; among equals large blocks, for long runs of stores, and few parts, which all read the pixels."""
            return self._cycles(spec, target, picks) * (1 + 0.01 / picks.block_px + 0.001 * picks.parallel_oc)

        return min(splits, key=penalty)

    def _cycles(self, spec, target, picks):
        """Cycles of the busiest core, at an FMA each."""
        lanes, cores = target.lanes, target.cores
        sizes = _sizes(ceildiv(spec.oc, lanes), picks.parallel_oc)
        blocks = {size: _blocks(spec, target, picks, size) for size in set(sizes)}
        runs = [run for size in sizes for run in blocks[size]]
        if spec.n * sum(count for count, _ in runs) > 64 * cores:
            most = spec.n * sum(map(math.prod, runs)) / cores
        else:
            most = busiest([cycles for count, cycles in runs for _ in range(count)] * spec.n, cores)
        if spec.is_pointwise:
            return most
        *rows, width = spec.out_spatial  # copied
        return most + 9 * spec.n * spec.ic * math.prod(rows) * ceildiv(width, lanes) / cores

    def cost(self, spec, target):
        cycles = self._cycles(spec, target, self.default(spec, target))
        return cycles * 2 * target.lanes * target.cores / (0.95 * target.peak_flops)

    def program(self, spec, target, picks):
        ops = Operands(spec)
        packed, _ = pack_channels(ops, target.lanes)
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, target.lanes, *buffers))


def _sizes(vectors, parts):
    """Vectors of channels of each part."""
    return [vectors * (p + 1) // parts - vectors * p // parts for p in range(parts)]


def _blocks(spec, target, picks, vectors):
    """The blocks of tiles of an image, with that many vectors of channels: runs of ``(count, cycles)``."""
    lanes, fmas = target.lanes, target.fmas  # beside two loads
    full, rest = divmod(spec.out_pixels, picks.tile_px)
    many, left = divmod(vectors, picks.tile_oc // lanes)
    widths = [(picks.tile_oc // lanes, many), (left, int(left > 0))]

    def tile(pixels):
        """Products, or what takes longer: loads, weights on their way from the L2 cache, a sum's latency. The copy,
        and transposed stores.
        """
        products = sum(
            times * max(width * pixels, fmas / 2 * (width + pixels), 3 * width, 5.5 * fmas) for width, times in widths
        )
        # Whole vectors; or with masks, which are slow before AVX-512.
        store = 4.3 if pixels == lanes else 5.7 if lanes == 16 else 30
        return spec.ic * (products + 6 * picks.copy_src) + store * lanes * vectors

    blocks, more = divmod(full, picks.block_px)
    last = more * tile(picks.tile_px) + (tile(rest) if rest else 0)
    return [(blocks, picks.block_px * tile(picks.tile_px)), (int(last > 0), last)]


def _kernel(spec, picks, lanes, src, residual, parameters, dst):
    """All of the layer: a loop over parts of the channels and blocks of pixels."""
    pixels, parts, most = spec.out_pixels, picks.parallel_oc, picks.tile_oc // lanes
    weights = parameters.pop("weights")
    vectors, tiles = ceildiv(spec.oc, lanes), ceildiv(pixels, picks.tile_px)
    blocks, rest = ceildiv(tiles, picks.block_px), pixels % picks.tile_px
    whole = Block()
    origin = [0] * (spec.rank - 1)  # pixels are flat: as if all in the first row

    def copied(block, panels, i, n, x, count):
        """The pixels of a tile, one channel after another."""
        with block.loop(spec.ic) as (step, c):
            step.add(store(panels, "f32", [i, c, 0], load(src, stored, [n - image, c, x], lanes, count), lanes, lanes))

    def product(block, panels, i, n, first, width, x, count):
        """``width`` vectors of channels, from the vector ``first`` on, times ``count`` pixels from x on."""
        sums = block.registers([(t, v) for t in range(count) for v in range(width)], lanes)
        outer_products(
            block,
            sums,
            spec.ic,
            lambda t, c: widen(src[n - image, c, x + t], stored) if panels is None else panels[i, c, t],
            lambda v, c: load(weights, "f32", [first + v, 0, c, 0], lanes, lanes),
        )
        for v in range(width):
            columns = [sums[t, v] if t < count else zeros(lanes) for t in range(lanes)]
            for channel, row in enumerate(interleave(block, columns, lanes)):
                o = block.let((first + v) * lanes + channel)
                with block.when(True if spec.oc % lanes == 0 else o < spec.oc) as there:
                    given = spread_parameters(there, parameters, o, lanes)
                    finish(there, spec, dst, residual, [n, o, *origin, x], row, lanes, count, **given)

    with (
        subsampled(whole, spec, src, lanes) as (batch, images, image, src, stored),
        batch.loop(images * parts * blocks, parallel=True) as (task, index),
    ):
        block, outer = task.let(index % blocks), index // blocks
        part, n = task.let(outer % parts), task.let(image + outer // parts)
        first, count = task.let(block * picks.block_px), picks.block_px
        if tiles % picks.block_px:
            count = task.let(tirx.min(picks.block_px, tiles - first))
        panels = task.buffer((picks.block_px, spec.ic, lanes)) if picks.copy_src else None

        def tiles_of(block):
            """Code for each of the block's tiles: ``(block, i, x, count)``."""
            with block.loop(count) as (one, i):
                tile = one.let(first + i)
                for these, there in one.cases(tile, pixels // picks.tile_px, picks.tile_px, rest):
                    yield these, i, these.let(tile * picks.tile_px), there

        if panels is not None:
            for these, i, x, there in tiles_of(task):
                copied(these, panels, i, n, x, there)
        start, end = (task.let(p * vectors // parts) for p in (part, part + 1))
        with task.loop(vectors // most if parts == 1 else task.let((end - start) // most)) as (channels, j):
            begin = channels.let(start + j * most)
            for these, i, x, there in tiles_of(channels):
                product(these, panels, i, n, begin, most, x, there)
        sizes = set(_sizes(vectors, parts))
        for left in {size % most for size in sizes} - {0}:
            begin = task.let(end - left)
            with task.when(True if len(sizes) == 1 else (end - start) % most == left) as remaining:
                for these, i, x, there in tiles_of(remaining):
                    product(these, panels, i, n, begin, left, x, there)
    return whole.statement()
