"""How far a network's tensors may be from ONNX Runtime's: the bounds of its operators, accumulated through the graph.

Every operator is computed here a third time, in f64 with NumPy, along with what the errors of its operands become and
what its own roundings add. Bounds of convolutions are those of :mod:`convgen.check.bounds`. Errors of different origin
are taken to be independent, as roundings are, so that their squares add up (Higham & Mary, *A New Approach to
Probabilistic Rounding Error Analysis*, SIAM J. Sci. Comput. 41(5), 2019): for ``y = f(x1, x2, …)``

    error(y)² = Σ (f changed by error(xi))² + (roundings of f)²

Bounds of the worst case would double with every layer, and say nothing after a few. ``f`` is evaluated where its
operands are off by their errors, so steps, as those of Floor, are allowed for where a value is near one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from ...check.bounds import even_tolerance, tolerance
from ...check.reference import run_onnxruntime
from ...problem import dtypes
from ...problem.accuracy import ACTIVATION_ERROR, CLASS_FACTOR, SMALLEST_NORMAL, UNIT_ROUNDOFF
from ...problem.activation import Activation
from ...problem.dtypes import LONG_RANGES, RANGES, numpy_dtype
from ..graph import Convolution, Graph, Operator, Shape
from ..storage import NARROW, class_of

F64 = npt.NDArray[np.float64]
_U = UNIT_ROUNDOFF


@dataclass(frozen=True)
class Measured:
    """A tensor's values, and how far from them it may be computed."""

    value: F64
    error: F64


@dataclass(frozen=True)
class Call:
    """One operator and its operands; the shape of what it gives."""

    operator: Operator
    operands: Sequence[Measured]
    shape: Shape

    def __getitem__(self, name: str) -> Any:
        return self.operator.attributes[name]

    @property
    def values(self) -> list[F64]:
        return [operand.value for operand in self.operands]


_Rule = Callable[[Call], Measured]


def measure(
    graph: Graph, inputs: Mapping[str, npt.NDArray[Any]], transformed: Collection[str] = (), accuracy: str = "standard"
) -> dict[str, Measured]:
    """Values and bounds of all tensors of a graph.

    Args:
        graph: as it was read, or rewritten.
        inputs: the network's, by name.
        transformed: names of the nodes whose kernels do more than reorder sums.
        accuracy: the network's.
    """
    known = {name: Measured(np.asarray(array, np.float64), np.zeros(array.shape)) for name, array in inputs.items()}
    for name, array in graph.constants.items():
        value = np.asarray(array, np.float64)
        # One that was folded is computed elsewhere by what may round otherwise; its terms may have been larger than it.
        is_rounded = name in graph.folded and np.issubdtype(array.dtype, np.floating)
        largest = np.full(array.shape, np.abs(value).max(initial=0.0))
        known[name] = Measured(value, _few(largest) if is_rounded else np.zeros(array.shape))
    if accuracy in NARROW:
        known |= {name: _stored(known[name], accuracy) for name in inputs}
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            operands = [known[name] for name in node.inputs]
            looser = node.name in transformed
            if isinstance(node, Convolution):
                known[node.output] = _convolution(node, operands, graph.shapes[node.output], looser, accuracy)
            else:
                made = RULES[node.kind](Call(node, operands, graph.shapes[node.output]))
                if all(graph.dtype(name) in _WHOLE for name in (*node.inputs, node.output)):
                    made = _of_whole_numbers(made, operands)
                factor = CLASS_FACTOR[class_of(accuracy)] if looser else 1.0
                known[node.output] = Measured(made.value, made.error * factor + SMALLEST_NORMAL)
            if (dtype := accuracy if accuracy in NARROW else graph.dtype(node.output)) in ("f16", "bf16"):
                known[node.output] = _stored(known[node.output], dtype)
    return known


#: Types of whole numbers.
_WHOLE = (*RANGES, "i32")


