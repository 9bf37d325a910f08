"""NaN, infinities and zeros through the operators of networks, beside ONNX Runtime.

What differs is a decision (docs/decisions.md): the sign of a zero, the maximum of a window with a NaN, of which ONNX
Runtime gives one or the other, and sums that are too large on the way to a mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from network_models import Array, expected, model_of
from onnx import NodeProto, TensorProto, helper

from convgen.hardware.target import resolve
from convgen.network.network import compile_network

NAN, INF = np.nan, np.inf
VALUES = np.array([NAN, INF, -INF, 0.0, -0.0, 1, -1, 2.5, -2.5, 0.5, -0.5, 3e38, -3e38, 89, -104, 7], np.float32)
#: Rows of 20: of NaN, of infinities, of both.
ROWS = np.concatenate(
    [
        np.random.default_rng(seed).choice(np.array(values, np.float32), (8, 20))
        for seed, values in enumerate(
            ([1, 2, NAN], [1, INF, 2], [1, -INF, 2], [INF, -INF, 1], [NAN, INF, 1], [NAN], [-INF], [INF], [1, 2])
        )
    ]
)


def check(
    nodes: Sequence[NodeProto], inputs: Mapping[str, Array], constants: Mapping[str, Array] | None = None, **how: Any
) -> None:
    """That all nodes compute what ONNX Runtime does; each has an output of its own, named after it."""
    outputs = [node.output[0] for node in nodes if node.output[0].startswith("=")]
    model = model_of(nodes, {name: array.shape for name, array in inputs.items()}, outputs, constants, **how)
    found: Any = compile_network(model, resolve("cpu").on(1), 1, name="special")(*inputs.values())
    found = found if isinstance(found, dict) else {outputs[0]: found}
    for name, wanted in expected(model, inputs).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-30, err_msg=name)


def node(operator: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, [f"={name or operator}"], **attributes)


UNARY = [
    *("Exp", "Log", "Sqrt", "Abs", "Neg", "Reciprocal", "Floor", "Ceil", "Erf", "Softplus", "Softsign", "Sin", "Cos"),
    *("Round", "Sign", "Relu", "Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "Elu", "HardSigmoid"),
    *("Selu", "Celu", "ThresholdedRelu", "Identity"),
]


def test_of_one_operand() -> None:
    nodes = [node(operator, ["x"]) for operator in UNARY]
    nodes += [node("Clip", ["x", "low", "high"])]
    check(nodes, {"x": VALUES.reshape(1, 4, 4)}, {"low": np.array(-1, np.float32), "high": np.array(INF, np.float32)})


def test_of_two_operands() -> None:
    x, y = np.array(list(itertools.product(VALUES, VALUES)), np.float32).T.reshape(2, 1, 16, 16)
    plain = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mean", "PRelu")
    nodes = [node(operator, ["x", "y"]) for operator in plain]
    for operator in ("Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual"):
        nodes += [helper.make_node(operator, ["x", "y"], [operator]), node("Cast", [operator], operator, to=1)]
    check(nodes, {"x": x, "y": y})


def test_powers_by_roots() -> None:
    exponents = (0, 1, 2, 3, 4, 0.25, 0.5, 0.75, -0.25, -0.5, -0.75, -1, -2, 1.5, INF, -INF, NAN)
    constants = {f"e{e}": np.array(e, np.float32) for e in exponents}
    check([node("Pow", ["x", name], name) for name in constants], {"x": VALUES.reshape(1, 16)}, constants)


@pytest.mark.parametrize("number", [0.0, -0.0, NAN, INF])
def test_a_constant_of_one_element(number: float) -> None:
    nodes = [node(operator, ["x", "c"]) for operator in ("Mul", "Div", "PRelu", "Add", "Sub", "Max", "Min")]
    nodes += [node("Mul", ["c", "x"], "left"), node("Div", ["c", "x"], "over")]
    check(nodes, {"x": VALUES.reshape(1, 16)}, {"c": np.array([number], np.float32)})


def test_truth_values() -> None:
    x, y = np.array(list(itertools.product(VALUES, VALUES)), np.float32).T.reshape(2, 1, 16, 16)
    nodes = [helper.make_node("Cast", [name], [f"is {name}"], to=TensorProto.BOOL) for name in "xy"]
    for operator in ("And", "Or", "Xor"):
        nodes += [helper.make_node(operator, ["is x", "is y"], [operator]), node("Cast", [operator], operator, to=1)]
    nodes += [
        helper.make_node("Not", ["is x"], ["not"]),
        node("Cast", ["not"], to=1),
        node("Where", ["is x", "x", "y"]),
    ]
    check(nodes, {"x": x, "y": y})


@pytest.mark.parametrize("axis", [1, 2])
def test_over_an_axis(axis: int) -> None:
    x = ROWS[None] if axis == 2 else np.ascontiguousarray(ROWS.T[None])
    reductions = ("Mean", "SumSquare", "L1", "L2", "LogSum", "LogSumExp", "Prod")
    nodes = [node(f"Reduce{name}", ["x"], axes=[axis]) for name in reductions]
    nodes += [node("ReduceSum", ["x", "axes"])]
    nodes += [node(operator, ["x"], axis=axis) for operator in ("Softmax", "LogSoftmax")]
    check(nodes, {"x": x}, {"axes": np.array([axis])})


@pytest.mark.parametrize("axis", [1, 2])
def test_extremes_are_nan_where_one_element_is(axis: int) -> None:
    """As NumPy has it; ONNX Runtime's depend on where the NaN stands."""
    x = ROWS[None] if axis == 2 else np.ascontiguousarray(ROWS.T[None])
    nodes = [node(f"Reduce{name}", ["x"], axes=[axis]) for name in ("Max", "Min")]
    model = model_of(nodes, {"x": x.shape}, ["=ReduceMax", "=ReduceMin"])
    found: Any = compile_network(model, resolve("cpu").on(1), 1, name="special")(x)
    np.testing.assert_array_equal(found["=ReduceMax"], x.max(axis, keepdims=True))
    np.testing.assert_array_equal(found["=ReduceMin"], x.min(axis, keepdims=True))


