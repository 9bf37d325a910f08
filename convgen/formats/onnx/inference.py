"""The shapes and types of an ONNX graph's values, derived from its inputs and constants node by node.

Every node is given to ONNX's inference with what is known of its operands, with the values of small constants where it
asks for them, whatever computes those. What a file stores about values (``value_info``, and the shapes of its outputs)
is often that of another batch or size: it is used only where nothing else tells, and not at all once a part of it
contradicts what is derived.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from ...errors import SpecError
from .constants import MOST_SEEN, ROOTS, SIZED_BY_DATA, is_deterministic
from .contrib import spelled_out
from .file import ModelFile, first_line
from .functions import branch
from .graph import MAX_NODES, Dim, Scope, Shape, bodies, dim_of, static, tensor_type, text

#: Operators that give a weight from an input by moving its elements alone.
_SHAPING = frozenset({"ConstantOfShape", "Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})
_SHAPING |= {"Flatten", "Concat", "Slice", "Expand", "Tile"}
_POOLS = frozenset({"MaxPool", "AveragePool", "LpPool"})
#: Operators whose output is like their first input; ONNX's inference misses that of those that are functions.
_ALIKE = frozenset({"GroupNormalization", "RMSNormalization", "LayerNormalization", "InstanceNormalization"})
_ALIKE |= {"MeanVarianceNormalization"}


def infer(graph: GraphProto, file: ModelFile, opset: int) -> Scope:
    """A graph, sorted, with what can be known of its values, and with those inside its nodes.

    An If whose condition is a constant is replaced by the branch that is taken.

    Raises:
        SpecError: too many nodes.
    """
    walk = _Walk(file, opset, trusting=True)
    scope = walk.graph(graph, None, "", ())
    if walk.relies and walk.contradiction:
        again = _Walk(file, opset, trusting=False)
        again.contradiction = walk.contradiction
        scope = again.graph(graph, None, "", ())
    return scope


class _Walk:
    """Goes through a graph's nodes in order.

    Attributes:
        trusting: whether what the file stores about values is used where nothing else tells.
        relies: whether that was the case.
        contradiction: where what is stored is not what is derived; empty where it is nowhere.
    """

    def __init__(self, file: ModelFile, opset: int, *, trusting: bool) -> None:
        self.file, self.opset, self.trusting = file, opset, trusting
        self.relies, self.contradiction, self.count = False, "", 0

    def graph(self, graph: GraphProto, outer: Scope | None, path: str, given: Sequence[TypeProto]) -> Scope:
        """A graph's scope; ``given`` are the types of its inputs, where what surrounds it tells these."""
        scope = Scope(graph, self.file, self.opset, outer, path)
        stored = {value.name: value.type for value in [*graph.value_info, *graph.output]}
        for position, value in enumerate(graph.input):
            told = given[position] if position < len(given) else TypeProto()
            scope.declare(value.name, self._settled(value.name, told, value.type, True) if outer else value.type)
            if outer is None:
                scope.given.add(value.name)
        for tensor in graph.initializer:
            scope.store(tensor.name, tensor)
        for node in graph.node:
            self._take(scope, node, stored)
        return scope

    def _take(self, scope: Scope, node: NodeProto, stored: dict[str, TypeProto]) -> None:
        self.count += 1
        if self.count > 2 * MAX_NODES:  # twice: bodies of loops may be gone through again
            raise SpecError("graph", f"at most {MAX_NODES} nodes", "more", self.file.where)
        if (taken := self._branch(scope, node)) is not None:
            name, body = taken
            names = {*scope.types, *scope.producers, *stored}
            inner, values = branch(node, body, f"{node.name or node.output[0]}/{name}", names)
            for tensor in body.initializer:
                scope.store(values[tensor.name], tensor)
            stored |= {values[value.name]: value.type for value in body.value_info if value.name in values}
            for own in inner:
                self._take(scope, own, stored)
            return
        rank = len(scope.shape(node.input[0]) or ()) - 2 if node.input else 0
        spelled = spelled_out(node, rank, scope.opset)
        if spelled[0] is not node:
            for own in spelled:
                self._take(scope, own, stored)
            return
        if node.op_type == "Range" and node.domain in ROOTS:
            node = self._of_scalars(scope, node, stored)
        if node.op_type == "Cast" and node.domain in ROOTS and _casts_to_its_own(scope, node):
            node = helper.make_node("Identity", node.input, node.output, node.name)
        scope.add(node)
        if node.op_type == "Constant" and node.domain in ROOTS:
            _store(scope, node)
        derived: Mapping[str, TypeProto] | None = {}
        if not scope.constants.issuperset(node.output):
            derived = self._body_types(scope, node) if bodies(node) else self._types(scope, node)
        known = all(_is_whole(scope.type(name)) for name in node.input if name)
        for name in filter(None, node.output):
            if name in scope.constants:
                continue
            kind = TypeProto()
            if derived is not None:
                kind = self._settled(name, derived.get(name, kind), stored.get(name, kind), known)
            scope.declare(name, kind)
            if not self.trusting and self.contradiction and name in stored and not kind.tensor_type.HasField("shape"):
                scope.reasons.setdefault(name, self.contradiction)
        self._mark(scope, node)

    def _of_scalars(self, scope: Scope, node: NodeProto, stored: dict[str, TypeProto]) -> NodeProto:
        """A Range of scalars: runtimes take vectors of one element too, while they do not know of them beforehand."""
        changed = NodeProto()
        changed.CopyFrom(node)
        for place, name in enumerate(node.input):
            if scope.shape(name) == (1,):
                changed.input[place] = f"{node.output[0]}/scalar{place}"
                squeeze = helper.make_node("Squeeze", [name], [changed.input[place]], changed.input[place])
                self._take(scope, squeeze, stored)
        return changed

    def _branch(self, scope: Scope, node: NodeProto) -> tuple[str, GraphProto] | None:
        """The branch of an If that is always taken."""
        if node.op_type != "If" or node.domain not in ROOTS or not scope.constant(node.input[0]):
            return None
        try:
            taken = bool(scope.value(node.input[0]).reshape(-1)[:1].all())
        except SpecError:
            return None
        name = "then_branch" if taken else "else_branch"
        body = dict(bodies(node)).get(name)
        return None if body is None or body.sparse_initializer or body.input else (name, body)

    def _mark(self, scope: Scope, node: NodeProto) -> None:
        """Say of a node's outputs whether they are constants, or the model's inputs in another shape."""
        if scope.sparse.intersection(node.output) or not node.input:
            return
        if node.domain not in ROOTS:
            self._mark_foreign(scope, node)
            return
        outputs = [name for name in node.output if name and name not in scope.constants]
        if node.op_type in ("Shape", "Size"):
            first, last = (_attribute(node, key) for key in ("start", "end"))
            if (shape := scope.shape(node.input[0])) is not None and static(shape[first:last]):
                scope.constants.update(outputs)
            return
        operands = [name for name in node.input if name]
        if is_deterministic(node) and not scope.drops(node) and all(map(scope.constant, operands)):
            for name in outputs:
                if node.op_type in SIZED_BY_DATA:
                    if scope.small(operands[0]) or scope.type(operands[0]).HasField("sequence_type"):
                        scope.know(name)
                elif static(scope.shape(name)) or scope.type(name).HasField("sequence_type"):
                    scope.constants.add(name)
        elif node.op_type in _SHAPING and all(map(scope.parameter, operands)):
            scope.given.update(outputs)

    def _mark_foreign(self, scope: Scope, node: NodeProto) -> None:
        """Compute what a node of another domain gives of constants, if ONNX Runtime can: nothing else tells shapes."""
        operands = [name for name in node.input if name]
        shapes = [shape for shape in map(scope.shape, operands) if static(shape)]
        if not is_deterministic(node) or not all(map(scope.constant, operands)) or len(shapes) < len(operands):
            return
        if sum(map(math.prod, shapes)) <= MOST_SEEN:
            for name in filter(None, node.output):
                scope.know(name)

    # ---- what is derived ----

    def _types(self, scope: Scope, node: NodeProto) -> Mapping[str, TypeProto] | None:
        """The types of a node's outputs, found without the values of constants if these are not needed; None where its
        operands contradict each other.
        """
        schema = _schema(node.op_type, "" if node.domain in ROOTS else node.domain, self.opset)
        if schema is None or node.domain not in ROOTS:
            return {}
        operands = {name: scope.type(name) for name in node.input if name}
        derived, reason = _inferred(schema, node, operands, {}, self.opset)
        known = derived and all(_is_whole(kind) for kind in derived.values())
        if not known and (values := self._values(scope, node)):
            derived, reason = _inferred(schema, node, operands, values, self.opset)
        if not derived and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            derived = _quantisation(scope, node)
        if reason and not derived and all(map(_is_whole, operands.values())):
            scope.reasons |= dict.fromkeys(filter(None, node.output), reason)
            return None
        return _corrected(scope, node, derived)

    def _values(self, scope: Scope, node: NodeProto) -> dict[str, TensorProto]:
        """The small constants among a node's operands."""
        values = {}
        for name in filter(scope.small, filter(None, node.input)):
            try:
                value = scope.value(name)
            except SpecError as error:
                scope.reasons |= dict.fromkeys(filter(None, node.output), str(error))
                continue
            if value.dtype.kind in "iufb":
                values[name] = numpy_helper.from_array(value, name)
        return values

    def _settled(self, name: str, derived: TypeProto, stored: TypeProto, known: bool) -> TypeProto:
        """What is derived of a value, and what is stored of it where that says nothing.

        Args:
            known: whether what it is computed from is known: else another thing is missing than what is stored.
        """
        if not derived.WhichOneof("value"):
            derived = _bare(stored)
        found, told = _shape(derived), _shape(stored)
        if told is None or not derived.HasField("tensor_type") or not self.trusting:
            return derived
        pairs = list(zip(found or told, told, strict=False))
        if found is not None and len(found) != len(told):
            pairs = [(len(found), len(told))]
        if any(a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int)):
            have = f"{text(told)} where {text(found)} follows"
            wrong = f"the shapes that the file stores are not this graph's: {name!r} has {have}"
            self.contradiction = self.contradiction or wrong
            return derived
        if not known or (found is not None and all(a is not None or b is None for a, b in pairs)):
            return derived
        self.relies = True
        return tensor_type(derived.tensor_type.elem_type, [b if a is None else a for a, b in pairs])

    # ---- nodes with graphs inside ----

    def _body_types(self, scope: Scope, node: NodeProto) -> Mapping[str, TypeProto]:
        """Goes through the graphs inside a node; the types of its outputs."""
        path = scope.name(node)
        if node.domain in ROOTS and node.op_type == "Loop":
            return self._loop(scope, node, f"{path}/body/")
        given: list[TypeProto] = []
        if node.domain in ROOTS and node.op_type == "Scan":
            given = _scanned(scope, node)
        inner = [self.graph(body, scope, f"{path}/{name}/", given) for name, body in bodies(node)]
        scope.inner += inner
        if node.domain in ROOTS and node.op_type == "If" and len(inner) == 2:
            results = [[branch.type(value.name) for value in branch.graph.output] for branch in inner]
            return dict(zip(node.output, map(_common, *results), strict=False))
        if given:
            return dict(zip(node.output, self._scan_results(scope, node, inner[0]), strict=False))
        return {}

    def _loop(self, scope: Scope, node: NodeProto, path: str) -> Mapping[str, TypeProto]:
        """A Loop, whose turns may change the shapes of what they carry: first it is supposed that they do not."""
        body = dict(bodies(node)).get("body", GraphProto())
        carried = [scope.type(name) for name in node.input[2:]]
        counts = [tensor_type(TensorProto.INT64, ()), tensor_type(TensorProto.BOOL, ())]
        before = self.relies, self.contradiction
        inner = self.graph(body, scope, path, [*counts, *carried])
        results = [inner.type(value.name) for value in body.output[1:]]
        if any(_shape(one) != _shape(other) for one, other in zip(carried, results, strict=False)):
            self.relies, self.contradiction = before
            carried = list(map(_bare, carried))
            trusting, self.trusting = self.trusting, False
            inner = self.graph(body, scope, path, [*counts, *carried])
            self.trusting = trusting
            results = [*carried, *(inner.type(value.name) for value in body.output[1 + len(carried) :])]
        scope.inner.append(inner)
        kept = len(carried)
        gathered = [_with_axis(kind, 0, None) for kind in results[kept:]]
        return dict(zip(node.output, [*results[:kept], *gathered], strict=False))

    def _scan_results(self, scope: Scope, node: NodeProto, inner: Scope) -> Iterator[TypeProto]:
        count = int(_attribute(node, "num_scan_inputs") or 0)
        states = len(node.input) - count
        axes = _attribute(node, "scan_output_axes") or []
        lengths = _attribute(node, "scan_input_axes") or [0] * count
        first = scope.shape(node.input[states]) if count else None
        length = first[lengths[0]] if first and lengths and -len(first) <= lengths[0] < len(first) else None
        for position, value in enumerate(inner.graph.output):
            kind = inner.type(value.name)
            place = position - states
            yield kind if place < 0 else _with_axis(kind, axes[place] if place < len(axes) else 0, length)


