"""Winograd's F(4×4, 3×3) of integers, exactly: the sizes of such a kernel, and its statements.

With ``d`` a tile of src and ``w`` the weights of a pair of channels, the outputs are ``Aᵀ[(G w Gᵀ) · (Bᵀ d B)]A``. Bᵀ
is whole; 24 G is whole, but for its last row, a quarter of which is taken, and four times Aᵀ's last column, so that
weights have 16 bits: so all of it is whole, and gives the outputs times 24². Sums wrap at 32 bits; as 24² is 9 · 2⁶ and
9 has an inverse there, an output is known but for multiples of 2²⁶, and so known where it is smaller than 2²⁵: of so
few channels are the sums that are transformed back together. Of all of them, where the weights are small enough for
that, which is known when they are packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..deferred import te, tirx
from ..lowering.compute import INTEGER, Expr, Operands, ceildiv, copied, unflat
from ..problem.dtypes import RANGES
from ..problem.spec import ConvSpec
from .images import dst_images, src_images
from .model import Core
from .narrowing import Stored, store_bytes
from .operation import Operation
from .panel import Source, converted, word
from .product import Even, blocks_ahead, fetching, multiply, register_tiles
from .tasks import TaskKernel
from .vector import Block, load, load_parameters

#: Outputs and taps of a tile along an axis, and its inputs, which are as many as its products.
OUTPUTS, TAPS, EXTENT = 4, 3, 6
POSITIONS = EXTENT * EXTENT
#: Bᵀ, 24 G with a quarter of its last row, and Aᵀ with four times its last column: interpolation at 0, 1, -1, 2, -2
#: and infinity.
INPUTS = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0),
          (0, 4, 0, -5, 0, 1))  # fmt: skip
WEIGHTS = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 6))
BACK = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 4))
#: Where the two points begin that are opposite: 1 and -1, 2 and -2.
OPPOSITE = (1, 3)
#: Outputs come times 9 · 2**SHIFTED; the inverse of 9 modulo 2**32.
SHIFTED, INVERSE = 6, 954437177
#: Products of two numbers of 8 bits, of which a sum is less than 2**25 in any case; what weights add up to at most,
#: their signs aside, where one is of any number of products.
MOST_PRODUCTS, MOST_WEIGHTS = (2**25 - 1) // 128**2, (2**25 - 1) // 128
#: Channels of a vector of 16-bit numbers.
CHANNELS = 32


def operation_of(spec: ConvSpec) -> Operation:
    """Sums of pairs of products of 16-bit numbers. Of u8, numbers are moved to lie about 0."""
    return Operation("vpdpwssd", 2, "int16", INTEGER, -128 if spec.src_dtype == "u8" else 0, biased=True)


class Grid:
    """A layer's tiles, cut into blocks of rows of tiles.

    Attributes:
        outputs, size: outputs and inputs of a tile along an axis.
        positions: products of a tile.
        tile_rows, tile_columns: of an image.
        rows: blocks of so many rows of tiles.
        most_tiles: of a block.
        parts: of the channels, whose sums are transformed back together.
        words: of a part, pairs of channels.
        slabs: packed weights of a position, each of an equal part of the channels.
        lanes: channels of a vector that is transformed.
        pitch: numbers from a tile's transformed input to the next one's; no power of two, which would put them in few
            sets of the cache.
    """

    def __init__(
        self, spec: ConvSpec, block_rows: int, *, outputs: int = OUTPUTS, parts: int = 0, lanes: int = CHANNELS
    ) -> None:
        self.outputs, self.size = outputs, outputs + TAPS - 1
        self.positions = self.size**2
        self.tile_rows, self.tile_columns = (ceildiv(size, outputs) for size in spec.out_spatial)
        self.rows = Even(self.tile_rows, block_rows)
        self.most_tiles = self.rows.full * self.tile_columns
        self.parts = parts or parts_of(spec.ic)
        self.words, self.slabs = spec.ic // self.parts // 2, self.parts
        self.lanes = math.gcd(src_images(spec).block, lanes)
        self.pitch = spec.ic + CHANNELS

    @property
    def joined(self) -> Grid:
        """The same with all parts of the channels as one."""
        grid = copy(self)
        grid.parts, grid.words = 1, self.words * self.parts
        return grid

    @property
    def extent(self) -> list[int]:
        """Planes, rows and columns that a block reads."""
        return [1, *(self.outputs * n + TAPS - 1 for n in (self.rows.full, self.tile_columns))]


@lru_cache(maxsize=1024)
def parts_of(ic: int) -> int:
    """The fewest equal parts of the channels, of whole words, whose sums are small enough; 0 where none are."""
    most = MOST_PRODUCTS // TAPS**2
    return next((n for n in range(1, ic // 2 + 1) if ic % (2 * n) == 0 and ic // n <= most), 0)


# ---- parameters -----------------------------------------------------------------------------------


def _rows(matrix: Sequence[Sequence[int]], row: Expr, values: Sequence[Expr]) -> Expr:
    """A row of a matrix, which a variable numbers, times values of 32 bits."""
    products = [combined(coefficients, values) for coefficients in matrix]
    chosen = products[-1]
    for number in range(len(products) - 2, -1, -1):
        chosen = tirx.Select(row == number, products[number], chosen)
    return chosen


def combined(coefficients: Sequence[int], values: Sequence[Expr]) -> Expr:
    """The sum of values, of integers, times coefficients."""
    total: Expr = None
    # Those that are added first, so that none is taken from 0.
    for c, value in sorted(zip(coefficients, values, strict=True), key=lambda term: term[0] < 0):
        if not c:
            continue
        size = value if abs(c) == 1 else value * _number(abs(c), value)
        if total is None:
            total = size if c > 0 else _number(0, value) - size
        else:
            total = total + size if c > 0 else total - size
    return total


def row_in(block: Block, values: Sequence[Expr]) -> list[Expr]:
    """:data:`INPUTS` times six values. At points that are opposite, numbers differ by the sign of what is odd."""
    rows = [combined(row, values) for row in INPUTS]
    for first in OPPOSITE:
        one, other = INPUTS[first], INPUTS[first + 1]
        even, odd = (
            block.let(combined([(a + sign * b) // 2 for a, b in zip(one, other, strict=True)], values))
            for sign in (1, -1)
        )
        rows[first : first + 2] = [even + odd, even - odd]
    return rows


def row_back(block: Block, values: Sequence[Expr]) -> list[Expr]:
    """:data:`BACK` times six values, of which it takes sums and differences at opposite points."""
    values, columns = list(values), [list(column) for column in zip(*BACK, strict=True)]
    for first in OPPOSITE:
        one, other = values[first : first + 2]
        values[first : first + 2] = [block.let(one + other), block.let(one - other)]
        a, b = columns[first : first + 2]
        columns[first : first + 2] = [[(x + sign * y) // 2 for x, y in zip(a, b, strict=True)] for sign in (1, -1)]
    return [combined(row, values) for row in zip(*columns, strict=True)]


def _number(c: int, like: Expr) -> Expr:
    """A number in as many lanes as another value has, of its type."""
    dtype = like.ty.dtype
    number = tirx.const(c, str(dtype).split("x")[0])
    return number if dtype.lanes == 1 else tirx.Broadcast(number, dtype.lanes)


def packed(ops: Operands, g: Grid, tile_oc: int) -> list[te.Tensor]:
    """Transformed weights ``[oc/t][position and part][word][t]``, what sums start at, and what requantises them; where
    there are several parts, whether one is enough for these weights.
    """
    spec, operation = ops.spec, operation_of(ops.spec)
    half = te.compute(
        (spec.oc, spec.ic, EXTENT, TAPS),
        lambda o, c, i, k: _rows(WEIGHTS, i, [ops.weights[(o, c, tap, k)] for tap in range(TAPS)]),
        name="weights_rows",
    )

    def words(b: Expr, at: Expr, k: Expr, t: Expr) -> Expr:
        i, j, part = unflat(at, (EXTENT, EXTENT, g.parts))
        channel, o = (part * g.words + k) * 2, tirx.min(b * tile_oc + t, spec.oc - 1)
        pair = [_rows(WEIGHTS, j, [half(o, channel + n, i, tap) for tap in range(TAPS)]) for n in range(2)]
        return operation.joined([operation.weight(value) for value in pair], 1)

    shape = (ceildiv(spec.oc, tile_oc), g.parts * POSITIONS, g.words, tile_oc)
    weights = te.compute(shape, words, name="weights_packed")
    given = {parameter.name: parameter for parameter in ops.parameters}
    axes = [te.reduce_axis((0, size), f"r{i}") for i, size in enumerate(spec.weights_shape[1:])]
    totals = te.compute((spec.oc,), lambda o: te.sum(ops.weights[(o, *axes)], axes), name="totals")
    nothing = tirx.const(operation.offset, INTEGER)
    if spec.src_zero:
        nothing = nothing + given["src_zero"][0]

    def start(o: Expr) -> Expr:
        value = 0 - totals[o] * nothing
        return given["bias"][o] + value if spec.bias else value

    starts = te.compute((spec.oc,), start, name="bias_packed")
    single = [_single(ops)] if g.parts > 1 else []
    return [weights, starts, *(copied(p) for p in ops.parameters[1:] if p.name != "bias"), *single]


def _single(ops: Operands) -> te.Tensor:
    """Whether the sums of all channels are small enough to be transformed back together: 1 or 0."""
    spec = ops.spec
    axes = [te.reduce_axis((0, size), f"s{i}") for i, size in enumerate(spec.weights_shape[1:])]
    sizes = te.compute((spec.oc,), lambda o: te.sum(tirx.abs(ops.weights[(o, *axes)]), axes), name="sizes")
    o = te.reduce_axis((0, spec.oc), "o")
    largest = te.compute((1,), lambda i: te.max(sizes[o], axis=o), name="largest")
    one, none = (tirx.const(number, INTEGER) for number in (1, 0))
    return te.compute((1,), lambda i: tirx.Select(largest[i] <= MOST_WEIGHTS, one, none), name="single_packed")


# ---- the kernel -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A block of rows of tiles of an image, and of blocks of channels, from one on: ``first`` to ``end``."""

    image: Expr
    row: Expr
    rows: Expr
    first: Expr
    end: Expr


