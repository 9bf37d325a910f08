"""What stays PyTorch's, in words: one line for each cause."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

#: Names of nodes that are listed for one cause.
MOST_NAMES = 3
#: What differs between reasons of one cause: the tensor that is of a type, or on a device.
_TENSOR = re.compile(r"^\S+ is (?=of torch\.|on )")


def causes(outside: Mapping[str, str]) -> list[tuple[str, str]]:
    """The names of nodes, some of them where they are many, and why these stay outside; by cause.

    >>> causes({"a": "aten.mul.Tensor: x is of torch.int64", "b": "aten.add.Tensor: y is of torch.int64"})
    [('a, b', 'a tensor is of torch.int64')]
    >>> causes({"a": "aten.mul.Tensor: x is of torch.int64"})
    [('a', 'aten.mul.Tensor: x is of torch.int64')]
    """
    groups: dict[str, dict[str, str]] = {}
    for name, reason in outside.items():
        _, _, why = reason.partition(": ")
        unknown = why.startswith("no such operator")
        groups.setdefault(reason if unknown else _TENSOR.sub("a tensor is ", why), {})[name] = reason
    return [(_listed(list(found)), _why(cause, list(found.values()))) for cause, found in groups.items()]


def in_words(outside: Mapping[str, str]) -> str:
    """All causes, one after another."""
    return "; ".join(f"{names}: {why}" for names, why in causes(outside))


def of_products(outside: Mapping[str, str], products: Iterable[str]) -> dict[str, str]:
    """What is said of convolutions and products; of operators."""
    starts = tuple(f"{'' if '.' in one.removesuffix('.default') else 'aten.'}{one}: " for one in products)
    return {name: reason for name, reason in outside.items() if reason.startswith(starts)}


def _why(cause: str, reasons: list[str]) -> str:
    return reasons[0] if len(set(reasons)) == 1 else cause


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
