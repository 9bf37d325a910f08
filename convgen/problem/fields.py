"""Values of a spec's fields as they are given, checked and made plain: integers, flags, sizes per axis, layouts.

Each raises :exc:`~convgen.errors.SpecError`, which names the field.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from ..errors import SpecError
from .layout import LAYOUTS

INT32_MAX = 2**31 - 1

Pair = tuple[int, int]
Spatial = tuple[int, ...]


def integer(name: str, value: object, minimum: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # also an array of several elements, which has an __index__
        raise SpecError(name, f"an integer >= {minimum}", repr(value)) from None
    if isinstance(value, bool):
        raise SpecError(name, f"an integer >= {minimum}", repr(value))
    if number < minimum:
        raise SpecError(name, f"an integer >= {minimum}", number)
    if number > INT32_MAX:
        raise SpecError(name, f"at most {INT32_MAX} (int32 indexing)", number)
    return number


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(name, "true or false", repr(value))
    return value


def layout_of(name: str, value: object, rank: int) -> str:
    layout, named_rank = LAYOUTS.get(str(value).lower(), ("", 0))
    if not layout or named_rank not in (0, rank):
        known = [token for token, (_, named) in LAYOUTS.items() if named in (0, rank)]
        raise SpecError(name, f"a {rank}-D layout among {', '.join(known)}", repr(value))
    return layout


def spatial(name: str, value: object, rank: int, minimum: int) -> Spatial:
    """One integer for all axes, or one per axis."""
    if hasattr(value, "__index__"):
        return (integer(name, value, minimum),) * rank
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SpecError(name, f"an integer, or {rank} of them", repr(value))
    if len(value) == 1 and rank > 1 and name != "in_spatial":
        value = tuple(value) * rank
    if len(value) != rank:
        raise SpecError(name, f"{rank} values, one per spatial axis", f"{len(value)}: {tuple(value)}")
    return tuple(integer(f"{name}[{axis}]", v, minimum) for axis, v in enumerate(value))
