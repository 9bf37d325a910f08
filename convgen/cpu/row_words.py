"""Grouped convolutions of integers by words of neighbouring rows: the sizes of such a kernel, and its statements.

A word (:mod:`convgen.cpu.operation`) has one column of as many rows as an instruction multiplies at once. What the
kernel does is said in ``schedules/cpu_grouped_integers.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from ..deferred import te, tirx
from ..hardware.target import Target
from ..lowering.compute import INTEGER, Expr, Operands, ceildiv, copied, of_lanes
from ..lowering.schedule import Picks
from ..problem.spec import ConvSpec
from .groups import GroupVectors
from .images import src_images, three
from .operation import Operation, operation_of
from .panel import Source, converted
from .product import Even
from .tasks import TaskKernel
from .vector import (
    Block,
    Registers,
    finish,
    interleave,
    load_parameters,
    load_stored,
    spread_parameters,
    zeros,
)


class Geometry:
    """How the output is walked: by rows of tiles, across which words lie.

    Attributes:
        axis: the one whose pixels are rows: the last but one, in 1-D the last.
        kernel, stride, dilation, begin, out: along three axes, 1 (begin: 0) along those that the layer lacks.
        rows: of the output.
        width, taps: the pixels and the taps of a row: in 1-D one.
        vectors: which channels are in the lanes.
        read: src as a task's copy has it, channels innermost.
        slack: numbers of the copy that may be read past the end of a row.
        loaded: numbers of a pixel that are loaded for a vector.
    """

    def __init__(self, spec: ConvSpec, operation: Operation, lanes: int) -> None:
        self.spec, self.operation, self.vectors = spec, operation, GroupVectors(spec, lanes)
        self.axis = 1 if spec.rank > 1 else 2
        self.kernel, self.stride, self.dilation = three(spec.kernel), three(spec.stride), three(spec.dilation)
        self.begin, self.out = three([begin for begin, _ in spec.padding], 0), three(spec.out_spatial)
        self.rows = self.out[self.axis]
        self.width, self.taps = (self.out[2], self.kernel[2]) if self.axis == 1 else (1, 1)
        self.read = src_images(spec)
        if spec.layout == "nchw":
            self.read = replace(self.read, layout="nhwc")
        self.slack = 4 * lanes // operation.bytes
        self.loaded = max(2, 1 << (self.vectors.groups * self.vectors.depth - 1).bit_length())

    @property
    def shifted(self) -> bool:
        """Whether what operands stand for 0 adds something to sums, which is taken off beforehand."""
        return bool(self.operation.offset) or (self.operation.biased and self.spec.src_zero)

    def met(self, height: int) -> int:
        """Rows that so many output rows meet."""
        return (height - 1) * self.stride[self.axis] + self.kernel[self.axis]

    def words(self, height: int) -> int:
        """Words of them."""
        return ceildiv(self.met(height), self.operation.depth)

    def uses(self, height: int) -> list[tuple[int, int]]:
        """``(word, output row)`` of those that have rows in common."""
        depth, stride, kernel = self.operation.depth, self.stride[self.axis], self.kernel[self.axis]
        pairs = itertools.product(range(self.words(height)), range(height))
        return [(q, r) for q, r in pairs if q * depth < r * stride + kernel and r * stride < (q + 1) * depth]

    def columns(self, width: int) -> dict[int, list[tuple[int, int]]]:
        """The columns that so many output pixels read: which ``(pixel, tap)`` read each."""
        found: dict[int, list[tuple[int, int]]] = {}
        for p, k in itertools.product(range(width), range(self.taps)):
            found.setdefault(p * self.stride[2] + k * self.dilation[2], []).append((p, k))
        return dict(sorted(found.items()))

    def unrolled(self, height: int, width: int) -> int:
        """Instructions of products of a tile."""
        return self.vectors.depth * width * self.taps * len(self.uses(height)) * self.operation.instructions

    def extent(self, picks: Picks) -> list[int]:
        """Planes, rows and columns that a task reads."""
        pixels = [1, 1, self.width]
        pixels[self.axis] = min(picks.block * picks.tile_oh, self.rows)
        axes = zip(pixels, self.stride, self.kernel, self.dilation, strict=True)
        return [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in axes]


@lru_cache(maxsize=1024)
def geometry_of(spec: ConvSpec, target: Target) -> Geometry:
    return Geometry(spec, operation_of(spec, target), target.lanes)


def _packed_weights(ops: Operands, g: Geometry, height: int) -> te.Tensor:
    """``[vector][plane of the kernel][word][row of the tile][ic][k][lanes]``, words."""
    spec, vectors, depth = ops.spec, g.vectors, g.operation.depth

    def words(b: Expr, z: Expr, q: Expr, r: Expr, c: Expr, kx: Expr, t: Expr) -> Expr:
        o = tirx.min(vectors.first(b) + t, spec.oc - 1)

        def weight(row: Expr) -> Expr:
            taps = (z, row, kx) if g.axis == 1 else (0, 0, row)
            value = ops.weights[(o, c, *taps[3 - spec.rank :])]
            if spec.weights_zero:
                value = value - ops.zero("weights")[o]
            exists = tirx.all(row >= 0, row < g.kernel[g.axis], t < vectors.count)
            return g.operation.weight(tirx.if_then_else(exists, value, tirx.const(0, value.ty.dtype)))

        return g.operation.joined([weight(q * depth + i - r * g.stride[g.axis]) for i in range(depth)], 1)

    shape = (vectors.number, g.kernel[0], g.words(height), height, vectors.depth, g.taps, vectors.lanes)
    return te.compute(shape, words, name="weights_packed")


def _starts(ops: Operands, g: Geometry) -> te.Tensor:
    """What sums start at: the bias, less what src's offset and zero point add to them."""
    spec, nothing = ops.spec, tirx.const(g.operation.offset, INTEGER)
    given = {parameter.name: parameter for parameter in ops.parameters}
    if spec.src_zero:
        nothing = nothing + given["src_zero"][0]
    axes = [te.reduce_axis((0, size), f"r{i}") for i, size in enumerate(spec.weights_shape[1:])]
    totals = te.compute((spec.oc,), lambda o: te.sum(ops.weights[(o, *axes)], axes), name="totals")

    def start(o: Expr) -> Expr:
        channel = tirx.min(o, spec.oc - 1)
        value = 0 - totals[channel] * nothing if g.shifted else tirx.const(0, INTEGER)
        return given["bias"][channel] + value if spec.bias else value

    return te.compute((spec.oc + g.vectors.lanes,), start, name="start_packed")


