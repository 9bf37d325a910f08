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

import math
from functools import lru_cache
from typing import Any

from convgen.cpu.correlation import Correlation, add_sums_of_channels
from convgen.cpu.gradient import WeightsGradient, reaches
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, most_pixels, pieces, steps
from convgen.cpu.vector import Block, written
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv, nothing_packed
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.layout import PLAIN
from convgen.problem.spec import ConvSpec


class CpuGradient(Written):
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

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        most = most_pixels(target, picks.tile_oc // target.lanes)

        def statement(src: Any, gradient: Any, parameters: dict[str, Any], dst: Any) -> Any:
            relation, block = Correlation(spec), Block()
            fetches = _fetches(spec, target)
            block.add(WeightsGradient(relation, picks, target.lanes, most, fetches, src, gradient, dst).statement())
            if spec.bias and relation.is_swapped:
                add_sums_of_channels(block, spec, target.lanes, gradient, dst)
            return block.statement()

        return written(Operands(spec), [nothing_packed()], statement)


def _fetches(spec: ConvSpec, target: Target) -> bool:
    """Whether what is put in order comes from beyond the L2 cache."""
    return spec.bytes["src" if Correlation(spec).is_swapped else "residual"] > target.l2


@lru_cache(maxsize=1024)
def _default(schedule: CpuGradient, spec: ConvSpec, target: Target) -> Picks:
    domains, core = schedule.space(spec, target).domains, core_of(target)
    width = Correlation(spec).width

    def rows(tile_oc: int) -> int:
        """As many as leave most of the L2 cache to src and the sums."""
        return max(int(r) for r in domains["rows"] if r == 1 or 4 * tile_oc * r * width <= target.l2 // 8)

    points = [
        Picks(tile_oc=tile_oc, tile_c=tile_c, rows=rows(tile_oc), parts=parts)
        for tile_oc in domains["tile_oc"]
        for tile_c in domains["tile_c"]
        for parts in domains["parts"]
    ]
    good = [picks for picks in points if schedule.reason_against(spec, target, picks) is None]
    return min(good, key=lambda picks: core.cycles(_counts(spec, target, picks)))


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """Of the busiest core."""
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
            work.append(Work(runs * spec.n * lines, cycles=BEGIN_RUN * (1 + 2 * (checked > 0)) + checked * numbers))
            sums = numbers * vectors
            work.append(Work(runs * passes, fmas=sums, loads=sums, stores=sums, cycles=BEGIN_TILE))
    shuffles = math.log2(lanes) if relation.outer.layout == "nchw" else 0
    ordered = tasks * spec.n * lines * width * vectors
    work.append(Work(ordered, loads=1, stores=1, masked_stores=0, shuffles=shuffles, cycles=1))
    weights = relation.own * relation.taps * picks.tile_oc / picks.parts
    work.append(Work(tasks * weights, loads=1, stores=1, cycles=1))
    inner, outer = ("residual", "src") if relation.is_swapped else ("src", "residual")
    moved = [
        Stream(spec.bytes[outer] / blocks * tasks, ahead=_fetches(spec, target)),
        Stream(spec.bytes[inner] / spec.groups / picks.parts * tasks, ahead=1),
        Stream(spec.bytes["dst"] / (blocks * picks.parts) * tasks),
    ]
    return Counts(work, moved)
