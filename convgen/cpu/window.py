"""What of the image a tile of output pixels meets: which rows, and which columns of them.

Padding is not copied: rows outside the image are left out at run time, and tiles at the edge of a row are code of their
own without the taps that miss the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tvm import tirx

from ..lowering.compute import Expr, ceildiv
from ..problem.spec import ConvSpec
from .vector import Block, meeting, runs


class RowUses(NamedTuple):
    """An input row, and the taps that read it.

    Attributes:
        row: its index; it lies in the image.
        uses: ``(output row of the tile, tap along this axis)``.
    """

    row: Expr
    uses: list[tuple[int, Expr]]


def tile_rows(spec: ConvSpec, axis: int, height: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """The input rows of ``height`` output rows, as runs ``(first, count, output rows that read them)``.

    Rows are counted from the tile's first one, which may be padding.
    """
    stride, kernel = spec.stride[axis], spec.kernel[axis]
    readers = [
        tuple(r for r in range(height) if 0 <= row - r * stride < kernel) for row in range((height - 1) * stride + kernel)
    ]
    return [run for run in runs(readers) if run[2]]


def input_rows(block: Block, spec: ConvSpec, axis: int, y: Expr, height: int) -> Iterator[tuple[Block, RowUses]]:
    """Code for the input rows inside the image that ``height`` output rows from ``y`` on read along an axis.

    Rows with the same readers are passes of one loop. Several output rows need a dilation of 1.
    """
    stride, begin, size = spec.stride[axis], spec.padding[axis][0], spec.in_spatial[axis]
    if height == 1:
        first, count = meeting(spec, axis, y)
        with block.loop(count) as (inner, k):
            tap = inner.let(first + k)
            yield inner, RowUses(inner.let(y * stride + tap * spec.dilation[axis] - begin), [(0, tap)])
        return
    start = block.let(y * stride - begin)
    last = (spec.out_spatial[axis] - height) * stride - begin  # of any tile
    for first, count, readers in tile_rows(spec, axis, height):
        low: Expr = first
        end: Expr = first + count
        if first < begin:
            low = block.let(tirx.max(low, -start))
        if last + end > size:
            end = block.let(tirx.min(end, size - start))
        fixed = isinstance(low, int) and isinstance(end, int)
        with block.loop(count if fixed else tirx.max(end - low, 0)) as (inner, i):
            row = inner.let(low + i)
            yield inner, RowUses(inner.let(start + row), [(r, row - r * stride) for r in readers])


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


