"""Where the tensors of a network lie: in the caller's arrays, among the weights, or in one arena by their lifetimes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..lowering.interface import round_up

ARENA, WEIGHTS, INPUT, OUTPUT = "arena", "weights", "input", "output"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        space: ``arena``, ``weights``, ``input`` or ``output``.
        number: of the input or output.
        offset: bytes from its beginning.
    """

    space: str
    number: int
    offset: int


@dataclass(frozen=True)
class Lifetime:
    """A buffer's bytes, and the steps of which it must outlive: from the first to the last, both included."""

    name: str
    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


def arrange(lifetimes: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """An offset for each buffer, and the size of the arena: those that live at once do not overlap.

    The largest is placed first, each in the smallest gap that holds it.
    """
    placed: list[tuple[int, Lifetime]] = []
    offsets: dict[str, int] = {}
    for buffer in sorted(lifetimes, key=lambda one: (-one.size, one.first, one.name)):
        size = round_up(buffer.size)
        taken = sorted((at, at + round_up(other.size)) for at, other in placed if other.meets(buffer))
        best, gap, end = -1, -1, 0
        for start, stop in taken:
            if start - end >= size and (gap < 0 or start - end < gap):
                best, gap = end, start - end
            end = max(end, stop)
        offset = best if best >= 0 else end
        offsets[buffer.name] = offset
        placed.append((offset, buffer))
    return offsets, max((offset + round_up(buffer.size) for offset, buffer in placed), default=0)
