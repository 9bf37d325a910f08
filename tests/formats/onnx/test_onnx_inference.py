"""Shapes are derived: what files store about values, how they order nodes, and branches that are always taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from onnx.tools import update_model_dims
from onnx_graphs import run_onnx, same_numbers

from convgen.errors import NotTakenError, SpecError
from convgen.formats.onnx.node import OnnxLayer
from convgen.formats.onnx.reader import layers_from_onnx, specs_from_onnx
from convgen.network.reading import read_graph

F32 = TensorProto.FLOAT


def parsed(text: str, **arrays: Any) -> ModelProto:
    """A model of the text ``g (inputs) => (outputs) { nodes }`` with these constants."""
    made = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18, "other" : 1]> {text}')
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    return made


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


W1, W2 = weights(6, 4, 3, 3), weights(5, 6, 3, 3)
TWO = "r = Conv<pads=[1,1,1,1]>(x, w) h = Relu(r) y = Conv<pads=[1,1,1,1], strides=[2,2]>(h, w2)"


def texts(layers: list[OnnxLayer]) -> dict[str, str]:
    return {layer.name: str(layer.spec or layer.refusal) for layer in layers}


def store(model: ModelProto, shape: list[int | str], *names: str) -> ModelProto:
    """The model with that shape stored for some values, where its file would have it."""
    for name in names:
        kept = [value for value in model.graph.output if value.name == name]
        place = kept[0] if kept else model.graph.value_info.add()
        place.CopyFrom(helper.make_tensor_value_info(name, F32, shape))
    return model


# ---- what is stored ----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("r",), ("h",), ("r", "h"), ("r", "h", "y"), ("y",)])
@pytest.mark.parametrize("shape", [[1, 6, 224, 224], [1, 6, 224], [4, 6, 31, 32], ["N", 6, 7, 7]])
def test_shapes_stored_of_another_size_are_not_believed(names: tuple[str, ...], shape: list[int | str]) -> None:
    model = parsed(f'g (float["N",4,"H","W"] x) => (float[1,1] y) {{ {TWO} }}', w=W1, w2=W2)
    (out,) = run_onnx(model, ["y"], {"x": np.zeros((4, 4, 32, 30), np.float32)})
    layers = layers_from_onnx(store(model, shape, *names), {"N": 4, "H": 32, "W": 30})
    specs = [layer.spec for layer in layers]
    assert specs[0] is not None
    assert specs[1] is not None
    assert (specs[0].src_shape, specs[1].src_shape) == ((4, 4, 32, 30), (4, 6, 32, 30))
    assert specs[1].dst_shape == out.shape


def test_sizes_changed_by_onnx_tools() -> None:
    model = parsed(f"g (float[1,4,16,16] x) => (float[1,5,8,8] y) {{ {TWO} }}", w=W1, w2=W2)
    model = onnx.shape_inference.infer_shapes(model)
    changed = update_model_dims.update_inputs_outputs_dims(model, {"x": ["B", 4, "H", "W"]}, {"y": ["B", 5, "h", "w"]})
    dims = {"B": 8, "H": 64, "W": 62}
    assert [entry.spec.src_shape for entry in specs_from_onnx(changed, dims)] == [(8, 4, 64, 62), (8, 6, 64, 62)]
    graph = read_graph(changed, dims)
    assert [node.spec.src_shape for node in graph.convolutions] == [(8, 4, 64, 62), (8, 6, 64, 62)]


def test_networks_have_the_derived_shapes() -> None:
    model = parsed(f"g (float[2,4,8,8] x) => (float[9,9,9,9] y) {{ {TWO} }}", w=W1, w2=W2)
    graph = read_graph(store(model, [1, 6, 224, 224], "r", "h"))
    assert graph.shapes[graph.outputs[0]] == (2, 5, 4, 4)
    assert [node.spec.n for node in graph.convolutions] == [2, 2]


ORACLE = "h = other.Mystery(x) y = Conv<pads=[1,1,1,1]>(h, w)"


def test_a_stored_shape_is_used_where_nothing_else_tells() -> None:
    model = store(parsed(f"g (float[1,4,8,8] x) => (y) {{ {ORACLE} }}", w=W1), [3, 4, 9, 9], "h")
    (entry,) = specs_from_onnx(model)
    assert entry.spec.src_shape == (3, 4, 9, 9)
    model = parsed("g (float[1,4,8,8] x) => (y) { h = other.Mystery(x) s = Shape(h) z = Reshape(h, s) y = Conv(z, w) }")
    model.graph.initializer.append(numpy_helper.from_array(W1, "w"))
    (entry,) = specs_from_onnx(store(model, [3, 4, 9, 9], "h"))
    assert entry.spec.src_shape == (3, 4, 9, 9)


def test_nothing_that_is_stored_is_believed_once_a_part_of_it_is_wrong() -> None:
    text = f"g (float[4,4,8,8] x) => (y) {{ v = Relu(x) {ORACLE.replace('(x)', '(v)')} }}"
    model = store(store(parsed(text, w=W1), [1, 4, 8, 8], "v"), [1, 4, 8, 8], "h")
    with pytest.raises(
        SpecError, match=r"after Mystery 'h': the shapes that the file stores .* 'v' has \[1, 4, 8, 8\]"
    ):
        specs_from_onnx(model)


def test_a_size_that_is_not_given_is_not_taken_from_what_is_stored() -> None:
    model = parsed(f'g (float[1,4,"H",32] x) => (y) {{ {TWO} }}', w=W1, w2=W2)
    found = texts(layers_from_onnx(store(model, [1, 6, 224, 32], "r", "h")))
    assert all("dims: expected a size for 'H'" in text for text in found.values())


def test_a_count_of_elements_is_computed_whatever_is_stored() -> None:
    text = (
        "g (float[1,4,8,7] x) => (y) { o = NonZero(flags) n = Shape(o) u = Gather(n, one) z = Concat<axis=0>(u, rest) "
    )
    made = parsed(text + "r = Reshape(x, z) y = Conv<pads=[1,1,1,1]>(r, w) }", one=[1], rest=[4, 2, 7], w=W1)
    made.graph.initializer.append(numpy_helper.from_array(np.array([0, 3, 1, 0, 5, 6]), "flags"))
    made.graph.value_info.append(helper.make_tensor_value_info("o", TensorProto.INT64, [1, 1]))
    (layer,) = layers_from_onnx(made)
    assert layer.spec is not None, layer.refusal
    assert layer.spec.src_shape == (4, 4, 2, 7)  # 4 flags are set


def test_operands_that_contradict_each_other_are_named() -> None:
    text = "g (float[1,4,8,8] x) => (y, z) { c = Conv(x, w) a = Add(c, x) y = Conv(a, w2) z = Conv(x, w) }"
    model = store(parsed(text, w=W1, w2=W2), [1, 6, 6, 6], "a")
    found = texts(layers_from_onnx(model))
    assert "src: expected a shape that shape inference finds" in found["y"]
    assert "after Add 'a': [ShapeInferenceError] Incompatible dimensions" in found["y"]
    assert found["z"].startswith("conv2d n1 ic4 oc6 i8x8")
    with pytest.raises(NotTakenError, match="Incompatible dimensions"):
        read_graph(model)


@pytest.mark.parametrize("word", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [2, 3])
def test_padding_of_the_output_adds_nothing_to_a_size_that_is_given(word: str, stride: int) -> None:
    """ONNX infers that it does; ONNX Runtime does what ONNX says."""
    c = f'ConvTranspose<kernel_shape=[3,3], strides=[{stride},{stride}], auto_pad="{word}", output_padding=[1,1]>(x, w)'
    made = parsed(f"g (float[1,6,8,8] x) => (y) {{ c = {c} y = Conv(c, w2) }}", w=W1, w2=W1)
    layers = layers_from_onnx(made, arrays=True)
    assert [layer.spec and layer.spec.in_spatial for layer in layers] == [(8, 8), (8 * stride, 8 * stride)]
    for layer in layers:
        same_numbers(made, layer)


@pytest.mark.parametrize("size", [6, 7])
def test_a_dst_that_is_not_what_src_and_weights_give(size: int) -> None:
    """An operator of a later version than the model's has no shape but the stored one: where that is not the layer's,
    the layer's dst would not be the next one's src.
    """
    made = parsed("g (float[1,4,8,8] x) => (z) { c = Conv(x, w) y = HardSwish(c) z = Conv(y, w2) }", w=W1, w2=W2)
    made.opset_import[0].version = 13  # HardSwish is of 14
    found = texts(layers_from_onnx(store(made, [1, 6, size, size], "y")))
    if size == 6:
        assert found["c"].endswith("nobias hardswish")
    else:
        wrong = "dst: expected shape [1, 6, 6, 6] as src and weights give, found [1, 6, 7, 7]"
        assert wrong in found["c"]
    assert f"i{size}x{size}" in found["z"]


def test_an_output_that_another_shape_is_declared_for() -> None:
    model = parsed("g (float[1,4,8,8] x) => (float[7,7] y) { y = Conv(x, w) }", w=W1)
    assert read_graph(model).shapes["y"] == (1, 6, 6, 6)


# ---- sizes that are computed -------------------------------------------------------------------

#: Nodes between x and r, and the constants that they use.
SIZES: dict[str, dict[str, Any]] = {
    "s = Shape(x) h = Slice(s, two, four) d = Mul(h, two) t = Slice(s, zero, two) z = Concat<axis=0>(t, d) "
    "r = Resize(x, none, none, z)": {"zero": [0], "two": [2], "four": [4], "none": np.zeros(0, np.float32)},
    "n = Size(x) q = Div(n, per) z = Concat<axis=0>(q, rest) r = Reshape(x, z)": {"per": [224], "rest": [4, 7, 8]},
    "s = Shape<start=2>(x) a = ReduceMax<keepdims=1>(s) z = Concat<axis=0>(ends, a, a) r = Expand(unit, z)": {
        "ends": [1, 4],
        "unit": np.ones((1, 4, 1, 1), np.float32),
    },
    "s = Shape(x) o = NonZero(flags) f = Squeeze(o, zero) g = Gather(s, f) r = Reshape(x, g)": {
        "flags": [3, 1, 1, 5],
        "zero": [0],
    },
    "k = CumSum(ones, axis) z = Add(k, less) r = Reshape(x, z)": {"ones": [1] * 4, "axis": 0, "less": [0, 2, 5, 3]},
    "b, e = Split<num_outputs=2>(sizes) z = Concat<axis=0>(b, e) r = Reshape(x, z)": {"sizes": [1, 4, 7, 8]},
    "l = Less(ones, sizes) z = Where(l, sizes, ones) r = Reshape(x, z)": {"ones": [1] * 4, "sizes": [-1, 4, 8, 7]},
    "z = Range(first, last, step) r = Tile(x, z)": {"first": 1, "last": 5, "step": 1},
    "m = MatMul(row, square) z = Clip(m, low, high) r = Reshape(x, z)": {
        "row": [1, 1, 1, 1],
        "square": np.diag([-3, 4, 8, 7]),
        "low": 1,
        "high": 9,
    },
    "u, i = Unique(some) t, j = TopK<largest=0>(u, count) z = Concat<axis=0>(t, rest) r = Reshape(x, z)": {
        "some": [4, 4, 1],
        "count": [2],
        "rest": [8, 7],
    },
    "i = Reciprocal(f) c = Cast<to=7>(i) z = Concat<axis=0>(one, c, rest) r = Reshape(x, z)": {
        "f": np.array([0.25], np.float32),
        "one": [1],
        "rest": [7, 8],
    },
    "s = SplitToSequence<keepdims=1>(sizes) a = SequenceAt(s, at) z = Concat<axis=0>(a, rest) r = Reshape(x, z)": {
        "sizes": [5, 1, 6],
        "at": 1,
        "rest": [4, 8, 7],
    },
}


@pytest.mark.parametrize("body", SIZES)
def test_sizes_that_operators_compute(body: str) -> None:
    """As ONNX Runtime has them, whatever operator it was."""
    arrays = {n: a if isinstance(a, np.ndarray) else np.array(a, np.int64) for n, a in SIZES[body].items()}
    made = parsed(f"g (float[1,4,8,7] x) => (y) {{ {body} p = Relu(r) }}", **arrays)
    (expected,) = run_onnx(made, ["p"], {"x": np.zeros((1, 4, 8, 7), np.float32)})
    made.graph.node.append(helper.make_node("Conv", ["p", "w"], ["y"], pads=[1, 1, 1, 1]))
    made.graph.initializer.append(numpy_helper.from_array(weights(4, expected.shape[1], 3, 3), "w"))
    (layer,) = layers_from_onnx(made)
    assert layer.spec is not None, layer.refusal
    assert layer.spec.src_shape == expected.shape


def test_same_padding_of_a_whole_network() -> None:
    """timm's Conv2dSame, exported with open sizes: each layer's pads depend on the size that the one before leaves."""
    lines, value = [], "x"
    for i in range(12):
        lines.append(
            f"s{i} = Shape({value}) h{i} = Gather(s{i}, axis2) f{i} = Cast<to=1>(h{i}) d{i} = Div(f{i}, twof) "
            f"c{i} = Ceil(d{i}) m{i} = Sub(c{i}, onef) n{i} = Mul(m{i}, twof) k{i} = Add(n{i}, threef) "
            f"o{i} = Sub(k{i}, f{i}) l{i} = Max(o{i}, zerof) a{i} = Cast<to=7>(l{i}) b{i} = Div(a{i}, two) "
            f"e{i} = Sub(a{i}, b{i}) p{i} = Concat<axis=0>(zeros, b{i}, b{i}, zeros, e{i}, e{i}) "
            f"q{i} = Pad({value}, p{i}) "
            f"v{i} = Conv<strides=[2,2]>(q{i}, w) u{i} = Resize(v{i}, none, double)"
        )
        value = f"u{i}"
    arrays: dict[str, Any] = {"axis2": np.array([2]), "two": np.array([2]), "zeros": np.array([0, 0])}
    arrays |= {f"{n}f": np.array([k], np.float32) for n, k in (("two", 2), ("one", 1), ("three", 3), ("zero", 0))}
    arrays |= {"w": weights(4, 4, 3, 3), "double": np.array([1, 1, 2, 2], np.float32), "none": np.zeros(0, np.float32)}
    made = parsed(f'g (float["N",4,"S","S"] x) => (y) {{ {" ".join(lines)} y = Relu({value}) }}', **arrays)
    layers = layers_from_onnx(made, {"N": 1, "S": 9})
    (expected,) = run_onnx(made, ["y"], {"x": np.zeros((1, 4, 9, 9), np.float32)})
    assert len(layers) == 12
    assert [layer.spec is not None and layer.spec.padding for layer in layers][:2] == [
        ((1, 1), (1, 1)),
        ((0, 1), (0, 1)),
    ]
    assert layers[-1].spec is not None
    assert tuple(2 * size for size in layers[-1].spec.out_spatial) == expected.shape[2:]


# ---- order, and old files ----------------------------------------------------------------------


def shuffled(model: ModelProto) -> ModelProto:
    nodes = list(model.graph.node)[::-1]
    changed = ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def test_nodes_in_any_order() -> None:
    body = "c = Conv(x, w) i = If(t) <then_branch = b () => (o) { o = Conv(c, w2) }, else_branch = b () => (o) "
    body += "{ o = Identity(late) }> late = Relu(k) k = Conv(c, w2) y = Sigmoid(i)"
    model = parsed(f"g (float[1,4,8,8] x, bool t) => (y) {{ {body} }}", w=W1, w2=W2)
    layers = layers_from_onnx(model)
    assert texts(layers) == texts(layers_from_onnx(shuffled(model)))
    assert texts(layers)["i/then_branch/o"] == "conv2d n1 ic6 oc5 i6x6 k3x3 s1x1 p0x0 nobias"
    assert texts(layers)["k"] == "conv2d n1 ic6 oc5 i6x6 k3x3 s1x1 p0x0 nobias relu"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    straight = parsed(f"g (float[1,4,8,8] x) => (y) {{ {TWO} }}", w=W1, w2=W2)
    session = onnxruntime.InferenceSession(shuffled(straight).SerializeToString(), options)
    (expected,) = session.run(None, {"x": np.zeros((1, 4, 8, 8), np.float32)})
    graph = read_graph(shuffled(straight))
    assert graph.shapes["y"] == expected.shape


@pytest.mark.parametrize("ir_version", [3, 8])
@pytest.mark.parametrize("listed", [False, True])
def test_initializers_that_are_inputs_or_not(ir_version: int, listed: bool, tmp_path: Path) -> None:
    model = parsed(f"g (float[1,4,8,8] x) => (y) {{ {TWO} }}", w=W1, w2=W2)
    model.ir_version = ir_version
    if listed:
        model.graph.input.extend(helper.make_tensor_value_info(t.name, F32, t.dims) for t in model.graph.initializer)
    onnx.save(model, tmp_path / "m.onnx")
    layers = layers_from_onnx(tmp_path / "m.onnx", arrays=True)
    np.testing.assert_array_equal(layers[1].arrays["weights"], W2)


# ---- branches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("how", ["stored", "computed"])
def test_a_branch_that_is_always_taken(taken: bool, how: str) -> None:
    """It stands in the If's place: the activation after it is folded, and weights that it stores are known."""
    text = """g (float[1,4,8,8] x) => (y) {
        COND
        i, j = If(t) <then_branch = b () => (o, k) { k = Identity(x) [c] o = Conv<pads=[1,1,1,1]>(x, w) },
                      else_branch = b () => (o, p) { v = Neg(w) [e] o = Conv(x, v) p = Relu(x) }>
        y = Sigmoid(i) z = Relu(j) }"""
    if how == "stored":
        model = parsed(text.replace("COND", ""), t=np.array(taken), w=W1)
    else:
        condition = "s = Shape(x) l = Gather(s, one) t = Equal(l, size)"
        size = np.array(4 if taken else 5)
        model = parsed(text.replace("COND", condition), one=np.array(1), size=size, w=W1)
    (layer,) = layers_from_onnx(model, arrays=True)
    name, padding = ("i/then_branch/c", 1) if taken else ("i/else_branch/e", 0)
    assert (layer.name, layer.dst) == (name, "y")
    assert str(layer.spec) == f"conv2d n1 ic4 oc6 i8x8 k3x3 s1x1 p{padding}x{padding} nobias sigmoid"
    np.testing.assert_array_equal(layer.arrays["weights"], W1 if taken else -W1)
    graph = read_graph(model)
    (expected,) = run_onnx(model, ["y"], {"x": np.zeros((1, 4, 8, 8), np.float32)})
    assert graph.shapes["y"] == expected.shape


def test_a_loop_gives_the_shape_that_it_carries() -> None:
    """And its body is entered with it; nothing is known of one that changes, whatever the file says."""
    text = """g (float[1,4,8,8] x, int64 n, bool t) => (y) {
        z = Loop(n, t, x) <body = b (int64 i, bool c, v) => (d, u) { d = Identity(c) u = Conv<pads=PADS>(v, w) }>
        y = Conv(z, w) }"""
    kept = layers_from_onnx(parsed(text.replace("PADS", "[1,1,1,1]"), w=weights(4, 4, 3, 3)))
    assert [layer.spec is not None and layer.spec.in_spatial for layer in kept] == [(8, 8), (8, 8)]
    changing = store(parsed(text.replace("PADS", "[0,0,0,0]"), w=weights(4, 4, 3, 3)), [1, 4, 6, 6], "v", "u")
    loop = next(node for node in changing.graph.node if node.op_type == "Loop")
    loop.attribute[0].g.value_info.extend(changing.graph.value_info)
    found = texts(layers_from_onnx(changing))
    assert "found ? after Loop 'z'" in found["y"]
    assert "found ?" in found["z/body/u"]
