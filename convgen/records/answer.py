"""Which record answers a build.

In this order, for the spec, the target and the number of threads asked for:

1. a record of this machine and today's versions (:func:`~convgen.lowering.versions.versions`), in the user's store;
2. one of a machine of the same kind (:func:`same_kind`) and today's versions: from the store, else from
   those that ship with the package (:mod:`convgen.records.shipped`);
3. one of other versions, after it has been verified and timed in turn with the default
   (:func:`convgen.tuning.recheck.recheck`). The outcome is stored, so that the old record, still right or not, is
   not measured again.

Among several records of one kind :func:`preferred` decides: first the winner of the final comparison that was
added to the store last. Members of a comparison are measured together and added together; the order in which
comparisons are added is the store's own, whatever clocks say. A trial that had no final comparison must be clearly
faster than the default's. A record whose schedule is gone, has another version or no longer admits the picks
answers nothing.

What cannot be (:mod:`convgen.records.doubt`: dated after now, or far too slow) does not answer: it is measured
again like a record of other versions, and the outcome, added last, answers from then on; where
nothing can be measured the next record answers. Either is said.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import SpecError, UnsupportedError
from ..hardware.target import Target, resolve
from ..lowering.candidates import default_candidate, reference_candidate
from ..lowering.discover import merged_into, schedules
from ..lowering.discover import schedule as find_schedule
from ..lowering.schedule import Candidate, Picks
from ..lowering.versions import versions
from ..problem.separable import SeparableSpec
from ..problem.spec import ConvSpec
from . import shipped, strips
from .doubt import doubt
from .outcome import Result
from .record import TuningRecord, trial_key
from .store import Filters, RecordStore

#: A trial is certainly faster than the default where its time is below this share of the default's: trials scatter
#: by some percent.
CLEARLY = 0.97

#: Names in the notes of final comparisons: where one is damaged, another is left.
_COMPARED = ("final", "winner", "default_seconds")
#: Of trials that are faster than what answers, how many are checked for damage: stores may have very many of schedules
#: that are gone.
_CHECKED = 30

_FINGERPRINT = re.compile(r"(.+-[0-9a-f]{12})-(\d+)\Z")


# ---- what a record stands for -------------------------------------------------------------------


def record_candidate(record: TuningRecord, spec: ConvSpec, target: Target) -> Candidate | None:
    """The candidate that a record describes; None where today's schedules no longer have it."""
    try:
        schedule = find_schedule(record.schedule)
    except UnsupportedError:
        return None
    picks = Picks(**record.picks)
    if schedule.version != record.schedule_version or schedule.reason_against(spec.core, target, picks):
        return None
    names = schedule.space(spec.core, target).domains  # records sort theirs
    return Candidate(schedule, Picks(**{name: picks[name] for name in names}))


def candidate_record(
    spec: ConvSpec,
    target: Target,
    threads: int,
    candidate: Candidate,
    result: Result,
    note: dict[str, Any] | None = None,
) -> TuningRecord:
    """The record of a candidate that was measured here and now."""
    return TuningRecord(
        **trial_identity(spec, target, threads, candidate),
        outcome=result.outcome,
        seconds=result.seconds,
        samples=result.samples,
        error=result.error,
        note=note,
    )


def record_result(record: TuningRecord) -> Result:
    """How the trial of a record ended. Its time is the record's: one from elsewhere may have no samples."""
    return Result(record.outcome, () if record.seconds is None else (record.seconds,), record.error)


def trial_identity(spec: ConvSpec, target: Target, threads: int, candidate: Candidate) -> dict[str, Any]:
    """The fields that identify a trial with today's versions: the arguments of
    :func:`convgen.records.record.trial_key`.
    """
    return {
        "spec": spec.descriptor,
        "target": target.spelling,
        "hardware": target.hardware,
        "threads": threads,
        "schedule": candidate.schedule.id,
        "schedule_version": candidate.schedule.version,
        "picks": dict(candidate.picks),
        "versions": versions(),
    }


