"""ONNX's own cases of operators of 8-bit integers, in networks whose inputs and outputs are f32."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnxruntime import InferenceSession

from convgen.errors import UnsupportedError
from convgen.hardware.target import resolve
from convgen.network.network import compile_network
from convgen.network.reading import read_graph

CASES = [
    *(f"test_convinteger_{which}_padding" for which in ("with", "without")),
    *(
        f"test_{operator}linear{which}"
        for operator in ("dequantize", "quantize")
        for which in ("", "_axis", "_int16", "_uint16")
    ),
    *(f"test_dynamicquantizelinear{which}" for which in ("", "_max_adjusted", "_min_adjusted")),
    "test_matmulinteger",
    "test_qlinearconv",
    *(f"test_qlinearmatmul_{rank}D_{dtype}_float32" for rank in (2, 3) for dtype in ("int8", "uint8")),
]
REFUSED = {
    "test_quantizelinear_int16": "expected one of f32, .*, found int16",
    "test_quantizelinear_int4": "expected one of f32, .*, found int4",
    "test_dequantizelinear_uint16": "expected one of f32, .*, found uint16",
    "test_dequantizelinear_blocked": "scales of blocks",
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the cases of other operators compute
        return {case.name: case for case in collect_testcases(None)}


def in_floats(case: Any) -> tuple[ModelProto, dict[str, Any], dict[str, Any]]:
    """A case's node of f32: what its integers are of scale 1. The first operand is given, all others are constants."""
    (node,) = case.model.graph.node
    given, wanted = case.data_sets[0]
    nodes: list[NodeProto] = []
    constants = [numpy_helper.from_array(np.float32(1), "one")]
    x = np.asarray(given[0])
    first = case.model.graph.input[0].name
    if x.dtype != np.float32:
        constants.append(numpy_helper.from_array(np.zeros((), x.dtype), "x_at"))
        nodes.append(helper.make_node("QuantizeLinear", ["given", "one", "x_at"], [first]))
    for value, array in zip(case.model.graph.input[1:], given[1:], strict=True):
        constants.append(numpy_helper.from_array(np.asarray(array), value.name))
    nodes.append(node)
    outputs = {}
    for value, array in zip(case.model.graph.output, wanted, strict=True):
        array = np.asarray(array)
        outputs[f"{value.name}_f32"] = array.astype(np.float32)
        if array.dtype == np.int32 or array.dtype == np.float32:
            nodes.append(helper.make_node("Cast", [value.name], [f"{value.name}_f32"], to=TensorProto.FLOAT))
            continue
        constants.append(numpy_helper.from_array(np.zeros((), array.dtype), f"{value.name}_at"))
        inputs = [value.name, "one", f"{value.name}_at"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{value.name}_f32"]))
    name = first if x.dtype == np.float32 else "given"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape)]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, array.shape) for n, array in outputs.items()]
    graph = helper.make_graph(nodes, "case", values, results, constants)
    opset = max(case.model.opset_import[0].version, 13)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return model, {name: x.astype(np.float32)}, outputs


@pytest.mark.parametrize("name", CASES)
def test_onnx_cases_of_integers(cases: dict[str, Any], name: str) -> None:
    model, inputs, outputs = in_floats(cases[name])
    network = compile_network(model, resolve("cpu").on(1), 1)
    found = network(*inputs.values())
    found = found if isinstance(found, dict) else {next(iter(network.outputs)): found}
    for output, array in outputs.items():
        np.testing.assert_array_equal(found[output], array)


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_other_types_are_named(cases: dict[str, Any], name: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        read_graph(cases[name].model)


def test_what_is_quantised_of_several_tensors_is_quantised_before_they_are_one() -> None:
    """Of two scales, one of them that of the whole: its elements stay as they are."""
    scales = {"fine": (0.03, 100), "coarse": (0.07, 120)}
    constants = [
        numpy_helper.from_array(value, f"{name}_{what}")
        for name, (scale, zero) in scales.items()
        for what, value in (("scale", np.float32(scale)), ("zero", np.uint8(zero)))
    ]

    def through(source: str, name: str, output: str) -> list[NodeProto]:
        given = [f"{name}_scale", f"{name}_zero"]
        return [
            helper.make_node("QuantizeLinear", [source, *given], [f"{output}_stored"]),
            helper.make_node("DequantizeLinear", [f"{output}_stored", *given], [output]),
        ]

    nodes = [
        *through("x", "fine", "a"),
        helper.make_node("Neg", ["x"], ["negative"]),
        *through("negative", "coarse", "b"),
        helper.make_node("Concat", ["a", "b", "x"], ["joined"], axis=1),
        *through("joined", "coarse", "y"),
    ]
    values = {"x": (1, 16, 5, 6), "y": (1, 48, 5, 6)}
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, values[name])] for name in values]
    graph = helper.make_graph(nodes, "joined", *ends, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    network = compile_network(model, resolve("cpu").on(1), 1)
    (plan,) = network.plans
    *steps, last = [plan.graph.dtype(step.output) for step in plan.steps]
    assert (set(steps), last) == ({"u8"}, "f32")
    x = np.random.default_rng(0).standard_normal(values["x"], np.float32) * 4
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(network(x), session.run(None, {"x": x})[0])
