"""A task's copy of the rows that it reads, as operands of an instruction that adds several products at once.

Channels lie innermost in it, so that a word has neighbours along the reduction: rows of NCHW are transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..deferred import tirx
from ..lowering.compute import INTEGER, Expr
from ..problem.dtypes import BYTES
from ..problem.spec import ConvSpec
from .images import Images
from .operation import Operation
from .vector import Block, interleave, zeros


def word(buffer: Any, operation: Operation, place: Sequence[Expr]) -> Expr:
    """The word of operands that begins at a place."""
    *outer, at = place
    if operation.depth == 1:
        return buffer[(*outer, at)]
    numbers = tirx.BufferLoad(buffer, [*outer, _ramp(at, operation.depth)])
    return tirx.reinterpret(INTEGER, numbers)


class Source(NamedTuple):
    """What is copied of src: an image, its pixels from one on, and how many planes, rows, columns; its zero point."""

    spec: ConvSpec
    src: Any
    image: Expr
    corner: Sequence[Expr]
    extent: Sequence[int]
    zero: Expr | None


def converted(body: Block, operation: Operation, source: Source, read: Images, lanes: int) -> tirx.Buffer:
    """A copy of what a task reads, with src's zero outside the image.

    ``[plane, line, block of channels, column and channel]``; blocks as ``read`` has them. A row may be read, and
    written, to a vector past its end.
    """
    spec, corner = source.spec, source.corner
    planes, lines, columns = source.extent
    blocks, size = read.channels // read.block, read.size
    slack = 4 * lanes // operation.bytes
    panel = body.buffer((planes, lines, blocks, columns * read.block + slack), operation.operand)
    nothing = body.let(operation.nothing(source.zero))
    first, end = (body.let(_within(x - corner[2], columns)) for x in (0, size[2]))
    with body.loop(planes) as (plane, z), plane.loop(lines) as (line, y):
        pixel = [line.let(corner[0] + z), line.let(corner[1] + y)]
        inside = tirx.all(*(c for i, n in zip(pixel, size, strict=False) for c in (i >= 0, i < n)))
        is_there = line.let(inside)
        with line.when(is_there) as case, case.loop(blocks) as (one, block):
            if read.layout == spec.layout:
                _copy(one, operation, source, read, panel, (z, y, block), pixel, (first, end), lanes)
            else:
                _transpose(one, operation, source, read, panel, (z, y), pixel, (first, end), lanes)
            for start, stop in ((0, first), (end, columns)):
                ends = (start * read.block, stop * read.block)
                _fill(one, operation, panel, [z, y, block], ends, nothing, lanes)
        with line.when(tirx.Not(is_there)) as case, case.loop(blocks) as (one, block):
            _fill(one, operation, panel, [z, y, block], (0, columns * read.block), nothing, lanes)
    return panel


def _within(x: Expr, columns: int) -> Expr:
    """The nearest of a row's columns, or its end."""
    return max(0, min(x, columns)) if isinstance(x, int) else tirx.max(0, tirx.min(x, columns))


def _ramp(start: Expr, lanes: int) -> Expr:
    start = tirx.const(start, "int32") if isinstance(start, int) else start
    return start if lanes == 1 else tirx.Ramp(start, tirx.const(1, "int32"), lanes)


