"""Conversion to bf16 by its own instruction, which TVM has no way to name: it would legalise the type first.

A function of LLVM's language is linked into the code that uses it, and inlined there. The instruction rounds to
nearest, ties to even, keeps NaN, and takes subnormal numbers for zero.
"""

from __future__ import annotations

from typing import Any

from ..deferred import tirx, tvm
from ..hardware.target import Target
from ..lowering.compute import Expr, narrow
from ..problem.spec import ConvSpec

#: Lanes of what is converted at once.
LANES = 16
_NAME = "convgen_bf16x16"
_FUNCTION = f"""
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define <16 x i16> @{_NAME}(<16 x float> %value) {{
  %rounded = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %value)
  %bits = bitcast <16 x bfloat> %rounded to <16 x i16>
  ret <16 x i16> %bits
}}
"""


def rounded(value: Expr) -> Expr:
    """A vector of 16 f32 as the bits of bf16. What it is part of must be a statement of :func:`with_conversion`."""
    return tirx.call_pure_extern("uint16x16", _NAME, value)


def narrowed(value: Expr, dtype: str, lanes: int) -> Expr:
    """f32 as it is stored, as :func:`~convgen.lowering.compute.narrow` has it; vectors as bf16 by the instruction."""
    return rounded(value) if dtype == "bf16" and lanes == LANES else narrow(value, dtype, lanes)


def is_stored(spec: ConvSpec, target: Target) -> bool:
    """Whether a layer stores bf16 on a CPU that has the instruction."""
    return spec.dst_dtype == "bf16" and "avx512bf16" in target.isa and target.lanes == LANES


def with_conversion(statement: Any) -> Any:
    """A statement that may convert."""
    return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(_FUNCTION), statement)
