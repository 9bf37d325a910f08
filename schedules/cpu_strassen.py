"""1×1 convolution as a matrix product with 7 multiplications for 8: Strassen's algorithm, one level.

Applies to  dense 1×1 kernels without padding, NCHW, even channel counts, many pixels and channels;
            accuracy `relaxed`.
Strategy    Winograd's form of Strassen's algorithm on halves of the output channels, of the input channels, and of a
            tile's pixels: C = A B with 7 products of half the size. A are the weights.
            1. Pack the sums of weights as [oc/2/t][product][ic/2][t], each output channel scaled by the power of two
               of its largest weight: channels meet in sums, and small ones must not drown in large ones.
            2. A tile of pixels is copied once, as the seven operands [product][ic/2][tile_px].
            3. Pixels in the lanes as in cpu_gemm: one product after the other in registers, each going on from the
               sums that it is added to; three sums wait in memory.
            4. Scale back, bias, residual and activation on the tile; the store is contiguous.
            5. One parallel loop over batch × blocks of tiles × parts of the channels.
Accuracy    The error of an element is relative to the largest elements of its channel's weights and of the pixels in
            the tile (Higham, *Accuracy and Stability of Numerical Algorithms*, §23.2.2). On data whose elements are
            alike it is a few hundredths of the bound of `standard`; but channels with the same weights no longer
            have the same result to the last bit, on which a softmax of logits of 1e10 depends. So: `relaxed`.
Why not     few channels: the copy costs more than an eighth of the products. A second level: 3-6 % faster on large
            layers, but four times the error, and ten seconds to compile.
"""

from __future__ import annotations

from tvm import te, tirx

from convgen.cpu.vector import (
    Block,
    finish,
    interleave,
    load,
    outer_products,
    store,
    subsampled,
    weighted_sum,
    written,
    zeros,
)
from convgen.lowering.compute import ACCUMULATOR, Operands, ceildiv, copied, round_up
from convgen.lowering.schedule import Picks, Space, Written, busiest, require

#: Weights of the seven products, as multiples of the blocks (11, 12, 21, 22), in the order they are summed in.
WEIGHTS = ((1, 0, 0, 0), (0, 1, 0, 0), (-1, 0, 1, 1), (1, 0, -1, 0), (0, 0, 0, -1), (0, 0, 1, 1), (1, 1, -1, -1))
#: Pixels of the seven products, likewise.
PIXELS = ((1, 0, 0, 0), (0, 0, 1, 0), (1, -1, 0, 1), (0, -1, 0, 1), (1, -1, -1, 1), (-1, 1, 0, 0), (0, 0, 0, 1))


