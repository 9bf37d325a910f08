"""Tuning: MetaSchedule's search interfaces over the spaces that schedules declare.

All applicable schedules race for one layer. :class:`Race` decides what to try next; MetaSchedule's
builder and runner (:mod:`convgen.measure`) compile, verify and time it in worker processes; every
trial is committed to the record store the moment it ends, and one that is already there is never
measured again. At the end the leaders and the default are re-measured in turn, and those figures
decide.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from .build import Records, check_native, check_threads, open_store, record_candidate, versions
from .errors import MeasureError, SpecError
from .interrupts import interrupts_held
from .lower import lower
from .measure import HOPELESS, INTERRUPTED, TRIAL_SECONDS, Expected, Result, measure_module, measured_candidate
from .race import ROUND, Race, race_strategy
from .records import RecordStore, TuningRecord
from .schedule import Candidate
from .spec import ConvSpec
from .target import Target, resolve
from .workers import LocalBuilder, LocalRunner, Pools, metaschedule_pools, outcome

#: Trials without a gain of 1 % after which a layer is done.
PATIENCE = 48
#: How many leaders are re-measured against the default, and how often each.
FINALISTS, ROUNDS = 3, 15


@dataclass
class Progress:
    """Where the tuning of one layer stands; handed to the progress callback after each trial.

    ``best`` and ``default`` are seconds; ``failures`` counts trials by outcome. ``known`` of the
    ``done`` trials were in the store before.
    """

    spec: ConvSpec
    trials: int
    seconds: float | None
    done: int = 0
    known: int = 0
    elapsed: float = 0.0
    best: float | None = None
    best_candidate: str = ""
    default: float | None = None
    failures: Counter[str] = field(default_factory=Counter)
    phase: str = "search"


class Tuner:
    """Worker processes and a store, for any number of layers one after another.

    Args:
        target: where the kernels run: this machine.
        threads: threads of the kernels.
        records: the store trials are committed to; None keeps them for this run only.

    Raises:
        UnsupportedError: kernels for the target do not run on this machine.
    """

    def __init__(self, target: Target, threads: int, records: RecordStore | None) -> None:
        check_native(target)
        self.target, self.threads, self.records = target, threads, records
        #: Candidates of the last layer that failed: they crashed, hung or were wrong.
        self.rejected: set[Candidate] = set()
        self._pools: Pools | None = None

    def __enter__(self) -> Tuner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pools:
            self._pools.close()

    @property
    def pools(self) -> Pools:
        if self._pools is None:
            self._pools = Pools(LocalBuilder(self.target.cores), LocalRunner())
        return self._pools

    def tune(
        self,
        spec: ConvSpec,
        *,
        trials: int = 0,
        seconds: float | None = None,
        progress: Callable[[Progress], None] | None = None,
        seed: int = 0,
    ) -> TuningRecord | None:
        """The best record for one layer, after spending a budget.

        Args:
            trials: trials in all, those already in the store included; 0: no limit.
            seconds: time to spend; None: no limit. With neither, it stops when nothing is gained.
            progress: called after every trial.

        Returns:
            The winner of the final comparison; None where no candidate was right.

        Raises:
            SpecError: the budget is not a number, or negative.
            KeyboardInterrupt: what was measured until then is in the store.
        """
        check_budget(trials, seconds)
        race = Race(spec, self.target, seed)
        state = Progress(spec, trials, seconds)
        report = progress or (lambda _: None)
        start, since_gain = time.monotonic(), 0
        measured: dict[Candidate, TuningRecord] = {}

        self.rejected = set()

        def learn(candidate: Candidate, record: TuningRecord) -> None:
            nonlocal since_gain
            result = Result(record.outcome, record.samples, record.error)
            before = race.best
            race.tell(candidate, result)
            since_gain = 0 if race.best < 0.99 * before else since_gain + 1
            measured[candidate] = record
            state.done += 1
            state.elapsed = time.monotonic() - start
            if record.outcome != "ok":
                state.failures[record.outcome] += 1
                self.rejected.add(candidate)
            elif record.seconds == race.best:
                state.best, state.best_candidate = record.seconds, str(candidate)
            if candidate == race.default:
                state.default = record.seconds
            report(state)

        known = self._known(spec)
        for candidate, record in known:
            if candidate not in measured:
                learn(candidate, record)
        since_gain, state.known = 0, state.done

        with interrupts_held() as interrupts, tempfile.TemporaryDirectory(prefix="convgen-") as directory:
            self.pools.interrupts = interrupts
            expected: Expected | None = None

            def finished() -> bool:
                return (
                    interrupts.came
                    or (trials > 0 and state.done >= trials)
                    or (seconds is not None and time.monotonic() - start >= seconds)
                    or since_gain >= PATIENCE
                )

            search = race_strategy(race, spec, self.target)
            while not finished():
                race.wanted = ROUND if not trials else min(ROUND, trials - state.done)
                batch = search.generate_measure_candidates()
                if batch is None:
                    break
                for candidate, result in race.refused:
                    learn(candidate, self._record(spec, candidate, result))
                race.refused.clear()
                expected = expected or Expected(spec, Path(directory), self.threads)
                for candidate, result in self._measure(expected, batch, lambda: HOPELESS * race.best, finished):
                    learn(candidate, self._record(spec, candidate, result))
            if interrupts.came:
                return None  # and the block raises
            finals = [record for _, record in known if (record.note or {}).get("final")]
            if state.done == state.known and finals:
                return _fastest(finals)
            state.phase = "final"
            report(state)
            expected = expected or Expected(spec, Path(directory), self.threads)
            return self._final(spec, expected, measured, race.default)

    # ---- measuring ----------------------------------------------------------------------------

    def _measure(
        self, expected: Expected, batch: list[Any], hopeless: Callable[[], float], finished: Callable[[], bool]
    ) -> Iterator[tuple[Candidate, Result]]:
        """Results of a batch of measure candidates in its order, each as soon as it is known."""
        from tvm.s_tir.meta_schedule.builder import BuilderInput
        from tvm.s_tir.meta_schedule.runner import RunnerInput

        builder, runner = metaschedule_pools(self.pools, expected, self.threads, hopeless)
        target = self.target.tvm()
        built = builder.build([BuilderInput(candidate.sch.mod, target) for candidate in batch])
        for measured, made in zip(batch, built, strict=True):
            if finished():
                break
            candidate = measured_candidate(measured.sch.mod)
            if made.error_msg is not None:
                kind, _, text = str(made.error_msg).partition(": ")
                yield candidate, Result(kind, error=text)
                continue
            (future,) = runner.run([RunnerInput(made.artifact_path, target.kind.name, measured.args_info)])
            result = outcome(future.result())
            if result.outcome == INTERRUPTED.outcome:
                break
            yield candidate, result

    def _final(
        self, spec: ConvSpec, expected: Expected, measured: dict[Candidate, TuningRecord], default: Candidate
    ) -> TuningRecord | None:
        """Re-measure the leaders and the default in turn; the fastest of that comparison wins."""
        from tvm.ir import save_json

        good = sorted((r.seconds, i, c) for i, (c, r) in enumerate(measured.items()) if r.seconds is not None)
        if not good:
            return None
        finalists = [c for _, _, c in good[:FINALISTS]]
        if default not in finalists and measured.get(default) and measured[default].outcome == "ok":
            finalists.append(default)
        paths = self.pools.build([save_json(measure_module(lower(spec, self.target, c))) for c in finalists])
        kept = [(c, p) for c, p in zip(finalists, paths, strict=True) if isinstance(p, str)]
        results = self._compare(expected, kept)
        for _, path in kept:
            self.pools.discard(path)
        if self.pools.interrupts.came:
            return None
        note = {"final": True, "default_seconds": dict(results).get(default, INTERRUPTED).seconds}
        return _fastest([self._record(spec, c, result, note) for c, result in results])

    def _compare(self, expected: Expected, built: list[tuple[Candidate, str]]) -> list[tuple[Candidate, Result]]:
        """Time libraries in turn."""
        try:
            samples = self.pools.duel([path for _, path in built], expected, self.threads, ROUNDS)
        except MeasureError:  # one of them fails now and then: it shows when each runs by itself
            return [(c, self.pools.run(path, expected, self.threads, seconds=TRIAL_SECONDS)) for c, path in built]
        return [(c, Result("ok", tuple(taken))) for (c, _), taken in zip(built, samples, strict=True)]

    # ---- records ------------------------------------------------------------------------------

    def _known(self, spec: ConvSpec) -> list[tuple[Candidate, TuningRecord]]:
        """The store's trials that still mean the same, oldest first."""
        if self.records is None:
            return []
        trials = self.records.trials(
            spec=spec.descriptor, target=self.target.spelling, hardware=self.target.hardware, threads=self.threads
        )
        found = [(record_candidate(r, spec, self.target), r) for r in trials if r.versions == versions()]
        return [(candidate, record) for candidate, record in found if candidate]

    def _record(
        self, spec: ConvSpec, candidate: Candidate, result: Result, note: dict[str, Any] | None = None
    ) -> TuningRecord:
        record = TuningRecord(
            spec=spec.descriptor,
            target=self.target.spelling,
            hardware=self.target.hardware,
            threads=self.threads,
            schedule=candidate.schedule.id,
            schedule_version=candidate.schedule.version,
            picks=dict(candidate.picks),
            outcome=result.outcome,
            seconds=result.seconds,
            samples=result.samples,
            error=result.error,
            versions=versions(),
            note=note,
        )
        if self.records is not None:
            self.records.add(record)
        return record


def _fastest(records: list[TuningRecord]) -> TuningRecord | None:
    return min((r for r in records if r.seconds is not None), key=lambda r: r.seconds or 0.0, default=None)


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


def tune(
    spec: ConvSpec | str,
    target: str | Target = "cpu",
    threads: int | None = None,
    *,
    trials: int = 0,
    seconds: float | None = None,
    records: Records = None,
    progress: Callable[[Progress], None] | None = None,
    seed: int = 0,
) -> TuningRecord | None:
    """Tune one layer; see :meth:`Tuner.tune`, and :func:`convgen.build` for the arguments it shares."""
    spec = ConvSpec.parse(spec) if isinstance(spec, str) else spec
    resolved = resolve(target)
    with open_store(records) as store, Tuner(resolved, check_threads(threads, resolved), store) as tuner:
        return tuner.tune(spec, trials=trials, seconds=seconds, progress=progress, seed=seed)
