"""Everything that convolves is read, or named with a reason: fused convolutions, other domains, bodies, functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from onnx_graphs import run_onnx

from convgen.check.reference import run_onnxruntime
from convgen.errors import NotTakenError, UnsupportedError
from convgen.formats.onnx.file import ModelFile
from convgen.formats.onnx.prepare import prepare
from convgen.formats.onnx.reader import layers_from_onnx, specs_from_onnx
from convgen.network.reading import read_graph

RNG = np.random.default_rng(0)
W, W2 = (RNG.standard_normal((6, c, 3, 3)).astype(np.float32) for c in (4, 6))
B = RNG.standard_normal(6).astype(np.float32)
Array = np.ndarray[Any, np.dtype[Any]]


def model(
    nodes: list[onnx.NodeProto], src: tuple[int, ...] = (1, 4, 8, 8), kind: int = TensorProto.FLOAT
) -> ModelProto:
    """Nodes from x to y, with constants w, w2 and b."""
    stored = [numpy_helper.from_array(array, name) for name, array in (("w", W), ("w2", W2), ("b", B))]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, src)],
        [helper.make_tensor_value_info("y", kind, None)],
        stored,
    )
    domains = {"": 18} | dict.fromkeys([node.domain for node in nodes if node.domain], 1)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*item) for item in domains.items()], ir_version=8
    )


def node(op: str, inputs: str, output: str, domain: str = "com.microsoft", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"the {op}", domain=domain, **attributes)


ACTIVATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "relu": {"activation": "Relu"},
    "sigmoid": {"activation": "Sigmoid"},
    "tanh": {"activation": "Tanh"},
    "leaky_relu(0.2)": {"activation": "LeakyRelu", "activation_params": [0.2]},
    "hardsigmoid(0.3,0.4)": {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]},
    "clip(-0.5,2.0)": {"activation": "Clip", "activation_params": [-0.5, 2.0]},
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("operands", ["x w", "x w b", "x w b z", "x w NONE z"])
def test_fused_convolutions(activation: str, operands: str) -> None:
    """As ONNX Runtime computes FusedConv: the residual is added before the activation."""
    first = helper.make_node("Conv", ["x", "w"], ["z"], name="plain")
    fused = node("FusedConv", operands, "y", **ACTIVATIONS[activation])
    fused.input[:] = ["" if name == "NONE" else name for name in fused.input]
    made = model([first, fused])
    plain, layer = layers_from_onnx(made, arrays=True)
    assert plain.spec is not None
    assert layer.spec is not None
    assert (layer.name, layer.dst) == ("the FusedConv", "y")
    assert layer.spec.activation == activation.replace(".0", "")
    assert (layer.spec.bias, layer.spec.residual) == (" b" in operands, "z" in operands)
    data = {"x": RNG.standard_normal((1, 4, 8, 8)).astype(np.float32)}
    expected, residual = run_onnx(made, ["y", "z"], data)
    spelled = {"residual": residual} if layer.spec.residual else {}
    got = run_onnxruntime(layer.spec, data["x"], **layer.arrays, **spelled, threads=1)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    graph = read_graph(made)
    assert [found.spec.activation for found in graph.convolutions][-1] == layer.spec.activation


def test_what_onnx_runtime_saves(tmp_path: Path) -> None:
    """A model that it has optimised has FusedConv; one that it has optimised for its processor is named as that."""
    nodes = [node("Conv", "x w", "c", "", pads=[1, 1, 1, 1]), node("Relu", "c", "r", "")]
    nodes += [helper.make_node("Conv", ["r", "w2", "b"], ["d"], name="two"), node("LeakyRelu", "d", "y", "", alpha=0.3)]
    made, found = model(nodes), {}
    for level in ("ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(tmp_path / level)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(made.SerializeToString(), options, ["CPUExecutionProvider"])
        found[level] = onnx.load(tmp_path / level)
    assert specs_from_onnx(found["ORT_ENABLE_EXTENDED"]) == specs_from_onnx(made)
    blocked = {node.domain for node in found["ORT_ENABLE_ALL"].graph.node}
    if "com.microsoft.nchwc" in blocked:  # of a processor for which there are such kernels
        skipped: list[str] = []
        assert specs_from_onnx(found["ORT_ENABLE_ALL"], skipped=skipped) == []
        assert len(skipped) == 2
        assert all("'com.microsoft.nchwc'" in reason for reason in skipped)
        assert all(", blocked for one processor" in reason for reason in skipped)


def test_what_onnx_runtime_saves_of_a_quantised_model(tmp_path: Path) -> None:
    """With the channels last throughout: the same layers, and a network."""
    made = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]> g (float[1,4,8,9] x) => (float[1,6,1,1] y) {
        q = QuantizeLinear(x, s, z) a = QLinearConv<pads=[1,1,1,1]>(q, s, z, v, s, o, t, z)
        b = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) c = QLinearConv<pads=[1,1,1,1]>(b, t, z, u, s, o, t, z)
        d = com.microsoft.QLinearAdd(b, t, z, c, t, z, t, z) e = com.microsoft.QLinearGlobalAveragePool(d, t, z, t, z)
        y = DequantizeLinear(e, t, z) }"""
    )
    arrays: dict[str, Any] = {"s": np.float32(0.02), "t": np.float32(0.1), "z": np.uint8(7), "o": np.int8(0)}
    arrays |= {"v": RNG.integers(-99, 99, W.shape).astype(np.int8), "u": RNG.integers(-9, 9, W2.shape).astype(np.int8)}
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "m.onnx"), 4
    onnxruntime.InferenceSession(made.SerializeToString(), options, ["CPUExecutionProvider"])
    saved = onnx.load(tmp_path / "m.onnx")
    specs = [[layer.spec for layer in layers_from_onnx(source)] for source in (made, saved)]
    assert specs[0] == specs[1]
    assert None not in specs[0]
    assert read_graph(saved).shapes["y"] == (1, 6, 1, 1)


