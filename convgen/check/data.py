"""Inputs that kernels are checked with: floats of one scale and of many, small integers, NaN and infinities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..problem.dtypes import RANGES, narrow, numpy_dtype
from ..problem.spec import ConvSpec
from .drawn import Draws

#: Tensors by name.
Arrays = dict[str, npt.NDArray[Any]]


def float_data(spec: ConvSpec, seed: int = 0) -> Arrays:
    """Standard normal tensors by name: ``src weights [bias] [slope] [scale] [sum] [residual]``; of i8, any integers,
    and scales with which outputs spread over the type's range and beyond.
    """
    rng = np.random.default_rng(seed)
    if spec.dtype == "i8":
        return _integers(spec, rng, 128, 2.0 ** rng.uniform(-1, 2, spec.oc))
    return {n: narrow(rng.standard_normal(shape, np.float32), spec.dtype) for n, shape in _shapes(spec).items()}


def exact_data(spec: ConvSpec, seed: int | Draws = 0) -> Arrays:
    """Small integers: every partial sum is below 2**24, so f32 arithmetic is exact in any order. Of i8, with scales
    that are powers of two: many outputs are ties.
    """
    rng = seed if isinstance(seed, Draws) else np.random.default_rng(seed)
    if spec.dtype == "i8":
        return _integers(spec, rng, 2, 2.0 ** -np.ones(spec.oc))
    largest = max(1, min(8, math.isqrt(2**22 // max(1, spec.reduction_length))))
    return {
        name: rng.integers(-largest, largest + 1, shape).astype(numpy_dtype(spec.dtype))
        for name, shape in _shapes(spec).items()
    }


def _integers(
    spec: ConvSpec, rng: np.random.Generator | Draws, largest: int, factors: npt.NDArray[np.float64]
) -> Arrays:
    """Tensors of a layer of integers, from ``-largest`` to ``largest - 1`` away from their zero points; scaled by
    ``factors`` so that some outputs saturate where the factor is 1 or more. Every other scale is a power of two.
    """
    zeros: Arrays = {
        name: rng.integers(*RANGES[spec.dtypes[name]], spec.shapes[name], endpoint=True).astype(
            numpy_dtype(spec.dtypes[name])
        )
        for name in ("src_zero", "weights_zero", "dst_zero")
        if name in spec.shapes
    }
    positive = [name for name in ("src", "weights") if spec.dtypes[name] == "u8" and f"{name}_zero" not in zeros]
    spread = 2 * spec.reduction_length if len(positive) > 1 else math.sqrt(spec.reduction_length) / 3
    rms = spread * largest**2 * (2 if positive else 1)
    scale = factors * min(1.0, 64 / rms)
    scale[::2] = 2.0 ** np.floor(np.log2(scale[::2]))
    bias = round(2 * rms)
    data: Arrays = {}
    for name in ("src", "weights"):
        dtype, zero = spec.dtypes[name], zeros.get(f"{name}_zero", np.array([largest if name in positive else 0]))
        by_channel = zero.astype(np.int64).reshape(-1, *(1,) * (len(spec.shapes[name]) - 1))
        if spec.transposed and by_channel.size > 1:  # a channel's weights have one zero point
            by_channel = by_channel.reshape(1, spec.groups, -1, *(1,) * spec.rank).max(axis=1)
        values = rng.integers(-largest, largest, spec.shapes[name]) + by_channel
        data[name] = np.clip(values, *RANGES[dtype]).astype(numpy_dtype(dtype))
    if spec.bias:
        data["bias"] = rng.integers(-bias, bias + 1, spec.oc).astype(np.int32)
    if "scale" in spec.shapes:
        data["scale"] = scale.astype(np.float32)
    if spec.residual:
        low, high = RANGES[spec.residual_dtype]
        data["residual"] = rng.integers(low, high + 1, spec.shapes["residual"]).astype(numpy_dtype(spec.residual_dtype))
        own = np.random.default_rng(0) if isinstance(rng, Draws) else rng  # four numbers need not be drawn again
        data["sum"] = _sum(spec, own, is_even=largest <= 2)
    return data | zeros


def _sum(spec: ConvSpec, rng: np.random.Generator, is_even: bool) -> npt.NDArray[np.float32]:
    """A residual's parameter ``sum``; scales are powers of two where ``is_even``: many sums are ties then."""
    scales = 2.0 ** (rng.integers(-1, 2, 2) if is_even else rng.uniform(-2, 1, 2))
    zeros = [rng.integers(*RANGES[dtype], endpoint=True) for dtype in (spec.dst_dtype, spec.residual_dtype)]
    return np.array([scales[0], zeros[0], scales[1], zeros[1]], np.float32)


