"""Winograd convolution: fewer multiplications than taps.

Applies to  convolutions with small kernels, strided or dilated, dense or with groups of whole vectors of channels (at
            least half as long as the target's), and strided dense transposed ones:
            3×3 at stride 1 and 2, 2×2, 5×5, 1×7, 1-D k3, 3-D with a 3×3 plane (the depth stays
            direct), transposed 4×4 at stride 2. Any layout.
Strategy    F(m, r) along the last one or two axes (Lavin & Gray, CVPR 2016): of m + r - 1 inputs
            make m outputs of an r-tap kernel with m + r - 1 products instead of m·r. At stride s an
            axis' input falls into s phases, each under every s-th tap at stride 1: F(m, ⌈r/s⌉) each,
            and the sum of all. In a transposed convolution it is the output that falls into phases.
            Either way it is one bilinear algorithm, y = Aᵀ[(G g) · (Bᵀ d)], for the steps below.
            1. Pack weights transformed, as [oc/t][position][taps of the depth][ic][t]: in the order of their use. They
               are many times as many, so where they are packed at every call that counts (`repacked`).
            2. A task is a group and a block of rows of tiles (in 1-D of tiles; in 3-D of so many planes). Transform its
               input along the columns, then the rows, a vector of channels at a time, to [position][tile][ic]; what is
               NCHW or 1-D is copied first, with its padding, NCHW transposed in registers, to [line][column][lanes].
            3. Per block of `tile_oc` channels and position, products: `tile_px` tiles × `tile_oc` channels in
               registers, ic innermost, while the next position's weights are fetched into the L2 cache.
            4. Transform back a tile at a time, channels in the lanes; bias, residual, activation, store. NCHW: through
               the block's plane of pixels, transposed in registers.
            5. `parallel="oc"`: with few tiles the input is transformed first, in parallel over ic, and the products
               are parallel over channel blocks, so that weights are shared out.
Accuracy    falls with m. On data of one scale the error stays within a quarter of the bound of `standard` up to
            m = 4; m > 4 needs `relaxed`. A pixel that is much larger than others costs its tile their precision.
Why not     small planes with many channels: the transformed weights are several times larger, and all of them are read
            for a few tiles. Few channels: sums are stored after few products. Kernels no larger than their stride: no
            gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from convgen.cpu.model import Core, Counts, Stream, Work, core_of
from convgen.cpu.product import (
    BEGIN_RUN,
    BEGIN_TASK,
    BEGIN_TILE,
    LINE,
    Ahead,
    Even,
    blocks_ahead,
    finishing,
    most_pixels,
    multiply,
    pieces,
    steps,
    steps_apart,
)
from convgen.cpu.vector import Block, load, store, written
from convgen.cpu.weights import Channel, WeightRows, packed_by_panels
from convgen.cpu.window import meeting
from convgen.cpu.winograd import (
    Grid,
    block_choices,
    covered,
    lanes_of,
    operations,
    outputs_of,
    tile_sizes,
    transformed,
    transformed_axes,
)
from convgen.cpu.winograd_passes import Task, Values, WayIn, WayOut, work_of_input
from convgen.deferred import te, tirx
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, copied, round_up, unflat
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Space, Written, busiest, require
from convgen.lowering.winograd import magnitudes
from convgen.problem.spec import ConvSpec

#: Planes of a block.
PLANES = (1, 2, 4)


class CpuWinograd(Written):
    id, version = "cpu_winograd", 8
    merged = ("cpu_winograd_grouped",)
    transforms = True

    def applies(self, spec: ConvSpec, target: Target) -> None:
        lanes = target.lanes
        require(target.kind == "cpu", "needs a CPU")
        require(lanes_of(spec, target) > 0, "needs groups of whole vectors of channels")
        axes = transformed_axes(spec)
        require(all(1 in (spec.stride[a], spec.dilation[a]) for a in axes), "dilated and strided")
        if spec.transposed:
            require(spec.rank <= 2, "needs at most two axes where transposed")
            require(spec.groups == 1, "needs groups 1 where transposed")
            require(all(d == 1 for d in spec.dilation), "needs dilation 1 where transposed")
        require(bool(tile_sizes(spec)), f"no transform of an axis saves enough products at accuracy {spec.accuracy}")
        # Where a window lies in nothing but padding the exact result admits no error; a transform has one.
        require(all(covered(spec, a) for a in axes), "needs windows with half of their taps inside the input")
        require(spec.oc >= lanes, f"needs at least {lanes} output channels")

    def takes_layouts(self, src: str, dst: str) -> bool:
        """Any."""
        return True

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, tiles = lanes_of(spec, target), tile_sizes(spec)
        return Space(
            tile=tiles,
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if v == 1 or lanes * (v - 1) < spec.oc // spec.groups],
            tile_px=list(range(1, 15)),
            block_rows=sorted({b for m in tiles for b in block_choices(spec, m)}),
            block_planes=[p for p in PLANES if p == 1 or (spec.rank > 2 and p <= spec.out_spatial[0])],
            parallel=["rows", "oc"] if spec.groups == 1 else ["rows"],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        g = Grid(spec, target, picks)
        most = most_pixels(target, picks.tile_oc // g.lanes)
        require(picks.tile_px <= most, f"{picks.tile_px} tiles in a register tile, registers for {most}")
        require(picks.block_rows <= g.blocked.groups, "block_rows exceeds the rows of tiles")
        require(picks.tile_px <= g.most_tiles, "fewer tiles in a block than tile_px")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return _cycles(spec, target, self.default(spec, target)) / core_of(target).hertz

    def repacked(self, spec: ConvSpec, target: Target) -> tuple[Picks, float]:
        return _repacked(self, spec, target)

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        tiles = {axis: outputs_of(spec, axis, picks.tile) for axis in transformed_axes(spec)}
        return magnitudes(spec, src, weights, tiles)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g = Operands(spec), Grid(spec, target, picks)

        def statement(src: tirx.Buffer, *rest: Any) -> tirx.Stmt:
            way_in, way_out = WayIn(spec.dtype, g, src), WayOut(spec, g, g.lanes, picks.tile_oc, *rest)
            core, weights = core_of(target, g.lanes), way_out.parameters["weights"]
            return _Kernel(spec, g, picks, g.lanes, core, weights, way_in, way_out).statement()

        return written(ops, [_packed_weights(ops, g, picks), *map(copied, ops.parameters[1:])], statement)


def _packed_weights(ops: Operands, g: Grid, picks: Picks) -> te.Tensor:
    """Transformed weights ``[oc/t][position][taps of the depth][ic][t]``, zeros past the last channel."""
    spec, rows, lanes = ops.spec, WeightRows(ops, g.lanes, picks.tile_oc), g.lanes
    height, width = (len(axis.weights[0]) for axis in (g.rows, g.columns))
    direct = rows.taps // (height * width)

    def stores(body: Block, packed: tirx.Buffer, to: tuple[Expr, Expr], panel: tirx.Buffer, channel: Channel) -> None:
        with body.loop(direct) as (one, tap):

            def read(y: int, x: int) -> Expr:
                row = rows.row(channel.in_panel, (tap * height + y) * width + x)
                return one.let(load(panel, "f32", [row, 0], lanes, lanes))

            columns = [transformed(one, g.rows.weights, [read(y, x) for y in range(height)]) for x in range(width)]
            for i, row in enumerate(zip(*columns, strict=True)):
                for j, value in enumerate(transformed(one, g.columns.weights, row)):
                    place = [to[0], i * g.columns.positions + j, tap, channel.index, to[1]]
                    one.add(store(packed, "f32", place, value, lanes, lanes))

    shape = (spec.groups * ceildiv(g.outputs, picks.tile_oc), g.positions, direct, g.own, picks.tile_oc)
    return packed_by_panels(ops, rows, shape, stores)


# ---- the kernel -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kernel:
    """The statements of the whole layer."""

    spec: ConvSpec
    g: Grid
    picks: Picks
    lanes: int
    core: Core
    weights: tirx.Buffer
    way_in: WayIn
    way_out: WayOut

    def statement(self) -> tirx.Stmt:
        """One parallel region over blocks, or one for the input of all and one over blocks of channels."""
        by_rows, (parts, planes, blocks) = (
            self.picks.parallel == "rows",
            (self.spec.groups, self.g.plane_blocks.count, self.g.groups.count),
        )
        tasks = (self.spec.n, parts, planes, blocks)
        whole = Block()
        if by_rows:
            with whole.loop(math.prod(tasks), parallel=True) as (body, index):
                self.block(body, self.task(body, *unflat(index, tasks)))
        else:
            self.by_channels(whole, tasks)
        return whole.statement()

    def block(self, body: Block, task: Task) -> None:
        """All of a block."""
        g, (stride, _, begin, _) = self.g, self.g.depth
        shape = (1, 1, g.window, g.positions, g.most_tiles * g.channels)
        first = body.let(task.part * ceildiv(g.own, self.lanes))
        values = Values(body.buffer(shape), 0, 0, body.let(task.plane * stride - begin), first)
        lines, half = self.way_in.scratch(body)
        with body.loop(g.window) as (plane_body, z):
            plane = plane_body.let(values.first_plane + z)
            exists = True if self.spec.rank < 3 else tirx.all(plane >= 0, plane < g.planes_in)
            with plane_body.when(exists) as inside, inside.loop(ceildiv(g.own, self.lanes)) as (part, c):
                self.way_in.transform(part, task, values, plane, part.let(first + c), lines, half)
        sums, pixels = self.way_out.scratch(body)
        with body.loop(ceildiv(g.outputs, self.picks.tile_oc)) as (part, b):
            self.channels(part, task, values, b, sums, pixels)

    def by_channels(self, whole: Block, tasks: Sequence[int]) -> None:
        """All input first; then blocks of channels, each of which reads all of that and weights of its own."""
        spec, g, oc_blocks = self.spec, self.g, ceildiv(self.spec.oc, self.picks.tile_oc)
        of_input = (spec.n, g.groups.count, g.planes_in, ceildiv(spec.ic, self.lanes))
        buffer = whole.buffer((*of_input[:3], g.positions, g.most_tiles * g.channels))
        with whole.loop(math.prod(of_input), parallel=True) as (body, index):
            image, block, plane, c = map(body.let, unflat(index, of_input))
            task, scratch = self.task(body, image, 0, 0, block), self.way_in.scratch(body)
            self.way_in.transform(body, task, Values(buffer, image, block, 0, 0), plane, c, *scratch)
        with whole.loop(oc_blocks * math.prod(tasks), parallel=True) as (body, index):
            b, image, _, plane_block, block = map(body.let, unflat(index, (oc_blocks, *tasks)))
            task, scratch = self.task(body, image, 0, plane_block, block), self.way_out.scratch(body)
            self.channels(body, task, Values(buffer, image, block, 0, 0), b, *scratch)

    def task(self, body: Block, image: Expr, part: Expr, plane_block: Expr, block: Expr) -> Task:
        """A block by its indices."""
        cuts = ((self.g.plane_blocks, body.let(plane_block)), (self.g.groups, body.let(block)))
        (plane, planes), (group, groups) = ((body.let(cut.start(i)), body.let(_size(cut, i))) for cut, i in cuts)
        return Task(body.let(image), body.let(part), plane, planes, group, groups)

    def channels(
        self, body: Block, task: Task, values: Values, b: Expr, sums: tirx.Buffer, pixels: tirx.Buffer | None
    ) -> None:
        """A block of channels: products, transformed back and stored."""
        g, lanes, tile_oc = self.g, self.lanes, self.picks.tile_oc
        width, blocks = tile_oc // lanes, ceildiv(g.outputs, tile_oc)
        full, rest = divmod(ceildiv(g.outputs, lanes), width)
        for case, vectors in body.cases(b, full, width, rest):
            self.products(case, task, values, case.let(task.part * blocks + b), vectors, sums)
        count = body.let(tirx.Select(b < full, width, rest)) if rest else width
        first = body.let(task.part * g.outputs + b * tile_oc)
        with body.loop(task.planes) as (plane_body, z), plane_body.loop(count) as (one, v):
            self.way_out.transform(one, task, z, one.let(first + v * lanes), (sums, v * lanes), pixels)

    def products(self, body: Block, task: Task, values: Values, b: Expr, vectors: int, sums: tirx.Buffer) -> None:
        """The sums of a block of channels, a position after another."""
        g, (stride, dilation, begin, _) = self.g, self.g.depth
        with body.loop(g.positions) as (position_body, position), position_body.loop(task.planes) as (plane_body, z):
            out = plane_body.let(task.plane + z)
            # A plane in padding meets no tap, though there be only one.
            met = meeting(self.spec, 0, out) if self.spec.rank > 2 else (0, 1)
            first, count = map(plane_body.let, met)
            plane = plane_body.let(out * stride - begin - values.first_plane + first * dilation)
            slab = _Slab(b, position, z, first, count, plane, vectors)
            for size, _ in g.groups.sizes:
                with plane_body.when(True if len(g.groups.sizes) == 1 else task.groups == size) as case:
                    tiles = Even(g.tiles(size), self.picks.tile_px)
                    with case.loop(tiles.count) as (one, i):
                        for inner, pixels in tiles.cases(one, i):
                            start, index = inner.let(tiles.start(i)), z * tiles.count + i
                            share = (index, tiles.count * g.plane_blocks.full)
                            self.register_tile(inner, values, slab, start, pixels, share, sums)

    def register_tile(
        self,
        body: Block,
        values: Values,
        slab: _Slab,
        start: Expr,
        pixels: int,
        share: tuple[Expr, int],
        sums: tirx.Buffer,
    ) -> None:
        """The sums of ``pixels`` tiles from one on. ``share``: which of how many fetches of the next slab this does."""
        g, lanes, tile_oc = self.g, self.lanes, self.picks.tile_oc
        taps, dilation = g.depth[3], g.depth[1]
        registers = body.registers([(t, v) for t in range(pixels) for v in range(slab.vectors)], lanes)
        following = slab.b * g.positions + slab.position + blocks_ahead(g.own * slab.vectors * g.most_tiles)
        following = body.let((following * taps + slab.first) * (g.own * tile_oc))
        lines = ceildiv(tile_oc, LINE)
        apart = steps_apart(self.core, pixels * slab.vectors, lines, share[1])
        ahead = Ahead(self.weights, following, slab.count * g.own, lines, *share, apart)
        origin = body.let(ahead.origin)
        with body.loop(slab.count) as (tap_body, tap):

            def scalar(t: int, k: Expr) -> Expr:
                where = [values.image, values.block, slab.plane + tap * dilation, slab.position]
                return values.buffer[*where, (start + t) * g.channels + k]

            def vector(v: int, k: Expr) -> Expr:
                return load(self.weights, "f32", [slab.b, slab.position, slab.first + tap, k, v * lanes], lanes, lanes)

            def fetch(step: Block, k: Expr) -> None:
                ahead.fetch(step, origin, tap * g.own + k)

            multiply(tap_body, registers, g.own, scalar, vector, fetch)
        for t, v in registers.keys:
            place = [slab.z, slab.position, start + t, v * lanes]
            body.add(store(sums, "f32", place, registers[t, v], lanes, lanes))


class _Slab(NamedTuple):
    """Weights of a block of channels at a position, and what they are multiplied by: the taps of the depth that meet
    src, ``count`` from ``first`` on; the first plane they read; the vectors of channels.
    """

    b: Expr
    position: Expr
    z: Expr
    first: Expr
    count: Expr
    plane: Expr
    vectors: int


def _size(cut: Even, index: Expr) -> Expr:
    return cut.full if cut.many == cut.count else tirx.Select(index < cut.many, cut.full, cut.full - 1)


# ---- the default ----------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _default(schedule: CpuWinograd, spec: ConvSpec, target: Target) -> Picks:
    return min(_points(schedule, spec, target), key=lambda picks: _cycles(spec, target, picks))


@lru_cache(maxsize=1024)
def _repacked(schedule: CpuWinograd, spec: ConvSpec, target: Target) -> tuple[Picks, float]:
    """The best point with the time of packing, and the seconds of both."""
    core = core_of(target, lanes_of(spec, target))

    def cycles(picks: Picks) -> float:
        return _cycles(spec, target, picks) + core.cycles(_of_packing(spec, target, picks))

    best = min(_points(schedule, spec, target), key=cycles)
    return best, cycles(best) / core.hertz


def _points(schedule: CpuWinograd, spec: ConvSpec, target: Target) -> Iterator[Picks]:
    """A few points worth comparing: the best register tile of each block, where tasks are few in both orders."""
    domains, lanes = schedule.space(spec, target).domains, lanes_of(spec, target)
    core = core_of(target, lanes)
    base = Picks(tile=0, tile_oc=0, tile_px=0, block_rows=0, block_planes=1, parallel="rows")
    for m in domains["tile"]:
        for block in block_choices(spec, m):
            tiles = []
            for tile_oc in domains["tile_oc"]:
                picks = base.replace(tile=m, tile_oc=tile_oc, block_rows=block)
                g = Grid(spec, target, picks)
                picks = picks.replace(tile_px=Even(g.most_tiles, min(14, most_pixels(target, tile_oc // lanes))).full)
                tiles.append((core.cycles(Counts(_of_products(target, g, picks, g.planes))), picks))
            fastest = min(cycles for cycles, _ in tiles)
            for picks in (picks for cycles, picks in tiles if cycles < 1.05 * fastest):
                for planes in domains["block_planes"]:
                    tasks = spec.n * spec.groups * g.groups.count * ceildiv(g.planes, planes)
                    for parallel in domains["parallel"] if target.cores > 1 and tasks < 4 * target.cores else ["rows"]:
                        yield picks.replace(block_planes=planes, parallel=parallel)


def _cycles(spec: ConvSpec, target: Target, picks: Picks) -> float:
    core = core_of(target, lanes_of(spec, target))
    return sum(core.cycles(counts) for counts in _counts(spec, target, picks))


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> list[Counts]:
    """What the busiest core does, one part after another."""
    g, by_channels = Grid(spec, target, picks), picks.parallel == "oc"
    stride, dilation, begin, taps = g.depth
    oc_blocks = ceildiv(g.outputs, picks.tile_oc)
    tasks = spec.n * spec.groups * g.plane_blocks.count * g.groups.count * (oc_blocks if by_channels else 1)
    sizes = [float(a * b) for a, n in g.plane_blocks.sizes for b, m in g.groups.sizes for _ in range(n * m)]
    # Of many tasks, each core has about its share.
    loads = sizes * (tasks // len(sizes)) if tasks <= 64 * target.cores else [1.0] * target.cores
    share, own = busiest(loads, target.cores) / sum(loads), ceildiv(tasks, target.cores)
    met = sum(0 <= z * stride - begin + k * dilation < g.planes_in for z in range(g.planes) for k in range(taps))
    made = g.planes_in if by_channels else min(g.planes_in, g.window) * g.plane_blocks.count
    slab = 4 * taps * g.own * picks.tile_oc
    weights = slab * g.positions * oc_blocks
    products = 4 * g.positions * g.most_tiles
    values = products * round_up(g.own, LINE) * min(g.window, g.planes_in)  # in lines
    sums = products * picks.tile_oc * g.plane_blocks.full
    # Whether a block of channels finds in the L1 cache what it reads, though all of its weights come by.
    in_l1 = values + sums + slab * g.positions <= target.l1 and not by_channels
    work = [
        part.with_times(part.times * share * spec.n * spec.groups * times)
        for parts, times in (
            (_of_products(target, g, picks, met, in_l1), 1),
            (work_of_input(g, near=in_l1), made),
            (_of_output(spec, g, core_of(target, g.lanes).waits.sums, in_l1), g.planes),
        )
        for part in parts
    ]
    work += [finishing(spec, g.lanes, share), Work(own, cycles=BEGIN_TASK)]
    near, passes = values + sums + 2 * slab, own * (1 if by_channels else oc_blocks)
    images = spec.bytes["src"] + (2 + spec.residual) * spec.bytes["dst"]  # a line is read before it is written
    streams = [Stream(images * share, ahead=True, footprint=target.l3)]
    # Transformed input comes from beyond the L2 cache, for every block.
    if by_channels or near > core_of(target).kept * target.l2:
        streams.append(Stream(passes * values, footprint=max(near, target.l2 + 1)))
    if near > target.l2:  # sums leave the L2 cache, and come back, but for the share of them that it holds
        streams.append(Stream(2 * passes * sums * (1 - target.l2 / near), footprint=near))
    if by_channels:
        streams.append(Stream(min(weights, own * weights / oc_blocks), weights=True, ahead=True))
        return [Counts(work, streams, 2)]
    # A group's weights come from memory while its first block is worked on, and then from where they stay.
    new = min(own, ceildiv(spec.groups, target.cores))
    cold, warm = Stream(new * weights, True, ahead=True), Stream((own - new) * weights, ahead=True, footprint=weights)
    return [
        Counts(
            [part.with_times(part.times * n / own) for part in work],
            [*(replace(stream, bytes=stream.bytes * n / own) for stream in streams), of_weights],
            regions,
        )
        for n, of_weights, regions in ((new, cold, 1), (own - new, warm, 0))
    ]


def _of_packing(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What packing takes the busiest core beside a copy of the weights: what is transformed, what is written more than
    there is (which is as much as it reads first), and the checksum of that.
    """
    g = Grid(spec, target, picks)
    rows, columns, taps = g.rows, g.columns, math.prod(spec.kernel[-len(transformed_axes(spec)) :])
    times = spec.groups * ceildiv(g.outputs, g.lanes) * g.own * g.depth[3] / target.cores
    sums = operations(rows.weights) * len(columns.weights[0]) + operations(columns.weights) * rows.positions
    more = 4 * g.lanes * (g.positions - taps)
    work = Work(times, sums, taps, g.positions, cycles=more / core_of(target, g.lanes).checked)
    return Counts([work], [Stream(2 * more * times, footprint=4 * g.lanes * g.positions * times * target.cores)], 0)


