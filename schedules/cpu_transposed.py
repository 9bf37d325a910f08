"""Transposed convolution by stride phases, in any layout: no zero is multiplied, and no product stored.

Applies to  all transposed convolutions, best with groups of whole vectors of output channels.
Strategy    1. Outputs that are equal modulo the stride form a phase (convgen.cpu.phases): a convolution at stride 1
               of src with every stride-th tap. A single input pixel has as many phases as outputs.
            2. Pack weights as [oc/t][rows of the kernel and blocks of channels][run][t], the taps of a phase together.
            3. A task copies its rows with their padding, in src's layout; else src is read where it lies.
            4. For one phase keep a tile of `tile_oh` × `tile_ow` pixels × `tile_oc` channels in registers: vector loads
               of weights, broadcast src. The next block's weights are fetched ahead.
            5. NHWC and blocks of channels: a pixel's vectors are stored where they belong. NCHW: they go to a buffer
               of output rows, of which vectors of pixels are transposed in registers when all phases of a row are
               there.
            6. `merge`: the phases of a row and the channels together are in the lanes, for few channels. All read the
               same pixels then, so rows begin where the first phase does, padding or not.
            7. One parallel loop over parts of the channels × batch × blocks of rows (in 1-D of tiles).
Why not     GEMM and col2im: it writes each product, and adds them up again in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from tvm import te, tirx

from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, FAR_ROW, Even, finishing, most_pixels, steps
from convgen.cpu.transposed import Kernel, geometry_of
from convgen.cpu.vector import written
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, copied, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, busiest, require
from convgen.problem.spec import ConvSpec

#: Rows of tiles of a task, in 1-D tiles; parts of the channels.
BLOCKS, PARTS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 3, 4, 6, 8, 12, 16)


class CpuTransposed(Written):
    id, version = "cpu_transposed", 4
    merged = ("cpu_transposed_pixel",)

    def takes_layouts(self, src: str, dst: str) -> bool:
        return True

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        layout, whole = geometry_of(spec, False).dst.layout, spec.oc // spec.groups % target.lanes == 0
        lie = spec.groups == 1 or whole or layout in ("nchw", "nhwc")
        require(lie, f"needs groups of multiples of {target.lanes} output channels in blocks of channels")
        own = spec.ic // spec.groups
        require(spec.src_blocks.is_plain or own % spec.src_blocks.size == 0, "needs groups of whole blocks of channels")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, g = target.lanes, geometry_of(spec, False)
        merge = [False, True] if g.mergeable else [False]
        channels = g.channels * (g.x.stride if g.mergeable else 1)
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4, 6) if lanes * (v - 1) < channels],
            tile_oh=[h for h in (1, 2, 3, 4, 6, 8) if h <= g.y.pixels],
            tile_ow=[w for w in range(1, 29) if w <= g.x.pixels + 1],
            merge=merge,
            block=[b for b in BLOCKS if b == 1 or b < 2 * g.blockable(1, 1)],
            parallel_oc=list(PARTS),
            copy_src=[True] if g.padded else [False, True],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        g = geometry_of(spec, picks.merge)
        most, pixels = most_pixels(target, picks.tile_oc // target.lanes), picks.tile_oh * picks.tile_ow
        require(pixels <= most, f"{pixels} pixels in a tile, registers for {most}")
        require(picks.tile_ow <= g.width, "tile_ow exceeds the pixels of a phase")
        require(picks.parallel_oc <= g.blocks(picks), "fewer channel blocks than parallel_oc")
        require(picks.copy_src or not g.padded, "needs a copy of src where it is padded")
        count, what = g.blockable(picks.tile_oh, picks.tile_ow), "tiles" if spec.rank == 1 else "rows of tiles"
        require(picks.block < 2 * count, f"{picks.block} {what} in a block, the output has {count}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        picks = self.default(spec, target)
        return core_of(target).seconds(_counts(spec, target, picks, _work(spec, target, picks)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g, tile = Operands(spec), geometry_of(spec, picks.merge), picks.tile_oc
        per_group = g.blocks(picks) // spec.groups

        def packed_weights(b: Expr, run: Expr, k: Expr, t: Expr) -> Expr:
            *position, block, x = unflat(run, g.runs)
            lane, part = b * tile + t, 0
            if picks.merge:
                group, lane = b // g.parts(picks), b % g.parts(picks) * tile + t
                part, lane = lane // g.channels, lane % g.channels
                exists = part < g.x.stride
            else:
                group, lane = b // per_group, b % per_group * tile + t
                exists = lane < g.channels
            x = x if g.apart else k // g.inner
            taps = [axis.tap(p) for axis, p in zip((g.z, g.y), position, strict=True)]
            taps.append(part + g.x.stride * (g.x.taps - 1 - x) if picks.merge else g.x.tap(x))
            channel = group * (spec.ic // spec.groups) + block * g.inner + k % g.inner
            return tirx.if_then_else(
                exists, ops.weights[(channel, lane, *taps[3 - spec.rank :])], tirx.const(0, "float32")
            )

        def statement(
            src: tirx.Buffer, residual: tirx.Buffer, parameters: dict[str, tirx.Buffer], dst: tirx.Buffer
        ) -> tirx.Stmt:
            weights = parameters.pop("weights")
            return Kernel(spec, g, picks, target.lanes, src, weights, residual, parameters, dst).statement()

        shape = (g.blocks(picks) * g.parts(picks), math.prod(g.runs), g.run, tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed"), *map(copied, ops.parameters[1:])]
        return written(ops, packed, statement)


# ---- the default --------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _default(schedule: CpuTransposed, spec: ConvSpec, target: Target) -> Picks:
    space, core, lanes = schedule.space(spec, target).domains, core_of(target), target.lanes
    g = geometry_of(spec, False)
    # Rows of NCHW, copied, are aligned, and lie side by side.
    copy_src = g.padded or g.src.layout == "nchw" or (spec.dtype != "f32" and spec.oc > 64)
    # Merged phases fill the lanes that a group's last vector of channels leaves empty.
    wasted = spec.oc // spec.groups % lanes > 0
    tiles = [
        Picks(tile_oc=c, tile_oh=h, tile_ow=w, merge=m, block=1, parallel_oc=1, copy_src=copy_src)
        for m in (space["merge"] if wasted else [False])
        for c in space["tile_oc"]
        for h in space["tile_oh"]
        for w in _widths(spec, m, most_pixels(target, c // lanes) // h)
        if h == 1 or w < 14
    ]

    def speed(picks: Picks) -> tuple[float, int]:
        work = _work(spec, target, picks)
        return core.cycles(Counts(work)), picks.tile_oc // lanes + picks.tile_oh * picks.tile_ow

    base = min(tiles, key=speed)
    g, work = geometry_of(spec, base.merge), _work(spec, target, base)
    points = [
        base.replace(block=b, parallel_oc=p)
        for b in space["block"]
        for p in space["parallel_oc"]
        if b < 2 * g.blockable(base.tile_oh, base.tile_ow) and p <= g.blocks(base)
    ]

    def penalty(picks: Picks) -> tuple[float, int, int]:
        return core.cycles(_counts(spec, target, picks, work)), picks.parallel_oc, -picks.block

    return min(points, key=penalty)


def _widths(spec: ConvSpec, merge: bool, most: int) -> list[int]:
    """Pixels of a tile's rows to choose from: a few of the widest that divide a row evenly."""
    width = geometry_of(spec, merge).width
    return sorted({Even(width, w).full for w in range(1, min(most, width, 28) + 1)})[-4:]


