"""Models of which no part is a node of its own compute what they did: everything stays as it was."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper
from onnx.backend.test.case.node import collect_testcases

from convgen.bridges.rewritten import PartNode, rewritten
from convgen.formats.onnx.file import ModelFile
from convgen.formats.onnx.graph import bodies


def again(model: ModelProto, parts: list[PartNode] | None = None) -> ModelProto:
    with ModelFile(model) as file:
        return rewritten(file, {}, parts or [], {})


def run(model: ModelProto, inputs: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, inputs)
    return outputs


def cases() -> list[Any]:
    """ONNX's own of nodes with graphs inside, and every 25th of the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the cases of other operators compute
        found = sorted((case for case in collect_testcases(None) if case.model is not None), key=lambda case: case.name)
    return [
        case for number, case in enumerate(found) if number % 25 == 0 or any(bodies(n) for n in case.model.graph.node)
    ]


def test_onnx_s_own_cases() -> None:
    checked = []
    for case in cases():
        inputs = dict(zip([value.name for value in case.model.graph.input], case.data_sets[0][0], strict=False))
        try:
            wanted = run(case.model, inputs)
        except Exception:
            continue
        after = again(case.model)
        onnx.checker.check_model(after)
        np.testing.assert_equal(run(after, inputs), wanted, err_msg=case.name)
        checked.append(case)
    assert len(checked) > 40
    assert sum(any(bodies(node) for node in case.model.graph.node) for case in checked) > 5


def test_functions_are_inlined_and_large_tensors_are_there() -> None:
    table = np.arange(800, dtype=np.float32).reshape(20, 40)
    inner = [
        helper.make_node("Constant", [], ["t"], value=onnx.numpy_helper.from_array(table)),
        helper.make_node("Add", ["a", "t"], ["b"]),
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "added", ["a"], ["b"], inner, opsets[:1])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [20, 40]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("added", ["x"], ["y"], domain="own")], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)
    after = again(model)
    assert not after.functions
    np.testing.assert_array_equal(run(after, {"x": table})[0], 2 * table)


def test_what_only_a_part_needed_is_gone() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Conv", ["a", "w"], ["b"]),
        helper.make_node("Shape", ["a"], ["s"]),
        helper.make_node("Tile", ["b", "s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    after = again(model, [PartNode("part", ("x",), ("b",), ((1, 1, 2, 1),), (TensorProto.FLOAT,), "part_0123")])
    assert [(node.domain, node.op_type) for node in after.graph.node] == [("convgen", "part_0123"), ("", "Tile")]
    assert len(after.graph.initializer) == 1
    onnx.checker.check_model(after, full_check=True)
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in after.graph.value_info}
    assert shapes["b"] == [1, 1, 2, 1]
