"""Constants of a model that nodes compute: which those are, and their values.

ONNX Runtime computes them, as it does wherever the model runs; what it has no kernels for (bfloat16 of a processor, an
opset newer than itself) ONNX's reference implementation.
"""

from __future__ import annotations

import math
import re
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
#: Most elements of the operands of an operator that is run to know the shape of what it gives.
MOST_SEEN = 1 << 24
#: The spellings of ONNX's own operator domain.
ROOTS = frozenset({"", "ai.onnx"})

#: Operators of ONNX that give something else every time.
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
#: Operators whose output is of a size that depends on their operands' elements, and is no larger than these.
SIZED_BY_DATA = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "SequenceAt", "ConcatFromSequence"})
#: Operators that multiply each element with many others.
_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "QLinearMatMul", "Gemm", "Einsum", "Conv", "ConvTranspose"})
_PRODUCTS |= {"ConvInteger", "QLinearConv", "DeformConv", "RNN", "LSTM", "GRU", "Attention", "Det", "NonMaxSuppression"}
#: What the names of other domains' operators say of them: they give something else every time.
_BY_CHANCE = re.compile("Random|Dropout|Bernoulli|Multinomial|Sampling")
#: Those whose output may be of any size, whatever the sizes of their operands.
_ANY_SIZE = frozenset({"Pad", "Range"})


def is_deterministic(node: NodeProto) -> bool:
    """Whether a node gives one result for the same operands, of a size that is bounded: no random one, none with a
    body. Of a Dropout only its graph tells (:meth:`convgen.formats.onnx.graph.Scope.drops`).
    """
    if any(a.HasField("g") or a.graphs for a in node.attribute):
        return False
    if node.domain in ROOTS:
        return node.op_type not in RANDOM
    return node.op_type not in _ANY_SIZE and not _BY_CHANCE.search(node.op_type)


def work_of(node: NodeProto, shapes: Sequence[Sequence[Any] | None]) -> float:
    """About how many products of numbers a node computes, from the shapes of its operands and results: of a matrix
    product, whose three tensors have mk, kn and mn elements, mkn; of windows, all their elements.
    """
    sizes = sorted((math.prod(d for d in shape if isinstance(d, int)) for shape in shapes if shape), reverse=True)
    if node.domain in ROOTS and node.op_type in _PRODUCTS:
        return math.sqrt(math.prod(map(float, sizes[:3])))
    if node.domain not in ROOTS:  # as if each element of the largest were multiplied along an axis of another
        axes = [d for shape in shapes for d in shape or () if isinstance(d, int)]
        return float(max(sizes, default=0)) * max(axes, default=0)
    window = next((a.ints for a in node.attribute if a.name == "kernel_shape"), ())
    return float(max(sizes, default=0) * math.prod(window)) if window else 0.0


def evaluate(
    nodes: list[NodeProto], leaves: Mapping[str, Array], wanted: str, opsets: Mapping[str, int], where: str
) -> Array:
    """The value that some nodes compute of others.

    Args:
        nodes: in order.
        leaves: the values that they read and do not compute.
        opsets: the version of each domain's operators.
        where: leads the message of an error.

    Raises:
        SpecError: neither implementation computes it.
    """
    opsets = {node.domain: 1 for node in nodes if node.domain not in ROOTS} | dict(opsets)
    try:
        return _by_runtime(nodes, leaves, wanted, opsets)
    except Exception as error:  # kernels raise whatever they happen to
        failure = error
    if any(node.op_type == "DequantizeLinear" for node in nodes):
        with suppress(Exception):
            return _by_runtime(list(map(_of_runtime, nodes)), leaves, wanted, {_RUNTIME: 1} | opsets)
    try:
        return _by_reference(nodes, leaves, wanted, opsets)
    except Exception:
        raise SpecError(f"value {wanted!r}", "a constant that can be computed", first_line(failure), where) from failure


def _model(graph: GraphProto, opsets: Mapping[str, int]) -> ModelProto:
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _by_runtime(nodes: list[NodeProto], leaves: Mapping[str, Array], wanted: str, opsets: Mapping[str, int]) -> Array:
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
    content = _model(graph, opsets).SerializeToString()
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


def _by_reference(nodes: list[NodeProto], leaves: Mapping[str, Array], wanted: str, opsets: Mapping[str, int]) -> Array:
    from onnx.reference import ReferenceEvaluator

    inputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in leaves]
    outputs = [helper.make_tensor_value_info(wanted, TensorProto.UNDEFINED, None)]
    evaluator = ReferenceEvaluator(_model(helper.make_graph(nodes, "constants", inputs, outputs), opsets))
    with np.errstate(all="ignore"):
        (value,) = evaluator.run(None, dict(leaves))
    return np.asarray(value)
