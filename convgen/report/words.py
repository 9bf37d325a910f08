"""Figures and names as people read them, in pages, tables and on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

#: What stands where a figure is missing because nobody took it.
NOT_MEASURED = "not measured"


def plural(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def shortened(texts: Sequence[str], width: int) -> list[str]:
    """Texts, each at most so wide, of which those that differ still do where that is possible.

    What is too long loses its end, as sentences may; else its middle, or what is left and right of that, where the
    fewest become alike: names of layers begin and end alike, and differ somewhere between.
    """
    different = dict.fromkeys(texts)
    long = [text for text in different if len(text) > width]
    best: dict[str, str] = {}
    for way in _ways(long, width) if long else ():
        made = {text: way(text) if len(text) > width else text for text in different}
        if len(set(made.values())) > len(set(best.values())):
            best = made
        if len(set(best.values())) == len(different):
            break
    return [best.get(text, text) for text in texts]


def _ways(texts: Sequence[str], width: int) -> Iterator[Callable[[str], str]]:
    """Ways to cut texts that are all too long, that which reads best first."""

    def without_middle(text: str, kept: int) -> str:
        return f"{text[:kept]}…{text[len(text) - (width - 1 - kept) :]}" if len(text) > width else text

    splits = sorted(range(width), key=lambda kept: abs(2 * kept + 1 - width))
    for kept in (width - 1, *splits):
        yield partial(without_middle, kept=kept)
    head = _alike(texts)
    tail = min(_alike([text[::-1] for text in texts]), min(map(len, texts)) - head)

    def without_ends(text: str, kept: int) -> str:
        own = len(text) - head - tail
        start = max(0, head - max(0, width - 2 - own))  # where there is room for it, what stands before it as well
        return without_middle(f"{'…' * (start > 0)}{text[start : len(text) - tail]}{'…' * (tail > 0)}", kept)

    for kept in splits:
        yield partial(without_ends, kept=kept)


def _alike(texts: Sequence[str]) -> int:
    """With how many letters all texts begin alike."""
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))


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
