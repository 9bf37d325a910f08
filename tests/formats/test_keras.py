"""Layer configurations of Keras, against outputs that Keras itself gave and against identities."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convgen
from convgen.check.reference import run_onnxruntime
from convgen.errors import ConvgenError, SpecError, UnsupportedError
from convgen.formats.keras import specs_from_keras
from convgen.problem.spec import ConvSpec


def layer(class_name: str, **config: Any) -> dict[str, Any]:
    """As ``serialize_keras_object`` gives it, with some of the keys that do not matter here."""
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}, "registered_name": None}
    if class_name.endswith("D"):
        config = {"name": "it", "trainable": True, "dtype": policy, "kernel_regularizer": None} | config
    return {"module": "keras.layers", "class_name": class_name, "config": config, "registered_name": None}


def one(config: Any, input_shape: Any = None, **options: Any) -> ConvSpec:
    (spec,) = specs_from_keras(config, input_shape, **options)
    return spec


# ---- what Keras says --------------------------------------------------------------------------

#: The examples in the documentation of Keras's layers: the shapes of x and y.
DOCUMENTED = [
    ("Conv1D", {"filters": 32, "kernel_size": 3}, (4, 10, 128), (4, 8, 32)),
    ("Conv2D", {"filters": 32, "kernel_size": 3}, (4, 10, 10, 128), (4, 8, 8, 32)),
    ("Conv3D", {"filters": 32, "kernel_size": 3}, (4, 10, 10, 10, 128), (4, 8, 8, 8, 32)),
    ("Conv1DTranspose", {"filters": 32, "kernel_size": 3, "strides": 2}, (4, 10, 128), (4, 21, 32)),
    ("Conv2DTranspose", {"filters": 32, "kernel_size": 2, "strides": 2}, (4, 10, 8, 128), (4, 20, 16, 32)),
    ("Conv3DTranspose", {"filters": 32, "kernel_size": 2, "strides": 2}, (4, 10, 8, 12, 128), (4, 20, 16, 24, 32)),
    ("DepthwiseConv2D", {"kernel_size": 3}, (4, 10, 10, 12), (4, 8, 8, 12)),
]
FIRST = {"data_format": "channels_first"}
#: What Keras 3.15 gave: the shapes of x and y.
RECORDED: list[tuple[str, Any, tuple[int, ...], tuple[int, ...]]] = [
    ("Conv2D", {"filters": 4, "kernel_size": (3, 2), "strides": (2, 3), "padding": "same", "groups": 2},
     (2, 9, 7, 6), (2, 5, 3, 4)),
    ("Conv2D", {"filters": 4, "kernel_size": 4, "dilation_rate": (2, 1), **FIRST}, (1, 6, 9, 7), (1, 4, 3, 4)),
    ("Conv3D", {"filters": 3, "kernel_size": (3, 1, 2), "strides": (1, 2, 2), "padding": "same"},
     (1, 5, 8, 6, 2), (1, 5, 4, 3, 3)),
    ("Conv2DTranspose", {"filters": 2, "kernel_size": (2, 5), "strides": (3, 2), "padding": "same"},
     (1, 4, 5, 3), (1, 12, 10, 2)),
    ("Conv2DTranspose", {"filters": 2, "kernel_size": (2, 5), "strides": (3, 2)}, (1, 4, 5, 3), (1, 12, 13, 2)),
    ("Conv2DTranspose",
     {"filters": 2, "kernel_size": (4, 3), "strides": (3, 2), "padding": "same", "output_padding": (2, 1), **FIRST},
     (1, 3, 4, 5), (1, 2, 11, 10)),
    ("Conv3DTranspose",
     {"filters": 2, "kernel_size": (3, 4, 1), "strides": (2, 3, 4), "padding": "valid", "output_padding": (1, 0, 3)},
     (2, 2, 3, 4, 1), (2, 6, 10, 16, 2)),
    ("DepthwiseConv1D", {"kernel_size": 3, "strides": 2, "padding": "same", "depth_multiplier": 2},
     (1, 9, 3), (1, 5, 6)),
    ("DepthwiseConv2D", {"kernel_size": (3, 5), "dilation_rate": (2, 1), "depth_multiplier": 3, **FIRST},
     (1, 3, 9, 8), (1, 9, 5, 4)),
    ("SeparableConv1D", {"filters": 5, "kernel_size": 3, "strides": 2, "depth_multiplier": 2}, (2, 9, 3), (2, 4, 5)),
    ("SeparableConv2D", {"filters": 5, "kernel_size": 3, "dilation_rate": 2, "padding": "same"},
     (1, 9, 9, 3), (1, 9, 9, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("class_name", "config", "x", "y"), [*DOCUMENTED, *RECORDED])
def test_shapes_are_those_of_keras(class_name: str, config: Any, x: tuple[int, ...], y: tuple[int, ...]) -> None:
    specs = specs_from_keras(layer(class_name, **config), x)
    assert specs[0].src_shape == x
    assert specs[-1].dst_shape == y
    assert specs[-1].layout == ("nchw" if "data_format" in config else "nhwc")


#: What Keras 3.15 gave for the input 1, 10, 100 … and the kernel 1, 2, 3 …
TRANSPOSED = [
    ({"kernel_size": 3, "strides": 2, "padding": "same"}, [1, 2, 13, 20, 130, 200]),
    ({"kernel_size": 2, "strides": 2, "padding": "same"}, [1, 2, 10, 20, 100, 200]),
    ({"kernel_size": 4, "strides": 3, "padding": "same"}, [1, 2, 3, 14, 20, 30, 140, 200, 300]),
    ({"kernel_size": 5, "strides": 2, "padding": "same"}, [2, 13, 24, 135, 240, 350]),
    ({"kernel_size": 1, "strides": 3, "padding": "same"}, [1, 0, 0, 10, 0, 0, 100, 0, 0]),
    ({"kernel_size": 2, "strides": 4, "padding": "valid"}, [1, 2, 0, 0, 10, 20, 0, 0, 100, 200, 0, 0]),
    ({"kernel_size": 3, "strides": 2, "padding": "valid"}, [1, 2, 13, 20, 130, 200, 300]),
    ({"kernel_size": 3, "strides": 2, "padding": "same", "output_padding": 0}, [2, 13, 20, 130, 200]),
    ({"kernel_size": 3, "strides": 2, "padding": "same", "output_padding": 1}, [1, 2, 13, 20, 130, 200]),
    ({"kernel_size": 4, "strides": 2, "padding": "same", "output_padding": 1}, [2, 13, 24, 130, 240]),
    ({"kernel_size": 5, "strides": 3, "padding": "same", "output_padding": 2}, [2, 3, 14, 25, 30, 140, 250, 300, 400]),
    ({"kernel_size": 4, "strides": 3, "padding": "same", "output_padding": 2}, [2, 3, 14, 20, 30, 140, 200, 300]),
    ({"kernel_size": 3, "strides": 2, "padding": "valid", "output_padding": 1}, [1, 2, 13, 20, 130, 200, 300, 0]),
    ({"kernel_size": 3, "padding": "same", "dilation_rate": 2}, [102, 20, 203]),
    ({"kernel_size": 2, "padding": "same", "dilation_rate": 3}, [10, 100, 2]),
    ({"kernel_size": 2, "padding": "valid", "dilation_rate": 2}, [1, 10, 102, 20, 200]),
]
PLAIN = [
    ({"kernel_size": 2, "padding": "same"}, [21, 210, 2100, 21000, 10000]),
    ({"kernel_size": 4, "padding": "same"}, [432, 4321, 43210, 32100, 21000]),
    ({"kernel_size": 3, "strides": 2, "padding": "same"}, [32, 3210, 21000]),
    ({"kernel_size": 4, "strides": 3, "padding": "same"}, [432, 32100]),
    ({"kernel_size": 2, "padding": "same", "dilation_rate": 3}, [200, 2001, 20010, 100, 1000]),
    ({"kernel_size": 3, "padding": "causal", "dilation_rate": 2}, [3, 30, 302, 3020, 30201]),
    ({"kernel_size": 2, "strides": 2, "padding": "causal"}, [2, 210, 21000]),
    ({"kernel_size": 3, "strides": 3, "padding": "valid"}, [321]),
]


@pytest.mark.parametrize(
    ("class_name", "config", "expected"),
    [("Conv1DTranspose", *case) for case in TRANSPOSED] + [("Conv1D", *case) for case in PLAIN],
)
def test_values_are_those_of_keras(class_name: str, config: dict[str, Any], expected: list[int]) -> None:
    size = 3 if class_name.endswith("Transpose") else 5
    spec = one(layer(class_name, filters=1, use_bias=False, **config), (None, size, 1))
    src = (10.0 ** np.arange(size)).astype(np.float32).reshape(spec.src_shape)
    weights = np.arange(1, config["kernel_size"] + 1, dtype=np.float32).reshape(spec.weights_shape)
    assert run_onnxruntime(spec, src, weights).ravel().astype(int).tolist() == expected


# ---- identities -------------------------------------------------------------------------------


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_transpose_is_the_gradient_of_the_convolution_between_its_sizes(data: st.DataObject) -> None:
    """With the same kernel and padding, <conv(y), x> = <y, transpose(x)>."""
    rank = data.draw(st.integers(1, 3))
    axes = st.tuples(*[st.integers(1, 4)] * rank)
    strides, dilation = (data.draw(axes), 1) if data.draw(st.booleans()) else (1, data.draw(axes))
    shared: dict[str, Any] = {
        "kernel_size": data.draw(axes),
        "strides": strides,
        "dilation_rate": dilation,
        "use_bias": False,
    }
    shared["padding"] = data.draw(st.sampled_from(("same", "valid")))
    sizes = data.draw(axes)
    transpose = one(layer(f"Conv{rank}DTranspose", filters=3, **shared), (2, *sizes, 4))
    conv = one(layer(f"Conv{rank}D", filters=4, **shared), (2, *transpose.out_spatial, 3))
    assert conv.dst_shape == transpose.src_shape

    x, y, weights = numbers(transpose.src_shape, 1), numbers(conv.src_shape, 2), numbers(conv.weights_shape, 3)
    forward, back = run_onnxruntime(conv, y, weights), run_onnxruntime(transpose, x, weights)
    assert np.sum(forward * x, dtype=float) == np.sum(back * y, dtype=float)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_separable_convolution_is_its_two_parts(multiplier: int) -> None:
    """Its product of kernels as one dense convolution gives the same."""
    config = {"filters": 4, "kernel_size": (3, 2), "strides": 2, "padding": "same"}
    parts = layer("SeparableConv2D", **config, depth_multiplier=multiplier, activation="relu")
    depthwise, pointwise = specs_from_keras(parts, (2, 7, 8, 3))
    dense = one(layer("Conv2D", **config, activation="relu"), (2, 7, 8, 3))
    assert (depthwise.bias, depthwise.activation, depthwise.groups) == (False, "none", 3)
    assert (pointwise.bias, pointwise.activation) == (True, "relu")
    assert pointwise.is_pointwise

    x, depth, bias = numbers(dense.src_shape, 1), numbers((3, 2, 3, multiplier), 2), numbers((4,), 4)
    point = numbers((3 * multiplier, 4), 3)  # Keras's shapes of both kernels
    inner = run_onnxruntime(depthwise, x, np.moveaxis(depth, (2, 3), (0, 1)).reshape(depthwise.weights_shape))
    got = run_onnxruntime(pointwise, inner, point.T.reshape(pointwise.weights_shape), bias)
    product = np.einsum("hwim,imo->oihw", depth, point.reshape(3, multiplier, 4))
    np.testing.assert_array_equal(got, run_onnxruntime(dense, x, product, bias))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.sampled_from(("Conv1D", "DepthwiseConv1D")), st.data()
)
def test_causal_output_knows_no_later_input(k: int, s: int, d: int, class_name: str, data: st.DataObject) -> None:
    config = {"filters": 2, "kernel_size": k, "strides": s, "dilation_rate": d, "padding": "causal", "use_bias": False}
    spec = one(layer(class_name, **config), (None, 9, 2))
    assert spec.out_spatial == (math.ceil(9 / s),)
    x, weights = numbers(spec.src_shape, 1), numbers(spec.weights_shape, 2)
    time = data.draw(st.integers(0, spec.out_spatial[0] - 1))
    later = x.copy()
    later[:, time * s + 1 :] = 99
    first, second = (run_onnxruntime(spec, src, weights)[:, : time + 1] for src in (x, later))
    np.testing.assert_array_equal(first, second)


def test_both_data_formats_compute_the_same() -> None:
    last = one(layer("Conv2D", filters=3, kernel_size=(3, 2), padding="same"), (1, 5, 6, 2))
    first = one(layer("Conv2D", filters=3, kernel_size=(3, 2), padding="same", **FIRST), (1, 2, 5, 6))
    assert first == last.with_(layout="nchw")


# ---- forms of a configuration -----------------------------------------------------------------

CONV = {"filters": 8, "kernel_size": [3, 3]}


def test_every_way_to_hand_over_a_layer() -> None:
    expected = [ConvSpec.parse("conv2d ic3 oc8 i8x9 k3 nhwc")]
    inside = layer("Conv2D", **CONV) | {"build_config": {"input_shape": [None, 8, 9, 3]}}
    assert specs_from_keras(inside) == expected
    assert specs_from_keras(json.dumps(inside)) == expected
    for shape in ((None, 8, 9, 3), (1, 8, 9, 3), [8, 9, 3]):
        assert specs_from_keras(layer("Conv2D", **CONV), shape) == expected
        assert specs_from_keras(CONV, shape, class_name="Conv2D") == expected
    old = {"class_name": "Convolution2D", "config": CONV | {"batch_input_shape": [None, 8, 9, 3], "dtype": "float32"}}
    assert specs_from_keras(old) == expected
    assert specs_from_keras(inside, (2, 6, 6, 3)) == [ConvSpec.parse("conv2d n2 ic3 oc8 i6x6 k3 nhwc")]  # it is given
    assert specs_from_keras(inside, accuracy="strict") == [expected[0].with_(accuracy="strict")]
    assert convgen.specs_from_keras is specs_from_keras


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (None, "none"),
        ("linear", "none"),
        ("relu", "relu"),
        ("relu6", "clip(0,6)"),
        ("leaky_relu", "leaky_relu(0.2)"),
        ("swish", "silu"),
        ("hard_silu", "hardswish"),
        ("mish", "mish"),
        ("celu", "elu"),
        ("hard_tanh", "clip(-1,1)"),
        ({"module": "builtins", "class_name": "function", "config": "gelu", "registered_name": "gelu"}, "gelu"),
        (layer("ReLU", max_value=6.0, negative_slope=0.0, threshold=0.0), "clip(0,6)"),
        (layer("ReLU", max_value=None, negative_slope=0.0, threshold=0.0), "relu"),
        (layer("ReLU", max_value=None, negative_slope=0.25, threshold=0.0), "leaky_relu(0.25)"),
        (layer("LeakyReLU", negative_slope=0.1), "leaky_relu(0.1)"),
        (layer("LeakyReLU", alpha=0.1), "leaky_relu(0.1)"),  # Keras 2
        (layer("LeakyReLU"), "leaky_relu(0.3)"),
        (layer("ELU", alpha=0.5), "elu(0.5)"),
        (layer("Activation", activation="tanh"), "tanh"),
    ],
)
def test_activations(activation: Any, expected: str) -> None:
    assert one(layer("Conv2D", **CONV, activation=activation), (8, 8, 3)).activation == expected


def test_hard_sigmoid_is_that_of_its_version() -> None:
    config = layer("Conv2D", **CONV, activation="hard_sigmoid")
    new, old = one(config, (8, 8, 3)), one(config | {"keras_version": "2.15.0"}, (8, 8, 3))
    assert new.activation_op.params == (1 / 6, 0.5)
    assert old.activation_op.params == (0.2, 0.5)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, "f32"),
        ("float32", "f32"),
        ("float16", "f16"),
        ({"class_name": "DTypePolicy", "config": {"name": "mixed_bfloat16"}}, "bf16"),
        ({"class_name": "Policy", "config": {"name": "mixed_float16"}}, "f16"),
    ],
)
def test_dtypes(dtype: Any, expected: str) -> None:
    assert one(layer("Conv2D", **CONV, dtype=dtype), (8, 8, 3)).dtype == expected


# ---- models -----------------------------------------------------------------------------------


def model(class_name: str, *layers: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"class_name": class_name, "config": {"name": "m", "layers": list(layers)}, **extra}


#: Keras 2 says the input's shape once.
SEQUENTIAL = model(
    "Sequential",
    layer("ZeroPadding2D", padding=[[1, 1], [2, 3]], batch_input_shape=[None, 32, 32, 3]),
    layer("Conv2D", filters=8, kernel_size=[3, 3], activation="hard_sigmoid"),
    layer("BatchNormalization", axis=[3]),
    layer("MaxPooling2D", pool_size=[3, 3], strides=[2, 2], padding="same"),
    layer("SeparableConv2D", filters=4, kernel_size=[3, 3], padding="same"),
    layer("AveragePooling2D", pool_size=[3, 3], strides=None),
    layer("UpSampling2D", size=[2, 2]),
    layer("Cropping2D", cropping=[[0, 1], [2, 0]]),
    model("Sequential", layer("Conv2DTranspose", filters=2, kernel_size=[2, 2], strides=[2, 2])),
    layer("Dropout", rate=0.5),
    layer("Conv2D", filters=1, kernel_size=[1, 1]),
    layer("Flatten"),
    layer("Dense", units=10),
    keras_version="2.4.0",
)


def test_a_sequential_model_hands_its_shape_on() -> None:
    expected = [
        "conv2d ic3 oc8 i34x37 k3 hardsigmoid nhwc",
        "conv2d ic8 oc8 i16x18 k3 g8 p1 nobias nhwc",
        "conv2d ic8 oc4 i16x18 k1 nhwc",
        "convtranspose2d ic4 oc2 i9x10 k2 s2 nhwc",
        "conv2d ic2 oc1 i18x20 k1 nhwc",
    ]
    assert specs_from_keras(SEQUENTIAL) == [ConvSpec.parse(text) for text in expected]
    assert specs_from_keras(json.dumps(SEQUENTIAL), (2, 64, 64, 3))[-1].in_spatial == (38, 40)
    oldest = SEQUENTIAL | {"config": SEQUENTIAL["config"]["layers"]}  # of Keras 2.1
    assert specs_from_keras(oldest) == specs_from_keras(SEQUENTIAL)


def test_layers_of_other_models_say_their_input_themselves() -> None:
    """As Keras 3 writes it; the shape of a merging layer is a list of shapes."""
    first = layer("Conv2D", **CONV) | {"build_config": {"input_shape": [None, 8, 8, 3]}, "inbound_nodes": []}
    merge = layer("Add") | {"build_config": {"input_shape": [[None, 6, 6, 8], [None, 6, 6, 8]]}}
    second = layer("DepthwiseConv2D", kernel_size=3) | {"build_config": {"input_shape": [4, 6, 6, 8]}}
    inner = model("Functional", second)
    specs = specs_from_keras(model("Functional", first, merge, inner, build_config={"input_shape": None}))
    assert [spec.src_shape for spec in specs] == [(1, 8, 8, 3), (4, 6, 6, 8)]


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (layer("Conv2D", kernel_size=3), (8, 8, 3), "layer it: filters: expected an integer, or 1 of them, found none"),
        (layer("Conv2D", filters=3), (8, 8, 3), "layer it: kernel_size"),
        (layer("SeparableConv2D", kernel_size=3), (8, 8, 3), "layer it: filters"),
        (layer("Conv2D", **CONV), None, "layer it: input_shape: expected build_config.input_shape"),
        (layer("Conv2D", **CONV), (8, 3), "layer it: input_shape: expected 4 sizes, or 3 without the batch"),
        (layer("Conv2D", **CONV), (1, None, 8, 3), "only the batch may be None"),
        (layer("Conv2D", **CONV), (1, 8, 8, None), "only the batch may be None"),
        (layer("Conv2D", **CONV), "8x8x3", "input_shape: expected a list of sizes"),
        (layer("Conv2D", **CONV), (1, 2, 2, 3), "layer it: kernel[0]"),
        (layer("Conv2D", **CONV, padding="full"), (8, 8, 3), "layer it: padding: expected one of valid, same"),
        (layer("Conv2D", **CONV, padding="causal"), (8, 8, 3), "layer it: padding"),
        (layer("Conv2D", **CONV, data_format="nhwc"), (8, 8, 3), "layer it: data_format"),
        (layer("Conv2D", **CONV, strides=[1]), (8, 8, 3), "layer it: strides: expected an integer, or 2 of them"),
        (layer("Conv2D", **CONV, strides=0), (8, 8, 3), "layer it: strides: expected at least 1"),
        (layer("Conv2D", **CONV, dilation_rate="2"), (8, 8, 3), "layer it: dilation_rate"),
        (layer("Conv2D", **CONV, groups=2), (8, 8, 3), "layer it: groups: expected a divisor of ic=3"),
        (layer("Conv2D", **CONV, use_bias=None), (8, 8, 3), "layer it: bias"),
        (layer("DepthwiseConv2D", kernel_size=3, depth_multiplier=1.5), (8, 8, 3), "layer it: depth_multiplier"),
        (layer("Conv1DTranspose", filters=1, kernel_size=3, strides=2, output_padding=2), (8, 3), "output_padding"),
        (layer("LSTM"), (8, 3), "class_name: expected a convolution, or a model of layers, found LSTM"),
        (layer("Conv2D") | {"config": None}, (8, 8, 3), "config: expected the dictionary of a layer"),
        ({"filters": 3, "kernel_size": 3}, (8, 8, 3), "class_name"),
        ([CONV], (8, 8, 3), "config: expected the dictionary of a layer"),
        ("{", None, "config: expected a dictionary or JSON"),
        (model("Sequential", layer("Reshape"), layer("Conv2D", **CONV)), (64, 3), "layer it: input_shape"),
        (model("Sequential", layer("ZeroPadding2D", padding=1), layer("Conv2D", **CONV)), (8, 8, 3), "padding"),
        (model("Functional", layer("Conv2D", **CONV)), (8, 8, 3), "layer m: input_shape: expected none for a model"),
    ],
)
def test_wrong_configurations(config: Any, shape: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        specs_from_keras(config, shape)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (layer("Conv2D", **CONV, activation="softmax"), "layer it: activation: expected one of"),
        (layer("Conv2D", **CONV, activation=layer("PReLU")), "layer it: activation"),
        (layer("Conv2D", **CONV, activation=layer("ReLU", threshold=1.0)), "layer it: activation"),
        (layer("Conv2D", **CONV, activation=layer("ReLU", max_value=6.0, negative_slope=0.1)), "layer it: activation"),
        (layer("Conv2D", **CONV, dtype="float64"), "layer it: dtype: expected one of"),
        (layer("Conv2D", **CONV) | {"module": "mine.layers", "registered_name": "mine>Conv2D"}, "layer it: module"),
        (model("Sequential", layer("TimeDistributed", name="t", layer=layer("Conv2D", **CONV))), "layer t: expected"),
    ],
)
def test_what_a_spec_cannot_say(config: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        specs_from_keras(config, (8, 8, 3))


def test_models_nested_too_deeply() -> None:
    nested = model("Sequential")
    for _ in range(3000):
        nested = model("Sequential", nested)
    with pytest.raises(SpecError, match="nested less deeply"):
        specs_from_keras(nested)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value within a configuration."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in items for found in places(inner, (*path, key)))]


@pytest.mark.parametrize(
    "junk", [None, True, -1, 0, 10**30, 1.5, "x", "", [], {}, [[1]], [None, "x"], {"class_name": 3}]
)
def test_any_wrong_value_is_an_error_of_ours_or_does_not_matter(junk: Any) -> None:
    lone = layer("Conv2DTranspose", **CONV, strides=[2, 2], output_padding=1, activation=layer("ReLU", max_value=6.0))
    within = layer("TimeDistributed", layer=layer("Dense", units=3))
    for config in (lone | {"build_config": {"input_shape": [None, 8, 8, 3]}}, SEQUENTIAL, model("Functional", within)):
        for path in places(config):
            changed = holder = {"root": json.loads(json.dumps(config))}
            *way, last = ("root", *path)
            for key in way:
                holder = holder[key]
            holder[last] = junk
            with contextlib.suppress(ConvgenError):
                specs_from_keras(changed["root"])
