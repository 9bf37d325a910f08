"""Operators of ONNX Runtime's own in ONNX's: those that its quantiser writes, and those that its optimiser makes of
convolutions and what stands between them.

Of the former their documentation says: DequantizeLinear, what they compute, QuantizeLinear. One with an attribute that
is not known here stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from onnx import NodeProto, TensorProto, helper

from .constants import ROOTS

#: The domain of ONNX Runtime's own operators.
DOMAIN = "com.microsoft"

#: Makes nodes of one, and of how many spatial axes its first operand has; 0 where that is not known.
_Speller: TypeAlias = Callable[[NodeProto, int], Iterator[NodeProto]]
#: An operator, its operands after the first (values, or numbers), and its attributes.
_Step: TypeAlias = tuple[str, Sequence[str | float], dict[str, Any]]


def spelled_out(node: NodeProto, rank: int, opset: int) -> list[NodeProto]:
    """The nodes of ONNX's own that a node means; itself where it is none that is known.

    Args:
        rank: how many spatial axes its first operand has; 0 or less where that is not known.
        opset: the version of ONNX's operators that they are to be of.
    """
    domain = "" if node.domain in ROOTS else node.domain
    if domain == DOMAIN and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return [helper.make_node(node.op_type, node.input, node.output, node.name, **_attributes(node))]
    try:
        if domain == DOMAIN and node.op_type in _BY_VERSION:
            return list(_BY_VERSION[node.op_type](node, max(rank, 0), opset))
        return list(_KNOWN.get((domain, node.op_type), _itself)(node, max(rank, 0)))
    except (
        AttributeError,
        IndexError,
        TypeError,
        ValueError,
    ):  # odd attributes or operands
        return [node]


def _itself(node: NodeProto, rank: int) -> Iterator[NodeProto]:
    yield node


def _attributes(node: NodeProto, *names: str) -> dict[str, Any]:
    """A node's attributes: all, or those of these names."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value for name, value in values.items() if not names or name in names}


def _dequantised(node: NodeProto, place: int, values: str = "") -> tuple[NodeProto, str]:
    """A DequantizeLinear of the integers (or others in their place), scale and zero point from an input on, and its
    output. Scales are along the second axis, as without the attribute that versions below 13 do not have.
    """
    name = f"{node.output[0]}/f32.{place}"
    inputs = [values or node.input[place], *filter(None, node.input[place + 1 : place + 3])]
    return helper.make_node("DequantizeLinear", inputs, [name], name), name


def _between(operator: str, operands: Sequence[int], result: int, *attributes: str) -> _Speller:
    """Spells an operator whose operands' inputs begin at these places, its scale and zero point at ``result``."""

    def spell(node: NodeProto, rank: int) -> Iterator[NodeProto]:
        values = _attributes(node)
        last = bool(values.get("channels_last", 0))
        if last and not rank:
            return (yield node)
        names, value = [], f"{node.output[0]}/f32"
        for place in operands or range(2, len(node.input), 3):
            made, name = _dequantised(node, place)
            names.append(name)
            yield made
        steps: list[_Step] = [(operator, names[1:], {k: v for k, v in values.items() if k in attributes})]
        yield from _chain(node.name, operator, names[0], _turned(steps, rank if last else 0), value)
        quantisation = [given for given in node.input[result : result + 2] if given]
        yield helper.make_node("QuantizeLinear", [value, *quantisation], node.output, f"{node.name}/stored")

    return spell


def _gemm(node: NodeProto, rank: int, opset: int) -> Iterator[NodeProto]:
    """QGemm: the bias is in steps of the product's scale; without one of its own the result is f32."""
    values = _attributes(node)
    given = [*node.input, *[""] * (9 - len(node.input))]
    value, columns = f"{node.output[0]}/f32", ""
    if values.pop("transB", 0):  # its scales are along its columns then, which are the second axis of what is turned
        columns = f"{value}.columns"
        yield helper.make_node("Transpose", [given[3]], [columns], columns, perm=(1, 0))
    left, a = _dequantised(node, 0)
    right, b = _dequantised(node, 3, columns)
    yield left
    yield right
    operands = [a, b]
    if given[6]:
        steps, bias = f"{value}.steps", f"{value}.bias"
        alpha: list[_Step] = [("Mul", [values["alpha"]], {})] if values.get("alpha", 1.0) != 1 else []
        yield from _chain(steps, "", given[1], [("Mul", [given[4]], {}), *alpha], steps)
        if opset >= 13:
            yield helper.make_node("DequantizeLinear", [given[6], steps], [bias], bias, axis=0)
        else:
            yield helper.make_node("Cast", [given[6]], [f"{bias}.f32"], f"{bias}.f32", to=TensorProto.FLOAT)
            yield helper.make_node("Mul", [f"{bias}.f32", steps], [bias], bias)
        operands.append(bias)
    result = value if given[7] else node.output[0]
    yield helper.make_node("Gemm", operands, [result], node.name, **values)
    if given[7]:
        yield helper.make_node("QuantizeLinear", [value, *filter(None, given[7:9])], node.output, f"{node.name}/stored")


