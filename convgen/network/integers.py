"""8-bit integers in networks: what quantises and dequantises them, and products of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from ..errors import SpecError, UnsupportedError
from ..formats.onnx.graph import Scope
from ..formats.onnx.node import OnnxLayer
from ..formats.onnx.quantised import INTEGERS, WEIGHTS, Stored, dequantised, stored_activation
from ..problem.dtypes import RANGES
from ..problem.spec import MOST_SUM_SCALE, ConvSpec
from .graph import Array, Convolution, Graph, Node, Operator
from .node import LONG_DTYPES, Reading, Refusal
from .nodes import READERS
from .whole import computed_product

#: Least scale of DynamicQuantizeLinear but that of a tensor of zeros, which is 1.
_TINY = 2.0**-126
#: Least scale with which a residual is added to a product, so that quotients of scales are ordinary numbers.
_LEAST_SCALE = 2.0**-60


# ---- to integers and back ----------------------------------------------------------------------


def _scaled(r: Reading, kind: str, **attributes: Any) -> None:
    """QuantizeLinear or DequantizeLinear: scale and zero point of one element, or along an axis."""
    source = r.input()
    if r.get("block_size", 0):
        raise Refusal("scales of blocks")
    rank, inputs = len(r.shape(source)), [source]
    for place, what in ((1, "scale"), (2, "zero")):
        if not (name := r.given(place)):
            continue
        if not r.scope.constant(name):
            inputs.append(r.tensor(name))
            continue
        values = r.array(name, what).astype(np.float32)
        if what == "scale" and kind == "quantise" and not values.all():
            raise Refusal("a scale of 0")
        if values.size > 1:
            axis = r.axis(r.get("axis", 1), rank)
            values = values.reshape(-1, *(1,) * (rank - 1 - axis))
        if values.any() or what == "scale":
            inputs.append(r.constant(values.reshape(()) if values.size == 1 else values, what))
    r.end(kind, inputs, **attributes)


def _quantise(r: Reading) -> None:
    known = INTEGERS | LONG_DTYPES
    dtype = known.get(r.scope.dtype(str(r.node.output[0])))
    if dtype is None:
        raise Refusal(f"to another type than {', '.join(known.values())}")
    _scaled(r, "quantise", dtype=dtype)


def _dequantise(r: Reading) -> None:
    _scaled(r, "dequantise")


def _quantise_dynamically(r: Reading) -> None:
    """DynamicQuantizeLinear: u8 whose range is that of the elements and 0."""
    source = r.input()
    axes = tuple(range(len(r.shape(source))))
    output, scale, zero = map(str, r.node.output)
    nothing, steps, tiny = r.constant(0.0, "nothing"), r.constant(255.0, "steps"), r.constant(_TINY, "tiny")
    reach = []
    for mode in ("max", "min"):
        found = r.add("reduce", [source], (), axes=axes, keepdims=False, mode=mode)
        reach.append(r.add(mode, [found, nothing], ()))
    high, low = reach
    step = r.add("div", [r.add("sub", [high, low], ()), steps], ())
    is_zero = r.add("equal", [step, nothing], ())
    r.add("add", [r.add("max", [step, tiny], ()), is_zero], (), scale)
    r.add("quantise", [r.add("neg", [low], ()), scale], (), zero, dtype="u8")
    r.add("quantise", [source, scale, zero], r.shape(source), output, dtype="u8")


# ---- products ----------------------------------------------------------------------------------


def integer_convolution(scope: Scope, graph: Graph, layer: OnnxLayer, spec: ConvSpec) -> list[Node]:
    """A convolution of integers. Where src's zero point is computed: that of padded src, its share taken off after."""
    for name, dtype in ((layer.src, spec.src_dtype), (layer.dst, spec.dst_dtype)):
        if dtype != "f32":
            graph.dtypes[name] = dtype
    if not spec.src_zero or "src_zero" in layer.arrays:
        return [Convolution(layer.name, spec, layer.arrays, (layer.src,), layer.dst)]
    node = scope.nodes[scope.producers[layer.dst]]
    zero = str(node.input[2])
    _take_zero(scope, graph, zero, spec)
    nodes: list[Node] = []
    src = layer.src
    if any(map(any, spec.padding)):
        begins = (0, 0, *(begin for begin, _ in spec.padding))
        padded = f"{layer.dst}/padded"
        graph.shapes[padded], graph.dtypes[padded] = (spec.n, spec.ic, *spec.padded_spatial), spec.src_dtype
        attributes = {"begins": begins, "mode": "constant", "value": 0.0}
        nodes.append(Operator(layer.name, "pad", (src, zero), padded, attributes))
        src = padded
    bare = spec.with_(in_spatial=spec.padded_spatial, padding=0, src_zero=False)
    weights = layer.arrays["weights"].astype(np.int64)
    if spec.weights_zero:
        weights = weights - layer.arrays["weights_zero"].reshape(-1, *(1,) * (spec.rank + 1))
    totals = weights.sum(axis=tuple(range(1, spec.rank + 2))).astype(np.int32).reshape(-1, *(1,) * spec.rank)
    convolution = Convolution(layer.name, bare, layer.arrays, (src,), f"{layer.dst}/sums")
    return [*nodes, *_centred(graph, convolution, zero, totals, layer.dst)]


