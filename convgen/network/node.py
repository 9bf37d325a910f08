"""One node of an ONNX graph as it is read: its attributes and operands, checked, and the operators that it becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from ..errors import SpecError
from ..formats.onnx.graph import Scope, static, text
from ..formats.onnx.halves import HALVES
from ..problem.dtypes import LONG_RANGES, RANGES, numpy_dtype
from ..problem.fields import INT32_MAX
from .graph import Graph, Node, Operator, Shape
from .kinds import I32_KINDS, INTEGER_KINDS, TYPED_KINDS

#: ONNX's numbers of types, and how such tensors are stored.
DTYPES = {TensorProto.FLOAT: "f32", TensorProto.UINT8: "u8", TensorProto.INT8: "i8", TensorProto.INT32: "i32"}
#: Types of a network's own inputs, and of its outputs.
INPUT_DTYPES = DTYPES | {TensorProto.BOOL: "bool"} | HALVES
OUTPUT_DTYPES = INPUT_DTYPES | {TensorProto.INT64: "i64"}
#: ONNX's numbers of the integers of 16 bits.
LONG_DTYPES = {TensorProto.INT16: "i16", TensorProto.UINT16: "u16"}
#: How tensors are stored whose types :class:`Reading` takes: truth values, 0 and 1, and integers of 16 bits as f32.
_STORED = INPUT_DTYPES | dict.fromkeys((TensorProto.BOOL, *LONG_DTYPES), "f32")
#: Operators that give places, whole numbers of f32 here, and those that may follow.
_PLACES = ("ArgMax", "ArgMin")
_MOVES = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose")


class Refusal(Exception):  # noqa: N818  (an answer more than an error)
    """A node is not taken; the message is the reason."""


class Reading:
    """One node as it is read: its attributes and operands, checked; and the operators that it becomes.

    Args:
        scope: the graph it stands in.
        opset: its version.
        graph: what the tensors that it makes or reads, and the constants that it brings with it, are added to.
    """

    def __init__(
        self,
        scope: Scope,
        node: NodeProto,
        opset: int,
        graph: Graph,
    ) -> None:
        self.scope, self.node, self.opset, self.graph = scope, node, opset, graph
        self.constants, self.shapes = graph.constants, graph.shapes
        self.name = scope.name(node)
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.nodes: list[Node] = []

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute; text as str, several numbers as a tuple."""
        value = self.attributes.get(name, default)
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        return tuple(value) if isinstance(value, list) else value

    def given(self, position: int) -> str:
        """The name of an input; empty where it is left out."""
        return str(self.node.input[position]) if position < len(self.node.input) else ""

    def shape(self, name: str) -> Shape:
        if name in self.shapes:
            return self.shapes[name]
        shape = self.scope.shape(name)
        if not static(shape):
            raise Refusal(f"the shape of {name!r} is not known: {text(shape)}")
        return shape

    def tensor(self, name: str) -> str:
        """An operand, recorded with its shape and type, and with its value where that is constant."""
        if name in self.shapes:
            return name
        self.check_type(name)
        self.shapes[name] = self.shape(name)
        if (dtype := _STORED.get(self.scope.dtype(name), "f32")) != "f32":
            self.graph.dtypes[name] = dtype
        if self.scope.constant(name):
            self.constants[name] = np.asarray(self.scope.value(name), numpy_dtype(dtype), order="C")
        return name

    def check_type(self, name: str) -> None:
        """Refuse a tensor of a type that is not taken."""
        if (dtype := self.scope.dtype(name)) in _STORED or self._are_places(name):
            return
        if dtype == TensorProto.UNDEFINED:
            reason = self.scope.reason(name)
            raise Refusal(f"the type of {name!r} is not known{reason and ': '}{reason}")
        raise Refusal(f"{name!r} is of type {TensorProto.DataType.Name(dtype).lower()}; f32 is supported")

    def _are_places(self, name: str) -> bool:
        """Whether a tensor is of places that this node gives or takes."""
        if self.node.op_type not in (*_PLACES, *_MOVES, "Cast") or (index := self.scope.producers.get(name)) is None:
            return False
        producer = self.scope.nodes[index]
        return producer.op_type in _PLACES or (producer.op_type in _MOVES and self._are_places(producer.input[0]))

    def input(self, position: int = 0) -> str:
        if not (name := self.given(position)):
            raise Refusal(f"input {position} is left out")
        return self.tensor(name)

    def inputs(self) -> list[str]:
        return [self.tensor(name) for name in self.node.input]

    def array(self, name: str, what: str) -> np.ndarray[Any, np.dtype[Any]]:
        """The value of a constant."""
        if not self.scope.constant(name):
            raise Refusal(f"{what} {name!r} is no constant; constants are supported")
        try:
            return self.scope.value(name)
        except SpecError as error:
            raise Refusal(str(error)) from error

    def integers(self, position: int, attribute: str) -> tuple[int, ...] | None:
        """What newer versions take as an input and older ones have as an attribute; None where there is neither."""
        if name := self.given(position):
            return tuple(int(value) for value in self.array(name, attribute).reshape(-1))
        value = self.get(attribute)
        return value if value is None or isinstance(value, tuple) else (value,)

    def number(self, position: int, attribute: str, default: float) -> float:
        """One number that may be an input or an attribute."""
        if name := self.given(position):
            value = self.array(name, attribute)
            if value.size != 1:
                raise Refusal(f"{attribute} has {value.size} elements; one is supported")
            return float(value.reshape(()))
        return float(self.get(attribute, default))

    def axis(self, value: int, rank: int) -> int:
        if not -rank <= value < rank:
            raise Refusal(f"axis {value} of a tensor of {rank} axes")
        return value % rank

    def axes(self, values: Sequence[int], rank: int) -> tuple[int, ...]:
        return tuple(sorted(self.axis(value, rank) for value in values))

    def _fresh(self, what: str) -> str:
        """A name that neither the model nor what was made of it has."""
        name = f"{self.node.output[0]}/{what}"
        while name in self.shapes or self.scope.owner(name) is not None:
            name += "'"
        return name

    def constant(self, array: Any, what: str) -> str:
        """A tensor of this node's own."""
        name = self._fresh(what)
        self.constants[name] = np.asarray(array, np.float32, order="C")
        self.shapes[name] = self.constants[name].shape
        return name

    def add(self, kind: str, inputs: Sequence[str], shape: Shape, output: str = "", **attributes: Any) -> str:
        """An operator, its output named; ``output`` is empty for a step within the node."""
        if 0 in shape:
            raise Refusal(f"a tensor without elements: {list(shape)}")
        if math.prod(shape) > INT32_MAX:
            raise Refusal(f"a tensor of more than {INT32_MAX} elements: {list(shape)}")
        output = output or self._fresh(str(len(self.nodes)))
        self.shapes[output] = shape
        if (dtype := self._dtype(kind, inputs, attributes)) != "f32":
            self.graph.dtypes[output] = dtype
        self.nodes.append(Operator(self.name, kind, tuple(inputs), output, attributes))
        return output

    def _dtype(self, kind: str, inputs: Sequence[str], attributes: Mapping[str, Any]) -> str:
        """What an operator gives: f32 of f32, and of integers where it only moves or compares them."""
        if kind in TYPED_KINDS:
            dtype = str(attributes.get("dtype", "f32"))
            return "f32" if dtype in LONG_RANGES else dtype
        if kind in ("centre", "dequantise"):
            return "i32" if kind == "centre" else "f32"
        if kind == "resize" and "linear" not in attributes["axes"]:
            return self.graph.dtype(inputs[0])  # beside it there are tables
        taken = {self.graph.dtype(name) for name in inputs}
        if taken <= {"f32"}:
            return "f32"
        if kind in I32_KINDS and taken == {"i32"}:
            return "i32"
        if kind not in INTEGER_KINDS or len(taken) > 1 or attributes.get("mode", "max") == "mean":
            known = "f32 and i32 are" if kind in I32_KINDS else "f32 is"
            around = "; DequantizeLinear before it and QuantizeLinear behind it make it one of f32"
            way_out = around * bool(taken & RANGES.keys())
            raise Refusal(f"{kind} of {', '.join(sorted(taken))}; {known} supported{way_out}")
        return taken.pop()

    def end(self, kind: str, inputs: Sequence[str], **attributes: Any) -> None:
        """The operator that computes the node's output."""
        output = str(self.node.output[0])
        self.add(kind, inputs, self.shape(output), output, **attributes)
