"""Transposed convolution of NCHW planes with few channels per group: a row of src gives all output rows it can.

Applies to  strided two-dimensional transposed convolutions of few input channels per group, NCHW: depthwise ones, among
            them the gradient of src of strided depthwise layers. Dilated only where the stride is 1.
Strategy    1. Pack weights as [group and oc][rows of the kernel][ic][taps of a row]. A task has an image's output
               channel, or one of `parallel_oh` parts of its rows; of a single input channel, weights stay in registers.
            2. Output rows fall into as many phases as the stride; a period has one row of each. Which rows of src, and
               which taps, a period's rows meet is the same for all but the first and the last periods: code is written
               out for each kind, nothing is looked up.
            3. Pixels of a row that are a stride apart are neighbours in the lanes: a vector of src is loaded where it
               lies, masked at the edges, and used by all rows and phases that it meets. Sums of a period of rows ×
               all phases × `tile_ow` vectors stay in registers.
            4. Phases are shuffled together, so that epilogue and store work on whole vectors.
Why not     row by row (cpu_transposed_rows): taps are counted, and what rows share is loaded, again for each row; short
            rows take longer to begin than to compute. Many channels per group: weights would be read for each period.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from convgen.cpu.lanes import Columns, Taps, columns_of, pack_rows, row_taps
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.periods import Period, Periods
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, finishing
from convgen.cpu.vector import Block, finish, interleave, load, spread_parameters, written
from convgen.deferred import tirx
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import ConvSpec

#: Input channels of a group.
MOST_DEPTH = 4
#: Multiply-adds written out, in all tiles together; more take long to compile.
MOST_UNROLLED = 2048
#: Cycles to begin a tile: its sums are few.
BEGIN = 4


class CpuTransposedPlanes(Written):
    id, version = "cpu_transposed_planes", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        require(spec.layout == "nchw" and spec.rank == 2, "needs NCHW with two axes")
        depth = spec.ic // spec.groups
        require(depth <= MOST_DEPTH, f"needs at most {MOST_DEPTH} input channels per group")
        require(all(1 in pair for pair in zip(spec.stride, spec.dilation, strict=True)), "dilated and strided")
        require(max(spec.stride) <= 4, "needs strides of at most 4")
        small = Picks(lanes=4, tile_ow=1, parallel_oh=1)
        unrolled = _unrolled(spec, small)
        require(unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        width, periods = ceildiv(spec.out_spatial[1], spec.stride[1]), Periods(spec).count
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * width)]
        return Space(
            lanes=lanes,
            tile_ow=[v for v in (1, 2, 3, 4) if v == 1 or lanes[0] * (v - 1) < width],
            parallel_oh=[p for p in (1, 2, 4, 8, 16) if p <= periods],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        width = ceildiv(spec.out_spatial[1], spec.stride[1])
        require(picks.lanes * (picks.tile_ow - 1) < width, "tile_ow exceeds the row")
        sums = math.prod(spec.stride) * picks.tile_ow
        most = target.vector_registers - 2
        require(picks.tile_ow == 1 or sums <= most, f"{sums} sums, registers for {most}")
        unrolled = _unrolled(spec, picks)
        small = picks.lanes == 4 and picks.tile_ow == 1
        require(small or unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        def statement(*tensors: Any) -> Any:
            return _Kernel(spec, Periods(spec), columns_of(spec, picks.lanes, picks.tile_ow), *tensors).statement(
                picks.parallel_oh
            )

        ops = Operands(spec)
        return written(ops, pack_rows(ops, 1), statement)


@dataclass(frozen=True)
class _Kernel:
    """The statements of the whole layer."""

    spec: ConvSpec
    rows: Periods
    columns: Columns
    src: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer

    def statement(self, parts: int) -> tirx.Stmt:
        """The parallel loop over images, output channels and parts of the rows."""
        spec, whole, count = self.spec, Block(), self.rows.count
        depth, per_group = spec.ic // spec.groups, spec.oc // spec.groups
        tasks = (spec.n, spec.oc, parts)
        with whole.loop(math.prod(tasks), parallel=True) as (body, index):
            image, channel, part = map(body.let, unflat(index, tasks))
            split = () if parts == 1 else (body.let(p * count // parts) for p in (part, part + 1))
            first = body.let(channel // per_group * depth)
            weights = self.weights(body, channel, 0) if depth == 1 else None
            given = spread_parameters(body, self.parameters, channel, self.columns.lanes)
            for rows_body, p, period in self.rows.periods(body, *split):
                for tile_body, _, x, pattern in self.columns.tiles(rows_body):
                    self.tile(tile_body, (image, channel, first), p, period, (x, pattern), weights, given)
        return whole.statement()

    def weights(self, body: Block, channel: Expr, c: Expr) -> dict[tuple[int, int], Expr]:
        """All weights of an output and an input channel, each in all lanes."""
        packed, lanes = self.parameters["weights"], self.columns.lanes
        taps = itertools.product(*map(range, self.spec.kernel))
        return {(ky, kx): body.let(tirx.Broadcast(packed[channel, ky, c, kx, 0], lanes)) for ky, kx in taps}

    def tile(
        self,
        body: Block,
        where: tuple[Expr, Expr, Expr],
        p: Expr,
        period: Period,
        pixels: tuple[Expr, dict[Any, Any]],
        weights: dict[tuple[int, int], Expr] | None,
        given: dict[str, Expr],
    ) -> None:
        """The sums of a period's rows in a tile of columns, their epilogue and store."""
        spec, columns, lanes, (image, channel, first), (x, pattern) = (
            self.spec,
            self.columns,
            self.columns.lanes,
            where,
            pixels,
        )
        vectors = [v for v in range(columns.vectors) if pattern["stored", v, 0] > 0]
        phases = range(columns.phases)
        sums = body.registers(list(itertools.product(range(period.rows), phases, vectors)), lanes)
        with body.loop(spec.ic // spec.groups) as (step, c):
            factors = self.weights(step, channel, c) if weights is None else weights
            for offset, readers in period.met:
                row = [image, first + c, p + offset]

                def read(at: int, count: int, shift: int, row: list[Expr] = row) -> Expr:
                    return load(self.src, spec.dtype, [*row, x + at], lanes, count, shift)

                inputs = Taps(step, columns, pattern, read)
                for (j, ky), tap, v in itertools.product(readers, columns.taps, vectors):
                    value = inputs[v, tap]
                    if value is not None:
                        sums.add(step, (j, tap.phase, v), value * factors[ky, tap.k])
        for j, v in itertools.product(range(period.rows), vectors):
            made = interleave(body, [body.let(sums[j, phase, v]) for phase in phases], lanes)
            for i, value in enumerate(made):
                count = pattern["stored", v, i]
                if count > 0:
                    at = x * columns.phases + (v * columns.phases + i) * lanes
                    place = [image, channel, p * self.rows.stride + j, at]
                    finish(body, spec, self.dst, self.residual, place, value, lanes, count, **given)


def _unrolled(spec: ConvSpec, picks: Picks) -> int:
    """Multiply-adds that are written out."""
    tiles = len(columns_of(spec, picks.lanes, picks.tile_ow).runs) * len(Periods(spec).runs)
    return int(tiles * math.prod(spec.kernel) * picks.tile_ow)


@lru_cache(maxsize=1024)
def _default(schedule: CpuTransposedPlanes, spec: ConvSpec, target: Target) -> Picks:
    space, core = schedule.space(spec, target).domains, core_of(target)
    tasks = spec.n * spec.oc
    parts = next((p for p in space["parallel_oh"] if p * tasks >= 4 * target.cores), space["parallel_oh"][-1])
    points = (
        Picks(lanes=lanes, tile_ow=v, parallel_oh=parts)
        for lanes, v in itertools.product(space["lanes"], space["tile_ow"])
    )
    good = [picks for picks in points if schedule.reason_against(spec, target, picks) is None]
    return min(good, key=lambda picks: core.cycles(_counts(spec, target, picks)))


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    rows, depth, lanes = Periods(spec), spec.ic // spec.groups, picks.lanes
    columns = columns_of(spec, lanes, picks.tile_ow)
    tasks = spec.n * spec.oc * picks.parallel_oh
    share = ceildiv(tasks, target.cores) / tasks
    vectors = ceildiv(ceildiv(spec.out_spatial[1], columns.phases), lanes)
    periods, sums = spec.n * spec.oc * rows.count * share, math.prod(spec.stride)
    met = len({tap.group for tap in row_taps(spec)})
    # Most vectors of neighbouring pixels lie in two lines of the cache.
    loads = depth * rows.read * met * (1 + lanes / target.lanes) + (depth > 1) * depth * math.prod(spec.kernel)
    rest = spec.out_spatial[1] % lanes > 0
    work = [
        Work(
            periods * vectors,
            fmas=depth * math.prod(spec.kernel),
            loads=loads,
            stores=sums,
            shuffles=sums * math.log2(columns.phases),
        ),
        Work(periods * columns.count, cycles=BEGIN + BEGIN_RUN * (depth > 1)),
        Work(periods * spec.stride[0] * rest, masked_stores=1),
        Work(tasks * share, loads=math.prod(spec.kernel), cycles=BEGIN_TASK / 4),
        finishing(spec, lanes, share),
    ]
    moved = spec.bytes["src"] + (2 + spec.residual) * spec.bytes["dst"]
    streams = [
        Stream(spec.bytes["weights"], weights=True),
        Stream(moved * share, ahead=True, footprint=moved),
    ]
    return Counts(work, streams)
