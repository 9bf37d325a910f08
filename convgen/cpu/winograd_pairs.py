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
from .vector import Block, weighted_sum
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

    def panel(self, body: Block, task: Task, corner: Sequence[Expr]) -> tirx.Buffer:
        spec, read = self.spec, src_images(self.spec)
        return read.copied(body, self.src, spec.src_dtype, task.image, corner, self.g.extent, LANES)

    def transform(self, block: Block, values: Sequence[Expr]) -> list[Expr]:
        return [weighted_sum(zip(row, values, strict=True)) for row in matrices()[2]]

    def operand(self, value: Expr) -> Expr:
        return self.operation.number(value, "f32", None, LANES)

    def transform_back(self, block: Block, values: Sequence[Expr]) -> list[Expr]:
        return [weighted_sum(zip(row, values, strict=True)) for row in matrices()[0]]

    def output(self, block: Block, value: Expr) -> Expr:
        return value
