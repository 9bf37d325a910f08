"""The ONNX reader: models as people have them, and hostile ones."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from onnx import TensorProto, helper, numpy_helper, parser
from strategies import specs
from test_onnx_model import integers

from convgen.errors import SpecError, UnsupportedError
from convgen.onnx_model import onnx_model
from convgen.onnx_reader import OnnxLayer, layers_from_onnx, specs_from_onnx
from convgen.reference import run_onnxruntime
from convgen.sources import SpecEntry
from convgen.spec import ConvSpec

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
    if expected.dtype != np.float32:
        with pytest.raises(UnsupportedError, match="dtype float16"):
            specs_from_onnx(model)
        return
    (entry,) = specs_from_onnx(model)
    assert entry.spec.dst_shape == expected.shape
    assert entry.spec.activation == ("silu" if "silu" in name or "swish" in name else "none")


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_light_graph(path: Path) -> None:
    """Every convolution is read, and its output has the shape that shape inference gives."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in [*graph.value_info, *graph.output]
    }
    nodes = {node.name or node.output[0]: node for node in graph.node if node.op_type in CONVOLUTIONS}
    entries = specs_from_onnx(path)
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
    problems = Path(__file__).parents[1] / "bench" / "problems" / "resnet50.json"
    layers = json.loads(problems.read_text())["layers"]
    assert {e.spec.descriptor: e.count for e in entries} == {layer["spec"]: layer["count"] for layer in layers}


# ---- reading ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(specs())
def test_round_trip(spec: ConvSpec) -> None:
    spec = spec.with_(layout="nchw", accuracy="standard")  # ONNX has neither
    assume(all(extra < stride for extra, stride in zip(spec.output_padding, spec.stride, strict=True)))
    assert specs_from_onnx(onnx_model(spec)) == [SpecEntry(spec, 1, ("conv",))]


SCALARS = {"half": 0.5, "nhalf": -0.5, "zero": 0, "one1": 1, "two": 2, "three": 3, "six": 6, "sixth": 1 / 6}
SCALARS |= {"fifth": 0.2, "sqrt2": 2**0.5, "rsqrt2": 0.5**0.5, "cubic": 0.044715, "root": (2 / math.pi) ** 0.5}


def graph(body: str, outputs: str = "y", inputs: str = "", opset: int = 20) -> onnx.ModelProto:
    """A 4-channel 3x3 convolution of x into c, followed by ``body``."""
    declared = ", ".join(f"float[1,4,8,8] {name}" for name in outputs.split())
    source = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[1,4,8,8] x{inputs}) => ({declared})
        {{ c = Conv<pads=[1,1,1,1]>(x, w)
           {body} }}"""
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 4, 3, 3), "k": (4,), "mean": (4,), "shift": (4,), "k3": (4, 1, 1), "k4": (1, 4, 1, 1), "one": (1,)}
    arrays: dict[str, Any] = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= {name: np.float32(value) for name, value in SCALARS.items()}
    arrays |= {"axes12": np.array([1, 2]), "shape": np.array([1, 4, 1, 1])}
    source.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
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
    return session.run(None, feeds)


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
    got = run_onnxruntime(spec, found[layer.src], **layer.arrays, **residual)
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


def test_old_clip_attributes() -> None:
    (entry,) = specs_from_onnx(graph("y = Clip<min=0.0, max=6.0>(c)", opset=6))
    assert entry.spec.activation == "clip(0,6)"
    (entry,) = specs_from_onnx(graph("y = Clip<min=0.0, max=3.4028234663852886e38>(c)", opset=6))
    assert entry.spec.activation == "clip(0,inf)"


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
    np.testing.assert_array_equal(run_onnxruntime(entry.spec, **data), expected)


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
        np.testing.assert_array_equal(run_onnxruntime(entry.spec, **data), expected)


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
    with pytest.raises(
        SpecError, match=r"'layer': dims: expected a size for 'N', found none \(src is \[N, 4, 9, 9\]\)"
    ):
        specs_from_onnx(model(src=("N", 4, 9, 9), before=before))


@pytest.mark.parametrize(
    ("source", "dims", "message"),
    [
        (model(src=("N", 4, "H", 9)), {"N": 1}, r"'layer': dims: expected a size for 'H', found none"),
        (model(src=("N", 4, None, 9)), {}, r"dims: expected a size for 'N', 'x\[2\]', found none"),
        (model(src=("N", 4, 9, 9)), {"M": 1}, "dims: expected names among N, found 'M'"),
        (model(), {"N": 1}, "dims: expected names among none, found 'N'"),
        (model(src=("N", 4, 9, 9)), {"N": -1}, r"dims\[N\]: expected an integer >= 0, found -1"),
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
        (model("Relu"), {}, "model: expected a Conv or ConvTranspose node, found none"),
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
        (model(dtype=TensorProto.FLOAT16), "Conv 'layer': weights 'w' has dtype float16; float32 is supported"),
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
    with pytest.raises(SpecError, match="expected a Conv or ConvTranspose node, found ConvInteger"):
        specs_from_onnx(changed)


def test_bodies_and_functions() -> None:
    """Convolutions inside If branches and local functions are the model's too."""
    source = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[1,4,8,8] x, bool t) => (float[1,4,8,8] y) <float[4,4,3,3] w>
        { b = local.block(x, w)
          y = If (t) <then_branch = t1 () => (a) { d = Conv<pads=[1,1,1,1]>(b, w) a = Relu(d) },
                      else_branch = t2 () => (e) { e = Identity(b) }> }
        <domain: "local", opset_import: ["" : 17]>
        block (v, u) => (o) { p = Conv<pads=[1,1,1,1]>(v, u) o = Sigmoid(p) }"""
    )
    found = {entry.spec.activation: entry.count for entry in specs_from_onnx(source)}
    assert found == {"sigmoid": 1, "relu": 1}


def test_external_weights_are_not_needed(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "w")
    source = model()
    source.graph.initializer.append(weights)
    onnx.save(source, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="m.bin")
    (tmp_path / "m.bin").unlink()
    (entry,) = specs_from_onnx(tmp_path / "m.onnx")
    assert entry.spec == ConvSpec.parse("conv2d ic4 oc4 i9x9 k3x3 nobias")


def test_identical_layers_are_merged() -> None:
    body = "d = Conv<pads=[1,1,1,1]>(c, w) e = Conv<pads=[1,1,1,1]>(d, w) y = Relu(e)"
    plain, last = specs_from_onnx(graph(body))
    assert (plain.count, plain.names) == (2, ("c", "d"))
    assert (last.count, last.names, last.spec.activation) == (1, ("e",), "relu")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Cut or altered anywhere, a model is read or refused in one line; never a traceback of protobuf."""
    content = bytearray(LIGHT[0].read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.onnx"
    messages = []
    for at in rng.integers(0, len(content), 200):
        damaged = bytearray(content)
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged if rng.random() < 0.8 else damaged[:at] or b"0")
        try:
            specs_from_onnx(path)
        except (SpecError, UnsupportedError) as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)
