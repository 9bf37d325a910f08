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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, pack_channels, widen
from convgen.lowering.schedule import Picks, Program, Space, Written, busiest, require
from convgen.problem.spec import ConvSpec

#: Parts of the channels, and tiles of pixels in a task.
PARTS, BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 4, 8, 16)

# What `cost` counts. Its unit is the time after which a core begins the next FMA: a cycle, or half of it where two
# begin at once. Fitted to measured kernels, not measured alone.
#: Cycles from one FMA to the next on the same sum.
FMA_LATENCY = 5.5
#: A vector of weights on its way from the L2 cache.
FAR_WEIGHTS = 3
#: Copying the vector of one channel's pixels: within a task (`copy_src`), and from rows read with a stride.
COPY, STRIDED_COPY = 6, 9
#: Storing a channel's row of a tile: a whole vector; one with a mask; the same before AVX-512, where masks are slow.
STORE, MASKED_STORE, SLOW_MASKED_STORE = 4.3, 5.7, 30


class CpuGemmChannels(Written):
    id, version = "cpu_gemm_channels", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(spec.has_unit_kernel and spec.groups == 1, "needs a dense 1×1 kernel, no padding, not transposed")
        require(spec.stride[-1] <= 8, "needs a stride along the row of at most 8")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.out_pixels > 1, "needs several pixels: with one, each weight is loaded for a single product")
        require(spec.oc > target.lanes // 2, f"needs more than {target.lanes // 2} output channels")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes = target.lanes
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if lanes * (v - 1) < spec.oc],
            tile_px=[p for p in range(1, lanes + 1) if p <= spec.out_pixels],
            parallel_oc=list(PARTS),
            block_px=list(BLOCKS),
            copy_src=[False, True],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most = target.most_pixels(picks.tile_oc // target.lanes)
        require(picks.tile_px <= most, f"{picks.tile_px} pixels in a tile, registers for {most}")
        vectors = ceildiv(spec.oc, target.lanes)
        require(picks.parallel_oc <= vectors, "fewer vectors of channels than parallel_oc")
        require(picks.tile_oc <= target.lanes * ceildiv(vectors, picks.parallel_oc), "tile_oc exceeds the largest part")
        tiles = ceildiv(spec.out_pixels, picks.tile_px)
        require(picks.block_px < 2 * tiles, f"{picks.block_px} tiles in a block, the image has {tiles}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        lanes, space = target.lanes, self.space(spec, target).domains
        vectors = ceildiv(spec.oc, lanes)
        copy_src = spec.is_pointwise and spec.dtype != "f32"  # otherwise they were converted at every product
        base = Picks(tile_oc=lanes, tile_px=1, parallel_oc=1, block_px=1, copy_src=copy_src)
        tiles = [base.replace(tile_oc=o, tile_px=p) for o in space["tile_oc"] for p in space["tile_px"]]

        def fits(picks: Picks) -> bool:
            """Whether four registers are left beside the sums: with fewer the transposition spills them."""
            width = picks.tile_oc // lanes
            most = min((target.vector_registers - 4) // width, target.most_pixels(width))
            return bool(picks.tile_px <= most)

        tiles = [picks for picks in tiles if fits(picks)]
        base = min(tiles, key=lambda picks: sum(map(math.prod, _image_cycles(spec, target, picks, vectors))))
        # What a task reads for every block of channels has to stay in its core's cache, beside weights that pass.
        most_tiles = max(1, target.l2 // 8 // (4 * spec.ic * base.tile_px))
        splits = [
            base.replace(tile_oc=min(base.tile_oc, lanes * ceildiv(vectors, p)), parallel_oc=p, block_px=b)
            for p in PARTS
            for b in BLOCKS
            if b <= most_tiles
        ]
        splits = [picks for picks in splits if self.reason_against(spec, target, picks) is None]

        def penalty(picks: Picks) -> float:
            """Time; among equals large blocks, for long runs of stores, and few parts, which all read the pixels."""
            cycles = self._cycles(spec, target, picks)
            return cycles * (1 + 0.01 / int(picks.block_px) + 0.001 * int(picks.parallel_oc))

        return min(splits, key=penalty)

    def _cycles(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Time of the busiest core, in FMAs."""
        lanes, cores = target.lanes, target.cores
        sizes = _part_sizes(ceildiv(spec.oc, lanes), picks.parallel_oc)
        cycles_of = {size: _image_cycles(spec, target, picks, size) for size in set(sizes)}
        runs = [run for size in sizes for run in cycles_of[size]]
        if spec.n * sum(count for count, _ in runs) > 64 * cores:  # so many tasks that all cores have as much to do
            most = spec.n * sum(map(math.prod, runs)) / cores
        else:
            most = busiest([cycles for count, cycles in runs for _ in range(count)] * spec.n, cores)
        if spec.is_pointwise:
            return most
        *rows, width = spec.out_spatial
        return most + STRIDED_COPY * spec.n * spec.ic * math.prod(rows) * ceildiv(width, lanes) / cores

    def cost(self, spec: ConvSpec, target: Target) -> float:
        cycles = self._cycles(spec, target, self.default(spec, target))
        return cycles * 2 * target.lanes * target.cores / (0.95 * target.peak_flops)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec)
        packed, _ = pack_channels(ops, target.lanes)
        return written(ops, packed, lambda *buffers: _Kernel(spec, picks, target.lanes, *buffers).statement())


def _part_sizes(vectors: int, parts: int) -> list[int]:
    """Vectors of channels of each part."""
    return [vectors * (p + 1) // parts - vectors * p // parts for p in range(parts)]


def _image_cycles(spec: ConvSpec, target: Target, picks: Picks, vectors: int) -> list[tuple[int, float]]:
    """What the blocks of an image's tiles take with so many vectors of channels: ``(blocks, cycles of each)``.

    All blocks but the last take as long as each other.
    """
    lanes, fmas = target.lanes, target.fmas  # FMAs that begin beside two loads
    full, rest = divmod(spec.out_pixels, picks.tile_px)
    many, left = divmod(vectors, picks.tile_oc // lanes)
    widths = [(picks.tile_oc // lanes, many), (left, int(left > 0))]

    def tile(pixels: int) -> float:
        """A tile's products or what takes longer (loads, weights from the L2 cache, a sum's latency), its copy, and its
        transposed stores.
        """
        products = sum(
            times * max(width * pixels, fmas / 2 * (width + pixels), FAR_WEIGHTS * width, FMA_LATENCY * fmas)
            for width, times in widths
        )
        masked_store = MASKED_STORE if lanes == 16 else SLOW_MASKED_STORE
        store = STORE if pixels == lanes else masked_store
        return float(spec.ic * (products + COPY * picks.copy_src) + store * lanes * vectors)

    blocks, more = divmod(full, picks.block_px)
    last = more * tile(picks.tile_px) + (tile(rest) if rest else 0)
    return [(blocks, picks.block_px * tile(picks.tile_px)), (int(last > 0), last)]


class _Task(NamedTuple):
    """What one task works on."""

    #: The image's index in the batch, and in ``pixels``.
    image: Expr
    copy_image: Expr
    #: What the kernel reads, ``[images, ic, pixels]`` stored as ``dtype``.
    pixels: tirx.Buffer
    dtype: str
    #: The tiles of pixels: the first, and how many.
    first: Expr
    count: Expr
    #: With ``copy_src`` the pixels of these tiles, ``[tile, ic, lanes]``; else None.
    panels: tirx.Buffer


class _Tile(NamedTuple):
    """A tile of pixels: its index in the task, its first pixel, and how many there are."""

    index: Expr
    x: Expr
    pixels: int


@dataclass(frozen=True)
class _Kernel:
    """The statements of the whole layer."""

    spec: ConvSpec
    picks: Picks
    lanes: int
    src: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer

    def statement(self) -> tirx.Stmt:
        """The parallel loop over images, parts of the channels and blocks of tiles, around what a task does."""
        spec, picks, parts = self.spec, self.picks, self.picks.parallel_oc
        tiles = ceildiv(spec.out_pixels, picks.tile_px)
        blocks = ceildiv(tiles, picks.block_px)
        whole = Block()
        with (
            subsampled(whole, spec, self.src, self.lanes) as (batch, images, first_image, pixels, dtype),
            batch.loop(images * parts * blocks, parallel=True) as (body, index),
        ):
            block, outer = body.let(index % blocks), index // blocks
            part, image = body.let(outer % parts), body.let(first_image + outer // parts)
            first, count = body.let(block * picks.block_px), picks.block_px
            if tiles % picks.block_px:
                count = body.let(tirx.min(picks.block_px, tiles - first))
            panels = body.buffer((picks.block_px, spec.ic, self.lanes)) if picks.copy_src else None
            task = _Task(image, image - first_image, pixels, dtype, first, count, panels)
            if picks.copy_src:
                for tile_body, tile in self.tiles(body, task):
                    self.copy(tile_body, task, tile)
            for channels_body, vector, width in self.channel_blocks(body, part):
                for tile_body, tile in self.tiles(channels_body, task):
                    self.product(tile_body, task, tile, vector, width)
        return whole.statement()

    def channel_blocks(self, body: Block, part: Expr) -> Iterator[tuple[Block, Expr, int]]:
        """Code for the blocks of channels of a part: ``(its body, its first vector of channels, its vectors)``.

        First the full blocks; then what is left, a case for each size that the rest of a part may have.
        """
        parts, width = self.picks.parallel_oc, self.picks.tile_oc // self.lanes
        vectors = ceildiv(self.spec.oc, self.lanes)
        start, end = (body.let(p * vectors // parts) for p in (part, part + 1))
        with body.loop(vectors // width if parts == 1 else body.let((end - start) // width)) as (full, i):
            yield full, full.let(start + i * width), width
        sizes = set(_part_sizes(vectors, parts))
        for left in {size % width for size in sizes} - {0}:
            first = body.let(end - left)
            with body.when(True if len(sizes) == 1 else (end - start) % width == left) as rest:
                yield rest, first, left

    def tiles(self, body: Block, task: _Task) -> Iterator[tuple[Block, _Tile]]:
        """Code for each tile of a task: full ones, and the last one of the image, which may have fewer pixels."""
        tile_px = self.picks.tile_px
        full, rest = divmod(self.spec.out_pixels, tile_px)
        with body.loop(task.count) as (pass_body, i):
            tile = pass_body.let(task.first + i)
            for case, pixels in pass_body.cases(tile, full, tile_px, rest):
                yield case, _Tile(i, case.let(tile * tile_px), pixels)

    def copy(self, body: Block, task: _Task, tile: _Tile) -> None:
        """Copy the tile's pixels to its panel as f32, one input channel after another."""
        with body.loop(self.spec.ic) as (step, c):
            value = load(task.pixels, task.dtype, [task.copy_image, c, tile.x], self.lanes, tile.pixels)
            step.add(store(task.panels, "f32", [tile.index, c, 0], value, self.lanes, self.lanes))

    def product(self, body: Block, task: _Task, tile: _Tile, vector: Expr, width: int) -> None:
        """The sums of ``width`` vectors of output channels, from ``vector`` on, for a tile of pixels; their store."""
        lanes, weights = self.lanes, self.parameters["weights"]
        sums = body.registers([(t, v) for t in range(tile.pixels) for v in range(width)], lanes)

        def pixel(t: int, c: Expr) -> Expr:
            if task.panels is None:
                return widen(task.pixels[task.copy_image, c, tile.x + t], task.dtype)
            return task.panels[tile.index, c, t]

        def weight(v: int, c: Expr) -> Expr:
            return load(weights, "f32", [vector + v, 0, c, 0], lanes, lanes)

        outer_products(body, sums, self.spec.ic, pixel, weight)
        for v in range(width):
            columns = [sums[t, v] if t < tile.pixels else zeros(lanes) for t in range(lanes)]
            self.store_transposed(body, task, tile, (vector + v) * lanes, columns)

    def store_transposed(self, body: Block, task: _Task, tile: _Tile, first: Expr, columns: list[Expr]) -> None:
        """Store a tile's sums of the channels from ``first`` on, a vector of channels per pixel, as rows of pixels."""
        spec, lanes = self.spec, self.lanes
        origin = [0] * (spec.rank - 1)  # pixels are flat: as if all were in the first row
        for t, row in enumerate(interleave(body, columns, lanes)):
            channel = body.let(first + t)
            with body.when(True if spec.oc % lanes == 0 else channel < spec.oc) as exists:
                given = spread_parameters(exists, self.parameters, channel, lanes)
                place = [task.image, channel, *origin, tile.x]
                finish(exists, spec, self.dst, self.residual, place, row, lanes, tile.pixels, **given)
