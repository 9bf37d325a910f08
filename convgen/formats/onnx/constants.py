"""Constants of a model that nodes compute: which those are, and their values.

ONNX Runtime computes them, as it does wherever the model runs; what it has no kernels for (bfloat16 of a processor, an
opset newer than itself) ONNX's reference implementation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ...errors import SpecError
from .file import first_line

Array = npt.NDArray[Any]

#: The domain of ONNX Runtime's own operators.
_RUNTIME = "com.microsoft"
#: Limits of a constant that is computed: elements and nodes on the way to it, and products of numbers.
MOST_ELEMENTS, MOST_STEPS, MOST_WORK = 1 << 28, 256, float(1 << 36)

#: Operators of ONNX that give something else every time.
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
#: Operators whose output is of a size that depends on their operands' elements, and is no larger than these.
SIZED_BY_DATA = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "SequenceAt", "ConcatFromSequence"})
#: Operators that multiply each element with many others.
_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "QLinearMatMul", "Gemm", "Einsum", "Conv", "ConvTranspose"})
_PRODUCTS |= {"ConvInteger", "QLinearConv", "DeformConv", "RNN", "LSTM", "GRU", "Attention", "Det", "NonMaxSuppression"}


def is_deterministic(node: NodeProto) -> bool:
    """Whether a node of ONNX's own domain gives one result for the same operands: no random one, none with a body."""
    if node.op_type in RANDOM or any(a.HasField("g") or a.graphs for a in node.attribute):
        return False
    return node.op_type != "Dropout" or len(node.input) < 3 or not node.input[2]


def work_of(node: NodeProto, shapes: Sequence[Sequence[Any] | None]) -> float:
    """About how many products of numbers a node computes, from the shapes of its operands and results: of a matrix
    product, whose three tensors have mk, kn and mn elements, mkn; of windows, all their elements.
    """
    sizes = sorted((math.prod(d for d in shape if isinstance(d, int)) for shape in shapes if shape), reverse=True)
    if node.op_type in _PRODUCTS:
        return math.sqrt(math.prod(map(float, sizes[:3])))
    window = next((a.ints for a in node.attribute if a.name == "kernel_shape"), ())
    return float(max(sizes, default=0) * math.prod(window)) if window else 0.0


def evaluate(nodes: list[NodeProto], leaves: Mapping[str, Array], wanted: str, opset: int, where: str) -> Array:
    """The value that some nodes compute of others.

    Args:
        nodes: of ONNX's own domain, in order.
        leaves: the values that they read and do not compute.
        opset: the version of the operators.
        where: leads the message of an error.

    Raises:
        SpecError: neither implementation computes it.
    """
    try:
        return _by_runtime(nodes, leaves, wanted, opset)
    except Exception as error:  # kernels raise whatever they happen to
        failure = error
    if any(node.op_type == "DequantizeLinear" for node in nodes):
        with suppress(Exception):
            return _by_runtime(list(map(_of_runtime, nodes)), leaves, wanted, opset)
    try:
        return _by_reference(nodes, leaves, wanted, opset)
    except Exception:
        raise SpecError(f"value {wanted!r}", "a constant that can be computed", first_line(failure), where) from failure


def _model(graph: GraphProto, opset: int) -> ModelProto:
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(_RUNTIME, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _by_runtime(nodes: list[NodeProto], leaves: Mapping[str, Array], wanted: str, opset: int) -> Array:
    import onnxruntime  # only where there is something to compute

    plain = {name: array for name, array in leaves.items() if array.dtype.kind in "biufc" and array.dtype.isbuiltin}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in plain.items()
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in leaves.items() if name not in plain]
    graph = helper.make_graph(nodes, "constants", inputs, [ValueInfoProto(name=wanted)], stored)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4  # what fails is said by the exception
    content = _model(graph, opset).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (value,) = session.run([wanted], plain)
    return np.asarray(value)


def _of_runtime(node: NodeProto) -> NodeProto:
    """ONNX Runtime's own DequantizeLinear, which has integers of 4 and 16 bits in all versions, in place of ONNX's."""
    own = NodeProto()
    own.CopyFrom(node)
    if node.op_type == "DequantizeLinear":
        own.domain = _RUNTIME
    return own


def _by_reference(nodes: list[NodeProto], leaves: Mapping[str, Array], wanted: str, opset: int) -> Array:
    from onnx.reference import ReferenceEvaluator

    inputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in leaves]
    outputs = [helper.make_tensor_value_info(wanted, TensorProto.UNDEFINED, None)]
    evaluator = ReferenceEvaluator(_model(helper.make_graph(nodes, "constants", inputs, outputs), opset))
    with np.errstate(all="ignore"):
        (value,) = evaluator.run(None, dict(leaves))
    return np.asarray(value)
