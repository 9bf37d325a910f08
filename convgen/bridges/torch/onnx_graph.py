"""An ONNX graph that is made of a traced one, and one node of that as it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ...network.node import Refusal
from .strides import Perm, inverse

#: Of ONNX's operators; the first with all that are used here.
OPSET, IR_VERSION = 20, 9
Shape: TypeAlias = tuple[int, ...]
#: Tensors whose values do not depend on a graph's inputs.
Known: TypeAlias = Mapping[fx.Node, Tensor]


def value(node: fx.Node) -> Any:
    """What a node of a traced graph gives: fake tensors, numbers, or several of them."""
    return node.meta.get("val")


def shape(node: fx.Node) -> Shape:
    """A node's shape; it is known by now."""
    return tuple(int(size) for size in value(node).shape)


def arguments(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by their names, those left out included; sizes that are nodes as numbers."""
    found = {}
    for place, argument in enumerate(node.target._schema.arguments):
        given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        found[argument.name] = map_aggregate(given, _number)
    return found


def _number(argument: Any) -> Any:
    """A size that is computed, as a number: guards have made it one."""
    if isinstance(argument, torch.SymInt):
        return int(argument)
    if isinstance(argument, fx.Node) and isinstance(value(argument), int | torch.SymInt):
        return int(value(argument))
    return argument


class OnnxGraph:
    """An ONNX graph that grows by nodes of PyTorch's.

    Args:
        known: values of nodes that do not depend on the inputs.
        values: whether their data is wanted, or only what nodes can be taken.
    """

    def __init__(self, known: Known, values: bool = True) -> None:
        self.known, self.values = known, values
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        #: What PyTorch's nodes are called here; of one that gives several tensors, each.
        self.names: dict[fx.Node, str | list[str]] = {}

    def take_item(self, node: fx.Node) -> None:
        """One of several tensors that a node gives; of most operators only the first is."""
        source, place = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(place, int)
        names = self.names[source]
        self.names[node] = names if isinstance(names, str) else names[place]

    def name(self, node: fx.Node) -> str:
        """The tensor that a node gives; a known one becomes a constant."""
        if node not in self.names:
            if node not in self.known:
                self.names[node] = node.name  # an input, or what is only tried
            else:
                self.names[node] = self.constant(node.name, array(self.known[node]) if self.values else np.zeros(0))
        found = self.names[node]
        return found if isinstance(found, str) else found[0]

    def constant(self, name: str, values: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def add(self, operation: str, inputs: Sequence[str], outputs: str | Sequence[str], **attributes: Any) -> str:
        """An ONNX node; returns its first output."""
        outputs = [outputs] if isinstance(outputs, str) else list(outputs)
        self.nodes.append(helper.make_node(operation, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs[0]

    def add_input(self, node: fx.Node, perm: Perm, kind: int = TensorProto.FLOAT) -> None:
        """A tensor that the caller gives, its axes in the order of its memory."""
        stored = f"{node.name}.stored" if perm != tuple(sorted(perm)) else node.name
        sizes = shape(node)
        self.inputs.append(helper.make_tensor_value_info(stored, kind, [sizes[axis] for axis in perm]))
        if stored != node.name:
            self.add("Transpose", [stored], node.name, perm=inverse(perm))
        self.names[node] = node.name

    def add_output(self, node: fx.Node, perm: Perm, called: str | None = None, kind: int = TensorProto.FLOAT) -> None:
        """A tensor that the caller gets, its axes in the order in which they shall lie in memory.

        Args:
            called: the output's name; as the node's tensor where None.
        """
        name, sizes = self.name(node), shape(node)
        if perm != tuple(sorted(perm)):
            name = self.add("Transpose", [name], called or f"{node.name}.stored", perm=perm)
        elif called is not None and called != name:
            name = self.add("Identity", [name], called)
        self.outputs.append(helper.make_tensor_value_info(name, kind, [sizes[axis] for axis in perm]))

    def model(self, name: str) -> Any:
        """All of it as a model."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, list(self.constants.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def array(tensor: Tensor) -> Any:
    """A known tensor's values."""
    return tensor.detach().cpu().contiguous().resolve_neg().numpy()


def operator(node: fx.Node) -> str:
    """The name of what a node calls, ``add.Tensor``."""
    return str(node.target).removeprefix("aten.")


class Reading:
    """One node as it is read: its arguments by name, checked, and what it becomes."""

    def __init__(self, graph: OnnxGraph, node: fx.Node) -> None:
        self.graph, self.node = graph, node
        self.arguments = arguments(node)
        self.count = 0

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def require(self, name: str, *expected: Any) -> None:
        """Refuse the node unless an argument is one of some values."""
        if not any(self[name] is one or (one is not None and self[name] == one) for one in expected):
            raise Refusal(f"{name} {self[name]!r}; {' or '.join(map(repr, expected))} is supported")

    @property
    def shape(self) -> Shape:
        """Of the node's tensor, or its first one."""
        found = value(self.node)
        first = found[0] if isinstance(found, tuple | list) else found
        return tuple(int(size) for size in first.shape)

    def sizes(self, name: str = "self") -> Shape:
        return shape(self[name])

    def input(self, name: str = "self") -> str:
        """An operand: a tensor, or a number as a constant."""
        given = self[name]
        if isinstance(given, fx.Node):
            return self.graph.name(given)
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise Refusal(f"{name} {given!r}; a tensor or a number is supported")
        return self.constant(np.float32(given))

    def known(self, name: str) -> str:
        """An operand that must not depend on the inputs."""
        if self[name] not in self.graph.known:
            raise Refusal(f"its {name} is not known beforehand: parameters of the module are")
        return self.input(name)

    def parameter(self, name: str, length: int, default: float) -> str:
        """A known vector, or one of a number where it is left out."""
        return self.known(name) if self[name] is not None else self.constant(np.full(length, default, np.float32))

    def number(self, name: str, default: float) -> float:
        given = self[name]
        if given is None:
            return default
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise Refusal(f"{name} {given!r}; a number is supported")
        return float(given)

    def axis(self, name: str, rank: int | None = None) -> int:
        rank = len(self.sizes()) if rank is None else rank
        return int(self[name]) % rank if rank else 0

    def axes(self, name: str) -> list[int]:
        rank, given = len(self.sizes()), self[name]
        chosen = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
        return sorted(axis % rank for axis in chosen)

    def window(self, name: str, rank: int, default: int | None = None) -> list[int]:
        """Numbers for each axis of an image, of which one may stand for all."""
        given = self[name] if isinstance(self[name], list | tuple) else [self[name]]
        given = [default] if not len(given) and default is not None else given
        return [int(size) for size in (given * rank if len(given) == 1 else given)]

    def constant(self, values: Any) -> str:
        return self.graph.constant(self._fresh(), values)

    def integers(self, values: Sequence[int]) -> str:
        return self.constant(np.array(values, np.int64))

    def add(self, operation: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A step within the node."""
        return self.graph.add(operation, inputs, self._fresh(), **attributes)

    def end(self, operation: str, inputs: Sequence[str], **attributes: Any) -> None:
        """What gives the node's tensor."""
        self.graph.names[self.node] = self.graph.add(operation, inputs, self.node.name, **attributes)

    def first_only(self) -> None:
        """Of several tensors, take the first; refuse where another one is used."""
        if any(user.args[1] for user in self.node.users):
            raise Refusal("an output but the first is used")

    def _fresh(self) -> str:
        self.count += 1
        return f"{self.node.name}.{self.count}"
