"""What ONNX's shape inference misses, or gets wrong.

A window of pooling with ``ceil_mode`` that would begin in the padding after the tensor is left out by ONNX Runtime and
PyTorch; ONNX says so too, but infers sizes with it. Here such a node gets a Slice that cuts off what it has no windows
for. And normalisation keeps the shape, which is not found where an operator is a function that asks for its input's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper

_POOLS = ("MaxPool", "AveragePool", "LpPool")
#: Operators whose output is like their first input.
_ALIKE = ("GroupNormalization", "RMSNormalization", "LayerNormalization", "InstanceNormalization")
#: What the name of an output with superfluous windows ends with.
_CUT = "/windows"


def correct_shapes(
    graph: GraphProto, shape: Callable[[str], Sequence[object] | None], dtype: Callable[[str], int]
) -> int:
    """Correct a graph; how many nodes that concerned, and shapes must be inferred again then.

    Args:
        graph: is changed; the shapes of what is computed from a node that is cut are forgotten.
        shape, dtype: of a value; None and 0 where they are not known.
    """
    new = 0
    for node in list(graph.node):
        given, out = (shape(names[0]) if names and names[0] else None for names in (node.input, node.output))
        if given is None:
            continue
        if node.op_type in _POOLS and out is not None and len(given) == len(out):
            new += not node.output[0].endswith(_CUT) and _cut(graph, node, given[2:], out[2:])
        elif node.op_type in _ALIKE and out is None and all(isinstance(size, int) for size in given):
            for value in [value for value in graph.value_info if value.name == node.output[0]]:
                graph.value_info.remove(value)
            kind = dtype(node.input[0])
            graph.value_info.append(helper.make_tensor_value_info(node.output[0], kind, list(given)))
            new += bool(kind)
    return new


def _cut(graph: GraphProto, node: NodeProto, sizes: Sequence[object], out: Sequence[object]) -> bool:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if not attributes.get("ceil_mode", 0) or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return False
    kept: list[int] = []
    begins, strides = attributes.get("pads", [0] * len(sizes)), attributes.get("strides", [1] * len(sizes))
    for count, size, stride, begin in zip(out, sizes, strides, begins, strict=False):
        if not isinstance(count, int) or not isinstance(size, int):
            return False
        kept.append(count - ((count - 1) * stride >= size + begin))
    if kept == list(out):
        return False
    name, node.output[0] = node.output[0], f"{node.output[0]}{_CUT}"
    operands = {"starts": [0] * len(kept), "ends": kept, "axes": list(range(2, 2 + len(kept)))}
    names = [f"{what} of {name}" for what in operands]
    graph.initializer.extend(map(numpy_helper.from_array, map(np.array, operands.values()), names))
    cut = helper.make_node("Slice", [node.output[0], *names], [name], name=f"{node.name or name}{_CUT}")
    graph.node.insert(list(graph.node).index(node) + 1, cut)
    _forget_shapes(graph, {name})
    return True


def _forget_shapes(graph: GraphProto, changed: set[str]) -> None:
    """Of values that are not what they were taken for, and of what is computed from them."""
    for node in graph.node:
        if changed.intersection(node.input) or any(attribute.HasField("g") for attribute in node.attribute):
            changed.update(filter(None, node.output))
    for value in [value for value in graph.value_info if value.name in changed]:
        graph.value_info.remove(value)
    for value in graph.output:
        if value.name in changed:
            value.type.tensor_type.ClearField("shape")