def _of_whole_numbers(computed: Measured, operands: Sequence[Measured]) -> Measured:
    """What is computed of integers that are known is one, and wraps where it is longer than 32 bits."""
    exact = all(operand.error.max(initial=0.0) < 0.5 for operand in operands)
    wrapped = (computed.value + 2.0**31) % 2.0**32 - 2.0**31
    return Measured(wrapped, np.zeros_like(computed.error) if exact else computed.error)


def _stored(computed: Measured, dtype: str) -> Measured:
    """A tensor that is rounded where it is stored; subnormal numbers of f32 may become 0. What may be too large for the
    type may be anything.
    """
    size = np.abs(computed.value)
    rounding = dtypes.UNIT_ROUNDOFF[dtype] * size + max(dtypes.UNDERFLOW[dtype], SMALLEST_NORMAL)
    error = _joined(computed.error, rounding)
    return Measured(computed.value, np.where(size + error < dtypes.LARGEST[dtype], error, math.inf))


def _joined(*errors: npt.ArrayLike) -> F64:
    """Independent errors together."""
    return np.asarray(np.sqrt(reduce(lambda a, b: a + b, [np.square(error) for error in errors])))


def _convolution(
    node: Convolution, operands: Sequence[Measured], shape: Shape, transforms: bool, accuracy: str
) -> Measured:
    """``shape`` is the output's: the spec sees rows of matrices as pixels."""
    if node.spec.is_quantised:
        return _of_integers(node, operands, shape)
    spec = node.spec.with_(accuracy=class_of(accuracy))
    src, *residual = operands
    data: dict[str, Any] = dict(node.parameters) | {"src": src.value.astype(np.float32).reshape(spec.src_shape)}
    if residual:
        data["residual"] = residual[0].value.astype(np.float32).reshape(spec.dst_shape)
    value = np.asarray(run_onnxruntime(spec, **data), np.float64)
    local = np.asarray((even_tolerance if transforms else tolerance)(spec, data), np.float64)
    plain = spec.with_(activation="none", bias=False, residual=False)
    largest, weights = src.error.max(initial=0.0) or 1.0, np.asarray(data["weights"], np.float64)
    heaviest = np.abs(weights).max(initial=0.0) or 1.0
    squares = run_onnxruntime(
        plain,
        np.square(src.error / largest).astype(np.float32).reshape(spec.src_shape),
        np.square(weights / heaviest).astype(np.float32),
    )
    slope = spec.activation_op.lipschitz
    if spec.has_slope:
        slope = max(1.0, float(np.abs(data["slope"]).max()))
    passed = slope * largest * heaviest * np.sqrt(np.maximum(squares, 0)).reshape(shape)
    added = [slope * other.error.reshape(shape) for other in residual]
    if accuracy in NARROW:  # weights so small that they lose digits
        ones = np.ones(data["weights"].shape, np.float32)
        sums = run_onnxruntime(plain, np.abs(data["src"]), ones).reshape(shape)
        added.append(slope * dtypes.UNDERFLOW[accuracy] * np.asarray(sums, np.float64))
    return Measured(value.reshape(shape), _joined(passed, local.reshape(shape), *added))