def _take_zero(scope: Scope, graph: Graph, zero: str, spec: ConvSpec) -> None:
    shape = scope.shape(zero)
    if shape is None or math.prod(shape) != 1:  # type: ignore[arg-type]
        raise Refusal(f"a zero point of shape {shape}")
    graph.shapes[zero], graph.dtypes[zero] = (), spec.src_dtype


def _centred(graph: Graph, convolution: Convolution, zero: str, totals: Array, output: str) -> list[Node]:
    """Sums less what a zero point, which is computed, adds to them."""
    sums, constant = convolution.output, f"{output}/totals"
    graph.shapes |= {sums: graph.shapes[output], constant: totals.shape}
    graph.dtypes |= dict.fromkeys((sums, constant, output), "i32")
    graph.constants[constant] = totals
    return [convolution, Operator(convolution.name, "centre", (sums, zero, constant), output)]


def _rows_spec(r: Reading, weights: Array, source: str, **fields: Any) -> ConvSpec:
    """A product of a matrix's rows with ``[oc, ic]``, as a convolution."""
    oc, ic = weights.shape
    rows = math.prod(r.shape(source)) // ic
    layout = "nhwc" if rows > 1 else "nchw"
    return ConvSpec(1, ic, oc, (rows,), (1,), layout=layout, dtype="i8", **fields)


def _constant_weights(r: Reading, stored: Stored, transposed: bool) -> tuple[Array, dict[str, Any], Array]:
    """Weights ``[oc, ic]``, their zero point as parameters where it matters, and the centred weights."""
    values, zero = r.array(stored.name, "weights"), np.zeros(1, np.int32)
    if stored.zero:
        zero = r.array(stored.zero, "zero point").reshape(-1).astype(np.int32)
    if values.ndim != 2:
        raise Refusal(f"a product with weights of {values.ndim} axes")
    values = np.ascontiguousarray(values if transposed else values.T)
    centred = values.astype(np.int32) - zero.reshape(-1, 1)
    low, high = RANGES["i8"]
    if centred.min() >= low and centred.max() <= high:
        return centred.astype(np.int8), {}, centred
    zeros = np.broadcast_to(zero, (len(values),)).astype(values.dtype)
    return values, {"weights_zero": zeros}, centred


def _matmul_integer(r: Reading) -> None:
    """MatMulInteger: sums of products, i32; the zero point of the rows may be computed."""
    known = all(r.scope.constant(name) for name in (r.given(1), r.given(3)) if name)
    if not known or len(r.shape(r.given(1))) != 2 or _is_of_rows(r, r.given(2)):
        return computed_product(r)
    return _product_with_constant(r)


def _is_of_rows(r: Reading, zero: str) -> bool:
    """Whether each row has a zero point."""
    return bool(zero) and math.prod(r.shape(zero)) > 1


