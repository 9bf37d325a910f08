"""Winograd convolution by products of pairs of bf16.

Applies to  2-D convolutions of f32 or bf16 with accuracy `bf16`, 3×3 at stride 1, dense, of whole vectors of channels
            that lie innermost, on processors that multiply pairs of bf16 (AVX512-BF16).
Strategy    F(2×2, 3×3) (convgen.cpu.winograd_pairs): 16 products of bf16 in place of 36, of which an instruction adds
            two.
            1. Pack weights transformed, as [oc/t][position][ic/2][t] of pairs of bf16.
            2. A task is a block of rows of tiles and a part of the output channels. It copies its input with the
               padding, transforms that in f32 along the columns, then the rows, and rounds it to [position][tile][ic].
            3. Per block of `tile_oc` channels and position, products: `tile_px` tiles × `tile_oc` channels in
               registers, while the next position's weights are fetched into the L2 cache.
            4. Transform back a tile at a time, channels in the lanes; bias, residual, activation, store.
Accuracy    of what is multiplied as of what cpu_direct multiplies: the rounding of sums of four pixels is at most 1.6
            times as large beside what comes out.
Why not     few channels: sums are stored after few products. cpu_winograd, whose larger tiles of f32 need hardly more
            instructions, is more accurate; its weights take four and a half times as much memory.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

from convgen.cpu.images import src_images
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.operation import PAIRS
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, Even, finishing, most_pixels, pieces, steps
from convgen.cpu.tasks import Buffers
from convgen.cpu.vector import written
from convgen.cpu.winograd import covered
from convgen.cpu.winograd_integers import TAPS
from convgen.cpu.winograd_pairs import OUTPUTS, PairsKernel, grid_of, packed
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Space, Written, require
from convgen.lowering.winograd import magnitudes
from convgen.problem.spec import ConvSpec

#: Rows of tiles of a block; parts of the channels.
ROWS, PARTS = (1, 2, 3, 4, 7, 8, 14), (1, 2, 4, 8)
#: Vector instructions that transform a row of four numbers, and four sums back to two outputs; a conversion's.
ROW_IN, ROW_OUT, CONVERSION = 4, 4, 2


class CpuWinogradPairs(Written):
    id, version = "cpu_winograd_pairs", 1
    transforms = True

    def instructions(self, spec: ConvSpec) -> tuple[str, ...]:
        return ("avx512bf16",)

    def takes_layouts(self, src: str, dst: str) -> bool:
        return {src, dst} <= {"nhwc", "nchw16c"}

    def applies(self, spec: ConvSpec, target: Target) -> None:
        lanes = target.lanes
        require(target.kind == "cpu" and lanes == 16, "needs a CPU with vectors of 512 bits")
        require(spec.dtype in ("f32", "bf16") and spec.accuracy == "bf16", "needs accuracy bf16, and no f16")
        require("avx512bf16" in target.isa, "needs a CPU that multiplies pairs of bf16")
        plain = not spec.transposed and spec.groups == 1 and spec.rank == 2
        require(plain, "needs a dense 2-D convolution that is not transposed")
        require(set(spec.kernel) == {TAPS}, "needs a 3x3 kernel")
        require(set(spec.stride) == set(spec.dilation) == {1}, "needs stride and dilation 1")
        require(spec.ic % lanes == spec.oc % lanes == 0, f"needs multiples of {lanes} channels")
        require(src_images(spec).block % lanes == 0, f"needs src with {lanes} channels innermost")
        require(spec.dst_blocks.size % lanes == 0, f"needs dst with {lanes} channels innermost")
        # Where a window lies in nothing but padding the exact result admits no error; a transform has one.
        require(all(covered(spec, a) for a in (0, 1)), "needs windows with half of their taps inside the input")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, rows = target.lanes, ceildiv(spec.out_spatial[0], OUTPUTS)
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if lanes * v <= spec.oc],
            tile_px=list(range(1, 15)),
            block_rows=sorted({b for b in (*ROWS, rows) if b <= rows and b <= max(ROWS)}),
            parallel_oc=[p for p in PARTS if p * lanes <= spec.oc],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most, g = most_pixels(target, picks.tile_oc // target.lanes), grid_of(spec, picks.block_rows)
        require(picks.tile_px <= most, f"{picks.tile_px} tiles in a register tile, registers for {most}")
        require(picks.tile_px <= g.most_tiles, "fewer tiles in a block than tile_px")
        blocks = ceildiv(spec.oc, picks.tile_oc)
        require(picks.parallel_oc <= blocks, f"{picks.parallel_oc} parts of {blocks} blocks of channels")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        return magnitudes(spec, src, weights, {0: OUTPUTS, 1: OUTPUTS})

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g, core = Operands(spec), grid_of(spec, picks.block_rows), core_of(target)
        return written(
            ops,
            packed(ops, g, picks.tile_oc),
            lambda *buffers: PairsKernel(Buffers(*buffers), spec, picks, g, target.lanes, core).statement(),
        )


# ---- the default --------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _default(schedule: CpuWinogradPairs, spec: ConvSpec, target: Target) -> Picks:
    domains, core = schedule.space(spec, target).domains, core_of(target)
    points = [
        Picks(tile_oc=oc, tile_px=min(most_pixels(target, oc // target.lanes), 14, tiles), block_rows=b, parallel_oc=p)
        for oc, b, p in itertools.product(domains["tile_oc"], domains["block_rows"], domains["parallel_oc"])
        for tiles in [grid_of(spec, b).most_tiles]
        if p <= ceildiv(spec.oc, oc)
    ]
    return min(points, key=lambda picks: core.cycles(_counts(spec, target, picks)))


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    g, lanes = grid_of(spec, picks.block_rows), target.lanes
    tasks = spec.n * g.rows.count * picks.parallel_oc
    own = ceildiv(tasks, target.cores)
    share, work = own / tasks, list[Work]()
    size = 2 * g.positions * spec.ic * spec.oc
    for vectors, blocks in pieces(spec.oc // lanes, picks.tile_oc // lanes):
        for rows, times in g.rows.sizes:
            for pixels, tiles in Even(rows * g.tile_columns, picks.tile_px).sizes:
                runs = spec.n * times * share * blocks * tiles * g.positions
                near = 4 * vectors * lanes
                work.append(steps(runs * g.words, pixels, vectors, near=near, fetched=0.5, operation=PAIRS))
                work.append(Work(runs, cycles=BEGIN_RUN, stores=pixels * vectors))
    images = spec.n * share
    tiles_in = images * picks.parallel_oc * g.tile_rows * g.tile_columns * spec.ic / lanes
    rows_in = g.outputs + g.size
    converted = CONVERSION * g.positions
    work.append(Work(tiles_in, fmas=ROW_IN * rows_in + converted, stores=g.size * rows_in, cycles=BEGIN_TILE))
    tiles_out = images * g.tile_rows * g.tile_columns * spec.oc / lanes
    work.append(Work(tiles_out, fmas=ROW_OUT * (g.size + g.outputs), loads=g.positions, cycles=BEGIN_TILE))
    work += [finishing(spec, lanes, share), Work(own, cycles=BEGIN_TASK)]
    once, again = min(size, own * size / picks.parallel_oc), max(0.0, own * size / picks.parallel_oc - size)
    streams = [Stream(once, True, 1), Stream(again, ahead=1, footprint=size)]
    data = spec.bytes["src"] + (2 + spec.residual) * spec.bytes["dst"]
    streams.append(Stream(data * share, ahead=1, footprint=data))
    between = g.positions * g.most_tiles * (2 * g.pitch + 4 * picks.tile_oc)  # what passes hand to each other
    if between > target.l2 // 2:
        streams.append(Stream(2 * own * between, footprint=max(between, target.l2 + 1)))
    return Counts(work, streams)
