"""Where a resized tensor's elements come from, axis by axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

#: How the place of an element is rounded to that of another.
_ROUND: dict[str, Any] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.where(_is_half(x), np.floor(x), np.rint(x)),
    "round_prefer_ceil": lambda x: np.where(_is_half(x), np.ceil(x), np.rint(x)),
}


def _is_half(x: F32) -> npt.NDArray[np.bool_]:
    """Whether places lie in the middle between two, but for what ONNX Runtime takes for their rounding."""
    return np.asarray(np.abs(x - np.floor(x) - np.float32(0.5)) < np.float32(1e-6))


def resize_tables(
    shape: Sequence[int], out: Sequence[int], scales: Sequence[float] | None, mode: str, transform: str, nearest: str
) -> tuple[tuple[Any, ...], list[F32]]:
    """How each axis is read, and the tables for it.

    An axis is read as it is (``same``), each element so often (a number), by a table of elements (``nearest``), or by
    three, of two elements and the share of the second (``linear``).

    Raises:
        ValueError: a mode that is not known.
    """
    if mode not in ("nearest", "linear", "bilinear"):
        raise ValueError(f"mode {mode!r}; nearest and linear are supported")
    ways: list[Any] = []
    tables: list[F32] = []
    for axis, (size, length) in enumerate(zip(shape, out, strict=True)):
        scale = np.float32(scales[axis]) if scales is not None else np.float32(length) / np.float32(size)
        if size == length and scale == 1:
            ways.append("same")
            continue
        places = _places(transform, np.arange(length, dtype=np.float32), size, length, scale)
        if mode == "nearest":
            if nearest not in _ROUND:
                raise ValueError(f"nearest_mode {nearest!r}")
            table = np.clip(_ROUND[nearest](places), 0, size - 1)
            repeats = length // size
            if repeats * size == length and (table == np.arange(length) // repeats).all():
                ways.append(repeats)
                continue
            ways.append("nearest")
            tables.append(table)
        else:
            kept = np.clip(places, 0, size - 1)
            first = np.floor(kept)
            second = np.minimum(first + 1, size - 1)
            ways.append("linear")
            # The last is half of each of two that are one: whatever number it is, none of it is multiplied by 0.
            tables += [first, second, np.where(first == second, np.float32(0.5), kept - first)]
    return tuple(ways), tables


def _places(transform: str, at: F32, size: int, length: int, scale: np.float32) -> F32:
    """Where each element of the longer axis lies in the shorter one.

    In f32 and in ONNX Runtime's order of operations: which neighbour is nearest may hang on the last bit.
    """
    half, one = np.float32(0.5), np.float32(1)
    match transform:
        case "half_pixel":
            return (at + half) / scale - half
        case "half_pixel_symmetric":
            adjustment = np.float32(length) / (scale * np.float32(size))
            return np.float32(size) / 2 * (one - adjustment) + (at + half) / scale - half
        case "pytorch_half_pixel":
            return (at + half) / scale - half if length > 1 else np.zeros_like(at)
        case "align_corners":
            return at * np.float32(size - 1) / np.float32(length - 1) if length > 1 else np.zeros_like(at)
        case "asymmetric":
            return at / scale
    raise ValueError(f"coordinate_transformation_mode {transform!r}")
