"""The search of one layer, in rounds: draw candidates, compile, measure, commit each trial, compare the best.

A :class:`Search` knows what the store has of its layer, and commits to it every trial the moment it ends.
:class:`~convgen.tuning.race.Race` decides what to try next. A candidate that is already in the store is never
measured again, and one that another job is measuring is left to that job. At the end the leaders, the
default and ONNX Runtime are timed in turn, and those figures decide.

:func:`take_rounds` keeps the workers busy with the rounds of any number of searches.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..errors import MeasureError
from ..lowering.schedule import Candidate
from ..lowering.versions import versions
from ..measure.compare import ratio_interval
from ..measure.standalone.timing import HOPELESS, TRIAL_SECONDS
from ..measure.trial import Expected, candidate_module, measured_candidate
from ..measure.workers import Pools
from ..problem.spec import ConvSpec
from ..records.answer import candidate_record, is_final, record_candidate, trial_identity
from ..records.outcome import INTERRUPTED, Result
from ..records.record import TuningRecord, trial_key
from .race import ROUND, Race, race_strategy

if TYPE_CHECKING:
    from .tuner import Tuner

#: Trials without a gain of 1 % in all after which a layer is done.
PATIENCE, GAIN = 48, 0.99
#: How many leaders are compared with the default at the end, and how many turns each gets.
FINALISTS, ROUNDS = 3, 9
#: Seconds between two looks at what another job is measuring.
LOOK_SECONDS = 0.2


@dataclass
class Progress:
    """Where the tuning of one layer stands; handed to the progress callback after each trial.

    ``best``, ``default`` and ``onnxruntime`` are seconds; ``failures`` counts trials by outcome.
    ``known`` of the ``done`` trials were in the store before. ``elapsed``: seconds spent on the layer.
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
    onnxruntime: float | None = None