def _of_integers(node: Convolution, operands: Sequence[Measured], shape: Shape) -> Measured:
    """A convolution of integers is exact but for what errors of src, whole steps of it, become, and a step more where
    they may round another way.
    """
    spec, (src, *residual) = node.spec, operands
    given: dict[str, Any] = {**node.parameters, "src": src.value.astype(numpy_dtype(spec.src_dtype))}
    given["src"] = given["src"].reshape(spec.src_shape)
    for other in residual:
        given["residual"] = other.value.astype(numpy_dtype(spec.residual_dtype)).reshape(spec.dst_shape)
    value = np.asarray(run_onnxruntime(spec, **given), np.float64)
    steps = np.where(src.error >= 0.5, np.rint(src.error), 0).astype(np.float32).reshape(spec.src_shape)
    weights = np.asarray(given["weights"], np.float32)
    if spec.weights_zero and not spec.transposed:
        weights = weights - given["weights_zero"].astype(np.float32).reshape(-1, *(1,) * (spec.rank + 1))
    plain = spec.with_(dtype="f32", activation="none", bias=False, residual=False)
    error = np.asarray(run_onnxruntime(plain, steps, np.abs(weights)), np.float64)
    if "scale" in given:
        error = error * np.abs(given["scale"]).reshape(spec.dst_blocks.shape(1, (1,) * spec.rank))
    if spec.dst_dtype in RANGES:
        error = np.where(error > 0, np.ceil(error) + 1, 0)
    for other in residual:
        product_scale, _, residual_scale, _ = (abs(float(number)) for number in given["sum"])
        added = error * product_scale + other.error.reshape(spec.dst_shape) * residual_scale
        error = np.where(added > 0, np.ceil(added) + 1, 0)
    if spec.dst_dtype == "f32":
        error = error + 4 * _U * np.abs(value)
    return Measured(value.reshape(shape), error.reshape(shape))


def _quantised(call: Call) -> Measured:
    """A step more or less where a number that is off may be rounded another way."""
    x, scale, *zero = call.operands
    (low, high), at = (RANGES | LONG_RANGES)[call["dtype"]], zero[0].value if zero else 0.0

    def stored(value: F64) -> F64:
        return np.asarray(np.clip(np.rint(value) + at, low, high))

    steps = x.value / scale.value
    off = _joined(x.error / np.abs(scale.value), steps * scale.error / np.abs(scale.value), 4 * _U * steps)
    value = stored(steps)
    error = np.maximum(np.abs(stored(steps + off) - value), np.abs(stored(steps - off) - value))
    return Measured(value, error + (zero[0].error if zero else 0.0))


def _within(x: F64, dtype: str) -> F64:
    return np.clip(x, *RANGES.get(dtype, (-(2.0**31), 2.0**31 - 2.0**7)))


def _wrapped(x: F64, dtype: str) -> F64:
    return np.asarray(x.astype(np.int64).astype(numpy_dtype(dtype)), np.float64)


# ---- element by element ------------------------------------------------------------------------


def _pointwise(function: Callable[..., F64], rounding: Callable[..., F64]) -> _Rule:
    """A function of elements: ``rounding`` says how far off it is itself, from its value and its operands."""

    def rule(call: Call) -> Measured:
        values = call.values
        value = np.asarray(function(call, *values), np.float64)
        errors: list[F64] = []
        for operand in {id(operand): operand for operand in call.operands}.values():  # one that is read twice is one
            moved = []
            for sign in (1, -1):
                changed = [o.value + sign * o.error if o is operand else o.value for o in call.operands]
                moved.append(np.abs(function(call, *changed) - value))
            errors.append(np.where(operand.error > 0, np.maximum(*moved), 0.0))
        return Measured(value, np.broadcast_to(_joined(*errors, rounding(value, *values)), value.shape))

    return rule


def _few(value: F64, *operands: F64) -> F64:
    """Some roundings of the result."""
    return 8 * _U * np.abs(value)


def _of_terms(value: F64, *operands: F64) -> F64:
    """Roundings of a sum, whose terms may cancel."""
    return 4 * _U * reduce(lambda a, b: a + b, [np.abs(operand) for operand in operands])


def _of_normalisation(value: F64, x: F64, scale: F64, shift: F64) -> F64:
    """The shift holds the mean times the scale, and may have lost digits: the mean is one of the elements' own size."""
    return np.asarray(4 * _U * (np.abs(scale) * (np.abs(x) + np.abs(x).max(initial=0.0)) + np.abs(shift)))


def _of_function(value: F64, *operands: F64) -> F64:
    """Of a function that is approximated: see :data:`~convgen.problem.accuracy.ACTIVATION_ERROR`."""
    return np.asarray(ACTIVATION_ERROR * _U * (np.abs(value) + np.abs(operands[0]) + 1))


