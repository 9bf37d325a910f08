"""Dataclasses by which answers are looked up thousands of times: each computes its hash once."""

from __future__ import annotations

from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)
_KEPT = "_hash"


def hashed_once(cls: _Class) -> _Class:
    """A frozen dataclass, whose hash is of all its fields, as one that keeps it.

    It is not pickled: that of a text is another one in every process.
    """
    computed: Any = cls.__hash__

    def hash_of(self: Any) -> int:
        kept = self.__dict__
        if _KEPT not in kept:
            kept[_KEPT] = computed(self)
        found: int = kept[_KEPT]
        return found

    def state_of(self: Any) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _KEPT}

    made: Any = cls
    made.__hash__, made.__getstate__ = hash_of, state_of
    return cls
