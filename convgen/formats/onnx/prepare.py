"""A model made ready for questions: functions inlined, nodes in order, sizes given, shapes and constants known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnx import GraphProto, ModelProto, NodeProto, TensorShapeProto, ValueInfoProto

from ...errors import SpecError
from .constants import ROOTS
from .file import ModelFile
from .functions import inline
from .graph import Scope, bodies, graphs_of, names_read, printable
from .inference import infer, least_inputs


def prepare(file: ModelFile, dims: Mapping[str, int]) -> tuple[list[Scope], list[str]]:
    """The model's graph and those inside it, functions inlined and shapes inferred; and symbols without a size.

    What is known of the graph's values is also written into it, in place of what the file stores about them.

    Raises:
        SpecError: a graph that is not one: functions that call themselves, values computed twice or never, or of
            themselves; an unknown symbol in ``dims``.
    """
    model, where = file.proto, file.where
    _check_text(model, where)
    inline(model, where)
    opset = max((o.version for o in model.opset_import if o.domain in ROOTS), default=1)
    for graph in graphs_of(model.graph):
        _sort(graph, where)
    _check_graph(model.graph, (), opset, where)
    left = _set_dims(model.graph, dict(dims), where)
    scope = infer(model.graph, file, opset)
    _write_types(scope)
    return list(_with_inner(scope)), left


def _with_inner(scope: Scope) -> Iterator[Scope]:
    yield scope
    for inner in scope.inner:
        yield from _with_inner(inner)


def _write_types(scope: Scope) -> None:
    graph, ends = scope.graph, scope.inputs | scope.outputs
    del graph.value_info[:]
    for node in scope.nodes:
        for name in node.output:
            if name and name not in ends and scope.type(name).WhichOneof("value"):
                graph.value_info.append(ValueInfoProto(name=name, type=scope.type(name)))
    for output in graph.output:
        if (kind := scope.type(output.name)).WhichOneof("value"):
            output.type.CopyFrom(kind)


def _check_text(model: ModelProto, where: str) -> None:
    """Protobuf returns bytes for text that is not UTF-8."""
    for node in [node for part in (model.graph, *model.functions) for graph in graphs_of(part) for node in graph.node]:
        names = (node.op_type, node.domain, node.name, *node.input, *node.output, *(a.name for a in node.attribute))
        if not all(isinstance(name, str) for name in names):
            raise SpecError("file", "an ONNX model", "a name that is not UTF-8", where)
        if not node.op_type.isidentifier() or not node.output:
            raise SpecError("file", "an ONNX model", f"a node {node.op_type!r} with {len(node.output)} outputs", where)


def _sort(graph: GraphProto, where: str) -> None:
    """Put the nodes in an order in which values are computed before they are used, which files need not have.

    Raises:
        SpecError: a value that depends on itself.
    """
    nodes = list(graph.node)
    known = {value.name for value in [*graph.input, *graph.initializer]}
    producers = {name: index for index, node in enumerate(nodes) for name in node.output if name and name not in known}
    needs = [sorted({producers[name] for name in names_read(node) if name in producers}) for node in nodes]
    if all(all(need < index for need in wanted) for index, wanted in enumerate(needs)):
        return
    order: dict[int, None] = {}
    for first in range(len(nodes)):
        waiting, inside = [(first, False)], set[int]()
        while waiting:
            index, ready = waiting.pop()
            if ready:
                order[index] = None
            elif index not in order:
                if index in inside:
                    value = next(filter(None, nodes[index].output), "")
                    raise SpecError(f"value {value!r}", "one that does not depend on itself", "one that does", where)
                inside.add(index)
                waiting.append((index, True))
                waiting += [(need, False) for need in reversed(needs[index]) if need not in order]
    copies = [NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
    del graph.node[:]
    graph.node.extend(copies)


def _check_graph(graph: GraphProto, outer: tuple[set[str], ...], opset: int, where: str) -> None:
    """Every operand is there, and every value is computed once.

    ``outer`` holds the values of each surrounding graph, which a graph inside may use.
    """
    stored = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    known = stored | {value.name for value in graph.input}
    around = (known, *outer)
    for node in graph.node:
        if len(node.input) < (least := least_inputs(node, opset)):
            found = f"{len(node.input)} of {(node.name or node.output[0])!r}"
            raise SpecError(f"inputs of {node.op_type}", f"at least {least}", found, where)
        if any(attribute.ref_attr_name for attribute in node.attribute):
            raise SpecError("attribute", "a value outside of functions", "a reference", where)
        for name in filter(None, node.input):
            if not any(name in values for values in around):
                found = f"none for {node.op_type} {(node.name or node.output[0])!r}"
                raise SpecError(f"value {name!r}", "an input, a constant or a node that computes it", found, where)
        for _, body in bodies(node):
            _check_graph(body, around, opset, where)
        for name in filter(None, node.output):
            if name in known:
                raise SpecError(f"value {name!r}", "one node that computes it", "another one", where)
            known.add(name)


def _set_dims(graph: GraphProto, dims: dict[str, int], where: str) -> list[str]:
    """Write the given sizes into the graph; returns the input dimensions left without one."""
    stored = {tensor.name for tensor in graph.initializer}
    known: dict[str, None] = {}
    left: dict[str, None] = {}
    given = _by_symbol(graph, dims, where)
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if value.name in stored or (dim.HasField("dim_value") and dim.dim_value >= 0):
                continue  # a negative size is an unknown one of old exporters
            symbol, place = _symbol(dim), f"{value.name}[{axis}]"
            known |= dict.fromkeys((symbol, place) if symbol and place in dims else (symbol or place,))
            symbol = symbol or place
            if symbol in given:
                dim.dim_value = given[symbol]
            else:
                left[symbol] = None
                dim.dim_param = symbol
    for name in dims:
        if name not in known:
            names = f"names among {', '.join(map(printable, known))}" if known else "none, as the model has all sizes"
            raise SpecError("dims", names, repr(name), where)
    for inside in graphs_of(graph):
        for value in [*inside.input, *inside.value_info, *inside.output]:
            for dim in value.type.tensor_type.shape.dim:
                if (symbol := _symbol(dim)) in given:
                    dim.dim_value = given[symbol]
    return list(left)


def _symbol(dim: TensorShapeProto.Dimension) -> str:
    """A dimension's name; empty where it has none, or the one of exporters for whatever is unknown."""
    return "" if dim.dim_param == "?" else str(dim.dim_param)


def _by_symbol(graph: GraphProto, dims: Mapping[str, int], where: str) -> dict[str, int]:
    """The given sizes by the dimensions' names, of which inputs' axes, ``x[2]``, are others.

    Raises:
        SpecError: two sizes of one name.
    """
    found = dict(dims)
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if (place := f"{value.name}[{axis}]") not in dims or not (symbol := _symbol(dim)):
                continue
            if found.setdefault(symbol, dims[place]) != dims[place]:
                raise SpecError("dims", f"one size of {printable(symbol)}", f"{found[symbol]} and {dims[place]}", where)
    return found
