"""Defaults of layers on which predictions were wrong: each is what was measured to be the fastest of those compared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from convgen.cpu.winograd import Grid
from convgen.hardware.target import Target, resolve
from convgen.lowering.candidates import default_candidate
from convgen.lowering.discover import schedule as find_schedule
from convgen.problem.spec import ConvSpec


def target_of(model: str) -> Target:
    """One thread of a processor with caches of its own, whatever this machine's are."""
    l1 = 48 << 10 if model == "znver5" else 32 << 10
    return replace(resolve(f"cpu:{model}").on(1), l1=l1, l2=1 << 20, l3=32 << 20)


@pytest.mark.parametrize(
    ("model", "layer", "schedule"),
    [
        # What few channels make of a few tiles stays in the L1 cache.
        ("znver5", "conv1d n1 ic16 oc16 i8192 k3 s1 p1 nchw16c", "cpu_winograd"),
        ("znver5", "conv1d n1 ic16 oc16 i8192 k7 s1 p3 nchw16c", "cpu_winograd"),
        ("znver5", "convtranspose1d n1 ic32 oc16 i4096 k4 s2 p1 nchw16c", "cpu_winograd"),
        ("haswell", "conv1d n1 ic16 oc16 i8192 k3 s1 p1 leaky_relu(0.1) nchw16c", "cpu_winograd"),
        ("haswell", "conv1d n1 ic16 oc16 i8192 k7 s1 p9 d3 leaky_relu(0.1) nchw16c", "cpu_winograd"),
        # A large output is read before it is written.
        ("znver4", "conv2d n1 ic3 oc64 i224x224 k3x3 s1x1 p1x1 relu dst_nchw16c", "cpu_direct"),
        # The channels of a group come from afar once.
        ("znver4", "conv2d n1 ic512 oc512 g32 i28x28 k3x3 s2x2 p1x1 relu nchw16c", "cpu_grouped"),
        ("znver4", "conv2d n1 ic288 oc288 g18 i28x28 k3x3 s2x2 p1x1 relu nchw16c", "cpu_grouped"),
        ("znver4", "conv2d n1 ic128 oc128 g8 i28x28 k3x3 s1x1 p1x1 relu nchw16c", "cpu_winograd"),
    ],
)
def test_the_fastest_is_chosen(model: str, layer: str, schedule: str) -> None:
    assert default_candidate(ConvSpec.parse(layer), target_of(model)).schedule.id == schedule


def test_memory_that_two_cores_share_makes_weights_dear() -> None:
    """On two cores of Zen 4: the smaller transform took 0.76 of the larger one's time, and none 0.85 of one's."""
    target = target_of("znver4").on(2)
    small = ConvSpec.parse("conv2d n1 ic512 oc512 i7x7 k3x3 s1x1 p1x1 relu nchw16c")
    assert default_candidate(small, target).picks.tile == 2
    groups = ConvSpec.parse("conv2d n1 ic672 oc672 g42 i7x7 k3x3 s1x1 p1x1 relu nchw16c")
    assert default_candidate(groups, target).schedule.id == "cpu_direct"


@pytest.mark.parametrize(
    ("model", "layer", "cache"),
    [
        ("znver4", "conv1d n1 ic16 oc16 i8192 k7 s1 p3 leaky_relu(0.1) nchw16c", "l1"),
        ("haswell", "conv1d n1 ic16 oc16 i8192 k3 s1 p5 d5 leaky_relu(0.1) nchw16c", "l1"),
        ("znver4", "conv2d n1 ic256 oc256 i20x20 k3x3 s2x2 p1x1 silu nchw16c", "l2"),
        ("znver4", "conv2d n1 ic256 oc512 i20x20 k3x3 s2x2 p1x1 silu nchw16c", "l2"),
    ],
)
def test_blocks_of_winograd_leave_room_in_the_cache_that_they_fit(model: str, layer: str, cache: str) -> None:
    """Blocks that fill it all took a fifth longer where it is L1, and three times as long where it is L2."""
    spec, target = ConvSpec.parse(layer), target_of(model)
    picks = find_schedule("cpu_winograd").default(spec, target)
    g = Grid(spec, target, picks)
    transformed = 4 * g.positions * g.most_tiles * (g.own + picks.tile_oc)
    assert transformed <= 0.65 * getattr(target, cache)
