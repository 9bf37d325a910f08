"""Which record answers a build.

In this order, for the spec, the target and the number of threads asked for:

1. a record of this machine and these versions (:func:`current_versions`), in the user's store;
2. one of a machine of the same kind (:func:`same_kind`) and these versions: from the store, else from
   those that ship with the package (:mod:`convgen.tuned`);
3. one of other versions, after it has been verified and timed in turn with the default
   (:func:`recheck`). What comes of it is stored, so that the old record, right or expired, is not
   measured again.

Among several of one kind :func:`preferred` decides; a trial that had no final comparison must be clearly faster
than the default's. None of them answers where its schedule is gone,
has another version or no longer admits the picks.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tuned
from .discover import schedule as find_schedule
from .errors import BuildError, Inapplicable, MeasureError, RecordError, SpecError, UnsupportedError, ValidationError
from .records import RecordStore, TuningRecord
from .schedule import Candidate, Picks
from .spec import ConvSpec
from .target import Target

if TYPE_CHECKING:
    from .measure import Result
    from .workers import Pools

#: Samples of each kernel in a re-check, and seconds of samples that precede them.
ROUNDS, VERIFY_SECONDS = 25, 0.02
#: A single trial's time over the default's below which it is certainly faster: trials scatter by some percent.
CLEARLY = 0.97
#: Days after which the search's records of other versions are not worth their space.
KEEP_DAYS = 180.0

_FINGERPRINT = re.compile(r"(.+-[0-9a-f]{12})-(\d+)\Z")


def current_versions() -> dict[str, str]:
    """The versions that make a record's kernel today's: :func:`convgen.build.versions`."""
    from .build import versions

    return versions()


# ---- what a record stands for -------------------------------------------------------------------


def record_candidate(record: TuningRecord, spec: ConvSpec, target: Target) -> Candidate | None:
    """What a record describes, or None where this version's schedules no longer mean the same."""
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
    """What tells a trial of today's from all others: the arguments of :func:`convgen.records.trial_key`."""
    return {
        "spec": spec.descriptor,
        "target": target.spelling,
        "hardware": target.hardware,
        "threads": threads,
        "schedule": candidate.schedule.id,
        "schedule_version": candidate.schedule.version,
        "picks": dict(candidate.picks),
        "versions": current_versions(),
    }


def choose(
    spec: ConvSpec, target: Target, record: TuningRecord | None, rejected: Collection[Candidate] = ()
) -> tuple[Candidate, TuningRecord | None]:
    """What to build, and the record it comes from: the record's candidate, else the default.

    A default that a search has ``rejected`` (it crashed, or its output was wrong) is not built: the
    reference, which the others are checked against, answers instead.
    """
    from .build import default_candidate, parse_candidate

    candidate = record_candidate(record, spec, target) if record else None
    if candidate is not None:
        return candidate, record
    candidate = default_candidate(spec, target)
    if candidate in rejected:
        candidate = parse_candidate(spec, target, "reference")
    return candidate, None


def has_schedule(record: TuningRecord) -> bool:
    """Whether its schedule exists, in the same version."""
    try:
        return find_schedule(record.schedule).version == record.schedule_version
    except UnsupportedError:
        return False


def is_final(record: TuningRecord) -> bool:
    """Whether it is of a final comparison, where kernels were timed in turn."""
    return bool((record.note or {}).get("final"))


def preferred(records: Iterable[TuningRecord]) -> TuningRecord | None:
    """The record to build from, of several of one problem: the winner of the newest final comparison,
    else the fastest of such comparisons, else the fastest trial; None where none was right.
    """
    right = [record for record in records if record.outcome == "ok"]
    finals = [record for record in right if is_final(record)]
    winners = [record for record in finals if (record.note or {}).get("winner")]
    if winners:
        return max(winners, key=lambda record: (record.when, record.id))
    return min(finals or right, key=lambda record: (record.seconds or 0.0, record.id), default=None)


def same_kind(hardware: str, target: Target, threads: int) -> bool:
    """Whether what was measured there holds here: the same machine, or the same processor model,
    stepping and instruction set, where both machines have a CPU for each thread.
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
        record: None where the default does.
        origin: where a record is from that was not measured here and now; empty otherwise.
        note: what a user should know about it; empty otherwise.
        rejected: candidates that a re-check found not to work.
    """

    record: TuningRecord | None
    origin: str = ""
    note: str = ""
    rejected: frozenset[Candidate] = frozenset()


def best_record(store: RecordStore, spec: ConvSpec, target: Target, threads: int) -> TuningRecord | None:
    """The record of this machine and these versions to build from, or None."""
    return _Known(store, spec, target, threads).own_best()


