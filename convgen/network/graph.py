"""What a network is: convolutions with their epilogues, the operators between them, and the tensors that connect them.

Tensors have the model's shapes and types; how each lies in memory is decided later (:mod:`convgen.network.plan`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedError
from ..problem.dtypes import BYTES
from ..problem.spec import ConvSpec

Shape: TypeAlias = tuple[int, ...]
F32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
#: Plain row-major order: what a network's own inputs and outputs have, and tensors without channels.
ROW_MAJOR = "nchw"
#: Attributes of an operator by name: numbers, text, and tuples of them.
Attributes: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Convolution:
    """A convolution, or a product with constant weights written as one.

    Attributes:
        name: of the node it was.
        spec: what it computes, of plain tensors: the plan chooses layouts.
        parameters: as the spec says.
        inputs: ``src [residual]``.
        output: dst.
        rows: the tensors are matrices ``[…, channels]``, rows of which are the spec's pixels: what the spec calls
            NHWC, and no other layout.
    """

    name: str
    spec: ConvSpec
    parameters: Mapping[str, Array]
    inputs: tuple[str, ...]
    output: str
    rows: bool = False


@dataclass(frozen=True)
class Operator:
    """What stands between convolutions.

    Attributes:
        name: of the node it was, or is a part of.
        kind: what it computes, a key of :data:`convgen.network.kinds.KINDS`.
        inputs, output: tensors.
        attributes: what else says what it computes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: Attributes = field(default_factory=dict)


Node: TypeAlias = Convolution | Operator


@dataclass
class Graph:
    """A network.

    Attributes:
        name: of the model.
        nodes: in an order in which every input is computed before it is used.
        shapes: of every tensor.
        dtypes: of the tensors that are not f32: ``u8``, ``i8`` or ``i32``; ``bool`` of inputs.
        constants: tensors that are known.
        inputs, outputs: of the network, in the model's order.
        names: what the model calls its outputs.
        dims: sizes of symbolic dimensions, by name, that it was read with.
        folded: constants that are no tensors of the model's: they were computed of such.
    """

    name: str
    nodes: list[Node]
    shapes: dict[str, Shape]
    constants: dict[str, Array]
    inputs: list[str]
    outputs: list[str]
    names: list[str]
    dtypes: dict[str, str] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    folded: set[str] = field(default_factory=set)

    @property
    def convolutions(self) -> list[Convolution]:
        return [node for node in self.nodes if isinstance(node, Convolution)]

    def producers(self) -> dict[str, Node]:
        """The node that computes each tensor."""
        return {node.output: node for node in self.nodes}

    def users(self) -> dict[str, list[Node]]:
        """The nodes that read each tensor; one that reads it twice is there twice."""
        users: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for name in node.inputs:
                users[name].append(node)
        return users

    def fresh(self, wanted: str) -> str:
        """A name like the wanted one that no tensor has: a model may call its tensors whatever it likes."""
        while wanted in self.shapes:
            wanted += "'"
        return wanted

    def size(self, name: str) -> int:
        """Elements of a tensor."""
        return math.prod(self.shapes[name])

    def dtype(self, name: str) -> str:
        """How a tensor is stored."""
        return self.dtypes.get(name, "f32")

    def bytes(self, name: str) -> int:
        """Of a tensor."""
        return BYTES[self.dtype(name)] * self.size(name)

    def order(self) -> None:
        """Sort the nodes, and leave out those that no output depends on.

        Raises:
            UnsupportedError: an output that nothing computes.
        """
        producers, done = self.producers(), dict[str, None]()
        for output in self.outputs:
            for name in _needed(output, producers, done):
                done[name] = None
        for name in self.outputs:
            if name not in done and name not in self.inputs:
                raise UnsupportedError(f"output {name!r}: expected one that a node computes, found none")
        self.nodes = [producers[name] for name in done if name in producers]
        read = {name for node in self.nodes for name in node.inputs} | {*self.inputs, *self.outputs}
        kept = read | {node.output for node in self.nodes}
        self.shapes = {name: shape for name, shape in self.shapes.items() if name in kept}
        self.dtypes = {name: dtype for name, dtype in self.dtypes.items() if name in kept}
        self.constants = {name: array for name, array in self.constants.items() if name in read}


def _needed(output: str, producers: Mapping[str, Node], done: Iterable[str]) -> Iterator[str]:
    """The tensors that one is computed from, and itself, each after what it needs; not those that are done."""
    seen = set(done)
    waiting: list[tuple[str, bool]] = [(output, False)]
    while waiting:
        name, ready = waiting.pop()
        if ready:
            yield name
        elif name not in seen and name in producers:
            seen.add(name)
            waiting.append((name, True))
            waiting += [(given, False) for given in reversed(producers[name].inputs)]