def _work(spec: ConvSpec, target: Target, picks: Picks) -> list[Work]:
    """Of all tiles of an image with all its channels."""
    g, lanes, core, found = geometry_of(spec, picks.merge), target.lanes, core_of(target), list[Work]()
    channels = g.channels * (g.x.stride if g.merge else 1)
    full, rest = divmod(ceildiv(channels, lanes), picks.tile_oc // lanes)
    lines = ((picks.tile_oh, g.y.pixels // picks.tile_oh), (g.y.pixels % picks.tile_oh, 1))
    phases, along = g.z.stride * g.y.stride, 1 if g.merge else g.x.stride
    buffered, squares = g.merge or g.dst.layout == "nchw", g.z.out * g.y.out * spec.groups
    for vectors, blocks in ((picks.tile_oc // lanes, full), (rest, 1)):
        for height, rows in lines:
            for width, tiles in Even(g.width, picks.tile_ow).sizes:
                times, pixels = g.z.pixels * spec.groups * blocks * rows * tiles, height * width
                if not (times and vectors and height):
                    continue
                resident, passes = 4 * g.products * vectors * lanes, g.blockable(height, width)
                passes *= tiles if spec.rank > 1 else 1
                near = 4 * vectors * lanes if resident // phases > target.l1 // 2 and passes > 1 else 0
                if resident > target.l2 // 2:  # what is fetched ahead is gone when it is used
                    near *= (core.l2 / core.memory + (passes - 1) * core.l2 / core.l3) / passes
                found.append(steps(times * g.products, pixels, vectors, near=near, fetched=0.5))
                found.append(Work(times * math.prod(g.runs) * (1 if g.apart else along), cycles=BEGIN_RUN))
                done = pixels * vectors
                found.append(
                    Work(
                        times * phases * along,
                        loads=0 if buffered else done * spec.residual,
                        stores=done,
                        cycles=BEGIN_TILE,
                    )
                )
    if buffered and g.dst.layout == "nchw":
        whole, rest = divmod(g.x.out, lanes)
        found.append(Work(squares * g.channels, cycles=FAR_ROW))
        for channels, blocks in ((lanes, g.channels // lanes), (g.channels % lanes, 1)):
            if channels and blocks:
                shuffles = 0 if g.merge and g.channels == 1 else lanes * math.log2(lanes)
                turned = channels if shuffles else 0  # wait in a buffer until their row is whole
                ends = ((whole, turned + channels, 0), (bool(rest), turned, channels))
                for count, stores, masked in ends:
                    times, loads = squares * blocks * count, lanes + turned + channels * spec.residual
                    found.append(Work(times, 0, loads, stores, masked, shuffles, cycles=4))
    elif buffered:
        found.append(Work(squares * g.x.out * ceildiv(g.channels, lanes), loads=1, masked_stores=1, cycles=2))
    return found


def _counts(spec: ConvSpec, target: Target, picks: Picks, work: Sequence[Work]) -> Counts:
    """What the busiest core does of the ``work`` of an image."""
    g, lanes = geometry_of(spec, picks.merge), target.lanes
    rows, tiles = g.task(picks)
    whole, size = (
        (ceildiv(g.y.pixels, picks.tile_oh), rows) if spec.rank > 1 else (Even(g.width, picks.tile_ow).count, tiles)
    )
    blocks, across, planes = g.blocks(picks), ceildiv(whole, size), spec.n * g.z.pixels
    bounds = [blocks * p // picks.parallel_oc for p in range(picks.parallel_oc + 1)]
    parts = [end - start for start, end in itertools.pairwise(bounds)]
    tasks = planes * across * len(parts)
    if tasks > 64 * target.cores:
        share, own = 1 / target.cores, tasks / target.cores
    else:
        lengths = [size] * (across - 1) + [whole - size * (across - 1)]
        loads = [part * length for part in parts for _ in range(planes) for length in lengths]
        share, own = busiest(loads, target.cores) / sum(loads), ceildiv(tasks, target.cores)
    work = [replace(part, times=part.times * share * spec.n) for part in work]
    panel = 4 * spec.ic * math.prod(g.extent(picks))
    if picks.copy_src:
        work.append(Work(own * panel / 4 / lanes, loads=1, stores=1, cycles=0.5))
        if g.src.layout == "nchw":  # each row of a channel lies in another page
            work.append(Work(own * spec.ic * math.prod(g.extent(picks)[:2]), cycles=FAR_ROW))
    work += [Work(own, cycles=BEGIN_TASK), finishing(spec, lanes, share)]
    weights = 4 * g.products * picks.tile_oc * blocks * g.parts(picks)
    per_task = weights / picks.parallel_oc
    images = spec.bytes["src"] + (2 + spec.residual) * spec.bytes["dst"]
    streams = [
        # Weights: once from memory, then from where they stay between tasks.
        Stream(min(weights, own * per_task), weights=True, ahead=True),
        Stream(
            max(0, own - picks.parallel_oc) * per_task if per_task > target.l2 // 2 else 0,
            ahead=True,
            footprint=weights,
        ),
        Stream(images * share, ahead=True, footprint=images),
    ]
    phases = g.z.stride * g.y.stride
    if panel + per_task / ceildiv(blocks, picks.parallel_oc) / phases > target.l2 // 2:
        passes = own * ceildiv(blocks, picks.parallel_oc) * phases
        streams.append(Stream(passes * panel, footprint=max(panel, target.l2 + 1)))
    return Counts(work, streams)
