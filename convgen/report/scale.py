"""The axis of ratios that the pages and the figure share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .words import times_text

#: Where an axis may begin, end and have its lines; ratios beyond are drawn at the edge, with their number.
_TICKS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True)
class Tick:
    """A line of an axis, ``x`` in percent of its width."""

    ratio: float
    x: str

    @property
    def label(self) -> str:
        return times_text(self.ratio)


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis with a line at each of its ticks."""

    ticks: tuple[float, ...]

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Scale:
        """An axis that holds all ratios as far as axes go, and some room on both sides of 1."""
        low = max([tick for tick in _TICKS if tick <= min([0.75, *ratios])], default=_TICKS[0])
        high = min([tick for tick in _TICKS if tick >= max([1.5, *ratios])], default=_TICKS[-1])
        inside = [tick for tick in _TICKS if low <= tick <= high]
        if high / low > 8:  # lines at powers of two are enough
            inside = [tick for tick in inside if tick in (low, high) or math.log2(tick).is_integer()]
        return cls(tuple(inside))

    def place(self, ratio: float) -> float:
        """Where a ratio is, from 0 to 1; beyond the ends, at them."""
        low, high = self.ticks[0], self.ticks[-1]
        return math.log(min(max(ratio, low), high) / low) / math.log(high / low)

    def holds(self, ratio: float) -> bool:
        return self.ticks[0] <= ratio <= self.ticks[-1]

    def percent(self, ratio: float) -> str:
        """Where a ratio is on an axis as wide as the box that it is drawn in."""
        return f"{100 * self.place(ratio):.2f}%"

    def lines(self, ratios: Iterable[float] | None = None) -> list[Tick]:
        """The ticks, or those for some ratios, as they are drawn."""
        return [Tick(ratio, self.percent(ratio)) for ratio in (self.ticks if ratios is None else ratios)]

    def is_right(self, ratio: float) -> bool:
        """Whether a ratio is beyond the right end."""
        return ratio > self.ticks[-1]