def packed(ops: Operands, g: Geometry, height: int) -> list[te.Tensor]:
    """Everything that a kernel with tiles so high takes of the parameters; of vectors, also past the last channel."""
    found = [_packed_weights(ops, g, height)]
    if ops.spec.bias or g.shifted:
        found.append(_starts(ops, g))
    size = {"scale": ops.spec.oc + g.vectors.lanes, "src_zero": 1, "dst_zero": 1, "sum": 0}
    return found + [copied(p, size[p.name]) for p in ops.parameters if p.name in size]


# ---- the kernel -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """A tile of pixels: where its rows begin in the task's copy and in dst, its first column, its size."""

    panel: tirx.Buffer
    image: Expr
    plane: Expr
    line: Expr
    row: Expr
    column: Expr
    height: int
    width: int

    @property
    def pixels(self) -> list[tuple[int, int]]:
        return [(r, p) for r in range(self.height) for p in range(self.width)]


class _Vector(NamedTuple):
    """A vector of channels: its number, its first output and input channel, what sums start at, parameters."""

    number: Expr
    channel: Expr
    source: Expr
    start: Expr | None
    given: dict[str, Expr]


@dataclass(frozen=True)
class Kernel(TaskKernel):
    """The statements of the whole layer: tasks are images, planes, and blocks of rows."""

    g: Geometry

    @property
    def lanes(self) -> int:
        return self.g.vectors.lanes

    @property
    def tasks(self) -> tuple[int, ...]:
        tiles = ceildiv(self.g.rows, self.picks.tile_oh)
        return self.spec.n, self.g.out[0], ceildiv(tiles, self.picks.block)

    def work(self, body: Block, place: Sequence[Expr]) -> None:
        g, picks, (image, plane, block) = self.g, self.picks, place
        tiles = ceildiv(g.rows, picks.tile_oh)
        first = body.let(block * picks.block)
        count = picks.block if tiles % picks.block == 0 else body.let(tirx.min(picks.block, tiles - first))
        corner = [plane * g.stride[0] - g.begin[0], 0, -g.begin[2]]
        corner[g.axis] = first * (picks.tile_oh * g.stride[g.axis]) - g.begin[g.axis]
        first_read = [body.let(c) for c in corner]
        source = Source(self.spec, self.src, image, first_read, g.extent(picks), self.src_zero)
        panel = converted(body, g.operation, source, g.read, self.lanes)
        with body.loop(count) as (inner, i):
            row = inner.let(first + i)
            for case, height in inner.cases(row, g.rows // picks.tile_oh, picks.tile_oh, g.rows % picks.tile_oh):
                line, y = (case.let(j * picks.tile_oh) for j in (i, row))
                self.row(case, _Tile(panel, image, plane, line, y, 0, height, 0))

    def row(self, body: Block, tile: _Tile) -> None:
        """A row of tiles, one vector of channels after another."""
        g, lanes, columns = self.g, self.lanes, Even(self.g.width, self.picks.tile_ow)
        with body.loop(g.vectors.number) as (inner, v):
            channel, source = inner.let(g.vectors.first(v)), inner.let(g.vectors.source(v))
            start = None
            if "start" in self.parameters:
                start = inner.let(load_stored(self.parameters["start"], "i32", [channel], lanes, lanes))
            given = load_parameters(inner, self.parameters, channel, lanes, lanes)
            vector = _Vector(v, channel, source, start, given)
            with inner.loop(columns.count) as (step, i):
                for case, width in columns.cases(step, i):
                    self.tile(case, replace(tile, column=case.let(columns.start(i)), width=width), vector)

    def tile(self, body: Block, tile: _Tile, vector: _Vector) -> None:
        """The sums of a tile, their epilogue and store."""
        spec, g, lanes = self.spec, self.g, self.lanes
        sums = body.registers(tile.pixels, lanes, INTEGER)
        for pixel in tile.pixels if vector.start is not None else ():
            sums.put(body, pixel, vector.start)
        with body.loop(g.kernel[0]) as (inner, z):
            self.products(inner, tile, vector, z, sums)
        if spec.dst_layout == "nchw":
            self.store_turned(body, tile, vector, sums)
            return
        for r, p in tile.pixels:
            place = spec.dst_blocks.order(tile.image, vector.channel, self.pixel(tile, r, p))
            finish(body, spec, self.dst, self.residual, place, sums[r, p], lanes, g.vectors.count, **vector.given)

    def pixel(self, tile: _Tile, r: int, p: int) -> list[Expr]:
        """Where in dst a tile's pixel is."""
        where = [tile.plane, tile.row + r, tile.column + p] if self.g.axis == 1 else [0, 0, tile.row + r]
        return where[3 - self.spec.rank :]

    def store_turned(self, body: Block, tile: _Tile, vector: _Vector, sums: Registers) -> None:
        """The same as rows of pixels of a channel each, transposed in registers."""
        g, lanes, nothing = self.g, self.lanes, zeros(self.lanes, INTEGER)
        rows = [[(r, p) for p in range(tile.width)] for r in range(tile.height)] if g.axis == 1 else [tile.pixels]
        for row, start in itertools.product(rows, range(0, len(rows[0]), lanes)):
            some = row[start : start + lanes]
            square = [sums[pixel] for pixel in some] + [nothing] * (lanes - len(some))
            turned = interleave(body, square, lanes)[: g.vectors.count]
            for t, value in enumerate(turned):
                channel = vector.channel + t
                given = spread_parameters(body, self.parameters, channel, lanes)
                place = self.spec.dst_blocks.order(tile.image, channel, self.pixel(tile, *some[0]))
                finish(body, self.spec, self.dst, self.residual, place, value, lanes, len(some), **given)

    def products(self, body: Block, tile: _Tile, vector: _Vector, z: Expr, sums: Registers) -> None:
        """Those of a plane of the kernel, one column that the tile reads after another."""
        g, lanes, weights = self.g, self.lanes, dict[tuple[int, ...], Expr]()
        for column, readers in g.columns(tile.width).items():
            words = self.words(body, tile, z, column, vector.source)
            for (q, c), word in words.items():
                for r in (r for used, r in g.uses(tile.height) if used == q):
                    for p, k in readers:
                        if (q, r, c, k) not in weights:
                            at = [vector.number, z, q, r, c, k, 0]
                            loaded = load_stored(self.parameters["weights"], "i32", at, lanes, lanes)
                            weights[q, r, c, k] = body.let(loaded)
                        sums.put(body, (r, p), g.operation.add(sums[r, p], word, weights[q, r, c, k], lanes))

    def words(self, body: Block, tile: _Tile, z: Expr, column: int, channel: Expr) -> dict[tuple[int, int], Expr]:
        """The words of a column of a tile's rows, by their number and the channel of a group."""
        g, operation, size, depth = self.g, self.g.operation, self.g.loaded, self.g.vectors.depth
        block, within = (0, channel) if g.read.layout == "nhwc" else (channel // g.read.block, channel % g.read.block)
        met, rows = g.met(tile.height), []
        for i in range(met):
            y, x = tile.line * g.stride[g.axis] + i * g.dilation[g.axis], tile.column * g.stride[2] + column
            z_at, y, x = (z * g.dilation[0], y, x) if g.axis == 1 else (0, 0, y)
            place = tirx.Ramp(x * g.read.block + within, tirx.const(1, "int32"), size)
            rows.append(body.let(tirx.BufferLoad(tile.panel, [z_at, y, block, place])))
        found = {}
        for q, c in itertools.product(range(g.words(tile.height)), range(depth)):
            # Rows past the last are multiplied by zeros, whatever they are.
            of_word = [rows[min(q * operation.depth + i, met - 1)] for i in range(operation.depth)]
            order = [i * size + group * depth + c for group in g.vectors.order for i in range(operation.depth)]
            copies = ceildiv(len(order), len(of_word) * size)  # TVM takes no more numbers than there are
            numbers = tirx.Shuffle(of_word * copies, order)
            found[q, c] = body.let(tirx.reinterpret(of_lanes(INTEGER, self.lanes), numbers))
        return found
