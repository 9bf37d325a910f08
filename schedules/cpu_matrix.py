"""Convolution by matrix tiles: bf16 with f32 sums, 8-bit integers with i32 sums.

Applies to  convolutions that are not transposed and have no groups, of any rank, stride and dilation, on CPUs with
            tiles (AMX); src NCHW or NHWC, dst in any layout. f32 layers of accuracy `bf16` are rounded when read.
Strategy    1. Pack weights as [oc/32][taps and blocks of channels][16 oc][channels/2][16][2] (i8: /4, 4): tiles, in the
               order of their use.
            2. A task copies its rows with their padding, channels innermost, in the tiles' type; rows a stride apart
               are neighbours there. A row's right padding is the next one's left padding. Where channels are few, it
               copies for each output pixel what a row of the kernel reads: as many channels. NHWC of this type without
               padding may be read where it lies.
            3. A group of output rows (in 1-D: of pixels) is one sequence of pixels, those between rows for nothing.
               32 of them × 32 channels are four tiles of sums: per step two tiles of pixels, two of weights, four
               products.
            4. Sums go to a buffer of the group; bias, residual and activation on vectors, which are then stored: of
               channels, or of pixels (NCHW) after a transposition in registers.
            5. One parallel loop over parts of the channels × batch × planes × blocks of groups. `order` names a task's
               outer loop: `oc`, and each block of channels meets all pixels while the next one's weights are fetched
               ahead; `pixels`, and each group meets all weights.
Why not     vectors (cpu_direct): they multiply an eighth as much per cycle.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache

from convgen.cpu.matrix import tiles
from convgen.cpu.matrix.geometry import CHANNELS, Geometry, geometry_of, operands_of
from convgen.cpu.matrix.kernel import Kernel
from convgen.cpu.matrix.panel import LANES
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, finishing
from convgen.cpu.tasks import Buffers
from convgen.cpu.vector import written
from convgen.deferred import te, tirx
from convgen.errors import Inapplicable
from convgen.hardware.target import Target
from convgen.lowering.compute import STORAGE, Expr, Operands, ceildiv, copied, narrow, round_up
from convgen.lowering.schedule import Picks, Program, Space, Written, busiest, require
from convgen.problem.spec import ConvSpec

#: Pixels of a group: of a row's part in 1-D, and those of rows at most.
LENGTHS, MOST_PIXELS = (16, 32, 64, 96, 128, 192, 256), 256
BLOCKS, PARTS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32)


class CpuMatrix(Written):
    id, version = "cpu_matrix", 1
    sums_integers = True

    def instructions(self, spec: ConvSpec) -> tuple[str, ...]:
        return tiles.instructions(operands_of(spec))

    def takes_integers(self, spec: ConvSpec) -> bool:
        return not spec.weights_zero and not spec.transposed

    def takes_layouts(self, src: str, dst: str) -> bool:
        return src in ("nchw", "nhwc")

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups == 1, "needs a convolution without groups")
        is_rounded = spec.dtype == "f32" and spec.accuracy == "bf16"
        require(spec.dtype in ("bf16", "i8") or is_rounded, "needs tensors of bf16 or i8, or accuracy bf16")
        whole = not spec.is_quantised or spec.dst_blocks.size >= LANES or spec.dst_blocks.is_plain
        require(whole, "needs blocks of whole vectors of channels, where dst is of integers")
        tiles.require_tiles(target.isa, operands_of(spec))
        require("avx512bf16" in target.isa, "needs a CPU that converts to bf16")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        g = geometry_of(spec, True)
        lengths = [n for n in LENGTHS if n < g.units + 16] if spec.rank == 1 else range(1, min(g.units, 16) + 1)
        direct = [False] if geometry_of(spec, False).is_possible else []
        return Space(
            tile=[n for n in lengths if n == lengths[0] or g.pixels(min(n, g.units)) <= MOST_PIXELS],
            block=[b for b in BLOCKS if b == 1 or b < 2 * ceildiv(g.units, lengths[0])],
            order=["oc", "pixels"],
            parallel_oc=[p for p in PARTS if p <= ceildiv(spec.oc, CHANNELS)],
            copy_src=[*direct, True],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        g = geometry_of(spec, picks.copy_src)
        require(picks.tile == 1 or g.continues, "rows do not follow one another in src")
        last = min(size for size in (picks.tile, g.units % picks.tile) if size)
        require(picks.copy_src or g.pixels(min(last, g.units)) >= tiles.ROWS, "groups that do not fill a tile")
        require(picks.block < 2 * ceildiv(g.units, picks.tile), "block exceeds the groups")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g = Operands(spec, integers=True), geometry_of(spec, picks.copy_src)
        vectors = {p.name: copied(p) for p in ops.parameters[1:]}
        if spec.src_zero:
            vectors["bias"] = _bias(ops)
        packed = [_packed_weights(ops, g), *vectors.values()]
        return written(ops, packed, lambda *buffers: Kernel(Buffers(*buffers), spec, picks, g).statement())


def _packed_weights(ops: Operands, g: Geometry) -> te.Tensor:
    spec = ops.spec

    def packed(b: Expr, step: Expr, v: Expr, row: Expr, column: Expr) -> Expr:
        o, k = b * CHANNELS + v * LANES + column // g.depth, row * g.depth + column % g.depth
        tap, channel = g.element(step, k)
        exists = tirx.all(o < spec.oc, channel < spec.ic, tap[2] < g.kernel[2])
        value = tirx.if_then_else(exists, ops.weights[(o, channel, *tap[3 - spec.rank :])], tirx.const(0, g.sums))
        return value.astype(STORAGE[g.operands[1]]) if spec.is_quantised else narrow(value, "bf16")

    shape = (ceildiv(spec.oc, CHANNELS), g.steps, min(2, ceildiv(spec.oc, LANES)), g.run // g.depth, LANES * g.depth)
    return te.compute(shape, packed, name="weights_packed")


def _bias(ops: Operands) -> te.Tensor:
    """The bias, less what the zero point of src adds: it is multiplied by all weights of a channel, padding is it."""
    spec, given = ops.spec, {p.name: p for p in ops.parameters}
    axes = [te.reduce_axis((0, size), f"r{i}") for i, size in enumerate(spec.weights_shape[1:])]
    totals = te.compute((spec.oc,), lambda o: te.sum(ops.weights[(o, *axes)], axes), name="totals")

    def value(o: Expr) -> Expr:
        added = totals[o] * given["src_zero"][0]
        return given["bias"][o] - added if spec.bias else 0 - added

    return te.compute((spec.oc,), value, name="bias_packed")


# ---- what it should take ----------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _default(schedule: CpuMatrix, spec: ConvSpec, target: Target) -> Picks:
    core, points = core_of(target), list[Picks]()
    for picks in schedule.space(spec, target):
        if picks.parallel_oc > 2 * target.cores:  # tasks enough
            continue
        with suppress(Inapplicable):
            schedule.valid(spec, target, picks)
            points.append(picks)
    return min(points, key=lambda p: (core.cycles(_counts(spec, target, p)), p.parallel_oc, -p.tile))


@lru_cache(maxsize=1024)
def _image_bytes(spec: ConvSpec) -> int:
    """What is read and written of images; a line is read before it is written."""
    return spec.bytes["src"] + (2 + spec.residual) * spec.bytes["dst"]


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    g = geometry_of(spec, picks.copy_src)
    groups, blocks = ceildiv(g.units, picks.tile), ceildiv(spec.oc, CHANNELS)
    planes, across = spec.n * g.out[0], ceildiv(groups, picks.block)
    tasks = picks.parallel_oc * planes * across
    lengths = [picks.block] * (across - 1) + [groups - picks.block * (across - 1)]
    loads = [length for length in lengths for _ in range(min(planes * picks.parallel_oc, 64))]
    share = busiest(loads, target.cores) / sum(loads)
    own = ceildiv(tasks, target.cores)

    weights = g.size * g.steps * g.run * CHANNELS  # of a block of channels
    near_weights = weights if picks.order == "pixels" and weights * blocks > target.l1 // 2 else 0
    near_weights = weights if weights > target.l1 // 2 else near_weights
    near_pixels = g.group_bytes(picks.tile) + (weights if picks.order == "oc" else 0) > target.l1 * 3 // 4
    work = []
    for times, size in ((g.units // picks.tile, picks.tile), (1, g.units % picks.tile)):
        if not size or not times:
            continue
        pairs, starts = g.tiles(size)
        for rows, number in ((2, pairs), (len(starts), 1)):
            count = times * number * planes * blocks * share
            near = near_weights / g.steps + (rows * 1024 if near_pixels else 0)
            step = Work(count * g.steps, tile_products=2 * rows, tile_loads=2 + rows, near=near)
            work += [step, Work(count, tile_stores=2 * rows, cycles=BEGIN_TILE)] if rows and number else []
    outputs = spec.n * spec.oc * spec.out_pixels / LANES * share
    kept = tiles.SUM_BYTES * g.pixels(min(picks.tile, g.units)) * min(CHANNELS, round_up(spec.oc, LANES))
    through = 2 * tiles.SUM_BYTES * LANES if kept > target.l1 // 2 else 0  # sums that leave the L1 cache
    shuffles = math.log2(LANES) if g.transposes else 1
    work.append(Work(outputs, loads=1, stores=1, shuffles=shuffles, near=through))
    work += [finishing(spec, LANES, share), Work(own, cycles=BEGIN_TASK)]
    if picks.copy_src:
        panel = g.panel(min(picks.block * picks.tile, g.units))
        turned = 2 * math.log2(LANES) if spec.layout == "nchw" else 0
        work.append(Work(own * panel.vectors, loads=1, stores=1, shuffles=turned, cycles=1))
        if spec.layout == "nhwc" and panel.channels != spec.ic:
            work.append(Work(own * panel.pixels, cycles=BEGIN_RUN))
    per_task = weights * blocks / picks.parallel_oc
    ahead = picks.order == "oc"
    images = _image_bytes(spec)
    again = max(0, own - picks.parallel_oc) * per_task if per_task > target.l2 // 2 else 0
    panels = own * g.group_bytes(min(picks.block * picks.tile, g.units)) * picks.copy_src
    streams = [
        Stream(2 * panels, footprint=panels / own),
        Stream(min(weights * blocks, own * per_task), True, ahead and min(1, picks.parallel_oc / own)),
        Stream(again, ahead=ahead, footprint=weights * blocks),
        Stream(images * share, ahead=True, footprint=images),
    ]
    return Counts(work, streams)
