"""cuda_gemm for groups of few channels: several groups are one, with zero weights between them.

Applies to  what cuda_gemm does, f16, bf16, i8 or accuracy tf32, with groups of at most 32 channels.
Strategy    1. `merge_g` groups are one of cuda_gemm's, packed with zeros where they do not meet.
            2. The rest is cuda_gemm's. Matrix units that multiply zeros cost less than ones that wait for
               whole tiles.
Why not     where NaN or an infinity must not reach the channels of another group.
"""

from __future__ import annotations

from convgen.lowering.schedule import require

from .cuda_gemm import CudaGemm

#: Channels of merged groups, at most.
CHANNELS = 64


class CudaGemmMerged(CudaGemm):
    id, version, transforms = "cuda_gemm_merged", 2, True

    def admits(self, spec):
        super().admits(spec)
        require(bool(self.merges(spec)), f"needs groups of at most {CHANNELS // 2} channels")

    def merges(self, spec):
        most = max(spec.ic, spec.oc) // spec.groups
        return [m for m in (2, 4, 8, 16) if spec.groups % m == 0 and m * most <= CHANNELS]
