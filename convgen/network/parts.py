"""A graph of which something is not taken, cut into networks: the largest ones that can each run as one node.

A part is connected, and convex: no path leaves it and comes back, else it would have to wait for itself. Parts are as
large as that lets them be: no two that touch could be one.
"""

from __future__ import annotations

import graphlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..problem.dtypes import LONG_RANGES
from .ends import store_ends
from .graph import Convolution, Graph, Node
from .reading import Outside

#: What is worth while to compute in a part of its own: all else costs little more than a node does.
_HEAVY = ("product",)


@dataclass
class Parts:
    """What :func:`split` makes of a graph.

    Attributes:
        networks: each a graph of its own.
        outside: operators that would have been taken, but stand where no part is worth while: by name, with the reason.
    """

    networks: list[Graph]
    outside: dict[str, str]


def split(graph: Graph, outside: Sequence[Outside], name: str, types: Mapping[str, str] | None = None) -> Parts:
    """The parts of a graph, each with the tensors between it and the rest as inputs and outputs.

    Args:
        graph: the nodes that are taken; its inputs and outputs are the model's.
        outside: those that are not.
        name: of the model; parts are called ``<name>_part0`` ….
        types: of tensors that are stored otherwise outside of parts; see :func:`~convgen.network.ends.store_ends`.
    """
    flow = _Flow(
        [(n.inputs, (n.output,)) for n in graph.nodes] + [(o.inputs, o.outputs) for o in outside], len(graph.nodes)
    )
    parts = Parts([], {})
    read_elsewhere = {*graph.outputs, *(name for node in outside for name in node.inputs)}
    for members in flow.groups():
        inside = [graph.nodes[number] for number in members]
        made = _part(graph, inside, read_elsewhere, f"{name}_part{len(parts.networks)}")
        if reason := _objection(made, types or {}):
            parts.outside |= dict.fromkeys((node.name for node in inside), reason)
        else:
            store_ends(made, types or {})
            made.order()
            parts.networks.append(made)
    return parts


def _objection(part: Graph, types: Mapping[str, str]) -> str:
    """Why a part is not worth while, or cannot be; empty where it is."""
    if not any(isinstance(node, Convolution) or node.kind in _HEAVY for node in part.nodes):
        return "no convolution or product is among its neighbours that are taken"
    if empty := [name for name in part.inputs if 0 in part.shapes[name]]:
        return f"{empty[0]!r} has no elements"
    if wide := [name for name in (*part.inputs, *part.outputs) if types.get(name) in LONG_RANGES]:
        return f"{wide[0]!r} is of {types[wide[0]]}, of which no part begins or ends"
    return ""


def _part(graph: Graph, inside: Sequence[Node], read_elsewhere: set[str], name: str) -> Graph:
    users = graph.users()
    made = {node.output for node in inside}
    own = {id(node) for node in inside}
    read = dict.fromkeys(tensor for node in inside for tensor in node.inputs)
    inputs = [tensor for tensor in read if tensor not in made and tensor not in graph.constants]
    outputs = [
        node.output
        for node in inside
        if node.output in read_elsewhere or any(id(user) not in own for user in users[node.output])
    ]
    constants = {tensor: graph.constants[tensor] for tensor in read if tensor in graph.constants}
    shapes = {tensor: graph.shapes[tensor] for tensor in (*read, *made)}
    dtypes = {tensor: graph.dtypes[tensor] for tensor in shapes if tensor in graph.dtypes}
    part = Graph(name, list(inside), shapes, constants, inputs, outputs, list(outputs), dtypes, folded=graph.folded)
    part.order()
    return part


class _Flow:
    """Which node reads what which node computes; the first ``taken`` nodes are those that are taken."""

    def __init__(self, nodes: Sequence[tuple[Sequence[str], Sequence[str]]], taken: int) -> None:
        self.taken = taken
        makers = {value: number for number, (_, outputs) in enumerate(nodes) for value in outputs}
        self.before = {
            number: {makers[value] for value in inputs if value in makers} for number, (inputs, _) in enumerate(nodes)
        }
        self.order = list(graphlib.TopologicalSorter(self.before).static_order())

    def groups(self) -> list[list[int]]:
        """The taken nodes of each part, parts and nodes in an order in which they can run."""
        group = self._levels()
        while (pair := self._mergeable(group)) is not None:
            kept, gone = pair
            group = {number: kept if of == gone else of for number, of in group.items()}
        members: dict[int, list[int]] = defaultdict(list)
        for number in self.order:
            if number < self.taken:
                members[group[number]].append(number)
        return list(members.values())

    def _levels(self) -> dict[int, int]:
        """A first cut: connected nodes between which and the inputs as many changes between taken and not taken lie.
        A path that leaves such a group has one more change where it could come back. A group is called by one of its
        nodes; a node that is not taken is a group of its own.
        """
        level: dict[int, int] = {}
        leader = {number: number for number in self.order}

        def find(number: int) -> int:
            while leader[number] != number:
                leader[number] = number = leader[leader[number]]
            return number

        for number in self.order:
            mine = number < self.taken
            steps = [level[other] + (mine != (other < self.taken)) for other in self.before[number]]
            level[number] = max(steps, default=0)
            for other in self.before[number] if mine else ():
                if other < self.taken and level[other] == level[number]:
                    leader[find(other)] = find(number)
        return {number: find(number) for number in self.order}

    def _mergeable(self, group: Mapping[int, int]) -> tuple[int, int] | None:
        """Two parts that touch and could be one: no path between them goes through something else."""
        after: dict[int, set[int]] = defaultdict(set)
        for number, others in self.before.items():
            for other in others:
                if group[number] != group[other]:
                    after[group[other]].add(group[number])
        for first in list(after):
            if first >= self.taken:
                continue
            for second in sorted(after[first]):
                if second < self.taken and not _reaches(after, after[first] - {second}, second):
                    return first, second
        return None


def _reaches(after: Mapping[int, set[int]], starts: set[int], goal: int) -> bool:
    waiting, seen = list(starts), set(starts)
    while waiting:
        for number in after.get(waiting.pop(), ()):
            if number == goal:
                return True
            if number not in seen:
                seen.add(number)
                waiting.append(number)
    return False
