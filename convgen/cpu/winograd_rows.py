"""Winograd convolution along the row alone: where the tiles of a row lie in vectors, and the statements of ``main``, as
``schedules/cpu_winograd_rows.py`` says what they do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..deferred import tirx
from ..lowering.compute import Expr, ceildiv, flat
from ..lowering.schedule import Picks
from ..lowering.winograd import toom_cook
from ..problem.spec import ConvSpec
from .lanes import add_products
from .tasks import TaskKernel
from .vector import (
    Block,
    Registers,
    finish,
    gathered,
    load,
    load_within,
    prefetch,
    spread_parameters,
    store,
    weighted_sum,
)
from .window import meeting_taps


class RowGeometry:
    """How a row of outputs falls into vectors of tiles.

    With dilation d, output ``m d q + d i + r`` is the i-th of the tile ``d q + r``, for ``r < d``. A lane is a tile:
    where d is at least a vector, a vector has neighbouring r of one q; where it is smaller, all r of several q.

    Attributes:
        m, taps, positions: outputs of a tile, taps of the kernel, products of a tile.
        d, lanes: the dilation, and the length of a vector.
        apart: whether the i-th outputs of a vector's tiles are neighbours, and lie apart from the next ones; else a
            vector's outputs are all neighbours, and have to be shuffled.
        vectors, block_vectors: vectors of tiles in a row, and in a block.
        planes, height: sizes of the output's axes before the rows, and its rows.
        rows_in, panel_rows: input rows of a block of output rows, in one plane and in all that it meets.
    """

    def __init__(self, spec: ConvSpec, picks: Picks) -> None:
        self.m, self.lanes = int(picks.tile), int(picks.lanes)
        self.taps, self.d = spec.kernel[-1], spec.dilation[-1]
        self.positions = self.m + self.taps - 1
        width = spec.out_spatial[-1]
        self.apart = self.d >= self.lanes
        if self.apart:
            self.per_period = ceildiv(self.d, self.lanes)  # vectors with the same q
            self.vectors = ceildiv(width, self.m * self.d) * self.per_period
        else:
            self.vectors = ceildiv(width, self.m * self.lanes)
        self.planes, self.height, self.rows_in = spec.out_spatial[:-2], 1, 1
        if spec.rank > 1:
            self.height = spec.out_spatial[-2]
            self.rows_in = (picks.block_rows - 1) * spec.stride[-2] + (spec.kernel[-2] - 1) * spec.dilation[-2] + 1
        self.panel_rows = math.prod(spec.kernel[:-2]) * self.rows_in
        self.ic, self.block_vectors = spec.ic, int(picks.tile_px * picks.block_px)

    @property
    def panel(self) -> tuple[int, ...]:
        """The shape of a task's transformed input: ``[vector][row][ic][position][lane]``."""
        return self.block_vectors, self.panel_rows, self.ic, self.positions, self.lanes

    def first(self, vector: Expr) -> Expr:
        """The first output pixel of a vector of tiles."""
        if not self.apart:
            return vector * (self.m * self.lanes)
        return vector // self.per_period * (self.m * self.d) + vector % self.per_period * self.lanes

    def element(self, i: int, lane: int) -> int:
        """Where the i-th element of the tile in a lane lies, counted from the vector's first pixel; not ``apart``."""
        return lane // self.d * (self.m * self.d) + i * self.d + lane % self.d

    @property
    def reach(self) -> int:
        """Elements of the input row that a vector of tiles meets, from its first on."""
        if self.apart:
            return (self.positions - 1) * self.d + self.lanes
        return self.element(self.positions - 1, self.lanes - 1) + 1

    @property
    def covered(self) -> int:
        """Output pixels from a vector's first to its last."""
        return (self.m - 1) * self.d + self.lanes if self.apart else self.m * self.lanes


class _Task(NamedTuple):
    """What a task works on: a block of rows × vectors of tiles.

    Attributes:
        n, plane: the image, and the place along the axes before the rows.
        first_vector, first_row: of the block.
        tiles, rows: how many register tiles of vectors, and how many rows, the block has.
        panel: the transformed input, ``[vector][row][ic][position][lane]``.
    """

    n: Expr
    plane: list[Expr]
    first_vector: Expr
    first_row: Expr
    tiles: Expr
    rows: Expr
    panel: tirx.Buffer


