"""Winograd's algorithm for the gradient of weights: exact identities, bounds of its errors, and its kernels."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from convgen.check.data import exact_data, float_data
from convgen.check.reference import run_onnxruntime
from convgen.check.validate import validate
from convgen.cpu.winograd import Axis, outputs_of, transformed_axes
from convgen.cpu.winograd_gradient import GradientGrid, gradient_axes, gradient_tile_sizes
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.schedule import Candidate
from convgen.lowering.winograd import POINTS, admitted_of_gradient, magnitudes_of_gradient, of_gradient
from convgen.problem.spec import ConvSpec

Array = np.ndarray[Any, Any]

NATIVE = resolve("cpu")
WINOGRAD = find_schedule("cpu_gradient_winograd")
#: Tiles that do not divide the image, several parts, channels past a vector, strides, dilations, one axis.
LAYERS = [
    "conv2d n3 ic16 oc32 i14x13 k3x3 s1 p1 nobias weights",
    "conv2d n2 ic33 oc18 i9x30 k3x3 s2 p1 weights",
    "conv2d n2 ic17 oc16 i11x12 k3x2 s1 p1x0_1 d2x1 nhwc weights",
    "conv2d n5 ic20 oc40 i7x7 k3x3 s1 p1 nobias weights nhwc",
    "conv1d n2 ic18 oc17 i70 k3 s1 p1 weights",
    "conv2d n1 ic16 oc16 i12x9 k1x3 s1 p0x1 nobias weights bf16",
]


def times(matrix: list[list[Fraction]], vector: list[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


def test_taps_are_what_gradients_and_inputs_make() -> None:
    rng = random.Random(0)
    for m, kernel, stride in itertools.product(range(1, 7), range(1, 6), range(1, 4)):
        if m + -(-kernel // stride) - 2 > len(POINTS):
            continue
        back, gradients, inputs = of_gradient(m, kernel, stride)
        y = [Fraction(rng.randint(-9, 9)) for _ in range(m)]
        x = [Fraction(rng.randint(-9, 9)) for _ in range(stride * (m - 1) + kernel)]
        found = times(back, [a * b for a, b in zip(times(gradients, y), times(inputs, x), strict=True)])
        assert found == [sum(y[i] * x[stride * i + k] for i in range(m)) for k in range(kernel)], (m, kernel, stride)


@pytest.mark.parametrize("descriptor", LAYERS)
def test_kernels_are_right_at_any_tile(descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor)
    core, rng = spec.core, random.Random(descriptor)
    space = WINOGRAD.space(core, NATIVE)
    drawn = [p for p in (space.sample(rng) for _ in range(40)) if WINOGRAD.reason_against(core, NATIVE, p) is None]
    tiles = {p.tile: p for p in drawn}
    points = [WINOGRAD.default(core, NATIVE), tiles[min(tiles)], tiles[max(tiles)]]
    for picks in dict.fromkeys(points):
        validate(compile_candidate(spec, NATIVE, Candidate(WINOGRAD, picks), 2)).raise_if_failed()


def test_parts_add_up_in_one_order() -> None:
    """However many parts there are, integers whose transforms are exact come out to the last bit."""
    spec = ConvSpec.parse("conv2d n4 ic16 oc16 i8x8 k3x3 s1 p1 nobias weights")
    data = exact_data(spec)
    expected = run_onnxruntime(spec, data["src"], residual=data["residual"])
    for images, rows in ((1, 1), (1, 4), (2, 4), (4, 4)):
        picks = WINOGRAD.default(spec, NATIVE).replace(tile=2, images=images, block_rows=rows)
        grid = GradientGrid(spec, NATIVE, picks)
        assert grid.parts == 4 // images * (4 // rows)
        kernel = compile_candidate(spec, NATIVE, Candidate(WINOGRAD, picks), 2)
        # F(3, 2) has halves alone: sums of integers times a power of two are exact.
        np.testing.assert_array_equal(kernel(**data), expected)


@pytest.mark.parametrize("descriptor", LAYERS)
def test_magnitudes_bound_what_tiles_add(descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor).with_(dtype="f32", bias=False)
    data = {name: np.abs(array) for name, array in float_data(spec).items()}
    for m in gradient_tile_sizes(spec):
        sizes = {axis: outputs_of(spec, axis, m) for axis in transformed_axes(spec)}
        made = magnitudes_of_gradient(spec, data["src"], data["residual"], sizes)
        found = run_onnxruntime(made.spec, made.src, residual=made.weights)
        assert (found >= 0.999 * by_tiles(spec, data["src"], data["residual"], m)).all()


def by_tiles(spec: ConvSpec, src: Array, gradient: Array, m: int) -> Array:
    """The sum over tiles of |Aᵀ|[(|G| y) · (|Bᵀ| x)]."""
    src, gradient = spec.src_blocks.channels_first(src), spec.dst_blocks.channels_first(gradient)
    axes = [gradient_axes(spec, axis, m) for axis in range(spec.rank)]
    for at, (_, as_src, as_gradient) in enumerate(axes):
        src = tiled(src, as_src, 2 + 2 * at)
        gradient = tiled(gradient, as_gradient, 2 + 2 * at)
    letters = "tuvw"[: 2 * spec.rank]
    sums = np.einsum(f"nc{letters},no{letters}->oc{letters[1::2]}", src, gradient)
    for at, (back, *_) in enumerate(axes):
        sums = np.moveaxis(np.tensordot(np.abs(np.array(back)), sums, (1, 2 + at)), 0, 2 + at)
    return np.asarray(sums)


def tiled(images: Array, axis: Axis, at: int) -> Array:
    """An axis of images as tiles and the positions of each, transformed by absolute values."""
    matrix, size = np.abs(np.array(axis.inputs)), images.shape[at]
    places = np.array([[axis.first + axis.input(t, k) for k in range(axis.extent)] for t in range(axis.tiles)])
    near = np.moveaxis(images, at, -1)[..., places.clip(0, size - 1)] * ((places >= 0) & (places < size))
    return np.moveaxis(near @ matrix.T, (-2, -1), (at, at + 1))


def test_accuracy_says_what_may_transform() -> None:
    spec = ConvSpec.parse(LAYERS[0])
    assert WINOGRAD.reason_against(spec, NATIVE) is None
    reason = WINOGRAD.reason_against(spec.with_(accuracy="strict"), NATIVE)
    assert reason == "transforms, which accuracy strict does not admit"
    assert admitted_of_gradient("standard", 5) == []
    assert admitted_of_gradient("standard", 3) == [2, 3, 4, 5, 6]
    for changes in ({"groups": 2, "ic": 32}, {"kernel": (1, 1), "padding": 0}, {"ic": 3}, {"padding": 3}):
        assert WINOGRAD.reason_against(spec.with_(**changes), NATIVE)


@pytest.mark.parametrize(
    "sizes",
    [
        "i3x3 k2x2 p2_0x2_0 d4x4",  # the first tap lies before the input, always
        "i3x3 k2x2 p0_2x0_2 d4x4",  # the last one behind it
        "i2x9 k3x3 s3x1 p1x1",  # an output's step is longer than the input
    ],
)
def test_a_tap_that_meets_padding_alone_is_not_transformed(sizes: str) -> None:
    """Its gradient is 0 and admits no error; a transform of what its neighbours meet has one."""
    spec = ConvSpec.parse(f"conv2d n1 ic16 oc17 {sizes} weights nhwc relaxed")
    assert WINOGRAD.reason_against(spec, NATIVE) == "needs taps that each meet the input"


def test_it_is_the_default_where_products_take_the_time() -> None:
    target = resolve("cpu:znver4").on(1)
    for layer in ("ic64 oc64 i56x56", "ic128 oc128 i28x28", "ic256 oc256 i14x14", "ic512 oc512 i7x7"):
        spec = ConvSpec.parse(f"conv2d n16 {layer} k3x3 s1 p1 nobias weights")
        assert default_candidate(spec, target).schedule is WINOGRAD
        assert default_candidate(spec.with_(accuracy="strict"), target).schedule.id == "cpu_gradient"
    strided = ConvSpec.parse("conv2d n16 ic256 oc512 i14x14 k3x3 s2 p1 nobias weights")
    assert default_candidate(strided, target).schedule.id == "cpu_gradient"
