"""Which nodes of a traced graph become networks, and which stay PyTorch's."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from ...network.node import Refusal
from .aten import PRODUCTS, take
from .onnx_graph import Known, OnnxGraph, operator, value
from .strides import storage_order


@dataclass(frozen=True)
class Part:
    """Nodes that become one network.

    Attributes:
        nodes: in order; each leads to an output.
        inputs: nodes outside, which are not known, whose tensors these read, in the graph's order.
        outputs: those of them whose tensors are read outside, or by those made again; first the graph's, in its order.
        remade: what is read outside and no network can give: views with gaps in memory, or in another output's, and
            lists. PyTorch makes them of the outputs; the network may compute them as well, for what it reads itself.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    remade: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Partition:
    """A traced graph, divided.

    Attributes:
        known: values of the nodes that do not depend on the graph's inputs.
        parts: what becomes networks; each depends on those before it only.
        stages: of every node that is not taken, the number of parts that must be computed before it.
        outside: nodes that stay PyTorch's by name, and why; those made again too.
    """

    known: Known
    parts: tuple[Part, ...]
    stages: dict[fx.Node, int]
    outside: dict[str, str]


def divide(graph: fx.Graph, parameters: Known, *, views: bool = False) -> Partition:
    """Divide a graph so that as few networks as possible have all nodes that can be taken.

    Between two parts lies a node that is not taken, so that none can wait for itself.

    Args:
        graph: of aten operators without side effects, with fake tensors as ``meta["val"]``.
        parameters: values of placeholders and attributes that do not change.
        views: whether outputs that lie in one memory must go on to do so. What a network gives has memory of its own;
            so PyTorch makes their views.
    """
    known = evaluated(graph, parameters)
    reasons = _refusals(graph, known)
    shared = set(_shared_views(graph, known)) if views else set()
    order = _Order.of(graph)
    while True:
        stages = _stages(graph, known, reasons)
        found: dict[int, list[fx.Node]] = defaultdict(list)
        for node, stage in stages.items():
            if node not in reasons:
                found[stage].append(node)
        parts = {stage: _part(nodes, known, shared, order) for stage, nodes in sorted(found.items())}
        idle = [stage for stage, part in parts.items() if not any(operator(node) in PRODUCTS for node in part.nodes)]
        if not idle:
            break
        reasons |= {node: "no convolution or product is beside it" for stage in idle for node in found[stage]}
    places = {stage: place for place, stage in enumerate(parts)}
    waits = {node: sum(1 for other in places if other < stages[node]) for node in reasons}
    for node in (node for part in parts.values() for node in part.remade):
        reasons[node] = (
            "another output lies in the same memory" if node in shared else "its elements lie apart in memory"
        )
    outside = {node.name: f"{node.target}: {reason}" for node, reason in reasons.items() if node.target is not getitem}
    return Partition(known, tuple(parts.values()), waits, outside)


def evaluated(graph: fx.Graph, parameters: Known) -> dict[fx.Node, Any]:
    """What does not depend on a graph's inputs, computed by PyTorch."""
    known: dict[fx.Node, Any] = dict(parameters)
    with torch.no_grad():
        for node in graph.nodes:
            if node.op != "call_function" or not _repeatable(node):
                continue
            if all(given in known for given in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
    return known


def _repeatable(node: fx.Node) -> bool:
    """Whether an operator gives the same each time, and does nothing else."""
    target: Any = node.target
    if target is getitem:
        return True
    random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    return hasattr(target, "_schema") and not target._schema.is_mutable and not random


def _refusals(graph: fx.Graph, known: Known) -> dict[fx.Node, str]:
    """The nodes that are not taken, and why; of those that are not known."""
    tried = OnnxGraph(known, values=False)
    reasons: dict[fx.Node, str] = {}
    for node in _computed(graph, known):
        try:
            if node.target is getitem and node.args[0] in reasons:
                raise Refusal(reasons[node.args[0]])
            _check_tensors(node)
            take(tried, node)
        except Refusal as error:
            reasons[node] = str(error)
    return reasons


def _shared_views(graph: fx.Graph, known: Known) -> list[fx.Node]:
    """The views that lead to outputs which lie in one memory, an input's or a computed tensor's."""
    (output,) = graph.find_nodes(op="output")
    chains: dict[fx.Node, list[list[fx.Node]]] = defaultdict(list)
    for node in output.all_input_nodes:
        chain, source = list[fx.Node](), node
        while source not in known and (before := _viewed(source)) is not None:
            chain.append(source)
            source = before
        chains[source].append(chain)
    shared = [found for source, found in chains.items() if len(found) > 1 or source.op == "placeholder"]
    return [node for found in shared for chain in found for node in chain]


def _viewed(node: fx.Node) -> fx.Node | None:
    """What a node's tensor lies in the memory of; None where it has memory of its own."""
    if node.op != "call_function":
        return None
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if node.target is getitem:  # one of several views of a tensor, or one of several tensors
        return first if _viewed(first) is not None else None
    schema: Any = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(result.alias_info is not None for result in schema.returns)
    return first if is_view else None


def _computed(graph: fx.Graph, known: Known) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node not in known]


