"""Winograd convolution of integers, to the bits of ONNX Runtime."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from drawn_points import random_picks

from convgen.check.reference import run_onnxruntime
from convgen.check.validate import validate
from convgen.cpu.winograd_integers import (
    BACK,
    EXTENT,
    INPUTS,
    INVERSE,
    MOST_WEIGHTS,
    OUTPUTS,
    SHIFTED,
    TAPS,
    WEIGHTS,
    parts_of,
    row_back,
    row_in,
)
from convgen.deferred import tirx
from convgen.hardware.target import resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import ConvSpec

SCHEDULE = find_schedule("cpu_winograd_integers")
TARGET = resolve("cpu")
#: Between them: layouts, types, zero points, padding, tiles that are cut off, several parts of the channels.
LAYERS = [
    "conv2d ic32 oc48 i9x11 k3x3 p1 i8 src_u8 dst_u8 src_zero dst_zero nhwc",
    "conv2d n2 ic16 oc16 i8x8 k3x3 p1 i8 relu nchw16c",
    "conv2d ic48 oc32 i7x14 k3x3 p0_2x2_1 i8 src_u8 src_zero dst_f32 nobias nhwc dst_nchw16c",
    "conv2d ic64 oc32 i6x5 k3x3 i8 src_zero dst_i32 nchw16c dst_nhwc",
    "conv2d ic256 oc64 i13x9 k3x3 p1 i8 src_u8 dst_u8 residual residual_u8 relu nhwc",
    "conv2d ic464 oc16 i4x4 k3x3 p1 i8 src_u8 clip(-20,90) nhwc",
]


def compiled(spec: ConvSpec, picks: Any = None) -> Kernel:
    if why := SCHEDULE.reason_against(spec, TARGET):
        pytest.skip(why)
    picks = picks or SCHEDULE.default(spec, TARGET)
    return compile_candidate(spec, TARGET, Candidate(SCHEDULE, picks), 2)


@pytest.mark.parametrize("text", LAYERS)
def test_layers_are_exact(text: str) -> None:
    spec = ConvSpec.parse(text)
    kernel = compiled(spec)
    for made in [kernel, *(compiled(spec, p) for p in random_picks(SCHEDULE, spec, TARGET, 1, random.Random(text)))]:
        report = validate(made)
        report.raise_if_failed()
        assert report.error_factor == report.worst_error == 0


@pytest.mark.parametrize("zero", [0, 128, 255])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("ic", "size", "parts"), [(224, 127, 1), (256, 113, 2), (256, 114, 2), (256, 127, 2)])
def test_the_largest_sums_are_exact(zero: int, sign: int, ic: int, size: int, parts: int) -> None:
    """Every product as large as it can be: of as many channels as are transformed back together in any case, of more
    with weights that are just small enough for that, and with weights that are not.
    """
    assert parts_of(ic) == parts
    assert MOST_WEIGHTS // (9 * 256) == 113
    spec = ConvSpec.parse(f"conv2d ic{ic} oc16 i8x8 k3x3 p1 i8 src_u8 src_zero dst_i32 nobias nhwc")
    rng = np.random.default_rng(zero)
    least = -128 if size == 127 else -size
    given: dict[str, Any] = {
        "weights": np.full(spec.weights_shape, least if sign < 0 else size, np.int8),
        "src_zero": np.array([zero], np.uint8),
    }
    given["weights"][1] = rng.choice([least, size], given["weights"][1].shape)
    kernel = compiled(spec)
    for src in (np.full(spec.src_shape, 0), np.full(spec.src_shape, 255), rng.choice([0, 255], spec.src_shape)):
        src = src.astype(np.uint8)
        np.testing.assert_array_equal(kernel(src, **given), run_onnxruntime(spec, src, **given))


def test_the_matrices_convolve() -> None:
    """One axis: 24 times the outputs; and the inverse undoes what is odd of 24 squared."""
    rng = np.random.default_rng(0)
    d, w = rng.integers(-128, 128, EXTENT), rng.integers(-128, 128, TAPS)
    found = np.array(BACK) @ ((np.array(WEIGHTS) @ w) * (np.array(INPUTS) @ d))
    np.testing.assert_array_equal(found, 24 * np.array([d[i : i + TAPS] @ w for i in range(OUTPUTS)]))
    assert (24**2 >> SHIFTED) * INVERSE % 2**32 == 1
    assert max(np.abs(INPUTS).sum(axis=1)) ** 2 * 255 < 2**15  # 16 bits hold transformed numbers
    assert max(np.abs(WEIGHTS).sum(axis=1)) ** 2 * 128 < 2**15


class Unnamed:
    """In place of a block: values stay expressions."""

    def let(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(("row", "matrix"), [(row_in, INPUTS), (row_back, BACK)])
def test_rows_are_products_with_the_matrices(row: Any, matrix: Any) -> None:
    given = np.random.default_rng(1).integers(-1000, 1000, EXTENT)
    made = row(Unnamed(), [tirx.const(int(value), "int32") for value in given])
    np.testing.assert_array_equal([int(value) for value in made], np.array(matrix) @ given)


def test_channels_are_parted_evenly() -> None:
    assert [parts_of(ic) for ic in (16, 224, 256, 512)] == [1, 1, 2, 4]
    assert all(ic // parts_of(ic) * 9 * 128**2 < 2**25 for ic in range(16, 2048, 16))
