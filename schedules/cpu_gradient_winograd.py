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

import itertools
import math

from convgen.cpu.correlation import gradient_program
from convgen.cpu.counted import Counted
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, LINE, most_pixels, pieces, steps
from convgen.cpu.traffic import busiest_share
from convgen.cpu.winograd import covered, outputs_of, taps_covered, transformed_axes
from convgen.cpu.winograd_gradient import GradientGrid, GradientKernel, blocks_of, gradient_tile_sizes, groups_of
from convgen.cpu.winograd_work import work_of_input, work_of_taps
from convgen.hardware.target import Target
from convgen.lowering.compute import ceildiv
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Space, require
from convgen.lowering.winograd import magnitudes_of_gradient
from convgen.problem.layout import PLAIN
from convgen.problem.spec import ConvSpec

#: Images of a part, vectors of the gradient's channels of a task.
IMAGES, BLOCKS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8)
#: Numbers of a part's transformed tensors: scratch memory.
MOST_VALUES = 1 << 26


class CpuGradientWinograd(Counted):
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
        require(all(covered(spec, a) for a in axes), "needs windows with half of their taps inside the input")
        require(min(spec.ic, spec.oc) >= target.lanes, f"needs at least {target.lanes} channels of src and of dst")
        require(all(taps_covered(spec, a) for a in axes), "needs taps that each meet the input")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, sizes = target.lanes, gradient_tile_sizes(spec)
        inner, outer = ceildiv(spec.ic, lanes), ceildiv(spec.oc, lanes)
        return Space(
            tile=sizes,
            images=[i for i in IMAGES if i <= spec.n],
            block_rows=sorted({b for m in sizes for b in blocks_of(spec, m)}),
            tile_oc=[t for t in (4, 8) if t <= lanes],
            tile_ic=[v for v in (1, 2, 3, 4) if v <= inner],
            block_oc=[b for b in BLOCKS if b == 1 or b < 2 * outer],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most, groups = most_pixels(target, picks.tile_ic), groups_of(spec, picks.tile)
        require(picks.tile_oc <= most, f"{picks.tile_oc} channels in a register tile, registers for {most}")
        require(picks.block_rows <= groups, "block_rows exceeds the rows of tiles")
        g = GradientGrid(spec, target, picks)
        values = g.positions * (g.values(g.inner) + g.values(g.outer))
        small = picks.images == picks.block_rows == 1
        require(small or values <= MOST_VALUES, f"{values} transformed numbers, at most {MOST_VALUES} at a time")

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        """Parts of several images have these whole. Of register tiles, the highest for each width."""
        domains, points = self.space(spec, target).domains, list[Picks]()
        for m in domains["tile"]:
            parts = [(1, rows) for rows in blocks_of(spec, m)]
            parts += [(images, groups_of(spec, m)) for images in domains["images"][1:]]
            for (images, rows), tile_ic in itertools.product(parts, domains["tile_ic"]):
                tile_oc = max((t for t in domains["tile_oc"] if t <= most_pixels(target, tile_ic)), default=4)
                tile = Picks(tile=m, images=images, block_rows=rows, tile_oc=tile_oc, tile_ic=tile_ic, block_oc=1)
                points += [tile.replace(block_oc=block) for block in domains["block_oc"]]
        return self.fastest(spec, target, points)

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        g, lanes, cores = GradientGrid(spec, target, picks), target.lanes, target.cores
        tasks, positions = math.prod(g.blocks), g.positions
        share = busiest_share(tasks, cores)
        work = [Work(g.parts * ceildiv(tasks, cores), cycles=BEGIN_TASK)]
        for tiles, vectors in ((g.src, g.inner), (g.gradient, g.outer)):
            busy = busiest_share(g.images.full * vectors, cores)
            work += [part.with_times(part.times * spec.n * busy) for part in work_of_input(tiles)]
        depth = spec.n * g.src.tiles(1) * g.src.blocked.groups
        strip, begin = 4 * lanes * g.depth, BEGIN_RUN + BEGIN_TILE
        for vectors, times in pieces(g.inner, picks.tile_ic):
            runs = times * g.all_tiles_oc * positions * share
            near = 4 * lanes * vectors if strip * (vectors + 1) > target.l1 // 2 else 0
            work.append(steps(runs * depth, picks.tile_oc, vectors, near=near))
            sums, added = picks.tile_oc * vectors, g.parts > 1
            moved = {"near": 4 * lanes * sums * added, "spilled": 4 * lanes * sums}
            work.append(Work(runs * g.parts, loads=sums * added, stores=sums, cycles=begin, **moved))
        work.append(work_of_taps(g, spec.oc * g.inner * share))
        values = 4 * positions * g.depth * lanes * (g.inner + g.outer)
        kept = 4 * positions * g.outer * g.inner * lanes**2
        around = values + (kept if g.parts > 1 else kept / tasks)
        images = spec.bytes["src"] + spec.bytes["residual"]
        streams = [Stream(images / cores, ahead=1), Stream(spec.bytes["dst"] * share)]
        if around > target.l2:  # transformed, which reads what it writes; then read by blocks of the other's channels
            read, again = g.inner * g.blocks[0] + g.outer * g.blocks[1], 2 * around  # other data are in the caches, too
            streams.append(Stream(2 * values * g.parts / cores, footprint=again))
            lines, waits = values * g.parts / cores / (4 * LINE), core_of(target).waits
            work.append(Work(lines, cycles=waits.scattered * max(1, positions / waits.places)))
            read_again = 4 * positions * g.depth * lanes * read * g.parts * share
            streams.append(Stream(read_again, ahead=0.5, footprint=again))
            if g.parts > 1:
                streams.append(Stream(2 * kept * g.parts * share, footprint=again))
        return Counts(work, streams, 3 * g.parts)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return super().cost(spec, target) * (core_of(target).waits.phased if max(spec.stride) > 1 else 1)

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        tiles = {axis: outputs_of(spec, axis, picks.tile) for axis in transformed_axes(spec)}
        return magnitudes_of_gradient(spec, src, weights, tiles)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        g = GradientGrid(spec, target, picks)
        return gradient_program(
            spec, target.lanes, lambda *tensors: GradientKernel(g, picks, *tensors).statement(), with_bias=spec.bias
        )