def _scanned(scope: Scope, node: NodeProto) -> list[TypeProto]:
    """What the body of a Scan is given: the states, and a slice of each operand that is scanned."""
    count = int(_attribute(node, "num_scan_inputs") or 0)
    axes = _attribute(node, "scan_input_axes") or [0] * count
    states = len(node.input) - count
    if scope.opset < 9 or count < 1 or states < 0 or len(axes) != count:  # 8 has a batch, and another first input
        return []
    given = [scope.type(name) for name in node.input[:states]]
    for name, axis in zip(node.input[states:], axes, strict=True):
        kind, shape = scope.type(name), scope.shape(name)
        if shape is None or not -len(shape) <= axis < len(shape):
            given.append(_bare(kind))
            continue
        axis %= len(shape)
        given.append(tensor_type(kind.tensor_type.elem_type, [*shape[:axis], *shape[axis + 1 :]]))
    return given


def _common(first: TypeProto, second: TypeProto) -> TypeProto:
    """What is known of a value that has one type or the other."""
    one, other = _shape(first), _shape(second)
    if first.WhichOneof("value") != second.WhichOneof("value"):
        return TypeProto()
    if not first.HasField("tensor_type"):
        return first if first == second else TypeProto()
    if first.tensor_type.elem_type != second.tensor_type.elem_type:
        return TypeProto()
    if one is None or other is None or len(one) != len(other):
        return _bare(first)
    sizes = [a if a == b else None for a, b in zip(one, other, strict=True)]
    return tensor_type(first.tensor_type.elem_type, sizes)


