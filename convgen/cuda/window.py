"""Neighbouring outputs of one thread, whose windows overlap: what is read along their axis is read once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from ..cpu.vector import Block
from ..lowering.compute import Expr, Operands, ceildiv, unflat
from ..problem.spec import ConvSpec
from .simt import load, memory, one_each, put, read, unrolled, where

#: Passes over the taps of the other axes that the CUDA compiler unrolls, at most.
MOST_PASSES = 9


class Place(NamedTuple):
    """Where a thread begins to read: an image, an input channel, and the first pixel of its outputs."""

    image: Expr
    channel: Expr
    pixel: Sequence[Expr]


class Window:
    """What one thread computes: ``tile`` pixels × ``channels`` neighbouring channels.

    The pixels lie along an axis other than the one along which neighbouring threads have neighbouring pixels. If the
    kernel has at most ``most_taps`` taps along that axis, they are written out; the taps of the other axes are passes
    of a loop.

    Attributes:
        axis: the spatial axis of the tile: in NHWC the last one; in NCHW the last but one, if there is one.
        inner: how many taps are written out in a pass.
        offsets: the inputs along the axis that a pass reads, counted from the first one.
    """

    def __init__(self, spec: ConvSpec, tile: int, channels: int, most_taps: int) -> None:
        self.spec, self.tile, self.channels = spec, tile, channels
        self.axis = axis_of(spec)
        self.stride, self.dilation = spec.stride[self.axis], spec.dilation[self.axis]
        taps = spec.kernel[self.axis]
        self.inner = taps if taps <= most_taps else 1
        self.passes = [1 if a == self.axis and self.inner > 1 else k for a, k in enumerate(spec.kernel)]
        self.offsets = sorted({self._offset(x, tap) for x in range(tile) for tap in range(self.inner)})

    def _offset(self, x: int, tap: int) -> int:
        return x * self.stride + tap * self.dilation

    @property
    def _grid(self) -> tuple[int, ...]:
        """dst's axes in units of what a thread computes; threads are numbered along them."""
        spec, parts = self.spec, self.spec.oc // self.channels
        spatial = [ceildiv(size, self.tile) if a == self.axis else size for a, size in enumerate(spec.out_spatial)]
        return (spec.n, parts, *spatial) if spec.layout == "nchw" else (spec.n, *spatial, parts)

    @property
    def threads(self) -> int:
        """How many threads there is work for."""
        return math.prod(self._grid)

    @contextmanager
    def each_thread(self, launch: Block, ops: Operands, threads: int) -> Iterator[tuple[Block, Expr, Expr, list[Expr]]]:
        """A launch in blocks of ``threads``: what a thread does, its image, its part of the channels, its tile."""
        with one_each(launch, self.threads, threads) as (body, number):
            image, part, tile = ops.logical([body.let(i) for i in unflat(number, self._grid)])
            yield body, image, part, list(tile)

    def first_pixel(self, block: Block, tile: Sequence[Expr]) -> list[Expr]:
        """The first pixel of a thread's tile."""
        return [block.let(i * self.tile) if a == self.axis else i for a, i in enumerate(tile)]

    def each_pass(self, block: Block) -> AbstractContextManager[tuple[Block, Expr]]:
        """A loop over the passes, and the number of a pass."""
        count = math.prod(self.passes)
        return unrolled(block, count) if count <= MOST_PASSES else block.loop(count)

    def first_tap(self, number: Expr) -> list[Expr]:
        """The first tap of a pass, per axis."""
        return unflat(number, self.passes)

    def tap(self, first_tap: Sequence[Expr], inner: int) -> list[Expr]:
        """The tap written out as number ``inner`` in the pass that begins at a tap."""
        return [inner if a == self.axis and self.inner > 1 else t for a, t in enumerate(first_tap)]

    def place(self, x: int, inner: int) -> int:
        """Which of ``offsets`` output ``x`` of the tile reads for the tap written out as number ``inner``."""
        return self.offsets.index(self._offset(x, inner))

    def read(self, block: Block, ops: Operands, src: Any, start: Place, first_tap: Sequence[Expr], lanes: int) -> Any:
        """What a pass reads, in registers: ``lanes`` channels at each of ``offsets``."""
        spec, (begins, ends) = self.spec, zip(*self.spec.padding, strict=True)
        position, inside = [], []
        for a, (pixel, tap) in enumerate(zip(start.pixel, first_tap, strict=True)):
            y = block.let(pixel * spec.stride[a] + tap * spec.dilation[a] - begins[a])
            position.append(y)
            if a != self.axis:
                inside += [y >= 0] * (begins[a] > 0) + [y < spec.in_spatial[a]] * (ends[a] > 0)
        row = memory(block, (len(self.offsets) * lanes,), "local", "row")
        past_end = ends[self.axis] > 0 or spec.out_spatial[self.axis] % self.tile > 0
        for number, offset in enumerate(self.offsets):
            y = block.let(position[self.axis] + offset)
            conditions = inside + [y >= 0] * (begins[self.axis] > 0) + [y < spec.in_spatial[self.axis]] * past_end
            index = ops.order(start.image, start.channel, self._moved(position, y))
            put(block, row, [number * lanes], where(conditions, read(src, spec.dtype, index, lanes), lanes), lanes)
        return row

    @contextmanager
    def each_store(
        self, block: Block, pixel: Sequence[Expr], sums: Any, count: int
    ) -> Iterator[tuple[Block, list[Expr], Expr, Any]]:
        """The body of a loop over the stores of a thread, of ``count`` channels of a pixel each.

        Args:
            pixel: the first pixel of the tile.
            sums: all sums of the thread, ``[tile][channels]``.

        Yields the body, the pixel, the first of the thread's channels, and the sums to store, in registers.
        """
        outputs = self.spec.out_spatial[self.axis]
        with unrolled(block, self.tile) as (each_pixel, x):
            y = each_pixel.let(pixel[self.axis] + x)
            with (
                each_pixel.when(y < outputs if outputs % self.tile else True) as inside,
                unrolled(inside, self.channels // count) as (body, part),
            ):
                stored_sums = memory(body, (count,), "local", "stored_sums")
                with unrolled(body, count) as (copy, e):
                    put(copy, stored_sums, [e], load(sums, [x * self.channels + part * count + e]))
                yield body, self._moved(pixel, y), part * count, stored_sums

    def _moved(self, position: Sequence[Expr], along: Expr) -> list[Expr]:
        """A position that is ``along`` on the axis of the tile."""
        return [along if a == self.axis else p for a, p in enumerate(position)]


def axis_of(spec: ConvSpec) -> int:
    """The axis along which a thread has several outputs."""
    return spec.rank - 1 if spec.layout == "nhwc" else max(0, spec.rank - 2)
