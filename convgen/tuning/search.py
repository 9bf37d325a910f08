"""The search of one layer: what is known of it, what to try next, and each trial kept the moment it ends.

:class:`~convgen.tuning.race.Race` decides what to try next. A candidate that is already in the store is never
measured again, and one that another job is measuring is left to that job. Candidates are compiled and measured in
rounds (:mod:`convgen.tuning.rounds`); at the end the best are compared (:mod:`convgen.tuning.final`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..lowering.schedule import Candidate
from ..lowering.versions import versions
from ..problem.spec import ConvSpec
from ..records.answer import candidate_record, is_final, record_candidate, record_result, trial_identity
from ..records.doubt import doubt
from ..records.outcome import Result
from ..records.record import TuningRecord, trial_key
from .context import SearchContext
from .race import Race

#: Trials without a gain of 1 % in all after which a layer is done.
PATIENCE, GAIN = 48, 0.99
#: How many leaders are compared with the default at the end, and how many of them are then judged in their network
#: beside it: the winner and one that beat the default as well.
FINALISTS, CONTENDERS = 3, 2


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
        context: target, threads, journal and workers.
        trials, seconds: what the progress is reported against; ``trials`` is a limit as well, those
            in the store included (0: none).
        progress: called after every trial.
        patience: trials without a gain of 1 % after which the search is over.
        seed: of the race.
        exclude: ids of schedules that do not take part; the default does, be it of one of them.

    Attributes:
        state: where the layer stands.
        tried: seconds of every candidate that was tried; None where it failed.
        rejected: candidates that failed.
        failure: how the first of them did: its outcome, and the error.
        made: trials made here.
        job_trials, job_cost: trials made and seconds spent by the journal's job, in earlier runs and by
            other processes as well.
        gain: fraction of the best time that a trial is expected to save.
        best: the fastest trial's record; ``winner`` that of the last final comparison.
        finals: each candidate's last record of a final comparison.
        libraries: those of the leaders, kept for the final comparison.
    """

    #: The gain expected of a trial before anything is known, and the weight of each new trial.
    PRIOR, WEIGHT = 0.02, 0.125

    def __init__(
        self,
        context: SearchContext,
        spec: ConvSpec,
        *,
        trials: int = 0,
        seconds: float | None = None,
        progress: Callable[[Progress], None] | None = None,
        patience: int | None = None,
        seed: int = 0,
        exclude: Collection[str] = (),
    ) -> None:
        self.context, self.spec, self.journal = context, spec, context.journal
        self.race = Race(spec, context.target, context.threads, seed, ranker=context.ranker, exclude=exclude)
        self.patience = PATIENCE if patience is None else patience
        self.exclude = frozenset(exclude)
        self.state = Progress(spec, trials, seconds)
        self.report = progress or (lambda _: None)
        self.rejected: set[Candidate] = set()
        self.failure = ""
        self.best: TuningRecord | None = None
        self.winner: TuningRecord | None = None
        self.gain = self.PRIOR
        self.made, self.job_trials, self.job_cost = 0, 0, 0.0
        self.since_gain, self._gained = 0, float("inf")
        self.exhausted = False
        self.finals: dict[Candidate, TuningRecord] = {}
        self.tried: dict[Candidate, float | None] = {}
        self.libraries: dict[Candidate, str] = {}
        self._elsewhere: list[Candidate] = []  # drawn, but being measured by another job
        self._claimed: dict[Candidate, str] = {}
        self._ids: set[str] = set()  # records that were learnt
        self._foreign = -1
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
    def all_failed(self) -> bool:
        """Whether something was tried, and nothing was right."""
        return bool(self.tried) and all(seconds is None for seconds in self.tried.values())

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

    def leaders(self) -> list[Candidate]:
        """The fastest candidates, and last the default unless it failed."""
        good = sorted((s, i, c) for i, (c, s) in enumerate(self.tried.items()) if s is not None)
        default = self.race.default
        leaders = [c for _, _, c in good if c != default][:FINALISTS]
        return leaders if self.tried.get(default, 0.0) is None else [*leaders, default]

    @property
    def answered(self) -> bool:
        """Whether a final comparison has had all that would be compared now."""
        return self.winner is not None and self.finals.keys() >= set(self.leaders())

    @property
    def contenders(self) -> list[Candidate]:
        """What is to be judged in a network: of the last comparison the winner, and what was certainly faster than the
        default beside it; nothing where the default won, or where that was done.
        """
        winner, default = self.winner, self.race.default
        if winner is None or "network" in (winner.note or {}) or default not in self.finals:
            return []
        best = record_candidate(winner, self.spec, self.context.target)
        if best is None or best == default:
            return []
        others = [
            (record.seconds or math.inf, candidate)
            for candidate, record in self.finals.items()
            if candidate not in (best, default)
            and (against := (record.note or {}).get("ratio_default"))
            and against[1] > 1
        ]
        return [best, *(candidate for _, candidate in sorted(others, key=lambda entry: entry[0]))][:CONTENDERS]

    # ---- what records say ---------------------------------------------------------------------

    def refresh(self) -> None:
        """Learn what the store has of this layer, and this search has not seen."""
        store, foreign = self.journal.store, self.journal.foreign()
        if store is None or foreign == self._foreign:
            return
        self._foreign = foreign
        target = self.context.target
        finals = []
        for record in store.trials(
            spec=self.spec.descriptor,
            target=target.spelling,
            hardware=target.hardware,
            threads=self.context.threads,
            skip=lambda id_: id_[:16] in self._ids,
        ):
            self._ids.add(record.id[:16])
            self._tally(record)
            candidate = record_candidate(record, self.spec, target) if record.versions == versions() else None
            if candidate is None or not self._takes_part(candidate, record):
                continue
            if is_final(record):
                finals.append((candidate, record))
            else:
                self._learn(candidate, record)
        for candidate, record in finals:
            self._learn(candidate, record)  # one that travelled without its trial
            self.finals[candidate] = record
            if not (record.note or {}).get("winner") or self._is_left_out(record):
                continue
            if doubt(record, store, self.spec, target):
                self.winner = None  # all are compared again
            else:
                self.win(record)

    def _takes_part(self, candidate: Candidate, record: TuningRecord) -> bool:
        """Whether what a record says counts here. Of the schedules that are left out the default does, and what won:
        builds take these, and so what wins here must be faster.
        """
        is_winner = is_final(record) and bool((record.note or {}).get("winner"))
        return record.schedule not in self.exclude or candidate == self.race.default or is_winner

    def _is_left_out(self, record: TuningRecord) -> bool:
        """Whether a winner is no answer of this search: its schedule is left out, and others have found it."""
        return record.schedule in self.exclude and (record.note or {}).get("job") != (self.journal.job or None)

    def _tally(self, record: TuningRecord) -> None:
        """Count a record of this job's."""
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
        self.race.tell(candidate, record_result(record))
        state.done += 1
        if record.seconds is None:
            state.failures[record.outcome] += 1
            self.rejected.add(candidate)
            self.failure = self.failure or f"{record.outcome}: {record.error or 'no more is known'}"
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

    def win(self, record: TuningRecord) -> None:
        """Take the record of a final comparison's winner for the answer."""
        note, state = record.note or {}, self.state
        self.winner = record
        state.best, state.default = record.seconds, _number(note.get("default_seconds"))
        state.best_candidate = f"{record.schedule}({' '.join(f'{k}={v}' for k, v in record.picks.items())})"
        state.onnxruntime = _number(note.get("onnxruntime_seconds"))

    # ---- what to try next -----------------------------------------------------------------------

    def draw(self, count: int) -> list[Candidate]:
        """Up to ``count`` candidates to try, each claimed: the race's, but for those that others are measuring."""
        self.refresh()
        if self.state.trials:
            count = min(count, self.state.trials - self.state.done - len(self._claimed))
        if count <= 0 or self.over:
            return []
        chosen, elsewhere = list[Candidate](), list[Candidate]()
        for candidate in self._elsewhere:
            if candidate in self.tried:
                continue
            if len(chosen) < count and self._claim(candidate):  # the other job has ended without a result
                chosen.append(candidate)
            else:
                elsewhere.append(candidate)
        self._elsewhere = elsewhere
        while len(chosen) < count:
            drawn = self.race.ask(count - len(chosen))
            self.exhausted = not drawn and not self._elsewhere
            if not drawn:
                break
            for candidate in drawn:
                if self._claim(candidate):
                    chosen.append(candidate)
                elif candidate not in self.tried:
                    self._elsewhere.append(candidate)
        return chosen

    def draw_default(self) -> list[Candidate]:
        """The default, claimed, whatever the budget; nothing where it was tried, or another job measures it."""
        self.refresh()
        default = self.race.default
        if default in self.tried or not self._claim(default):
            return []
        self._elsewhere = [candidate for candidate in self._elsewhere if candidate != default]
        return [default]

    def _claim(self, candidate: Candidate) -> bool:
        """Claim a candidate; False where another job is measuring it, or has done so."""
        key = self.key(candidate)
        if not self.journal.claim(key):
            return False
        if self.journal.has(key):  # since this search looked
            self.journal.release(key)
            self.refresh()
            return False
        self._claimed[candidate] = key
        return True

    def drop(self, candidate: Candidate) -> None:
        """Leave a candidate to others."""
        if key := self._claimed.pop(candidate, None):
            self.journal.release(key)

    def key(self, candidate: Candidate) -> str:
        """What the trial of a candidate is known by in the store."""
        return trial_key(**trial_identity(self.spec, self.context.target, self.context.threads, candidate))

    # ---- what was tried -------------------------------------------------------------------------

    def commit(self, candidate: Candidate, result: Result) -> None:
        """Keep a trial that has ended, and learn from it."""
        record = self.record(candidate, result, {"cost": self.charge()})
        self.keep(record)
        self.made += 1
        self.drop(candidate)
        self._learn(candidate, record)
        self.report(self.state)

    def keep(self, *records: TuningRecord) -> None:
        """Add records of this layer to the journal."""
        self.journal.add(*records)
        for record in records:
            self._ids.add(record.id[:16])
            self._tally(record)

    def conclude(self, records: Mapping[Candidate, TuningRecord]) -> None:
        """Keep the records of a final comparison; its winner's answers."""
        self.keep(*records.values())
        self.finals |= records
        for record in records.values():
            if (record.note or {}).get("winner"):
                self.win(record)

    def charge(self) -> float:
        """Seconds since the last trial ended, which are this layer's."""
        cost = self.journal.charge()
        self.state.elapsed += cost
        return cost

    def record(self, candidate: Candidate, result: Result, note: dict[str, Any]) -> TuningRecord:
        """A result as a record; its note has the job, what that leaves out, and what the runner says beside times."""
        job: dict[str, Any] = {"job": self.journal.job} if self.journal.job else {}
        if self.exclude:
            job["exclude"] = sorted(self.exclude)
        said = {"drift": result.drift, "device": result.device or None, "busy": result.busy}
        measured = {name: value for name, value in said.items() if value is not None}
        return candidate_record(
            self.spec, self.context.target, self.context.threads, candidate, result, note={**job, **note, **measured}
        )

    def keep_library(self, candidate: Candidate, path: str) -> None:
        """Keep a library that was measured for the final comparison, if it leads; discard those that lead no more."""
        self.libraries[candidate] = path
        leaders = self.leaders()
        for other in [c for c in self.libraries if c not in leaders]:
            self.context.pools.discard(self.libraries.pop(other))

    def close(self) -> None:
        """Remove what is left of the search but its records."""
        for candidate in list(self._claimed):
            self.drop(candidate)
        for path in self.libraries.values():
            self.context.pools.discard(path)
        self.libraries.clear()


def _number(value: object) -> float | None:
    """A number of a note, which may hold anything."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
