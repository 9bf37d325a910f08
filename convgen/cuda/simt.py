"""Matrix products without matrix units, as statements: what the CUDA schedules share.

A thread block computes a tile of one of a batch of products; every thread keeps a part of it in registers, and
slices of both operands pass through shared memory. Where a schedule's first operand comes from, and where the
sums go, it says itself: convolutions are products of patches and weights, transposed ones one for each phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tvm import te, tirx

from ..cpu.vector import Block, zeros
from ..lowering.compute import ACCUMULATOR, STORAGE, Expr, ceildiv, epilogue, narrow, round_up, widen
from ..problem.spec import PARAMETERS, ConvSpec
from .tiles import Size, Tile

#: Elements of an access that is 16 bytes of f32, and 8 of f16 or bf16.
LANES = 4
#: Loads that a thread has under way at once.
MOST_UNROLLED = 8


@contextmanager
def bound(block: Block, extent: int, axis: str) -> Iterator[tuple[Block, Expr]]:
    """The body of a loop over ``blockIdx.x`` or ``threadIdx.x``.

    One over threads within another is all of them too: what threads do together, such as filling shared memory.
    """
    inner, var = Block(), tirx.Var(axis.replace("Idx.", "_"), "int32")
    yield inner, var
    binding = tirx.IterVar(None, var, tirx.IterVar.ThreadIndex, axis)
    kind = tirx.ForKind.THREAD_BINDING
    block.add(tirx.For(var, tirx.const(0, "int32"), tirx.const(extent, "int32"), kind, inner.statement(), binding))


@contextmanager
def unrolled(block: Block, extent: int) -> Iterator[tuple[Block, Expr]]:
    """The body of a loop that the CUDA compiler unrolls, so that arrays it indexes become registers."""
    inner = Block()
    if extent == 1:
        yield block, 0
        return
    var = tirx.Var("u", "int32")
    yield inner, var
    end = tirx.const(extent, "int32")
    by_compiler = {"pragma_unroll_explicit": tirx.const(0, "int32")}  # else TVM writes the passes out
    block.add(
        tirx.For(var, tirx.const(0, "int32"), end, tirx.ForKind.UNROLLED, inner.statement(), annotations=by_compiler)
    )


@contextmanager
def together(block: Block, count: int, threads: int) -> Iterator[tuple[Block, Expr]]:
    """All threads of a block share ``count`` pieces of work, neighbours doing neighbouring ones."""
    rounds = ceildiv(count, threads)
    loop = unrolled if rounds <= MOST_UNROLLED else Block.loop  # more at once would take too many registers
    with bound(block, threads, "threadIdx.x") as (body, thread), loop(body, rounds) as (one, turn):
        piece = one.let(turn * threads + thread)
        if count % threads:
            with one.when(piece < count) as within:
                yield within, piece
        else:
            yield one, piece


def memory(block: Block, shape: Sequence[int], scope: str, name: str, dtype: str = ACCUMULATOR) -> Any:
    """Memory of a scope: ``local`` is registers, ``shared.dyn`` is shared by a thread block."""
    buffer = tirx.decl_buffer(shape, dtype, name, scope=scope)
    block.add(tirx.AllocBuffer(buffer))
    return buffer


def _from(index: Sequence[Expr], lanes: int, stride: int) -> list[Expr]:
    """The index of as many elements of the last axis."""
    full = [tirx.const(i, "int32") if isinstance(i, int) else i for i in index]
    return [*full[:-1], tirx.Ramp(full[-1], tirx.const(stride, "int32"), lanes) if lanes > 1 else full[-1]]


def load(buffer: Any, index: Sequence[Expr], lanes: int = 1) -> Expr:
    return tirx.BufferLoad(buffer, _from(index, lanes, 1))


def put(block: Block, buffer: Any, index: Sequence[Expr], value: Expr, lanes: int = 1, stride: int = 1) -> None:
    block.add(tirx.BufferStore(buffer, value, _from(index, lanes, stride)))


def where(conditions: Sequence[Expr], value: Expr, lanes: int = 1) -> Expr:
    """The f32 value; zero, and not evaluated, where one of the conditions does not hold."""
    if not conditions:
        return value
    zero = zeros(lanes) if lanes > 1 else tirx.const(0, ACCUMULATOR)
    return tirx.if_then_else(tirx.all(*conditions), value, zero)


def all_of(conditions: Sequence[Expr]) -> Expr:
    """Whether all hold, as :meth:`Block.when` takes it."""
    return tirx.all(*conditions) if conditions else True


def read(buffer: Any, dtype: str, index: Sequence[Expr], lanes: int = 1) -> Expr:
    """Elements of a tensor at the user's boundary, as f32."""
    return widen(load(buffer, index, lanes), dtype, lanes)


