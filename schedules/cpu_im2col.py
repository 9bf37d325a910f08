"""Convolution as a matrix product over the patches of a tile of pixels (im2col, a tile at a time).

Applies to  dense NCHW convolutions that are not transposed, of any rank, with few products per output and many
            output channels; stride along the row at most 16.
Strategy    1. Pack weights as [oc/t][row of the kernel, ic, k][t].
            2. A tile is `tile_px` pixels of an output row. Its patches are gathered once, with their padding and apart
               by phase of the stride, into [row of the kernel, ic, k][tile_px], for all channels.
            3. Pixels in the lanes as in cpu_gemm: `tile_oc` channels × `tile_px` pixels in registers.
            4. Bias, residual and activation on the tile; the store is contiguous.
            5. One parallel loop over batch × rows × blocks of tiles × parts of the channels.
Why not     shuffles in the product's loop (cpu_masked): every block of channels repeats them. Many products per
            output: patches outgrow the cache, and what is loaded is too large for what it saves.
"""

from __future__ import annotations

import math

from tvm import te, tirx

from convgen.cpu.vector import (
    Block,
    Columns,
    Taps,
    finish,
    load,
    outer_products,
    spread_parameters,
    store,
    written,
    zeros,
)
from convgen.lowering.compute import ACCUMULATOR, Operands, ceildiv, copied, round_up, unflat
from convgen.lowering.schedule import Picks, Space, Written, require


class CpuIm2col(Written):
    id, version = "cpu_im2col", 1

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed and spec.groups == 1, "needs groups 1, not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        require(not spec.has_unit_kernel, "needs more than a pixel's own products: cpu_gemm is for these")
        require(spec.stride[-1] <= 16, "needs a stride along the row of at most 16")
        require(spec.kernel[-1] <= 128, "needs at most 128 taps along the row")
        require(spec.reduction_length <= 512, "needs at most 512 products per output")

    def space(self, spec, target):
        lanes = target.lanes
        return Space(
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14) if c <= spec.oc],
            tile_px=[lanes * v for v in (1, 2, 3, 4) if lanes * (v - 1) < spec.out_spatial[-1]],
            block_px=[1, 2, 4, 8, 16],
            parallel_oc=[1, 2, 4, 8],
        )

    def valid(self, spec, target, picks):
        most = target.most_pixels(picks.tile_px // target.lanes)  # here: channels
        require(picks.tile_oc <= most, f"{picks.tile_oc} channels in a tile, registers for {most}")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec, target):
        lanes = target.lanes
        vectors = 2 if spec.out_spatial[-1] > lanes else 1
        most = min(spec.oc, 8 if target.vector_registers > 16 else 6)
        tile_oc = min(range(1, most + 1), key=lambda c: (round_up(spec.oc, c) * (1 + 0.3 / c), -c))
        tiles = ceildiv(spec.out_spatial[-1], vectors * lanes)
        rows = spec.n * math.prod(spec.out_spatial[:-1])
        # Long runs of stores; patches that stay in half a core's cache; enough for every core to do.
        fits = [
            b
            for b in (2, 4, 8, 16)
            if b <= tiles
            and 4 * b * spec.reduction_length * vectors * lanes <= target.l2 // 2
            and rows * ceildiv(tiles, b) >= 4 * target.cores
        ]
        return Picks(tile_oc=tile_oc, tile_px=vectors * lanes, block_px=max(fits, default=1), parallel_oc=1)

    def cost(self, spec, target):
        picks, lanes = self.default(spec, target), target.lanes
        width, length = round_up(spec.out_spatial[-1], lanes), spec.reduction_length
        vectors = spec.n * math.prod(spec.out_spatial[:-1]) * width / lanes
        products = round_up(spec.oc, picks.tile_oc) * (length * 1.05 + 5)
        patches = length * (3 if spec.stride[-1] == 1 else 3 + 2 * math.log2(spec.stride[-1]))
        return vectors * (products + patches) * 2 * lanes / target.peak_flops

    def program(self, spec, target, picks):
        ops = Operands(spec)
        tile, taps, length = picks.tile_oc, spec.kernel[-1], spec.reduction_length

        def packed_weights(b, k, t):
            row, c, kx = unflat(k, (math.prod(spec.kernel[:-1]), spec.ic, taps))
            value = ops.weights[(b * tile + t, c, *unflat(row, spec.kernel[:-1]), kx)]
            if spec.oc % tile == 0:
                return value
            return tirx.if_then_else(b * tile + t < spec.oc, value, tirx.const(0, ACCUMULATOR))

        packed = [te.compute((ceildiv(spec.oc, tile), length, tile), packed_weights, name="weights_packed")]
        packed += [copied(p) for p in ops.parameters[1:]]
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, target.lanes, *buffers))


