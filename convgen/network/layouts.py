"""Which layout every tensor of a network has: the cheapest together, by what schedules and copies should take.

A tensor has one layout; a convolution that wants another reads or writes a converted copy. The search goes down from
several starts, one tensor, or one set of tensors that are better alike, at a time.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..cpu.model import core_of
from ..cuda import model
from ..hardware.target import Target
from ..lowering.candidates import predicted
from ..lowering.discover import schedule as find_schedule
from ..lowering.kept import kept, key_of
from ..lowering.schedule import Candidate, Picks
from ..problem.layout import BLOCKS, PLAIN, Blocks
from ..problem.spec import ConvSpec
from .graph import ROW_MAJOR, Convolution, Graph, Node, Operator, Shape
from .kinds import KINDS

#: Operators after which elements may lie in another order.
_REORDERING = ("reshape", "transpose")
#: How many times longer a pass takes that reads one element here and one there.
_SCATTERED = 4


def physical(shape: Shape, layout: str) -> Shape:
    """The shape of a tensor in memory."""
    if layout == ROW_MAJOR:
        return shape
    return Blocks(layout, shape[1]).shape(shape[0], shape[2:])


def same_memory(shape: Shape, one: str, other: str) -> bool:
    """Whether elements lie in the same order: of one pixel, channels are neighbours in every layout."""
    return one == other or math.prod(shape[2:]) == 1


@dataclass(frozen=True)
class Choice:
    """The layouts of a convolution's src and dst, and how it is computed with them."""

    src: str
    dst: str
    candidate: Candidate


#: What this process knows, so many at most: its next network may ask again.
_MOST_KNOWN = 4096
_known: dict[tuple[ConvSpec, Target], tuple[float, Candidate]] = {}


def _to_bytes(seconds: float, candidate: Candidate) -> bytes:
    return json.dumps([seconds, candidate.schedule.id, dict(candidate.picks)]).encode()


def _from_bytes(data: bytes) -> tuple[float, Candidate]:
    seconds, schedule, picks = json.loads(data)
    return seconds, Candidate(find_schedule(schedule), Picks(**picks))


class Costs:
    """What convolutions and copies are predicted to take on a target; each is asked for once.

    Args:
        unknown: called when something is predicted that no process has before.
    """

    def __init__(self, target: Target, unknown: Callable[[], object] = lambda: None) -> None:
        self.target, self._unknown = target, unknown
        self._new: dict[ConvSpec, tuple[float, Candidate]] = {}

    def recall(self, specs: Iterable[ConvSpec]) -> None:
        """Look up together what other processes have predicted for specs."""
        keys = {self._key(spec): spec for spec in specs if (spec, self.target) not in _known}
        for key, data in kept().find(list(keys)).items():
            self._know(keys[key], _from_bytes(data))

    @cached_property
    def blocked(self) -> str:
        """The layout whose blocks are vectors of the target."""
        return next((name for name, size in BLOCKS.items() if size == max(8, self.target.lanes)), "nchw16c")

    def layouts(self, shape: Shape) -> tuple[str, ...]:
        """What a tensor of images may lie in."""
        if len(shape) < 3 or len(shape) > 5:
            return (ROW_MAJOR,)
        whole = not self.target.on_device and shape[1] % BLOCKS[self.blocked] == 0
        return (*PLAIN, self.blocked) if whole else PLAIN

    def convolution(self, spec: ConvSpec) -> tuple[float, Candidate]:
        """The predicted seconds and the candidate of a spec in its layouts."""
        known = _known.get((spec, self.target))
        if known is None:
            self._unknown()
            known = self._new[spec] = predicted(spec, self.target)
            self._know(spec, known)
        return known

    def _know(self, spec: ConvSpec, known: tuple[float, Candidate]) -> None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[spec, self.target] = known

    def keep(self) -> None:
        """Let other processes know what was predicted here."""
        new, self._new = self._new, {}
        kept().add({self._key(spec): _to_bytes(*found) for spec, found in new.items()})

    @cached_property
    def _machine(self) -> bytes:
        return key_of(None if self.target.on_device else core_of(self.target), self.target)

    def _key(self, spec: ConvSpec) -> bytes:
        """What a prediction depends on."""
        return key_of("predicted", spec, self._machine)

    def copy(self, size: int, ordered: bool = True, times: int = 1) -> float:
        """Seconds to read and write so many bytes, so many times: in one order, or from scattered places."""
        if self.target.on_device:
            return model.LAUNCH + 2 * size * times * (1 if ordered else _SCATTERED) / self.target.rates.memory
        core = core_of(self.target)
        cycles = 2 * size * times / core.l3 * (1 if ordered else _SCATTERED)
        return (cycles / self.target.cores + core.region) / core.hertz


