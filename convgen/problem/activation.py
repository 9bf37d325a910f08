"""Activations: their names, parameters, defaults and descriptor spelling.

This table is the one place that knows which activations exist. The expressions are
:func:`convgen.lowering.compute.activate` (TE) and :mod:`convgen.check.onnx_model` (ONNX), kept apart on purpose:
their agreement is what validation tests.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import SpecError, meant

#: name -> default parameters. ``hardsigmoid(alpha, beta)`` is max(0, min(1, alpha*x + beta)), with
#: ONNX's defaults; ``gelu`` is the erf form, ``gelu_tanh`` its tanh approximation. The slope of
#: ``prelu`` is a tensor ``[oc]`` given when weights are bound.
DEFAULTS: dict[str, tuple[float, ...]] = {
    "none": (),
    "relu": (),
    "leaky_relu": (0.01,),
    "prelu": (),
    "clip": (-math.inf, math.inf),
    "sigmoid": (),
    "tanh": (),
    "silu": (),
    "mish": (),
    "hardswish": (),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0,),
    "gelu": (),
    "gelu_tanh": (),
}

#: Spellings that mean another activation.
ALIASES = {
    "identity": "none",
    "linear": "none",
    "relu6": "clip(0,6)",
    "swish": "silu",
    "hard_swish": "hardswish",
    "hard_sigmoid": "hardsigmoid",
    "leakyrelu": "leaky_relu",
}

#: Largest slope (Lipschitz constant), where it does not depend on parameters.
_SLOPES = {"silu": 1.1, "mish": 1.1, "hardswish": 1.5, "gelu": 1.13, "gelu_tanh": 1.13}

#: About how many vector operations each takes.
_OPERATIONS = {
    "none": 0,
    "relu": 1,
    "clip": 2,
    "leaky_relu": 2,
    "prelu": 2,
    "hardswish": 5,
    "hardsigmoid": 4,
    "sigmoid": 16,
    "silu": 16,
    "tanh": 18,
    "elu": 14,
    "mish": 22,
    "gelu": 20,
    "gelu_tanh": 20,
}

#: Activations whose value on integers is an integer or exact product: bit-exact checks hold.
EXACT = frozenset({"none", "relu", "clip", "leaky_relu", "prelu"})

F32_MAX = (2 - 2**-23) * 2.0**127
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?|[-+]?inf")
_PATTERN = re.compile(r"([a-z_0-9]+)(?:\((.*)\))?\Z")


def _number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else repr(value)


@dataclass(frozen=True)
class Activation:
    """An activation and its parameters; ``str()`` gives the descriptor token."""

    name: str
    params: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Activation:
        """Read ``relu``, ``clip(0,6)``, ``leaky_relu(0.1)`` …

        Raises:
            SpecError: the name is unknown, or a parameter is missing or not a number.
        """
        if not isinstance(text, str):
            raise SpecError("activation", "a name such as 'relu' or 'clip(0,6)'", repr(text))
        lowered = text.strip().lower()
        match = _PATTERN.match(ALIASES.get(lowered, lowered))
        name = ALIASES.get(match[1], match[1]) if match else ""
        if match is None or name not in DEFAULTS:
            raise SpecError(
                "activation", f"one of {', '.join(DEFAULTS)}, relu6", f"{text!r}{meant(text, (*DEFAULTS, 'relu6'))}"
            )
        defaults = DEFAULTS[name]
        given = match[2].split(",") if match[2] else []
        if len(given) > len(defaults):
            raise SpecError("activation", f"at most {len(defaults)} parameters for {name}", repr(text))
        if not all(_NUMBER.fullmatch(part.strip()) for part in given):
            raise SpecError("activation", f"numbers as parameters of {name}", repr(text))
        params = tuple(map(float, given)) + defaults[len(given) :]
        if any(abs(p) > F32_MAX and not (name == "clip" and math.isinf(p)) for p in params):
            raise SpecError("activation", f"float32 numbers as parameters of {name}", repr(text))
        if name == "clip" and params[0] > params[1]:
            raise SpecError("activation", "clip(lo,hi) with lo <= hi", repr(text))
        return cls(name, params)

    def __str__(self) -> str:
        if not self.params or (self.params == DEFAULTS[self.name]):
            return self.name
        return f"{self.name}({','.join(map(_number, self.params))})"

    @property
    def lipschitz(self) -> float:
        """The factor by which an input error can grow (prelu: per unit of its slope)."""
        if self.name in {"leaky_relu", "elu"}:
            return max(1.0, abs(self.params[0]))
        if self.name == "hardsigmoid":
            return abs(self.params[0])
        return _SLOPES.get(self.name, 1.0)

    @property
    def operations(self) -> int:
        """About how many vector operations it takes; a division counts as many times an addition."""
        return _OPERATIONS[self.name]

    @property
    def costly(self) -> bool:
        """Whether it takes tens of operations: an exponential."""
        return self.operations > 10

    @property
    def exact(self) -> bool:
        """Whether small integers stay exactly representable through it."""
        if self.name == "leaky_relu":
            return math.log2(abs(self.params[0])).is_integer() if self.params[0] else True
        if self.name == "clip":
            return True
        return self.name in EXACT
