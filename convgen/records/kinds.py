"""What a file with records, or with what becomes records, is: who gave it to another command is told the right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of file: what it is called, and the command that takes it, which names it."""

    name: str
    taken: str


STORE = Kind("a record store", "`convgen records merge {}` takes it")
LINES = Kind("records as lines of JSON", "`convgen records import {}` takes them")
RESULTS = Kind("results of a bundle", "`convgen fleet import {}` takes them")
BUNDLE = Kind("an archive, as bundles are", "`convgen fleet run {}` measures a bundle")

#: What files begin with.
_BEGINNINGS = {b"SQLite format 3\0": STORE, b"\x1f\x8b": BUNDLE, b"PK\x03\x04": BUNDLE, b"\xfd7zXZ\0": BUNDLE}
#: Names that the first line's object has.
_NAMES = {
    frozenset({"schema", "trial_key", "id"}): LINES,
    frozenset({"kind", "manifest", "facts"}): RESULTS,
}
_LINE_BYTES = 1 << 24


def kind_of(path: Path) -> Kind | None:
    """What a file is; None where that does not show, it cannot be read, or only once, as a pipe."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            line = file.readline(_LINE_BYTES)
        for beginning, kind in _BEGINNINGS.items():
            if line.startswith(beginning):
                return kind
        values = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(values, dict):
        for names, kind in _NAMES.items():
            if names <= values.keys():
                return kind
    return None


def found_instead(path: Path, wanted: Kind) -> str:
    """The end of a message about a file that is of another kind: what was found, and what takes it; empty where it is
    of the wanted one, or of none.
    """
    kind = kind_of(path)
    return "" if kind is None or kind == wanted else f"found {kind.name}: {kind.taken.format(path)}"
