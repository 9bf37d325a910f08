"""The ONNX reader: models as people have them, and hostile ones."""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from integer_data import integers
from onnx import TensorProto, helper, numpy_helper, parser
from paths import ROOT
from strategies import specs

import convgen
from convgen.check.onnx_model import onnx_model
from convgen.check.reference import run_onnxruntime
from convgen.errors import SpecError, UnsupportedError
from convgen.formats.entries import SpecEntry
from convgen.formats.onnx.node import OnnxLayer
from convgen.formats.onnx.reader import layers_from_onnx, specs_from_onnx
from convgen.problem.spec import ConvSpec

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
LIGHT = sorted((DATA / "light").glob("light_*.onnx"))
CONVOLUTIONS = ("Conv", "ConvTranspose")

# ---- models the onnx package ships ------------------------------------------------------------

Case = tuple[onnx.ModelProto, list[np.ndarray], np.ndarray]


def _stored_cases() -> dict[str, Case]:
    cases = {}
    for folder in sorted(DATA.glob("pytorch-*/test_*onv*")):
        if not (folder / "model.onnx").exists() or "onv" not in folder.name:
            continue
        model = onnx.load(folder / "model.onnx")
        if not any(node.op_type in CONVOLUTIONS for node in model.graph.node):
            continue
        sets = folder / "test_data_set_0"
        read = [
            [numpy_helper.to_array(onnx.load_tensor(file)) for file in sorted(sets.glob(f"{kind}_*.pb"))]
            for kind in ("input", "output")
        ]
        cases[folder.name] = (model, read[0], read[1][0])
    return cases


def _node_cases() -> dict[str, Case]:
    from onnx.backend.test.case import node as package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The package's collect_testcases() would build the cases of every operator, which takes seconds.
        for module in ("conv", "convtranspose", "causal_conv_with_state"):
            importlib.import_module(f"{package.__name__}.{module}")
    cases = {}
    for case in package._NodeTestCases:
        if any(node.op_type in CONVOLUTIONS for node in case.model.graph.node):
            inputs, outputs = case.data_sets[0]
            cases[case.name] = (case.model, list(inputs), outputs[0])
    return cases


STORED, NODE = _stored_cases(), _node_cases()
PLAIN = {name: case for name, case in (STORED | NODE).items() if len(case[0].graph.node) == 1}
EXPANDED = sorted(set(NODE) - set(PLAIN))  # another operator spelled out, with a Conv in its middle


def test_the_package_has_the_cases() -> None:
    assert len(STORED) == 30
    assert set(STORED) <= set(PLAIN)
    assert len(PLAIN) >= 47
    assert len(LIGHT) == 9


@pytest.mark.parametrize("name", PLAIN)
def test_shipped_case(name: str) -> None:
    """The spec read from a model computes the outputs that come with the model."""
    model, inputs, expected = PLAIN[name]
    (entry,) = specs_from_onnx(model)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    fed = [value.name for value in model.graph.input if value.name not in values]
    values |= dict(zip(fed, inputs, strict=True))
    got = run_onnxruntime(entry.spec, *(values[name] for name in model.graph.node[0].input))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXPANDED)
