"""The mathematics of convolution, through built kernels and without another implementation.

Identities on small integers, where f32 arithmetic is exact: both the reference schedule and the
fastest one must satisfy them bit for bit (Winograd, which rounds, within a small error).
"""

from __future__ import annotations

import functools
import itertools
import math
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, stored
from strategies import ACTIVATIONS

from convgen.check.data import exact_data
from convgen.check.sandbox import run_guarded
from convgen.errors import SpecError
from convgen.hardware.target import resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.compute import Operands, ceildiv, flat, round_up
from convgen.problem.spec import ConvSpec

HOW = ["reference", "default"]
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86-64 processor")
few = settings(max_examples=5, deadline=None, print_blob=True)
#: Identities build several kernels for each example.
fewer = settings(few, max_examples=3)

Array = np.ndarray[Any, np.dtype[np.float32]]


@functools.cache
def kernel(spec: ConvSpec, how: str) -> Kernel:
    target = resolve()
    candidate = parse_candidate(spec, target, how) if how == "reference" else default_candidate(spec, target)
    built = compile_candidate(spec, target, candidate, 2)
    if how == "default":  # in a process of its own first: a write out of bounds would end this one
        with tempfile.TemporaryDirectory() as directory:
            run_guarded(built.path, built.name, spec, {"integers": exact_data(spec)}, 2, Path(directory), 60)
    return built


def convolve(how: str, spec: ConvSpec, src: Array, weights: Array, bias: Array | None = None, **more: Array) -> Array:
    src, weights = np.ascontiguousarray(src), np.ascontiguousarray(weights)
    return np.asarray(kernel(spec, how)(src, weights, bias, **more))


def integers(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def same(how: str, spec: ConvSpec, found: Array, expected: Array) -> None:
    """Equal; through a transform nearly so."""
    if kernel(spec, how).exact:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-2)


@st.composite
def layers(
    draw: st.DrawFn,
    *,
    transposed: bool | None = None,
    padded: bool = True,
    groups: tuple[int, ...] = (1, 1, 2),
    ranks: tuple[int, ...] = (1, 2, 3),
    layouts: tuple[str, ...] = ("nchw", "nhwc"),
) -> ConvSpec:
    """Small layers that only sum products: no bias, residual or activation."""
    rank = draw(st.sampled_from(ranks))
    if transposed is None:
        transposed = draw(st.booleans())

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    g = draw(st.sampled_from(groups))
    fields: dict[str, Any] = {
        "n": draw(st.integers(1, 2)),
        "ic": g * draw(st.sampled_from((1, 2, 16))),
        "oc": g * draw(st.sampled_from((1, 3, 17))),
        "kernel": axes(1, 3),
        "stride": axes(1, 3),
        "dilation": axes(1, 2),
        "padding": tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank)) if padded else 0,
        "groups": g,
        "transposed": transposed,
        "bias": False,
        "layout": draw(st.sampled_from(layouts)),
    }
    if transposed:
        limits = [max(s, d) for s, d in zip(fields["stride"], fields["dilation"], strict=True)]
        fields["output_padding"] = tuple(draw(st.integers(0, limit - 1)) for limit in limits)
    sizes = axes(2, 6)
    while True:
        try:
            return ConvSpec(in_spatial=sizes, **fields)
        except SpecError:  # the kernel or the crop is too large for the input
            sizes = tuple(size + 2 for size in sizes)


def on_axis(spec: ConvSpec, axis: int, index: slice) -> tuple[slice, ...]:
    """An index that takes ``index`` along a spatial axis, all of the others."""
    first = 2 if spec.layout == "nchw" else 1
    return (slice(None),) * (first + axis) + (index,)


