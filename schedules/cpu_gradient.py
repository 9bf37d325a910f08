"""Gradient of weights: a register tile of output channels and taps, summed over all images and pixels.

Applies to  the gradient of weights of layers of any rank, transposed ones too, NCHW and NHWC, on CPUs; with few output
            channels per group, most of a vector is idle.
Strategy    1. A task has `blocks` times `tile_oc` output channels, in the vector lanes, and one of `parts` of the input
               channels, with all taps of these: sums that no other task has, so that threads and their number change
               no bit.
            2. It goes over all images, `rows` output rows at a time, or all rows of `images`. Their gradients of dst
               are put in order first, [pixel][channel]: of NCHW by transposing squares in registers. They stay in the
               cache. Those of large images have been fetched ahead by then.
            3. For each tile of `tile_c` input channels × the taps of a row of the kernel, and each block, sums are in
               registers over all pixels of the rows: a step loads the vectors of a pixel's gradients, and multiplies
               these by a number of src for each channel and tap. Rows outside the image are left out; of pixels whose
               taps lie partly outside it, each number is checked.
            4. Where a pixel meets one of src, as of 1×1 kernels, blocks and images are such that src comes from memory
               once or a few times; what comes next is fetched ahead. Pixels a stride apart are put side by side once
               for all blocks of a task.
            5. A task's sums lie in its scratch memory, [channel and tap][output channel], and are stored transposed.
            6. The gradient of bias is the sum of the same gradients of dst, in the tasks of the first part.
            7. The pixels of a pointwise layer are one row, which is taken for several.
            8. Of a transposed layer src and the gradient of dst change places. Its bias is a sum of its own.
Why not     gradients of dst packed as weights are: they are as large as the images, and used once. Images split among
            tasks: their sums would have to be added up afterwards, and channels are tasks enough.
"""

from __future__ import annotations

import math

from convgen.cpu.correlation import Correlation, gradient_program
from convgen.cpu.counted import Counted, at_most
from convgen.cpu.gradient import Fetches, WeightsGradient, reaches
from convgen.cpu.gradient_inner import deepened
from convgen.cpu.model import Counts, Stream, Work
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, most_pixels, pieces, steps
from convgen.hardware.target import Target
from convgen.lowering.compute import ceildiv
from convgen.lowering.schedule import Picks, Program, Space, require
from convgen.problem.layout import PLAIN
from convgen.problem.spec import ConvSpec

#: Register tiles of which the default is chosen.
TILES = 12


