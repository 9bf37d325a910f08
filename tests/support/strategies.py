"""Hypothesis strategies that several test modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from convgen.errors import SpecError
from convgen.problem.spec import ConvSpec

ACTIVATIONS = ["none", "relu", "relu6", "clip(-1,2.5)", "clip(0,inf)", "leaky_relu", "leaky_relu(0.25)", "prelu"]
ACTIVATIONS += ["sigmoid", "tanh", "silu", "mish", "hardswish", "hardsigmoid", "hardsigmoid(0.25,0.5)"]
ACTIVATIONS += ["elu", "elu(0.5)", "gelu", "gelu_tanh"]


@st.composite
def spec_fields(draw: st.DrawFn, activations: Sequence[str] = ACTIVATIONS) -> dict[str, Any]:
    """Keyword arguments of a small :class:`ConvSpec` of any rank; most, not all, are valid."""
    rank = draw(st.integers(1, 3))
    transposed = draw(st.booleans())

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    stride, dilation = axes(1, 3), axes(1, 3)
    extra = (0,) * rank
    if transposed:
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    fields = {
        "n": draw(st.sampled_from((1, 1, 2, 0))),
        "ic": groups * draw(st.sampled_from((1, 2, 3, 16))),
        "oc": groups * draw(st.sampled_from((1, 2, 5, 16))),
        "in_spatial": axes(1, 7),
        "kernel": axes(1, 4),
        "stride": stride,
        "padding": tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(rank)),
        "dilation": dilation,
        "groups": groups,
        "transposed": transposed,
        "output_padding": extra,
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(activations)),
        "residual": draw(st.booleans()),
        "accuracy": draw(st.sampled_from(("standard", "strict", "relaxed"))),
        "dtype": draw(st.sampled_from(("f32", "f32", "f16", "bf16", "i8"))),
        "layout": draw(st.sampled_from(("nchw", "nhwc"))),
    }
    if fields["dtype"] == "i8":  # which has no others
        fields |= {"transposed": False, "output_padding": 0, "residual": False, "accuracy": "standard"}
        fields["activation"] = draw(st.sampled_from([a for a in activations if a in ("none", "relu")]))
    return fields


@st.composite
def specs(draw: st.DrawFn, activations: Sequence[str] = ACTIVATIONS) -> ConvSpec:
    """Valid specs; a kernel that does not fit gets a larger input."""
    fields = draw(spec_fields(activations))
    while True:
        try:
            return ConvSpec(**fields)
        except SpecError:  # the kernel or the crop is too large for the input
            fields["in_spatial"] = tuple(size + 3 for size in fields["in_spatial"])