def _with_axis(kind: TypeProto, axis: int, size: Dim) -> TypeProto:
    shape = _shape(kind)
    if shape is None:
        return _bare(kind)
    axis = axis % (len(shape) + 1)
    return tensor_type(kind.tensor_type.elem_type, [*shape[:axis], size, *shape[axis:]])


def _bare(kind: TypeProto) -> TypeProto:
    """A type without its shape."""
    bare = TypeProto()
    bare.CopyFrom(kind)
    if bare.HasField("tensor_type"):
        bare.tensor_type.ClearField("shape")
    return bare


# ---- one node ---------------------------------------------------------------------------------


@cache
def _schema(operator: str, domain: str, opset: int) -> Any:
    """What ONNX says of an operator; None of an unknown one."""
    try:
        return onnx.defs.get_schema(operator, opset, domain)
    except (onnx.defs.SchemaError, OverflowError, TypeError):  # the latter two: not an opset's number
        return None


def least_inputs(node: NodeProto, opset: int) -> int:
    """How many inputs a node has at least; 0 for one of an unknown operator."""
    schema = _schema(node.op_type, "", opset) if node.domain in ROOTS else None
    return int(schema.min_input) if schema else 0


#: What ONNX's inference raises where a node makes no sense.
_FAILURES: tuple[type[Exception], ...] = (onnx.shape_inference.InferenceError, onnx.checker.ValidationError)
_FAILURES += (DecodeError, RuntimeError, ValueError, KeyError)


