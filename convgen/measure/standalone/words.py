"""Text for people."""

from __future__ import annotations

import sys
from typing import Any


def printable(text: str, keep: str = "") -> str:
    r"""Text with everything that does not print escaped, as ``repr`` escapes it.

    Names and messages come from files and other machines. What moves the cursor, hides text or turns its direction
    is seen as ``\x1b`` or ``\u202e`` then, and not obeyed. The characters in ``keep`` stay.
    """
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def one_line(text: str) -> str:
    """Text as one printable line: its lines with spaces between them."""
    return printable(" ".join(text.splitlines()))


def tell(text: str) -> None:
    """Write a line to standard error; letters that its encoding lacks become question marks."""
    encoding = sys.stderr.encoding or "ascii"
    sys.stderr.write(one_line(text).encode(encoding, "replace").decode(encoding) + "\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:8.1f} µs" if seconds < 1e-2 else f"{seconds * 1e3:8.1f} ms"


def problem(trial: dict[str, Any]) -> str:
    """What a trial is of: its layer, target and threads."""
    return f"{trial['spec']}, {trial['target']}, {trial['threads']} thread{'s' * (trial['threads'] != 1)}"


def candidate(trial: dict[str, Any]) -> str:
    """A trial's schedule with its picks."""
    return f"{trial['schedule']}({' '.join(f'{name}={value}' for name, value in trial['picks'].items())})"
