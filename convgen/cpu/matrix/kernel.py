"""The statements of a convolution by matrix tiles, as ``schedules/cpu_matrix.py`` says what it does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...deferred import tirx
from ...lowering.compute import STORAGE, Expr, ceildiv, round_up, unflat
from .. import bf16
from ..tasks import TaskKernel
from ..vector import (
    Block,
    finish,
    interleave,
    load_parameters,
    load_stored,
    prefetch,
    spread_parameters,
    store_stored,
)
from . import tiles
from .geometry import CHANNELS, PIXELS, Geometry
from .panel import LANES

#: Registers: sums by rows and columns of tiles, pixels, weights.
SUMS, A, B = ((0, 1), (2, 3)), (4, 5), (6, 7)


class _Task(NamedTuple):
    """What a task works on: the image and plane, the first group and how many, a copy of src, a buffer of sums."""

    image: Expr
    plane: Expr
    first: Expr
    count: Expr
    panel: Any
    sums: Any


class _Channels(NamedTuple):
    """A block of channels, and how many each of its vectors has."""

    block: Expr
    counts: tuple[int, ...]


class _Tile(NamedTuple):
    """Tiles of sums that are kept at once: where they begin in the group, and the number of all these in the task."""

    pixels: tuple[Expr, ...]
    number: Expr


@dataclass(frozen=True)
class Kernel(TaskKernel):
    """The statements of the whole layer: tasks are parts of the channels, images, planes, and blocks of groups."""

    g: Geometry

    @property
    def vectors(self) -> int:
        """Vectors of a block of channels."""
        return min(2, ceildiv(self.spec.oc, LANES))

    @property
    def tasks(self) -> tuple[int, ...]:
        groups = ceildiv(self.g.units, self.picks.tile)
        return self.picks.parallel_oc, self.spec.n, self.g.out[0], ceildiv(groups, self.picks.block)

    def statement(self) -> Any:
        return bf16.with_conversion(super().statement())

    def work(self, body: Block, place: Sequence[Expr]) -> None:
        g, picks, (part, image, plane, across) = self.g, self.picks, place
        groups, blocks = ceildiv(g.units, picks.tile), ceildiv(self.spec.oc, CHANNELS)
        first = body.let(across * picks.block)
        count = picks.block
        if groups % count:
            count = body.let(tirx.min(count, groups - first))
        panel = None
        if picks.copy_src:
            units = min(picks.block * picks.tile, g.units)
            panel = g.panel(units).copied(
                body, self.src, image, g.corner(plane, first * picks.tile), g.shared, self.zero("src", g.operand)
            )
        most = round_up(g.pixels(min(picks.tile, g.units)), tiles.ROWS)
        sums = body.buffer((most, self.vectors * LANES), g.sums, addressed=True)
        task = _Task(image, plane, first, count, panel, sums)
        weights = (g.run // g.depth, tiles.ROW_BYTES)
        shapes = [(tiles.ROWS, tiles.ROW_BYTES)] * 4 + [(tiles.ROWS, g.run * g.size)] * 2 + [weights] * 2
        tiles.configure(body, shapes)
        start, end = (body.let(p * blocks // picks.parallel_oc) for p in (part, part + 1))
        if picks.order == "oc":
            with body.loop(end - start) as (inner, i):
                for group_body, group, size in self.groups(inner, task):
                    self.group(group_body, task, group, size, start + i)
        else:
            for group_body, group, size in self.groups(body, task):
                with group_body.loop(end - start) as (inner, i):
                    self.group(inner, task, group, size, start + i)
        tiles.release(body)

    def groups(self, body: Block, task: _Task) -> Iterator[tuple[Block, Expr, int]]:
        """Code for the groups of a task: ``(its body, its first unit, how many units it has)``."""
        tile, units = self.picks.tile, self.g.units
        with body.loop(task.count) as (inner, i):
            group = inner.let(task.first + i)
            for case, size in inner.cases(group, units // tile, tile, units % tile):
                yield case, case.let(group * tile), size

    def group(self, body: Block, task: _Task, unit: Expr, size: int, block: Expr) -> None:
        """The products of a group of pixels and a block of channels, and what becomes of them."""
        block = body.let(block)
        pairs, starts = self.g.tiles(size)
        before = body.let((unit // self.picks.tile - task.first) * ceildiv(self.g.pixels(self.picks.tile), PIXELS))
        for case, counts in body.cases(block, *self.blocks):
            channels = _Channels(block, counts)
            if pairs:
                with case.loop(pairs) as (inner, i):
                    first = inner.let(i * PIXELS)
                    self.tile(inner, task, unit, channels, _Tile((first, first + tiles.ROWS), before + i))
            if starts:
                self.tile(case, task, unit, channels, _Tile(starts, before + pairs))
            stored = self.store_pixels if self.g.transposes else self.store_channels
            stored(case, task, unit, size, channels)

    @property
    def blocks(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """How many blocks of channels are full, the channels of each vector of these, and of the last block's, if it
        has fewer.
        """
        whole, rest = divmod(self.spec.oc, self.vectors * LANES)
        counts = (*(LANES,) * (rest // LANES), *((rest % LANES,) if rest % LANES else ()))
        return whole, (LANES,) * self.vectors, counts

    def tile(self, body: Block, task: _Task, unit: Expr, channels: _Channels, tile: _Tile) -> None:
        """The sums of some rows of tiles × vectors of channels."""
        g, weights, (block, counts) = self.g, self.parameters["weights"], channels
        rows, vectors = len(tile.pixels), len(counts)
        for row, v in itertools.product(range(rows), range(vectors)):
            tiles.zero(body, SUMS[row][v])
        with body.loop(g.steps) as (step, k):
            for v in range(vectors):
                tiles.read(step, B[v], weights, [block, k, v, 0, 0], tiles.ROW_BYTES)
            if self.picks.order == "oc":
                self.fetch(step, block, k, tile.number)
            tap = [step.let(i) for i in unflat(k, g.taps)]
            origin = [step.let(i) for i in self.origin(task, unit, tap)]
            for row, pixel in enumerate(tile.pixels):
                at = [*origin[:-1], origin[-1] + pixel * g.pixel]
                tiles.read(step, A[row], self.src if task.panel is None else task.panel, at, g.pixel * g.size)
                for v in range(vectors):
                    tiles.multiply(step, g.operands, SUMS[row][v], A[row], B[v])
        for (row, pixel), v in itertools.product(enumerate(tile.pixels), range(vectors)):
            place = [pixel, v * LANES]
            tiles.write(body, SUMS[row][v], task.sums, place, self.vectors * LANES * tiles.SUM_BYTES)

    def origin(self, task: _Task, unit: Expr, tap: list[Expr]) -> list[Expr]:
        """The index of what the first pixel of a group reads with a tap: its plane, row, column and block."""
        g = self.g
        y, x = g.axes(unit)
        if task.panel is None:
            at = [i * s + t * d for i, s, t, d in zip((task.plane, y, x), g.stride, tap, g.dilation, strict=False)]
            return g.src.place(task.image, 0, [*at[:2], 0], at[2] * g.channels + tap[3] * g.run)
        y0, x0 = g.axes(task.first * self.picks.tile)
        phase, line = g.line(tap[1])
        column = (x - x0) * g.pixel + tap[2] * g.dilation[2] * g.channels + tap[3] * g.run
        panel = g.panel(min(self.picks.block * self.picks.tile, g.units))
        return [panel.start(tap[0], phase, y - y0 + line) + column]

    def fetch(self, body: Block, block: Expr, step: Expr, number: Expr) -> None:
        """Fetch a tile's share of the next block's weights into the L2 cache."""
        g, weights, picks = self.g, self.parameters["weights"], self.picks
        of_step = self.vectors * (g.run // g.depth)  # lines
        most = min(picks.block, ceildiv(g.units, picks.tile)) * ceildiv(g.pixels(picks.tile), PIXELS)
        lines = ceildiv(of_step, most)
        first = body.let(tirx.min(number, tirx.const(ceildiv(of_step, lines) - 1, "int32")) * lines)
        for line in range(lines):
            body.add(prefetch(weights, [block + 1, step, 0, first + line, 0], level=2))

    # ---- the store --------------------------------------------------------------------------------

    def value(self, task: _Task, pixel: Expr, v: Expr) -> Expr:
        """The sums of a pixel and a vector of channels."""
        return load_stored(task.sums, "f32", [pixel, v * LANES], LANES, LANES)

    def store_channels(self, body: Block, task: _Task, unit: Expr, size: int, channels: _Channels) -> None:
        """Vectors of channels, pixel by pixel."""
        g, (block, counts), tensors = self.g, channels, (self.dst, self.residual)
        (y0, x0), (rows, columns) = g.axes(unit), g.extent(size)
        firsts = [body.let(block * CHANNELS + v * LANES) for v in range(len(counts))]
        vectors = zip(firsts, counts, strict=True)
        given = [load_parameters(body, self.parameters, first, LANES, count) for first, count in vectors]
        with body.loop(rows) as (row, y), row.loop(columns) as (inner, x):
            at = inner.let(y * g.pitch + x)
            for v, count in enumerate(counts):
                place = (task.image, firsts[v], [task.plane, y0 + y, x0 + x])
                value = inner.let(self.value(task, at, v))
                g.dst.finish(inner, self.spec, tensors, place, value, LANES, count, given[v], narrowed=g.narrowed)

    def store_pixels(self, body: Block, task: _Task, unit: Expr, size: int, channels: _Channels) -> None:
        """Vectors of pixels, transposed in registers."""
        g, spec, (block, counts), tensors = self.g, self.spec, channels, (self.dst, self.residual)
        (y0, x0), (rows, columns) = g.axes(unit), g.extent(size)
        zero = tirx.Broadcast(tirx.const(0, g.sums), LANES)
        for v, channel_count in enumerate(counts):
            first = body.let(block * CHANNELS + v * LANES)
            with body.loop(rows) as (row, y), row.loop(ceildiv(columns, LANES)) as (inner, i):
                x = inner.let(i * LANES)
                for case, count in inner.cases(i, columns // LANES, LANES, columns % LANES):
                    at = case.let(y * g.pitch + x)
                    square = [case.let(self.value(task, at + t, v)) if t < count else zero for t in range(LANES)]
                    rows_of = interleave(case, square, LANES)[:channel_count]
                    for one, t, value in self.each(case, rows_of):
                        given = spread_parameters(one, self.parameters, first + t, LANES)
                        place = g.dst.element(task.image, first + t, [task.plane, y0 + y, x0 + x])
                        finish(one, spec, *tensors, place, value, LANES, count, narrowed=g.narrowed, **given)

    def zero(self, tensor: str, dtype: str) -> Expr:
        """A tensor's zero point as a type; 0 where it has none."""
        found = self.parameters.get(f"{tensor}_zero")
        return tirx.const(0, STORAGE[dtype]) if found is None else found[0].astype(STORAGE[dtype])

    def each(self, body: Block, vectors: Sequence[Expr]) -> Iterator[tuple[Block, Expr, Expr]]:
        """Code for what becomes of each vector: a loop where that is long."""
        if not self.spec.activation_op.costly:
            yield from ((body, t, vector) for t, vector in enumerate(vectors))
            return
        kept = body.buffer((len(vectors), LANES), self.g.sums)
        for t, vector in enumerate(vectors):
            body.add(store_stored(kept, "f32", [t, 0], vector, LANES, LANES))
        with body.loop(len(vectors)) as (inner, t):
            yield inner, t, inner.let(load_stored(kept, "f32", [t, 0], LANES, LANES))
