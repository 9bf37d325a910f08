"""1×1 convolution as a matrix product with 7 multiplications for 8: Strassen's algorithm, one level.

Applies to  dense 1×1 kernels without padding, NCHW, even channel counts, many pixels and channels;
            accuracy `relaxed`.
Strategy    Winograd's form of Strassen's algorithm on halves of the output channels, of the input channels, and of a
            tile's pixels: C = A B with 7 products of half the size. A are the weights.
            1. Pack the sums of weights as [oc/2/t][product][ic/2][t], each output channel scaled by the power of two
               of its largest weight: channels meet in sums, and small ones must not drown in large ones.
            2. A tile of pixels is copied once, as the seven operands [product][ic/2][tile_px].
            3. Pixels in the lanes as in cpu_gemm: one product after the other in registers, each added to the
               sums that it continues; three of these sums wait in memory until a second block needs them.
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

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tvm import te, tirx

from convgen.cpu.product import multiply
from convgen.cpu.vector import (
    Block,
    Registers,
    finish,
    interleave,
    load,
    store,
    subsampled,
    weighted_sum,
    written,
    zeros,
)
from convgen.hardware.target import Target
from convgen.lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv, copied, round_up
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Space, Written, busiest, require
from convgen.problem.spec import ConvSpec

#: Weights of the seven products, as multiples of the blocks (11, 12, 21, 22), in the order they are summed in.
WEIGHTS = ((1, 0, 0, 0), (0, 1, 0, 0), (-1, 0, 1, 1), (1, 0, -1, 0), (0, 0, 0, -1), (0, 0, 1, 1), (1, 1, -1, -1))
#: Pixels of the seven products, likewise.
PIXELS = ((1, 0, 0, 0), (0, 0, 1, 0), (1, -1, 0, 1), (0, -1, 0, 1), (1, -1, -1, 1), (-1, 1, 0, 0), (0, 0, 0, 1))


class CpuStrassen(Written):
    id, version = "cpu_strassen", 1
    transforms = True

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(spec.accuracy == "relaxed", "mixes channels: needs accuracy relaxed")
        require(spec.has_unit_kernel and spec.groups == 1, "needs a dense 1×1 kernel, no padding, not transposed")
        require(spec.stride[-1] <= 8, "needs a stride along the row of at most 8")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.ic % 2 == spec.oc % 2 == 0, "needs even numbers of channels")
        require(spec.oc >= 8, "needs at least 8 output channels")
        require(spec.out_pixels > target.lanes, f"needs more than {target.lanes} pixels")

    def space(self, spec: ConvSpec, target: Target) -> Space:
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

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        lanes, pixels = target.lanes, picks.lanes == "pixels"
        vector, other = (picks.tile_px, picks.tile_oc) if pixels else (picks.tile_oc, picks.tile_px)
        require(vector % lanes == 0, f"{picks.lanes} in the lanes: needs whole vectors of them")
        require(pixels or other <= lanes, f"at most {lanes} pixels where channels are in the lanes")
        most = target.most_pixels(vector // lanes)
        require(other <= most, f"{other} × {vector // lanes} vectors in a tile, registers for {most}")
        require(picks.parallel_oc <= ceildiv(spec.oc // 2, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
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
        picks = min(options, key=lambda p: _cycles(spec, target, p), default=base)
        # What a task copies has to stay in its core's cache.
        most = max(1, target.l2 // 2 // (4 * len(PIXELS) * spec.ic // 2 * round_up(picks.tile_px, lanes)))
        blocks = [b for b in (1, 2, 3, 4, 6, 8) if b <= most]
        split = [picks.replace(parallel_oc=p, block_px=b) for b in blocks for p in (1, 2, 3, 4, 8)]
        split = [p for p in split if self.reason_against(spec, target, p) is None]
        return min(split, key=lambda p: _cycles(spec, target, p))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        cycles = _cycles(spec, target, self.default(spec, target))
        return float(cycles * 2 * target.lanes * target.cores / target.peak_flops)

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        """A factor of a product is at most the sum of its four blocks, and an output has at most four products."""
        plane = (slice(None, None, step) for step in spec.stride)
        pixels = src[(slice(None), slice(None), *plane)].reshape(spec.n, 2, spec.ic // 2, -1).sum(1)
        whole = spec.out_pixels // (2 * picks.tile_px) * 2 * picks.tile_px
        edge = _edge(spec.out_pixels - whole, picks, target.lanes)
        parts = [_over_halves(pixels[..., :whole], picks.tile_px), _over_halves(pixels[..., whole:], edge)]
        channels = weights.reshape(spec.oc, 2, spec.ic // 2).sum(1)
        largest = np.maximum(weights.reshape(spec.oc, -1).max(1), 2.0**-126)
        power = np.exp2(np.floor(np.log2(largest)))
        scaled = (channels / power[:, None]).reshape(2, spec.oc // 2, -1).sum(0)
        mixed = 4 * power[:, None] * np.concatenate([scaled, scaled])
        flat = spec.with_(
            ic=spec.ic // 2,
            in_spatial=(spec.out_pixels,),
            kernel=(1,),
            stride=(1,),
            padding=((0, 0),),
            dilation=(1,),
            output_padding=(0,),
        )
        return Magnitudes(flat, np.concatenate(parts, -1), mixed[..., None].astype(np.float32))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec)
        weights, scale = _packed_weights(ops, picks.tile_oc)
        packed = [weights, *(copied(p) for p in ops.parameters[1:]), scale]
        return written(ops, packed, lambda *buffers: _Kernel(spec, picks, target.lanes, *buffers).statement())


def _cycles(spec: ConvSpec, target: Target, picks: Picks) -> float:
    """Cycles of the busiest core: products, the copy, the way back to the four blocks of the output."""
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
    return float(spec.n * share * (products * stores + back + copy * picks.parallel_oc))


def _largest_share(sizes: Sequence[int], picks: Picks, images: int, cores: int) -> float:
    """The share of all tiles' work that the busiest core has; ``sizes`` are the tiles'."""
    blocks = [sum(sizes[i : i + picks.block_px]) for i in range(0, len(sizes), picks.block_px)]
    tasks = blocks * picks.parallel_oc * images
    if len(tasks) > 64 * cores:
        return 1 / cores
    return float(busiest(tasks, cores) / sum(tasks))


def _sum(factors: Sequence[int], values: Sequence[Expr]) -> Expr:
    """The sum of ``values`` times ``factors``; subtracted ones come last, so that little is negated."""
    return weighted_sum(sorted(zip(factors, values, strict=True), key=lambda pair: -pair[0]))


def _over_halves(pixels: Array, half: int) -> Array:
    """Sums of the two halves of each tile, for every pixel; the last axis is pixels, whole tiles or less than one."""
    *front, count = pixels.shape
    if not count:
        return pixels
    padded = np.pad(pixels, [(0, 0)] * len(front) + [(0, -count % (2 * half))])
    halves = padded.reshape(*front, -1, 2, half)
    sums: Array = (halves + halves[..., ::-1, :]).reshape(*front, -1)[..., :count]
    return sums


def _edge(rest: int, picks: Picks, lanes: int) -> int:
    """Pixels per half of the last tile, which has only ``rest``."""
    half = ceildiv(rest, 2)
    return round_up(half, lanes) if picks.lanes == "pixels" else half


def _packed_weights(ops: Operands, tile: int) -> tuple[te.Tensor, te.Tensor]:
    """The products' sums of weights ``[oc/2/t][product][ic/2][t]``, and the powers of two ``[oc]`` that scale back."""
    spec, point = ops.spec, (0,) * ops.spec.rank
    half_oc, half_ic = spec.oc // 2, spec.ic // 2
    c = te.reduce_axis((0, spec.ic), "c")
    largest = te.compute((spec.oc,), lambda oc: te.max(tirx.abs(ops.weights[(oc, c, *point)]), axis=c), name="largest")

    def power(oc: Expr) -> Expr:
        """The power of two at or below the channel's largest weight, but no less than the smallest normal number."""
        exponent = tirx.reinterpret("int32", largest[oc]) & tirx.const(0x7F800000, "int32")
        return tirx.reinterpret("float32", tirx.max(exponent, tirx.const(0x00800000, "int32")))

    def weights(b: Expr, product: Expr, c: Expr, lane: Expr) -> Expr:
        first_oc = tirx.min(b * tile + lane, half_oc - 1)

        def quarter(row: int, column: int) -> Expr:
            oc = first_oc + row * half_oc
            return ops.weights[(oc, c + column * half_ic, *point)] / power(oc)

        quarters = [quarter(row, column) for row in (0, 1) for column in (0, 1)]
        value = _sum(WEIGHTS[-1], quarters)
        for index in range(len(WEIGHTS) - 2, -1, -1):
            value = tirx.if_then_else(product == index, _sum(WEIGHTS[index], quarters), value)
        return value

    def scale(oc: Expr) -> Expr:
        # Exactly zero where all weights are.
        return tirx.Select(largest[oc] > tirx.const(0, ACCUMULATOR), power(oc), tirx.const(0, ACCUMULATOR))

    shape = (ceildiv(half_oc, tile), len(WEIGHTS), half_ic, tile)
    return te.compute(shape, weights, name="weights_packed"), te.compute((spec.oc,), scale, name="scale_packed")


