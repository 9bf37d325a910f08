"""How the fuzzer makes small what fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from convgen.check.fuzz.cases import Case
from convgen.check.fuzz.shrinking import case_steps, shrink
from convgen.hardware.target import resolve
from convgen.lowering.discover import schedules
from convgen.lowering.schedule import Picks
from convgen.problem.spec import ConvSpec

NATIVE = resolve()


def halves(value: int) -> Iterator[int]:
    yield from (value // 2, value - 1)


def test_shrinking_ends_at_the_simplest_value_and_tries_nothing_twice() -> None:
    tried: list[int] = []

    def fails(value: int) -> bool:
        tried.append(value)
        return value >= 17

    assert shrink(1000, [halves], fails) == 17
    assert len(tried) == len(set(tried)) < 40
    assert 1000 not in tried


def test_steps_are_repeated_until_none_helps() -> None:
    """The second step makes room for the first."""

    def first(value: tuple[int, int]) -> Iterator[tuple[int, int]]:
        yield value[0] - 1, value[1]

    def second(value: tuple[int, int]) -> Iterator[tuple[int, int]]:
        yield value[0], value[1] - 1

    assert shrink((5, 5), [first, second], lambda v: v[0] >= 0 and 0 <= v[1] <= v[0] + 1) == (0, 0)
    assert shrink((5, 5), [first, second], lambda v: False) == (5, 5)


def test_shrinking_stops_in_time() -> None:
    assert shrink(1000, [halves], lambda v: True, until=0.0) == 1000


FULL = (
    "convtranspose3d n2 ic12 oc36 g2 i5x4x6 k3x2x3 s2x2x3 p1_0x0x2_1 d1x2x1 op1x0x2"
    " residual clip(-1,2.5) bf16 nhwc strict"
)
SHRUNK: dict[str, tuple[str, Callable[[ConvSpec], bool], str]] = {
    "whatever": (FULL, lambda s: True, "conv1d n1 ic1 oc1 i1 k1 s1 p0 nobias"),
    "a rank": (FULL, lambda s: s.rank >= 2, "conv2d n1 ic1 oc1 i1x1 k1x1 s1x1 p0x0 nobias"),
    "an operator": (FULL, lambda s: s.transposed, "convtranspose1d n1 ic1 oc1 i1 k1 s1 p0 nobias"),
    "an epilogue": (FULL, lambda s: s.residual and s.bias, "conv1d n1 ic1 oc1 i1 k1 s1 p0 residual"),
    "an activation": (
        FULL,
        lambda s: s.activation != "none" and s.layout == "nhwc",
        "conv1d n1 ic1 oc1 i1 k1 s1 p0 nobias clip(-1,2.5) nhwc",
    ),
    "a layout": (
        "conv2d n2 ic48 oc80 g2 i9x9 k3x3 s1 p1 nchw8c dst_nchw16c",
        lambda s: s.dst_layout == "nchw16c",
        "conv1d n1 ic16 oc16 i1 k1 s1 p0 nobias nchw16c",
    ),
    "a layout of one": (
        "conv2d n2 ic48 oc80 g2 i9x9 k3x3 s1 p1 nchw8c dst_nhwc",
        lambda s: s.layout == "nchw8c" != s.dst_layout,
        "conv1d n1 ic8 oc1 i1 k1 s1 p0 nobias nchw8c dst_nchw",
    ),
    "layouts that are two": (
        "conv2d n2 ic48 oc80 g2 i9x9 k3x3 s1 p1 nhwc dst_nchw16c",
        lambda s: s.dst_layout != s.layout,
        "conv1d n1 ic1 oc1 i1 k1 s1 p0 nobias dst_nhwc",
    ),
    "tail channels": (
        "conv2d n2 ic8 oc55 i9x9 k3x3 s1 p1",
        lambda s: s.oc % 16 > 5,
        "conv1d n1 ic1 oc6 i1 k1 s1 p0 nobias",
    ),
    "groups": (
        "conv2d n2 ic15 oc30 g15 i9x9 k3x3 s1 p1",
        lambda s: s.groups == s.ic > 2,
        "conv1d n1 ic3 oc3 g3 i1 k1 s1 p0 nobias",
    ),
    "a stride past the kernel": (
        "conv2d n1 ic4 oc4 i20x20 k3x3 s7 p4",
        lambda s: any(t > k for t, k in zip(s.stride, s.kernel, strict=True)),
        "conv1d n1 ic1 oc1 i1 k1 s2 p0 nobias",
    ),
    "one end's padding": (
        "conv2d n1 ic4 oc4 i9x9 k3x3 s2 p2_4x1",
        lambda s: any(e > b for b, e in s.padding),
        "conv1d n1 ic1 oc1 i1 k1 s1 p0_1 nobias",
    ),
    "an empty batch": ("conv1d n0 ic4 oc4 i9 k3", lambda s: s.n == 0, "conv1d n0 ic1 oc1 i1 k1 s1 p0 nobias"),
}


@pytest.mark.parametrize("name", SHRUNK)
def test_a_spec_is_shrunk_to_the_simplest_that_fails(name: str) -> None:
    descriptor, fails, expected = SHRUNK[name]
    case = Case(ConvSpec.parse(descriptor), NATIVE.spelling, 5, 77, "reference", Picks())
    shrunk = shrink(case, case_steps(NATIVE), lambda c: fails(c.spec))
    assert shrunk == Case(ConvSpec.parse(expected), NATIVE.spelling, 1, 0, "reference", Picks())
    assert shrink(case, case_steps(NATIVE), lambda c: fails(c.spec)) == shrunk


def test_picks_follow_the_spec_and_are_shrunk_too() -> None:
    spec = ConvSpec.parse("conv2d n1 ic4 oc64 i30x30 k3x3 s1 p1")
    space = schedules()["cpu_direct"].space(spec.core, NATIVE)
    rng = random.Random(1)
    valid = (p for p in (space.sample(rng) for _ in range(10_000)) if p.order == "pixels" and p.tile_ow > 4)
    picks = next(p for p in valid if schedules()["cpu_direct"].reason_against(spec.core, NATIVE, p) is None)
    seen: list[Case] = []

    def fails(case: Case) -> bool:
        seen.append(case)
        return case.picks is not None and case.picks.order == "pixels" and case.spec.oc > 16

    shrunk = shrink(Case(spec, NATIVE.spelling, 2, 0, "cpu_direct", picks), case_steps(NATIVE), fails)
    assert shrunk.spec.descriptor == "conv1d n1 ic1 oc17 i1 k1 s1 p0 nobias"
    assert shrunk.picks is not None
    assert shrunk.picks["order"] == "pixels"
    domains = schedules()["cpu_direct"].space(shrunk.spec.core, NATIVE).domains
    assert all(shrunk.picks[name] == values[0] for name, values in domains.items() if name != "order")
    assert all(
        case.picks and schedules()["cpu_direct"].reason_against(case.spec.core, NATIVE, case.picks) is None
        for case in seen
    )
