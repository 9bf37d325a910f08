"""What the nodes of an ONNX graph mean that are not convolutions, as operators of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from ..errors import SpecError, UnsupportedError
from ..formats.onnx.file import CONTRADICTIONS, contradiction
from ..formats.onnx.graph import Scope
from . import composed
from .graph import Graph, Node, Shape
from .node import Reading, Refusal
from .resizing import resize_tables


def read_node(
    scope: Scope,
    node: NodeProto,
    opset: int,
    graph: Graph,
    readers: Mapping[str, Callable[[Reading], None]],
) -> list[Node]:
    """The nodes of a network that a node means, whose tensors are added to its graph; see
    :class:`~convgen.network.node.Reading`.

    Raises:
        Refusal: it is not taken, and why.
    """
    if any(attribute.g.node or attribute.graphs for attribute in node.attribute):
        raise Refusal("graphs inside of nodes are not taken")
    if node.op_type not in readers:
        raise Refusal("no such operator is known here")
    if any(scope.users[name] or name in scope.outputs for name in node.output[1:] if name) and (
        node.op_type not in ("Split", "DynamicQuantizeLinear")
    ):
        raise Refusal("an output but the first is used")
    try:
        reading = Reading(scope, node, opset, graph)
        readers[node.op_type](reading)
        for made in reading.nodes:
            if made.output in node.output and scope.dtype(made.output):
                reading.check_type(made.output)
    except (SpecError, UnsupportedError) as error:
        raise Refusal(str(error)) from error
    except CONTRADICTIONS as error:  # that no reader has looked for
        raise Refusal(contradiction(error)) from error
    return reading.nodes


#: Most operands of one operator: steps take a limited number of tensors.
MOST_OPERANDS = 32


# ---- element by element ------------------------------------------------------------------------


def _simple(kind: str) -> Callable[[Reading], None]:
    return lambda r: r.end(kind, r.inputs())


def _folded(kind: str, share: bool = False) -> Callable[[Reading], None]:
    """Of any number of operands, taken together a few at a time; the mean is a sum times a number."""

    def read(r: Reading) -> None:
        names = r.inputs()
        while len(names) > MOST_OPERANDS:
            first, names = names[:MOST_OPERANDS], names[MOST_OPERANDS:]
            shape = np.broadcast_shapes(*map(r.shape, first))
            names = [r.add(kind, first, tuple(shape)), *names]
        if not share:
            return r.end(kind, names)
        total = r.add(kind, names, r.shape(str(r.node.output[0]))) if len(names) > 1 else names[0]
        return r.end("mul", [total, r.constant(1 / len(r.node.input), "share")])

    return read


def _activation(text: Callable[[Reading], str]) -> Callable[[Reading], None]:
    return lambda r: r.end("activate", [r.input()], activation=text(r))


def _clip(r: Reading) -> None:
    low, high = r.number(1, "min", -math.inf), r.number(2, "max", math.inf)
    if not low <= high:
        raise Refusal(f"bounds {low} and {high}")
    r.end("activate", [r.input()], activation=f"clip({low!r},{high!r})")


def _gelu(r: Reading) -> None:
    r.end("activate", [r.input()], activation="gelu_tanh" if r.get("approximate") == "tanh" else "gelu")


def _passed(r: Reading) -> None:
    if r.node.op_type == "Dropout" and r.given(2) and r.array(r.given(2), "training_mode").any():
        raise Refusal("dropout in training")
    r.end("identity", [r.input()])


def _batch_normalization(r: Reading) -> None:
    if r.get("training_mode", 0) or r.get("spatial", 1) != 1:
        raise Refusal("normalisation by the batch's own mean and variance")
    source = r.input()
    gamma, beta, mean, variance = (r.array(r.given(i), "parameter").astype(np.float64) for i in range(1, 5))
    scale = gamma / np.sqrt(variance + r.get("epsilon", 1e-5))
    ones = (1,) * (len(r.shape(source)) - 2)
    vectors = {"scale": scale, "shift": beta - mean * scale}
    made = [r.constant(vector.reshape(-1, *ones), what) for what, vector in vectors.items()]
    r.end("scale_shift", [source, *made])


# ---- from one place to another -----------------------------------------------------------------


def _reshape(r: Reading) -> None:
    r.end("reshape", [r.input()])


def _transpose(r: Reading) -> None:
    source = r.input()
    rank = len(r.shape(source))
    r.end("transpose", [source], perm=r.get("perm", tuple(range(rank))[::-1]))


def _concat(r: Reading) -> None:
    inputs = r.inputs()
    if len(ranks := {len(r.shape(name)) for name in inputs}) != 1:
        raise Refusal(f"operands of {', '.join(map(str, sorted(ranks)))} axes")
    axis = r.axis(r.get("axis", 1), ranks.pop())
    filled = [name for name in inputs if r.shape(name)[axis]]
    while len(filled) > MOST_OPERANDS:
        first, filled = filled[:MOST_OPERANDS], filled[MOST_OPERANDS:]
        shape = list(r.shape(first[0]))
        shape[axis] = sum(r.shape(name)[axis] for name in first)
        filled = [r.add("concat", first, tuple(shape), axis=axis), *filled]
    r.end("concat", filled, axis=axis)


def _split(r: Reading) -> None:
    source = r.input()
    shape = r.shape(source)
    axis = r.axis(r.get("axis", 0), len(shape))
    start = 0
    for output in map(str, r.node.output):
        part = r.shape(output)
        starts = tuple(start if i == axis else 0 for i in range(len(shape)))
        r.add("slice", [source], part, output, starts=starts, steps=(1,) * len(shape))
        start += part[axis]
    if start != shape[axis]:
        raise Refusal(f"parts of {start} elements in all, where the axis has {shape[axis]}")


def _slice(r: Reading) -> None:
    source = r.input()
    shape = r.shape(source)
    begins, ends = r.integers(1, "starts"), r.integers(2, "ends")
    if begins is None or ends is None:
        raise Refusal("no starts or ends")
    axes = r.integers(3, "axes") or tuple(range(len(begins)))
    jumps = r.integers(4, "steps") or (1,) * len(begins)
    counts = {"starts": len(begins), "ends": len(ends), "axes": len(axes), "steps": len(jumps)}
    if len(set(counts.values())) != 1:
        raise Refusal(f"as many of each expected, found {', '.join(f'{n} {what}' for what, n in counts.items())}")
    starts, steps = [0] * len(shape), [1] * len(shape)
    for axis, begin, end, step in zip(axes, begins, ends, jumps, strict=True):
        axis = r.axis(axis, len(shape))
        starts[axis], _, steps[axis] = slice(begin, end, step).indices(shape[axis])
    r.end("slice", [source], starts=tuple(starts), steps=tuple(steps))


def _pad(r: Reading) -> None:
    source = r.input()
    rank = len(r.shape(source))
    pads, axes = r.integers(1, "pads"), r.integers(3, "axes") or tuple(range(rank))
    mode = r.get("mode", "constant")
    if pads is None or len(pads) != 2 * len(axes):
        raise Refusal(f"pads {pads} of {len(axes)} axes")
    begins = [0] * rank
    for axis, begin in zip(axes, pads, strict=False):
        begins[r.axis(axis, rank)] = begin
    if mode not in ("constant", "edge", "reflect", "wrap"):
        raise Refusal(f"mode {mode!r}")
    for axis, *reaches in zip(axes, pads, pads[len(axes) :], strict=False):
        if mode == "reflect" and max(map(abs, reaches)) >= r.shape(source)[r.axis(axis, rank)]:
            raise Refusal("a reflection of more than the tensor")
    value = r.number(2, "value", 0.0) if mode == "constant" else 0.0
    r.end("pad", [source], begins=tuple(begins), mode=mode, value=value)


def _expand(r: Reading) -> None:
    r.end("expand", [r.input()])


def _resize(r: Reading) -> None:
    source = r.input()
    shape, out = r.shape(source), r.shape(str(r.node.output[0]))
    old = r.node.op_type == "Upsample" or r.opset < 11
    place = 1 if old else 2
    scales: Sequence[float] | None = r.get("scales")
    if scales is None and r.given(place):
        scales = [float(value) for value in r.array(r.given(place), "scales").reshape(-1)] or None
    chosen = r.get("axes")
    if scales is not None and chosen is not None:
        full = [1.0] * len(shape)
        for axis, scale in zip(chosen, scales, strict=True):
            full[r.axis(axis, len(shape))] = scale
        scales = full
    if r.get("antialias", 0) or r.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Refusal("antialias, or a policy to keep the aspect ratio")
    options = {
        "mode": r.get("mode", "nearest"),
        "transform": r.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel"),
        "nearest": r.get("nearest_mode", "floor" if old else "round_prefer_floor"),
    }
    try:
        ways, tables = resize_tables(shape, out, scales, **options)
    except ValueError as error:
        raise Refusal(str(error)) from error
    made = [r.constant(table, f"table{number}") for number, table in enumerate(tables)]
    if "linear" in ways and (dtype := r.graph.dtype(source)) != "f32":
        return _end_mixed(r, [source, *made], ways, dtype)
    return r.end("resize", [source, *made], axes=ways)


def _end_mixed(r: Reading, operands: Sequence[str], ways: Sequence[Any], dtype: str) -> None:
    """Integers that are mixed: ONNX Runtime does so in f32, and cuts off what is beyond a whole number. That is
    a matter of the last bit, unless nothing is rounded: of two axes with shares of 8 bits.
    """
    source, *tables = operands
    shares = [r.constants[table] for table in tables[2::3]] if ways.count("linear") * 3 == len(tables) else []
    exact = 1 <= len(shares) <= 2 and all((share * 256 % 1 == 0).all() for share in shares)
    if dtype not in ("u8", "i8") or not exact:
        raise Refusal(
            f"linear of {dtype}, but by factors such as 2, 4 and 8 along one axis or two; dequantise before it"
        )
    mixed = r.add("resize", [r.add("cast", [source], r.shape(source)), *tables], r.shape(r.node.output[0]), axes=ways)
    whole = r.add("floor", [r.add("abs", [mixed], r.shape(mixed))], r.shape(mixed))
    signed = r.add("mul", [whole, r.add("sign", [mixed], r.shape(mixed))], r.shape(mixed))
    r.end("quantise", [signed, r.constant(1.0, "step")], dtype=dtype)


def _image_in_blocks(r: Reading) -> tuple[str, int, Shape]:
    """The operand of four axes, and the size of its blocks."""
    source, block = r.input(), r.get("blocksize")
    if len(shape := r.shape(source)) != 4 or not isinstance(block, int) or block < 1:
        raise Refusal(f"blocks of {block} of a tensor of {len(shape)} axes; 4 axes are supported")
    return source, block, shape


def _depth_to_space(r: Reading) -> None:
    source, block, (n, c, h, w) = _image_in_blocks(r)
    last = r.get("mode", "DCR") == "CRD"
    parts = (n, c // block**2, block, block, h, w) if last else (n, block, block, c // block**2, h, w)
    perm = (0, 1, 4, 2, 5, 3) if last else (0, 3, 4, 1, 5, 2)
    parted = r.add("reshape", [source], parts)
    turned = r.add("transpose", [parted], tuple(parts[axis] for axis in perm), perm=perm)
    r.end("reshape", [turned])


def _space_to_depth(r: Reading) -> None:
    source, block, (n, c, h, w) = _image_in_blocks(r)
    parts = (n, c, h // block, block, w // block, block)
    perm = (0, 1, 3, 5, 2, 4) if r.get("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    parted = r.add("reshape", [source], parts)
    turned = r.add("transpose", [parted], tuple(parts[axis] for axis in perm), perm=perm)
    r.end("reshape", [turned])


# ---- over many elements ------------------------------------------------------------------------


def _window(r: Reading, sizes: Shape) -> dict[str, Any]:
    """The window of a pooling node: its taps, and the padding before and after."""
    kernel, out = r.get("kernel_shape"), r.shape(str(r.node.output[0]))[2:]
    rank = len(sizes)
    strides, dilations = r.get("strides", (1,) * rank), r.get("dilations", (1,) * rank)
    pads, word = r.get("pads", (0,) * (2 * rank)), r.get("auto_pad", "NOTSET")
    if kernel is None or len(pads) != 2 * rank:
        raise Refusal(f"kernel_shape {kernel} and pads {pads} of {rank} axes")
    for what, values in (("kernel_shape", kernel), ("strides", strides), ("dilations", dilations)):
        if len(values) != rank or min(values) < 1:
            raise Refusal(f"{what} {values} of {rank} axes")
    if word in ("SAME_UPPER", "SAME_LOWER"):
        if max(dilations) > 1 or any(s > k for s, k in zip(strides, kernel, strict=True)):
            # ONNX Runtime's sizes are not ONNX's, or windows begin in the middle.
            raise Refusal(f"auto_pad={word} with dilations, or with strides above the window; give pads")
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        all_ = zip(out, strides, reach, sizes, strict=True)
        wanted = [max(0, (o - 1) * s + w - size) for o, s, w, size in all_]
        less = [pad // 2 for pad in wanted]
        more = [pad - half for pad, half in zip(wanted, less, strict=True)]
        begins, ends = (less, more) if word == "SAME_UPPER" else (more, less)
    elif word == "VALID":
        begins, ends = [0] * rank, [0] * rank
    else:
        begins, ends = pads[:rank], pads[rank:]
    for size, k, d, begin, end in zip(sizes, kernel, dilations, begins, ends, strict=True):
        if (k - 1) * d + 1 > size + begin + end:
            raise Refusal(f"a window of {(k - 1) * d + 1} elements, more than the {size + begin + end} with padding")
    window = {"kernel": kernel, "strides": strides, "dilations": dilations, "begins": begins, "ends": ends}
    return {name: tuple(values) for name, values in window.items()}


def _pool(mode: str) -> Callable[[Reading], None]:
    def read(r: Reading) -> None:
        source = r.input()
        window = _window(r, r.shape(source)[2:])
        r.end("pool", [source], mode=mode, include_pad=bool(r.get("count_include_pad", 0)), **window)

    return read


def _global_pool(mode: str) -> Callable[[Reading], None]:
    def read(r: Reading) -> None:
        source = r.input()
        axes = tuple(range(2, len(r.shape(source))))
        r.end("reduce", [source], axes=axes, keepdims=True, mode=mode)

    return read


def _reduce(mode: str) -> Callable[[Reading], None]:
    def read(r: Reading) -> None:
        source = r.input()
        rank = len(r.shape(source))
        axes = r.integers(1, "axes")
        if not axes and r.get("noop_with_empty_axes", 0):
            return r.end("identity", [source])
        reduced = r.axes(axes or range(rank), rank)
        return r.end("reduce", [source], axes=reduced, keepdims=bool(r.get("keepdims", 1)), mode=mode)

    return read


def _softmax(logarithm: bool) -> Callable[[Reading], None]:
    def read(r: Reading) -> None:
        source = r.input()
        rank = len(r.shape(source))
        axis = r.axis(r.get("axis", -1 if r.opset >= 13 else 1), rank)
        axes = (axis,) if r.opset >= 13 else tuple(range(axis, rank))  # before, the rest is one axis
        r.end("softmax", [source], axes=axes, log=logarithm)

    return read


def _layer_normalization(r: Reading) -> None:
    source = r.input()
    rank = len(r.shape(source))
    axes = tuple(range(r.axis(r.get("axis", -1), rank), rank))
    affine = [r.input(place) for place in (1, 2) if r.given(place)]
    r.end("normalise", [source, *affine], axes=axes, epsilon=r.get("epsilon", 1e-5))


def _instance_normalization(r: Reading) -> None:
    source = r.input()
    rank = len(r.shape(source))
    affine = []
    for place in (1, 2):
        vector = r.array(r.given(place), "parameter")
        affine.append(r.constant(vector.reshape(-1, *(1,) * (rank - 2)), f"affine{place}"))
    r.end("normalise", [source, *affine], axes=tuple(range(2, rank)), epsilon=r.get("epsilon", 1e-5))


def _lrn(r: Reading) -> None:
    numbers = {name: float(r.get(name, default)) for name, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))}
    r.end("lrn", [r.input()], size=r.get("size"), **numbers)


def _matmul(r: Reading) -> None:
    end_product(r, r.input(0), r.input(1))


def end_product(r: Reading, left: str, right: str) -> None:
    """The product of two tensors of matrices, rows or columns, as the node's output."""
    trans: dict[str, Any] = {"trans_a": False, "trans_b": False}
    a, b = r.shape(left), r.shape(right)
    if len(a) > 1 and len(b) > 1:
        return r.end("product", [left, right], **trans)
    if len(a) == 1:  # a row
        left = r.add("reshape", [left], (1, *a))
    if len(b) == 1:  # a column
        right = r.add("reshape", [right], (*b, 1))
    outer = np.broadcast_shapes(a[:-2], b[:-2])
    shape = (*outer, a[-2] if len(a) > 1 else 1, b[-1] if len(b) > 1 else 1)
    return r.end("reshape", [r.add("product", [left, right], shape, **trans)])


