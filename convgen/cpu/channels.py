"""Schedules with output channels in the vector lanes: what those share that are a walk by phases.

Their default is the tile that takes the fewest cycles, then the cut into tasks that does.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from ..deferred import te, tirx
from ..hardware.target import Target
from ..lowering.compute import INTEGER, Expr, Operands, ceildiv, copied, flat, unflat
from ..lowering.schedule import Picks, Program, Space, busiest, require
from ..problem.spec import ConvSpec
from .counted import Counted
from .geometry import Geometry, geometry_of
from .model import Counts, Stream, Work, core_of
from .product import BEGIN_RUN, BEGIN_TASK, FAR_ROW, finishing, most_pixels, pieces
from .tasks import Buffers
from .vector import Block, load, store, written
from .walk import Kernel
from .weights import Channels, WeightRows, packed_by_panels


class ChannelsInLanes(Counted):
    """A schedule of this kind. What each says itself is where it applies, its space, and what its tiles count."""

    sums_integers = True

    def takes_integers(self, spec: ConvSpec) -> bool:
        return True

    def takes_layouts(self, src: str, dst: str) -> bool:
        return True

    @abstractmethod
    def tiles(self, spec: ConvSpec, target: Target) -> list[Picks]:
        """Tiles worth comparing for the default, each with one task."""

    def variants(self, spec: ConvSpec, picks: Picks) -> list[Picks]:
        """The chosen tile in all ways worth comparing."""
        return [picks]

    @abstractmethod
    def work(self, spec: ConvSpec, target: Target, picks: Picks) -> Iterator[Work]:
        """Of all tiles of an image with all its channels, what most is done of first."""

    @abstractmethod
    def streams(self, spec: ConvSpec, target: Target, picks: Picks, share: float, tasks: float) -> list[Stream]:
        """Of the busiest core, which has a ``share`` of the work in so many ``tasks``."""

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        g = geometry_of(spec, target, picks.get("merge", False))
        most, pixels = most_pixels(target, picks.tile_oc // target.lanes), picks.tile_oh * picks.tile_ow
        require(pixels <= most, f"{pixels} pixels in a tile, registers for {most}")
        require(picks.tile_ow <= g.width, "tile_ow exceeds the pixels of a phase")
        require(picks.parallel_oc <= g.blocks(picks), "fewer channel blocks than parallel_oc")
        require(picks.copy_src or not g.copied, "needs a copy of src, which is padded or converted")
        count, what = g.blockable(picks.tile_oh, picks.tile_ow), "tiles" if spec.rank == 1 else "rows of tiles"
        require(picks.block < 2 * count, f"{picks.block} {what} in a block, the output has {count}")

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        """The fastest tile; with it, the fastest cut into tasks."""
        space, best = self.space(spec, target), self._fastest_tile(spec, target)
        least = (math.inf, 0, 0)
        for variant in self.variants(spec, best):
            cuts = _Cuts(self, spec, target, variant)
            for picks in self._cuts(spec, target, variant, space):
                penalty = cuts.cycles(picks, least[0]), picks.parallel_oc, -picks.block
                if penalty < least:
                    best, least = picks, penalty
        return best

    def _fastest_tile(self, spec: ConvSpec, target: Target) -> Picks:
        """Of those that are as fast, the smallest, and then the first."""
        core, tiles = self.core(spec, target), self.tiles(spec, target)
        sizes = [picks.tile_oc // target.lanes + picks.tile_oh * picks.tile_ow for picks in tiles]
        best, least = tiles[0], (math.inf, 0, 0)
        # Large ones first: most others are slower, which a part of their work shows.
        for number in sorted(range(len(tiles)), key=lambda n: -tiles[n].tile_oc * tiles[n].tile_oh * tiles[n].tile_ow):
            work = core.cycles_of(self.work(spec, target, tiles[number]), least[0])
            penalty = core.cycles_with(work, ()), sizes[number], number
            if penalty < least:
                best, least = tiles[number], penalty
        return best

    def _cuts(self, spec: ConvSpec, target: Target, tile: Picks, space: Space) -> Iterator[Picks]:
        """A tile with every cut into tasks that is valid with it: whether a cut is depends on each of its numbers
        alone.
        """

        def values(name: str) -> list[Any]:
            points = [(value, tile.replace(**{name: value})) for value in space.domains[name]]
            return [value for value, picks in points if picks in space and self.is_valid(spec, target, picks)]

        names = [name for name in ("order", "block", "parallel_oc") if name in space.domains]
        cuts = itertools.product(*map(values, names))
        return (tile.replace(**dict(zip(names, cut, strict=True))) for cut in cuts)

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        g = geometry_of(spec, target, picks.get("merge", False))
        share, tasks = _share(g, picks, target.cores)
        work = [part.with_times(part.times * share * spec.n) for part in self.work(spec, target, picks)]
        work += _besides(spec, g, target, picks, share, tasks)
        return Counts(work, self.streams(spec, target, picks, share, tasks))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        g = geometry_of(spec, target, picks.get("merge", False))
        ops = Operands(spec, integers=g.operation.sums == INTEGER)
        starts = spec.is_quantised and spec.bias and not spec.transposed
        given = [parameter for parameter in ops.parameters[1:] if parameter.name != "bias" or not starts]
        packed = [_packed_weights(ops, g, picks, target.lanes), *map(copied, given)]
        if starts or g.operation.offset or (g.operation.biased and spec.src_zero):
            packed.append(_starts(ops, g, picks))
        core = core_of(target)
        return written(
            ops, packed, lambda *buffers: Kernel(Buffers(*buffers), spec, picks, g, target.lanes, core).statement()
        )


class Alike(NamedTuple):
    """Tiles of an image that are alike, and how many ``times`` there are such; their pixels and vectors of channels."""

    times: int
    height: int
    width: int
    vectors: int


def tiles_of(g: Geometry, picks: Picks, lanes: int) -> Iterator[Alike]:
    """All tiles of an image, in a phase: full ones, and what the last rows, pixels and channels leave."""
    channels = g.channels * (g.x.stride if g.merge else 1)
    for vectors, blocks in pieces(ceildiv(channels, lanes), picks.tile_oc // lanes):
        for height, rows in pieces(g.y.pixels, picks.tile_oh):
            for width, tiles in g.row(picks.tile_ow).sizes:
                yield Alike(g.z.pixels * g.spec.groups * blocks * rows * tiles, height, width, vectors)


class _Cuts:
    """What a tile takes with its cuts into tasks: cycles of its counts, added in the same order."""

    def __init__(self, schedule: ChannelsInLanes, spec: ConvSpec, target: Target, tile: Picks) -> None:
        self.schedule, self.spec, self.target, self.core = schedule, spec, target, schedule.core(spec, target)
        self.g = geometry_of(spec, target, tile.get("merge", False))
        self.tiles = [(part.times, self.core.once(part)) for part in schedule.work(spec, target, tile)]
        self._known: dict[tuple[int, int], tuple[float, float, float]] = {}

    def cycles(self, picks: Picks, most: float = math.inf) -> float:
        """Of the busiest core; where they are more than ``most``, maybe infinite."""
        key = picks.block, picks.parallel_oc
        if key not in self._known:
            self._known[key] = self._work(picks)
        work, share, tasks = self._known[key]
        if self.core.cycles_with(work, ()) > most:
            return math.inf
        return self.core.cycles_with(work, self.schedule.streams(self.spec, self.target, picks, share, tasks))

    def _work(self, picks: Picks) -> tuple[float, float, float]:
        """Cycles of the busiest core's work, its share of all, and its number of tasks."""
        share, tasks = _share(self.g, picks, self.target.cores)
        cycles = 0.0
        for times, once in self.tiles:
            cycles += times * share * self.spec.n * once
        for part in _besides(self.spec, self.g, self.target, picks, share, tasks):
            cycles += part.times * self.core.once(part)
        return cycles, share, tasks