@dataclass(frozen=True)
class Kernel(TaskKernel):
    """The statements of the whole layer: tasks are images, blocks of rows of tiles, and parts of the channels.

    Attributes:
        permutes: whether bytes of vectors can be permuted.
    """

    g: Grid
    lanes: int
    core: Core
    permutes: bool = False

    @property
    def operation(self) -> Operation:
        return operation_of(self.spec)

    @property
    def tasks(self) -> tuple[int, ...]:
        return self.spec.n, self.g.rows.count, self.picks.parallel_oc

    def statement(self) -> tirx.Stmt:
        return self.operation.with_helper(super().statement())

    def work(self, body: Block, place: Sequence[Expr]) -> None:
        spec, g, picks, (image, block, part) = self.spec, self.g, self.picks, place
        blocks = ceildiv(spec.oc, picks.tile_oc)
        first, end = (body.let((part + i) * blocks // picks.parallel_oc) for i in (0, 1))
        row = body.let(g.rows.start(block))
        rows = body.let(g.rows.size_of(block))
        task = Task(image, row, rows, first, end)
        values = self.transformed(body, task)
        sums = body.buffer((g.parts * g.positions, g.most_tiles, picks.tile_oc), self.operation.sums)
        with body.loop(end - first) as (inner, i):
            b = inner.let(first + i)
            vectors, width = spec.oc // self.lanes, picks.tile_oc // self.lanes
            for case, count in inner.cases(b, vectors // width, width, vectors % width):
                for some, kernel in self.in_parts(case):
                    kernel.products(some, task, values, b, count, sums)
                    with some.loop(count) as (one, v):
                        kernel.back(one, task, sums, v * self.lanes, one.let(b * picks.tile_oc + v * self.lanes))

    def in_parts(self, body: Block) -> Iterator[tuple[Block, Kernel]]:
        """Code for weights of which the sums of all channels are transformed back together, and for others."""
        if self.g.parts == 1:
            yield body, self
            return
        single = self.parameters["single"][0]
        for condition, g in ((single == 1, self.g.joined), (single == 0, self.g)):
            with body.when(condition) as case:
                yield case, replace(self, g=g)

    # ---- what another kind of numbers does in its own way ---------------------------------------

    def panel(self, body: Block, task: Task, corner: Sequence[Expr]) -> tirx.Buffer:
        """A copy of what a task reads, from the pixel ``corner`` on, as numbers that can be transformed."""
        source = Source(self.spec, self.src, task.image, [*corner], self.g.extent, self.src_zero)
        return converted(body, self.operation, source, src_images(self.spec), self.lanes)

    def transform(self, block: Block, values: Sequence[Expr]) -> list[Expr]:
        """Inputs of a tile along an axis."""
        return row_in(block, values)

    def operand(self, value: Expr) -> Expr:
        """What is multiplied, of an input that is transformed along both axes."""
        return value

    def transform_back(self, block: Block, values: Sequence[Expr]) -> list[Expr]:
        """Sums of a tile along an axis."""
        return row_back(block, values)

    def output(self, block: Block, value: Expr) -> Expr:
        """An output, of a sum that is transformed back along both axes."""
        times = block.let(value)
        return (times * _number(INVERSE, times)) >> _number(SHIFTED, times)

    # ---- input --------------------------------------------------------------------------------

    def transformed(self, body: Block, task: Task) -> tirx.Buffer:
        """A task's input, transformed: operands ``[position][tile][ic]``."""
        g, read, size, step = self.g, src_images(self.spec), self.g.size, self.g.outputs
        (top, _), (left, _) = self.spec.padding
        panel = self.panel(body, task, [0, body.let(task.row * step - top), -left])
        columns = g.extent[2]
        values = body.buffer((g.positions, g.most_tiles, g.pitch), self.operation.operand)
        half = body.buffer((size, columns, g.lanes), str(panel.dtype))
        with body.loop(task.rows) as (row, y), row.loop(self.spec.ic // g.lanes) as (part, c):
            channel = part.let(c * g.lanes)
            block, within = (0, channel) if read.layout == "nhwc" else (channel // read.block, channel % read.block)
            with part.loop(columns) as (one, x):
                place = one.let(x * read.block + within)
                column = [self.numbers(one, panel, [0, y * step + k, block, place]) for k in range(size)]
                for i, value in enumerate(self.transform(one, column)):
                    one.add(self.stored(half, [i, x, 0], value))
            with part.loop(g.tile_columns) as (one, tx), one.loop(size) as (inner, i):
                line = [self.numbers(inner, half, [i, tx * step + k, 0]) for k in range(size)]
                for j, value in enumerate(self.transform(inner, line)):
                    place = [i * size + j, y * g.tile_columns + tx, channel]
                    inner.add(self.stored(values, place, self.operand(value)))
        return values

    def numbers(self, block: Block, buffer: tirx.Buffer, place: Sequence[Any]) -> Expr:
        """A vector of numbers of a panel, or of what is half transformed."""
        return block.let(tirx.BufferLoad(buffer, [*place[:-1], _ramp(place[-1], self.g.lanes)]))

    def stored(self, buffer: tirx.Buffer, place: Sequence[Any], value: Expr) -> tirx.Stmt:
        return tirx.BufferStore(buffer, value, [*place[:-1], _ramp(place[-1], self.g.lanes)])

    # ---- products -----------------------------------------------------------------------------

    def products(self, body: Block, task: Task, values: tirx.Buffer, b: Expr, vectors: int, sums: tirx.Buffer) -> None:
        """The sums of a block of channels, a position of a part of src's channels after another."""
        g, positions = self.g, self.g.parts * self.g.positions
        with body.loop(positions) as (one, at):
            for inner, first, pixels, i, tiles in register_tiles(
                one, g.rows, task.rows, lambda rows: rows * g.tile_columns, self.picks.tile_px
            ):
                self.register_tile(inner, values, (b, at), (first, pixels), (i, tiles), vectors, sums)

    def register_tile(
        self,
        body: Block,
        values: tirx.Buffer,
        slab: tuple[Expr, Expr],
        tiles: tuple[Expr, int],
        share: tuple[Expr, int],
        vectors: int,
        sums: tirx.Buffer,
    ) -> None:
        """The sums of so many ``tiles`` from one on. ``slab``: a block of channels, and a position of a part of src's;
        ``share``: which of how many fetches of the next slab this does.
        """
        g, lanes, weights, (b, at), (first, pixels) = self.g, self.lanes, self.parameters["weights"], slab, tiles
        registers = body.registers([(t, v) for t in range(pixels) for v in range(vectors)], lanes, self.operation.sums)
        position, part = (at, 0) if g.parts == 1 else (body.let(at // g.parts), body.let(at % g.parts))
        following = b * (g.parts * g.positions) + at + blocks_ahead(g.words * vectors * g.most_tiles)
        following = following * (g.words * self.picks.tile_oc)
        fetch = fetching(body, self.core, weights, following, g.words, pixels * vectors, share)

        def scalar(t: int, k: Expr) -> Expr:
            return word(values, self.operation, [position, first + t, (part * g.words + k) * 2])

        def vector(v: int, k: Expr) -> Expr:
            return load(weights, "i32", [b, at * (g.slabs // g.parts), k, v * lanes], lanes, lanes)

        multiply(body, registers, g.words, scalar, vector, fetch, self.operation)
        for t, v in registers.keys:
            place = [at, first + t, tirx.Ramp(tirx.const(v * lanes, "int32"), tirx.const(1, "int32"), lanes)]
            body.add(tirx.BufferStore(sums, registers[t, v], place))

    # ---- output -------------------------------------------------------------------------------

    def back(self, body: Block, task: Task, sums: tirx.Buffer, lane: Expr, channel: Expr) -> None:
        """A vector of channels transformed back, finished and stored, tile by tile."""
        spec, g, lanes, images = self.spec, self.g, self.lanes, dst_images(self.spec)
        tensors, outputs = (self.dst, self.residual), g.outputs
        given = load_parameters(body, self.parameters, channel, lanes, lanes)
        height, width = spec.out_spatial
        with body.loop(task.rows) as (row, y), row.loop(g.tile_columns) as (one, x):
            tile = one.let(y * g.tile_columns + x)
            pixels = self.outputs(one, sums, tile, lane)
            for p in range(outputs):
                line = one.let((task.row + y) * outputs + p)
                with one.when(True if height % outputs == 0 else line < height) as there:
                    if width % outputs == 0 and spec.dst_dtype in RANGES:
                        self.back_together(there, (task.image, channel, line, x * outputs), pixels, p, given)
                        continue
                    for q in range(outputs):
                        column = x * outputs + q
                        with there.when(True if width % outputs == 0 else column < width) as exists:
                            place = (task.image, channel, [0, line, column])
                            narrowed = self.operation.narrowed
                            images.finish(exists, spec, tensors, place, pixels[p, q], lanes, lanes, given, narrowed)

    def back_together(
        self,
        body: Block,
        place: tuple[Expr, Expr, Expr, Expr],
        pixels: dict[tuple[int, int], Expr],
        p: int,
        given: dict[str, Expr],
    ) -> None:
        """The store of a row of a tile as bytes: image, channel, and its first pixel in dst."""
        image, channel, line, column = place
        images = dst_images(self.spec)
        vectors = [
            Stored(images.element(image, channel, [0, line, column + q]), pixels[p, q], given, images.layout != "nhwc")
            for q in range(self.g.outputs)
        ]
        zero = body.let(self.parameters["dst_zero"][0]) if self.spec.dst_zero else None
        store_bytes(body, self.spec, (self.dst, self.residual), vectors, zero, permutes=self.permutes)

    def outputs(self, body: Block, sums: tirx.Buffer, tile: Expr, lane: Expr) -> dict[tuple[int, int], Expr]:
        """The outputs of a tile, sums of those of all parts of src's channels."""
        g, size, totals = self.g, self.g.size, dict[tuple[int, int], Expr]()
        for part in range(g.parts):
            columns = []
            for j in range(size):
                at = [(i * size + j) * g.parts + part for i in range(size)]
                places = [[place, tile, _ramp(lane, self.lanes)] for place in at]
                read = [body.let(tirx.BufferLoad(sums, place)) for place in places]
                columns.append([body.let(value) for value in self.transform_back(body, read)])
            for p in range(g.outputs):
                for q, value in enumerate(self.transform_back(body, [column[p] for column in columns])):
                    own = self.output(body, value)
                    totals[p, q] = body.let(own if part == 0 else totals[p, q] + own)
        return totals


def _ramp(start: Expr, lanes: int) -> Expr:
    start = tirx.const(start, "int32") if isinstance(start, int) else start
    return tirx.Ramp(start, tirx.const(1, "int32"), lanes)
