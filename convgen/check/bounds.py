"""What ONNX Runtime computes, and how far from it a kernel may be.

**Any data.** Element-wise, from the rounding analysis of a dot product (Higham, *Accuracy and Stability of Numerical
Algorithms*, 2nd ed., §3; for the square root, Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019),

    |dst - reference| <= L * c * u * (M + |bias| + |residual|) + the activation's own error

with ``u = 2**-24``, ``c = 8 + 2 * sqrt(K)`` for ``K`` products per element (``2**15`` more for tf32: two operands cut
off after 11 bits; ``2**17 + 2**8`` more for bf16: two operands rounded to 8 bits), and ``L`` the activation's slope.
For a kernel that only reorders sums ``M`` is ``conv(|src|, |weights|)``. One that transforms adds pixels before it
multiplies, and its ``M`` is the sum of what it adds, which reaches all pixels of a tile:
:meth:`~convgen.lowering.schedule.Schedule.magnitudes`. Subnormal numbers and products count as the smallest normal
number. Instructions that multiply bf16 take them for 0, sums too: where they may be used, as storage or as the accuracy
class, the bound has ``2**-126 * K * L * (max|src| + max|weights| + 1)`` more. Where ``M`` is not finite, as a
transform's is throughout a tile with a NaN, nothing is promised.

Rounding errors are taken to be as often up as down, as they are however large or small numbers are. Where they are all
alike, as those of a constant image under a constant filter, ``c`` is ``8 + K`` (Higham, §3.1).

**Data of one scale**, whose pixels are alike, as those of a layer with normalised inputs: the same with

    ``M = max(conv(|src|, |weights|), K * mean|src| * mean|weights|)``,  ``c = f * (8 + 2 * sqrt(K))``

where ``f`` is what the accuracy class lets a transform lose: 8 (standard) or 64 (relaxed).

A layer stored as f16 or bf16 is computed in f32 and rounded once: two results that far apart may round
to neighbours, so the bound grows by twice the rounding of what may come out.

Layers of i8 are exact: every element must be ONNX Runtime's, on data whose sums take the whole range of types,
saturate here and there, and on data half of whose outputs are ties.

On small integers every partial sum is exact, so a schedule that only reorders sums must match bit
for bit; one that transforms (Winograd) is held to the bound for data of one scale there too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..lowering.schedule import Candidate, Magnitudes
from ..problem import dtypes
from ..problem.accuracy import ACTIVATION_ERROR, SMALLEST_NORMAL, UNIT_ROUNDOFF, error_factor
from ..problem.dtypes import UNDERFLOW, numpy_dtype, widen
from ..problem.spec import ConvSpec
from .data import Arrays

if TYPE_CHECKING:
    from ..hardware.target import Target

#: From here on sums of pixels, times what a transform multiplies them by, may be too large for f32.
LARGE = 1e30

F32 = npt.NDArray[np.float32]
Stored = npt.NDArray[Any]  # of the dtype that the spec says


# ---- reference and bound ----------------------------------------------------------------------


def reference(spec: ConvSpec, data: Arrays, threads: int = 1) -> Stored:
    """ONNX Runtime's output for ``data``, computed in f32 and rounded to the spec's dtype."""
    if spec.n == 0:
        return np.empty(spec.dst_shape, numpy_dtype(spec.dst_dtype))
    from .reference import run_onnxruntime  # imports ONNX Runtime

    return run_onnxruntime(spec, **data, threads=threads)


def differences(expected: Stored, found: Stored) -> str:
    """Where two outputs differ, NaN being NaN; empty where nowhere."""
    wrong = np.argwhere((found != expected) & ~((found != found) & (expected != expected)))
    if not len(wrong):
        return ""
    at = tuple(int(i) for i in wrong[0])
    return f"{len(wrong)} of {found.size} elements differ; at {at} expected {expected[at]}, found {found[at]}"


class Made(Protocol):
    """How something computes: lowered code, or a kernel."""

    @property
    def candidate(self) -> Candidate: ...

    @property
    def target(self) -> Target: ...


def tolerance(spec: ConvSpec, data: Arrays, made: Made | None = None, threads: int = 1) -> F32:
    """The element-wise bound that holds on any data, of the output's shape; of integers, zeros.

    Args:
        made: by which candidate, for which target; sums in any order where None. Infinite where it promises nothing.
    """
    if spec.dtype == "i8":
        return np.zeros(spec.dst_shape, np.float32)
    plain = _products(spec, data, None, threads)
    if made is None or not made.candidate.schedule.transforms:
        return _bound(spec, data, error_factor(spec), plain, plain, threads)
    return _bound(spec, data, error_factor(spec), _products(spec, data, made, threads), plain, threads)


def even_tolerance(spec: ConvSpec, data: Arrays, threads: int = 1) -> F32:
    """The element-wise bound of what transforms, as the spec's accuracy class has it on data of one scale."""
    if spec.dtype == "i8":
        return np.zeros(spec.dst_shape, np.float32)
    plain = _products(spec, data, None, threads)
    means = [float(np.abs(widen(data[name])).mean()) if data[name].size else 0 for name in _factors(spec)]
    magnitude = np.maximum(plain, np.float32(spec.reduction_length * math.prod(means)))
    return _bound(spec, data, error_factor(spec, transforms=True), magnitude, plain, threads)