def _of_exponential(value: F64, *operands: F64) -> F64:
    return np.asarray(ACTIVATION_ERROR * _U * np.abs(value) * (np.abs(operands[0]) + 1))


def _of_power(value: F64, *operands: F64) -> F64:
    digits = np.abs(operands[1] * np.log(np.abs(operands[0]) + SMALLEST_NORMAL))
    return np.asarray(ACTIVATION_ERROR * _U * np.abs(value) * (1 + digits))


def _sigmoid(x: F64) -> F64:
    return np.asarray(0.5 + 0.5 * np.tanh(x / 2))


def _erf(x: F64) -> F64:
    flat = [math.erf(v) if math.isfinite(v) else float(np.sign(v)) for v in np.ravel(x).tolist()]
    return np.array(flat).reshape(np.shape(x))


def _softplus(x: F64) -> F64:
    return np.asarray(np.logaddexp(0, x))


#: Activations by the names of :mod:`convgen.problem.activation`, of an element and parameters.
_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x, alpha: np.where(x < 0, alpha * x, x),
    "clip": lambda x, low, high: np.clip(x, low, high),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "hardsigmoid": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    "elu": lambda x, alpha: np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x),
    "gelu": lambda x: x / 2 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def _activate(call: Call, x: F64) -> F64:
    op = Activation.parse(call["activation"])
    return np.asarray(_ACTIVATIONS[op.name](x, *op.params))


def _plain(function: Callable[..., Any]) -> Callable[..., F64]:
    return lambda call, *values: np.asarray(function(*values))


def _folded(function: Callable[[F64, F64], F64]) -> Callable[..., F64]:
    return lambda call, *values: reduce(function, values)


_POINTWISE: dict[str, _Rule] = {
    "activate": _pointwise(_activate, _of_function),
    "identity": _pointwise(_plain(lambda x: x), lambda value, x: 0 * x),
    "scale_shift": _pointwise(_plain(lambda x, a, b: a * x + b), _of_normalisation),
    **{
        name: _pointwise(_folded(function), _of_terms)
        for name, function in (("add", np.add), ("sub", np.subtract), ("max", np.maximum), ("min", np.minimum))
    },
    "mul": _pointwise(_folded(np.multiply), _few),
    "div": _pointwise(_folded(np.divide), _few),
    "pow": _pointwise(_plain(np.power), _of_power),
    "prelu": _pointwise(_plain(lambda x, slope: np.where(x < 0, x * slope, x)), _few),
    "threshold": _pointwise(_plain(lambda x, alpha: np.where(x > alpha, x, 0)), _few),
    "where": _pointwise(_plain(lambda chosen, x, y: np.where(chosen > 0, x, y)), lambda value, *_: 0 * value),
    **{
        name: _pointwise(_plain(function), lambda value, *_: 0 * value)
        for name, function in (
            ("greater", lambda a, b: (a > b).astype(float)),
            ("greater_equal", lambda a, b: (a >= b).astype(float)),
            ("less", lambda a, b: (a < b).astype(float)),
            ("less_equal", lambda a, b: (a <= b).astype(float)),
            ("equal", lambda a, b: (a == b).astype(float)),
            ("not_equal", lambda a, b: (a != b).astype(float)),
            ("not", lambda a: 1 - a),
            ("round", np.rint),
            ("sign", np.sign),
        )
    },
    "exp": _pointwise(_plain(np.exp), _of_exponential),
    **{
        name: _pointwise(_plain(function), _few)
        for name, function in (
            ("sqrt", np.sqrt),
            ("abs", np.abs),
            ("neg", np.negative),
            ("reciprocal", np.reciprocal),
            ("floor", np.floor),
            ("ceil", np.ceil),
            ("softsign", lambda x: x / (1 + np.abs(x))),
        )
    },
    **{
        name: _pointwise(_plain(function), _of_function)
        for name, function in (
            ("log", np.log),
            ("erf", _erf),
            ("softplus", _softplus),
            ("sin", np.sin),
            ("cos", np.cos),
        )
    },
}


