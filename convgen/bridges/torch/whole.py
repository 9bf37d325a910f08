"""An exported program as one network that is called as its module is: what its library is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from onnx import TensorProto
from torch import fx

from ...errors import UnsupportedError
from .aten import take
from .onnx_graph import OnnxGraph, value
from .partition import Part, Partition
from .strides import storage_order

if TYPE_CHECKING:
    from onnx import ModelProto

_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


@dataclass(frozen=True)
class Ends:
    """What a module takes and gives, of tensors, in its order.

    Attributes:
        inputs: by their nodes' names.
        outputs: the names of outputs, and the nodes that give them: one may give several.
    """

    inputs: tuple[fx.Node, ...]
    outputs: tuple[tuple[str, fx.Node], ...]


def is_whole(part: Part, outputs: list[str], ends: Ends) -> bool:
    """Whether a network takes and gives what the module does, in that order, every tensor as its axes are.

    Args:
        outputs: what the network calls them.
    """
    nodes = tuple(node for _, node in ends.outputs)
    same = part.inputs == ends.inputs and part.outputs == nodes and outputs == [name for name, _ in ends.outputs]
    return same and all(storage_order(value(node)) in (None, _own(node)) for node in (*ends.inputs, *nodes))


def whole_model(graph: fx.Graph, partition: Partition, ends: Ends, name: str) -> ModelProto | None:
    """A model of all of a graph, with the module's axes, names and order; None where nodes of it are PyTorch's.

    Raises:
        UnsupportedError: an input or output is of a type that models do not have.
    """
    taken = {node for part in partition.parts for node in (*part.nodes, *part.remade)}
    needed = {node for _, node in ends.outputs}
    for node in reversed(graph.nodes):
        if node in needed and node not in partition.known:
            needed.update(node.all_input_nodes)
    computed = [node for node in graph.nodes if node in needed and node.op == "call_function"]
    computed = [node for node in computed if node not in partition.known]
    if not taken or not taken.issuperset(computed):
        return None
    made = OnnxGraph(partition.known)
    for node in ends.inputs:
        made.add_input(node, _own(node), _type("input", node.name, node))
    for node in computed:
        take(made, node)
    for output, node in ends.outputs:
        kind = _type("output", output, node)
        made.add_output(node, _own(node), output, kind)
    return made.model(name)


def _own(node: fx.Node) -> tuple[int, ...]:
    return tuple(range(value(node).dim()))


def _type(what: str, name: str, node: fx.Node) -> Any:
    dtype = value(node).dtype
    if dtype not in _TYPES:
        known = ", ".join(str(one).removeprefix("torch.") for one in _TYPES)
        raise UnsupportedError(f"{what} {name!r}: expected one of {known} in a library, found {dtype}")
    return _TYPES[dtype]
