"""A network's inputs and outputs as its model stores them, where that is not how they are computed with.

Between nodes f16 and bf16 are f32, and truth values are 0 and 1 of f32. Casts at the ends make one of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .graph import Graph, Operator


def store_ends(graph: Graph, types: Mapping[str, str]) -> None:
    """Give a graph's inputs and outputs the types that the model has.

    Args:
        graph: with nodes that compute its outputs, each by itself; the order of its nodes is kept.
        types: ``f16``, ``bf16`` or ``bool`` of tensors that are f32 in the graph; others than inputs and outputs are
            left alone.
    """
    for name in graph.inputs:
        if (dtype := types.get(name)) is not None:
            _take(graph, name, dtype)
    for position, name in enumerate(graph.outputs):
        if (dtype := types.get(graph.names[position])) is not None:
            stored = graph.fresh(f"{name}/{dtype}")
            graph.nodes.append(Operator(graph.names[position], "cast", (name,), stored, {"dtype": dtype}))
            graph.shapes[stored], graph.dtypes[stored] = graph.shapes[name], dtype
            graph.outputs[position] = stored


def _take(graph: Graph, name: str, dtype: str) -> None:
    """What is given becomes f32; bytes that are not 0 are true."""
    read = graph.fresh(f"{name}/f32")
    graph.shapes[read], graph.dtypes[name] = graph.shapes[name], dtype
    users = [replace(n, inputs=tuple(read if given == name else given for given in n.inputs)) for n in graph.nodes]
    if dtype != "bool":
        graph.nodes = [Operator(name, "cast", (name,), read), *users]
        return
    whole, zero = graph.fresh(f"{name}/bytes"), graph.fresh(f"{name}/zero")
    graph.shapes |= {whole: graph.shapes[name], zero: ()}
    graph.constants[zero] = np.zeros((), np.float32)
    graph.nodes = [Operator(name, "cast", (name,), whole), Operator(name, "not_equal", (whole, zero), read), *users]