class Search:
    """The search of one layer: a race, and what is known of the layer already.

    Args:
        tuner: target, threads, store and workers.
        trials, seconds: what the progress is reported against; ``trials`` is a limit as well, those
            in the store included (0: none).
        progress: called after every trial.
        patience: trials without a gain of 1 % after which the search is over.
        seed: of the race.
        exclude: ids of schedules that do not take part.

    Attributes:
        state: where the layer stands.
        rejected: candidates that failed.
        made: trials made here.
        job_trials, job_cost: trials made and seconds spent by the journal's job, in earlier runs and by
            other processes as well.
        gain: fraction of the best time that a trial is expected to save.
        best: the fastest trial's record; ``winner`` that of the last final comparison.
    """

    #: The gain expected of a trial before anything is known, and the weight of each new trial.
    PRIOR, WEIGHT = 0.02, 0.125

    def __init__(
        self,
        tuner: Tuner,
        spec: ConvSpec,
        *,
        trials: int = 0,
        seconds: float | None = None,
        progress: Callable[[Progress], None] | None = None,
        patience: int | None = None,
        seed: int = 0,
        exclude: Collection[str] = (),
    ) -> None:
        self.tuner, self.spec, self.journal = tuner, spec, tuner.journal
        self.race = Race(spec, tuner.target, tuner.threads, seed, ranker=tuner.ranker, exclude=exclude)
        self.patience = PATIENCE if patience is None else patience
        self.exclude = frozenset(exclude)
        self.state = Progress(spec, trials, seconds)
        self.report = progress or (lambda _: None)
        self.rejected: set[Candidate] = set()
        self.best: TuningRecord | None = None
        self.winner: TuningRecord | None = None
        self.gain = self.PRIOR
        self.made, self.job_trials, self.job_cost = 0, 0, 0.0
        self.since_gain, self._gained = 0, float("inf")
        self.exhausted = False
        #: Candidates that had a final comparison.
        self.compared: set[Candidate] = set()
        #: Seconds of every candidate that was tried; None where it failed.
        self.tried: dict[Candidate, float | None] = {}
        self._elsewhere: list[Candidate] = []  # drawn, but being measured by another job
        self._only: Candidate | None = None
        self._claimed: dict[Candidate, str] = {}
        self._artifacts: dict[Candidate, str] = {}  # libraries of the leaders
        self._ids: set[str] = set()  # records that were learnt
        self._foreign = -1
        # What MetaSchedule's strategy asks of a race.
        self.wanted = 0
        self.refused: list[tuple[Candidate, Result]] = []
        self._strategy = race_strategy(cast(Race, self), spec, tuner.target)
        self.refresh()
        self.state.known = self.state.done

    # ---- where it stands ----------------------------------------------------------------------

    @property
    def over(self) -> str:
        """Why there is nothing more to try: ``trials``, ``converged`` or ``exhausted``; else empty."""
        if self.state.trials and self.state.done >= self.state.trials:
            return "trials"
        if self.since_gain >= self.patience:
            return "converged"
        return "exhausted" if self.exhausted and not self._claimed else ""

    @property
    def in_flight(self) -> int:
        """Trials that are begun."""
        return len(self._claimed)

    @property
    def started(self) -> bool:
        """Whether anything was tried, or is being tried."""
        return bool(self.tried or self._claimed)

    @property
    def blocked(self) -> bool:
        """Whether all that is left to try is being measured by other jobs."""
        return self.exhausted is False and bool(self._elsewhere) and not self._claimed

    def refresh(self) -> None:
        """Learn what the store has of this layer, and this search has not seen."""
        store, foreign = self.journal.store, self.journal.foreign()
        if store is None or foreign == self._foreign:
            return
        self._foreign = foreign
        finals = []
        for record in store.trials(
            spec=self.spec.descriptor,
            target=self.tuner.target.spelling,
            hardware=self.tuner.target.hardware,
            threads=self.tuner.threads,
        ):
            if record.id[:16] in self._ids:
                continue
            self._ids.add(record.id[:16])
            self._tally(record)
            if record.versions != versions() or record.schedule in self.exclude:
                continue
            candidate = record_candidate(record, self.spec, self.tuner.target)
            if candidate is None:
                continue
            if is_final(record):
                finals.append((candidate, record))
            else:
                self._learn(candidate, record)
        for candidate, record in finals:
            self._learn(candidate, record)  # one that travelled without its trial
            self.compared.add(candidate)
            if (record.note or {}).get("winner"):
                self._win(record)

    def _tally(self, record: TuningRecord) -> None:
        note = record.note or {}
        if self.journal.job and note.get("job") == self.journal.job:
            self.job_trials += not is_final(record)
            self.job_cost += _number(note.get("cost")) or 0.0

    def _learn(self, candidate: Candidate, record: TuningRecord) -> None:
        """Tell the race how a candidate did."""
        if candidate in self.tried:
            return
        state, before = self.state, self.race.best
        self.tried[candidate] = record.seconds
        self.race.tell(candidate, Result(record.outcome, record.samples, record.error))
        state.done += 1
        if record.seconds is None:
            state.failures[record.outcome] += 1
            self.rejected.add(candidate)
        elif self.best is None or record.seconds < (self.best.seconds or 0.0):
            self.best = record
            state.best, state.best_candidate = record.seconds, str(candidate)
        if candidate == self.race.default:
            state.default = record.seconds
        best = self.race.best
        saved = 1.0 - best / before if before < float("inf") else 0.0
        self.gain += self.WEIGHT * (saved - self.gain)
        if best < GAIN * self._gained:
            self.since_gain, self._gained = 0, best
        else:
            self.since_gain += 1

    def _win(self, record: TuningRecord) -> None:
        note, state = record.note or {}, self.state
        self.winner = record
        state.best, state.default = record.seconds, _number(note.get("default_seconds"))
        state.best_candidate = f"{record.schedule}({' '.join(f'{k}={v}' for k, v in record.picks.items())})"
        state.onnxruntime = _number(note.get("onnxruntime_seconds"))

    # ---- a round ------------------------------------------------------------------------------

    def ask(self, count: int) -> list[Candidate]:
        """Candidates to lower, each claimed: the race's, without those that others are measuring."""
        chosen: list[Candidate] = []
        for candidate in [self._only] if self._only else list(self._elsewhere):
            if candidate in self.tried or (len(chosen) < count and self._take(candidate)):
                chosen.append(candidate)
        self._elsewhere = [c for c in self._elsewhere if c not in chosen]
        chosen = [c for c in chosen if c not in self.tried]
        while len(chosen) < count and not self._only:
            drawn = self.race.ask(count - len(chosen))
            self.exhausted = not drawn and not self._elsewhere
            if not drawn:
                break
            for candidate in drawn:
                if self._take(candidate):
                    chosen.append(candidate)
                elif candidate not in self.tried:
                    self._elsewhere.append(candidate)
        return chosen

    def _take(self, candidate: Candidate) -> bool:
        """Claim a candidate; False where another job is measuring it, or has done so."""
        key = self._key(candidate)
        if not self.journal.claim(key):
            return False
        if self.journal.has(key):  # since this search looked
            self.journal.release(key)
            self.refresh()
            return False
        self._claimed[candidate] = key
        return True

    def _drop(self, candidate: Candidate) -> None:
        if key := self._claimed.pop(candidate, None):
            self.journal.release(key)

    def prepare(self, count: int) -> Round:
        """Draw up to ``count`` candidates and begin to compile them."""
        self.refresh()
        if self.state.trials and not self._only:
            count = min(count, self.state.trials - self.state.done - len(self._claimed))
        round_ = Round(self)
        if count <= 0 or (self.over and not self._only):
            return round_
        before = set(self._claimed)
        self.wanted = count
        drawn = _lowered(self._strategy)
        for candidate, result in self.refused:
            self._commit(candidate, result)
        self.refused.clear()
        for candidate in self._claimed.keys() - before - {candidate for candidate, _ in drawn}:
            self._drop(candidate)  # could not be lowered after all
        for candidate, module in drawn:
            round_.building[candidate] = self.tuner.pools.builder.submit(module)
        return round_

    def _commit(self, candidate: Candidate, result: Result) -> None:
        """A trial has ended."""
        record = self._record(candidate, result, {"cost": self._charge(), **_measured_note(result)})
        self._keep(record)
        self.made += 1
        self._drop(candidate)
        self._learn(candidate, record)
        self.report(self.state)

    def _keep(self, *records: TuningRecord) -> None:
        self.journal.add(*records)
        for record in records:
            self._ids.add(record.id[:16])
            self._tally(record)

    def _charge(self) -> float:
        cost = self.journal.charge()
        self.state.elapsed += cost
        return cost

    def _key(self, candidate: Candidate) -> str:
        return trial_key(**trial_identity(self.spec, self.tuner.target, self.tuner.threads, candidate))

    def _record(self, candidate: Candidate, result: Result, note: dict[str, Any]) -> TuningRecord:
        job = {"job": self.journal.job} if self.journal.job else {}
        return candidate_record(
            self.spec, self.tuner.target, self.tuner.threads, candidate, result, note={**job, **note}
        )

    def _artifact(self, candidate: Candidate, path: str) -> None:
        """A library that was measured: those of the leaders are kept for the final comparison."""
        self._artifacts[candidate] = path
        leaders = self._leaders()
        for other in [c for c in self._artifacts if c not in leaders]:
            self.tuner.pools.discard(self._artifacts.pop(other))

    def close(self) -> None:
        """Remove what is left of the search but its records."""
        for candidate in list(self._claimed):
            self._drop(candidate)
        for path in self._artifacts.values():
            self.tuner.pools.discard(path)
        self._artifacts.clear()

    # ---- the final comparison -----------------------------------------------------------------

    def _leaders(self) -> list[Candidate]:
        """The fastest candidates, and last the default unless it failed."""
        good = sorted((s, i, c) for i, (c, s) in enumerate(self.tried.items()) if s is not None)
        default = self.race.default
        leaders = [c for _, _, c in good if c != default][:FINALISTS]
        return leaders if self.tried.get(default, 0.0) is None else [*leaders, default]

    @property
    def answered(self) -> bool:
        """Whether a final comparison has had all that would be compared now."""
        return self.winner is not None and self.compared.issuperset(self._leaders())

    def final(self) -> TuningRecord | None:
        """Time the leaders, the default and ONNX Runtime in turn, and keep the figures.

        A tuned candidate wins where the interval of its ratio to the default lies above 1, else the
        default does. Nothing is measured where an earlier comparison had the same candidates.

        Returns:
            The winner's record; None where no candidate is right, or Ctrl-C came.
        """
        self.refresh()
        if self.answered:
            return self.winner
        if all(seconds is None for seconds in self.tried.values()):
            return None
        self.state.phase = "final"
        self.report(self.state)
        self._try_default()
        pools = self.tuner.pools
        built = self._build(self._leaders())
        if not built or pools.interrupts.came:
            return None
        expected = self.tuner.expected(self.spec)
        results, peer = self._compare(expected, built)
        if pools.interrupts.came:
            return None
        records = self._finals(results, peer)
        self._keep(*records)
        self.compared.update(candidate for candidate, _ in results)
        if records and (records[-1].note or {}).get("winner"):
            self._win(records[-1])
        self.state.phase = "done"
        self.report(self.state)
        return self.winner

    def _try_default(self) -> None:
        """Measure the default if that was not yet done: here, or elsewhere meanwhile."""
        pools, self._only = self.tuner.pools, self.race.default
        while self._only not in self.tried and not pools.interrupts.came:
            round_ = self.prepare(1)
            if round_.building:
                round_.measure(lambda: pools.interrupts.came)
            elif self._only not in self.tried:
                time.sleep(LOOK_SECONDS)
        self._only = None

    def _build(self, candidates: Sequence[Candidate]) -> list[tuple[Candidate, str]]:
        missing = [c for c in candidates if c not in self._artifacts]
        if missing:
            modules = [candidate_module(self.spec, self.tuner.target, c) for c in missing]
            for candidate, path in zip(missing, self.tuner.pools.build(modules), strict=True):
                if isinstance(path, str):
                    self._artifacts[candidate] = path
        return [(c, self._artifacts[c]) for c in candidates if c in self._artifacts]

    def _compare(
        self, expected: Expected, built: list[tuple[Candidate, str]]
    ) -> tuple[list[tuple[Candidate, Result]], list[float] | None]:
        """Time libraries in turn; ONNX Runtime's samples as well where it can take part."""
        pools, threads = self.tuner.pools, self.tuner.threads
        try:
            samples, peer = pools.compare([path for _, path in built], expected, threads, ROUNDS)
        except MeasureError:  # one of them fails now and then: it shows when each runs by itself
            return [(c, pools.run(path, expected, threads, seconds=TRIAL_SECONDS)) for c, path in built], None
        return [(c, Result("ok", tuple(taken))) for (c, _), taken in zip(built, samples, strict=True)], peer

    def _finals(self, results: list[tuple[Candidate, Result]], peer: list[float] | None) -> list[TuningRecord]:
        """The records of a comparison, the winner's last."""
        times = [result.samples if result.outcome == "ok" else None for _, result in results]
        default = next((i for i, (c, _) in enumerate(results) if c == self.race.default and times[i]), None)
        winner, notes = judge(times, default, peer)
        cost = self._charge() / max(len(results), 1)
        records = []
        for i in sorted(range(len(results)), key=lambda i: i == winner):
            candidate, result = results[i]
            records.append(self._record(candidate, result, {**notes[i], "cost": cost, **_measured_note(result)}))
        return records


