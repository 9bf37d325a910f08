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
Why not     channels in the lanes (cpu_direct): better with many channels, or few pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from tvm import tirx

from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_TASK, BEGIN_TILE, FAR_ROW, finishing, most_pixels, multiply, steps
from convgen.cpu.vector import Block, finish, load, spread_parameters, store, subsampled, written
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, pack_channels
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import ConvSpec

#: Tiles of pixels in a task.
BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)
#: How much longer weights take that nothing but the processor fetches ahead, which stops at each page.
LATE = 3
#: Parts of the channels.
PARTS = (1, 2, 3, 4, 8)


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
        most = most_pixels(target, picks.tile_px // target.lanes)  # here: channels
        require(picks.tile_oc <= most, f"{picks.tile_oc} channels in a tile, registers for {most}")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec)
        packed, _ = pack_channels(ops, picks.tile_oc)
        return written(ops, packed, lambda *buffers: _Kernel(spec, picks, target.lanes, *buffers).statement())


@lru_cache(maxsize=1024)
def _default(schedule: CpuGemm, spec: ConvSpec, target: Target) -> Picks:
    lanes, core = target.lanes, core_of(target)
    domains = schedule.space(spec, target).domains
    vectors = 2 if spec.out_pixels > lanes else 1
    tiles = [c for c in domains["tile_oc"] if c <= min(8, most_pixels(target, vectors))]
    base = Picks(tile_oc=1, tile_px=vectors * lanes, parallel_oc=1, copy_src=False, block_px=1)

    def cycles(picks: Picks) -> float:
        return core.cycles(_counts(spec, target, picks))

    base = min((base.replace(tile_oc=c, copy_src=copy) for c in tiles for copy in domains["copy_src"]), key=cycles)
    # What a task copies has to stay in its core's cache.
    most = max(1, target.l2 // 2 // (4 * spec.ic * vectors * lanes))
    points = [base.replace(block_px=b, parallel_oc=p) for b in BLOCKS if b <= most for p in PARTS]
    return min((p for p in points if schedule.reason_against(spec, target, p) is None), key=cycles)


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    lanes, vectors, parts, block = target.lanes, picks.tile_px // target.lanes, picks.parallel_oc, picks.block_px
    tiles, (full, rest) = ceildiv(spec.out_pixels, picks.tile_px), divmod(spec.oc, picks.tile_oc)
    channel_blocks = full + (rest > 0)
    tasks = spec.n * parts * ceildiv(tiles, block)
    own = ceildiv(tasks, target.cores)
    part = ceildiv(channel_blocks, parts) / channel_blocks
    # Tiles, and blocks of channels, of the busiest core: its last block of tiles may be shorter.
    passes = min(own * block, spec.n * parts * tiles) * part
    work = [Work(own, cycles=BEGIN_TASK)]
    for channels, blocks in ((picks.tile_oc, full), (rest, 1)):
        if not (channels and blocks):
            continue
        times = passes * blocks
        near = 4 * picks.tile_px if picks.copy_src and 4 * spec.ic * picks.tile_px * block > target.l1 // 2 else 0
        # Stores begin beside the next tile's products.
        step = steps(times * spec.ic, channels, vectors, near=near)
        work += [replace(step, stores=channels * vectors / spec.ic), Work(times, cycles=BEGIN_TILE)]
        # Rows of dst lie in a page each: short ones of stores begin a line, and a page, anew.
        work.append(Work(times * channels / block, cycles=FAR_ROW))
    rows = spec.ic * vectors * passes / part
    if picks.copy_src:
        work.append(Work(rows, loads=1, stores=1, cycles=FAR_ROW / 4))
    else:  # rows of src, far apart, for every block of channels
        work.append(Work(rows * channel_blocks * part, cycles=FAR_ROW / 16))
    if not spec.is_pointwise:
        work.append(
            Work(spec.n * spec.ic * ceildiv(spec.out_pixels, lanes) / target.cores, loads=2, shuffles=2, stores=1)
        )
    share = passes / (spec.n * parts * tiles * part)
    work.append(finishing(spec, lanes, share / 2))  # likewise: other units do half of it
    images = spec.bytes["src"] + (2 + spec.residual) * spec.bytes["dst"]
    streams = [
        Stream(LATE * 4 * spec.ic * spec.oc / parts, weights=True),
        Stream(images * share, ahead=True, footprint=images),
    ]
    return Counts(work, streams, 1 + (not spec.is_pointwise))


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

        multiply(body, sums, spec.ic, lambda t, c: weights[channel_block, 0, c, t], vector)
        origin = [0] * (spec.rank - 1)  # pixels are flat: as if all were in the first row
        for t in range(channels):
            channel = body.let(channel_block * self.picks.tile_oc + t)
            given = spread_parameters(body, self.parameters, channel, lanes)
            for v in vectors:
                place = [task.image, channel, *origin, tile.x + v * lanes]
                finish(body, spec, self.dst, self.residual, place, sums[t, v], lanes, tile.counts[v], **given)