def special_data(spec: ConvSpec, seed: int = 0) -> Arrays:
    """Integers with a NaN and infinities of both signs here and there in src; no zero weights.

    They are in the tensor whose padding ONNX's operator leaves out: for the gradient of weights of a transposed layer,
    that of dst.
    """
    data = exact_data(spec, seed)
    rng = np.random.default_rng(seed + 1)
    odd, other = "src", "residual" if spec.direction == "weights" else "weights"
    if spec.direction == "weights" and spec.transposed:
        odd, other = other, odd
    data[other][data[other] == 0] = 1
    flat = data[odd].reshape(-1)
    if flat.size:
        for value in (np.nan, np.inf, -np.inf):
            flat[rng.integers(flat.size)] = value
    return data


def odd_data(spec: ConvSpec, seed: int = 0) -> Arrays:
    """Floats that are not of one scale; what is odd about them is drawn from the seed.

    Of src: pixels and a channel up to 10^6 times the others, blank and subnormal regions; now and then a number that
    is nearly too large, a NaN or an infinity. Of the weights: zeros between others, taps that are zero throughout, an
    output channel much smaller than the others. Of i8, scales that are no ordinary numbers, of channels some of whose
    sums are 0.
    """
    rng = np.random.default_rng((seed, 2))
    if spec.dtype == "i8":
        data = _integers(spec, rng, 128, np.ones(spec.oc))
        odd = np.array([np.nan, np.inf, -np.inf, 3e38, 1e-40, 0], np.float32)
        at = rng.permutation(spec.oc)[: len(odd)]
        if "scale" in data:
            data["scale"][at] = odd[: len(at)]
        blank = rng.permutation(spec.oc)[: spec.oc // 2]
        if not spec.transposed:
            data["weights"][blank] = 0
        if spec.bias:
            data["bias"][blank] = 0
        return data
    data = {name: rng.standard_normal(shape, np.float32) for name, shape in _shapes(spec).items()}
    src = spec.src_blocks.channels_first(data["src"])
    weights = data["residual" if spec.direction == "weights" else "weights"]
    if src.size:
        even = src.copy()
        for _ in range(rng.choice([0, 1, 12])):
            pixel: tuple[Any, ...] = tuple(int(rng.integers(size)) for size in src.shape[2:])
            column: Any = (slice(None), slice(None), *pixel)
            src[column] = even[column] * float(10 ** rng.uniform(2, 6))
        if rng.random() < 0.3:
            src[:, rng.integers(src.shape[1])] *= np.float32(10 ** rng.uniform(1, 6))
        for scale in (0.0, 1e-39):
            if rng.random() < 0.4:
                axis = int(rng.integers(2, src.ndim))
                part = slice(int(rng.integers(src.shape[axis])), None)
                src[(slice(None),) * axis + (part,)] *= np.float32(scale)
        if rng.random() < 0.3:
            place = tuple(rng.integers(size) for size in src.shape)
            src[place] = rng.choice([3e38, -3e38, np.inf, -np.inf, np.nan])
    if weights.size > 1:
        weights[rng.random(weights.shape) < rng.choice([0, 0, 0.5, 0.9])] = 0
    axis = int(rng.integers(2, weights.ndim))
    if rng.random() < 0.4 and weights.shape[axis] > 1:
        weights[(slice(None),) * axis + (int(rng.integers(weights.shape[axis])),)] = 0
    if rng.random() < 0.3:
        weights[rng.integers(len(weights))] *= np.float32(10 ** -rng.uniform(2, 6))
    data["src"] = np.ascontiguousarray(spec.src_blocks.stored(src))
    return {name: narrow(array, spec.dtype) for name, array in data.items()}


def _shapes(spec: ConvSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of a call's inputs, by name."""
    return {name: shape for name, shape in spec.shapes.items() if name != "dst"}
