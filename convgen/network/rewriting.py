"""Changes of a graph after which it computes the same with less to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from ..errors import SpecError
from ..problem.spec import ConvSpec
from .graph import F32, Convolution, Graph, Node, Operator
from .integers import add_quantised, keep_integers, multiply_scales, quantise_product
from .steps import dequantise_apart, scale_in_steps


def rewrite(graph: Graph) -> None:
    """Products with constants become convolutions that take in what follows; what does nothing is gone."""
    _drop_copies(graph)
    for change in (_product, _bias):
        _each(graph, change)
    _add_before_transposing(graph)
    for change in (_residual, _activation, quantise_product):
        _each(graph, change)
    keep_integers(graph)
    _each(graph, add_quantised)
    dequantise_apart(graph)
    multiply_scales(graph)
    scale_in_steps(graph)
    _nest_concats(graph)
    graph.order()


def renamed(node: Node, names: Mapping[str, str]) -> Node:
    """A node that reads and writes other tensors."""
    inputs = tuple(names.get(name, name) for name in node.inputs)
    return dataclasses.replace(node, inputs=inputs, output=names.get(node.output, node.output))


# ---- what does nothing -------------------------------------------------------------------------


def _passes(graph: Graph, node: Node) -> bool:
    """Whether a node hands on its input as it is."""
    named = isinstance(node, Operator) and node.kind in ("identity", "reshape", "expand")
    return named and graph.shapes[node.inputs[0]] == graph.shapes[node.output]


def _drop_copies(graph: Graph) -> None:
    """Take out operators that hand on their input. Outputs keep their names, so that their source takes such a name."""
    names: dict[str, str] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        node = renamed(node, names)
        if _passes(graph, node) and node.output not in graph.outputs:
            names[node.output] = node.inputs[0]
        else:
            kept.append(node)
    computed = {node.output for node in kept}
    for node in [node for node in kept if _passes(graph, node)]:
        source, output = node.inputs[0], node.output
        if source in computed and source not in graph.outputs:
            kept = [renamed(other, {source: output}) for other in kept if other.output != output]
    graph.nodes = kept


# ---- convolutions and what follows them --------------------------------------------------------


def _each(graph: Graph, change: Callable[[Graph, Node], Convolution | None]) -> None:
    """Apply a change until there is nothing more to change: it answers with the convolution that takes a node's place,
    and the place of the convolution that the node read.
    """
    for node in list(graph.nodes):
        if (changed := change(graph, node)) is not None:
            graph.nodes = [changed if other is node else other for other in graph.nodes]
    graph.order()


def _before(graph: Graph, node: Node, name: str) -> Convolution | None:
    """The product that computes a tensor which ``node`` alone reads; its epilogue may still grow."""
    producer = graph.producers().get(name)
    alone = len(graph.users()[name]) == 1 and name not in graph.outputs
    free = isinstance(producer, Convolution) and producer.rows and producer.spec.activation == "none"
    return producer if free and alone and isinstance(producer, Convolution) else None


def _product(graph: Graph, node: Node) -> Convolution | None:
    """A matrix times a constant one is a 1x1 convolution whose pixels are rows."""
    if not isinstance(node, Operator) or node.kind != "product" or node.attributes["trans_a"]:
        return None
    source, constant = node.inputs
    weights = graph.constants.get(constant)
    if weights is None or weights.ndim != 2 or source in graph.constants or not graph.size(node.output):
        return None
    if not node.attributes["trans_b"]:
        weights = np.ascontiguousarray(weights.T)
    oc, ic = weights.shape
    rows = graph.size(source) // ic
    try:
        spec = ConvSpec(1, ic, oc, (rows,), (1,), bias=False, layout="nhwc" if rows > 1 else "nchw")
    except SpecError:  # larger than specs are
        return None
    parameters: dict[str, F32] = {"weights": weights.reshape(oc, ic, 1)}
    return Convolution(node.name, spec, parameters, (source,), node.output, rows=True)


def _vector(graph: Graph, name: str, channels: int) -> F32 | None:
    """A constant that has an element for each channel of rows, or one for all."""
    array = graph.constants.get(name)
    if array is None or array.size not in (1, channels) or (array.size > 1 and array.shape[-1] != channels):
        return None
    return np.broadcast_to(array.reshape(-1), (channels,)).astype(np.float32)


def _bias(graph: Graph, node: Node) -> Convolution | None:
    """A constant that is added to a product's rows."""
    if not isinstance(node, Operator) or node.kind != "add" or len(node.inputs) != 2:
        return None
    for source, other in (node.inputs, node.inputs[::-1]):
        made = _before(graph, node, source)
        vector = _vector(graph, other, made.spec.oc) if made and not made.spec.is_quantised else None
        if made is None or vector is None or made.spec.residual or graph.shapes[source] != graph.shapes[node.output]:
            continue
        bias = vector + made.parameters["bias"] if made.spec.bias else vector
        parameters = {"weights": made.parameters["weights"], "bias": bias}
        spec = made.spec.with_(bias=True)
        return dataclasses.replace(made, spec=spec, parameters=parameters, output=node.output)
    return None


