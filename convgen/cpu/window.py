"""What of the image a tile of output pixels meets: which rows, and which columns of them.

Padding is not copied: rows outside the image are left out at run time, and tiles at the edge of a row are code of their
own without the taps that miss the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from ..deferred import tirx
from ..lowering.compute import Expr, ceildiv, flat, unflat
from ..problem.spec import ConvSpec
from .vector import Block, runs, stretches

#: Taps of a plane of the kernel that are all written out.
SHORT = 9


def meeting(spec: ConvSpec, axis: int, y: Expr) -> tuple[Expr, Expr]:
    """The taps that lie in the image for output ``y`` along an axis: the first, and how many."""
    kernel, size, dilation = spec.kernel[axis], spec.in_spatial[axis], spec.dilation[axis]
    if spec.padding[axis] == (0, 0):
        return 0, kernel
    start = y * spec.stride[axis] - spec.padding[axis][0]

    def reaching(pixel: int) -> Expr:
        """The number of taps that lie before a pixel.

        Divided is what grows with ``y``: of an index that is a remainder, TVM 0.27 divides negative multiples wrongly
        (``(16 - i % 4 * 2) // 4``, which it takes for a division by -2).
        """
        return tirx.min(tirx.max(-tirx.floordiv(start - pixel, dilation), 0), kernel)

    return reaching(0), reaching(size) - reaching(0)


def _meeting_transposed(spec: ConvSpec, axis: int, y: Expr) -> tuple[Expr, Expr, Expr]:
    """The same of a transposed convolution that is strided or dilated, not both: the first tap, which input pixel it
    meets, and how many taps there are; they are the stride apart, their pixels the dilation, to the left.
    """
    stride, dilation, size = spec.stride[axis], spec.dilation[axis], spec.in_spatial[axis]
    last, phase = (y + spec.padding[axis][0]) // stride, (y + spec.padding[axis][0]) % stride
    start = (tirx.max(last - (size - 1), 0) + (dilation - 1)) // dilation
    end = tirx.min((spec.kernel[axis] - 1 - phase + stride) // stride, last // dilation + 1)
    return phase + start * stride, last - start * dilation, tirx.max(end - start, 0)


@contextmanager
def meeting_taps(block: Block, spec: ConvSpec, pixel: Sequence[Expr]) -> Iterator[tuple[Block, list[Expr], list[Expr]]]:
    """Loops over the taps of the first axes that lie in the image for an output ``pixel``: ``(their body, the taps,
    the input pixel)``.
    """
    with ExitStack() as loops:
        taps, where = [], []
        for axis, y in enumerate(pixel):
            stride, dilation = spec.stride[axis], spec.dilation[axis]
            if spec.transposed:
                first, start, count = map(block.let, _meeting_transposed(spec, axis, y))
                block, k = loops.enter_context(block.loop(count))
                taps.append(block.let(first + k * stride))
                where.append(block.let(start - k * dilation))
            else:
                first, count = meeting(spec, axis, y)
                block, k = loops.enter_context(block.loop(count))
                taps.append(block.let(first + k))
                where.append(block.let(y * stride + taps[-1] * dilation - spec.padding[axis][0]))
        yield block, taps, where


class Met(NamedTuple):
    """A row of the input, and the rows of the kernel that a tile reads it with.

    Attributes:
        where: its index, on all axes that are passes of loops; it lies in the image.
        uses: ``(output row of the tile, row of the kernel)``, rows of the kernel counted over all those axes.
    """

    where: list[Expr]
    uses: list[tuple[int, Expr]]


class Lines(NamedTuple):
    """The output rows of a tile.

    Attributes:
        first: the first one, on all axes that are passes of loops; none where there are no such axes.
        height: how many there are, along the last of them.
        whole: whether all that they read along that axis lies in the image.
    """

    first: list[Expr]
    height: int
    whole: bool

    def row(self, r: int) -> list[Expr]:
        """The r-th row."""
        return [*self.first[:-1], *(y + r for y in self.first[-1:])]


def output_rows(
    block: Block, spec: ConvSpec, axes: int, height: int, start: Expr, end: Expr
) -> Iterator[tuple[Block, Lines]]:
    """Code for the rows of tiles, ``height`` high, from ``start`` to ``end`` of those along the output's first axes."""
    if not axes:
        yield block, Lines([], 1, True)
        return
    *outer, lines = spec.out_spatial[:axes]
    full, rest = divmod(lines, height)
    low, high = _whole(spec, axes - 1, height) if is_short(spec, axes - 1) else (0, 0)
    with block.loop(end - start) as (inner, i):
        *front, line = map(inner.let, unflat(start + i, (*outer, ceildiv(lines, height))))
        row = [*front, inner.let(line * height)]
        middle = tirx.And(line >= low, line < high)
        edge = tirx.And(tirx.Not(middle), line < full) if rest else tirx.Not(middle)
        if low < high:
            with inner.when(True if (low, high) == (0, full) and not rest else middle) as case:
                yield case, Lines(row, height, True)
        if low > 0 or high < full:
            with inner.when(edge if low < high or rest else True) as case:
                yield case, Lines(row, height, False)
        if rest:
            with inner.when(line == full) as case:
                yield case, Lines(row, rest, spec.padding[axes - 1] == (0, 0))


def _whole(spec: ConvSpec, axis: int, height: int) -> tuple[int, int]:
    """Which tiles of full height read nothing but image along an axis: the first, and the one after the last."""
    (begin, _), stride, advance = spec.padding[axis], spec.stride[axis], spec.stride[axis] * height
    full = spec.out_spatial[axis] // height
    reach = (height - 1) * stride + spec.window[axis]
    low = min(ceildiv(begin, advance), full)
    return low, max(low, min(full, (spec.in_spatial[axis] + begin - reach) // advance + 1))


def kernel_rows(block: Block, spec: ConvSpec, lines: Lines) -> Iterator[tuple[Block, Met]]:
    """Code for the input rows inside the image that output rows read."""
    row = lines.first
    if not row:
        yield block, Met([], [(0, 0)])
    elif spec.transposed:
        with meeting_taps(block, spec, row) as (inner, taps, where):
            yield inner, Met(where, [(0, inner.let(flat(taps, spec.kernel[: len(row)])))])
    else:
        with meeting_taps(block, spec, row[:-1]) as (inner, taps, where):
            for body, at, uses in _input_rows(inner, spec, len(row) - 1, lines):
                rows = [(r, body.let(flat([*taps, tap], spec.kernel[: len(row)]))) for r, tap in uses]
                yield body, Met([*where, at], rows)


def copies(spec: ConvSpec, axes: int) -> int:
    """How often the code of a tile is written: also for tiles at the edge, where its rows are written out."""
    return 2 if axes and is_short(spec, axes - 1) and spec.padding[axes - 1] != (0, 0) else 1


def readers(spec: ConvSpec, axes: int, height: int) -> list[tuple[int, int]]:
    """``(input rows, output rows that read each)`` of a tile ``height`` high, for each piece of code that there is.

    ``axes`` are passes of loops; the tile's rows lie along the last of them.
    """
    if not axes:
        return [(1, 1)]
    if height == 1 and not is_short(spec, axes - 1):
        return [(spec.kernel[axes - 1], 1)]
    return [(count, len(rows)) for _, count, rows in _tile_rows(spec, axes - 1, height)]


def _tile_rows(spec: ConvSpec, axis: int, height: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """The input rows of ``height`` output rows, as runs ``(first, count, output rows that read them)``.

    Rows are counted from the tile's first one, which may be padding.
    """
    stride, kernel = spec.stride[axis], spec.kernel[axis]
    rows = range((height - 1) * stride + kernel)
    served = [tuple(r for r in range(height) if 0 <= row - r * stride < kernel) for row in rows]
    return [run for run in runs(served) if run[2]]


def _input_rows(
    block: Block, spec: ConvSpec, axis: int, lines: Lines
) -> Iterator[tuple[Block, Expr, list[tuple[int, Expr]]]]:
    """Code for the input rows inside the image that output rows read along an axis.

    ``(its body, the row, (output row, tap) of its readers)``. Rows with the same readers are passes of one loop, unless
    the kernel is short. Several output rows need a dilation of 1.
    """
    stride, begin, size = spec.stride[axis], spec.padding[axis][0], spec.in_spatial[axis]
    y, height, dilation = lines.first[-1], lines.height, spec.dilation[axis]
    short = is_short(spec, axis)
    if height == 1 and not short:
        first, count = meeting(spec, axis, y)
        with block.loop(count) as (inner, k):
            tap = inner.let(first + k)
            yield inner, inner.let(y * stride + tap * dilation - begin), [(0, tap)]
        return
    start = block.let(y * stride - begin)
    last = (spec.out_spatial[axis] - height) * stride - begin  # of any tile
    found = _tile_rows(spec, axis, height)
    if short:
        found = [(first + i, 1, served) for first, count, served in found for i in range(count)]
    for first, count, served in found:
        if count == 1:
            at = first * dilation  # one, but where the tile is one row
            inside = [start >= -at] * (at < begin) + [start < size - at] * (last + at >= size)
            with block.when(tirx.all(*inside) if inside and not lines.whole else True) as inner:
                yield inner, inner.let(start + at), [(r, first - r * stride) for r in served]
            continue
        low = block.let(tirx.max(first, -start)) if first < begin else first
        end = block.let(tirx.min(first + count, size - start)) if last + first + count > size else first + count
        with block.loop(block.let(tirx.max(end - low, 0))) as (inner, i):
            row = inner.let(low + i)
            yield inner, inner.let(start + row), [(r, row - r * stride) for r in served]


def is_short(spec: ConvSpec, axis: int) -> bool:
    """Whether the rows of the kernel are written out, and again without conditions for tiles inside the image.

    Code for the rows of a large kernel is long, and LLVM would keep too much of it in registers: also of rows that are
    shuffled apart, where a stride meets pixels in the lanes.
    """
    shuffled = spec.layout == "nchw" and spec.stride[-1] > 1
    return spec.kernel[axis] * spec.kernel[-1] <= SHORT and not shuffled and not spec.transposed


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
    return stretches(count, start, end, pattern)
