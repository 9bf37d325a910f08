"""Expressions that are kept exactly, and the activations among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convgen.formats.onnx.algebra import (
    Expr,
    NoExpressionError,
    X,
    activation,
    apply,
    clip,
    elu,
    erf,
    exp,
    hardsigmoid,
    leaky_relu,
    log,
    maximum,
    number,
    relu,
    sigmoid,
    softplus,
    tanh,
)

POINTS = np.concatenate([np.linspace(-9, 9, 145), [-1e-3, 1e-3, -40, 40]])
_erf = np.vectorize(math.erf, otypes=[float])

#: Atom -> what it is of its arguments' values.
ATOMS: dict[str, Callable[..., Any]] = {
    "x": lambda: POINTS,
    "relu": lambda p: np.maximum(p, 0),
    "clip": lambda p, top: np.clip(p, 0, top),
    "sigmoid": lambda p: 1 / (1 + np.exp(-p)),
    "tanh": np.tanh,
    "erf": _erf,
    "exp": np.exp,
    "log": np.log,
    "leaky_relu": lambda p, slope: np.where(p < 0, float(slope) * p, p),
    "elu": lambda p, slope: np.where(p < 0, float(slope) * np.expm1(p), p),
}


def values(expression: Expr) -> np.ndarray:
    """An expression at :data:`POINTS`."""
    total = np.zeros_like(POINTS)
    for product, factor in expression.terms:
        term = np.full_like(POINTS, float(factor))
        for (name, *arguments), power in product:
            term *= ATOMS[name](*(values(a) if isinstance(a, Expr) else a for a in arguments)) ** power
        total += term
    return total


#: Operator -> the same in NumPy.
PLAIN: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Neg": np.negative,
    "Max": np.maximum,
    "Min": np.minimum,
    "Relu": lambda p: np.maximum(p, 0),
    "Sigmoid": ATOMS["sigmoid"],
    "Tanh": np.tanh,
    "Erf": _erf,
    "Exp": np.exp,
    "Softplus": lambda p: np.logaddexp(0, p),
    "HardSigmoid": lambda p: np.clip(0.2 * p + 0.5, 0, 1),
    "HardSwish": lambda p: p * np.clip(p / 6 + 0.5, 0, 1),
    "LeakyRelu": lambda p: np.where(p < 0, 0.01 * p, p),
    "Elu": lambda p: np.where(p < 0, np.expm1(p), p),
    "Mish": lambda p: p * np.tanh(np.logaddexp(0, p)),
    "Gelu": lambda p: p / 2 * (1 + _erf(p * math.sqrt(0.5))),
    "GeluTanh": lambda p: p / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (p + 0.044715 * p**3))),
}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_an_expression_has_the_operators_values(data: st.DataObject) -> None:
    """Whatever normal form sums, products and clips are brought into."""
    known = [(X, POINTS)]
    known += [(number(c), np.full_like(POINTS, c)) for c in (0.5, 3.0, -2.0, 6.0, 1.0)]
    for _ in range(data.draw(st.integers(1, 6))):
        operator = data.draw(st.sampled_from(sorted(PLAIN)))
        count = 2 if operator in ("Add", "Sub", "Mul", "Div", "Max", "Min") else 1
        chosen = [data.draw(st.sampled_from(known)) for _ in range(count)]
        try:
            expression = apply(operator, [expression for expression, _ in chosen], {})
        except NoExpressionError:
            continue
        with np.errstate(all="ignore"):
            expected = PLAIN[operator](*(value for _, value in chosen))
            got = values(expression)
        finite = np.isfinite(expected) & np.isfinite(got) & (np.abs(expected) < 1e6)
        np.testing.assert_allclose(got[finite], expected[finite], rtol=1e-6, atol=1e-6)
        known.append((expression, expected))


def named(expression: Expr) -> str | None:
    return activation(expression, 3 * 2.0**-24, lambda value: f"{float(value):g}")


def n(value: float) -> Expr:
    return number(value)


INF = math.inf


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        (X * clip(X + n(3), Fraction(0), Fraction(6)) / n(6), "hardswish"),
        (clip(X + n(3), Fraction(0), Fraction(6)) * n(float(np.float32(1 / 6))), "hardsigmoid(0.166667,0.5)"),
        (-relu(-X), "clip(-inf,0)"),
        (clip(clip(X, Fraction(-1), INF), Fraction(-3), Fraction(2)), "clip(-1,2)"),
        (clip(-clip(-X, Fraction(-6), Fraction(0)), Fraction(-9), Fraction(9)), "clip(0,6)"),
        (n(2) * clip(X / n(2), Fraction(-1), Fraction(1)), "clip(-2,2)"),
        (maximum(n(0.25) * X, X), "leaky_relu(0.25)"),
        (leaky_relu(X, Fraction(3)), "leaky_relu(3)"),
        (relu(relu(X)), "relu"),
        (X * tanh(softplus(X)), "mish"),
    ],
)
def test_activations(expression: Expr, name: str) -> None:
    assert named(expression) == name


NO_ACTIVATIONS = [
    X,
    n(2) * relu(X),
    relu(X) + n(1),
    relu(X + n(1)),
    relu(n(2) * X),
    sigmoid(n(2) * X),
    X * sigmoid(n(1.702) * X),
    X * X * sigmoid(X),
    X * clip(X + n(3), Fraction(0), Fraction(5)) / n(6),
    X * clip(X + n(3), Fraction(0), Fraction(6)) * n(0.1667),  # four digits are another function
    n(2) * clip(X + n(3), Fraction(0), Fraction(6)) / n(6),
    n(0.5) * X * (n(1) + erf(n(0.7) * X)),
    X * (n(1) + erf(n(math.sqrt(0.5)) * X)),
    n(0.5) * X * (n(1) + tanh(n(0.8) * (X + n(0.044715) * X * X * X))),
    X * tanh(log(n(2) + exp(X))),
    elu(n(2) * X, Fraction(1)),
    leaky_relu(X, Fraction(1, 2)) + leaky_relu(X, Fraction(1, 4)),
    hardsigmoid(X, 0.2, 0.5) * X,
    clip(n(-1) * X, Fraction(0), Fraction(3)),
]


@pytest.mark.parametrize("expression", NO_ACTIVATIONS, ids=range(len(NO_ACTIVATIONS)))
def test_no_activations(expression: Expr) -> None:
    assert named(expression) is None


@pytest.mark.parametrize(
    "build",
    [
        lambda: clip(X, Fraction(2), Fraction(1)),
        lambda: clip(X, Fraction(1), Fraction(1)),
        lambda: n(1) / X,
        lambda: n(1) / n(0),
        lambda: n(math.nan),
        lambda: n(math.inf),
        lambda: apply("Pow", [X, n(0.5)], {}),
        lambda: apply("Pow", [n(2), X], {}),
        lambda: apply("Softmax", [X], {}),
        lambda: apply("Add", [X], {}),
        lambda: apply("Sum", [], {}),
        lambda: apply("LeakyRelu", [X], {"alpha": math.nan}),
        lambda: (X + n(1)) * (X + exp(X)) * (X + tanh(X)) * (X + erf(X)),  # too many terms
        lambda: X * X * X * X * X,  # of too high a degree
        lambda: reduce(Expr.__mul__, [X, *[n(3e38)] * 9]),  # beyond any float
    ],
)
def test_what_is_not_kept(build: Callable[[], Expr]) -> None:
    with pytest.raises(NoExpressionError):
        build()
