"""cuda_gemm for f32: each product as three of TF32, which together are nearly one of f32.

Applies to  what cuda_gemm does, f32, accuracy standard or relaxed.
Strategy    1. Each operand is the sum of two numbers of 11 bits, split in registers.
            2. The product of the two smaller ones is left out (Ootomo and Yokota, Int. J. High Perform.
               Comput. Appl. 36(4), 2022). The rest is cuda_gemm's.
Why not     accuracy strict: the error is about 2^-22 of a product, four times that of f32. Nor where infinities
            must come out as such: the second number that an infinity is split into is NaN.
"""

from __future__ import annotations

from convgen.cuda.tf32x3 import ThreeProducts

from .cuda_gemm import CudaGemm


class CudaGemmTf32x3(ThreeProducts, CudaGemm):
    id, version = "cuda_gemm_tf32x3", 3
