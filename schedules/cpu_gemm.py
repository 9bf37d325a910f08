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
            6. One parallel loop over batch × blocks of tiles × parts of the channels. A task's outer loop is that over
               channels, so that a channel's stores follow each other: rows of dst lie in a page each, too.
Why not     channels in the lanes (cpu_gemm_channels): better with many channels, or few pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tvm import tirx

from convgen.cpu.vector import Block, finish, load, outer_products, spread_parameters, store, subsampled, written
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, pack_channels, round_up
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import ConvSpec

#: Tiles of pixels in a task.
BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)
#: Parts of the channels.
PARTS = (1, 2, 3, 4, 8)

# What `default` and `cost` weigh, each in the time of one product. Fitted to measured kernels, not measured alone.
#: Copying one element of src.
COPY = 3
#: What a part of the channels costs beyond its products where nothing is copied.
PART = 0.01
#: What a row of stores costs that ends after a single tile; shared by the tiles of a longer one.
SHORT_ROW = 0.08


class CpuGemm(Written):
    id, version = "cpu_gemm", 4

    def applies(self, spec: ConvSpec, target: Target) -> None:
        lanes = target.lanes
        require(target.kind == "cpu", "needs a CPU")
        require(spec.has_unit_kernel and spec.groups == 1, "needs a dense 1×1 kernel, no padding, not transposed")
        require(spec.stride[-1] <= 8, "needs a stride along the row of at most 8")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.out_pixels >= lanes, f"needs at least {lanes} pixels")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes = target.lanes
        return Space(
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14) if c <= spec.oc],
            tile_px=[lanes * v for v in (1, 2, 3, 4, 6) if lanes * (v - 1) < spec.out_pixels],
            parallel_oc=list(PARTS),
            copy_src=[False, True],
            block_px=list(BLOCKS),
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most = target.most_pixels(picks.tile_px // target.lanes)  # here: channels
        require(picks.tile_oc <= most, f"{picks.tile_oc} channels in a tile, registers for {most}")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        lanes = target.lanes
        vectors = 2 if spec.out_pixels > lanes else 1
        most_channels = min(spec.oc, 8 if target.vector_registers > 16 else 6)
        loads = 0.3 if target.vector_registers > 16 else 0.5  # of a step of the tile, in products of one channel
        tile_oc = min(range(1, most_channels + 1), key=lambda c: (round_up(spec.oc, c) * (1 + loads / c), -c))
        tiles, channel_blocks = ceildiv(spec.out_pixels, vectors * lanes), ceildiv(spec.oc, tile_oc)
        copy_src = spec.oc >= 6 * tile_oc

        def penalty(option: tuple[int, int]) -> float:
            """Relative time of the busiest core: its share of the products, the copy that every part repeats, and
            what short rows of stores cost.
            """
            block, parts = option
            tasks = spec.n * parts * ceildiv(tiles, block)
            share = ceildiv(tasks, target.cores) * target.cores / tasks * ceildiv(tiles, block) * block / tiles
            share *= round_up(channel_blocks, parts) / channel_blocks
            return share + parts * (COPY / spec.oc if copy_src else PART) + SHORT_ROW / block

        # What a task copies has to stay in its core's cache.
        most_tiles = max(1, target.l2 // 2 // (4 * spec.ic * vectors * lanes))
        blocks = [b for b in BLOCKS if b == 1 or (b <= most_tiles and b <= tiles)]
        splits = [p for p in PARTS if p <= channel_blocks]
        block_px, parallel_oc = min(itertools.product(blocks, splits), key=penalty)
        return Picks(
            tile_oc=tile_oc,
            tile_px=vectors * lanes,
            parallel_oc=parallel_oc,
            copy_src=copy_src,
            block_px=block_px,
        )

    def cost(self, spec: ConvSpec, target: Target) -> float:
        lanes = target.lanes
        # A short reduction leaves the tile's prologue and store uncovered, few channels the copy.
        efficiency = 0.95 * spec.ic / (spec.ic + 3.2) * spec.out_pixels / round_up(spec.out_pixels, lanes)
        if self.default(spec, target).copy_src:
            efficiency *= spec.oc / (spec.oc + 6 * spec.ic / (spec.ic + 32))
        return spec.flops / (target.peak_flops * efficiency)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec)
        packed, _ = pack_channels(ops, picks.tile_oc)
        return written(ops, packed, lambda *buffers: _Kernel(spec, picks, target.lanes, *buffers).statement())


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
    #: With ``copy_src`` the pixels of these tiles, ``[tile, ic, tile_px]``; else None.
    panels: tirx.Buffer


class _Tile(NamedTuple):
    """A tile of pixels: its index in the task, its first pixel, and how many pixels each of its vectors has."""

    index: Expr
    x: Expr
    counts: list[int]


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
        spec, picks = self.spec, self.picks
        tiles, parts = ceildiv(spec.out_pixels, picks.tile_px), picks.parallel_oc
        blocks = ceildiv(tiles, picks.block_px)
        whole = Block()
        with (
            subsampled(whole, spec, self.src, self.lanes) as (batch, images, first_image, pixels, dtype),
            batch.loop(images * parts * blocks, parallel=True) as (body, index),
        ):
            block, outer = body.let(index % blocks), index // blocks
            part, image = body.let(outer % parts), body.let(first_image + outer // parts)
            panels = body.buffer((picks.block_px, spec.ic, picks.tile_px)) if picks.copy_src else None
            first = body.let(block * picks.block_px)
            count = body.let(tirx.min(picks.block_px, tiles - first)) if picks.block_px > 1 else 1
            task = _Task(image, image - first_image, pixels, dtype, first, count, panels)
            if picks.copy_src:
                for tile_body, tile in self.tiles(body, task):
                    self.copy(tile_body, task, tile)
            for channels_body, channel_block, channels in self.channel_blocks(body, part):
                for tile_body, tile in self.tiles(channels_body, task):
                    self.product(tile_body, task, tile, channel_block, channels)
        return whole.statement()

    def channel_blocks(self, body: Block, part: Expr) -> Iterator[tuple[Block, Expr, int]]:
        """Code for each block of channels of a part: ``(its body, its index, its channels)``."""
        tile_oc = self.picks.tile_oc
        per_part = ceildiv(ceildiv(self.spec.oc, tile_oc), self.picks.parallel_oc)
        full, rest = divmod(self.spec.oc, tile_oc)
        with body.loop(per_part) as (pass_body, i):
            channel_block = pass_body.let(part * per_part + i)
            for case, channels in pass_body.cases(channel_block, full, tile_oc, rest):
                yield case, channel_block, channels

    def tiles(self, body: Block, task: _Task) -> Iterator[tuple[Block, _Tile]]:
        """Code for each tile of a task: full ones, and the last one of the image, which may have fewer pixels."""
        lanes, width = self.lanes, self.picks.tile_px
        full, rest = divmod(self.spec.out_pixels, width)
        starts = range(0, width, lanes)
        edge = [max(0, min(lanes, rest - start)) for start in starts] if rest else None
        with body.loop(task.count) as (pass_body, i):
            tile = pass_body.let(task.first + i)
            for case, counts in pass_body.cases(tile, full, [lanes for _ in starts], edge):
                yield case, _Tile(i, case.let(tile * width), counts)

    def copy(self, body: Block, task: _Task, tile: _Tile) -> None:
        """Copy the tile's pixels to its panel, one input channel after another."""
        with body.loop(self.spec.ic) as (step, c):
            for v, count in enumerate(tile.counts):
                value = self.pixels(task, c, tile.x + v * self.lanes, count)
                step.add(store(task.panels, "f32", [tile.index, c, v * self.lanes], value, self.lanes, self.lanes))

    def pixels(self, task: _Task, channel: Expr, x: Expr, count: int) -> Expr:
        """A vector of ``count`` pixels of an input channel, from x on."""
        return load(task.pixels, task.dtype, [task.copy_image, channel, x], self.lanes, count)

    def product(self, body: Block, task: _Task, tile: _Tile, channel_block: Expr, channels: int) -> None:
        """The sums of ``channels`` output channels for a tile of pixels, their epilogue and store."""
        spec, lanes, weights = self.spec, self.lanes, self.parameters["weights"]
        vectors = [v for v, count in enumerate(tile.counts) if count > 0]
        sums = body.registers([(t, v) for t in range(channels) for v in vectors], lanes)

        def vector(v: int, c: Expr) -> Expr:
            if task.panels is None:
                return self.pixels(task, c, tile.x + v * lanes, tile.counts[v])
            return load(task.panels, "f32", [tile.index, c, v * lanes], lanes, lanes)

        outer_products(body, sums, spec.ic, lambda t, c: weights[channel_block, 0, c, t], vector)
        origin = [0] * (spec.rank - 1)  # pixels are flat: as if all were in the first row
        for t in range(channels):
            channel = body.let(channel_block * self.picks.tile_oc + t)
            given = spread_parameters(body, self.parameters, channel, lanes)
            for v in vectors:
                place = [task.image, channel, *origin, tile.x + v * lanes]
                finish(body, spec, self.dst, self.residual, place, sums[t, v], lanes, tile.counts[v], **given)