def test_channels_last() -> None:
    """NhwcFusedConv: the same layer, turned before and after."""
    fused = node("NhwcFusedConv", "x w b z", "y", activation="Relu")
    first = node("NhwcFusedConv", "x w", "z")
    made = model([first, fused], (1, 8, 8, 4))
    plain, layer = layers_from_onnx(made)
    assert str(plain.spec) == "conv2d n1 ic4 oc6 i8x8 k3x3 s1x1 p0x0 nobias"
    assert str(layer.spec) == "conv2d n1 ic4 oc6 i8x8 k3x3 s1x1 p0x0 residual relu"
    assert read_graph(model([first, fused], (1, 8, 9, 4))).shapes["y"] == (1, 6, 7, 6)


@pytest.mark.parametrize("last", [0, 1])
def test_quantised_convolution_of_onnx_runtime(last: int) -> None:
    made = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]> g (uint8[1,{"8,8,4" if last else "4,8,8"}] x)
        => (uint8[1,{"6,6,6"}] y) {{ [q] y = com.microsoft.QLinearConv<channels_last={last}>
            (x, s, xz, w, s, z, t, xz) }}"""
    )
    arrays: dict[str, Any] = {"s": np.float32(0.02), "t": np.float32(0.1), "xz": np.uint8(7), "z": np.int8(0)}
    arrays |= {"w": RNG.integers(-99, 99, W.shape).astype(np.int8)}
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    (layer,) = layers_from_onnx(made, arrays=True)
    assert layer.spec is not None, layer.refusal
    src = RNG.integers(0, 255, (1, 8, 8, 4) if last else (1, 4, 8, 8)).astype(np.uint8)
    (expected,) = run_onnx(made, ["y"], {"x": src})
    turned = np.ascontiguousarray(src.transpose(0, 3, 1, 2)) if last else src
    got = run_onnxruntime(layer.spec, turned, **layer.arrays, threads=1)
    np.testing.assert_array_equal(got.transpose(0, 2, 3, 1) if last else got, expected)


BETWEEN = {
    "Gelu": node("Gelu", "c", "y"),
    "BiasGelu": node("BiasGelu", "c k", "y"),
    "FastGelu": node("FastGelu", "c", "y"),
    "FastGelu of a sum": node("FastGelu", "c k", "y"),
    "QuickGelu": node("QuickGelu", "c", "y", alpha=1.5),
    "FusedGemm": node("FusedGemm", "c m", "y", activation="LeakyRelu", activation_alpha=0.2, transB=1, alpha=0.5),
    "FusedGemm of three": node("FusedGemm", "c m k", "y", activation="Relu", beta=2.0),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_what_the_optimiser_writes_between_convolutions(what: str) -> None:
    """Spelled out, it is what ONNX Runtime computes of it; and shapes are known behind it."""
    made = model([helper.make_node("Identity", ["x"], ["c"]), BETWEEN[what]], (5, 6))
    stored = {"k": RNG.standard_normal(6), "m": RNG.standard_normal((6, 6))}
    made.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), name) for name, a in stored.items())
    x = RNG.standard_normal((5, 6)).astype(np.float32)
    (expected,) = run_onnx(made, ["y"], {"x": x})
    with ModelFile(made) as file:
        (scope, *_), _ = prepare(file, {})
        assert {found.domain for found in scope.nodes} == {""}
        assert scope.shape("y") == expected.shape
        del file.proto.graph.node[:]
        file.proto.graph.node.extend(scope.nodes)
        (got,) = run_onnx(file.proto, ["y"], {"x": x})
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_pooling_with_the_channels_last() -> None:
    made = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]> g (uint8[1,9,8,4] x) => (uint8[1,4,3,4] y)
        { y = com.microsoft.NhwcMaxPool<kernel_shape=[3,2], strides=[2,3], pads=[0,0,0,1]>(x) }"""
    )
    x = RNG.integers(0, 255, (1, 9, 8, 4)).astype(np.uint8)
    (expected,) = run_onnx(made, ["y"], {"x": x})
    with ModelFile(made) as file:
        (scope, *_), _ = prepare(file, {})
        assert scope.shape("y") == expected.shape
        del file.proto.graph.node[:]
        file.proto.graph.node.extend(scope.nodes)
        (got,) = run_onnx(file.proto, ["y"], {"x": x})
    np.testing.assert_array_equal(got, expected)


