"""What ONNX Runtime computes, and how far from it a kernel may be.

Bounds (rounding analysis of a dot product; Higham, *Accuracy and Stability of Numerical Algorithms*,
2nd ed., §3; for the square root, Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019): element-wise

    |dst - reference| <= L * c * u * (conv(|src|, |weights|) + |bias| + |residual|) + the activation's own error

with ``u = 2**-24``, ``K`` products per element, ``L`` the activation's slope and

    ``c = f * (8 + 2 * sqrt(K))``,  ``f = 1`` (strict), ``8`` (standard), ``64`` (relaxed),

and ``2**15`` more than relaxed for tf32: two operands cut off after 11 bits.

A layer stored as f16 or bf16 is computed in f32 and rounded once: two results that far apart may round
to neighbours, so the bound grows by twice the rounding of what may come out.

Layers of i8 are exact: every element must be ONNX Runtime's, on data whose sums take the whole range of types,
saturate here and there, and on data half of whose outputs are ties.

On small integers every partial sum is exact, so a schedule that only reorders sums must match bit
for bit; one that transforms (Winograd) is held to its bound there too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..problem import dtypes
from ..problem.accuracy import ACTIVATION_ERROR, UNIT_ROUNDOFF, error_factor
from ..problem.dtypes import UNDERFLOW, numpy_dtype, widen
from ..problem.spec import ConvSpec
from .data import Arrays

F32 = npt.NDArray[np.float32]
Stored = npt.NDArray[Any]  # of the dtype that the spec says


# ---- reference and bound ----------------------------------------------------------------------


def reference(spec: ConvSpec, data: Arrays, threads: int = 1) -> Stored:
    """ONNX Runtime's output for ``data``, computed in f32 and rounded to the spec's dtype."""
    if spec.n == 0:
        return np.empty(spec.dst_shape, numpy_dtype(spec.dtype))
    from .reference import run_onnxruntime  # imports ONNX Runtime

    return run_onnxruntime(spec, **data, threads=threads)


def tolerance(spec: ConvSpec, data: Arrays, threads: int = 1) -> F32:
    """The element-wise bound for ``data``, of the output's shape; of integers, zeros."""
    if spec.dtype == "i8":
        return np.zeros(spec.dst_shape, np.float32)
    plain = spec.with_(activation="none", dtype="f32")
    magnitude = reference(plain, {k: np.abs(widen(v)) for k, v in data.items() if k != "slope"}, threads)
    op = spec.activation_op
    slope = op.lipschitz
    if spec.has_slope and data["slope"].size:
        slope = max(1.0, float(np.abs(widen(data["slope"])).max()))
    bound = slope * error_factor(spec) * UNIT_ROUNDOFF * magnitude
    if op.name != "none":
        bound += np.float32(ACTIVATION_ERROR * UNIT_ROUNDOFF) * (magnitude + 1)
    if spec.dtype != "f32":
        largest = np.abs(widen(reference(spec, data, threads))) + bound
        bound += 2 * (np.float32(dtypes.UNIT_ROUNDOFF[spec.dtype]) * largest + np.float32(UNDERFLOW[spec.dtype]))
    return np.asarray(bound, np.float32)


def worst(error: F32, bound: F32) -> float:
    """Largest error as a fraction of its bound; infinite where an element is NaN."""
    if not error.size:
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(error == 0, 0, error / bound)
    return float(np.where(np.isnan(ratio), np.inf, ratio).max())
