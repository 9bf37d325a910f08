"""Heights of strips in a store: with which a separable problem is computed fastest.

A height is a record as a candidate's is: of its problem's descriptor, of the schedule ``strips``, with the pick
``rows`` (0: no strips). All heights that were timed in turn are kept together, as of a final comparison.
"""

from __future__ import annotations

from ..hardware.target import Target
from ..lowering.versions import versions
from ..problem.separable import SeparableSpec
from .record import TuningRecord
from .store import RecordStore

#: What stands for a schedule in such records; raised where the strips that heights make are others.
SCHEDULE, VERSION = "strips", 1


def is_height(record: TuningRecord) -> bool:
    """Whether a record is of a height of strips, not of a kernel."""
    return record.schedule == SCHEDULE


def best_height(store: RecordStore, spec: SeparableSpec, target: Target, threads: int) -> TuningRecord | None:
    """The record of the height that won last on this machine with today's versions; None where there is none.

    Raises:
        RecordError: the store cannot be read.
    """
    found = store.trials(
        spec=spec.descriptor,
        target=target.spelling,
        hardware=target.hardware,
        threads=threads,
    )
    heights = [record for record in found if is_height(record)]  # no filter of the store's: it would hide a damaged one
    won = [record for record in heights if record.versions == versions() and (record.note or {}).get("winner")]
    return next((record for record in reversed(won) if record.schedule_version == VERSION and _has_rows(record)), None)


def rows_of(record: TuningRecord) -> int:
    """The rows of a height's strips; 0: no strips."""
    return int(record.picks["rows"])


def _has_rows(record: TuningRecord) -> bool:
    """Whether a record, which may come from elsewhere, has a number of rows."""
    rows = record.picks.get("rows")
    return isinstance(rows, int) and not isinstance(rows, bool) and rows >= 0