class CpuGradient(Counted):
    id, version, directions = "cpu_gradient", 4, ("weights",)

    def takes_layouts(self, src: str, dst: str) -> bool:
        return src in PLAIN and dst in PLAIN

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        relation = Correlation(spec)
        own, group, lines = relation.own, relation.group, relation.lines
        tiles = [target.lanes * v for v in (1, 2, 3, 4) if target.lanes * (v - 1) < group]
        return Space(
            tile_oc=tiles,
            tile_c=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 20, 24, 28) if c <= own],
            blocks=[b for b in range(1, 25) if any(ceildiv(group, oc) % b == 0 for oc in tiles)],
            images=[i for i in (1, 2, 4, 8, 16) if i <= spec.n],
            rows=sorted({min(lines, 1 << i) for i in range(11)}),
            parts=[p for p in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if p <= own],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        relation, most = Correlation(spec), most_pixels(target, picks.tile_oc // target.lanes)
        sums = picks.tile_c * min(spec.kernel[-1], most)
        require(sums <= most, f"{sums} numbers of a step, registers for {most}")
        require(picks.tile_c <= ceildiv(relation.own, picks.parts), "tile_c exceeds the channels of a part")
        require(ceildiv(relation.group, picks.tile_oc) % picks.blocks == 0, "blocks do not divide the output channels")
        require(picks.images == 1 or picks.rows == relation.lines, "images of which some rows are taken go one by one")

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        """With as many rows as leave most of the L2 cache to src and the sums; where a pixel meets one of src, as many
        rows or images as fit there beside the sums, and what comes next of them.
        """
        relation, domains = Correlation(spec), self.space(spec, target).domains
        tiles = (
            Picks(tile_oc=oc, tile_c=c, blocks=1, images=1, rows=1, parts=1)
            for oc in domains["tile_oc"]
            for c in domains["tile_c"]
        )
        if not relation.is_single:
            line = 4 * relation.width
            rows = {oc: at_most(target.l2 // 8 // (line * oc), domains["rows"]) for oc in domains["tile_oc"]}
            points = (t.replace(parts=p, rows=rows[t.tile_oc]) for t in tiles for p in domains["parts"])
            return self.fastest(spec, target, points)
        good = [t for t in tiles if self.is_valid(spec, target, t)]
        good = sorted(good, key=lambda picks: self.cycles_alone(spec, target, picks))[:TILES]
        shared = (t.replace(blocks=b, parts=p) for t in good for b in domains["blocks"] for p in domains["parts"])
        deep = (deepened(relation, target, t, domains) for t in shared if self.is_valid(spec, target, t))
        return self.fastest(spec, target, (picks for picks in deep if picks is not None))

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        lanes, vectors, relation = target.lanes, picks.tile_oc // target.lanes, Correlation(spec)
        blocks = spec.groups * ceildiv(relation.group, picks.tile_oc)
        tasks = ceildiv(blocks // picks.blocks * picks.parts, target.cores)
        each = tasks * picks.blocks
        lines, width = relation.lines, relation.width
        taps_down, channels = math.prod(relation.kernel[:2]), ceildiv(relation.own, picks.parts)
        passes = ceildiv(spec.n, picks.images) * ceildiv(lines, picks.rows)
        work = [Work(tasks, cycles=BEGIN_TASK)]
        for reach in reaches(relation, most_pixels(target, vectors)):
            for size, times in pieces(channels, picks.tile_c):
                numbers, runs = size * reach.taps, each * times * taps_down
                work.append(steps(runs * spec.n * lines * width, numbers, vectors, near=4 * picks.tile_oc))
                checked = width - (reach.end - reach.start)
                begin = BEGIN_RUN * (1 + 2 * (checked > 0))
                begun = passes if relation.is_gathered else spec.n * lines
                work.append(Work(runs * begun, cycles=begin + checked * numbers))
                sums = numbers * vectors
                near = 8 * lanes * sums * relation.is_single  # read and written
                work.append(Work(runs * passes, fmas=sums, loads=sums, stores=sums, near=near, cycles=BEGIN_TILE))
        if relation.is_gathered:
            copies = tasks * channels * spec.n * lines * ceildiv(width, lanes)
            stride = relation.stride[2]
            work.append(Work(copies, loads=stride, shuffles=stride - 1, stores=1, cycles=2))
        shuffles = math.log2(lanes) if relation.outer.layout == "nchw" else 0
        work.append(Work(each * spec.n * lines * width * vectors, loads=1, stores=1, shuffles=shuffles, cycles=1))
        weights = relation.own * relation.taps * picks.tile_oc / picks.parts
        work.append(Work(each * weights, loads=1, stores=1, cycles=1))
        fetches, around = _fetches(relation, target), relation.inner_bytes + relation.outer_bytes
        moved = [
            Stream(relation.outer_bytes / blocks * each, ahead=fetches.outer),
            Stream(
                relation.inner_bytes / spec.groups / picks.parts * tasks,
                ahead=1,
                footprint=around if relation.is_single else 0,
            ),
            Stream(spec.bytes["dst"] / (blocks * picks.parts) * each),
        ]
        return Counts(work, moved)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        relation, most = Correlation(spec), most_pixels(target, picks.tile_oc // target.lanes)
        how = (relation, picks, target.lanes, most, _fetches(relation, target))
        return gradient_program(
            spec,
            target.lanes,
            lambda *tensors: WeightsGradient(*how, *tensors).statement(),
            with_bias=spec.bias and relation.is_swapped,
        )


def _fetches(relation: Correlation, target: Target) -> Fetches:
    """Whether what is put in order comes from beyond the L2 cache, and what is multiplied by it."""
    return Fetches(relation.outer_bytes > target.l2, relation.is_single and relation.inner_bytes > target.l2)
