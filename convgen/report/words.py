"""Figures and names as people read them, in pages, tables and on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What stands where a figure is missing because nobody took it.
NOT_MEASURED = "not measured"


def plural(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def picks_text(picks: Mapping[str, Any]) -> str:
    """``tile_oc=32 tile_ow=14``, as the option ``--picks`` takes them: always in alphabetical order."""
    return " ".join(f"{name}={value}" for name, value in sorted(picks.items()))


def microseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1e6:.{0 if seconds >= 1e-4 else 1}f}"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:.{1 if seconds >= 1e-2 else 3}f}"


def factor(value: float | None) -> str:
    """A ratio with two digits behind the point."""
    return f"{value:.2f}" if value else "–"


def times_text(ratio: float) -> str:
    """``1.5×``."""
    return f"{ratio:g}×"


def span(seconds: float | None) -> str:
    """``2 h 5 min``: a time people wait."""
    if seconds is None:
        return NOT_MEASURED
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