def _besides(spec: ConvSpec, g: Geometry, target: Target, picks: Picks, share: float, tasks: float) -> Iterator[Work]:
    """What the busiest core does beside its tiles."""
    lanes = target.lanes
    if picks.copy_src:
        extent = g.extent(picks)
        size = g.read.channels * math.prod(extent) * g.operation.bytes
        yield _copying(g, tasks * size / (4 * lanes), lanes, size > target.l1)
        if g.src.layout == "nchw":  # each row of a channel lies in another page
            begin = FAR_ROW if spec.transposed else BEGIN_RUN
            yield Work(tasks * spec.ic * math.prod(extent[:2]), cycles=begin)
    yield Work(tasks, cycles=BEGIN_TASK)
    yield finishing(spec, lanes, share)


def _copying(g: Geometry, vectors: float, lanes: int, leaves_l1: bool) -> Work:
    """A task's copies, of so many ``vectors``."""
    spilled = 4 * lanes if leaves_l1 else 0
    if g.read.layout == g.src.layout:
        return Work(vectors, loads=1, stores=1, spilled=spilled, cycles=0.5)
    joined = g.operation.depth if g.operation.depth > 1 else 0  # each a load and a few instructions; then transposed
    return Work(
        vectors,
        fmas=3 * joined,
        loads=g.operation.depth,
        stores=1,
        shuffles=math.log2(lanes),
        spilled=spilled,
    )


