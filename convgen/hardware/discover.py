"""Finds the modules in ``schedules/`` and ``targets/``, and the target families among them."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType


def module_names(package_name: str) -> list[str]:
    """The modules of a package, without importing them; those whose names begin with an underscore do not count."""
    package = importlib.import_module(package_name)
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))


def modules(package_name: str) -> list[ModuleType]:
    """The modules of a package, imported."""
    return [importlib.import_module(f"{package_name}.{name}") for name in module_names(package_name)]


@cache
def target_families() -> dict[str, ModuleType]:
    """Every target family by name: modules in ``targets/`` with ``resolve(model)``, ``known()``, ``beginning(text)``,
    ``close(name)`` and ``fingerprint(machine)``.
    """
    return {module.__name__.rpartition(".")[2]: module for module in modules("convgen.targets")}
