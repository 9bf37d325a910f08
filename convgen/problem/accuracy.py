"""How far a kernel may be from the exact result: the bound's constants, by accuracy class.

The bound itself, and what it is for, is in :mod:`convgen.check.bounds`.
"""

from __future__ import annotations

import math

from .spec import ConvSpec

UNIT_ROUNDOFF = 2.0**-24
CLASS_FACTOR = {"strict": 1.0, "standard": 8.0, "relaxed": 64.0, "tf32": 64.0}
#: What a product of two TF32 operands adds to ``c``: they are cut off after 11 bits.
OPERAND_FACTOR = {"tf32": 2.0**15}
#: Rounding errors of the activation itself, in units of ``u`` times its input's magnitude plus 1: an
#: exp, tanh or erf that is a few ulp off near its saturation is that much of the input off in silu or gelu.
ACTIVATION_ERROR = 16.0


def error_factor(spec: ConvSpec) -> float:
    """The bound's ``c``: the admitted error in units of ``u * conv(|src|, |weights|)``; 0 for layers of integers."""
    if spec.dtype == "i8":
        return 0.0
    sums = CLASS_FACTOR[spec.accuracy] * (8 + 2 * math.sqrt(spec.reduction_length))
    return sums + OPERAND_FACTOR.get(spec.accuracy, 0)