def _check_tensors(node: fx.Node) -> None:
    """Raise Refusal unless all that a node reads and gives is f32, on the CPU, and has elements."""
    found = value(node)
    several = node.op == "call_function" and isinstance(found, tuple | list)
    first = found[:1] if several and "split" not in str(node.target) else found
    tensors = [(node.name, one) for one in (first if several else [found])]
    for name, tensor in [*tensors, *((given.name, value(given)) for given in node.all_input_nodes)]:
        if isinstance(tensor, tuple | list | int | torch.SymInt):
            continue  # the items of several are looked at by themselves
        if not isinstance(tensor, Tensor):
            raise Refusal(f"{name} is a {type(tensor).__name__}; tensors are supported")
        if tensor.device.type != "cpu":
            raise Refusal(f"{name} is on {tensor.device}; the CPU is supported")
        if not tensor.numel():
            raise Refusal(f"{name} has no elements")
        is_index = tensor.dtype == torch.int64 and "index" in str(node.target)
        if tensor.dtype != torch.float32 and not is_index:
            raise Refusal(f"{name} is of {tensor.dtype}; torch.float32 is supported")


def _stages(graph: fx.Graph, known: Known, reasons: dict[fx.Node, str]) -> dict[fx.Node, int]:
    """How often what leads to a node leaves what is taken, on the way that does so most often.

    Taken nodes of one stage never wait for each other through one that is not taken.
    """
    stages: dict[fx.Node, int] = {}
    for node in _computed(graph, known):
        before = [(given, stages[given]) for given in node.all_input_nodes if given in stages]
        leaves = node in reasons
        stages[node] = max((stage + (leaves and given not in reasons) for given, stage in before), default=0)
    return stages


@dataclass(frozen=True)
class _Order:
    """Places of a graph's nodes, and among its outputs."""

    nodes: dict[fx.Node, int]
    outputs: dict[fx.Node, int]

    @classmethod
    def of(cls, graph: fx.Graph) -> _Order:
        (output,) = graph.find_nodes(op="output")
        numbered = (
            {node: place for place, node in enumerate(nodes)} for nodes in (graph.nodes, output.all_input_nodes)
        )
        return cls(*numbered)


def _part(taken: list[fx.Node], known: Known, shared: set[fx.Node], order: _Order) -> Part:
    """The network of what is taken in one stage; ``shared`` are views that must lie in the memory of what they view."""
    inside = set(taken)
    outputs, remade = set[fx.Node](), set[fx.Node]()
    for node in reversed(taken):
        if not any(user not in inside or user in remade for user in node.users):
            continue
        given = value(node)
        if isinstance(given, Tensor) and storage_order(given) is not None and node not in shared:
            outputs.add(node)
        else:
            remade.add(node)
    needed = set(outputs)
    for node in reversed(taken):
        if node in needed:
            needed.update(before for before in node.all_input_nodes if before in inside)
    nodes = [node for node in taken if node in needed]
    read = {given for node in nodes for given in node.all_input_nodes if given not in inside and given not in known}
    inputs = sorted((node for node in read if isinstance(value(node), Tensor)), key=order.nodes.__getitem__)
    given = [node for node in taken if node in outputs]
    given.sort(key=lambda node: order.outputs.get(node, len(order.outputs)))
    return Part(tuple(nodes), tuple(inputs), tuple(given), tuple(node for node in taken if node in remade))
