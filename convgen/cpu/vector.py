"""Statements written by hand, for schedules that place every vector themselves (``te.extern``).

A vector is a TVM expression of several lanes. What TVM's vectoriser cannot say is here: loads and
stores with a mask, lanes shifted in from zero, strided reads by shuffles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from tvm import te, tirx

from ..lowering.compute import ACCUMULATOR, STORAGE, STORED, Expr, Operands, epilogue, narrow, of_lanes, unflat, widen
from ..lowering.schedule import Program
from ..problem.spec import ConvSpec

#: Numbers of 128 bits: what most shuffles of longer vectors stay within.
PIECE = 4


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
        residual = rest.pop(0) if spec.residual else None
        return kernel(src, residual, dict(zip(names, rest, strict=True)), outs[0])

    taken = [*(o.tensor for o in (ops.src, ops.residual) if o is not None), *inputs]
    dtype, buffers = STORAGE[spec.dtype], {}
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

    def buffer(self, shape: Sequence[int]) -> Any:
        """Scratch memory of f32."""
        buffer = tirx.decl_buffer(shape, ACCUMULATOR, "scratch")
        self.add(tirx.AllocBuffer(buffer))
        return buffer

    def registers(self, keys: Sequence[Any], lanes: int) -> Registers:
        """Vectors of sums, at zero, that a loop may add to."""
        return Registers(self, keys, lanes)

    def statement(self) -> Any:
        if not self._statements:
            return tirx.Evaluate(tirx.const(0, "int32"))
        return self._statements[0] if len(self._statements) == 1 else tirx.SeqStmt(self._statements)


class Registers:
    """Vectors that change: a buffer each. TVM puts what has less than 1 KiB (and the scope `global`) on the stack,
    from where LLVM takes it into registers; in workspace, masked loads might read it.
    """

    def __init__(self, block: Block, keys: Sequence[Any], lanes: int) -> None:
        self.keys, self.lanes, self._row = tuple(keys), lanes, _row([0], lanes)
        self._buffers = {key: block.buffer((lanes,)) for key in keys}
        for buffer in self._buffers.values():
            block.add(tirx.BufferStore(buffer, zeros(lanes), self._row))

    def __getitem__(self, key: Any) -> Expr:
        return tirx.BufferLoad(self._buffers[key], self._row)

    def add(self, block: Block, key: Any, value: Expr) -> None:
        block.add(tirx.BufferStore(self._buffers[key], self[key] + value, self._row))


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


def _masked_load(buffer: Any, dtype: str, index: Sequence[Expr], lanes: int, mask: Expr) -> Expr:
    stored = of_lanes(STORAGE[dtype], lanes)
    nothing = tirx.Broadcast(tirx.const(0, STORAGE[dtype]), lanes)
    return tirx.call_llvm_intrin(stored, "llvm.masked.load", tirx.address_of(_element(buffer, index)), mask, nothing)


def _masked_store(buffer: Any, index: Sequence[Expr], value: Expr, mask: Expr) -> Any:
    pointer = tirx.address_of(_element(buffer, index))
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.masked.store", value, pointer, mask))


def load(buffer: Any, dtype: str, index: Sequence[Expr], lanes: int, count: int, shift: int = 0) -> Expr:
    """``lanes`` numbers stored as ``dtype``, as f32: ``shift`` zeros, ``count`` elements, then zeros again.

    Nothing but the elements from ``index`` on is read. ``index`` is that of an element there is, unless ``count`` is 0.
    """
    if count <= 0:
        return zeros(lanes)
    if count >= lanes:
        value = _element(buffer, _row(index, lanes))
    else:
        value = _masked_load(buffer, dtype, index, lanes, _first(count, lanes))
    value = widen(value, dtype, lanes)
    if shift == 0:
        return value
    return tirx.Shuffle([zeros(lanes), value], [lanes - shift + i for i in range(lanes)])


def store(buffer: Any, dtype: str, index: Sequence[Expr], value: Expr, lanes: int, count: int) -> Any:
    """The statement that writes the first ``count`` of ``lanes`` f32 numbers as ``dtype`` from ``index`` on.

    Of short vectors in pieces: where masks are vectors too (AVX2), a store with one takes as long as many without.
    """
    value = narrow(value, dtype, lanes)
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
    """What :func:`finish` takes of ``count`` channels from one on, from vectors ``[oc]``, as they are stored."""
    return {name: block.let(load(p, STORED[str(p.dtype)], [channel], lanes, count)) for name, p in _vectors(parameters)}


def spread_parameters(block: Block, parameters: Mapping[str, Any], channel: Expr, lanes: int) -> dict[str, Expr]:
    """What :func:`finish` takes of one channel, in all lanes."""
    return {name: block.let(tirx.Broadcast(p[channel], lanes)) for name, p in _vectors(parameters)}


def _vectors(parameters: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those of the parameters that have a number for each channel: packed weights may be among them."""
    return [(name, p) for name, p in parameters.items() if name != "weights"]


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
    buffer: Any, dtype: str, index: Sequence[Expr], value: Expr, lanes: int, count: int, *, size: Expr | None = None
) -> Any:
    """The statement that writes those of the first ``count`` lanes that lie in the buffer's last axis, or in its first
    ``size``.
    """
    return _masked_store(buffer, index, narrow(value, dtype, lanes), _within(buffer, index, lanes, count, size))


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
    **given: Expr,
) -> None:
    """The epilogue of a vector of sums, and its store in the first ``count`` elements of dst from ``place`` on.

    ``given`` is the bias, slope and scale there are, as vectors. ``within``: ``place`` may lie anywhere along the last
    axis; only what lies in it is stored, or in its first ``size``.
    """
    read, write = (partial(load_within, size=size), partial(store_within, size=size)) if within else (load, store)
    more = None if residual is None else read(residual, spec.dtype, place, lanes, count)
    result = epilogue(spec, value, residual=more, **given, lanes=lanes)
    if spec.dtype == "f32" and count < lanes:  # it may be stored in pieces
        result = block.let(result)
    block.add(write(dst, spec.dtype, place, result, lanes, count))


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


