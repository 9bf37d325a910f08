"""The default of schedules with channels in the lanes: it is the least of all points, however few are looked at."""

from __future__ import annotations

import pytest

from convgen.cpu.channels import ChannelsInLanes
from convgen.cpu.model import Counts, core_of
from convgen.errors import Inapplicable, SpecError
from convgen.hardware.target import Target, resolve
from convgen.lowering.discover import schedule as find_schedule
from convgen.lowering.schedule import Picks
from convgen.problem.spec import ConvSpec

LAYERS = [
    "conv2d n1 ic96 oc24 i14x14 k1x1 residual",
    "conv2d n1 ic48 oc96 i15x13 k3x3 s2x2 p1x1 relu6",
    "conv2d n3 ic512 oc256 i7x7 k1x1 relu",
    "conv2d n1 ic64 oc128 g2 i9x9 k3x3 p1x1",
    "conv1d n1 ic32 oc80 i400 k5 p4 d2",
    "conv3d n1 ic16 oc32 i4x8x8 k3x3x3 p1x1x1",
    "convtranspose2d n1 ic32 oc16 i14x14 k4x4 s2x2 p1x1",
]
LAYOUTS = [("nchw", "nchw"), ("nhwc", "nhwc"), ("nchw16c", "nhwc"), ("nchw", "nchw16c")]


def least(schedule: ChannelsInLanes, spec: ConvSpec, target: Target) -> tuple[Picks, float]:
    """The best tile, and the best of its cuts with its cycles, each by looking at all of them."""
    core, space = core_of(target), schedule.space(spec, target)

    def speed(picks: Picks) -> tuple[float, int]:
        work = list(schedule.work(spec, target, picks))
        return core.cycles(Counts(work)), picks.tile_oc // target.lanes + picks.tile_oh * picks.tile_ow

    base = min(schedule.tiles(spec, target), key=speed)
    points = [
        picks
        for variant in schedule.variants(spec, base)
        for picks in space
        if all(picks[name] == variant[name] for name in picks if name not in ("order", "block", "parallel_oc"))
        and schedule.reason_against(spec, target, picks) is None
    ]

    def cycles(picks: Picks) -> float:
        return schedule.cycles(spec, target, picks)

    best = min(points, key=lambda picks: (cycles(picks), picks.parallel_oc, -picks.block))
    return best, cycles(best)


@pytest.mark.parametrize("target", ["cpu:znver5", "cpu:haswell"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_default_is_the_least_of_all_points(layer: str, target: str) -> None:
    spec, on = ConvSpec.parse(layer), resolve(target).on(2)
    schedule = find_schedule("cpu_transposed" if spec.transposed else "cpu_direct")
    assert isinstance(schedule, ChannelsInLanes)
    checked = 0
    for src, dst in LAYOUTS:
        try:
            laid = spec.with_(layout=src, dst_layout=dst).core
            schedule.check(laid, on)
        except (SpecError, Inapplicable):
            continue
        best, cycles = least(schedule, laid, on)
        assert schedule.default(laid, on) == best
        assert schedule.cost(laid, on) == cycles / core_of(on).hertz
        checked += 1
    assert checked > 1
