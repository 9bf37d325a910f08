"""Which activation an expression of one variable is, however an exporter spelled it.

An expression is kept as a polynomial with exact coefficients over *atoms*: the variable, and functions
of polynomials. Sums, products, quotients by constants and small powers multiply out, so that
``x * 0.5 * (1 + erf(x / sqrt(2)))`` and ``(x + x * erf(0.7071068 * x)) / 2`` are the same one. Clipping
is kept as ``lo + (hi - lo) * clip(., 0, 1)``, which makes ``clip(x + 3, 0, 6) / 6`` that of ``x/6 + 1/2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, reduce
from typing import Any

#: The product of atoms with their powers; an atom is ``(function, *arguments)``.
_Product = tuple[tuple[tuple[Any, ...], int], ...]
_Bound = Fraction | float  # float: an infinity

_MAX_TERMS, _MAX_DEGREE, _MAX_FACTOR = 8, 4, Fraction(2) ** 250  # below what floats hold


class NoExpressionError(Exception):
    """The expression is not one of those kept here."""


@dataclass(frozen=True)
class Expr:
    """A polynomial: ``terms`` are products and their coefficients, none zero, in the order of their shape."""

    terms: tuple[tuple[_Product, Fraction], ...]

    @cached_property
    def shape(self) -> str:
        """The expression without its numbers."""
        return repr([_shape(product) for product, _ in self.terms])

    @property
    def constant(self) -> Fraction:
        """The term without atoms."""
        return next((factor for product, factor in self.terms if not product), Fraction(0))

    def __add__(self, other: Expr) -> Expr:
        terms = dict(self.terms)
        for product, factor in other.terms:
            terms[product] = terms.get(product, Fraction(0)) + factor
        return _sorted(terms)

    def __mul__(self, other: Expr) -> Expr:
        terms: dict[_Product, Fraction] = {}
        for a, p in self.terms:
            for b, q in other.terms:
                powers = dict(a)
                for atom, power in b:
                    powers[atom] = powers.get(atom, 0) + power
                product = tuple(sorted(((k, n) for k, n in powers.items() if n), key=repr))
                if sum(abs(n) for _, n in product) > _MAX_DEGREE:
                    raise NoExpressionError
                terms[product] = terms.get(product, Fraction(0)) + p * q
        return _sorted(terms)

    def __neg__(self) -> Expr:
        return self * number(-1)

    def __sub__(self, other: Expr) -> Expr:
        return self + -other

    def __truediv__(self, other: Expr) -> Expr:
        return self * _inverse(other)


def _sorted(terms: dict[_Product, Fraction]) -> Expr:
    kept = [(product, factor) for product, factor in terms.items() if factor]
    if len(kept) > _MAX_TERMS or any(not 1 / _MAX_FACTOR < abs(factor) < _MAX_FACTOR for _, factor in kept):
        raise NoExpressionError
    return Expr(tuple(sorted(kept, key=lambda term: _shape(term[0]))))


def _shape(product: _Product) -> str:
    return repr([(a[0], [arg.shape for arg in a[1:] if isinstance(arg, Expr)], power) for a, power in product])


def number(value: float | Fraction) -> Expr:
    """A constant, which must be finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise NoExpressionError
    return _sorted({(): Fraction(value)})


def _atom(function: str, *arguments: Any) -> Expr:
    return Expr((((((function, *arguments), 1),), Fraction(1)),))


X = _atom("x")


def _named(name: str) -> Callable[..., Expr]:
    """A function that is only ever compared by its name and arguments."""
    return lambda *arguments: _atom(name, *arguments)


tanh, erf, exp, log, sigmoid = map(_named, ("tanh", "erf", "exp", "log", "sigmoid"))
leaky_relu, elu, prelu = map(_named, ("leaky_relu", "elu", "prelu"))


def relu(p: Expr) -> Expr:
    """max(p, 0), which is not written as a clip where it stands alone."""
    _, low, high = _unclipped(p)
    if low >= 0:
        return p
    return _atom("relu", p) if (low, high) == (-math.inf, math.inf) else clip(p, Fraction(0), math.inf)


def softplus(p: Expr) -> Expr:
    return log(number(1) + exp(p))