def choose(
    spec: ConvSpec,
    target: Target,
    record: TuningRecord | None,
    rejected: Collection[Candidate] = (),
    *,
    repacked: bool = False,
) -> tuple[Candidate, TuningRecord | None]:
    """What to build, and the record it comes from: the record's candidate, else the default, of weights that are
    ``repacked`` at each call the one for these.

    A default that a search has ``rejected`` (it crashed, or its output was wrong) is not built: the
    reference, which the others are checked against, answers instead.
    """
    candidate = record_candidate(record, spec, target) if record else None
    if candidate is not None:
        return candidate, record
    candidate = default_candidate(spec, target, repacked=repacked)
    if candidate in rejected:
        candidate = reference_candidate(spec, target)
    return candidate, None


def has_schedule(record: TuningRecord) -> bool:
    """Whether a record's schedule exists, in the same version."""
    if strips.is_height(record):
        return record.schedule_version == strips.VERSION
    try:
        return find_schedule(record.schedule).version == record.schedule_version
    except UnsupportedError:
        return False


def is_final(record: TuningRecord) -> bool:
    """Whether a record is from a final comparison, where kernels were timed in turn."""
    return bool((record.note or {}).get("final"))


def preferred(records: Iterable[TuningRecord]) -> TuningRecord | None:
    """The record to build from, of several for one problem in the order in which they were added: the winner of the
    last final comparison, else the fastest record of a final comparison, else the fastest trial; None where no
    trial was right.
    """
    right = [record for record in records if record.outcome == "ok"]
    finals = [record for record in right if is_final(record)]
    winners = [record for record in finals if (record.note or {}).get("winner")]
    if winners:
        return winners[-1]
    return min(finals or right, key=lambda record: (record.seconds or 0.0, record.id), default=None)


def same_kind(hardware: str, target: Target, threads: int) -> bool:
    """Whether records of the machine ``hardware`` hold for the target's: it is the same machine, or has the same
    processor model, stepping and instruction set, and both have a CPU for each thread.
    """
    if hardware == target.hardware:
        return True
    there, here = _FINGERPRINT.match(hardware), _FINGERPRINT.match(target.hardware)
    if there is None or here is None or there[1] != here[1]:
        return False
    return threads <= min(int(there[2]), int(here[2]))


