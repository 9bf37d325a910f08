"""Which records are not believed before they are measured again.

A record says what a machine once measured; a clock that was wrong, a file that was imported, or a machine that was
busy may have made it say what cannot be. What speaks against one:

- it is dated more than a day after now;
- it is faster than any CPU computes, :data:`FASTEST`;
- it is :data:`SLOWER` times slower than another record of its problem, machine and versions: one against which neither
  of these speaks, that no later record of the same trial has corrected, and whose candidate there still is;
- nothing in it says how fast the default was at the same time, and it is :data:`ABSURD` times slower than what
  the default's schedule predicts, a call's overhead added.

A record that a re-check has made stands whatever others say: it was measured because of them.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ..hardware.target import Target, resolve
from ..lowering.candidates import default_candidate
from ..lowering.discover import schedules
from ..lowering.schedule import Picks
from ..problem.spec import ConvSpec
from .record import TuningRecord
from .store import RecordStore
from .strips import is_height

#: By how much clocks may differ.
AHEAD = timedelta(days=1)
#: Times by which a busy machine does not make the winner of a comparison slower than a trial.
SLOWER = 4.0
#: Times by which no prediction is wrong, and seconds that a call takes for nothing.
ABSURD, OVERHEAD = 25.0, 2e-5


#: Operations a second, of each thread and lane of its vectors, that no CPU does: 8 a cycle, 8 GHz, and a transform that
#: saves seven of eight. The fastest there are do a tenth.
FASTEST = 8 * 8e9 * 8


def is_ahead(record: TuningRecord) -> bool:
    """Whether a record is dated after now, by more than clocks may differ."""
    return datetime.fromisoformat(record.when) > datetime.now(UTC) + AHEAD


def disbelief(record: TuningRecord, store: RecordStore) -> str:
    """Why a record that would answer here is not believed; empty where it is, or says no time."""
    if not record.seconds or is_height(record):
        return ""
    spec, target = ConvSpec.parse(record.spec), resolve(record.target).on(record.threads)
    found = doubt(record, store, spec, target)
    return f"it is not believed: it is {found}" if found else ""


def doubt(record: TuningRecord, store: RecordStore, spec: ConvSpec, target: Target) -> str:
    """What speaks against a record, as what it is: ``dated 2099-01-01, after now``; empty where nothing does."""
    note, seconds = record.note or {}, record.seconds or 0.0
    if is_ahead(record):
        return f"dated {record.when[:10]}, after now"
    if _is_too_fast(record, spec, target):
        return "faster than any such CPU computes"
    if "recheck" in note:
        return ""

    def counts(other: TuningRecord) -> bool:
        return not (is_ahead(other) or _is_too_fast(other, spec, target)) and _has_candidate(other, spec, target)

    faster = store.first(
        counts,
        latest=True,
        versions=record.versions,
        schedules=[f"{schedule.id} {schedule.version}" for schedule in schedules().values()],
        spec=record.spec,
        target=record.target,
        hardware=record.hardware,
        threads=record.threads,
    )
    if faster is not None and seconds > SLOWER * (faster.seconds or 0.0):
        return f"{seconds / (faster.seconds or seconds):.3g} times slower than record {faster.id[:12]}"
    predicted = default_candidate(spec, target).schedule.cost(spec.core, target) + OVERHEAD
    if note.get("default_seconds") is None and seconds > ABSURD * predicted:
        return f"{seconds / predicted:.3g} times slower than predicted for the default"
    return ""


def _is_too_fast(record: TuningRecord, spec: ConvSpec, target: Target) -> bool:
    lanes = record.threads * target.lanes
    return target.kind == "cpu" and (record.seconds or 0.0) * lanes * FASTEST < spec.flops


def _has_candidate(record: TuningRecord, spec: ConvSpec, target: Target) -> bool:
    """Whether a record's schedule still admits its picks."""
    return schedules()[record.schedule].reason_against(spec.core, target, Picks(**record.picks)) is None
