"""The statements of a transposed convolution by phases; what they do is said in ``schedules/cpu_transposed.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tvm import tirx

from ..lowering.compute import Expr, ceildiv, unflat, widen
from ..lowering.schedule import Picks
from ..problem.spec import ConvSpec
from .images import dst_images, src_images
from .phases import Axis, Phase
from .product import Ahead, Even, multiply
from .vector import (
    Block,
    Registers,
    finish,
    interleave,
    load,
    load_parameters,
    spread_parameters,
    store,
)

#: Numbers from the weights that a tile uses to those that it fetches, where no other tile uses them.
AHEAD = 1 << 12


@lru_cache(maxsize=1024)
def geometry_of(spec: ConvSpec, merge: bool) -> Geometry:
    return Geometry(spec, merge)


class Geometry:
    """The phases of a spec, and what a run of numbers is."""

    def __init__(self, spec: ConvSpec, merge: bool) -> None:
        self.spec, self.merge = spec, merge
        self.z, self.y, self.x = (Axis.of(spec, axis if axis >= 0 else -1) for axis in range(spec.rank - 3, spec.rank))
        self.src, self.dst = src_images(spec), dst_images(spec)
        #: Output channels of a group.
        self.channels = spec.oc // spec.groups
        #: Where all phases have as many taps: no tap is a zero, which infinite pixels would make NaN.
        self.mergeable = self.x.stride > 1 and self.x.dilation == 1 and self.x.kernel % self.x.stride == 0
        channels = spec.ic // spec.groups
        #: Whether taps of a row are runs of their own, as what they read lies apart.
        self.apart = self.src.layout == "nchw" or (self.src.layout == "nhwc" and spec.groups > 1) or self.x.gap > 1
        #: Channels of a run.
        self.inner = channels if self.src.layout in ("nchw", "nhwc") else self.src.block
        columns = self.x.taps if merge else self.x.kernel
        #: Products of a run, of the longest row of taps.
        self.run = self.inner * (1 if self.apart else columns)
        #: Runs along the axes of the kernel, over blocks of channels, and along a row.
        self.runs = (self.z.kernel, self.y.kernel, channels // self.inner, columns if self.apart else 1)
        #: What a row of outputs lacks at its beginning, where phases are merged.
        self.crop = self.x.begin % self.x.stride if merge else 0
        #: Pixels of a row of a phase.
        self.width = ceildiv(self.x.out + self.crop, self.x.stride)
        self.reads = (self.z.reads, self.y.reads, self.columns)
        pixels = (self.z.pixels, self.y.pixels, self.width)
        ends = (n - 1 + last >= size for n, (_, last), size in zip(pixels, self.reads, self.src.size, strict=True))
        self.padded = any(first < 0 for first, _ in self.reads) or any(ends)

    @property
    def columns(self) -> tuple[int, int]:
        """The first and the last pixel that pixel 0 of a row's phases meets."""
        last = self.x.begin // self.x.stride
        return (last - self.x.taps + 1, last) if self.merge else self.x.reads

    @property
    def products(self) -> int:
        """Of a block of weights."""
        return math.prod(self.runs) * self.run

    def blocks(self, picks: Picks) -> int:
        """Blocks of channels; merged phases: the groups."""
        return self.spec.groups * (1 if self.merge else ceildiv(self.channels, picks.tile_oc))

    def parts(self, picks: Picks) -> int:
        """Blocks of lanes of a block of channels: more than one only where phases are merged."""
        return ceildiv(self.channels * self.x.stride, picks.tile_oc) if self.merge else 1

    def blockable(self, tile_oh: int, tile_ow: int) -> int:
        """What a task takes a block of: rows of tiles; in 1-D, tiles."""
        return ceildiv(self.y.pixels, tile_oh) if self.spec.rank > 1 else Even(self.width, tile_ow).count

    def task(self, picks: Picks) -> tuple[int, int]:
        """Rows of tiles of a task, and tiles of each."""
        tiles = Even(self.width, picks.tile_ow).count
        return (picks.block, tiles) if self.spec.rank > 1 else (1, min(picks.block, tiles))

    def pixels(self, picks: Picks) -> int:
        """Pixels of a row of a task, in each phase."""
        return min(self.task(picks)[1] * Even(self.width, picks.tile_ow).full, self.width)

    def extent(self, picks: Picks) -> list[int]:
        """Planes, rows and columns that a task reads."""
        lines = self.task(picks)[0] * picks.tile_oh
        return [n + last - first for n, (first, last) in zip((1, lines, self.pixels(picks)), self.reads, strict=True)]