def _stretches(body: Block, length: Expr, sizes: Sequence[int]) -> Iterator[tuple[Block, Expr, int]]:
    """Code for vectors of the first of some ``sizes`` that a length has: the last one overlaps the one before.

    The last size is 1.
    """
    if isinstance(length, int):
        sizes = [size for size in sizes if size <= length][:1]
    for larger, size in zip((None, *sizes), sizes, strict=False):
        fits: Expr = True
        if not isinstance(length, int):
            fits = length >= size if larger is None else tirx.all(length >= size, length < larger)
        with body.when(fits) as case, case.loop((length + (size - 1)) // size) as (one, i):
            last = length - size
            yield one, one.let(min(i, last) if isinstance(i, int) else tirx.min(i * size, last)), size


def _fill(
    body: Block,
    operation: Operation,
    panel: Any,
    row: Sequence[Expr],
    ends: tuple[Expr, Expr],
    nothing: Expr,
    lanes: int,
) -> None:
    """Nothing of src from an element of a row to another."""
    start, stop = ends
    for one, at, size in _stretches(body, stop - start, (4 * lanes // operation.bytes, 1)):
        value = nothing if size == 1 else tirx.Broadcast(nothing, size)
        one.add(tirx.BufferStore(panel, value, [*row, _ramp(start + at, size)]))


def _copy(
    body: Block,
    operation: Operation,
    source: Source,
    read: Images,
    panel: Any,
    row: Sequence[Expr],
    pixel: Sequence[Expr],
    columns: tuple[Expr, Expr],
    lanes: int,
) -> None:
    """A row of a block of channels."""
    dtype, (first, end) = source.spec.src_dtype, columns
    most = 4 * lanes // max(operation.bytes, BYTES[dtype])
    for one, at, size in _stretches(body, (end - first) * read.block, (most, 1)):
        start = one.let((source.corner[2] + first) * read.block + at)
        *outer, x = read.place(source.image, row[-1], [*pixel, 0], start)
        value = tirx.BufferLoad(source.src, [*outer, _ramp(x, size)])
        value = operation.number(value, dtype, source.zero, size)
        one.add(tirx.BufferStore(panel, value, [*row, _ramp(first * read.block + at, size)]))


def _transpose(
    body: Block,
    operation: Operation,
    source: Source,
    read: Images,
    panel: Any,
    row: Sequence[Expr],
    pixel: Sequence[Expr],
    columns: tuple[Expr, Expr],
    lanes: int,
) -> None:
    """A row of all channels of NCHW, squares of as many pixels as words of channels at a time.

    Of the last square's words some may lie past a pixel's last channel, in the next pixel: which is written later.
    Those that are not whole squares come first, therefore.
    """
    spec, depth, (first, end) = source.spec, operation.depth, columns
    own, groups = spec.ic // spec.groups, spec.groups
    padded = read.channels // groups
    words, length = read.channels // depth, end - first
    sizes = [size for size in (16, 8, 4, 2, 1) if size <= lanes]
    if not isinstance(length, int):
        sizes = [lanes, 1]

    def value(block: Block, place: Expr, size: int, lane: Expr) -> Expr:
        """A channel of ``size`` pixels, in all lanes."""
        group, within = lane // padded, lane % padded
        last = own - 1
        channel = group * own + (min(within, last) if isinstance(within, int) else tirx.min(within, last))
        *outer, x = Images("nchw", spec.ic, read.size, read.rank).place(source.image, channel, [*pixel, 0], place)
        stored = tirx.BufferLoad(source.src, [*outer, _ramp(x, size)])
        number = operation.number(stored, spec.src_dtype, source.zero, size)
        if padded > own and operation.sums != INTEGER:  # weights of 0 would make NaN of infinity
            kept, none = (tirx.const(bits, operation.operand) for bits in (0xFFFF, 0))
            mask = (
                (kept if within < own else none) if isinstance(within, int) else tirx.Select(within < own, kept, none)
            )
            number = number & (mask if size == 1 else tirx.Broadcast(mask, size))
        number = block.let(number)
        if size == lanes:
            return number
        if size == 1:
            return tirx.Broadcast(number, lanes)
        return tirx.Shuffle([number] * (lanes // size), list(range(lanes)))

    def square(block: Block, at: Expr, size: int, word_at: Expr, count: int) -> None:
        place = block.let(source.corner[2] + first + at)
        vectors = []
        for w in range(count):
            lane = (word_at + w) * depth
            vectors.append(
                block.let(operation.joined([value(block, place, size, lane + i) for i in range(depth)], lanes))
            )
        vectors += [zeros(lanes, INTEGER)] * (lanes - count)
        for t, vector in enumerate(interleave(block, vectors, lanes)[:size]):
            numbers = vector if depth == 1 else tirx.reinterpret(f"{operation.operand}x{lanes * depth}", vector)
            where = block.let((first + at + t) * read.channels + word_at * depth)
            block.add(tirx.BufferStore(panel, numbers, [*row, 0, _ramp(where, lanes * depth)]))

    parts: list[tuple[int, Callable[[Expr], Expr], int]] = []
    if words % lanes:
        parts.append((1, lambda i: words // lanes * lanes, words % lanes))
    if words >= lanes:
        parts.append((words // lanes, lambda i: i * lanes, lanes))
    for times, begin, count in parts:
        for one, at, size in _stretches(body, length, sizes):
            with one.loop(times) as (block, i):
                square(block, at, size, begin(i), count)
