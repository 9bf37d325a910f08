"""The tuning of one layer after another: all applicable schedules race for each, within a budget.

:class:`Tuner` has the workers and the store; :mod:`convgen.tuning.search` finds what to try next,
:mod:`convgen.tuning.rounds` tries it, and :mod:`convgen.tuning.final` decides.
:mod:`convgen.tuning.job_run` divides time among many layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

from ..errors import SpecError
from ..hardware.target import Target
from ..interrupts import interrupts_held
from ..lowering.schedule import Candidate
from ..measure.workers import Pools
from ..problem.spec import ConvSpec
from ..records.record import TuningRecord
from ..records.store import RecordStore
from .context import SearchContext
from .final import final_comparison
from .journal import Journal
from .ranker import Ranker
from .rounds import round_size, take_rounds
from .search import Progress, Search


class Tuner:
    """Worker processes and a store, for any number of layers one after another.

    Args:
        target: where the kernels run: this machine, or the one the runner measures on.
        threads: threads of the kernels.
        records: the store trials are committed to, or the journal of a job; None keeps them for this
            run only.
        pools: who compiles and measures; processes of this machine by default. Those that are given
            are left open.
        ranker: ranks candidates before they are measured; by default one that learns from the store.

    Raises:
        UnsupportedError: kernels for the target do not run on this machine, which is to measure them.
    """

    def __init__(
        self,
        target: Target,
        threads: int,
        records: RecordStore | Journal | None,
        *,
        pools: Pools | None = None,
        ranker: Ranker | None = None,
    ) -> None:
        self.target, self.threads = target, threads
        self.journal = records if isinstance(records, Journal) else Journal(records)
        self._own_journal = self.journal is not records
        self.context = SearchContext(target, threads, self.journal, pools=pools, ranker=ranker)
        #: Candidates of the last layer that failed, they crashed, hung or were wrong, while others did not: where all
        #: fail that says nothing of any one.
        self.rejected: set[Candidate] = set()
        #: What a user should know of the last layer's trials; empty otherwise.
        self.note = ""

    def __enter__(self) -> Tuner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and give claims back."""
        with interrupts_held():
            self.context.close()
            if self._own_journal:
                self.journal.close()

    @property
    def records(self) -> RecordStore | None:
        return self.journal.store

    @property
    def pools(self) -> Pools:
        return self.context.pools

    def search(self, spec: ConvSpec, **options: Any) -> Search:
        """The search of a layer, to be taken on in rounds; the arguments are those of :class:`Search`."""
        return Search(self.context, spec, **options)

    def tune(
        self,
        spec: ConvSpec,
        *,
        trials: int = 0,
        seconds: float | None = None,
        progress: Callable[[Progress], None] | None = None,
        seed: int = 0,
        exclude: Collection[str] = (),
        patience: int | None = None,
    ) -> TuningRecord | None:
        """The best record for one layer, after spending a budget.

        Args:
            trials: trials in all, those already in the store included; 0: no limit.
            seconds: time to spend; None: no limit. With neither, it stops when nothing is gained.
            progress: called after every trial.
            exclude: ids of schedules that do not take part.
            patience: trials without a gain of 1 % after which it stops; by default
                :data:`~convgen.tuning.search.PATIENCE`.

        Returns:
            The winner of the final comparison; None where no candidate was right.

        Raises:
            SpecError: the budget is not a number, or negative.
            KeyboardInterrupt: what was measured until then is in the store.
        """
        check_budget(trials, seconds)
        with interrupts_held() as interrupts:
            pools, journal = self.pools, self.journal
            pools.interrupts = interrupts
            journal.charge()
            start = journal.now()
            search = self.search(
                spec, trials=trials, seconds=seconds, progress=progress, seed=seed, exclude=exclude, patience=patience
            )
            self.rejected, self.note = search.rejected, ""

            def stop() -> bool:
                return interrupts.came or (seconds is not None and journal.now() - start >= seconds)

            try:
                take_rounds(pools, lambda: None if search.over else (search, round_size(pools)), stop)
                record = None if interrupts.came else final_comparison(search)
                if search.all_failed:
                    self.rejected = set()
                    count = f"all {len(search.tried)} trials" if len(search.tried) > 1 else "the one trial"
                    self.note = f"{search.spec}: {count} failed: the untuned default answers; first {search.failure}"
                return record
            finally:
                search.close()
                self.context.forget()


def check_budget(trials: object, seconds: object) -> None:
    """Raise:
    SpecError: ``trials`` is not an integer, ``seconds`` not a finite number or None, or one is negative.
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 0:
        raise SpecError("trials", "an integer >= 0", repr(trials))
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise SpecError("seconds", "a finite number >= 0", repr(seconds))
