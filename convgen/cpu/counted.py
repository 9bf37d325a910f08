"""Schedules that count: their default, and what it should take, come from what the busiest core does at a point."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from ..errors import Inapplicable
from ..hardware.target import Target
from ..lowering.schedule import Picks, Written
from ..problem.spec import ConvSpec
from .model import Core, Counts, core_of


class Counted(Written):
    """A schedule for CPUs whose default is chosen by what it counts."""

    @abstractmethod
    def counts(self, spec: ConvSpec, target: Target, picks: Picks) -> Counts:
        """What the busiest core does. A point may be one that is not valid."""

    @abstractmethod
    def chosen(self, spec: ConvSpec, target: Target) -> Picks:
        """The default, which is remembered: mostly the :meth:`fastest` of the points worth comparing."""

    def core(self, spec: ConvSpec, target: Target) -> Core:
        """What it runs on."""
        return core_of(target)

    def cycles(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Of the busiest core."""
        return self.core(spec, target).cycles(self.counts(spec, target, picks))

    def cycles_alone(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """The same as if all data were near: what tells tiles apart, not the tasks that they are shared out in."""
        return self.core(spec, target).cycles(Counts(self.counts(spec, target, picks).work))

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return _default(self, spec, target)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return self.cycles(spec, target, self.default(spec, target)) / self.core(spec, target).hertz

    def is_valid(self, spec: ConvSpec, target: Target, picks: Picks) -> bool:
        """Whether a point of the space is."""
        try:
            self.valid(spec, target, picks)
        except Inapplicable:
            return False
        return True

    def fastest(
        self,
        spec: ConvSpec,
        target: Target,
        points: Iterable[Picks],
        rank: Callable[[Picks], Any] | None = None,
        *,
        admits: Callable[[Picks], bool] = lambda _: True,
        otherwise: Picks | None = None,
    ) -> Picks:
        """The valid one of some points that ranks first: that takes the fewest cycles.

        Args:
            rank: what is compared instead of cycles.
            admits: what a point must be besides valid. Both are asked of one point after another, until one is.
            otherwise: the answer where none is.

        Raises:
            Inapplicable: none is, and there is no other answer.
        """
        ordered = sorted(points, key=rank or (lambda picks: self.cycles(spec, target, picks)))
        space = self.space(spec, target)
        good = (p for p in ordered if admits(p) and p in space and self.is_valid(spec, target, p))
        if (found := next(good, otherwise)) is None:
            raise Inapplicable("no point that is worth comparing is valid")
        return found


@lru_cache(maxsize=1 << 14)
def _default(schedule: Counted, spec: ConvSpec, target: Target) -> Picks:
    return schedule.chosen(spec, target)


def at_most(most: int, choices: Sequence[int]) -> int:
    """The largest choice that is no more; the smallest where all are."""
    return max((choice for choice in choices if choice <= most), default=min(choices))
