"""The sizes that one library is made for: ``{"N": (1, 4), "H": 224}`` are two."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..errors import SpecError
from .graph import F32, Convolution, Graph

#: Sizes of symbolic dimensions by name: one, or those that a library is made for.
Dims = Mapping[str, int | Sequence[int]]
#: Most sizes of a library: each is planned and compiled.
MOST_SIZES = 64


def every_size(dims: Dims) -> list[dict[str, int]]:
    """Each size: every choice of one value for each dimension, the last dimension changing fastest.

    Raises:
        SpecError: a dimension without values, with one twice or below 1; or more than :data:`MOST_SIZES` sizes.
    """
    choices = []
    for name, given in dims.items():
        values = (given,) if isinstance(given, int) else tuple(given)
        if not values or len(set(values)) < len(values) or not all(isinstance(v, int) and v > 0 for v in values):
            raise SpecError(f"dim {name}", "sizes from 1 on, each once", ", ".join(map(str, values)) or "none")
        choices.append(values)
    found = [dict(zip(dims, values, strict=True)) for values in itertools.product(*choices)]
    if len(found) > MOST_SIZES:
        raise SpecError("dims", f"at most {MOST_SIZES} sizes in one library", len(found))
    return found


def labels_of(sizes: Sequence[Mapping[str, int]]) -> list[str]:
    """What tells sizes apart, as a part of a C identifier: ``N4_H224``, of the dimensions that differ."""
    differing = [name for name in sizes[0] if len({size[name] for size in sizes}) > 1]
    labels = ["_".join(f"{_plain(name)}{size[name]}" for name in differing) for size in sizes]
    return labels if len(set(labels)) == len(sizes) else [f"size{number}" for number in range(len(sizes))]


class Shared:
    """Graphs of one model at several sizes, whose weights are in memory once."""

    def __init__(self) -> None:
        self._known: dict[bytes, F32] = {}

    def take(self, graph: Graph) -> Graph:
        """The graph with the arrays of an earlier one where they are alike."""
        graph.constants = self._arrays(graph.constants)
        graph.nodes = [
            replace(node, parameters=self._arrays(node.parameters)) if isinstance(node, Convolution) else node
            for node in graph.nodes
        ]
        return graph

    def _arrays(self, arrays: Mapping[str, F32]) -> dict[str, F32]:
        return {name: self._known.setdefault(_digest(array), array) for name, array in arrays.items()}


def _digest(array: F32) -> bytes:
    digest = hashlib.sha256(repr((array.shape, array.dtype.str)).encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name, flags=re.ASCII).strip("_") or "dim"