# ---- named ---------------------------------------------------------------------------------------

NAMED = {
    "DeformConv": (helper.make_node("DeformConv", ["c", "w2", "o"], ["y"], name="it"), "its windows move with offsets"),
    "of an unknown domain": (node("SubmConv3d", "c w2", "y", "spconv"), "an operator of the domain 'spconv', which is"),
    "DCN": (node("DCNv2", "c w2", "y", "trt.plugins"), "an operator of the domain 'trt.plugins'"),
    "ATen": (
        node("ATen", "c w2", "y", "org.pytorch.aten", operator="aten::conv2d"),
        "of the domain 'org.pytorch.aten'",
    ),
    "aten": (node("conv_transpose2d", "c w2", "y", "aten"), "an operator of the domain 'aten'"),
    "nchwc": (node("Conv", "c w2", "y", "com.microsoft.nchwc"), "blocked for one processor"),
    "NhwcConv": (node("NhwcConv", "c w2", "y"), "an operator of the domain 'com.microsoft'"),
    "a fused one of tomorrow": (node("FusedConv", "c w2", "y", activation="Swish"), "that ends with 'Swish', which is"),
    "padded at run time": (node("ConvTransposeWithDynamicPads", "c w2", "y"), "its padding is given when it runs"),
}


@pytest.mark.parametrize("what", NAMED)
@pytest.mark.parametrize("alone", [False, True])
def test_what_convolves_and_is_not_read_is_named(what: str, alone: bool) -> None:
    it, reason = NAMED[what]
    changed = onnx.NodeProto.FromString(it.SerializeToString())
    changed.input[0] = "x" if alone else "c"
    nodes = [changed] if alone else [helper.make_node("Conv", ["x", "w"], ["c"]), changed]
    made = model(nodes)
    if "o" in changed.input:
        made.graph.input.append(helper.make_tensor_value_info("o", TensorProto.FLOAT, (1, 18, 6, 6)))
    skipped: list[str] = []
    assert len(specs_from_onnx(made, skipped=skipped)) == (not alone)
    assert len(skipped) == 1
    assert f"{changed.op_type} {changed.name!r}" in skipped[0]
    assert reason in skipped[0]
    with pytest.raises(UnsupportedError, match=changed.op_type):
        specs_from_onnx(made)
    with pytest.raises(NotTakenError, match=changed.op_type):
        read_graph(made)


