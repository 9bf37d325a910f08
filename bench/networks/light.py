"""The models that the onnx package ships for tests: graphs of well-known networks whose weights are constants.

Every weight is 0.02 there. Here each gets random numbers of the scale that suits what reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnxruntime import GraphOptimizationLevel

from convgen.check.reference import open_session

#: In the order of the tables.
LIGHT = (
    "light_bvlc_alexnet",
    "light_densenet121",
    "light_inception_v1",
    "light_inception_v2",
    "light_resnet50",
    "light_shufflenet",
    "light_squeezenet",
    "light_vgg19",
    "light_zfnet512",
)

F32 = npt.NDArray[np.float32]
#: Inputs of an operator that scale, and those that are variances; they are around 1, others of one axis around 0.
_FACTORS, _VARIANCES = {("BatchNormalization", 1), ("Mul", 0), ("Mul", 1)}, {("BatchNormalization", 4)}


def write_light(name: str, folder: Path, seed: int = 0) -> Path:
    """A model with weights in a folder, as a file."""
    model = onnx.load(Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"{name}.onnx")
    graph, rng = model.graph, np.random.default_rng(seed)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    users = {name: (node, place) for node in graph.node for place, name in enumerate(node.input)}
    kept = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        role = _role(node.output[0], users)
        arrays[node.output[0]] = _weights(tuple(map(int, arrays[node.input[0]])), role, rng)
    read = {name for node in kept for name in node.input}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items() if name in read)
    model.ir_version = max(4, model.ir_version)  # from which on initializers need not be inputs
    inputs = [value for value in graph.input if value.name not in arrays]
    del graph.input[:]
    graph.input.extend(inputs)
    _temper(model, arrays)
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return path


def _role(value: str, users: dict[str, tuple[Any, int]]) -> tuple[str, int]:
    """The operator that reads a value, and which of its inputs that is; what only shapes it is looked through."""
    node, place = users[value]
    while node.op_type in ("Unsqueeze", "Reshape"):
        node, place = users[node.output[0]]
    return node.op_type, place


def _weights(shape: tuple[int, ...], role: tuple[str, int], rng: np.random.Generator) -> F32:
    if role in _FACTORS:
        return rng.uniform(0.8, 1.2, shape).astype(np.float32)
    if role in _VARIANCES:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1:
        return rng.normal(0, 0.1, shape).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return rng.normal(0, (2 / fan_in) ** 0.5, shape).astype(np.float32)


def _temper(model: onnx.ModelProto, arrays: dict[str, Any]) -> None:
    """Scale the last weights so that a Softmax behind them gets numbers of the scale 1: with large ones it would answer
    0 and 1 whatever a library computes, and its outputs would check nothing.
    """
    graph = model.graph
    last = graph.node[-1]
    if last.op_type != "Softmax":
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.node[-1], probe.graph.output[:]
    probe.graph.output.append(helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, None))
    session = open_session(probe.SerializeToString(), 1, GraphOptimizationLevel.ORT_ENABLE_BASIC)
    inputs = {
        info.name: np.random.default_rng(0).standard_normal(info.shape, np.float32) for info in session.get_inputs()
    }
    spread = float(np.std(session.run(None, inputs)[0]))
    weighted = next(node for node in reversed(graph.node) if node.op_type in ("Conv", "Gemm"))
    scaled = set(weighted.input[1:])
    for tensor in graph.initializer:
        if tensor.name in scaled:
            tensor.CopyFrom(numpy_helper.from_array((arrays[tensor.name] / spread).astype(np.float32), tensor.name))