# ---- from one place to another -----------------------------------------------------------------


def _moved(function: Callable[..., F64]) -> _Rule:
    """What happens to values happens to errors."""

    def rule(call: Call) -> Measured:
        return Measured(function(call, *call.values), function(call, *(operand.error for operand in call.operands)))

    return rule


def _slice(call: Call, x: F64) -> F64:
    places = []
    for start, step, size in zip(call["starts"], call["steps"], call.shape, strict=True):
        places.append(start + step * np.arange(size))
    return x[np.ix_(*places)]


def _pad(call: Call, x: F64, value: float) -> F64:
    places, inside = [], np.ones((), bool)
    for axis, (begin, size, length) in enumerate(zip(call["begins"], x.shape, call.shape, strict=True)):
        at = np.arange(length) - begin
        is_in = (at >= 0) & (at < size)
        if call["mode"] == "reflect":
            at = np.abs(at)
            at = size - 1 - np.abs(size - 1 - at)
        elif call["mode"] == "wrap":
            kept = np.arange(size)[max(0, -begin) : min(size, length - begin)]
            at = kept[(at - kept[0]) % len(kept)]
        places.append(np.clip(at, 0, size - 1))
        inside = inside & is_in.reshape(-1, *(1,) * (x.ndim - 1 - axis))
    moved = x[np.ix_(*places)]
    return np.where(inside, moved, value) if call["mode"] == "constant" else moved


def _padded(call: Call) -> Measured:
    operand, *given = call.operands  # a zero point that is computed stands around
    around = (float(given[0].value.reshape(())), float(given[0].error.reshape(()))) if given else (call["value"], 0.0)
    return Measured(_pad(call, operand.value, around[0]), _pad(call, operand.error, around[1]))


def _resize(x: F64, ways: Sequence[Any], tables: Sequence[F64]) -> tuple[F64, F64]:
    """Resized, and how far apart the elements are that were mixed."""
    left, apart = list(tables), np.zeros_like(x)
    for axis, way in enumerate(ways):
        if way == "same":
            continue
        if isinstance(way, int):
            x, apart = np.repeat(x, way, axis), np.repeat(apart, way, axis)
            continue
        first = left.pop(0).astype(int)
        low = np.take(x, first, axis)
        apart = np.take(apart, first, axis)
        if way == "nearest":
            x = low
            continue
        high, share = np.take(x, left.pop(0).astype(int), axis), left.pop(0)
        share = share.reshape(-1, *(1,) * (x.ndim - 1 - axis))
        x, apart = low + share * (high - low), apart + x.shape[axis] * np.abs(high - low)
    return x, apart


def _resized(call: Call) -> Measured:
    source, *tables = call.operands
    arrays = [table.value for table in tables]
    value, apart = _resize(source.value, call["axes"], arrays)
    error, _ = _resize(source.error, call["axes"], arrays)
    # Where an element lies is computed in f32 elsewhere: it is off by some roundings of the axis' length.
    return Measured(value, _joined(error, 8 * _U * apart, _few(value)))


_MOVES: dict[str, _Rule] = {
    "reshape": _moved(lambda call, x: x.reshape(call.shape)),
    "transpose": _moved(lambda call, x: x.transpose(call["perm"])),
    "slice": _moved(_slice),
    "concat": _moved(lambda call, *parts: np.concatenate(parts, call["axis"])),
    "expand": _moved(lambda call, x: np.broadcast_to(x, call.shape)),
    "pad": _padded,
    "resize": _resized,
}


# ---- over many elements ------------------------------------------------------------------------


def _of_alike(count: int, magnitude: Any) -> F64:
    """Roundings of a sum of so many terms that may be all alike, as those of a padded tensor are, whose absolute values
    add up to a magnitude: all in one direction then.
    """
    return np.asarray((8 + count) * _U * magnitude)


