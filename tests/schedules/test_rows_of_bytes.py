"""Layers of bytes with pixels in the lanes: the formula's bits, and where sums of f32 are exact."""

from __future__ import annotations

import pytest

from convgen.check.fuzz.checking import check_values
from convgen.errors import Inapplicable
from convgen.hardware.target import resolve
from convgen.lowering.discover import schedule
from convgen.problem.spec import ConvSpec

LAYERS = [
    "conv1d n1 ic64 oc64 g64 i401 k3 s1 p2 d2 src_u8 dst_u8 i8",
    "conv2d n2 ic32 oc32 g32 i15x17 k3x3 s2x2 p1 src_u8 dst_u8 dst_zero relu i8",
    "conv2d ic16 oc12 i9x11 k1x1 src_u8 dst_u8 residual residual_u8 i8",
    "conv2d ic16 oc12 i9x11 k1x1 s2x2 src_u8 weights_u8 i8",
    "conv2d ic3 oc16 i20x20 k7x7 s2x2 p3 src_u8 dst_zero clip(-3,9) i8",
    "conv2d ic4 oc4 g4 i9x30 k1x21 p0x3 src_u8 dst_u8 i8",
]


@pytest.mark.parametrize("target", ["cpu", "cpu:haswell"])
@pytest.mark.parametrize("layer", LAYERS)
def test_bytes_are_the_formulas(layer: str, target: str) -> None:
    outcome = check_values(layer, target, 2, 3, "cpu_rows", None, 6)
    assert (outcome.kind, outcome.message) == ("ok", "")


@pytest.mark.parametrize(
    ("types", "most"), [("", 1024), ("src_u8", 514), ("src_u8 weights_u8", 258), ("weights_u8", 514)]
)
def test_sums_of_f32_are_exact(types: str, most: int) -> None:
    """As many of the largest products as come to 2**24 at most."""
    rows, target = schedule("cpu_rows"), resolve("cpu").on(1)
    rows.check(ConvSpec.parse(f"conv2d ic{most} oc16 i8x8 k1x1 {types} i8"), target)
    with pytest.raises(Inapplicable, match=f"exact for {most} products"):
        rows.check(ConvSpec.parse(f"conv2d ic{most + 1} oc16 i8x8 k1x1 {types} i8"), target)


@pytest.mark.parametrize("types", ["src_zero", "weights_zero", "dst_i32", "dst_f32"])
def test_what_it_does_not_know(types: str) -> None:
    """Zero points of what is multiplied; sums that are stored as they are, to which a bias of 32 bits is added."""
    with pytest.raises(Inapplicable, match="types and zero points"):
        schedule("cpu_rows").check(ConvSpec.parse(f"conv2d ic4 oc4 g4 i8x8 k3x3 {types} i8"), resolve("cpu").on(1))