# ---- one operand at a time ------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@few
@given(spec=layers(), seed=st.integers(0, 2**32))
def test_it_is_linear_in_src_and_in_weights(how: str, spec: ConvSpec, seed: int) -> None:
    x, y = integers(spec.src_shape, seed), integers(spec.src_shape, seed + 1)
    v, w = integers(spec.weights_shape, seed + 2), integers(spec.weights_shape, seed + 3)
    run = functools.partial(convolve, how, spec)
    same(how, spec, run(2 * x - 3 * y, w), 2 * run(x, w) - 3 * run(y, w))
    same(how, spec, run(x, 2 * v - 3 * w), 2 * run(x, v) - 3 * run(x, w))
    same(how, spec, run(np.zeros_like(x), w), np.zeros(spec.dst_shape, np.float32))


@pytest.mark.parametrize("how", HOW)
@few
@given(spec=layers(padded=False), seed=st.integers(0, 2**32), data=st.data())
def test_shifting_the_input_shifts_the_output(how: str, spec: ConvSpec, seed: int, data: st.DataObject) -> None:
    """By a stride (transposed: by one), the output moves by one (transposed: by a stride)."""
    axis = data.draw(st.integers(0, spec.rank - 1), label="axis")
    stride = spec.stride[axis]
    into, out = (1, stride) if spec.transposed else (stride, 1)
    x, w = integers(spec.src_shape, seed), integers(spec.weights_shape, seed + 1)
    x[on_axis(spec, axis, slice(-into, None))] = 0  # nothing is shifted out at the end and in again
    moved = np.roll(x, into, axis=axis + (2 if spec.layout == "nchw" else 1))
    before, after = convolve(how, spec, x, w), convolve(how, spec, moved, w)
    same(how, spec, after[on_axis(spec, axis, slice(out, None))], before[on_axis(spec, axis, slice(None, -out))])


