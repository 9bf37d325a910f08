"""A tuning job at work.

The records are its only state: it goes on from whatever is in the store, whoever measured it. Time goes where it
pays: each round of candidates to the layer that is expected to save most of its models' time per second spent on it
(the idea of a gradient-based task scheduler: Zheng et al., *Ansor*, OSDI 2020, section 6).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import BuildError, ConvgenError, MeasureError
from ..hardware.machine import check_memory
from ..hardware.target import Target
from ..interrupts import interrupts_held
from ..measure.workers import Pools
from ..problem.spec import ConvSpec
from ..records.record import TuningRecord
from ..records.store import RecordStore
from .context import SearchContext
from .final import final_comparison
from .job import Job, Problem
from .journal import Journal
from .networks import ROUNDS as CHAIN_ROUNDS
from .networks import NetworkTimes, Timing, contenders, judge_networks
from .rounds import round_size, take_rounds
from .search import Progress, Search

#: Seconds that a final comparison takes, before one was made: on one thread, and on several.
FINAL_GUESS = (2.5, 5.0)
#: Seconds that judging a network takes beside the rounds of its chains, of which there are so many at most: with the
#: defaults, with what won, with what came next, and with what is kept beside the defaults.
NETWORK_GUESS, CHAINS = 2.0, 5
#: Share of the budget that is kept for final comparisons at most, and that first trials take at most.
RESERVE, FIRST = 1 / 3, 1 / 2
#: Trials that the job's mean cost of one counts as, when a layer's own is estimated.
TRUST = 4


@dataclass
class Layer:
    """A problem of a running job.

    Attributes:
        state: ``waiting``, ``searching``, ``comparing``, ``done``, ``skipped`` (nothing to do) or ``failed``.
        reason: why it was skipped, or failed.
        predicted: seconds of its default, before anything was measured.
    """

    problem: Problem
    search: Search | None = None
    state: str = "waiting"
    reason: str = ""
    predicted: float = 0.0

    @property
    def progress(self) -> Progress | None:
        return self.search.state if self.search else None

    @property
    def best(self) -> TuningRecord | None:
        """The winner of the final comparison; before there is one, the fastest trial."""
        return (self.search.winner or self.search.best) if self.search else None

    @property
    def share(self) -> float:
        """Seconds that the layer takes of its models' time."""
        best = self.search.race.best if self.search else math.inf
        return self.problem.count * (best if best < math.inf else self.predicted)

    @property
    def is_open(self) -> bool:
        """Whether there may be something to search."""
        return self.search is not None and self.state in ("waiting", "searching") and not self.search.over

    @property
    def is_compared_alone(self) -> bool:
        """Whether a tuned candidate has won that was not judged in a network."""
        return self.search is not None and bool(contenders(self.search))

    @property
    def is_improved(self) -> bool:
        """Whether a tuned candidate seems to beat the default."""
        state = self.progress
        return bool(state and state.best and (state.default is None or state.best < 0.99 * state.default))