@contextmanager
def subsampled(block: Block, spec: ConvSpec, src: Any, lanes: int) -> Iterator[tuple[Block, int, Expr, Any, str]]:
    """The pixels that a 1×1 kernel reads: ``(block, images, first, pixels, dtype)``.

    In ``block`` there are so many ``images`` from ``first`` on, as ``pixels`` ``[images, ic, pixels]`` stored as
    ``dtype``. At stride 1 all of ``src``. Else an image at a time, a copy in f32, made in parallel over the
    channels: most of what is read with a stride is skipped, and every block of output channels would skip it again.
    """
    if spec.is_pointwise:
        yield block, spec.n, 0, src, spec.dtype
        return
    with block.loop(spec.n) as (image, n):
        yield image, 1, n, _subsampled(image, spec, src, n, lanes), "f32"


def _subsampled(block: Block, spec: ConvSpec, src: Any, n: Expr, lanes: int) -> Any:
    """The copy of an image."""
    *rows, width = spec.out_spatial
    columns = Columns(spec, lanes, 1)
    # Whole vectors, overwritten by the next row: TVM shrinks a buffer to what it sees accessed, and of a masked
    # store it sees the first element.
    copy = block.buffer((1, spec.ic, math.prod(rows) * width + lanes))
    with block.loop(spec.ic, parallel=True) as (plane, c), plane.loop(math.prod(rows)) as (row, y):
        where = [row.let(p * s) for p, s in zip(unflat(y, rows), spec.stride, strict=False)]
        for start, count, tile in columns.runs:
            with row.loop(count) as (one, j):
                x0 = one.let((start + j) * lanes)

                def read(offset: int, stored: int, shift: int, x0: Expr = x0) -> Expr:
                    return load(src, spec.dtype, [n, c, *where, x0 * spec.stride[-1] + offset], lanes, stored, shift)

                taps, place = Taps(one, columns, tile, read), [0, c, y * width + x0]
                value = zeros(lanes) if taps[0, 0] is None else columns.in_order(taps[0, 0])
                one.add(store(copy, "f32", place, value, lanes, lanes))
    return copy


