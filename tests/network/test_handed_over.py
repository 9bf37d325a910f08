"""Models as people hand them over: odd graphs, odd names, other types: compiled as meant, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from network_models import arrays_for, expected, furthest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from convgen.errors import ConvgenError, UnsupportedError
from convgen.hardware.target import resolve
from convgen.network.check.places import check_places
from convgen.network.network import compile_network
from convgen.network.operators import Pass
from convgen.network.plan import Plan, plan
from convgen.network.reading import read_graph
from convgen.network.rewriting import rewrite

pytestmark = pytest.mark.timeout(600)

F32, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
IMAGE = (1, 3, 4, 4)
WEIGHTS = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32), "w")


def value(name: str, shape: Sequence[int | str] | None = None, kind: int = F32) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name: str, values: Any, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)


def model(
    nodes: Sequence[NodeProto], inputs: Sequence[Any], outputs: Sequence[Any], *stored: TensorProto, opset: int = 17
) -> ModelProto:
    graph = helper.make_graph(list(nodes), "odd", list(inputs), list(outputs), list(stored))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 8
    return made


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def planned(made: ModelProto) -> Plan:
    graph = read_graph(made)
    rewrite(graph)
    found = plan(graph, resolve("cpu").on(1))
    check_places(found)
    return found


def branches() -> NodeProto:
    then = helper.make_graph([node("Relu", "x", "t")], "then", [], [value("t")])
    other = helper.make_graph([node("Neg", "x", "o")], "else", [], [value("o")])
    return helper.make_node("If", ["c"], ["y"], name="choice", then_branch=then, else_branch=other)


# ---- taken -------------------------------------------------------------------------------------

#: What is taken, and must compute what ONNX Runtime does.
TAKEN: dict[str, ModelProto] = {
    "a weight that is an input, too": model(
        [node("Conv", "x w", "y")], [value("x", IMAGE), value("w", (4, 3, 1, 1))], [value("y")], WEIGHTS
    ),
    "an input that is an output": model(
        [node("Conv", "x w", "y")], [value("x", IMAGE)], [value("y"), value("x", IMAGE)], WEIGHTS
    ),
    "an output that others read": model(
        [node("Relu", "x", "r"), node("Conv", "r w", "y")], [value("x", IMAGE)], [value("r"), value("y")], WEIGHTS
    ),
    "a constant that is an output": model(
        [node("Relu", "x", "y")], [value("x", (2, 3))], [value("y"), value("w")], WEIGHTS
    ),
    "a scalar constant that is an output": model(
        [node("Relu", "x", "y")], [value("x", (2, 3))], [value("y"), value("s")], constant("s", 2.5)
    ),
    "nothing but constants": model([node("Identity", "w", "y")], [], [value("y")], WEIGHTS),
    "an input that nobody reads": model([node("Relu", "x", "y")], [value("x", (2, 3)), value("z", (5,))], [value("y")]),
    "an output that nobody reads": model(
        [node("Split", "x", "a b", axis=0), node("Relu", "a", "y")], [value("x", (2, 3))], [value("y")]
    ),
    "scalars": model([node("Relu", "x", "r"), node("Add", "r x", "y")], [value("x", ())], [value("y")]),
    "a tensor without elements between": model(
        [node("Slice", "x s s", "none"), node("Concat", "none x", "y", axis=0)],
        [value("x", (2, 3))],
        [value("y")],
        constant("s", [0], np.int64),
    ),
    "a convolution of a constant": model(
        [node("Conv", "k w", "c"), node("Add", "c x", "y")],
        [value("x", (1, 4, 1, 1))],
        [value("y")],
        WEIGHTS,
        constant("k", np.ones((1, 3, 1, 1))),
    ),
    "a shape that is computed": model(
        [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "n", axis=0),
            node("Unsqueeze", "n axes", "rows"),
            node("Concat", "rows rest", "shape", axis=0),
            node("Reshape", "x shape", "y"),
        ],
        [value("x", (2, 3, 4))],
        [value("y")],
        constant("zero", 0, np.int64),
        constant("axes", [0], np.int64),
        constant("rest", [-1], np.int64),
    ),
    "names that ours could be": model(
        [
            node("Relu", "x", "y/0"),
            node("Celu", "y/0", "y/inner", alpha=2.0),
            node("Celu", "y/inner", "y", alpha=0.5),
            node("Add", "y y/0", "y/copy0"),
        ],
        [value("x", (2, 3))],
        [value("y/copy0"), value("x", (2, 3)), value("y/0")],
    ),
    "names that are no words": model(
        [node("Relu", 'a"b\\\\n', "é%s"), node("Neg", "é%s", "*/;")],
        [value('a"b\\\\n', (2, 3))],
        [value("*/;"), value("é%s")],
    ),
    "windows that begin in the padding": model(
        [
            node("MaxPool", "x", "p", kernel_shape=[1, 2], strides=[2, 3], ceil_mode=1),
            node("Conv", "p w", "y"),
        ],
        [value("x", (1, 3, 6, 8))],
        [value("y")],
        WEIGHTS,
    ),
    "more operands than a step takes": model(
        [node("Sum", " ".join(f"x{number}" for number in range(300)), "y")],
        [value(f"x{number}", (2, 3)) for number in range(300)],
        [value("y")],
    ),
    "more parts than a step takes": model(
        [
            *(node("Neg", f"x{number % 7}", f"n{number}") for number in range(300)),
            node("Concat", " ".join(f"n{number}" for number in range(300)), "y", axis=1),
        ],
        [value(f"x{number}", (2, 1, 3)) for number in range(7)],
        [value("y")],
    ),
    "constants that are parts, or wholes": model(
        [
            node("Concat", "x one", "c", axis=0),
            node("Split", "many", "a b", axis=0),
            node("Add", "c a", "s"),
            node("ReduceSum", "one", "r", keepdims=0),
            node("Pad", "one around", "p"),
            node("MatMul", "one b", "m"),
            node("Softmax", "one", "f", axis=1),
        ],
        [value("x", (2, 1))],
        [value(name) for name in ("s", "r", "p", "m", "f")],
        constant("one", [[2.5]]),
        constant("many", [[1.0, 2.0], [3.0, 4.0]]),
        constant("around", [0, 1, 0, 2], np.int64),
    ),
    "padding below 0": model(
        [
            node("Pad", "x shifted", "e", mode="edge"),
            node("Pad", "x shifted", "r", mode="reflect"),
            node("Pad", "x shifted", "w", mode="wrap"),
            node("Pad", "x cut", "c", mode="wrap"),
            node("Pad", "x cut", "z"),
        ],
        [value("x", (2, 5, 7))],
        [value(name) for name in ("e", "r", "w", "c", "z")],
        constant("shifted", [0, 1, -2, 0, -1, 2], np.int64),
        constant("cut", [0, -1, -2, 1, 3, -1], np.int64),
        opset=19,
    ),
    "nodes in any order, a branch that is always taken, weights that are computed": model(
        [
            node("Relu", "i", "y"),
            helper.make_node(
                "If",
                ["t"],
                ["i"],
                then_branch=helper.make_graph([node("Conv", "c v", "o")], "then", [], [value("o")]),
                else_branch=helper.make_graph([node("Softsign", "c", "p")], "else", [], [value("p")]),
            ),
            node("Less", "size four", "t"),
            node("Size", "some", "size"),
            node("Div", "k n", "v"),
            node("ReduceL2", "k", "n", axes=[1, 2, 3]),
            node("Conv", "x w", "c"),
        ],
        [value("x", IMAGE)],
        [value("y", (9, 9))],
        WEIGHTS,
        constant("k", np.random.default_rng(1).standard_normal((5, 4, 1, 1))),
        constant("some", [1, 2, 3]),
        constant("four", 4, np.int64),
    ),
    "truth values between": model(
        [
            node("Greater", "x half", "t"),
            node("Not", "t", "f"),
            node("LessOrEqual", "x one", "l"),
            node("Xor", "f l", "c"),
            node("Where", "c x half", "w"),
            node("Cast", "c", "n", to=F32),
            node("Cast", "x", "b", to=BOOL),
            node("Or", "b c", "o"),
            node("And", "o t", "a"),
            node("Cast", "a", "m", to=F32),
        ],
        [value("x", (3, 5))],
        [value("w"), value("n"), value("m")],
        constant("half", 0.5),
        constant("one", 1.0),
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken(name: str) -> None:
    made = TAKEN[name]
    stored = {tensor.name for tensor in made.graph.initializer}
    inputs = {name: array for name, array in arrays_for(made).items() if name not in stored}
    planned(made)
    network = compile_network(made, resolve("cpu").on(1), 1)
    found = network(*(inputs[given] for given in network.inputs))
    assert furthest(found, expected(made, inputs)) < 1e-6


@pytest.mark.parametrize("activation", [("Relu",), ("Clip", -0.5, 0.7), ("HardSigmoid", 0.3, 0.4), ("LeakyRelu", 0.2)])
def test_convolutions_that_onnx_runtime_fused(activation: tuple[Any, ...]) -> None:
    """With what is stored about the values between of another batch."""
    name, *numbers = activation
    attributes = {"activation": name, "domain": "com.microsoft"} | ({"activation_params": numbers} if numbers else {})
    nodes = [node("FusedConv", "x w", "c", **attributes), node("FusedConv", "c v b c", "y", **attributes)]
    stored = [constant("v", np.random.default_rng(1).standard_normal((4, 4, 1, 1))), constant("b", np.arange(4))]
    made = model(nodes, [value("x", ("N", 3, 4, 5))], [value("y", (1, 4, 4, 5))], WEIGHTS, *stored)
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    made.graph.value_info.append(value("c", (1, 4, 4, 5)))
    network = compile_network(made, resolve("cpu").on(1), 1, dims={"N": 2})
    x = np.random.default_rng(2).standard_normal((2, 3, 4, 5)).astype(np.float32)
    assert furthest(network(x), expected(made, {"x": x})) < 1e-5


def test_two_outputs_of_one_tensor() -> None:
    made = model([node("Relu", "x", "y"), node("Identity", "y", "z")], [value("x", (2, 3))], [value("y"), value("z")])
    network = compile_network(made, resolve("cpu").on(1), 1)
    x = arrays_for(made)["x"]
    found = network(x)
    assert (found["y"] == np.maximum(x, 0)).all()
    assert (found["z"] == found["y"]).all()


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 18, 21, 22, 24])
def test_every_version_of_the_operators(opset: int) -> None:
    """Of those that changed: axes became inputs, BatchNormalization and Dropout lost outputs, Softmax is another."""
    axes = ({"axes": [2, 3]}, "") if opset < 18 else ({}, " axes")
    nodes = [
        node("Conv", "x w", "c", pads=[0, 0, 0, 0]),
        node("BatchNormalization", "c one one one one", "b"),
        node("Relu", "b", "r"),
        node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("ReduceMean", f"p{axes[1]}", "m", keepdims=0, **axes[0]),
        node("Dropout", "m", "d"),
        node("Softmax", "d", "y", axis=1),
    ]
    stored = [WEIGHTS, constant("one", np.ones(4)), constant("axes", [2, 3], np.int64)]
    made = model(nodes, [value("x", IMAGE)], [value("y")], *stored[: 2 + (opset >= 18)], opset=opset)
    inputs = arrays_for(made)
    network = compile_network(made, resolve("cpu").on(1), 1)
    assert furthest(network(inputs["x"]), expected(made, inputs)) < 1e-5


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = constant("w", rng.standard_normal((24, 3, 5, 5)))
    made = model([node("Conv", "x w", "y")], [value("x", (1, 3, 6, 6))], [value("y")], weights)
    inputs, path = arrays_for(made), tmp_path / "model.onnx"
    wanted = expected(made, inputs)
    onnx.save_model(made, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size >= weights.ByteSize() - 64
    network = compile_network(path, resolve("cpu").on(1), 1)
    assert furthest(network(inputs["x"]), wanted) < 1e-5
    network.validate(path).raise_if_failed()


# ---- refused -----------------------------------------------------------------------------------

#: What is not taken, and what the message must name.
REFUSED: dict[str, tuple[ModelProto, str]] = {
    "never computed": (
        model([node("Relu", "a", "y")], [value("x", (2,))], [value("y")]),
        "value 'a': expected an input, a constant or a node that computes it",
    ),
    "an output of f64": (
        model(
            [node("Cast", "x", "y", to=TensorProto.DOUBLE)], [value("x", (2,))], [value("y", None, TensorProto.DOUBLE)]
        ),
        "output 'y': expected one of f32, .*, i64, found double",
    ),
    "an input of indices": (
        model([node("Gather", "x i", "y")], [value("x", (2,)), value("i", (2,), I64)], [value("y")]),
        "input 'i': expected one of f32, u8, i8, i32, bool, f16, bf16, found int64",
    ),
    "f64": (
        model([node("Relu", "x", "y")], [value("x", (2,), TensorProto.DOUBLE)], [value("y", None, TensorProto.DOUBLE)]),
        "input 'x': expected one of f32, .*, found double",
    ),
    "branches": (
        model([branches()], [value("x", (2,)), value("c", (), BOOL)], [value("y")]),
        "If 'choice': ",
    ),
    "sizes that are not known": (
        model([node("Relu", "x", "y")], [value("x", ("N", 3))], [value("y")]),
        r"input 'x': expected a known shape \(--dim\), found \[N, 3\]",
    ),
    "no elements": (
        model([node("Relu", "x", "y")], [value("x", (0, 3))], [value("y")]),
        "input 'x': expected elements",
    ),
    "weights that are computed": (
        model([node("Conv", "x v", "y")], [value("x", IMAGE), value("v", (4, 3, 1, 1))], [value("y")]),
        "its weights are no constants",
    ),
    "an output that nothing computes": (
        model([node("Relu", "x", "r")], [value("x", (2,))], [value("y")]),
        "nothing computes it",
    ),
    "a second output": (
        model(
            [node("MaxPool", "x", "y i", kernel_shape=[2, 2])], [value("x", IMAGE)], [value("y"), value("i", None, I64)]
        ),
        "an output but the first is used",
    ),
    "a window larger than the tensor": (
        model([node("AveragePool", "x", "y", kernel_shape=[5, 4])], [value("x", IMAGE)], [value("y")]),
        "a window of 5 elements, more than the 4 with padding",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    made, reason = REFUSED[name]
    with pytest.raises(ConvgenError, match=reason):
        read_graph(made)


def test_an_operator_of_someone_else_is_named() -> None:
    made = model(
        [helper.make_node("Foo", ["x"], ["y"], name="foo", domain="com.acme")], [value("x", (2,))], [value("y")]
    )
    made.opset_import.append(helper.make_opsetid("com.acme", 1))
    with pytest.raises(UnsupportedError, match=r"Foo 'foo': it is of the domain 'com\.acme'"):
        read_graph(made)


def test_steps_of_scalars_say_what_they_compute() -> None:
    made = model(
        [node("DynamicQuantizeLinear", "x", "q s z"), node("DequantizeLinear", "q s z", "y")],
        [value("x", (2, 3))],
        [value("y")],
    )
    said = [step.function.descriptor for step in planned(made).steps if isinstance(step.function, Pass)]
    assert {"reduce_min scalar", "reduce_max scalar"} <= set(said)
    assert len(set(said)) == len(said)
