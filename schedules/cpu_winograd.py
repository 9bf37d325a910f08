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

from collections.abc import Iterator
from functools import lru_cache

from convgen.cpu.counted import Counted
from convgen.cpu.model import Core, Counts, core_of
from convgen.cpu.product import Even, most_pixels
from convgen.cpu.tasks import Buffers
from convgen.cpu.vector import written
from convgen.cpu.winograd import Grid, block_choices, covered, lanes_of, outputs_of, tile_sizes, transformed_axes
from convgen.cpu.winograd_kernel import WinogradKernel, packed
from convgen.cpu.winograd_work import packing_counts, winograd_counts, work_of_products
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Space, require
from convgen.lowering.winograd import magnitudes
from convgen.problem.spec import ConvSpec

#: Planes of a block, and tiles of a register tile at most.
PLANES, MOST_TILES = (1, 2, 4), 14


class CpuWinograd(Counted):
    id, version = "cpu_winograd", 9
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
            tile_px=list(range(1, MOST_TILES + 1)),
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

    def core(self, spec: ConvSpec, target: Target) -> Core:
        return core_of(target, lanes_of(spec, target))

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        return self.fastest(spec, target, self.points(spec, target))

    def repacked(self, spec: ConvSpec, target: Target) -> tuple[Picks, float]:
        return _repacked(self, spec, target)

    def points(self, spec: ConvSpec, target: Target) -> Iterator[Picks]:
        """The best register tile of each block, where tasks are few in both orders."""
        domains, lanes, core = self.space(spec, target).domains, lanes_of(spec, target), self.core(spec, target)
        base = Picks(tile=0, tile_oc=0, tile_px=0, block_rows=0, block_planes=1, parallel="rows")
        for m in domains["tile"]:
            for block in block_choices(spec, m):
                tiles = []
                for tile_oc in domains["tile_oc"]:
                    picks = base.replace(tile=m, tile_oc=tile_oc, block_rows=block)
                    g, most = Grid(spec, target, picks), min(MOST_TILES, most_pixels(target, tile_oc // lanes))
                    picks = picks.replace(tile_px=Even(g.most_tiles, most).full)
                    tiles.append((core.cycles(Counts(work_of_products(target, g, picks, g.planes))), picks))
                fastest = min(cycles for cycles, _ in tiles)
                for picks in (picks for cycles, picks in tiles if cycles < 1.05 * fastest):
                    for planes in domains["block_planes"]:
                        tasks = spec.n * spec.groups * g.groups.count * ceildiv(g.planes, planes)
                        few = target.cores > 1 and tasks < 4 * target.cores
                        for parallel in domains["parallel"] if few else ["rows"]:
                            yield picks.replace(block_planes=planes, parallel=parallel)

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        return winograd_counts(spec, target, self.core(spec, target), picks)

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        tiles = {axis: outputs_of(spec, axis, picks.tile) for axis in transformed_axes(spec)}
        return magnitudes(spec, src, weights, tiles)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g, core = Operands(spec), Grid(spec, target, picks), self.core(spec, target)
        return written(
            ops,
            packed(ops, g, picks.tile_oc),
            lambda *buffers: WinogradKernel(Buffers(*buffers), spec, picks, g, core).statement(),
        )


@lru_cache(maxsize=1024)
def _repacked(schedule: CpuWinograd, spec: ConvSpec, target: Target) -> tuple[Picks, float]:
    """The best point with the time of packing, and the seconds of both."""
    core = schedule.core(spec, target)

    def cycles(picks: Picks) -> float:
        return schedule.cycles(spec, target, picks) + core.cycles(packing_counts(spec, target, picks))

    best = schedule.fastest(spec, target, schedule.points(spec, target), cycles)
    return best, cycles(best) / core.hertz
