"""What a layer of integers stores, of sums of products: ``docs/quantised.md`` says it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from ..deferred import tirx
from ..problem.spec import MOST_SUM_SCALE, ConvSpec
from .compute import ACCUMULATOR, INTEGER, SHIFT, STORAGE, Expr, epilogue, of_lanes, quantised_bits, saturated

#: Activations that are bounds of a value; those of clip are its parameters.
CLAMPS: dict[str, tuple[float, ...]] = {"none": (-math.inf, math.inf), "relu": (0, math.inf), "clip": ()}


def requantise(
    spec: ConvSpec,
    sums: Expr,
    *,
    bias: Expr | None = None,
    scale: Expr | None = None,
    dst_zero: Expr | None = None,
    residual: Expr | None = None,
    lanes: int = 1,
    times: Callable[[Expr, Expr], Expr] | None = None,
    **addends: Expr,
) -> Expr:
    """What a layer of integers stores in dst: ``saturate(round(activation((sums + bias) * scale)) + dst_zero)``; with a
    residual, the sum of what is stored so and of that.

    Args:
        sums: of products, i32, what zero points add to them already taken off (or in the bias).
        bias, scale, dst_zero: i32, f32 and i32 of a channel, or vectors of them; what the spec lacks is None.
        residual: as f32, without its zero point taken off.
        times: gives a product of two f32 that is rounded before it is added to another.
        addends: of a residual, the numbers of :data:`~convgen.problem.spec.SUM`.

    Returns:
        An element, or vector, of dst's type. Of i32 the sums with the bias, of f32 what would be rounded.
    """
    if spec.dst_dtype == "i32":
        return sums if bias is None else sums + bias
    if spec.dst_dtype == "f32":
        return epilogue(spec, sums, bias=bias, scale=scale, lanes=lanes)
    # The activation's bounds and the type's are one: in few instructions, which short sums wait for.
    op = spec.activation_op
    least, largest = CLAMPS[op.name] or op.params
    value = steps_of(spec, sums, bias=bias, scale=scale, residual=residual, lanes=lanes, times=times, **addends)
    bits = quantised_bits(value, spec.dst_dtype, dst_zero, lanes, (least, largest))
    return bits.astype(of_lanes(STORAGE[spec.dst_dtype], lanes))


def steps_of(
    spec: ConvSpec,
    sums: Expr,
    *,
    bias: Expr | None = None,
    scale: Expr | None = None,
    residual: Expr | None = None,
    lanes: int = 1,
    times: Callable[[Expr, Expr], Expr] | None = None,
    whole: Callable[[Expr], Expr] | None = None,
    **addends: Expr,
) -> Expr:
    """What :func:`requantise` rounds and saturates, an f32 in steps of dst, before the activation.

    ``whole`` rounds an f32, small enough for a number of 22 bits, to nearest, ties to even.
    """
    sums = sums.astype(of_lanes(INTEGER, lanes))
    value = (sums if bias is None else sums + bias).astype(of_lanes(ACCUMULATOR, lanes)) * scale
    if residual is None:
        return value
    whole = whole or partial(_whole, lanes=lanes)
    return _added(spec, value, residual, lanes, times or rounded_product, whole, **addends)


def rounded_product(a: Expr, b: Expr) -> Expr:
    """``a * b`` that LLVM does not take together with a sum, whose rounding would be another."""
    product = a * b
    return tirx.call_llvm_intrin(str(product.ty.dtype), "llvm.arithmetic.fence", product)


def _added(
    spec: ConvSpec,
    value: Expr,
    residual: Expr,
    lanes: int,
    times: Callable[[Expr, Expr], Expr],
    whole: Callable[[Expr], Expr],
    *,
    product_scale: Expr,
    product_zero: Expr,
    residual_scale: Expr,
    residual_zero: Expr,
) -> Expr:
    """A product, rounded to dst's type, plus the residual, in steps of dst."""
    product = whole(saturated(value, spec.dst_dtype, product_zero, lanes, (-math.inf, math.inf)))
    least, most = (tirx.const(bound, ACCUMULATOR) for bound in (-MOST_SUM_SCALE, MOST_SUM_SCALE))
    # In this order NaN stays.
    product_scale, residual_scale = (
        tirx.max(least, tirx.min(most, scale)) for scale in (product_scale, residual_scale)
    )
    return times(product, product_scale) + times(residual - residual_zero, residual_scale)


def _whole(value: Expr, lanes: int) -> Expr:
    # Through integers, as the simplifier would take (a + b) - b for a.
    bits = tirx.reinterpret(of_lanes(INTEGER, lanes), value + tirx.const(SHIFT, ACCUMULATOR))
    return tirx.reinterpret(of_lanes(ACCUMULATOR, lanes), bits) - tirx.const(SHIFT, ACCUMULATOR)
