"""Matrix products without matrix units, as statements: what the CUDA schedules share.

A thread block computes a tile of one product of a batch. Each of its threads keeps a part of that tile in
registers, and slices of both operands pass through shared memory. A schedule says where the elements of the first
operand come from and where the sums go: a convolution is a product of patches and weights, a transposed
convolution is one such product for each phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..cpu.vector import Block, zeros
from ..deferred import te, tirx
from ..lowering.compute import ACCUMULATOR, STORAGE, Expr, ceildiv, epilogue, narrow, round_up, widen
from ..problem.spec import PARAMETERS, ConvSpec
from .tiles import Size, Tile

#: Elements of a vector access: 16 bytes of f32, 8 of f16 or bf16.
LANES = 4
#: Loads that a thread has under way at once.
MOST_UNROLLED = 8


class Buffers(NamedTuple):
    """What a kernel reads and writes, in the order in which :func:`~convgen.cpu.vector.written` hands it on.

    Attributes:
        residual: None where the spec has none.
        parameters: the packed tensors by name: ``weights``, ``bias``, …
    """

    src: Any
    residual: Any
    parameters: dict[str, Any]
    dst: Any


# ---- loops and accesses ------------------------------------------------------------------------


@contextmanager
def bound(block: Block, extent: int, axis: str) -> Iterator[tuple[Block, Expr]]:
    """The body of a loop over ``blockIdx.x`` or ``threadIdx.x``, and its variable.

    A loop over the threads inside another one means all threads of the block once more: that is how they do
    something together, such as filling shared memory.
    """
    inner, var = Block(), tirx.Var(axis.replace("Idx.", "_"), "int32")
    yield inner, var
    binding = tirx.IterVar(None, var, tirx.IterVar.ThreadIndex, axis)
    kind = tirx.ForKind.THREAD_BINDING
    block.add(tirx.For(var, tirx.const(0, "int32"), tirx.const(extent, "int32"), kind, inner.statement(), binding))


@contextmanager
def one_each(launch: Block, count: int, threads: int) -> Iterator[tuple[Block, Expr]]:
    """A launch of ``count`` threads in blocks of ``threads``: what each of them does, and its number."""
    with (
        bound(launch, ceildiv(count, threads), "blockIdx.x") as (grid, block),
        bound(grid, threads, "threadIdx.x") as (every_thread, thread),
        every_thread.when(block * threads + thread < count if count % threads else True) as body,
    ):
        yield body, block * threads + thread


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
    """All threads of a block share ``count`` pieces of work; neighbouring threads do neighbouring pieces.

    Yields what a thread does with one piece, and the number of that piece.
    """
    rounds = ceildiv(count, threads)
    loop = unrolled if rounds <= MOST_UNROLLED else Block.loop  # more loads at once would take too many registers
    with bound(block, threads, "threadIdx.x") as (every_thread, thread), loop(every_thread, rounds) as (body, turn):
        piece = body.let(turn * threads + thread)
        if count % threads:
            with body.when(piece < count) as within:
                yield within, piece
        else:
            yield body, piece


def memory(block: Block, shape: Sequence[int], scope: str, name: str, dtype: str = ACCUMULATOR) -> Any:
    """Memory of a scope: ``local`` is registers, ``shared.dyn`` is shared by a thread block."""
    buffer = tirx.decl_buffer(shape, dtype, name, scope=scope)
    block.add(tirx.AllocBuffer(buffer))
    return buffer


def zero_sums(block: Block, count: int) -> Any:
    """Sums in registers, which begin at zero."""
    sums = memory(block, (count,), "local", "sums")
    with unrolled(block, count) as (body, i):
        put(body, sums, [i], tirx.const(0, ACCUMULATOR))
    return sums


def _vector_index(index: Sequence[Expr], lanes: int, stride: int) -> list[Expr]:
    """The index of ``lanes`` elements, ``stride`` apart along the last axis, of which ``index`` is the first."""
    *outer, last = [tirx.const(i, "int32") if isinstance(i, int) else i for i in index]
    return [*outer, tirx.Ramp(last, tirx.const(stride, "int32"), lanes) if lanes > 1 else last]


def load(buffer: Any, index: Sequence[Expr], lanes: int = 1) -> Expr:
    """``lanes`` neighbouring elements from ``index`` on, as they are stored."""
    return tirx.BufferLoad(buffer, _vector_index(index, lanes, 1))


def put(block: Block, buffer: Any, index: Sequence[Expr], value: Expr, lanes: int = 1, stride: int = 1) -> None:
    """Store ``lanes`` elements from ``index`` on, ``stride`` apart along the last axis."""
    block.add(tirx.BufferStore(buffer, value, _vector_index(index, lanes, stride)))


def where(conditions: Sequence[Expr], value: Expr, lanes: int = 1) -> Expr:
    """The f32 value; zero, and not evaluated, where one of the conditions does not hold."""
    if not conditions:
        return value
    zero = zeros(lanes) if lanes > 1 else tirx.const(0, ACCUMULATOR)
    return tirx.if_then_else(tirx.all(*conditions), value, zero)


def all_of(conditions: Sequence[Expr]) -> Expr:
    """Whether all conditions hold, as :meth:`Block.when` takes it."""
    return tirx.all(*conditions) if conditions else True


def read(buffer: Any, dtype: str, index: Sequence[Expr], lanes: int = 1) -> Expr:
    """``lanes`` elements of a tensor at the user's boundary, as f32."""
    return widen(load(buffer, index, lanes), dtype, lanes)


