"""How far a kernel may be from the exact result: the bounds' constants, by accuracy class.

The bounds themselves, and what they are for, are in :mod:`convgen.check.bounds`.
"""

from __future__ import annotations

import math

from .spec import ConvSpec

UNIT_ROUNDOFF = 2.0**-24
#: What subnormal numbers count as.
SMALLEST_NORMAL = 2.0**-126
#: What a transform's error is of plain summation's, at most, on data of one scale. ``strict`` admits none.
CLASS_FACTOR = {"strict": 1.0, "standard": 8.0, "relaxed": 64.0, "tf32": 64.0, "bf16": 64.0}
#: What a product of two rounded operands adds to ``c``: those of TF32 are cut off after 11 bits, those of bf16 are
#: rounded to 8.
OPERAND_FACTOR = {"tf32": 2.0**15, "bf16": 2.0**17 + 2.0**8}
#: Rounding errors of the activation itself, in units of ``u`` times its input's magnitude plus 1: an
#: exp, tanh or erf that is a few ulp off near its saturation is that much of the input off in silu or gelu.
ACTIVATION_ERROR = 16.0


def error_factor(spec: ConvSpec, *, transforms: bool = False) -> float:
    """The bound's ``c``: the admitted error in units of ``u * conv(|src|, |weights|)``; 0 for layers of integers.

    Args:
        transforms: the kernel does more than reorder sums; ``c`` is then for data of one scale.
    """
    if spec.dtype == "i8":
        return 0.0
    sums = 8 + 2 * math.sqrt(spec.reduction_length)
    return sums * (CLASS_FACTOR[spec.accuracy] if transforms else 1) + OPERAND_FACTOR.get(spec.accuracy, 0)
