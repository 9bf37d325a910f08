"""cuda_gemm for f32: each product as three of TF32, which together are nearly one of f32.

Applies to  what cuda_gemm does, f32, accuracy standard or relaxed.
Strategy    1. Each operand is the sum of two numbers of 11 bits, split in registers.
            2. The product of the two smaller ones is left out (Ootomo and Yokota, Int. J. High Perform.
               Comput. Appl. 36(4), 2022). The rest is cuda_gemm's.
Why not     accuracy strict: the error is about 2^-22 of a product, four times that of f32. Nor where infinities
            must come out as such: the second number that an infinity is split into is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convgen.lowering.schedule import Array, Magnitudes, Picks, require

from .cuda_gemm import CudaGemm

if TYPE_CHECKING:
    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec


class CudaGemmTf32x3(CudaGemm):
    id, version, transforms = "cuda_gemm_tf32x3", 3, True

    def admits(self, spec: ConvSpec) -> None:
        require(spec.dtype == "f32", "needs f32")
        require(spec.accuracy in ("standard", "relaxed"), "its error is that of accuracy standard")

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        """Two operands cut off after 22 bits, and the product that is left out: 12 roundings of f32 at most."""
        return Magnitudes(spec, src, 4 * weights)

    def kind(self, spec: ConvSpec) -> str:
        return "tf32x3"
