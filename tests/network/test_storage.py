"""Networks whose tensors are stored as bf16: what is, what is not, and how far that is from f32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from network_models import arrays_for, expected, furthest, model_of
from onnx import TensorProto, helper

from convgen.hardware.target import resolve
from convgen.network.check.bounds import measure
from convgen.network.check.validate import run_onnxruntime
from convgen.network.network import compile_network
from convgen.network.plan import Product
from convgen.network.reading import read_graph
from convgen.network.rewriting import rewrite
from convgen.network.storage import store_narrow

pytestmark = pytest.mark.timeout(600)

#: Some roundings to 8 bits of what the largest element is made of.
ERROR = 0.04


def weights(*shape: int) -> Any:
    return (np.random.default_rng(3).standard_normal(shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32)


NODES = [
    helper.make_node("Conv", ["x", "w0"], ["c0"], strides=[2, 2], pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["c0"], ["r0"]),
    helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1, 1, 1, 1]),
    helper.make_node("Add", ["c1", "r0"], ["a1"]),
    helper.make_node("MaxPool", ["a1"], ["pooled"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    helper.make_node("Sigmoid", ["pooled"], ["gate"]),
    helper.make_node("Concat", ["gate", "pooled"], ["both"], axis=1),
    helper.make_node("GlobalAveragePool", ["both"], ["mean"]),
    helper.make_node("Flatten", ["mean"], ["flat"]),
    helper.make_node("Gemm", ["flat", "w4"], ["scores"], transB=1),
]
MODEL = model_of(
    NODES,
    {"x": (1, 3, 24, 20)},
    ["scores"],
    {"w0": weights(32, 3, 3, 3), "w1": weights(32, 32, 3, 3), "w4": weights(10, 64)},
)


def test_what_lies_between_is_bf16_and_what_is_given_and_taken_f32() -> None:
    network = compile_network(MODEL, resolve("cpu").on(1), 1, accuracy="bf16")
    inputs = arrays_for(MODEL)
    found = network(*inputs.values())
    assert found.dtype == np.float32
    error = furthest(found, expected(MODEL, inputs))
    assert 1e-4 < error < ERROR  # it was rounded
    plan = network.plan
    specs = [step.function.spec for step in plan.steps if isinstance(step.function, Product)]
    assert [(spec.dtype, spec.accuracy) for spec in specs] == [("bf16", "bf16")] * 2 + [("f32", "bf16")]
    between = {name for step in plan.steps for name in (*step.inputs, step.output)} - {"x", "scores"}
    stored = {name: plan.graph.dtype(name) for name in between if not name.endswith("@f32")}
    assert stored
    assert set(stored.values()) == {"bf16"}


def test_the_arena_is_half_as_large() -> None:
    sizes = [compile_network(MODEL, resolve("cpu").on(1), 1, accuracy=a).plan.arena for a in ("standard", "bf16")]
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("last", [["Flatten"], ["Transpose"], ["Flatten", "Identity"], []])
def test_what_an_output_is_a_part_of_stays_f32(last: list[str]) -> None:
    """In memory it is the same tensor by another name."""
    names = ["c", *(f"v{number}" for number in range(len(last)))]
    moves = [helper.make_node(kind, [a], [b]) for kind, a, b in zip(last, names[:-1], names[1:], strict=True)]
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Conv", ["r", "w"], ["c"]), *moves]
    graph = read_graph(model_of(nodes, {"x": (1, 4, 5, 5)}, [names[-1]], {"w": weights(4, 4, 3, 3)}))
    rewrite(graph)
    store_narrow(graph, "bf16")
    assert {graph.dtype(name) for name in graph.shapes if name in names} == {"f32"}
    assert graph.dtype("r") == "bf16"
    assert [node.spec.accuracy for node in graph.convolutions] == ["bf16"]


def test_outputs_are_within_their_bounds() -> None:
    """Those that roundings of everything that is stored allow for."""
    report = compile_network(MODEL, resolve("cpu").on(2), 2, accuracy="bf16").validate(MODEL)
    assert report.passed, report
    assert 1e-3 < report.worst_error < 1


def test_nothing_is_promised_of_what_f16_cannot_hold() -> None:
    model = model_of(
        [helper.make_node("Mul", ["x", "k"], ["y"])], {"x": (1, 4)}, ["y"], {"k": np.array([1e5], np.float32)}
    )
    graph = read_graph(model, {})
    inputs = {"x": np.array([[0.1, -0.5, 0.7, -2.0]], np.float32)}
    found = measure(graph, inputs, accuracy="f16")[graph.outputs[0]].error
    assert np.isinf(found).tolist() == [[False, False, True, True]]
    assert (found[0, :2] >= 2.0**-11 * np.array([1e4, 5e4])).all()  # it is rounded to 11 bits


def test_whole_numbers_are_not_rounded() -> None:
    """Places among many, and integers of 16 bits, have more digits than what is stored between nodes."""
    nodes = [
        helper.make_node("ArgMax", ["x"], ["first"], axis=1, keepdims=0),
        helper.make_node("Mul", ["x", "two"], ["computed"]),
        helper.make_node("ArgMin", ["computed"], ["least"], axis=1),
        helper.make_node("Cast", ["least"], ["second"], to=TensorProto.INT32),
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["third"]),
        helper.make_node("Cast", ["q"], ["fourth"], to=TensorProto.FLOAT),
    ]
    constants: dict[str, Any] = {"two": np.float32(2), "step": np.float32(0.0003), "zero": np.uint16(32768)}
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    model = model_of(nodes, {"x": (3, 3001)}, ["first", "second", "third", "fourth"], arrays, opset=21)
    for value in model.graph.output:  # of types that are inferred
        value.ClearField("type")
    model.ir_version = 10
    inputs = {"x": np.random.default_rng(5).standard_normal((3, 3001), np.float32)}
    inputs["x"][:, 2999], inputs["x"][:, 2998] = 7, -7
    network = compile_network(model, resolve("cpu").on(1), 1, accuracy="bf16")
    found = network(inputs["x"])
    for name, wanted in run_onnxruntime(model, inputs).items():
        np.testing.assert_array_equal(found[name], wanted)
