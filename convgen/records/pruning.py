"""What can go from a record store without changing an answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta

from ..errors import SpecError, UnsupportedError
from ..hardware.target import resolve
from ..lowering.versions import versions
from ..problem.spec import ConvSpec
from .answer import has_schedule, is_final, preferred, record_candidate
from .record import TuningRecord

#: Days after which records of other versions are not worth their space.
KEEP_DAYS = 180.0


def prunable(
    records: Iterable[TuningRecord], *, keep: int, days: float = KEEP_DAYS, now: str
) -> dict[str, list[TuningRecord]]:
    """What can go from a store, by reason.

    Final comparisons and failures of today's versions always stay: the first answer builds, the second keep a
    search from trying again what crashes. Of other versions, the records that a re-check would take stay for
    ``days``.

    Args:
        records: all records of the store.
        keep: how many of each problem's fastest records stay, for each machine.
        days: age in days up to which records of other versions stay.
        now: the time, as records spell it.
    """
    oldest = datetime.fromisoformat(now) - timedelta(days=days)
    today = versions()
    reasons: dict[str, list[TuningRecord]] = defaultdict(list)
    problems: dict[tuple[object, ...], list[TuningRecord]] = defaultdict(list)
    for record in records:
        if not has_schedule(record):
            reasons["of another version of its schedule"].append(record)
        elif record.versions == today:
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


def outdated(record: TuningRecord) -> str:
    """Why no build takes a record any more, on whatever machine; empty where one may."""
    if record.outcome != "ok":
        return "failed"
    if not has_schedule(record):
        return "of another version of its schedule"
    try:
        candidate = record_candidate(record, ConvSpec.parse(record.spec), resolve(record.target))
    except (SpecError, UnsupportedError):
        return "of a layer or target that this version does not know"
    return "" if candidate else "of picks that its schedule no longer admits"
