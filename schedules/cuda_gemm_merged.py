"""cuda_gemm for groups of few channels: several groups are one, with zero weights between them.

Applies to  what cuda_gemm does, f16, bf16, i8 or accuracy tf32, with groups of at most 32 channels.
Strategy    1. `merge_g` groups are one group of cuda_gemm's; the weights between channels of different groups
               are packed as zeros.
            2. The rest is cuda_gemm's. Multiplying zeros costs matrix units less than tiles that they cannot fill.
Why not     where a NaN or an infinity must not reach the channels of another group: times zero, it is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convgen.deferred import np
from convgen.lowering.schedule import Array, Magnitudes, Picks, require

from .cuda_gemm import CudaGemm

if TYPE_CHECKING:
    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec

#: Channels of the groups that are merged into one, at most, in all.
CHANNELS = 64


class CudaGemmMerged(CudaGemm):
    id, version, transforms = "cuda_gemm_merged", 3, True

    def admits(self, spec: ConvSpec) -> None:
        super().admits(spec)
        require(bool(self.merges(spec)), f"needs groups of at most {CHANNELS // 2} channels")

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        """The zeros between groups add nothing but what a NaN or an infinity times zero is."""
        count, depth, *taps = weights.shape
        channel = np.arange(count)
        merged = np.zeros((count, picks.merge_g, depth, *taps), weights.dtype)
        merged[channel, channel // (count // spec.groups) % picks.merge_g] = weights
        groups = spec.groups // picks.merge_g
        return Magnitudes(spec.with_(groups=groups), src, merged.reshape(count, -1, *taps))

    def merges(self, spec: ConvSpec) -> list[int]:
        most = max(spec.ic, spec.oc) // spec.groups
        return [m for m in (2, 4, 8, 16) if spec.groups % m == 0 and m * most <= CHANNELS]
