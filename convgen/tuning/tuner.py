"""Tuning: what the searches of layers share, and the tuning of one layer.

All applicable schedules race for a layer (:mod:`convgen.tuning.search`); MetaSchedule's search interface is what
draws, compiles and measures their candidates. :class:`Tuner` has what the layers of one target and
thread count share, :class:`Journal` what all tuners of a job share. :mod:`convgen.tuning.job` divides time among
many layers.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import SpecError
from ..hardware.machine import machine
from ..hardware.target import Target, check_native
from ..interrupts import interrupts_held
from ..lowering.schedule import Candidate
from ..measure.trial import Expected
from ..measure.workers import LocalBuilder, LocalRunner, Pools
from ..problem.spec import ConvSpec
from ..records.record import TuningRecord
from ..records.store import RecordStore
from .journal import Journal
from .ranker import Ranker
from .search import Progress, Search, round_size, take_rounds

#: Layers whose inputs and expected outputs are kept on the disk at once.
EXPECTED = 4


class Tuner:
    """Worker processes and a store, for any number of layers one after another or in turns.

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
        if pools is None or not pools.runner.isolated:
            check_native(target)
        self.target, self.threads, self._ranker = target, threads, ranker
        self.journal = records if isinstance(records, Journal) else Journal(records)
        #: Candidates of the last layer that failed: they crashed, hung or were wrong.
        self.rejected: set[Candidate] = set()
        self._pools, self._own_pools, self._own_journal = pools, pools is None, self.journal is not records
        self._expected: OrderedDict[ConvSpec, tuple[tempfile.TemporaryDirectory[str], Expected]] = OrderedDict()

    def __enter__(self) -> Tuner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and give claims back."""
        with interrupts_held():
            if self._pools and self._own_pools:
                self._pools.close()
            self._forget(0)
            if self._own_journal:
                self.journal.close()

    @property
    def records(self) -> RecordStore | None:
        return self.journal.store

    @property
    def ranker(self) -> Ranker:
        """Learns from every layer of the store, and from every trial made here."""
        if self._ranker is None:
            self._ranker = Ranker.from_store(self.journal.store, self.target, self.threads)
        return self._ranker

    @property
    def pools(self) -> Pools:
        if self._pools is None:
            self._pools = Pools(LocalBuilder(machine().cores), LocalRunner())
        return self._pools

    def expected(self, spec: ConvSpec) -> Expected:
        """Inputs and expected output of a layer in a folder, which is kept for a while."""
        if spec not in self._expected:
            self._forget(EXPECTED - 1)
            folder = tempfile.TemporaryDirectory(prefix="convgen-")
            threads = self.threads if self.target.kind == "cpu" else machine().cores
            self._expected[spec] = folder, Expected(spec, Path(folder.name), threads)
        self._expected.move_to_end(spec)
        return self._expected[spec][1]

    def _forget(self, keep: int) -> None:
        while len(self._expected) > keep:
            self._expected.popitem(last=False)[1][0].cleanup()

    def search(self, spec: ConvSpec, **options: Any) -> Search:
        """The search of a layer, to be taken on in rounds; the arguments are those of :class:`Search`."""
        return Search(self, spec, **options)

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
            patience: trials without a gain of 1 % after which it stops; :data:`PATIENCE` by default.

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
            self.rejected = search.rejected

            def stop() -> bool:
                return interrupts.came or (seconds is not None and journal.now() - start >= seconds)

            try:
                take_rounds(pools, lambda: None if search.over else (search, round_size(pools)), stop)
                return None if interrupts.came else search.final()
            finally:
                search.close()
                self._forget(0)


def check_budget(trials: object, seconds: object) -> None:
    """Raise:
    SpecError: ``trials`` is not an integer or ``seconds`` not a number or None, or one is negative.
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 0:
        raise SpecError("trials", "an integer >= 0", repr(trials))
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise SpecError("seconds", "a number >= 0", repr(seconds))
