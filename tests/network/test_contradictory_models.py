"""Models that contradict themselves: changed at random, they are read or refused in words, whatever is in them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
from network_models import Array, model_of
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper
from quantised_models import small_model

from convgen.errors import ConvgenError, NotTakenError
from convgen.hardware.target import resolve
from convgen.network.network import plan_model
from convgen.network.reading import read_graph

pytestmark = pytest.mark.timeout(600)

#: Models are changed so often in each of the tests.
CHANGES = 40
NUMBERS = (-5, -1, 0, 1, 2, 3, 7, 2**31, 2**63 - 1)
OPERATORS = [
    "Relu",
    "Conv",
    "Add",
    "Concat",
    "Reshape",
    "Gemm",
    "MatMul",
    "Nope",
    "Resize",
    "Slice",
    "QuantizeLinear",
    "Softmax",
    "Split",
    "Pad",
    "MaxPool",
]
OPERATORS += [
    "DepthToSpace",
    "Transpose",
    "ReduceMean",
    "ConvTranspose",
    "Gather",
    "LayerNormalization",
    "BatchNormalization",
]
TYPES = (0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 16, 99)


def _moves() -> ModelProto:
    """What takes tensors apart and puts them together."""
    rng = np.random.default_rng(0)
    made = [
        helper.make_node("DepthToSpace", ["x"], ["deep"], blocksize=2),
        helper.make_node("SpaceToDepth", ["deep"], ["back"], blocksize=2),
        helper.make_node("Split", ["back", "parts"], ["left", "right"], axis=1),
        helper.make_node("Slice", ["left", "starts", "ends", "axes", "steps"], ["sliced"]),
        helper.make_node("Pad", ["sliced", "pads"], ["padded"], mode="edge"),
        helper.make_node("Concat", ["padded", "right"], ["joined"], axis=1),
        helper.make_node("BatchNormalization", ["joined", "c", "c", "c", "v"], ["normal"]),
        helper.make_node("PRelu", ["normal", "slope"], ["bent"]),
        helper.make_node("MaxPool", ["bent"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Resize", ["pooled", "", "scales"], ["grown"], mode="linear"),
        helper.make_node("Transpose", ["grown"], ["turned"], perm=[0, 2, 3, 1]),
        helper.make_node("LayerNormalization", ["turned", "c", "c"], ["even"], axis=-1),
        helper.make_node("MatMul", ["even", "m"], ["product"]),
        helper.make_node("Gather", ["product", "places"], ["taken"], axis=2),
        helper.make_node("ReduceMean", ["taken"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Reshape", ["mean", "shape"], ["flat"]),
        helper.make_node("Gemm", ["flat", "g", "h"], ["y"], transB=1, alpha=0.5),
    ]
    arrays = {"c": (8,), "slope": (8, 1, 1), "m": (8, 6), "g": (3, 12), "h": (3,)}
    constants = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in arrays.items()}
    constants |= {"v": np.ones(8, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    integers = {"parts": [3, 5], "starts": [1, 0], "ends": [3, 3], "axes": [2, 3], "steps": [1, 1]}
    integers |= {"pads": [0, 0, 1, 0, 0, 0, 1, 1], "places": [0, 2], "shape": [1, 12]}
    constants |= {name: np.array(values, np.int64) for name, values in integers.items()}
    return model_of(made, {"x": (1, 8, 4, 4)}, ["y"], constants)


def _halves() -> ModelProto:
    model = small_model()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def _integers() -> ModelProto:
    """A convolution between integers, and one between what is dequantised."""
    rng = np.random.default_rng(0)
    made = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QLinearConv", ["q", "s", "z", "w", "ws", "wz", "s", "z", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], axis=0),
        helper.make_node("Conv", ["d", "dw"], ["e"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["e", "s", "z"], ["qe"]),
        helper.make_node("MaxPool", ["qe"], ["p"], kernel_shape=[2, 2]),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]),
    ]
    constants: dict[str, Array] = {
        "s": np.array(0.1, np.float32),
        "z": np.array(128, np.uint8),
        "wz": np.zeros(4, np.int8),
        "b": np.arange(4, dtype=np.int32),
    }
    constants |= {"w": rng.integers(-9, 9, (4, 4, 3, 3)).astype(np.int8), "ws": np.full(4, 0.01, np.float32)}
    return model_of(made, {"x": (1, 4, 6, 6)}, ["y"], constants)


MODELS: dict[str, Callable[[], ModelProto]] = {
    "layers": functools.cache(small_model),
    "moves": functools.cache(_moves),
    "halves": functools.cache(_halves),
    "integers": functools.cache(_integers),
}


def _change_attribute(model: ModelProto, rng: random.Random) -> None:
    found = [a for node in model.graph.node for a in node.attribute]
    attribute, number = rng.choice(found), rng.choice(NUMBERS)
    if attribute.type == AttributeProto.INT:
        attribute.i = number
    elif attribute.type == AttributeProto.INTS and rng.random() < 0.5:
        attribute.ints[rng.randrange(len(attribute.ints))] = number
    elif attribute.type == AttributeProto.INTS:
        attribute.ints.append(1) if rng.random() < 0.5 else attribute.ints.pop()
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = rng.choice((float("nan"), float("inf"), -1.0, 0.0))
    else:
        attribute.s = rng.choice((b"", b"bogus", b"\xff\xfe"))


def _remove_attribute(model: ModelProto, rng: random.Random) -> None:
    node = rng.choice([node for node in model.graph.node if node.attribute])
    del node.attribute[rng.randrange(len(node.attribute))]


def _change_input(model: ModelProto, rng: random.Random) -> None:
    graph = model.graph
    number = rng.randrange(len(graph.node))
    node = graph.node[number]
    known = [*(t.name for t in graph.initializer), *(o for before in graph.node[:number] for o in before.output), "x"]
    place = rng.randrange(len(node.input))
    node.input[place] = rng.choice((rng.choice(known), rng.choice(known), "", "nothing"))


def _remove_input(model: ModelProto, rng: random.Random) -> None:
    del rng.choice(model.graph.node).input[-1]


def _change_shape(model: ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    if tensor.dims and rng.random() < 0.5:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, -1, 1, 2, 10**12))
    elif tensor.dims and rng.random() < 0.5:
        del tensor.dims[-1]
    else:
        tensor.dims.append(rng.choice((1, 2)))


def _change_value(model: ModelProto, rng: random.Random) -> None:
    """Of the right size, another number."""
    found = [t for t in model.graph.initializer if t.data_type == TensorProto.INT64] or model.graph.initializer
    tensor = rng.choice(found)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[rng.randrange(array.size)] = rng.choice(NUMBERS[:-1]) if array.dtype == np.int64 else 0
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _change_type(model: ModelProto, rng: random.Random) -> None:
    rng.choice(model.graph.initializer).data_type = rng.choice(TYPES)


def _remove_data(model: ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]


def _change_operator(model: ModelProto, rng: random.Random) -> None:
    rng.choice(model.graph.node).op_type = rng.choice(OPERATORS)


def _change_end(model: ModelProto, rng: random.Random) -> None:
    kind = rng.choice((*model.graph.input, *model.graph.output)).type.tensor_type
    if rng.random() < 0.5 and kind.shape.dim:
        kind.shape.dim[rng.randrange(len(kind.shape.dim))].dim_value = rng.choice((-1, 0, 1, 2, 5))
    else:
        kind.elem_type = rng.choice(TYPES)


CHANGE = (
    *(_change_attribute, _change_attribute, _remove_attribute, _change_input, _change_input, _remove_input),
    *(_change_shape, _change_value, _change_type, _remove_data, _change_operator, _change_operator, _change_end),
)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", MODELS)
def test_a_changed_model_is_planned_or_refused_in_words(name: str, seed: int) -> None:
    rng, target, refused = random.Random(f"{name} {seed}"), resolve("cpu").on(1), 0
    for number in range(CHANGES):
        model = ModelProto()
        model.CopyFrom(MODELS[name]())
        made = [rng.choice(CHANGE) for _ in range(rng.choice((1, 1, 2)))]
        try:
            for change in made:
                change(model, rng)
        except (IndexError, ValueError):  # nothing left that could be changed so
            continue
        try:
            plan_model(model, target)
        except ConvgenError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"change {number}: {', '.join(change.__name__ for change in made)}") from error
    assert CHANGES // 4 < refused < CHANGES  # neither all of them, nor none


def _refusal(model: ModelProto, node: str) -> str:
    with pytest.raises(NotTakenError) as caught:
        read_graph(model)
    return caught.value.nodes[node]


def test_a_concatenation_of_other_ranks_says_which() -> None:
    constants = {"c": np.array(1, np.float32)}
    nodes = [helper.make_node("Concat", ["x", "c"], ["y"], "join", axis=1)]
    assert "4" in _refusal(model_of(nodes, {"x": (1, 2, 3, 3)}, ["y"], constants), "Concat 'join'")


def test_a_slice_of_more_starts_than_ends_says_how_many() -> None:
    constants = {"starts": np.array([0, 0], np.int64), "ends": np.array([1], np.int64)}
    nodes = [helper.make_node("Slice", ["x", "starts", "ends"], ["y"], "cut")]
    model = model_of(nodes, {"x": (1, 2, 3, 3)}, ["y"], constants)
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, (1, 2, 3, 3)))
    assert _refusal(model, "Slice 'cut'")
