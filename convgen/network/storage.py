"""Tensors stored as bf16 or f16: half the bytes of f32, and what processors multiply fastest.

The network's own inputs and outputs stay f32, and what is a part of them, or of a constant, in memory. Operators
compute in f32 and round what they store.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..errors import SpecError
from ..problem.dtypes import LARGEST, LONG_RANGES, narrow
from .graph import Convolution, Graph, Node, Operator
from .kinds import KINDS

#: Accuracies of networks that store so, which have the types' names, and the classes of their convolutions: of those
#: that read f32 and of those that read what is stored. TF32 has the digits of f16; products of f16 are exact in f32.
NARROW = {"bf16": ("bf16", "bf16"), "f16": ("tf32", "standard")}


def class_of(accuracy: str) -> str:
    """The accuracy class of the convolutions of a network, of several the one that promises least."""
    return NARROW[accuracy][0] if accuracy in NARROW else accuracy


def store_narrow(graph: Graph, stored: str) -> None:
    """Store what lies between the nodes of an f32 network as bf16 or f16, and let convolutions multiply that.

    Raises:
        SpecError: of weights that the type cannot hold.
    """
    kept = _kept(graph)
    outputs = [node.output for node in graph.nodes if graph.dtype(node.output) == "f32"]
    graph.dtypes |= dict.fromkeys((name for name in outputs if name not in kept), stored)
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
            node = replace(node, spec=node.spec.with_(accuracy=class_of(stored)), inputs=inputs)
            if dtype == stored:
                stored_as = {"dtype": stored, "src_dtype": "", "weights_dtype": "", "dst_dtype": ""}
                spec = node.spec.with_(accuracy=NARROW[stored][1], **stored_as)
                parameters = {name: _narrowed(node, name, array, stored) for name, array in node.parameters.items()}
                node = replace(node, spec=spec, parameters=parameters)
        nodes.append(node)
    graph.nodes = nodes


def _narrowed(node: Convolution, name: str, array: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.generic]:
    made = narrow(array, dtype)
    if (np.isfinite(array) & ~np.isfinite(made)).any():
        largest = f"{np.abs(array).max():.6g} among {name} of node {node.name!r}"
        raise SpecError("accuracy", f"weights of at most {LARGEST[dtype]:.6g} for {dtype}", largest)
    return made


def _whole_numbers(node: Operator) -> tuple[str, ...]:
    """Tensors of f32 that are whole numbers: integers of 16 bits, and what becomes integers, such as places."""
    dtype = node.attributes.get("dtype")
    if node.kind == "quantise" and dtype in LONG_RANGES:
        return (node.output,)
    return node.inputs[:1] if node.kind == "truncate" or (node.kind == "cast" and dtype == "i64") else ()


def _kept(graph: Graph) -> set[str]:
    """Tensors that stay as they are: inputs, outputs and constants, whole numbers that are larger than the digits of a
    narrow type tell, and what only moves to or from these.
    """
    operators = [node for node in graph.nodes if isinstance(node, Operator)]
    kept = {*graph.inputs, *graph.outputs, *graph.constants}
    kept |= {name for node in operators for name in _whole_numbers(node)}
    moves = [
        {node.output, *(name for name in node.inputs if name not in graph.constants)}
        for node in operators
        if KINDS[node.kind].moves or node.kind == "identity"
    ]
    grown = True
    while grown:
        grown = False
        for names in moves:
            if names & kept and not names <= kept:
                kept |= names
                grown = True
        for node in operators:  # the largest of elements that are kept is looked for among them
            is_one = node.kind == "reduce" and node.attributes["mode"] in ("max", "min")
            if is_one and node.inputs[0] in kept and node.output not in kept:
                kept.add(node.output)
                grown = True
    return kept
