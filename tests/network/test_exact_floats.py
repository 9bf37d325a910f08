"""Networks of f32 on whole numbers: where every sum is one that f32 has, results are ONNX Runtime's to the last bit."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from bench_module import load_bench
from onnx import ModelProto, NodeProto, helper, numpy_helper

from convgen.hardware.target import resolve
from convgen.network.check.drawing import draw_network
from convgen.network.check.drawn import Drawn, model_of, run_model
from convgen.network.network import compile_network

pytestmark = pytest.mark.timeout(900)

Array = npt.NDArray[Any]
SEED = 5
#: What sums of magnitudes stay below: f32 has all whole numbers up to four times as many.
MOST = 2.0**22
#: Operators that give whole numbers of whole numbers: all but those that sum and multiply choose, move or round them.
EXACT = {
    *("Conv", "ConvTranspose", "MatMul", "Gemm", "Add", "Sub", "Mul", "Sum", "ReduceSum", "ReduceL1"),
    *("Relu", "Abs", "Neg", "Max", "Min", "Floor", "Ceil", "Round", "Sign", "Identity", "Dropout"),
    *("MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Concat", "Split", "Slice", "Pad", "Expand", "Tile"),
    *("Gather", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "DepthToSpace", "SpaceToDepth"),
    *("Greater", "Less", "Equal", "Not", "And", "Or", "Xor", "Where"),
}


def sums_of(node: NodeProto, given: dict[str, Array]) -> float:
    """No less than what the magnitudes of any sum of a node's add up to, its operands by name."""
    sizes = [float(np.abs(given[name].astype(np.float64)).max()) if name else 0.0 for name in node.input]
    match node.op_type:
        case "Conv" | "ConvTranspose":
            shape = given[node.input[1]].shape
            terms: int = math.prod(shape) // shape[node.op_type == "ConvTranspose"]
            return terms * sizes[0] * sizes[1] + sum(sizes[2:])
        case "MatMul" | "Gemm":
            return float(max(given[node.input[0]].shape)) * sizes[0] * sizes[1] + sum(sizes[2:])
        case "ReduceSum" | "ReduceL1":
            return float(given[node.input[0]].size) * sizes[0]
        case "Mul":
            return sizes[0] * sizes[1]
        case _:
            return sum(sizes)


def in_whole_numbers(one: Drawn) -> tuple[Drawn, list[int]]:
    """A drawn network of whole numbers, and which of its nodes are kept: those that are exact on these."""
    rng, made = np.random.default_rng(0), copy.copy(one)

    def whole(array: Array, most: int) -> Array:
        if array.dtype != np.float32:
            return array
        return rng.integers(-most, most + 1, array.shape).astype(np.float32)

    constants = {name: whole(array, 2) for name, array in one.constants.items()}
    made.constants, made.values = constants, {name: whole(one.values[name], 4) for name in one.inputs}
    kept = []
    for number, node in enumerate(one.nodes):
        known = {**constants, **made.values}
        given = {name: known[name] for name in node.input if name}
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        floats = all(array.dtype in (np.float32, np.bool_) for name, array in given.items() if name in made.values)
        scaled = {attributes.get(name, 1.0) for name in ("alpha", "beta")} - {1.0, 2.0}
        if node.op_type in EXACT and floats and not scaled and sums_of(node, given) < MOST:
            read = {name: array for name, array in given.items() if name in made.values}
            model = model_of(
                [node], read, list(node.output), {name: constants[name] for name in given.keys() - read}, one.opset
            )
            made.values |= run_model(model, read)
            kept.append(number)
        else:
            made.values |= {name: whole(one.values[name], 4) for name in node.output}
    return made, kept


def test_drawn_networks_of_whole_numbers_are_exact() -> None:
    """All nodes of a few together; each network compiled as one, beside ONNX Runtime without optimisations."""
    operators, convolutions = set[str](), 0
    for index in range(12):
        one, kept = in_whole_numbers(draw_network(SEED, index))
        model = one.model(kept)
        if not model.graph.output:
            continue
        inputs = {value.name: one.values[value.name] for value in model.graph.input}
        network = compile_network(model, resolve("cpu").on(2), 2, accuracy="strict")
        found = network(inputs)
        found = found if isinstance(found, dict) else {model.graph.output[0].name: found}
        for name, array in found.items():
            np.testing.assert_array_equal(array, one.values[name], err_msg=f"network {index}")
        operators |= {one.nodes[number].op_type for number in kept}
        convolutions += len(network.plans[0].graph.convolutions)
    assert convolutions > 4
    assert len(operators) > 12


def sparse(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Weights of three ones or minus ones for each output channel: outputs are hardly larger than inputs."""
    found = np.zeros((shape[0], math.prod(shape[1:])), np.float32)
    for row in found:
        row[rng.choice(row.size, 3, replace=False)] = rng.choice((-1, 1, 1), 3)
    return found.reshape(shape)


def whole_squeezenet(folder: Path) -> tuple[ModelProto, Array]:
    """SqueezeNet on images of 48 x 48, of whole numbers; it ends with the mean of 2 x 2 pixels, which f32 has, too."""
    rng = np.random.default_rng(0)
    model = onnx.load(load_bench("networks.modules").write_module("squeezenet1_1", folder, 48))
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            shape = tuple(tensor.dims)
            array = sparse(shape, rng) if len(shape) == 4 else rng.integers(-2, 3, shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model, rng.integers(-8, 9, (1, 3, 48, 48)).astype(np.float32)


def test_a_real_network_of_whole_numbers_is_exact(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model, x = whole_squeezenet(tmp_path)
    between = copy.deepcopy(model)
    names = [name for node in between.graph.node if node.op_type == "Conv" for name in node.output]
    del between.graph.output[:]
    between.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    assert max(np.abs(array).max() for array in run_model(between, {"x": x}).values()) < MOST / 4
    (wanted,) = run_model(model, {"x": x}).values()
    assert len(np.unique(wanted)) > 20
    for threads in (1, 2):
        network = compile_network(model, resolve("cpu").on(2), threads, accuracy="strict")
        np.testing.assert_array_equal(network(x), wanted)
