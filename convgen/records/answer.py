"""Which record answers a build.

In this order, for the spec, the target and the number of threads asked for:

1. a record of this machine and today's versions (:func:`~convgen.lowering.versions.versions`), in the user's store;
2. one of a machine of the same kind (:func:`same_kind`) and today's versions: from the store, else from
   those that ship with the package (:mod:`convgen.records.shipped`);
3. one of other versions, after it has been verified and timed in turn with the default
   (:func:`convgen.tuning.recheck.recheck`). The outcome is stored, so that the old record, still right or not, is
   not measured again.

Among several records of one kind :func:`preferred` decides; a trial that had no final comparison must be clearly
faster than the default's. A record whose schedule is gone, has another version or no longer admits the picks
answers nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import SpecError, UnsupportedError
from ..hardware.target import Target, resolve
from ..lowering.candidates import default_candidate, reference_candidate
from ..lowering.discover import schedule as find_schedule
from ..lowering.schedule import Candidate, Picks
from ..lowering.versions import versions
from ..problem.spec import ConvSpec
from . import shipped
from .outcome import Result
from .record import TuningRecord
from .store import RecordStore

#: A trial is certainly faster than the default where its time is below this share of the default's: trials scatter
#: by some percent.
CLEARLY = 0.97

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
    spec: ConvSpec, target: Target, record: TuningRecord | None, rejected: Collection[Candidate] = ()
) -> tuple[Candidate, TuningRecord | None]:
    """What to build, and the record it comes from: the record's candidate, else the default.

    A default that a search has ``rejected`` (it crashed, or its output was wrong) is not built: the
    reference, which the others are checked against, answers instead.
    """
    candidate = record_candidate(record, spec, target) if record else None
    if candidate is not None:
        return candidate, record
    candidate = default_candidate(spec, target)
    if candidate in rejected:
        candidate = reference_candidate(spec, target)
    return candidate, None


def has_schedule(record: TuningRecord) -> bool:
    """Whether a record's schedule exists, in the same version."""
    try:
        return find_schedule(record.schedule).version == record.schedule_version
    except UnsupportedError:
        return False


def is_final(record: TuningRecord) -> bool:
    """Whether a record is from a final comparison, where kernels were timed in turn."""
    return bool((record.note or {}).get("final"))


def preferred(records: Iterable[TuningRecord]) -> TuningRecord | None:
    """The record to build from, of several for one problem: the winner of the newest final comparison, else the
    fastest record of a final comparison, else the fastest trial; None where no trial was right.
    """
    right = [record for record in records if record.outcome == "ok"]
    finals = [record for record in right if is_final(record)]
    winners = [record for record in finals if (record.note or {}).get("winner")]
    if winners:
        return max(winners, key=lambda record: (record.when, record.id))
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
        outdated: records to measure again before there is an answer (:func:`convgen.tuning.recheck.recheck`);
            the first has other versions. Empty where this is the answer.
    """

    record: TuningRecord | None
    origin: str = ""
    note: str = ""
    rejected: frozenset[Candidate] = frozenset()
    outdated: tuple[TuningRecord, ...] = ()


def best_record(store: RecordStore, spec: ConvSpec, target: Target, threads: int) -> TuningRecord | None:
    """The record of this machine and these versions to build from, or None."""
    return _Known(store, spec, target, threads).own_best()


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
        RecordError: the store cannot be read, or a shipped database is damaged.
    """
    known, today = _Known(store, spec, target, threads), versions()
    own, old = known.own_best(), known.best(known.outdated, new=True)
    if own is not None and (is_final(own) or old is None or not is_final(old)):
        return Answer(own)
    alike, packaged = known.best(known.alike, new=True), _packaged(spec, target, threads)
    if alike is None:
        alike = known.best((record for record in packaged if record.versions == today), new=True)
    if own is None and alike is None and old is None:
        old = known.best((record for record in packaged if record.versions != today), new=True)
    if old is None or not measure or not spec.n:
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
    return Answer(None, outdated=tuple(contenders))


class _Known:
    """What a store knows about one problem on machines of this kind.

    Attributes:
        own: records of this machine and today's versions, failures too.
        alike: right trials of other machines and today's versions.
        outdated: right trials of other versions.
    """

    def __init__(self, store: RecordStore, spec: ConvSpec, target: Target, threads: int) -> None:
        self._spec, self._target, today = spec, target, versions()
        trials = store.trials(spec=spec.descriptor, target=target.spelling, threads=threads)
        trials = [record for record in trials if same_kind(record.hardware, target, threads)]
        self.outdated = [record for record in trials if record.versions != today and record.outcome == "ok"]
        current = [record for record in trials if record.versions == today]
        self.own = [record for record in current if record.hardware == target.hardware]
        others = [record for record in current if record.hardware != target.hardware]
        self.alike = [record for record in others if record.outcome == "ok"]

    def best(self, records: Iterable[TuningRecord], *, new: bool = False) -> TuningRecord | None:
        """The preferred record among those that can still be built; with ``new`` only those whose candidate this
        machine has not measured with today's versions.
        """
        left = [record for record in records if has_schedule(record)]
        while (best := preferred(left)) is not None:
            candidate = record_candidate(best, self._spec, self._target)
            if candidate is not None and not (new and candidate in self._measured):
                return best
            left.remove(best)
        return None

    def own_best(self) -> TuningRecord | None:
        """The preferred record of this machine and today's versions.

        A trial that had no final comparison must be :data:`CLEARLY` faster than the default's, which answers
        otherwise: tuning must not make a layer slower.
        """
        best = self.best(self.own)
        if best is None or is_final(best):
            return best
        default = default_candidate(self._spec, self._target)
        tried = [r for r in self.own if r.outcome == "ok" and record_candidate(r, self._spec, self._target) == default]
        unproven = [r for r in tried if (best.seconds or 0.0) > CLEARLY * (r.seconds or 0.0)]
        return preferred(unproven) or best

    @cached_property
    def _measured(self) -> set[Candidate | None]:
        return {record_candidate(record, self._spec, self._target) for record in self.own}


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
    if not has_schedule(record):
        return f"{record.schedule} is gone, or no longer has version {record.schedule_version}"
    try:
        spec, target = ConvSpec.parse(record.spec), resolve(record.target)
    except (SpecError, UnsupportedError) as error:
        return str(error)
    if not same_kind(record.hardware, target, record.threads):
        return f"it is of another kind of machine than this, {target.hardware}"
    if record_candidate(record, spec, target) is None:
        return f"{record.schedule} no longer admits its picks"
    if record.versions != versions():
        return f"it is of {other_versions(record)}: a build would measure it again first"
    return ""
