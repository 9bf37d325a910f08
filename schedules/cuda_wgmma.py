"""cuda_gemm with Hopper's warpgroup instructions: four warps multiply tiles they read from shared memory.

Applies to  what cuda_gemm does, f16, bf16 and i8, on GPUs with ``wgmma`` (sm_90a).
Strategy    1. A warpgroup's tile is 64 pixels × `tile_n` channels; only its sums are in registers.
            2. Rows of a step are 128 bytes, swizzled as the instruction reads them; the copies that fill
               them are those of cuda_gemm, made visible to the instruction by a proxy fence.
Why not     TMA: cuda_wgmma_tma uses it, for what its im2col mode can encode. This schedule gathers by 16 bytes,
            so that any stride, group and transposed convolution goes, and few channels are not filled up with
            zeros that are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from convgen.cuda import model, tensorize
from convgen.lowering.compute import ceildiv
from convgen.lowering.schedule import Picks, Space, require
from convgen.problem.dtypes import BYTES

from .cuda_gemm import OTHER_REGISTERS, CudaGemm

if TYPE_CHECKING:
    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec

#: Pixels of a warpgroup's tile, 16 for each of its four warps.
WARPGROUP_ROWS = 64
#: Cycles from the end of a step's products until the next ones begin.
WAIT_CYCLES = 60


class CudaWgmma(CudaGemm):
    id, version = "cuda_wgmma", 2

    def applies(self, spec: ConvSpec, target: Target) -> None:
        super().applies(spec, target)
        require("wgmma" in target.features, "needs wgmma (sm_90a)")

    def admits(self, spec: ConvSpec) -> None:
        require(spec.dtype != "f32", "needs f16, bf16 or i8")

    def depth(self, spec: ConvSpec) -> int:
        return tensorize.ROW // tensorize.VECTOR

    def intrinsic(self, spec: ConvSpec, picks: Picks) -> str:
        return tensorize.wgmma(self.kind(spec), spec.dtype, picks.tile_n)

    def space(self, spec: ConvSpec, target: Target) -> Space:
        oc = spec.oc // spec.groups
        reduction, step = self.reduction(spec), tensorize.ROW // BYTES[spec.dtype]
        return Space(
            merge_g=[1],
            tile_m=[64, 128, 256],
            tile_n=[n for n in (32, 64, 96, 128, 192, 256) if n < 2 * max(32, oc)],
            tile_k=[step],
            warps_m=[4, 8, 16],
            warps_n=[1],
            stages=[2, 3, 4, 5, 6],
            split_k=[s for s in (1, 2, 4, 8, 16) if s == 1 or reduction >= 4 * s * step],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        require(picks.tile_m == 16 * picks.warps_m, f"a warpgroup has {WARPGROUP_ROWS} pixels")
        need = self.shared_memory(spec, picks)
        require(need <= target.shared_memory, f"{need} bytes of shared memory, at most {target.shared_memory}")
        registers = self.registers(spec, picks) * 32 * picks.warps_m
        require(registers <= model.REGISTERS, f"{registers} registers in a block, at most {model.REGISTERS}")
        steps = ceildiv(self.reduction(spec), picks.tile_k)
        require(picks.split_k <= max(1, steps // 2), "less than two steps for each part of split_k")
        steps = ceildiv(steps, picks.split_k)
        require(picks.stages <= max(2, steps), f"{picks.stages} stages, there are {steps} steps")

    def likely(self, spec: ConvSpec, target: Target) -> Iterator[Picks]:
        domains = self.space(spec, target).domains
        for tile_m in domains["tile_m"]:
            for tile_n in domains["tile_n"]:
                for stages in (4, 3, 2):
                    for split_k in domains["split_k"]:
                        yield Picks(
                            merge_g=1, tile_m=tile_m, tile_n=tile_n, tile_k=domains["tile_k"][0],
                            warps_m=tile_m // 16, warps_n=1, stages=stages, split_k=split_k,
                        )  # fmt: skip

    def registers(self, spec: ConvSpec, picks: Picks) -> int:
        """Registers of a thread, estimated: its sums, and others; operands stay in shared memory."""
        sums: int = picks.tile_n // 2
        return sums + OTHER_REGISTERS

    def rate(self, spec: ConvSpec, target: Target) -> float:
        return dict(target.rates.wgmma)[self.kind(spec)]

    def rows_read(self, picks: Picks) -> int:
        rows: int = picks.warps_m // 4 * (WARPGROUP_ROWS + picks.tile_n)
        return rows

    def step_cycles(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Cycles of a warpgroup's products, with all of a core's units; it waits until those of a step have ended."""
        return self.product_cycles(spec, target, picks) + WAIT_CYCLES

    def product_cycles(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Cycles of a warpgroup's products in a step."""
        macs: int = WARPGROUP_ROWS * picks.tile_n * picks.tile_k
        return macs / self.rate(spec, target)