def _product_with_constant(r: Reading) -> None:
    source, output = r.input(0), str(r.node.output[0])
    weights, parameters, centred = _constant_weights(r, Stored(r.given(1), "", r.given(3)), False)
    types = {"src_dtype": r.graph.dtype(source), "weights_dtype": _type_of(weights), "dst_dtype": "i32", "bias": False}
    spec = _rows_spec(r, weights, source, **types, weights_zero=bool(parameters))
    parameters["weights"] = weights.reshape(*weights.shape, 1)
    r.shapes[output], r.graph.dtypes[output] = r.shape(output), "i32"
    zero = r.given(2)
    if zero and r.scope.constant(zero) and not r.array(zero, "zero point").any():
        zero = ""
    if not zero:
        r.nodes.append(Convolution(r.name, spec, parameters, (source,), output, rows=True))
    elif r.scope.constant(zero):
        whole = parameters | {"src_zero": r.array(zero, "zero point").reshape(-1)}
        r.nodes.append(Convolution(r.name, spec.with_(src_zero=True), whole, (source,), output, rows=True))
    else:
        _take_zero(r.scope, r.graph, zero, spec)
        product = Convolution(r.name, spec, parameters, (source,), f"{output}/sums", rows=True)
        r.nodes += _centred(r.graph, product, zero, centred.sum(axis=1).astype(np.int32), output)


def _type_of(array: Array) -> str:
    return "u8" if array.dtype == np.uint8 else "i8"


def _dequantised_product(read_f32: Callable[[Reading], None]) -> Callable[[Reading], None]:
    """MatMul or Gemm: of dequantised rows and constant dequantised weights a product of integers, to f32; else as it
    would be read.
    """

    def read(r: Reading) -> None:
        left, right = dequantised(r.scope, r.given(0)), dequantised(r.scope, r.given(1))
        try:
            if left is None or right is None or not _product(r, left, right):
                read_f32(r)
        except (SpecError, UnsupportedError, Refusal):
            del r.nodes[:]
            read_f32(r)

    return read


def _product(r: Reading, left: Stored, right: Stored) -> bool:
    """Read a product of integers; False where it is none: then it is one of f32."""
    scope = r.scope
    known = [name for stored in (left, right) for name in (stored.scale, stored.zero) if name]
    is_plain = r.get("alpha", 1.0) == r.get("beta", 1.0) == 1 and not r.get("transA", 0)
    if not is_plain or not all(map(scope.constant, [*known, right.name])):
        return False
    if scope.dtype(left.name) not in INTEGERS or scope.dtype(right.name) not in WEIGHTS:
        return False
    transposed = bool(r.get("transB", 0))
    src_scale, scale = (r.array(stored.scale, "scale").astype(np.float32).reshape(-1) for stored in (left, right))
    src_zero = r.array(left.zero, "zero point").reshape(-1) if left.zero else np.zeros(1, np.int8)
    along = right.axis % 2 == (0 if transposed else 1)
    if src_scale.size != 1 or src_zero.size != 1 or (scale.size > 1 and not along):
        return False
    weights, parameters, _ = _constant_weights(r, right, transposed)
    steps = np.broadcast_to(src_scale * scale, (len(weights),)).astype(np.float32)
    if (given := r.given(2)) and (bias := _bias(r, given, steps)) is None:
        return False
    source, output = r.tensor(left.name), str(r.node.output[0])
    parameters |= {"weights": weights.reshape(*weights.shape, 1), "scale": steps}
    if given:
        parameters["bias"] = bias
    if src_zero.any():
        parameters["src_zero"] = src_zero
    types = {"src_dtype": r.graph.dtype(source), "weights_dtype": _type_of(weights), "dst_dtype": "f32"}
    flags = {name: name in parameters for name in ("bias", "src_zero", "weights_zero")}
    spec = _rows_spec(r, weights, source, **types, **flags)
    r.shapes[output] = r.shape(output)
    r.nodes.append(Convolution(r.name, spec, parameters, (source,), output, rows=True))
    return True


def _bias(r: Reading, name: str, steps: Array) -> Array | None:
    """A constant bias in steps of the products, as i32; None where it is not known or does not fit."""
    if not r.scope.constant(name):
        return None
    stored = dequantised(r.scope, name)
    if stored is not None and not stored.zero and r.scope.dtype(stored.name) not in INTEGERS:
        values, own = r.array(stored.name, "bias"), r.array(stored.scale, "scale").reshape(-1).astype(np.float64)
        if np.allclose(own, steps, rtol=2.0**-20, atol=0) and values.size == steps.size:
            return values.reshape(-1).astype(np.int32)
    rounded = np.rint(r.array(name, "bias").reshape(-1).astype(np.float64) / steps)
    if rounded.size not in (1, steps.size) or not (abs(rounded) < 2**31).all():
        return None
    return np.broadcast_to(rounded, steps.shape).astype(np.int32)


