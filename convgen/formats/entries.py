"""A layer of a network: its spec, how often it occurs, and its names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import SpecError, meant
from ..problem.spec import ConvSpec
from ..problem.tokens import NETWORK_ACCURACIES


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


@dataclass(frozen=True)
class AccuracyRule:
    """The accuracy class of layers of floats: of all, or of those with a name that a pattern matches. Or what networks
    have besides, which layers refuse.
    """

    accuracy: str
    pattern: str | None = None

    @classmethod
    def parse(cls, text: str) -> AccuracyRule:
        """``strict``, or ``head.*=strict`` with ``*``, ``?`` and ``[…]`` as in a shell's file names.

        Raises:
            SpecError: no such accuracy class, or an empty pattern.
        """
        pattern, separator, accuracy = text.rpartition("=")
        if accuracy not in NETWORK_ACCURACIES or bool(separator) != bool(pattern):
            raise SpecError(
                "accuracy",
                f"CLASS or NAME=CLASS with one of {', '.join(NETWORK_ACCURACIES)}",
                f"{text!r}{meant(accuracy, NETWORK_ACCURACIES)}",
            )
        return cls(accuracy, pattern or None)

    def __str__(self) -> str:
        return self.accuracy if self.pattern is None else f"{self.pattern}={self.accuracy}"

    def applies(self, spec: ConvSpec, name: str) -> bool:
        """Whether it is about a layer of that name. Layers of integers are exact: only by name, to be refused."""
        return spec.dtype != "i8" if self.pattern is None else fnmatchcase(name, self.pattern)


def with_accuracy(models: Sequence[Sequence[SpecEntry]], rules: Sequence[AccuracyRule]) -> list[list[SpecEntry]]:
    """The models' layers with the accuracy that the last rule about each says, identical ones merged. A layer that
    occurs under several names is split where rules part them; occurrences without a name go with the first.

    Raises:
        SpecError: a rule matches no layer, or names one of integers.
    """
    return [merge(entries) for entries in apart_with_accuracy(models, rules)]


def apart_with_accuracy(models: Sequence[Sequence[SpecEntry]], rules: Sequence[AccuracyRule]) -> list[list[SpecEntry]]:
    """As :func:`with_accuracy`, but in the given order and nothing merged: an entry for each name of a layer."""
    matched: set[AccuracyRule] = set()

    def chosen(spec: ConvSpec, name: str) -> ConvSpec:
        for rule in rules:
            if rule.applies(spec, name):
                matched.add(rule)
                spec = spec.with_(accuracy=rule.accuracy)
        return spec

    changed = []
    for entries in models:
        parts = []
        for entry in entries:
            unnamed = entry.count - len(entry.names[1:])
            parts.append(SpecEntry(chosen(entry.spec, "".join(entry.names[:1])), unnamed, entry.names[:1]))
            parts += [SpecEntry(chosen(entry.spec, name), 1, (name,)) for name in entry.names[1:]]
        changed.append(parts)
    for rule in rules if any(models) else ():  # where nothing could be read, that is said
        if rule not in matched:
            where = "a layer of floats" if rule.pattern is None else f"a layer with a name like {rule.pattern!r}"
            names = {name for entries in models for entry in entries for name in entry.names}
            raise SpecError("accuracy", where, f"none{meant(rule.pattern or '', names)}")
    return changed