class Product(NamedTuple):
    """Where the first operand of a batch of products comes from, and where the sums go.

    Attributes:
        fetch: elements of the first operand, zero outside it: ``fetch(block, b, row, start, offset, lanes)`` is
            those from ``(row, start + offset)`` on, along ``vectors``; ``start`` is the same for all threads.
        vectors: the axis along which four of its elements are one access: ``row``, ``depth`` or none.
        store: ``store(block, b, row, column, sums, count)`` takes ``count`` sums, in registers, along a row or
            a column.
        by_row: which of the two.
        piece: how many at once: four where those are one access.
        needed: conditions, the same for all threads, without which a slice from ``needed(b, start)`` on is
            nothing but zeros.
    """

    size: Size
    fetch: Callable[[Block, Expr, Expr, Expr, Expr, int], Expr]
    vectors: str
    store: Callable[[Block, Expr, Expr, Expr, Any, int], None]
    by_row: bool
    piece: int
    needed: Callable[[Expr, Expr], Sequence[Expr]] = lambda b, start: ()


def packed(size: Size, tile: Tile, value: Callable[[Expr, Expr, Expr], Expr]) -> te.Tensor:
    """The second operand ``[batch][depth][columns]``, in whole tiles: zero past its end."""
    shape = (size.batch, round_up(size.depth, tile.tile_k), round_up(size.columns, tile.tile_n))

    def padded(b: Expr, k: Expr, o: Expr) -> Expr:
        inside = [k < size.depth] * (shape[1] != size.depth) + [o < size.columns] * (shape[2] != size.columns)
        return where(inside, value(b, k, o))

    return te.compute(shape, padded, name="weights_packed")


def stores(spec: ConvSpec, columns: int) -> tuple[bool, int]:
    """``by_row`` and ``piece`` of the stores to dst: along its last axis, in vectors where those are whole."""
    by_row = spec.layout == "nhwc"
    return by_row, math.gcd(columns if by_row else spec.out_pixels, LANES)