class JobRun:
    """A job at work; between two runs of it only the records remain.

    Args:
        job: what to do.
        store: where records go; None: they are kept for this run only.
        pools: who compiles and measures; None: nothing can be measured, only asked how the job stands.
        report: called after every trial and whenever a layer's state changes.
        resolve: gives a target's facts.
        timing: what judges the winners in their networks; these networks' chains where None.
        expected: seconds of layers' defaults that are known better than by prediction.
        now: the clock, in seconds.

    Attributes:
        layers: every problem of the job.
        networks: what the models' layers take one after another, where that was timed in this run.

    Raises:
        SpecError, UnsupportedError: a model cannot be read, or a target is unknown or does not run here.
        RecordError: the store cannot be read.
    """

    def __init__(
        self,
        job: Job,
        store: RecordStore | None,
        pools: Pools | None = None,
        *,
        report: Callable[[JobRun, Layer], None] | None = None,
        resolve: Callable[[str], Target] | None = None,
        timing: Timing | None = None,
        expected: Mapping[ConvSpec, float] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timing, self._expected = timing, expected or {}
        self.job, self.store, self.pools = job, store, pools
        self.journal = Journal(store, job.id, now=now)
        self._report, self._now = report or (lambda run, layer: None), now
        self.layers = [Layer(problem) for problem in job.problems(resolve)]
        self.networks: list[NetworkTimes] = []
        self._in_networks = {spec for order in job.networks.values() for spec in order}
        self._contexts: dict[tuple[str, int], SearchContext] = {}
        self._finals: list[float] = []  # what final comparisons took
        self._running = False
        for layer in self.layers:
            target, threads = layer.problem.target, layer.problem.threads
            key = (target.spelling, threads)
            if key not in self._contexts:
                self._contexts[key] = SearchContext(target, threads, self.journal, pools=pools)
            self._open(layer, self._contexts[key])

    def _open(self, layer: Layer, context: SearchContext) -> None:
        """Find out where a layer stands."""
        spec = layer.problem.spec
        if not spec.n:
            layer.state, layer.reason = "skipped", "an empty batch: nothing to tune"
            return
        try:
            check_memory(spec)
            layer.search = search = Search(
                context,
                spec,
                trials=self.job.trials_per_layer,
                patience=self.job.patience,
                seed=self.job.seed,
                exclude=self.job.exclude,
                progress=lambda _: self._report(self, layer),
            )
        except ConvgenError as error:
            layer.state, layer.reason = "failed", str(error)
            return
        default = search.race.default
        predicted = self._expected.get(spec) or default.schedule.cost(spec.core, context.target)
        layer.predicted = predicted if predicted < math.inf else 10 * spec.flops / context.target.peak_flops
        if self._is_answered(search):
            layer.state, layer.reason = "skipped", "the store has the answer"
        elif search.over and search.answered:
            layer.state = "done"
        elif search.started:
            layer.state = "searching"

    def _is_answered(self, search: Search) -> bool:
        """Whether the store has what this job would find out: another job's answer, or an imported one."""
        if search.winner is None:
            return False
        note, asked = search.winner.note or {}, self.job.trials_per_layer
        left_out = note.get("exclude")
        if isinstance(left_out, list) and any(name not in self.job.exclude for name in left_out):
            return False  # not all that may win here took part
        if asked:
            return search.state.done >= asked
        if "recheck" in note:  # it beat the default, and nothing else was tried
            return False
        by = note.get("job")
        return by != self.journal.job if by else search.state.done <= len(search.finals)

    # ---- where it stands ----------------------------------------------------------------------

    @property
    def _searches(self) -> list[Search]:
        return [layer.search for layer in self.layers if layer.search]

    @property
    def spent(self) -> float:
        """Seconds spent on the job, in all its runs."""
        kept = sum(search.job_cost for search in self._searches)
        return kept + (self.journal.uncharged if self._running else 0.0)

    @property
    def trials(self) -> int:
        """Trials made for the job, in all its runs."""
        return sum(search.job_trials for search in self._searches)

    @property
    def measured(self) -> int:
        """Trials made in this run."""
        return sum(search.made for search in self._searches)

    @property
    def left(self) -> float | None:
        """Seconds left of the budget; None: there is no limit."""
        return None if self.job.seconds is None else max(0.0, self.job.seconds - self.spent)

    # ---- running ------------------------------------------------------------------------------

    def run(self) -> None:
        """Spend the budget, and compare what was found.

        Raises:
            KeyboardInterrupt: what was measured until then is in the store.
            MeasureError: nothing can be measured any more.
            RecordError: the store cannot be read or written.
        """
        if self.pools is None:
            raise MeasureError("job: expected workers to run it with, found none")
        with interrupts_held() as interrupts:
            self.pools.interrupts = interrupts
            self.journal.charge()
            self._running = True

            def stop() -> bool:
                return interrupts.came or self._is_spent()

            while not interrupts.came:
                take_rounds(self.pools, self._choose, stop)
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
            self._running = False

    def close(self) -> None:
        """Give claims and files back; the workers are the caller's."""
        for search in self._searches:
            search.close()
        for context in self._contexts.values():
            context.close()
        self.journal.close()

    def _is_spent(self) -> bool:
        """Whether it is time to compare: the budget is spent, but for what that takes."""
        job = self.job
        if job.trials is not None and self.trials >= job.trials:
            return True
        return job.seconds is not None and self.spent >= job.seconds - self._reserve()

    def _reserve(self) -> float:
        """Seconds to keep for the final comparisons."""
        waiting = [layer for layer in self.layers if self._awaits_comparison(layer)]
        reserve = sum(map(self._final_seconds, waiting))
        in_networks = [layer for layer in waiting if layer.problem.spec in self._in_networks]
        if in_networks:
            reserve += NETWORK_GUESS + CHAINS * CHAIN_ROUNDS * sum(layer.share for layer in in_networks)
        return min(reserve, RESERVE * (self.job.seconds or 0.0))

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
        pools, job = self.pools, self.job
        if pools is None or any(self._is_finished(layer) for layer in self.layers):
            return None
        claimed = sum(search.in_flight for search in self._searches)
        left = math.inf if job.trials is None else job.trials - self.trials - claimed
        candidates = [layer for layer in self.layers if layer.is_open]
        candidates = [layer for layer in candidates if layer.search and not layer.search.blocked] or candidates
        if left <= 0 or not candidates:
            return None
        fresh = [layer for layer in candidates if layer.search and not layer.search.started]
        if fresh and (job.seconds is None or self.spent < FIRST * job.seconds or len(fresh) == len(candidates)):
            layer, count = max(fresh, key=lambda layer: layer.share), max(pools.builder.workers, 1)
        else:
            mean = sum(s.job_cost for s in self._searches) / self.trials if self.trials else 1.0
            layer, count = max(candidates, key=lambda layer: _value(layer, mean)), round_size(pools)
        if layer.state != "searching":
            layer.state = "searching"
            self._report(self, layer)
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
                or not any(s.winner for s in self._searches)
            ):
                self._compare(layer)

    def _compare(self, layer: Layer) -> None:
        """The final comparison of a layer."""
        search = _search(layer)
        layer.state = "comparing"
        start = self._now()
        try:
            answered = search.answered
            winner = final_comparison(search)
            if not answered and winner is not None:
                self._finals.append(self._now() - start)
        except BuildError as error:
            winner, layer.reason = None, str(error)
        if self.pools and self.pools.interrupts.came:
            layer.state = "searching"
            return
        layer.state = "done" if winner else "failed"
        if winner is None:
            layer.reason = layer.reason or "no candidate finished within the budget with the right result"
        if layer.problem.spec not in self._in_networks:
            search.close()
        self._report(self, layer)

    def _judge_networks(self) -> None:
        """Keep of what won only what pays in the models as well, where the order of their layers is known."""
        for key, context in self._contexts.items():
            layers = [layer for layer in self.layers if (layer.problem.target.spelling, layer.problem.threads) == key]
            searches = {layer.problem.spec: _search(layer) for layer in layers if layer.search and layer.search.winner}
            judging = [layer for layer in layers if layer.is_compared_alone and layer.problem.spec in self._in_networks]
            self.networks += judge_networks(context, self.job.networks, searches, self._timing)
            for layer in judging:
                self._report(self, layer)


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