# ---- the answer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What answers a build.

    Attributes:
        record: the record to build from; None: the default answers.
        origin: where the record is from, if it was not measured on this machine; empty otherwise.
        note: what a user should know about the record; empty otherwise.
        rejected: candidates that a re-check found not to work.
        to_measure: records to measure again before there is an answer (:func:`convgen.tuning.recheck.recheck`).
            Empty where this is the answer.
        reason: why the first of these must be, as what it is: ``of convgen 0.0.1``, ``dated 2099-01-01, after now``.
        doubted: ids of records that would answer and are not believed, and what they are.
    """

    record: TuningRecord | None
    origin: str = ""
    note: str = ""
    rejected: frozenset[Candidate] = frozenset()
    to_measure: tuple[TuningRecord, ...] = ()
    reason: str = ""
    doubted: tuple[tuple[str, str], ...] = ()


def best_record(store: RecordStore, spec: ConvSpec, target: Target, threads: int) -> TuningRecord | None:
    """The record of this machine and these versions to build from, or None."""
    known = _Known(store, spec, target, threads)
    best = known.own_best()
    known.expect_whole(best)
    return best


def find_record(
    store: RecordStore,
    spec: ConvSpec,
    target: Target,
    threads: int,
    *,
    measure: bool = True,
) -> Answer:
    """The record to build from, or the records to measure again first: see the top of this module.

    Args:
        measure: whether the caller can measure again; records of other versions don't answer otherwise.

    Raises:
        RecordError: the store cannot be read, one of its records that may answer is damaged, or a shipped database is.
    """
    target = target.on(threads)
    known = _Known(store, spec, target, threads)
    measure = measure and spec.n > 0
    answer = known.answer(measure)
    known.expect_whole(answer.record or next(iter(answer.to_measure), None))
    doubted: list[tuple[TuningRecord, str]] = []
    while answer.record is not None and (reason := doubt(answer.record, store, spec, target)):
        doubted.append((answer.record, reason))
        known.left_out.add(answer.record.id)
        answer = known.answer(measure)
    if not doubted:
        return answer
    (record, reason), *_ = doubted
    others = answer.to_measure or ((answer.record,) if answer.record else ())
    default = default_candidate(spec, target)
    contenders = (record, *others)
    if measure and any(record_candidate(each, spec, target) != default for each in contenders):
        return Answer(None, to_measure=contenders, reason=reason)
    said = f"{spec.descriptor}: record {record.id[:12]} is not believed: it is {reason}"
    said_doubts = tuple((each.id, why) for each, why in doubted)
    return replace(answer, note="; ".join(filter(None, (said, answer.note))), doubted=said_doubts)


class _Known:
    """What a store knows about one problem on machines of this kind: it is asked, record by record, and however many
    there are few are read.

    Attributes:
        left_out: ids of records that are not to answer.
    """

    def __init__(self, store: RecordStore, spec: ConvSpec, target: Target, threads: int) -> None:
        self._store, self._spec, self._target, self._threads = store, spec, target.on(threads), threads
        self._problem: Filters = {"spec": spec.descriptor, "target": target.spelling, "threads": threads}
        self._schedules = [f"{schedule.id} {schedule.version}" for schedule in schedules().values()]
        self.left_out: set[str] = set()

    def answer(self, measure: bool) -> Answer:
        """What answers if everything is believed."""
        spec, target = self._spec, self._target
        own = self.own_best()
        if own is not None and is_final(own):
            return Answer(own)
        old = self._best(self._machines, old=True, new=True)
        if own is not None and (old is None or not is_final(old)):
            return Answer(own)
        packaged, today = _packaged(spec, target, self._threads), versions()
        alike = self._best([name for name in self._machines if name != target.hardware], new=True)
        if alike is None:
            alike = self._best_of([record for record in packaged if record.versions == today])
        if own is None and alike is None and old is None:
            old = self._best_of([record for record in packaged if record.versions != today])
        if old is None or not measure:
            best = own or alike
            if best is None or best is own:
                return Answer(best)
            origin = _origin(best, packaged)
            is_elsewhere = best.hardware != target.hardware
            return Answer(best, origin, f"{spec.descriptor}: the record is {origin}" if is_elsewhere else "")
        contenders = [record for record in (old, own, alike) if record]
        default = default_candidate(spec, target)
        if all(record_candidate(record, spec, target) == default for record in contenders):
            return Answer(own)  # there is nothing to compare the default with
        return Answer(None, to_measure=tuple(contenders), reason=f"of {other_versions(old)}")

    def expect_whole(self, best: TuningRecord | None) -> None:
        """Raise where a record is damaged that might answer in place of ``best``: what is looked for in records may be
        what is damaged, and they would be passed over.
        """
        machines: Filters = {**self._problem, "hardware": self._machines}
        self._store.expect_whole(saying=_COMPARED, **machines)
        if best is None or not is_final(best):
            self._store.expect_whole(faster=best.seconds if best else None, limit=_CHECKED, **machines)

    def own_best(self) -> TuningRecord | None:
        """The preferred record of this machine and today's versions.

        A trial that had no final comparison must be :data:`CLEARLY` faster than the default's, which answers
        otherwise: tuning must not make a layer slower.
        """
        best = self._best([self._target.hardware])
        if best is None or is_final(best):
            return best
        default = default_candidate(self._spec, self._target)
        tried = self._store.trials(trial_key=self._key(default), outcome="ok")
        unproven = [r for r in tried if (best.seconds or 0.0) > CLEARLY * (r.seconds or 0.0)]
        return preferred(record for record in unproven if record.id not in self.left_out) or best

    @cached_property
    def _machines(self) -> list[str]:
        """The machines of this kind, this one among them."""
        found = {hardware for _, _, hardware, _ in self._store.problems(**self._problem)}
        return [hardware for hardware in sorted(found) if same_kind(hardware, self._target, self._threads)]

    def _best(self, machines: list[str], *, old: bool = False, new: bool = False) -> TuningRecord | None:
        """The record of some machines that :func:`preferred` would take among those that can still be built.

        Args:
            old: of other versions than today's.
            new: only those whose candidate this machine has not measured with today's versions.
        """
        asked: Filters = {**self._problem, "hardware": machines}
        for marks in (("final", "winner"), ("final",), ()):
            found = self._store.first(
                lambda record: self._can_answer(record, new),
                newest="winner" in marks,
                marked=marks,
                versions=versions(),
                other_versions=old,
                schedules=self._schedules,
                **asked,
            )
            if found is not None:
                return found
        return None

    def _best_of(self, records: list[TuningRecord]) -> TuningRecord | None:
        """The preferred one of the package's records, as :meth:`_best` with ``new``."""
        return preferred(record for record in records if self._can_answer(record, new=True))

    def _can_answer(self, record: TuningRecord, new: bool) -> bool:
        candidate = record_candidate(record, self._spec, self._target)
        if candidate is None or record.id in self.left_out:
            return False
        return not (new and self._store.has(self._key(candidate)))

    def _key(self, candidate: Candidate) -> str:
        """What the trial of a candidate on this machine is known by."""
        return trial_key(**trial_identity(self._spec, self._target, self._threads, candidate))