@pytest.mark.parametrize("channels", [3, 16])
def test_the_largest_number_of_a_window(channels: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.choice(np.array([1, 2, -3, NAN, -INF], np.float32), (1, channels, 9, 12))
    model = model_of([node("MaxPool", ["x"], kernel_shape=[2, 3])], {"x": x.shape}, ["=MaxPool"])
    found = compile_network(model, resolve("cpu").on(1), 1, name="special")(x)
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 3), (2, 3))
    np.testing.assert_array_equal(found, np.where(np.isnan(windows), -INF, windows).max((-1, -2)))


def test_resized_edges() -> None:
    x = np.random.default_rng(0).choice(np.array([1, 2, NAN, INF], np.float32), (1, 2, 6, 5))
    constants = {"none": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 3], np.float32)}
    check([node("Resize", ["x", "none", "scales"], mode="linear")], {"x": x}, constants)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scale", [0.6, 1.5, 1.7, 2.3])
def test_corners_are_aligned_by_whole_lengths(mode: str, scale: float) -> None:
    """By scales too, as ONNX Runtime and PyTorch have it; ONNX's own text takes the product of scale and size."""
    x = np.random.default_rng(0).standard_normal((1, 2, 13, 4)).astype(np.float32)
    constants = {"none": np.zeros(0, np.float32), "scales": np.array([1, 1, scale, scale], np.float32)}
    how = {"mode": mode, "coordinate_transformation_mode": "align_corners", "nearest_mode": "floor"}
    check([node("Resize", ["x", "none", "scales"], **how)], {"x": x}, constants)


@pytest.mark.parametrize("mode", ["round_prefer_ceil", "round_prefer_floor"])
def test_halves_that_are_rounded_are_halves(mode: str) -> None:
    """7 to 2: the second place is 1 / (2 / 7), in f32 a little less than 3.5."""
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": mode}
    sizes = {f"{size} to {length}": np.array([1, 1, length]) for size, length in ((7, 2), (13, 14), (23, 14), (10, 12))}
    for name, array in sizes.items():
        x = np.arange(float(name.split()[0]), dtype=np.float32).reshape(1, 1, -1)
        none = np.zeros(0, np.float32)
        check([node("Resize", ["x", "none", "none", "sizes"], **how)], {"x": x}, {"none": none, "sizes": array})
