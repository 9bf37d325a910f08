"""Transposed convolution of NCHW planes with few channels per group: a row of src gives all output rows it can.

Applies to  strided two-dimensional transposed convolutions of few input channels per group, NCHW: depthwise ones, among
            them the gradient of src of strided depthwise layers. Dilated only where the stride is 1.
Strategy    1. Pack weights as [group and oc][rows of the kernel][ic][taps of a row]. A task has an image's output
               channel, or one of `parallel_oh` parts of its rows; of a single input channel, weights stay in registers.
            2. Output rows fall into as many phases as the stride; a period has one row of each. Which rows of src, and
               which taps, a period's rows meet is the same for all but the first and the last periods: code is written
               out for each kind, nothing is looked up.
            3. Pixels of a row that are a stride apart are neighbours in the lanes: a vector of src is loaded where it
               lies, masked at the edges, and used by all rows and phases that it meets. Sums of a period of rows ×
               all phases × `tile_ow` vectors stay in registers.
            4. Phases are shuffled together, so that epilogue and store work on whole vectors.
Why not     row by row (cpu_transposed_rows): taps are counted, and what rows share is loaded, again for each row; short
            rows take longer to begin than to compute. Many channels per group: weights would be read for each period.
"""

from __future__ import annotations

import itertools
import math

from convgen.cpu.counted import Counted
from convgen.cpu.lanes import columns_of, pack_rows, row_taps, vector_lengths
from convgen.cpu.model import Counts, Stream, Work
from convgen.cpu.periods import Periods
from convgen.cpu.planes import PlanesKernel
from convgen.cpu.product import BEGIN_RUN, BEGIN_TASK, finishing
from convgen.cpu.tasks import Buffers
from convgen.cpu.traffic import busiest_share, enough_parts, image_bytes, of_images
from convgen.cpu.vector import written
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv
from convgen.lowering.schedule import Picks, Program, Space, require
from convgen.problem.spec import ConvSpec

#: Input channels of a group.
MOST_DEPTH = 4
#: Multiply-adds written out, in all tiles together; more take long to compile.
MOST_UNROLLED = 2048
#: Cycles to begin a tile: its sums are few.
BEGIN = 4


class CpuTransposedPlanes(Counted):
    id, version = "cpu_transposed_planes", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        require(spec.layout == "nchw" and spec.rank == 2, "needs NCHW with two axes")
        depth = spec.ic // spec.groups
        require(depth <= MOST_DEPTH, f"needs at most {MOST_DEPTH} input channels per group")
        require(all(1 in pair for pair in zip(spec.stride, spec.dilation, strict=True)), "dilated and strided")
        require(max(spec.stride) <= 4, "needs strides of at most 4")
        small = Picks(lanes=4, tile_ow=1, parallel_oh=1)
        unrolled = _unrolled(spec, small)
        require(unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        width, periods = ceildiv(spec.out_spatial[1], spec.stride[1]), Periods(spec).count
        lanes = vector_lengths(target, width)
        return Space(
            lanes=lanes,
            tile_ow=[v for v in (1, 2, 3, 4) if v == 1 or lanes[0] * (v - 1) < width],
            parallel_oh=[p for p in (1, 2, 4, 8, 16) if p <= periods],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        width = ceildiv(spec.out_spatial[1], spec.stride[1])
        require(picks.lanes * (picks.tile_ow - 1) < width, "tile_ow exceeds the row")
        sums = math.prod(spec.stride) * picks.tile_ow
        most = target.vector_registers - 2
        require(picks.tile_ow == 1 or sums <= most, f"{sums} sums, registers for {most}")
        unrolled = _unrolled(spec, picks)
        small = picks.lanes == 4 and picks.tile_ow == 1
        require(small or unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        space = self.space(spec, target).domains
        parts = enough_parts(space["parallel_oh"], spec.n * spec.oc, target.cores)
        points = itertools.product(space["lanes"], space["tile_ow"])
        return self.fastest(spec, target, [Picks(lanes=n, tile_ow=v, parallel_oh=parts) for n, v in points])

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        rows, depth, lanes = Periods(spec), spec.ic // spec.groups, picks.lanes
        columns, taps = columns_of(spec, lanes, picks.tile_ow), math.prod(spec.kernel)
        tasks = spec.n * spec.oc * picks.parallel_oh
        share = busiest_share(tasks, target.cores)
        vectors = ceildiv(ceildiv(spec.out_spatial[1], columns.phases), lanes)
        periods, sums = spec.n * spec.oc * rows.count * share, math.prod(spec.stride)
        met = len({tap.group for tap in row_taps(spec)})
        # Most vectors of neighbouring pixels lie in two lines of the cache.
        loads = depth * rows.read * met * (1 + lanes / target.lanes) + (depth > 1) * depth * taps
        shuffles, rest = sums * math.log2(columns.phases), spec.out_spatial[1] % lanes > 0
        work = [
            Work(periods * vectors, fmas=depth * taps, loads=loads, stores=sums, shuffles=shuffles),
            Work(periods * columns.count, cycles=BEGIN + BEGIN_RUN * (depth > 1)),
            Work(periods * spec.stride[0] * rest, masked_stores=1),
            Work(tasks * share, loads=taps, cycles=BEGIN_TASK / 4),
            finishing(spec, lanes, share),
        ]
        return Counts(
            work, [Stream(spec.bytes["weights"], weights=spec.bytes["weights"]), of_images(image_bytes(spec), share)]
        )

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec)
        packed = pack_rows(ops, 1)
        return written(ops, packed, lambda *buffers: PlanesKernel(Buffers(*buffers), spec, picks).statement())


def _unrolled(spec: ConvSpec, picks: Picks) -> int:
    """Multiply-adds that are written out."""
    tiles = len(columns_of(spec, picks.lanes, picks.tile_ow).runs) * len(Periods(spec).runs)
    return int(tiles * math.prod(spec.kernel) * picks.tile_ow)
