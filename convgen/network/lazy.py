"""What an operator between convolutions is to what computes it: tensors by their elements, and how these are computed.

A :class:`Lazy` tensor is a shape and a function from a logical index to an expression: whatever layout its elements lie
in, and whether it lies in memory at all. So chains of operators are one expression, and every operator reads and writes
every layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..deferred import tirx
from ..lowering.compute import ACCUMULATOR, Expr, Index
from .graph import ROW_MAJOR, Attributes, Shape

#: Neighbours that are computed side by side: as many as the widest vector has.
BLOCK = 16
#: The least number there is: what a maximum begins with.
LOWEST = -math.inf


@dataclass(frozen=True)
class Lazy:
    """A tensor by its elements.

    Attributes:
        shape: logical.
        at: the element at a logical index.
        scalar: its value, where it is a constant of one element.
    """

    shape: Shape
    at: Callable[[Index], Expr]
    scalar: float | None = None

    def broadcast(self, index: Index) -> Expr:
        """The element that stands at an index of a larger tensor."""
        own = index[len(index) - len(self.shape) :]
        return self.at([0 if size == 1 else i for i, size in zip(own, self.shape, strict=True)])


@dataclass(frozen=True)
class Operation:
    """One operator with its operands, as what computes it sees it; the layout that it is computed in."""

    attributes: Attributes
    operands: Sequence[Lazy]
    shape: Shape
    layout: str = ROW_MAJOR

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]


class Stage(Protocol):
    """Gives a tensor that is computed beforehand, from its shape and its elements; ``lanes`` of its last axis alike."""

    def __call__(self, shape: Shape, at: Callable[..., Expr], lanes: bool = False) -> Lazy: ...


#: The element at an index; what is to be computed beforehand by stages.
Formula = Callable[[Operation, Stage], Callable[[Index], Expr]]


@dataclass(frozen=True)
class Kind:
    """How an operator computes.

    Attributes:
        formula: gives its elements.
        reduces: whether an element is a sum or maximum over many, which must stand alone in a tensor expression.
        elementwise: whether an element depends on the elements at its own index only.
        moves: whether elements are those of operands, each read at most once.
        lanes: along which axes neighbours are computed alike, without a condition that only some meet, from neighbours:
            ``channels``, what is innermost in row-major order (``rows``), or ``any``; empty where along neither;
            ``blocks`` along channels where these are whole blocks.
    """

    formula: Formula
    reduces: bool = False
    elementwise: bool = False
    moves: bool = False
    lanes: str = ""


def const(value: float) -> Expr:
    return tirx.const(value, ACCUMULATOR)
