"""A layer of a network: its spec, how often it occurs, and its names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..problem.spec import ConvSpec


@dataclass(frozen=True)
class SpecEntry:
    """A spec, how often it occurs and under which names."""

    spec: ConvSpec
    count: int = 1
    names: tuple[str, ...] = ()


def merge(entries: Iterable[SpecEntry]) -> list[SpecEntry]:
    """One entry per distinct spec, in the order of first occurrence: counts added, names joined."""
    merged: dict[ConvSpec, SpecEntry] = {}
    for entry in entries:
        seen = merged.get(entry.spec, SpecEntry(entry.spec, 0))
        merged[entry.spec] = SpecEntry(entry.spec, seen.count + entry.count, seen.names + entry.names)
    return list(merged.values())
