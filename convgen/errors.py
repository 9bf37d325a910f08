"""Everything convgen raises on purpose.

::

    ConvgenError
    ├── SpecError (ValueError)     a spec, descriptor or spec file that cannot be what was meant
    ├── UnsupportedError           a valid request this version does not serve; says what would
    │   └── NotTakenError          a model of which some nodes are not taken; names each, and why
    ├── Inapplicable               a schedule does not apply to a spec on a target, and why
    ├── BuildError                 lowering, compiling or linking failed
    │   └── ResourceError          a kernel takes more of a GPU than it may
    ├── MeasureError               timing or a worker failed
    ├── ValidationError            a kernel's output is not what ONNX Runtime computes
    ├── RecordError                a record or its store cannot be read or written
    ├── ExportError                an exported library cannot be written or loaded
    ├── FolderError                the system's temporary folder cannot be written, or nothing be loaded from it
    └── KernelError                a call that the kernel refused: a wrong buffer, size or CPU

Messages name the field, what was expected and what was found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence


def meant(found: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is none of those known: which of them it is like, if any."""
    from difflib import get_close_matches  # slow to load, and seldom needed

    words = {word.lower(): word for word in known}
    return meant_by([words[word] for word in get_close_matches(found.lower(), words, n=2)])


def meant_by(close: Sequence[str]) -> str:
    """The end of a message about a word that may mean one of others; empty where there are none."""
    return f"; did you mean {' or '.join(close)}?" if close else ""


#: How many things that are refused for one cause are listed one by one.
MOST_ALIKE = 3
#: What is quoted in a message: a name.
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


def by_cause(reasons: Mapping[str, str]) -> dict[str, str]:
    """Reasons by what they are of, such as ``Det 'first'``; of many of a kind whose reasons are alike but for names,
    the first, with how many more there are.

    >>> by_cause({f"Det '{name}'": f"'{name}' is of i8" for name in "abcd"})
    {"Det 'a' and 3 more": "'a' is of i8"}
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for what, reason in reasons.items():
        groups.setdefault((what.partition(" ")[0], _QUOTED.sub("", reason)), []).append(what)
    found: dict[str, str] = {}
    for first, *others in groups.values():
        if len(others) < MOST_ALIKE:
            found |= {what: reasons[what] for what in (first, *others)}
        else:
            found[f"{first} and {len(others)} more"] = reasons[first]
    return found


class ConvgenError(Exception):
    """The root of every error convgen raises on purpose."""


class SpecError(ConvgenError, ValueError):
    """A field of a spec, descriptor or file is wrong.

    Attributes: ``field`` (its name), ``expected`` and ``found`` (text).
    """

    def __init__(self, field: str, expected: str, found: object, where: str = "") -> None:
        self.field, self.expected, self.found = field, expected, found
        self.where = where
        prefix = f"{where}: " if where else ""
        super().__init__(f"{prefix}{field}: expected {expected}, found {found}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.field, self.expected, self.found, self.where)


class UnsupportedError(ConvgenError):
    """The request is valid, but this version does not serve it."""


class NotTakenError(UnsupportedError):
    """A model of which some nodes, or inputs, are not taken.

    Attributes:
        where: the model.
        nodes: each of them, such as ``Det 'first'``, and why.
        taken: how many of the model's nodes are; 0 where that is not known.
        counted: what they are: ``1 input and 2 nodes``.
    """

    def __init__(self, where: str, nodes: dict[str, str], taken: int) -> None:
        self.where, self.nodes, self.taken = where, nodes, taken
        reasons = "; ".join(f"{node}: {reason}" for node, reason in by_cause(nodes).items())
        super().__init__(f"{where}: {self.counted} {'is' if len(nodes) == 1 else 'are'} not taken: {reasons}")

    @property
    def counted(self) -> str:
        kinds = [what.partition(" ")[0] for what in self.nodes]
        counts = {kind: kinds.count(kind) for kind in ("input", "output", "value")}
        counts["node"] = len(kinds) - sum(counts.values())
        said = [f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts.items() if count]
        return " and ".join(filter(None, [", ".join(said[:-1]), *said[-1:]]))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.where, self.nodes, self.taken)


class Inapplicable(ConvgenError):  # noqa: N818  (an answer more than an error)
    """A schedule does not apply here; the message is the reason."""


class BuildError(ConvgenError):
    """Lowering, compiling or linking failed."""


class ResourceError(BuildError):
    """A kernel takes more of a GPU than it may: registers spill, or a block does not fit."""


class MeasureError(ConvgenError):
    """A measurement or its worker failed."""


class ValidationError(ConvgenError):
    """A kernel's output is outside its bound, or not bit-exact where it must be."""


class RecordError(ConvgenError):
    """A tuning record, or the store that holds it, cannot be read or written."""


class ExportError(ConvgenError):
    """An exported library cannot be written, or does not match its manifest."""


class FolderError(ConvgenError):
    """The system's temporary folder cannot be written, is full, or nothing can be loaded from it."""


class KernelError(ConvgenError, ValueError):
    """A kernel refused a call: a wrong shape, dtype, size, stride or CPU."""
