"""Schedules that count: which point is the default, and what it should take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from convgen.cpu.counted import Counted, at_most
from convgen.cpu.model import Counts, Stream, Work, core_of
from convgen.cpu.traffic import busiest_share, enough_parts
from convgen.errors import Inapplicable
from convgen.hardware.target import Target, resolve
from convgen.lowering.schedule import Picks, Program, Space, require
from convgen.problem.spec import ConvSpec

TARGET = resolve("cpu:znver5")
SPEC = ConvSpec.parse("conv2d n1 ic16 oc16 i8x8 k3x3")


class Tables(Counted):
    """Of widths 1 to 8: odd ones are not valid; the wider, the faster, but for weights that the widest ones read."""

    id, version = "tables", 1
    asked = 0

    def applies(self, spec: ConvSpec, target: Target) -> None:
        pass

    def space(self, spec: ConvSpec, target: Target) -> Space:
        return Space(width=range(1, 9))

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        require(picks.width % 2 == 0, "odd")

    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        streams = [Stream(1 << 20, weights=True)] if picks.width > 6 else []
        return Counts([Work(1000 / picks.width, fmas=8)], streams)

    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        self.asked += 1
        return self.fastest(spec, target, self.space(spec, target))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        raise AssertionError("nothing is built here")


def test_the_default_is_the_fastest_valid_point_and_is_chosen_once() -> None:
    tables = Tables()
    assert [tables.default(SPEC, TARGET) for _ in range(3)] == [Picks(width=6)] * 3
    assert tables.asked == 1
    core = core_of(TARGET)
    assert tables.cost(SPEC, TARGET) == core.seconds(tables.counts(SPEC, TARGET, Picks(width=6)))
    assert tables.cost(SPEC, TARGET) < core.seconds(tables.counts(SPEC, TARGET, Picks(width=8)))


@pytest.mark.parametrize(
    ("admits", "width"), [(lambda p: p.width < 6, 4), (lambda p: p.width > 6, 8), (lambda p: p.width % 2 == 1, 1)]
)
def test_points_have_to_be_admitted_and_valid(admits: Callable[[Picks], bool], width: int) -> None:
    tables, first = Tables(), Picks(width=1)
    points = list(tables.space(SPEC, TARGET))
    assert tables.fastest(SPEC, TARGET, points, admits=admits, otherwise=first) == Picks(width=width)
    alone = tables.fastest(SPEC, TARGET, points, lambda picks: tables.cycles_alone(SPEC, TARGET, picks))
    assert alone == Picks(width=8)


def test_without_a_valid_point_there_is_no_default() -> None:
    with pytest.raises(Inapplicable, match="valid"):
        Tables().fastest(SPEC, TARGET, [Picks(width=3), Picks(width=10)])  # one is odd, one not of the space


def test_what_follows_is_counted_too() -> None:
    """With streams of its own, which hide behind its own work alone."""
    core = replace(core_of(TARGET), exposed=0)
    first = Counts([Work(10_000, fmas=10)], [Stream(4096, ahead=1)])
    then = Counts([Work(1, fmas=1)], [Stream(1 << 20, ahead=1)], regions=0)
    both = replace(first, then=then)
    assert core.cycles(both) == core.cycles(first) + core.cycles(then)
    assert core.cycles(both) > core.cycles(replace(first, streams=[*first.streams, *then.streams]))


def test_tasks_and_choices() -> None:
    assert busiest_share(8, 4) == 1 / 4
    assert busiest_share(9, 4) == 3 / 9
    assert enough_parts((1, 2, 4, 8), 3, 2) == 4
    assert enough_parts((1, 2), 1, 2) == 2
    assert [at_most(most, (2, 4, 8)) for most in (1, 2, 7, 100)] == [2, 2, 4, 8]