def test_shipped_case_within_another_operator(name: str) -> None:
    model, _, expected = NODE[name]
    (entry,) = specs_from_onnx(model)
    assert entry.spec.dtype == {"float32": "f32", "float16": "f16"}[expected.dtype.name]
    assert entry.spec.dst_shape == expected.shape
    gated = expected.dtype == np.float32 and ("silu" in name or "swish" in name)  # f16 is widened in between
    assert entry.spec.activation == ("silu" if gated else "none")


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_light_graph(path: Path) -> None:
    """Every convolution is read, and its output has the shape that shape inference gives."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in [*graph.value_info, *graph.output]
    }
    nodes = {node.name or node.output[0]: node for node in graph.node if node.op_type in CONVOLUTIONS}
    entries = specs_from_onnx(onnx.load(path))
    names = [name for entry in entries for name in entry.names]
    assert sorted(names) == sorted(nodes)
    assert len({entry.spec for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.count == len(entry.names)
        for name in entry.names:
            assert entry.spec.dst_shape == shapes[nodes[name].output[0]], name


def test_light_resnet50_is_resnet50() -> None:
    """The graph's layers are those of the problem file, which another exporter's model gave."""
    entries = specs_from_onnx(DATA / "light" / "light_resnet50.onnx")
    assert sum(entry.count for entry in entries) == 53
    assert sum(entry.count * entry.spec.macs for entry in entries) == 4_087_136_256
    problems = ROOT / "bench" / "problems" / "resnet50.json"
    layers = json.loads(problems.read_text())["layers"]
    assert {e.spec.descriptor: e.count for e in entries} == {layer["spec"]: layer["count"] for layer in layers}


# ---- reading ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(specs())
def test_round_trip(spec: ConvSpec) -> None:
    spec = spec.with_(layout="nchw", accuracy="standard", dtype="f32")  # ONNX has neither layout nor accuracy
    assume(all(extra < stride for extra, stride in zip(spec.output_padding, spec.stride, strict=True)))
    activation = spec.activation_op
    assume(activation.name != "clip" or activation.params[0] < activation.params[1])  # a constant is not fused
    assert specs_from_onnx(onnx_model(spec)) == [SpecEntry(spec, 1, ("conv",))]


SCALARS = {"half": 0.5, "nhalf": -0.5, "zero": 0, "one1": 1, "two": 2, "three": 3, "six": 6, "sixth": 1 / 6}
SCALARS |= {"fifth": 0.2, "sqrt2": 2**0.5, "rsqrt2": 0.5**0.5, "cubic": 0.044715, "root": (2 / math.pi) ** 0.5}


CONSTANTS = {"w": (4, 4, 3, 3), "w2": (4, 2, 3, 3), "k": (4,), "mean": (4,), "shift": (4,), "k3": (4, 1, 1)}
CONSTANTS |= {"k4": (1, 4, 1, 1), "one": (1,)}


def graph(
    body: str, outputs: str = "y", inputs: str = "", opset: int = 20, conv: str = "c = Conv<pads=[1,1,1,1]>(x, w)"
) -> onnx.ModelProto:
    """A 4-channel 3x3 convolution of x into c, followed by ``body``; constants that it does not use are absent."""
    declared = ", ".join(f"float[1,4,8,8] {name}" for name in outputs.split())
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[1,4,8,8] x{inputs}) => ({declared})'
    source = parser.parse_model(f"{head} {{ {conv} {body} }}")
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {n: rng.uniform(0.5, 1.5, shape).astype(np.float32) for n, shape in CONSTANTS.items()}
    arrays |= {name: np.float32(value) for name, value in SCALARS.items()}
    arrays |= {"axes12": np.array([1, 2]), "shape": np.array([1, 4, 1, 1]), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    arrays |= {"w8": rng.integers(-9, 9, (4, 4, 3, 3)).astype(np.int8), "z8": np.arange(4, dtype=np.int8)}
    used = {name for node in source.graph.node for name in node.input}
    source.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items() if name in used
    )
    return source


def run_onnx(model: onnx.ModelProto, wanted: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Values of a model, inner ones too, by ONNX Runtime without its own fusions."""
    import onnxruntime

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(changed.SerializeToString(), options, ["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, feeds)
    return outputs


def same_numbers(model: onnx.ModelProto, layer: OnnxLayer, feeds: dict[str, np.ndarray] | None = None) -> None:
    """The folded spec with the folded arrays computes the value of the model that it says it does."""
    spec = layer.spec
    assert spec is not None
    rng = np.random.default_rng(1)
    if feeds is None:
        feeds = {}
        for value in model.graph.input:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            feeds[value.name] = (3 * rng.standard_normal(shape)).astype(np.float32)
    names = [layer.src, layer.dst] + [layer.residual] * spec.residual
    given = [name for name in names if name in feeds]
    found = dict(zip(rest := [n for n in names if n not in given], run_onnx(model, rest, feeds), strict=True)) | feeds
    residual = {"residual": found[layer.residual]} if spec.residual else {}
    got = run_onnxruntime(spec, found[layer.src], **layer.arrays, **residual, threads=1)
    expected = found[layer.dst]
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * scale, err_msg=str(spec))


#: What follows a convolution without bias -> what the spec has instead of ``nobias``.
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


def model(
    op: str = "Conv",
    src: tuple[int | str | None, ...] = (1, 4, 9, 9),
    weights: tuple[int | str, ...] = (4, 4, 3, 3),
    dtype: int = TensorProto.FLOAT,
    before: list[onnx.NodeProto] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """One node called ``layer`` on inputs x and w."""
    node = helper.make_node(op, ["h" if before else "x", "w"], ["y"], name="layer", **attributes)
    inputs = [helper.make_tensor_value_info(n, dtype, s) for n, s in (("x", src), ("w", weights))]
    made = helper.make_graph([*(before or []), node], "g", inputs, [helper.make_tensor_value_info("y", dtype, None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("other", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize(("op", "dilation"), [("Conv", 1), ("ConvTranspose", 1), ("ConvTranspose", 2)])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_auto_pad(op: str, auto_pad: str, dilation: int) -> None:
    """The resolved padding gives what ONNX Runtime computes from auto_pad itself."""
    import onnxruntime

    source = model(op, auto_pad=auto_pad, strides=[2, 3], dilations=[dilation, 1])
    (entry,) = specs_from_onnx(source)
    data = integers(entry.spec)
    session = onnxruntime.InferenceSession(source.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": data["src"], "w": data["weights"]})
    np.testing.assert_array_equal(run_onnxruntime(entry.spec, **data, threads=1), expected)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("wanted", [(18, 18), (17, 18), (16, 17), (1, 4, 18, 17)])
def test_output_shape(auto_pad: str, wanted: tuple[int, ...]) -> None:
    import onnxruntime

    source = model("ConvTranspose", auto_pad=auto_pad, strides=[2, 2], output_shape=wanted)
    (entry,) = specs_from_onnx(source)
    assert entry.spec.out_spatial == wanted[-2:]
    if len(wanted) == 2:
        data = integers(entry.spec)
        session = onnxruntime.InferenceSession(source.SerializeToString(), providers=["CPUExecutionProvider"])
        (expected,) = session.run(None, {"x": data["src"], "w": data["weights"]})
        np.testing.assert_array_equal(run_onnxruntime(entry.spec, **data, threads=1), expected)


def test_symbolic_dimensions() -> None:
    source = model(src=("N", 4, "H", None))
    (entry,) = specs_from_onnx(source, {"N": 2, "H": 6, "x[3]": 7})
    assert entry.spec.src_shape == (2, 4, 6, 7)
    assert source.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"  # the caller's model is as it was
    (entry,) = specs_from_onnx(source, {"N": 0, "H": 6, "x[3]": 7})
    assert entry.spec.n == 0


def test_symbols_behind_other_operators() -> None:
    before = [helper.make_node("Relu", ["x"], ["h"])]
    (entry,) = specs_from_onnx(model(src=("N", 4, 9, 9), before=before), {"N": 3})
    assert entry.spec.n == 3
    message = r"'layer': dims: expected a size for 'N' \(as in --dim 'N=1'\), found none \(src is \[N, 4, 9, 9\]\)"
    with pytest.raises(SpecError, match=message):
        specs_from_onnx(model(src=("N", 4, 9, 9), before=before))


@pytest.mark.parametrize(
    ("source", "dims", "message"),
    [
        (
            model(src=("N", 4, "H", 9)),
            {"N": 1},
            r"'layer': dims: expected a size for 'H' \(as in --dim 'H=1'\)",
        ),
        (
            model(src=("N", 4, None, 9)),
            {},
            r"dims: expected a size for 'N', 'x\[2\]' \(as in --dim 'N=1'\), found none",
        ),
        (model(src=("N", 4, 9, 9)), {"M": 1}, "dims: expected names among N, found 'M'"),
        (model(), {"N": 1}, "dims: expected names among none, found 'N'"),
        (model(src=("N", 4, 9, 9)), {"N": -1}, r"dims\[N\]: expected an integer >= 0, found -1"),
        (model(src=("N", 4, 9, 9)), {"N": np.int64(1)}, r"dims\[N\]: expected an integer >= 0, found np.int64"),
        (model(src=("N\nx", 4, 9, 9)), {}, r"dims: expected a size for 'N\\nx' \(as in --dim 'N\\nx=1'\)"),
        (model(src=("N\nx", 4, 9, 9)), {"M": 1}, r"dims: expected names among 'N\\nx', found 'M'"),
        (model(weights=(4, 3, 3, 3)), {}, r"'layer': weights: expected 4 input channels .*, found \[4, 3, 3, 3\]"),
        (model(weights=(4, 1, 3, 3), group=3), {}, "'layer': weights: expected 4 input channels"),
        (model(src=(1, 4, 9)), {}, "'layer': src: expected 4 axes as the weights have"),
        (model(pads=[1, 1]), {}, "'layer': pads: expected 4 values"),
        (model(pads=[-1, 0, 0, 0]), {}, r"'layer': padding\[0\]: expected an integer >= 0, found -1"),
        (model(strides=[0, 1]), {}, r"stride\[0\]: expected an integer >= 1, found 0"),
        (model(strides=[1]), {}, r"'layer': strides: expected 2 values, found \[1\]"),
        (model(strides=1.0), {}, "strides: expected ints, found float"),
        (model(stride=[1, 1]), {}, "'stride': expected one of kernel_shape, strides"),
        (model(kernel_shape=[2, 2]), {}, r"kernel_shape: expected the weights' \[3, 3\], found \[2, 2\]"),
        (model(auto_pad="SAME"), {}, "auto_pad: expected NOTSET or one of SAME_UPPER, SAME_LOWER, VALID, found 'SAME'"),
        (model(src=(1, 4, 2, 9)), {}, r"kernel\[0\]: expected a dilated kernel within the padded input \(2\), found 3"),
        (model("ConvTranspose", output_shape=[30, 30]), {}, r"output_spatial\[0\]: expected a size the windows reach"),
        (model("ConvTranspose", output_shape=[1, 18, 18]), {}, r"output_shape: expected 2 values, found \[1, 18, 18\]"),
        (model("Relu"), {}, "model: expected a node Conv, ConvTranspose, QLinearConv, found none"),
        (onnx.ModelProto(), {}, "file: expected an ONNX model, found no graph in it"),
    ],
)
def test_wrong_model(source: onnx.ModelProto, dims: dict[str, int], message: str) -> None:
    if source.graph.node and source.graph.node[0].op_type == "Relu":
        del source.graph.node[0].input[1:]
    with pytest.raises(SpecError, match=message) as caught:
        specs_from_onnx(source, dims)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (model(dtype=TensorProto.DOUBLE), "Conv 'layer': weights 'w' has dtype double; supported are f32, f16, bf16"),
        (model(dtype=TensorProto.INT8), "Conv 'layer': weights 'w' has dtype int8; supported are f32, f16, bf16"),
        (model(src=(1, 4, 9, 9, 9, 9), weights=(4, 4, 3, 3, 3, 3)), "'layer': weights .* have 4 spatial axes"),
        (
            model("ConvTranspose", auto_pad="SAME_UPPER", strides=[4, 4]),
            "auto_pad=SAME_.* with strides above the window",
        ),
    ],
)
def test_unsupported_model(source: onnx.ModelProto, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        specs_from_onnx(source)


SIZES = {
    "s = Shape(c) a = Slice(s, start, stop) f = Cast<to=1>(a) g = Mul(f, half) h = Floor(g) i = Cast<to=7>(h) "
    "b = Slice(s, zero64, start) z = Concat<axis=0>(b, i) r = Resize(c, , , z)": "i4x4",
    "s = Shape(c) h = Gather(s, last) g = Div(h, two64) u = Unsqueeze(g, zero64) z = Concat<axis=0>(head, u, minus) "
    "r = Reshape(c, z)": "i4x16",
    "n = Neg(pads) m = Neg(n) r = Pad(c, m)": "i10x10",
    "e = Equal(sizes, minus) v = ConstantOfShape<value=int64[1] {8}>(four) z = Where(e, v, sizes) "
    "r = Expand(c, z)": "i8x8",
}


@pytest.mark.parametrize("body", SIZES)
@pytest.mark.parametrize("symbolic", [False, True])
def test_sizes_that_are_computed(body: str, symbolic: bool) -> None:
    """Exporters spell sizes by operators on shapes, which all have a value once the input's shape is known."""
    source = graph(f"{body} p = Relu(r) y = Conv(p, w)")
    arrays = {
        "start": [2],
        "stop": [4],
        "zero64": [0],
        "last": 3,
        "two64": 2,
        "head": [1, 4],
        "minus": [-1],
        "four": [4],
    }
    arrays["sizes"] = [1, 4, -1, -1]
    used = {name for node in source.graph.node for name in node.input}
    for name in used & arrays.keys():
        source.graph.initializer.append(numpy_helper.from_array(np.array(arrays[name]), name))
    if symbolic:
        source.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
        source.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    layers = layers_from_onnx(source, {"batch": 1, "width": 8} if symbolic else {})
    assert f" {SIZES[body]} " in names(layers)["y"]


def test_a_lost_shape_names_the_operator() -> None:
    before = [
        helper.make_node("Mystery", ["x"], ["g"], name="oracle", domain="other"),
        helper.make_node("Relu", ["g"], ["h"]),
    ]
    with pytest.raises(SpecError, match=r"'layer': src: .*, found \? after Mystery 'oracle'"):
        specs_from_onnx(model(before=before))


def test_quantized_models_say_what_was_found() -> None:
    source = next(c for c in STORED.values())[0]
    changed = onnx.ModelProto()
    changed.CopyFrom(source)
    for node in changed.graph.node:
        node.op_type = "ConvInteger"
    with pytest.raises(SpecError, match="expected a node Conv, ConvTranspose, QLinearConv, found ConvInteger"):
        specs_from_onnx(changed)


def names(layers: list[OnnxLayer]) -> dict[str, str]:
    return {layer.name: str(layer.spec or layer.refusal) for layer in layers}


PLAIN_CONV = "conv2d n1 ic4 oc4 i8x8 k3x3 s1x1 p1x1 nobias"


def test_bodies() -> None:
    """Convolutions inside If, Loop and Scan are the model's, too; names have the path to them."""
    source = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,4,8,8] x, bool t, int64 n, float[4,4,3,3] w, float[5,1,4,8,8] seq) => (float y, float z, float s)
        { [choice] y = If (t) <then_branch = t1 () => (a) { [c1] d = Conv<pads=[1,1,1,1]>(x, w) a = Relu(d) },
                      else_branch = t2 () => (e) { e = Identity(x) }>
          z = Loop(n, t, x) <body = b (int64 i, bool c, v) => (c2, u)
              { c2 = Identity(c) f = Conv<pads=[1,1,1,1]>(v, w) u = Sigmoid(f) }>
          [scan] s, p = Scan(x, seq) <num_scan_inputs=1, body = b (float[1,4,8,8] state, float[1,4,8,8] item) => (o, q)
              { h = Conv<pads=[1,1,1,1]>(item, w) o = Add(h, state) q = Identity(o) }> }"""
    )
    assert names(layers_from_onnx(source)) == {
        "choice/then_branch/c1": f"{PLAIN_CONV} relu",
        "z/body/f": f"{PLAIN_CONV} sigmoid",
        "scan/body/h": f"{PLAIN_CONV} residual",
    }


def test_a_loop_that_changes_its_values_shape() -> None:
    """The first turn's shape must not be taken for that of all."""
    source = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,4,8,8] x, bool t, int64 n, float[4,4,3,3] w) => (float z)
        { z = Loop(n, t, x) <body = b (int64 i, bool c, v) => (c2, u) { c2 = Identity(c) u = Conv(v, w) }> }"""
    )
    (layer,) = layers_from_onnx(source)
    assert isinstance(layer.refusal, SpecError)
    assert "Conv 'z/body/u': src: expected a shape that shape inference finds, found ?" in str(layer.refusal)


FUNCTIONS = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[1,4,8,8] x, float[1,4,5,5] x2, bool t, float[4,4,3,3] w) => (float y, float z)
    { [one] b = local.block<slope=0.5>(x, w)
      [two] z = local.block(x2, w)
      y = If (t) <then_branch = t1 () => (a) { [in] a = local.twice(b, w) },
                  else_branch = t2 () => (e) { e = Relu(x) }> }
    <domain: "local", opset_import: ["" : 17], overload: "">
    block <slope: float = 0.25> (v, u) => (o) {
      [conv] p = Conv<pads=[1,1,1,1]>(v, u) o = LeakyRelu<alpha: float = @slope>(p) }
    <domain: "local", opset_import: ["" : 17, "local" : 1]>
    twice (v, u) => (o) { [a] p = local.block(v, u) [b] o = local.block<slope=0.125>(p, u) }"""


def test_functions() -> None:
    """A function is read once per call: with the call's shapes, attributes and name."""
    source = parser.parse_model(FUNCTIONS)
    layers = layers_from_onnx(source)
    assert names(layers) == {
        "one/conv": f"{PLAIN_CONV} leaky_relu(0.5)",
        "two/conv": f"{PLAIN_CONV} leaky_relu(0.25)".replace("8x8", "5x5"),
        "y/then_branch/in/a/conv": f"{PLAIN_CONV} leaky_relu(0.25)",
        "y/then_branch/in/b/conv": f"{PLAIN_CONV} leaky_relu(0.125)",
    }
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 4, 8, 8), "x2": (1, 4, 5, 5), "w": (4, 4, 3, 3)}
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    (expected,) = run_onnx(source, ["z"], feeds | {"t": np.array(True)})  # the default of the function's attribute
    spec = layers[1].spec
    assert spec is not None
    np.testing.assert_allclose(run_onnxruntime(spec, feeds["x2"], feeds["w"]), expected, rtol=1e-5, atol=1e-5)