def _kernel(spec, picks, lanes, src, residual, parameters, dst):
    """All of the layer: a loop over images, rows, blocks of tiles and parts of the channels."""
    columns = Columns(spec, lanes, picks.tile_px // lanes)
    rows, taps, length, width = spec.out_spatial[:-1], spec.kernel[-1], spec.reduction_length, spec.out_spatial[-1]
    vectors, step = range(columns.vectors), columns.step
    tiles, per_task = ceildiv(width, step), ceildiv(ceildiv(spec.oc, picks.tile_oc), picks.parallel_oc)
    blocks = ceildiv(tiles, picks.block_px)
    whole = Block()

    def gather(block, patches, i, n, at, x0, tile):
        """The patches of the tile at x0 in the output row ``at``; ``tile`` tells what of the image they meet."""
        outer = math.prod(spec.kernel[:-1])
        with block.loop(outer) as (kernel_row, r):
            position = unflat(r, spec.kernel[:-1])
            where = [
                kernel_row.let(y * s + k * d - begin)
                for y, s, k, d, (begin, _) in zip(at, spec.stride, position, spec.dilation, spec.padding, strict=False)
            ]
            sizes = list(zip(where, spec.in_spatial, spec.padding, strict=False))
            conditions = [c for y, size, pad in sizes if any(pad) for c in (y >= 0, y < size)]
            inside = tirx.all(*conditions) if conditions else True
            for image, condition in ((True, inside), (False, tirx.Not(inside) if conditions else False)):
                with kernel_row.when(condition) as branch, branch.loop(spec.ic) as (channel, c):

                    def read(offset, count, shift, channel=channel, c=c):
                        index = [n, c, *where, x0 * spec.stride[-1] + offset]
                        return load(src, spec.dtype, index, lanes, count, shift)

                    inputs = Taps(channel, columns, tile, read)
                    for kx in range(taps):
                        for v in vectors:
                            value = inputs[v, kx] if image and tile["stored", v] > 0 else None
                            place = [i, (r * spec.ic + c) * taps + kx, v * lanes]
                            value = zeros(lanes) if value is None else value
                            channel.add(store(patches, "f32", place, value, lanes, lanes))

    def product(block, patches, i, n, b, channels, at, x0, counts):
        """``channels`` of block b times the tile at x0; ``counts`` says how many pixels there are per vector."""
        live = [v for v, count in enumerate(counts) if count > 0]
        sums = block.registers([(t, v) for t in range(channels) for v in live], lanes)
        outer_products(
            block,
            sums,
            length,
            lambda t, k: parameters["weights"][b, k, t],
            lambda v, k: load(patches, "f32", [i, k, v * lanes], lanes, lanes),
        )
        for t in range(channels):
            o = block.let(b * picks.tile_oc + t)
            given = spread_parameters(block, parameters, o, lanes)
            for v in live:
                place = [n, o, *at, x0 + v * lanes]
                finish(block, spec, dst, residual, place, sums[t, v], lanes, counts[v], **given)

    with whole.loop(spec.n * math.prod(rows) * blocks * picks.parallel_oc, parallel=True) as (task, index):
        rest, part = index // picks.parallel_oc, task.let(index % picks.parallel_oc)
        rest, first = rest // blocks, task.let(rest % blocks * picks.block_px)
        n, row = task.let(rest // math.prod(rows)), rest % math.prod(rows)
        at = [task.let(y) for y in unflat(row, rows)]
        end = task.let(tirx.min(first + picks.block_px, tiles))
        patches = task.buffer((picks.block_px, length, step))
        for start, count, tile in columns.runs:
            low = task.let(tirx.max(first, start))
            with task.loop(task.let(tirx.max(tirx.min(end, start + count) - low, 0))) as (one, j):
                gather(one, patches, one.let(low + j - first), n, at, one.let((low + j) * step), tile)
        full, rest = [lanes] * columns.vectors, width % step
        edge = [max(0, min(lanes, rest - v * lanes)) for v in vectors] if rest else None
        with task.loop(per_task) as (inside, j):
            b = inside.let(part * per_task + j)
            for those, channels in inside.cases(b, spec.oc // picks.tile_oc, picks.tile_oc, spec.oc % picks.tile_oc):
                with those.loop(end - first) as (one, i):
                    for these, counts in one.cases(one.let(first + i), width // step, full, edge):
                        x0 = these.let((first + i) * step)
                        product(these, patches, i, n, b, channels, at, x0, counts)
    return whole.statement()