# ---- products ----------------------------------------------------------------------------------


class Product(NamedTuple):
    """A batch of products: how large they are, where the first operand comes from, and where the sums go.

    Attributes:
        fetch: ``fetch(block, item, row, start, offset, lanes)`` is ``lanes`` elements of the first operand of the
            batch's product number ``item``, from ``(row, start + offset)`` on along the axis ``vectors``; zero
            outside the operand. ``start`` is the same for all threads.
        vectors: the axis along which :data:`LANES` elements are one access: ``row``, ``depth``, or ``""`` for none.
        store: ``store(block, item, row, column, sums, count)`` stores ``count`` sums, which are in registers, from
            ``(row, column)`` on.
        by_row: whether the sums of a store are neighbours in a row; else they are neighbours in a column.
        piece: the most sums of one store: :data:`LANES` where those are one access.
        needed: ``needed(item, start)``: conditions, the same for all threads. Where one of them does not hold, the
            slice of the first operand from ``start`` on is nothing but zeros, and is skipped.
    """

    size: Size
    fetch: Callable[[Block, Expr, Expr, Expr, Expr, int], Expr]
    vectors: str
    store: Callable[[Block, Expr, Expr, Expr, Any, int], None]
    by_row: bool
    piece: int
    needed: Callable[[Expr, Expr], Sequence[Expr]] = lambda item, start: ()


class _Position(NamedTuple):
    """Where a thread works: at which product and tile, and its place among the threads that share that tile."""

    item: Expr
    tile_row: Expr
    tile_column: Expr
    thread_row: Expr
    thread_column: Expr