def _of_products(target: Target, g: Grid, picks: Picks, met: int, in_l1: bool = False) -> list[Work]:
    """Work of the products of all planes, with ``met`` taps of the depth in all; sums may stay in the L1 cache."""
    lanes, width, found = g.lanes, picks.tile_oc // g.lanes, list[Work]()
    for size, blocks in g.groups.sizes:
        tiles = Even(g.tiles(size), picks.tile_px)
        for vectors, channel_blocks in pieces(ceildiv(g.outputs, lanes), width):
            near = 4 * lanes * vectors if 4 * g.own * vectors * lanes > target.l1 // 2 else 0
            for pixels, count in tiles.sizes:
                times = blocks * channel_blocks * count * g.positions
                fetched = ceildiv(width, tiles.count)
                step = steps(times * met * g.own, pixels, vectors, near=near, fetched=fetched)
                sums = pixels * vectors
                if in_l1:  # they go there beside the next tile's products
                    step = replace(step, stores=sums * g.planes / max(1, met * g.own))
                    tile = Work(times * g.planes, cycles=BEGIN_TILE)
                else:
                    tile = Work(times * g.planes, stores=sums, spilled=4 * lanes * sums, cycles=BEGIN_TILE)
                found += [step, Work(times * met, cycles=BEGIN_RUN), tile]
    return found


def _of_output(spec: ConvSpec, g: Grid, wait: float, in_l1: bool) -> list[Work]:
    """Work of transforming a plane of dst back, and of its store.

    Each vector that a tile reads is a ``wait``, and comes from the L2 cache unless ``in_l1``.
    """
    rows, columns, vectors = g.rows, g.columns, ceildiv(g.outputs, g.lanes)
    outputs = rows.outputs * columns.outputs
    sums = operations(rows.back) * columns.positions + operations(columns.back) * rows.outputs
    near, loads = 0 if in_l1 else 4 * g.lanes * g.positions, g.positions + outputs * spec.residual
    times, begin = rows.tiles * columns.tiles * vectors, wait * g.positions
    found = [Work(times, sums + 2 * outputs, loads, outputs, near=near, cycles=begin)]
    if g.dst.layout == "nchw":
        shuffles = math.log2(g.lanes)
        found.append(Work(rows.size * columns.size * vectors, fmas=2, loads=2, stores=1, shuffles=shuffles))
    return found
