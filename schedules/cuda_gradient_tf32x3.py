"""cuda_gradient for f32: each product as three of TF32, which together are nearly one of f32.

Applies to  what cuda_gradient does, f32, accuracy standard or relaxed.
Strategy    1. Products are cuda_gemm_tf32x3's: each operand is the sum of two numbers of 11 bits, split in registers.
            2. The rest is cuda_gradient's.
Why not     accuracy strict: the error is about 2^-22 of a product, four times that of f32. Nor where infinities
            must come out as such: the second number that an infinity is split into is NaN.
"""

from __future__ import annotations

from convgen.cuda.tf32x3 import ThreeProducts

from .cuda_gradient import CudaGradient


class CudaGradientTf32x3(ThreeProducts, CudaGradient):
    id, version = "cuda_gradient_tf32x3", 1
