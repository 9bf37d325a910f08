"""An ONNX graph made ready for questions: :class:`Scope`, which :mod:`convgen.formats.onnx.inference` fills."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from ...errors import SpecError
from .constants import MOST_ELEMENTS, MOST_STEPS, MOST_WORK, ROOTS, evaluate, work_of
from .file import SMALL, ModelFile

#: A dimension: a size, a symbol, or None where nothing is known.
Dim = int | str | None
Shape = tuple[Dim, ...]
Array = npt.NDArray[Any]

MAX_NODES = 250_000  # of a model, functions inlined


def bodies(node: NodeProto) -> list[tuple[str, GraphProto]]:
    """The graphs inside a node, by the name of their attribute."""
    return [
        (attribute.name, body)
        for attribute in node.attribute
        for body in ([attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs)
    ]


def graphs_of(graph: GraphProto | FunctionProto) -> Iterator[GraphProto]:
    """A graph (or function) and all graphs inside it."""
    yield graph
    for node in graph.node:
        for _, body in bodies(node):
            yield from graphs_of(body)


def tensors_of(graph: GraphProto | FunctionProto) -> Iterator[TensorProto]:
    """Every tensor of a graph (or function) and of those inside its nodes."""
    if isinstance(graph, GraphProto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
            if attribute.type == AttributeProto.SPARSE_TENSOR:
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
        for _, body in bodies(node):
            yield from tensors_of(body)


class Scope:
    """The values of one graph: shapes, dtypes, who uses them, which are constants.

    Attributes:
        graph: as the file has it; what is known of it is here.
        file, opset: the model's, and the version of ONNX's operators in it.
        outer: the graph around it.
        path: what stands before the names of its nodes.
        nodes: in an order in which every value is computed before it is used.
        tensors: values that are stored, also those of Constant nodes.
        sparse: values that are stored as sparse tensors.
        constants: values that are stored, or computed from what is.
        given: values that are the model's inputs, reshaped or not.
        types: of values; empty where nothing is known.
        reasons: why nothing is known of a value, by its name.
        inputs, outputs: names of the graph's.
        producers, users: numbers of nodes, by the value that they compute and by those that they read.
        inner: the graphs inside its nodes.
    """

    def __init__(self, graph: GraphProto, file: ModelFile, opset: int, outer: Scope | None, path: str) -> None:
        self.graph, self.file, self.opset, self.outer, self.path = graph, file, opset, outer, path
        self.nodes: list[NodeProto] = []
        self.types: dict[str, TypeProto] = {}
        self.reasons: dict[str, str] = {}
        self.tensors: dict[str, TensorProto] = {}
        self.constants: set[str] = set()
        self.given: set[str] = set()
        self.inner: list[Scope] = []
        self.sparse = {sparse.values.name for sparse in graph.sparse_initializer}
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self.producers: dict[str, int] = {}
        self.users: dict[str, set[int]] = defaultdict(set)
        self._shapes: dict[str, Shape | None] = {}
        self._values: dict[str, Array] = {}  # constants that were computed and are small

    # ---- what fills it ----

    def declare(self, name: str, kind: TypeProto) -> None:
        """Say what is known of a value."""
        tensor = kind.tensor_type
        self.types[name] = kind
        self._shapes[name] = tuple(map(dim_of, tensor.shape.dim)) if tensor.HasField("shape") else None

    def store(self, name: str, tensor: TensorProto) -> None:
        """Add a constant."""
        self.tensors[name] = tensor
        self.constants.add(name)
        self.declare(name, tensor_type(tensor.data_type, tensor.dims))

    def add(self, node: NodeProto) -> None:
        """Add a node, whose operands are there."""
        index = len(self.nodes)
        self.nodes.append(node)
        for name in _names_used(node):
            self.users[name].add(index)
        self.producers.update((name, index) for name in node.output if name)

    def know(self, name: str) -> bool:
        """Compute a constant whose shape its operator does not tell, to know that; whether it could be."""
        self.constants.add(name)
        try:
            value = self._computed(name)
        except SpecError as error:
            self.constants.discard(name)
            self.reasons[name] = str(error)
            return False
        if value.nbytes <= SMALL:
            self._values[name] = value
        else:
            self.tensors[name] = numpy_helper.from_array(value, name)
        self.declare(name, tensor_type(self.dtype(name) or helper.np_dtype_to_tensor_dtype(value.dtype), value.shape))
        return True

    # ---- questions ----

    def name(self, node: NodeProto) -> str:
        """A node's name, or its first output's; inside others with the path to it."""
        name: str = node.name or next(filter(None, node.output), node.op_type)
        return self.path + name

    def owner(self, name: str) -> Scope | None:
        """The graph that a value belongs to: this one or one around it."""
        scope: Scope | None = self
        while scope and name not in scope.types and name not in scope.producers and name not in scope.sparse:
            scope = scope.outer
        return scope

    def type(self, name: str) -> TypeProto:
        """All that is known of a value; an empty type where nothing is."""
        owner = self.owner(name)
        return owner.types.get(name, TypeProto()) if owner else TypeProto()

    def shape(self, name: str) -> Shape | None:
        owner = self.owner(name)
        return owner._shapes.get(name) if owner else None

    def dtype(self, name: str) -> int:
        dtype: int = self.type(name).tensor_type.elem_type
        return dtype

    def constant(self, name: str) -> bool:
        """Whether the value is stored in the model, or computed from what is."""
        owner = self.owner(name)
        return owner is not None and name in owner.constants

    def parameter(self, name: str) -> bool:
        """Whether the value is a constant or an input of the model, reshaped or not."""
        owner = self.owner(name)
        return owner is not None and (name in owner.constants or name in owner.given)

    def reason(self, name: str) -> str:
        """Why nothing is known of a value; empty where that is not said."""
        owner = self.owner(name)
        return owner.reasons.get(name, "") if owner else ""

    def scalar(self, name: str) -> float | None:
        """The value of a constant of one element; None where it is not known."""
        shape = self.shape(name)
        if not self.constant(name) or shape is None or any(d != 1 for d in shape):
            return None
        try:
            value = self.value(name)
        except SpecError:  # damaged, or without its data
            return None
        return float(value.reshape(())) if value.size == 1 and value.dtype.kind not in "SUOc" else None

    def drops(self, node: NodeProto) -> bool:
        """Whether a node is a Dropout that may drop: it is told to train, or that is not known."""
        told = node.input[2] if node.op_type == "Dropout" and len(node.input) > 2 else ""
        return bool(told) and self.scalar(told) != 0

    def small(self, name: str) -> bool:
        """Whether the value is a constant of few elements."""
        shape = self.shape(name)
        return self.constant(name) and static(shape) and math.prod(shape) * 8 <= SMALL

    def value(self, name: str) -> Array:
        """The elements of a constant.

        Raises:
            SpecError: they cannot be read or computed, or are too many.
        """
        owner = self.owner(name)
        if owner is None or name not in owner.constants:
            raise SpecError(f"value {name!r}", "a constant", "another value", self.file.where)
        if name in owner._values:
            return owner._values[name]
        value = self.file.array(owner.tensors[name]) if name in owner.tensors else owner._computed(name)
        if value.shape != owner._shapes.get(name):
            found = f"{text(value.shape)}, not {text(owner._shapes.get(name))}"
            raise SpecError(f"value {name!r}", "the shape it is declared with", found, self.file.where)
        if value.nbytes <= SMALL:
            owner._values[name] = value
        return value

    def _computed(self, name: str) -> Array:
        """The value of a constant that nodes of this graph compute: all of them in one go."""
        wanted, elements, work = [name], 0, 0.0
        needed: set[int] = set()
        leaves: dict[str, Array] = {}
        while wanted:
            at = wanted.pop()
            if at in leaves:
                continue
            index = self.producers.get(at)
            if index is None or at in self.tensors or at in self._values:  # stored, or of a surrounding graph
                leaves[at] = self.value(at)
            elif self.nodes[index].op_type in ("Shape", "Size") and self.nodes[index].domain in ROOTS:
                leaves[at] = self._shape_of(self.nodes[index])
            elif index not in needed:
                node = self.nodes[index]
                needed.add(index)
                elements += sum(map(self._size, filter(None, node.output)))
                work += work_of(node, [self.shape(operand) for operand in (*node.input, *node.output) if operand])
                if elements > MOST_ELEMENTS or len(needed) > MOST_STEPS or work > MOST_WORK:
                    limits = f"{MOST_ELEMENTS} elements, from {MOST_STEPS} nodes and {MOST_WORK:.0e} products"
                    raise SpecError(f"value {name!r}", f"a constant of at most {limits}", "more", self.file.where)
                wanted += [operand for operand in node.input if operand]
        nodes = [self.nodes[index] for index in sorted(needed)]
        if not nodes:
            return leaves[name]
        used = {node.domain for node in nodes} - ROOTS
        opsets = {o.domain: o.version for o in self.file.proto.opset_import if o.domain in used}
        return evaluate(nodes, leaves, name, opsets | {"": self.opset}, self.file.where)

    def _shape_of(self, node: NodeProto) -> Array:
        """What Shape or Size gives."""
        shape = self.shape(node.input[0]) or ()
        if node.op_type == "Size":
            return np.array(math.prod(size for size in shape if isinstance(size, int)), np.int64)
        start, end = (next((a.i for a in node.attribute if a.name == key), None) for key in ("start", "end"))
        return np.array(shape[start:end], np.int64)

    def _size(self, name: str) -> int:
        """Most elements of a value: where its operator does not tell, those of its operands for each axis that is."""
        shape = self.shape(name)
        if static(shape):
            return math.prod(shape)
        operands = self.nodes[self.producers[name]].input
        return _MOST_AXES * sum(math.prod(known) for known in map(self.shape, operands) if static(known))


_MOST_AXES = 8


def tensor_type(dtype: int, shape: Iterable[Dim]) -> TypeProto:
    """A tensor's type."""
    kind = TypeProto()
    kind.tensor_type.elem_type = dtype
    kind.tensor_type.shape.SetInParent()  # of a scalar, too
    for size in shape:
        dim = kind.tensor_type.shape.dim.add()
        if isinstance(size, int):
            dim.dim_value = size
        elif size:
            dim.dim_param = size
    return kind


