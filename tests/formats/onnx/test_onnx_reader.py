"""The ONNX reader: models as people have them, and hostile ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from integer_data import integers
from onnx import TensorProto, helper, numpy_helper, parser
from onnx_graphs import graph, run_onnx
from strategies import specs

from convgen.check.onnx_model import onnx_model
from convgen.check.reference import run_onnxruntime
from convgen.errors import SpecError, UnsupportedError
from convgen.formats.entries import SpecEntry
from convgen.formats.onnx.node import OnnxLayer
from convgen.formats.onnx.reader import layers_from_onnx, specs_from_onnx
from convgen.problem.spec import ConvSpec


@settings(max_examples=150, deadline=None)
@given(specs())
def test_round_trip(spec: ConvSpec) -> None:
    # ONNX has neither layouts nor accuracy
    spec = spec.with_(layout="nchw", dst_layout="nchw", accuracy="standard", dtype="f32")
    assume(all(extra < stride for extra, stride in zip(spec.output_padding, spec.stride, strict=True)))
    activation = spec.activation_op
    assume(activation.name != "clip" or activation.params[0] < activation.params[1])  # a constant is not fused
    read = spec.with_(activation="none") if spec.activation == "clip" else spec  # to no bounds at all
    assert specs_from_onnx(onnx_model(spec)) == [SpecEntry(read, 1, ("conv",))]


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
    source = model(op, auto_pad=auto_pad, strides=[2, 3], dilations=[dilation, 1])
    (entry,) = specs_from_onnx(source)
    data = integers(entry.spec)
    session = onnxruntime.InferenceSession(source.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": data["src"], "w": data["weights"]})
    np.testing.assert_array_equal(run_onnxruntime(entry.spec, **data, threads=1), expected)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("wanted", [(18, 18), (17, 18), (16, 17), (1, 4, 18, 17)])
def test_output_shape(auto_pad: str, wanted: tuple[int, ...]) -> None:
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
        (model(), {"N": 1}, "dims: expected none, as the model has all sizes, found 'N'"),
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
        (model("Relu"), {}, "model: expected a node Conv, ConvTranspose, QLinearConv, ConvInteger, found none"),
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
    changed = model()
    for node in changed.graph.node:
        node.op_type = "ConvInteger"
    with pytest.raises(UnsupportedError, match="src has the dtype of 'x', float; supported are i8, u8"):
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
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(source.SerializeToString(), options)
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
        ({"inputs": ("w_scale",)}, "scale 'w_scale' is no constant"),
        ({"y_zero": np.int16(0)}, "dst has the dtype of 'y_zero', int16; supported are i8, u8"),
        ({"w": QUANTISED["w"].astype(np.int16)}, "weights has the dtype of 'w', int16; supported are i8, u8"),
        ({"w_scale": np.ones(2, np.float32)}, "scale 'w_scale': expected 6 elements, found 2"),
    ],
)
def test_quantised_convolutions_that_mean_another_thing_are_refused(changes: dict[str, Any], message: str) -> None:
    skipped: list[str] = []
    assert specs_from_onnx(quantised(**changes), skipped=skipped) == []
    assert re.search(message, skipped[0]), skipped


def test_an_axis_of_an_input_names_its_size_and_a_question_mark_is_no_name() -> None:
    for name in ("H", "?"):
        (entry,) = specs_from_onnx(model(src=(1, 4, name, 9)), {"x[2]": 12})
        assert entry.spec.in_spatial == (12, 9)
    (entry,) = specs_from_onnx(model(src=(1, 4, "H", "H")), {"x[3]": 12})
    assert entry.spec.in_spatial == (12, 12)
    (entry,) = specs_from_onnx(model(src=(1, 4, "?", "?")), {"x[2]": 12, "x[3]": 9})
    assert entry.spec.in_spatial == (12, 9)
    with pytest.raises(SpecError, match="dims: expected one size of H, found 5 and 6"):
        specs_from_onnx(model(src=(1, 4, "H", 9)), {"H": 5, "x[2]": 6})
    with pytest.raises(SpecError, match=r"dims: expected names among x\[2\], x\[3\], found '\?'"):
        specs_from_onnx(model(src=(1, 4, "?", "?")), {"?": 5})
