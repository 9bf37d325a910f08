"""What the ONNX reader folds into a convolution, and what it leaves alone."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import graph, run_onnx, same_numbers

import convgen
from convgen.errors import SpecError, UnsupportedError
from convgen.formats.onnx.reader import layers_from_onnx, specs_from_onnx
from convgen.problem.spec import ConvSpec

FUSED = {
    "y = BatchNormalization(c, k, k, k, k)": "",
    "y = BatchNormalization<epsilon=0.5>(c, k, mean, shift, k)": "",
    "b = BatchNormalization(c, k, k, shift, k) y = Relu(b)": "relu",
    "b = BatchNormalization(c, k, k, shift, k) m = Mul(b, k3) a = Add(k4, m) y = Relu(a)": "relu",
    "u = Unsqueeze(k, axes12) y = Add(c, u)": "",
    "u = Reshape(shift, shape) y = Add(u, c)": "",
    "u = Reshape(shift, shape) v = Mul(u, two) n = Neg(v) y = Add(n, c)": "",
    "a = Add(c, k3) r = Sum(a, x) y = Tanh(r)": "residual tanh",
    "r = Add(x, c) a = Add(r, one) y = Sigmoid(a)": "residual sigmoid",
    "r = Add(x, c) a = Sub(r, k3) y = Sigmoid(a)": "residual sigmoid",
    "i = Identity(c) r = Add(i, x) y = LeakyRelu<alpha=0.1>(r)": "nobias residual leaky_relu(0.1)",
    "y = LeakyRelu(c)": "nobias leaky_relu",
    "y = Mul(c, half)": "nobias",
    "y = Div(c, k3)": "nobias",
    "y = Neg(c)": "nobias",
    "a = Sub(c, k3) n = Neg(a) y = Relu(n)": "relu",
    "a = Sub(k4, c) y = Relu(a)": "relu",
    "y = PRelu(c, k3)": "nobias prelu",
    "y = PRelu(c, one)": "nobias prelu",
    "d = Dropout(c) y = Relu(d)": "nobias relu",
    "d, mask = Dropout(c) y = Relu(d)": "nobias relu",
    "h = Cast<to=1>(c) y = Relu(h)": "nobias relu",
    "s = Sigmoid(c) y = Mul(c, s)": "nobias silu",
    "s = Sigmoid(c) y = Mul(s, c)": "nobias silu",
    "n = Neg(c) e = Exp(n) p = Add(e, one1) y = Div(c, p)": "nobias silu",
    "n = Neg(c) e = Exp(n) p = Add(one1, e) s = Div(one1, p) y = Mul(s, c)": "nobias silu",
    "n = Neg(c) e = Exp(n) p = Add(one1, e) y = Reciprocal(p)": "nobias sigmoid",
    "h = HardSigmoid<alpha=0.16666667, beta=0.5>(c) y = Mul(c, h)": "nobias hardswish",
    "a = Add(c, three) l = Clip(a, zero, six) m = Mul(c, l) y = Div(m, six)": "nobias hardswish",
    "a = Add(three, c) l = Clip(a, zero, six) d = Div(l, six) y = Mul(d, c)": "nobias hardswish",
    "a = Add(c, three) l = Clip(a, zero, six) d = Mul(l, sixth) y = Mul(c, d)": "nobias hardswish",
    "a = Add(c, three) l = Relu(a) u = Min(l, six) m = Mul(u, c) y = Mul(m, sixth)": "nobias hardswish",
    "a = Add(c, three) l = Max(a, zero) u = Min(six, l) m = Mul(c, sixth) y = Mul(m, u)": "nobias hardswish",
    "y = HardSwish(c)": "nobias hardswish",
    "y = HardSigmoid(c)": "nobias hardsigmoid",
    "a = Add(c, three) l = Clip(a, zero, six) y = Div(l, six)": "nobias hardsigmoid(0.16666667,0.5)",
    "m = Mul(c, fifth) a = Add(m, half) u = Min(a, one1) y = Max(zero, u)": "nobias hardsigmoid",
    "y = Elu<alpha=0.5>(c)": "nobias elu(0.5)",
    "y = Gelu(c)": "nobias gelu",
    'y = Gelu<approximate="tanh">(c)': "nobias gelu_tanh",
    "d = Div(c, sqrt2) e = Erf(d) a = Add(e, one1) m = Mul(c, a) y = Mul(m, half)": "nobias gelu",
    "h = Mul(half, c) d = Mul(c, rsqrt2) e = Erf(d) a = Add(one1, e) y = Mul(h, a)": "nobias gelu",
    "r = Sqrt(two) d = Div(c, r) e = Erf(d) f = Mul(e, half) a = Add(half, f) y = Mul(a, c)": "nobias gelu",
    "p = Pow(c, three) q = Mul(p, cubic) a = Add(c, q) t = Mul(a, root) h = Tanh(t) "
    "b = Add(one1, h) d = Mul(c, half) y = Mul(d, b)": "nobias gelu_tanh",
    "s = Mul(c, c) p = Mul(s, c) q = Mul(cubic, p) a = Add(q, c) t = Mul(root, a) h = Tanh(t) "
    "b = Add(h, one1) d = Mul(b, half) y = Mul(d, c)": "nobias gelu_tanh",
    "s = Pow(c, two) q = Mul(cubic, s) f = Add(q, one1) g = Mul(root, c) t = Mul(g, f) h = Tanh(t) "
    "b = Add(h, one1) d = Mul(b, c) y = Mul(d, half)": "nobias gelu_tanh",
    "y = Mish(c)": "nobias mish",
    "s = Softplus(c) t = Tanh(s) y = Mul(c, t)": "nobias mish",
    "e = Exp(c) p = Add(e, one1) s = Log(p) t = Tanh(s) y = Mul(t, c)": "nobias mish",
    "m = Mul(c, fifth) y = Max(m, c)": "nobias leaky_relu(0.2)",
    "y = Max(c, zero)": "nobias clip(0,inf)",
    "a = Relu(c) y = Min(a, six)": "nobias relu6",
    "a = Relu(c) y = Clip(a, , six)": "nobias relu6",
    "a = Max(c, nhalf) y = Min(half, a)": "nobias clip(-0.5,0.5)",
    "a = Min(c, half) y = Max(nhalf, a)": "nobias clip(-0.5,0.5)",
    "lo = Constant<value_float=0.0>() hi = Constant<value=float {6.0}>() y = Clip(c, lo, hi)": "nobias relu6",
    "lo = Constant<value_float=-0.5>() y = Clip(c, lo)": "nobias clip(-0.5,inf)",
    "y = Clip(c, , half)": "nobias clip(-inf,0.5)",
    "a = Relu(c) y = Relu(a)": "nobias relu",
    "a = Relu(c) t = Shape(c) y = Reshape(a, t)": "nobias relu",
}


@pytest.mark.parametrize("body", FUSED)
def test_fused(body: str) -> None:
    source = graph(body)
    (layer,) = layers_from_onnx(source, arrays=True)
    assert layer.spec == ConvSpec.parse(f"conv2d ic4 oc4 i8x8 k3x3 p1 {FUSED[body]}")
    same_numbers(source, layer)


CONV = "c = Conv<pads=[1,1,1,1]>(x, w)"
BASES = [CONV, "c = Conv<pads=[1,1,1,1]>(x, w, k)", "c = ConvTranspose<pads=[1,1,1,1]>(x, w, k)"]
BASES += ["c = Conv<pads=[1,1,1,1], group=2>(x, w2, k)", "c = ConvTranspose<pads=[1,1,1,1], group=2>(x, w2)"]
BASES += ["p = Pad(x, pads) c = Conv(p, w)", "p = Pad(x, pads) c = Conv<dilations=[2,2], pads=[1,1,1,1]>(p, w)"]
BASES += ["v = Mul(w, k4) u = Transpose<perm=[1,0,2,3]>(v) c = Conv<pads=[1,1,1,1]>(x, u, k)"]
BASES += ["v = DequantizeLinear<axis=0>(w8, k, z8) c = Conv<pads=[1,1,1,1]>(x, v)"]


def renamed_in(body: str, names: dict[str, str]) -> str:
    """The body with the values that have a new name called by that."""
    return re.sub(r"\b[a-z]\w*\b(?!=)", lambda match: names.get(match[0], match[0]), body)


def chained(bodies: list[str]) -> tuple[str, list[str]]:
    """One body after another on ``c``: the text, and the values between."""
    lines, values = [], ["c"]
    for number, body in enumerate(bodies):
        own = {name for left in re.findall(r"([\w, ]+?) = ", body) for name in left.replace(",", " ").split()}
        after = f"y{number}"
        renamed = {name: f"{name}_{number}" for name in own} | {"c": values[-1], "y": after}
        lines.append(renamed_in(body, renamed))
        values.append(after)
    return " ".join(lines), values


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_whatever_is_folded_is_exact(data: st.DataObject) -> None:
    """Any sequence of foldable things, values between used elsewhere or given out."""
    bodies = data.draw(st.lists(st.sampled_from(sorted(FUSED)), min_size=1, max_size=4))
    text, values = chained(bodies)
    leaks = data.draw(st.lists(st.sampled_from(values[:-1]), max_size=2, unique=True))
    ways = [data.draw(st.sampled_from(["used", "output"])) for _ in leaks]
    used = " ".join(
        f"leak{i} = Abs({name})" for i, (name, way) in enumerate(zip(leaks, ways, strict=True)) if way == "used"
    )
    given_out = [f"leak{i}" if way == "used" else name for i, (name, way) in enumerate(zip(leaks, ways, strict=True))]
    source = graph(f"{text} {used}", " ".join([values[-1], *given_out]), conv=data.draw(st.sampled_from(BASES)))
    (layer,) = layers_from_onnx(source, arrays=True)
    same_numbers(source, layer)
    if leaks:
        assert layer.dst not in values or values.index(layer.dst) <= min(map(values.index, leaks))


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("a = Relu(c) y = Add(a, c)", "y"),  # c is used twice
        ("y = Relu(c)", "y c"),  # c is an output
        ("s = Sigmoid(c) y = Mul(c, s)", "y s"),  # the gate is an output
        ("s = Sigmoid(c) y = Mul(x, s)  z = Relu(c)", "y z"),  # not c's own gate
        ("h = HardSigmoid(c) y = Mul(c, h)", "y"),  # another slope than hardswish's
        ("y = Add(c, c)", "y"),
        ("y = BatchNormalization<training_mode=1>(c, k, k, k, k)", "y"),
        ("y, m, v = BatchNormalization(c, k, k, k, k)", "y"),  # updated statistics: training as well
        ("p = GlobalAveragePool(x) q = Squeeze(p) y = BatchNormalization(c, q, k, k, k)", "y"),
        ("s = GlobalAveragePool(x) y = Mul(c, s)", "y"),  # a scale that depends on the data
        ("s = GlobalAveragePool(x) y = Add(c, s)", "y"),  # a residual that is broadcast
        ("s = GlobalAveragePool(x) y = Clip(c, , s)", "y"),  # a bound that depends on the data
        ("y = PRelu(x, c)", "y"),  # c is the slope
        ("y = Softmax<axis=1>(c)", "y"),
    ],
)
def test_not_fused(body: str, outputs: str) -> None:
    (entry,) = specs_from_onnx(graph(body, outputs))
    assert entry.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 nobias")


def test_a_scale_after_the_residual_is_not_fused() -> None:
    (entry,) = specs_from_onnx(graph("r = Add(c, x) m = Mul(r, k3) y = Relu(m)"))
    assert entry.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 nobias residual")


def test_one_residual_only() -> None:
    (entry,) = specs_from_onnx(graph("r = Add(c, x) q = Add(r, x) y = Relu(q)"))
    assert entry.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 nobias residual")


@pytest.mark.parametrize("order", ["a = Add(d, s)", "a = Add(s, d)"])
@pytest.mark.parametrize("shortcut_first", [True, False])
def test_the_deeper_convolution_takes_the_addition(order: str, shortcut_first: bool) -> None:
    main, shortcut = "d = Conv<pads=[1,1,1,1]>(c, w)", "s = Conv<pads=[1,1,1,1]>(x, w)"
    first = f"{shortcut} {main}" if shortcut_first else f"{main} {shortcut}"
    entries = specs_from_onnx(graph(f"{first} {order} y = Relu(a)"))
    by_name = {name: entry.spec.descriptor.partition("p1x1 ")[2] for entry in entries for name in entry.names}
    assert by_name == {"c": "nobias", "s": "nobias", "d": "nobias residual relu"}


PADS = {
    "p = Pad(x, pads) c = Conv(p, w) y = Relu(c)": "p1 relu",
    "p = Pad(x, pads, zero) c = Conv<pads=[0,1,2,0]>(p, w) y = Relu(c)": "p1_3x2_1 relu",
    'p = Pad(x, pads) c = Conv<auto_pad="SAME_UPPER">(p, w) y = Relu(c)': "p2 relu",
    "p = Pad(x, one12, , axes12) c = Conv(p, w1) y = Relu(c)": "p1x0 relu",
    "q = Pad(x, pads) p = Pad(q, pads) c = Conv<strides=[2,2]>(p, w) y = Relu(c)": "p2 s2 relu",
}
NO_PADS = {
    "p = Pad(x, pads, half) c = Conv(p, w) y = Relu(c)": "i10x10",  # not zeros
    'p = Pad<mode="reflect">(x, pads) c = Conv(p, w) y = Relu(c)': "i10x10",
    "p = Pad(x, pads) c = Conv(p, w) r = Relu(p) y = Relu(c)": "i10x10",  # p is used elsewhere
    "p = Pad(x, pads) c = ConvTranspose(p, w) y = Relu(c)": "i10x10",
    "n = Neg(pads) p = Pad(x, n) c = Conv(p, w) y = Relu(c)": "i6x6",  # a crop
    "p = Pad(x, channels) c = Conv(p, w1) y = Relu(c)": "ic6 i8x8",
}


def padded(body: str, opset: int = 20) -> onnx.ModelProto:
    source = graph("", opset=opset, conv=body)
    extra = {"one12": np.array([0, 1, 0, 1]), "channels": np.array([0, 1, 0, 0, 0, 1, 0, 0])}
    extra["w1"] = np.ones((4, 6 if "channels" in body else 4, 3, 3), np.float32)
    used = {name for node in source.graph.node for name in node.input}
    source.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in extra.items() if name in used)
    return source


@pytest.mark.parametrize("body", PADS)
def test_padding_before(body: str) -> None:
    source = padded(body)
    (layer,) = layers_from_onnx(source, arrays=True)
    assert layer.spec == ConvSpec.parse(f"conv2d ic4 oc4 i8x8 k3x3 nobias {PADS[body]}")
    same_numbers(source, layer)


@pytest.mark.parametrize("body", NO_PADS)
def test_padding_that_stays(body: str) -> None:
    (layer,) = layers_from_onnx(padded(body))
    assert layer.spec is not None
    assert f" {NO_PADS[body]} ".replace("ic6 ", "ic6 oc4 ") in f" {layer.spec} "


def test_padding_as_an_attribute() -> None:
    (layer,) = layers_from_onnx(padded("p = Pad<pads=[0,0,1,1,0,0,1,1]>(x) c = Conv(p, w) y = Relu(c)", opset=10))
    assert layer.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 nobias relu")


WEIGHTS = {
    "u = Identity(w)": 7,
    "u = Reshape(flat, sizes)": 7,
    "u = Transpose<perm=[1,0,3,2]>(w)": 7,
    "u = Unsqueeze<axes=[3]>(thin)": 7,
    "u = Unsqueeze(thin, three)": 13,
    "u = Squeeze<axes=[0]>(thick)": 11,
    "u = Slice(long, starts, ends)": 11,
    "u = Cast<to=1>(doubles)": 9,
    "v = Concat<axis=0>(half, half) u = Concat<axis=1>(v, v)": 7,
    "u = DequantizeLinear<axis=0>(w8, scale, zero8)": 13,
    "u = DequantizeLinear<axis=0>(w8, scale)": 21,
    "v = Div(w, scales) u = Mul(v, scales)": 7,
    "v = Sqrt(w) a = Add(v, w) b = Sub(a, v) u = Expand(b, sizes)": 8,
    "u = ConstantOfShape<value = float[1] {0.5}>(sizes)": 9,
    "s = Shape(x4) u = ConstantOfShape<value = float[1] {0.5}>(s)": 9,
    "v = Constant<value_floats=[0.1, 0.2, 0.3, 0.4]>() a = Reshape(v, column) u = Expand(a, sizes)": 12,
    "v = Constant<value_float=0.25>() u = Expand(v, sizes)": 12,
    "s = Constant<value_ints=[4, 4, 3, 3]>() u = ConstantOfShape(s)": 12,
}


@pytest.mark.parametrize("body", WEIGHTS)
@pytest.mark.parametrize("newest", [False, True])
def test_weights_that_are_computed(body: str, newest: bool) -> None:
    """Constant expressions, from the opset on that has their operators as they are written here."""
    opset = 21 if newest and "axes=[" not in body else WEIGHTS[body]
    source = graph("y = Relu(c)", opset=opset, conv=f"{body} c = Conv(x, u)")
    rng = np.random.default_rng(0)
    w = rng.uniform(0.5, 1.5, (4, 4, 3, 3)).astype(np.float32)
    arrays = {"flat": w.reshape(-1), "thin": w[..., 0], "thick": w[None], "long": np.concatenate([w, w])}
    arrays |= {"doubles": w.astype(float), "half": w[:2, :2], "w8": (w * 9).astype(np.int8), "x4": w}
    arrays |= {"scale": w[:, 0, 0, 0], "zero8": np.arange(4, dtype=np.int8), "scales": w[:1, :, :1, :1]}
    arrays |= {"sizes": np.array([4, 4, 3, 3]), "starts": np.array([2]), "ends": np.array([6]), "three": np.array([3])}
    arrays["column"] = np.array([4, 1, 1, 1])
    used = {name for node in source.graph.node for name in node.input}
    del source.graph.initializer[:]
    for name, array in (arrays | {"w": w}).items():
        if name in used:
            source.graph.initializer.append(numpy_helper.from_array(array, name))
    (layer,) = layers_from_onnx(source, arrays=True)
    kernel = "3x1" if "thin" in body else "3x3"
    assert layer.spec == ConvSpec.parse(f"conv2d ic4 oc4 i8x8 k{kernel} nobias relu")
    same_numbers(source, layer)


def test_sparse_weights_are_refused() -> None:
    """As an initializer and as a Constant; the other convolutions are read."""
    values = numpy_helper.from_array(np.ones(2, np.float32), "u")
    tensor = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([3, 9]), "at"), [4, 4, 3, 3])
    source = graph("d = Conv(c, u) e = Conv(c, v) y = Relu(e)")
    source.graph.sparse_initializer.append(tensor)
    source.graph.node.insert(0, helper.make_node("Constant", [], ["v"], sparse_value=tensor))
    first, *others = layers_from_onnx(source)
    assert first.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 nobias")
    for layer, name in zip(others, "uv", strict=True):
        assert isinstance(layer.refusal, UnsupportedError)
        assert f"weights '{name}' is a sparse tensor; dense ones are supported" in str(layer.refusal)


def test_what_cannot_be_read_leaves_the_rest() -> None:
    source = graph("d = Conv(c, w5) e = Cast<to=11>(c) f = Cast<to=11>(w) g = Conv(e, f) y = Conv(c, w)")
    source.graph.initializer.append(numpy_helper.from_array(np.ones((4, 5, 3, 3), np.float32), "w5"))
    layers = layers_from_onnx(source)
    assert [(layer.name, layer.spec is None) for layer in layers] == [("c", 0), ("d", 1), ("g", 1), ("y", 0)]
    assert [type(layer.refusal) for layer in layers[1:3]] == [SpecError, UnsupportedError]
    with pytest.raises(SpecError, match="model: Conv 'd': weights: expected 4 input channels"):
        specs_from_onnx(source)


def test_half_precision() -> None:
    source = graph("b = BatchNormalization(c, k, k, shift, k) h = HardSwish(b) y = Identity(h)")
    source.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    source.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in source.graph.initializer}
    del source.graph.initializer[:]
    source.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float16), name) for name, a in arrays.items())
    (layer,) = layers_from_onnx(source, arrays=True)
    assert layer.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 hardswish f16")
    k, shift = arrays["k"], arrays["shift"]
    assert {name: array.dtype.name for name, array in layer.arrays.items()} == dict.fromkeys(layer.arrays, "float16")
    factor = k / np.sqrt(k + 1e-5)
    np.testing.assert_allclose(layer.arrays["weights"], arrays["w"] * factor.reshape(4, 1, 1, 1), rtol=3e-3)
    np.testing.assert_allclose(layer.arrays["bias"], k - shift * factor, rtol=1e-2, atol=1e-2)


def test_products_beyond_any_float() -> None:
    body = " ".join(f"v{i + 1} = Mul(v{i}, huge)" for i in range(12))
    source = graph(f"r = Relu(c) v0 = Identity(r) {body} y = Relu(v12)")
    source.graph.initializer.append(numpy_helper.from_array(np.float32(3e38), "huge"))
    assert layers_from_onnx(source)[0].spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 nobias relu")


def test_folding_that_overflows_is_refused() -> None:
    source = graph("y = Mul(c, huge)")
    source.graph.initializer.append(numpy_helper.from_array(np.float32(3e38), "huge"))
    assert layers_from_onnx(source)[0].spec is not None
    (layer,) = layers_from_onnx(source, arrays=True)
    assert str(layer.refusal) == "model: Conv 'c': folding what follows it leaves the range of f32"


def test_arrays_given_at_run_time() -> None:
    source = graph("b = BatchNormalization(c, p, k, k, k) y = Relu(b)", inputs=", float[4] p")
    (layer,) = layers_from_onnx(source, arrays=True)
    assert layer.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 relu")
    assert layer.arrays == {}


@pytest.mark.parametrize("body", ["y = Mul(c, p)", "y = Add(c, p)", "y = Div(p, c)", "y = Max(c, p)"])
def test_arithmetic_with_inputs_is_not_folded(body: str) -> None:
    """They may be data; only where an operator has parameters by its meaning, inputs are taken for some."""
    (layer,) = layers_from_onnx(graph(body, inputs=", float[4,1,1] p"))
    assert layer.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 nobias")


def test_old_models_list_their_initializers_as_inputs() -> None:
    source = graph("b = BatchNormalization(c, k, k, k, k) m = Mul(b, k3) y = Relu(m)", opset=9)
    for tensor in source.graph.initializer:
        source.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    source.ir_version = 3
    (layer,) = layers_from_onnx(source, arrays=True)
    assert layer.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 relu")
    same_numbers(source, layer, {"x": np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)})


def test_the_layers_of_a_model_in_place() -> None:
    """src, dst and residual say which values of the model a layer stands between."""
    (first, second) = layers_from_onnx(graph("a = Relu(c) d = Conv<pads=[1,1,1,1]>(a, w) r = Add(d, a) y = Relu(r)"))
    assert (first.src, first.dst, first.residual) == ("x", "a", "")
    assert (second.src, second.dst, second.residual) == ("a", "y", "a")


@pytest.mark.parametrize("opset", [7, 10])
def test_old_clip_attributes(opset: int) -> None:
    (entry,) = specs_from_onnx(graph("y = Clip<min=0.0, max=6.0>(c)", opset=opset))
    assert entry.spec.activation == "clip(0,6)"
    (entry,) = specs_from_onnx(graph("y = Clip<min=0.0, max=3.4028234663852886e38>(c)", opset=opset))
    assert entry.spec.activation == "clip(0,inf)"


def test_before_opset_7_nothing_is_folded() -> None:
    """Conv was the same, but Add had a broadcast of its own."""
    (entry,) = specs_from_onnx(graph("a = Add<broadcast=1, axis=1>(c, k) y = Relu(a)", opset=6))
    assert entry.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1 nobias")


def test_parameters_may_be_inputs() -> None:
    body = "b = BatchNormalization(c, p, p, p, p) d = Conv<group=2, pads=[1,1,1,1]>(b, v, p) y = Relu(d)"
    first, second = specs_from_onnx(graph(body, inputs=", float[4] p, float[4,2,3,3] v"))
    assert first.spec == ConvSpec.parse("conv2d ic4 oc4 i8x8 k3x3 p1")
    assert second.spec == ConvSpec.parse("conv2d ic4 oc4 g2 i8x8 k3x3 p1 relu")


TORCH_ACTIVATIONS = {
    "ReLU()": "relu",
    "ReLU6()": "relu6",
    "Hardtanh(-1, 2)": "clip(-1,2)",
    "Hardswish()": "hardswish",
    "Hardsigmoid()": "hardsigmoid(0.16666667,0.5)",
    "SiLU()": "silu",
    "Mish()": "mish",
    "GELU()": "gelu",
    "GELU(approximate='tanh')": "gelu_tanh",
    "PReLU(4)": "prelu",
    "ELU(0.5)": "elu(0.5)",
    "LeakyReLU(0.1)": "leaky_relu(0.1)",
}


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
@pytest.mark.parametrize("opset", [9, 11, 18])
def test_what_pytorch_exports(activation: str, opset: int) -> None:
    """Padding, normalization and activation, in whatever operators the opset has, fold without a rest."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    layers = [torch.nn.ZeroPad2d(1), torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4), eval(f"torch.nn.{activation}")]
    module, x, saved = torch.nn.Sequential(*layers).eval(), torch.randn(1, 4, 8, 8), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, x, saved, opset_version=opset, dynamo=False, do_constant_folding=False)
    source = onnx.load_from_string(saved.getvalue())
    (layer,) = layers_from_onnx(source, arrays=True)
    assert layer.spec == ConvSpec.parse(f"conv2d ic4 oc4 i8x8 k3x3 p1 {TORCH_ACTIVATIONS[activation]}")
    assert (layer.src, layer.dst) == (source.graph.input[0].name, source.graph.output[0].name)
    same_numbers(source, layer)


def test_a_kernel_takes_the_arrays() -> None:
    source = graph("b = BatchNormalization(c, k, k, shift, k) r = Add(b, x) y = PRelu(r, k3)")
    (layer,) = layers_from_onnx(source, arrays=True)
    assert layer.spec is not None
    x = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    bound = convgen.build(layer.spec, threads=1, records=False).bind(**layer.arrays)
    (expected,) = run_onnx(source, [layer.dst], {"x": x})
    np.testing.assert_allclose(bound(x, residual=x), expected, rtol=1e-4, atol=1e-4)
