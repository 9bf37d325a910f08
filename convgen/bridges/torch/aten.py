"""What operators of PyTorch's aten graphs mean, as nodes of an ONNX graph.

ONNX's operators are what networks are read from; so a graph of PyTorch becomes one of these, and means the same from
there on. :data:`READERS` has every operator that is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch import fx

from ...network.node import Refusal
from .onnx_graph import OnnxGraph, Reading, operator, shape, value
from .resizing import gathered, resize
from .strides import moves, storage_order


def take(graph: OnnxGraph, node: fx.Node) -> None:
    """Add to a graph what a node computes.

    Raises:
        Refusal: it is not taken, and why.
    """
    if node.target is getitem:
        graph.take_item(node)
        return
    reader = READERS.get(operator(node))
    if reader is None:
        raise Refusal("no such operator is known here")
    reader(Reading(graph, node))


def is_read(operation: Any) -> bool:
    """Whether an operator of PyTorch is among those that are taken."""
    return str(operation).removeprefix("aten.") in READERS


# ---- element by element ------------------------------------------------------------------------


def _simple(operation: str, *names: str) -> Callable[[Reading], None]:
    names = names or ("self",)
    return lambda r: r.end(operation, [r.input(name) for name in names])


def _scaled(operation: str, first: str = "self", second: str = "other") -> Callable[[Reading], None]:
    """A sum or difference whose second operand has a factor."""

    def read(r: Reading) -> None:
        left, right = r.input(first), r.input(second)
        if r["alpha"] != 1:
            right = r.add("Mul", [right, r.constant(np.float32(r["alpha"]))])
        r.end(operation, [left, right])

    return read


def _silu(r: Reading) -> None:
    source = r.input()
    r.end("Mul", [source, r.add("Sigmoid", [source])])


def _glu(r: Reading) -> None:
    axis = r.axis("dim")
    parts = [f"{r.node.name}.{part}" for part in ("values", "gates")]
    r.graph.add("Split", [r.input(), r.integers([r.shape[axis]] * 2)], parts, axis=axis)
    r.end("Mul", [parts[0], r.add("Sigmoid", [parts[1]])])


def _clip(low: str, high: str) -> Callable[[Reading], None]:
    def read(r: Reading) -> None:
        bounds = r.number(low, -math.inf), r.number(high, math.inf)
        if not bounds[0] <= bounds[1]:
            raise Refusal(f"bounds {bounds[0]} and {bounds[1]}")
        r.end("Clip", [r.input(), *(r.constant(np.float32(bound)) for bound in bounds)])

    return read


def _elu(r: Reading) -> None:
    """ELU, SELU, and CELU, whose numbers below 0 are divided by alpha first."""
    alpha, scale, steps = (float(r[name]) for name in ("alpha", "scale", "input_scale"))
    if (steps, scale) == (1, 1):
        return r.end("Elu", [r.input()], alpha=alpha)
    if steps == 1:
        return r.end("Mul", [r.add("Elu", [r.input()], alpha=alpha), r.constant(np.float32(scale))])
    if scale != 1 or abs(alpha * steps - 1) > 1e-6:
        raise Refusal(f"scale {scale} and input_scale {steps}; those of ELU, SELU and CELU are supported")
    return r.end("Celu", [r.input()], alpha=alpha)


def _softplus(r: Reading) -> None:
    """``log(1 + exp(beta x)) / beta``: from PyTorch's threshold on that is x, unless the threshold is a small one."""
    beta = float(r["beta"])
    if r["threshold"] < 20 or beta <= 0:
        raise Refusal(f"threshold {r['threshold']} and beta {beta}; at least 20, and more than 0 are supported")
    if beta == 1:
        return r.end("Softplus", [r.input()])
    steps = r.constant(np.float32(beta))
    return r.end("Div", [r.add("Softplus", [r.add("Mul", [r.input(), steps])]), steps])


def _round(r: Reading) -> None:
    if "decimals" in r.arguments:
        r.require("decimals", 0)
    r.end("Round", [r.input()])


def _prelu(r: Reading) -> None:
    r.end("PRelu", [r.input(), r.known("weight")])


def _square(r: Reading) -> None:
    r.end("Mul", [r.input(), r.input()])


