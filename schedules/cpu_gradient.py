"""Gradient of weights: a register tile of output channels and taps, summed over all images and pixels.

Applies to  the gradient of weights of layers of any rank, transposed ones too, NCHW and NHWC, on CPUs; with few output
            channels per group, most of a vector is idle.
Strategy    1. A task has `tile_oc` output channels, in the vector lanes, and one of `parts` of the input channels, with
               all taps of these: sums that no other task has, so that threads and their number change no bit.
            2. It goes over all images, `rows` output rows at a time. Their gradients of dst are put in order first,
               [pixel][channel]: of NCHW by transposing squares in registers. They stay in the cache. Those of large
               images have been fetched ahead by then.
            3. For each tile of `tile_c` input channels × the taps of a row of the kernel, sums are in registers over
               all pixels of the rows: a step loads the vectors of a pixel's gradients, and multiplies these by a number
               of src for each channel and tap. Rows outside the image are left out; of pixels whose taps lie partly
               outside it, each number is checked.
            4. A task's sums lie in its scratch memory, [channel and tap][output channel], and are stored transposed.
            5. The gradient of bias is the sum of the same gradients of dst, in the tasks of the first part.
            6. The pixels of a pointwise layer are one row, which is taken for several.
            7. Of a transposed layer src and the gradient of dst change places. Its bias is a sum of its own.
Why not     gradients of dst packed as weights are: they are as large as the images, and used once. Images split among
            tasks: their sums would have to be added up afterwards, and channels are tasks enough.
"""

from __future__ import annotations

import itertools
import math

from convgen.cpu.correlation import Correlation, gradient_program
from convgen.cpu.counted import Counted, at_most
from convgen.cpu.gradient import WeightsGradient, reaches
from convgen.cpu.model import Counts, Stream, Work
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, most_pixels, pieces, steps
from convgen.hardware.target import Target
from convgen.lowering.compute import ceildiv
from convgen.lowering.schedule import Picks, Program, Space, require
from convgen.problem.layout import PLAIN
from convgen.problem.spec import ConvSpec


class CpuGradient(Counted):
    id, version, directions = "cpu_gradient", 3, ("weights",)

    def takes_layouts(self, src: str, dst: str) -> bool:
        return src in PLAIN and dst in PLAIN

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        relation = Correlation(spec)
        own, group, lines = relation.own, relation.group, relation.lines
        return Space(
            tile_oc=[target.lanes * v for v in (1, 2, 3, 4) if target.lanes * (v - 1) < group],
            tile_c=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 20, 24, 28) if c <= own],
            rows=sorted({min(lines, 1 << i) for i in range(11)}),
            parts=[p for p in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if p <= own],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most = most_pixels(target, picks.tile_oc // target.lanes)
        sums = picks.tile_c * min(spec.kernel[-1], most)
        require(sums <= most, f"{sums} numbers of a step, registers for {most}")
        require(picks.tile_c <= ceildiv(Correlation(spec).own, picks.parts), "tile_c exceeds the channels of a part")

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        """With as many rows as leave most of the L2 cache to src and the sums."""
        domains, line = self.space(spec, target).domains, 4 * Correlation(spec).width
        rows = {oc: at_most(target.l2 // 8 // (line * oc), domains["rows"]) for oc in domains["tile_oc"]}
        tiles = itertools.product(*(domains[name] for name in ("tile_oc", "tile_c", "parts")))
        points = (Picks(tile_oc=oc, tile_c=c, rows=rows[oc], parts=parts) for oc, c, parts in tiles)
        return self.fastest(spec, target, points)

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        lanes, vectors, relation = target.lanes, picks.tile_oc // target.lanes, Correlation(spec)
        blocks = spec.groups * ceildiv(relation.group, picks.tile_oc)
        tasks = ceildiv(blocks * picks.parts, target.cores)
        lines, width = relation.lines, relation.width
        taps_down, channels = math.prod(relation.kernel[:2]), ceildiv(relation.own, picks.parts)
        passes = spec.n * ceildiv(lines, picks.rows)
        work = [Work(tasks, cycles=BEGIN_TASK)]
        for reach in reaches(relation, most_pixels(target, vectors)):
            for size, times in pieces(channels, picks.tile_c):
                numbers, runs = size * reach.taps, tasks * times * taps_down
                work.append(steps(runs * spec.n * lines * width, numbers, vectors, near=4 * picks.tile_oc))
                checked = width - (reach.end - reach.start)
                begin = BEGIN_RUN * (1 + 2 * (checked > 0))
                work.append(Work(runs * spec.n * lines, cycles=begin + checked * numbers))
                sums = numbers * vectors
                work.append(Work(runs * passes, fmas=sums, loads=sums, stores=sums, cycles=BEGIN_TILE))
        shuffles = math.log2(lanes) if relation.outer.layout == "nchw" else 0
        work.append(Work(tasks * spec.n * lines * width * vectors, loads=1, stores=1, shuffles=shuffles, cycles=1))
        weights = relation.own * relation.taps * picks.tile_oc / picks.parts
        work.append(Work(tasks * weights, loads=1, stores=1, cycles=1))
        moved = [
            Stream(relation.outer_bytes / blocks * tasks, ahead=_fetches(relation, target)),
            Stream(relation.inner_bytes / spec.groups / picks.parts * tasks, ahead=1),
            Stream(spec.bytes["dst"] / (blocks * picks.parts) * tasks),
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


def _fetches(relation: Correlation, target: Target) -> bool:
    """Whether what is put in order comes from beyond the L2 cache."""
    return relation.outer_bytes > target.l2