def find_record(
    store: RecordStore,
    spec: ConvSpec,
    target: Target,
    threads: int,
    *,
    pools: Callable[[], Pools] | None = None,
    measure: bool = True,
) -> Answer:
    """The record to build from: see the top of this module.

    Args:
        pools: where to re-check, asked for only when there is something to; worker processes of its own
            by default.
        measure: whether to re-check at all; records of other versions don't answer otherwise.

    Raises:
        RecordError: the store cannot be read or written, or a shipped database is damaged.
        KeyboardInterrupt: during a re-check, of which nothing is stored.
    """
    from .build import default_candidate

    known, versions = _Known(store, spec, target, threads), current_versions()
    own, old = known.own_best(), known.best(known.outdated, new=True)
    if own is not None and (is_final(own) or old is None or not is_final(old)):
        return Answer(own)
    alike, shipped = known.best(known.alike, new=True), _shipped(spec, target, threads)
    if alike is None:
        alike = known.best((record for record in shipped if record.versions == versions), new=True)
    if own is None and alike is None and old is None:
        old = known.best((record for record in shipped if record.versions != versions), new=True)
    if old is None or not measure or not spec.n:
        found = own or alike
        if found is None or found is own:
            return Answer(found)
        origin = _origin(found, shipped)
        is_elsewhere = found.hardware != target.hardware
        return Answer(found, origin, f"{spec.descriptor}: the record is {origin}" if is_elsewhere else "")
    contenders = [record for record in (old, own, alike) if record]
    default = default_candidate(spec, target)
    if all(record_candidate(record, spec, target) == default for record in contenders):
        return Answer(own)  # there is nothing to compare the default with
    return recheck(store, spec, target, threads, contenders, pools)


class _Known:
    """What a store knows about one problem on machines of this kind.

    Attributes:
        own: records of this machine and these versions, failures too.
        alike: right ones of other machines and these versions.
        outdated: right ones of other versions.
    """

    def __init__(self, store: RecordStore, spec: ConvSpec, target: Target, threads: int) -> None:
        self._spec, self._target, versions = spec, target, current_versions()
        found = store.trials(spec=spec.descriptor, target=target.spelling, threads=threads)
        found = [record for record in found if same_kind(record.hardware, target, threads)]
        self.outdated = [r for r in found if r.versions != versions and r.outcome == "ok"]
        found = [r for r in found if r.versions == versions]
        self.own = [r for r in found if r.hardware == target.hardware]
        self.alike = [r for r in found if r.hardware != target.hardware and r.outcome == "ok"]

    def best(self, records: Iterable[TuningRecord], *, new: bool = False) -> TuningRecord | None:
        """The preferred one of those that still mean something; ``new``: and whose candidate has not been
        measured here and now.
        """
        left = [record for record in records if has_schedule(record)]
        while (best := preferred(left)) is not None:
            candidate = record_candidate(best, self._spec, self._target)
            if candidate is not None and not (new and candidate in self._measured):
                return best
            left.remove(best)
        return None

    def own_best(self) -> TuningRecord | None:
        """The preferred record of this machine and these versions. A trial that had no final comparison must be
        :data:`CLEARLY` faster than the default's, or that one answers: tuning must not make a layer slower.
        """
        best = self.best(self.own)
        if best is None or is_final(best):
            return best
        from .build import default_candidate

        default = default_candidate(self._spec, self._target)
        tried = [r for r in self.own if r.outcome == "ok" and record_candidate(r, self._spec, self._target) == default]
        unproven = [r for r in tried if (best.seconds or 0.0) > CLEARLY * (r.seconds or 0.0)]
        return preferred(unproven) or best

    @cached_property
    def _measured(self) -> set[Candidate | None]:
        return {record_candidate(record, self._spec, self._target) for record in self.own}


def _shipped(spec: ConvSpec, target: Target, threads: int) -> list[TuningRecord]:
    """The package's records for one problem on machines of this kind."""
    found = []
    for origin, path in tuned.databases():
        if same_kind(origin.hardware, target, threads) and origin.target == target.spelling:
            found += tuned.records_of(path, origin.records).get(spec.descriptor, [])
    return [record for record in found if record.threads == threads]


def _origin(record: TuningRecord, shipped: Sequence[TuningRecord]) -> str:
    there = _FINGERPRINT.match(record.hardware)
    cpus = f"{there[2]} CPUs" if there else record.hardware
    source = "of those that ship with convgen" if record in shipped else "from another machine"
    return f"{source}, measured {record.when[:10]} on a machine of this kind with {cpus}"


