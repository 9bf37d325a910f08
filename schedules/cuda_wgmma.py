"""cuda_gemm with Hopper's warpgroup instructions: four warps multiply tiles they read from shared memory.

Applies to  what cuda_gemm does, f16, bf16 and i8, on GPUs with ``wgmma`` (sm_90a).
Strategy    1. A warpgroup's tile is 64 pixels × `tile_n` channels; its sums alone are in registers.
            2. Rows of a step are 128 bytes, swizzled as the instruction reads them; the copies that fill
               them are those of cuda_gemm, made visible by a proxy fence.
Why not     TMA: cuda_wgmma_tma has it, within what its im2col mode encodes. This gathers by 16 bytes whatever
            strides, groups and transposed convolutions ask for, and multiplies no zeros after few channels.
"""

from __future__ import annotations

from convgen.cuda import model, tensorize
from convgen.lowering.compute import ceildiv
from convgen.lowering.schedule import Picks, Space, require
from convgen.problem.dtypes import BYTES

from .cuda_gemm import CudaGemm


class CudaWgmma(CudaGemm):
    id, version = "cuda_wgmma", 1

    def applies(self, spec, target):
        super().applies(spec, target)
        require("wgmma" in target.features, "needs wgmma (sm_90a)")

    def admits(self, spec):
        require(spec.dtype != "f32", "needs f16, bf16 or i8")

    def depth(self, spec):
        return tensorize.ROW // tensorize.VECTOR

    def intrinsic(self, spec, picks):
        return tensorize.wgmma(self.kind(spec), spec.dtype, picks.tile_n)

    def space(self, spec, target):
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

    def valid(self, spec, target, picks):
        require(picks.tile_m == 16 * picks.warps_m, "a warpgroup has 64 pixels")
        need = self.shared_memory(spec, picks)
        require(need <= target.shared_memory, f"{need} bytes of shared memory, {target.shared_memory} there")
        registers = (picks.tile_n // 2 + 64) * 32 * picks.warps_m
        require(registers <= model.REGISTERS, f"{registers} registers in a block, {model.REGISTERS} there")
        steps = ceildiv(self.reduction(spec), picks.tile_k)
        require(picks.split_k <= max(1, steps // 2), "less than two steps for each of split_k")

    def likely(self, spec, target):
        domains = self.space(spec, target).domains
        for tile_m in domains["tile_m"]:
            for tile_n in domains["tile_n"]:
                for stages in (4, 3, 2):
                    for split_k in domains["split_k"]:
                        yield Picks(
                            merge_g=1, tile_m=tile_m, tile_n=tile_n, tile_k=domains["tile_k"][0],
                            warps_m=tile_m // 16, warps_n=1, stages=stages, split_k=split_k,
                        )  # fmt: skip

    def rate(self, spec):
        return 4096 // BYTES[spec.dtype]

    def rows_read(self, picks):
        return picks.warps_m // 4 * (64 + picks.tile_n)

    def step_cycles(self, spec, picks):
        """A warpgroup has all of a core's units; it waits for each step's products to end."""
        return 64 * picks.tile_n * picks.tile_k / self.rate(spec) + 60
