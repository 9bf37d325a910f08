"""One convolution of an ONNX graph with what can be folded into it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, NodeProto, TensorProto, helper

from ...errors import SpecError, UnsupportedError
from ...problem.dtypes import UNIT_ROUNDOFF, narrow
from ...problem.spec import ConvSpec
from ..onnx import algebra
from .algebra import Expr, NoExpressionError, X, number
from .constants import ROOTS
from .graph import Array, Scope, static, text
from .node import convolution_fields

F64 = npt.NDArray[np.float64]

_DTYPES = {TensorProto.FLOAT: "f32", TensorProto.FLOAT16: "f16", TensorProto.BFLOAT16: "bf16"}
_F32_MAX = (2 - 2**-23) * 2.0**127
_MAX_OPERANDS = 5  # of a node that is folded: BatchNormalization has them
_MAX_REGION = 16  # nodes of an activation; the longest one that exporters spell has 9


class Reader(Protocol):
    """What reads the convolutions of one graph.

    Attributes:
        scope: the graph.
        unknown: symbols of its inputs' shapes without a size.
        folds: whether what follows convolutions is folded into them.
        where: the model's path.
        taken: outputs of additions that are some convolution's residual.
    """

    scope: Scope
    unknown: list[str]
    folds: bool
    where: str
    taken: set[str]

    def lost(self, name: str) -> str:
        """Names, for a message, the node after which shapes are unknown although those of its inputs are known."""


class Fold:
    """One convolution: its spec, and the scales and shifts that its arrays take in.

    Attributes: ``src``, ``dst`` and ``residual`` name the values that the spec's tensors are.
    """

    def __init__(self, reader: Reader, node: NodeProto, where: str) -> None:
        self.reader, self.scope, self.where, self.node = reader, reader.scope, where, node
        self.dtype = next(iter(_DTYPES.values()))
        self.residual = self.slope = ""
        self.steps: list[tuple[NodeProto, str]] = []  # a scale and shift per channel, and the value it is of
        self.src, self.weights, self.bias = self._operands(node)
        self.parameters = [name for name in (self.weights, self.bias) if name]
        self.dst = node.output[0]
        self.spec = self._convolution()
        if reader.folds:
            self._take_padding()
            self._take_what_follows()

    # ---- the node itself ----

    def _operands(self, node: NodeProto) -> tuple[str, str, str]:
        """The names of src, weights and bias."""
        return node.input[0], node.input[1], node.input[2] if len(node.input) > 2 else ""

    def _convolution(self) -> ConvSpec:
        weights = self._shape("weights", self.weights)
        src, bias = self._shape("src", self.src), bool(self.bias)
        fields = convolution_fields(self.node.op_type, attributes_of(self.node), src, weights, bias, self.where)
        spec = ConvSpec(**fields, dtype=self.dtype)
        if bias and (shape := self._bias_shape()) != (spec.oc,):
            raise SpecError("bias", f"shape [{spec.oc}]", text(shape))
        return spec

    def _bias_shape(self) -> Any:
        return self._shape("bias", self.bias)

    def _shape(self, what: str, name: str) -> tuple[int, ...]:
        """The shape of an operand, whose dtype becomes the spec's.

        Raises:
            SpecError: it is not known; names the dimensions of the inputs that are missing.
            UnsupportedError: a dtype that specs do not have, or a sparse tensor.
        """
        owner = self.scope.owner(name)
        if owner and name in owner.sparse:
            raise UnsupportedError(f"{self.where}: {what} {name!r} is a sparse tensor; dense ones are supported")
        dtype, shape = self.scope.dtype(name), self.scope.shape(name)
        if dtype not in (*_DTYPES, TensorProto.UNDEFINED):
            names = ", ".join(_DTYPES.values())
            found = enum_name(TensorProto.DataType, dtype)
            raise UnsupportedError(f"{self.where}: {what} {name!r} has dtype {found}; supported are {names}")
        if static(shape) and dtype:
            if what == "weights":
                self.dtype = _DTYPES[dtype]
            elif self.dtype != _DTYPES[dtype]:
                raise SpecError(what, f"the weights' dtype {self.dtype}", _DTYPES[dtype])
            return shape
        return self._unknown(what, name)

    def _unknown(self, what: str, name: str) -> NoReturn:
        """Raise SpecError: an operand's shape is not known."""
        shape = self.scope.shape(name)
        if self.reader.unknown:
            missing, example = ", ".join(map(repr, self.reader.unknown)), f"{self.reader.unknown[0]}=1"
            raise SpecError(
                "dims", f"a size for {missing} (as in --dim {example!r})", f"none ({what} is {text(shape)})"
            )
        raise SpecError(what, "a shape that shape inference finds", text(shape) + self.reader.lost(name))

    # ---- what comes before it ----

    def _take_padding(self) -> None:
        """Pad nodes with zeros, used by this convolution alone, become its padding."""
        while not self.spec.transposed and self._alone(self.src):
            index = self.scope.producers.get(self.src)
            node = self.scope.nodes[index] if index is not None else None
            pads = _zeros_around(self.scope, node) if node and node.op_type == "Pad" and node.domain in ROOTS else None
            shape = self.scope.shape(node.input[0]) if node else None
            if node is None or pads is None or not static(shape) or not len(pads) == len(shape) == self.spec.rank + 2:
                return
            sums = tuple((p + b, q + e) for (p, q), (b, e) in zip(self.spec.padding, pads[2:], strict=True))
            grown = tuple(size + b + e for size, (b, e) in zip(shape, pads, strict=True))
            if any(p < 0 for pair in pads for p in pair) or any(map(any, pads[:2])) or grown != self._src_shape():
                return
            self.spec = self.spec.with_(in_spatial=shape[2:], padding=sums)
            self.src = node.input[0]

    def _src_shape(self) -> tuple[int, ...]:
        return (self.spec.n, self.spec.ic, *self.spec.in_spatial)

    def _alone(self, name: str) -> bool:
        """Whether one node of this graph uses the value, and nothing else does."""
        return len(self.scope.users[name]) == 1 and name not in self.scope.outputs

    # ---- what follows it ----

    def _take_what_follows(self) -> None:
        while self.dst not in self.scope.outputs:
            users = self.scope.users[self.dst]
            only = self.scope.nodes[next(iter(users))] if len(users) == 1 else None
            if only and only.domain in ROOTS and self._passes(only):
                self.dst = only.output[0]
            elif self._take_activation() or only is None or not self._take(only):
                return

    def _take(self, node: NodeProto) -> bool:
        """Fold a node that alone uses the value so far; False where that is not exact."""
        spec, op = self.spec, node.op_type
        if node.domain not in ROOTS or any(node.output[1:]) or len(node.input) > _MAX_OPERANDS:
            return False
        others = [name for name in node.input if name != self.dst]
        if len(others) != len(node.input) - 1:
            return False
        adds = op in ("Add", "Sum") or (op == "Sub" and node.input[0] == self.dst)
        scales = op in ("Mul", "Sub") or (op == "Div" and node.input[0] == self.dst)
        if len(others) == 1 and (adds or (scales and not spec.residual)) and self._per_channel(others[0]):
            self.spec = spec.with_(bias=spec.bias or op in ("Add", "Sum", "Sub"))
        elif op == "BatchNormalization" and not spec.residual and self._normalizes(node):
            self.spec = spec.with_(bias=True)
        elif len(others) == 1 and op in ("Add", "Sum") and self._is_residual(node, others[0]):
            self.spec, self.residual, self.dst = spec.with_(residual=True), others[0], node.output[0]
            self.reader.taken.add(self.dst)
            return True
        elif op != "Neg" or spec.residual:
            return False
        self.steps.append((node, self.dst))
        self.parameters += others
        self.dst = node.output[0]
        return True

    def _is_residual(self, node: NodeProto, other: str) -> bool:
        free = not self.spec.residual and node.output[0] not in self.reader.taken
        return free and self.scope.shape(other) == self.spec.dst_shape

    def _passes(self, node: NodeProto) -> bool:
        """Whether a node hands on its only changing operand as it is."""
        if node.op_type == "Cast":
            return self.scope.dtype(node.output[0]) == self.scope.dtype(node.input[0])
        if any(self.scope.users[name] or name in self.scope.outputs for name in node.output[1:]):
            return False
        if node.op_type == "Dropout":  # before opset 12 always as in inference
            return not self.scope.drops(node)
        return bool(node.op_type == "Identity")

    def _normalizes(self, node: NodeProto) -> bool:
        """Whether a BatchNormalization is a scale and a shift per channel, known beforehand."""
        attributes = {a.name: a.i for a in node.attribute}
        inference = not attributes.get("training_mode", 0) and attributes.get("spatial", 1) == 1
        parameters = node.input[1:]
        known = all(self.scope.parameter(p) and self.scope.shape(p) == (self.spec.oc,) for p in parameters)
        return bool(inference and known and len(parameters) == 4 and node.input[0] == self.dst)

    def _per_channel(self, name: str, inputs: bool = False) -> bool:
        """Whether a value is a constant (or an input) with one element, or one per channel."""
        shape = self.scope.shape(name)
        if not (self.scope.parameter(name) if inputs else self.scope.constant(name)):
            return False
        if shape is None or len(shape) > self.spec.rank + 2:
            return False
        full = (1,) * (self.spec.rank + 2 - len(shape)) + shape
        return full[1] in (1, self.spec.oc) and all(d == 1 for axis, d in enumerate(full) if axis != 1)

    # ---- activations ----

    def _take_activation(self) -> bool:
        """Fold the largest part of the graph that is an activation of the value so far and of it alone."""
        scope, x = self.scope, self.dst
        expressions: dict[str, Expr] = {x: X}
        cones: dict[str, frozenset[int]] = {x: frozenset()}
        slopes: list[str] = []
        found = ""
        if len(scope.users[x]) > _MAX_REGION:
            return False
        waiting = sorted(scope.users[x])
        seen = 0
        while waiting and seen < _MAX_REGION:
            index = heapq.heappop(waiting)
            node, seen = scope.nodes[index], seen + 1
            if node.output[0] in expressions or (any(node.output[1:]) and not self._passes(node)):
                continue
            y = node.output[0]
            try:
                expression = self._expression(node, expressions, slopes)
            except NoExpressionError:
                continue
            if expression is None:
                continue
            expressions[y] = expression
            cones[y] = frozenset({index}).union(*(cones[name] for name in node.input if name in cones))
            inside = [x, *(scope.nodes[i].output[0] for i in cones[y] if i != index)]
            if expression != X and all(name not in scope.outputs and scope.users[name] <= cones[y] for name in inside):
                # Constants are rounded to the dtype, and coefficients are products of two at most.
                tolerance = 3 * UNIT_ROUNDOFF[self.dtype]
                if activation := algebra.activation(expression, tolerance, _shortest):
                    self.spec, self.dst, found = self.spec.with_(activation=activation), y, activation
            if len(scope.users[y]) <= _MAX_REGION:
                for user in scope.users[y]:
                    if user not in waiting:
                        heapq.heappush(waiting, user)
        if found == "prelu":
            self.slope = slopes[0]
        return bool(found)

    def _expression(self, node: NodeProto, known: Mapping[str, Expr], slopes: list[str]) -> Expr | None:
        """What a node computes of the values in ``known`` and constants; None where that is not known."""
        if node.domain not in ROOTS:
            return None
        if node.op_type == "PRelu":
            if node.input[0] not in known or not self._per_channel(node.input[1], inputs=True):
                return None
            slopes.append(node.input[1])
            return algebra.prelu(known[node.input[0]], node.input[1])
        if node.op_type == "Clip":
            low, high = (self._bound(node, index) for index in (1, 2))
            if node.input[0] not in known or low is None or high is None:
                return None
            return algebra.clip(known[node.input[0]], low, high)
        if self._passes(node):
            return known.get(node.input[0])
        operands = []
        for name in node.input:
            operand = known.get(name) or self._constant(name)
            if operand is None:
                return None
            operands.append(operand)
        attributes = {a.name: a for a in node.attribute}
        form = "Tanh" if "approximate" in attributes and attributes["approximate"].s == b"tanh" else ""
        return algebra.apply(node.op_type + form, operands, {name: a.f for name, a in attributes.items()})

    def _constant(self, name: str) -> Expr | None:
        """A constant of one element, which does not add axes."""
        shape = self.scope.shape(name)
        if shape is None or len(shape) > self.spec.rank + 2 or (value := self.scope.scalar(name)) is None:
            return None
        return number(value)

    def _bound(self, node: NodeProto, index: int) -> Fraction | float | None:
        """Clip's lower (1) or upper (2) bound; None where its value is not known."""
        limit = math.inf if index == 2 else -math.inf
        attributes = {a.name: a.f for a in node.attribute}
        value: float | None = attributes.get("max" if index == 2 else "min", limit)
        if len(node.input) > index and node.input[index]:
            value = self.scope.scalar(node.input[index])
        if value is None or math.isnan(value):
            return None
        # "No bound" is often spelled as the largest finite number.
        return math.copysign(math.inf, value) if abs(value) >= _F32_MAX else Fraction(value)

    # ---- arrays ----

    def arrays(self) -> dict[str, Array]:
        """``weights [bias] [slope]`` with everything folded in float64; empty where :meth:`unknown` says why."""
        if self.unknown():
            return {}
        spec, weights = self.spec, self.scope.value(self.weights)
        scale, shift = np.ones(spec.oc), np.zeros(spec.oc)
        if self.bias:
            shift = self._channels(self.bias)
        with np.errstate(all="ignore"):
            for node, x in self.steps:
                factor, addend = self._affine(node, x)
                scale, shift = scale * factor, shift * factor + addend
            found = {"weights": self._scaled(weights, scale) if self.steps else weights}
            if spec.bias:
                found["bias"] = narrow(shift, spec.dtype)
        if self.steps and np.isfinite(weights).all() and not all(np.isfinite(array).all() for array in found.values()):
            raise UnsupportedError(f"{self.where}: folding what follows it leaves the range of {spec.dtype}")
        if self.slope:
            found["slope"] = narrow(self._channels(self.slope), spec.dtype)
        return found

    def unknown(self) -> str:
        """Why the arrays are not known: a parameter that is given or computed when the model runs; empty if all are."""
        return self.reason([*self.parameters, self.slope])

    def reason(self, names: Sequence[str]) -> str:
        """Why one of these values is not known before the model runs; empty if all are."""
        scope = self.scope
        for name in filter(None, names):
            if scope.constant(name):
                continue
            owner = scope.owner(name)
            index = owner.producers.get(name) if owner else None
            if owner is None or index is None:
                return f"{name!r} is an input"
            node = owner.nodes[index]
            reason = scope.reason(name) or "not of constants alone, or not the same every time"
            return f"{name!r} is computed by {node.op_type} {owner.name(node)!r}: {reason}"
        return ""

    def _affine(self, node: NodeProto, x: str) -> tuple[F64 | float, F64 | float]:
        """The factor and addend per channel that a node applies to ``x``."""
        if node.op_type == "Neg":
            return -1.0, 0.0
        if node.op_type == "BatchNormalization":
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            gamma, beta, mean, variance = map(self._channels, node.input[1:5])
            factor = gamma / np.sqrt(variance + epsilon)
            return factor, beta - mean * factor
        operand = self._channels(next(name for name in node.input if name != x))
        if node.op_type == "Mul":
            return operand, 0.0
        if node.op_type == "Div":
            return 1 / operand, 0.0
        if node.op_type == "Sub":
            return (1.0, -operand) if node.input[0] == x else (-1.0, operand)
        return 1.0, operand

    def _scaled(self, weights: Array, scale: F64) -> Array:
        """Weights times a factor per output channel."""
        spec = self.spec
        groups, inner = (spec.groups, spec.ic // spec.groups) if spec.transposed else (1, 1)
        by_channel = weights.astype(np.float64).reshape(groups, inner, spec.oc // groups, -1)
        scaled = by_channel * scale.reshape(groups, 1, -1, 1)
        return narrow(scaled.reshape(weights.shape), spec.dtype)

    def _channels(self, name: str) -> F64:
        """A constant with one element, or one per output channel, as float64 ``[oc]``."""
        values = self.scope.value(name)
        if values.dtype.kind in "SUO":
            raise SpecError(f"value {name!r}", "numbers", values.dtype)
        return np.broadcast_to(values.astype(np.float64).reshape(-1), (self.spec.oc,)).copy()


#: Attributes of convolutions and their types.
_ATTRIBUTES = dict.fromkeys(
    ("kernel_shape", "strides", "dilations", "pads", "output_padding", "output_shape"), AttributeProto.INTS
) | {"group": AttributeProto.INT, "auto_pad": AttributeProto.STRING}


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """The attributes of a convolution: integers as int and list, text as str."""
    for attribute in node.attribute:
        wanted = _ATTRIBUTES.get(attribute.name)
        if wanted is None:
            raise SpecError(repr(attribute.name), f"one of {', '.join(_ATTRIBUTES)}", "an unknown attribute")
        if attribute.type != wanted:
            kinds = [enum_name(AttributeProto.AttributeType, number) for number in (wanted, attribute.type)]
            raise SpecError(attribute.name, *kinds)
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: v.decode(errors="replace") if isinstance(v, bytes) else v for name, v in values.items()}


def enum_name(enum: Any, number: int) -> str:
    """A protobuf enum's name; the number where a damaged or newer file has one without."""
    names: dict[int, str] = {value: name.lower() for name, value in enum.items()}
    return names.get(number, str(number))


def _shortest(value: Fraction | float) -> str:
    """The number that is written like the f32 value: 0.1 instead of 0.10000000149011612."""
    rounded = np.float32(float(value))
    if math.isfinite(value) and not np.isfinite(rounded):
        raise NoExpressionError
    return repr(float(str(rounded)))


def _zeros_around(scope: Scope, node: NodeProto) -> list[tuple[int, int]] | None:
    """What a Pad node adds to each axis, begin and end; None where it is not known or not of zeros."""
    attributes = {a.name: a for a in node.attribute}
    mode = attributes["mode"].s if "mode" in attributes else b"constant"
    shape = scope.shape(node.input[0])
    value: float | None = attributes["value"].f if "value" in attributes else 0.0
    if len(node.input) > 2 and node.input[2]:
        value = scope.scalar(node.input[2])
    if mode != b"constant" or value != 0 or shape is None:
        return None
    try:
        pads = list(attributes["pads"].ints) if "pads" in attributes else _integers(scope, node.input[1])
        axes = _integers(scope, node.input[3]) if len(node.input) > 3 and node.input[3] else list(range(len(shape)))
    except (SpecError, IndexError):
        return None
    if len(pads) != 2 * len(axes):
        return None
    pairs = {axis % len(shape): (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)} if shape else {}
    return [pairs.get(axis, (0, 0)) for axis in range(len(shape))]


def _integers(scope: Scope, name: str) -> list[int]:
    values = scope.value(name)
    if values.dtype.kind not in "iu":
        raise SpecError(f"value {name!r}", "integers", values.dtype)
    return [int(value) for value in values.reshape(-1)]
