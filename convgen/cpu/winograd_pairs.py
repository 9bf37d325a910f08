"""Winograd's F(2×2, 3×3) by pairs of bf16: what differs from the kernel of integers.

Transforms are of f32. What they give is rounded to bf16 where it is stored to be multiplied: 16 products of pairs in
place of 36, whose weights take less memory than f32 of the taps do. Of so small a tile sums are of few numbers, and
their rounding hardly more than that of what they are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ..deferred import te, tirx
from ..lowering.compute import Expr, Operands, ceildiv, copied, row_times, unflat
from ..lowering.winograd import toom_cook
from ..problem.spec import ConvSpec
from .images import src_images
from .operation import PAIRS, Operation
from .vector import Block, load, weighted_sum
from .winograd_integers import TAPS, Grid, Kernel, Task

#: Outputs of a tile along an axis.
OUTPUTS = 2
#: Channels that are transformed at once.
LANES = 16

Matrix = Sequence[Sequence[float]]


@cache
def matrices() -> tuple[Matrix, Matrix, Matrix]:
    """Aᵀ, G and Bᵀ."""
    back, weights, inputs = ([[float(v) for v in row] for row in matrix] for matrix in toom_cook(OUTPUTS, TAPS))
    return back, weights, inputs


def grid_of(spec: ConvSpec, block_rows: int) -> Grid:
    return Grid(spec, block_rows, outputs=OUTPUTS, parts=1, lanes=LANES)


def packed(ops: Operands, g: Grid, tile_oc: int) -> list[te.Tensor]:
    """Transformed weights ``[oc/t][position][word][t]``, words of two bf16, and what the epilogue takes."""
    spec, rows = ops.spec, matrices()[1]
    half = te.compute(
        (spec.oc, spec.ic, g.size, TAPS),
        lambda o, c, i, k: row_times(rows, i, lambda tap: ops.weights[(o, c, tap, k)]),
        name="weights_rows",
    )

    def words(b: Expr, at: Expr, k: Expr, t: Expr) -> Expr:
        i, j = unflat(at, (g.size, g.size))
        o = tirx.min(b * tile_oc + t, spec.oc - 1)
        pair = [row_times(rows, j, lambda tap, n=n: half[(o, k * 2 + n, i, tap)]) for n in range(2)]  # type: ignore[misc]
        return PAIRS.joined([PAIRS.weight(value) for value in pair], 1)

    shape = (ceildiv(spec.oc, tile_oc), g.positions, g.words, tile_oc)
    return [te.compute(shape, words, name="weights_packed"), *map(copied, ops.parameters[1:])]


@dataclass(frozen=True)
class PairsKernel(Kernel):
    """The statements of the whole layer."""

    @property
    def operation(self) -> Operation:
        return PAIRS

    def transformed(self, body: Block, task: Task) -> tirx.Buffer:
        """A task's input, transformed: ``[position][tile][ic]``, bf16."""
        spec, g, lanes, read, inputs = self.spec, self.g, LANES, src_images(self.spec), matrices()[2]
        (top, _), (left, _) = spec.padding
        corner = [0, body.let(task.row * g.outputs - top), -left]
        panel = read.copied(body, self.src, spec.src_dtype, task.image, corner, g.extent, lanes)
        columns = g.extent[2]
        values = body.buffer((g.positions, g.most_tiles, g.pitch), self.operation.operand)
        half = body.buffer((g.size, columns, lanes))
        with body.loop(task.rows) as (row, y), row.loop(spec.ic // lanes) as (part, c):
            channel = part.let(c * lanes)
            block, within = (0, channel) if read.layout == "nhwc" else (channel // read.block, channel % read.block)
            with part.loop(columns) as (one, x):
                place = one.let(x * read.block + within)
                places = [[0, y * g.outputs + k, block, place] for k in range(g.size)]
                column = [one.let(load(panel, "f32", at, lanes, lanes)) for at in places]
                for i, row_of in enumerate(inputs):
                    total = weighted_sum(zip(row_of, column, strict=True))
                    one.add(self.stored(half, [i, x, 0], total))
            with part.loop(g.tile_columns) as (one, tx), one.loop(g.size) as (inner, i):
                places = [[i, tx * g.outputs + k, 0] for k in range(g.size)]
                line = [inner.let(load(half, "f32", at, lanes, lanes)) for at in places]
                for j, row_of in enumerate(inputs):
                    total = weighted_sum(zip(row_of, line, strict=True))
                    place = [i * g.size + j, y * g.tile_columns + tx, channel]
                    inner.add(self.stored(values, place, self.operation.number(total, "f32", None, lanes)))
        return values

    def outputs(self, body: Block, sums: tirx.Buffer, tile: Expr, lane: Expr) -> dict[tuple[int, int], Expr]:
        """The outputs of a tile."""
        size, back, columns = self.g.size, matrices()[0], []
        for j in range(size):
            places = [[i * size + j, tile, lane] for i in range(size)]
            read = [body.let(load(sums, "f32", place, self.lanes, self.lanes)) for place in places]
            columns.append([body.let(weighted_sum(zip(row_of, read, strict=True))) for row_of in back])
        return {
            (p, q): body.let(weighted_sum(zip(row_of, [column[p] for column in columns], strict=True)))
            for p in range(self.g.outputs)
            for q, row_of in enumerate(back)
        }
