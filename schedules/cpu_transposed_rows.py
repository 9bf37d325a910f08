"""Transposed convolution of NCHW planes: neighbouring pixels of a stride phase in the lanes.

Applies to  transposed convolutions of any rank and groups, NCHW, dilated only where the stride is 1.
Strategy    1. Along the last axis, output pixels whose distance to the first one is the same modulo
               the stride form a phase: pixel s·q + r takes every s-th tap, of input pixels q + offset.
            2. A vector is `lanes` neighbouring q of one phase; a tile is all phases × `tile_ow` vectors ×
               `tile_oc` channels. A src vector is loaded where it lies, masked at the edges, and used by
               all phases, taps and channels; weights are broadcast, packed [oc/t][taps][ic][taps of a row][t].
            3. Sums of `tile_phase` phases at once stay in registers over all rows of taps and input channels.
            4. Rows of taps that lie in padding are left out: their loop runs over those inside.
            5. Phases are shuffled together, so that epilogue and store work on whole vectors.
            6. `prefetch_src`: each channel's src of the next tile is fetched ahead; channels lie far apart.
            7. One parallel loop over batch × rows (× parts of a row) × channel blocks.
Why not     channels in the lanes (cpu_transposed): better with many channels, and rows shorter than a vector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

from tvm import te, tirx

from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TILE, finishing
from convgen.cpu.vector import Block, Registers, finish, interleave, load, prefetch, runs, spread_parameters, written
from convgen.hardware.target import Target
from convgen.lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv, copied, flat, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.dtypes import BYTES
from convgen.problem.spec import ConvSpec

#: Multiply-adds written out, in all tiles together; more take long to compile.
MOST_UNROLLED = 4096
#: Cycles of a step: each input channel lies in another page.
FAR = 2
#: Bytes of a cache line: what a prefetch fetches.
CACHE_LINE = 64


class CpuTransposedRows(Written):
    id, version = "cpu_transposed_rows", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.stride[-1] <= 64, "needs a stride of at most 64 along a row")
        require(spec.kernel[-1] <= 256, "needs at most 256 taps along a row")
        require(all(s == 1 or d == 1 for s, d in zip(spec.stride, spec.dilation, strict=True)), "dilated and strided")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        width, phases = ceildiv(spec.out_spatial[-1], spec.stride[-1]), spec.stride[-1]
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * width)]
        return Space(
            lanes=lanes,
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16) if c <= spec.oc // spec.groups],
            tile_ow=[v for v in (1, 2, 3, 4) if v == 1 or lanes[0] * (v - 1) < width],
            tile_phase=sorted({ceildiv(phases, parts) for parts in (1, 2, 3, 4, 6, 8)}),
            parallel_ow=[1, 2, 4, 8, 16],
            prefetch_src=[False, True],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        width, phases = ceildiv(spec.out_spatial[-1], spec.stride[-1]), spec.stride[-1]
        sums = picks.tile_phase * picks.tile_oc * picks.tile_ow
        most = _most_sums(target)
        require(sums <= most or sums == picks.tile_phase, f"{sums} sums, registers for {most}")
        require(picks.lanes * (picks.tile_ow - 1) < width, "tile_ow exceeds the row")
        require(picks.parallel_ow <= ceildiv(width, picks.lanes * picks.tile_ow), "fewer tiles than parallel_ow")
        per_phase = picks.tile_oc * picks.tile_ow
        unrolled = len(_Columns(spec, picks).runs) * per_phase * max(phases, spec.kernel[-1])
        require(
            unrolled <= MOST_UNROLLED or per_phase == 1, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}"
        )

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, tile = Operands(spec), picks.tile_oc
        per_group, leading = spec.oc // spec.groups, spec.kernel[:-1]
        blocks, depth = ceildiv(per_group, tile), spec.ic // spec.groups

        def packed_weights(block: Expr, position: Expr, ic: Expr, tap: Expr, lane: Expr) -> Expr:
            oc = block % blocks * tile + lane
            value = ops.weights[(block // blocks * depth + ic, oc, *unflat(position, leading), tap)]
            if per_group % tile == 0:
                return value
            return tirx.if_then_else(oc < per_group, value, tirx.const(0, ACCUMULATOR))

        shape = (blocks * spec.groups, math.prod(leading), depth, spec.kernel[-1], tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p) for p in ops.parameters[1:]]
        return written(ops, packed, lambda *buffers: _Kernel(spec, picks, *buffers).statement())


@lru_cache(maxsize=1024)
def _default(schedule: CpuTransposedRows, spec: ConvSpec, target: Target) -> Picks:
    space, core = schedule.space(spec, target).domains, core_of(target)
    names = ("lanes", "tile_oc", "tile_ow", "tile_phase")
    least = {name: min(space[name]) for name in names} | {"parallel_ow": 1, "prefetch_src": False}
    small = Picks(**least | {"tile_phase": min(space["tile_phase"], key=lambda p: (abs(p - 8), p))})
    points = [
        small.replace(**dict(zip(names, values, strict=True)))
        for values in itertools.product(*(space[name] for name in names))
        if math.prod(values[1:]) <= _most_sums(target)
    ]
    points.sort(key=lambda picks: core.cycles(_counts(spec, target, picks)))
    good = (picks for picks in points if schedule.reason_against(spec, target, picks) is None)
    base = next(good, small)
    tasks = spec.n * math.prod(spec.out_spatial[:-1]) * _blocks(spec, base)
    tiles = ceildiv(ceildiv(spec.out_spatial[-1], spec.stride[-1]), base.lanes * base.tile_ow)
    possible = [p for p in space["parallel_ow"] if p <= tiles]
    parts = next((p for p in possible if p * tasks >= 4 * target.cores), possible[-1])
    return base.replace(parallel_ow=parts, prefetch_src=tiles > 1 and spec.bytes["src"] > target.l2)


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    taps, phases, depth = spec.kernel[-1], spec.stride[-1], spec.ic // spec.groups
    vectors = ceildiv(ceildiv(spec.out_spatial[-1], phases), picks.lanes)
    tiles, groups = ceildiv(vectors, picks.tile_ow), ceildiv(phases, picks.tile_phase)
    # Taps of the other axes that meet the input, on average over the output.
    sizes = zip(spec.kernel[:-1], spec.in_spatial[:-1], spec.out_spatial[:-1], strict=True)
    met = math.prod(min(k, k * i / o) for k, i, o in sizes)
    tasks = spec.n * math.prod(spec.out_spatial[:-1]) * _blocks(spec, picks) * picks.parallel_ow
    share = ceildiv(tasks, target.cores) / tasks
    rows, wide = tasks / picks.parallel_ow * share, vectors / tiles
    steps, stored = rows * tiles * groups * met, rows * vectors * picks.tile_oc * phases
    read = min(_offsets(spec), ceildiv(taps, groups)) * (1 + picks.lanes / target.lanes)
    work = [
        Work(
            steps * depth,
            fmas=taps / groups * picks.tile_oc * wide,
            loads=read * wide + taps / groups * picks.tile_oc,
            chain=ceildiv(taps, phases),
            cycles=FAR,
        ),
        Work(steps, cycles=BEGIN_RUN),
        Work(rows * tiles, cycles=BEGIN_TILE),
        Work(stored, stores=1, shuffles=math.log2(phases)),
        finishing(spec, picks.lanes, share),
    ]
    moved = spec.bytes["src"] + (2 + spec.residual) * spec.bytes["dst"]
    streams = [
        Stream(spec.bytes["weights"], weights=True),
        Stream(moved * share, ahead=True, footprint=moved),
    ]
    return Counts(work, streams)


def _most_sums(target: Target) -> int:
    """Sums in registers beside a vector of src or two, and a weight."""
    return 28 if target.vector_registers > 16 else 12


def _blocks(spec: ConvSpec, picks: Picks) -> int:
    """Blocks of output channels, of all groups."""
    return spec.groups * ceildiv(spec.oc // spec.groups, int(picks.tile_oc))


def _offsets(spec: ConvSpec) -> int:
    """How many input pixels the phases of one q meet."""
    begin, taps, stride = spec.padding[-1][0], spec.kernel[-1], spec.stride[-1]
    return taps if stride == 1 else ceildiv(begin, stride) - ceildiv(begin - taps + 1, stride) + 1


def _phases(spec: ConvSpec) -> list[list[tuple[int, int]]]:
    """For each phase of a row its taps, each with the offset of the input pixel that it meets."""
    stride, dilation, begin = spec.stride[-1], spec.dilation[-1], spec.padding[-1][0]
    return [
        [
            (k, (r + begin - k * dilation) // stride)
            for k in range(spec.kernel[-1])
            if (r + begin - k * dilation) % stride == 0
        ]
        for r in range(stride)
    ]


class _AxisTaps(NamedTuple):
    """The taps that an output pixel takes along an axis before the last, by a number t of a range.

    Tap ``first_tap + t * stride`` meets input pixel ``base - t * dilation``; t runs over ``size`` numbers from
    ``start`` on.
    """

    base: Expr
    first_tap: Expr
    start: Expr
    size: Expr


def _axis_taps(spec: ConvSpec, axis: int, y: Expr) -> _AxisTaps:
    """The taps of output pixel ``y`` that meet the input."""
    stride, dilation, size = spec.stride[axis], spec.dilation[axis], spec.in_spatial[axis]
    base, first_tap = (y + spec.padding[axis][0]) // stride, (y + spec.padding[axis][0]) % stride
    start = (tirx.max(base - (size - 1), 0) + (dilation - 1)) // dilation
    end = tirx.min((spec.kernel[axis] - 1 - first_tap + stride) // stride, base // dilation + 1)
    return _AxisTaps(base, first_tap, start, tirx.max(end - start, 0))


class _Met(NamedTuple):
    """What a tile meets of a row.

    Attributes:
        loads: by ``(vector, offset of a tap)`` how many lanes lie left of the image, and how many elements follow.
        stored: by ``(vector, part)`` how many output pixels there are, in each of the vectors that a vector of every
            phase becomes.
    """

    loads: dict[tuple[int, int], tuple[int, int]]
    stored: dict[tuple[int, int], int]


class _Columns:
    """The tiles of a row: ``runs`` lists runs of tiles that meet the same, ``tiles`` is how many there are."""

    def __init__(self, spec: ConvSpec, picks: Picks) -> None:
        stride, step = spec.stride[-1], picks.lanes * picks.tile_ow
        self._spec, self._picks = spec, picks
        self._offsets = sorted({dx for taps in _phases(spec) for _, dx in taps})
        self.tiles = ceildiv(spec.out_spatial[-1], stride * step)
        # Tiles in the middle meet nothing but image.
        left = min(self.tiles, ceildiv(max(0, -min(self._offsets, default=0)), step))
        right = min(
            (spec.in_spatial[-1] - max(self._offsets, default=0)) // step, spec.out_spatial[-1] // (stride * step)
        )
        right = max(left, right)
        middle = [(left, right - left, self._met(left * step))] if right > left else []
        last = runs([self._met(i * step) for i in range(right, self.tiles)])
        self.runs: list[tuple[int, int, _Met]] = runs([self._met(i * step) for i in range(left)]) + middle
        self.runs += [(right + first, count, met) for first, count, met in last]

    def _met(self, q0: int) -> _Met:
        """What the tile from pixel ``q0`` of every phase on meets."""
        spec, lanes, stride = self._spec, self._picks.lanes, self._spec.stride[-1]
        met = _Met({}, {})
        for v in range(self._picks.tile_ow):
            for dx in self._offsets:
                x = q0 + v * lanes + dx
                shift = min(lanes, max(0, -x))
                met.loads[v, dx] = (shift, max(0, min(lanes - shift, spec.in_spatial[-1] - x - shift)))
            for j in range(stride):
                x = (q0 + v * lanes) * stride + j * lanes
                met.stored[v, j] = min(lanes, spec.out_spatial[-1] - x)
        return met


class _Task(NamedTuple):
    """What a task works on: a row (or a part of it) of a block of output channels.

    Attributes:
        n, row: the image, and the row's place along the axes before the last.
        group, block: the group, and the block of its channels.
        first_oc: the block's first channel.
        taps: which rows of the input the row takes, per axis.
    """

    n: Expr
    row: list[Expr]
    group: Expr
    block: Expr
    first_oc: Expr
    taps: list[_AxisTaps]


class _Tile(NamedTuple):
    """A tile of a task: of every phase the pixels from ``q0`` on, and what they meet."""

    task: _Task
    q0: Expr
    met: _Met


class _Kernel:
    """All of the layer: a loop over rows (and parts of them) and blocks of channels.

    Sums have keys ``(phase, channel, vector)``.
    """

    def __init__(
        self, spec: ConvSpec, picks: Picks, src: Any, residual: Any, parameters: Mapping[str, Any], dst: Any
    ) -> None:
        self.spec, self.picks, self.lanes = spec, picks, picks.lanes
        self.src, self.residual, self.parameters, self.dst = src, residual, parameters, dst
        self.per_group, self.depth = spec.oc // spec.groups, spec.ic // spec.groups
        self.blocks = ceildiv(self.per_group, picks.tile_oc)
        self.phases, self.columns = _phases(spec), _Columns(spec, picks)
        self.channels, self.vectors = range(picks.tile_oc), range(picks.tile_ow)

    def statement(self) -> Any:
        spec, parts = self.spec, self.picks.parallel_ow
        tasks = (spec.n, *spec.out_spatial[:-1], parts, spec.groups, self.blocks)
        whole = Block()
        with whole.loop(math.prod(tasks), parallel=True) as (body, index):
            n, *row, part, group, block = (body.let(i) for i in unflat(index, tasks))
            first_oc = body.let(group * self.per_group + block * self.picks.tile_oc)
            taps = [_AxisTaps(*(body.let(value) for value in _axis_taps(spec, axis, y))) for axis, y in enumerate(row)]
            task = _Task(n, row, group, block, first_oc, taps)
            for first, count, met in self.columns.runs:
                start, end = first, first + count
                if parts > 1:
                    start = tirx.max(part * self.columns.tiles // parts, start)
                    end = tirx.min((part + 1) * self.columns.tiles // parts, end)
                    start, count = body.let(start), body.let(tirx.max(end - start, 0))
                with body.loop(count) as (inner, j):
                    q0 = inner.let((j + start) * (self.lanes * self.picks.tile_ow))
                    self._add_tile(inner, _Tile(task, q0, met))
        return whole.statement()

    def _add_tile(self, block: Block, tile: _Tile) -> None:
        """Compute a tile: groups of phases one after the other, then the epilogue of all."""
        stride, together = self.spec.stride[-1], self.picks.tile_phase
        sums: dict[tuple[int, int, int], Registers] = {}
        for first in range(0, stride, together):
            phases = range(first, min(stride, first + together))
            keys = [(r, i, v) for r in phases for i in self.channels for v in self.vectors]
            registers = block.registers(keys, self.lanes)
            self._add_products(block, registers, tile, phases)
            sums.update(dict.fromkeys(keys, registers))
        all_exist = self.per_group % self.picks.tile_oc == 0
        for i in self.channels:
            with block.when(all_exist or tile.task.block * self.picks.tile_oc + i < self.per_group) as branch:
                self._finish(branch, sums, tile, i)

    def _add_products(self, block: Block, sums: Registers, tile: _Tile, phases: Sequence[int]) -> None:
        """Add up a group of phases, over the rows of src that the task's row takes, and over input channels."""
        spec, task, tile_width = self.spec, tile.task, self.lanes * self.picks.tile_ow
        with ExitStack() as loops:
            inner, where, kernel = block, [], []
            for taps, s, d in zip(task.taps, spec.stride, spec.dilation, strict=False):
                inner, number = loops.enter_context(inner.loop(taps.size))
                number = inner.let(number + taps.start)
                where.append(inner.let(taps.base - number * d))
                kernel.append(taps.first_tap + number * s)
            position = inner.let(flat(kernel, spec.kernel[:-1]))
            with inner.loop(self.depth) as (step, ic):
                row = [task.n, step.let(task.group * self.depth + ic), *where]
                if self.picks.prefetch_src and phases[0] == 0:
                    for x in range(0, tile_width, CACHE_LINE // BYTES[spec.dtype]):
                        step.add(prefetch(self.src, [*row, tile.q0 + (tile_width + x)]))
                weights_row = [task.group * self.blocks + task.block, position, ic]
                self._add_row(step, sums, tile, phases, row, weights_row)

    def _add_row(
        self,
        step: Block,
        sums: Registers,
        tile: _Tile,
        phases: Sequence[int],
        row: Sequence[Expr],
        weights_row: Sequence[Expr],
    ) -> None:
        """Add one row of src times one row of taps; every vector and weight is loaded where it is first used."""
        loaded: dict[tuple[int, int], Expr] = {}
        for r in phases:
            for k, dx in self.phases[r]:
                for i in self.channels:
                    weight = None
                    for v in self.vectors:
                        shift, count = tile.met.loads[v, dx]
                        if count <= 0:
                            continue
                        if (v, dx) not in loaded:
                            place = [*row, tile.q0 + (v * self.lanes + dx + shift)]
                            value = load(self.src, self.spec.dtype, place, self.lanes, count, shift)
                            loaded[v, dx] = step.let(value)
                        if weight is None:
                            scalar = self.parameters["weights"][(*weights_row, k, i)]
                            weight = step.let(tirx.Broadcast(scalar, self.lanes))
                        sums.add(step, (r, i, v), loaded[v, dx] * weight)

    def _finish(self, block: Block, sums: Mapping[Any, Registers], tile: _Tile, channel: int) -> None:
        """Shuffle the phases of one of the tile's channels together; epilogue and store."""
        stride, lanes, task = self.spec.stride[-1], self.lanes, tile.task
        oc = task.first_oc + channel
        per_channel = spread_parameters(block, self.parameters, oc, lanes)
        for v in self.vectors:
            keys = [(r, channel, v) for r in range(stride)]
            apart = [block.let(sums[key][key]) for key in keys]
            for j, value in enumerate(interleave(block, apart, lanes)):
                count = tile.met.stored[v, j]
                if count > 0:
                    place = [task.n, oc, *task.row, tile.q0 * stride + (v * stride + j) * lanes]
                    finish(block, self.spec, self.dst, self.residual, place, value, lanes, count, **per_channel)