def runs(patterns: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """Neighbours that are equal, as one: ``(first, count, pattern)``."""
    found: list[tuple[int, int, Any]] = []
    for index, pattern in enumerate(patterns):
        if found and found[-1][2] == pattern:
            found[-1] = (found[-1][0], found[-1][1] + 1, pattern)
        else:
            found.append((index, 1, pattern))
    return found


class Columns:
    """A row of output pixels as tiles of ``vectors`` vectors, and what of the input row each tile meets.

    ``runs`` lists runs of equal tiles. A tile maps ``("stored", v)`` to the pixels of its v-th vector that there are,
    and ``(v, group, j)`` to what :func:`load` needs to know of the load ``offset(v, group, j)`` elements past the
    tile's first: how many lanes lie left of the image, and how many elements follow.
    """

    def __init__(self, spec: ConvSpec, lanes: int, vectors: int) -> None:
        self.lanes, self.vectors, self.step = lanes, vectors, lanes * vectors
        self.kernel, self.stride, self.dilation = spec.kernel[-1], spec.stride[-1], spec.dilation[-1]
        self._begin, self._size, self._out = spec.padding[-1][0], spec.in_spatial[-1], spec.out_spatial[-1]
        self.runs = self._runs()

    def _runs(self) -> list[tuple[int, int, Any]]:
        """In a time that does not depend on the width: those in the middle meet nothing but image."""
        advance, furthest = self.step * self.stride, (self.kernel - 1) * self.dilation // self.stride
        count = -(-self._out // self.step)
        start = min(count, -(-self._begin // advance))
        reach = self.offset(self.vectors - 1, furthest, self.stride - 1) + self.lanes
        end = max(start, min(self._out // self.step, (self._size - reach) // advance + 1))
        left, right = (runs([self._tile(i * self.step) for i in edge]) for edge in (range(start), range(end, count)))
        middle = [(start, end - start, self._tile(start * self.step))] if end > start else []
        return [*left, *middle, *((first + end, times, tile) for first, times, tile in right)]

    def offset(self, v: int, group: int, j: int) -> int:
        return (v * self.stride + j) * self.lanes + group * self.stride - self._begin

    @property
    def crossed(self) -> bool:
        """Whether each piece of a vector has pixels of both vectors that were loaded for it: that takes one of AVX2's
        instructions, and two where pixels follow each other.
        """
        return self.lanes == 2 * PIECE and self.stride == 2

    def in_order(self, value: Expr) -> Expr:
        """A vector of the same pixels, one after another, from sums of what :class:`Taps` reads."""
        return tirx.Shuffle([value], [0, 1, 4, 5, 2, 3, 6, 7]) if self.crossed else value

    def _tile(self, x0: int) -> dict[Any, Any]:
        lanes, tile = self.lanes, dict[Any, Any]()
        groups = {kx * self.dilation // self.stride for kx in range(self.kernel)}
        for v in range(self.vectors):
            tile["stored", v] = min(lanes, self._out - x0 - v * lanes)
            for group in groups:
                for j in range(self.stride):
                    x = x0 * self.stride + self.offset(v, group, j)
                    shift = min(lanes, max(0, -x))
                    tile[v, group, j] = (shift, max(0, min(lanes - shift, self._size - x - shift)))
        return tile


class Taps:
    """What the taps of a row read, as vectors: loaded, and where there is a stride shuffled apart, once each.

    ``read(offset, count, shift)`` is the :func:`load` of a vector that lies ``offset`` past the tile's first element.
    Sums of them are :meth:`Columns.in_order`.
    """

    def __init__(self, block: Block, columns: Columns, tile: dict[Any, Any], read: Callable[[int, int, int], Expr]):
        self._block, self._columns, self._tile, self._read = block, columns, tile, read
        self._found: dict[Any, Expr | None] = {}

    def __getitem__(self, key: tuple[int, int]) -> Expr | None:
        """The input of tap kx for the v-th vector; None where all of it is padding."""
        v, kx = key
        group, phase = divmod(kx * self._columns.dilation, self._columns.stride)
        return self._every(self._columns.stride, phase, 0, v, group)

    def _every(self, step: int, phase: int, j: int, v: int, group: int) -> Expr | None:
        """The j-th vector of every step-th element, by halves where that goes: they are shared by phases."""
        key = (step, phase, j, v, group)
        if key not in self._found:
            value = self._load(v, group, j) if step == 1 else self._shuffled(step, phase, j, v, group)
            self._found[key] = None if value is None else self._block.let(value)
        return self._found[key]

    def _load(self, v: int, group: int, j: int) -> Expr | None:
        shift, count = self._tile[v, group, j]
        return self._read(self._columns.offset(v, group, j) + shift, count, shift) if count > 0 else None

    def _shuffled(self, step: int, phase: int, j: int, v: int, group: int) -> Expr | None:
        lanes, ways = self._columns.lanes, 2 if step % 2 == 0 else step
        outer, inner = divmod(phase, step // ways)
        parts = [self._every(step // ways, inner, j * ways + i, v, group) for i in range(ways)]
        if all(part is None for part in parts):
            return None
        parts = [zeros(lanes) if part is None else part for part in parts]
        if self._columns.crossed:
            order = [v * lanes + start + outer + i for start in (0, PIECE) for v in range(2) for i in (0, 2)]
            return tirx.Shuffle(parts, order)
        return tirx.Shuffle(parts, [outer + i * ways for i in range(lanes)])