READ_INTEGERS: Mapping[str, Callable[[Reading], None]] = {
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _dequantise,
    "DynamicQuantizeLinear": _quantise_dynamically,
    "MatMulInteger": _matmul_integer,
    "MatMul": _dequantised_product(READERS["MatMul"]),
    "Gemm": _dequantised_product(READERS["Gemm"]),
}


# ---- rewriting ---------------------------------------------------------------------------------


def quantise_product(graph: Graph, node: Node) -> Convolution | None:
    """Rows of f32 that a product of integers gives, quantised: the product stores integers."""
    if not isinstance(node, Operator) or node.kind != "quantise":
        return None
    source, *quantisation = node.inputs
    made = graph.producers().get(source)
    alone = len(graph.users()[source]) == 1 and source not in graph.outputs
    if not isinstance(made, Convolution) or not alone or made.spec.dst_dtype != "f32" or not made.spec.is_quantised:
        return None
    if node.attributes["dtype"] not in RANGES:  # of 16 bits
        return None
    values = [graph.constants.get(name) for name in quantisation]
    if any(array is None or array.size != 1 for array in values):
        return None
    scale, zero, *_ = [np.float32(array.reshape(())) for array in values if array is not None] + [np.float32(0)]
    dtype = node.attributes["dtype"]
    activation = stored_activation(made.spec.activation, scale, int(zero), dtype)
    spec = made.spec.with_(dst_dtype=dtype, dst_zero=bool(zero), activation=activation)
    parameters = dict(made.parameters) | {"scale": (made.parameters["scale"] / scale).astype(np.float32)}
    if zero:
        parameters["dst_zero"] = np.array([int(zero)], np.uint8 if dtype == "u8" else np.int8)
    return dataclasses.replace(made, spec=spec, parameters=parameters, output=node.output)


def add_quantised(graph: Graph, node: Node) -> Convolution | None:
    """What is quantised of a dequantised product and another dequantised tensor, their sum: the product takes it in
    where that gives the same for all numbers they may be.
    """
    if not isinstance(node, Operator) or node.kind != "quantise" or not is_of_tensor(graph, node):
        return None
    producers, activation = graph.producers(), "none"
    total = operator_alone(graph, producers, node.inputs[0])
    if total is not None and total.kind == "activate":
        activation, total = total.attributes["activation"], operator_alone(graph, producers, total.inputs[0])
    if total is None or total.kind != "add" or len(total.inputs) != 2:
        return None
    for name, other in (total.inputs, total.inputs[::-1]):
        product, residual = operator_alone(graph, producers, name), producers.get(other)
        if product is None or not isinstance(residual, Operator) or graph.shapes[name] != graph.shapes[other]:
            continue
        if not all(one.kind == "dequantise" and is_of_tensor(graph, one) for one in (product, residual)):
            continue
        made = producers.get(product.inputs[0])
        if isinstance(made, Convolution) and (sum_of := _with_sum(graph, made, (product, residual, node), activation)):
            return sum_of
    return None


def operator_alone(graph: Graph, producers: Mapping[str, Node], name: str) -> Operator | None:
    """The operator that computes a tensor which one other node reads."""
    made = producers.get(name)
    alone = len(graph.users()[name]) == 1 and name not in graph.outputs
    return made if isinstance(made, Operator) and alone else None


