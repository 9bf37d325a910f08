"""Finds what is in ``schedules/`` and ``targets/``. The core reaches them only through here."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from .errors import UnsupportedError

if TYPE_CHECKING:
    from .schedule import Schedule


def _names(package_name: str) -> list[str]:
    package = importlib.import_module(package_name)
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))


def _modules(package_name: str) -> list[ModuleType]:
    return [importlib.import_module(f"{package_name}.{name}") for name in _names(package_name)]


def schedule_ids() -> list[str]:
    """The ids of all schedules, without importing one (and TVM with it): a file is named after its schedule."""
    return _names("convgen.schedules")


@cache
def schedules() -> dict[str, Schedule]:
    """Every schedule by id: one instance of each Schedule subclass a module in ``schedules/`` defines."""
    from .schedule import Schedule

    found: dict[str, Schedule] = {}
    for module in _modules("convgen.schedules"):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Schedule) and value.__module__ == module.__name__:
                if value.id in found:
                    raise UnsupportedError(f"schedule id {value.id!r}: expected once, found again in {module.__name__}")
                found[value.id] = value()
    return found


def schedules_of(kind: str) -> dict[str, Schedule]:
    """The schedules for a kind of target, by id: all but those whose ids begin with another kind's name."""
    others = tuple(f"{family}_" for family in target_families() if family != kind)
    return {name: found for name, found in schedules().items() if not name.startswith(others)}


def schedule(schedule_id: str) -> Schedule:
    """The schedule of that id.

    Raises:
        UnsupportedError: there is none.
    """
    known = schedules()
    if schedule_id not in known:
        raise UnsupportedError(f"schedule: expected one of {', '.join(known)}, found {schedule_id!r}")
    return known[schedule_id]


@cache
def target_families() -> dict[str, ModuleType]:
    """Every target family by name: modules in ``targets/`` with ``resolve(model)`` and ``known()``."""
    return {module.__name__.rpartition(".")[2]: module for module in _modules("convgen.targets")}
