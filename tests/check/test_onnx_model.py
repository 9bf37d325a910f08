"""ConvSpec to ONNX, and ONNX Runtime as the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from integer_data import integers
from layouts import LAYOUTS, channels_first, stored
from strategies import ACTIVATIONS, specs_without_activation

from convgen.check.onnx_model import onnx_model
from convgen.check.reference import OrtReference, run_onnxruntime
from convgen.errors import SpecError
from convgen.problem.dtypes import narrow, numpy_dtype
from convgen.problem.spec import ConvSpec

# ---- the written model means the spec ---------------------------------------------------------


def plain_loops(spec: ConvSpec, data: dict[str, np.ndarray]) -> np.ndarray:
    """The spec without its activation in float64, scattered or gathered tap by tap."""
    axes = range(spec.rank)
    x, w = data["src"].astype(float), data["weights"].astype(float)
    residual = data.get("residual")
    x = channels_first(x, spec.layout)
    residual = None if residual is None else channels_first(residual, spec.dst_layout)
    full = [
        (spec.in_spatial[a] - 1) * spec.stride[a] + spec.window[a] + spec.output_padding[a]
        if spec.transposed
        else spec.out_spatial[a]
        for a in axes
    ]
    y = np.zeros((spec.n, spec.oc, *full))
    padded = x if spec.transposed else np.pad(x, [(0, 0), (0, 0), *spec.padding])
    steps = spec.in_spatial if spec.transposed else spec.out_spatial
    ic, oc = spec.ic // spec.groups, spec.oc // spec.groups
    everything = slice(None)
    at: tuple[Any, ...]
    for tap in itertools.product(*map(range, spec.kernel)):
        starts = [t * d for t, d in zip(tap, spec.dilation, strict=True)]
        window = tuple(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(starts, steps, spec.stride, strict=True))
        for g in range(spec.groups):
            i, o = slice(g * ic, (g + 1) * ic), slice(g * oc, (g + 1) * oc)
            if spec.transposed:
                at = (i, everything, *tap)
                part = w[at].T
                y[(everything, o, *window)] += np.einsum("oi,ni...->no...", part, padded[:, i])
            else:
                at = (o, everything, *tap)
                part = w[at]
                y[:, o] += np.einsum("oi,ni...->no...", part, padded[(everything, i, *window)])
    if spec.transposed:
        at = (..., *(slice(b, n - e) for n, (b, e) in zip(full, spec.padding, strict=True)))
        y = y[at]
    if spec.bias:
        y = y + data["bias"].reshape(-1, *[1] * spec.rank)
    if residual is not None:
        y = y + residual
    if spec.dtype == "i8":
        y = np.clip(np.rint(y * data["scale"].reshape(-1, *[1] * spec.rank)), -128, 127)
    return stored(y, spec.dst_layout)


@pytest.mark.parametrize("dst", LAYOUTS)
@pytest.mark.parametrize("src", LAYOUTS)
@pytest.mark.parametrize("words", ["conv1d i9 k3 p1", "conv2d i4x5 k3x2 g2", "convtranspose3d i2x3x2 k2 s2 nobias"])
def test_onnx_runtime_agrees_with_plain_loops_in_all_layouts(words: str, src: str, dst: str) -> None:
    spec = ConvSpec.parse(f"{words} n2 ic32 oc48 residual").with_(layout=src, dst_layout=dst)
    data = integers(spec)
    np.testing.assert_array_equal(run_onnxruntime(spec, **data, threads=1), plain_loops(spec, data))


@settings(max_examples=150, deadline=None)
@given(specs_without_activation())
def test_onnx_runtime_agrees_with_plain_loops(spec: ConvSpec) -> None:
    zeros = spec.src_zero or spec.weights_zero or spec.dst_zero
    types = {spec.src_dtype, spec.weights_dtype, spec.dst_dtype}
    assume(len(types) == 1 and not zeros)  # what others mean is tested where it is said
    data = integers(spec)
    expected = plain_loops(spec, data)
    assert expected.shape == spec.dst_shape
    found = run_onnxruntime(spec, **data, threads=1)
    assert found.dtype == numpy_dtype(spec.dtype)
    np.testing.assert_array_equal(found, narrow(expected, spec.dtype))
    if spec.dtype in ("f32", "i8"):
        np.testing.assert_array_equal(OrtReference(spec, **data, threads=1).run(), expected)
    onnx.checker.check_model(onnx_model(spec), full_check=True)


def test_output_padding_up_to_the_dilation() -> None:
    """ONNX Runtime refuses output padding from the stride on; what is left of it is bias alone."""
    spec = ConvSpec.parse("convtranspose2d n1 ic2 oc3 i3x1 k2x1 s1x2 p0x1_0 d3x3 op2x2")
    data = integers(spec)
    got = run_onnxruntime(spec, **data, threads=1)
    np.testing.assert_array_equal(got, plain_loops(spec, data))
    np.testing.assert_array_equal(got[0, :, -1, -1], data["bias"])


_erf = np.vectorize(math.erf, otypes=[float])
FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "clip(-1,2.5)": lambda x: np.clip(x, -1, 2.5),
    "clip(0,inf)": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "leaky_relu(0.25)": lambda x: np.where(x < 0, 0.25 * x, x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "hardsigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "hardsigmoid(0.25,0.5)": lambda x: np.clip(0.25 * x + 0.5, 0, 1),
    "elu": lambda x: np.where(x < 0, np.expm1(x), x),
    "elu(0.5)": lambda x: np.where(x < 0, 0.5 * np.expm1(x), x),
    "gelu": lambda x: x / 2 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def test_every_activation_has_a_formula() -> None:
    assert set(FORMULAS) == set(ACTIVATIONS) - {"none", "prelu"}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("activation", FORMULAS)
def test_activation(activation: str, layout: str) -> None:
    spec = ConvSpec(1, 1, 1, (2001,), (1,), bias=False, activation=activation, layout=layout)
    x = np.linspace(-20, 20, 2001, dtype=np.float32)
    src, one = x.reshape(spec.src_shape), np.ones(spec.weights_shape, np.float32)
    expected = FORMULAS[activation](x.astype(float))
    for got in (run_onnxruntime(spec, src, one), OrtReference(spec, src, one).run()):
        np.testing.assert_allclose(got.reshape(-1), expected, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_prelu(rank: int, layout: str) -> None:
    spec = ConvSpec(2, 3, 4, (5, 4, 3)[:rank], (1,) * rank, activation="prelu", residual=True, layout=layout)
    data = integers(spec)
    plain = plain_loops(spec, data)
    slope = data["slope"] if layout == "nhwc" else data["slope"].reshape(-1, *[1] * rank)
    np.testing.assert_array_equal(run_onnxruntime(spec, **data, threads=1), np.where(plain < 0, slope * plain, plain))
    shared = run_onnxruntime(
        spec, **data | {"slope": np.array(0.5, np.float32)}, threads=1
    )  # one slope stands for all channels
    np.testing.assert_array_equal(shared, np.where(plain < 0, plain / 2, plain))


def test_infinity_passes_an_open_clip() -> None:
    spec = ConvSpec(1, 1, 1, (4,), (1,), bias=False, activation="clip(0,inf)")
    src = np.array([[[np.inf, -np.inf, np.nan, 1]]], np.float32)
    got = run_onnxruntime(spec, src, np.ones((1, 1, 1), np.float32))
    np.testing.assert_array_equal(got, [[[np.inf, 0, np.nan, 1]]])


def test_reference_reads_its_inputs_anew_and_keeps_its_output() -> None:
    spec = ConvSpec.parse("conv2d n1 ic2 oc3 i5x5 k3x3 p1 residual")
    data = integers(spec)
    reference = OrtReference(spec, **data, threads=2)
    first = reference.run()
    data["src"][:] += 1
    reference()
    np.testing.assert_array_equal(reference.output, plain_loops(spec, data))
    assert not np.array_equal(first, reference.output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.zeros((3, 2, 3), np.float32)}, r"weights: expected shape \(3, 2, 3, 3\), found \(3, 2, 3\)"),
        ({"src": np.zeros((1, 2, 5, 5))}, "src: expected dtype float32, found float64"),
        ({"bias": None}, "bias: expected an array, found none"),
        ({"slope": np.zeros(3, np.float32)}, "slope: expected none, found one"),
        ({"residual": np.zeros((1, 3, 5, 5), np.float32)}, "residual: expected none, found one"),
    ],
)
def test_wrong_arrays(change: dict[str, Any], message: str) -> None:
    spec = ConvSpec.parse("conv2d n1 ic2 oc3 i5x5 k3x3 p1")
    for call in (run_onnxruntime, OrtReference):
        with pytest.raises(SpecError, match=message):
            call(spec, **integers(spec) | change)


def test_superfluous_constant() -> None:
    with pytest.raises(SpecError, match="bias: expected none"):
        onnx_model(ConvSpec.parse("conv1d ic1 oc1 i4 k1 nobias"), bias=np.zeros(1, np.float32))
