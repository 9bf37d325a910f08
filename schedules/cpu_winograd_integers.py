"""Winograd convolution of 8-bit integers, exactly.

Applies to  2-D convolutions of i8 and u8 with 3×3 kernels at stride 1, dense, of whole vectors of channels that lie
            innermost, on processors that multiply pairs of 16-bit numbers (AVX512-VNNI).
Strategy    F(4×4, 3×3) in whole numbers (convgen.cpu.winograd_integers): 36 products of 16-bit numbers in place of 144
            of bytes, of which an instruction adds two, not four: half the instructions.
            1. Pack weights transformed, as [oc/t][position and part of ic][ic/2][t] of pairs of 16-bit numbers.
            2. A task is a block of rows of tiles and a part of the output channels. It copies its input with the
               padding, as 16-bit numbers, and transforms that along the columns, then the rows, to
               [position][tile][ic].
            3. Per block of `tile_oc` channels and position, products: `tile_px` tiles × `tile_oc` channels in
               registers, while the next position's weights are fetched into the L2 cache.
            4. Transform back a tile at a time, channels in the lanes: 32-bit sums, times the inverse of 9, shifted.
               Requantise and store. Sums of many channels may be too large for that: unless the weights are small, it
               is done of parts, and added.
Why not     small planes with many channels: the transformed weights are eight times larger, and all of them are read
            for a few tiles. Few channels: sums are stored after few products.
"""

from __future__ import annotations

from convgen.cpu.model import Work, core_of
from convgen.cpu.operation import Operation
from convgen.cpu.product import BEGIN_TILE
from convgen.cpu.tasks import Buffers
from convgen.cpu.vector import written
from convgen.cpu.winograd_blocks import WinogradBlocks
from convgen.cpu.winograd_integers import Grid, Kernel, operation_of, packed, parts_of
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands
from convgen.lowering.schedule import Picks, Program, require
from convgen.problem.spec import ConvSpec

#: Vector instructions that transform a row of six numbers, and six sums back to four outputs.
ROW_IN, ROW_OUT = 18, 14
#: Those that requantise a vector.
REQUANTISED = 10


class CpuWinogradIntegers(WinogradBlocks):
    id, version = "cpu_winograd_integers", 3
    sums_integers = only_integers = True

    def takes_integers(self, spec: ConvSpec) -> bool:
        return not spec.weights_zero and spec.weights_dtype == "i8"

    def applies(self, spec: ConvSpec, target: Target) -> None:
        lanes = target.lanes
        require(target.kind == "cpu" and lanes == 16 and "avx512vnni" in target.isa, "needs AVX512-VNNI")
        self.require_tiles(spec, lanes)
        require(parts_of(spec.ic) > 0, "needs channels of a few equal parts")

    def grid(self, spec: ConvSpec, block_rows: int) -> Grid:
        return Grid(spec, block_rows)

    def operation(self, spec: ConvSpec) -> Operation:
        return operation_of(spec)

    def inputs(self, g: Grid) -> Work:
        rows = g.outputs + g.size
        return Work(1, fmas=ROW_IN * rows, stores=g.size * rows, cycles=BEGIN_TILE)

    def outputs(self, spec: ConvSpec, g: Grid) -> Work:
        rows = g.parts * (g.size + g.outputs)
        return Work(1, fmas=ROW_OUT * rows + REQUANTISED * g.outputs**2, cycles=BEGIN_TILE)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g, core = Operands(spec, integers=True), Grid(spec, picks.block_rows), core_of(target)
        permutes = "avx512vbmi" in target.isa
        return written(
            ops,
            packed(ops, g, picks.tile_oc),
            lambda *buffers: Kernel(Buffers(*buffers), spec, picks, g, target.lanes, core, permutes).statement(),
        )
