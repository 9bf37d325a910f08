"""What docstrings and comments refer to exists: every ``:mod:``, ``:class:``, ``:func:`` … in the package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import convgen

#: Every module of the package but the one that runs it.
MODULES = [info.name for info in pkgutil.walk_packages(convgen.__path__, "convgen.") if info.name != "convgen.__main__"]
ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc|obj):`~?([^`]+)`")


def has(owner: object, name: str) -> bool:
    """Whether a module or class has a name: a field without a default, or an attribute set by a method, too."""
    if hasattr(owner, name):
        return True
    classes = inspect.getmro(owner)[:-1] if isinstance(owner, type) else ()
    own = [c for c in classes if c.__module__.startswith("convgen")]
    return any(name in c.__annotations__ or f"self.{name}" in inspect.getsource(c) for c in own)


def exists(reference: str, module: ModuleType) -> bool:
    """Whether a reference in a module leads somewhere: from the top, from the module, or from a class of it."""
    path, _, last = reference.rpartition(".")
    try:
        pkgutil.resolve_name(reference)
    except (ImportError, AttributeError):
        pass
    else:
        return True
    if reference.startswith("convgen."):
        try:
            return has(pkgutil.resolve_name(path), last)
        except (ImportError, AttributeError):
            return False
    if path:
        return hasattr(module, path) and has(getattr(module, path), last)
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return any(has(owner, last) for owner in (module, *(c for c in classes if c.__module__ == module.__name__)))


@pytest.mark.parametrize("name", ["convgen", *MODULES])
def test_every_reference_leads_somewhere(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    references = ROLE.findall(Path(module.__file__).read_text(encoding="utf-8"))
    assert not [reference for reference in references if not exists(reference, module)]


def test_a_dead_reference_is_noticed() -> None:
    module = importlib.import_module("convgen.cuda.tiles")
    dead = (
        "convgen.vector",
        "convgen.cpu.vector.missing",
        "Missing",
        "Tile.missing",
        "convgen.cuda.tiles.Tile.missing",
    )
    alive = ("convgen.cpu.vector.written", "Tile", "Tile.tile_m", "tile_m", "convgen.cuda.tiles.Tile.threads", "pickle")
    assert [name for name in (*dead, *alive) if exists(name, module)] == [*alive]