class _Tile(NamedTuple):
    """A register tile: its number in a row, its row in the task, and that row's place in the output."""

    x: Expr
    r: Expr
    row: list[Expr]


@dataclass(frozen=True)
class RowWinogradKernel(TaskKernel):
    """The statements of the whole layer: tasks are images, planes, and blocks of rows × vectors of tiles."""

    @cached_property
    def geometry(self) -> RowGeometry:
        return RowGeometry(self.spec, self.picks)

    @property
    def tasks(self) -> tuple[int, ...]:
        g = self.geometry
        blocks = ceildiv(g.height, self.picks.block_rows), ceildiv(g.vectors, g.block_vectors)
        return self.spec.n, *g.planes, *blocks

    def work(self, body: Block, place: Sequence[Expr]) -> None:
        g, picks, (n, *plane, block_y, block_x) = self.geometry, self.picks, place
        panel = body.buffer(g.panel)
        first_vector, first_row = body.let(block_x * g.block_vectors), body.let(block_y * picks.block_rows)
        # In whole tiles: what lies past the row reads zeros and is not stored.
        left = (g.vectors - first_vector + picks.tile_px - 1) // picks.tile_px
        tiles = body.let(tirx.min(picks.block_px, left))
        rows = body.let(tirx.min(picks.block_rows, g.height - first_row))
        task = _Task(n, plane, first_vector, first_row, tiles, rows, panel)
        self._transform_rows(body, task)
        self._add_products(body, task)

    def _transform_rows(self, body: Block, task: _Task) -> None:
        """Transform the input rows of a task's block, for all of its vectors."""
        g, begin = self.geometry, self.spec.padding[-1][0]
        *_, input_rows = toom_cook(g.m, g.taps)
        for block, row, place in self._source_rows(body, task):
            vectors = task.tiles * self.picks.tile_px
            with block.loop(self.spec.ic) as (channel, c), channel.loop(vectors) as (inner, v):
                x0 = inner.let(g.first(task.first_vector + v))
                inside = tirx.all(x0 >= begin, x0 - begin + g.reach <= self.spec.in_spatial[-1])
                for is_inside, condition in ((True, inside), (False, tirx.Not(inside))):
                    with inner.when(condition) as branch:
                        elements = self._elements(branch, [task.n, c, *place], x0, is_inside)
                        for position, factors in enumerate(input_rows):
                            value = weighted_sum(zip(factors, elements, strict=True))
                            target = [v, row, c, position, 0]
                            branch.add(store(task.panel, "f32", target, value, g.lanes, g.lanes))

    def _elements(self, block: Block, row: Sequence[Expr], x0: Expr, is_inside: bool) -> list[Expr]:
        """The inputs of the vector of tiles whose first output is ``x0``: one vector for each element of a tile.

        ``is_inside``: all of them lie in the image.
        """
        g, lanes, begin = self.geometry, self.picks.lanes, self.spec.padding[-1][0]
        # To where the next block lies, which is probably this thread's next.
        ahead = g.block_vectors * (lanes if g.apart else g.m * lanes)

        def read(offset: int, count: int) -> Expr:
            block.add(prefetch(self.src, [*row, x0 - begin + offset + ahead]))
            read_row = load if is_inside else load_within
            return block.let(read_row(self.src, self.spec.dtype, [*row, x0 - begin + offset], lanes, count))

        if g.apart:
            return [read(i * g.d, lanes) for i in range(g.positions)]
        vectors = [read(x, min(lanes, g.reach - x)) for x in range(0, g.reach, lanes)]
        orders = [[g.element(i, lane) for lane in range(lanes)] for i in range(g.positions)]
        return [block.let(gathered(vectors, order, lanes)) for order in orders]

    def _source_rows(self, body: Block, task: _Task) -> Iterator[tuple[Block, Expr, list[Expr]]]:
        """Code for each input row that a block of rows meets: ``(block, row of the panel, place in src)``."""
        spec, g = self.spec, self.geometry
        with meeting_taps(body, spec, task.plane) as (inner, taps, where):
            if spec.rank == 1:
                yield inner, 0, []
                return
            with inner.loop(g.rows_in) as (block, row):
                y = block.let(task.first_row * spec.stride[-2] + row - spec.padding[-2][0])
                with block.when(tirx.all(y >= 0, y < spec.in_spatial[-2])) as inside:
                    place = inside.let(flat(taps, spec.kernel[:-2]) * g.rows_in + row)
                    yield inside, place, [*where, y]

    def _add_products(self, body: Block, task: _Task) -> None:
        """Every block of channels times every tile of a task, and back."""
        g, picks = self.geometry, self.picks
        full, rest = divmod(self.spec.oc, picks.tile_oc)
        with body.loop(ceildiv(self.spec.oc, picks.tile_oc)) as (outer, channel_block):
            for branch, channels in outer.cases(channel_block, full, picks.tile_oc, rest):
                with branch.loop(task.tiles) as (column, x), column.loop(task.rows) as (block, r):
                    row = [*task.plane, block.let(task.first_row + r)][: self.spec.rank - 1]  # in 1-D none
                    keys = list(itertools.product(range(channels), range(g.positions), range(picks.tile_px)))
                    sums = block.registers(keys, g.lanes)
                    self._multiply(block, sums, task, channel_block, _Tile(x, r, row))
                    first_oc = block.let(channel_block * picks.tile_oc)
                    for v in range(picks.tile_px):
                        x0 = block.let(g.first(task.first_vector + x * picks.tile_px + v))
                        for t in range(channels):
                            place = [task.n, first_oc + t, *row, x0]
                            self._finish(block, [sums[t, p, v] for p in range(g.positions)], place)

    def _multiply(self, block: Block, sums: Registers, task: _Task, channel_block: Expr, tile: _Tile) -> None:
        """Add up a register tile by ``(channel, position, vector)``."""
        spec, g, weights = self.spec, self.geometry, self.parameters["weights"]
        with meeting_taps(block, spec, tile.row) as (inner, taps, _):
            tap, row = inner.let(flat(taps, spec.kernel[:-1])), 0
            if taps:
                panel_row = flat(taps[:-1], spec.kernel[:-2]) * g.rows_in
                row = inner.let(panel_row + tile.r * spec.stride[-2] + taps[-1] * spec.dilation[-2])
            with inner.loop(spec.ic) as (step, c):
                for p in range(g.positions):
                    places = {v: [tile.x * self.picks.tile_px + v, row, c, p, 0] for v in range(self.picks.tile_px)}
                    values = {v: step.let(load(task.panel, "f32", at, g.lanes, g.lanes)) for v, at in places.items()}
                    add_products(step, sums, values, [p], lambda p, t: weights[channel_block, tap, c, p, t])

    def _finish(self, block: Block, positions: Sequence[Expr], place: Sequence[Expr]) -> None:
        """Transform the products of a vector of tiles back; epilogue, and store from ``place`` on."""
        g, lanes = self.geometry, self.picks.lanes
        back_rows, _, _ = toom_cook(g.m, g.taps)
        _, oc, *_, x0 = place
        pixels = [i * g.d if g.apart else i * lanes for i in range(g.m)]
        given = spread_parameters(block, self.parameters, oc, lanes)
        values = [block.let(weighted_sum(zip(factors, positions, strict=True))) for factors in back_rows]
        if not g.apart:
            source = {g.element(i, lane): i * lanes + lane for i in range(g.m) for lane in range(lanes)}
            orders = [[source[x + lane] for lane in range(lanes)] for x in pixels]
            values = [block.let(gathered(values, order, lanes)) for order in orders]
        width, end = self.spec.out_spatial[-1], x0 + g.covered
        for within, condition in ((False, end <= width), (True, end > width)):
            with block.when(condition) as branch:
                for x, value in zip(pixels, values, strict=True):
                    at, dst, residual = [*place[:-1], x0 + x], self.dst, self.residual
                    finish(branch, self.spec, dst, residual, at, value, lanes, lanes, within=within, **given)
