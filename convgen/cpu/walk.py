"""Output channels in the vector lanes: the statements of such a kernel (:mod:`convgen.cpu.geometry` has its sizes).

One walk over tasks, rows of tiles, tiles and blocks of channels, by phases of the output (:mod:`convgen.cpu.phases`).
A forward convolution has one phase, whose pixels are a stride apart in src. What the walk does is said in
``schedules/cpu_direct.py`` and ``schedules/cpu_transposed.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..deferred import tirx
from ..lowering.compute import STORED, Expr, ceildiv, flat, unflat, widen
from ..problem.dtypes import BYTES, RANGES
from .geometry import SHORT_ROW, Geometry, taps_inside
from .model import Core
from .narrowing import TOGETHER, Stored, store_bytes
from .panel import Source, converted, word
from .phases import Axis, Phase
from .product import LINE, Even, fetching, multiply
from .tasks import TaskKernel
from .vector import (
    Block,
    Registers,
    finish,
    interleave,
    load,
    load_parameters,
    prefetch,
    spread_parameters,
    store,
    zeros,
)


class _Task(NamedTuple):
    """What one task works on.

    Attributes:
        image: the image.
        pixel: the plane of each phase, the first row and the first pixel of a row.
        columns: the first tile of a row, and how many there are.
        first, end: the blocks of channels: the first, and the one after the last.
        corner: the first plane, row and column that is read.
        panel: a copy of what is read; None where src is read.
        rows: the buffer of output rows; None where pixels are stored from registers.
        turned: a row of it as rows of channels.
    """

    image: Expr
    pixel: tuple[Expr, Expr, Expr]
    columns: tuple[Expr, Expr]
    first: Expr
    end: Expr
    corner: list[Expr]
    panel: tirx.Buffer
    rows: tirx.Buffer
    turned: tirx.Buffer


#: The first tap along an axis that is computed, and how many are.
_Taps = tuple[Expr, Expr]


class _Row(NamedTuple):
    """A row of tiles, in a phase of planes and rows.

    Attributes:
        index, y: of the task's: its number, and its first row.
        height: rows.
        phases: of planes and rows.
        taps: those of planes, and of rows, that are computed; None where all are.
    """

    index: Expr
    y: Expr
    height: int
    phases: tuple[Phase, Phase]
    taps: tuple[_Taps, _Taps] | None


class _Tile(NamedTuple):
    """A tile: its row, its index and first pixel in the task, its width, its phase."""

    row: _Row
    index: Expr
    x: Expr
    width: int
    phase: Phase

    @property
    def pixels(self) -> list[tuple[int, int]]:
        return [(ty, tx) for ty in range(self.row.height) for tx in range(self.width)]


class _Channels(NamedTuple):
    """A block of channels, or of its lanes where phases are merged.

    Attributes:
        group, first: its group, and its first channel there.
        vectors: of lanes.
        weights: the index of the block's weights.
        lane: the first of its lanes.
    """

    group: Expr
    first: Expr
    vectors: int
    weights: Expr
    lane: Expr


class _Line(NamedTuple):
    """A row of the buffer of rows, and where it goes in dst: from a pixel there, before which the buffer's row has some
    that are ``skipped``, to the ``end`` of a row.
    """

    row: Expr
    skipped: Expr
    pixel: list[Expr]
    end: Expr


@dataclass(frozen=True)
class Kernel(TaskKernel):
    """The statements of the whole layer: tasks are parts of the channels, images, planes, and blocks of rows."""

    g: Geometry
    lanes: int
    core: Core

    @property
    def pitch(self) -> int:
        """Numbers of an output pixel in the buffer of rows."""
        return self.g.channels if self.g.merge else self.picks.tile_oc

    @property
    def tasks(self) -> tuple[int, ...]:
        g, (rows, tiles) = self.g, self.g.task(self.picks)
        down, across = ceildiv(g.y.pixels, self.picks.tile_oh), Even(g.width, self.picks.tile_ow).count
        return self.picks.parallel_oc, self.spec.n, g.z.pixels, ceildiv(down, rows), ceildiv(across, tiles)

    def statement(self) -> tirx.Stmt:
        return self.g.operation.with_helper(super().statement())

    def work(self, body: Block, place: Sequence[Expr]) -> None:
        g, picks, parts = self.g, self.picks, self.picks.parallel_oc
        (rows, tiles), columns, blocks = g.task(picks), Even(g.width, picks.tile_ow), g.blocks(picks)
        part, image, z, block_y, block_x = place
        tile = body.let(block_x * tiles)
        count = tiles if columns.count % tiles == 0 else body.let(tirx.min(tiles, columns.count - tile))
        pixel = (z, body.let(block_y * (rows * picks.tile_oh)), body.let(columns.start(tile)))
        corner = [body.let(p * m + first) for p, m, (first, _) in zip(pixel, g.moves, g.reads, strict=True)]
        panel = buffer = turned = None
        if picks.copy_src and g.operation.converts:
            whole_rows = self.spec.rank > 1
            first = [*corner[:2], g.reads[2][0] if whole_rows else corner[2]]
            source = Source(self.spec, self.src, image, first, g.extent(picks), self.src_zero)
            panel = converted(body, g.operation, source, g.read, self.lanes)
        elif picks.copy_src:
            panel = g.src.copied(body, self.src, self.spec.dtype, image, corner, g.extent(picks), self.lanes)
        if g.buffered:
            # Vectors of pixels are read past the last one; so are vectors of lanes.
            size = (g.pixels(picks) * g.x.stride + self.lanes) * self.pitch + picks.tile_oc
            buffer = body.buffer((picks.tile_oh, size), g.operation.sums)
        if g.buffered and g.dst.layout == "nchw" and self.pitch > 1:
            # An odd number of vectors: rows begin in different sets of a cache.
            vectors = ceildiv(g.pixels(picks) * g.x.stride, self.lanes)
            turned = body.buffer(
                (min(self.lanes, g.channels), (vectors + 1 - vectors % 2) * self.lanes), g.operation.sums
            )
        first, end = (body.let(p * blocks // parts) for p in (part, part + 1))
        self.task(body, _Task(image, pixel, (tile, count), first, end, corner, panel, buffer, turned))

    def task(self, body: Block, task: _Task) -> None:
        """All tiles of a task with all its blocks of channels; `order` is that of these two loops."""
        if self.picks.get("order", "oc") == "pixels":
            for row_body, row in self.rows(body, task):
                for tile_body, tile in self.tiles(row_body, task, row):
                    for inner, channels in self.channel_blocks(tile_body, task):
                        self.product(inner, task, tile, channels)
            return
        for block_body, block in self.channel_blocks(body, task):
            for row_body, row in self.rows(block_body, task):
                for lanes_body, channels in self.lane_blocks(row_body, block):
                    for inner, tile in self.tiles(lanes_body, task, row):
                        self.product(inner, task, tile, channels)
                if task.rows is not None:
                    self.store_rows(row_body, task, row, block)

    # ---- loops --------------------------------------------------------------------------------

    def channel_blocks(self, body: Block, task: _Task) -> Iterator[tuple[Block, _Channels]]:
        """Code for each block of channels of a task: full ones, and a group's last, which may have fewer vectors."""
        g, tile, parts = self.g, self.picks.tile_oc, self.picks.parallel_oc
        blocks = g.blocks(self.picks)
        each, vectors = blocks // self.spec.groups, ceildiv(g.channels, self.lanes)
        width = vectors if g.merge else tile // self.lanes
        with body.loop(blocks // parts if blocks % parts == 0 else task.end - task.first) as (inner, i):
            block = inner.let(task.first + i)
            of_group = unflat(block, (self.spec.groups, each))
            group, within = (0, block) if self.spec.groups == 1 else map(inner.let, of_group)
            for case, count in inner.cases(within, vectors // width, width, vectors % width):
                yield case, _Channels(group, case.let(within * tile), count, block, 0)

    def lane_blocks(self, body: Block, block: _Channels) -> Iterator[tuple[Block, _Channels]]:
        """Code for each block of lanes of a block of channels: of merged phases; else there is only one."""
        g, tile, parts = self.g, self.picks.tile_oc, self.g.parts(self.picks)
        if not g.merge:
            yield body, block
            return
        last = ceildiv(g.channels * g.x.stride - (parts - 1) * tile, self.lanes)
        # The last block first: its vectors may reach into the next pixel's, which are written later.
        with body.loop(parts) as (inner, i):
            j = inner.let(parts - 1 - i)
            for case, vectors in inner.cases(j, parts - 1, tile // self.lanes, last):
                yield case, block._replace(vectors=vectors, weights=case.let(block.weights * parts + j), lane=j * tile)

    def rows(self, body: Block, task: _Task) -> Iterator[tuple[Block, _Row]]:
        """Code for each row of tiles of a task, phase by phase: full ones, and the last one, which may be lower."""
        g, lines, height = self.g, self.g.y.pixels, self.picks.tile_oh
        rows, groups = g.task(self.picks)[0], ceildiv(lines, height)
        with body.loop(g.z.stride) as (planes, jz), planes.loop(g.y.stride) as (phase_body, jy):
            phases = (_bound(phase_body, g.z.phase(jz)), _bound(phase_body, g.y.phase(jy)))
            with phase_body.when(_exists(g.z, task.pixel[0], phases[0])) as some:
                first = some.let(task.pixel[1] // height)
                with some.loop(rows if groups % rows == 0 else some.let(tirx.min(rows, groups - first))) as (inner, i):
                    for case, size in inner.cases(first + i, lines // height, height, lines % height):
                        with case.when(_exists(g.y, task.pixel[1] + i * height, phases[1])) as exists:
                            yield exists, _Row(i, i * height, size, phases, self.taps(exists, task, i * height, size))

    def taps(self, body: Block, task: _Task, row: Expr, height: int) -> tuple[_Taps, _Taps] | None:
        """The taps of planes and rows that a row of tiles has, where not all."""
        if not self.g.skips:
            return None

        def inside(axis: Axis, move: int, pixel: Expr, pixels: int) -> _Taps:
            start, end = (body.let(tap) for tap in taps_inside(axis, move, pixel, pixel + (pixels - 1)))
            return start, body.let(tirx.max(0, end - start))

        (z, down), (y, move) = (self.g.z, self.g.moves[0]), (self.g.y, self.g.moves[1])
        return inside(z, down, task.pixel[0], 1), inside(y, move, task.pixel[1] + row, height)

    def tiles(self, body: Block, task: _Task, row: _Row) -> Iterator[tuple[Block, _Tile]]:
        """Code for the tiles of a row, phase by phase, by their widths."""
        g, columns, across = self.g, Even(self.g.width, self.picks.tile_ow), self.g.task(self.picks)[1]
        with body.loop(1 if g.merge else g.x.stride) as (phase_body, j):
            phase = Phase(-g.crop, g.reads[2][0], g.x.taps, 0) if g.merge else _bound(phase_body, g.x.phase(j))
            all_exist = g.merge or g.x.out >= g.x.stride
            with (
                phase_body.when(True if all_exist else phase.first < g.x.out) as some,
                some.loop(task.columns[1]) as (inner, i),
            ):
                column = inner.let(task.columns[0] + i)
                for case, width in columns.cases(inner, column):
                    x = case.let(columns.start(column) - task.pixel[2])
                    yield case, _Tile(row, row.index * across + i, x, width, phase)

    # ---- the product --------------------------------------------------------------------------

    def product(self, body: Block, task: _Task, tile: _Tile, channels: _Channels) -> None:
        """The sums of a tile's lanes and pixels, and their store."""
        g, lanes, tile_oc, weights = self.g, self.lanes, self.picks.tile_oc, self.parameters["weights"]
        phases, axes = (*tile.row.phases, tile.phase), (g.z, g.y, g.x)
        z, y, x = phases
        operation = g.operation
        sums = body.registers([(p, v) for p in tile.pixels for v in range(channels.vectors)], lanes, operation.sums)
        if "start" in self.parameters:
            for v in range(channels.vectors):
                place = [channels.weights, v * lanes]
                start = body.let(load(self.parameters["start"], "i32", place, lanes, lanes))
                for p in tile.pixels:
                    sums.put(body, (p, v), start)
        # The group's first block of channels in src, of a run or of one channel.
        of_group = g.read.channels // self.spec.groups // (1 if g.read.layout == "nchw" else g.inner)
        first_block = body.let(channels.group * of_group)
        if self.fetches_outputs:
            self.fetch_outputs(body, task, tile, channels)
        if g.fetches_rows(self.core.l2_size):
            with body.loop(channels.vectors * lanes) as (one, c):
                row = channels.group * g.channels + channels.first + c
                for line in range(tile.row.height):
                    line_of_dst = (task.image, row, self.dst_pixel(task, tile, (line, 0)))
                    g.dst.fetch(one, self.dst, line_of_dst, sorted({0, tile.width - 1}))
        images_ahead = g.fetches_images(self.picks, self.core.l2_size)
        fetched = self.fetching(body, tile, channels)
        length, is_short = g.words(1 if g.apart else x.taps), g.run < SHORT_ROW
        counts = (z.taps, y.taps, x.taps if g.apart else 1, g.runs[3], length if is_short else 1)
        with _loops(body, counts, tile.row.taps) as (run, (iz, iy, ix, block, step)):
            taps = (z.position + iz, y.position + iy, x.position + ix if g.apart else 0)
            index = run.let(flat((*taps, block), g.runs))
            first = step if g.apart else run.let(g.words(x.position) + step)
            moved = [
                run.let(phase.source - start + i * axis.gap)
                for phase, axis, i, (start, _) in zip(phases, axes, (iz, iy, ix), g.reads, strict=True)
            ]

            def met(p: tuple[int, int]) -> list[Expr]:
                of_phase = (0, tile.row.y + p[0], tile.x + p[1])
                return [i * m + offset for i, m, offset in zip(of_phase, g.moves, moved, strict=True)]

            def pixel(p: tuple[int, int], k: Expr) -> Expr:
                return self.pixel(task, met(p), first_block, block, step + k)

            dtype = STORED[operation.word]

            def weight(v: int, k: Expr) -> Expr:
                return load(weights, dtype, [channels.weights, index, first + k, v * lanes], lanes, lanes)

            def fetch(step: Block, k: Expr) -> None:
                if not images_ahead:
                    fetched(step, index * g.run + first + k)
                    return
                row, columns = first_block + first + k, range(0, (tile.width - 1) * g.moves[2] + 1, LINE)
                for line in range(tile.row.height):
                    at = [c + i for c, i in zip(task.corner, met((line, 0)), strict=True)]
                    g.src.fetch(step, self.src, (task.image + 1, row, at), columns)

            # What a single tile uses once, one block of channels after another, the processor itself fetches ahead.
            is_ahead = self.picks.get("order", "oc") == "oc" and math.prod(g.task(self.picks)) > 1
            fetches = images_ahead or is_ahead
            multiply(run, sums, 1 if is_short else length, pixel, weight, fetch if fetches else None, operation)
        if task.rows is None:
            stored = self.store_squares if g.dst.layout == "nchw" else self.store_channels
            stored(body, task, tile, channels, sums)
            return
        place = body.let((tile.x * g.x.stride * self.pitch) + (channels.lane if g.merge else x.first * tile_oc))
        for ty, tx in tile.pixels:  # by pixels: what vectors write past the last lane, the next pixel overwrites
            for v in range(channels.vectors):
                at = [ty, place + (tx * g.x.stride * self.pitch + v * lanes)]
                body.add(store(task.rows, STORED[operation.sums], at, sums[(ty, tx), v], lanes, lanes))

    def fetching(self, body: Block, tile: _Tile, channels: _Channels) -> Callable[[Block, Expr], None]:
        """What fetches a tile's share of the weights that follow; blocks of merged lanes come last first."""
        g, (rows, across), size = self.g, self.g.task(self.picks), self.g.products * self.picks.tile_oc
        start, fmas = (channels.weights + (-1 if g.merge else 1)) * size, len(tile.pixels) * channels.vectors
        share = (tile.index, rows * across)
        return fetching(body, self.core, self.parameters["weights"], start, g.products, fmas, share)

    @property
    def fetches_outputs(self) -> bool:
        """Whether what a tile adds to and writes is fetched while its products are summed: where it comes from beyond
        the L2 cache, and these are short.
        """
        spec, g = self.spec, self.g
        is_far = sum(spec.bytes[name] for name in ("dst", "residual") if name in spec.bytes) > self.core.l2_size // 2
        return g.operation.converts and g.dst.layout != "nchw" and not g.buffered and not spec.transposed and is_far

    def fetch_outputs(self, body: Block, task: _Task, tile: _Tile, channels: _Channels) -> None:
        """Fetch the lines of dst and the residual that a tile's vectors lie in."""
        g, tensors = self.g, {"dst": self.dst, "residual": self.residual}
        first = channels.group * g.channels + channels.first
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            together = 4 * LINE // (self.lanes * BYTES[self.spec.dtypes[name]])
            for p, v in itertools.product(tile.pixels, range(channels.vectors)):
                side_by_side = v if g.dst.layout == "nhwc" else p[1]
                if side_by_side % together == 0:
                    at = g.dst.element(task.image, first + v * self.lanes, self.dst_pixel(task, tile, p))
                    body.add(prefetch(tensor, at))

    def pixel(self, task: _Task, at: Sequence[Expr], first: Expr, block: Expr, k: Expr) -> Expr:
        """The k-th word of a run from a pixel of what the task reads; ``first``: its group's first block of channels,
        or where a block has the channels of several groups, the group.
        """
        g, inner, k = self.g, self.g.read.block, k * self.g.operation.depth
        z, y, x = at if task.panel is not None else (c + i for c, i in zip(task.corner, at, strict=True))
        if g.read.layout == "nchw":
            block, column = (first + k, x) if g.apart else (first + block, x + k)
        elif g.read.layout == "nhwc":
            block, column = 0, x * inner + first * g.inner + k
        else:
            block, column = first + block, x * inner + k
        if task.panel is not None:
            return word(task.panel, g.operation, [z, y, block, column])
        place = g.src.place(task.image, block, [z, y, 0], column)
        if g.operation.converts:
            return word(self.src, g.operation, place)
        return widen(self.src[tuple(place)], self.spec.dtype)

    # ---- the store ----------------------------------------------------------------------------

    def dst_pixel(self, task: _Task, tile: _Tile, p: tuple[Expr, Expr]) -> list[Expr]:
        """Where in dst a tile's pixel is."""
        pixel = (task.pixel[0], task.pixel[1] + tile.row.y + p[0], task.pixel[2] + tile.x + p[1])
        phases, axes = (*tile.row.phases, tile.phase), (self.g.z, self.g.y, self.g.x)
        return [i * axis.stride + phase.first for i, axis, phase in zip(pixel, axes, phases, strict=True)]

    def store_channels(self, body: Block, task: _Task, tile: _Tile, channels: _Channels, sums: Registers) -> None:
        """The epilogue and store of a tile's vectors of channels, one per pixel."""
        g = self.g
        if self.packs:
            self.store_packed(body, task, tile, channels, sums)
            return
        for v in range(channels.vectors):
            for case, channel, count, given in self.vectors(body, channels, v):
                for inner, p, value in self.each(case, {p: sums[p, v] for p in tile.pixels}):
                    line, column = task.pixel[1] + tile.row.y + p[0], task.pixel[2] + tile.x + p[1]
                    with (
                        inner.when(_exists(g.y, line, tile.row.phases[1])) as there,
                        there.when(_exists(g.x, column, tile.phase)) as exists,
                    ):
                        place = (task.image, channel, self.dst_pixel(task, tile, p))
                        self.finish_channels(exists, place, value, count, given)

    def finish_channels(self, body: Block, place: Any, value: Expr, count: int, given: Mapping[str, Expr]) -> None:
        """The epilogue and store of a vector of a pixel's channels; ``place``: image, channel, pixel."""
        tensors, narrowed = (self.dst, self.residual), self.g.operation.narrowed
        self.g.dst.finish(body, self.spec, tensors, place, value, self.lanes, count, given, narrowed)

    def finish_pixels(self, body: Block, place: Sequence[Expr], value: Expr, count: int, **more: Any) -> None:
        """The same of a vector of pixels of a channel."""
        narrowed = self.g.operation.narrowed
        finish(body, self.spec, self.dst, self.residual, place, value, self.lanes, count, narrowed=narrowed, **more)

    @property
    def packs(self) -> bool:
        """Whether vectors are stored together, as bytes: whole ones, of pixels that all exist."""
        spec, g = self.spec, self.g
        whole = g.channels % self.lanes == g.dst.block % self.lanes == 0
        return g.operation.packs and spec.dst_dtype in RANGES and whole and not spec.transposed

    def store_packed(self, body: Block, task: _Task, tile: _Tile, channels: _Channels, sums: Registers) -> None:
        """The same of bytes, several vectors together: those that lie side by side in dst follow each other."""
        g, numbers = self.g, range(channels.vectors)
        by_channels = g.dst.layout == "nhwc"
        first = channels.group * g.channels + channels.first
        at = {v: body.let(first + v * self.lanes) for v in numbers}
        given = {v: load_parameters(body, self.parameters, at[v], self.lanes, self.lanes) for v in numbers}
        zero = body.let(self.parameters["dst_zero"][0]) if self.spec.dst_zero else None
        keys = [(p, v) for p in tile.pixels for v in numbers]
        if not by_channels:
            keys.sort(key=lambda key: key[1])
        for start in range(0, len(keys), TOGETHER):
            vectors: list[Stored] = []
            for i, (p, v) in enumerate(keys[start : start + TOGETHER]):
                before = keys[start + i - 1] if i else None
                follows = before == ((p, v - 1) if by_channels else ((p[0], p[1] - 1), v))
                place = g.dst.element(task.image, at[v], self.dst_pixel(task, tile, p))
                vectors.append(Stored(place, sums[p, v], given[v], follows))
            tensors, permutes = (self.dst, self.residual), g.operation.permutes
            store_bytes(body, self.spec, tensors, vectors, zero, permutes=permutes)

    def vectors(
        self, body: Block, channels: _Channels, v: Expr
    ) -> Iterator[tuple[Block, Expr, int, Mapping[str, Expr]]]:
        """Code for the v-th vector of channels of a block: its first channel, how many it has, and their parameters."""
        rest = self.g.channels % self.lanes
        within = body.let(channels.first + v * self.lanes)
        for case, count in body.cases(within, self.g.channels - rest, self.lanes, rest):
            channel = case.let(channels.group * self.g.channels + within)
            yield case, channel, count, load_parameters(case, self.parameters, channel, self.lanes, count)

    def store_squares(self, body: Block, task: _Task, tile: _Tile, channels: _Channels, sums: Registers) -> None:
        """The same as rows of pixels, transposed in registers, each with the epilogue of its channel."""
        lanes, g = self.lanes, self.g
        for v in range(channels.vectors):
            within = body.let(channels.first + v * lanes)
            first = body.let(channels.group * g.channels + within)
            for y, x in ((y, x) for y, x in tile.pixels if x % lanes == 0):
                count = min(lanes, tile.width - x)
                none = zeros(lanes, g.operation.sums)
                square = [sums[(y, x + t), v] if t < count else none for t in range(lanes)]
                rows = {(0, t): row for t, row in enumerate(interleave(body, square, lanes))}
                for inner, (_, t), row in self.each(body, rows):
                    with inner.when(True if g.channels % lanes == 0 else within + t < g.channels) as exists:
                        given = spread_parameters(exists, self.parameters, first + t, lanes)
                        place = g.dst.element(task.image, first + t, self.dst_pixel(task, tile, (y, x)))
                        self.finish_pixels(exists, place, row, count, **given)

    def each(
        self, body: Block, vectors: Mapping[tuple[int, int], Expr]
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
        dtype = STORED[self.g.operation.sums]
        sums = body.buffer((len(vectors) // width, width, self.lanes), self.g.operation.sums)
        for (y, x), vector in vectors.items():
            body.add(store(sums, dtype, [y, x, 0], vector, self.lanes, self.lanes))
        with body.loop(len(vectors) // width) as (row, y), row.loop(width) as (inner, x):
            yield inner, (y, x), inner.let(load(sums, dtype, [y, x, 0], self.lanes, self.lanes))

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
        stored = self.store_turned if g.dst.layout == "nchw" else self.store_columns
        with body.loop(row.height) as (inner, ty):
            y_out = (task.pixel[1] + row.y + ty) * g.y.stride + y.first
            with inner.when(_exists(g.y, task.pixel[1] + row.y + ty, y)) as exists:
                pixel = [task.pixel[0] * g.z.stride + z.first, y_out, start]
                stored(exists, task, channels, _Line(ty, skipped, pixel, end))

    def store_columns(self, body: Block, task: _Task, channels: _Channels, line: _Line) -> None:
        """A row as vectors of channels."""
        *outer, start = line.pixel
        with body.loop(line.end - start) as (one, i), one.loop(channels.vectors) as (some, v):
            at = [line.row, (line.skipped + i) * self.pitch + v * self.lanes]
            value = load(task.rows, STORED[self.g.operation.sums], at, self.lanes, self.lanes)
            for case, channel, count, given in self.vectors(some, channels, v):
                place = (task.image, channel, [*outer, start + i])
                self.finish_channels(case, place, value, count, given)

    def store_turned(self, body: Block, task: _Task, channels: _Channels, line: _Line) -> None:
        """A row as vectors of pixels, transposed in registers.

        A channel after the other: rows of many channels lie where they share few sets of a cache.
        """
        g, lanes, (*outer, start) = self.g, self.lanes, line.pixel
        length, kept, turned = line.end - start, min(lanes, g.channels), self.pitch > 1
        dtype = STORED[g.operation.sums]
        with body.loop(channels.vectors) as (some, v):
            first = some.let(channels.first + v * lanes)
            if turned:
                with some.loop((length + (lanes - 1)) // lanes) as (step, i):
                    at = step.let((line.skipped + i * lanes) * self.pitch + v * lanes)
                    places = [[line.row, at + t * self.pitch] for t in range(lanes)]
                    square = [step.let(load(task.rows, dtype, place, lanes, lanes)) for place in places]
                    for t, value in enumerate(interleave(step, square, lanes)[:kept]):
                        step.add(store(task.turned, dtype, [t, i * lanes], value, lanes, lanes))
            count = kept if g.channels % kept == 0 else some.let(tirx.min(lanes, g.channels - first))
            with some.loop(count) as (one, t):
                channel = one.let(channels.group * g.channels + first + t)
                given = spread_parameters(one, self.parameters, channel, lanes)
                for case, x, size in _steps(one, length, lanes):
                    where = g.dst.element(task.image, channel, [*outer, start + x])
                    row, place = (task.turned, [t, x]) if turned else (task.rows, [line.row, line.skipped + x])
                    value = load(row, dtype, place, lanes, lanes)
                    more = {"within": True, "size": line.end} if size is None else {}
                    self.finish_pixels(case, where, value, size or lanes, **more, **given)


@contextmanager
def _loops(
    body: Block, counts: Sequence[Expr], ranges: tuple[_Taps, _Taps] | None = None
) -> Iterator[tuple[Block, list[Expr]]]:
    """The body of nested loops, and their variables; where counts are known, of one loop: LLVM would write out what has
    few passes, rows of a kernel and short runs, and keep all that they load on the stack.

    Args:
        ranges: of the two outer loops, where these are not whole: the first pass and how many there are.
    """
    if ranges is not None:
        (outer, planes), (first, rows) = ranges
        within = math.prod(counts[2:])
        with body.loop(planes) as (plane, iz), plane.loop(rows * within) as (inner, i):
            yield inner, [outer + iz, *unflat(i + first * within, counts[1:])]
        return
    if all(isinstance(count, int) for count in counts):
        with body.loop(math.prod(counts)) as (inner, i):
            yield inner, unflat(i, counts)
        return
    with ExitStack() as loops:
        index = []
        for count in counts:
            body, i = loops.enter_context(body.loop(count))
            index.append(i)
        yield body, index


def _steps(body: Block, length: Expr, lanes: int) -> Iterator[tuple[Block, Expr, int | None]]:
    """Code for the vectors of a row: where they begin, and their pixels; None where these are not known yet."""
    with body.loop(length // lanes) as (step, i):
        yield step, step.let(i * lanes), lanes
    if not isinstance(length, int):
        with body.when(length % lanes > 0) as rest:
            yield rest, rest.let(length // lanes * lanes), None
    elif length % lanes:
        yield body, length // lanes * lanes, length % lanes


def _exists(axis: Axis, pixel: Expr, phase: Phase) -> Expr:
    """Whether a phase has a pixel."""
    return True if axis.out % axis.stride == 0 else pixel * axis.stride + phase.first < axis.out


def _bound(body: Block, phase: Phase) -> Phase:
    """A phase whose numbers are variables."""
    return Phase(*map(body.let, phase))
