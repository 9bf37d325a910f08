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

from convgen.cpu.model import Work, core_of
from convgen.cpu.operation import PAIRS, Operation
from convgen.cpu.product import BEGIN_TILE
from convgen.cpu.tasks import Buffers
from convgen.cpu.vector import written
from convgen.cpu.winograd import covered
from convgen.cpu.winograd_blocks import WinogradBlocks
from convgen.cpu.winograd_integers import Grid
from convgen.cpu.winograd_pairs import OUTPUTS, PairsKernel, grid_of, packed
from convgen.hardware.target import Target
from convgen.lowering.compute import Operands
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, require
from convgen.lowering.winograd import magnitudes
from convgen.problem.spec import ConvSpec

#: Vector instructions that transform a row of four numbers, and four sums back to two outputs; a conversion's.
ROW_IN, ROW_OUT, CONVERSION = 4, 4, 2


class CpuWinogradPairs(WinogradBlocks):
    id, version = "cpu_winograd_pairs", 2
    transforms = True

    def instructions(self, spec: ConvSpec) -> tuple[str, ...]:
        return ("avx512bf16",)

    def applies(self, spec: ConvSpec, target: Target) -> None:
        lanes = target.lanes
        require(target.kind == "cpu" and lanes == 16, "needs a CPU with vectors of 512 bits")
        require(spec.dtype in ("f32", "bf16") and spec.accuracy == "bf16", "needs accuracy bf16, and no f16")
        require("avx512bf16" in target.isa, "needs a CPU that multiplies pairs of bf16")
        self.require_tiles(spec, lanes)
        # Where a window lies in nothing but padding the exact result admits no error; a transform has one.
        require(all(covered(spec, a) for a in (0, 1)), "needs windows with half of their taps inside the input")

    def grid(self, spec: ConvSpec, block_rows: int) -> Grid:
        return grid_of(spec, block_rows)

    def operation(self, spec: ConvSpec) -> Operation:
        return PAIRS

    def inputs(self, g: Grid) -> Work:
        rows = g.outputs + g.size
        fmas = ROW_IN * rows + CONVERSION * g.positions
        return Work(1, fmas=fmas, stores=g.size * rows, cycles=BEGIN_TILE)

    def outputs(self, spec: ConvSpec, g: Grid) -> Work:
        return Work(1, fmas=ROW_OUT * (g.size + g.outputs), loads=g.positions, cycles=BEGIN_TILE)

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        return magnitudes(spec, src, weights, {0: OUTPUTS, 1: OUTPUTS})

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g, core = Operands(spec), grid_of(spec, picks.block_rows), core_of(target)
        return written(
            ops,
            packed(ops, g, picks.tile_oc),
            lambda *buffers: PairsKernel(Buffers(*buffers), spec, picks, g, target.lanes, core).statement(),
        )