def _inverse(p: Expr) -> Expr:
    """1 / p, where p is a constant or ``1 + exp(q)``; the latter gives sigmoid(-q)."""
    if not p.terms:
        raise NoExpressionError
    if p.terms == number(p.constant).terms:
        return number(1 / p.constant)
    match _alone(p - number(1)):
        case ("exp", q):
            return sigmoid(-q)
    raise NoExpressionError


def _alone(p: Expr) -> tuple[Any, ...] | None:
    """The only atom of an expression that is nothing but one atom; None for others."""
    if len(p.terms) != 1 or p.terms[0][1] != 1 or len(p.terms[0][0]) != 1 or p.terms[0][0][0][1] != 1:
        return None
    return p.terms[0][0][0][0]


def power(p: Expr, exponent: Expr) -> Expr:
    if exponent == number(2):
        return p * p
    if exponent == number(3):
        return p * p * p
    raise NoExpressionError


def clip(p: Expr, lo: _Bound, hi: _Bound) -> Expr:
    """``min(max(p, lo), hi)``; one clip of another is one."""
    inner, low, high = _unclipped(p)
    low, high = min(max(low, lo), hi), min(max(high, lo), hi)
    if not low < high:
        raise NoExpressionError
    if isinstance(low, Fraction) and isinstance(high, Fraction):
        width = high - low
        return number(low) + number(width) * _atom("clip", (inner - number(low)) * number(1 / width), 1.0)
    if isinstance(low, Fraction):
        return number(low) + _atom("clip", inner - number(low), math.inf)
    if isinstance(high, Fraction):
        return number(high) - _atom("clip", number(high) - inner, math.inf)
    return inner


def _unclipped(p: Expr) -> tuple[Expr, _Bound, _Bound]:
    """(q, lo, hi) with ``p == min(max(q, lo), hi)``; infinite bounds where p is no clip."""
    products = [term for term in p.terms if term[0]]
    if len(products) == 1 and len(products[0][0]) == 1:
        ((((name, *arguments), power),), factor), shift = products[0], number(p.constant)
        if name in ("clip", "relu") and power == 1:
            top = arguments[1] if name == "clip" else math.inf
            ends = [p.constant, p.constant + factor if top == 1 else math.copysign(math.inf, factor)]
            return number(factor) * arguments[0] + shift, min(ends), max(ends)
    return p, -math.inf, math.inf


def maximum(p: Expr, q: Expr) -> Expr:
    """Of an expression and a constant, or of x and a fraction of it."""
    for one, other in ((p, q), (q, p)):
        if _is_constant(other):
            return clip(one, other.constant, math.inf)
        slope = dict(other.terms).get(X.terms[0][0], Fraction(0))
        if one == X and 0 < slope < 1 and other == number(slope) * X:
            return leaky_relu(X, slope)
    raise NoExpressionError


def minimum(p: Expr, q: Expr) -> Expr:
    """Of an expression and a constant."""
    for one, other in ((p, q), (q, p)):
        if _is_constant(other):
            return clip(one, -math.inf, other.constant)
    raise NoExpressionError


def _is_constant(p: Expr) -> bool:
    return not any(product for product, _ in p.terms)


def hardsigmoid(p: Expr, slope: float, shift: float) -> Expr:
    return clip(number(slope) * p + number(shift), Fraction(0), Fraction(1))


def hardswish(p: Expr) -> Expr:
    return p * clip(p * number(Fraction(1, 6)) + number(Fraction(1, 2)), Fraction(0), Fraction(1))


def silu(p: Expr) -> Expr:
    return p * sigmoid(p)


def mish(p: Expr) -> Expr:
    return p * tanh(softplus(p))


def gelu(p: Expr) -> Expr:
    return number(0.5) * p * (number(1) + erf(number(math.sqrt(0.5)) * p))


def gelu_tanh(p: Expr) -> Expr:
    cubic = number(math.sqrt(2 / math.pi)) * (p + number(0.044715) * p * p * p)
    return number(0.5) * p * (number(1) + tanh(cubic))