def _inferred(
    schema: Any, node: NodeProto, operands: dict[str, TypeProto], values: dict[str, TensorProto], opset: int
) -> tuple[dict[str, TypeProto], str]:
    """The types of a node's outputs, and why there are none."""
    try:
        opsets = [helper.make_opsetid("", opset)]
        return onnx.shape_inference.infer_node_outputs(schema, node, operands, values, opset_imports=opsets), ""
    except _FAILURES as error:
        return {}, first_line(error)


def _corrected(scope: Scope, node: NodeProto, derived: dict[str, TypeProto]) -> Mapping[str, TypeProto]:
    """What ONNX's inference misses, or gets wrong: normalisation keeps the shape, which is not found where an operator
    is a function that asks for its input's; a window of pooling with ``ceil_mode`` that would begin in the padding
    after the tensor is left out by ONNX Runtime and PyTorch; and ``SAME_*`` gives a ConvTranspose's size whatever the
    padding of its output. ONNX says so too, but infers sizes with the one and the other.
    """
    given, output = scope.type(node.input[0]) if node.input else TypeProto(), node.output[0]
    shape, out = _shape(given), _shape(derived.get(output, TypeProto()))
    if node.op_type in _ALIKE and out is None and shape is not None:
        return derived | {output: given}
    if out is not None and (taken := _padded_twice(scope, node)):
        right = [size - more if isinstance(size, int) else size for size, more in zip(out[2:], taken, strict=False)]
        return derived | {output: tensor_type(derived[output].tensor_type.elem_type, [*out[:2], *right])}
    if node.op_type not in _POOLS or shape is None or out is None or len(shape) != len(out):
        return derived
    if not _attribute(node, "ceil_mode") or (_attribute(node, "auto_pad") or b"NOTSET") != b"NOTSET":
        return derived
    sizes, counts = shape[2:], out[2:]
    begins, strides = (
        _attribute(node, name) or [default] * len(sizes) for name, default in (("pads", 0), ("strides", 1))
    )
    kept: list[Dim] = list(out[:2])
    for count, size, stride, begin in zip(counts, sizes, strides, begins, strict=False):
        known = isinstance(count, int) and isinstance(size, int)
        kept.append(count - ((count - 1) * stride >= size + begin) if known else count)  # type: ignore[operator]
    kinds = [tensor_type(derived[name].tensor_type.elem_type, kept) for name in node.output if name in derived]
    return derived | dict(zip([name for name in node.output if name in derived], kinds, strict=True))