def _gemm(r: Reading) -> None:
    out = r.shape(str(r.node.output[0]))
    trans: dict[str, Any] = {"trans_a": bool(r.get("transA", 0)), "trans_b": bool(r.get("transB", 0))}
    alpha, beta = float(r.get("alpha", 1.0)), float(r.get("beta", 1.0))
    added = r.input(2) if r.given(2) and beta else ""
    operands = [r.input(0), r.input(1)]
    if alpha == 1 and not added:
        return r.end("product", operands, **trans)
    value = r.add("product", operands, out, **trans)
    if alpha != 1 and not added:
        return r.end("mul", [value, r.constant(alpha, "alpha")])
    if alpha != 1:
        value = r.add("mul", [value, r.constant(alpha, "alpha")], out)
    if beta != 1:
        added = r.add("mul", [added, r.constant(beta, "beta")], r.shape(added))
    return r.end("add", [value, added])


#: What reads each operator of ONNX.
READERS: Mapping[str, Callable[[Reading], None]] = {
    **{
        name: _simple(name.lower())
        for name in ("Exp", "Log", "Sqrt", "Abs", "Neg", "Reciprocal", "Floor", "Ceil", "Erf", "Softplus", "Softsign")
    },
    **{name: _simple(name.lower()) for name in ("Sin", "Cos", "Add", "Sub", "Mul", "Div", "Pow")},
    "Sum": _folded("add"),
    "Max": _folded("max"),
    "Min": _folded("min"),
    "Mean": _folded("add", share=True),
    "PRelu": _simple("prelu"),
    **{name: _simple(name.lower()) for name in ("Round", "Sign")},
    **{name: _simple(name.lower()) for name in ("Greater", "Less", "Equal", "Not", "Where")},
    "GreaterOrEqual": _simple("greater_equal"),
    "LessOrEqual": _simple("less_equal"),
    "And": _simple("mul"),
    "Or": _simple("max"),
    "Xor": _simple("not_equal"),
    "Selu": composed.scaled(composed.selu),
    "Celu": composed.scaled(composed.celu),
    "Swish": composed.swish,
    "ThresholdedRelu": composed.thresholded_relu,
    **{
        name: _activation(lambda r, word=word: word)  # type: ignore[misc]
        for name, word in (
            ("Relu", "relu"),
            ("Sigmoid", "sigmoid"),
            ("Tanh", "tanh"),
            ("HardSwish", "hardswish"),
            ("Mish", "mish"),
        )
    },
    "LeakyRelu": _activation(lambda r: f"leaky_relu({r.get('alpha', 0.01)!r})"),
    "Elu": _activation(lambda r: f"elu({r.get('alpha', 1.0)!r})"),
    "HardSigmoid": _activation(lambda r: f"hardsigmoid({r.get('alpha', 0.2)!r},{r.get('beta', 0.5)!r})"),
    "Clip": _clip,
    "Gelu": _gelu,
    "Identity": _passed,
    "Dropout": _passed,
    "BatchNormalization": _batch_normalization,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": composed.tile,
    "Gather": composed.gather,
    "Resize": _resize,
    "Upsample": _resize,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "MaxPool": _pool("max"),
    "AveragePool": _pool("mean"),
    "GlobalAveragePool": _global_pool("mean"),
    "GlobalMaxPool": _global_pool("max"),
    "ReduceMean": _reduce("mean"),
    "ReduceSum": _reduce("sum"),
    "ReduceMax": _reduce("max"),
    "ReduceMin": _reduce("min"),
    "ReduceSumSquare": _reduce("square"),
    "ArgMax": composed.place_of("max"),
    "ArgMin": composed.place_of("min"),
    "ReduceL1": composed.reduce_in_steps("abs", "sum", ""),
    "ReduceL2": composed.reduce_in_steps("", "square", "sqrt"),
    "ReduceLogSum": composed.reduce_in_steps("", "sum", "log"),
    "ReduceLogSumExp": composed.log_sum_exp,
    "ReduceProd": _reduce("product"),
    "Softmax": _softmax(False),
    "LogSoftmax": _softmax(True),
    "LayerNormalization": _layer_normalization,
    "InstanceNormalization": _instance_normalization,
    "GroupNormalization": composed.group_normalization,
    "RMSNormalization": composed.rms_normalization,
    "LRN": _lrn,
    "MatMul": _matmul,
    "Gemm": _gemm,
}
