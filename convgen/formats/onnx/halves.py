"""Models of f16 and bf16 read as f32: every value of these types is one of f32, and what computes computes in f32.

So ONNX Runtime runs them on processors: what it has for f32 alone, which is nearly all, it computes in f32. It rounds
what these nodes give; here only the model's casts round, and what it gives in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    helper,
    numpy_helper,
)

from ...errors import SpecError
from .file import CONTRADICTIONS, STORED, ModelFile, first_line
from .graph import bodies, graphs_of, tensors_of

#: ONNX's numbers of the types that have half the bytes of f32, and how such tensors are stored.
HALVES = {TensorProto.FLOAT16: "f16", TensorProto.BFLOAT16: "bf16"}
#: Attributes that are numbers of types.
_TYPED = ("to", "dtype", "output_dtype", "stash_type")


def widen_halves(model: ModelProto) -> bool:
    """Make all of a model's values of f16 and bf16 ones of f32, in place; whether there were any.

    Args:
        model: with tensors as :class:`~convgen.formats.onnx.file.ModelFile` has them: what is large refers to its data,
            and is widened when it is read.

    Raises:
        SpecError: a tensor's data is not that of its shape.
    """
    graphs = list(_graphs(model))
    every = [*graphs, *model.functions]
    found = [_widen_type(value.type) for graph in graphs for value in (*graph.input, *graph.output, *graph.value_info)]
    for tensor in [tensor for graph in (model.graph, *model.functions) for tensor in tensors_of(graph)]:
        if tensor.data_type in HALVES:
            found.append(True)
            _widen_tensor(tensor)
    for graph in every:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in _TYPED and attribute.type == AttributeProto.INT and attribute.i in HALVES:
                    found.append(True)
                    if node.op_type != "Cast":
                        attribute.i = TensorProto.FLOAT
    if any(found):
        taken = {name for graph in every for node in graph.node for name in node.output}
        for graph in every:
            _keep_casts(graph, taken)
    return any(found)


def _keep_casts(graph: GraphProto | FunctionProto, taken: set[str]) -> None:
    """A cast to f16 or bf16 rounds, whatever it is given: it is followed by one to f32."""
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Cast" and any(a.name == "to" and a.i in HALVES for a in node.attribute):
            output, rounded = node.output[0], f"{node.output[0]}/rounded"
            while rounded in taken:
                rounded += "'"
            taken.add(rounded)
            node.output[0] = rounded
            nodes.append(helper.make_node("Cast", [rounded], [output], f"{node.name}/f32", to=TensorProto.FLOAT))
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def as_f32(source: str | Path | ModelProto) -> ModelProto | None:
    """A model whose values of f16 and bf16 are f32, its data included; None where it has none of these."""
    model = ModelProto()
    if isinstance(source, ModelProto):
        model.CopyFrom(source)
        return model if widen_halves(model) else None
    with ModelFile(source) as file:  # without the data, which most models need not be read for
        if not widen_halves(file.proto):
            return None
    model = onnx.load(source)
    widen_halves(model)
    return model


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    """All of them, those inside of nodes and functions too."""
    yield from graphs_of(model.graph)
    for function in model.functions:
        for node in function.node:
            for _, body in bodies(node):
                yield from graphs_of(body)


def _widen_type(kind: TypeProto) -> bool:
    """A type of tensors, sequences or optional values."""
    which = kind.WhichOneof("value")
    if which in ("sequence_type", "optional_type"):
        return _widen_type(getattr(kind, which).elem_type)
    if which not in ("tensor_type", "sparse_tensor_type") or getattr(kind, which).elem_type not in HALVES:
        return False
    getattr(kind, which).elem_type = TensorProto.FLOAT
    return True


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor.external_data.add(key=STORED, value=str(tensor.data_type))
        tensor.data_type = TensorProto.FLOAT
        return
    try:
        array = np.asarray(numpy_helper.to_array(tensor), np.float32)
    except CONTRADICTIONS as error:
        where = f"tensor {tensor.name!r}"
        raise SpecError("data", "that of its shape and dtype", first_line(error), where) from error
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
