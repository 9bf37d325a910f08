"""Convolution with pixels in the vector lanes: NCHW rows in registers, masks instead of padding.

Applies to  NCHW convolutions of any rank that are not transposed: 1×1 products with at least a vector of pixels, and
            those with few channels per group: depthwise with any multiplier, grouped, and dense layers with few
            products per output (stems).
Strategy    1. Pack weights as [group][oc/t][rows of the kernel][ic][k][t]: in the order they are used.
            2. A vector is `lanes` neighbouring output pixels of a row. Keep a tile of `tile_oc` channels × `tile_oh`
               rows × `tile_ow` vectors in registers. Nothing is copied: input rows are loaded where they lie, those
               above and below the image are left out, and edges are masked (code of their own).
            3. Loop over the input rows, then over the group's input channels. What a row's taps read is loaded once
               and used by all rows and channels of the tile; weights are broadcast.
            4. Where there is a stride, as many vectors are loaded and shuffled apart by phase.
            5. One parallel loop over batch × groups × `parallel_oc` parts of the channels × `parallel_oh` parts of the
               rows of tiles (in 1-D of the tiles). A task's outer loop is that over tiles of channels, so that a
               channel's stores follow each other: planes of dst lie far apart.
            6. A 1×1 product is over flat pixels; of a strided one, over a copy of those it reads. `copy_src`: a task's
               pixels are first copied to [tile][ic][pixel], where many tiles of channels read them again: rows lie far
               apart, each in a page of its own.
Why not     a padded copy: for small planes the copying costs more than the arithmetic. Channels in the lanes
            (cpu_direct): better with many channels, or few pixels.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from convgen.cpu.counted import Counted
from convgen.cpu.flat_pixels import PARTS, flattened, is_product, product_counts, product_points
from convgen.cpu.lanes import MOST_TAPS, RowProduct, columns_of, pack_rows, vector_lengths
from convgen.cpu.model import Counts
from convgen.cpu.rows import row_counts, statement, tiles_of_pixels, unrolled
from convgen.cpu.traffic import enough_parts
from convgen.cpu.vector import written
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands, ceildiv
from convgen.lowering.schedule import Picks, Program, Space, require
from convgen.problem.dtypes import RANGES
from convgen.problem.spec import ConvSpec

#: Multiply-adds written out in all tiles together, in any and in the default; more take long to compile.
MOST_UNROLLED, MOST_DEFAULT = 2048, 1024
#: Vectors of pixels in a tile of the default: more leave no registers for what they read.
ROW_SUMS = 16
#: Taps from which products, and not memory, take a 1-D depthwise layer's time. With fewer, half as wide vectors are
#: faster: half as many lie in two lines of the cache.
LONG = 8


class CpuRows(Counted):
    id, version = "cpu_rows", 5
    merged = ("cpu_masked", "cpu_gemm")

    def takes_integers(self, spec: ConvSpec) -> bool:
        """Sums are of numbers as they are stored; stored in 8 bits, as they become i32 on the way to these alone."""
        return not spec.src_zero and not spec.weights_zero and spec.dst_dtype in RANGES

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        if is_product(spec, target):
            return
        few = spec.oc // spec.groups <= 32 or spec.reduction_length <= 160
        why = f"needs a 1×1 kernel and {target.lanes} pixels, 32 output channels per group, or 160 products per output"
        require(few, why)
        most = 8 if spec.oc // spec.groups <= 4 else 4  # more shuffles than cpu_direct has broadcasts
        require(spec.stride[-1] <= most, f"needs a stride along the row of at most {most}")
        long = spec.kernel[-1] > MOST_TAPS
        require(not long or spec.stride[-1] == 1, f"needs at most {MOST_TAPS} taps along the row, or stride 1")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        inner, per_group = flattened(spec, target), spec.oc // spec.groups
        rows, width = math.prod(inner.out_spatial[:-1]), inner.out_spatial[-1]
        lanes = vector_lengths(target, width)
        tall = inner.rank > 1 and inner.dilation[-2] == 1
        tile_oc = [c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14, 16) if c <= per_group]
        tile_ow = [v for v in (1, 2, 3, 4, 6) if v == 1 or lanes[0] * (v - 1) < width]
        parts = {1 << i for i in range(10) if 1 << i <= (rows if inner.rank > 1 else ceildiv(width, lanes[0]))}
        if inner.rank == 1:  # each tile a task, too
            parts |= {ceildiv(width, n * v) for n in lanes for v in tile_ow}
        return Space(
            lanes=lanes,
            tile_oc=tile_oc,
            tile_oh=[h for h in (1, 2, 3, 4, 5, 6, 7, 8) if h == 1 or (tall and h <= inner.out_spatial[-2])],
            tile_ow=tile_ow,
            parallel_oc=sorted({*(p for p in PARTS if p <= per_group), *(ceildiv(per_group, c) for c in tile_oc)}),
            parallel_oh=sorted(parts),
            copy_src=[False, True] if is_product(spec, target) else [False],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        inner, sums = flattened(spec, target), picks.tile_oc * picks.tile_oh * picks.tile_ow
        # Beside the sums: what they read, and a weight, or two where products follow each other less closely.
        used = sums + picks.tile_ow * inner.stride[-1] + (1 if is_product(spec, target) else 2)
        require(sums == 1 or used <= target.vector_registers, f"{used} vectors, {target.vector_registers} registers")
        require(picks.lanes * (picks.tile_ow - 1) < inner.out_spatial[-1], "tile_ow exceeds the row")
        require(picks.parallel_oc <= ceildiv(spec.oc // spec.groups, picks.tile_oc), "fewer tiles than parallel_oc")
        require(picks.parallel_oh <= tiles_of_pixels(inner, picks), "fewer tiles of pixels than parallel_oh")
        products = unrolled(inner, picks)
        require(products <= MOST_UNROLLED or sums == 1, f"{products} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        """The fastest tile; then tasks enough."""
        space, per_group = self.space(spec, target).domains, spec.oc // spec.groups
        if is_product(spec, target):
            return self.fastest(spec, target, product_points(spec, target, space))
        small = Picks(**{name: min(values) for name, values in space.items()})
        most, widths = target.vector_registers - 2, space["lanes"][-2:]
        apart, row_sums = (2 * spec.stride[-1], 8) if spec.stride[-1] > 1 else (1, ROW_SUMS)
        if spec.rank == 1 and spec.ic == spec.groups == spec.oc and spec.kernel[-1] < LONG:
            widths, row_sums = widths[:1], 4
        tiles = itertools.product(widths, space["tile_oc"], space["tile_oh"], space["tile_ow"])
        points = [
            small.replace(lanes=n, tile_oc=c, tile_oh=h, tile_ow=v, parallel_oc=ceildiv(per_group, c))
            for n, c, h, v in tiles
            if c * h * v + v * apart <= most and h * v <= row_sums
        ]
        picks = self.fastest(
            spec,
            target,
            points,
            lambda picks: self.cycles_alone(spec, target, picks),
            admits=lambda picks: unrolled(spec, picks) <= MOST_DEFAULT,
            otherwise=small.replace(parallel_oc=per_group),
        )
        parts = [p for p in space["parallel_oh"] if p <= tiles_of_pixels(spec, picks)]
        tasks = spec.n * spec.groups * picks.parallel_oc
        return picks.replace(parallel_oh=enough_parts(parts, tasks, target.cores))

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        return (product_counts if is_product(spec, target) else row_counts)(spec, target, picks)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, inner = Operands(spec), flattened(spec, target)
        columns = columns_of(inner, picks.lanes, picks.tile_ow)

        def whole(*tensors: Any) -> Any:
            return statement(spec, picks, RowProduct(inner, columns, picks.tile_oc, spec.dtypes["src"], *tensors))

        return written(ops, pack_rows(ops, picks.tile_oc), whole)
