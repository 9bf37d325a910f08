"""Gradients: against PyTorch's autograd, and the identities that define them, bit for bit on small integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convgen.check import autograd
from convgen.check.data import exact_data
from convgen.check.random_specs import Limits, Source, random_fields
from convgen.check.reference import run_onnxruntime
from convgen.errors import SpecError
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering.candidates import default_candidate, reference_candidate
from convgen.lowering.discover import schedules_of
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate
from convgen.problem.dtypes import widen
from convgen.problem.spec import ConvSpec

Array = np.ndarray[Any, Any]

#: Layers by what is particular about them.
LAYERS = {
    "plain": "conv2d n2 ic5 oc7 i9x8 k3x3 s1x1 p1x1",
    "strided": "conv2d n2 ic4 oc6 i10x9 k3x3 s2x2 p1x1",
    "rows left over": "conv2d n1 ic3 oc4 i11x10 k3x2 s3x3 p0x0",
    "dilated and grouped": "conv2d n2 ic6 oc9 g3 i11x9 k3x3 s1x1 p2x2 d2x2",
    "depthwise": "conv2d n2 ic8 oc8 g8 i9x9 k3x3 s2x2 p1x1",
    "depthwise with a multiplier": "conv2d n1 ic4 oc8 g4 i9x9 k3x3 s1x1 p1_0x0_1",
    "pointwise": "conv2d n2 ic17 oc9 i5x4 k1x1 s1x1 p0x0",
    "padded past its window": "conv2d n1 ic2 oc3 i5x5 k3x3 s1x1 p4_0x1_3",
    "one axis": "conv1d n2 ic3 oc4 i17 k5 s2 p2",
    "three axes": "conv3d n1 ic2 oc3 i5x4x6 k3x2x3 s1x2x1 p1x0x1",
    "channels last": "conv2d n2 ic5 oc7 i9x8 k3x3 s2x1 p1x1 nhwc",
    "between layouts": "conv2d n1 ic8 oc16 i6x6 k3x3 s1x1 p1x1 nhwc dst_nchw8c",
    "transposed": "convtranspose2d n2 ic5 oc4 i5x6 k3x3 s2x2 p1x1 op1x1",
    "transposed and grouped": "convtranspose2d n1 ic6 oc4 g2 i5x4 k4x3 s3x1 p1_0x1_2 d1x2",
    "output padding past the stride": "convtranspose2d n1 ic3 oc2 i4x5 k2x2 s1x1 p0x0 d3x3 op2x1",
}
DIRECTIONS = ("data", "weights")


def computed(spec: ConvSpec, how: str, **data: Array) -> Array:
    target = resolve()
    candidate = (reference_candidate if how == "reference" else default_candidate)(spec, target)
    return np.asarray(compile_candidate(spec, target, candidate, 2)(**data))


def by_onnx(spec: ConvSpec, data: dict[str, Array]) -> Array:
    return run_onnxruntime(spec, data["src"], data.get("weights"), residual=data.get("residual"))


def integers(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def gradients(spec: ConvSpec, **data: Array) -> Array:
    """What PyTorch's autograd has for a spec of direction data or weights."""
    pytest.importorskip("torch")
    return autograd.gradients(spec, data)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_kernels_and_onnx_are_autograd_s(layer: str, direction: str) -> None:
    spec = ConvSpec.parse(LAYERS[layer]).with_(direction=direction)
    data = exact_data(spec)
    expected = gradients(spec, **data)
    np.testing.assert_array_equal(by_onnx(spec, data), expected)
    np.testing.assert_array_equal(computed(spec, "reference", **data), expected)
    np.testing.assert_array_equal(computed(spec.with_(accuracy="strict"), "default", **data), expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("layer", ["plain", "depthwise", "channels last"])
def test_gradients_that_may_multiply_in_bf16(layer: str, dtype: str, direction: str) -> None:
    """Of integers that bf16 holds, their products and sums are the same whether they do or not."""
    spec = ConvSpec.parse(LAYERS[layer]).with_(direction=direction, accuracy="bf16", dtype=dtype)
    data = exact_data(spec)
    found = widen(computed(spec, "default", **data))
    assert np.unique(found).size > 10
    np.testing.assert_array_equal(found, widen(by_onnx(spec, data)))


def test_gradients_of_ordinary_layers_need_no_reference() -> None:
    for layer in ("plain", "strided", "dilated and grouped", "pointwise", "channels last", "one axis", "three axes"):
        for direction in DIRECTIONS:
            spec = ConvSpec.parse(LAYERS[layer]).with_(direction=direction, ic=36, oc=36)
            assert not default_candidate(spec, resolve()).schedule.is_reference, (layer, direction)


@pytest.mark.parametrize("layer", [name for name in LAYERS if "layouts" not in name])
def test_a_gradient_is_the_adjoint(layer: str) -> None:
    """<conv(x), y> = <x, data(y)> = <weights, gradient(x, y)>, each with kernels of its own."""
    spec = ConvSpec.parse(LAYERS[layer]).with_(bias=False)
    x, weights, y = integers(spec.src_shape, 1), integers(spec.weights_shape, 2), integers(spec.dst_shape, 3)
    forward = computed(spec, "reference", src=x, weights=weights)
    backward = computed(spec.with_(direction="data"), "reference", src=y, weights=weights)
    of_weights = computed(spec.with_(direction="weights"), "reference", src=x, residual=y)
    product = (forward.astype(float) * y).sum()
    assert product == (x.astype(float) * backward).sum() == (weights.astype(float) * of_weights).sum() != 0


class Drawn(Source):
    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))