def _softmax(node: NodeProto, rank: int, opset: int) -> Iterator[NodeProto]:
    """QLinearSoftmax, which says itself of which version it is: of those below 13 all axes from one on are one."""
    values = _attributes(node)
    meant, axis, axes = values["opset"], values.get("axis", -1), rank + 2 if rank else 0
    is_last = axis == -1 or axis == axes - 1
    if (meant < 13) != (opset < 13) and not is_last:
        if opset < 13 or not axes:
            return (yield node)
        made, x = _dequantised(node, 0)
        yield made
        sizes = f"{node.output[0]}/sizes"
        yield helper.make_node("Shape", [x], [sizes], sizes)
        steps: list[_Step] = [("Flatten", [], {"axis": axis}), ("Softmax", [], {"axis": 1}), ("Reshape", [sizes], {})]
        steps.append(("QuantizeLinear", list(filter(None, node.input[3:5])), {}))
        yield from _chain(node.name or node.output[0], "Softmax", x, steps, node.output[0])
        return
    given = NodeProto()
    given.CopyFrom(node)
    del given.attribute[:]
    given.attribute.append(helper.make_attribute("axis", axes - 1 if is_last and axes else axis))
    yield from _between("Softmax", (0,), 3, "axis")(given, rank)


def _moved(node: NodeProto, rank: int, opset: int) -> Iterator[NodeProto]:
    """Pad and Range, which ONNX has too since these take what they take as inputs."""
    same = opset >= 11 and (node.op_type == "Pad" or len(node.input) == 3)
    yield helper.make_node(node.op_type, node.input, node.output, node.name, **_attributes(node)) if same else node


# ---- convolutions ------------------------------------------------------------------------------

_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
#: What FusedConv may end with, and the attributes that its ``activation_params`` are there.
_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}


def _fused_convolution(last: bool) -> _Speller:
    """Spells ``activation(Conv(X, W, B) + Z)``; ``last``: of X, Z and the result channels are the last axis."""

    def spell(node: NodeProto, rank: int) -> Iterator[NodeProto]:
        values, name = _attributes(node), node.name or node.output[0]
        activation = values.get("activation", b"").decode(errors="replace")
        numbers, wanted = list(map(float, values.get("activation_params", ()))), _ACTIVATIONS.get(activation)
        rank = rank if last else 0
        if values.keys() - {*_CONV, "activation", "activation_params"} or (last and not rank):
            return (yield node)
        if activation and (wanted is None or len(numbers) != len(wanted)):
            return (yield node)
        src, weights, bias, added = [*node.input, "", "", ""][:4]
        steps: list[_Step] = [("Conv", [weights, bias] if bias else [weights], _attributes(node, *_CONV))]
        if added and last:
            moved = f"{node.output[0]}/residual"
            yield helper.make_node("Transpose", [added], [moved], moved, perm=_channels_first(rank))
            added = moved
        if added:
            steps.append(("Add", [added], {}))
        if activation == "Clip":
            steps += [("Max", numbers[:1], {}), ("Min", numbers[1:], {})]  # Clip's operands changed
        elif activation:
            steps.append((activation, [], dict(zip(wanted or (), numbers, strict=True))))
        yield from _chain(name, "Conv", src, _turned(steps, rank), node.output[0])

    return spell


def _quantised_convolution(node: NodeProto, rank: int) -> Iterator[NodeProto]:
    """ONNX Runtime's own QLinearConv, which may have the channels last."""
    values = _attributes(node)
    last = bool(values.pop("channels_last", 0))
    if values.keys() - set(_CONV) or (last and not rank):
        return (yield node)
    steps = _turned([("QLinearConv", list(node.input[1:]), values)], rank if last else 0)
    yield from _chain(node.name or node.output[0], "QLinearConv", node.input[0], steps, node.output[0])


def _channels_first(rank: int) -> list[int]:
    return [0, rank + 1, *range(1, rank + 1)]


def _turned(steps: list[_Step], rank: int) -> list[_Step]:
    """What is computed with channels as the second axis, of tensors that have them as the last; 0: as it is."""
    if not rank:
        return steps
    back = [0, *range(2, rank + 2), 1]
    return [("Transpose", [], {"perm": _channels_first(rank)}), *steps, ("Transpose", [], {"perm": back})]


