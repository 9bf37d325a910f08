"""Random layers: every kind is drawn, within the limits, from a seed or by hypothesis."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, settings
from layouts import LAYOUTS
from strategies import ACTIVATIONS, TILES, TINY, specs

from convgen.check.fuzz.drawing import FEATURES
from convgen.check.random_specs import SMALL, Limits, Seeded, in_a_direction, random_spec
from convgen.problem.activation import DEFAULTS
from convgen.problem.dtypes import DTYPES
from convgen.problem.spec import OPERATORS, ConvSpec
from convgen.problem.tokens import ACCURACIES

COUNT = 2000


def draws(limits: Limits) -> list[ConvSpec]:
    source = Seeded(random.Random(1))
    return [in_a_direction(source, random_spec(source, limits, TILES)) for _ in range(COUNT)]


#: Every value of a property that layers are to have.
KINDS: dict[str, tuple[set[Any], Callable[[ConvSpec], Any]]] = {
    "operator": (set(OPERATORS), lambda s: s.operator),
    "dtype": (set(DTYPES), lambda s: s.dtype),
    "layout": (set(LAYOUTS), lambda s: s.layout),
    "layout of dst": (set(LAYOUTS), lambda s: s.dst_layout),
    "layouts alike": ({False, True}, lambda s: s.layout == s.dst_layout),
    "accuracy": (set(ACCURACIES), lambda s: s.accuracy),
    "activation": (set(DEFAULTS), lambda s: s.activation_op.name),
    "bias": ({False, True}, lambda s: s.bias),
    "residual": ({False, True}, lambda s: s.residual),
    "batch": ({0, 1, 2}, lambda s: s.n),
    "axes alike": ({False, True}, lambda s: len({*zip(s.kernel, s.stride, s.dilation, s.padding, strict=True)}) > 1),
    "output padding": ({False, True}, lambda s: any(s.output_padding)),
}


@pytest.mark.parametrize("limits", [SMALL, TINY], ids=["small", "tiny"])
def test_every_kind_is_drawn_within_the_limits(limits: Limits) -> None:
    layers = draws(limits)
    assert len(set(layers)) > 0.9 * COUNT
    assert all(limits.admit(spec) for spec in layers)
    for name, (values, of) in KINDS.items():
        assert set(map(of, layers)) == values, name
    for name, has in FEATURES.items():
        assert sum(map(has, layers)) >= COUNT // 50, name
    kernels, strides, dilations = (
        {size for spec in layers for size in getattr(spec, name)} for name in ("kernel", "stride", "dilation")
    )
    assert kernels >= {1, 2, 3, 4, 5, 7}
    assert strides >= {1, 2, 3, 4}
    assert dilations >= {1, 2, 3}
    assert {spec.groups for spec in layers} >= {1, 2, 3, 4, 5}


def test_every_spelling_of_an_activation_is_drawn() -> None:
    source = Seeded(random.Random(2))
    spellings = {random_spec(source, TINY, TILES).activation for _ in range(3 * COUNT)}
    assert {str(ConvSpec.parse(f"conv1d ic1 oc1 i1 k1 {text}").activation) for text in ACTIVATIONS} <= spellings


def test_a_seed_draws_the_same_again() -> None:
    assert draws(TINY) == draws(TINY)


@pytest.mark.parametrize(
    ("wanted", "simplest"),
    [
        (lambda s: s.transposed and s.rank == 2, "convtranspose2d n1 ic1 oc1 i1x1 k1x1 s1x1 p0x0 nobias strict"),
        (
            lambda s: s.is_depthwise and s.operator == "conv1d" and s.stride[0] > 1,
            "conv1d n1 ic2 oc2 g2 i1 k1 s2 p0 nobias strict",
        ),
    ],
)
def test_hypothesis_makes_them_simple(wanted: Callable[[ConvSpec], bool], simplest: str) -> None:
    options = settings(
        max_examples=2000,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    assert find(specs(), wanted, settings=options).descriptor == simplest