def _copied(r: Reading) -> None:
    r.end("Identity", [r.input()])


def _converted(r: Reading) -> None:
    for name in ("dtype", "device", "layout"):
        r.require(name, None, {"dtype": torch.float32, "device": torch.device("cpu"), "layout": torch.strided}[name])
    r.end("Identity", [r.input()])


def _restrided(r: Reading) -> None:
    """A tensor whose elements stay where they are."""
    before, after = value(r["self"]), value(r.node)
    orders, sizes = [storage_order(tensor) for tensor in (before, after)], r.sizes()
    known = [moves(order, sizes) for order in orders if order is not None]
    if sizes != r.shape or r["storage_offset"] or len(known) < 2 or known[0] != known[1]:
        raise Refusal("it takes elements from their places in memory")
    r.end("Identity", [r.input()])


# ---- normalisation -----------------------------------------------------------------------------


def _batch_norm(r: Reading) -> None:
    r.first_only()
    channels = r.sizes("input")[1]
    vectors = [r.parameter(name, channels, default) for name, default in (("weight", 1), ("bias", 0))]
    statistics = [r.known(name) for name in ("running_mean", "running_var")]
    r.end("BatchNormalization", [r.input("input"), *vectors, *statistics], epsilon=float(r["eps"]))


def _norm_of_its_own(r: Reading) -> None:
    """By the statistics of what is given. Instance normalisation is this, its images side by side as one."""
    r.first_only()
    sizes = r.sizes("input")
    if sizes[0] != 1 or len(sizes) < 3:
        raise Refusal("statistics over several images; eval mode has those that were kept")
    vectors = [r.parameter(name, sizes[1], default) for name, default in (("weight", 1), ("bias", 0))]
    r.end("InstanceNormalization", [r.input("input"), *vectors], epsilon=float(r["eps"]))


def _layer_norm(r: Reading) -> None:
    r.first_only()
    axes = [int(size) for size in r["normalized_shape"]]
    ones = r.input("weight") if r["weight"] is not None else r.constant(np.ones(axes, np.float32))
    shift = [r.input("bias")] if r["bias"] is not None else []
    r.end("LayerNormalization", [r.input("input"), ones, *shift], axis=-len(axes), epsilon=float(r["eps"]))


