"""Strided transposed convolution of NCHW planes by periods of output rows: the statements of ``main``, as
``schedules/cpu_transposed_planes.py`` says what they do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..deferred import tirx
from ..lowering.compute import Expr
from .lanes import Columns, Taps, columns_of
from .periods import Period, Periods
from .tasks import TaskKernel
from .vector import Block, finish, interleave, load, spread_parameters


class _Place(NamedTuple):
    """What a tile's sums are of: image, output channel, and the first input channel of its group."""

    image: Expr
    channel: Expr
    first: Expr


class _Tile(NamedTuple):
    """A period of rows, its number, and its vectors: from an input pixel on, with what of the image they meet."""

    p: Expr
    period: Period
    x: Expr
    pattern: dict[Any, Any]


@dataclass(frozen=True)
class PlanesKernel(TaskKernel):
    """The statements of the whole layer: tasks are images, output channels and parts of the rows."""

    @cached_property
    def rows(self) -> Periods:
        return Periods(self.spec)

    @property
    def columns(self) -> Columns:
        return columns_of(self.spec, self.picks.lanes, self.picks.tile_ow)

    @property
    def tasks(self) -> tuple[int, ...]:
        return self.spec.n, self.spec.oc, self.picks.parallel_oh

    def work(self, body: Block, place: Sequence[Expr]) -> None:
        spec, count, parts, (image, channel, part) = self.spec, self.rows.count, self.picks.parallel_oh, place
        depth, per_group = spec.ic // spec.groups, spec.oc // spec.groups
        at = _Place(image, channel, body.let(channel // per_group * depth))
        weights = self.weights(body, channel, 0) if depth == 1 else None
        given = spread_parameters(body, self.parameters, channel, self.columns.lanes)
        split = () if parts == 1 else [body.let(p * count // parts) for p in (part, part + 1)]
        for rows_body, p, period in self.rows.periods(body, *split):
            for tile_body, _, x, pattern in self.columns.tiles(rows_body):
                self.tile(tile_body, at, _Tile(p, period, x, pattern), weights, given)

    def weights(self, body: Block, channel: Expr, c: Expr) -> dict[tuple[int, int], Expr]:
        """All weights of an output and an input channel, each in all lanes."""
        packed, lanes = self.parameters["weights"], self.columns.lanes
        taps = itertools.product(*map(range, self.spec.kernel))
        return {(ky, kx): body.let(tirx.Broadcast(packed[channel, ky, c, kx, 0], lanes)) for ky, kx in taps}

    def tile(
        self,
        body: Block,
        at: _Place,
        tile: _Tile,
        weights: dict[tuple[int, int], Expr] | None,
        given: dict[str, Expr],
    ) -> None:
        """The sums of a period's rows in a tile of columns, their epilogue and store."""
        spec, columns, (p, period, x, pattern) = self.spec, self.columns, tile
        lanes, phases, rows = columns.lanes, range(columns.phases), range(period.rows)
        vectors = [v for v in range(columns.vectors) if pattern["stored", v, 0] > 0]
        sums = body.registers(list(itertools.product(rows, phases, vectors)), lanes)
        with body.loop(spec.ic // spec.groups) as (step, c):
            factors = self.weights(step, at.channel, c) if weights is None else weights
            for offset, readers in period.met:
                row = [at.image, at.first + c, p + offset]

                def read(pixel: int, count: int, shift: int, row: list[Expr] = row) -> Expr:
                    return load(self.src, spec.dtype, [*row, x + pixel], lanes, count, shift)

                inputs = Taps(step, columns, pattern, read)
                for (j, ky), tap, v in itertools.product(readers, columns.taps, vectors):
                    value = inputs[v, tap]
                    if value is not None:
                        sums.add(step, (j, tap.phase, v), value * factors[ky, tap.k])
        for j, v in itertools.product(rows, vectors):
            made = interleave(body, [body.let(sums[j, phase, v]) for phase in phases], lanes)
            for i, value in enumerate(made):
                count = pattern["stored", v, i]
                if count > 0:
                    pixel = x * columns.phases + (v * columns.phases + i) * lanes
                    place = [at.image, at.channel, p * self.rows.stride + j, pixel]
                    finish(body, spec, self.dst, self.residual, place, value, lanes, count, **given)
