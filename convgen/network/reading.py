"""An ONNX model as a :class:`~convgen.network.graph.Graph`."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto

from ..errors import NotTakenError
from ..formats.onnx.constants import ROOTS
from ..formats.onnx.file import ModelFile
from ..formats.onnx.graph import Scope, Shape, names_read, printable, static, text
from ..formats.onnx.halves import HALVES, widen_halves
from ..formats.onnx.layers import folded_graphs
from ..formats.onnx.node import OnnxLayer
from ..formats.onnx.prepare import prepare
from ..problem.dtypes import EXACT, numpy_dtype
from .ends import store_ends
from .graph import Convolution, Graph, Node, Operator
from .integers import READ_INTEGERS, integer_convolution
from .node import DTYPES, INPUT_DTYPES, LONG_DTYPES, OUTPUT_DTYPES, Refusal
from .nodes import READERS, read_node
from .whole import READ_WHOLE

_READERS = {**READERS, **READ_WHOLE, **READ_INTEGERS}


def read_graph(source: str | Path | ModelProto, dims: Mapping[str, int] | None = None) -> Graph:
    """The network that a model is, its convolutions folded as :func:`convgen.specs_from_onnx` has them.

    Raises:
        SpecError: it cannot be read, or is not an ONNX model.
        NotTakenError: of nodes that are not taken: names each of them, and why.
    """
    with ModelFile(source) as file:
        types = _widened(file, dims or {})
        (scope, layers), *_ = folded_graphs(file, dims or {}, arrays=True, strict=False)
        name = str(file.proto.graph.name) if not isinstance(source, str | os.PathLike) else Path(source).stem
        graph = _Builder(scope, layers, _opset(file), file.where).graph(identifier(name), types)
        graph.dims = dict(dims or {})
        return graph


@dataclass(frozen=True)
class Outside:
    """A node that is not taken.

    Attributes:
        name: operator and name, as messages have them.
        reason: why.
        inputs, outputs: values that it reads, inside of its own graphs too, and those that it computes.
    """

    name: str
    reason: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class PartlyRead:
    """What :func:`read_partly` takes of a model.

    Attributes:
        graph: the nodes that are taken, in no order; its inputs and outputs are the model's.
        outside: all others, but for those that compute constants or were folded.
        types: how the model stores tensors that are f32 in the graph: ``f16``, ``bf16``, ``bool``.
    """

    graph: Graph
    outside: list[Outside]
    types: Mapping[str, str] = field(default_factory=dict)


def read_partly(file: ModelFile, dims: Mapping[str, int]) -> PartlyRead:
    """The nodes of a model that are taken, folded as :func:`read_graph` has them, and those that are not.

    Raises:
        SpecError: it is not an ONNX model.
    """
    types = _widened(file, dims)
    (scope, layers), *_ = folded_graphs(file, dims, arrays=True, strict=False)
    builder = _Builder(scope, layers, _opset(file), file.where)
    graph = builder.partial()
    types |= _other_types(scope, graph.shapes)
    return PartlyRead(graph, list(builder.outside.values()), types)


def _other_types(scope: Scope, names: Iterable[str]) -> dict[str, str]:
    """Which of some tensors, f32 in a graph, are truth values, places or integers of 16 bits in the model."""
    others = {TensorProto.BOOL: "bool", TensorProto.INT64: "i64"} | LONG_DTYPES
    return {name: others[scope.dtype(name)] for name in names if scope.dtype(name) in others}


def _widened(file: ModelFile, dims: Mapping[str, int]) -> dict[str, str]:
    """Make a model's values of f16 and bf16 ones of f32, and tell which these are."""
    widened = ModelProto()
    widened.CopyFrom(file.proto)
    if not widen_halves(widened):
        return {}
    (scope, *_), _ = prepare(file, dims)
    file.proto = widened
    return {name: HALVES[scope.dtype(name)] for name in scope.types if scope.dtype(name) in HALVES}


def _opset(file: ModelFile) -> int:
    return max((o.version for o in file.proto.opset_import if o.domain in ROOTS), default=1)


