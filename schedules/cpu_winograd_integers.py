"""Winograd convolution of 8-bit integers, exactly.

Applies to  2-D convolutions of i8 and u8 with 3×3 kernels at stride 1, dense, of whole vectors of channels that lie
            innermost, on processors that multiply pairs of 16-bit numbers (AVX512-VNNI).
Strategy    F(4×4, 3×3) in whole numbers (convgen.cpu.winograd_integers): 36 products of 16-bit numbers in place of 144
            of bytes, of which an instruction adds two, not four: half the instructions.
            1. Pack weights transformed, as [oc/t][part of ic and position][ic/2][t] of pairs of 16-bit numbers.
            2. A task is a block of rows of tiles and a part of the output channels. It copies its input with the
               padding, as 16-bit numbers, and transforms that along the columns, then the rows, to
               [position][tile][ic].
            3. Per block of `tile_oc` channels and position, products: `tile_px` tiles × `tile_oc` channels in
               registers, while the next position's weights are fetched into the L2 cache.
            4. Transform back a tile at a time, channels in the lanes: 32-bit sums, times the inverse of 9, shifted.
               Requantise and store. Sums of many channels would be too large for that: it is done of parts, and added.
Why not     small planes with many channels: the transformed weights are eight times larger, and all of them are read
            for a few tiles. Few channels: sums are stored after few products.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

from convgen.cpu.images import src_images
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, BEGIN_TILE, Even, most_pixels, pieces, steps
from convgen.cpu.tasks import Buffers
from convgen.cpu.vector import written
from convgen.cpu.winograd_integers import (
    CHANNELS,
    EXTENT,
    OUTPUTS,
    POSITIONS,
    TAPS,
    Grid,
    Kernel,
    operation_of,
    packed,
    parts_of,
)
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import ConvSpec

#: Rows of tiles of a block; parts of the channels.
ROWS, PARTS = (1, 2, 3, 4, 7, 8, 14), (1, 2, 4, 8)
#: Vector instructions that transform a row of six numbers, and six sums back to four outputs.
ROW_IN, ROW_OUT = 18, 14
#: Those that requantise a vector.
REQUANTISED = 10


class CpuWinogradIntegers(Written):
    id, version = "cpu_winograd_integers", 1
    sums_integers = only_integers = True

    def takes_integers(self, spec: ConvSpec) -> bool:
        return not spec.weights_zero and spec.weights_dtype == "i8"

    def takes_layouts(self, src: str, dst: str) -> bool:
        return {src, dst} <= {"nhwc", "nchw16c"}

    def applies(self, spec: ConvSpec, target: Target) -> None:
        lanes = target.lanes
        require(target.kind == "cpu" and lanes == 16 and "avx512vnni" in target.isa, "needs AVX512-VNNI")
        plain = not spec.transposed and spec.groups == 1 and spec.rank == 2
        require(plain, "needs a dense 2-D convolution that is not transposed")
        require(set(spec.kernel) == {TAPS}, "needs a 3x3 kernel")
        require(set(spec.stride) == set(spec.dilation) == {1}, "needs stride and dilation 1")
        require(spec.ic % lanes == spec.oc % lanes == 0, f"needs multiples of {lanes} channels")
        require(src_images(spec).block % lanes == 0, f"needs src with {lanes} channels innermost")
        require(spec.dst_blocks.size % lanes == 0, f"needs dst with {lanes} channels innermost")
        require(parts_of(spec.ic) > 0, "needs channels of a few equal parts")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes, rows = target.lanes, ceildiv(spec.out_spatial[0], OUTPUTS)
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if lanes * v <= spec.oc],
            tile_px=list(range(1, 15)),
            block_rows=sorted({b for b in (*ROWS, rows) if b <= rows and b <= max(ROWS)}),
            parallel_oc=[p for p in PARTS if p * lanes <= spec.oc],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most, g = most_pixels(target, picks.tile_oc // target.lanes), Grid(spec, picks.block_rows)
        require(picks.tile_px <= most, f"{picks.tile_px} tiles in a register tile, registers for {most}")
        require(picks.tile_px <= g.most_tiles, "fewer tiles in a block than tile_px")
        blocks = ceildiv(spec.oc, picks.tile_oc)
        require(picks.parallel_oc <= blocks, f"{picks.parallel_oc} parts of {blocks} blocks of channels")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return core_of(target).seconds(_counts(spec, target, self.default(spec, target)))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g, core = Operands(spec, integers=True), Grid(spec, picks.block_rows), core_of(target)
        return written(
            ops,
            packed(ops, g, picks.tile_oc),
            lambda *buffers: Kernel(Buffers(*buffers), spec, picks, g, target.lanes, core).statement(),
        )


# ---- the default --------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _default(schedule: CpuWinogradIntegers, spec: ConvSpec, target: Target) -> Picks:
    domains, core = schedule.space(spec, target).domains, core_of(target)
    points = [
        Picks(tile_oc=oc, tile_px=min(most_pixels(target, oc // target.lanes), 14, tiles), block_rows=b, parallel_oc=p)
        for oc, b, p in itertools.product(domains["tile_oc"], domains["block_rows"], domains["parallel_oc"])
        for tiles in [Grid(spec, b).most_tiles]
        if p <= ceildiv(spec.oc, oc)
    ]
    return min(points, key=lambda picks: core.cycles(_counts(spec, target, picks)))


def _counts(spec: ConvSpec, target: Target, picks: Picks) -> Counts:
    """What the busiest core does."""
    g, lanes, operation = Grid(spec, picks.block_rows), target.lanes, operation_of(spec)
    tasks = spec.n * g.rows.count * picks.parallel_oc
    own = ceildiv(tasks, target.cores)
    share = own / tasks
    positions, work = g.parts * POSITIONS, list[Work]()
    size = 2 * POSITIONS * spec.ic * spec.oc
    for vectors, blocks in pieces(spec.oc // lanes, picks.tile_oc // lanes):
        for rows, times in g.rows.sizes:
            for pixels, tiles in Even(rows * g.tile_columns, picks.tile_px).sizes:
                runs = spec.n * times * share * blocks * tiles * positions
                near = 4 * vectors * lanes
                work.append(steps(runs * g.words, pixels, vectors, near=near, fetched=0.5, operation=operation))
                work.append(Work(runs, cycles=BEGIN_RUN, stores=pixels * vectors))
    images = spec.n * share
    tiles_in = images * picks.parallel_oc * g.tile_rows * g.tile_columns * spec.ic / min(CHANNELS, g.lanes)
    columns = OUTPUTS + EXTENT
    work.append(Work(tiles_in, fmas=ROW_IN * columns, stores=EXTENT * columns, cycles=BEGIN_TILE))
    tiles_out = images * g.tile_rows * g.tile_columns * spec.oc / lanes
    rows_back = g.parts * (EXTENT + OUTPUTS)
    work.append(Work(tiles_out, fmas=ROW_OUT * rows_back + REQUANTISED * OUTPUTS**2, cycles=BEGIN_TILE))
    work.append(Work(own, cycles=BEGIN_TASK))
    once, again = min(size, own * size / picks.parallel_oc), max(0.0, own * size / picks.parallel_oc - size)
    streams = [Stream(once, True, 1), Stream(again, ahead=1, footprint=size)]
    data = spec.bytes["src"] + 2 * spec.bytes["dst"]
    streams.append(Stream(data * share, ahead=1, footprint=data))
    between = POSITIONS * g.most_tiles * (2 * g.pitch + 4 * g.parts * picks.tile_oc)  # what passes hand to each other
    if between > target.l2 // 2:
        streams.append(Stream(2 * own * between, footprint=max(between, target.l2 + 1)))
    return Counts(work, streams)