def judge(
    times: Sequence[Sequence[float] | None], default: int | None, peer: Sequence[float] | None = None
) -> tuple[int | None, list[dict[str, Any]]]:
    """Which of several kernels wins: the fastest that is certainly faster than the default, else the default.

    Args:
        times: samples of each in seconds, taken in turn; None where it failed.
        default: which is the default; None: it is not among them, or failed. The fastest wins then.
        peer: samples of ONNX Runtime, taken in turn with them.

    Returns:
        The winner's index, None where all failed; and what the record of each says (see
        :attr:`~convgen.records.record.TuningRecord.note`). Ratios are the other's time over the kernel's.
    """
    base = times[default] if default is not None else None
    against = [ratio(base, taken) if base and taken else None for taken in times]
    ranked = sorted((statistics.median(taken), i) for i, taken in enumerate(times) if taken)
    winner = next((i for _, i in ranked if i == default or (r := against[i]) is None or r[1] > 1.0), None)
    notes = [
        {
            "final": True,
            "default_seconds": statistics.median(base) if base else None,
            "onnxruntime_seconds": statistics.median(peer) if peer else None,
            "ratio_default": against[i],
            "ratio_onnxruntime": ratio(peer, taken) if peer and taken else None,
            "winner": i == winner,
        }
        for i, taken in enumerate(times)
    ]
    return winner, notes


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratio of two medians and its 95 % bootstrap interval: ``[median, low, high]``."""
    count = min(len(above), len(below))
    above, below = above[:count], below[:count]
    return [statistics.median(above) / statistics.median(below), *ratio_interval(above, below)]


def _measured_note(result: Result) -> dict[str, Any]:
    """What the runner says besides the times: the machine's drift, the device."""
    said = {name: getattr(result, name, None) for name in ("drift", "device")}
    return {name: value for name, value in said.items() if value}


