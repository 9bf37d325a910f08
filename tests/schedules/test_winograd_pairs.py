"""Winograd convolution by products of bf16: how far it is from the exact result, and where it is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from convgen.check.bounds import tolerance
from convgen.check.data import float_data
from convgen.check.reference import run_onnxruntime
from convgen.check.validate import validate
from convgen.cpu.winograd_pairs import matrices
from convgen.hardware.target import resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.problem.spec import ConvSpec

SCHEDULE = find_schedule("cpu_winograd_pairs")
TARGET = resolve("cpu")
LAYERS = [
    "conv2d ic32 oc48 i9x11 k3x3 p1 nhwc relu",
    "conv2d n2 ic16 oc80 i8x8 k3x3 p1 nchw16c residual silu",
    "conv2d ic48 oc32 i7x14 k3x3 p0_2x2_1 nobias nhwc dst_nchw16c",
    "conv2d ic64 oc32 i6x5 k3x3 clip(-1,2) nchw16c dst_nhwc",
    "conv2d ic32 oc32 i1x1 k3x3 p1 prelu nhwc",
]


def compiled(text: str, schedule: str = "cpu_winograd_pairs", picks: str | None = None) -> Kernel:
    spec = ConvSpec.parse(f"{text} accuracy_bf16")
    if why := SCHEDULE.reason_against(spec, TARGET):
        pytest.skip(why)
    return compile_candidate(spec, TARGET, parse_candidate(spec, TARGET, schedule, picks), 2)


@pytest.mark.parametrize("text", LAYERS)
def test_kernels_pass_validation(text: str) -> None:
    validate(compiled(text)).raise_if_failed()
    picks = "tile_oc=16 tile_px=2 block_rows=1 parallel_oc=1"
    if "i1x1" not in text:
        validate(compiled(text, picks=picks)).raise_if_failed()


def test_the_matrices_make_a_convolution() -> None:
    back, weights, inputs = map(np.array, matrices())
    rng = np.random.default_rng(0)
    tile, taps = rng.integers(-9, 10, (4, 4)), rng.integers(-9, 10, (3, 3))
    found = back @ ((weights @ taps @ weights.T) * (inputs @ tile @ inputs.T)) @ back.T
    expected = [[(tile[y : y + 3, x : x + 3] * taps).sum() for x in range(2)] for y in range(2)]
    np.testing.assert_array_equal(found, expected)


def test_its_error_is_hardly_more_than_that_of_products_of_bf16() -> None:
    """Of normal data; 1.6 times that of a direct convolution is what is said of it."""
    text = "conv2d ic128 oc64 i14x14 k3x3 p1 nhwc"
    errors = {}
    for schedule in ("cpu_winograd_pairs", "cpu_direct"):
        kernel = compiled(text, schedule)
        squares, largest = [], 0.0
        for seed in range(3):
            data = float_data(kernel.spec, seed)
            exact = run_onnxruntime(kernel.spec, threads=1, **data)
            error = np.abs(kernel(**data) - exact)
            squares.append(float((error**2).mean()))
            largest = max(largest, float((error / tolerance(kernel.spec, data)).max()))
        errors[schedule] = np.sqrt(np.mean(squares))
        assert largest < 0.2  # of the bound for sums in any order
    assert 1 < errors["cpu_winograd_pairs"] / errors["cpu_direct"] < 1.8


def test_it_is_chosen_where_accuracy_and_processor_admit_it() -> None:
    target = resolve("cpu:znver4").on(1)
    chosen = {}
    for layer in ("ic512 oc512 i7x7", "ic256 oc256 i14x14", "ic64 oc64 i56x56"):
        spec = ConvSpec.parse(f"conv2d {layer} k3x3 p1 relu nhwc accuracy_bf16")
        chosen[layer] = default_candidate(spec, target).schedule.id
    assert set(chosen.values()) == {"cpu_winograd_pairs"}
    # Without products of bf16, and where the accuracy does not admit them, it is for nothing.
    spec = ConvSpec.parse("conv2d ic512 oc512 i7x7 k3x3 p1 nhwc accuracy_bf16")
    for other, where in ((spec, resolve("cpu:skylake-avx512")), (spec.with_(accuracy="relaxed"), target)):
        assert SCHEDULE.reason_against(other, where)