@pytest.mark.parametrize("how", HOW)
@few
@given(spec=layers(), data=st.data())
def test_the_response_to_one_element_is_the_kernel(how: str, spec: ConvSpec, data: st.DataObject) -> None:
    """Every tap carries a src element to the pixel where ``pixel * stride + tap * dilation - begin = position``;
    transposed ``pixel = position * stride + tap * dilation - begin``.
    """
    position = tuple(data.draw(st.integers(0, size - 1)) for size in spec.in_spatial)
    ic_group, oc_group = spec.ic // spec.groups, spec.oc // spec.groups
    channel = data.draw(st.integers(0, spec.ic - 1))
    outputs = range(channel // ic_group * oc_group, (channel // ic_group + 1) * oc_group)
    order = Operands(spec).order
    x, expected = np.zeros(spec.src_shape, np.float32), np.zeros(spec.dst_shape, np.float32)
    x[order(0, channel, position)] = 1
    w = np.arange(1, math.prod(spec.weights_shape) + 1, dtype=np.float32).reshape(spec.weights_shape)
    for tap in itertools.product(*map(range, spec.kernel)):
        pixel = []
        for p, t, s, d, (b, _), size in zip(
            position, tap, spec.stride, spec.dilation, spec.padding, spec.out_spatial, strict=True
        ):
            where, rest = (p * s + t * d - b, 0) if spec.transposed else divmod(p + b - t * d, s)
            if not rest and 0 <= where < size:
                pixel.append(where)
        if len(pixel) == spec.rank:
            for o in outputs:
                at = (channel, o % oc_group) if spec.transposed else (o, channel % ic_group)
                expected[order(0, o, pixel)] = w[(*at, *tap)]
    same(how, spec, convolve(how, spec, x, w), expected)


# ---- one layer as another ---------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@fewer
@given(spec=layers(transposed=False), seed=st.integers(0, 2**32))
def test_transposed_convolution_is_the_adjoint(how: str, spec: ConvSpec, seed: int) -> None:
    """``<conv(x), y> = <x, convtranspose(y)>`` with the same weights."""
    rest = [(p - w) % s for p, w, s in zip(spec.padded_spatial, spec.window, spec.stride, strict=True)]
    back = spec.with_(ic=spec.oc, oc=spec.ic, in_spatial=spec.out_spatial, transposed=True, output_padding=tuple(rest))
    assert back.dst_shape == spec.src_shape
    assert back.weights_shape == spec.weights_shape
    x, y, w = integers(spec.src_shape, seed), integers(spec.dst_shape, seed + 1), integers(spec.weights_shape, seed + 2)
    forward, backward = convolve(how, spec, x, w), convolve(how, back, y, w)
    found, expected = np.vdot(forward.astype(np.float64), y), np.vdot(x, backward.astype(np.float64))
    if kernel(spec, how).exact and kernel(back, how).exact:
        assert found == expected
    else:
        assert found == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("how", HOW)
@fewer
@given(spec=layers(groups=(2, 3)), seed=st.integers(0, 2**32))
def test_groups_are_a_block_diagonal_dense_kernel(how: str, spec: ConvSpec, seed: int) -> None:
    dense = spec.with_(groups=1)
    x, w = integers(spec.src_shape, seed), integers(spec.weights_shape, seed + 1)
    blocks = np.zeros(dense.weights_shape, np.float32)
    rows, columns = (n // spec.groups for n in dense.weights_shape[:2])
    for g in range(spec.groups):
        at = slice(g * rows, (g + 1) * rows)
        blocks[at, g * columns : (g + 1) * columns] = w[at]
    same(how, dense, convolve(how, spec, x, w), convolve(how, dense, x, blocks))


@pytest.mark.parametrize("how", HOW)
@fewer
@given(spec=layers(), seed=st.integers(0, 2**32))
def test_dilation_is_a_kernel_stuffed_with_zeros(how: str, spec: ConvSpec, seed: int) -> None:
    larger = tuple(size + k for size, k in zip(spec.in_spatial, spec.kernel, strict=True))  # the window fits
    spec = spec.with_(in_spatial=larger, dilation=2, output_padding=0)
    stuffed = spec.with_(dilation=1, kernel=spec.window)
    x, w = integers(spec.src_shape, seed), integers(spec.weights_shape, seed + 1)
    wide = np.zeros(stuffed.weights_shape, np.float32)
    wide[(slice(None), slice(None), *[slice(None, None, 2)] * spec.rank)] = w
    same(how, stuffed, convolve(how, spec, x, w), convolve(how, stuffed, x, wide))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("end", ["first", "last"])
@fewer
@given(spec=layers(ranks=(1, 2)), seed=st.integers(0, 2**32))
def test_a_unit_axis_changes_nothing(how: str, end: str, spec: ConvSpec, seed: int) -> None:
    """1-D is 2-D, and 2-D is 3-D, with one more axis of size 1."""

    def more(values: tuple[Any, ...], unit: Any) -> tuple[Any, ...]:
        return (unit, *values) if end == "first" else (*values, unit)

    wide = spec.with_(
        in_spatial=more(spec.in_spatial, 1),
        kernel=more(spec.kernel, 1),
        stride=more(spec.stride, 2 if not spec.transposed else 1),
        padding=more(spec.padding, (0, 0)),
        dilation=more(spec.dilation, 3),
        output_padding=more(spec.output_padding, 0),
    )
    x, w = integers(spec.src_shape, seed), integers(spec.weights_shape, seed + 1)
    found = convolve(how, wide, x.reshape(wide.src_shape), w.reshape(wide.weights_shape))
    same(how, wide if not kernel(wide, how).exact else spec, found.reshape(spec.dst_shape), convolve(how, spec, x, w))


@pytest.mark.parametrize("how", HOW)
@fewer
@given(spec=layers(layouts=("nchw",)), seed=st.integers(0, 2**32))
def test_nhwc_is_nchw_with_its_axes_permuted(how: str, spec: ConvSpec, seed: int) -> None:
    last = spec.with_(layout="nhwc")
    x, w = integers(spec.src_shape, seed), integers(spec.weights_shape, seed + 1)
    found = convolve(how, last, np.moveaxis(x, 1, -1), w)
    same(how, last if not kernel(last, how).exact else spec, np.moveaxis(found, -1, 1), convolve(how, spec, x, w))


@pytest.mark.parametrize("dst", LAYOUTS)
@pytest.mark.parametrize("src", LAYOUTS)
def test_the_reference_computes_the_same_in_all_layouts(src: str, dst: str) -> None:
    plain = ConvSpec.parse("conv2d n2 ic16 oc32 g2 i4x5 k3x2 s1x2 p1 residual relu")
    spec = plain.with_(layout=src, dst_layout=dst)
    x, w, b = integers(plain.src_shape, 0), integers(plain.weights_shape, 1), integers((plain.oc,), 2)
    residual = integers(plain.dst_shape, 3)
    found = convolve("reference", spec, stored(x, src), w, b, residual=np.ascontiguousarray(stored(residual, dst)))
    np.testing.assert_array_equal(found, stored(convolve("reference", plain, x, w, b, residual=residual), dst))


@pytest.mark.parametrize("how", HOW)
@fewer
@given(spec=layers(), seed=st.integers(0, 2**32))
def test_images_of_a_batch_do_not_know_of_each_other(how: str, spec: ConvSpec, seed: int) -> None:
    batch, one = spec.with_(n=3), spec.with_(n=1)
    x, w = integers(batch.src_shape, seed), integers(spec.weights_shape, seed + 1)
    alone = np.concatenate([convolve(how, one, x[i : i + 1], w) for i in range(3)])
    same(how, one, convolve(how, batch, x, w), alone)


@pytest.mark.parametrize("how", HOW)
@fewer
@given(spec=layers(), seed=st.integers(0, 2**32))
def test_bias_and_residual_are_added_before_the_activation(how: str, spec: ConvSpec, seed: int) -> None:
    full = spec.with_(bias=True, residual=True, activation="relu")
    x, w = integers(spec.src_shape, seed), integers(spec.weights_shape, seed + 1)
    bias, residual = integers((spec.oc,), seed + 2), integers(spec.dst_shape, seed + 3)
    along = bias.reshape(1, -1, *[1] * spec.rank) if spec.layout == "nchw" else bias
    expected = np.maximum(convolve(how, spec, x, w) + along + residual, 0)
    same(how, full, convolve(how, full, x, w, bias, residual=residual), expected)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "descriptor",
    [
        "conv2d n0 ic3 oc4 i5x5 k3x3 relu",
        "conv2d n0 ic3 oc4 i5x5 k1x1 nhwc residual",
        "convtranspose1d n0 ic3 oc4 i5 k3 s2 nobias",
    ],
)
def test_an_empty_batch_gives_an_empty_output(how: str, descriptor: str) -> None:
    spec = ConvSpec.parse(descriptor)
    more = {"residual": np.empty(spec.dst_shape, np.float32)} if spec.residual else {}
    bias = np.ones(spec.oc, np.float32) if spec.bias else None
    y = convolve(how, spec, np.empty(spec.src_shape, np.float32), np.ones(spec.weights_shape, np.float32), bias, **more)
    assert y.shape == spec.dst_shape
    assert y.size == 0


# ---- activations ------------------------------------------------------------------------------

SLOPE = np.float32(0.3)


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def clip(low: float, high: float) -> Callable[[Array], Array]:
    return lambda x: np.minimum(np.maximum(x, low), high)


def gelu(x: Array) -> Array:
    return np.asarray(x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))