def _quantisation(scope: Scope, node: NodeProto) -> dict[str, TypeProto]:
    """What QuantizeLinear and DequantizeLinear give that are of types which ONNX has since later versions than the
    model's: ONNX Runtime's own operators of these names have them in all.
    """
    source, *others = node.input
    of = others[1:] if node.op_type == "QuantizeLinear" else others[:1]
    shape, dtypes = scope.shape(source), [scope.dtype(name) for name in of if name]
    return {node.output[0]: tensor_type(dtypes[0], shape)} if dtypes and dtypes[0] and static(shape) else {}


def _padded_twice(scope: Scope, node: NodeProto) -> list[int]:
    """How much of a ConvTranspose's output padding ``SAME_*`` takes away on each axis, which ONNX leaves there; none of
    other nodes.
    """
    added, wanted, strides, dilations, kernel = (
        next((list(a.ints) for a in node.attribute if a.name == name), [])  # empty where a file has another type
        for name in ("output_padding", "output_shape", "strides", "dilations", "kernel_shape")
    )
    is_same = next((a.s for a in node.attribute if a.name == "auto_pad"), b"").startswith(b"SAME")
    shape = scope.shape(node.input[1]) if len(node.input) > 1 else None
    if node.op_type != "ConvTranspose" or not added or wanted or not is_same or not static(shape):
        return []
    ones = [1] * len(added)
    windows = zip(kernel or shape[2:], strides or ones, dilations or ones, strict=False)
    gaps = [(k - 1) * d + 1 - s for k, s, d in windows]
    return [max(0, gap + more) - max(0, gap) for gap, more in zip(gaps, added, strict=False)]


def _casts_to_its_own(scope: Scope, node: NodeProto) -> bool:
    """Whether a Cast changes nothing, as PyTorch's exporter writes them between QuantizeLinear and DequantizeLinear."""
    wanted = next((a.i for a in node.attribute if a.name == "to"), TensorProto.UNDEFINED)
    return bool(node.input) and wanted != TensorProto.UNDEFINED and scope.dtype(node.input[0]) == wanted


def _store(scope: Scope, node: NodeProto) -> None:
    """The value of a Constant node; text has none here."""
    for a in node.attribute:
        name = node.output[0]
        if a.type == AttributeProto.SPARSE_TENSOR:
            scope.sparse.add(name)
        elif a.type == AttributeProto.TENSOR:
            scope.store(name, a.t)
        elif a.type in (AttributeProto.FLOAT, AttributeProto.FLOATS):
            scope.store(name, numpy_helper.from_array(np.array(helper.get_attribute_value(a), np.float32)))
        elif a.type in (AttributeProto.INT, AttributeProto.INTS):
            scope.store(name, numpy_helper.from_array(np.array(helper.get_attribute_value(a), np.int64)))


def _attribute(node: NodeProto, name: str) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def _is_whole(kind: TypeProto) -> bool:
    """Whether a type says everything."""
    return static(_shape(kind)) if kind.HasField("tensor_type") else kind.WhichOneof("value") is not None


def _shape(kind: TypeProto) -> Shape | None:
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    return tuple(map(dim_of, kind.tensor_type.shape.dim))
