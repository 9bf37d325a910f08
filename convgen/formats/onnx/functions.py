"""Graphs without calls: a model's own functions in place of what calls them, and a branch in place of its If."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from itertools import chain, repeat

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, helper

from ...errors import SpecError
from .graph import MAX_NODES, bodies

MAX_CALLS = 100  # nested calls


def inline(model: ModelProto, where: str) -> None:
    """Replace the calls of the model's own functions by their nodes, whose names get the call's in front.

    Raises:
        SpecError: functions that call themselves, or too many nodes.
    """
    if not model.functions:
        return
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    _Inliner(functions, where).expand(model.graph, ())
    known = {opset.domain for opset in model.opset_import}
    for function in functions.values():
        for opset in function.opset_import:
            if opset.domain not in known:
                known.add(opset.domain)
                model.opset_import.append(opset)
    del model.functions[:]


class _Inliner:
    def __init__(self, functions: dict[tuple[str, str, str], FunctionProto], where: str) -> None:
        self.functions, self.where = functions, where
        self.calls = self.nodes = 0

    def expand(self, graph: GraphProto, callers: tuple[str, ...]) -> None:
        """Inline what a graph calls, which stands inside the given functions."""
        nodes = [inner for node in graph.node for inner in self._expanded(node, callers)]
        if any(self._called(node) for node in graph.node):
            del graph.node[:]
            graph.node.extend(nodes)

    def _called(self, node: NodeProto) -> FunctionProto | None:
        return self.functions.get((node.domain, node.op_type, node.overload))

    def _expanded(self, node: NodeProto, callers: tuple[str, ...]) -> Iterator[NodeProto]:
        """The node, or those of the function it calls."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise SpecError("functions", f"at most {MAX_NODES} nodes when inlined", "more", self.where)
        function = self._called(node)
        if function is None:
            for _, body in bodies(node):
                self.expand(body, callers)
            yield node
            return
        name = f"{function.domain}.{function.name}"
        if name in callers or len(callers) > MAX_CALLS:
            expected = f"none that calls itself, and at most {MAX_CALLS} calls inside each other"
            raise SpecError("functions", expected, repr(name), self.where)
        self.calls += 1
        path, mark = node.name or node.output[0] or function.name, f"{function.name}#{self.calls}"
        values = dict(zip(function.input, chain(node.input, repeat("")), strict=False))
        values |= {inner: given for inner, given in zip(function.output, node.output, strict=False) if given}
        attributes = {a.name: a for a in [*function.attribute_proto, *node.attribute]}
        for inner in function.node:
            copy = _renamed(inner, lambda value: values.get(value, f"{mark}/{value}"), path)
            _bind(copy, attributes)
            yield from self._expanded(copy, (*callers, name))


def _renamed(node: NodeProto, name: Callable[[str], str], path: str) -> NodeProto:
    """A copy whose values have the names that ``name`` gives them, and whose own has the path in front."""
    copy = NodeProto()
    copy.CopyFrom(node)
    _rename(copy, name)
    copy.name = f"{path}/{copy.name}"
    return copy


def _rename(node: NodeProto, name: Callable[[str], str]) -> None:
    node.name = node.name or next(filter(None, node.output), "")
    node.input[:] = [name(value) if value else "" for value in node.input]
    node.output[:] = [name(value) if value else "" for value in node.output]
    for _, body in bodies(node):
        for value in [*body.input, *body.output, *body.value_info, *body.initializer]:
            value.name = name(value.name)
        for sparse in body.sparse_initializer:
            sparse.values.name = name(sparse.values.name)
        for inner in body.node:
            _rename(inner, name)


def _bind(node: NodeProto, given: Mapping[str, AttributeProto]) -> None:
    """Attributes that refer to the function's own, with the call's values; unset where it has none."""
    kept = []
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name not in given:
                continue
            bound = AttributeProto()
            bound.CopyFrom(given[attribute.ref_attr_name])
            bound.name = attribute.name
            attribute = bound
        kept.append(attribute)
    del node.attribute[:]
    node.attribute.extend(kept)
    for _, body in bodies(node):
        for inner in body.node:
            _bind(inner, given)


def branch(node: NodeProto, body: GraphProto, path: str, taken: Set[str]) -> tuple[list[NodeProto], dict[str, str]]:
    """The nodes of an If's branch that take its place, and what the branch's own values are called among them.

    Args:
        path: in front of the names of nodes and values.
        taken: names that values have already.
    """
    computed = {name for inner in body.node for name in inner.output if name}
    values: dict[str, str] = {}
    copied = []
    for inner, outer in zip(body.output, node.output, strict=False):
        if outer and inner.name in computed and inner.name not in values:
            values[inner.name] = outer
        elif outer:
            copied.append((inner.name, outer))
    for name in computed.union(tensor.name for tensor in body.initializer) - values.keys():
        values[name] = f"{path}/{name}"
        while values[name] in taken:
            values[name] += "'"
    nodes = [_renamed(inner, lambda value: values.get(value, value), path) for inner in body.node]
    nodes += [helper.make_node("Identity", [values.get(inner, inner)], [outer], outer) for inner, outer in copied]
    return nodes, values