class LayoutSearch:
    """The layouts of one graph's tensors."""

    def __init__(self, graph: Graph, costs: Costs) -> None:
        self.graph, self.costs = graph, costs
        fixed = {*graph.inputs, *graph.outputs, *graph.constants}
        fixed |= {name for node in graph.convolutions if node.rows for name in (*node.inputs, node.output)}
        self.options = {
            name: (ROW_MAJOR,) if name in fixed else costs.layouts(shape) for name, shape in graph.shapes.items()
        }
        self.around: dict[str, list[int]] = defaultdict(list)
        for number, node in enumerate(graph.nodes):
            for name in {*node.inputs, node.output}:
                self.around[name].append(number)
        self._node_costs: dict[tuple[int, tuple[str, ...]], float] = {}
        self._laid: dict[tuple[ConvSpec, str, str], ConvSpec] = {}
        specs = {node.spec: node for node in graph.convolutions}
        costs.recall(self.laid(spec, *pair) for spec, node in specs.items() for pair in self._every_pair(node))

    def laid(self, spec: ConvSpec, src: str, dst: str) -> ConvSpec:
        """A spec with layouts."""
        key = spec, src, dst
        if key not in self._laid:
            self._laid[key] = spec.with_(layout=src, dst_layout=dst)
        return self._laid[key]

    def best(self) -> dict[str, str]:
        """A layout for every tensor."""
        starts = [self._uniform(layout) for layout in (self.costs.blocked, *PLAIN[::-1])]
        return min((self._descended(start) for start in starts), key=self.total)

    def total(self, layouts: Mapping[str, str]) -> float:
        return sum(self.node_seconds(number, layouts) for number in range(len(self.graph.nodes)))

    def _uniform(self, layout: str) -> dict[str, str]:
        wanted = [layout, *PLAIN[::-1]]
        return {
            name: next(choice for choice in wanted if choice in options) if len(options) > 1 else options[0]
            for name, options in self.options.items()
        }

    def _descended(self, layouts: dict[str, str]) -> dict[str, str]:
        units = [*self._groups(), *([name] for name, options in self.options.items() if len(options) > 1)]
        improved = True
        while improved:
            improved = False
            for unit in units:
                for option in dict.fromkeys(option for name in unit for option in self.options[name]):
                    changed = {name: option for name in unit if option in self.options[name]}
                    nodes = {number for name in changed for number in self.around[name]}
                    tried = {**layouts, **changed}
                    before = sum(self.node_seconds(number, layouts) for number in nodes)
                    if sum(self.node_seconds(number, tried) for number in nodes) < before * (1 - 1e-9):
                        layouts, improved = tried, True
        return layouts

    def _groups(self) -> list[list[str]]:
        """Sets of tensors that operators connect which work best in one layout."""
        leader = {name: name for name in self.options}

        def find(name: str) -> str:
            while leader[name] != name:
                name = leader[name]
            return name

        for node in self.graph.nodes:
            if isinstance(node, Operator) and node.kind in _REORDERING:
                continue
            joined = [*node.inputs, node.output] if isinstance(node, Operator) else [*node.inputs[1:], node.output]
            free = [name for name in joined if len(self.options[name]) > 1]
            for name in free[1:]:
                leader[find(name)] = find(free[0])
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.options:
            groups[find(name)].append(name)
        return [group for group in groups.values() if len(group) > 1]

    # ---- of one node ----

    def node_seconds(self, number: int, layouts: Mapping[str, str]) -> float:
        node = self.graph.nodes[number]
        key = number, tuple(layouts[name] for name in (*node.inputs, node.output))
        if key not in self._node_costs:
            if isinstance(node, Convolution):
                self._node_costs[key] = self.choose(node, layouts)[1]
            else:
                self._node_costs[key] = self._operator(node, layouts)
        return self._node_costs[key]

    def choose(self, node: Convolution, layouts: Mapping[str, str]) -> tuple[Choice, float]:
        """The layouts that a convolution is computed in, and its seconds with the conversions that takes."""
        best: tuple[Choice, float] | None = None
        for src, dst in self._pairs(node, layouts):
            converted = 0.0, 0.0
            if not node.rows:  # whose tensors are as they are
                after = sum(self._converted(name, layouts, dst) for name in (*node.inputs[1:], node.output))
                converted = self._converted(node.inputs[0], layouts, src), after
            if best is not None and sum(converted) >= best[1]:
                continue  # the conversions alone take longer: nothing need be predicted
            seconds, candidate = self.costs.convolution(self.laid(node.spec, src, dst))
            seconds = seconds + converted[0] + converted[1]
            if best is None or seconds < best[1]:
                best = Choice(src, dst, candidate), seconds
        assert best is not None
        return best

    def _pairs(self, node: Convolution, layouts: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        """The layouts of src and dst that are tried: those that the tensors have, and every one for both."""
        every = self._every_pair(node)
        own = (layouts[node.inputs[0]], layouts[node.output])
        return dict.fromkeys([own, *(pair for pair in every if pair[0] == pair[1])]) if own in every else every

    def _every_pair(self, node: Convolution) -> list[tuple[str, str]]:
        """The layouts that src and dst may have."""
        spec = node.spec
        if node.rows and spec.in_spatial != (1,):
            return [("nhwc", "nhwc")]
        sources = self.costs.layouts((spec.n, spec.ic, *spec.in_spatial))
        return list(itertools.product(sources, self.costs.layouts((spec.n, spec.oc, *spec.out_spatial))))

    def _converted(self, name: str, layouts: Mapping[str, str], wanted: str) -> float:
        shape = self.graph.shapes[name]
        if len(shape) < 3 or same_memory(shape, layouts[name], wanted):
            return 0.0
        return self.costs.copy(self.graph.bytes(name), ordered=False)

    def _operator(self, node: Operator, layouts: Mapping[str, str]) -> float:
        """A pass over its tensors, slower where their orders differ, or where neighbours are not read together."""
        shapes, output = self.graph.shapes, node.output
        if node.kind in _REORDERING:
            keeps = keeps_order(self.graph, node, layouts)
            return 0.0 if keeps else self.costs.copy(self.graph.bytes(output), ordered=False)
        read = [name for name in node.inputs if name not in self.graph.constants]
        alike = all(
            same_memory(shapes[name], layouts[name], layouts[output])
            for name in read
            if len(shapes[name]) == len(shapes[output]) > 2
        )
        if node.kind in ("concat", "slice") and alike and lies_apart(self.graph, node, layouts[output]):
            return 0.0
        size = max(self.graph.bytes(name) for name in (*read, output))
        if KINDS[node.kind].reduces and layouts[output] == ROW_MAJOR and len(shapes[output]) > 2:
            alike = False  # neighbours are summed, or windows begin at odd places
        taps = math.prod(node.attributes.get("kernel", (1,)))
        return self.costs.copy(size, alike, times=max(1, taps // 4))


def lies_apart(graph: Graph, node: Operator, layout: str) -> bool:
    """Whether the parts of a concatenation, or the part that a slice takes, are one piece of memory each."""
    whole = graph.shapes[node.output if node.kind == "concat" else node.inputs[0]]
    parts = [graph.shapes[name] for name in (node.inputs if node.kind == "concat" else (node.output,))]
    if node.kind == "slice" and set(node.attributes["steps"]) != {1}:
        return False
    differ = [axis for axis in range(len(whole)) if any(part[axis] != whole[axis] for part in parts)]
    if node.kind == "concat":
        differ = [node.attributes["axis"]]
    if len(differ) != 1:
        return False
    order = memory_order(len(whole), layout)
    if math.prod(whole[axis] for axis in order[: order.index(differ[0])]) != 1:
        return False
    block = BLOCKS[layout]
    return layout in PLAIN or (differ == [1] and all(part[1] % block == 0 for part in parts))


def keeps_order(graph: Graph, node: Operator, layouts: Mapping[str, str]) -> bool:
    """Whether elements lie in the same order before and after a reshape or transpose."""
    (source, *_), output = node.inputs, node.output
    shape, out = graph.shapes[source], graph.shapes[output]
    if node.kind == "reshape":
        ends = ((shape, layouts[source]), (out, layouts[output]))
        return all(len(s) < 3 or same_memory(s, layout, ROW_MAJOR) for s, layout in ends)
    if layouts[source] not in PLAIN or layouts[output] not in PLAIN:
        return False
    order = memory_order(len(shape), layouts[source])
    turned = [node.attributes["perm"][axis] for axis in memory_order(len(out), layouts[output])]
    return [axis for axis in order if shape[axis] > 1] == [axis for axis in turned if shape[axis] > 1]


def memory_order(rank: int, layout: str) -> list[int]:
    """The logical axes of a tensor as they follow each other in memory; of blocks, as if each were one channel."""
    return [0, *range(2, rank), 1] if layout == "nhwc" else list(range(rank))


@dataclass(frozen=True)
class Laid:
    """A graph whose convolutions have layouts, with what converts tensors between them.

    Attributes:
        graph: convolutions' specs have their layouts.
        layouts: of every tensor.
        candidates: how each convolution is computed, by its output.
        seconds: predicted.
    """

    graph: Graph
    layouts: dict[str, str]
    candidates: dict[str, Candidate]
    seconds: float


def lay(graph: Graph, costs: Costs) -> Laid:
    """Choose the layouts, and add the conversions they take."""
    search = LayoutSearch(graph, costs)
    layouts = search.best()
    seconds = search.total(layouts)
    costs.keep()
    nodes: list[Node] = []
    candidates: dict[str, Candidate] = {}
    made: dict[tuple[str, str], str] = {}

    def converted(name: str, layout: str) -> str:
        """A tensor in a layout: itself, or a copy that is made once."""
        shape = graph.shapes[name]
        if len(shape) < 3 or same_memory(shape, layouts[name], layout):
            return name
        if (name, layout) not in made:
            copied = made[name, layout] = graph.fresh(f"{name}@{layout}")
            nodes.append(Operator(name, "identity", (name,), copied))
            graph.shapes[copied], layouts[copied] = shape, layout
            graph.dtypes[copied] = graph.dtype(name)
        return made[name, layout]

    for node in graph.nodes:
        if isinstance(node, Operator):
            nodes.append(node)
            continue
        choice, _ = search.choose(node, layouts)
        if node.rows:
            nodes.append(replace(node, spec=node.spec.with_(layout=choice.src, dst_layout=choice.dst)))
            candidates[node.output] = choice.candidate
            continue
        src, *rest = node.inputs
        inputs = (converted(src, choice.src), *(converted(name, choice.dst) for name in rest))
        spec = node.spec.with_(layout=choice.src, dst_layout=choice.dst)
        output, shape = node.output, graph.shapes[node.output]
        if len(shape) >= 3 and not same_memory(shape, choice.dst, layouts[output]):
            output = graph.fresh(f"{node.output}@{choice.dst}")
            graph.shapes[output], layouts[output] = shape, choice.dst
            graph.dtypes[output] = graph.dtype(node.output)
            made[node.output, choice.dst] = output
        nodes.append(replace(node, spec=spec, inputs=inputs, output=output))
        candidates[output] = choice.candidate
        if output != node.output:
            nodes.append(Operator(node.name, "identity", (output,), node.output))
    graph.nodes = nodes
    graph.order()
    return Laid(graph, layouts, candidates, seconds)
