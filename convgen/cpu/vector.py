"""Statements written by hand, for schedules that place every vector themselves (``te.extern``).

A vector is a TVM expression of several lanes. What TVM's vectoriser cannot say is here: loads and
stores with a mask, lanes shifted in from zero, strided reads by shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..deferred import te, tirx
from ..lowering.compute import (
    ACCUMULATOR,
    INTEGER,
    STORAGE,
    STORED,
    Expr,
    Operands,
    epilogue,
    narrow,
    of_lanes,
    widen,
)
from ..lowering.requantise import requantise
from ..lowering.schedule import Program
from ..problem.dtypes import RANGES
from ..problem.spec import SUM, ConvSpec

#: TVM's types of numbers that are stored as the lowest bits of integers of 32.
_NARROWED = tuple(STORAGE[dtype] for dtype in ("i8", "u8", "bf16"))
#: Numbers of 128 bits: what most shuffles of longer vectors stay within.
PIECE = 4
#: What makes of a vector of f32 one of a storage type, as :func:`~convgen.lowering.compute.narrow` does.
Narrow = Callable[[Expr, str, int], Expr]


def written(ops: Operands, packed: Sequence[te.Tensor], kernel: Callable[..., Any], *, offsets: bool = True) -> Program:
    """The program whose main function is ``kernel(src, residual, parameters, dst)``, a statement.

    Its arguments are buffers; ``residual`` is None where there is none, ``parameters`` the packed
    tensors by name, without ``_packed``. ``offsets``: buffers may start elsewhere than where they point; a
    GPU's functions take pointers alone.
    """
    spec = ops.spec
    inputs = [te.placeholder(p.shape, p.dtype, f"{p.op.name}_in") for p in packed]
    names = [p.op.name.removesuffix("_packed") for p in packed]

    def body(ins: Sequence[Any], outs: Sequence[Any]) -> Any:
        src, *rest = ins
        residual = rest.pop(0) if ops.residual is not None else None
        return kernel(src, residual, dict(zip(names, rest, strict=True)), outs[0])

    taken = [*(o.tensor for o in (ops.src, ops.residual) if o is not None), *inputs]
    dtype, buffers = STORAGE[spec.dst_dtype], {}
    if not offsets:
        buffers["in_buffers"] = [tirx.decl_buffer(t.shape, t.dtype, t.op.name) for t in taken]
        buffers["out_buffers"] = [tirx.decl_buffer(spec.dst_shape, dtype, "dst")]
    dst = te.extern(spec.dst_shape, taken, body, name="dst", dtype=dtype, **buffers)
    return Program(pack=ops.pack(*packed), main=ops.main(inputs, dst))


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
    def loop(self, extent: Expr, *, parallel: bool = False) -> Iterator[tuple[Block, Expr]]:
        """The body of a loop and its variable; a loop of one pass is its body."""
        inner = Block()
        if isinstance(extent, int) and extent == 1 and not parallel:
            yield self, 0
            return
        var = tirx.Var("i", "int32")
        yield inner, var
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        end = tirx.const(extent, "int32") if isinstance(extent, int) else extent
        self.add(tirx.For(var, tirx.const(0, "int32"), end, kind, inner.statement()))

    @contextmanager
    def when(self, condition: Expr) -> Iterator[Block]:
        """The statements of a condition, which may be known."""
        inner = Block()
        yield inner
        if isinstance(condition, bool):
            if condition:
                self._statements += inner._statements
            return
        self.add(tirx.IfThenElse(condition, inner.statement(), None))

    def cases(self, index: Expr, whole: int, pattern: Any, rest: Any) -> Iterator[tuple[Block, Any]]:
        """Code for ``index < whole`` with one pattern, and for ``index == whole`` with what rest there is."""
        for condition, found in ((index < whole, pattern if whole else None), (index == whole, rest)):
            if found:
                with self.when(condition) as branch:
                    yield branch, found

    def buffer(self, shape: Sequence[int], dtype: str = ACCUMULATOR, *, addressed: bool = False) -> Any:
        """Scratch memory, of f32 or of another of TVM's types.

        ``addressed``: instructions get addresses in it. TVM cuts a buffer to what it sees read and written, so its ends
        are written.
        """
        buffer = tirx.decl_buffer(shape, dtype, "scratch")
        self.add(tirx.AllocBuffer(buffer))
        for ends in ([0] * len(shape), [size - 1 for size in shape]) if addressed else ():
            self.add(tirx.BufferStore(buffer, tirx.const(0, dtype), [tirx.const(i, "int32") for i in ends]))
        return buffer

    def registers(self, keys: Sequence[Any], lanes: int, dtype: str = ACCUMULATOR) -> Registers:
        """Vectors of sums, at zero, that a loop may add to."""
        return Registers(self, keys, lanes, dtype)

    def statement(self) -> Any:
        if not self._statements:
            return tirx.Evaluate(tirx.const(0, "int32"))
        return self._statements[0] if len(self._statements) == 1 else tirx.SeqStmt(self._statements)


class Registers:
    """Vectors that change: a buffer each. TVM puts what has less than 1 KiB (and the scope `global`) on the stack,
    from where LLVM takes it into registers; in workspace, masked loads might read it.
    """

    def __init__(self, block: Block, keys: Sequence[Any], lanes: int, dtype: str = ACCUMULATOR) -> None:
        self.keys, self.lanes, self._row = tuple(keys), lanes, _row([0], lanes)
        self._buffers = {key: block.buffer((lanes,), dtype) for key in keys}
        for key in keys:
            self.put(block, key, zeros(lanes, dtype))

    def __getitem__(self, key: Any) -> Expr:
        return tirx.BufferLoad(self._buffers[key], self._row)

    def put(self, block: Block, key: Any, value: Expr) -> None:
        block.add(tirx.BufferStore(self._buffers[key], value, self._row))

    def add(self, block: Block, key: Any, value: Expr) -> None:
        self.put(block, key, self[key] + value)


def zeros(lanes: int, dtype: str = ACCUMULATOR) -> Expr:
    return tirx.Broadcast(tirx.const(0, dtype), lanes)


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


def _masked_load(buffer: Any, dtype: str, index: Sequence[Expr], lanes: int, mask: Expr) -> Expr:
    stored = of_lanes(STORAGE[dtype], lanes)
    nothing = tirx.Broadcast(tirx.const(0, STORAGE[dtype]), lanes)
    return tirx.call_llvm_intrin(stored, "llvm.masked.load", tirx.address_of(_element(buffer, index)), mask, nothing)


def _masked_store(buffer: Any, index: Sequence[Expr], value: Expr, mask: Expr) -> Any:
    """The statement that writes those of a vector's lanes that a mask has.

    LLVM 22 compiles a masked store of integers narrowed from 32 bits, its mask a constant with one lane, to a store of
    32 bits: bytes too many. So it is kept from seeing that they were narrowed.
    """
    dtype = value.ty.dtype
    if str(buffer.dtype) in _NARROWED:
        as_floats = of_lanes(ACCUMULATOR, dtype.lanes * dtype.bits // 32)
        fenced = tirx.call_llvm_intrin(as_floats, "llvm.arithmetic.fence", tirx.reinterpret(as_floats, value))
        value = tirx.reinterpret(str(dtype), fenced)
    pointer = tirx.address_of(_element(buffer, index))
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.masked.store", value, pointer, mask))


def load(buffer: Any, dtype: str, index: Sequence[Expr], lanes: int, count: int, shift: int = 0) -> Expr:
    """``lanes`` numbers stored as ``dtype``, as f32: ``shift`` zeros, ``count`` elements, then zeros again.

    Nothing but the elements from ``index`` on is read. ``index`` is that of an element there is, unless ``count`` is 0.
    """
    if count <= 0:
        return zeros(lanes)
    value = widen(load_stored(buffer, dtype, index, lanes, count), dtype, lanes)
    if shift == 0:
        return value
    return tirx.Shuffle([zeros(lanes), value], [lanes - shift + i for i in range(lanes)])


def load_stored(buffer: Any, dtype: str, index: Sequence[Expr], lanes: int, count: int) -> Expr:
    """The same as it is stored: ``count`` elements from ``index`` on, one at least, then zeros."""
    if count >= lanes:
        return _element(buffer, _row(index, lanes))
    return _masked_load(buffer, dtype, index, lanes, _first(count, lanes))


def store(
    buffer: Any, dtype: str, index: Sequence[Expr], value: Expr, lanes: int, count: int, narrowed: Narrow = narrow
) -> Any:
    """The statement that writes the first ``count`` of ``lanes`` f32 numbers as ``dtype`` from ``index`` on.

    Of short vectors in pieces: where masks are vectors too (AVX2), a store with one takes as long as many without.
    """
    return store_stored(buffer, dtype, index, narrowed(value, dtype, lanes), lanes, count)


def store_stored(buffer: Any, dtype: str, index: Sequence[Expr], value: Expr, lanes: int, count: int) -> Any:
    """The same of numbers that are of the type already."""
    if count >= lanes:
        return tirx.BufferStore(buffer, value, _row(index, lanes))
    if dtype == "f32" and lanes <= 8:
        *outer, x = index
        pieces = Block()
        for size in (4, 2, 1):
            if count & size:
                at = count & -(2 * size)
                part = tirx.Shuffle([value], list(range(at, at + size)))
                place = _row([*outer, x + at], size) if size > 1 else [*outer, x + at]
                pieces.add(tirx.BufferStore(buffer, part, place))
        return pieces.statement()
    return _masked_store(buffer, index, value, _first(count, lanes))


def load_parameters(
    block: Block, parameters: Mapping[str, Any], channel: Expr, lanes: int, count: int
) -> dict[str, Expr]:
    """What :func:`finish` takes of ``count`` channels from one on, from vectors ``[oc]``, as they are stored; or from
    the single number of all channels.
    """
    given = {
        name: block.let(load(p, STORED[str(p.dtype)], [channel], lanes, count)) for name, p in _vectors(parameters)
    }
    return given | _of_all(block, parameters, lanes)


def spread_parameters(block: Block, parameters: Mapping[str, Any], channel: Expr, lanes: int) -> dict[str, Expr]:
    """What :func:`finish` takes of one channel, in all lanes."""
    given = {name: block.let(tirx.Broadcast(p[channel], lanes)) for name, p in _vectors(parameters)}
    return given | _of_all(block, parameters, lanes)


def _vectors(parameters: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those of the parameters that the epilogue takes of channels: packed weights, and what sums start at, may be among
    them.
    """
    return [(name, p) for name, p in parameters.items() if name in ("bias", "slope", "scale")]