@pytest.mark.parametrize("name", ["Convert", "Conversion", "ConvexHull", "Converge", "Cast"])
def test_what_does_not_convolve_is_not_named(name: str) -> None:
    made = model([helper.make_node("Conv", ["x", "w"], ["c"]), node(name, "c", "y", "other")])
    skipped: list[str] = []
    assert len(specs_from_onnx(made, skipped=skipped)) == 1
    assert skipped == []


ODD = {
    "a number as activation": node("FusedConv", "x w", "y", activation=3),
    "text as parameters": node("FusedConv", "x w", "y", activation="Clip", activation_params=["a", "b"]),
    "text as a slope": node("FusedConv", "x w", "y", activation="LeakyRelu", activation_params=["a"]),
    "one operand": node("FusedConv", "x", "y"),
    "of another layout": node("NhwcFusedConv", "x w", "y", channels_last="yes"),
    "no operand": helper.make_node("QLinearConv", [], ["y"], domain="com.microsoft"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_makes_no_sense_is_named_too(what: str) -> None:
    skipped: list[str] = []
    assert specs_from_onnx(model([ODD[what]]), skipped=skipped) == []
    assert len(skipped) == 1


def test_everywhere_in_a_model() -> None:
    """Functions of any domain, one with the name of a convolution too, and bodies inside bodies."""
    source = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1, "mine" : 1]>
        g (float[1,4,8,8] x, bool t, int64 n, float[4,4,3,3] w) => (y) {
          [f] c = mine.Conv(x, w)
          [i] y = If (t) <
            then_branch = a () => (p) { [l] p = Loop(n, t, c) <body = b (int64 k, bool g, v) => (h, u) {
                h = Identity(g) [in] u = com.microsoft.FusedConv<activation="Relu", pads=[1,1,1,1]>(v, w) }> },
            else_branch = e () => (q) { [d] q = com.microsoft.NhwcConv(c, w) }> }
        <domain: "mine", opset_import: ["" : 18]> Conv (v, u) => (o) { [own] o = Conv<pads=[1,1,1,1]>(v, u) }"""
    )
    found = {layer.name: str(layer.spec or layer.refusal) for layer in layers_from_onnx(source)}
    plain = "conv2d n1 ic4 oc4 i8x8 k3x3 s1x1 p1x1 nobias"
    assert found.pop("f/own") == plain
    assert found.pop("i/then_branch/l/body/in") == f"{plain} relu"
    assert "NhwcConv 'i/else_branch/d'" in found.pop("i/else_branch/d")
    assert found == {}


def test_a_convolution_of_integers_without_a_zero_point() -> None:
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])]
    nodes += [helper.make_node("ConvInteger", ["q", "w8", "z"], ["y"], name="ci")]
    made = model(nodes, kind=TensorProto.INT32)
    made.graph.initializer.append(numpy_helper.from_array(np.ones((6, 4, 3, 3), np.int8), "w8"))
    (layer,) = layers_from_onnx(made, arrays=True)
    assert str(layer.spec) == "conv2d n1 ic4 oc6 i8x8 k3x3 s1x1 p0x0 nobias src_zero src_u8 dst_i32 i8"
    assert layer.unknown.startswith("'z' is computed by DynamicQuantizeLinear")
    assert sorted(layer.arrays) == ["weights"]
