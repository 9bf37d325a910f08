"""Schedules made up for the tests of the search: spaces and predicted times, nothing to compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convgen.hardware.target import Target
from convgen.lowering.schedule import Picks, Schedule, Space, require
from convgen.problem.spec import ConvSpec


class Fake(Schedule):
    """A space, the points of it that are valid, and a predicted time.

    Args:
        name: its id.
        cost: predicted seconds of the default, in every layer.
        good: which points are valid; all unless given. The first of them is the default.
        domains: of the picks.
    """

    id, version = "fake", 1

    def __init__(self, name: str, cost: float = 1.0, good: Callable[[Picks], bool] | None = None, **domains: Any):
        self.id, self._cost, self._good, self._space = name, cost, good, Space(**domains)  # type: ignore[misc]
        self.is_reference = name == "reference"  # type: ignore[misc]

    def applies(self, spec: ConvSpec, target: Target) -> None:
        pass

    def space(self, spec: ConvSpec, target: Target) -> Space:
        return self._space

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        require(self._good is None or self._good(picks), "no good")

    def points(self) -> list[Picks]:
        return [picks for picks in self._space if self._good is None or self._good(picks)]

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return next(picks for picks in self._space if self._good is None or self._good(picks))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return self._cost

    def program(self, *_: Any) -> Any:
        raise AssertionError("nothing is compiled here")

    apply = program
