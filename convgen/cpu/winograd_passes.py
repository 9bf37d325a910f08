"""Winograd's way in and out on a CPU: pixels transformed, and sums transformed back, channels in the vector lanes.

Both go tile by tile, a vector of channels at a time; what lies between them, products, is the schedule's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ..deferred import tirx
from ..lowering.compute import Expr, round_up
from ..problem.spec import ConvSpec
from .vector import (
    Block,
    finish,
    interleave,
    load,
    load_parameters,
    load_within,
    spread_parameters,
    store,
    zeros,
)
from .winograd import NO_AXIS, Grid, Tiles, transformed


class Task(NamedTuple):
    """A block: its image and group of channels; its planes of dst; its tiles of each, from a group of tiles on."""

    image: Expr
    part: Expr
    plane: Expr
    planes: Expr
    group: Expr
    groups: Expr

    def rows_columns(self, grid: Tiles) -> tuple[Expr, Expr, Expr, Expr]:
        """The first row and column of tiles, and how many it has of each."""
        g = grid
        first, count = self.group * g.blocked.period, self.groups * g.blocked.period
        return (first, 0, count, g.tile_columns) if g.blocked is g.rows else (0, first, 1, count)


class Values(NamedTuple):
    """Transformed input ``[image][block][plane][position][tile and ic]``, and where in it a task's is: its planes and
    vectors of channels are counted from the first ones; its tiles begin at one.
    """

    buffer: tirx.Buffer
    image: Expr
    block: Expr
    first_plane: Expr
    first_vector: Expr
    first_tile: Expr = 0


@dataclass(frozen=True)
class WayIn:
    """Pixels transformed: those of ``src``, images stored as ``dtype``."""

    dtype: str
    g: Tiles
    src: tirx.Buffer

    @property
    def lanes(self) -> int:
        return self.g.lanes

    def scratch(self, body: Block) -> tuple[tirx.Buffer | None, tirx.Buffer | None]:
        """For a vector of channels: the input ``[line][column]``, and a row of tiles transformed along the columns."""
        g, lanes = self.g, self.lanes
        half = body.buffer((g.length, g.rows.positions, lanes)) if g.rows is not NO_AXIS else None
        left, vectors = g.stored
        return None if g.direct else body.buffer((g.lines, max(g.length, left + vectors * lanes), lanes)), half

    def transform(
        self,
        body: Block,
        task: Task,
        values: Values,
        plane: Expr,
        c: Expr,
        lines: tirx.Buffer | None,
        half: tirx.Buffer | None,
    ) -> None:
        """Transform the c-th vector of channels of a plane's block."""
        g, lanes = self.g, self.lanes
        rows, columns = g.rows, g.columns
        row, column, row_count, column_count = task.rows_columns(self.g)
        y0, x0 = (body.let(a.first + a.input(t, 0)) for a, t in ((rows, row), (columns, column)))
        corner = (task.image, plane, y0, x0)
        tail = g.src.channels % lanes if g.src.layout != "nchw" else 0
        for case, channels in body.cases(c, g.src.channels // lanes, lanes, tail) if tail else [(body, lanes)]:
            if lines is not None:
                self.gather(case, corner, c, channels, lines)
            with case.loop(row_count) as (row_body, r):
                if lines is None:
                    self.transform_pixels(row_body, corner, r, c, channels, half)
                elif half is not None:
                    with row_body.loop(g.length) as (one, x):
                        read = [load(lines, "f32", [rows.input(r, k), x, 0], lanes, lanes) for k in range(rows.extent)]
                        self.transform_column(one, read, x, half)
                with row_body.loop(rows.positions) as (i_body, i), i_body.loop(column_count) as (one, t):
                    places = [columns.input(t, k) for k in range(columns.extent)]
                    source = [(lines, [r, x, 0]) if half is None else (half, [x, i, 0]) for x in places]
                    read = [one.let(load(buffer, "f32", place, lanes, lanes)) for buffer, place in source]
                    index = [values.image, values.block, plane - values.first_plane]
                    for j, value in enumerate(transformed(one, columns.inputs, read)):
                        tile, vector = values.first_tile + r * g.tile_columns + t, c - values.first_vector
                        at = tile * g.channels + vector * g.apart
                        one.add(
                            store(values.buffer, "f32", [*index, i * columns.positions + j, at], value, lanes, lanes)
                        )

    def transform_column(self, body: Block, read: Sequence[Expr], x: Expr, half: tirx.Buffer) -> None:
        """Transform a column of pixels."""
        for i, value in enumerate(transformed(body, self.g.rows.inputs, [body.let(value) for value in read])):
            body.add(store(half, "f32", [x, i, 0], value, self.lanes, self.lanes))

    def transform_pixels(
        self, body: Block, corner: Sequence[Expr], r: Expr, c: Expr, channels: int, half: tirx.Buffer
    ) -> None:
        """Transform the columns of the r-th row of tiles from src, where channels lie side by side."""
        g, lanes, height = self.g, self.lanes, self.g.src.size[1]
        image, plane, y0, x0 = corner
        ys = [body.let(y0 + g.rows.input(r, k)) for k in range(g.rows.extent)]
        start, end = self.stored_columns(body, x0)
        inside = body.let(tirx.all(ys[0] >= 0, ys[-1] < height))
        for condition, whole in ((inside, True), (tirx.Not(inside), False)):
            with body.when(condition) as case, case.loop(end - start) as (one, i):
                x, read = one.let(start + i), []
                for y in ys:
                    near = y if whole else tirx.max(0, tirx.min(y, height - 1))
                    value = self.channels_of((image, plane, near, x0 + x), c, channels)
                    read.append(value if whole else tirx.Select(tirx.all(y >= 0, y < height), value, zeros(lanes)))
                self.transform_column(one, read, x, half)
        for first, last in ((0, start), (end, g.length)):
            with body.loop(last - first) as (one, i):
                for k in range(g.rows.positions):
                    one.add(store(half, "f32", [first + i, k, 0], zeros(lanes), lanes, lanes))

    def stored_columns(self, body: Block, x0: Expr) -> tuple[Expr, Expr]:
        """Which columns of a block's input, the first of which is ``x0``, the image has."""
        start = body.let(tirx.max(0, tirx.min(-x0, self.g.length)))
        return start, body.let(tirx.max(start, tirx.min(self.g.src.size[2] - x0, self.g.length)))

    def gather(self, body: Block, corner: Sequence[Expr], c: Expr, channels: int, lines: tirx.Buffer) -> None:
        """Copy a block's input of a vector of ``channels`` channels, with zeros in its padding."""
        g, lanes, height = self.g, self.lanes, self.g.src.size[1]
        image, plane, y0, x0 = corner
        with body.loop(g.lines) as (line_body, line):
            y = line_body.let(y0 + line)
            inside = tirx.all(y >= 0, y < height)
            with line_body.when(inside) as case:
                if g.src.layout == "nchw":
                    self.gather_transposed(case, (image, plane, y, x0), c, lines, line)
                else:
                    start, end = self.stored_columns(case, x0)
                    for first, last, real in ((0, start, False), (start, end, True), (end, g.length, False)):
                        with case.loop(last - first) as (one, i):
                            x = one.let(first + i)
                            value = self.channels_of((image, plane, y, x0 + x), c, channels) if real else zeros(lanes)
                            one.add(store(lines, "f32", [line, x, 0], value, lanes, lanes))
            with line_body.when(tirx.Not(inside)) as case, case.loop(g.length) as (one, x):
                one.add(store(lines, "f32", [line, x, 0], zeros(lanes), lanes, lanes))

    def gather_transposed(self, body: Block, place: Sequence[Expr], c: Expr, lines: tirx.Buffer, line: Expr) -> None:
        """A line of NCHW, from ``place`` on, which may lie outside src. What follows the last channel is not read."""
        lanes, g, channels = self.lanes, self.g, self.g.src.channels
        image, *where, x0 = place
        left, vectors = g.stored
        with body.loop(vectors) as (one, i):
            x, square = one.let(x0 + left + i * lanes), []
            for t in range(lanes):
                channel = c * lanes + t if channels % lanes == 0 else tirx.min(c * lanes + t, channels - 1)
                index = g.src.element(image, channel, [*where, x])
                square.append(one.let(load_within(self.src, self.dtype, index, lanes, lanes)))
            for t, vector in enumerate(interleave(one, square, lanes)):
                one.add(store(lines, "f32", [line, left + i * lanes + t, 0], vector, lanes, lanes))
        for x in (*range(left), *range(left + vectors * lanes, g.length)):
            body.add(store(lines, "f32", [line, x, 0], zeros(lanes), lanes, lanes))

    def channels_of(self, place: Sequence[Expr], c: Expr, channels: int) -> Expr:
        """A pixel's c-th vector of channels, where they lie side by side, in blocks at least."""
        lanes, src, (image, *pixel) = self.lanes, self.g.src, place

        def loaded(t: int, width: int, count: int) -> Expr:
            return load(self.src, self.dtype, src.element(image, c * lanes + t, pixel), width, count)

        if src.block >= lanes or src.layout == "nhwc":
            return loaded(0, lanes, channels)
        width = src.block
        parts = [loaded(t, width, width) if t < channels else zeros(width) for t in range(0, lanes, width)]
        return tirx.Shuffle(parts, list(range(lanes)))


@dataclass(frozen=True)
class WayOut:
    """Sums transformed back, and stored."""

    spec: ConvSpec
    g: Grid
    lanes: int
    tile_oc: int
    residual: tirx.Buffer | None
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer

    def scratch(self, body: Block) -> tuple[tirx.Buffer, tirx.Buffer | None]:
        """For a block of channels: sums ``[plane][position][tile][t]``; for NCHW, pixels ``[pixel][lane]``."""
        g, lanes = self.g, self.lanes
        sums = body.buffer((g.plane_blocks.full, g.positions, g.most_tiles, self.tile_oc))
        pixels = round_up(g.pixels(g.groups.full), lanes)
        return sums, body.buffer((pixels, lanes)) if g.dst.layout == "nchw" else None

    def transform(
        self,
        body: Block,
        task: Task,
        z: Expr,
        channel: Expr,
        sums: tuple[tirx.Buffer, Expr],
        pixels: tirx.Buffer | None,
    ) -> None:
        """Transform a vector of channels of a plane back, and store it."""
        lanes, (rows, columns) = self.lanes, (self.g.rows, self.g.columns)
        row, column, *_ = task.rows_columns(self.g)
        y0, x0 = (body.let(a.output(t, 0)) for a, t in ((rows, row), (columns, column)))
        if pixels is not None:
            for pixel, y, x, value in self.pixels(body, task, z, sums):
                pixel.add(store(pixels, "f32", [(y - y0) * columns.size + (x - x0), 0], value, lanes, lanes))
            first = (task.image, task.plane + z, 0, y0 * columns.size + x0)
            self.store_transposed(body, task, first, channel, pixels)
            return
        tail, tensors = self.spec.oc % lanes, (self.dst, self.residual)
        for case, count in body.cases(channel, self.spec.oc - tail, lanes, tail) if tail else [(body, lanes)]:
            given = load_parameters(case, self.parameters, channel, lanes, count)
            for pixel, y, x, value in self.pixels(case, task, z, sums):
                place = (task.image, channel, (task.plane + z, y, x))
                self.g.dst.finish(pixel, self.spec, tensors, place, value, lanes, count, given)

    def pixels(
        self, body: Block, task: Task, z: Expr, sums: tuple[tirx.Buffer, Expr]
    ) -> Iterator[tuple[Block, Expr, Expr, Expr]]:
        """Code for each pixel that there is in a tile: ``(block, row, column, vector)``."""
        g, (rows, columns), lanes, (buffer, lane) = self.g, (self.g.rows, self.g.columns), self.lanes, sums
        row, column, row_count, column_count = task.rows_columns(g)
        with body.loop(row_count) as (row_body, r), row_body.loop(column_count) as (one, c):
            half = []
            for j in range(columns.positions):
                places = [[z, i * columns.positions + j, r * g.tile_columns + c, lane] for i in range(rows.positions)]
                read = [one.let(load(buffer, "f32", place, lanes, lanes)) for place in places]
                half.append(transformed(one, rows.back, read))
            found = [transformed(one, columns.back, [made[p] for made in half]) for p in range(rows.outputs)]
            ys = [one.let(rows.output(row + r, p)) for p in range(rows.outputs)]
            xs = [one.let(columns.output(column + c, q)) for q in range(columns.outputs)]
            for case, is_whole in self.whole_or_not(one, ys[-1], xs[-1]):
                for y, line in zip(ys, found, strict=True):
                    for x, value in zip(xs, line, strict=True):
                        ends = [] if is_whole else [i < a.size for i, a in ((y, rows), (x, columns)) if a.ragged]
                        with case.when(tirx.all(*ends) if ends else True) as pixel:
                            yield pixel, y, x, value

    def whole_or_not(self, body: Block, y: Expr, x: Expr) -> Iterator[tuple[Block, bool]]:
        """Code for tiles whose last pixel, ``(y, x)``, is in dst, and for others."""
        conditions = [i < a.size for i, a in ((y, self.g.rows), (x, self.g.columns)) if a.ragged]
        if not conditions:
            yield body, True
            return
        is_whole = body.let(tirx.all(*conditions))
        for condition, answer in ((is_whole, True), (tirx.Not(is_whole), False)):
            with body.when(condition) as case:
                yield case, answer

    def store_transposed(
        self, body: Block, task: Task, first: Sequence[Expr], channel: Expr, pixels: tirx.Buffer
    ) -> None:
        """The epilogue and store of a block's pixels in NCHW, side by side in dst from ``first`` on."""
        spec, g, lanes = self.spec, self.g, self.lanes
        line = g.columns.size if g.blocked is g.rows else 1
        starts = [i * (g.groups.full - 1) + min(i, g.groups.many) for i in range(g.groups.count)] + [g.blocked.groups]
        sizes = {min(g.pixels(b - a), line * g.blocked.size - g.pixels(a)) for a, b in pairwise(starts)}
        total: Expr = max(sizes)
        if len(sizes) > 1:
            whole = line * g.blocked.size - task.group * g.pixels(1)
            total = body.let(tirx.min(task.groups * g.pixels(1), whole))
        # The last vector of pixels may have some of the one before, where a block has as many; else only what there is.
        parts = [(True, lanes)] if min(sizes) >= lanes else [(total >= lanes, lanes)]
        parts += [(total == size, size) for size in sorted(sizes) if size < lanes]
        for condition, stored in parts:
            with body.when(condition) as case, case.loop((total + lanes - 1) // lanes) as (one, i):
                at = one.let(tirx.max(0, tirx.min(i * lanes, total - lanes)))
                vectors = [one.let(load(pixels, "f32", [at + t, 0], lanes, lanes)) for t in range(lanes)]
                image, *where, x = first
                for t, row in enumerate(interleave(one, vectors, lanes)):
                    with one.when(True if spec.oc % lanes == 0 else channel + t < spec.oc) as exists:
                        given = spread_parameters(exists, self.parameters, channel + t, lanes)
                        place = g.dst.element(image, channel + t, [*where, x + at])
                        finish(exists, spec, self.dst, self.residual, place, row, lanes, stored, **given)
