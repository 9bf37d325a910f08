"""cuda_gradient for f32: each product as three of TF32, which together are nearly one of f32.

Applies to  what cuda_gradient does, f32, accuracy standard or relaxed.
Strategy    1. Products are cuda_gemm_tf32x3's: each operand is the sum of two numbers of 11 bits, split in registers.
            2. The rest is cuda_gradient's.
Why not     accuracy strict: the error is about 2^-22 of a product, four times that of f32. Nor where infinities
            must come out as such: the second number that an infinity is split into is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convgen.lowering.schedule import Array, Magnitudes, Picks, require

from .cuda_gradient import CudaGradient

if TYPE_CHECKING:
    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec


class CudaGradientTf32x3(CudaGradient):
    id, version, transforms = "cuda_gradient_tf32x3", 1, True

    def admits(self, spec: ConvSpec) -> None:
        require(spec.dtype == "f32", "needs f32")
        require(spec.accuracy in ("standard", "relaxed"), "its error is that of accuracy standard")

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        """Two operands cut off after 22 bits, and the product that is left out: 12 roundings of f32 at most."""
        return Magnitudes(spec, src, 4 * weights)

    def kind(self, spec: ConvSpec) -> str:
        return "tf32x3"
