"""An ONNX model of which some parts became nodes of another domain."""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from ..errors import SpecError
from ..formats.onnx.file import SMALL, ModelFile
from ..formats.onnx.graph import Scope, names_read, tensors_of
from ..formats.onnx.prepare import prepare
from ..network.graph import Graph
from ..network.node import OUTPUT_DTYPES

#: ONNX's numbers of types.
ONNX_TYPES = {name: number for number, name in OUTPUT_DTYPES.items()}
#: The domain of the nodes that take the parts' places, and its version.
DOMAIN, DOMAIN_VERSION = "convgen", 1
#: The version of ONNX's format from which on constants need not be inputs.
FREE_INITIALIZERS = 4


@dataclass(frozen=True)
class PartNode:
    """A part of a model, and the operator that computes it.

    Attributes:
        name: of the node.
        inputs, outputs: values of the model.
        shapes, types: of the outputs; None where sizes differ, and ONNX's numbers.
        operator: of the domain ``convgen``; empty before it is known.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    types: tuple[int, ...]
    operator: str = ""

    @classmethod
    def of(cls, part: Sequence[Graph]) -> PartNode:
        """The node of a part, given at each of its sizes, that is not planned yet: planning changes it."""
        first = part[0]
        shapes = []
        for name in first.outputs:
            axes = zip(*(graph.shapes[name] for graph in part), strict=True)
            shapes.append(tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in axes))
        types = tuple(ONNX_TYPES[first.dtype(name)] for name in first.outputs)
        return cls(first.name, tuple(first.inputs), tuple(first.names), tuple(shapes), types)


def rewritten(
    file: ModelFile, dims: Mapping[str, int], parts: Sequence[PartNode], metadata: Mapping[str, str]
) -> ModelProto:
    """The model with one node in place of each part, and without what nothing needs any more.

    Names of inputs and outputs, versions and metadata are the model's. Functions are inlined, sizes that were given
    are written into its inputs, and what was computed from shapes that are known is a constant.

    Args:
        file: the model, of which nothing has been read yet.
        dims: sizes that are written into its inputs.
        metadata: entries that are added to the model's own.

    Raises:
        SpecError: the data of a tensor that stays cannot be read.
    """
    declared = {}
    for value in file.proto.graph.output:
        declared[value.name] = ValueInfoProto()
        declared[value.name].CopyFrom(value)
    (scope, *_), _ = prepare(file, dims)
    model = ModelProto()
    model.CopyFrom(file.proto)
    model.ClearField("graph")
    model.graph.CopyFrom(_Rewriting(file, scope, parts).graph())
    for output in model.graph.output:  # where nothing could be inferred
        if output.type.HasField("tensor_type") and not output.type.tensor_type.HasField("shape"):
            output.CopyFrom(declared[output.name])
    if all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key not in metadata}
    del model.metadata_props[:]
    helper.set_model_props(model, {**kept, **metadata})
    return model


class _Rewriting:
    """Collects from the outputs back what is needed of a graph."""

    def __init__(self, file: ModelFile, scope: Scope, parts: Sequence[PartNode]) -> None:
        self.file, self.scope = file, scope
        self.parts = parts
        self.made = {output: part for part in parts for output in part.outputs}
        self.nodes: dict[str, NodeProto] = {}  # by their first output
        self.maker: dict[str, str] = {}  # value -> the first output of the node that computes it
        self.tensors: dict[str, TensorProto] = {}
        self.sparse: set[str] = set()

    def graph(self) -> GraphProto:
        before, scope = self.scope.graph, self.scope
        waiting, seen = [value.name for value in before.output], set[str]()
        while waiting:
            value = waiting.pop()
            if value not in seen:
                seen.add(value)
                waiting += self._take(value)
        after = GraphProto()
        after.CopyFrom(before)
        for field in ("node", "initializer", "sparse_initializer", "value_info"):
            after.ClearField(field)
        del after.input[:]
        after.input.extend(v for v in before.input if v.name not in scope.tensors or v.name in self.tensors)
        after.node.extend(self._ordered())
        after.initializer.extend(self.tensors.values())
        after.sparse_initializer.extend(t for t in before.sparse_initializer if t.values.name in self.sparse)
        ends = {value.name for value in [*before.input, *before.output]}
        known = {value.name: value for value in before.value_info}
        after.value_info.extend(known[name] for name in sorted(seen - ends) if name in known)
        for part in self.parts:
            for output, shape, dtype in zip(part.outputs, part.shapes, part.types, strict=True):
                if output not in ends and output not in known:
                    after.value_info.append(helper.make_tensor_value_info(output, dtype, shape))
        for tensor in tensors_of(after):
            _restore(self.file, tensor)
        if self.file.proto.ir_version < FREE_INITIALIZERS:
            listed = {value.name for value in after.input}
            after.input.extend(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                for tensor in after.initializer
                if tensor.name not in listed
            )
        return after

    def _take(self, value: str) -> list[str]:
        """Add what computes a value; returns the values that this takes."""
        scope = self.scope
        if (part := self.made.get(value)) is not None:
            node = helper.make_node(part.operator, part.inputs, part.outputs, part.name, domain=DOMAIN)
        elif value in scope.sparse:
            self.sparse.add(value)
            node = None
        elif (constant := self._constant(value)) is not None:
            self.tensors[value] = constant
            return []
        else:
            index = scope.producers.get(value)
            node = scope.nodes[index] if index is not None else None
        if node is None:
            return []
        key = next(filter(None, node.output))
        self.nodes[key] = node
        self.maker |= dict.fromkeys(filter(None, node.output), key)
        return list(names_read(node))

    def _constant(self, value: str) -> TensorProto | None:
        """A constant that is stored, or that is small: it may have been computed from a shape that nothing has now."""
        scope = self.scope
        index = scope.producers.get(value)
        if index is None:
            return scope.tensors.get(value)
        if scope.nodes[index].op_type == "Constant" or not scope.constant(value):
            return None
        try:
            array = scope.value(value)
        except SpecError:
            return None
        return numpy_helper.from_array(np.asarray(array), value) if array.nbytes <= SMALL else None

    def _ordered(self) -> Iterator[NodeProto]:
        needs = {
            key: {self.maker[name] for name in names_read(node) if name in self.maker}
            for key, node in sorted(self.nodes.items(), key=lambda item: self.scope.producers.get(item[0], 0))
        }
        for key in graphlib.TopologicalSorter(needs).static_order():
            yield self.nodes[key]


def _restore(file: ModelFile, tensor: TensorProto) -> None:
    """Give a tensor its data, which is elsewhere so far."""
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor.CopyFrom(numpy_helper.from_array(file.array(tensor), tensor.name))