def _group_norm(r: Reading) -> None:
    """Groups as channels of which each is normalised by itself."""
    r.first_only()
    sizes, groups = r.sizes("input"), int(r["group"])
    parted = r.add("Reshape", [r.input("input"), r.integers((sizes[0], groups, math.prod(sizes[1:]) // groups))])
    vectors = [r.constant(np.full(groups, number, np.float32)) for number in (1, 0)]
    normal = r.add("InstanceNormalization", [parted, *vectors], epsilon=float(r["eps"]))
    last = r.add("Reshape", [normal, r.integers(sizes)])
    for name, operation in (("weight", "Mul"), ("bias", "Add")):
        if r[name] is not None:
            vector = r.add("Reshape", [r.known(name), r.integers((sizes[1], *(1,) * (len(sizes) - 2)))])
            last = r.add(operation, [last, vector])
    r.end("Identity", [last])


# ---- from one place to another -----------------------------------------------------------------


def _reshape(r: Reading) -> None:
    r.end("Reshape", [r.input(), r.integers(r.shape)])


def _expand(r: Reading) -> None:
    r.end("Expand", [r.input(), r.integers(r.shape)])


def _permute(r: Reading) -> None:
    r.end("Transpose", [r.input()], perm=[axis % len(r.shape) for axis in r["dims"]])


def _transpose(first: str | int, second: str | int) -> Callable[[Reading], None]:
    def read(r: Reading) -> None:
        rank = len(r.shape)
        one, other = (r.axis(at) if isinstance(at, str) else at % max(1, rank) for at in (first, second))
        perm = list(range(rank))
        if rank > 1:
            perm[one], perm[other] = perm[other], perm[one]
        r.end("Transpose", [r.input()], perm=perm)

    return read


def _channel_shuffle(r: Reading) -> None:
    (n, c, *pixels), groups = r.shape, int(r["groups"])
    parted = r.add("Reshape", [r.input(), r.integers((n, groups, c // groups, *pixels))])
    turned = r.add("Transpose", [parted], perm=[0, 2, 1, *range(3, len(pixels) + 3)])
    r.end("Reshape", [turned, r.integers(r.shape)])


def _pixel_unshuffle(r: Reading) -> None:
    by, sizes = int(r["downscale_factor"]), r.sizes()
    if len(sizes) != 4:
        raise Refusal(f"{len(sizes)} axes; 4 are supported")
    n, c, rows, columns = sizes
    parted = r.add("Reshape", [r.input(), r.integers((n, c, rows // by, by, columns // by, by))])
    r.end("Reshape", [r.add("Transpose", [parted], perm=[0, 1, 3, 5, 2, 4]), r.integers(r.shape)])


def _cat(r: Reading) -> None:
    filled = [node for node in r["tensors"] if shape(node) != (0,)]
    axis = int(r["dim"]) % len(r.shape)
    r.end("Concat", [r.graph.name(node) for node in filled], axis=axis)


def _stack(r: Reading) -> None:
    axis = int(r["dim"]) % len(r.shape)
    longer = tuple(1 if at == axis else size for at, size in enumerate(r.shape))
    parts = [r.add("Reshape", [r.graph.name(node), r.integers(longer)]) for node in r["tensors"]]
    r.end("Concat", parts, axis=axis)


def _split(r: Reading) -> None:
    axis = r.axis("dim")
    parts = [int(part.shape[axis]) for part in value(r.node)]
    names = [f"{r.node.name}.part{number}" for number in range(len(parts))]
    r.graph.add("Split", [r.input(), r.integers(parts)], names, axis=axis)
    r.graph.names[r.node] = names


def _unbind(r: Reading) -> None:
    """The slices of an axis, which is gone then."""
    axis = r.axis("dim")
    names = [f"{r.node.name}.part{number}" for number in range(r.sizes()[axis])]
    parts = [f"{name}.kept" for name in names]
    r.graph.add("Split", [r.input(), r.integers([1] * len(names))], parts, axis=axis)
    for part, name in zip(parts, names, strict=True):
        r.graph.add("Reshape", [part, r.integers(r.shape)], name)
    r.graph.names[r.node] = names


def _repeat(r: Reading) -> None:
    sizes, times = r.sizes(), [int(count) for count in r["repeats"]]
    longer = r.add("Reshape", [r.input(), r.integers((1,) * (len(times) - len(sizes)) + sizes)])
    r.end("Tile", [longer, r.integers(times)])


def _flip(r: Reading) -> None:
    axes = [axis % len(r.shape) for axis in r["dims"]]
    ends = [[number] * len(axes) for number in (-1, np.iinfo(np.int64).min)]
    r.end("Slice", [r.input(), *map(r.integers, (*ends, axes, [-1] * len(axes)))])


def _roll(r: Reading) -> None:
    """Along each axis its end, then its beginning."""
    axes = [int(axis) % len(r.shape) for axis in r["dims"]]
    last = r.input()
    if not axes:
        raise Refusal("all elements as one row; axes are supported")
    for axis, shift in zip(axes, r["shifts"], strict=True):
        if not (moved := int(shift) % (size := r.shape[axis])):
            continue
        parts = [
            r.add("Slice", [last, *(r.integers([number]) for number in (begin, end, axis))])
            for begin, end in ((size - moved, size), (0, size - moved))
        ]
        last = r.add("Concat", parts, axis=axis)
    r.end("Identity", [last])


def _slice(r: Reading) -> None:
    axis = r.axis("dim")
    start, stop, step = slice(r["start"], r["end"], r["step"]).indices(r.sizes()[axis])
    r.end("Slice", [r.input(), *(r.integers([number]) for number in (start, stop, axis, step))])


def _select(r: Reading) -> None:
    axis = r.axis("dim")
    index = int(r["index"]) % r.sizes()[axis]
    part = r.add("Slice", [r.input(), *(r.integers([number]) for number in (index, index + 1, axis))])
    r.end("Reshape", [part, r.integers(r.shape)])


def _pad(mode: str) -> Callable[[Reading], None]:
    def read(r: Reading) -> None:
        rank, given = len(r.shape), [int(size) for size in r["pad" if mode == "constant" else "padding"]]
        begins, ends = [0] * rank, [0] * rank
        for place in range(len(given) // 2):  # from the last axis on
            begins[rank - 1 - place], ends[rank - 1 - place] = given[2 * place : 2 * place + 2]
        filled = [r.constant(np.float32(r["value"]))] if mode == "constant" else []
        r.end("Pad", [r.input(), r.integers([*begins, *ends]), *filled], mode=mode)

    return read


# ---- over many elements ------------------------------------------------------------------------


def _convolution(r: Reading) -> None:
    rank = len(r.shape) - 2
    if rank not in (1, 2, 3):
        raise Refusal(f"{rank} axes of an image; 1 to 3 are supported")
    padding = r.window("padding", rank)
    _end_convolution(r, "input", padding, padding)


def _own_convolution(r: Reading) -> None:
    """The operator of convgen's own layers, of whose padding begin and end of each axis are given."""
    padding = [int(size) for size in r["padding"]]
    _end_convolution(r, "x", padding[::2], padding[1::2])


def _end_convolution(r: Reading, source: str, begins: list[int], ends: list[int]) -> None:
    rank = len(begins)
    attributes: dict[str, Any] = {
        "strides": r.window("stride", rank),
        "pads": [*begins, *ends],
        "dilations": r.window("dilation", rank),
        "group": int(r["groups"]),
        "kernel_shape": r.sizes("weight")[2:],
    }
    operation = "Conv"
    if r["transposed"]:
        operation, attributes["output_padding"] = "ConvTranspose", r.window("output_padding", rank)
    operands = [r.input(source), r.known("weight")] + ([r.known("bias")] if r["bias"] is not None else [])
    r.end(operation, operands, **attributes)


def _pool(r: Reading, operation: str, **attributes: Any) -> None:
    """Windows that reach as far as the output's size needs: so is rounding up said, too."""
    sizes = r.sizes()
    rank = len(value(r.node)[0].shape if isinstance(value(r.node), tuple | list) else r.shape) - 2
    if rank not in (1, 2, 3):
        raise Refusal(f"{rank} axes of an image; 1 to 3 are supported")
    kernel = r.window("kernel_size", rank)
    strides = [stride or size for stride, size in zip(r.window("stride", rank, 0), kernel, strict=True)]
    dilations = r.window("dilation", rank) if "dilation" in r.arguments else [1] * rank
    padding = r.window("padding", rank)
    ends = []
    for size, out, k, s, d, begin in zip(sizes[2:], r.shape[2:], kernel, strides, dilations, padding, strict=True):
        reach = (out - 1) * s + (k - 1) * d + 1 - size - begin
        if reach > begin and attributes.get("count_include_pad"):
            raise Refusal("a mean over padding that rounding up adds")
        ends.append(max(reach, 0) if not attributes.get("count_include_pad") else begin)
    r.end(operation, [r.input()], kernel_shape=kernel, strides=strides, pads=[*padding, *ends], **attributes)


def _max_pool(r: Reading) -> None:
    if isinstance(value(r.node), tuple | list):
        r.first_only()
    rank = len(r.shape) - 2
    _pool(r, "MaxPool", dilations=r.window("dilation", rank))


def _average_pool(r: Reading) -> None:
    r.require("divisor_override", None)
    _pool(r, "AveragePool", count_include_pad=int(r["count_include_pad"]))


def _adaptive_pool(operation: str) -> Callable[[Reading], None]:
    def read(r: Reading) -> None:
        if isinstance(value(r.node), tuple | list):
            r.first_only()
        sizes, out = r.sizes()[2:], r.shape[2:]
        if len(r.shape) != len(out) + 2 or any(size % parts for size, parts in zip(sizes, out, strict=True)):
            raise Refusal(f"windows of different sizes: {list(sizes)} to {list(out)}")
        kernel = [size // parts for size, parts in zip(sizes, out, strict=True)]
        r.end(operation, [r.input()], kernel_shape=kernel, strides=kernel)

    return read


def _reduce(operation: str) -> Callable[[Reading], None]:
    def read(r: Reading) -> None:
        if "dtype" in r.arguments:
            r.require("dtype", None, torch.float32)
        axes = r.axes("dim") if "dim" in r.arguments else list(range(len(r.sizes())))
        kept = int(r["keepdim"]) if "keepdim" in r.arguments else 0
        r.end(operation, [r.input(), r.integers(axes)], keepdims=kept)

    return read


def _vector_norm(r: Reading) -> None:
    r.require("dtype", None, torch.float32)
    r.require("ord", 1, 2)
    r.end(f"ReduceL{int(r['ord'])}", [r.input(), r.integers(r.axes("dim"))], keepdims=int(r["keepdim"]))


def _variance(root: bool) -> Callable[[Reading], None]:
    """The mean of what squares are, apart from the mean; of ``count - correction`` instead of ``count`` elements."""

    def read(r: Reading) -> None:
        source, axes, kept = r.input(), r.integers(r.axes("dim")), int(r["keepdim"])
        count = math.prod(r.sizes()[axis] for axis in r.axes("dim"))
        left = count - (1.0 if r["correction"] is None else float(r["correction"]))
        if left <= 0:
            raise Refusal(f"correction {r['correction']} of {count} elements")
        apart = r.add("Sub", [source, r.add("ReduceMean", [source, axes], keepdims=1)])
        total = r.add("ReduceSumSquare", [apart, axes], keepdims=kept)
        share = [total, r.constant(np.float32(1 / left))]
        r.end("Sqrt", [r.add("Mul", share)]) if root else r.end("Mul", share)

    return read


def _softmax(operation: str) -> Callable[[Reading], None]:
    def read(r: Reading) -> None:
        r.require("half_to_float", False)
        r.end(operation, [r.input()], axis=r.axis("dim"))

    return read


def _addmm(r: Reading) -> None:
    operands = [r.input("mat1"), r.input("mat2"), r.input("self")]
    r.end("Gemm", operands, alpha=float(r["alpha"]), beta=float(r["beta"]))


def _linear(r: Reading) -> None:
    turned = r.add("Transpose", [r.known("weight")], perm=[1, 0])
    if r["bias"] is None:
        return r.end("MatMul", [r.input("input"), turned])
    return r.end("Add", [r.add("MatMul", [r.input("input"), turned]), r.known("bias")])


#: What reads each operator, by its name with the overload.
READERS: Mapping[str, Callable[[Reading], None]] = {
    **{
        f"{name}.default": _simple(name.capitalize())
        for name in ("relu", "sigmoid", "tanh", "exp", "log", "sqrt", "abs", "neg", "reciprocal", "floor", "ceil")
    },
    **{f"{name}.default": _simple(name.capitalize()) for name in ("erf", "sin", "cos", "mish")},
    "hardswish.default": _simple("HardSwish"),
    "hardsigmoid.default": lambda r: r.end("HardSigmoid", [r.input()], alpha=1 / 6, beta=0.5),
    "silu.default": _silu,
    "gelu.default": lambda r: r.end("Gelu", [r.input()], approximate=r["approximate"]),
    "leaky_relu.default": lambda r: r.end("LeakyRelu", [r.input()], alpha=float(r["negative_slope"])),
    "elu.default": _elu,
    "celu.default": lambda r: r.end("Celu", [r.input()], alpha=float(r["alpha"])),
    "selu.default": _simple("Selu"),
    "glu.default": _glu,
    "softplus.default": _softplus,
    "hardtanh.default": _clip("min_val", "max_val"),
    "relu6.default": lambda r: r.end("Clip", [r.input(), *(r.constant(np.float32(bound)) for bound in (0, 6))]),
    "clamp.default": _clip("min", "max"),
    "clamp_min.default": lambda r: r.end("Clip", [r.input(), r.constant(np.float32(r.number("min", 0)))]),
    "clamp_max.default": lambda r: r.end("Clip", [r.input(), "", r.constant(np.float32(r.number("max", 0)))]),
    "_prelu_kernel.default": _prelu,
    "rsqrt.default": lambda r: r.end("Reciprocal", [r.add("Sqrt", [r.input()])]),
    "square.default": _square,
    "sign.default": _simple("Sign"),
    **{f"round.{overload}": _round for overload in ("default", "decimals")},
    **{f"add.{overload}": _scaled("Add") for overload in ("Tensor", "Scalar")},
    **{f"sub.{overload}": _scaled("Sub") for overload in ("Tensor", "Scalar")},
    **{f"rsub.{overload}": _scaled("Sub", "other", "self") for overload in ("Tensor", "Scalar")},
    **{f"mul.{overload}": _simple("Mul", "self", "other") for overload in ("Tensor", "Scalar")},
    **{f"div.{overload}": _simple("Div", "self", "other") for overload in ("Tensor", "Scalar")},
    **{f"pow.Tensor_{overload}": _simple("Pow", "self", "exponent") for overload in ("Tensor", "Scalar")},
    "maximum.default": _simple("Max", "self", "other"),
    "minimum.default": _simple("Min", "self", "other"),
    **{f"{name}.default": _copied for name in ("clone", "alias", "detach", "lift_fresh_copy")},
    "_to_copy.default": _converted,
    "as_strided.default": _restrided,
    "_native_batch_norm_legit_no_training.default": _batch_norm,
    "_native_batch_norm_legit.no_stats": _norm_of_its_own,
    "native_layer_norm.default": _layer_norm,
    "native_group_norm.default": _group_norm,
    **{f"{name}.default": _reshape for name in ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze")},
    **{f"squeeze.{overload}": _reshape for overload in ("dim", "dims")},
    "flatten.using_ints": _reshape,
    "expand.default": _expand,
    "permute.default": _permute,
    "t.default": _transpose(0, 1),
    "transpose.int": _transpose("dim0", "dim1"),
    "cat.default": _cat,
    "stack.default": _stack,
    "split.Tensor": _split,
    "split_with_sizes.default": _split,
    "unbind.int": _unbind,
    "repeat.default": _repeat,
    "flip.default": _flip,
    "roll.default": _roll,
    "slice.Tensor": _slice,
    "select.int": _select,
    "constant_pad_nd.default": _pad("constant"),
    **{f"reflection_pad{rank}d.default": _pad("reflect") for rank in (1, 2, 3)},
    **{f"replication_pad{rank}d.default": _pad("edge") for rank in (1, 2, 3)},
    "pixel_shuffle.default": lambda r: r.end(
        "DepthToSpace", [r.input()], blocksize=int(r["upscale_factor"]), mode="CRD"
    ),
    "pixel_unshuffle.default": _pixel_unshuffle,
    "channel_shuffle.default": _channel_shuffle,
    **{f"upsample_nearest{rank}d.{kind}": resize("nearest") for rank in (1, 2, 3) for kind in ("default", "vec")},
    **{f"upsample_bilinear2d.{kind}": resize("linear") for kind in ("default", "vec")},
    "_unsafe_index.Tensor": gathered,
    "index.Tensor": gathered,
    "convolution.default": _convolution,
    "convgen.convolution.default": _own_convolution,
    **{f"max_pool{rank}d_with_indices.default": _max_pool for rank in (2, 3)},
    "max_pool2d.default": _max_pool,
    **{f"avg_pool{rank}d.default": _average_pool for rank in (2, 3)},
    "_adaptive_avg_pool2d.default": _adaptive_pool("AveragePool"),
    "_adaptive_avg_pool3d.default": _adaptive_pool("AveragePool"),
    "adaptive_max_pool2d.default": _adaptive_pool("MaxPool"),
    "mean.dim": _reduce("ReduceMean"),
    "mean.default": _reduce("ReduceMean"),
    "sum.dim_IntList": _reduce("ReduceSum"),
    "sum.default": _reduce("ReduceSum"),
    "amax.default": _reduce("ReduceMax"),
    "amin.default": _reduce("ReduceMin"),
    **{f"prod.{overload}": _reduce("ReduceProd") for overload in ("default", "dim_int")},
    "logsumexp.default": _reduce("ReduceLogSumExp"),
    "linalg_vector_norm.default": _vector_norm,
    "var.correction": _variance(root=False),
    "std.correction": _variance(root=True),
    "_softmax.default": _softmax("Softmax"),
    "_log_softmax.default": _softmax("LogSoftmax"),
    "mm.default": _simple("MatMul", "self", "mat2"),
    "bmm.default": _simple("MatMul", "self", "mat2"),
    "addmm.default": _addmm,
    "linear.default": _linear,
}
#: Operators that a network is made for: what has none of them stays PyTorch's.
PRODUCTS = frozenset(
    f"{name}.default" for name in ("convolution", "convgen.convolution", "mm", "bmm", "addmm", "linear")
)