def _with_sum(
    graph: Graph, made: Convolution, parts: tuple[Operator, Operator, Operator], activation: str
) -> Convolution | None:
    """A product with the residual that is added to it, of what dequantises these two and quantises the sum; None where
    it does not fit.
    """
    _, residual, quantised = parts
    stored, dtype = graph.dtype(residual.inputs[0]), quantised.attributes["dtype"]
    alone = len(graph.users()[made.output]) == 1 and made.output not in graph.outputs
    plain = made.spec.is_quantised and not made.spec.residual and made.spec.activation == "none"
    if not alone or not plain or made.spec.dst_dtype != dtype or stored not in RANGES:
        return None
    (a_scale, a_zero), (b_scale, b_zero), (scale, zero) = (scale_and_zero(graph, part) for part in parts)
    if not all(_LEAST_SCALE <= number <= 1 / _LEAST_SCALE for number in (a_scale, b_scale, scale)):
        return None
    parameters = {name: array for name, array in made.parameters.items() if name != "dst_zero"}
    types = (dtype, stored, dtype)
    scales = scales_of_sum((a_scale, b_scale, scale), (a_zero, b_zero, zero), types)
    if scales is None or max(scales) > MOST_SUM_SCALE:
        return None
    parameters["sum"] = np.array([scales[0], a_zero, scales[1], b_zero], np.float32)
    if zero:
        parameters["dst_zero"] = np.array([zero], np.uint8 if dtype == "u8" else np.int8)
    try:
        spec = made.spec.with_(
            residual=True,
            residual_dtype=stored,
            dst_zero=bool(zero),
            activation=stored_activation(activation, scale, zero, dtype),
        )
    except SpecError:  # another activation
        return None
    inputs = (*made.inputs, residual.inputs[0])
    return dataclasses.replace(made, spec=spec, parameters=parameters, inputs=inputs, output=quantised.output)


def multiply_scales(graph: Graph) -> None:
    """What is dequantised and quantised at once is multiplied by a scale near the quotient of both, where that gives
    the same for all numbers: a division takes as long as ten products.
    """
    producers = graph.producers()
    for node in list(graph.nodes):
        if not isinstance(node, Operator) or node.kind != "quantise" or not is_of_tensor(graph, node):
            continue
        made = operator_alone(graph, producers, node.inputs[0])
        if made is None or made.kind != "dequantise" or not is_of_tensor(graph, made):
            continue
        (a_scale, a_zero), (scale, zero) = (scale_and_zero(graph, one) for one in (made, node))
        stored = graph.dtype(made.inputs[0])
        nothing = np.float32(0)
        if stored not in RANGES or not all(_LEAST_SCALE <= s <= 1 / _LEAST_SCALE for s in (a_scale, scale)):
            continue
        dtypes = (stored, stored, node.attributes["dtype"])
        if (found := scales_of_sum((a_scale, nothing, scale), (a_zero, 0, zero), dtypes)) is None:
            continue
        named = {made.output: (made, found[0]), node.output: (node, np.float32(1))}
        for output, (one, value) in named.items():
            constant = graph.fresh(f"{output}/factor")
            graph.shapes[constant], graph.constants[constant] = (), np.asarray(value)
            changed = dataclasses.replace(one, inputs=(one.inputs[0], constant, *one.inputs[2:]))
            graph.nodes = [changed if other is one else other for other in graph.nodes]


#: Of this many neighbouring numbers of f32 the scales of a sum are looked for, on either side.
_NEIGHBOURS = 64


def scales_of_sum(
    scales: tuple[np.float32, np.float32, np.float32], zeros: tuple[int, int, int], dtypes: tuple[str, str, str]
) -> tuple[np.float32, np.float32] | None:
    """Scales of two addends in steps of their sum, such that products with them give what a sum of dequantised numbers
    does, divided by its own scale, for all pairs of numbers.

    Args:
        scales, zeros, dtypes: of the addends and of the sum.

    Returns:
        f32 near ``scales[0] / scales[2]`` and ``scales[1] / scales[2]``; None where none there do.
    """
    low, high = (bound - zeros[2] for bound in RANGES[dtypes[2]])
    of_types = [np.arange(low, high + 1) for low, high in map(RANGES.__getitem__, dtypes[:2])]
    a, b = ((stored - zero).astype(np.float32) for stored, zero in zip(of_types, zeros, strict=False))
    exact = (a[:, None] * scales[0] + b * scales[1]) / scales[2]
    wanted = np.clip(np.rint(exact), low, high)
    near = (abs(exact - np.floor(exact) - 0.5) < 2.0**-10) & (exact > low - 1) & (exact < high + 1)
    rows, columns = np.nonzero(near)
    steps = np.arange(-_NEIGHBOURS, _NEIGHBOURS + 1)
    first, second = (
        (np.float32(scale / scales[2]).view(np.int32) + steps).astype(np.int32).view(np.float32) for scale in scales[:2]
    )
    left, right = first[:, None, None] * a[rows], second[None, :, None] * b[columns]
    fits = (np.clip(np.rint(left + right), low, high) == wanted[rows, columns]).all(axis=2)
    for i, j in sorted(np.argwhere(fits).tolist(), key=lambda at: abs(at[0] - _NEIGHBOURS) + abs(at[1] - _NEIGHBOURS)):
        if (np.clip(np.rint(a[:, None] * first[i] + b * second[j]), low, high) == wanted).all():
            return first[i], second[j]
    return None


