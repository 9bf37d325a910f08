"""Winograd convolution along the row alone: pixels in the vector lanes, all of a tile in registers.

Applies to  dense NCHW convolutions of any rank with 2 to 7 taps along the row at stride 1; any dilation there
            that divides the vector's lanes, or is at least as large; the other axes are direct.
Strategy    F(m, r) along the row (see cpu_winograd) makes m outputs with m + r - 1 products instead of m r.
            1. Pack weights transformed, as [oc/t][rows of the kernel][ic][position][t].
            2. A lane is a tile: the m outputs at the dilation's distance. A task is a block of rows × vectors of
               tiles: its input rows are transformed once into [row][ic][position][lanes], padding by masks.
            3. Keep all positions of `tile_oc` channels in registers; one pass over the kernel's rows and ic.
            4. Transform back in registers; bias, residual, activation; vectors are shuffled back into pixels.
            5. One parallel loop over batch × blocks.
Why not     two axes (cpu_winograd): half the products, but its stages pass through memory, which only many
            channels pay for.
"""

from __future__ import annotations

import itertools
import math

from convgen.cpu.counted import Counted
from convgen.cpu.lanes import pack_rows
from convgen.cpu.model import Counts, Stream, Work
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, finishing, pieces
from convgen.cpu.tasks import Buffers
from convgen.cpu.traffic import busiest_share, image_bytes, of_images
from convgen.cpu.vector import written
from convgen.cpu.winograd_rows import RowGeometry, RowWinogradKernel
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Space, require
from convgen.lowering.winograd import admitted, magnitudes, toom_cook
from convgen.problem.spec import ConvSpec


class CpuWinogradRows(Counted):
    id, version = "cpu_winograd_rows", 1
    transforms = True

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed and spec.groups == 1, "needs groups 1, not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        taps, dilation = spec.kernel[-1], spec.dilation[-1]
        require(taps >= 2 and bool(admitted(spec.accuracy, taps)), "needs 2 to 7 taps along the row")
        require(spec.stride[-1] == 1, "needs stride 1 along the row")
        # Where a window lies in nothing but padding the exact result admits no error; a transform has one.
        if any(spec.padding[-1]):
            require(max(spec.padding[-1]) <= (taps - 1) * dilation, "needs windows that all meet the image")
            require(spec.in_spatial[-1] >= dilation, "needs windows that all meet the image")
        require(bool(_lanes(spec, target)), "needs a dilation that divides the vector, or is no less")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        return Space(
            tile=admitted(spec.accuracy, spec.kernel[-1]),
            lanes=_lanes(spec, target),
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8) if c <= spec.oc],
            tile_px=[1, 2, 3],
            block_px=[1, 2, 4, 8],
            block_rows=[r for r in (1, 2, 4, 7, 8, 14) if (spec.rank > 1 and r <= spec.out_spatial[-2]) or r == 1],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        g = RowGeometry(spec, picks)
        used = picks.tile_oc * g.positions * picks.tile_px + picks.tile_px + 1
        require(used <= target.vector_registers, f"{used} vectors in a tile, {target.vector_registers} registers")
        require(
            picks.block_px == 1 or picks.block_px * picks.tile_px < 2 * g.vectors,
            "block_px exceeds the vectors of a row",
        )

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        """The register tile first, then the block."""
        domains = self.space(spec, target).domains
        base = Picks(tile=2, lanes=domains["lanes"][0], tile_oc=1, tile_px=1, block_px=1, block_rows=1)

        def rank(picks: Picks) -> tuple[bool, float]:
            """Whether the transformed rows crowd the cache, and cycles."""
            panel = 4 * math.prod(RowGeometry(spec, picks).panel)
            return panel > target.l2 // 2, self.cycles(spec, target, picks)

        for names in (("tile", "lanes", "tile_oc"), ("block_rows", "block_px")):
            choices = itertools.product(*(domains[name] for name in names))
            points = [base.replace(**dict(zip(names, choice, strict=True))) for choice in choices]
            base = self.fastest(spec, target, points, rank, otherwise=base)
        return base

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        g, m = RowGeometry(spec, picks), picks.tile
        back, _, inputs = (sum(c != 0 for row in rows for c in row) for rows in toom_cook(m, g.taps))
        blocks_x, blocks_y = ceildiv(g.vectors, g.block_vectors), ceildiv(g.height, picks.block_rows)
        images = spec.n * math.prod(g.planes)
        tasks = images * blocks_x * blocks_y
        share = busiest_share(tasks, target.cores)
        tiles, rows = blocks_x * picks.block_px * share, math.prod(spec.kernel[:-1])
        shuffles = 0 if g.apart else m - 1
        made = images * blocks_y * g.rows_in * math.prod(spec.kernel[:-2]) * spec.ic * tiles * picks.tile_px
        read = g.positions if g.apart else ceildiv(g.reach, g.lanes)
        work = [Work(made, inputs, 2 * read, g.positions, shuffles=g.positions * shuffles, cycles=4)]
        for channels, times in pieces(spec.oc, picks.tile_oc):
            times *= images * g.height * tiles
            fmas, loads = g.positions * picks.tile_px * channels, g.positions * (picks.tile_px + channels)
            work += [
                Work(times * rows * spec.ic, fmas, loads, chain=1),
                Work(times * rows, cycles=BEGIN_RUN),
                Work(times * picks.tile_px * channels, back, stores=m, shuffles=m * shuffles, cycles=4),
                Work(times, cycles=BEGIN_TILE),
            ]
        work += [finishing(spec, g.lanes, share), Work(tasks * share, cycles=BEGIN_TASK)]
        weights = 4 * spec.oc * spec.ic * rows * g.positions
        return Counts(work, [Stream(weights, weights), of_images(image_bytes(spec), share)])

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        return magnitudes(spec, src, weights, {spec.rank - 1: picks.tile})

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, (_, weight_rows, _) = Operands(spec), toom_cook(picks.tile, spec.kernel[-1])
        packed = pack_rows(ops, picks.tile_oc, weight_rows)
        return written(ops, packed, lambda *buffers: RowWinogradKernel(Buffers(*buffers), spec, picks).statement())


def _lanes(spec: ConvSpec, target: Target) -> list[int]:
    """Vector lengths that the dilation suits."""
    dilation = spec.dilation[-1]
    return [n for n in (4, 8, 16) if n <= target.lanes and (dilation >= n or n % dilation == 0)]