class CpuStrassen(Written):
    id, version = "cpu_strassen", 1
    transforms = True

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(spec.accuracy == "relaxed", "mixes channels: needs accuracy relaxed")
        require(spec.has_unit_kernel and spec.groups == 1, "needs a dense 1×1 kernel, no padding, not transposed")
        require(spec.stride[-1] <= 8, "needs a stride along the row of at most 8")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.ic % 2 == spec.oc % 2 == 0, "needs even numbers of channels")
        require(spec.oc >= 8, "needs at least 8 output channels")
        require(spec.out_pixels > target.lanes, f"needs more than {target.lanes} pixels")

    def space(self, spec, target):
        lanes = target.lanes
        wide = [lanes * v for v in (1, 2, 3, 4) if lanes * (2 * v - 1) < spec.out_pixels]
        narrow = [p for p in (4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16) if p < spec.out_pixels and p <= lanes]
        return Space(
            lanes=["pixels", "channels"],
            tile_oc=sorted({4, 5, 6, 7, 8, 10, 12, 13, 14, *(lanes * v for v in (1, 2, 3) if lanes * v <= spec.oc)}),
            tile_px=sorted({*wide, *narrow}),
            parallel_oc=[1, 2, 3, 4, 8],
            block_px=[1, 2, 3, 4, 6, 8],
        )

    def valid(self, spec, target, picks):
        lanes, pixels = target.lanes, picks.lanes == "pixels"
        vector, other = (picks.tile_px, picks.tile_oc) if pixels else (picks.tile_oc, picks.tile_px)
        require(vector % lanes == 0, f"{picks.lanes} in the lanes: needs whole vectors of them")
        require(pixels or other <= lanes, f"at most {lanes} pixels where channels are in the lanes")
        most = target.most_pixels(vector // lanes)
        require(other <= most, f"{other} × {vector // lanes} vectors in a tile, registers for {most}")
        require(picks.parallel_oc <= ceildiv(spec.oc // 2, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec, target):
        lanes = target.lanes
        base = Picks(lanes="pixels", tile_oc=4, tile_px=lanes, parallel_oc=1, block_px=1)
        options = []
        for v in (1, 2):
            most = target.most_pixels(v)
            options.append(base.replace(tile_oc=min(8, most), tile_px=lanes * v))
            options += [
                base.replace(lanes="channels", tile_oc=lanes * v, tile_px=p) for p in range(4, min(lanes, most) + 1)
            ]
        options += [p.replace(parallel_oc=2) for p in options]
        options = [p for p in options if self.reason_against(spec, target, p) is None]
        picks = min(options, key=lambda p: self._cycles(spec, target, p), default=base)
        # What a task copies has to stay in its core's cache.
        most = max(1, target.l2 // 2 // (4 * len(PIXELS) * spec.ic // 2 * round_up(picks.tile_px, lanes)))
        blocks = [b for b in (1, 2, 3, 4, 6, 8) if b <= most]
        split = [picks.replace(parallel_oc=p, block_px=b) for b in blocks for p in (1, 2, 3, 4, 8)]
        split = [p for p in split if self.reason_against(spec, target, p) is None]
        return min(split, key=lambda p: self._cycles(spec, target, p))

    def _cycles(self, spec, target, picks):
        """Cycles of the busiest core: products, the copy, the stores."""
        lanes, across = target.lanes, picks.lanes == "pixels"
        tiles, rest = divmod(spec.out_pixels, 2 * picks.tile_px)
        halves = [(picks.tile_px, tiles), (_edge(rest, picks, lanes), int(rest > 0))]
        half_oc, half_ic = spec.oc // 2, spec.ic // 2
        filled = round_up(half_oc, picks.tile_oc if across else lanes)
        one_vector = (picks.tile_px if across else picks.tile_oc) == lanes
        pixels = sum(half * count for half, count in halves)
        loads = 1.01 if across else 1.02 + 0.5 / picks.tile_px
        products = pixels * filled / lanes * 7 * half_ic * (loads + 0.04 * one_vector)
        copy = sum(round_up(half, lanes) * count for half, count in halves) / lanes * half_ic * 24
        back = pixels * filled / lanes * (42 if across else 70)
        share = _largest_share([half for half, count in halves for _ in range(count)], picks, spec.n, target.cores)
        stores = 1 + 0.04 / picks.block_px if across else 1.0
        return spec.n * share * (products * stores + back + copy * picks.parallel_oc)

    def cost(self, spec, target):
        cycles = self._cycles(spec, target, self.default(spec, target))
        return cycles * 2 * target.lanes * target.cores / target.peak_flops

    def program(self, spec, target, picks):
        ops, t = Operands(spec), picks.tile_oc
        half_oc, half_ic = spec.oc // 2, spec.ic // 2
        channel = te.reduce_axis((0, spec.ic), "c")
        point = (0,) * spec.rank
        largest = te.compute(
            (spec.oc,), lambda o: te.max(tirx.abs(ops.weights[(o, channel, *point)]), axis=channel), name="largest"
        )

        def power(o):
            """Of two, of the largest weight: no less than the smallest normal number."""
            exponent = tirx.reinterpret("int32", largest[o]) & tirx.const(0x7F800000, "int32")
            return tirx.reinterpret("float32", tirx.max(exponent, tirx.const(0x00800000, "int32")))

        def packed_weights(b, product, c, lane):
            o = tirx.min(b * t + lane, half_oc - 1)

            def block(row, column):
                index = o + row * half_oc
                return ops.weights[(index, c + column * half_ic, *point)] / power(index)

            blocks = [block(row, column) for row in (0, 1) for column in (0, 1)]
            value = _sum(WEIGHTS[-1], blocks)
            for index in range(len(WEIGHTS) - 2, -1, -1):
                value = tirx.if_then_else(product == index, _sum(WEIGHTS[index], blocks), value)
            return value

        def packed_scale(o):
            # Exactly zero where all weights are.
            return tirx.Select(largest[o] > tirx.const(0, ACCUMULATOR), power(o), tirx.const(0, ACCUMULATOR))

        shape = (ceildiv(half_oc, t), len(WEIGHTS), half_ic, t)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p) for p in ops.parameters[1:]]
        packed += [te.compute((spec.oc,), packed_scale, name="scale_packed")]
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, target.lanes, *buffers))


