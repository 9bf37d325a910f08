"""Vectors of integers that are packed and stored as bytes together: the bits of the formula, by fewer instructions."""

from __future__ import annotations

import re

import pytest

from convgen.check.fuzz.checking import check_values
from convgen.errors import UnsupportedError
from convgen.hardware.target import Target, check_native, resolve
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.lower import lower, source
from convgen.problem.spec import ConvSpec


def runnable(spelling: str) -> Target:
    """A target with vectors that can be packed, which runs here."""
    target = resolve(spelling)
    try:
        check_native(target)
    except UnsupportedError as error:
        pytest.skip(str(error))
    if target.lanes < 16 or "avx512bw" not in target.isa:
        pytest.skip(f"{target} has no vectors of 512 bits that can be packed")
    return target


LAYERS = {
    "all of a row": "conv2d ic16 oc32 i5x8 k1x1 src_u8 dst_u8 i8 {}",
    "rows of odd length": "conv2d ic20 oc48 i3x13 k3x3 p1 src_zero dst_zero src_u8 dst_u8 i8 {}",
    "strided, to i8": "conv2d ic16 oc16 i9x11 k3x3 s2x2 p1 dst_zero i8 {}",
    "from i8 to u8": "conv2d ic8 oc64 i4x6 k1x1 relu dst_u8 dst_zero i8 {}",
    "bounded": "conv2d ic16 oc32 i6x7 k3x3 clip(-20.5,90.5) dst_zero src_u8 i8 {}",
    "bounded below zero": "conv1d ic16 oc32 i21 k3 clip(-inf,-3) nobias dst_zero dst_u8 i8 {}",
    "with a residual": "conv2d ic16 oc32 i6x9 k1x1 residual relu src_zero dst_zero src_u8 dst_u8 residual_u8 i8 {}",
    "grouped": "conv2d ic32 oc64 g2 i5x5 k3x3 p1 src_u8 dst_u8 dst_zero i8 {}",
    "3-D": "conv3d ic8 oc16 i3x4x5 k2x2x2 dst_zero i8 {}",
}


@pytest.mark.parametrize("target", ["cpu", "cpu:skylake-avx512"])
@pytest.mark.parametrize("layouts", ["nhwc", "nchw16c", "nhwc dst_nchw16c"])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_bytes_are_the_formulas(name: str, layouts: str, target: str) -> None:
    runnable(target)
    if "nchw16c" in layouts.split() and name in ("rows of odd length", "from i8 to u8", "3-D"):
        pytest.skip("src is no whole blocks of 16 channels")
    spec = ConvSpec.parse(LAYERS[name].format(layouts))
    outcome = check_values(spec.descriptor, target, 2, 3, "cpu_direct", None, 4)
    assert (outcome.kind, outcome.message) == ("ok", "")


@pytest.mark.parametrize("size", [7, 8, 14])
@pytest.mark.parametrize("layout", ["nhwc", "nchw16c"])
@pytest.mark.parametrize("words", ["dst_u8 src_u8", "dst_zero relu", "dst_i32 nobias", "residual residual_u8 dst_zero"])
def test_winograds_outputs_are_the_formulas(size: int, layout: str, words: str) -> None:
    if "avx512vnni" not in runnable("cpu").isa:
        pytest.skip("no products of 16-bit integers that are added at once")
    spec = f"conv2d ic32 oc32 i{size}x{size} k3x3 p1 {words} i8 {layout}"
    outcome = check_values(ConvSpec.parse(spec).descriptor, "cpu", 2, 5, "cpu_winograd_integers", None, 3)
    assert (outcome.kind, outcome.message) == ("ok", "")


def test_no_vector_is_narrowed_alone() -> None:
    target = resolve("cpu:x86-64-v4")
    spec = ConvSpec.parse("conv2d ic64 oc64 i14x14 k1x1 src_u8 dst_u8 i8 nhwc")
    code = source(lower(spec, target, default_candidate(spec, target)), "asm")
    assert re.search(r"\bvpackuswb\b", code)
    assert not re.search(r"\bvpmov(s|us)?db\b", code)
    # With part of a vector of channels, and where dst is of 32 bits, there is nothing to pack.
    for words in ("oc40 src_u8 dst_u8", "oc64 src_u8 dst_i32"):
        spec = ConvSpec.parse(f"conv2d ic64 i14x14 k1x1 i8 nhwc {words}")
        code = source(lower(spec, target, parse_candidate(spec, target, "cpu_direct", None)), "asm")
        assert not re.search(r"\bvpackuswb\b", code)


def test_what_a_residual_is_added_to_is_rounded_by_one_instruction() -> None:
    target = resolve("cpu:x86-64-v4")
    for words, rounds in (("residual residual_u8", True), ("", False)):
        spec = ConvSpec.parse(f"conv2d ic64 oc64 i14x14 k1x1 src_u8 dst_u8 i8 nhwc {words}")
        code = source(lower(spec, target, default_candidate(spec, target)), "asm")
        assert bool(re.search(r"\bvrndscaleps\b", code)) == rounds
