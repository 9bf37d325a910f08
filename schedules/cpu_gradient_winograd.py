"""Gradient of weights by Winograd's algorithm: fewer products than taps.

Applies to  the gradient of weights of dense convolutions with small kernels, strided or dilated, in one or two
            dimensions, NCHW and NHWC, on CPUs.
Strategy    F(r, m) along the last one or two axes: the r taps of a kernel are what m gradients of dst and m + r - 1
            pixels of src make with m + r - 1 products instead of m·r. At stride s taps fall into s phases, each of
            every s-th pixel. The sum over tiles is taken before the way back:
            dw = Aᵀ [ sum over tiles of (G y) · (Bᵀ x) ].
            1. `images` images and `block_rows` rows of their tiles (in 1-D tiles) are a part; parts follow each other.
               Both tensors are transformed, a vector of channels of an image a task, to [position][vector of
               channels][tile][lane]; of NCHW through a copy that is transposed in registers.
            2. Products: a task has `block_oc` vectors of the gradient's channels × `tile_ic` of src's, all positions.
               A register tile is `tile_oc` channels × `tile_ic` vectors of src's, summed over the tiles of the part,
               and added to the task's sums. No other task has these, and parts come in one order, so threads and their
               number change no bit.
            3. After the last part, sums are transformed back, taps and channels interleaved in registers, and stored
               as they lie in memory.
            4. The gradient of bias is a sum of its own.
Accuracy    as Winograd's: errors of a tile add up as those of a sum's products do.
Why not     few channels: transforms are used by few products. Few pixels: tiles reach past them. Parts as large as
            memory allows: what is transformed would come back from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from convgen.cpu.correlation import add_sums_of_channels
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, LINE, most_pixels, pieces, steps
from convgen.cpu.vector import Block, written
from convgen.cpu.winograd import ROWS, TILES, operations, taps_covered, transformed_axes
from convgen.cpu.winograd_gradient import (
    GradientGrid,
    GradientKernel,
    gradient_axes,
    gradient_tile_sizes,
    gradients_of,
)
from convgen.cpu.winograd_passes import WayIn, work_of_input
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv, nothing_packed
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Space, Written, require
from convgen.lowering.winograd import magnitudes_of_gradient
from convgen.problem.layout import PLAIN
from convgen.problem.spec import ConvSpec

#: Images of a part, vectors of the gradient's channels of a task.
IMAGES, BLOCKS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8)
#: Numbers of a part's transformed tensors: scratch memory.
MOST_VALUES = 1 << 26


class CpuGradientWinograd(Written):
    id, version, directions = "cpu_gradient_winograd", 1, ("weights",)
    transforms = True

    def takes_layouts(self, src: str, dst: str) -> bool:
        return src in PLAIN and dst in PLAIN

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups == 1, "needs groups 1")
        require(spec.rank <= 2, "needs at most two axes")
        axes = transformed_axes(spec)
        require(all(1 in (spec.stride[a], spec.dilation[a]) for a in axes), "dilated and strided")
        why = f"no transform of an axis saves enough products at accuracy {spec.accuracy}"
        require(bool(gradient_tile_sizes(spec)), why)
        # A tap that meets nothing but padding is 0, and admits no error; a transform has one.
        inside = all(2 * max(spec.padding[a]) <= (spec.kernel[a] + 1) * spec.dilation[a] for a in axes)
        require(inside, "needs windows with half of their taps inside the input")
        require(min(spec.ic, spec.oc) >= target.lanes, f"needs at least {target.lanes} channels of src and of dst")
        require(all(taps_covered(spec, a) for a in axes), "needs taps that each meet the input")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, sizes = target.lanes, gradient_tile_sizes(spec)
        inner, outer = ceildiv(spec.ic, lanes), ceildiv(spec.oc, lanes)
        return Space(
            tile=sizes,
            images=[i for i in IMAGES if i <= spec.n],
            block_rows=sorted({b for m in sizes for b in _rows(spec, m)}),
            tile_oc=[t for t in (4, 8) if t <= lanes],
            tile_ic=[v for v in (1, 2, 3, 4) if v <= inner],
            block_oc=[b for b in BLOCKS if b == 1 or b < 2 * outer],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most, groups = most_pixels(target, picks.tile_ic), _groups(spec, picks.tile)
        require(picks.tile_oc <= most, f"{picks.tile_oc} channels in a register tile, registers for {most}")
        require(picks.block_rows <= groups, "block_rows exceeds the rows of tiles")
        g = GradientGrid(spec, target, picks)
        values = g.positions * (g.values(g.inner) + g.values(g.outer))
        small = picks.images == picks.block_rows == 1
        require(small or values <= MOST_VALUES, f"{values} transformed numbers, at most {MOST_VALUES} at a time")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        core = core_of(target)
        seconds = core.seconds(_counts(spec, target, self.default(spec, target)))
        return seconds * (core.waits.phased if max(spec.stride) > 1 else 1)

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        tiles = {axis: gradients_of(spec, axis, picks.tile) for axis in transformed_axes(spec)}
        return magnitudes_of_gradient(spec, src, weights, tiles)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        g = GradientGrid(spec, target, picks)

        def statement(src: Any, gradient: Any, parameters: dict[str, Any], dst: Any) -> Any:
            block, ways = Block(), (WayIn(spec.dtype, g.src, src), WayIn(spec.dtype, g.gradient, gradient))
            block.add(GradientKernel(g, picks, *ways, dst).statement())
            if spec.bias:
                add_sums_of_channels(block, spec, target.lanes, gradient, dst)
            return block.statement()

        return written(Operands(spec), [nothing_packed()], statement)


def _groups(spec: ConvSpec, m: int) -> int:
    """Rows of tiles; in 1-D tiles. Those that interleave count as one."""
    return gradient_axes(spec, transformed_axes(spec)[0], m)[1].groups


def _rows(spec: ConvSpec, m: int) -> set[int]:
    groups = _groups(spec, m)
    return {b for b in (ROWS if spec.rank > 1 else TILES) if b <= groups} | {groups}


@lru_cache(maxsize=1024)
def _default(schedule: CpuGradientWinograd, spec: ConvSpec, target: Target) -> Picks:
    core = core_of(target)
    good = (p for p in _points(schedule, spec, target) if schedule.reason_against(spec, target, p) is None)
    return min(good, key=lambda picks: core.cycles(_counts(spec, target, picks)))


def _points(schedule: CpuGradientWinograd, spec: ConvSpec, target: Target) -> Iterator[Picks]:
    """Parts of several images have these whole. Of register tiles, the highest for each width."""
    domains = schedule.space(spec, target).domains
    for m in domains["tile"]:
        groups = _groups(spec, m)
        parts = [(1, rows) for rows in _rows(spec, m)] + [(images, groups) for images in domains["images"][1:]]
        for images, rows in parts:
            for tile_ic in domains["tile_ic"]:
                tile_oc = max((t for t in domains["tile_oc"] if t <= most_pixels(target, tile_ic)), default=4)
                for block in domains["block_oc"]:
                    yield Picks(
                        tile=m, images=images, block_rows=rows, tile_oc=tile_oc, tile_ic=tile_ic, block_oc=block
                    )


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """Of the busiest core."""
    g, lanes, cores = GradientGrid(spec, target, picks), target.lanes, target.cores
    tasks = math.prod(g.blocks)
    share, positions = ceildiv(tasks, cores) / tasks, g.positions
    work = [Work(g.parts * ceildiv(tasks, cores), cycles=BEGIN_TASK)]
    for tiles, vectors in ((g.src, g.inner), (g.gradient, g.outer)):
        busy = ceildiv(g.images.full * vectors, cores) / (g.images.full * vectors)
        work += [part.with_times(part.times * spec.n * busy) for part in work_of_input(tiles)]
    depth = spec.n * g.src.tiles(1) * g.src.blocked.groups
    strip = 4 * lanes * g.depth
    for vectors, times in pieces(g.inner, picks.tile_ic):
        runs = times * g.all_tiles_oc * positions * share
        near = 4 * lanes * vectors if strip * (vectors + 1) > target.l1 // 2 else 0
        work.append(steps(runs * depth, picks.tile_oc, vectors, near=near))
        sums, added = picks.tile_oc * vectors, g.parts > 1
        moved = 4 * lanes * sums
        work.append(
            Work(
                runs * g.parts,
                loads=sums * added,
                stores=sums,
                near=moved * added,
                spilled=moved,
                cycles=BEGIN_RUN + BEGIN_TILE,
            )
        )
    work.append(_of_output(g, spec.oc * g.inner * share))
    values = 4 * positions * g.depth * lanes * (g.inner + g.outer)
    kept = 4 * positions * g.outer * g.inner * lanes**2
    around = values + (kept if g.parts > 1 else kept / tasks)
    moved = [
        Stream((spec.bytes["src"] + spec.bytes["residual"]) / cores, ahead=1),
        Stream(spec.bytes["dst"] * share),
    ]
    # Other data are in the caches, too.
    again = 2 * around
    if around > target.l2:  # transformed, which reads what it writes; then read by blocks of the other's channels
        read = g.inner * g.blocks[0] + g.outer * g.blocks[1]
        moved.append(Stream(2 * values * g.parts / cores, footprint=again))
        lines, waits = values * g.parts / cores / (4 * LINE), core_of(target).waits
        work.append(Work(lines, cycles=waits.scattered * max(1, positions / waits.places)))
        moved.append(Stream(4 * positions * g.depth * lanes * read * g.parts * share, ahead=0.5, footprint=again))
    if g.parts > 1 and around > target.l2:
        moved.append(Stream(2 * kept * g.parts * share, footprint=again))
    return Counts(work, moved, 3 * g.parts)


def _of_output(g: GradientGrid, vectors: float) -> Work:
    """Work of transforming so many vectors of sums back, and of storing them."""
    *rows, columns = g.back
    sums = operations(columns) * (len(rows[0]) if rows else 1)
    if rows:
        sums += operations(rows[0]) * len(columns[0])
    near = 4 * g.lanes * g.positions
    return Work(vectors, sums, g.positions, g.taps, shuffles=g.taps * g.taps, near=near, cycles=BEGIN_TILE)
