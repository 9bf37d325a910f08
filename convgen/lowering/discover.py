"""Finds what is in ``schedules/`` and ``targets/``. The core reaches them only through here."""

from __future__ import annotations

from functools import cache

from ..errors import UnsupportedError, meant
from ..hardware.discover import module_names, modules, target_families
from .schedule import Schedule


def schedule_ids() -> list[str]:
    """The ids of all schedules, without importing one (and TVM with it): a file is named after its schedule."""
    return module_names("convgen.schedules")


@cache
def schedules() -> dict[str, Schedule]:
    """Every schedule by id: one instance of each Schedule subclass a module in ``schedules/`` defines."""
    found: dict[str, Schedule] = {}
    for module in modules("convgen.schedules"):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Schedule) and value.__module__ == module.__name__:
                if value.id in found:
                    raise UnsupportedError(f"schedule id {value.id!r}: expected once, found again in {module.__name__}")
                found[value.id] = value()
    return found


def schedules_of(kind: str) -> dict[str, Schedule]:
    """The schedules for a kind of target, by id; those whose ids begin with the name of another kind are left out."""
    others = tuple(f"{family}_" for family in target_families() if family != kind)
    return {name: found for name, found in schedules().items() if not name.startswith(others)}


def merged_into(schedule_id: str) -> str:
    """The schedule that has taken the place of one of an earlier version; empty where none has."""
    return next((schedule.id for schedule in schedules().values() if schedule_id in schedule.merged), "")


def reference_schedule() -> Schedule:
    """The schedule that always applies and is always right, and slow."""
    return next(schedule for schedule in schedules().values() if schedule.is_reference)


def schedule(schedule_id: str) -> Schedule:
    """The schedule of that id.

    Raises:
        UnsupportedError: there is none.
    """
    known = schedules()
    if schedule_id not in known and (now := merged_into(schedule_id)):
        raise UnsupportedError(f"schedule: {schedule_id} gave way to {now}: expected {now}, found {schedule_id!r}")
    if schedule_id not in known:
        raise UnsupportedError(
            f"schedule: expected one of {', '.join(known)}, found {schedule_id!r}{meant(schedule_id, known)}"
        )
    return known[schedule_id]