FORMULAS: dict[str, Callable[[Array], Any]] = {
    "none": lambda x: x,
    "relu": clip(0, math.inf),
    "relu6": clip(0, 6),
    "clip(-1,2.5)": clip(-1, 2.5),
    "clip(0,inf)": clip(0, math.inf),
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "leaky_relu(0.25)": lambda x: np.where(x < 0, 0.25 * x, x),
    "prelu": lambda x: np.where(x < 0, SLOPE * x, x),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "silu": lambda x: x * sigmoid(x),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "hardsigmoid": lambda x: clip(0, 1)(0.2 * x + 0.5),
    "hardsigmoid(0.25,0.5)": lambda x: clip(0, 1)(0.25 * x + 0.5),
    "elu": lambda x: np.where(x < 0, np.expm1(np.minimum(x, 0)), x),
    "elu(0.5)": lambda x: np.where(x < 0, 0.5 * np.expm1(np.minimum(x, 0)), x),
    "gelu": gelu,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_follow_their_formula(activation: str) -> None:
    """From deep saturation to rounding at zero, in float64; and NaN stays NaN."""
    points = np.concatenate([np.linspace(-30, 30, 601), [-1e30, -300, -1e-6, 0, 1e-6, 300, 1e30]])
    x = np.append(points, np.nan).astype(np.float32)
    spec = ConvSpec(1, 1, 1, (x.size,), (1,), bias=False, activation=activation)
    ones = np.ones(spec.weights_shape, np.float32)
    layer = kernel(spec, "reference").bind(ones, slope=SLOPE if spec.has_slope else None)
    found = layer(x.reshape(spec.src_shape)).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.asarray(FORMULAS[activation](x[:-1].astype(np.float64)))
    assert np.isnan(found[-1])
    error = np.abs(found[:-1] - expected) / (1 + np.abs(x[:-1]))
    assert error.max() < 16 * 2.0**-24, f"at {x[error.argmax()]}: {found[error.argmax()]}"


#: Largest error in units in the last place over the inputs named: what was measured, and a little more.
ULPS: dict[str, tuple[int, float, float]] = {
    "sigmoid": (3, -80, 80),
    "silu": (3, -80, 80),
    "mish": (5, -40, 80),
    "elu": (2, -80, 80),
    "tanh": (7, -80, 80),
}
ULPS |= {"gelu": (4, -0.5, 80), "gelu_tanh": (4, -0.5, 80)}


@pytest.mark.parametrize("how", ["cpu", pytest.param("cpu:x86-64-v2", marks=x86_only)])  # with and without FMA
@pytest.mark.parametrize("activation", ULPS)
def test_activations_are_accurate_in_units_in_the_last_place(activation: str, how: str) -> None:
    """Of floats of every size, from subnormal results to saturation."""
    most, low, high = ULPS[activation]
    x = np.arange(0, 0x7F800000, 9973, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, -x])
    x = x[(low <= x) & (x <= high)]
    spec = ConvSpec(1, 1, 1, (x.size,), (1,), bias=False, activation=activation)
    target = resolve(how)
    built = compile_candidate(spec, target, parse_candidate(spec, target, "reference"), 1)
    found = built(x.reshape(spec.src_shape), np.ones(spec.weights_shape, np.float32)).reshape(-1)
    expected = np.asarray(FORMULAS[activation](x.astype(np.float64)))
    unit = np.spacing(np.maximum(np.abs(expected), 2.0**-126).astype(np.float32))
    error = np.abs(found - expected) / unit
    assert error.max() < most, f"at {x[error.argmax()]}: {found[error.argmax()]}"
    if activation in {"tanh", "sigmoid"}:
        assert np.abs(found).max() <= 1


# ---- helpers of the definition ----------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_rounding_up(a: int, b: int) -> None:
    assert ceildiv(a, b) == math.ceil(a / b)
    assert round_up(a, b) == ceildiv(a, b) * b
    assert 0 <= round_up(a, b) - a < b


def test_flat_is_the_row_major_position() -> None:
    shape = (2, 3, 4)
    for index in np.ndindex(*shape):
        assert flat(index, shape) == np.ravel_multi_index(index, shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logical_is_the_inverse_of_order(layout: str) -> None:
    dst_layout = LAYOUTS[LAYOUTS.index(layout) - 1]
    ops = Operands(ConvSpec(1, 32, 48, (4, 5), (1, 1), residual=True, layout=layout, dst_layout=dst_layout))
    assert ops.residual is not None
    for order, logical, tensor, channel in (
        (ops.order, ops.logical, ops.src, 29),
        (ops.dst_order, ops.dst_logical, ops.residual, 45),
    ):
        index = order(0, channel, (2, 3))
        assert logical(index) == (0, channel, (2, 3))
        assert all(0 <= i < size for i, size in zip(index, tensor.shape, strict=True))
