"""Traced graphs as programs: networks, and between them what stays PyTorch's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, fx, nn

from ...errors import SpecError, UnsupportedError
from ...network.apart import Refused
from ...network.library import NetworkLibrary
from ...network.network import Network
from .aten import take
from .onnx_graph import Known, OnnxGraph, value
from .outside import causes
from .partition import Part, Partition, divide
from .strides import Perm, storage_order

if TYPE_CHECKING:
    from onnx import ModelProto

log = logging.getLogger("convgen.bridges.torch")

#: What compiles an ONNX model.
Compile: TypeAlias = Callable[[Any], Network]
AnyNetwork = TypeVar("AnyNetwork", bound=NetworkLibrary)


class Divided:
    """A traced graph, divided into what becomes networks and what stays PyTorch's.

    Args:
        views: whether outputs that lie in one memory go on to do so.
    """

    def __init__(self, graph: fx.GraphModule, parameters: Known, name: str, *, views: bool = False) -> None:
        self.graph, self.name = graph, name
        self.partition = divide(graph.graph, parameters, views=views)

    def models(self) -> Iterator[ModelProto]:
        """What becomes networks, in order, as ONNX models with copies of their weights."""
        several = len(self.partition.parts) > 1
        for number, part in enumerate(self.partition.parts):
            own = f"{self.name}_{number}" if several else self.name
            yield _model(part, self.partition.known, own)

    def compiled(self, compiled: Callable[[Any], AnyNetwork]) -> list[AnyNetwork | Refused]:
        """The models, each compiled; or why one is not taken."""
        found: list[AnyNetwork | Refused] = []
        for model in self.models():
            try:
                found.append(compiled(model))
            except (UnsupportedError, SpecError) as error:
                found.append(error)
        return found

    def forget(self) -> None:
        """Let go of the weights: from now on there are no models of it."""
        self.partition = replace(self.partition, known=dict.fromkeys(self.partition.known))


class Program(Generic[AnyNetwork]):
    """A traced graph, compiled: ``program(*inputs)`` takes and gives what the graph does.

    Args:
        divided: the graph.
        made: the network of each of its models; or why there is none.

    Attributes:
        networks: what convgen computes, in order.
        outside: nodes that PyTorch computes, by name, and why.
        reads: which of its inputs are read at all; the others are known, and may be anything.
    """

    def __init__(self, divided: Divided, made: Sequence[AnyNetwork | Refused]) -> None:
        partition = divided.partition
        self.outside = dict(partition.outside)
        self.networks: list[AnyNetwork] = []
        calls: dict[Part, NetworkCall] = {}
        for part, network in zip(partition.parts, made, strict=True):
            if isinstance(network, Exception):
                self.outside |= {node.name: f"{node.target}: {network}" for node in part.nodes}
            else:
                self.networks.append(network)
                calls[part] = _call(part, network)
        joined = _joined(divided.graph, partition, calls)
        self.reads = _drop_unread(joined)
        self._run = joined.forward
        for nodes, reason in causes(self.outside):
            log.info("%s: left to PyTorch: %s: %s", divided.name, nodes, reason)

    def __call__(self, *inputs: Any) -> Any:
        return self._run(*[inputs[place] for place in self.reads])


class NetworkCall(nn.Module):  # type: ignore[misc]
    """A network on PyTorch's tensors, which share their memory with it.

    Args:
        network: its inputs and outputs are shaped as they lie in memory.
        inputs: the order of each input's axes in memory.
        outputs: shape, strides, and the order of axes of each.
    """

    def __init__(
        self, network: NetworkLibrary, inputs: Sequence[Perm], outputs: Sequence[tuple[Any, Any, Perm]]
    ) -> None:
        super().__init__()
        self.network, self.inputs = network, tuple(inputs)
        self.outputs = tuple(zip(network.outputs, outputs, strict=True))

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        arrays = [_array(tensor, perm) for tensor, perm in zip(tensors, self.inputs, strict=True)]
        results, out = [], {}
        for name, (sizes, strides, perm) in self.outputs:
            result = torch.empty_strided(sizes, strides)
            results.append(result)
            out[name] = result.permute(perm).numpy()
        self.network(*arrays, out=out)
        return results


def _array(tensor: Tensor, perm: Perm) -> Any:
    """A tensor as NumPy has it, its axes as they lie in memory; a copy where they lie otherwise."""
    return tensor.detach().permute(perm).contiguous().resolve_neg().numpy()


def _order(node: fx.Node) -> Perm:
    """The axes of a node's tensor from the outermost in memory to the innermost."""
    tensor = value(node)
    return storage_order(tensor) or tuple(range(tensor.dim()))


def _model(part: Part, known: Known, name: str) -> ModelProto:
    graph = OnnxGraph(known)
    for node in part.inputs:
        graph.add_input(node, _order(node))
    for node in part.nodes:
        take(graph, node)
    for node in part.outputs:
        graph.add_output(node, _order(node))
    return graph.model(name)


def _call(part: Part, network: NetworkLibrary) -> NetworkCall:
    outputs = [(_ints(value(node).shape), _ints(value(node).stride()), _order(node)) for node in part.outputs]
    return NetworkCall(network, [_order(node) for node in part.inputs], outputs)


def _ints(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(map(int, sizes))


def _joined(whole: fx.GraphModule, partition: Partition, calls: dict[Part, NetworkCall]) -> fx.GraphModule:
    """The graph with calls of networks in the place of their nodes."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()

    def copy(node: fx.Node) -> None:
        made[node] = graph.node_copy(node, made.__getitem__)

    for node in whole.graph.nodes:
        if node.op != "output" and (node.op != "call_function" or node in partition.known):
            copy(node)
    waiting = [node for node in whole.graph.nodes if node in partition.stages]
    for stage, part in enumerate(partition.parts):
        for node in [node for node in waiting if partition.stages[node] <= stage]:
            copy(node)
            waiting.remove(node)
        if part not in calls:
            every = {*part.nodes, *part.remade}
            for node in [node for node in whole.graph.nodes if node in every]:
                copy(node)
            continue
        results = graph.call_module(f"network{stage}", tuple(made[node] for node in part.inputs))
        for place, node in enumerate(part.outputs):
            made[node] = graph.call_function(_item, (results, place))
        for node in part.remade:
            copy(node)
    for node in [*waiting, *whole.graph.find_nodes(op="output")]:
        copy(node)
    root: dict[str, Any] = {
        f"network{stage}": calls[part] for stage, part in enumerate(partition.parts) if part in calls
    }
    root |= {str(node.target): getattr(whole, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    joined = fx.GraphModule(root, graph)
    joined.graph.eliminate_dead_code()
    joined.recompile()
    return joined


def _drop_unread(graph: fx.GraphModule) -> list[int]:
    """Take out the inputs that nothing reads: of weights there are hundreds. Returns the places of those that stay."""
    reads = []
    for place, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        if node.users:
            reads.append(place)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return reads


def _item(results: list[Tensor], place: int) -> Tensor:
    return results[place]