# ---- measuring again ----------------------------------------------------------------------------


@contextmanager
def _some_pools(target: Target, pools: Callable[[], Pools] | None) -> Iterator[Pools]:
    """The given pools, left open, or own ones."""
    from .workers import LocalBuilder, LocalRunner
    from .workers import Pools as OwnPools

    if pools is not None:
        yield pools()
        return
    made = OwnPools(LocalBuilder(max(1, min(2, target.cores))), LocalRunner())
    try:
        yield made
    finally:
        made.close()


def measure_in_turn(
    spec: ConvSpec, target: Target, threads: int, candidates: Iterable[Candidate], pools: Pools
) -> dict[Candidate, Result]:
    """Verify candidates in worker processes, and time those that are right in turn; how each ended.

    Raises:
        KeyboardInterrupt: at the end of the running measurement.
    """
    from .interrupts import interrupts_held
    from .measure import Expected, Result, candidate_module

    results: dict[Candidate, Result] = {}
    with interrupts_held() as interrupts, tempfile.TemporaryDirectory(prefix="convgen-") as folder:
        pools.interrupts = interrupts
        modules: dict[Candidate, str] = {}
        for candidate in dict.fromkeys(candidates):
            try:
                modules[candidate] = candidate_module(spec, target, candidate)
            except (BuildError, Inapplicable) as error:
                results[candidate] = Result("build_error", error=str(error)[-2000:])
        expected = Expected(spec, Path(folder), threads)
        paths: dict[Candidate, str] = {}
        for candidate, built in zip(modules, pools.build(list(modules.values())), strict=True):
            if isinstance(built, Result):
                results[candidate] = built
            else:
                paths[candidate] = built
                results[candidate] = pools.run(built, expected, threads, seconds=VERIFY_SECONDS)
        right = [candidate for candidate in paths if results[candidate].outcome == "ok"]
        try:
            if right and not interrupts.came:
                samples = pools.duel([paths[candidate] for candidate in right], expected, threads, ROUNDS)
                results |= {c: Result("ok", tuple(taken)) for c, taken in zip(right, samples, strict=True)}
        except MeasureError as error:  # one of them fails now and then, and nobody knows which
            results |= {candidate: Result("crash", error=str(error)) for candidate in right}
        finally:
            for path in paths.values():
                pools.discard(path)
    return results


def ratio_over(default: Result, result: Result) -> list[float] | None:
    """[median, low, high] of the default's time over another's, timed in turn; None where one failed."""
    from .compare import ratio_interval

    if default.seconds is None or result.seconds is None:
        return None
    if default is result:
        return [1.0, 1.0, 1.0]
    return [default.seconds / result.seconds, *ratio_interval(default.samples, result.samples)]


def recheck(
    store: RecordStore,
    spec: ConvSpec,
    target: Target,
    threads: int,
    records: Sequence[TuningRecord],
    pools: Callable[[], Pools] | None = None,
) -> Answer:
    """Measure records again, in turn with the default: in worker processes, in one or two seconds.

    The fastest that is right answers; the default, unless another is faster for certain. Each becomes a
    record of today, of a final comparison where it was right; where the store cannot be written, the
    answer's note says so.

    Args:
        records: the first is the one of other versions.
    """
    from .build import default_candidate

    default = default_candidate(spec, target)
    old = {candidate: record for record in records if (candidate := record_candidate(record, spec, target))}
    with _some_pools(target, pools) as workers:
        results = measure_in_turn(spec, target, threads, [default, *old], workers)
    right = [candidate for candidate in results if results[candidate].outcome == "ok"]
    ratios = {candidate: ratio_over(results[default], results[candidate]) for candidate in right}
    # Where the default is right, another must be faster for certain.
    faster = [candidate for candidate in right if (ratio := ratios[candidate]) is None or ratio[1] > 1]
    winner = min(faster, key=lambda c: results[c].seconds or 0.0, default=default if default in right else None)
    made: dict[Candidate, TuningRecord] = {}
    for candidate, result in results.items():
        note = {
            "final": True,
            "winner": candidate == winner,
            "default_seconds": results[default].seconds,
            "ratio_default": ratios.get(candidate),
            "recheck": records[0].id,
        }
        kept_note = note if result.outcome == "ok" else None
        made[candidate] = candidate_record(spec, target, threads, candidate, result, kept_note)
    kept = "; not kept: the store is read-only" if store.readonly else ""
    if not store.readonly:
        try:
            store.add_all(made.values())
        except RecordError as error:  # of a full disk: the build goes on
            kept = f"; not kept: {error}"
    was = record_candidate(records[0], spec, target)
    if was is not None and was == winner:
        verdict = "still wins"
    elif was is not None and results[was].outcome != "ok":
        verdict = f"has expired: {results[was].outcome}"
    else:
        verdict = f"has expired: {'not faster than the default' if winner == default else 'another is faster'} now"
    said = f"{spec.descriptor}: a record of {_other_versions(records[0])} was measured again and {verdict}{kept}"
    rejected = frozenset(candidate for candidate in results if candidate not in right)
    return Answer(made[winner] if winner else None, "measured again", said, rejected)