FEW = Limits(channels=9, pixels={1: 30, 2: 12, 3: 6}, taps=64, macs=200_000, elements=50_000)


@st.composite
def layers(draw: Any) -> ConvSpec:
    """A layer that has gradients."""
    for _ in range(50):
        fields = random_fields(Drawn(draw), FEW, (4, 8))
        plain = {"dtype": "f32", "activation": "none", "residual": False, "n": max(fields["n"], 1)}
        known = {name: value for name, value in fields.items() if not name.endswith(("_zero", "_dtype"))}
        try:
            spec = ConvSpec(**known | plain | {"accuracy": "standard"})
        except SpecError:
            continue
        if FEW.admit(spec):
            return spec
    return ConvSpec.parse(LAYERS["plain"])


@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from(DIRECTIONS))
def test_onnx_and_the_layer_that_a_gradient_is(layer: ConvSpec, direction: str) -> None:
    spec = layer.with_(direction=direction)
    data = exact_data(spec)
    expected = gradients(spec, **data)
    np.testing.assert_array_equal(by_onnx(spec, data), expected)
    core = spec.core
    same = {name: array.reshape(core.shapes[name]) for name, array in data.items()}
    np.testing.assert_array_equal(by_onnx(core, same).reshape(expected.shape), expected)
    assert ConvSpec.parse(spec.descriptor) == spec == ConvSpec.from_dict(spec.to_dict())


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    "layer", ["conv2d n2 ic3 oc37 i161x157 k3x3 s2x2 p1x1", "conv2d n2 ic20 oc40 i80x80 k1x1 s1x1 p0x0"]
)
def test_gradients_of_large_images_are_fetched_ahead(layer: str, layout: str) -> None:
    """Those of dst, by the schedule for many channels; small ones are in the cache."""
    large, schedule = (
        ConvSpec.parse(layer).with_(direction="weights", layout=layout),
        schedules_of("cpu")["cpu_gradient"],
    )
    target = resolve("cpu").on(1)
    for spec, fetched in ((large, True), (large.with_(in_spatial=(9, 9)), False)):
        candidate = Candidate(schedule, schedule.default(spec.core, target))
        assert ("llvm.prefetch" in lower(spec, target, candidate).module.script()) == fetched
        data = exact_data(spec)
        made = compile_candidate(spec, target, candidate, 1)(**data)
        np.testing.assert_array_equal(made, gradients(spec, **data))


def test_depthwise_gradients_of_small_images_take_channels_together() -> None:
    """Those of large ones one by one; either is autograd's, bit for bit."""
    small, target = ConvSpec.parse("conv2d n3 ic40 oc40 g40 i14x13 k3x3 s2x2 p1x1 weights"), resolve("cpu").on(1)
    schedule = schedules_of("cpu")["cpu_gradient_grouped"]
    large = small.with_(in_spatial=(300, 300))
    small_picks, large_picks = (schedule.default(spec.core, target) for spec in (small, large))
    assert small_picks.block > large_picks.block == 1
    data = exact_data(small)
    made = compile_candidate(small, target, Candidate(schedule, small_picks), 1)(**data)
    np.testing.assert_array_equal(made, gradients(small, **data))


def test_a_gradient_of_src_is_a_layer_with_the_same_weights() -> None:
    strided = ConvSpec.parse("conv2d n2 ic4 oc6 i10x9 k3x3 s2x2 p1x1 data").core
    assert strided == ConvSpec.parse("convtranspose2d n2 ic6 oc4 i5x5 k3x3 s2x2 p1x1 op1x0 nobias")
    dense = ConvSpec.parse("conv2d n2 ic4 oc6 i10x9 k3x3 s1x1 p1x0 data").core
    assert dense == ConvSpec.parse("conv2d n2 ic6 oc4 i10x7 k3x3 s1x1 p1x2 nobias mirrored")
    transposed = ConvSpec.parse("convtranspose2d n2 ic4 oc6 i5x5 k3x3 s2x2 p1x1 op1x1 data").core
    assert transposed == ConvSpec.parse("conv2d n2 ic6 oc4 i10x10 k3x3 s2x2 p1x1 nobias")


def test_descriptors_of_forward_layers_do_not_know_directions() -> None:
    spec = ConvSpec.parse("conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1 forward")
    assert spec.descriptor == "conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1"
    assert not {"direction", "mirrored"} & spec.canonical.keys()


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("relu data", "activation"),
        ("residual weights", "residual"),
        ("i8 data", "dtype"),
        ("mirrored data", "mirrored"),
        ("data weights", "weights"),
    ],
)
def test_what_has_no_gradient_is_refused(words: str, field: str) -> None:
    with pytest.raises(SpecError, match=f"^{field}"):
        ConvSpec.parse(f"conv2d n1 ic4 oc4 i5x5 k3x3 s1x1 p1x1 {words}")
    with pytest.raises(SpecError, match=r"^direction: expected one of forward, data, weights, found 'backward'"):
        ConvSpec(1, 4, 4, (5, 5), (3, 3), direction="backward")
    with pytest.raises(SpecError, match=r"^n: expected 1 or more with direction weights"):
        ConvSpec(0, 4, 4, (5, 5), (3, 3), direction="weights")
