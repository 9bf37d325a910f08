"""Operators that ONNX Runtime's quantiser writes, in ONNX's own: DequantizeLinear, what they compute, QuantizeLinear.

That is how their documentation defines them. An operator that is spelled out elsewhere stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from onnx import GraphProto, ModelProto, NodeProto, helper

#: The domain of ONNX Runtime's own operators.
DOMAIN = "com.microsoft"

_Speller: TypeAlias = Callable[[NodeProto], Iterator[NodeProto]]


def spell_out(model: ModelProto) -> None:
    """Replace what is known in a model, whose functions are inlined."""
    _in_graph(model.graph)


def _in_graph(graph: GraphProto) -> None:
    nodes = [made for node in graph.node for made in _spelled(node)]
    if len(nodes) != len(graph.node) or any(a is not b for a, b in zip(nodes, graph.node, strict=True)):
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def _spelled(node: NodeProto) -> Iterator[NodeProto]:
    if node.domain == DOMAIN and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield helper.make_node(node.op_type, node.input, node.output, node.name, **_attributes(node))
    elif (node.domain, node.op_type) in _KNOWN:
        yield from _KNOWN[node.domain, node.op_type](node)
    else:
        yield node


def _attributes(node: NodeProto, *names: str) -> dict[str, Any]:
    """A node's attributes: all, or those of these names."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value for name, value in values.items() if not names or name in names}


def _dequantised(node: NodeProto, place: int, axis: int = 1) -> tuple[NodeProto, str]:
    """A DequantizeLinear of the integers, scale and zero point from an input on, and its output."""
    name = f"{node.output[0]}/f32.{place}"
    inputs = [given for given in node.input[place : place + 3] if given]
    return helper.make_node("DequantizeLinear", inputs, [name], name, axis=axis), name


def _between(operator: str, operands: Sequence[int], result: int, *attributes: str) -> _Speller:
    """Spells an operator whose operands' inputs begin at these places, its scale and zero point at ``result``."""

    def spell(node: NodeProto) -> Iterator[NodeProto]:
        values = _attributes(node)
        if values.get("channels_last", 0):
            yield node
            return
        places = operands or range(2, len(node.input), 3)
        yield from _around(node, operator, places, result, {k: v for k, v in values.items() if k in attributes})

    return spell


def _around(
    node: NodeProto, operator: str, places: Sequence[int], result: int, attributes: dict[str, Any]
) -> Iterator[NodeProto]:
    names, value = [], f"{node.output[0]}/f32"
    for place in places:
        made, name = _dequantised(node, place)
        names.append(name)
        yield made
    yield helper.make_node(operator, names, [value], node.name, **attributes)
    quantisation = [given for given in node.input[result : result + 2] if given]
    yield helper.make_node("QuantizeLinear", [value, *quantisation], node.output, f"{node.name}/stored")


def _gemm(node: NodeProto) -> Iterator[NodeProto]:
    """QGemm: the bias is in steps of the product's scale; without one of its own the result is f32."""
    values = _attributes(node)
    given = [*node.input, *[""] * (9 - len(node.input))]
    left, a = _dequantised(node, 0)
    right, b = _dequantised(node, 3, axis=0 if values.get("transB", 0) else 1)
    yield left
    yield right
    operands, value = [a, b], f"{node.output[0]}/f32"
    if given[6]:
        steps, bias = f"{value}.steps", f"{value}.bias"
        yield helper.make_node("Mul", [given[1], given[4]], [steps], steps)
        yield helper.make_node("DequantizeLinear", [given[6], steps], [bias], bias, axis=0)
        operands.append(bias)
    result = value if given[7] else node.output[0]
    yield helper.make_node("Gemm", operands, [result], node.name, **values)
    if given[7]:
        yield helper.make_node("QuantizeLinear", [value, *filter(None, given[7:9])], node.output, f"{node.name}/stored")


_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
_KNOWN: dict[tuple[str, str], _Speller] = {
    ("", "QLinearMatMul"): _between("MatMul", (0, 3), 6),
    (DOMAIN, "QLinearAdd"): _between("Add", (0, 3), 6),
    (DOMAIN, "QLinearMul"): _between("Mul", (0, 3), 6),
    (DOMAIN, "QLinearConcat"): _between("Concat", (), 0, "axis"),
    (DOMAIN, "QLinearAveragePool"): _between("AveragePool", (0,), 3, *_POOL),
    (DOMAIN, "QLinearGlobalAveragePool"): _between("GlobalAveragePool", (0,), 3),
    (DOMAIN, "QLinearSigmoid"): _between("Sigmoid", (0,), 3),
    (DOMAIN, "QLinearLeakyRelu"): _between("LeakyRelu", (0,), 3, "alpha"),
    (DOMAIN, "QLinearSoftmax"): _between("Softmax", (0,), 3, "axis"),
    (DOMAIN, "QGemm"): _gemm,
}