def _of_all(block: Block, parameters: Mapping[str, Any], lanes: int) -> dict[str, Expr]:
    """Those numbers of the parameters that the epilogue takes of all channels, in all lanes."""
    numbers = {"dst_zero": parameters["dst_zero"][0].astype(INTEGER)} if "dst_zero" in parameters else {}
    if "sum" in parameters:
        numbers |= {name: parameters["sum"][i] for i, name in enumerate(SUM)}
    return {name: block.let(tirx.Broadcast(number, lanes)) for name, number in numbers.items()}


def _within(buffer: Any, index: Sequence[Expr], lanes: int, count: int, size: Expr | None = None) -> Expr:
    """The mask of those of the first ``count`` lanes that lie in the buffer's last axis, or in its first ``size``."""
    ramp = tirx.Ramp(index[-1], tirx.const(1, "int32"), lanes)
    size = int(buffer.shape[-1]) if size is None else size
    end = tirx.Broadcast(tirx.const(size, "int32") if isinstance(size, int) else size, lanes)
    mask = tirx.And(ramp >= tirx.Broadcast(tirx.const(0, "int32"), lanes), ramp < end)
    return mask if count >= lanes else tirx.And(mask, _first(count, lanes))


def load_within(
    buffer: Any, dtype: str, index: Sequence[Expr], lanes: int, count: int, *, size: Expr | None = None
) -> Expr:
    """As :func:`load`, from an ``index`` that may lie anywhere along the last axis; zeros outside it.

    ``size``: elements that count as the last axis; more than it has go on in the next ones.
    """
    mask = _within(buffer, index, lanes, count, size)
    return widen(_masked_load(buffer, dtype, index, lanes, mask), dtype, lanes)


