"""Models that another process compiles."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from convgen.errors import NotTakenError
from convgen.network.apart import compiler
from convgen.network.library import NetworkLibrary


def model(*nodes: onnx.NodeProto, name: str) -> onnx.ModelProto:
    """Of ``x`` of 1×3×8×8 to ``y``, with random weights ``w`` of 4×3×3×3."""
    weights = np.random.default_rng(0).standard_normal((4, 3, 3, 3), np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, name, [x], [y], [numpy_helper.from_array(weights, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_each_model_is_compiled_or_its_refusal_told() -> None:
    convolution = helper.make_node("Conv", ["x", "w"], ["y"])
    unknown = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Det", ["c"], ["y"], "odd")]
    made = compiler.submit([model(convolution, name="first"), model(*unknown, name="second")], 1, "standard")
    assert compiler.wait()
    network, refused = made.result(0)
    assert isinstance(refused, NotTakenError)
    assert "Det 'odd'" in str(refused)
    assert isinstance(network, NetworkLibrary)
    assert network.name == "first"
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8), np.float32)
    session = ReferenceEvaluator(model(convolution, name="first"))
    np.testing.assert_allclose(network(x), session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-4)