def _open_shape(shape: Shape | None) -> str:
    """What is missing of an input's shape, and how to give it."""
    if shape is None:
        return "expected a shape in the model, found none (`convgen help networks` has how to write one)"
    names = dict.fromkeys(dim for dim in shape if isinstance(dim, str))
    given = " ".join(f"--dim {shlex.quote(f'{printable(name)}=1')}" for name in names)
    return f"expected a known shape (--dim), found {text(shape)}; such as {given}"


def identifier(name: str) -> str:
    """A name as one of C."""
    cleaned = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[:100]
    cleaned = re.sub(r"__+", "_", cleaned)
    return cleaned if cleaned[:1].isalpha() and not cleaned.startswith("convgen") else f"network_{cleaned}".rstrip("_")


class _Builder:
    """Makes a graph of one that is folded: from its outputs to its inputs, so that what was folded is not met."""

    def __init__(self, scope: Scope, layers: list[OnnxLayer], opset: int, where: str) -> None:
        self.scope, self.opset, self.where = scope, opset, where
        self.layers = {layer.dst: layer for layer in layers if layer.dst}
        self.nodes: dict[str, Node] = {}
        self.made = Graph("", [], {}, {}, [], [], [])
        self.refused: dict[str, str] = {}
        self.outside: dict[int, Outside] = {}
        self.unread = {layer.name: self._reason(layer) for layer in layers if layer.refusal}

    def graph(self, name: str, types: Mapping[str, str]) -> Graph:
        """All of the model, its inputs and outputs of the given types, where not as the scope has them."""
        made = self.made
        made.name = name
        self._begin()
        for given in made.inputs:
            self._take_input(given)
        for output in made.outputs:
            self._check_end("output", output, OUTPUT_DTYPES)
        if not made.shapes.keys() >= set(made.inputs):  # without which no other shape is known
            raise NotTakenError(self.where, self.refused, 0)
        self._read_all(made.outputs)
        if self.refused:
            raise NotTakenError(self.where, self.refused, len(self.nodes))
        self._separate_outputs()
        made.nodes = list(self.nodes.values())
        store_ends(made, {**types, **_other_types(self.scope, (*made.inputs, *made.names))})
        made.order()
        return made

    def partial(self) -> Graph:
        """What is taken, where that need not be all."""
        self._begin()
        self._read_all([name for name in self.made.outputs if not self.scope.constant(name)])
        self.made.nodes = list(self.nodes.values())
        return self.made

    def _begin(self) -> None:
        scope, made = self.scope, self.made
        made.inputs = [v.name for v in scope.graph.input if v.name not in scope.tensors]
        made.outputs = [v.name for v in scope.graph.output]
        made.names = list(made.outputs)

    def _read_all(self, wanted: list[str]) -> None:
        """From values back to the inputs."""
        waiting, seen = list(wanted), set[str]()
        while waiting:
            value = waiting.pop()
            if value not in seen and value not in self.made.inputs:
                seen.add(value)
                waiting += self._read(value)

    def _take_input(self, name: str) -> None:
        shape, dtype = self.scope.shape(name), self.scope.dtype(name)
        if not static(shape):
            self.refused[f"input {name!r}"] = _open_shape(shape)
            return
        self.made.shapes[name] = shape
        if dtype != TensorProto.FLOAT and dtype in DTYPES:
            self.made.dtypes[name] = DTYPES[dtype]
        self._check_end("input", name, INPUT_DTYPES)
        if 0 in shape:
            self.refused[f"input {name!r}"] = f"expected elements, found {text(shape)}"

    def _check_end(self, what: str, name: str, dtypes: Mapping[int, str]) -> None:
        """Refuse an input or output of a type that is not taken; one of f16 or bf16 is f32 here."""
        if (dtype := self.scope.dtype(name)) not in (*dtypes, TensorProto.UNDEFINED):
            found = TensorProto.DataType.Name(dtype).lower()
            self.refused[f"{what} {name!r}"] = f"expected one of {', '.join(dtypes.values())}, found {found}"

    def _read(self, value: str) -> list[str]:
        """Add what computes a value, unless it is constant or refused; returns the values that this takes."""
        if value in self.made.constants or value in self.nodes:
            return []
        if (layer := self.layers.get(value)) is not None:
            try:
                found = self._convolution(layer)
                self.nodes |= {node.output: node for node in found}
                return [name for node in found for name in node.inputs]
            except Refusal as error:  # what was folded into it may be taken by itself
                self.unread[layer.name] = str(error)
                del self.layers[value]
        if self.scope.constant(value):
            if (dtype := DTYPES.get(self.scope.dtype(value), "f32")) != "f32":
                self.made.dtypes[value] = dtype
            array = np.asarray(self.scope.value(value))
            if array.dtype == np.int64 and np.abs(array).max(initial=0) > EXACT:
                self.refused[f"constant {value!r}"] = f"whole numbers beyond {EXACT}, which f32 does not have"
                return []
            self.made.constants[value] = np.asarray(array, numpy_dtype(dtype), order="C")
            self.made.shapes[value] = self.made.constants[value].shape
            producer = self.scope.producers.get(value)
            if producer is not None and self.scope.nodes[producer].op_type != "Constant":
                self.made.folded.add(value)
            return []
        if (index := self.scope.producers.get(value)) is None:
            self.refused[f"value {value!r}"] = "nothing computes it"
            return []
        node = self.scope.nodes[index]
        key = f"{node.op_type} {self.scope.name(node)!r}"
        try:
            if reason := self.unread.get(self.scope.name(node)):
                raise Refusal(reason)
            if node.domain not in ROOTS:
                raise Refusal(f"it is of the domain {node.domain!r}")
            found = read_node(self.scope, node, self.opset, self.made, _READERS)
        except Refusal as error:
            self.refused[key] = str(error)
            reads = tuple(name for name in dict.fromkeys(names_read(node)) if not self.scope.constant(name))
            self.outside[index] = Outside(key, str(error), reads, tuple(filter(None, node.output)))
            return [name for name in reads if self.scope.owner(name) is self.scope]
        self.nodes |= {made.output: made for made in found}
        return [name for made in found for name in made.inputs]

    def _convolution(self, layer: OnnxLayer) -> list[Node]:
        spec = layer.spec
        if spec is None:
            raise Refusal(self._reason(layer))
        if spec.dtype not in ("f32", "i8"):
            raise Refusal(f"dtype {spec.dtype}; f32 and i8 are supported")
        if spec.n == 0:
            raise Refusal("an empty batch")
        if not layer.arrays:
            raise Refusal(f"its weights are no constants: {layer.unknown}")
        self.made.shapes |= {layer.src: spec.src_shape, layer.dst: spec.dst_shape}
        if spec.is_quantised:
            return integer_convolution(self.scope, self.made, layer, spec)
        if layer.residual:
            self.made.shapes[layer.residual] = spec.dst_shape
        inputs = (layer.src, layer.residual) if layer.residual else (layer.src,)
        return [Convolution(layer.name, spec, layer.arrays, inputs, layer.dst)]

    def _reason(self, layer: OnnxLayer) -> str:
        """Why a convolution is not read, without the model and the node, which are named beside it."""
        return str(layer.refusal).removeprefix(f"{self.where}: {layer.operator} {layer.name!r}: ")

    def _separate_outputs(self) -> None:
        """Every output is computed, each by itself: one that is an input, a constant or another output is copied."""
        for position, name in enumerate(self.made.outputs):
            if name in self.nodes and name not in self.made.outputs[:position]:
                continue
            copied = self.made.fresh(f"{name}/copy{position}")
            self.nodes[copied] = Operator(name, "identity", (name,), copied)
            self.made.shapes[copied] = self.made.shapes[name]
            if (dtype := self.made.dtype(name)) != "f32":
                self.made.dtypes[copied] = dtype
            self.made.outputs[position] = copied