def _add_before_transposing(graph: Graph) -> None:
    """Where a product is transposed and then added to something, add to it what is transposed the other way: the
    product takes in the addition, and the transpositions may be nothing but other names for the same memory.
    """
    for node in list(graph.nodes):
        if not isinstance(node, Operator) or node.kind != "add" or len(node.inputs) != 2:
            continue
        for turned, other in (node.inputs, node.inputs[::-1]):
            transpose = graph.producers().get(turned)
            if not isinstance(transpose, Operator) or transpose.kind != "transpose" or other in graph.constants:
                continue
            alone = len(graph.users()[turned]) == 1 and turned not in graph.outputs
            (source,) = transpose.inputs
            same = graph.shapes[other] == graph.shapes[node.output]
            if not alone or not same or _before(graph, transpose, source) is None:
                continue
            perm = transpose.attributes["perm"]
            back = tuple(perm.index(axis) for axis in range(len(perm)))
            names = graph.fresh(f"{node.output}/turned"), graph.fresh(f"{node.output}/sum")
            graph.shapes |= dict.fromkeys(names, graph.shapes[source])
            added = (
                Operator(node.name, "transpose", (other,), names[0], {"perm": back}),
                Operator(node.name, "add", (source, names[0]), names[1]),
                Operator(node.name, "transpose", (names[1],), node.output, {"perm": perm}),
            )
            graph.nodes = [one for one in graph.nodes if one is not node and one is not transpose] + list(added)
            graph.order()
            break


def _residual(graph: Graph, node: Node) -> Convolution | None:
    """A tensor that is added to a product."""
    if not isinstance(node, Operator) or node.kind != "add" or len(node.inputs) != 2:
        return None
    for source, other in (node.inputs, node.inputs[::-1]):
        made = _before(graph, node, source)
        same = graph.shapes[source] == graph.shapes[other] == graph.shapes[node.output] and source != other
        if made is None or made.spec.is_quantised or not same or made.spec.residual or other in graph.constants:
            continue
        spec, inputs = made.spec.with_(residual=True), (*made.inputs, other)
        return dataclasses.replace(made, spec=spec, inputs=inputs, output=node.output)
    return None


def _activation(graph: Graph, node: Node) -> Convolution | None:
    if not isinstance(node, Operator) or node.kind != "activate":
        return None
    made = _before(graph, node, node.inputs[0])
    if made is None:
        return None
    try:
        spec = made.spec.with_(activation=node.attributes["activation"])
    except SpecError:  # of integers few are taken
        return None
    return dataclasses.replace(made, spec=spec, output=node.output)


# ---- concatenations ----------------------------------------------------------------------------


def _nest_concats(graph: Graph) -> None:
    """A concatenation that begins with all of another one reads that instead of its parts: the parts can then be
    written where both want them. (Networks of dense blocks concatenate all that there is, again and again.)
    """
    known: dict[tuple[int, tuple[str, ...]], str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, Operator) and node.kind == "concat":
            axis, inputs = node.attributes["axis"], node.inputs
            for length in range(len(inputs) - 1, 1, -1):
                if (start := known.get((axis, inputs[:length]))) is not None:
                    node = dataclasses.replace(node, inputs=(start, *inputs[length:]))
                    break
            known[axis, inputs] = node.output
        nodes.append(node)
    graph.nodes = nodes