def _number(value: object) -> float | None:
    """A number of a note, which may hold anything."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _lowered(strategy: Any) -> list[tuple[Candidate, str]]:
    """What MetaSchedule's strategy wants measured next: candidates and their serialised modules."""
    from tvm.ir import save_json

    modules = [measured.sch.mod for measured in strategy.generate_measure_candidates() or ()]
    return [(measured_candidate(module), save_json(module)) for module in modules]


# ---- rounds -----------------------------------------------------------------------------------------


class Round:
    """Candidates of a search that are being compiled, and then measured."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.building: dict[Candidate, Future[str | Result]] = {}

    def measure(self, stop: Callable[[], bool], meanwhile: Callable[[], None] | None = None) -> None:
        """Verify and time what was compiled, and commit each trial as it ends.

        Args:
            stop: whether to end after the trials that are running.
            meanwhile: called once, when the devices are busy.
        """
        search, pools = self.search, self.search.tuner.pools
        runner, threads = pools.runner, self.search.tuner.threads

        def came() -> bool:
            return pools.interrupts.came

        expected = search.tuner.expected(search.spec)
        running: dict[Future[Result], tuple[Candidate, str]] = {}
        # Compiling disturbs what is timed on this machine, and two at a time keep another one busy.
        if not runner.isolated:
            _wait(self.building.values(), came)
        places = runner.devices + (runner.devices if runner.isolated else 0)
        try:
            while (self.building or running) and not came():
                stopped = stop() or bool(search.over)
                if stopped and not running:
                    break
                for candidate in [c for c, made in self.building.items() if made.done()]:
                    if stopped or len(running) >= places:
                        break
                    path = self.building.pop(candidate).result()
                    if isinstance(path, Result):
                        if path.outcome != INTERRUPTED.outcome:
                            search._commit(candidate, path)
                            stopped = stop() or bool(search.over)
                        continue
                    job = runner.submit(
                        path, expected, threads, seconds=TRIAL_SECONDS, hopeless=HOPELESS * _finite(search.race.best)
                    )
                    running[job] = candidate, path
                if meanwhile and (running or not self.building):
                    meanwhile()
                    meanwhile = None
                waited: list[Future[Any]] = [*running]
                if not stopped and len(running) < places:
                    waited += self.building.values()
                if waited:
                    wait(waited, timeout=0.1, return_when=FIRST_COMPLETED)
                for job in [job for job in running if job.done()]:
                    candidate, path = running.pop(job)
                    result = job.result()
                    if result.outcome == INTERRUPTED.outcome:
                        pools.discard(path)
                        search._drop(candidate)
                    else:
                        search._commit(candidate, result)
                        search._artifact(candidate, path)
        finally:
            for job, (candidate, path) in running.items():
                search._drop(candidate)
                job.add_done_callback(partial(_discard, pools, path))
            self.abandon()

    def abandon(self) -> None:
        """Leave what was not yet measured to others."""
        for candidate, made in self.building.items():
            self.search._drop(candidate)
            made.add_done_callback(partial(_discard_built, self.search.tuner.pools))
        self.building.clear()


def _discard(pools: Pools, path: str, _: Future[Any]) -> None:
    pools.discard(path)


def _discard_built(pools: Pools, made: Future[str | Result]) -> None:
    if isinstance(path := made.result(), str):
        pools.discard(path)


def _finite(seconds: float) -> float:
    """The best time as a limit: 0, which means none, before there is one."""
    return seconds if seconds < float("inf") else 0.0


def _wait(futures: Collection[Future[Any]], came: Callable[[], bool]) -> None:
    """Until all are done, or Ctrl-C came."""
    while wait(list(futures), timeout=0.1).not_done and not came():
        pass


def round_size(pools: Pools) -> int:
    """Candidates per round: enough for every device."""
    return max(ROUND, 2 * pools.runner.devices)


def take_rounds(pools: Pools, choose: Callable[[], tuple[Search, int] | None], stop: Callable[[], bool]) -> None:
    """Measure round after round until it is time to ``stop``, or there is nothing left to choose.

    Where the devices are other machines, the next round is compiled while one is measured.

    Args:
        choose: the search whose turn it is, and how many candidates at most.
    """

    def begin(wait_for_others: bool) -> Round | None:
        while not stop() and (chosen := choose()):
            search, count = chosen
            round_ = search.prepare(count)
            if round_.building:
                return round_
            if search.in_flight or (search.blocked and not wait_for_others):
                return None
            if search.blocked:
                time.sleep(LOOK_SECONDS)
        return None

    ahead: list[Round] = []

    def meanwhile() -> None:
        ahead.extend(filter(None, [begin(wait_for_others=False)]))

    try:
        while round_ := ahead.pop() if ahead else begin(wait_for_others=True):
            round_.measure(stop, meanwhile if pools.runner.isolated else None)
    finally:
        for left in ahead:
            left.abandon()