def store_within(
    buffer: Any,
    dtype: str,
    index: Sequence[Expr],
    value: Expr,
    lanes: int,
    count: int,
    narrowed: Narrow = narrow,
    *,
    size: Expr | None = None,
) -> Any:
    """The statement that writes those of the first ``count`` lanes that lie in the buffer's last axis, or in its first
    ``size``.
    """
    return _masked_store(buffer, index, narrowed(value, dtype, lanes), _within(buffer, index, lanes, count, size))


def finish(
    block: Block,
    spec: ConvSpec,
    dst: Any,
    residual: Any,
    place: Sequence[Expr],
    value: Expr,
    lanes: int,
    count: int,
    *,
    within: bool = False,
    size: Expr | None = None,
    narrowed: Narrow = narrow,
    **given: Expr,
) -> None:
    """The epilogue of a vector of sums, and its store in the first ``count`` elements of dst from ``place`` on.

    ``given`` is the bias, slope, scale, dst's zero point and what a residual's sum takes, as vectors. ``within``:
    ``place`` may lie anywhere along the last axis; only what lies in it is stored, or in its first ``size``.
    ``narrowed`` makes of f32 what is stored.
    """
    read, write = (partial(load_within, size=size), partial(store_within, size=size)) if within else (load, store)
    more = None if residual is None else read(residual, spec.residual_dtype, place, lanes, count)
    if spec.is_quantised:
        result, dtype = requantise(spec, value, residual=more, **given, lanes=lanes), spec.dst_dtype
        if dtype in RANGES and within:
            block.add(_masked_store(dst, place, result, _within(dst, place, lanes, count, size)))
            return
        if dtype in RANGES:
            block.add(store_stored(dst, dtype, place, result, lanes, count))
            return
    else:
        result, dtype = epilogue(spec, value, residual=more, **given, lanes=lanes), spec.dtype
    if dtype == "f32" and count < lanes:  # it may be stored in pieces
        result = block.let(result)
    block.add(write(dst, dtype, place, result, lanes, count, narrowed))


