"""Direct convolution with output channels in the vector lanes, in any layout.

Applies to  convolutions of any rank, stride and dilation that are not transposed, dense or with groups of more than
            half a vector of output channels.
Strategy    1. A layout is a block of channels that lie innermost: 1 in NCHW, 16 in nchw16c, all in NHWC. What a row of
               the kernel reads of a block lies side by side: one run of numbers (NCHW, or dilated: of channels, per
               tap). Pack weights as [oc/t][rows of the kernel and blocks][run][t], in the order of their use.
            2. A task copies its rows with their padding, in src's layout; without padding src is read where it lies.
            3. Keep a tile of `tile_oh` × `tile_ow` pixels × `tile_oc` channels in registers: vector loads of weights,
               broadcast src. Rows are cut into tiles whose sizes differ by one at most.
            4. Bias, residual and activation on the tile; vectors of channels are stored. NCHW: vectors of pixels,
               transposed in registers.
            5. One parallel loop over parts of the channels × batch × blocks of rows (in 1-D of tiles). `order` names a
               task's outer loop: `oc`, and every block of channels reads the pixels again, while the next one's
               weights are fetched ahead; `pixels`, and every tile reads the weights again.
Why not     pixels in the lanes (cpu_gemm, cpu_rows): NCHW then needs no transposition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from tvm import te, tirx

from convgen.cpu.images import dst_images, src_images, three
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import (
    BEGIN_RUN,
    BEGIN_TASK,
    BEGIN_TILE,
    CROWDED,
    Ahead,
    Even,
    finishing,
    most_pixels,
    multiply,
    steps,
)
from convgen.cpu.vector import (
    Block,
    finish,
    interleave,
    load,
    load_parameters,
    spread_parameters,
    store,
    written,
    zeros,
)
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, copied, round_up, unflat, widen
from convgen.lowering.schedule import Picks, Program, Space, Written, busiest, require
from convgen.problem.spec import ConvSpec

#: Taps of a row that are too few for a run: LLVM would unroll it, and keep what neighbouring taps share in registers.
SHORT_ROW = 7
#: Pixels of a tile at most: code is written out for each.
MOST_PIXELS = 16
#: Rows of tiles of a task, in 1-D tiles; parts of the channels.
BLOCKS, PARTS = (1, 2, 4, 7, 8, 14, 16, 28, 56, 112), (1, 2, 3, 4, 6, 8, 12, 16)


class CpuDirect(Written):
    id, version = "cpu_direct", 3
    merged = ("cpu_channels_last", "cpu_gemm_channels", "cpu_im2col")

    def takes_layouts(self, src: str, dst: str) -> bool:
        return True

    def applies(self, spec: ConvSpec, target: Target) -> None:
        lanes, own = target.lanes, spec.ic // spec.groups
        channels = spec.oc // spec.groups
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups == 1 or channels > lanes // 2, f"needs groups of more than {lanes // 2} output channels")
        require(spec.src_blocks.is_plain or own % spec.src_blocks.size == 0, "needs groups of whole blocks of channels")
        whole = spec.groups == 1 or channels % lanes == 0 or spec.dst_blocks.is_plain
        require(whole, "needs groups of whole vectors of channels, as dst is in blocks")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, g = target.lanes, _Geometry(spec)
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if lanes * (v - 1) < g.channels],
            tile_oh=[h for h in (1, 2, 3, 4) if h <= g.out[1]],
            tile_ow=[w for w in range(1, 17) if w <= g.out[2]],
            block=[b for b in BLOCKS if b == 1 or b < 2 * g.blockable(1, 1)],
            order=["oc", "pixels"],
            parallel_oc=list(PARTS),
            copy_src=[True] if g.padded else [False, True],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most, pixels = most_pixels(target, picks.tile_oc // target.lanes), picks.tile_oh * picks.tile_ow
        require(pixels <= min(most, MOST_PIXELS), f"{pixels} pixels in a tile, registers for {most}")
        g = _Geometry(spec)
        require(picks.parallel_oc <= g.channel_blocks(picks), "fewer channel blocks than parallel_oc")
        count, what = g.blockable(picks.tile_oh, picks.tile_ow), "rows of tiles" if g.rank > 1 else "tiles"
        require(picks.block < 2 * count, f"{picks.block} {what} in a block, the output has {count}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g, tile = Operands(spec), _Geometry(spec), picks.tile_oc
        each = ceildiv(g.channels, tile)

        def packed_weights(b: Expr, run: Expr, k: Expr, t: Expr) -> Expr:
            *taps, block = unflat(run, g.runs)
            if not g.apart:
                taps[2] = k // g.inner
            group, within = b // each, b % each * tile + t
            value = ops.weights[(group * g.channels + within, block * g.inner + k % g.inner, *taps[3 - spec.rank :])]
            return tirx.if_then_else(within < g.channels, value, tirx.const(0, "float32"))

        def statement(
            src: tirx.Buffer, residual: tirx.Buffer, parameters: dict[str, tirx.Buffer], dst: tirx.Buffer
        ) -> tirx.Stmt:
            weights = parameters.pop("weights")
            return _Kernel(spec, g, picks, target.lanes, src, weights, residual, parameters, dst).statement()

        shape = (g.channel_blocks(picks), math.prod(g.runs), g.run, tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed"), *map(copied, ops.parameters[1:])]
        return written(ops, packed, statement)


class _Geometry:
    """The spec with three spatial axes, those it lacks of size 1."""

    def __init__(self, spec: ConvSpec) -> None:
        self.rank = spec.rank
        self.out, self.kernel, self.stride, self.dilation, self.window = map(
            three, (spec.out_spatial, spec.kernel, spec.stride, spec.dilation, spec.window)
        )
        self.begin = three([begin for begin, _ in spec.padding], 0)
        self.padded = any(b or e for b, e in spec.padding)
        self.src, self.dst = src_images(spec), dst_images(spec)
        channels = spec.ic // spec.groups
        #: Groups, and output channels of one.
        self.groups, self.channels = spec.groups, spec.oc // spec.groups
        #: Whether taps of a row are runs of their own: what they read lies apart, or in NCHW there are more channels.
        self.apart = self.dilation[2] > 1
        if self.src.layout == "nchw":
            self.apart |= self.kernel[2] < max(channels, SHORT_ROW)
        elif self.src.layout == "nhwc":
            self.apart |= spec.groups > 1
        #: Channels of a run, and products.
        self.inner = self.src.block if self.src.layout not in ("nchw", "nhwc") else channels
        if self.src.layout == "nchw" and not self.apart:
            self.inner = 1
        self.run = self.inner * (1 if self.apart else self.kernel[2])
        #: Runs along each axis of the kernel, and over blocks of channels.
        self.runs = (*self.kernel[:2], self.kernel[2] if self.apart else 1, channels // self.inner)

    @property
    def products(self) -> int:
        """Of an output."""
        return math.prod(self.runs) * self.run

    def crowds(self, target: Target, pixels: int) -> bool:
        """Whether a tile has more pixels in src, or in dst, than there is room for in the sets of the L1 cache that
        they lie in, as they are a power of two apart.
        """
        return any(pixels > target.places(4 * apart) for apart in (self.src.block * self.stride[2], self.dst.block))

    def channel_blocks(self, picks: Picks) -> int:
        """Blocks of channels: of all groups, none of which shares one with another."""
        return self.groups * ceildiv(self.channels, picks.tile_oc)

    def blockable(self, tile_oh: int, tile_ow: int) -> int:
        """What a task takes a block of: rows of tiles; in 1-D, tiles."""
        return ceildiv(self.out[1], tile_oh) if self.rank > 1 else Even(self.out[2], tile_ow).count

    def blocks(self, picks: Picks) -> tuple[int, int]:
        """Rows of tiles of a task, and tiles of each."""
        tiles = Even(self.out[2], picks.tile_ow).count
        return (picks.block, tiles) if self.rank > 1 else (1, min(picks.block, tiles))

    def extent(self, picks: Picks) -> list[int]:
        """Planes, rows and columns that a task reads."""
        rows, tiles = self.blocks(picks)
        pixels = min(tiles * Even(self.out[2], picks.tile_ow).full, self.out[2])
        lines = min(rows * picks.tile_oh, self.out[1])
        return [(o - 1) * s + w for o, s, w in zip((1, lines, pixels), self.stride, self.window, strict=True)]


# ---- the default --------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _default(schedule: CpuDirect, spec: ConvSpec, target: Target) -> Picks:
    lanes, space, g, core = target.lanes, schedule.space(spec, target).domains, _Geometry(spec), core_of(target)
    copy_src = g.padded or (spec.dtype != "f32" and spec.oc > 64)
    base = Picks(tile_oc=lanes, tile_oh=1, tile_ow=1, block=1, order="oc", parallel_oc=1, copy_src=copy_src)
    widths = sorted({Even(g.out[2], w).full for w in space["tile_ow"]})
    tiles = [
        base.replace(tile_oc=o, tile_oh=h, tile_ow=w)
        for o in space["tile_oc"]
        for h in space["tile_oh"]
        for w in widths
        if h * w <= min(MOST_PIXELS, most_pixels(target, o // lanes)) and (h == 1 or w < 14)
    ]

    def speed(picks: Picks) -> tuple[float, int]:
        work = _tiles(spec, target, g, picks)
        return core.cycles(Counts(work)), picks.tile_oc // lanes + picks.tile_oh * picks.tile_ow

    base = min(tiles, key=speed)
    points = [
        base.replace(block=b, parallel_oc=p, order=order)
        for order in space["order"]
        for b in space["block"]
        for p in space["parallel_oc"]
    ]
    points = [picks for picks in points if schedule.reason_against(spec, target, picks) is None]

    def penalty(picks: Picks) -> tuple[float, int, int]:
        return core.cycles(_counts(spec, target, picks)), picks.parallel_oc, -picks.block

    return min(points, key=penalty)


def _tiles(spec: ConvSpec, target: Target, g: _Geometry, picks: Picks) -> list[Work]:
    """Work of all tiles of an image with all its channels."""
    lanes, found = target.lanes, []
    full, rest = divmod(ceildiv(g.channels, lanes), picks.tile_oc // lanes)
    lines = [(picks.tile_oh, g.out[1] // picks.tile_oh), (g.out[1] % picks.tile_oh, 1)]
    for vectors, channel_blocks in ((picks.tile_oc // lanes, full), (rest, 1)):
        for height, rows in lines:
            for width, tiles in Even(g.out[2], picks.tile_ow).sizes:
                times, pixels = g.out[0] * g.groups * channel_blocks * rows * tiles, height * width
                if not (times and vectors and height and width):
                    continue
                weights = 4 * g.products * vectors * lanes
                near = 4 * vectors * lanes if weights > target.l1 // 2 else 0
                slower = CROWDED if g.crowds(target, pixels) else 1
                found.append(steps(times * g.products * slower, pixels, vectors, near=near, fetched=0.5))
                loops = math.prod(g.runs) if g.run > 1 else 1
                found.append(Work(times * loops, cycles=BEGIN_RUN))
                found.append(_finish(spec, g, times, height, width, vectors, lanes))
    return found


def _finish(spec: ConvSpec, g: _Geometry, times: float, height: int, width: int, vectors: int, lanes: int) -> Work:
    """Storing a tile."""
    stored, shuffles, masked = height * width * vectors, 0.0, 0
    if g.dst.layout == "nchw":
        squares = height * ceildiv(width, lanes) * vectors
        stored, shuffles = squares * lanes, squares * lanes * math.log2(lanes)
        masked = stored if width % lanes else 0
    return Work(
        times,
        stores=stored - masked,
        masked_stores=masked,
        shuffles=shuffles,
        cycles=BEGIN_TILE,
    )


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    g, lanes = _Geometry(spec), target.lanes
    rows, tiles = g.blocks(picks)
    row_tiles, row_groups = Even(g.out[2], picks.tile_ow).count, ceildiv(g.out[1], picks.tile_oh)
    blocks = g.channel_blocks(picks)
    parts = [blocks * (p + 1) // picks.parallel_oc - blocks * p // picks.parallel_oc for p in range(picks.parallel_oc)]
    across, sizes = (ceildiv(row_groups, rows), rows) if g.rank > 1 else (ceildiv(row_tiles, tiles), tiles)
    whole = row_groups if g.rank > 1 else row_tiles
    lengths = [sizes] * (across - 1) + [whole - sizes * (across - 1)]
    planes = spec.n * g.out[0]
    tasks = planes * across * len(parts)
    if tasks > 64 * target.cores:
        share, own = 1 / target.cores, tasks / target.cores
    else:
        loads = [part * length for part in parts for _ in range(planes) for length in lengths]
        share, own = busiest(loads, target.cores) / sum(loads), ceildiv(tasks, target.cores)
    work = [_scaled(part, share * spec.n) for part in _tiles(spec, target, g, picks)]
    panel = 4 * spec.ic * math.prod(g.extent(picks))
    weights = 4 * g.products * g.groups * round_up(g.channels, lanes)
    per_task = weights / picks.parallel_oc
    if picks.copy_src:
        work.append(Work(own * panel / 4 / lanes, loads=1, stores=1, cycles=0.5))
    work += [Work(own, cycles=BEGIN_TASK), finishing(spec, lanes, share)]
    images = spec.bytes["src"] + (2 + spec.residual) * spec.bytes["dst"]  # a line is read before it is written
    ahead = picks.order == "oc"
    # Parts of rows are written in one pass, others in the next, when the cache has lost them.
    written_bytes = (1 + spec.residual) * spec.bytes["dst"] / (planes * across)
    revisited = ahead and g.dst.block > picks.tile_oc and written_bytes > target.l2 // 4
    streams = [
        # Weights: once from memory, then from where they stay between tasks, or between tiles.
        Stream(min(weights, own * per_task), weights=True, ahead=ahead and min(1, picks.parallel_oc / own)),
        Stream(
            max(0, own - picks.parallel_oc) * per_task if per_task > target.l2 // 4 else 0,
            ahead=ahead,
            footprint=weights,
        ),
        Stream(images * share, ahead=not revisited, footprint=images),
    ]
    passes = own * ceildiv(blocks, picks.parallel_oc)
    if picks.copy_src and panel > target.l2 // 2:  # the copy leaves the core's cache, and comes back
        streams.append(Stream(2 * own * panel, footprint=max(panel, target.l2 + 1)))
    if ahead and panel > target.l2 // 2:
        streams.append(Stream(passes * panel, ahead=True, footprint=max(panel, target.l2 + 1)))
    if not ahead and per_task > target.l2 // 2:
        streams.append(Stream(own * rows * tiles * per_task, footprint=max(per_task, target.l2 + 1)))
    return Counts(work, streams)


def _scaled(work: Work, by: float) -> Work:
    return replace(work, times=work.times * by)


# ---- the kernel -----------------------------------------------------------------------------------


class _Task(NamedTuple):
    """What one task works on."""

    #: The image, the plane of its output, the first row there, and the first tile and pixel of each row.
    image: Expr
    z: Expr
    y: Expr
    tile: Expr
    x: Expr
    #: The blocks of channels: the first, and the one after the last.
    first: Expr
    end: Expr
    #: A copy of the planes, rows and columns that the task reads, in src's layout; None where src is read.
    panel: tirx.Buffer


class _Tile(NamedTuple):
    """A tile: its index in the task, its first row and pixel there, and its size."""

    index: Expr
    row: Expr
    x: Expr
    height: int
    width: int

    @property
    def pixels(self) -> list[tuple[int, int]]:
        return [(ty, tx) for ty in range(self.height) for tx in range(self.width)]


class _Channels(NamedTuple):
    """A block of channels: its index, its group, the first channel there, and how many vectors it has."""

    block: Expr
    group: Expr
    first: Expr
    vectors: int


@dataclass(frozen=True)
class _Kernel:
    """The statements of the whole layer."""

    spec: ConvSpec
    g: _Geometry
    picks: Picks
    lanes: int
    src: tirx.Buffer
    weights: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer

    def statement(self) -> tirx.Stmt:
        """The parallel loop over parts of the channels, images, planes and blocks of rows, around what a task does."""
        g, picks, parts = self.g, self.picks, self.picks.parallel_oc
        rows, tiles = g.blocks(picks)
        columns, channel_blocks = Even(g.out[2], picks.tile_ow), g.channel_blocks(picks)
        across = ceildiv(ceildiv(g.out[1], picks.tile_oh), rows)
        tasks = (parts, self.spec.n, g.out[0], across, ceildiv(columns.count, tiles))
        whole = Block()
        with whole.loop(math.prod(tasks), parallel=True) as (body, index):
            part, image, z, block_y, block_x = map(body.let, unflat(index, tasks))
            y, tile = body.let(block_y * (rows * picks.tile_oh)), body.let(block_x * tiles)
            x = body.let(columns.start(tile))
            corner = [body.let(p * s - b) for p, s, b in zip((z, y, x), g.stride, g.begin, strict=True)]
            panel = None
            if picks.copy_src:
                panel = g.src.copied(body, self.src, self.spec.dtype, image, corner, g.extent(picks), self.lanes)
            first, end = (body.let(p * channel_blocks // parts) for p in (part, part + 1))
            self.task(body, _Task(image, z, y, tile, x, first, end, panel))
        return whole.statement()

    def task(self, body: Block, task: _Task) -> None:
        """The products of all tiles of a task with all its blocks of channels."""
        if self.picks.order == "oc":
            for channels_body, channels in self.channel_blocks(body, task):
                for tile_body, tile in self.tiles(channels_body, task):
                    self.product(tile_body, task, tile, channels)
        else:
            for tile_body, tile in self.tiles(body, task):
                for channels_body, channels in self.channel_blocks(tile_body, task):
                    self.product(channels_body, task, tile, channels)

    # ---- loops --------------------------------------------------------------------------------

    def tiles(self, body: Block, task: _Task) -> Iterator[tuple[Block, _Tile]]:
        """Code for each tile of a task: rows of full ones, the last rows, and the sizes that tiles of a row have."""
        height, lines = self.picks.tile_oh, self.g.out[1]
        rows, tiles = self.g.blocks(self.picks)
        columns, groups = Even(self.g.out[2], self.picks.tile_ow), ceildiv(lines, height)
        first = body.let(task.y // height)
        count = rows if groups % rows == 0 else body.let(tirx.min(rows, groups - first))
        across = tiles if columns.count % tiles == 0 else body.let(tirx.min(tiles, columns.count - task.tile))
        with body.loop(count) as (row_body, row):
            for row_case, size in row_body.cases(first + row, lines // height, height, lines % height):
                with row_case.loop(across) as (inner, i):
                    column = inner.let(task.tile + i)
                    for case, width in columns.cases(inner, column):
                        x = case.let(columns.start(column) - task.x)
                        yield case, _Tile(row * across + i, row * height, x, size, width)

    def channel_blocks(self, body: Block, task: _Task) -> Iterator[tuple[Block, _Channels]]:
        """Code for each block of channels of a task: full ones, and a group's last, which may have fewer vectors."""
        g, parts, tile_oc = self.g, self.picks.parallel_oc, self.picks.tile_oc
        blocks, width, each = g.channel_blocks(self.picks), tile_oc // self.lanes, ceildiv(g.channels, tile_oc)
        last = ceildiv(g.channels - (each - 1) * tile_oc, self.lanes)
        with body.loop(blocks // parts if blocks % parts == 0 else task.end - task.first) as (inner, i):
            block = inner.let(task.first + i)
            group, index = (0, block) if g.groups == 1 else (inner.let(block // each), inner.let(block % each))
            full, rest = (each, None) if last == width else (each - 1, last)
            for case, vectors in inner.cases(index, full, width, rest):
                yield case, _Channels(block, group, case.let(index * tile_oc), vectors)

    # ---- the product --------------------------------------------------------------------------

    def product(self, body: Block, task: _Task, tile: _Tile, channels: _Channels) -> None:
        """The sums of a block of channels for a tile of pixels, and their store."""
        spec, g, lanes, tile_oc = self.spec, self.g, self.lanes, self.picks.tile_oc
        sums = body.registers([(p, v) for p in tile.pixels for v in range(channels.vectors)], lanes)
        first_block: Expr = 0
        if g.groups > 1:
            first_block = body.let(channels.group * (spec.ic // g.groups // (1 if g.src.layout == "nchw" else g.inner)))
        rows, tiles = g.blocks(self.picks)
        start = body.let((channels.block + 1) * (g.products * tile_oc))
        ahead = Ahead(self.weights, start, g.products, tile_oc // lanes, tile.index, rows * tiles)
        origin = body.let(ahead.origin)
        with body.loop(math.prod(g.runs)) as (run, index):
            taps = unflat(index, g.runs)

            def pixel(p: tuple[int, int], k: Expr) -> Expr:
                return self.pixel(task, tile, p, taps, first_block, k)

            def weight(v: int, k: Expr) -> Expr:
                return load(self.weights, "f32", [channels.block, index, k, v * lanes], lanes, lanes)

            def fetch(step: Block, k: Expr) -> None:
                ahead.fetch(step, origin, index * g.run + k)

            multiply(run, sums, g.run, pixel, weight, fetch if self.picks.order == "oc" else None)
        for v in range(channels.vectors):
            vectors = {p: sums[p, v] for p in tile.pixels}
            stored = self.store_transposed if g.dst.layout == "nchw" else self.store_channels
            stored(body, task, tile, channels, v * lanes, vectors)

    def pixel(self, task: _Task, tile: _Tile, p: tuple[int, int], taps: Sequence[Expr], first: Expr, k: Expr) -> Expr:
        """The k-th number, as f32, of a run that a tile's pixel reads; ``first``: its group's first block of channels,
        or where a block has the channels of several groups, the group.
        """
        g, (ty, tx) = self.g, p
        kz, ky, kx, block = taps
        kx = kx * g.dilation[2] if g.apart else 0
        line = (tile.row + ty) * g.stride[1] + ky * g.dilation[1]
        column = (tile.x + tx) * g.stride[2] + kx
        inner = g.src.block
        if g.src.layout == "nchw":
            block, at = (first + k, column) if g.apart else (first + block, column + k)
        elif g.src.layout == "nhwc":
            block, at = 0, column * inner + first * g.inner + k
        else:
            block, at = first + block, column * inner + k
        if task.panel is not None:
            return task.panel[kz * g.dilation[0], line, block, at]
        where = [task.z * g.stride[0] + kz * g.dilation[0], task.y * g.stride[1] + line, 0]
        place = g.src.place(task.image, block, where, task.x * g.stride[2] * inner + at)
        return widen(self.src[tuple(place)], self.spec.dtype)

    def store_channels(
        self,
        body: Block,
        task: _Task,
        tile: _Tile,
        channels: _Channels,
        offset: int,
        vectors: dict[tuple[int, int], Expr],
    ) -> None:
        """The epilogue and store of a tile's vectors of channels, from ``offset`` in their block on, one per pixel."""
        spec, lanes, g = self.spec, self.lanes, self.g
        rest = g.channels % lanes
        within = body.let(channels.first + offset)
        for case, count in body.cases(within, g.channels - rest, lanes, rest):
            channel = case.let(channels.group * g.channels + within)
            given = load_parameters(case, self.parameters, channel, lanes, count)
            for inner, p, vector in self.each(case, vectors):
                place = (task.image, channel, self.dst_pixel(task, tile, p))
                g.dst.finish(inner, spec, (self.dst, self.residual), place, vector, lanes, count, given)

    def store_transposed(
        self,
        body: Block,
        task: _Task,
        tile: _Tile,
        channels: _Channels,
        offset: int,
        vectors: dict[tuple[int, int], Expr],
    ) -> None:
        """The same as rows of pixels, each with the epilogue of its channel."""
        spec, lanes, g = self.spec, self.lanes, self.g
        within = body.let(channels.first + offset)
        first = body.let(channels.group * g.channels + within)
        for y in range(tile.height):
            for x in range(0, tile.width, lanes):
                count = min(lanes, tile.width - x)
                square = [vectors[y, x + t] if t < count else zeros(lanes) for t in range(lanes)]
                rows = {(0, t): row for t, row in enumerate(interleave(body, square, lanes))}
                for inner, (_, t), row in self.each(body, rows):
                    with inner.when(True if g.channels % lanes == 0 else within + t < g.channels) as exists:
                        given = spread_parameters(exists, self.parameters, first + t, lanes)
                        place = g.dst.element(task.image, first + t, self.dst_pixel(task, tile, (y, x)))
                        finish(exists, spec, self.dst, self.residual, place, row, lanes, count, **given)

    def each(
        self, body: Block, vectors: dict[tuple[int, int], Expr]
    ) -> Iterator[tuple[Block, tuple[Expr, Expr], Expr]]:
        """Code for what becomes of each vector ``(y, x)``, all x of each y: ``(its body, its key, the vector)``.

        A loop where that takes a costly activation: written out for every register, it would not fit into the cache
        of instructions.
        """
        if not self.spec.activation_op.costly:
            for p, vector in vectors.items():
                yield body, p, vector
            return
        width = 1 + max(x for _, x in vectors)
        sums = body.buffer((len(vectors) // width, width, self.lanes))
        for (y, x), vector in vectors.items():
            body.add(store(sums, "f32", [y, x, 0], vector, self.lanes, self.lanes))
        with body.loop(len(vectors) // width) as (row, y), row.loop(width) as (inner, x):
            yield inner, (y, x), inner.let(load(sums, "f32", [y, x, 0], self.lanes, self.lanes))

    def dst_pixel(self, task: _Task, tile: _Tile, p: tuple[Expr, Expr]) -> list[Expr]:
        """Where in dst a tile's pixel is."""
        return [task.z, task.y + tile.row + p[0], task.x + tile.x + p[1]]
