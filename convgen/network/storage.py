"""Tensors stored as bf16: half the bytes of f32, and what processors multiply fastest.

The network's own inputs and outputs stay f32, and what is a part of them, or of a constant, in memory. Operators
compute in f32 and round what they store.
"""

from __future__ import annotations

from dataclasses import replace

from ..problem.dtypes import narrow
from .expressions import KINDS
from .graph import Convolution, Graph, Node, Operator

NARROW = "bf16"


def store_narrow(graph: Graph) -> None:
    """Store what lies between the nodes of an f32 network as bf16, and let convolutions multiply that."""
    kept = _kept(graph)
    outputs = [node.output for node in graph.nodes if graph.dtype(node.output) == "f32"]
    graph.dtypes |= dict.fromkeys((name for name in outputs if name not in kept), NARROW)
    nodes: list[Node] = []
    made: dict[tuple[str, str], str] = {}

    def converted(name: str, dtype: str) -> str:
        """A tensor as a type: itself, or a copy that is made once."""
        if graph.dtype(name) == dtype:
            return name
        if (name, dtype) not in made:
            copied = made[name, dtype] = f"{name}@{dtype}"
            graph.shapes[copied], graph.dtypes[copied] = graph.shapes[name], dtype
            nodes.append(Operator(name, "identity", (name,), copied))
        return made[name, dtype]

    for node in graph.nodes:
        if isinstance(node, Convolution) and node.spec.dtype == "f32":
            dtype = graph.dtype(node.output)
            inputs = tuple(converted(name, dtype) for name in node.inputs)
            node = replace(node, spec=node.spec.with_(accuracy="bf16"), inputs=inputs)
            if dtype == NARROW:
                spec = node.spec.with_(dtype=NARROW, src_dtype="", weights_dtype="", dst_dtype="")
                parameters = {name: narrow(array, NARROW) for name, array in node.parameters.items()}
                node = replace(node, spec=spec, parameters=parameters)
        nodes.append(node)
    graph.nodes = nodes


def _kept(graph: Graph) -> set[str]:
    """Tensors that stay as they are: inputs, outputs and constants, and what only moves to or from these."""
    kept = {*graph.inputs, *graph.outputs, *graph.constants}
    moves = [
        {node.output, *(name for name in node.inputs if name not in graph.constants)}
        for node in graph.nodes
        if isinstance(node, Operator) and (KINDS[node.kind].moves or node.kind == "identity")
    ]
    grown = True
    while grown:
        grown = False
        for names in moves:
            if names & kept and not names <= kept:
                kept |= names
                grown = True
    return kept
