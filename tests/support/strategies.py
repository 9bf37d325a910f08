"""Hypothesis strategies that several test modules share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from convgen.check.random_specs import Limits, Source, random_fields, random_spec
from convgen.problem.spec import ConvSpec

#: Every activation, with its default parameters and with others.
ACTIVATIONS = ["none", "relu", "relu6", "clip(-1,2.5)", "clip(0,inf)", "leaky_relu", "leaky_relu(0.25)", "prelu"]
ACTIVATIONS += ["sigmoid", "tanh", "silu", "mish", "hardswish", "hardsigmoid", "hardsigmoid(0.25,0.5)"]
ACTIVATIONS += ["elu", "elu(0.5)", "gelu", "gelu_tanh"]

#: Layers that are read, written or computed by loops, hundreds in a test.
TINY = Limits(channels=16, pixels={1: 9, 2: 7, 3: 7}, taps=125, macs=2_000_000, elements=100_000)
#: What most numbers of channels and pixels are close to.
TILES = (4, 8)


class Drawn(Source):
    """Numbers that hypothesis draws."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))


@st.composite
def spec_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of a small :class:`ConvSpec` of any kind; most, not all, are valid."""
    fields = random_fields(Drawn(draw), TINY, TILES)
    if draw(st.booleans()):  # sizes that the kernel may be too large for
        fields["in_spatial"] = tuple(draw(st.integers(1, 7)) for _ in fields["kernel"])
    return fields


@st.composite
def specs(draw: st.DrawFn) -> ConvSpec:
    """Small valid specs of any kind."""
    return random_spec(Drawn(draw), TINY, TILES)


def specs_without_activation() -> st.SearchStrategy[ConvSpec]:
    """Small valid specs of any kind but for their activation, which is none."""
    return specs().map(lambda spec: spec.with_(activation="none"))
