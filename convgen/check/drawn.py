"""Whole numbers that any machine draws from a seed, digests of outputs and samples of them: ``runtime/check.c`` has the
same functions in C, for machines without NumPy.

A number depends on its seed and index alone: ``mix(seed << 40 | index)``, the finalizer of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

#: Elements that share a digest.
PART = 1 << 16


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def whole_numbers(seed: int, count: int, low: int, high: int) -> npt.NDArray[np.int64]:
    """``count`` numbers from ``low`` to ``high``."""
    drawn = _mix(np.arange(count, dtype=np.uint64) | np.uint64(seed << 40)) >> np.uint64(32)
    return (drawn * np.uint64(high - low + 1) >> np.uint64(32)).astype(np.int64) + low


def digests(array: npt.NDArray[Any]) -> list[int]:
    """A number of 64 bits for every :data:`PART` elements in a row, of their values as f32; -0 is 0."""
    values = array.reshape(-1).astype(np.float32) + np.float32(0)
    bits = values.view(np.uint32).astype(np.uint64)
    mixed = _mix(bits << np.uint64(32) | np.arange(bits.size, dtype=np.uint64) % np.uint64(PART))
    return [int(part) for part in np.add.reduceat(mixed, np.arange(0, mixed.size, PART))]


def sampled(array: npt.NDArray[Any], seed: int, count: int) -> npt.NDArray[Any]:
    """``count`` elements of an array, each of every ``size / count`` in a row one that is drawn."""
    flat, begins = array.reshape(-1), np.arange(count + 1) * array.size // count
    drawn = _mix(np.arange(count, dtype=np.uint64) | np.uint64(seed << 40)) >> np.uint64(32)
    within = (drawn * np.diff(begins).astype(np.uint64) >> np.uint64(32)).astype(np.int64)
    return np.asarray(flat[begins[:-1] + within])


class Draws:
    """What :func:`convgen.check.data.exact_data` draws from, in place of a generator of NumPy's: every draw has a seed
    of its own, so that tensors can be drawn again elsewhere.

    Attributes:
        made: of each draw its seed, shape, least and largest number.
    """

    def __init__(self) -> None:
        self.made: list[tuple[int, tuple[int, ...], int, int]] = []

    def integers(self, low: int, high: int, size: int | Sequence[int], endpoint: bool = False) -> npt.NDArray[np.int64]:
        """As :meth:`numpy.random.Generator.integers`."""
        shape = (size,) if isinstance(size, int) else tuple(size)
        seed, largest = len(self.made), high if endpoint else high - 1
        self.made.append((seed, shape, low, largest))
        return whole_numbers(seed, math.prod(shape), low, largest).reshape(shape)

    def recipe(self, array: npt.NDArray[Any]) -> Mapping[str, int] | None:
        """How to draw an array again, to which a number was added perhaps; None where it was not drawn so."""
        for seed, shape, low, high in self.made:
            if shape != array.shape or not array.size:
                continue
            drawn = whole_numbers(seed, array.size, low, high).reshape(shape)
            added = int(array.flat[0]) - int(drawn.flat[0])
            if np.array_equal(drawn + added, array.astype(np.int64)):
                return {"seed": seed, "low": low + added, "high": high + added}
        return None
