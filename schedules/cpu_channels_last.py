"""Direct convolution of channels-last rows: output channels in the vector lanes, runs of input in memory.

Applies to  convolutions of any rank, stride and dilation that are not transposed, dense or with groups of whole
            vectors of output channels: NHWC; and NCHW with more than a 1×1 kernel.
Strategy    1. The taps of a kernel's row and their channels lie side by side: one run of `kw × ic` numbers per row of
               the kernel (dilated or grouped: a run of channels per tap). Pack weights as [oc/t][rows of the
               kernel][run][t].
            2. A task copies its rows with their padding, NCHW transposed in registers; a 1×1 kernel reads src where it
               lies.
            3. Keep a tile of `tile_px` pixels × `tile_oc` channels in registers: vector loads of weights, broadcast
               src. The last pixels of a row and the last vectors of channels are smaller tiles, with code of their own.
            4. Bias, residual and activation on the tile; vectors of channels are stored, the last one masked. NCHW:
               vectors of pixels, transposed in registers.
            5. One parallel loop over parts of the channels × batch × blocks of rows (in 1-D of tiles). `order` names a
               task's outer loop: `oc`, and every block of channels reads the pixels again; `pixels`, and every tile
               reads the weights again.
Why not     pixels in the lanes: channels-last data would have to be transposed in and out. NCHW rows that make good
            vectors need no transposition (cpu_rows, cpu_im2col).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tvm import te, tirx

from convgen.cpu.vector import (
    Block,
    finish,
    interleave,
    load,
    load_parameters,
    load_within,
    outer_products,
    spread_parameters,
    store,
    written,
    zeros,
)
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, copied, round_up, unflat, widen
from convgen.lowering.schedule import Picks, Program, Space, Written, busiest, require
from convgen.problem.spec import ConvSpec

#: Rows of a task, in 1-D tiles; parts of the channels.
BLOCKS, PARTS = (1, 2, 4, 7, 8, 14, 16, 28, 56), (1, 2, 3, 4, 6, 8, 12, 16)

# What `cost` counts. Its unit is the time after which a core begins the next FMA: a cycle, or half of it where two
# begin at once. Fitted to measured kernels, not measured alone.
#: Cycles from one FMA to the next on the same sum; to begin a run of products; to begin a tile.
FMA_LATENCY, BEGIN_RUN, BEGIN_TILE = 5.5, 6, 10
#: A vector of weights on its way from the L2 cache.
FAR_WEIGHTS = 3
#: Storing a vector of channels; reading its residual.
STORE, RESIDUAL = 3, 2
#: A channel's share of transposing a square of sums into a row of pixels: whole; with a mask; the same before
#: AVX-512, where masks are slow.
TRANSPOSE, MASKED_TRANSPOSE, SLOW_MASKED_TRANSPOSE = 4, 6, 30
#: Copying a vector of src: as it lies; transposed.
COPY, TRANSPOSED_COPY = 4, 8
#: Beginning a task.
BEGIN_TASK = 200


class CpuChannelsLast(Written):
    id, version = "cpu_channels_last", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        gemm = spec.layout == "nchw" and spec.has_unit_kernel
        require(not gemm, "needs NHWC, or more than a 1×1 kernel: cpu_gemm_channels is for 1×1 kernels of NCHW")
        whole = spec.oc // spec.groups % target.lanes == 0
        require(spec.groups == 1 or whole, f"needs groups 1, or multiples of {target.lanes} output channels per group")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, channels = target.lanes, spec.oc // spec.groups
        g = _Geometry(spec)
        tiles = [lanes * v for v in (1, 2, 3, 4) if lanes * (v - 1) < channels]
        return Space(
            tile_oc=[t for t in tiles if spec.groups == 1 or channels % t == 0],
            tile_px=[p for p in range(1, 29) if p <= g.out[2]],
            block=[b for b in BLOCKS if b == 1 or b < 2 * g.blockable(1)],
            order=["oc", "pixels"],
            parallel_oc=list(PARTS),
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most = _most_pixels(target, picks)
        require(picks.tile_px <= most, f"{picks.tile_px} pixels in a tile, registers for {most}")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")
        g = _Geometry(spec)
        count, what = g.blockable(picks.tile_px), "rows" if g.rank > 1 else "tiles"
        require(picks.block < 2 * count, f"{picks.block} {what} in a block, the output has {count}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        lanes, space, g = target.lanes, self.space(spec, target).domains, _Geometry(spec)
        base = Picks(tile_oc=lanes, tile_px=1, block=1, order="oc", parallel_oc=1)
        tiles = [base.replace(tile_oc=o, tile_px=p) for o in space["tile_oc"] for p in space["tile_px"]]
        tiles = [picks for picks in tiles if picks.tile_px <= _most_pixels(target, picks)]
        base = min(tiles, key=lambda p: (_row_cycles(spec, target, p), p.tile_oc // lanes + p.tile_px))
        weights = 4 * math.prod(spec.weights_shape)
        base = base.replace(order="pixels" if weights <= target.l2 // 2 else "oc")
        points = [base.replace(block=b, parallel_oc=p) for b in space["block"] for p in space["parallel_oc"]]
        points = [picks for picks in points if self.reason_against(spec, target, picks) is None]
        room = target.l2 // 2

        def penalty(picks: Picks) -> tuple[float, int, int]:
            """Time; what a task reads again and again should stay in its core's cache."""
            task_bytes = 4 * spec.ic * math.prod(g.extent(picks))
            return _cycles(spec, target, picks) * (1 + 0.05 * (task_bytes > room)), picks.parallel_oc, -picks.block

        return min(points, key=penalty)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        cycles = _cycles(spec, target, self.default(spec, target))
        return cycles * 2 * target.lanes * target.cores / (0.95 * target.peak_flops)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g, tile = Operands(spec), _Geometry(spec), picks.tile_oc

        def packed_weights(b: Expr, tap: Expr, k: Expr, t: Expr) -> Expr:
            taps = unflat(tap, g.taps)
            within, c = (k // g.channels,), k % g.channels
            value = ops.weights[(b * tile + t, c, *(taps if g.apart else [*taps[:-1], *within])[3 - spec.rank :])]
            return tirx.if_then_else(b * tile + t < spec.oc, value, tirx.const(0, "float32"))

        def statement(
            src: tirx.Buffer, residual: tirx.Buffer, parameters: dict[str, tirx.Buffer], dst: tirx.Buffer
        ) -> tirx.Stmt:
            weights = parameters.pop("weights")
            return _Kernel(spec, g, picks, target.lanes, src, weights, residual, parameters, dst).statement()

        shape = (ceildiv(spec.oc, tile), math.prod(g.taps), g.run, tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed"), *map(copied, ops.parameters[1:])]
        return written(ops, packed, statement)


def _most_pixels(target: Target, picks: Picks) -> int:
    """Pixels of a tile for which there are registers.

    Beside its sums, a tile holds a vector of weights for each of its vectors of channels, and one broadcast pixel.
    """
    vectors: int = picks.tile_oc // target.lanes
    return (target.vector_registers - 1) // vectors - 1


class _Geometry:
    """The spec with three spatial axes, those it lacks of size 1."""

    def __init__(self, spec: ConvSpec) -> None:
        more = 3 - spec.rank
        self.rank = spec.rank
        self.out, self.size, self.kernel, self.stride, self.dilation, self.window = (
            (1,) * more + tuple(values)
            for values in (spec.out_spatial, spec.in_spatial, spec.kernel, spec.stride, spec.dilation, spec.window)
        )
        self.begin = (0,) * more + tuple(begin for begin, _ in spec.padding)
        self.channels = spec.ic // spec.groups
        #: Whether what the taps of a row read lies apart in memory: each is a run of its own.
        self.apart = spec.groups > 1 or self.dilation[2] > 1
        #: Runs of products along each axis of the kernel, and products of a run.
        self.taps = self.kernel if self.apart else (*self.kernel[:2], 1)
        self.run = self.channels * (1 if self.apart else self.kernel[2])
        #: Whether rows are copied: for their padding, or to convert numbers once.
        self.copies = not spec.has_unit_kernel or (spec.dtype != "f32" and spec.oc > 64)

    def blockable(self, tile_px: int) -> int:
        """What a task takes a block of: rows; in 1-D, tiles."""
        return self.out[1] if self.rank > 1 else ceildiv(self.out[2], tile_px)

    def blocks(self, picks: Picks) -> tuple[int, int]:
        """Rows of a task, and tiles of each."""
        tiles = ceildiv(self.out[2], picks.tile_px)
        return (picks.block, tiles) if self.rank > 1 else (1, min(picks.block, tiles))

    def extent(self, picks: Picks) -> list[int]:
        """Planes, rows and columns that a task reads."""
        rows, tiles = self.blocks(picks)
        pixels = min(tiles * picks.tile_px, self.out[2])
        return [(o - 1) * s + w for o, s, w in zip((1, rows, pixels), self.stride, self.window, strict=True)]


def _row_vectors(pixels: int, lanes: int) -> list[int]:
    """Pixels of each vector that a row of ``pixels`` is stored as."""
    return [min(lanes, pixels - first) for first in range(0, pixels, lanes)]


def _tile_cycles(spec: ConvSpec, target: Target, g: _Geometry, vectors: int, pixels: int) -> float:
    """Time of a tile, in FMAs: its products or what takes longer (loads, a sum's latency), and its store."""
    lanes = target.lanes
    fmas = target.fmas  # FMAs that begin beside two loads
    step = max(vectors * pixels, fmas / 2 * (vectors + pixels), FMA_LATENCY * fmas)
    if 4 * spec.reduction_length * vectors * lanes > target.l1 // 2:
        step = max(step, FAR_WEIGHTS * vectors)
    # Pixels so far apart that their cache lines, eight of which have a place, displace each other.
    apart = 4 * spec.ic * g.stride[2]
    if pixels > 8 * (target.l1 // 8) // math.gcd(target.l1 // 8, apart) - vectors:
        step *= 2
    store = vectors * pixels * (STORE + RESIDUAL * spec.residual)
    if spec.layout == "nchw":
        masked = MASKED_TRANSPOSE if lanes == 16 else SLOW_MASKED_TRANSPOSE
        squares = (TRANSPOSE if count == lanes else masked for count in _row_vectors(pixels, lanes))
        store += vectors * lanes * sum(squares)
    return math.prod(g.taps) * (g.run * step + BEGIN_RUN * fmas) + store + BEGIN_TILE * fmas


def _row_cycles(spec: ConvSpec, target: Target, picks: Picks) -> float:
    """Time of a row of pixels with all channels of a group, in FMAs."""
    g, lanes = _Geometry(spec), target.lanes
    many, left = divmod(ceildiv(spec.oc // spec.groups, lanes), picks.tile_oc // lanes)
    tiles, rest = divmod(g.out[2], picks.tile_px)
    total = 0.0
    for vectors, channel_blocks in ((picks.tile_oc // lanes, many), (left, int(left > 0))):
        for pixels, times in ((picks.tile_px, tiles), (rest, int(rest > 0))):
            if channel_blocks and times:
                total += channel_blocks * times * _tile_cycles(spec, target, g, vectors, pixels)
    return total


def _cycles(spec: ConvSpec, target: Target, picks: Picks) -> float:
    """Time of the busiest core, in FMAs."""
    g, lanes = _Geometry(spec), target.lanes
    rows, tiles = g.blocks(picks)
    row_tiles = ceildiv(g.out[2], picks.tile_px)
    tile = spec.groups * _row_cycles(spec, target, picks) / row_tiles  # with all channels
    copy_vector = COPY if spec.layout == "nhwc" else TRANSPOSED_COPY
    copy = copy_vector * math.prod(g.extent(picks)) * spec.ic / lanes if g.copies else 0
    planes = spec.n * g.out[0]
    across = ceildiv(g.out[1], rows) if g.rank > 1 else ceildiv(row_tiles, tiles)
    blocks = ceildiv(spec.oc, picks.tile_oc)
    parts = [blocks * (p + 1) // picks.parallel_oc - blocks * p // picks.parallel_oc for p in range(picks.parallel_oc)]
    last = (g.out[1] % rows or rows) / rows if g.rank > 1 else 1

    def task(part: int, share: float) -> float:
        """Time of a task with ``part`` blocks of channels and a share of its rows."""
        return share * (rows * tiles * tile * part / blocks + copy) + BEGIN_TASK

    if planes * across * len(parts) > 64 * target.cores:  # so many tasks that all cores have as much to do
        return planes * sum(across * task(part, 1) for part in parts) / target.cores
    shares = [1] * (across - 1) + [last]
    return busiest([task(part, share) for part in parts for _ in range(planes) for share in shares], target.cores)


class _Task(NamedTuple):
    """What one task works on."""

    #: The image, the plane of its output, and the first row and tile there.
    image: Expr
    z: Expr
    y: Expr
    tile: Expr
    #: The blocks of channels: the first, and the one after the last.
    first: Expr
    end: Expr
    #: A copy of the planes, rows and columns that the task reads, their channels last; None where src is read.
    panel: tirx.Buffer


class _Row(NamedTuple):
    """A row that a task copies: image, plane, line and first column in src; plane and line in the panel."""

    image: Expr
    source: list[Expr]
    x: Expr
    place: list[Expr]


class _Tile(NamedTuple):
    """A tile of pixels: its row in the task, its first pixel in the task's part of that row, and its pixels."""

    row: Expr
    x: Expr
    pixels: int


class _Channels(NamedTuple):
    """A block of channels: its index, and how many vectors it has."""

    block: Expr
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
        row_tiles, channel_blocks = ceildiv(g.out[2], picks.tile_px), ceildiv(self.spec.oc, picks.tile_oc)
        tasks = (parts, self.spec.n, g.out[0], ceildiv(g.out[1], rows), ceildiv(row_tiles, tiles))
        whole = Block()
        with whole.loop(math.prod(tasks), parallel=True) as (body, index):
            part, image, z, block_y, block_x = map(body.let, unflat(index, tasks))
            y, tile = body.let(block_y * rows), body.let(block_x * tiles)
            corner = [p * s - b for p, s, b in zip((z, y, tile * picks.tile_px), g.stride, g.begin, strict=True)]
            corner = [body.let(c) for c in corner]
            panel = self.copied_rows(body, image, corner) if g.copies else None
            first, end = (body.let(p * channel_blocks // parts) for p in (part, part + 1))
            self.task(body, _Task(image, z, y, tile, first, end, panel))
        return whole.statement()

    def task(self, body: Block, task: _Task) -> None:
        """The products of all tiles of a task with all its blocks of channels."""
        if self.picks.order == "oc":
            for channels_body, channels in self.channel_blocks(body, task):
                for row_body, row in self.rows(channels_body, task):
                    for tile_body, tile in self.tiles(row_body, task, row):
                        self.product(tile_body, task, tile, channels)
        else:
            for row_body, row in self.rows(body, task):
                for tile_body, tile in self.tiles(row_body, task, row):
                    for channels_body, channels in self.channel_blocks(tile_body, task):
                        self.product(channels_body, task, tile, channels)

    # ---- loops --------------------------------------------------------------------------------

    def rows(self, body: Block, task: _Task) -> Iterator[tuple[Block, Expr]]:
        """Code for the rows of a task: ``(its body, the row's index in the task)``."""
        rows, _ = self.g.blocks(self.picks)
        with body.loop(rows if self.g.out[1] % rows == 0 else tirx.min(rows, self.g.out[1] - task.y)) as (inner, row):
            yield inner, row

    def tiles(self, body: Block, task: _Task, row: Expr) -> Iterator[tuple[Block, _Tile]]:
        """Code for each tile of a row: full ones, and the last one, which may have fewer pixels."""
        tile_px = self.picks.tile_px
        _, tiles = self.g.blocks(self.picks)
        row_tiles = ceildiv(self.g.out[2], tile_px)
        full, rest = divmod(self.g.out[2], tile_px)
        with body.loop(tiles if row_tiles % tiles == 0 else tirx.min(tiles, row_tiles - task.tile)) as (inner, i):
            for case, pixels in inner.cases(task.tile + i, full, tile_px, rest):
                yield case, _Tile(row, case.let(i * tile_px), pixels)

    def channel_blocks(self, body: Block, task: _Task) -> Iterator[tuple[Block, _Channels]]:
        """Code for each block of channels of a task: full ones, and the last one, which may have fewer vectors."""
        parts, tile_oc = self.picks.parallel_oc, self.picks.tile_oc
        blocks, width = ceildiv(self.spec.oc, tile_oc), tile_oc // self.lanes
        last = ceildiv(self.spec.oc - (blocks - 1) * tile_oc, self.lanes)
        with body.loop(blocks // parts if blocks % parts == 0 else task.end - task.first) as (inner, i):
            block = inner.let(task.first + i)
            full, rest = (blocks, None) if last == width else (blocks - 1, last)
            for case, vectors in inner.cases(block, full, width, rest):
                yield case, _Channels(block, vectors)

    # ---- the copy -----------------------------------------------------------------------------

    def copied_rows(self, body: Block, image: Expr, corner: Sequence[Expr]) -> tirx.Buffer:
        """A copy of what a task reads from the pixel ``corner`` on, which may lie outside the image: zeros there."""
        planes, lines, _ = self.g.extent(self.picks)
        panel = body.buffer((planes, lines, self.panel_width))
        with body.loop(planes) as (plane, z), plane.loop(lines) as (line, y):
            source = [line.let(c + i) for c, i in zip(corner, (z, y), strict=False)]
            row = _Row(image, source, corner[2], [z, y])
            bounds = [c for i, size in zip(source, self.g.size, strict=False) for c in (i >= 0, i < size)]
            inside = tirx.all(*bounds)
            with line.when(inside) as within:
                if self.spec.layout == "nhwc":
                    self.copy_row(within, row, panel)
                else:
                    self.copy_row_transposed(within, row, panel)
            with line.when(tirx.Not(inside)) as outside:
                self.clear_row(outside, row, panel)
        return panel

    @property
    def panel_width(self) -> int:
        """Numbers of a row in the panel. NCHW: of whole vectors of pixels, and of channels in the last pixel."""
        *_, columns = self.g.extent(self.picks)
        lanes, ic = self.lanes, self.spec.ic
        return round_up(columns * ic if self.spec.layout == "nhwc" else round_up(columns, lanes) * ic + lanes, lanes)

    def clear_row(self, body: Block, row: _Row, panel: tirx.Buffer) -> None:
        """Zeros for a row that lies outside the image."""
        lanes = self.lanes
        with body.loop(self.panel_width // lanes) as (inner, i):
            inner.add(store(panel, "f32", [*row.place, i * lanes], zeros(lanes), lanes, lanes))

    def copy_row(self, body: Block, row: _Row, panel: tirx.Buffer) -> None:
        """Copy a row whose channels are last, with zeros left and right of the image."""
        lanes, ic = self.lanes, self.spec.ic
        with body.loop(self.panel_width // lanes) as (inner, i):
            index = self.place(row.image, (*row.source, 0), inner.let(row.x * ic + i * lanes))
            value = load_within(self.src, self.spec.dtype, index, lanes, lanes, size=self.g.size[2] * ic)
            inner.add(store(panel, "f32", [*row.place, i * lanes], value, lanes, lanes))

    def copy_row_transposed(self, body: Block, row: _Row, panel: tirx.Buffer) -> None:
        """Copy a row of each channel's plane as one row of pixels, a square of lanes × lanes numbers at a time."""
        lanes, ic = self.lanes, self.spec.ic
        *_, columns = self.g.extent(self.picks)
        full, rest = divmod(ic, lanes)
        with body.loop(ceildiv(columns, lanes)) as (pixels, i), pixels.loop(full + (rest > 0)) as (square, j):
            x = square.let(row.x + i * lanes)
            for case, channels in square.cases(j, full, lanes, rest):
                first = case.let(j * lanes)
                places = [self.place(row.image, (*row.source, x), first + c) for c in range(channels)]
                vectors = [load_within(self.src, self.spec.dtype, place, lanes, lanes) for place in places]
                vectors = [case.let(vector) for vector in vectors] + [zeros(lanes)] * (lanes - channels)
                # With fewer channels than a vector has lanes, what is too much is overwritten by the next pixel.
                count = channels if full else lanes
                for t, pixel in enumerate(interleave(case, vectors, lanes)):
                    to = [*row.place, (i * lanes + t) * ic + first]
                    case.add(store(panel, "f32", to, pixel, lanes, count))

    # ---- the product --------------------------------------------------------------------------

    def product(self, body: Block, task: _Task, tile: _Tile, channels: _Channels) -> None:
        """The sums of a block of channels for a tile of pixels, and their store."""
        spec, g, lanes, tile_oc = self.spec, self.g, self.lanes, self.picks.tile_oc
        sums = body.registers([(t, v) for t in range(tile.pixels) for v in range(channels.vectors)], lanes)
        first_ic = 0
        if spec.groups > 1:
            first_ic = body.let(channels.block * tile_oc // (spec.oc // spec.groups) * g.channels)
        with body.loop(math.prod(g.taps)) as (run, tap):
            taps = unflat(tap, g.taps)

            def pixel(t: int, k: Expr) -> Expr:
                return self.pixel(task, tile, t, taps, first_ic, k)

            def weight(v: int, k: Expr) -> Expr:
                return load(self.weights, "f32", [channels.block, tap, k, v * lanes], lanes, lanes)

            outer_products(run, sums, g.run, pixel, weight)
        for v in range(channels.vectors):
            channel = body.let(channels.block * tile_oc + v * lanes)
            vectors = [sums[t, v] for t in range(tile.pixels)]
            if spec.layout == "nhwc":
                self.store_channels(body, task, tile, channel, vectors)
            else:
                self.store_transposed(body, task, tile, channel, vectors)

    def pixel(self, task: _Task, tile: _Tile, t: int, taps: Sequence[Expr], first_ic: Expr, k: Expr) -> Expr:
        """The k-th number, as f32, of the run from channel ``first_ic`` on that a tile's t-th pixel reads."""
        g = self.g
        if task.panel is None:
            where = [p * s for p, s in zip(self.output(task, tile, t), g.stride, strict=True)]
            return widen(self.src[tuple(self.place(task.image, where, first_ic + k))], self.spec.dtype)
        kz, ky, kx = taps
        column = (tile.x + t) * g.stride[2] + kx * g.dilation[2]
        line = tile.row * g.stride[1] + ky * g.dilation[1]
        return task.panel[kz * g.dilation[0], line, column * self.spec.ic + first_ic + k]

    def store_channels(self, body: Block, task: _Task, tile: _Tile, channel: Expr, vectors: Sequence[Expr]) -> None:
        """The epilogue and store of a tile's vectors of channels, from ``channel`` on, one of each pixel."""
        spec, lanes = self.spec, self.lanes
        rest = spec.oc % lanes
        for case, count in body.cases(channel, spec.oc - rest, lanes, rest):
            given = load_parameters(case, self.parameters, channel, lanes, count)
            for t, vector in enumerate(vectors):
                place = self.place(task.image, self.output(task, tile, t), channel)
                finish(case, spec, self.dst, self.residual, place, vector, lanes, count, **given)

    def store_transposed(self, body: Block, task: _Task, tile: _Tile, first: Expr, vectors: Sequence[Expr]) -> None:
        """The same as rows of pixels, each with the epilogue of its channel."""
        spec, lanes = self.spec, self.lanes
        for x, count in zip(range(0, tile.pixels, lanes), _row_vectors(tile.pixels, lanes), strict=True):
            square = [vectors[x + t] if t < count else zeros(lanes) for t in range(lanes)]
            for t, row in enumerate(interleave(body, square, lanes)):
                with body.when(True if spec.oc % lanes == 0 else first + t < spec.oc) as exists:
                    given = spread_parameters(exists, self.parameters, first + t, lanes)
                    place = self.place(task.image, self.output(task, tile, x), first + t)
                    finish(exists, spec, self.dst, self.residual, place, row, lanes, count, **given)

    # ---- places -------------------------------------------------------------------------------

    def place(self, image: Expr, pixel: Sequence[Expr], channel: Expr) -> list[Expr]:
        """The index of a channel of a pixel, which has three axes, in src or dst."""
        where = pixel[3 - self.spec.rank :]
        return [image, *where, channel] if self.spec.layout == "nhwc" else [image, channel, *where]

    def output(self, task: _Task, tile: _Tile, t: int) -> tuple[Expr, Expr, Expr]:
        """The t-th output pixel of a tile, with three axes."""
        return task.z, task.y + tile.row, task.tile * self.picks.tile_px + tile.x + t
