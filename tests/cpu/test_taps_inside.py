"""Taps that lie outside of src for a whole tile: which these are, and that leaving them out changes no bit."""

from __future__ import annotations

import itertools

import pytest

from convgen.check.fuzz.checking import check_values
from convgen.cpu.geometry import geometry_of, taps_inside
from convgen.hardware.target import resolve
from convgen.lowering.candidates import parse_candidate
from convgen.problem.spec import ConvSpec

SPECS = [
    "conv2d ic4 oc16 i7x5 k3x3 p1 {}",
    "conv2d ic4 oc16 i4x5 k5x3 p6x1 {}",  # whole rows of dst see nothing of src
    "conv2d ic4 oc16 i9x5 k3x3 s2x1 p2x1 d3x1 {}",
    "conv2d ic4 oc16 i2x5 k7x1 s3x1 p3_5x0 {}",
    "conv3d ic4 oc16 i2x3x5 k3x3x3 p1 {}",
    "conv3d ic4 oc16 i1x6x5 k5x2x2 p4x0x1 d2x1x1 {}",
]


@pytest.mark.parametrize("spec", SPECS)
def test_which_taps_are_inside(spec: str) -> None:
    """By their definition, tap by tap."""
    layer = ConvSpec.parse(spec.format("src_u8 i8"))
    g, rows = geometry_of(layer, resolve("cpu:znver4").on(1)), layer.rank - 2
    pixels, kernel, size = layer.out_spatial[rows], layer.kernel[rows], layer.in_spatial[rows]
    stride, dilation, (pad, _) = layer.stride[rows], layer.dilation[rows], layer.padding[rows]
    for first, last in itertools.combinations_with_replacement(range(pixels), 2):
        inside = [
            tap
            for tap in range(kernel)
            if any(0 <= y * stride - pad + tap * dilation < size for y in range(first, last + 1))
        ]
        start, end = taps_inside(g.y, stride, first, last)
        assert set(inside) <= set(range(start, end))
        if first == last:
            assert inside == list(range(start, end))


def test_where_taps_are_left_out() -> None:
    """Where what stands for them adds nothing; and the choice of a tile knows how much remains."""
    vnni, avx2 = resolve("cpu:znver4").on(1), resolve("cpu:haswell").on(1)
    for words, target, skips in [
        ("src_u8 i8", vnni, True),
        ("src_u8 src_zero i8", vnni, False),  # its zero point
        ("i8", vnni, False),  # 128 is added to make it unsigned
        ("i8", avx2, True),
        ("src_u8 src_zero i8", avx2, True),  # taken off first
        ("", vnni, False),  # floats: an infinite weight times 0
    ]:
        g = geometry_of(ConvSpec.parse(f"conv2d ic32 oc32 i7x7 k3x3 p1 {words}"), target)
        assert g.skips == skips, words
        assert g.share_inside(1) == pytest.approx(19 / 21 if skips else 1)
        assert g.share_inside(7) == 1
    assert not geometry_of(ConvSpec.parse("conv2d ic32 oc32 i7x7 k3x3 src_u8 i8"), vnni).skips
    planes = geometry_of(ConvSpec.parse("conv3d ic32 oc32 i2x7x7 k3x3x3 p1x0x0 src_u8 i8"), vnni)
    assert planes.share_inside(1) == pytest.approx(2 / 3)


@pytest.mark.parametrize("target", ["cpu", "cpu:haswell"])
@pytest.mark.parametrize("layout", ["nchw", "nchw16c"])
@pytest.mark.parametrize("spec", SPECS)
def test_leaving_them_out_changes_no_bit(spec: str, layout: str, target: str) -> None:
    words = "src_u8 dst_i32 i8" if target == "cpu" else "src_u8 src_zero dst_i32 i8"
    layer = ConvSpec.parse(spec.replace("ic4", "ic16").format(f"{words} {layout}"))
    resolved = resolve(target).on(2)
    picks = parse_candidate(layer, resolved, "cpu_direct").picks
    for height in range(1, min(2, layer.out_spatial[layer.rank - 2]) + 1):
        chosen = str(picks.replace(tile_oh=height, tile_ow=1, block=1))
        outcome = check_values(layer.descriptor, target, 2, 3, "cpu_direct", chosen, 4)
        assert (outcome.kind, outcome.message) == ("ok", "")