def _packaged(spec: ConvSpec, target: Target, threads: int) -> list[TuningRecord]:
    """The package's records for one problem on machines of this kind."""
    records: list[TuningRecord] = []
    for origin, path in shipped.databases():
        if same_kind(origin.hardware, target, threads) and origin.target == target.spelling:
            records += shipped.records_of(path, origin.records).get(spec.descriptor, [])
    return [record for record in records if record.threads == threads]


def _origin(record: TuningRecord, packaged: Sequence[TuningRecord]) -> str:
    there = _FINGERPRINT.match(record.hardware)
    cpus = f"{there[2]} CPUs" if there else record.hardware
    source = "of those that ship with convgen" if record in packaged else "from another machine"
    return f"{source}, measured {record.when[:10]} on a machine of this kind with {cpus}"


def other_versions(record: TuningRecord) -> str:
    """The versions of a record that are not today's, as text."""
    today = versions()
    names = sorted(name for name in record.versions.keys() | today if record.versions.get(name) != today.get(name))
    return ", ".join(f"{name} {record.versions.get(name, '(unknown)')}" for name in names)


def reason_against(record: TuningRecord) -> str:
    """Why a record answers no build on this machine; empty where it may."""
    if record.outcome != "ok":
        return f"its outcome is {record.outcome}"
    if now := merged_into(record.schedule):
        return f"{record.schedule} gave way to {now}, which has to be measured anew"
    if not has_schedule(record):
        return f"{record.schedule} is gone, or no longer has version {record.schedule_version}"
    try:
        spec = (SeparableSpec if strips.is_height(record) else ConvSpec).parse(record.spec)
        target = resolve(record.target)
    except (SpecError, UnsupportedError) as error:
        return str(error)
    if isinstance(spec, SeparableSpec):
        if record.hardware != target.hardware:
            return f"it is of another machine than this, {target.hardware}"
        return "" if record.versions == versions() else f"it is of {other_versions(record)}"
    if not same_kind(record.hardware, target, record.threads):
        return f"it is of another kind of machine than this, {target.hardware}"
    if record_candidate(record, spec, target) is None:
        return f"{record.schedule} no longer admits its picks"
    if record.versions != versions():
        return f"it is of {other_versions(record)}: a build would measure it again first"
    return ""
