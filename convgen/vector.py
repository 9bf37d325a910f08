"""Statements written by hand, for schedules that place every vector themselves (``te.extern``).

A vector is a TVM expression of several lanes. What TVM's vectoriser cannot say is here: loads and
stores with a mask, lanes shifted in from zero, strided reads by shuffles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx

from .compute import ACCUMULATOR, STORAGE, Expr, narrow, of_lanes, widen


class Block:
    """Statements in the making, in order."""

    def __init__(self) -> None:
        self._statements: list[Any] = []

    def add(self, statement: Any) -> None:
        self._statements.append(statement)

    def let(self, value: Expr) -> Expr:
        """A variable with this value; numbers stay numbers."""
        if isinstance(value, int):
            return value
        var = tirx.Var("v", value.dtype if hasattr(value, "dtype") else value.ty)
        self.add(tirx.Bind(var, value))
        return var

    @contextmanager
    def loop(self, extent: int, *, parallel: bool = False) -> Iterator[tuple[Block, Expr]]:
        """The body of a loop and its variable; a loop of one pass is its body."""
        inner = Block()
        if extent == 1 and not parallel:
            yield self, 0
            return
        var = tirx.Var("i", "int32")
        yield inner, var
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        self.add(tirx.For(var, tirx.const(0, "int32"), tirx.const(extent, "int32"), kind, inner.statement()))

    @contextmanager
    def when(self, condition: Expr) -> Iterator[Block]:
        """The statements of a condition."""
        inner = Block()
        yield inner
        self.add(tirx.IfThenElse(condition, inner.statement(), None))

    def statement(self) -> Any:
        return self._statements[0] if len(self._statements) == 1 else tirx.SeqStmt(self._statements)


def zeros(lanes: int) -> Expr:
    return tirx.Broadcast(tirx.const(0.0, ACCUMULATOR), lanes)


def _element(buffer: Any, index: Sequence[Expr]) -> Expr:
    return tirx.BufferLoad(buffer, [tirx.const(i, "int32") if isinstance(i, int) else i for i in index])


def _row(index: Sequence[Expr], lanes: int) -> list[Expr]:
    *outer, x = index
    start = tirx.const(x, "int32") if isinstance(x, int) else x
    return [*outer, tirx.Ramp(start, tirx.const(1, "int32"), lanes)]


def _first(count: int, lanes: int) -> Expr:
    """The mask of the first ``count`` lanes."""
    ramp = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)
    return ramp < tirx.Broadcast(tirx.const(count, "int32"), lanes)


def load(buffer: Any, dtype: str, index: Sequence[Expr], lanes: int, count: int, shift: int = 0) -> Expr:
    """``lanes`` numbers stored as ``dtype``, as f32: ``shift`` zeros, ``count`` elements, then zeros again.

    Nothing but the elements from ``index`` on is read. ``index`` is that of an element there is, unless ``count`` is 0.
    """
    if count <= 0:
        return zeros(lanes)
    if count >= lanes:
        value = _element(buffer, _row(index, lanes))
    else:
        pointer, mask = tirx.address_of(_element(buffer, index)), _first(count, lanes)
        stored = of_lanes(STORAGE[dtype], lanes)
        nothing = tirx.Broadcast(tirx.const(0, STORAGE[dtype]), lanes)
        value = tirx.call_llvm_intrin(stored, "llvm.masked.load", pointer, mask, nothing)
    value = widen(value, dtype, lanes)
    if shift == 0:
        return value
    return tirx.Shuffle([zeros(lanes), value], [lanes - shift + i for i in range(lanes)])


def store(buffer: Any, dtype: str, index: Sequence[Expr], value: Expr, lanes: int, count: int) -> Any:
    """The statement that writes the first ``count`` of ``lanes`` f32 numbers as ``dtype`` from ``index`` on."""
    value = narrow(value, dtype, lanes)
    if count >= lanes:
        return tirx.BufferStore(buffer, value, _row(index, lanes))
    pointer, mask = tirx.address_of(_element(buffer, index)), _first(count, lanes)
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.masked.store", value, pointer, mask))


def runs(patterns: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """Neighbours that are equal, as one: ``(first, count, pattern)``."""
    found: list[tuple[int, int, Any]] = []
    for index, pattern in enumerate(patterns):
        if found and found[-1][2] == pattern:
            found[-1] = (found[-1][0], found[-1][1] + 1, pattern)
        else:
            found.append((index, 1, pattern))
    return found