class _Task(NamedTuple):
    """What one task works on.

    Attributes:
        image: the image.
        pixel: the plane of each phase, the first row and the first pixel of a row.
        columns: the first tile of a row, and how many there are.
        corner: the first plane, row and column that is read.
        panel: a copy of what is read, in src's layout; None where src is read.
        rows: the buffer of output rows; None where pixels are stored one by one.
        turned: a row of it as rows of channels.
    """

    image: Expr
    pixel: tuple[Expr, Expr, Expr]
    columns: tuple[Expr, Expr]
    corner: list[Expr]
    panel: tirx.Buffer
    rows: tirx.Buffer
    turned: tirx.Buffer


class _Channels(NamedTuple):
    """A block of channels: its index, its group, its first channel there and its vectors."""

    block: Expr
    group: Expr
    first: Expr
    vectors: int


class _Row(NamedTuple):
    """A row of tiles, in a phase of planes and rows: its index in the task, its first row there, and its height."""

    index: Expr
    y: Expr
    height: int
    phases: tuple[Phase, Phase]


class _Tile(NamedTuple):
    """A tile of a row: its index and first pixel in the task, its width, its phase, its vectors of lanes.

    ``weights`` is the index of their weights, ``place`` where the first pixel's sums go in the buffer of rows.
    """

    index: Expr
    x: Expr
    width: int
    phase: Phase
    vectors: int
    weights: Expr
    place: Expr