def weighted_sum(terms: Iterable[tuple[Any, Expr]]) -> Expr:
    """The sum of constant coefficients times values, ``(coefficient, value)`` each, in this order, without those of 0.

    None where no other is left.
    """
    total: Expr = None
    for c, value in terms:
        if not c:
            continue
        size = value if abs(c) == 1 else value * _constant(abs(c), value)
        if total is None:
            total = size if c > 0 else _constant(0, value) - size
        else:
            total = total + size if c > 0 else total - size
    return total


def _constant(c: Any, like: Expr) -> Expr:
    """A number in as many lanes as another value has, which may be one."""
    number, lanes = tirx.const(float(c), ACCUMULATOR), like.ty.dtype.lanes
    return number if lanes == 1 else tirx.Broadcast(number, lanes)


def gathered(vectors: Sequence[Expr], order: Sequence[int], lanes: int) -> Expr:
    """A vector of the elements that ``order`` numbers, of all the vectors one after another."""
    used = sorted({e // lanes for e in order})
    at = {vector: i for i, vector in enumerate(used)}
    return tirx.Shuffle([vectors[v] for v in used], [at[e // lanes] * lanes + e % lanes for e in order])


def permuted(value: Expr, index: Expr, lanes: int) -> Expr:
    """The vector whose elements are those of a vector of 8 or 16 f32 that an index vector numbers.

    The instruction itself: of a constant index, LLVM makes two shuffles where that saves a register.
    """
    name = {8: "llvm.x86.avx2.permps", 16: "llvm.x86.avx512.permvar.sf.512"}[lanes]
    return tirx.call_llvm_intrin(of_lanes(ACCUMULATOR, lanes), name, value, index)


def prefetch(buffer: Any, index: Sequence[Expr], *, level: int = 1) -> Any:
    """The statement that fetches an element's cache line ahead, to the cache of a level; it may lie past the end."""
    read, keep, data = (tirx.const(i, "int32") for i in (0, 4 - level, 1))
    return tirx.Evaluate(
        tirx.call_llvm_intrin("void", "llvm.prefetch", tirx.address_of(_element(buffer, index)), read, keep, data)
    )


def interleave(block: Block, vectors: Sequence[Expr], lanes: int) -> list[Expr]:
    """As many vectors: the first element of each, then the second of each, and so on."""
    if lanes != 2 * PIECE or len(vectors) not in (2, 4, 8):
        return _interleaved(block, vectors, lanes, lanes)
    # Within pieces, and then whole pieces: one of AVX2's instructions each. What else crosses pieces takes two.
    parts = [_interleaved(block, vectors[i : i + PIECE], lanes, PIECE) for i in range(0, len(vectors), PIECE)]
    made = [vector for row in zip(*parts, strict=True) for vector in row]
    orders = [[v * lanes + half + i for v in range(2) for i in range(PIECE)] for half in (0, PIECE)]
    pairs = list(zip(made[::2], made[1::2], strict=True))
    return [block.let(tirx.Shuffle(pair, order)) for order in orders for pair in pairs]


def _interleaved(block: Block, vectors: Sequence[Expr], lanes: int, piece: int) -> list[Expr]:
    """The same, of each ``piece`` of the vectors; of an odd number, of whole ones."""
    count = len(vectors)
    if count == 1:
        return list(vectors)
    if count % 2:
        order = [e % count * lanes + e // count for e in range(count * lanes)]
        return [block.let(tirx.Shuffle(vectors, order[i : i + lanes])) for i in range(0, count * lanes, lanes)]
    pairs = zip(*(_interleaved(block, part, lanes, piece) for part in (vectors[::2], vectors[1::2])), strict=True)
    orders = [
        [start + first + i // 2 + i % 2 * lanes for start in range(0, lanes, piece) for i in range(piece)]
        for first in (0, piece // 2)
    ]
    return [block.let(tirx.Shuffle(pair, order)) for pair in pairs for order in orders]


def runs(patterns: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """Neighbours that are equal, as one: ``(first, count, pattern)``."""
    found: list[tuple[int, int, Any]] = []
    for index, pattern in enumerate(patterns):
        if found and found[-1][2] == pattern:
            found[-1] = (found[-1][0], found[-1][1] + 1, pattern)
        else:
            found.append((index, 1, pattern))
    return found


def stretches(count: int, start: int, end: int, pattern: Callable[[int], Any]) -> list[tuple[int, int, Any]]:
    """The patterns of ``count`` tiles as :func:`runs`, in a time that does not depend on those from ``start`` to
    ``end``, which are alike.
    """
    left, right = (runs([pattern(i) for i in edge]) for edge in (range(start), range(end, count)))
    middle = [(start, end - start, pattern(start))] if end > start else []
    return [*left, *middle, *((end + first, times, found) for first, times, found in right)]
