"""Convolution as a matrix product over the patches of a tile of pixels (im2col, a tile at a time).

Applies to  dense NCHW convolutions that are not transposed, of any rank, with few products per output and many
            output channels; stride along the row at most 16.
Strategy    1. Pack weights as [oc/t][row of the kernel, ic, k][t].
            2. A tile is `tile_px` pixels of an output row. Its patches are gathered once for all output channels, with
               their padding, into [row of the kernel, ic, k][tile_px]; a stride is taken out by shuffles.
            3. Pixels in the lanes as in cpu_gemm: `tile_oc` channels × `tile_px` pixels in registers.
            4. Bias, residual and activation on the tile; the store is contiguous.
            5. One parallel loop over batch × rows × blocks of tiles × parts of the channels.
Why not     shuffles in the product's loop (cpu_rows): every block of channels repeats them. With many products
            per output the patches outgrow the cache, and to load them costs more than they save.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from convgen.hardware.target import Target
from convgen.lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv, copied, round_up, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import ConvSpec

# What `cost` counts, in the time of one vector's product. Fitted to measured kernels, not measured alone.
#: A product with its share of the loads; storing a sum.
PRODUCT, STORE = 1.05, 5
#: Gathering a vector of patches; each halving of the stride by shuffles.
GATHER, SHUFFLE = 3, 2


class CpuIm2col(Written):
    id, version = "cpu_im2col", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed and spec.groups == 1, "needs groups 1, not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        require(not spec.has_unit_kernel, "needs padding or more than a 1×1 kernel: cpu_gemm is for plain 1×1 kernels")
        require(spec.stride[-1] <= 16, "needs a stride along the row of at most 16")
        require(spec.kernel[-1] <= 128, "needs at most 128 taps along the row")
        require(spec.reduction_length <= 512, "needs at most 512 products per output")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes = target.lanes
        return Space(
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14) if c <= spec.oc],
            tile_px=[lanes * v for v in (1, 2, 3, 4) if lanes * (v - 1) < spec.out_spatial[-1]],
            block_px=[1, 2, 4, 8, 16],
            parallel_oc=[1, 2, 4, 8],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most = target.most_pixels(picks.tile_px // target.lanes)  # here: channels
        require(picks.tile_oc <= most, f"{picks.tile_oc} channels in a tile, registers for {most}")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        lanes = target.lanes
        vectors = 2 if spec.out_spatial[-1] > lanes else 1
        most_channels = min(spec.oc, 8 if target.vector_registers > 16 else 6)
        loads = 0.3  # of a step of the tile, in products of one channel
        tile_oc = min(range(1, most_channels + 1), key=lambda c: (round_up(spec.oc, c) * (1 + loads / c), -c))
        tiles = ceildiv(spec.out_spatial[-1], vectors * lanes)
        rows = spec.n * math.prod(spec.out_spatial[:-1])
        # Long runs of stores; patches that stay in half a core's cache; enough for every core to do.
        blocks = [
            b
            for b in (2, 4, 8, 16)
            if b <= tiles
            and 4 * b * spec.reduction_length * vectors * lanes <= target.l2 // 2
            and rows * ceildiv(tiles, b) >= 4 * target.cores
        ]
        return Picks(tile_oc=tile_oc, tile_px=vectors * lanes, block_px=max(blocks, default=1), parallel_oc=1)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        picks, lanes = self.default(spec, target), target.lanes
        width, length = round_up(spec.out_spatial[-1], lanes), spec.reduction_length
        vectors = spec.n * math.prod(spec.out_spatial[:-1]) * width / lanes
        products = round_up(spec.oc, picks.tile_oc) * (length * PRODUCT + STORE)
        patches = length * (GATHER if spec.stride[-1] == 1 else GATHER + SHUFFLE * math.log2(spec.stride[-1]))
        return vectors * (products + patches) * 2 * lanes / target.peak_flops

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, lanes = Operands(spec), target.lanes
        tile, taps, length = picks.tile_oc, spec.kernel[-1], spec.reduction_length
        columns = Columns(spec, lanes, picks.tile_px // lanes)

        def packed_weights(b: Expr, k: Expr, t: Expr) -> Expr:
            row, c, kx = unflat(k, (math.prod(spec.kernel[:-1]), spec.ic, taps))
            value = ops.weights[(b * tile + t, c, *unflat(row, spec.kernel[:-1]), kx)]
            if spec.oc % tile == 0:
                return value
            return tirx.if_then_else(b * tile + t < spec.oc, value, tirx.const(0, ACCUMULATOR))

        packed = [te.compute((ceildiv(spec.oc, tile), length, tile), packed_weights, name="weights_packed")]
        packed += [copied(p) for p in ops.parameters[1:]]
        return written(ops, packed, lambda *buffers: _Kernel(spec, picks, columns, *buffers).statement())


class _Task(NamedTuple):
    """What one task works on."""

    #: The image, and the output row there.
    image: Expr
    row: list[Expr]
    #: The tiles of that row: the first, and the one after the last.
    first: Expr
    end: Expr
    #: Their patches, ``[tile, products per output, tile_px]``.
    patches: tirx.Buffer


class _Tile(NamedTuple):
    """A tile of pixels: its index in the task, and its first pixel."""

    index: Expr
    x: Expr


@dataclass(frozen=True)
class _Kernel:
    """The statements of the whole layer."""

    spec: ConvSpec
    picks: Picks
    columns: Columns
    src: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer

    def statement(self) -> tirx.Stmt:
        """The parallel loop over images, rows, blocks of tiles and parts of the channels, around what a task does."""
        spec, picks, step, parts = self.spec, self.picks, self.columns.step, self.picks.parallel_oc
        rows = spec.out_spatial[:-1]
        tiles = ceildiv(spec.out_spatial[-1], step)
        blocks = ceildiv(tiles, picks.block_px)
        whole = Block()
        with whole.loop(spec.n * math.prod(rows) * blocks * parts, parallel=True) as (body, index):
            outer, part = index // parts, body.let(index % parts)
            outer, first = outer // blocks, body.let(outer % blocks * picks.block_px)
            image, row = body.let(outer // math.prod(rows)), outer % math.prod(rows)
            at = [body.let(y) for y in unflat(row, rows)]
            end = body.let(tirx.min(first + picks.block_px, tiles))
            task = _Task(image, at, first, end, body.buffer((picks.block_px, spec.reduction_length, step)))
            self.gather(body, task)
            for channels_body, channel_block, channels in self.channel_blocks(body, part):
                for tile_body, tile, counts in self.tiles(channels_body, task):
                    self.product(tile_body, task, tile, counts, channel_block, channels)
        return whole.statement()

    def gather(self, body: Block, task: _Task) -> None:
        """Gather the patches of all tiles of a task. Tiles that meet the same part of the image share their code."""
        for start, count, pattern in self.columns.runs:
            first = body.let(tirx.max(task.first, start))
            with body.loop(body.let(tirx.max(tirx.min(task.end, start + count) - first, 0))) as (inner, i):
                index = inner.let(first + i - task.first)
                tile = _Tile(index, inner.let((first + i) * self.columns.step))
                self.gather_tile(inner, task, tile, pattern)

    def gather_tile(self, body: Block, task: _Task, tile: _Tile, pattern: dict[Any, Any]) -> None:
        """Gather the patches of a tile; ``pattern`` tells what of the image its pixels meet, as in :class:`Columns`."""
        spec = self.spec
        rows = spec.kernel[:-1]
        with body.loop(math.prod(rows)) as (inner, kernel_row):
            where = [
                inner.let(y * s + k * d - begin)
                for y, s, k, d, (begin, _) in zip(
                    task.row, spec.stride, unflat(kernel_row, rows), spec.dilation, spec.padding, strict=False
                )
            ]
            axes = zip(where, spec.in_spatial, spec.padding, strict=False)
            bounds = [c for y, size, padding in axes if any(padding) for c in (y >= 0, y < size)]
            with inner.when(tirx.all(*bounds) if bounds else True) as inside:
                self.gather_row(inside, task, tile, pattern, kernel_row, where)
            if bounds:
                with inner.when(tirx.Not(tirx.all(*bounds))) as outside:
                    self.gather_row(outside, task, tile, pattern, kernel_row, None)

    def gather_row(
        self,
        body: Block,
        task: _Task,
        tile: _Tile,
        pattern: dict[Any, Any],
        kernel_row: Expr,
        where: Sequence[Expr] | None,
    ) -> None:
        """Gather what a row of the kernel reads: of the row ``where`` of every input channel; None: zeros, outside."""
        spec, lanes, taps = self.spec, self.columns.lanes, self.spec.kernel[-1]
        with body.loop(spec.ic) as (inner, c):

            def read(offset: int, count: int, shift: int) -> Expr:
                index = [task.image, c, *(where or ()), tile.x * spec.stride[-1] + offset]
                return load(self.src, spec.dtype, index, lanes, count, shift)

            inputs = Taps(inner, self.columns, pattern, read)
            for kx in range(taps):
                for v in range(self.columns.vectors):
                    value = inputs[v, kx] if where is not None and pattern["stored", v] > 0 else None
                    place = [tile.index, (kernel_row * spec.ic + c) * taps + kx, v * lanes]
                    value = zeros(lanes) if value is None else value
                    inner.add(store(task.patches, "f32", place, value, lanes, lanes))

    def channel_blocks(self, body: Block, part: Expr) -> Iterator[tuple[Block, Expr, int]]:
        """Code for each block of channels of a part: ``(its body, its index, its channels)``."""
        tile_oc = self.picks.tile_oc
        per_part = ceildiv(ceildiv(self.spec.oc, tile_oc), self.picks.parallel_oc)
        full, rest = divmod(self.spec.oc, tile_oc)
        with body.loop(per_part) as (inner, i):
            channel_block = inner.let(part * per_part + i)
            for case, channels in inner.cases(channel_block, full, tile_oc, rest):
                yield case, channel_block, channels

    def tiles(self, body: Block, task: _Task) -> Iterator[tuple[Block, _Tile, list[int]]]:
        """Code for each tile of a task: ``(its body, the tile, pixels of each of its vectors)``."""
        lanes, step = self.columns.lanes, self.columns.step
        full, rest = divmod(self.spec.out_spatial[-1], step)
        starts = range(0, step, lanes)
        edge = [max(0, min(lanes, rest - start)) for start in starts] if rest else None
        with body.loop(task.end - task.first) as (inner, i):
            for case, counts in inner.cases(inner.let(task.first + i), full, [lanes for _ in starts], edge):
                yield case, _Tile(i, case.let((task.first + i) * step)), counts

    def product(
        self, body: Block, task: _Task, tile: _Tile, counts: Sequence[int], channel_block: Expr, channels: int
    ) -> None:
        """The sums of ``channels`` output channels for a tile of pixels, their epilogue and store."""
        spec, lanes, weights = self.spec, self.columns.lanes, self.parameters["weights"]
        vectors = [v for v, count in enumerate(counts) if count > 0]
        sums = body.registers([(t, v) for t in range(channels) for v in vectors], lanes)

        def patch(v: int, k: Expr) -> Expr:
            return load(task.patches, "f32", [tile.index, k, v * lanes], lanes, lanes)

        outer_products(body, sums, spec.reduction_length, lambda t, k: weights[channel_block, k, t], patch)
        for t in range(channels):
            channel = body.let(channel_block * self.picks.tile_oc + t)
            given = spread_parameters(body, self.parameters, channel, lanes)
            for v in vectors:
                place = [task.image, channel, *task.row, tile.x + v * lanes]
                finish(body, spec, self.dst, self.residual, place, sums[t, v], lanes, counts[v], **given)
