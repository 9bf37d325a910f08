"""Tiles of channels in the lanes: what they read, that they are all there, how long their code is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convgen.cpu.channels import tiles_of
from convgen.cpu.geometry import geometry_of
from convgen.cpu.product import Even
from convgen.hardware.target import resolve
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate, Picks
from convgen.problem.spec import ConvSpec

TARGET = resolve("cpu:znver4")


@given(
    st.integers(4, 30), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3), st.integers(0, 3)
)
def test_a_forward_layer_is_one_phase_that_reads_what_its_taps_meet(
    size: int, kernel: int, stride: int, dilation: int, begin: int, end: int
) -> None:
    window = (kernel - 1) * dilation + 1
    if size + begin + end < window:
        return
    spec = ConvSpec.parse(f"conv1d n1 ic8 oc16 i{size} k{kernel} s{stride} p{begin}_{end} d{dilation}")
    g, out = geometry_of(spec, TARGET), spec.out_spatial[0]
    met = [p * stride + k * dilation - begin for p in range(out) for k in range(kernel)]
    whole = Picks(tile_oc=16, tile_oh=1, tile_ow=1, block=out)
    assert g.x.phase(0) == (0, -begin, kernel, 0)
    assert (g.reads[2][0], g.extent(whole)[2]) == (min(met), max(met) - min(met) + 1)
    assert g.padded == (min(met) < 0 or max(met) >= size)


@given(
    st.sampled_from(
        [
            "conv2d n1 ic8 oc40 i9x13 k3x3 s1 p1",
            "conv2d n1 ic12 oc72 g2 i9x13 k3x3 s2x1 p1 nhwc",
            "convtranspose2d n1 ic8 oc21 i5x7 k4x4 s2 p1",
            "convtranspose1d n1 ic8 oc5 i17 k6 s3 p1",
        ]
    ),
    st.booleans(),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 7),
)
def test_tiles_that_are_alike_are_all_tiles(words: str, merge: bool, vectors: int, height: int, width: int) -> None:
    spec = ConvSpec.parse(words)
    g, lanes = geometry_of(spec, TARGET, merge and spec.transposed), TARGET.lanes
    found = list(tiles_of(g, Picks(tile_oc=lanes * vectors, tile_oh=height, tile_ow=width), lanes))
    channels = spec.oc // spec.groups * (g.x.stride if g.merge else 1)
    made = sum(alike.times * alike.height * alike.width * alike.vectors for alike in found)
    assert made == g.z.pixels * g.y.pixels * g.width * spec.groups * -(-channels // lanes)
    assert all(0 < a.height <= height and 0 < a.width <= Even(g.width, width).full for a in found)
    assert math.prod(alike.times for alike in found) > 0


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("cpu_direct", "conv2d n1 ic16 oc16 i8x8 k1x1 silu nhwc"),
        ("cpu_transposed", "convtranspose2d n1 ic16 oc16 i8x8 k2x2 s2 silu nhwc"),
    ],
)
def test_costly_activations_are_not_written_out_for_every_register(schedule: str, words: str) -> None:
    spec, found = ConvSpec.parse(words), find_schedule(schedule)
    picks = found.default(spec.core, TARGET).replace(tile_oc=16, tile_oh=1, block=1, parallel_oc=1)
    texts = [
        str(lower(spec, TARGET, Candidate(found, picks.replace(tile_ow=w))).module.script(show_meta=False))
        for w in (1, 8)
    ]
    one, eight = (text.count("T.Div(") + text.count(" / ") + text.count("exp") for text in texts)
    assert 0 < eight == one
