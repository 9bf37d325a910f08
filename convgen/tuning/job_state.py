"""Where a tuning job stands: its layers, and what records say of them. Nothing here measures, or loads what does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConvgenError, RecordError
from ..hardware.machine import check_memory
from ..hardware.target import Target
from ..problem.spec import ConvSpec
from ..records.record import TuningRecord
from ..records.store import RecordStore
from .context import SearchContext
from .job import Job, Problem
from .journal import Journal
from .search import Progress, Search

if TYPE_CHECKING:
    from ..measure.workers import Pools
    from .networks import NetworkTimes


#: Why a layer is not searched any more that might be.
SPENT = "the budget is spent"


@dataclass
class Layer:
    """A problem of a running job.

    Attributes:
        state: ``waiting``, ``searching``, ``comparing``, ``begun`` (not searched to the end, and nothing searches it
            now), ``done``, ``out of budget`` (not searched to the end), ``skipped`` (nothing to do) or ``failed``.
        reason: why it was skipped, or failed, or is not searched any more.
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
        return self.search is not None and bool(self.search.contenders)

    @property
    def is_improved(self) -> bool:
        """Whether a tuned candidate seems to beat the default."""
        state = self.progress
        return bool(state and state.best and (state.default is None or state.best < 0.99 * state.default))


class JobState:
    """A job as the records have it; between two runs of it only they remain.

    Args:
        job: what to do.
        store: where records are; None: there are none.
        pools: who compiles and measures, in a run.
        report: called after every trial and whenever a layer's state changes.
        resolve: gives a target's facts.
        expected: seconds of layers' defaults that are known better than by prediction.
        now: the clock, in seconds.

    Attributes:
        layers: every problem of the job.
        searches: of the layers that can be searched.
        contexts: what these share, by target and number of threads.
        networks: what the models' layers take one after another, where that was timed in this run.
        running: whether the time that passes is the job's.
        judging: whether what won is being timed in its networks.

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
        report: Callable[[JobState, Layer], None] | None = None,
        resolve: Callable[[str], Target] | None = None,
        expected: Mapping[ConvSpec, float] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job, self.store, self.pools = job, store, pools
        self.journal = Journal(store, job.id, now=now)
        self.report, self.now = report or (lambda state, layer: None), now
        self.layers = [Layer(problem) for problem in job.problems(resolve)]
        self.networks: list[NetworkTimes] = []
        self.contexts: dict[tuple[str, int], SearchContext] = {}
        self.running = self.judging = False
        for layer in self.layers:
            target, threads = layer.problem.target, layer.problem.threads
            key = (target.spelling, threads)
            if key not in self.contexts:
                self.contexts[key] = SearchContext(target, threads, self.journal, pools=pools)
            self._open(layer, self.contexts[key], expected or {})

    def _open(self, layer: Layer, context: SearchContext, expected: Mapping[ConvSpec, float]) -> None:
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
                trials=self.job.trials_per_layer or 0,
                patience=self.job.patience,
                seed=self.job.seed,
                exclude=self.job.exclude,
                progress=lambda _: self.report(self, layer),
            )
        except RecordError:
            raise  # no fault of the layer
        except ConvgenError as error:
            layer.state, layer.reason = "failed", str(error)
            return
        default = search.race.default
        predicted = expected.get(spec) or default.schedule.cost(spec.core, context.target)
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

    @property
    def searches(self) -> list[Search]:
        return [layer.search for layer in self.layers if layer.search]

    @property
    def spent(self) -> float:
        """Seconds spent on the job, in all its runs."""
        kept = sum(search.job_cost for search in self.searches)
        return kept + (self.journal.uncharged if self.running else 0.0)

    @property
    def trials(self) -> int:
        """Trials made for the job, in all its runs."""
        return sum(search.job_trials for search in self.searches)

    @property
    def measured(self) -> int:
        """Trials made in this run."""
        return sum(search.made for search in self.searches)

    @property
    def over(self) -> float:
        """Seconds that were spent beyond the budget: what was found is compared in any case."""
        return 0.0 if self.job.seconds is None else max(0.0, self.spent - self.job.seconds)

    @property
    def left(self) -> float | None:
        """Seconds left of the budget; None: there is no limit."""
        return None if self.job.seconds is None else max(0.0, self.job.seconds - self.spent)

    def is_spent(self, reserve: float = 0.0) -> bool:
        """Whether the budget is spent, but for some seconds.

        A budget of none for each layer is one of none.
        """
        job = self.job
        if job.trials_per_layer == 0 or (job.trials is not None and self.trials >= job.trials):
            return True
        return job.seconds is not None and self.spent >= job.seconds - reserve

    def settle(self) -> None:
        """Say of layers whose search the budget has ended that it was this."""
        for layer in self.layers:
            if layer.state in ("searching", "done") and layer.search is not None and not layer.search.over:
                layer.state = "done" if layer.search.answered else "out of budget"
                layer.reason = SPENT

    def rest(self) -> None:
        """Say of layers that are not searched to the end that nothing searches them now."""
        for layer in self.layers:
            if layer.state in ("searching", "comparing"):
                layer.state = "begun"

    def close(self) -> None:
        """Give claims and files back; the workers are the caller's."""
        for search in self.searches:
            search.close()
        for context in self.contexts.values():
            context.close()
        self.journal.close()