class _Tile(NamedTuple):
    """A tile of pixels in two halves.

    Attributes:
        slot: which of its task's tiles it is.
        x: its first pixel.
        half: pixels from the first half to the second: what the operands have.
        counts: pixels of the image in each half.
    """

    slot: Expr
    x: Expr
    half: int
    counts: tuple[int, int]


class _Task(NamedTuple):
    """What a task works on: a block of tiles of an image, and a part of the output channels.

    Attributes:
        n: the image.
        first, count: the first tile of the block, and how many there are.
        part: the part of the channels.
        operands: ``[tile][product][ic/2][pixel]``, the second operands of the products.
    """

    n: Expr
    first: Expr
    count: Expr
    part: Expr
    operands: Any


class _Pixels(NamedTuple):
    """What is read: ``[image][ic][pixel]``, stored as ``dtype``, from the image number ``first`` on."""

    buffer: Any
    dtype: str
    first: Expr


class _Kernel:
    """All of the layer: a loop over blocks of tiles of pixels and parts of the channels."""

    def __init__(
        self,
        spec: ConvSpec,
        picks: Picks,
        lanes: int,
        src: Any,
        residual: Any,
        parameters: Mapping[str, Any],
        dst: Any,
    ) -> None:
        self.spec, self.picks, self.lanes = spec, picks, lanes
        self.src, self.residual, self.dst = src, residual, dst
        self.weights = parameters["weights"]
        self.vectors = {name: vector for name, vector in parameters.items() if name != "weights"}
        self.half_oc, self.half_ic = spec.oc // 2, spec.ic // 2
        self.tiles = ceildiv(spec.out_pixels, 2 * picks.tile_px)

    def statement(self) -> Any:
        picks, whole = self.picks, Block()
        blocks = ceildiv(self.tiles, picks.block_px)
        with (
            subsampled(whole, self.spec, self.src, self.lanes) as (batch, images, first_image, buffer, dtype),
            batch.loop(images * picks.parallel_oc * blocks, parallel=True) as (body, index),
        ):
            block, outer = body.let(index % blocks), index // blocks
            part, n = body.let(outer % picks.parallel_oc), body.let(first_image + outer // picks.parallel_oc)
            operands = body.buffer((picks.block_px, len(PIXELS), self.half_ic, round_up(picks.tile_px, self.lanes)))
            first = body.let(block * picks.block_px)
            count = body.let(tirx.min(picks.block_px, self.tiles - first)) if picks.block_px > 1 else 1
            task, pixels = _Task(n, first, count, part, operands), _Pixels(buffer, dtype, first_image)
            for branch, tile in self._tiles_of(body, task):
                self._copy(branch, pixels, task, tile)
            self._add_channels(body, task)
        return whole.statement()

    def _tiles_of(self, block: Block, task: _Task) -> Iterator[tuple[Block, _Tile]]:
        """Code for each tile of a task's block; a smaller last one has its own."""
        size, lanes = self.picks.tile_px, self.lanes
        full, rest = divmod(self.spec.out_pixels, 2 * size)
        half = _edge(rest, self.picks, lanes)
        edge = (half, (min(half, rest), max(0, rest - half))) if rest else None
        with block.loop(task.count) as (inner, slot):
            number = inner.let(task.first + slot)
            for branch, (half, counts) in inner.cases(number, full, (size, (size, size)), edge):
                yield branch, _Tile(slot, branch.let(number * (2 * size)), half, counts)

    def _copy(self, block: Block, pixels: _Pixels, task: _Task, tile: _Tile) -> None:
        """Make the operands of a tile: sums of its four blocks, of two halves of channels and two of pixels."""
        lanes = self.lanes
        with block.loop(self.half_ic) as (inner, c):
            for v in range(0, tile.half, lanes):
                blocks = []
                for row in (0, self.half_ic):
                    for start, count in zip((0, tile.half), tile.counts, strict=True):
                        place = [task.n - pixels.first, c + row, tile.x + start + v]
                        blocks.append(inner.let(load(pixels.buffer, pixels.dtype, place, lanes, min(lanes, count - v))))
                for product, factors in enumerate(PIXELS):
                    value = _sum(factors, blocks)
                    inner.add(store(task.operands, "f32", [tile.slot, product, c, v], value, lanes, lanes))

    def _add_channels(self, body: Block, task: _Task) -> None:
        """Every block of the task's channels times every tile."""
        tile_oc = self.picks.tile_oc
        full, rest = divmod(self.half_oc, tile_oc)
        per_task = ceildiv(ceildiv(self.half_oc, tile_oc), self.picks.parallel_oc)
        with body.loop(per_task) as (inner, number):
            channel_block = inner.let(task.part * per_task + number)
            for branch, channels in inner.cases(channel_block, full, tile_oc, rest):
                for tile_branch, tile in self._tiles_of(branch, task):
                    _TileProducts(self, tile_branch, task, tile, channel_block, channels).add()


class _TileProducts:
    """The products of a tile of pixels with ``channels`` of a block, in each half of either.

    Its sums have keys ``(channel, first pixel of a vector)``; with channels in the lanes, ``(pixel, first channel of a
    vector)``.
    """

    def __init__(
        self, kernel: _Kernel, block: Block, task: _Task, tile: _Tile, channel_block: Expr, channels: int
    ) -> None:
        self.kernel, self.block, self.lanes = kernel, block, kernel.lanes
        self.task, self.tile, self.channel_block, self.channels = task, tile, channel_block, channels
        self.across = kernel.picks.lanes == "pixels"
        along, others = (tile.half, channels) if self.across else (round_up(channels, self.lanes), tile.half)
        self.along = range(0, along, self.lanes)
        self.keys = [(i, v) for i in range(others) for v in self.along]
        self.slots = {key: slot for slot, key in enumerate(self.keys)}
        self.waiting = block.buffer((2, len(self.keys), self.lanes))

    def add(self) -> None:
        """P1 + P2 = C11; P1 + P6 = U2; U2 + P7 = U3; U3 - P4 = C21; U3 + P5 = C22; U2 + P5 + P3 = C12.

        These are the literature's numbers; :data:`WEIGHTS` has the products in the order P1 P2 P6 P7 -P4 P5 P3.
        """
        sums = self._registers()
        self._accumulate(sums, 0)
        self._keep(sums, 0)
        self._accumulate(sums, 1)
        self._finish(0, 0, sums.__getitem__)
        sums = self._registers()
        self._recall(sums, 0)
        self._accumulate(sums, 2)
        self._keep(sums, 0)
        self._accumulate(sums, 3)
        self._keep(sums, 1)
        self._accumulate(sums, 4)
        self._finish(1, 0, sums.__getitem__)
        sums = self._registers()
        self._accumulate(sums, 5)
        self._finish(1, 1, lambda key: sums[key] + self._kept(key, 1))
        self._recall(sums, 0)
        self._accumulate(sums, 6)
        self._finish(0, 1, sums.__getitem__)

    def _registers(self) -> Registers:
        return self.block.registers(self.keys, self.lanes)

    def _accumulate(self, sums: Registers, product: int) -> None:
        """Add a product."""
        pixels, weights = (self.task.operands, self.tile.slot), (self.kernel.weights, self.channel_block)
        (vectors, at), (scalars, place) = (pixels, weights) if self.across else (weights, pixels)
        multiply(
            self.block,
            sums,
            self.kernel.half_ic,
            lambda i, c: scalars[place, product, c, i],
            lambda v, c: load(vectors, "f32", [at, product, c, v], self.lanes, self.lanes),
        )

    def _keep(self, sums: Registers, place: int) -> None:
        """Write the sums down, in the first or second place."""
        for key, slot in self.slots.items():
            self.block.add(store(self.waiting, "f32", [place, slot, 0], sums[key], self.lanes, self.lanes))

    def _kept(self, key: tuple[int, int], place: int) -> Expr:
        return load(self.waiting, "f32", [place, self.slots[key], 0], self.lanes, self.lanes)

    def _recall(self, sums: Registers, place: int) -> None:
        """Add what was written down."""
        for key in self.keys:
            sums.add(self.block, key, self._kept(key, place))

    def _rows(self, value: Callable[[tuple[int, int]], Expr]) -> Iterator[tuple[int, int, Expr]]:
        """``(channel, first pixel, vector of pixels)`` of all sums, where ``value`` gives that of a key."""
        if self.across:
            yield from ((i, v, value((i, v))) for i, v in self.keys)
            return
        for v in self.along:
            pixels = range(self.lanes)
            columns = [self.block.let(value((i, v))) if i < self.tile.half else zeros(self.lanes) for i in pixels]
            turned = interleave(self.block, columns, self.lanes)
            yield from ((v + i, 0, turned[i]) for i in range(min(self.lanes, self.channels - v)))

    def _finish(self, row: int, column: int, value: Callable[[tuple[int, int]], Expr]) -> None:
        """Epilogue and store of one of the four blocks: a half of the channels and a half of the pixels."""
        kernel, tile, lanes = self.kernel, self.tile, self.lanes
        spec, before = kernel.spec, [0] * (kernel.spec.rank - 1)  # pixels are flat: as if all lay in the first row
        for i, v, total in self._rows(value):
            count = min(lanes, tile.counts[column] - v)
            if count <= 0:
                continue
            oc = self.channel_block * kernel.picks.tile_oc + i + row * kernel.half_oc
            given = {name: tirx.Broadcast(vector[oc], lanes) for name, vector in kernel.vectors.items()}
            place = [self.task.n, oc, *before, tile.x + (column * tile.half + v)]
            total = total * given.pop("scale")
            finish(self.block, spec, kernel.dst, kernel.residual, place, total, lanes, count, **given)
