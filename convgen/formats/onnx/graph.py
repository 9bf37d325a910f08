"""ONNX graphs made ready for questions: functions inlined, shapes inferred, constants known.

:func:`prepare` gives a model's graph and those inside its If, Loop and Scan nodes, each as a :class:`Scope`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain, repeat
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TensorShapeProto,
    helper,
    numpy_helper,
)

from ...errors import SpecError
from .contrib import spell_out
from .file import SMALL, ModelFile, first_line
from .inference import correct_shapes

#: A dimension: a size, a symbol, or None where nothing is known.
Dim = int | str | None
Shape = tuple[Dim, ...]
Array = npt.NDArray[Any]

ROOTS = frozenset({"", "ai.onnx"})  # the two spellings of ONNX's own operator domain
MAX_NODES, MAX_CALLS = 250_000, 100  # limits of inlining: nodes in all, depth of nested calls
MAX_ELEMENTS, MAX_STEPS = 1 << 28, 256  # limits of a constant that is computed: elements, nodes

#: Operators that give a constant for constants, in time and memory of their output.
_FOLDED = {"ConstantOfShape", "Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze"}
_FOLDED |= {"Flatten", "Concat", "Slice", "Gather", "Expand", "Tile", "DequantizeLinear"}
_SHAPING = frozenset(_FOLDED - {"Gather", "DequantizeLinear"})
_FOLDED |= {"QuantizeLinear"}
_FOLDED |= {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt", "Reciprocal", "Pow", "Exp"}
_FOLDED |= {"Floor", "Ceil", "Max", "Min", "Mod", "Equal", "Where"}


# ---- a model whose shapes are known -----------------------------------------------------------


def prepare(file: ModelFile, dims: Mapping[str, int]) -> tuple[list[Scope], list[str]]:
    """The model's graph and those inside it, functions inlined and shapes inferred; and symbols without a size.

    Raises:
        SpecError: a graph that is not one: functions that call themselves, values computed twice or used
            before they are computed, shapes that contradict each other, an unknown symbol in ``dims``.
    """
    model, where = file.proto, file.where
    _check_text(model, where)
    if model.functions:
        _inline(model, where)
    spell_out(model)
    opset = max((o.version for o in model.opset_import if o.domain in ROOTS), default=1)
    _check_graph(model.graph, (), opset, where)
    left = _set_dims(model.graph, dict(dims), where)
    _keep_small(file, model.graph)
    given = {value.name: value for value in model.graph.input}
    for output in model.graph.output:  # what is declared there is often another batch
        output.type.tensor_type.ClearField("shape")
        if output.name in given:
            output.type.CopyFrom(given[output.name].type)
    return _carried(*_inferred(file, model)), left


def _inferred(file: ModelFile, model: ModelProto) -> tuple[ModelProto, list[Scope]]:
    """The model with the shapes of its values.

    Where an operator's output depends on the value of a constant that shape inference does not compute
    (the pads of a Pad, for one), it is computed here and inference is repeated; and where it counts windows that are
    none.
    """
    while True:
        try:
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except (onnx.shape_inference.InferenceError, DecodeError, RuntimeError, ValueError) as error:
            expected = "a graph whose shapes can be inferred"
            raise SpecError("model", expected, first_line(error), file.where) from error
        found = list(_scopes(model.graph, file, None, ""))
        if not sum(scope.store_sizes() + correct_shapes(scope.graph, scope.shape, scope.dtype) for scope in found):
            return model, found


def _carried(model: ModelProto, found: list[Scope]) -> list[Scope]:
    """The graphs with the shapes of what Loops carry.

    Shape inference leaves them open, as each turn may change them. They are tried with the shapes of
    what is passed in, which holds if the body then gives back the same.
    """
    file = found[0].file
    while sum(scope.enter_loops() for scope in found):
        try:
            model, tried = _inferred(file, model)
        except SpecError:
            break
        if any(before != after for scope in tried for before, after in scope.turns()):
            break
        found = tried
    return found


def bodies(node: NodeProto) -> list[tuple[str, GraphProto]]:
    """The graphs inside a node, by the name of their attribute."""
    return [
        (attribute.name, body)
        for attribute in node.attribute
        for body in ([attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs)
    ]


def _graphs(graph: GraphProto | FunctionProto) -> Iterator[GraphProto]:
    """A graph (or function) and all graphs inside it."""
    yield graph
    for node in graph.node:
        for _, body in bodies(node):
            yield from _graphs(body)


def _check_text(model: ModelProto, where: str) -> None:
    """Protobuf returns bytes for text that is not UTF-8."""
    for node in [node for part in (model.graph, *model.functions) for graph in _graphs(part) for node in graph.node]:
        names = (node.op_type, node.domain, node.name, *node.input, *node.output, *(a.name for a in node.attribute))
        if not all(isinstance(name, str) for name in names):
            raise SpecError("file", "an ONNX model", "a name that is not UTF-8", where)
        if not node.op_type.isidentifier() or not node.output:
            raise SpecError("file", "an ONNX model", f"a node {node.op_type!r} with {len(node.output)} outputs", where)


@cache
def _least_inputs(operator: str, opset: int) -> int:
    """How many inputs an operator of ONNX has at least; 0 for an unknown one."""
    try:
        least: int = onnx.defs.get_schema(operator, opset, "").min_input
    except (onnx.defs.SchemaError, OverflowError, TypeError):  # the latter two: not an opset's number
        return 0
    return least


def _check_graph(graph: GraphProto, outer: tuple[set[str], ...], opset: int, where: str) -> None:
    """Every operand is there; every value is computed once, and before it is used: that leaves no cycles.

    ``outer`` holds the values of each surrounding graph, which a graph inside may use.
    """
    stored = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    known = stored | {value.name for value in graph.input}
    around = (known, *outer)
    for node in graph.node:
        if node.domain in ROOTS and len(node.input) < (least := _least_inputs(node.op_type, opset)):
            found = f"{len(node.input)} of {(node.name or node.output[0])!r}"
            raise SpecError(f"inputs of {node.op_type}", f"at least {least}", found, where)
        if any(attribute.ref_attr_name for attribute in node.attribute):
            raise SpecError("attribute", "a value outside of functions", "a reference", where)
        for name in filter(None, node.input):
            if not any(name in values for values in around):
                found = f"{node.op_type} {(node.name or node.output[0])!r} before it is computed, or never is"
                raise SpecError(f"value {name!r}", "a use after it is computed", found, where)
        for _, body in bodies(node):
            _check_graph(body, around, opset, where)
        for name in filter(None, node.output):
            if name in known:
                raise SpecError(f"value {name!r}", "one node that computes it", "another one", where)
            known.add(name)


def _set_dims(graph: GraphProto, dims: dict[str, int], where: str) -> list[str]:
    """Write the given sizes into the graph; returns the input dimensions left without one."""
    stored = {tensor.name for tensor in graph.initializer}
    known: dict[str, None] = {}
    left: dict[str, None] = {}
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if value.name in stored or (dim.HasField("dim_value") and dim.dim_value >= 0):
                continue  # a negative size is an unknown one of old exporters
            symbol = str(dim.dim_param) or f"{value.name}[{axis}]"
            known[symbol] = None
            if symbol in dims:
                dim.dim_value = dims[symbol]
            else:
                left[symbol] = None
                dim.dim_param = symbol
    for name in dims:
        if name not in known:
            raise SpecError("dims", f"names among {', '.join(map(printable, known)) or 'none'}", repr(name), where)
    for inside in _graphs(graph):
        for value in [*inside.input, *inside.value_info, *inside.output]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in dims:
                    dim.dim_value = dims[dim.dim_param]
    return list(left)


def _keep_small(file: ModelFile, graph: GraphProto) -> None:
    """Put small external tensors into the graph: shape inference wants the values of some."""
    for inside in _graphs(graph):
        values = [a.t for node in inside.node if node.op_type == "Constant" for a in node.attribute]
        for tensor in [*inside.initializer, *values]:
            if tensor.data_location != TensorProto.EXTERNAL or math.prod(tensor.dims) * 8 > SMALL:
                continue
            name = tensor.name
            try:
                tensor.CopyFrom(numpy_helper.from_array(file.array(tensor), name))
            except SpecError as error:
                if not isinstance(error.__cause__, FileNotFoundError) and file.folder is not None:
                    raise


# ---- functions --------------------------------------------------------------------------------


def _inline(model: ModelProto, where: str) -> None:
    """Replace the calls of the model's own functions by their nodes, whose names get the call's in front."""
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
            copy = NodeProto()
            copy.CopyFrom(inner)
            _rename(copy, values, mark)
            copy.name = f"{path}/{copy.name}"
            _bind(copy, attributes)
            yield from self._expanded(copy, (*callers, name))


def _rename(node: NodeProto, values: Mapping[str, str], mark: str) -> None:
    """Values of a function under the names that the call gives them, or under ones of their own."""

    def name(inner: str) -> str:
        return values.get(inner, f"{mark}/{inner}") if inner else ""

    node.name = node.name or next(filter(None, node.output), "")
    node.input[:] = list(map(name, node.input))
    node.output[:] = list(map(name, node.output))
    for _, body in bodies(node):
        for value in [*body.input, *body.output, *body.value_info, *body.initializer]:
            value.name = name(value.name)
        for inner in body.node:
            _rename(inner, values, mark)


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


# ---- one graph and what surrounds it ----------------------------------------------------------


def _scopes(graph: GraphProto, file: ModelFile, outer: Scope | None, path: str, loop: bool = False) -> Iterator[Scope]:
    """A graph and, recursively, those inside its nodes."""
    this = Scope(graph, file, outer, path, loop)
    yield this
    for node in graph.node:
        for attribute, body in bodies(node):
            yield from _scopes(body, file, this, f"{this.name(node)}/{attribute}/", node.op_type == "Loop")


class Scope:
    """The values of one graph: shapes, dtypes, who uses them, which are constants."""

    def __init__(self, graph: GraphProto, file: ModelFile, outer: Scope | None, path: str, loop: bool) -> None:
        self.graph, self.file, self.outer, self.path, self.loop = graph, file, outer, path, loop
        self.nodes: list[NodeProto] = list(graph.node)
        self._shapes: dict[str, Shape | None] = {}
        self._dtypes: dict[str, int] = {}
        self.tensors: dict[str, TensorProto] = {}
        for value in [*graph.input, *graph.output, *graph.value_info]:
            tensor = value.type.tensor_type
            self._dtypes[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self._shapes[value.name] = tuple(_dim(d) for d in tensor.shape.dim)
            else:
                self._shapes.setdefault(value.name, None)
        for constant in graph.initializer:
            self._shapes[constant.name], self._dtypes[constant.name] = tuple(constant.dims), constant.data_type
            self.tensors[constant.name] = constant
        self.sparse = {sparse.values.name for sparse in graph.sparse_initializer}
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self.producers: dict[str, int] = {}
        self.users: dict[str, set[int]] = defaultdict(set)
        for index, node in enumerate(self.nodes):
            for name in _names_used(node):
                self.users[name].add(index)
            self.producers.update((name, index) for name in node.output if name)
            if node.op_type == "Constant" and node.domain in ROOTS:
                self._store(node)
        self._constants: set[str] = set(self.tensors)
        self._parameters: set[str] = set() if outer else set(self.inputs)
        for node in self.nodes:
            if self._folds(node):
                self._constants.update(filter(None, node.output))
            elif self._reshapes(node):
                self._parameters.update(filter(None, node.output))

    def _store(self, node: NodeProto) -> None:
        """The value of a Constant node; text has none here."""
        for a in node.attribute:
            if a.type == AttributeProto.SPARSE_TENSOR:
                self.sparse.add(node.output[0])
            elif a.type == AttributeProto.TENSOR:
                self.tensors[node.output[0]] = a.t
            elif a.type in (AttributeProto.FLOAT, AttributeProto.FLOATS):
                value = np.array(a.f if a.type == AttributeProto.FLOAT else a.floats, np.float32)
                self.tensors[node.output[0]] = numpy_helper.from_array(value)
            elif a.type in (AttributeProto.INT, AttributeProto.INTS):
                value = np.array(a.i if a.type == AttributeProto.INT else a.ints, np.int64)
                self.tensors[node.output[0]] = numpy_helper.from_array(value)

    def _folds(self, node: NodeProto) -> bool:
        if node.domain not in ROOTS or self.sparse.intersection(node.output):
            return False
        if node.op_type == "Shape":
            return static(self.shape(node.input[0]))
        return node.op_type in _FOLDED and all(self.constant(name) for name in node.input if name)

    def _reshapes(self, node: NodeProto) -> bool:
        known = node.op_type in _SHAPING and node.domain in ROOTS
        return known and all(self.parameter(name) for name in node.input if name)

    def name(self, node: NodeProto) -> str:
        """A node's name, or its first output's; inside others with the path to it."""
        name: str = node.name or next(filter(None, node.output), node.op_type)
        return self.path + name

    def owner(self, name: str) -> Scope | None:
        """The graph that a value belongs to: this one or one around it."""
        scope: Scope | None = self
        while scope and name not in scope._shapes and name not in scope.producers and name not in scope.sparse:
            scope = scope.outer
        return scope

    def shape(self, name: str) -> Shape | None:
        owner = self.owner(name)
        return owner._shapes.get(name) if owner else None

    def dtype(self, name: str) -> int:
        owner = self.owner(name)
        return owner._dtypes.get(name, 0) if owner else 0

    def constant(self, name: str) -> bool:
        """Whether the value is stored in the model, or computed from what is."""
        owner = self.owner(name)
        return owner is not None and name in owner._constants

    def parameter(self, name: str) -> bool:
        """Whether the value is a constant or an input of the model, reshaped or not."""
        owner = self.owner(name)
        return owner is not None and (name in owner._constants or name in owner._parameters)

    def enter_loops(self) -> int:
        """Write the shapes of what is passed to Loops into their bodies; how many there were."""
        new = 0
        for node in self.nodes:
            for _, body in bodies(node) if node.op_type == "Loop" and node.domain in ROOTS else ():
                for value, given in zip(body.input[2:], node.input[2:], strict=False):
                    shape, kind = self.shape(given), value.type.tensor_type
                    if not kind.HasField("shape") and static(shape):
                        kind.elem_type = self.dtype(given)
                        kind.shape.SetInParent()  # of a scalar, too
                        kind.shape.dim.extend(TensorShapeProto.Dimension(dim_value=size) for size in shape or ())
                        new += 1
        return new

    def turns(self) -> Iterator[tuple[Shape | None, Shape | None]]:
        """The shapes of what the body of a Loop gets and gives back, where the former is known."""
        for before, after in zip(self.graph.input[2:], self.graph.output[1:], strict=False) if self.loop else ():
            if before.type.tensor_type.HasField("shape"):
                yield self.shape(before.name), self.shape(after.name)

    def store_sizes(self) -> int:
        """Store small constants that are computed for nodes whose output has no shape; how many there were."""
        new = 0
        for node in self.nodes:
            if all(static(self.shape(name)) for name in node.output if name):
                continue
            for index, name in enumerate(node.input):
                owner = self.owner(name)
                small = math.prod(shape) * 8 <= SMALL if static(shape := self.shape(name)) and shape else False
                if owner is None or name in owner.tensors or not self.constant(name) or not small:
                    continue
                try:
                    value = self.value(name)
                except SpecError:
                    continue
                if value.dtype.kind not in "iufb":
                    continue
                node.input[index] = f"{name} of {self.path}{node.output[0]}[{index}]"
                self.graph.initializer.append(numpy_helper.from_array(value, node.input[index]))
                new += 1
        return new

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

    def value(self, name: str) -> Array:
        """The elements of a constant.

        Raises:
            SpecError: they cannot be read or computed, or are too many.
        """
        owner = self.owner(name)
        if owner is None or name not in owner._constants:
            raise SpecError(f"value {name!r}", "a constant", "another value", self.file.where)
        value = self.file.array(owner.tensors[name]) if name in owner.tensors else owner._computed(name)
        if value.shape != owner._shapes.get(name):
            found = f"{text(value.shape)}, not {text(owner._shapes.get(name))}"
            raise SpecError(f"value {name!r}", "the shape it is declared with", found, self.file.where)
        return value

    def _computed(self, name: str) -> Array:
        wanted, elements = [name], 0
        needed: set[int] = set()
        leaves: dict[str, Array] = {}
        while wanted:
            at = wanted.pop()
            index = self.producers.get(at)
            if index is None or at in self.tensors:  # it is stored, or belongs to a surrounding graph
                leaves[at] = self.value(at) if at not in leaves else leaves[at]
            elif self.nodes[index].op_type == "Shape":
                leaves[at] = self._shape_of(self.nodes[index])
            elif index not in needed:
                needed.add(index)
                elements += self._size(self.nodes[index])
                if elements > MAX_ELEMENTS or len(needed) > MAX_STEPS:
                    expected = f"a constant of at most {MAX_ELEMENTS} elements, from {MAX_STEPS} nodes"
                    raise SpecError(f"value {name!r}", expected, "more", self.file.where)
                wanted += [i for i in self.nodes[index].input if i]
        return _evaluate([self.nodes[i] for i in sorted(needed)], leaves, name, self.file)

    def _shape_of(self, node: NodeProto) -> Array:
        shape = self.shape(node.input[0]) or ()
        start, end = (next((a.i for a in node.attribute if a.name == key), None) for key in ("start", "end"))
        return np.array(shape[start:end], np.int64)

    def _size(self, node: NodeProto) -> int:
        """Elements of a node's outputs."""
        size = 0
        for output in filter(None, node.output):
            shape = self.shape(output)
            if not static(shape):
                raise SpecError(f"value {output!r}", "a constant of known shape", text(shape), self.file.where)
            size += math.prod(shape)
        return size


def _dim(dim: Any) -> Dim:
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


def _evaluate(nodes: list[NodeProto], leaves: Mapping[str, Array], wanted: str, file: ModelFile) -> Array:
    """What ONNX's reference implementation computes."""
    from onnx.reference import ReferenceEvaluator  # only where there is something to compute

    inputs = [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in leaves]
    outputs = [helper.make_tensor_value_info(wanted, TensorProto.UNDEFINED, None)]
    graph = helper.make_graph(nodes, "constants", inputs, outputs)
    version = next((o.version for o in file.proto.opset_import if o.domain in ROOTS), 1)
    if 13 <= version < 19:  # nothing that is folded changed its meaning, and the evaluator has DequantizeLinear
        version = 19
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    try:
        with np.errstate(all="ignore"):
            (value,) = ReferenceEvaluator(model).run(None, dict(leaves))
    except Exception as error:  # the evaluator raises whatever NumPy or its own code happens to
        expected = "a constant that can be computed"
        raise SpecError(f"value {wanted!r}", expected, first_line(error), file.where) from error
    return np.asarray(value)