def dim_of(dim: Any) -> Dim:
    """What protobuf's dimension says."""
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else str(dim.dim_param) or None


def static(shape: Shape | None) -> TypeGuard[tuple[int, ...]]:
    """Whether a shape is known."""
    return shape is not None and all(isinstance(d, int) for d in shape)


def text(shape: Shape | None) -> str:
    """A shape for people: ``[N, 3, ?, 224]``."""
    words = ["?" if d is None else str(d) for d in shape or ()]
    return "?" if shape is None else f"[{', '.join(map(printable, words))}]"


def printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _names_used(node: NodeProto) -> Iterable[str]:
    """The values a node reads, its bodies included; not those of which it asks only shape or type."""
    if node.op_type in ("Shape", "Size", "CastLike") and node.domain in ROOTS:
        yield from node.input[:1] if node.op_type == "CastLike" else ()
        return
    yield from node.input
    for _, body in bodies(node):
        for inner in body.node:
            yield from _names_used(inner)
        yield from (value.name for value in body.output)


def names_read(node: NodeProto) -> Iterable[str]:
    """All values that a node must be given: its inputs, and what its bodies take from around them."""
    yield from filter(None, node.input)
    for _, body in bodies(node):
        inside = {value.name for value in [*body.input, *body.initializer]}
        inside |= {tensor.values.name for tensor in body.sparse_initializer}
        inside |= {name for inner in body.node for name in inner.output}
        for inner in body.node:
            yield from (name for name in names_read(inner) if name not in inside)
        yield from (value.name for value in body.output if value.name not in inside)