@dataclass(frozen=True)
class Kernel:
    """The statements of the whole layer."""

    spec: ConvSpec
    g: Geometry
    picks: Picks
    lanes: int
    src: tirx.Buffer
    weights: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer

    @property
    def pitch(self) -> int:
        """Numbers of an output pixel in the buffer of rows."""
        return self.g.channels if self.g.merge else self.picks.tile_oc

    def statement(self) -> tirx.Stmt:
        """The parallel loop over parts of the channels, images, planes and blocks of rows, around what a task does."""
        g, picks, parts = self.g, self.picks, self.picks.parallel_oc
        rows, tiles = g.task(picks)
        columns, blocks = Even(g.width, picks.tile_ow), g.blocks(picks)
        across = ceildiv(ceildiv(g.y.pixels, picks.tile_oh), rows)
        tasks = (parts, self.spec.n, g.z.pixels, across, ceildiv(columns.count, tiles))
        whole = Block()
        with whole.loop(math.prod(tasks), parallel=True) as (body, index):
            part, image, z, block_y, block_x = map(body.let, unflat(index, tasks))
            tile = body.let(block_x * tiles)
            count = tiles if columns.count % tiles == 0 else body.let(tirx.min(tiles, columns.count - tile))
            pixel = (z, body.let(block_y * (rows * picks.tile_oh)), body.let(columns.start(tile)))
            corner = [body.let(p + first) for p, (first, _) in zip(pixel, g.reads, strict=True)]
            panel = buffer = turned = None
            if picks.copy_src:
                panel = g.src.copied(body, self.src, self.spec.dtype, image, corner, g.extent(picks), self.lanes)
            if g.merge or g.dst.layout == "nchw":
                # Vectors of pixels are read past the last one; so are vectors of lanes.
                size = (g.pixels(picks) * g.x.stride + self.lanes) * self.pitch + picks.tile_oc
                buffer = body.buffer((picks.tile_oh, size))
            if buffer is not None and g.dst.layout == "nchw" and self.pitch > 1:
                # An odd number of vectors: rows begin in different sets of a cache.
                vectors = ceildiv(g.pixels(picks) * g.x.stride, self.lanes)
                turned = body.buffer((min(self.lanes, g.channels), (vectors + 1 - vectors % 2) * self.lanes))
            task = _Task(image, pixel, (tile, count), corner, panel, buffer, turned)
            first, end = (body.let(p * blocks // parts) for p in (part, part + 1))
            for inner, channels in self.channel_blocks(
                body, first, blocks // parts if blocks % parts == 0 else end - first
            ):
                self.block(inner, task, channels)
        return whole.statement()

    # ---- loops --------------------------------------------------------------------------------

    def channel_blocks(self, body: Block, first: Expr, count: Expr) -> Iterator[tuple[Block, _Channels]]:
        """Code for each block of channels: full ones, and a group's last one, which may have fewer vectors."""
        g, tile = self.g, self.picks.tile_oc
        per_group, width = self.g.blocks(self.picks) // self.spec.groups, tile // self.lanes
        last = ceildiv(g.channels - (per_group - 1) * tile, self.lanes)
        with body.loop(count) as (inner, i):
            block = inner.let(first + i)
            group, within = (inner.let(v) for v in unflat(block, (self.spec.groups, per_group)))
            full, rest = (per_group, None) if last == width or g.merge else (per_group - 1, last)
            for case, vectors in inner.cases(within, full, ceildiv(g.channels, self.lanes) if g.merge else width, rest):
                yield case, _Channels(block, group, case.let(within * tile), vectors)

    def block(self, body: Block, task: _Task, channels: _Channels) -> None:
        """All phases of all rows of a task with a block of channels."""
        g = self.g
        with body.loop(g.z.stride) as (planes, jz), planes.loop(g.y.stride) as (lines, jy):
            phases = (_bound(lines, g.z.phase(jz)), _bound(lines, g.y.phase(jy)))
            with lines.when(self.exists(g.z, task.pixel[0], phases[0])) as some:
                for body_row, row in self.rows(some, task, phases):
                    with body_row.when(self.exists(g.y, task.pixel[1] + row.y, phases[1])) as there:
                        for tile_body, tile in self.tiles(there, task, row, channels):
                            self.product(tile_body, task, row, tile, channels)
                        if task.rows is not None:
                            self.store_rows(there, task, row, channels)

    @staticmethod
    def exists(axis: Axis, pixel: Expr, phase: Phase) -> Expr:
        """Whether a phase has a pixel."""
        return True if axis.out % axis.stride == 0 else pixel * axis.stride + phase.first < axis.out

    def rows(self, body: Block, task: _Task, phases: tuple[Phase, Phase]) -> Iterator[tuple[Block, _Row]]:
        """Code for each row of tiles of a task: full ones, and the last one, which may be lower."""
        lines, height = self.g.y.pixels, self.picks.tile_oh
        rows, groups = self.g.task(self.picks)[0], ceildiv(lines, height)
        first = body.let(task.pixel[1] // height)
        with body.loop(rows if groups % rows == 0 else body.let(tirx.min(rows, groups - first))) as (inner, row):
            for case, size in inner.cases(first + row, lines // height, height, lines % height):
                yield case, _Row(row, row * height, size, phases)

    def tiles(self, body: Block, task: _Task, row: _Row, channels: _Channels) -> Iterator[tuple[Block, _Tile]]:
        """Code for each tile of a row: of each phase, or merged of each block of lanes."""
        g, tile_oc = self.g, self.picks.tile_oc
        if not g.merge:
            with body.loop(g.x.stride) as (inner, j):
                phase = _bound(inner, g.x.phase(j))
                with inner.when(True if g.x.out >= g.x.stride else phase.first < g.x.out) as some:
                    place = phase.first * tile_oc
                    yield from self.columns(
                        some, task, row, _Tile(0, 0, 0, phase, channels.vectors, channels.block, place)
                    )
            return
        parts = g.parts(self.picks)
        last = ceildiv(g.channels * g.x.stride - (parts - 1) * tile_oc, self.lanes)
        phase = Phase(-g.crop, g.columns[0], g.x.taps, 0)
        # The last block first: its vectors may reach into the next pixel's, which are written later.
        with body.loop(parts) as (inner, i):
            j = inner.let(parts - 1 - i)
            for case, vectors in inner.cases(j, parts - 1, tile_oc // self.lanes, last):
                weights = case.let(channels.block * parts + j)
                yield from self.columns(case, task, row, _Tile(0, 0, 0, phase, vectors, weights, j * tile_oc))

    def columns(self, body: Block, task: _Task, row: _Row, like: _Tile) -> Iterator[tuple[Block, _Tile]]:
        """Code for the tiles along a row, by their widths."""
        columns, across = Even(self.g.width, self.picks.tile_ow), self.g.task(self.picks)[1]
        with body.loop(task.columns[1]) as (inner, i):
            column = inner.let(task.columns[0] + i)
            for case, width in columns.cases(inner, column):
                x = case.let(columns.start(column) - task.pixel[2])
                place = case.let(x * (self.g.x.stride * self.pitch) + like.place)
                yield case, like._replace(index=row.index * across + i, x=x, width=width, place=place)

    # ---- the product --------------------------------------------------------------------------

    def product(self, body: Block, task: _Task, row: _Row, tile: _Tile, channels: _Channels) -> None:
        """The sums of a tile's lanes and pixels, and their store."""
        g, lanes, (z, y), x = self.g, self.lanes, row.phases, tile.phase
        pixels = [(ty, tx) for ty in range(row.height) for tx in range(tile.width)]
        sums = body.registers([(p, v) for p in pixels for v in range(tile.vectors)], lanes)
        rows, across = g.task(self.picks)
        # What follows: blocks of merged lanes come last first. Weights that are used once follow at a fixed distance.
        size, once = g.products * self.picks.tile_oc, rows * across == 1
        start = tile.weights * size + min(size, AHEAD) if once else (tile.weights + (-1 if g.merge else 1)) * size
        start = body.let(start)
        ahead = Ahead(self.weights, start, g.products, self.picks.tile_oc // lanes, tile.index, rows * across)
        origin = body.let(ahead.origin)
        with (
            body.loop(z.taps) as (planes, iz),
            planes.loop(y.taps) as (lines, iy),
            lines.loop(g.runs[2]) as (blocks, block),
            blocks.loop(x.taps if g.apart else 1) as (run, ix),
        ):
            index = ((z.position + iz) * g.runs[1] + y.position + iy) * g.runs[2] + block
            index = run.let(index * g.runs[3] + (x.position + ix if g.apart else 0))
            first = 0 if g.apart else run.let(x.position * g.inner)
            tap = [i * axis.gap for i, axis in zip((iz, iy, ix), (g.z, g.y, g.x), strict=True)]
            moved = [
                run.let(phase.source + i - first) for phase, i, (first, _) in zip((z, y, x), tap, g.reads, strict=True)
            ]

            def pixel(p: tuple[int, int], k: Expr) -> Expr:
                at = (moved[0], row.y + p[0] + moved[1], tile.x + p[1] + moved[2])
                return self.pixel(task, at, channels.group, block, k)

            def weight(v: int, k: Expr) -> Expr:
                return load(self.weights, "f32", [tile.weights, index, first + k, v * lanes], lanes, lanes)

            def fetch(step: Block, k: Expr) -> None:
                ahead.fetch(step, origin, index * g.run + first + k)

            multiply(run, sums, g.inner if g.apart else x.taps * g.inner, pixel, weight, fetch)
        if task.rows is None:
            self.store_pixels(body, task, row, tile, channels, sums)
            return
        for ty, tx in pixels:  # by pixels: what vectors write past the last lane, the next pixel overwrites
            for v in range(tile.vectors):
                place = [ty, tile.place + (tx * g.x.stride * self.pitch + v * lanes)]
                body.add(store(task.rows, "f32", place, sums[(ty, tx), v], lanes, lanes))

    def pixel(self, task: _Task, at: tuple[Expr, Expr, Expr], group: Expr, block: Expr, k: Expr) -> Expr:
        """The k-th number, as f32, of a run from a pixel of what the task reads."""
        g, (z, y, x) = self.g, at
        if task.panel is None:
            z, y, x = (c + i for c, i in zip(task.corner, at, strict=True))
        inner = g.src.block
        if g.src.layout == "nchw":
            block, column = group * g.inner + k, x
        elif g.src.layout == "nhwc":
            block, column = 0, x * inner + group * g.inner + k
        else:
            block, column = group * g.runs[2] + block, x * inner + k
        if task.panel is not None:
            return task.panel[z, y, block, column]
        return widen(self.src[tuple(g.src.place(task.image, block, [z, y, 0], column))], self.spec.dtype)

    # ---- the store ----------------------------------------------------------------------------

    def store_pixels(
        self, body: Block, task: _Task, row: _Row, tile: _Tile, channels: _Channels, sums: Registers
    ) -> None:
        """The epilogue and store of a tile's vectors of channels, at every stride-th pixel."""
        g, (z, y) = self.g, row.phases
        for v in range(tile.vectors):
            for case, count, given in self.vectors(body, channels, v):
                for ty in range(row.height):
                    line = task.pixel[1] + row.y + ty
                    with case.when(self.exists(g.y, line, y) if ty else True) as there:
                        for tx in range(tile.width):
                            column = task.pixel[2] + tile.x + tx
                            at = [task.pixel[0] * g.z.stride + z.first, line * g.y.stride + y.first]
                            at.append(column * g.x.stride + tile.phase.first)
                            with there.when(self.exists(g.x, column, tile.phase)) as exists:
                                self.store_vector(exists, task, at, channels, v, sums[(ty, tx), v], count, given)

    def vectors(self, body: Block, channels: _Channels, v: Expr) -> Iterator[tuple[Block, int, dict[str, Expr]]]:
        """Code for the v-th vector of channels of a block, by how many channels it has, and their parameters."""
        rest = self.g.channels % self.lanes
        lane = body.let(channels.first + v * self.lanes)
        for case, count in body.cases(lane, self.g.channels - rest, self.lanes, rest):
            channel = case.let(channels.group * self.g.channels + lane)
            yield case, count, load_parameters(case, self.parameters, channel, self.lanes, count)

    def store_vector(
        self,
        body: Block,
        task: _Task,
        pixel: Sequence[Expr],
        channels: _Channels,
        v: Expr,
        value: Expr,
        count: int,
        given: dict[str, Expr],
    ) -> None:
        """The epilogue and store of a vector of channels of a pixel."""
        place = (task.image, channels.group * self.g.channels + channels.first + v * self.lanes, pixel)
        self.g.dst.finish(body, self.spec, (self.dst, self.residual), place, value, self.lanes, count, given)

    def store_rows(self, body: Block, task: _Task, row: _Row, channels: _Channels) -> None:
        """The epilogue and store of the buffer's rows, whose phases are all there."""
        g, (z, y) = self.g, row.phases
        start, end, skipped = 0, g.x.out, g.crop
        if self.spec.rank == 1:
            columns = Even(g.width, self.picks.tile_ow)
            begin = body.let(task.pixel[2] * g.x.stride - g.crop)
            start = body.let(tirx.max(begin, 0))
            last = columns.start(task.columns[0] + task.columns[1]) * g.x.stride - g.crop
            end, skipped = body.let(tirx.min(last, g.x.out)), body.let(start - begin)
        with body.loop(row.height) as (line, ty):
            pixel = [task.pixel[0] * g.z.stride + z.first, (task.pixel[1] + row.y + ty) * g.y.stride + y.first, start]
            with line.when(self.exists(g.y, task.pixel[1] + row.y + ty, y)) as there:
                each = self.store_squares if g.dst.layout == "nchw" else self.store_columns
                each(there, task, channels, pixel, (ty, skipped), end)

    def store_columns(
        self,
        body: Block,
        task: _Task,
        channels: _Channels,
        pixel: Sequence[Expr],
        place: tuple[Expr, Expr],
        end: Expr,
    ) -> None:
        """A row of the buffer, from a pixel of dst and its ``place`` to an ``end``, as vectors of channels."""
        with body.loop(end - pixel[2]) as (one, i), one.loop(channels.vectors) as (some, v):
            at = [place[0], (place[1] + i) * self.pitch + v * self.lanes]
            value = load(task.rows, "f32", at, self.lanes, self.lanes)
            for case, count, given in self.vectors(some, channels, v):
                self.store_vector(case, task, [*pixel[:2], pixel[2] + i], channels, v, value, count, given)

    def store_squares(
        self,
        body: Block,
        task: _Task,
        channels: _Channels,
        pixel: Sequence[Expr],
        place: tuple[Expr, Expr],
        end: Expr,
    ) -> None:
        """The same as vectors of pixels, transposed in registers.

        A channel after the other: rows of many channels lie where they share few sets of a cache.
        """
        g, lanes, (ty, skipped), length = self.g, self.lanes, place, end - pixel[2]
        steps, kept = (length + (lanes - 1)) // lanes, min(lanes, g.channels)
        with body.loop(channels.vectors) as (some, v):
            first = some.let(channels.first + v * lanes)
            turned = self.pitch > 1
            row, origin = (task.turned, 0) if turned else (task.rows, skipped)
            if turned:
                with some.loop(steps) as (step, i):
                    start = step.let((skipped + i * lanes) * self.pitch + v * lanes)
                    square = [
                        step.let(load(task.rows, "f32", [ty, start + t * self.pitch], lanes, lanes))
                        for t in range(lanes)
                    ]
                    for t, value in enumerate(interleave(step, square, lanes)[:kept]):
                        step.add(store(row, "f32", [t, i * lanes], value, lanes, lanes))
            count = kept if g.channels % kept == 0 else some.let(tirx.min(lanes, g.channels - first))
            with some.loop(count) as (one, t):
                channel = one.let(channels.group * g.channels + first + t)
                given = spread_parameters(one, self.parameters, channel, lanes)
                for case, x, size in self.steps(one, length):
                    where = g.dst.element(task.image, channel, [*pixel[:2], pixel[2] + x])
                    value = load(row, "f32", [t if turned else ty, origin + x], lanes, lanes)
                    more = {"within": True, "size": end} if size is None else {}
                    finish(
                        case, self.spec, self.dst, self.residual, where, value, lanes, size or lanes, **more, **given
                    )

    def steps(self, body: Block, length: Expr) -> Iterator[tuple[Block, Expr, int | None]]:
        """Code for the vectors of a row: where they begin, and their pixels; None where these are not known yet."""
        lanes = self.lanes
        with body.loop(length // lanes) as (step, i):
            yield step, step.let(i * lanes), lanes
        if not isinstance(length, int):
            with body.when(length % lanes > 0) as rest:
                yield rest, rest.let(length // lanes * lanes), None
        elif length % lanes:
            yield body, length // lanes * lanes, length % lanes


def _bound(body: Block, phase: Phase) -> Phase:
    """A phase whose numbers are variables."""
    return Phase(*map(body.let, phase))
