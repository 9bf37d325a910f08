"""Tensors that are parts of others in memory: nothing is copied that can be read, or written, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..problem.dtypes import BYTES
from ..problem.layout import BLOCKS, PLAIN
from .graph import Graph, Node, Operator
from .kinds import KINDS
from .layouts import Laid, keeps_order, lies_apart, memory_order


@dataclass(frozen=True)
class View:
    """A tensor that is a part of another: where it begins there, in bytes."""

    of: str
    offset: int = 0


class Views:
    """Finds the views of a graph, and takes out the operators that they make superfluous.

    Args:
        alignment: bytes at multiples of which a view begins within the whole.
    """

    def __init__(self, laid: Laid, alignment: int = 1) -> None:
        self._alignment = alignment
        self.graph, self.layouts = laid.graph, laid.layouts
        self.views: dict[str, View] = {}
        self._computed = {node.output for node in self.graph.nodes}
        nodes: list[Node] = []
        for node in self.graph.nodes:
            kept = [node] if not isinstance(node, Operator) else self._kept(node)
            nodes += kept
        self.graph.nodes = nodes

    def root(self, name: str) -> View:
        """The whole that a tensor is a part of, and where it begins there; itself where it is none."""
        offset = 0
        while name in self.views:
            offset += self.views[name].offset
            name = self.views[name].of
        return View(name, offset)

    @property
    def bound(self) -> set[str]:
        """Tensors that are views, or of which there are some: those that lie in memory whatever happens."""
        return {*self.views, *(view.of for view in self.views.values())}

    def _kept(self, node: Operator) -> list[Node]:
        """What is left to do of an operator."""
        source = node.inputs[0]
        if node.kind in ("reshape", "transpose") and keeps_order(self.graph, node, self.layouts):
            return [] if self._share(source, node.output) else [node]
        if node.kind == "slice" and self._in_place(node) and self._may_be_part(source, node.output):
            self.views[node.output] = View(source, self._begin(node))
            return []
        if node.kind == "concat" and self._in_place(node):
            return self._placed(node)
        return [node]

    def _may_be_part(self, whole: str, part: str) -> bool:
        """Whether a tensor may lie within another: outputs lie by themselves, constants where they are."""
        return part not in self.graph.outputs and whole not in self.graph.constants

    def _free(self, name: str) -> bool:
        """Whether it may be told where to lie."""
        return name in self._computed and name not in self.views and name not in self.graph.outputs

    def _share(self, source: str, output: str) -> bool:
        """Let two tensors be the same memory."""
        if self._may_be_part(source, output):
            self.views[output] = View(source)
        elif self._free(source):
            self.views[source] = View(output)
        else:
            return False
        return True

    def _in_place(self, node: Operator) -> bool:
        layout = self.layouts[node.output]
        parts = node.inputs if node.kind == "concat" else (node.inputs[0],)
        if any(self.layouts[name] != layout for name in parts if name not in self.graph.constants):
            return False
        if node.kind == "slice" and layout not in PLAIN and node.attributes["starts"][1] % BLOCKS[layout]:
            return False
        begins = [self._begin(node)] if node.kind == "slice" else map(self.graph.bytes, node.inputs[:-1])
        if any(begin % self._alignment for begin in begins):
            return False
        return lies_apart(self.graph, node, layout)

    def _begin(self, node: Operator) -> int:
        whole = self.graph.shapes[node.inputs[0]]
        starts: tuple[int, ...] = node.attributes["starts"]
        order = memory_order(len(whole), self.layouts[node.output])
        axis = next((place for place, at in enumerate(order) if starts[at]), 0)
        inner = math.prod(whole[at] for at in order[axis + 1 :])
        return BYTES[self.graph.dtype(node.output)] * starts[order[axis]] * inner

    def _placed(self, node: Operator) -> list[Node]:
        """Parts that are written where they belong, and copies of those that lie elsewhere."""
        copies, offset = list[Node](), 0
        for number, name in enumerate(node.inputs):
            part = name
            if not self._free(name) or self.root(node.output).of == name:
                part = self.graph.fresh(f"{node.output}/part{number}")
                copies.append(Operator(node.name, "identity", (name,), part))
                self.graph.shapes[part], self.layouts[part] = self.graph.shapes[name], self.layouts[node.output]
                self.graph.dtypes[part] = self.graph.dtype(name)
                self._computed.add(part)
            self.views[part] = View(node.output, offset)
            offset += self.graph.bytes(name)
        return copies


# ---- operators in one pass ----------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Operators that are computed in one pass, the last of which gives the output.

    Attributes:
        operators: in order.
        inputs: tensors that are read, each once.
    """

    operators: tuple[Operator, ...]
    inputs: tuple[str, ...]

    @property
    def output(self) -> str:
        return self.operators[-1].output

    @property
    def name(self) -> str:
        return self.operators[-1].name


#: Most operators of one pass, and tensors that they read: expressions grow with them.
MOST, MOST_INPUTS = 24, 64


def fuse(graph: Graph, views: Views) -> list[Node | Group]:
    """The graph's nodes in order, with chains of operators taken together."""
    users, producers, bound = graph.users(), graph.producers(), views.bound
    position = {id(node): number for number, node in enumerate(graph.nodes)}
    absorbed: set[int] = set()
    steps: list[Node | Group] = []

    def takes(consumer: Operator, name: str, group: list[Operator]) -> bool:
        """Whether the operator that computes an operand of ``consumer`` may be computed within it."""
        producer = producers.get(name)
        if not isinstance(producer, Operator) or len(group) >= MOST or name in bound or name in graph.outputs:
            return False
        if len({given for operator in (*group, producer) for given in operator.inputs}) > MOST_INPUTS:
            return False
        kind, made = KINDS[producer.kind], KINDS[consumer.kind]
        if not (kind.elementwise or kind.moves) or any(all(user is not one for one in group) for user in users[name]):
            return False
        if made.elementwise:
            return graph.shapes[name] == graph.shapes[consumer.output]
        return made.moves or consumer.kind == "reduce"

    for node in reversed(graph.nodes):
        if id(node) in absorbed:
            continue
        if not isinstance(node, Operator):
            steps.append(node)
            continue
        group = [node]
        for member in group:  # which grows meanwhile
            for name in member.inputs:
                if takes(member, name, group) and all(producers[name] is not one for one in group):
                    found = producers[name]
                    assert isinstance(found, Operator)
                    group.append(found)
                    absorbed.add(id(found))
        group.sort(key=lambda operator: position[id(operator)])
        steps.append(Group(tuple(group), _inputs(group, graph)))
    return steps[::-1]


def _inputs(group: Sequence[Operator], graph: Graph) -> tuple[str, ...]:
    inner = {operator.output for operator in group}
    read = dict.fromkeys(
        name
        for operator in group
        for name in operator.inputs
        if name not in inner and not is_number(graph, operator, name)
    )
    return tuple(read)


def is_number(graph: Graph, operator: Operator, name: str) -> bool:
    """Whether an operand is a constant of one element, which is written into the code: for operators that ask of an
    operand nothing but elements. Not a zero that is a factor: TVM takes a product with one for zero, whatever the other
    is, and refuses a quotient by one.
    """
    if not (KINDS[operator.kind].elementwise and name in graph.constants and graph.constants[name].size == 1):
        return False
    return operator.kind not in _FACTORS or bool(graph.constants[name].reshape(()) != 0)


#: Operators whose operands may be factors or divisors.
_FACTORS = frozenset({"mul", "div", "prelu", "scale_shift"})
