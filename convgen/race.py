"""What to try next: all applicable schedules race for one layer.

The spaces are small and structured, where plain sampling with a local search around the leaders
comes close to the best in few trials (Tollenaere et al., ACM TACO 20(1), 2022).
"""

from __future__ import annotations

import random
from typing import Any

from .build import default_candidate
from .discover import schedules
from .errors import BuildError, Inapplicable
from .lower import lower
from .measure import Result, measure_module
from .schedule import Candidate, Picks, Schedule
from .spec import ConvSpec
from .target import Target

#: Candidates per round: enough to keep the build processes busy, few enough to learn from each.
ROUND = 8
#: A schedule whose best is this many times slower than the leader after `TRIES` trials drops out.
BEHIND, TRIES = 1.3, 12


class Race:
    """What to try next: the schedules' candidates, those that lead tried more.

    Half of the draws are uniform over a schedule's valid picks, half change one value of one of its
    three best. Schedules that stay behind drop out. The reference takes part only where it is the
    ``default``, the zero-trial answer that tuning must not lose to.
    """

    def __init__(self, spec: ConvSpec, target: Target, seed: int = 0) -> None:
        self.spec, self.target, self.rng = spec.core, target, random.Random(seed)
        self.default = default_candidate(spec, target)
        applicable = [s for s in schedules().values() if s.reason_against(self.spec, target) is None]
        self.schedules: list[Schedule] = [s for s in applicable if s.id != "reference" or s is self.default.schedule]
        self.results: dict[Schedule, list[tuple[float, Picks]]] = {s: [] for s in self.schedules}
        self.tried: dict[Schedule, int] = dict.fromkeys(self.schedules, 0)
        self.seen: set[Candidate] = set()
        self.wanted = ROUND
        self.refused: list[tuple[Candidate, Result]] = []

    @property
    def best(self) -> float:
        return min((seconds for found in self.results.values() for seconds, _ in found), default=float("inf"))

    def defaults(self) -> list[Candidate]:
        """Every schedule's zero-trial answer; first the one that is taken where nothing was measured."""
        found = [Candidate(s, s.default(self.spec, self.target)) for s in self.schedules]
        return sorted(found, key=lambda candidate: candidate != self.default)

    def tell(self, candidate: Candidate, result: Result) -> None:
        """Learn how a candidate did."""
        self.seen.add(candidate)
        if candidate.schedule in self.tried:
            self.tried[candidate.schedule] += 1
            if result.seconds is not None:
                self.results[candidate.schedule].append((result.seconds, candidate.picks))

    def ask(self, count: int) -> list[Candidate]:
        """Up to ``count`` distinct valid candidates not yet tried; none where the spaces are exhausted."""
        chosen: list[Candidate] = [c for c in self.defaults() if c not in self.seen][:count]
        self.seen.update(chosen)
        survivors = [s for s in self.schedules if self._alive(s)]
        while len(chosen) < count and survivors:
            schedule = self.rng.choices(survivors, [self._weight(s) for s in survivors])[0]
            candidate = self._draw(schedule)
            if candidate is None:
                survivors.remove(schedule)
            else:
                self.seen.add(candidate)
                chosen.append(candidate)
        return chosen

    def _alive(self, schedule: Schedule) -> bool:
        own = min((seconds for seconds, _ in self.results[schedule]), default=float("inf"))
        return self.tried[schedule] < TRIES or own <= BEHIND * self.best

    def _weight(self, schedule: Schedule) -> float:
        own = min((seconds for seconds, _ in self.results[schedule]), default=None)
        return 1.0 if own is None else (self.best / own) ** 4

    def _draw(self, schedule: Schedule) -> Candidate | None:
        space = schedule.space(self.spec, self.target)
        leaders = [picks for _, picks in sorted(self.results[schedule], key=lambda r: r[0])[:3]]
        if leaders and self.rng.random() < 0.5:
            near = [p for leader in leaders for p in space.neighbours(leader)]
            self.rng.shuffle(near)
            for picks in near:
                if self._fresh(schedule, picks):
                    return Candidate(schedule, picks)
        for _ in range(64):
            picks = space.sample(self.rng)
            if self._fresh(schedule, picks):
                return Candidate(schedule, picks)
        # Chance finds nothing new: what is left is little, or nothing.
        return next((Candidate(schedule, p) for p in space if self._fresh(schedule, p)), None)

    def _fresh(self, schedule: Schedule, picks: Picks) -> bool:
        return Candidate(schedule, picks) not in self.seen and not schedule.reason_against(
            self.spec, self.target, picks
        )


def race_strategy(race: Race, spec: ConvSpec, target: Target) -> Any:
    """A race as MetaSchedule's SearchStrategy: measure candidates made from different modules.

    A candidate that TVM cannot schedule is put into ``race.refused``. Results reach the race as they
    come, through :meth:`Race.tell`, because a budget may end within a batch.
    """
    from tvm.ir.utils import derived_object
    from tvm.s_tir import Schedule as TirSchedule
    from tvm.s_tir.meta_schedule.search_strategy import MeasureCandidate, PySearchStrategy

    @derived_object
    class RaceStrategy(PySearchStrategy):  # type: ignore[misc]
        def generate_measure_candidates(self) -> list[Any] | None:
            drawn = race.ask(race.wanted)
            candidates = []
            for candidate in drawn:
                try:
                    module = measure_module(lower(spec, target, candidate))
                    candidates.append(MeasureCandidate(TirSchedule(module), []))
                except Inapplicable:
                    continue
                except BuildError as error:
                    race.refused.append((candidate, Result("build_error", error=str(error)[-2000:])))
            return candidates if drawn else None

        def clone(self) -> Any:
            return race_strategy(race, spec, target)

    return RaceStrategy()
