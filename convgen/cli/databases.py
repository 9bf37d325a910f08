"""Files of records: those that ship with convgen, and others that ``convgen records export --note`` wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecordError
from .common import note

if TYPE_CHECKING:
    from ..hardware.target import Target
    from ..records.record import TuningRecord
    from ..tuning.recheck import Checked


def measured_again(records: Sequence[TuningRecord], target: Target) -> list[Checked]:
    """Records that are measured again in turn with their defaults, each told of as soon as it is."""
    from ..tuning.recheck import check_records

    results = []
    for result in check_records(records, target):
        ratio, record = result.ratio_default, result.record
        text = f"{ratio[0]:.3f}× the default ({ratio[1]:.3f}–{ratio[2]:.3f})" if ratio else result.error
        note(f"{record.id[:12]}  {result.outcome}  {text}  {record.spec}, {record.threads} threads")
        results.append(result)
    return results


def prune_database(path: Path, measure: bool, yes: bool) -> tuple[Counter[str], int, int | None]:
    """Drop the records of a file that no build takes any more, and say so in the file beside it.

    Args:
        measure: drop as well what is wrong, or certainly slower than today's default.
        yes: whether to drop them; else they are only counted.

    Returns:
        How many go, by reason; how many records there are now; how many were removed, None where nothing should be.

    Raises:
        RecordError: the file cannot be read or written, none of its records can answer, or they are of another kind of
            machine than this, which is to measure them.
    """
    from ..hardware.target import resolve
    from ..records import shipped
    from ..records.answer import same_kind
    from ..records.pruning import outdated

    origin = shipped.Origin.read(path.with_suffix(".json"))
    found = [record for records in shipped.records_of(path, origin.records).values() for record in records]
    reasons = {record.id: reason for record in found if (reason := outdated(record))}
    if measure:
        target = resolve(origin.target)
        if not same_kind(origin.hardware, target, max(origin.threads)):
            raise RecordError(
                f"{path}: hardware: expected a machine as this, {target.hardware}, found {origin.hardware}"
            )
        for result in measured_again([record for record in found if record.id not in reasons], target):
            if result.outcome != "ok":
                reasons[result.record.id] = f"measured again: {result.outcome}"
    kept = [record for record in found if record.id not in reasons]
    counts = Counter(reasons.values())
    if not yes:
        return counts, len(found), None
    if not kept:
        raise RecordError(f"{path}: expected a record that can still answer, found none: remove both files")
    shipped.write(path, kept, origin.of_some(kept))
    return counts, len(kept), len(found) - len(kept)