#: ONNX's operators: the number of operands (0: one or more) and what they make of them and of attributes.
_OPERATORS: dict[str, tuple[int, Callable[[Sequence[Expr], Mapping[str, float]], Expr]]] = {
    "Add": (2, lambda p, a: p[0] + p[1]),
    "Sum": (0, lambda p, a: reduce(Expr.__add__, p)),
    "Sub": (2, lambda p, a: p[0] - p[1]),
    "Mul": (2, lambda p, a: p[0] * p[1]),
    "Div": (2, lambda p, a: p[0] / p[1]),
    "Neg": (1, lambda p, a: -p[0]),
    "Reciprocal": (1, lambda p, a: number(1) / p[0]),
    "Pow": (2, lambda p, a: power(p[0], p[1])),
    "Max": (0, lambda p, a: reduce(maximum, p)),
    "Min": (0, lambda p, a: reduce(minimum, p)),
    "Erf": (1, lambda p, a: erf(p[0])),
    "Exp": (1, lambda p, a: exp(p[0])),
    "Log": (1, lambda p, a: log(p[0])),
    "Softplus": (1, lambda p, a: softplus(p[0])),
    "Relu": (1, lambda p, a: relu(p[0])),
    "LeakyRelu": (1, lambda p, a: leaky_relu(p[0], number(a.get("alpha", 0.01)).constant)),
    "Elu": (1, lambda p, a: elu(p[0], number(a.get("alpha", 1.0)).constant)),
    "Sigmoid": (1, lambda p, a: sigmoid(p[0])),
    "Tanh": (1, lambda p, a: tanh(p[0])),
    "HardSigmoid": (1, lambda p, a: hardsigmoid(p[0], a.get("alpha", 0.2), a.get("beta", 0.5))),
    "HardSwish": (1, lambda p, a: hardswish(p[0])),
    "Swish": (1, lambda p, a: p[0] * sigmoid(number(a.get("alpha", 1.0)) * p[0])),
    "Gelu": (1, lambda p, a: gelu(p[0])),
    "GeluTanh": (1, lambda p, a: gelu_tanh(p[0])),
    "Mish": (1, lambda p, a: mish(p[0])),
}


def apply(operator: str, operands: Sequence[Expr], attributes: Mapping[str, float]) -> Expr:
    """What an operator computes.

    Raises:
        NoExpressionError: that is not an expression kept here.
    """
    if operator not in _OPERATORS:
        raise NoExpressionError
    count, function = _OPERATORS[operator]
    if len(operands) != (count or max(1, len(operands))):
        raise NoExpressionError
    return function(operands, attributes)


_FIXED = {
    name: formula(X)
    for name, formula in {
        "relu": relu,
        "sigmoid": sigmoid,
        "tanh": tanh,
        "silu": silu,
        "mish": mish,
        "hardswish": hardswish,
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
    }.items()
}


def close(p: Expr, q: Expr, tolerance: float) -> bool:
    """Whether two expressions are equal but for relative differences of their numbers."""

    def near(a: Any, b: Any) -> bool:
        if isinstance(a, Expr) and isinstance(b, Expr):
            return close(a, b, tolerance)
        if isinstance(a, str):
            return bool(a == b)
        return bool(a == b) or math.isclose(a, b, rel_tol=tolerance)

    if p.shape != q.shape:
        return False
    for (a, x), (b, y) in zip(p.terms, q.terms, strict=True):
        if not near(x, y):
            return False
        for (one, _), (other, _) in zip(a, b, strict=True):
            if len(one) != len(other) or not all(map(near, one, other)):
                return False
    return True


def activation(p: Expr, tolerance: float, text: Callable[[_Bound], str]) -> str | None:
    """The activation that an expression of :data:`X` is, in the spec's spelling; None where it is none.

    ``tolerance`` is relative and for coefficients, which exporters round; ``text`` writes a parameter.
    """
    for name, formula in _FIXED.items():
        if close(p, formula, tolerance):
            return name
    inner, low, high = _unclipped(p)
    if (low, high) != (-math.inf, math.inf):
        if inner == X:
            return f"clip({text(low)},{text(high)})"
        slope = inner - number(inner.constant)
        linear = [product for product, _ in slope.terms] == [X.terms[0][0]]
        if linear and low == 0 and math.isclose(high, 1, rel_tol=tolerance):
            return f"hardsigmoid({text(slope.terms[0][1])},{text(inner.constant)})"
        return None
    function, *arguments = _alone(p) or ("none",)
    if function in ("prelu", "leaky_relu", "elu") and arguments[0] == X:
        return function if function == "prelu" else f"{function}({text(arguments[1])})"
    return None
