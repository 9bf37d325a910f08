"""How far outputs are apart, as one number: what a network and what other libraries are judged by."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convgen.check.bounds import apart

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("found", "expected", "dtype", "far"),
    [
        ([1.0, -4.0], [1.0, -4.0], "float32", 0.0),
        ([1.0, -3.0], [1.0, -4.0], "float32", 0.25),
        ([0.5], [0.0], "float32", 0.5),  # of zeros the difference itself
        ([1.0, NAN], [1.0, NAN], "float32", 0.0),
        ([3.0, INF], [4.0, INF], "float32", 0.25),
        ([1.0, NAN], [1.0, 2.0], "float32", INF),
        ([1.0, 2.0], [1.0, NAN], "float32", INF),
        ([1.0, INF], [1.0, 2.0], "float32", INF),
        ([1.0, -INF], [1.0, INF], "float32", INF),
        ([1.0, NAN], [1.0, INF], "float32", INF),
        ([], [], "float32", 0.0),
        ([1, 2, 3, 4], [2, 1, 3, 4], "uint8", 0.0),  # a step is rounding
        ([1, 2, 3, 6], [1, 2, 3, 4], "int64", 0.25),
        ([0, 255], [255, 255], "uint8", 0.5),  # nothing wraps
        ([True, False], [True, True], "bool", 0.5),
        ([1.0, -3.0], [1.0, -4.0], ml_dtypes.bfloat16, 0.25),
    ],
)
def test_outputs_are_apart(found: list[Any], expected: list[Any], dtype: Any, far: float) -> None:
    assert apart(np.array(found, dtype), np.array(expected, dtype)) == far


def test_a_nan_in_place_of_a_whole_number_counts() -> None:
    assert apart(np.array([1.0, NAN]), np.array([1, 1])) == 0.5


def test_other_shapes_are_infinitely_apart() -> None:
    assert apart(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)) == INF