def _factors(spec: ConvSpec) -> tuple[str, str]:
    """The tensors whose products are summed."""
    return "src", "residual" if spec.direction == "weights" else "weights"


def _products(spec: ConvSpec, data: Arrays, made: Made | None, threads: int) -> F32:
    """``M``: sums of absolute values, of the output's shape."""
    if spec.n == 0:  # whose core has a batch of one
        return np.empty(spec.dst_shape, np.float32)
    # A gradient of bias is an output of its own; any other bias is added elsewhere.
    bias = spec.bias and spec.direction == "weights"
    layer = spec.with_(activation="none", dtype="f32", bias=bias, residual=False)
    if made is not None:
        layer = layer.core
    src = np.abs(widen(data["src"])).reshape(layer.src_shape)
    factor = _factors(spec)[1]
    weights = np.abs(widen(data[factor])).reshape(layer.shapes[factor])

    def magnitudes(src: F32, weights: F32) -> Magnitudes:
        if made is None:
            return Magnitudes(layer, src, weights)
        candidate = made.candidate
        return candidate.schedule.magnitudes(layer, made.target, candidate.picks, src, weights)

    def summed(src: F32, weights: F32) -> F32:
        found = magnitudes(src, weights)
        values = {"src": found.src.astype(np.float32), factor: found.weights.astype(np.float32)}
        return widen(reference(found.spec, values, threads)).reshape(spec.dst_shape)

    with np.errstate(over="ignore", invalid="ignore"):
        total = summed(np.maximum(src, SMALLEST_NORMAL), np.maximum(weights, SMALLEST_NORMAL))
        # Products may be subnormal too, and are multiplied on the way back.
        ones = magnitudes(np.ones_like(src), np.ones_like(weights))
        others = tuple(a for a in range(ones.weights.ndim) if a != int(spec.transposed))
        products = ones.weights.sum(axis=others if spec.direction == "forward" else None)
        total = total + np.float32(SMALLEST_NORMAL * products.max() * ones.src.max(initial=0))
        if made is not None and max(src.max(initial=0), weights.max(initial=0)) > LARGE:
            # Sums of pixels may be too large even where products are not.
            total = np.where(np.isfinite(summed(np.maximum(src, 1), np.maximum(weights, 1))), total, np.inf)
    return np.where(np.isnan(total), np.float32(np.inf), total)


def _bound(spec: ConvSpec, data: Arrays, factor: float, products: F32, plain: F32, threads: int) -> F32:
    """The bound with ``factor * u * products``, and ``plain`` for the activation's own error."""
    op = spec.activation_op
    slope = op.lipschitz
    if spec.has_slope and data["slope"].size:
        slope = max(1.0, float(np.abs(widen(data["slope"])).max()))
    added = np.zeros((), np.float32)
    if "bias" in data:
        added = added + np.abs(widen(data["bias"])).reshape(spec.dst_blocks.shape(1, (1,) * spec.rank))
    if spec.residual:  # not the gradient that a gradient of weights has in its place
        added = added + np.abs(widen(data["residual"]))
    with np.errstate(over="ignore", invalid="ignore"):
        bound = np.float32(slope * factor * UNIT_ROUNDOFF) * (products + added)
        if "bf16" in (spec.dtype, spec.accuracy):
            largest = sum(float(np.abs(widen(data[name])).max(initial=0)) for name in _factors(spec))
            bound = bound + np.float32(slope * SMALLEST_NORMAL * spec.reduction_length * (largest + 1))
        if op.name != "none":
            bound = bound + np.float32(ACTIVATION_ERROR * UNIT_ROUNDOFF) * (plain + added + 1)
        if spec.dtype != "f32":
            largest = np.abs(widen(reference(spec, data, threads))) + bound
            bound += 2 * (np.float32(dtypes.UNIT_ROUNDOFF[spec.dtype]) * largest + np.float32(UNDERFLOW[spec.dtype]))
            bound = np.where(largest < dtypes.LARGEST[spec.dtype], bound, np.float32(np.inf))
        # Sums that are just numbers may be none with their errors: of factors that are rounded to bf16, far below.
        bound = np.where(np.isfinite(products + added + bound), bound, np.float32(np.inf))
    return np.asarray(bound, np.float32)


def apart(found: Stored, expected: Stored) -> float:
    """How far an output as a whole is from what is expected: of floats the largest difference, as a fraction of the
    largest element; of whole numbers the share of those that differ by more than one; of truth values that of those
    that differ. Infinite where the shapes differ, or NaN and infinities are elsewhere.
    """
    if found.shape != expected.shape:
        return math.inf
    if expected.dtype.kind in "iub":
        differ = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        return float((~(differ <= (expected.dtype != np.bool_))).mean()) if differ.size else 0.0
    a, b = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if differences(b[~finite], a[~finite]) or not np.isfinite(a[finite]).all():
        return math.inf
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0) / (np.abs(b[finite]).max(initial=0.0) or 1.0))


def worst(error: F32, bound: F32) -> float:
    """Largest error as a fraction of its bound; infinite where an element is NaN."""
    if not error.size:
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        ratio = np.where(error == 0, 0, error / bound)
    return float(np.where(np.isnan(ratio), np.inf, ratio).max())
