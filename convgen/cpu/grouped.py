"""Grouped convolutions with output channels of whole groups in the lanes, by tiles of pixels: their sizes, weights and
work, and the statements of ``main``, as ``schedules/cpu_grouped.py`` says what they do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

from ..deferred import te, tirx
from ..hardware.target import Target
from ..lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv, copied, narrow, unflat
from ..lowering.schedule import Picks
from ..problem.spec import ConvSpec
from . import bf16
from .groups import GroupVectors
from .model import Work
from .product import BEGIN_RUN, BEGIN_TILE, pieces
from .tasks import TaskKernel
from .vector import Block, Registers, finish, load, load_parameters
from .window import (
    Lines,
    Met,
    Pattern,
    copies,
    is_short,
    kernel_rows,
    output_rows,
    readers,
    row_tiles,
)

#: Taps of a row that are written out; a row with more is a column of pixels, whose taps are passes of a loop.
MOST_TAPS = 32


class Geometry:
    """How the output is walked: rows of lines of tiles.

    Attributes:
        outer: the output's axes but the last, or all of them where a row's taps are passes of a loop.
        lines: the output's pixels along the last of ``outer``, which tiles have `tile_oh` of.
        width, taps: the pixels of a row and the taps that are written out.
        src_block, dst_block: channels that lie innermost.
    """

    def __init__(self, spec: ConvSpec) -> None:
        self.spec = spec
        self.written = spec.kernel[-1] <= MOST_TAPS
        self.outer = spec.out_spatial[:-1] if self.written else spec.out_spatial
        self.axis = len(self.outer) - 1
        self.lines = self.outer[-1] if self.outer else 1
        self.line_dilation = spec.dilation[self.axis] if self.outer else 0
        self.width, self.taps = (spec.out_spatial[-1], spec.kernel[-1]) if self.written else (1, 1)
        self.src_block, self.dst_block = spec.src_blocks.size, spec.dst_blocks.size

    def rows(self, height: int) -> int:
        """Rows of tiles."""
        return math.prod(self.outer[:-1]) * ceildiv(self.lines, height)

    def tiles(self, size: int) -> list[tuple[int, int, Pattern]]:
        """The tiles of a row (:func:`row_tiles`)."""
        return row_tiles(self.spec, size) if self.written else [(0, 1, Pattern(1, ((0, ((0, 0),)),)))]

    def unrolled(self, picks: Picks) -> int:
        """Multiply-adds that are written out."""
        across = sum(len(uses) for *_, pattern in self.tiles(picks.tile_ow) for _, uses in pattern.inputs)
        sizes = pieces(self.lines, picks.tile_oh)
        down = sum(rows for height, _ in sizes for _, rows in readers(self.spec, len(self.outer), height))
        return across * down * int(picks.tile_c) * copies(self.spec, len(self.outer))

    def offsets(self, width: int) -> set[int]:
        """The pixels of an input row that so many output pixels read."""
        stride, dilation = self.spec.stride[-1], self.spec.dilation[-1]
        return {p * stride + k * dilation for p in range(width) for k in range(self.taps)}


@lru_cache(maxsize=1024)
def geometry_of(spec: ConvSpec) -> Geometry:
    return Geometry(spec)


@lru_cache(maxsize=1024)
def lanes_of(spec: ConvSpec, target: Target) -> list[int]:
    """Lanes that vectors can have."""
    g, found = geometry_of(spec), []
    for lanes in (4, 8, 16):
        vectors = GroupVectors(spec, lanes)
        fits = vectors.within(g.src_block, spec.ic, True) and vectors.within(g.dst_block, spec.oc, False)
        if lanes <= target.lanes and (lanes == 4 or lanes < 2 * spec.oc) and fits:
            found.append(lanes)
    return found


def work_of_tile(g: Geometry, vectors: GroupVectors, target: Target, picks: Picks, height: int, width: int) -> Work:
    """A tile of so many rows of so many pixels, once."""
    spec, front = g.spec, math.prod(g.spec.kernel[: max(0, g.axis)])
    rows, pixels, passes = readers(spec, len(g.outer), height), g.offsets(width), front * vectors.depth
    sums = height * width * picks.tile_c
    products = sums * g.taps * (spec.kernel[g.axis] if g.outer else 1)
    read = sum(count for count, _ in rows) * len(pixels)
    loads = read * vectors.loaded
    # A pixel's channels come from the L2 cache once, and then, one after another, from the L1 cache: unless a row's
    # pixels displace each other there. What is permuted takes as long each time.
    once = not vectors.permuted and len(pixels) <= target.places(4 * g.src_block) // 2
    fetched = 4 * front * vectors.depth * vectors.groups * read if once else 4 * passes * picks.lanes * loads
    # Where all rows of a single channel are written out, they share the weights that they read.
    short = vectors.depth == 1 and bool(g.outer) and is_short(spec, g.axis)
    uses = spec.kernel[g.axis] if short else sum(count * served for count, served in rows)
    return Work(
        1,
        fmas=passes * products,
        loads=passes * (loads + uses * g.taps * picks.tile_c),
        shuffles=passes * (read if vectors.permuted else 0),
        stores=sums,
        near=fetched * width * spec.stride[-1] / len(pixels),
        chain=passes * products / sums,
        cycles=BEGIN_TILE + (0 if short else BEGIN_RUN * front * len(rows) * vectors.depth),
    )


def packed(ops: Operands, g: Geometry, vectors: GroupVectors, picks: Picks) -> list[te.Tensor]:
    """Weights ``[tile of vectors][row of the kernel][ic][k][vector][lane]``, and of the other parameters whole vectors
    from any channel.
    """
    spec, looped, tile_c = ops.spec, ops.spec.kernel[: len(g.outer)], picks.tile_c

    def weight(b: Expr, row: Expr, c: Expr, kx: Expr, v: Expr, t: Expr) -> Expr:
        o = vectors.first(b * tile_c + v) + t
        o = o if vectors.count == picks.lanes else tirx.min(o, spec.oc - 1)
        value = ops.weights[(o, c, *unflat(row, looped), kx)[: 2 + spec.rank]]
        if vectors.count == picks.lanes:
            return value
        return tirx.if_then_else(t < vectors.count, value, tirx.const(0, ACCUMULATOR))

    shape = (vectors.number // tile_c, math.prod(looped), vectors.depth, g.taps, tile_c, picks.lanes)
    weights = te.compute(shape, weight, name="weights_packed")
    return [weights, *(copied(p, spec.oc + picks.lanes) for p in ops.parameters[1:])]


# ---- the kernel -----------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """A tile of pixels × vectors: its image, its rows, its first pixel there, its index among the tiles of vectors, and
    what of the image its pixels meet.
    """

    image: Expr
    lines: Lines
    x: Expr
    vectors: Expr
    pattern: Pattern

    @property
    def pixels(self) -> list[tuple[int, int]]:
        return [(r, p) for r in range(self.lines.height) for p in range(self.pattern.pixels)]


@dataclass(frozen=True)
class Kernel(TaskKernel):
    """The statements of the whole layer: tasks are images, blocks of vectors, and parts of the rows.

    Attributes:
        rounds: whether vectors become bf16 by an instruction of their own.
    """

    g: Geometry
    vectors: GroupVectors
    rounds: bool

    @property
    def number(self) -> int:
        """How many times ``tile_c`` vectors there are."""
        return self.vectors.number // int(self.picks.tile_c)

    @property
    def tasks(self) -> tuple[int, ...]:
        return self.spec.n, ceildiv(self.number, self.picks.block_c), self.picks.parallel_oh

    def statement(self) -> tirx.Stmt:
        return bf16.with_conversion(super().statement()) if self.rounds else super().statement()

    def work(self, body: Block, place: Sequence[Expr]) -> None:
        picks, number, (_, blocks, parts), (image, block, part) = self.picks, self.number, self.tasks, place
        rows = self.g.rows(picks.tile_oh) if self.g.outer else ceildiv(self.g.width, picks.tile_ow)
        size = ceildiv(number, blocks)  # all alike, or the last one is smaller
        first = body.let(block * size)
        count = size
        if number % size:
            count = body.let(tirx.max(tirx.min(size, number - first), 0))
        start, end = (body.let(p * rows // parts) for p in (part, part + 1))
        for pixels_body, lines, x, pattern in self.tiles(body, start, end):
            with pixels_body.loop(count) as (tile_body, j):
                vectors = tile_body.let(first + j)
                self.product(tile_body, _Tile(image, lines, x, vectors, pattern))

    def tiles(self, body: Block, start: Expr, end: Expr) -> Iterator[tuple[Block, Lines, Expr, Pattern]]:
        """Code for the tiles of a task: ``(its body, its rows, its first pixel, its pattern)``.

        The task has the rows of tiles, or in 1-D the tiles, from ``start`` to ``end``.
        """
        for row_body, lines in output_rows(body, self.spec, len(self.g.outer), self.picks.tile_oh, start, end):
            for inner, x, pattern in self.columns(row_body, *(() if lines.first else (start, end))):
                yield inner, lines, x, pattern

    def columns(self, body: Block, start: Expr = 0, end: Expr = None) -> Iterator[tuple[Block, Expr, Pattern]]:
        """Code for the tiles along a row, or those from ``start`` to ``end``: ``(its body, first pixel, pattern)``."""
        for first, count, pattern in self.g.tiles(self.picks.tile_ow):
            low, number = first, count
            if end is not None and self.picks.parallel_oh > 1:
                low = body.let(tirx.max(first, start))
                number = body.let(tirx.max(tirx.min(first + count, end) - low, 0))
            with body.loop(number) as (inner, i):
                yield inner, inner.let((low + i) * self.picks.tile_ow), pattern

    def product(self, body: Block, tile: _Tile) -> None:
        """The sums of a tile, their epilogue and store."""
        spec, lanes, tile_c, vectors = self.spec, self.picks.lanes, self.picks.tile_c, self.vectors
        numbers = [body.let(tile.vectors * tile_c + v) for v in range(tile_c)]
        narrowed = bf16.narrowed if self.rounds else narrow
        source = body.let(vectors.source(numbers[0]))
        sums = body.registers([(p, v) for p in tile.pixels for v in range(tile_c)], lanes)
        for inner, met in kernel_rows(body, spec, tile.lines):
            with inner.loop(vectors.depth) as (step, c):
                self.step(step, tile, sums, c, source, met)
        for v in range(tile_c):
            channel = body.let(vectors.first(numbers[v]))
            given = load_parameters(body, self.parameters, channel, lanes, lanes)
            for r, p in tile.pixels:
                place = spec.dst_blocks.order(tile.image, channel, [*tile.lines.row(r), tile.x + p][: spec.rank])
                value, count = sums[(r, p), v], vectors.count
                finish(body, spec, self.dst, self.residual, place, value, lanes, count, narrowed=narrowed, **given)

    def step(self, body: Block, tile: _Tile, sums: Registers, c: Expr, source: Expr, met: Met) -> None:
        """The products of an input row with a channel of each group."""
        spec, lanes = self.spec, self.picks.lanes
        begin = tile.x * spec.stride[-1] - spec.padding[-1][0]
        weights: dict[tuple[int, int, int], Expr] = {}
        for offset, readers_of in tile.pattern.inputs:
            pixel = [*met.where, begin + offset][: spec.rank]
            place = partial(spec.src_blocks.order, tile.image, spatial=pixel)
            value = body.let(self.vectors.read(self.src, spec.dtype, place, source, c))
            for (p, kx), (r, kernel_row), v in itertools.product(readers_of, met.uses, range(self.picks.tile_c)):
                if (r, kx, v) not in weights:
                    at = [tile.vectors, kernel_row, c, kx, v, 0]
                    weights[r, kx, v] = body.let(load(self.parameters["weights"], "f32", at, lanes, lanes))
                sums.add(body, ((r, p), v), value * weights[r, kx, v])
