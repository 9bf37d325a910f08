"""A network that was drawn: its nodes and every tensor's values; as a model, and what ONNX Runtime makes of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import ModelProto, NodeProto, helper, numpy_helper

Array = npt.NDArray[Any]


def run_model(model: ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """ONNX Runtime's outputs, without optimisations, on one thread."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4  # what it refuses is no news
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def model_of(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
    constants: Mapping[str, Array],
    opset: int,
) -> ModelProto:
    """A model whose inputs are like arrays, and whose outputs' shapes and types are not said."""
    graph = helper.make_graph(
        list(nodes),
        "drawn",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
        ],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


@dataclass
class Drawn:
    """A network.

    Attributes:
        opset: the version of its operators.
        inputs: names.
        nodes: in order.
        constants: its weights and other parameters.
        values: of every tensor, the inputs among them, as ONNX Runtime computes it node by node.
    """

    opset: int
    inputs: list[str] = field(default_factory=list)
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)

    def model(self, kept: Collection[int] | None = None) -> ModelProto:
        """All nodes as a model, or those with the given numbers: what the others compute are inputs then."""
        nodes = [node for number, node in enumerate(self.nodes) if kept is None or number in kept]
        computed = [name for node in nodes for name in node.output]
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        inputs = {name: self.values[name] for name in read if name in self.values and name not in computed}
        if kept is None:
            inputs = {name: self.values[name] for name in self.inputs}
        outputs = [name for name in computed if name not in read and self.values[name].dtype == np.float32]
        constants = {name: self.constants[name] for name in read if name in self.constants}
        return model_of(nodes, inputs, outputs, constants, self.opset)