def _of_sum(count: int, magnitude: Any) -> F64:
    """Roundings of a sum of products, as often up as down."""
    return np.asarray((8 + 2 * math.sqrt(count)) * _U * magnitude)


def _windows(call: Call, x: F64, fill: float, ends: float | None = None) -> F64:
    """The elements that each window is over, in the last axes; what is outside is ``fill``, padding ``ends``."""
    rank = len(call["kernel"])
    extra, padding = [(0, 0)] * (x.ndim - rank), [(0, 0)] * (x.ndim - rank)
    index: list[Any] = [slice(None)] * (x.ndim - rank)
    reaches, taps = [], []
    names = ("kernel", "strides", "dilations", "begins", "ends")
    for size, out, *numbers in zip(x.shape[-rank:], call.shape[-rank:], *(call[name] for name in names), strict=True):
        kernel, stride, dilation, begin, end = numbers
        reach = (kernel - 1) * dilation + 1
        padding.append((begin, end))
        extra.append((0, max(0, (out - 1) * stride + reach - size - begin - end)))
        index.append(slice(0, (out - 1) * stride + 1, stride))
        reaches.append(reach)
        taps.append(slice(None, None, dilation))
    padded = np.pad(np.pad(x, padding, constant_values=fill if ends is None else ends), extra, constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded, reaches, tuple(range(x.ndim - rank, x.ndim)))
    found: F64 = windows[(*index, *taps)]
    return found


def _pool(call: Call) -> Measured:
    (operand,), rank = call.operands, len(call["kernel"])
    axes = tuple(range(-rank, 0))
    if call["mode"] == "max":
        value = _windows(call, operand.value, -math.inf).max(axes)
        return Measured(value, _windows(call, operand.error, 0.0).max(axes))
    counted = _windows(call, np.ones_like(operand.value), 0.0, 1.0 if call["include_pad"] else 0.0).sum(axes)
    value = _windows(call, operand.value, 0.0).sum(axes) / counted
    magnitude = _windows(call, np.abs(operand.value), 0.0).sum(axes) / counted
    error = np.sqrt(_windows(call, np.square(operand.error), 0.0).sum(axes)) / counted
    return Measured(value, _joined(error, _of_alike(math.prod(call["kernel"]), magnitude)))


def _reduced(call: Call) -> Measured:
    (operand,), axes, kept = call.operands, tuple(call["axes"]), bool(call["keepdims"])
    x, e, mode = operand.value, operand.error, call["mode"]
    count = math.prod(x.shape[axis] for axis in axes)

    def over(function: Callable[..., F64], array: F64) -> F64:
        return np.asarray(function(array, axis=axes, keepdims=kept))

    if mode in ("max", "min"):
        return Measured(over(np.max if mode == "max" else np.min, x), over(np.max, e))
    if mode == "product":
        value = over(np.prod, x)
        return Measured(value, np.abs(value) * _joined(np.sqrt(over(np.sum, np.square(e / x))), _of_alike(count, 1.0)))
    terms, moved = (np.square(x), 2 * np.abs(x) * e + np.square(e)) if mode == "square" else (x, e)
    scale = 1 / count if mode == "mean" else 1.0
    error = np.sqrt(over(np.sum, np.square(moved)))
    return Measured(scale * over(np.sum, terms), scale * _joined(error, _of_alike(count, over(np.sum, np.abs(terms)))))


def _product(call: Call) -> Measured:
    left, right = (
        [array.swapaxes(-1, -2) if turned else array for array in (operand.value, operand.error)]
        for operand, turned in zip(call.operands, (call["trans_a"], call["trans_b"]), strict=True)
    )
    (a, a_error), (b, b_error) = left, right
    moved = np.square(a_error) @ np.square(b) + np.square(a) @ np.square(b_error)
    return Measured(a @ b, _joined(np.sqrt(moved), _of_sum(a.shape[-1], np.abs(a) @ np.abs(b))))


