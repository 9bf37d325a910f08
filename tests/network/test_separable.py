"""Separable problems: their descriptors, what they mean in ONNX, and strips of rows in the cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import convgen
from convgen.check.onnx_separable import random_parameters, separable_model
from convgen.errors import SpecError
from convgen.formats.keras import specs_from_keras
from convgen.formats.separable import read_separables
from convgen.hardware.target import resolve
from convgen.network.network import Network, compile_planned, plan_model
from convgen.network.strip_tuning import StripTime, fastest
from convgen.problem.separable import SeparableSpec
from convgen.problem.spec import ConvSpec

KERAS = {
    "class_name": "SeparableConv2D",
    "config": {
        "name": "separable",
        "filters": 12,
        "kernel_size": [3, 3],
        "strides": [2, 2],
        "padding": "same",
        "depth_multiplier": 2,
        "activation": "relu",
        "data_format": "channels_last",
    },
    "build_config": {"input_shape": [1, 21, 20, 6]},
}


def compiled(spec: SeparableSpec, strips: int | None, threads: int = 1) -> Network:
    target = resolve("cpu").on(threads)
    plans = plan_model(separable_model(spec), target, strips=strips, name="separable")
    return compile_planned(plans, target, threads, "standard")


@pytest.mark.parametrize(
    "text",
    [
        "separable2d n1 ic32 oc64 i56x56 k3x3 s1x1 p1x1 clip(0,6) nhwc depthwise_clip(0,6)",
        "separable1d n2 ic6 oc7 i20 k3 s2 p0 nobias residual prelu strict m2 depthwise_bias",
        "separable3d n1 ic8 oc3 i5x9x10 k3x3x2 s1x2x1 p1x1x1 d1x1x2 dst_nhwc",
    ],
)
def test_descriptor_is_read_back(text: str) -> None:
    spec = SeparableSpec.parse(text)
    assert spec.descriptor == text
    assert SeparableSpec.parse(" ".join(reversed(text.split()[1:])).join([text.split()[0] + " ", ""])) == spec


def test_parts_are_what_the_descriptor_says() -> None:
    spec = SeparableSpec.parse("separable2d ic4 oc5 i8x9 k3x3 s2x1 psame m3 depthwise_relu sigmoid nhwc")
    assert spec.depthwise == ConvSpec.parse("conv2d n1 ic4 oc12 g4 i8x9 k3x3 s2x1 psame nobias relu nhwc dst_nchw")
    assert spec.pointwise == ConvSpec.parse("conv2d n1 ic12 oc5 i4x9 k1x1 s1x1 sigmoid nchw dst_nhwc")
    assert spec.parameters == {
        "depthwise_weights": (12, 1, 3, 3),
        "pointwise_weights": (5, 12, 1, 1),
        "pointwise_bias": (5,),
    }


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("separable2d ic3 oc6 i5x5 k3x3 g3", "g"),
        ("separable2d ic3 oc6 i5x5 k3x3 m0", "m0"),
        ("separable2d ic3 oc6 i5x5 k3x3 m2 m2", "m2"),
        ("separable2d ic3 oc6 i5x5 k3x3 f16", "depthwise.dtype"),
        ("separable2d ic3 oc6 i5x5 k3x3 data", "depthwise.direction"),
        ("separable2d ic3 oc6 i5x5 k3x3 depthwise_nobias", "activation"),
        ("separable4d ic3 oc6 i5x5 k3x3", "operator"),
    ],
)
def test_wrong_descriptor_names_the_field(text: str, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        SeparableSpec.parse(text)
    assert caught.value.field == field


def test_parts_that_do_not_fit_are_refused() -> None:
    first, second = ConvSpec.parse("conv2d ic4 oc4 g4 i8x8 k3x3"), ConvSpec.parse("conv2d ic4 oc5 i8x8 k1x1")
    with pytest.raises(SpecError, match=r"pointwise\.in_spatial: expected \(6, 6\)"):
        SeparableSpec(first, second)


def test_wrong_parameters_are_named() -> None:
    spec = SeparableSpec.parse("separable1d ic3 oc4 i9 k3")
    arrays = random_parameters(spec)
    with pytest.raises(SpecError, match="pointwise_bias: expected an array"):
        separable_model(spec, {name: array for name, array in arrays.items() if name != "pointwise_bias"})
    with pytest.raises(SpecError, match="depthwise_bias: expected one of"):
        separable_model(spec, arrays | {"depthwise_bias": np.zeros(3, np.float32)})


def test_network_computes_what_pytorch_does() -> None:
    spec = SeparableSpec.parse("separable2d ic6 oc10 i13x11 k3x3 s2x1 p1x1 m2 depthwise_relu relu nhwc")
    arrays = random_parameters(spec, 3)
    x = np.random.default_rng(4).standard_normal((1, 13, 11, 6), np.float32)
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    between = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2), weights["depthwise_weights"], stride=(2, 1), padding=1, groups=6
    ).relu()
    wanted = torch.nn.functional.conv2d(between, weights["pointwise_weights"], weights["pointwise_bias"]).relu()
    model = separable_model(spec, arrays)
    found = convgen.compile(model, threads=1, strips=3, records=False)(x)
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "separable2d ic16 oc24 i31x17 k3x3 s1x1 p1x1 clip(0,6) nhwc depthwise_clip(0,6)",
        "separable2d ic16 oc24 i31x17 k5x3 s2x2 p2x1 m2 nhwc residual relu depthwise_bias",
        "separable2d ic16 oc8 i20x9 k3x3 s1x1 p0x0 d2x1 nhwc",
        "separable1d ic16 oc8 i50 k3 s1 p1 nhwc",
        "separable2d ic16 oc24 i12x8 k3x3 s1x1 p1x1",  # rows of NCHW are no strips in memory: copied, and right
    ],
)
def test_strips_compute_the_same(text: str) -> None:
    spec = SeparableSpec.parse(text)
    whole, strips = compiled(spec, 0, 2), compiled(spec, 5, 2)
    assert len(whole.plan.steps) < len(strips.plan.steps)
    report = strips.validate(separable_model(spec))
    report.raise_if_failed()
    rng = np.random.default_rng(0)
    inputs = [rng.integers(-3, 4, info.shape).astype(np.float32) for info in whole.inputs.values()]
    np.testing.assert_allclose(strips(*inputs), whole(*inputs), rtol=1e-5, atol=1e-5)


def test_strips_of_nhwc_are_copied_nowhere_and_share_a_place() -> None:
    spec = SeparableSpec.parse("separable2d ic16 oc24 i32x16 k3x3 s1x1 p1x1 nhwc")
    whole, strips = compiled(spec, 0), compiled(spec, 4)
    assert len(strips.plan.steps) == 2 * 8
    assert strips.plan.arena * 8 == whole.plan.arena == spec.depthwise.bytes["dst"]


def test_exact_integers() -> None:
    spec = SeparableSpec.parse("separable2d ic16 oc24 i18x16 k3x3 s1x1 p1x1 nhwc")
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(-4, 5, shape).astype(np.float32) for name, shape in spec.parameters.items()}
    x = rng.integers(-4, 5, (1, 18, 16, 16)).astype(np.float32)
    model = separable_model(spec, arrays)
    session = ReferenceEvaluator(model)
    (wanted,) = session.run(None, {"src": x})
    for threads in (1, 2):
        found = convgen.compile(model, threads=threads, strips=4, accuracy="strict", records=False)(x)
        np.testing.assert_array_equal(found, wanted)


def test_default_strips_are_where_images_are_large() -> None:
    large = SeparableSpec.parse("separable2d ic64 oc128 i224x224 k3x3 s1x1 p1x1 nhwc")
    small = SeparableSpec.parse("separable2d ic16 oc16 i7x7 k3x3 s1x1 p1x1 nhwc")
    target = resolve("cpu").on(1)
    steps = [len(plan_model(separable_model(spec), target, strips=None)[0].steps) for spec in (large, small)]
    assert steps[0] > 2
    assert steps[1] == 2


def test_the_best_height_is_certainly_faster() -> None:
    times = [
        StripTime(8, True, 1.0, (1.0, 1.0, 1.0)),
        StripTime(0, False, 0.9, (1.1, 0.99, 1.2)),
        StripTime(4, False, 0.95, (1.05, 1.01, 1.1)),
    ]
    assert fastest(times).height == 4
    assert fastest(times[:2]).height == 8


def test_keras_layers_are_separable_problems(tmp_path: Path) -> None:
    (tmp_path / "layer.json").write_text(json.dumps(KERAS))
    (spec,) = read_separables(tmp_path / "layer.json")
    assert spec.descriptor == "separable2d n1 ic6 oc12 i21x20 k3x3 s2x2 p1x0_1 relu nhwc m2"
    first, second = specs_from_keras(KERAS)
    assert (first.weights_shape, second.weights_shape) == tuple(
        spec.parameters[name] for name in ("depthwise_weights", "pointwise_weights")
    )


def test_pairs_of_a_model_are_found(tmp_path: Path) -> None:
    spec = SeparableSpec.parse("separable2d ic6 oc10 i13x11 k3x3 s2x1 p1x1 m2 depthwise_clip(0,6) relu")
    onnx.save(separable_model(spec), tmp_path / "model.onnx")
    assert read_separables(tmp_path / "model.onnx") == [spec]
