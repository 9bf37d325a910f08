"""The steps of a network: which function is called with which tensors, and where these lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..hardware.target import Target
from ..lowering.interface import HEADER_BYTES, round_up
from ..lowering.schedule import Candidate
from ..problem.spec import ConvSpec
from .graph import ROW_MAJOR, Array, Convolution, Graph, Shape
from .layouts import Costs, Laid, lay, physical
from .memory import ARENA, INPUT, OUTPUT, WEIGHTS, Lifetime, Place, arrange
from .operators import Pass, as_pass
from .views import Group, View, Views, fuse


@dataclass(frozen=True)
class Product:
    """A convolution's code: what it depends on."""

    spec: ConvSpec
    candidate: Candidate


Function = Product | Pass

#: Bytes at multiples of which tensors in a GPU's memory begin: of its longest loads.
DEVICE_ALIGNMENT = 16


@dataclass(frozen=True)
class Step:
    """A call.

    Attributes:
        name: of the node it was.
        function: what is called.
        inputs: tensors that are read; of a convolution without its weights.
        output: tensor that is written.
        parameters: of a convolution, its weights before they are packed.
    """

    name: str
    function: Function
    inputs: tuple[str, ...]
    output: str
    parameters: Mapping[str, Any]


@dataclass
class Plan:
    """A network's steps in order, and where its tensors lie.

    Attributes:
        graph: with the layouts' conversions.
        layouts: of every tensor.
        steps: in order.
        places: of every tensor of the steps; a constant's offset is among the constants.
        arena: bytes.
        constants: what lies first among the weights: tensors that passes read, each with its offset.
        views: of tensors that are parts of others: which, and where they begin there.
        seconds: predicted.
    """

    graph: Graph
    layouts: dict[str, str]
    steps: list[Step]
    places: dict[str, Place]
    arena: int
    constants: dict[str, int]
    views: dict[str, View]
    seconds: float

    @property
    def specs(self) -> list[ConvSpec]:
        """Of each convolution, in the order in which they run."""
        return [step.function.spec for step in self.steps if isinstance(step.function, Product)]

    def shape(self, name: str) -> Shape:
        """A tensor's shape in memory."""
        return physical(self.graph.shapes[name], self.layouts.get(name, ROW_MAJOR))


def plan(graph: Graph, target: Target, costs: Costs | None = None) -> Plan:
    """Layouts, views, passes and places of a graph, which is changed."""
    laid = lay(graph, costs or Costs(target))
    views = Views(laid, DEVICE_ALIGNMENT if target.on_device else 1)
    steps = [_step(made, laid) for made in fuse(graph, views)]
    read = {name for step in steps for name in step.inputs}
    constants, end = dict[str, int](), HEADER_BYTES
    for name in sorted(read & graph.constants.keys()):
        constants[name] = end
        end += round_up(graph.constants[name].nbytes)
    places, arena = _places(graph, views, steps, constants)
    parts = {name: views.root(name) for name in views.views}
    return Plan(graph, laid.layouts, steps, places, arena, constants, parts, laid.seconds)


def _step(made: object, laid: Laid) -> Step:
    if isinstance(made, Group):
        function: Function = as_pass(made, laid.graph, laid.layouts)
        return Step(made.name, function, made.inputs, made.output, {})
    assert isinstance(made, Convolution)
    function = Product(made.spec, laid.candidates[made.output])
    return Step(made.name, function, made.inputs, made.output, made.parameters)


def _places(
    graph: Graph, views: Views, steps: Sequence[Step], constants: Mapping[str, int]
) -> tuple[dict[str, Place], int]:
    first, last, size = dict[str, int](), dict[str, int](), dict[str, int]()
    tensors = dict.fromkeys(name for step in steps for name in (*step.inputs, step.output))
    fixed = {name: Place(INPUT, number, 0) for number, name in enumerate(graph.inputs)}
    fixed |= {name: Place(WEIGHTS, 0, offset) for name, offset in constants.items()}
    fixed |= {name: Place(OUTPUT, number, 0) for number, name in reversed(list(enumerate(graph.outputs)))}
    for number, step in enumerate(steps):
        for name in (*step.inputs, step.output):
            root = views.root(name).of
            first.setdefault(root, number)
            last[root] = number
            size[root] = graph.bytes(root)
    lifetimes = [Lifetime(root, size[root], first[root], last[root]) for root in size if root not in fixed]
    offsets, arena = arrange(lifetimes)
    places = {}
    for name in tensors:
        view = views.root(name)
        whole = fixed.get(view.of) or Place(ARENA, 0, offsets[view.of])
        places[name] = Place(whole.space, whole.number, whole.offset + view.offset)
    return places, arena


def packed(array: Array) -> bytes:
    """A constant as it lies among the weights."""
    data = np.ascontiguousarray(array).tobytes()
    return data + bytes(round_up(len(data)) - len(data))