def multiply(product: Product, tile: Tile, weights: Any) -> Any:
    """The statement of a launch that computes a batch of products; ``weights`` is the second operand."""
    size, whole, threads = product.size, Block(), tile.threads
    rows, columns = ceildiv(size.rows, tile.tile_m), ceildiv(size.columns, tile.tile_n)
    groups_m, groups_n = tile.tile_m // tile.thread_m, tile.tile_n // tile.thread_n
    with (
        bound(whole, size.batch * rows * columns, "blockIdx.x") as (grid, block),
        bound(grid, threads, "threadIdx.x") as (body, thread),
    ):
        # Neighbouring blocks share patches, which L2 then holds.
        n0 = body.let(block % columns * tile.tile_n)
        m0 = body.let(block // columns % rows * tile.tile_m)
        b = body.let(block // (columns * rows)) if size.batch > 1 else 0
        # Neighbouring threads store neighbouring elements.
        at_m = body.let(thread // groups_n if product.by_row else thread % groups_m)
        at_n = body.let(thread % groups_n if product.by_row else thread // groups_m)
        sums = memory(body, (tile.thread_m * tile.thread_n,), "local", "sums")
        with unrolled(body, tile.thread_m * tile.thread_n) as (one, i):
            put(one, sums, [i], tirx.const(0, ACCUMULATOR))
        left = memory(body, (tile.tile_k * tile.tile_m,), "shared.dyn", "left")
        right = memory(body, (tile.tile_k * tile.tile_n,), "shared.dyn", "right")
        with (
            body.loop(ceildiv(size.depth, tile.tile_k)) as (every, ko),
            _if_all(every, product.needed(b, ko * tile.tile_k)) as turn,
        ):
            start = turn.let(ko * tile.tile_k)
            _fill(turn, product, tile, left, b, m0, start)
            with together(turn, tile.tile_k * tile.tile_n // min(LANES, tile.tile_n), threads) as (one, piece):
                lanes = min(LANES, tile.tile_n)
                k, n = piece // (tile.tile_n // lanes), piece % (tile.tile_n // lanes) * lanes
                put(one, right, [k * tile.tile_n + n], load(weights, [b, start + k, n0 + n], lanes), lanes)
            with unrolled(turn, tile.tile_k) as (one, k):
                column = _piece(one, left, k * tile.tile_m, at_m, tile.thread_m, groups_m, "column")
                row = _piece(one, right, k * tile.tile_n, at_n, tile.thread_n, groups_n, "row")
                with unrolled(one, tile.thread_m) as (outer, i), unrolled(outer, tile.thread_n) as (inner, j):
                    at = i * tile.thread_n + j
                    put(inner, sums, [at], load(sums, [at]) + load(column, [i]) * load(row, [j]))
        _drain(body, product, tile, sums, b, (m0, n0), (at_m, at_n))
    return whole.statement()


@contextmanager
def _if_all(block: Block, conditions: Sequence[Expr]) -> Iterator[Block]:
    """What is done where all conditions hold. As a loop of one pass or none: TVM sets no barrier in a branch."""
    passes = tirx.Select(tirx.all(*conditions), tirx.const(1, "int32"), 0) if conditions else 1
    with block.loop(passes) as (body, _):
        yield body


def _fill(block: Block, product: Product, tile: Tile, left: Any, b: Expr, m0: Expr, start: Expr) -> None:
    """Copy a slice of the first operand to shared memory, its rows along memory."""
    lanes = LANES if product.vectors else 1
    along_m, along_k = (lanes, 1) if product.vectors == "row" else (1, lanes)
    with together(block, tile.tile_k * tile.tile_m // lanes, tile.threads) as (one, piece):
        m = one.let(piece % (tile.tile_m // along_m) * along_m)
        k = one.let(piece // (tile.tile_m // along_m) * along_k)
        value = product.fetch(one, b, one.let(m0 + m), start, k, lanes)
        put(one, left, [k * tile.tile_m + m], value, lanes, 1 if product.vectors == "row" else tile.tile_m)


def _vector(count: int) -> int:
    """Elements of a thread's piece."""
    return math.gcd(count, LANES)


def _piece(block: Block, operand: Any, start: Expr, at: Expr, count: int, groups: int, name: str) -> Any:
    """A thread's elements of a row of shared memory, in registers."""
    size, registers = _vector(count), memory(block, (count,), "local", name)
    with unrolled(block, count // size) as (one, f):
        put(one, registers, [f * size], load(operand, [start + (f * groups + at) * size], size), size)
    return registers


def _drain(
    block: Block, product: Product, tile: Tile, sums: Any, b: Expr, first: Sequence[Expr], at: Sequence[Expr]
) -> None:
    """Give a thread's sums to ``product.store``."""
    size_m, size_n = _vector(tile.thread_m), _vector(tile.thread_n)
    groups_m, groups_n = tile.tile_m // tile.thread_m, tile.tile_n // tile.thread_n
    # Along the axis of the store in pieces, along the other one by one.
    step_m, step_n = (1, min(size_n, product.piece)) if product.by_row else (min(size_m, product.piece), 1)
    count = step_m * step_n
    with (
        unrolled(block, tile.thread_m // step_m) as (outer, u),
        unrolled(outer, tile.thread_n // step_n) as (one, v),
    ):
        i, j = u * step_m, v * step_n
        row = one.let(first[0] + (i // size_m * groups_m + at[0]) * size_m + i % size_m)
        column = one.let(first[1] + (j // size_n * groups_n + at[1]) * size_n + j % size_n)
        inside = [row < product.size.rows] * (product.size.rows % tile.tile_m != 0)
        inside += [column < product.size.columns] * (product.size.columns % tile.tile_n != 0)
        with one.when(all_of(inside)) as within:
            taken = memory(within, (count,), "local", "taken")
            with unrolled(within, count) as (copy, e):
                source = i * tile.thread_n + j + e if product.by_row else (i + e) * tile.thread_n + j
                put(copy, taken, [e], load(sums, [source]))
            product.store(within, b, row, column, taken, count)


def finish(
    block: Block,
    spec: ConvSpec,
    buffers: tuple[Any, Any, dict[str, Any]],
    place: Sequence[Expr],
    channel: Callable[[Expr], Expr],
    sums: Any,
    count: int,
) -> None:
    """The epilogue of ``count`` neighbouring elements of dst from ``place`` on, and their store.

    Args:
        buffers: dst, residual or None, and the packed parameters by name.
        place: index of the first one in dst.
        channel: of the element with a number.
        sums: the elements' sums, in registers.
    """
    dst, residual, parameters = buffers
    ready = memory(block, (count,), "local", "ready", STORAGE[spec.dtype])
    if residual is not None:
        more = memory(block, (count,), "local", "more", STORAGE[spec.dtype])
        put(block, more, [0], load(residual, place, count), count)
    with unrolled(block, count) as (one, e):
        given: dict[str, Expr] = {
            name: load(parameters[name], [channel(e)]) for name in PARAMETERS[1:] if name in parameters
        }
        if residual is not None:
            given["residual"] = read(more, spec.dtype, [e])
        put(one, ready, [e], narrow(epilogue(spec, load(sums, [e]), **given), spec.dtype))
    put(block, dst, place, load(ready, [0], count), count)
