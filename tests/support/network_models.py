"""Small networks as ONNX models, and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
OPSET = 17


def model_of(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int]],
    outputs: Sequence[str],
    constants: Mapping[str, Array] | None = None,
    opset: int = OPSET,
) -> ModelProto:
    """A model of f32 inputs."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


def arrays_for(model: ModelProto, seed: int = 0) -> dict[str, Array]:
    """Standard normal inputs."""
    rng = np.random.default_rng(seed)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def expected(model: ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """ONNX Runtime's outputs, without optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def furthest(found: Any, wanted: Mapping[str, Array]) -> float:
    """The largest difference of all outputs, relative to the largest element of each."""
    arrays = found if isinstance(found, dict) else dict(zip(wanted, [found], strict=True))
    assert list(arrays) == list(wanted)
    worst = 0.0
    for name, array in wanted.items():
        assert arrays[name].shape == array.shape
        scale = float(np.abs(array).max()) if array.size else 1.0
        difference = np.abs(arrays[name] - array).max() if array.size else 0.0
        worst = max(worst, float(difference) / (scale or 1.0))
    return worst