def _softmax(call: Call) -> Measured:
    (operand,), axes = call.operands, tuple(call["axes"])
    x, e = operand.value, operand.error
    apart = x - x.max(axes, keepdims=True)
    share = np.exp(apart) / np.exp(apart).sum(axes, keepdims=True)
    mixed = np.square(share * e).sum(axes, keepdims=True)
    roundings = ACTIVATION_ERROR * _U * (np.abs(apart) + 2 + math.log(share.size))
    if call["log"]:
        return Measured(np.log(share), _joined(np.sqrt(np.square(e) + mixed), roundings))
    return Measured(share, share * _joined(np.sqrt(np.square(e) + mixed), roundings))


def _normalised(call: Call) -> Measured:
    """With ``z`` the normalised elements, ``dz = (dx - mean(dx) - z · mean(z · dx)) / deviation``."""
    operand, *affine = call.operands
    x, e, axes = operand.value, operand.error, tuple(call["axes"])
    count = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(axes, keepdims=True)
    deviation = np.sqrt(np.square(x - mean).mean(axes, keepdims=True) + call["epsilon"])
    z = (x - mean) / deviation
    moved = np.square(e) + np.square(e).sum(axes, keepdims=True) / count**2
    moved = moved + np.square(z) * np.square(z * e).sum(axes, keepdims=True) / count**2
    # The mean is rounded, and so are squares, whose mean elsewhere is taken before the mean's square is subtracted.
    size = np.square(x).mean(axes, keepdims=True)
    roundings = _of_alike(count, (np.sqrt(size) + np.abs(z) * size / deviation) / deviation)
    error = _joined(np.sqrt(moved) / deviation, roundings, _few(z))
    value = z
    if affine:
        value, error = z * affine[0].value, error * np.abs(affine[0].value)
    if len(affine) > 1:
        value = value + affine[1].value
    return Measured(value, _joined(error, _few(value)))


def _lrn(call: Call) -> Measured:
    (operand,), size = call.operands, call["size"]
    x, e, before = operand.value, operand.error, (call["size"] - 1) // 2

    def neighbours(array: F64) -> F64:
        padded = np.pad(array, [(0, 0), (before, size - 1 - before), *[(0, 0)] * (x.ndim - 2)])
        return np.asarray(sum(padded[:, k : k + x.shape[1]] for k in range(size)))

    scale = call["alpha"] / size
    base = call["bias"] + scale * neighbours(np.square(x))
    value = x * base ** -call["beta"]
    share = np.abs(value) * call["beta"] / base * scale  # what becomes of an error of a sum of squares
    moved = 2 * share * np.sqrt(neighbours(np.square(x * e)))
    # ONNX Runtime's sums go along all channels: the next square is added, the last one subtracted.
    running = 4 * _U * share * np.square(x).sum(1, keepdims=True)
    return Measured(value, _joined(e * base ** -call["beta"], moved, running, 4 * _few(value)))


#: How each operator of :mod:`convgen.network.kinds` computes, and what errors become.
RULES: dict[str, _Rule] = {
    **_POINTWISE,
    **_MOVES,
    "quantise": _quantised,
    "dequantise": _pointwise(_plain(lambda x, scale, zero=0.0: (x - zero) * scale), _few),
    "centre": _pointwise(_plain(lambda sums, zero, totals: sums - zero * totals), lambda value, *_: 0 * value),
    "cast": _pointwise(_plain(lambda x: x), _few),
    "clamp": _pointwise(lambda call, x: np.clip(x, call["low"], call["high"]), lambda value, x: 0 * value),
    "truncate": _pointwise(lambda call, x: _within(np.trunc(x), call["dtype"]), lambda value, x: 0 * value),
    "wrap": _pointwise(lambda call, x: _wrapped(x, call["dtype"]), lambda value, x: 0 * value),
    "pool": _pool,
    "reduce": _reduced,
    "product": _product,
    "softmax": _softmax,
    "normalise": _normalised,
    "lrn": _lrn,
}
