"""Every operator between convolutions, by its name."""

from __future__ import annotations

from ..errors import BuildError
from .expressions import ELEMENTWISE, MOVES
from .lazy import Kind
from .reductions import REDUCES

#: Those that take integers and give what they took.
INTEGER_KINDS = frozenset({*MOVES, "identity", "pool", "clamp"} - {"resize"})
#: Those that compute with i32.
I32_KINDS = frozenset({"add", "sub", "mul", "max", "min", "neg", "abs", "product"})
#: Those that say themselves what they give.
TYPED_KINDS = frozenset({"quantise", "truncate", "wrap", "cast"})
#: Every operator by its name.
KINDS: dict[str, Kind] = {**ELEMENTWISE, **MOVES, **REDUCES}


def kind(name: str) -> Kind:
    """The operator of that name.

    Raises:
        BuildError: there is none.
    """
    if name not in KINDS:
        raise BuildError(f"operator: expected one of {', '.join(sorted(KINDS))}, found {name!r}")
    return KINDS[name]
