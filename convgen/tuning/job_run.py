"""A tuning job at work.

The records are its only state: it goes on from whatever is in the store, whoever measured it. First the default of
every layer is measured, then that of every other schedule that applies: where a layer is slow, that is usually what is
wrong. Then time goes where it pays: each round of candidates to the layer that is expected to save most of its models'
time per second spent on it (the idea of a gradient-based task scheduler: Zheng et al., *Ansor*, OSDI 2020, section 6).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from ..errors import BuildError, MeasureError
from ..hardware.target import Target
from ..interrupts import interrupts_held
from ..measure.workers import Pools
from ..problem.spec import ConvSpec
from ..records.store import RecordStore
from .final import final_comparison
from .job import Job
from .job_state import JobState, Layer
from .networks import ROUNDS as CHAIN_ROUNDS
from .networks import Timing, judge_networks
from .rounds import round_size, take_rounds
from .search import Search

#: Seconds that a final comparison takes, before one was made: on one thread, and on several.
FINAL_GUESS = (2.5, 5.0)
#: Seconds that judging a network takes beside the rounds of its chains, of which there are so many at most: with the
#: defaults, with what won, with what came next, and with what is kept beside the defaults.
NETWORK_GUESS, CHAINS = 2.0, 5
#: Share of the budget that is kept for final comparisons at most.
RESERVE = 1 / 3
#: Trials that the job's mean cost of one counts as, when a layer's own is estimated.
TRUST = 4


class JobRun(JobState):
    """A job at work.

    Args:
        job, store, report, resolve, expected, now: as of a :class:`~convgen.tuning.job_state.JobState`.
        pools: who compiles and measures.
        timing: what judges the winners in their networks; these networks' chains where None.

    Raises:
        SpecError, UnsupportedError: a model cannot be read, or a target is unknown or does not run here.
        RecordError: the store cannot be read.
    """

    def __init__(
        self,
        job: Job,
        store: RecordStore | None,
        pools: Pools,
        *,
        report: Callable[[JobState, Layer], None] | None = None,
        resolve: Callable[[str], Target] | None = None,
        timing: Timing | None = None,
        expected: Mapping[ConvSpec, float] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(job, store, pools, report=report, resolve=resolve, expected=expected, now=now)
        self.workers, self._timing = pools, timing
        self._in_networks = {spec for order in job.networks.values() for spec in order}
        self._finals: list[float] = []  # what final comparisons took

    def run(self) -> None:
        """Spend the budget, and compare what was found.

        Raises:
            KeyboardInterrupt: what was measured until then is in the store.
            MeasureError: nothing can be measured any more.
            RecordError: the store cannot be read or written.
        """
        with interrupts_held() as interrupts:
            self.workers.interrupts = interrupts
            self.journal.charge()
            self.running = True

            def stop() -> bool:
                return interrupts.came or self.is_spent(self._reserve())

            while not interrupts.came:
                take_rounds(self.workers, self._choose, stop)
                if interrupts.came:
                    break
                finished = [layer for layer in self.layers if self._is_finished(layer)]
                for layer in finished:
                    self._compare(layer)
                    if interrupts.came:
                        break
                if not finished:  # the time is over, or nothing is left to try
                    break
            self._last_comparisons(lambda: interrupts.came)
            if not interrupts.came:
                self._judge_networks()
                self.settle()
            self.running = False

    def _reserve(self) -> float:
        """Seconds to keep for the final comparisons."""
        if self.job.seconds is None:
            return 0.0
        waiting = [layer for layer in self.layers if self._awaits_comparison(layer)]
        reserve = sum(map(self._final_seconds, waiting))
        in_networks = [layer for layer in waiting if layer.problem.spec in self._in_networks]
        if in_networks:
            reserve += NETWORK_GUESS + CHAINS * CHAIN_ROUNDS * sum(layer.share for layer in in_networks)
        return min(reserve, RESERVE * self.job.seconds)

    def _final_seconds(self, layer: Layer) -> float:
        if self._finals:
            return sum(self._finals) / len(self._finals)
        return FINAL_GUESS[layer.problem.threads > 1]

    def _awaits_comparison(self, layer: Layer) -> bool:
        search = layer.search
        return search is not None and layer.state == "searching" and search.best is not None and not search.answered

    def _is_finished(self, layer: Layer) -> bool:
        """Whether the search of a layer is over, and the comparison is due."""
        return layer.search is not None and layer.state == "searching" and bool(layer.search.over)

    def _choose(self) -> tuple[Search, int] | None:
        """The search that a round is to be spent on; None where comparisons are due, or there is none."""
        job = self.job
        if any(self._is_finished(layer) for layer in self.layers):
            return None
        claimed = sum(search.in_flight for search in self.searches)
        left = math.inf if job.trials is None else job.trials - self.trials - claimed
        candidates = [layer for layer in self.layers if layer.is_open]
        candidates = [layer for layer in candidates if not _search(layer).blocked] or candidates
        if left <= 0 or not candidates:
            return None
        opening = [layer for layer in candidates if _search(layer).race.opening]
        fresh = [layer for layer in opening if not _search(layer).started]
        if opening:
            layer = max(fresh or opening, key=lambda layer: layer.share)
            count = max(self.workers.builder.workers, 1) if fresh else round_size(self.workers)
            count = min(count, _search(layer).race.opening)
        else:
            mean = sum(s.job_cost for s in self.searches) / self.trials if self.trials else 1.0
            layer, count = max(candidates, key=lambda layer: _value(layer, mean)), round_size(self.workers)
        if layer.state != "searching":
            layer.state = "searching"
            self.report(self, layer)
        return _search(layer), int(min(count, left))

    def _last_comparisons(self, came: Callable[[], bool]) -> None:
        """Compare what was searched: first what has most to gain; what seems no better while there is time."""
        seconds = self.job.seconds
        waiting = [layer for layer in self.layers if layer.state == "searching"]
        for layer in sorted(waiting, key=lambda layer: (layer.is_improved, layer.share), reverse=True):
            if came():
                return
            if (
                layer.is_improved
                or seconds is None
                or self.spent <= seconds
                or not any(s.winner for s in self.searches)
            ):
                self._compare(layer)

    def _compare(self, layer: Layer) -> None:
        """The final comparison of a layer."""
        search = _search(layer)
        layer.state = "comparing"
        start = self.now()
        try:
            answered = search.answered
            winner = final_comparison(search)
            if not answered and winner is not None:
                self._finals.append(self.now() - start)
        except BuildError as error:
            winner, layer.reason = None, str(error)
        if self.workers.interrupts.came:
            layer.state = "searching"
            return
        layer.state = "done" if winner else "failed" if search.tried or layer.reason else "waiting"
        if layer.state == "failed":
            failures = ", ".join(f"{what} {count}" for what, count in sorted(search.state.failures.items()))
            layer.reason = layer.reason or f"no candidate was right: {failures or 'none ran when compared'}"
        if layer.problem.spec not in self._in_networks:
            search.close()
        self.report(self, layer)

    def _judge_networks(self) -> None:
        """Keep of what won only what pays in the models as well, where the order of their layers is known."""
        for key, context in self.contexts.items():
            layers = [layer for layer in self.layers if (layer.problem.target.spelling, layer.problem.threads) == key]
            searches = {layer.problem.spec: _search(layer) for layer in layers if layer.search and layer.search.winner}
            judging = [layer for layer in layers if layer.is_compared_alone and layer.problem.spec in self._in_networks]
            self.judging = bool(judging)
            for layer in judging[:1]:
                self.report(self, layer)  # before the minutes that compiling networks may take
            self.networks += judge_networks(context, self.job.networks, searches, self._timing)
            self.judging = False
            for layer in judging:
                self.report(self, layer)


def _value(layer: Layer, mean: float) -> float:
    """Seconds of the models' time that a second spent on a layer is expected to save.

    ``mean``: seconds that a trial of the job takes.
    """
    search = _search(layer)
    cost = (search.job_cost + TRUST * mean) / (search.job_trials + TRUST)
    return search.gain * layer.share / max(cost, 1e-9)


def _search(layer: Layer) -> Search:
    """The search of a layer that has one."""
    if layer.search is None:
        raise MeasureError(f"{layer.problem.spec.descriptor}: {layer.reason}")
    return layer.search
