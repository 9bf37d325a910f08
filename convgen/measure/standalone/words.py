"""Text for people."""

from __future__ import annotations

import sys
from typing import Any


def tell(text: str) -> None:
    """Write a line to standard error; letters that its encoding lacks become question marks."""
    encoding = sys.stderr.encoding or "ascii"
    sys.stderr.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:8.1f} µs" if seconds < 1e-2 else f"{seconds * 1e3:8.1f} ms"


def candidate(trial: dict[str, Any]) -> str:
    """A trial's schedule with its picks."""
    return f"{trial['schedule']}({' '.join(f'{name}={value}' for name, value in trial['picks'].items())})"
