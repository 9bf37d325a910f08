"""What a bundle's C library draws, digests and samples is what Python does, on machines that have no NumPy."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import numpy as np
import pytest

from convgen.check.data import exact_data
from convgen.check.drawn import PART, Draws, digests, sampled, whole_numbers
from convgen.lowering.link import link_shared
from convgen.measure.standalone.interface import DTYPES
from convgen.problem.dtypes import numpy_dtype
from convgen.problem.spec import ConvSpec


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("check") / "check.so"
    link_shared(["check.c"], path, platform.machine(), headers=["types.h"])
    return ctypes.CDLL(str(path))


def numbers(*values: int) -> list[Any]:
    return [ctypes.c_uint64(value) for value in values]


def test_the_finalizer_is_splitmix64s() -> None:
    """Its first output from the state 0, as its reference implementation prints it."""
    low, high = -(2**31), 2**31 - 1
    found = whole_numbers(0, 1, low, high)[0] - low
    assert found == 0xE220A8397B1DCDAF >> 32


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_draw_the_same(dtype: str, check: ctypes.CDLL) -> None:
    low, high = (0, 255) if dtype == "u8" else (-100, 101)
    expected = whole_numbers(3, 5000, low, high)
    assert (expected.min(), expected.max()) == (low, high)
    found = np.empty(5000, numpy_dtype(dtype))
    limits = ctypes.c_int64(low), ctypes.c_int64(high)
    check.convgen_draw(found.ctypes.data_as(ctypes.c_void_p), *numbers(5000), DTYPES[dtype], *numbers(3), *limits)
    np.testing.assert_array_equal(found.astype(np.int64), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_digest_and_sample_the_same(dtype: str, check: ctypes.CDLL) -> None:
    array = whole_numbers(1, 2 * PART + 77, 0, 120).astype(numpy_dtype(dtype))
    if dtype not in ("i8", "u8"):
        array[::3] *= -1  # some are -0
    expected, found = digests(array), (ctypes.c_uint64 * 3)()
    pointer = array.ctypes.data_as(ctypes.c_void_p)
    check.convgen_digest(pointer, *numbers(array.size), DTYPES[dtype], *numbers(PART), found)
    assert list(found) == expected
    array[PART + 5] += np.ones(1, array.dtype)[0]
    check.convgen_digest(pointer, *numbers(array.size), DTYPES[dtype], *numbers(PART), found)
    assert [i for i in range(3) if found[i] != expected[i]] == [1]
    places, values = (ctypes.c_uint64 * 1000)(), np.empty(1000, array.dtype)
    taken = numbers(array.size, array.itemsize, 9, 1000)
    check.convgen_sample(pointer, *taken, values.ctypes.data_as(ctypes.c_void_p), places)
    np.testing.assert_array_equal(values, sampled(array, 9, 1000))
    np.testing.assert_array_equal(values, array[list(places)])
    assert len(set(places)) == 1000


@pytest.mark.parametrize("text", ["conv2d n2 ic40 oc24 i9x8 k3x3 residual f16", "conv2d n1 ic64 oc32 i9x9 k3x3 i8"])
def test_tensors_know_how_they_were_drawn(text: str) -> None:
    spec, draws = ConvSpec.parse(text), Draws()
    data = exact_data(spec, draws)
    for name in ("src", "weights"):
        recipe = draws.recipe(data[name])
        assert recipe is not None
        again = whole_numbers(recipe["seed"], data[name].size, recipe["low"], recipe["high"])
        np.testing.assert_array_equal(again.reshape(data[name].shape), data[name].astype(np.int64))
    other = data["src"].copy()
    other.flat[-1] += 1
    assert draws.recipe(other) is None