def scale_and_zero(graph: Graph, node: Operator) -> tuple[np.float32, int]:
    """Of one for all elements."""
    scale, *zero = (graph.constants[name].reshape(()) for name in node.inputs[1:])
    return np.float32(scale), int(zero[0]) if zero else 0


#: Operators that give their operands' elements, or the largest of some: the same of integers and of what they mean.
_KEEPING = frozenset({"reshape", "transpose", "slice", "concat", "expand", "identity", "pool"})


def keep_integers(graph: Graph) -> None:
    """Where elements are dequantised, moved, and quantised as they were, they are moved as they are stored. What is
    quantised of several tensors, one after another, is quantised before they are.
    """
    changed = True
    while changed:
        changed = False
        producers, users = graph.producers(), graph.users()
        for node in graph.nodes:
            if not _keeps(node, graph, users):
                continue
            after, before = users[node.output], [producers.get(name) for name in node.inputs]
            while len(before) == 1 and _keeps(before[0], graph, users) and len(before[0].inputs) == 1:
                before = [producers.get(before[0].inputs[0])]
            if moved := _stored(graph, node, after[0], before):
                graph.nodes = [other for other in graph.nodes if other is not node and other is not after[0]] + moved
                graph.order()
                changed = True
                break


def _keeps(node: Node | None, graph: Graph, users: Mapping[str, Sequence[Node]]) -> TypeGuard[Operator]:
    """Whether a node moves elements, and one other node reads them."""
    if not isinstance(node, Operator) or node.kind not in _KEEPING or node.attributes.get("mode") == "mean":
        return False
    return len(users[node.output]) == 1 and node.output not in graph.outputs


def _stored(graph: Graph, node: Operator, after: Node, before: list[Node | None]) -> list[Node]:
    """A node that moves elements as they are stored, in place of one and of what quantises its elements; what is
    quantised before it, first. Nothing where this is not to be.

    Args:
        before: what computes its operands; of one that others have moved, what computes that.
    """
    if not isinstance(after, Operator) or after.kind != "quantise" or not before:
        return []
    undone = [made if _undone(graph, after, made) else None for made in before]
    is_dequantised = any(isinstance(made, Operator) and made.kind == "dequantise" for made in before)
    if not all(undone) and (node.kind != "concat" or not is_dequantised or not is_of_tensor(graph, after)):
        return []
    nodes, inputs = list[Node](), list[str]()
    for number, (name, made) in enumerate(zip(node.inputs, undone, strict=True)):
        if made is not None and made.output == name:
            inputs.append(made.inputs[0])
            continue
        part = f"{after.output}/part{number}"
        graph.shapes[part], graph.dtypes[part] = graph.shapes[name], after.attributes["dtype"]
        nodes.append(dataclasses.replace(after, inputs=(name, *after.inputs[1:]), output=part))
        inputs.append(part)
    return [*nodes, dataclasses.replace(node, inputs=tuple(inputs), output=after.output)]


def is_of_tensor(graph: Graph, node: Operator) -> bool:
    """Whether all elements have one scale, and one zero point, which are known."""
    arrays = [graph.constants.get(name) for name in node.inputs[1:]]
    return all(array is not None and array.size == 1 for array in arrays)


def _undone(graph: Graph, after: Operator, made: Node | None) -> bool:
    """Whether a node quantises as another one has dequantised."""
    if not isinstance(made, Operator) or made.kind != "dequantise" or len(made.inputs) != len(after.inputs):
        return False
    if graph.dtype(made.inputs[0]) != after.attributes["dtype"]:
        return False
    if not is_of_tensor(graph, made) or not is_of_tensor(graph, after):
        return False
    pairs = zip(made.inputs[1:], after.inputs[1:], strict=True)
    return all((graph.constants[a] == graph.constants[b]).all() for a, b in pairs)
