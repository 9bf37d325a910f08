"""What to try next: all applicable schedules race for one layer.

The spaces are small and structured, where sampling with a local search around the leaders comes close to
the best in few trials (Tollenaere et al., ACM TACO 20(1), 2022). Which of the samples are measured, a
:class:`~convgen.tuning.ranker.Ranker` decides: those that may well be the fastest, given every measurement of
this layer and of others. The candidates of a round differ: each is chosen as if those before it had
come out as predicted (GP-BUCB: Desautels, Krause and Burdick, JMLR 15, 2014).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Iterator
from functools import cached_property

from ..deferred import np
from ..errors import Inapplicable, UnsupportedError
from ..hardware.target import Target
from ..lowering.candidates import default_candidate
from ..lowering.discover import schedules
from ..lowering.schedule import Candidate, Picks, Schedule
from ..problem.spec import ConvSpec
from ..records.outcome import Result
from .ranker import NOISE, Ranker

#: Candidates per round: enough to keep the build processes busy, few enough to learn from each.
ROUND = 4
#: A schedule whose best is this many times slower than the leader after `TRIES` trials drops out.
BEHIND, TRIES = 1.3, 8
#: How many candidates are drawn for the ranker to choose from.
POOL = 256
#: Standard deviations by which a candidate may be better than expected, in turn: what is likely the fastest, and
#: what may well be; and the share of trials drawn by chance, where the model may be led astray.
HOPES, CHANCE = (0.0, 1.0), 0.25


class Race:
    """What to try next: the schedules' candidates, those that lead tried more.

    First comes the zero-trial answer, which tuning must not lose to, then what won on similar layers and the default
    of every other schedule, however slow it is said to be: where the answer is bad, that is usually what is wrong.
    Then comes what the ranker chooses among uniform draws and neighbours of the leaders. Schedules that stay behind
    drop out. The reference takes part only where it is the ``default``, or nothing else is left.

    Args:
        threads: what the ranker predicts for, where none is given.
        ranker: taught by a store; told every result of this race. None: one that knows nothing yet.
        exclude: ids of schedules to leave out. The default is the zero-trial answer even if it is one of theirs: a
            build takes it, whatever a search leaves out, and so what wins must be faster than that.

    Raises:
        UnsupportedError: no schedule applies, or none is left.
    """

    def __init__(
        self,
        spec: ConvSpec,
        target: Target,
        threads: int,
        seed: int = 0,
        *,
        ranker: Ranker | None = None,
        exclude: Collection[str] = (),
    ) -> None:
        target = target.on(threads)
        self.spec, self.target, self.rng = spec.core, target, random.Random(seed)
        self.ranker = Ranker(target, threads) if ranker is None else ranker
        self.default = default_candidate(spec, target)
        applicable = [s for s in schedules().values() if s.reason_against(self.spec, target) is None]
        applicable = [s for s in applicable if s.id not in exclude]
        if not applicable:
            raise UnsupportedError(f"exclude: expected to leave a schedule for {spec.descriptor}, found none")
        fast = [s for s in applicable if not s.is_reference or s is self.default.schedule]
        self.schedules: list[Schedule] = fast or applicable
        self.results: dict[Schedule, list[tuple[float, Picks]]] = {s: [] for s in self.schedules}
        self.tried: dict[Schedule, int] = dict.fromkeys(self.schedules, 0)
        self.seen: set[Candidate] = set()
        #: Seconds of the fastest candidate so far.
        self.best = math.inf
        self._spaces = {s: s.space(self.spec, target) for s in self.schedules}
        self._awaited: dict[Candidate, None] = {}
        self._opening = True
        self._hopes = itertools.cycle(HOPES)

    def defaults(self) -> list[Candidate]:
        """Every schedule's zero-trial answer; first the one that is taken where nothing was measured."""
        defaults = [Candidate(s, s.default(self.spec, self.target)) for s in self.schedules]
        return list(dict.fromkeys([self.default, *defaults]))

    def tell(self, candidate: Candidate, result: Result) -> None:
        """Learn how a candidate did."""
        self.seen.add(candidate)
        self._awaited.pop(candidate, None)
        if candidate.schedule in self.tried:
            self.tried[candidate.schedule] += 1
            if result.seconds is not None:
                self.results[candidate.schedule].append((result.seconds, candidate.picks))
                self.best = min(self.best, result.seconds)
            self.ranker.observe(self.spec, candidate, result.seconds)

    def ask(self, count: int) -> list[Candidate]:
        """Up to ``count`` distinct valid candidates not yet tried; none where the spaces are exhausted."""
        chosen: list[Candidate] = []
        if self._opening:
            chosen = [c for c in dict.fromkeys(self._first()) if c not in self.seen][:count]
            self._opening = bool(chosen)
            self._take(chosen)
        while len(chosen) < count and (pool := self._pool()):
            taken = self._choose(pool, count - len(chosen))
            self._take(taken)
            chosen += taken
        return chosen

    def _take(self, candidates: list[Candidate]) -> None:
        self.seen.update(candidates)
        self._awaited.update(dict.fromkeys(candidates))

    @property
    def opening(self) -> int:
        """How many are left to try of what is tried before anything is drawn."""
        return sum(candidate not in self.seen for candidate in self._openers)

    @cached_property
    def _openers(self) -> list[Candidate]:
        """In no order: the default, what won on similar layers, and every schedule's default."""
        return list(dict.fromkeys([*self.defaults(), *self._winners]))

    @cached_property
    def _winners(self) -> list[Candidate]:
        """What won on similar layers, by what was known when the race began to draw."""
        return [c for c in self.ranker.similar(self.spec) if c.schedule in self.tried]

    def _first(self) -> Iterator[Candidate]:
        """What is tried before anything is drawn."""
        yield self.default
        yield from self._winners
        defaults = self.defaults()
        log_seconds = self.ranker.predict(self.spec, defaults)
        ranked = sorted(zip(log_seconds, range(len(defaults)), defaults, strict=True), key=lambda entry: entry[:2])
        yield from (candidate for _, _, candidate in ranked)

    def _choose(self, pool: list[Candidate], count: int) -> list[Candidate]:
        """Those of a pool that may well be the fastest."""
        awaited = list(self._awaited)
        everything = [*awaited, *pool]
        mean, covariance = self.ranker.posterior(self.spec, everything)
        free = np.array([False] * len(awaited) + [True] * len(pool))

        def suppose(index: int) -> None:
            """It came out as predicted: what is like it is no longer uncertain."""
            nonlocal covariance
            column = covariance[:, index]
            covariance = covariance - np.outer(column, column) / (column[index] + NOISE**2)

        for index in range(len(awaited)):
            suppose(index)
        levels: dict[Schedule, float] = {}
        for value, candidate in zip(mean, everything, strict=True):
            # A default whose schedule is left out may be among those that are awaited.
            levels[candidate.schedule] = min(levels.get(candidate.schedule, math.inf), float(value))
        # Chance draws among the schedules that may win.
        near = np.array([levels[c.schedule] <= mean.min() + math.log(BEHIND) for c in everything])
        taken: list[Candidate] = []
        while len(taken) < count and free.any():
            if self.rng.random() < CHANCE and (free & near).any():
                index = self.rng.choice([int(i) for i in np.flatnonzero(free & near)])
            else:
                hope = mean - next(self._hopes) * np.sqrt(np.maximum(np.diag(covariance), 0.0))
                index = int(np.argmin(np.where(free, hope, np.inf)))
            suppose(index)
            free[index] = False
            taken.append(pool[index - len(awaited)])
        return taken

    # ---- candidates -------------------------------------------------------------------------------

    def _alive(self, schedule: Schedule) -> bool:
        own = min((seconds for seconds, _ in self.results[schedule]), default=float("inf"))
        return self.tried[schedule] < TRIES or own <= BEHIND * self.best

    def _pool(self) -> list[Candidate]:
        """Candidates not yet tried, of the schedules that are still in the race; none where they are exhausted."""
        alive = [s for s in self.schedules if self._alive(s)]
        pool: dict[Candidate, None] = {}
        for schedule in alive:
            pool.update(dict.fromkeys(Candidate(schedule, p) for p in self._draw(schedule, POOL // len(alive))))
        return list(pool)

    def _draw(self, schedule: Schedule, count: int) -> list[Picks]:
        """Up to ``count`` fresh points of a schedule's space: all of a small one, else uniform ones, and
        neighbours of its three best (of its default where it has none) and neighbours of those.
        """
        space, fresh = self._spaces[schedule], dict[Picks, None]()

        def take(points: Iterator[Picks], limit: int) -> None:
            fresh.update(dict.fromkeys(itertools.islice((p for p in points if self._is_fresh(schedule, p)), limit)))

        if space.size <= 2 * count:
            points = list(space)
            self.rng.shuffle(points)
            take(iter(points), count)
            return list(fresh)
        leaders = [picks for _, picks in sorted(self.results[schedule], key=lambda r: r[0])[:3]]
        leaders = leaders or [schedule.default(self.spec, self.target)]
        near = [p for leader in leaders for p in space.neighbours(leader)]
        self.rng.shuffle(near)
        take(iter(near), count // 2)
        further = (self.rng.choice(list(space.neighbours(self.rng.choice(near)))) for _ in range(count))
        take(further, count // 4)
        take((space.sample(self.rng) for _ in range(2 * count)), count - len(fresh))
        if not fresh:  # chance finds nothing new: what is left is little, or nothing
            take(iter(space), count)
        return list(fresh)

    def _is_fresh(self, schedule: Schedule, picks: Picks) -> bool:
        if Candidate(schedule, picks) in self.seen:
            return False
        try:
            schedule.valid(self.spec, self.target, picks)
        except Inapplicable:
            return False
        return True