def _largest_share(sizes, picks, images, cores):
    """The share of all tiles' work that the busiest core has; ``sizes`` are the tiles'."""
    blocks = [sum(sizes[i : i + picks.block_px]) for i in range(0, len(sizes), picks.block_px)]
    tasks = blocks * picks.parallel_oc * images
    if len(tasks) > 64 * cores:
        return 1 / cores
    return busiest(tasks, cores) / sum(tasks)


def _sum(factors, values):
    """What is subtracted comes last, so that little is negated."""
    return weighted_sum(sorted(zip(factors, values, strict=True), key=lambda pair: -pair[0]))


def _edge(rest, picks, lanes):
    """Pixels per half of a tile that has but ``rest``."""
    half = ceildiv(rest, 2)
    return round_up(half, lanes) if picks.lanes == "pixels" else half


def _kernel(spec, picks, lanes, src, residual, parameters, dst):
    """All of the layer: a loop over tiles of pixels and parts of the channels."""
    pixels, half_ic, half_oc = spec.out_pixels, spec.ic // 2, spec.oc // 2
    across = picks.lanes == "pixels"
    step = 2 * picks.tile_px
    tiles, rest = ceildiv(pixels, step), pixels % step
    per_task = ceildiv(ceildiv(half_oc, picks.tile_oc), picks.parallel_oc)
    weights = parameters.pop("weights")
    whole = Block()
    origin = [0] * (spec.rank - 1)  # pixels are flat: as if all in the first row

    def copy(block, operands, i, n, x, half, counts):
        """The operands of a tile of two times ``half`` pixels, of which there are ``counts``."""
        with block.loop(half_ic) as (inner, c):
            for v in range(0, half, lanes):
                parts = [
                    inner.let(load(src, stored, [n - image, c + row, x + at + v], lanes, min(lanes, count - v)))
                    for row in (0, half_ic)
                    for at, count in zip((0, half), counts, strict=True)
                ]
                for p, factors in enumerate(PIXELS):
                    inner.add(store(operands, "f32", [i, p, c, v], _sum(factors, parts), lanes, lanes))

    def products(block, operands, i, n, b, channels, x, half, counts):
        """``channels`` of block b in both halves, for the tile of pixels at x."""
        along, others = (half, channels) if across else (round_up(channels, lanes), half)
        keys = [(i, v) for i in range(others) for v in range(0, along, lanes)]
        slots = {key: slot for slot, key in enumerate(keys)}
        kept = block.buffer((2, len(keys), lanes))

        def accumulate(sums, p):
            pixel, channel = (operands, i), (weights, b)
            (vectors, at), (scalars, place) = (pixel, channel) if across else (channel, pixel)
            outer_products(
                block,
                sums,
                half_ic,
                lambda t, c: scalars[place, p, c, t],
                lambda v, c: load(vectors, "f32", [at, p, c, v], lanes, lanes),
            )

        def keep(sums, index):
            for key, slot in slots.items():
                block.add(store(kept, "f32", [index, slot, 0], sums[key], lanes, lanes))

        def recall(sums, index):
            for key, slot in slots.items():
                sums.add(block, key, load(kept, "f32", [index, slot, 0], lanes, lanes))

        def rows(value):
            """``(channel, first pixel, vector of pixels)`` of all sums."""
            if across:
                yield from ((t, v, value((t, v))) for t, v in keys)
                return
            for v in range(0, along, lanes):
                columns = [block.let(value((i, v))) if i < half else zeros(lanes) for i in range(lanes)]
                turned = interleave(block, columns, lanes)
                yield from ((v + t, 0, turned[t]) for t in range(min(lanes, channels - v)))

        def complete(row, column, value):
            """Epilogue and store of one of the four blocks."""
            for t, v, total in rows(value):
                count = min(lanes, counts[column] - v)
                if count <= 0:
                    continue
                o = b * picks.tile_oc + t + row * half_oc
                given = {name: tirx.Broadcast(vector[o], lanes) for name, vector in parameters.items()}
                at = [n, o, *origin, x + (column * half + v)]
                finish(block, spec, dst, residual, at, total * given.pop("scale"), lanes, count, **given)

        # P1 + P2 = C11; P1 + P6 = U2; U2 + P7 = U3; U3 - P4 = C21; U3 + P5 = C22; U2 + P5 + P3 = C12.
        sums = block.registers(keys, lanes)
        accumulate(sums, 0)
        keep(sums, 0)
        accumulate(sums, 1)
        complete(0, 0, sums.__getitem__)
        sums = block.registers(keys, lanes)
        recall(sums, 0)
        accumulate(sums, 2)
        keep(sums, 0)
        accumulate(sums, 3)
        keep(sums, 1)
        accumulate(sums, 4)
        complete(1, 0, sums.__getitem__)
        sums = block.registers(keys, lanes)
        accumulate(sums, 5)
        complete(1, 1, lambda key: sums[key] + load(kept, "f32", [1, slots[key], 0], lanes, lanes))
        recall(sums, 0)
        accumulate(sums, 6)
        complete(0, 1, sums.__getitem__)

    blocks = ceildiv(tiles, picks.block_px)
    with (
        subsampled(whole, spec, src, lanes) as (batch, images, image, src, stored),
        batch.loop(images * picks.parallel_oc * blocks, parallel=True) as (task, index),
    ):
        block, outer = task.let(index % blocks), index // blocks
        part, n = task.let(outer % picks.parallel_oc), task.let(image + outer // picks.parallel_oc)
        operands = task.buffer((picks.block_px, len(PIXELS), half_ic, round_up(picks.tile_px, lanes)))
        first = task.let(block * picks.block_px)
        count = task.let(tirx.min(picks.block_px, tiles - first)) if picks.block_px > 1 else 1
        smaller = _edge(rest, picks, lanes)
        full, edge = (picks.tile_px, (picks.tile_px,) * 2), (smaller, (min(smaller, rest), max(0, rest - smaller)))

        def tiles_of(block):
            """Code for each of the block's tiles: ``(block, i, x, half, counts)``."""
            with block.loop(count) as (one, i):
                tile = one.let(first + i)
                for these, (half, counts) in one.cases(tile, pixels // step, full, edge if rest else None):
                    yield these, i, these.let(tile * step), half, counts

        for these, i, x, half, counts in tiles_of(task):
            copy(these, operands, i, n, x, half, counts)
        with task.loop(per_task) as (inside, j):
            b = inside.let(part * per_task + j)
            whole_blocks, remaining = divmod(half_oc, picks.tile_oc)
            for those, channels in inside.cases(b, whole_blocks, picks.tile_oc, remaining):
                for these, i, x, half, counts in tiles_of(those):
                    products(these, operands, i, n, b, channels, x, half, counts)
    return whole.statement()