def _other_versions(record: TuningRecord) -> str:
    now = current_versions()
    names = sorted(name for name in record.versions.keys() | now if record.versions.get(name) != now.get(name))
    return ", ".join(f"{name} {record.versions.get(name, '(unknown)')}" for name in names)


@dataclass(frozen=True)
class Checked:
    """What measuring a record again found.

    Attributes:
        record: the one that was checked.
        outcome: ``ok``; ``slower``, where the default certainly is faster; or how it failed, as in a record.
        ratio_default: the default's time over its own [median, low, high]; None where one failed.
        error: what a failure said.
    """

    record: TuningRecord
    outcome: str
    ratio_default: list[float] | None = None
    error: str = ""


def check_records(
    records: Iterable[TuningRecord], target: Target, pools: Callable[[], Pools] | None = None
) -> Iterator[Checked]:
    """Build what records describe, validate it in full, and time it in turn with the default, one by one."""
    from .build import compile_candidate, default_candidate
    from .validate import validate

    with _some_pools(target, pools) as workers:
        for record in records:
            spec = ConvSpec.parse(record.spec)
            candidate, default = record_candidate(record, spec, target), default_candidate(spec, target)
            if candidate is None:
                yield Checked(record, "inapplicable", error=f"{record.schedule} has changed since, or does not apply")
                continue
            results = measure_in_turn(spec, target, record.threads, [candidate, default], workers)
            if results[candidate].outcome != "ok":
                yield Checked(record, results[candidate].outcome, error=results[candidate].error)
                continue
            ratio = ratio_over(results[default], results[candidate])
            try:
                validate(compile_candidate(spec, target, candidate, record.threads)).raise_if_failed()
            except ValidationError as error:
                yield Checked(record, "wrong", ratio, str(error))
                continue
            yield Checked(record, "slower" if ratio and ratio[2] < 1 else "ok", ratio)


def reason_against(record: TuningRecord) -> str:
    """Why a record answers no build on this machine; empty where it may."""
    from .target import resolve

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
    if record.versions != current_versions():
        return f"it is of {_other_versions(record)}: a build would measure it again first"
    return ""


# ---- stores -------------------------------------------------------------------------------------


def prunable(
    records: Iterable[TuningRecord], *, keep: int, days: float = KEEP_DAYS, now: str
) -> dict[str, list[TuningRecord]]:
    """What can go from a store, by reason.

    Never the final comparisons and failures of these versions: the first answer builds, and the others
    keep a search from repeating what crashes. Of other versions, those stay that a re-check would
    take, for ``days``.

    Args:
        records: all of the store.
        keep: how many of the fastest stay of each problem, on each machine.
        days: age in days up to which records of other versions stay.
        now: the time, as records spell it.
    """
    from datetime import datetime, timedelta

    oldest = datetime.fromisoformat(now) - timedelta(days=days)
    versions = current_versions()
    reasons: dict[str, list[TuningRecord]] = defaultdict(list)
    problems: dict[tuple[object, ...], list[TuningRecord]] = defaultdict(list)
    for record in records:
        if not has_schedule(record):
            reasons["of another version of its schedule"].append(record)
        elif record.versions == versions:
            if record.outcome == "ok" and not is_final(record):
                problems[record.spec, record.target, record.hardware, record.threads, True].append(record)
        elif datetime.fromisoformat(record.when) < oldest:
            reasons[f"of other versions, more than {days:g} days old"].append(record)
        elif record.outcome != "ok":
            reasons["failed with other versions"].append(record)
        else:
            problems[record.spec, record.target, record.hardware, record.threads, False].append(record)
    for (*_, is_current), found in problems.items():
        best = None if is_current else preferred(found)
        found.sort(key=lambda record: (record is not best, record.seconds, record.id))
        if dropped := found[keep:]:
            which = "" if is_current else ", of other versions"
            reasons[f"slower than the {keep} fastest of its problem{which}"] += dropped
    return dict(reasons)
