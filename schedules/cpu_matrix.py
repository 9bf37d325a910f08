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

from convgen.cpu.counted import Counted
from convgen.cpu.matrix import tiles
from convgen.cpu.matrix.geometry import CHANNELS, geometry_of, operands_of
from convgen.cpu.matrix.kernel import Kernel
from convgen.cpu.matrix.panel import LANES
from convgen.cpu.matrix.weights import packed
from convgen.cpu.matrix.work import weight_bytes, work_of_copies, work_of_products, work_of_sums
from convgen.cpu.model import Counts, Stream, Work
from convgen.cpu.product import BEGIN_TASK, finishing
from convgen.cpu.tasks import Buffers
from convgen.cpu.traffic import image_bytes, of_images
from convgen.cpu.vector import written
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv
from convgen.lowering.schedule import Picks, Program, Space, busiest, require
from convgen.problem.spec import ConvSpec

#: Pixels of a group: of a row's part in 1-D, and those of rows at most.
LENGTHS, MOST_PIXELS = (16, 32, 64, 96, 128, 192, 256), 256
BLOCKS, PARTS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32)


class CpuMatrix(Counted):
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

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        points = [
            picks
            for picks in self.space(spec, target)
            if picks.parallel_oc <= 2 * target.cores and self.is_valid(spec, target, picks)  # tasks enough
        ]

        def rank(picks: Picks) -> tuple[float, int, int]:
            return self.cycles(spec, target, picks), picks.parallel_oc, -picks.tile

        return self.fastest(spec, target, points, rank)

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        g = geometry_of(spec, picks.copy_src)
        groups, planes = ceildiv(g.units, picks.tile), spec.n * g.out[0]
        across = ceildiv(groups, picks.block)
        lengths = [picks.block] * (across - 1) + [groups - picks.block * (across - 1)]
        loads = [length for length in lengths for _ in range(min(planes * picks.parallel_oc, 64))]
        share, tasks = busiest(loads, target.cores) / sum(loads), picks.parallel_oc * planes * across
        own = ceildiv(tasks, target.cores)
        work = [*work_of_products(g, target, picks, share), work_of_sums(g, target, picks, share)]
        work += [finishing(spec, LANES, share), Work(own, cycles=BEGIN_TASK)]
        if picks.copy_src:
            work += work_of_copies(g, picks, own)
        weights, ahead = weight_bytes(g) * ceildiv(spec.oc, CHANNELS), picks.order == "oc"
        per_task = weights / picks.parallel_oc
        again = max(0, own - picks.parallel_oc) * per_task if per_task > target.l2 // 2 else 0
        panels = own * g.group_bytes(min(picks.block * picks.tile, g.units)) * picks.copy_src
        streams = [
            Stream(2 * panels, footprint=panels / own),
            Stream(min(weights, own * per_task), weights, ahead and min(1, picks.parallel_oc / own)),
            Stream(again, ahead=ahead, footprint=weights),
            of_images(image_bytes(spec), share),
        ]
        return Counts(work, streams)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g = Operands(spec, integers=True), geometry_of(spec, picks.copy_src)
        return written(ops, packed(ops, g), lambda *buffers: Kernel(Buffers(*buffers), spec, picks, g).statement())
