"""What of the image a tile of output pixels meets: which rows, and which columns of them.

Padding is not copied: rows outside the image are left out at run time, and tiles at the edge of a row are code of their
own without the taps that miss the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from tvm import tirx

from ..lowering.compute import Expr, ceildiv, flat, unflat
from ..problem.spec import ConvSpec
from .vector import Block, meeting, runs


class Met(NamedTuple):
    """A row of the input, and the rows of the kernel that a tile reads it with.

    Attributes:
        where: its index, on all axes that are passes of loops; it lies in the image.
        uses: ``(output row of the tile, row of the kernel)``, rows of the kernel counted over all those axes.
    """

    where: list[Expr]
    uses: list[tuple[int, Expr]]


def output_rows(
    block: Block, outer: Sequence[int], height: int, start: Expr, end: Expr
) -> Iterator[tuple[Block, list[Expr], int]]:
    """Code for rows of tiles ``height`` high, from ``start`` to ``end``: ``(its body, its first row, its height)``.

    ``outer`` are the output's axes across which rows lie, the last of them the one along which tiles have height.
    """
    if not outer:
        yield block, [], 1
        return
    full, rest = divmod(outer[-1], height)
    with block.loop(end - start) as (inner, i):
        *front, line = map(inner.let, unflat(start + i, (*outer[:-1], ceildiv(outer[-1], height))))
        row = [*front, inner.let(line * height)]
        for case, size in inner.cases(line, full, height, rest) if rest else [(inner, height)]:
            yield case, row, size


def kernel_rows(block: Block, spec: ConvSpec, row: Sequence[Expr], height: int) -> Iterator[tuple[Block, Met]]:
    """Code for the input rows inside the image that ``height`` output rows from ``row`` on read."""
    if not row:
        yield block, Met([], [(0, 0)])
        return
    with ExitStack() as loops:
        inner, taps, where = block, [], []
        for axis, y in enumerate(row[:-1]):
            first, count = meeting(spec, axis, y)
            inner, k = loops.enter_context(inner.loop(count))
            taps.append(inner.let(first + k))
            where.append(inner.let(y * spec.stride[axis] + taps[-1] * spec.dilation[axis] - spec.padding[axis][0]))
        for body, at, uses in _input_rows(inner, spec, len(row) - 1, row[-1], height):
            rows = [(r, body.let(flat([*taps, tap], spec.kernel[: len(row)]))) for r, tap in uses]
            yield body, Met([*where, at], rows)


def heights(size: int, height: int) -> list[tuple[int, int]]:
    """The heights that tiles of so many rows have, and how many of a column have each."""
    return [(h, times) for h, times in ((height, size // height), (size % height, 1)) if h and times]


def readers(spec: ConvSpec, axes: int, height: int) -> list[tuple[int, int]]:
    """``(input rows, output rows that read each)`` of a tile ``height`` high, for each piece of code that there is.

    ``axes`` are passes of loops; the tile's rows lie along the last of them.
    """
    if not axes:
        return [(1, 1)]
    if height == 1:
        return [(spec.kernel[axes - 1], 1)]
    return [(count, len(rows)) for _, count, rows in _tile_rows(spec, axes - 1, height)]


def _tile_rows(spec: ConvSpec, axis: int, height: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """The input rows of ``height`` output rows, as runs ``(first, count, output rows that read them)``.

    Rows are counted from the tile's first one, which may be padding.
    """
    stride, kernel = spec.stride[axis], spec.kernel[axis]
    served = [
        tuple(r for r in range(height) if 0 <= row - r * stride < kernel) for row in range((height - 1) * stride + kernel)
    ]
    return [run for run in runs(served) if run[2]]


def _input_rows(
    block: Block, spec: ConvSpec, axis: int, y: Expr, height: int
) -> Iterator[tuple[Block, Expr, list[tuple[int, Expr]]]]:
    """Code for the input rows inside the image that ``height`` output rows from ``y`` on read along an axis.

    ``(its body, the row, (output row, tap) of its readers)``. Rows with the same readers are passes of one loop. Several output rows need a dilation of 1.
    """
    stride, begin, size = spec.stride[axis], spec.padding[axis][0], spec.in_spatial[axis]
    if height == 1:
        first, count = meeting(spec, axis, y)
        with block.loop(count) as (inner, k):
            tap = inner.let(first + k)
            yield inner, inner.let(y * stride + tap * spec.dilation[axis] - begin), [(0, tap)]
        return
    start = block.let(y * stride - begin)
    last = (spec.out_spatial[axis] - height) * stride - begin  # of any tile
    for first, count, served in _tile_rows(spec, axis, height):
        low: Expr = first
        end: Expr = first + count
        if first < begin:
            low = block.let(tirx.max(low, -start))
        if last + end > size:
            end = block.let(tirx.min(end, size - start))
        fixed = isinstance(low, int) and isinstance(end, int)
        with block.loop(count if fixed else tirx.max(end - low, 0)) as (inner, i):
            row = inner.let(low + i)
            yield inner, inner.let(start + row), [(r, row - r * stride) for r in served]


class Pattern(NamedTuple):
    """What of a row a tile of ``pixels`` meets.

    ``inputs`` are ``(offset, ((pixel, tap), …))`` of each input pixel: its distance from the tile's first, counted with
    padding, and which taps of which output pixels read it.
    """

    pixels: int
    inputs: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


def row_tiles(spec: ConvSpec, size: int) -> list[tuple[int, int, Pattern]]:
    """A row of output pixels as tiles of ``size``: runs of tiles that are alike, ``(first, count, pattern)``.

    In a time that does not depend on the width: those in the middle meet nothing but image.
    """
    kernel, stride, dilation = spec.kernel[-1], spec.stride[-1], spec.dilation[-1]
    begin, width, out = spec.padding[-1][0], spec.in_spatial[-1], spec.out_spatial[-1]

    def pattern(i: int) -> Pattern:
        pixels = min(size, out - i * size)
        inputs: dict[int, list[tuple[int, int]]] = {}
        for pixel in range(pixels):
            for tap in range(kernel):
                offset = pixel * stride + tap * dilation
                if 0 <= i * size * stride + offset - begin < width:
                    inputs.setdefault(offset, []).append((pixel, tap))
        return Pattern(pixels, tuple((offset, tuple(inputs[offset])) for offset in sorted(inputs)))

    count, advance = ceildiv(out, size), size * stride
    start = min(count, ceildiv(begin, advance))
    reach = (size - 1) * stride + (kernel - 1) * dilation + 1
    end = max(start, min(out // size, (width + begin - reach) // advance + 1))
    left, right = (runs([pattern(i) for i in edge]) for edge in (range(start), range(end, count)))
    middle = [(start, end - start, pattern(start))] if end > start else []
    return [*left, *middle, *((first + end, times, edge) for first, times, edge in right)]