def test_functions_with_bodies_and_open_arguments() -> None:
    source = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[1,4,8,8] x, bool t, float[4,4,3,3] w) => (float y) { y = local.block(x, w, , t) }
        <domain: "local", opset_import: ["" : 17]>
        block (v, u, bias, t) => (o, unused) {
          p = Conv<pads=[1,1,1,1]>(v, u, bias)
          o = If (t) <then_branch = t1 () => (a) { q = Conv<pads=[1,1,1,1]>(p, u) a = Tanh(q) },
                      else_branch = t2 () => (e) { e = Relu(v) }>
          unused = Relu(p) }"""
    )
    found = names(layers_from_onnx(source))
    assert found == {"y/p": PLAIN_CONV, "y/o/then_branch/q": f"{PLAIN_CONV} tanh"}  # p has two users


def test_identical_layers_are_merged() -> None:
    body = "d = Conv<pads=[1,1,1,1]>(c, w) e = Conv<pads=[1,1,1,1]>(d, w) y = Relu(e)"
    plain, last = specs_from_onnx(graph(body))
    assert (plain.count, plain.names) == (2, ("c", "d"))
    assert (last.count, last.names, last.spec.activation) == (1, ("e",), "relu")


# ---- with others ------------------------------------------------------------------------------

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


# ---- QLinearConv -------------------------------------------------------------------------------

_RNG = np.random.default_rng(3)
QUANTISED: dict[str, np.ndarray] = {
    "x_scale": np.array(0.5, np.float32),
    "x_zero": np.array(0, np.int8),
    "w": _RNG.integers(-128, 128, (6, 2, 3, 3)).astype(np.int8),
    "w_scale": _RNG.uniform(0.001, 0.01, 6).astype(np.float32),
    "w_zero": np.zeros(6, np.int8),
    "y_scale": np.array(0.3, np.float32),
    "y_zero": np.array(0, np.int8),
    "b": _RNG.integers(-5000, 5000, 6).astype(np.int32),
}


def quantised(inputs: tuple[str, ...] = (), relu: bool = True, **changes: Any) -> onnx.ModelProto:
    """x int8 [1, 4, 7, 7] -> QLinearConv -> Relu; ``inputs`` are given at run time."""
    arrays = {name: np.asarray(value) for name, value in {**QUANTISED, **changes}.items()}
    nodes = [helper.make_node("QLinearConv", ["x", *arrays], ["y"], name="q", group=2, pads=[1, 1, 1, 1])]
    nodes += [helper.make_node("Relu", ["y"], ["z"])] * relu
    given = [("x", np.zeros((1, 4, 7, 7), np.int8)), *((name, arrays.pop(name)) for name in inputs)]
    types = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given]
    output = helper.make_tensor_value_info("z" if relu else "y", TensorProto.INT8, None)
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "quantised", types, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("relu", [True, False])
def test_a_quantised_convolution_is_a_layer_of_i8(relu: bool, tmp_path: Path) -> None:
    source = quantised(relu=relu)
    onnx.save(source, tmp_path / "q.onnx")
    (layer,) = layers_from_onnx(tmp_path / "q.onnx", arrays=True)
    spec = layer.spec
    assert spec is not None
    activation = " relu" if relu else ""
    assert spec.descriptor == f"conv2d n1 ic4 oc6 g2 i7x7 k3x3 s1x1 p1x1{activation} i8"
    assert (layer.operator, layer.dst) == ("QLinearConv", "z" if relu else "y")
    src = np.random.default_rng(0).integers(-128, 128, spec.src_shape).astype(np.int8)
    options = convgen.check.reference.ort.SessionOptions()
    options.graph_optimization_level = convgen.check.reference.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = convgen.check.reference.ort.InferenceSession(source.SerializeToString(), options)
    expected = session.run(None, {"x": src})[0]
    assert np.unique(expected).size > 50
    np.testing.assert_array_equal(run_onnxruntime(spec, src, **layer.arrays, threads=1), expected)


def test_one_scale_of_weights_is_every_channels() -> None:
    (layer,) = layers_from_onnx(quantised(w_scale=np.float32(0.01), w_zero=np.int8(0)), arrays=True)
    assert layer.arrays["scale"].shape == (6,)
    assert layers_from_onnx(quantised(inputs=("w",)), arrays=True)[0].arrays == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_zero": np.int8(3)}, "zero point 'x_zero' is not known to be 0"),
        ({"w_zero": np.array([0, 0, 0, 0, 1, 0], np.int8)}, "zero point 'w_zero' is not known to be 0"),
        ({"inputs": ("y_zero",)}, "zero point 'y_zero' is not known to be 0"),
        ({"inputs": ("w_scale",)}, "scale 'w_scale' is no constant"),
        ({"y_zero": np.uint8(0)}, "dst has the dtype of 'y_zero', uint8; supported is i8"),
        ({"w": QUANTISED["w"].astype(np.uint8)}, "weights 'w' has dtype uint8; supported are i8"),
        ({"w_scale": np.ones(2, np.float32)}, "scale 'w_scale': expected 6 elements, found 2"),
    ],
)
def test_quantised_convolutions_that_mean_another_thing_are_refused(changes: dict[str, Any], message: str) -> None:
    skipped: list[str] = []
    assert specs_from_onnx(quantised(**changes), skipped=skipped) == []
    assert re.search(message, skipped[0]), skipped
