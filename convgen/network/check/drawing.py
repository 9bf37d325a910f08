"""Networks drawn at random, as ONNX models: of every operator that networks take, with what ONNX Runtime makes of them.

Every node is run by ONNX Runtime as soon as it is drawn, alone. So its output's shape and values are known, what ONNX
Runtime refuses is drawn again, and every subset of a network's nodes is a network too, whose inputs have values: those
are what a failing network is shrunk to.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from .drawn import Array, Drawn, model_of, run_model

#: Versions of ONNX's operators that networks are drawn in: between them axes became inputs, and Softmax another one.
OPSETS = (11, 13, 18, 21)
#: Most elements of a tensor, and the largest magnitude of one.
MOST_ELEMENTS, MOST = 1 << 14, 1e4
#: How often an operand is a constant that might have been a tensor.
CONSTANT = 0.03
#: Parts that a network has, and how often a part is drawn before it is left out.
PARTS, TRIES = 8, 12
_REFUSALS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


class _Left(Exception):  # noqa: N818  (an answer more than an error)
    """What was drawn cannot be part of a network."""


def draw_network(seed: int, index: int, parts: int = PARTS) -> Drawn:
    """Network ``index`` of a seed."""
    return _Drawing(random.Random(f"{seed} {index}"), parts).made


class _Drawing:
    """One network as it is drawn."""

    def __init__(self, rng: random.Random, parts: int) -> None:
        self.rng, self.numbers = rng, np.random.default_rng(rng.randrange(1 << 32))
        self.made = Drawn(rng.choice(OPSETS))
        for _ in range(rng.choice((1, 1, 1, 2))):
            self._input()
        wanted = rng.randint(1, parts)
        for _ in range(wanted):
            self._part(rng.choice(_PARTS))

    def _input(self) -> None:
        rng, name = self.rng, f"x{len(self.made.inputs)}"
        rank = rng.choice((4, 4, 4, 4, 3, 5, 2, 1))
        channels = rng.choice((1, 3, 8, 16, 16, 17, 32))
        size = {1: 40, 2: 40, 3: 30, 4: 12, 5: 5}[rank]
        spatial = tuple(rng.randint(1, size) for _ in range(rank - 2))
        shape = (rng.choice((1, 1, 2)), channels, *spatial)[:rank]
        self.made.inputs.append(name)
        self.made.values[name] = self.numbers.standard_normal(shape, np.float32)

    def _part(self, part: Callable[[_Drawing], None]) -> None:
        """Draw a part until one can be computed; leave out one that fails again and again."""
        made = self.made
        for _ in range(TRIES):
            before = len(made.nodes), len(made.constants), len(made.values)
            with suppress(_Left):
                return part(self)
            del made.nodes[before[0] :]
            for known, count in ((made.constants, before[1]), (made.values, before[2])):
                for name in list(known)[count:]:
                    del known[name]
        return None

    # ---- what parts are made of ----

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.made.constants)}"
        self.made.constants[name] = np.array(value, dtype)
        return name

    def normal(self, shape: Sequence[int], scale: float = 1.0) -> str:
        return self.constant(scale * self.numbers.standard_normal(shape))

    def integers(self, values: Sequence[int]) -> str:
        return self.constant(values, np.int64)

    def shape(self, name: str) -> tuple[int, ...]:
        known = self.made.values if name in self.made.values else self.made.constants
        return tuple(known[name].shape)

    def tensors(self, fit: Callable[[Array], bool]) -> list[str]:
        """Tensors of f32 of a kind; those of truth values are read where they are made."""
        return [name for name, array in self.made.values.items() if array.dtype == np.float32 and fit(array)]

    def pick(self, *ranks: int) -> str:
        """A tensor of one of the ranks, or of any; one of the last more often, a constant seldom."""
        if self.rng.random() < CONSTANT:
            sizes = (1, 1, 2, 3, 8, 16)
            return self.normal([self.rng.choice(sizes) for _ in range(self.rng.choice(ranks or (0, 1, 2, 4)))])
        names = self.tensors(lambda array: not ranks or array.ndim in ranks)
        if not names:
            raise _Left
        return self.rng.choice(names[-3:] if self.rng.random() < 0.7 else names)

    def add(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        """A node that ONNX Runtime computes now; its first output."""
        made = self.made
        names = [f"v{len(made.values) + number}" for number in range(outputs)]
        node = helper.make_node(op, list(inputs), names, name=f"n{len(made.nodes)}", **attributes)
        given = {name: made.values[name] for name in inputs if name in made.values}
        constants = {name: made.constants[name] for name in inputs if name in made.constants}
        try:
            with np.errstate(all="ignore"):
                found = run_model(model_of([node], given, names, constants, made.opset), given)
        except _REFUSALS as error:
            raise _Left from error
        for array in found.values():
            if not 0 < array.size <= MOST_ELEMENTS or not (np.abs(array.astype(np.float32)) <= MOST).all():
                raise _Left
        made.nodes.append(node)
        made.values |= found
        return names[0]

    def with_axes(self, op: str, source: str, axes: Sequence[int], since: int, **attributes: Any) -> str:
        """A node whose axes are an attribute before a version of ONNX, and an input since."""
        if self.made.opset < since:
            return self.add(op, [source], axes=axes, **attributes)
        return self.add(op, [source, self.integers(axes)], **attributes)

    def some_axes(self, rank: int) -> list[int]:
        axes = self.rng.sample(range(rank), self.rng.randint(1, rank)) if rank else []
        return sorted(axis - rank if self.rng.random() < 0.3 else axis for axis in axes)

    def padding(self, rank: int, most: int) -> list[int]:
        return [self.rng.randint(0, most) for _ in range(2 * rank)]


# ---- convolutions and products -----------------------------------------------------------------


def _convolution(d: _Drawing) -> None:
    source, rng = d.pick(3, 4, 5), d.rng
    shape = d.shape(source)
    rank, ic = len(shape) - 2, shape[1]
    groups = rng.choice([1, 1, ic, *(size for size in (2, 4) if ic % size == 0)])
    oc = rng.choice((ic, groups, 2 * groups, 8 * groups, 16 * groups))
    kernel = [rng.choice((1, 2, 3, 3, 5)) for _ in range(rank)] if rng.random() < 0.7 else [1] * rank
    common: dict[str, Any] = {"group": groups, "strides": [rng.choice((1, 1, 2, 3)) for _ in range(rank)]}
    if rng.random() < 0.2:
        common["dilations"] = [rng.choice((1, 2)) for _ in range(rank)]
    transposed = rng.random() < 0.15
    if rng.random() < 0.2 and not transposed:
        common["auto_pad"] = rng.choice(("SAME_UPPER", "SAME_LOWER", "VALID"))
    elif rng.random() < 0.8:
        common["pads"] = [k // 2 for k in kernel] * 2 if rng.random() < 0.6 else d.padding(rank, max(kernel) - 1)
    if oc % groups or oc > 64:
        raise _Left
    taps = math.prod(kernel) * (oc if transposed else ic) // groups
    weights_shape = (ic, oc // groups, *kernel) if transposed else (oc, ic // groups, *kernel)
    parameters = [source, d.normal(weights_shape, taps**-0.5)]
    if rng.random() < 0.5:
        parameters.append(d.normal((oc,)))
    made = d.add("ConvTranspose" if transposed else "Conv", parameters, **common)
    if rng.random() < 0.3 and (
        alike := [n for n, a in d.made.values.items() if a.shape == d.shape(made) and n != made]
    ):
        made = d.add("Add", rng.sample([made, rng.choice(alike)], 2))
    if rng.random() < 0.5:
        d.add(rng.choice(("Relu", "Sigmoid", "HardSigmoid", "LeakyRelu", "Tanh")), [made])


def _product(d: _Drawing) -> None:
    source, rng = d.pick(1, 2, 3, 4), d.rng
    shape = d.shape(source)
    columns, depth = rng.choice((1, 7, 16, 33)), shape[-1]
    if len(shape) == 2 and rng.random() < 0.5:
        trans_a, trans_b = rng.random() < 0.2, rng.random() < 0.5
        rows, depth = shape[::-1] if trans_a else shape
        right = d.normal((columns, depth) if trans_b else (depth, columns), depth**-0.5)
        added = [rng.choice((d.normal((columns,)), d.normal((rows, 1)), d.normal(())))] if rng.random() < 0.7 else []
        attributes: dict[str, Any] = {"transA": int(trans_a), "transB": int(trans_b)}
        attributes |= {name: rng.choice((0.5, 2.0)) for name in ("alpha", "beta") if rng.random() < 0.3}
        made = d.add("Gemm", [source, right, *added], **attributes)
    elif len(shape) > 1 and rng.random() < 0.4:  # of two tensors that are computed
        perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        made = d.add("MatMul", [source, d.add("Transpose", [source], perm=perm)])
    else:
        outer = shape[:-2] if rng.random() < 0.2 else ()
        made = d.add("MatMul", [source, d.normal((*outer, depth, columns), depth**-0.5)])
    if rng.random() < 0.5 and d.shape(made):
        made = d.add("Add", rng.sample([made, d.normal(d.shape(made)[-1:])], 2))
    if rng.random() < 0.3:
        d.add("Relu", [made])


# ---- element by element ------------------------------------------------------------------------

_UNARY: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in ("Relu", "Sigmoid", "Tanh", "HardSigmoid", "LeakyRelu", "Elu", "Softplus", "Softsign")),
    *((name, {}) for name in ("Exp", "Log", "Sqrt", "Abs", "Neg", "Reciprocal", "Floor", "Ceil", "Erf", "Sin", "Cos")),
    *((name, {}) for name in ("HardSwish", "Mish", "Gelu", "Identity", "Dropout", "Selu", "Celu", "ThresholdedRelu")),
    *((name, {}) for name in ("Round", "Sign")),
    ("LeakyRelu", {"alpha": 0.3}),
    ("Elu", {"alpha": 0.5}),
    ("HardSigmoid", {"alpha": 0.25, "beta": 0.4}),
    ("Gelu", {"approximate": "tanh"}),
)


def _unary(d: _Drawing) -> None:
    source = d.pick()
    op, attributes = d.rng.choice(_UNARY)
    if op in ("Log", "Sqrt") and d.rng.random() < 0.7:
        source = d.add("Abs", [source])
    d.add(op, [source], **attributes)


def _clip(d: _Drawing) -> None:
    ends = [d.constant(-0.5) if d.rng.random() < 0.7 else "", d.constant(0.75) if d.rng.random() < 0.7 else ""]
    d.add("Clip", [d.pick(), *ends])


def _swish(d: _Drawing) -> None:
    source = d.pick()
    d.add("Mul", d.rng.sample([source, d.add("Sigmoid", [source])], 2))


def _broadcast(d: _Drawing, shape: Sequence[int]) -> list[int]:
    """A shape that broadcasts to another."""
    kept = [size if d.rng.random() < 0.6 else 1 for size in shape]
    return kept[d.rng.randint(0, len(kept)) :] if d.rng.random() < 0.4 else kept


def _binary(d: _Drawing) -> None:
    left, rng = d.pick(), d.rng
    shape = d.shape(left)
    alike = d.tensors(lambda array: _fits(array.shape, shape))
    choice = rng.random()
    if choice < 0.5 and alike:
        right = rng.choice(alike)
    elif choice < 0.8:
        right = d.normal(_broadcast(d, shape))
    else:
        right = d.constant(rng.choice((2.0, 0.5, -1.0, 3.0)))
    op = rng.choice(("Add", "Add", "Sub", "Mul", "Mul", "Div", "Max", "Min", "Mean", "Sum", "Pow", "PRelu"))
    operands = [left, right] if op in ("PRelu", "Pow") else rng.sample([left, right], 2)
    if op in ("Max", "Min", "Mean", "Sum") and rng.random() < 0.3:
        operands.append(rng.choice([left, *alike]))
    if op == "PRelu" and np.broadcast_shapes(shape, d.shape(right)) != shape:
        raise _Left
    d.add(op, operands)


def _choice(d: _Drawing) -> None:
    """Comparisons, and what is chosen by them."""
    left, rng = d.pick(), d.rng
    right = rng.choice((d.constant(0.25), d.normal(_broadcast(d, d.shape(left)))))
    truth = d.add(rng.choice(("Greater", "Less", "Equal")), [left, right])
    if rng.random() < 0.3:
        truth = d.add("Not", [truth])
    if rng.random() < 0.3:
        truth = d.add(rng.choice(("And", "Or", "Xor")), [truth, d.add("Less", [left, d.constant(1.0)])])
    d.add("Where", rng.choice(([truth, left, d.constant(0.0)], [truth, d.constant(-1.0), left])))


def _fits(shape: Sequence[int], other: Sequence[int]) -> bool:
    try:
        return math.prod(np.broadcast_shapes(tuple(shape), tuple(other))) <= MOST_ELEMENTS
    except ValueError:
        return False


def _squeeze_excite(d: _Drawing) -> None:
    source = d.pick(4)
    c = d.shape(source)[1]
    mean = d.add("GlobalAveragePool", [source])
    gate = d.add("Conv", [mean, d.normal((c, c, 1, 1), c**-0.5), d.normal((c,))])
    d.add("Mul", [source, d.add("Sigmoid", [gate])])


# ---- from one place to another -----------------------------------------------------------------


def _factors(d: _Drawing, count: int) -> list[int]:
    """Sizes of as many axes as are drawn, whose product is a count."""
    sizes = []
    for _ in range(d.rng.randint(0, 4)):
        size = d.rng.choice([k for k in range(1, min(count, 64) + 1) if count % k == 0])
        sizes.append(size)
        count //= size
    return [*sizes, count]


def _reshape(d: _Drawing) -> None:
    source, rng = d.pick(), d.rng
    shape = d.shape(source)
    rank = len(shape)
    match rng.choice(("reshape", "reshape", "flatten", "squeeze", "unsqueeze")):
        case "reshape":
            sizes = _factors(d, math.prod(shape))
            if rng.random() < 0.5 and math.prod(shape) == math.prod(shape[:2]) * math.prod(sizes[2:] or [1]):
                sizes[:2] = shape[:2]
            d.add("Reshape", [source, d.integers(sizes)])
        case "flatten":
            d.add("Flatten", [source], axis=rng.randint(0, rank))
        case "squeeze":
            ones = [axis for axis, size in enumerate(shape) if size == 1]
            if not ones:
                raise _Left
            d.with_axes("Squeeze", source, rng.sample(ones, rng.randint(1, len(ones))), 13)
        case "unsqueeze":
            if rank > 4:
                raise _Left
            d.with_axes("Unsqueeze", source, [rng.randint(0, rank)], 13)


def _transpose(d: _Drawing) -> None:
    source = d.pick(1, 2, 3, 4, 5)
    perm = list(range(len(d.shape(source))))
    if d.rng.random() < 0.5 and len(perm) > 2:
        perm = d.rng.choice(([0, *perm[2:], 1], [0, perm[-1], *perm[1:-1]]))
    else:
        d.rng.shuffle(perm)
    d.add("Transpose", [source], perm=perm)


def _concat(d: _Drawing) -> None:
    source, rng = d.pick(1, 2, 3, 4, 5), d.rng
    shape = d.shape(source)
    axis = rng.choice((0, 1, 1, 1, len(shape) - 1)) if len(shape) > 1 else 0

    def matches(other: Array) -> bool:
        return other.ndim == len(shape) and all(
            a == b or i == axis for i, (a, b) in enumerate(zip(other.shape, shape, strict=True))
        )

    others = d.tensors(matches)
    parts = [source, *rng.choices([*others, source], k=rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.1:
        parts.append(d.normal(shape))
    d.add("Concat", rng.sample(parts, len(parts)), axis=axis - len(shape) if rng.random() < 0.2 else axis)


def _split(d: _Drawing) -> None:
    source, rng = d.pick(1, 2, 3, 4, 5), d.rng
    shape = d.shape(source)
    axis = 1 if len(shape) > 1 and rng.random() < 0.6 else rng.randrange(len(shape))
    sizes = _parts(d, shape[axis])
    if d.made.opset < 13:
        d.add("Split", [source], len(sizes), axis=axis, split=sizes)
    else:
        d.add("Split", [source, d.integers(sizes)], len(sizes), axis=axis)


def _parts(d: _Drawing, size: int) -> list[int]:
    if size < 2:
        return [size]
    if size % 16 == 0 and size > 16 and d.rng.random() < 0.5:
        return [16, size - 16]
    if size % 2 == 0 and d.rng.random() < 0.5:
        return [size // 2] * 2
    first = d.rng.randint(1, size - 1)
    return [first, size - first]


def _slice(d: _Drawing) -> None:
    source, rng = d.pick(1, 2, 3, 4, 5), d.rng
    shape = d.shape(source)
    axes = d.some_axes(len(shape))
    starts, ends, steps = [], [], []
    for axis in axes:
        size = shape[axis]
        step = rng.choice((1, 1, 1, 2, 3, -1, -2))
        low, high = sorted((rng.randint(0, size), rng.randint(0, size)))
        start, end = (low, high) if step > 0 else (high, low - 1 if low else -size - 1)
        if step > 0 and rng.random() < 0.3:
            start, end = start - size if start < size else start, 1 << 40
        starts.append(start)
        ends.append(end)
        steps.append(step)
    d.add("Slice", [source, *map(d.integers, (starts, ends, axes, steps))])


def _pad(d: _Drawing) -> None:
    source, rng = d.pick(1, 2, 3, 4, 5), d.rng
    rank = len(d.shape(source))
    pads = [rng.choice((0, 0, 1, 2, 3)) for _ in range(2 * rank)]
    if rank > 2:
        pads[:2] = pads[rank : rank + 2] = [0, rng.choice((0, 0, 1, 16))]
    if rng.random() < 0.2:
        pads[rng.randrange(2 * rank)] = -1
    modes = ("constant", "constant", "edge", "reflect", *(("wrap",) if d.made.opset >= 19 else ()))
    value = [d.constant(0.5)] if rng.random() < 0.3 else []
    mode = rng.choice(modes)
    d.add("Pad", [source, d.integers(pads), *(value if mode == "constant" else [])], mode=mode)


def _expand(d: _Drawing) -> None:
    source = d.pick()
    shape = [size if size > 1 else d.rng.randint(1, 3) for size in d.shape(source)]
    d.add("Expand", [source, d.integers([2] * (len(shape) < 4 and d.rng.random() < 0.3) + shape)])


def _resize(d: _Drawing) -> None:
    source, rng = d.pick(3, 4, 5), d.rng
    shape = d.shape(source)
    mode = rng.choice(("nearest", "nearest", "linear"))
    transforms = ("half_pixel", "half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": rng.choice(transforms)}
    if mode == "nearest":
        attributes["nearest_mode"] = rng.choice(("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"))
    if rng.random() < 0.6:
        scales = [1.0, 1.0, *(rng.choice((0.5, 1.0, 1.5, 2.0, 2.0, 3.0)) for _ in shape[2:])]
        d.add("Resize", [source, d.constant([]), d.constant(scales)], **attributes)
    else:
        sizes = [*shape[:2], *(rng.randint(1, 2 * size + 1) for size in shape[2:])]
        d.add("Resize", [source, d.constant([]), d.constant([]), d.integers(sizes)], **attributes)


def _shuffle(d: _Drawing) -> None:
    source = d.pick(4)
    n, c, h, w = d.shape(source)
    if c % 2:
        raise _Left
    match d.rng.choice(("channels", "depth", "space")):
        case "channels":
            parted = d.add("Reshape", [source, d.integers([n, 2, c // 2, h, w])])
            turned = d.add("Transpose", [parted], perm=[0, 2, 1, 3, 4])
            d.add("Reshape", [turned, d.integers([n, c, h, w])])
        case "depth":
            d.add("DepthToSpace", [source], blocksize=2, mode=d.rng.choice(("DCR", "CRD")))
        case "space":
            d.add("SpaceToDepth", [source], blocksize=2)


def _gather(d: _Drawing) -> None:
    source, rng = d.pick(1, 2, 3, 4), d.rng
    shape = d.shape(source)
    axis = rng.randrange(len(shape))
    many = rng.choice(((), (1,), (3,), (2, 2)))
    places = d.numbers.integers(-shape[axis], shape[axis], many)
    d.add("Gather", [source, d.constant(places, np.int64)], axis=axis)


def _tile(d: _Drawing) -> None:
    source = d.pick(1, 2, 3, 4)
    d.add("Tile", [source, d.integers([d.rng.choice((1, 1, 2)) for _ in d.shape(source)])])


# ---- over many elements ------------------------------------------------------------------------


def _pool(d: _Drawing) -> None:
    source, rng = d.pick(3, 4, 5), d.rng
    rank = len(d.shape(source)) - 2
    op = rng.choice(("MaxPool", "AveragePool"))
    kernel = [rng.choice((1, 2, 3, 3)) for _ in range(rank)]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": [rng.choice((1, 2, 2, 3)) for _ in range(rank)]}
    if rng.random() < 0.2:
        attributes["auto_pad"] = rng.choice(("SAME_UPPER", "SAME_LOWER", "VALID"))
    else:
        attributes["pads"] = [rng.randint(0, k - 1) for k in kernel * 2]
        attributes["ceil_mode"] = int(rng.random() < 0.3)
    may_dilate = "pads" in attributes or attributes["auto_pad"] == "VALID"
    if not may_dilate:  # else ONNX Runtime's windows begin in the middle
        attributes["strides"] = [min(pair) for pair in zip(attributes["strides"], kernel, strict=True)]
    if rng.random() < 0.2 and may_dilate and (op == "MaxPool" or d.made.opset >= 19):
        attributes["dilations"] = [rng.choice((1, 2)) for _ in range(rank)]
    pads, dilations = attributes.get("pads", [0] * 2 * rank), attributes.get("dilations", [1] * rank)
    for axis, size in enumerate(d.shape(source)[2:]):  # ONNX Runtime has an output where no window fits
        if (kernel[axis] - 1) * dilations[axis] + 1 > size + pads[axis] + pads[axis + rank]:
            raise _Left
    if op == "AveragePool" and rng.random() < 0.4:
        attributes["count_include_pad"] = 1
    d.add(op, [source], **attributes)


def _global(d: _Drawing) -> None:
    d.add(d.rng.choice(("GlobalAveragePool", "GlobalMaxPool")), [d.pick(3, 4, 5)])


def _reduce(d: _Drawing) -> None:
    source, rng = d.pick(1, 2, 3, 4, 5), d.rng
    words = ("Mean", "Sum", "Max", "Min", "SumSquare", "L1", "L2", "Prod", "LogSumExp", "LogSum")
    op = f"Reduce{rng.choice(words)}"
    axes, keepdims = d.some_axes(len(d.shape(source))), rng.randint(0, 1)
    d.with_axes(op, source, axes, 13 if op == "ReduceSum" else 18, keepdims=keepdims)


def _softmax(d: _Drawing) -> None:
    source = d.pick(1, 2, 3, 4)
    op = d.rng.choice(("Softmax", "Softmax", "LogSoftmax"))
    d.add(op, [source], axis=d.rng.randint(-1, len(d.shape(source)) - 1))


def _normalised(d: _Drawing) -> None:
    rng, opset = d.rng, d.made.opset
    match rng.choice(("batch", "layer", "instance", "lrn", "group")):
        case "batch":
            source = d.pick(2, 3, 4, 5)
            c = d.shape(source)[1]
            variance = d.constant(np.abs(d.numbers.standard_normal(c)) + 0.5)
            d.add("BatchNormalization", [source, *(d.normal((c,)) for _ in range(3)), variance])
        case "layer" if opset >= 17:
            source = d.pick(2, 3, 4)
            axis = rng.randint(-2, -1)
            shape = d.shape(source)[axis:]
            affine = [d.normal(shape), *([d.normal(shape)] if rng.random() < 0.7 else [])]
            d.add("LayerNormalization", [source, *affine], axis=axis)
        case "instance":
            source = d.pick(3, 4, 5)
            c = d.shape(source)[1]
            d.add("InstanceNormalization", [source, d.normal((c,)), d.normal((c,))])
        case "lrn":
            d.add("LRN", [d.pick(4)], size=rng.choice((1, 3, 4, 5)), alpha=0.5, beta=rng.choice((0.75, 0.5, 0.6)))
        case "group" if opset >= 21:
            source = d.pick(3, 4)
            c = d.shape(source)[1]
            groups = rng.choice([k for k in (1, 2, 4, c) if c % k == 0])
            d.add("GroupNormalization", [source, d.normal((c,)), d.normal((c,))], num_groups=groups)
        case _:
            raise _Left


# ---- integers ----------------------------------------------------------------------------------


def _quantised(d: _Drawing) -> None:
    """What is quantised, bounded as it is stored, and dequantised."""
    source, rng = d.pick(), d.rng
    dtype = rng.choice((np.uint8, np.int8))
    info = np.iinfo(dtype)
    how = [d.constant(rng.choice((0.01, 0.05, 0.3))), d.constant(rng.randint(info.min, info.max), dtype)]
    stored = d.add("QuantizeLinear", [source, *how])
    if d.made.opset >= 13 and rng.random() < 0.7:
        bounds = sorted(rng.randint(info.min, info.max) for _ in range(2))
        stored = d.add("Clip", [stored, *(d.constant(bound, dtype) for bound in bounds)])
    if d.made.opset >= 18 and dtype == np.int8 and rng.random() < 0.3:
        stored = d.add("Relu", [stored])
    d.add("DequantizeLinear", [stored, *how])


_BYTES = (TensorProto.UINT8, TensorProto.INT8)


def _whole(d: _Drawing) -> None:
    """Whole numbers of floats, computed with as i32."""
    source, rng = d.pick(), d.rng
    whole = d.add("Cast", [d.add("Mul", [source, d.constant(16.0)])], to=TensorProto.INT32)
    other = d.constant(d.numbers.integers(-9, 9, _broadcast(d, d.shape(source))), np.int32)
    op = rng.choice(("Add", "Sub", "Mul", *(("Max", "Min") if d.made.opset >= 13 else ())))
    whole = d.add(op, rng.sample([whole, other], 2))
    if rng.random() < 0.3:
        whole = d.add("Cast", [d.add("Cast", [whole], to=_BYTES[rng.random() < 0.5])], to=TensorProto.INT32)
    d.add("Cast", [whole], to=TensorProto.FLOAT)


#: What networks are drawn of, convolutions more often.
_PARTS: tuple[Callable[[_Drawing], None], ...] = (
    *(4 * (_convolution,)),
    *(2 * (_product, _unary, _binary, _concat, _pool)),
    *(_clip, _choice, _swish, _squeeze_excite, _reshape, _transpose, _split, _slice, _pad, _expand, _resize, _shuffle),
    *(_global, _reduce, _softmax, _normalised, _gather, _tile, _quantised, _whole),
)