def _share(g: Geometry, picks: Picks, cores: int) -> tuple[float, float]:
    """The share of all work that the busiest core has, and its number of tasks."""
    blocks, count = g.blocks(picks), g.blockable(picks.tile_oh, picks.tile_ow)
    size = min(picks.block, count) if g.spec.rank == 1 else picks.block
    bounds = [blocks * p // picks.parallel_oc for p in range(picks.parallel_oc + 1)]
    across, planes = ceildiv(count, size), g.spec.n * g.z.pixels
    tasks = planes * across * picks.parallel_oc
    if tasks > 64 * cores:
        return 1 / cores, tasks / cores
    lengths = [size] * (across - 1) + [count - size * (across - 1)]
    parts = [end - start for start, end in itertools.pairwise(bounds)]
    loads = [part * length for part in parts for _ in range(planes) for length in lengths]
    return busiest(loads, cores) / sum(loads), ceildiv(tasks, cores)


def _packed_weights(ops: Operands, g: Geometry, picks: Picks, lanes: int) -> te.Tensor:
    """``[oc/t][rows of the kernel, taps and blocks of channels][run][t]``, the taps of a phase together, in the order
    of their use. A word of a run has zeros where it is longer.
    """
    spec, own, tile = ops.spec, ops.spec.ic // ops.spec.groups, picks.tile_oc
    blocks = g.blocks(picks) // spec.groups * g.parts(picks)
    operation, shape = g.operation, (g.blocks(picks) * g.parts(picks), math.prod(g.runs), g.run, tile)
    rows = WeightRows(ops, lanes, tile)
    if rows.are_apart and not operation.converts and not picks.get("merge", False):
        return packed_by_panels(ops, rows, shape, partial(_store_panel, g, rows))

    def weight(b: Expr, run: Expr, k: Expr, t: Expr) -> Expr:
        *position, block = unflat(run, g.runs)
        position[2] = position[2] if g.apart else k // g.inner
        group, lane, taps = b // blocks, b % blocks * tile + t, position
        exists = lane < g.channels
        if picks.get("merge", False):
            part, lane = lane // g.channels, lane % g.channels
            exists = part < g.x.stride
            taps = [g.z.tap(position[0]), g.y.tap(position[1]), part + g.x.stride * (g.x.taps - 1 - position[2])]
        elif spec.transposed:
            taps = [axis.tap(p) for axis, p in zip((g.z, g.y, g.x), position, strict=True)]
        channel = block * g.inner + k % g.inner
        if operation.depth > 1:
            exists = tirx.all(exists, k < g.numbers, channel < own)
        index = (group * own + channel, lane) if spec.transposed else (group * g.channels + lane, channel)
        value = ops.weights[(*index, *taps[3 - spec.rank :])]
        if spec.weights_zero:
            value = value - ops.zero("weights")[tirx.min(group * g.channels + lane, spec.oc - 1)]
        value = tirx.if_then_else(exists, value, tirx.const(0, value.ty.dtype))
        return operation.weight(value)

    def packed(b: Expr, run: Expr, k: Expr, t: Expr) -> Expr:
        return operation.joined([weight(b, run, k * operation.depth + i, t) for i in range(operation.depth)], 1)

    return te.compute(shape, packed, name="weights_packed")


def _store_panel(
    g: Geometry, rows: WeightRows, body: Block, packed: Any, to: tuple[Expr, Expr], panel: Any, channels: Channels
) -> None:
    """Store what is packed of input channels: their taps, each in a run of its own or one after another in one."""
    axes = (g.z, g.y, g.x)
    with (
        body.loop(channels.count) as (each, c),
        each.loop(g.z.kernel) as (planes, z),
        planes.loop(g.y.kernel) as (lines, y),
        lines.loop(g.x.kernel) as (one, x),
    ):
        taps = [axis.tap(p) for axis, p in zip(axes, (z, y, x), strict=True)] if g.spec.transposed else (z, y, x)
        row = rows.row(c, flat(taps, [axis.kernel for axis in axes]))
        block, inner = unflat(channels.first + c, (g.runs[3], g.inner))
        run = flat((z, y, x if g.apart else 0, block), g.runs)
        place = [to[0], run, inner if g.apart else x * g.inner + inner, to[1]]
        one.add(
            store(packed, "f32", place, load(panel, "f32", [row, 0], rows.lanes, rows.lanes), rows.lanes, rows.lanes)
        )


def _starts(ops: Operands, g: Geometry, picks: Picks) -> te.Tensor:
    """What sums of integers start at, ``[oc/t][t]``: the bias, less what src's offset and zero point add to them."""
    spec, tile, offset = ops.spec, picks.tile_oc, tirx.const(g.operation.offset, INTEGER)
    blocks = g.blocks(picks) // spec.groups
    given = {parameter.name: parameter for parameter in ops.parameters}
    totals: te.Tensor | None = None
    if g.operation.offset or (g.operation.biased and spec.src_zero):
        axes = [te.reduce_axis((0, size)) for size in ops.weights.shape[1:]]
        totals = te.compute((spec.oc,), lambda o: te.sum(ops.weights[(o, *axes)], axes), name="totals")
    nothing = ops.zero("src")[0] + offset if spec.src_zero else offset

    def start(b: Expr, t: Expr) -> Expr:
        lane = b % blocks * tile + t
        channel = b // blocks * g.channels + tirx.min(lane, g.channels - 1)
        value = given["bias"][channel] if spec.bias else tirx.const(0, INTEGER)
        return value if totals is None else value - totals[channel] * nothing

    return te.compute((spec.groups * blocks, tile), start, name="start_packed")