def _chain(name: str, main: str, src: str, steps: Sequence[_Step], output: str) -> Iterator[NodeProto]:
    """Nodes each of which takes what the one before gives; that of the operator ``main`` has the name."""
    for number, (operator, others, attributes) in enumerate(steps, 1):
        result = output if number == len(steps) else f"{output}/{number}"
        called = name if operator == main else f"{name}/{operator.lower()}{number}"
        operands = [src]
        for other in others:
            if isinstance(other, str):
                operands.append(other)
                continue
            operands.append(f"{result}/constant")
            yield helper.make_node("Constant", [], operands[-1:], operands[-1], value_float=float(other))
        yield helper.make_node(operator, operands, [result], called, **attributes)
        src = result


# ---- what its optimiser makes of what stands between -------------------------------------------


def _nhwc_max_pool(node: NodeProto, rank: int) -> Iterator[NodeProto]:
    steps = _turned([("MaxPool", [], _attributes(node))], rank or len(_attributes(node).get("kernel_shape", ())))
    yield from _chain(node.name or node.output[0], "MaxPool", node.input[0], steps, node.output[0])


def _gelu(node: NodeProto, rank: int) -> Iterator[NodeProto]:
    """Gelu, BiasGelu, FastGelu (by tanh) and QuickGelu (by a sigmoid), the second and third of a sum."""
    x, output = node.input[0], node.output[0]
    if len(node.input) > 1 and node.input[1]:
        x = f"{output}/sum"
        yield helper.make_node("Add", node.input[:2], [x], x)

    def by(operator: str, operand: float | str) -> _Step:
        return operator, [operand], {}

    if node.op_type == "QuickGelu":
        steps = [by("Mul", _attributes(node).get("alpha", 1.702)), ("Sigmoid", [], {})]
    elif node.op_type == "FastGelu":
        steps = [by("Mul", x), by("Mul", 0.044715), by("Add", 1.0), by("Mul", x), by("Mul", math.sqrt(2 / math.pi))]
        steps += [("Tanh", [], {}), by("Add", 1.0), by("Mul", 0.5)]
    else:
        steps = [by("Mul", math.sqrt(0.5)), ("Erf", [], {}), by("Add", 1.0), by("Mul", 0.5)]
    yield from _chain(node.name or output, "", x, [*steps, by("Mul", x)], output)


def _fused_gemm(node: NodeProto, rank: int) -> Iterator[NodeProto]:
    values = _attributes(node)
    wanted = {name: value for name, value in values.items() if not name.startswith("activation")}
    activation = values.get("activation", b"").decode(errors="replace")
    names = _ACTIVATIONS.get(activation, ()) if activation != "Clip" else ()
    if activation and (activation == "Clip" or activation not in _ACTIVATIONS):
        return (yield node)
    numbers = {name: values[f"activation_{name}"] for name in names if f"activation_{name}" in values}
    steps: list[_Step] = [("Gemm", list(node.input[1:]), wanted), (activation or "Identity", [], numbers)]
    yield from _chain(node.name or node.output[0], "Gemm", node.input[0], steps, node.output[0])


_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
_KNOWN: dict[tuple[str, str], _Speller] = {
    (DOMAIN, "FusedConv"): _fused_convolution(last=False),
    (DOMAIN, "NhwcFusedConv"): _fused_convolution(last=True),
    (DOMAIN, "QLinearConv"): _quantised_convolution,
    (DOMAIN, "NhwcMaxPool"): _nhwc_max_pool,
    **{(DOMAIN, name): _gelu for name in ("Gelu", "BiasGelu", "FastGelu", "QuickGelu")},
    (DOMAIN, "FusedGemm"): _fused_gemm,
    ("", "QLinearMatMul"): _between("MatMul", (0, 3), 6),
    (DOMAIN, "QLinearAdd"): _between("Add", (0, 3), 6),
    (DOMAIN, "QLinearMul"): _between("Mul", (0, 3), 6),
    (DOMAIN, "QLinearConcat"): _between("Concat", (), 0, "axis"),
    (DOMAIN, "QLinearAveragePool"): _between("AveragePool", (0,), 3, *_POOL),
    (DOMAIN, "QLinearGlobalAveragePool"): _between("GlobalAveragePool", (0,), 3),
    (DOMAIN, "QLinearSigmoid"): _between("Sigmoid", (0,), 3),
    (DOMAIN, "QLinearLeakyRelu"): _between("LeakyRelu", (0,), 3, "alpha"),
}
#: Of ONNX Runtime's own, what is another in other versions of ONNX's operators.
_BY_VERSION: dict[str, Callable[[NodeProto, int, int], Iterator[NodeProto]]] = {
    "Pad": _moved,
    "QGemm": _gemm,
    "QLinearSoftmax": _softmax,
    "Range": _moved,
}