def packed(size: Size, tile: Tile, value: Callable[[Expr, Expr, Expr], Expr]) -> te.Tensor:
    """The second operand ``[batch][depth][columns]``, in whole tiles: ``value(b, k, o)``, zero past its end."""
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
    size, launch = product.size, Block()
    rows, columns = ceildiv(size.rows, tile.tile_m), ceildiv(size.columns, tile.tile_n)
    threads_m, threads_n = _threads_along(tile)
    with (
        bound(launch, size.batch * rows * columns, "blockIdx.x") as (grid, block),
        bound(grid, tile.threads, "threadIdx.x") as (body, thread),
    ):
        # Neighbouring blocks share patches, which L2 then holds.
        tile_column = body.let(block % columns * tile.tile_n)
        tile_row = body.let(block // columns % rows * tile.tile_m)
        item = body.let(block // (columns * rows)) if size.batch > 1 else 0
        # Neighbouring threads store neighbouring elements.
        thread_row = body.let(thread // threads_n if product.by_row else thread % threads_m)
        thread_column = body.let(thread % threads_n if product.by_row else thread // threads_m)
        position = _Position(item, tile_row, tile_column, thread_row, thread_column)
        sums = zero_sums(body, tile.thread_m * tile.thread_n)
        left = memory(body, (tile.tile_k * tile.tile_m,), "shared.dyn", "left")
        right = memory(body, (tile.tile_k * tile.tile_n,), "shared.dyn", "right")
        with (
            body.loop(ceildiv(size.depth, tile.tile_k)) as (every_slice, slice_number),
            _if_all(every_slice, product.needed(item, slice_number * tile.tile_k)) as step,
        ):
            start = step.let(slice_number * tile.tile_k)
            _copy_first_operand(step, product, tile, left, position, start)
            _copy_weights(step, tile, weights, right, position, start)
            _multiply_slice(step, tile, left, right, sums, position)
        _store_sums(body, product, tile, sums, position)
    return launch.statement()


def _threads_along(tile: Tile) -> tuple[int, int]:
    """How many threads share the rows, and how many the columns of a tile."""
    return tile.tile_m // tile.thread_m, tile.tile_n // tile.thread_n


@contextmanager
def _if_all(block: Block, conditions: Sequence[Expr]) -> Iterator[Block]:
    """What is done where all conditions hold. As a loop of one pass or none: TVM sets no barrier in a branch."""
    passes = tirx.Select(tirx.all(*conditions), tirx.const(1, "int32"), 0) if conditions else 1
    with block.loop(passes) as (body, _):
        yield body


def _copy_first_operand(
    block: Block, product: Product, tile: Tile, left: Any, position: _Position, start: Expr
) -> None:
    """Copy a slice of the first operand to shared memory, as ``[depth][row]``."""
    lanes = LANES if product.vectors else 1
    along_m, along_k = (lanes, 1) if product.vectors == "row" else (1, lanes)
    with together(block, tile.tile_k * tile.tile_m // lanes, tile.threads) as (body, piece):
        row = body.let(piece % (tile.tile_m // along_m) * along_m)
        k = body.let(piece // (tile.tile_m // along_m) * along_k)
        value = product.fetch(body, position.item, body.let(position.tile_row + row), start, k, lanes)
        put(body, left, [k * tile.tile_m + row], value, lanes, 1 if product.vectors == "row" else tile.tile_m)


def _copy_weights(block: Block, tile: Tile, weights: Any, right: Any, position: _Position, start: Expr) -> None:
    """Copy a slice of the second operand to shared memory, as ``[depth][column]``."""
    lanes = min(LANES, tile.tile_n)
    vectors = tile.tile_n // lanes
    with together(block, tile.tile_k * vectors, tile.threads) as (body, piece):
        k, column = piece // vectors, piece % vectors * lanes
        value = load(weights, [position.item, start + k, position.tile_column + column], lanes)
        put(body, right, [k * tile.tile_n + column], value, lanes)


def _multiply_slice(block: Block, tile: Tile, left: Any, right: Any, sums: Any, position: _Position) -> None:
    """Add the products of a slice to a thread's sums: of each depth a column times a row."""
    threads_m, threads_n = _threads_along(tile)
    with unrolled(block, tile.tile_k) as (body, k):
        column = _own_elements(
            body, left, k * tile.tile_m, position.thread_row, tile.thread_m, threads_m, "left_column"
        )
        row = _own_elements(body, right, k * tile.tile_n, position.thread_column, tile.thread_n, threads_n, "right_row")
        with unrolled(body, tile.thread_m) as (each_row, i), unrolled(each_row, tile.thread_n) as (each_sum, j):
            place = i * tile.thread_n + j
            put(each_sum, sums, [place], load(sums, [place]) + load(column, [i]) * load(row, [j]))


def _vector(count: int) -> int:
    """Elements of a vector, of ``count`` elements that a thread has along an axis of the tile."""
    return math.gcd(count, LANES)


def _own_elements(block: Block, operand: Any, start: Expr, thread: Expr, count: int, threads: int, name: str) -> Any:
    """A thread's ``count`` elements of a line of shared memory, in registers.

    The line begins at ``start``; ``threads`` threads share it, vector by vector in turn.
    """
    lanes, registers = _vector(count), memory(block, (count,), "local", name)
    with unrolled(block, count // lanes) as (body, vector):
        value = load(operand, [start + (vector * threads + thread) * lanes], lanes)
        put(body, registers, [vector * lanes], value, lanes)
    return registers


def _store_sums(block: Block, product: Product, tile: Tile, sums: Any, position: _Position) -> None:
    """Give a thread's sums to ``product.store``, as many at once as are neighbours in dst."""
    lanes_m, lanes_n = _vector(tile.thread_m), _vector(tile.thread_n)
    threads_m, threads_n = _threads_along(tile)
    # Along the axis of the store in pieces, along the other axis one by one.
    step_m, step_n = (1, min(lanes_n, product.piece)) if product.by_row else (min(lanes_m, product.piece), 1)
    count = step_m * step_n
    with (
        unrolled(block, tile.thread_m // step_m) as (each_row, step_row),
        unrolled(each_row, tile.thread_n // step_n) as (body, step_column),
    ):
        i, j = step_row * step_m, step_column * step_n
        row = body.let(position.tile_row + (i // lanes_m * threads_m + position.thread_row) * lanes_m + i % lanes_m)
        column = body.let(
            position.tile_column + (j // lanes_n * threads_n + position.thread_column) * lanes_n + j % lanes_n
        )
        inside = [row < product.size.rows] * (product.size.rows % tile.tile_m != 0)
        inside += [column < product.size.columns] * (product.size.columns % tile.tile_n != 0)
        with body.when(all_of(inside)) as within:
            stored_sums = memory(within, (count,), "local", "stored_sums")
            with unrolled(within, count) as (copy, e):
                source = i * tile.thread_n + j + e if product.by_row else (i + e) * tile.thread_n + j
                put(copy, stored_sums, [e], load(sums, [source]))
            product.store(within, position.item, row, column, stored_sums, count)


# ---- stores ------------------------------------------------------------------------------------


def finish(
    block: Block,
    spec: ConvSpec,
    buffers: Buffers,
    place: Sequence[Expr],
    channel: Callable[[Expr], Expr],
    sums: Any,
    count: int,
) -> None:
    """The epilogue of ``count`` neighbouring elements of dst, and their store.

    Args:
        place: the index of the first element in dst.
        channel: ``channel(e)`` is the output channel of element number ``e``.
        sums: the elements' sums, in registers.
    """
    results = memory(block, (count,), "local", "results", STORAGE[spec.dtype])
    if buffers.residual is not None:
        residuals = memory(block, (count,), "local", "residuals", STORAGE[spec.dtype])
        put(block, residuals, [0], load(buffers.residual, place, count), count)
    with unrolled(block, count) as (body, e):
        terms: dict[str, Expr] = {
            name: load(buffers.parameters[name], [channel(e)]) for name in PARAMETERS[1:] if name in buffers.parameters
        }
        if buffers.residual is not None:
            terms["residual"] = read(residuals, spec.dtype, [e])
        put(body, results, [e], narrow(epilogue(spec, load(sums, [e]), **terms), spec.dtype))
    put(block, buffers.dst, place, load(results, [0], count), count)
