"""Neighbouring outputs of one thread, whose windows overlap: what is read along their axis is read once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ..cpu.vector import Block
from ..lowering.compute import Expr, Operands, ceildiv, unflat
from ..problem.spec import ConvSpec
from .simt import memory, put, read, unrolled, where

#: Passes over the other taps that the CUDA compiler unrolls.
MOST_PASSES = 9


class Window:
    """``tile`` outputs along an axis other than the one neighbouring threads run along.

    Taps along that axis are written out, where they are at most ``most``; those along the others are passes.

    Attributes:
        axis: the spatial axis: of NHWC the last one; of NCHW the last but one, if there is one.
        inner: taps written out.
        offsets: what is read along the axis in a pass, from the first input on.
    """

    def __init__(self, spec: ConvSpec, tile: int, most: int) -> None:
        self.spec, self.tile = spec, tile
        self.axis = axis_of(spec)
        self.stride, self.dilation = spec.stride[self.axis], spec.dilation[self.axis]
        taps = spec.kernel[self.axis]
        self.inner = taps if taps <= most else 1
        self.passes = [1 if a == self.axis and self.inner > 1 else k for a, k in enumerate(spec.kernel)]
        reads = {x * self.stride + k * self.dilation for x in range(tile) for k in range(self.inner)}
        self.offsets = sorted(reads)

    def grid(self, channels: int) -> tuple[int, ...]:
        """What threads are numbered by: dst's axes, in tiles; ``channels`` of them."""
        outputs = self.spec.out_spatial
        spatial = [ceildiv(y, self.tile) if a == self.axis else y for a, y in enumerate(outputs)]
        return (self.spec.n, channels, *spatial) if self.spec.layout == "nchw" else (self.spec.n, *spatial, channels)

    def items(self, channels: int) -> int:
        return math.prod(self.grid(channels))

    def loop(self, block: Block) -> AbstractContextManager[tuple[Block, Expr]]:
        """A loop over the passes."""
        count = math.prod(self.passes)
        return unrolled(block, count) if count <= MOST_PASSES else block.loop(count)

    def taps(self, number: Expr) -> list[Expr]:
        """Of a pass, per axis."""
        return unflat(number, self.passes)

    def along(self, taps: Sequence[Expr], k: int) -> list[Expr]:
        """The taps of a pass, at the one written out as number ``k``."""
        return [k if a == self.axis and self.inner > 1 else t for a, t in enumerate(taps)]

    def place(self, x: int, k: int) -> int:
        """Which of ``offsets`` output ``x`` reads for tap ``k``."""
        return self.offsets.index(x * self.stride + k * self.dilation)

    def read(
        self,
        block: Block,
        ops: Operands,
        src: Any,
        at: tuple[Expr, Expr, Sequence[Expr]],
        taps: Sequence[Expr],
        lanes: int,
    ) -> Any:
        """What a pass reads, in registers: ``lanes`` channels at each of ``offsets``.

        ``at``: image, channel, and the pixel of the first output.
        """
        spec, (n, channel, pixel) = self.spec, at
        where_from, inside = [], []
        for a, (p, t) in enumerate(zip(pixel, taps, strict=True)):
            begin, end = spec.padding[a]
            y = block.let(p * spec.stride[a] + t * spec.dilation[a] - begin)
            where_from.append(y)
            if a != self.axis:
                inside += [y >= 0] * (begin > 0) + [y < spec.in_spatial[a]] * (end > 0)
        row = memory(block, (len(self.offsets) * lanes,), "local", "row")
        begin, end = spec.padding[self.axis]
        past_end = end > 0 or spec.out_spatial[self.axis] % self.tile > 0
        for number, offset in enumerate(self.offsets):
            y = block.let(where_from[self.axis] + offset)
            within = inside + [y >= 0] * (begin > 0) + [y < spec.in_spatial[self.axis]] * past_end
            index = ops.order(n, channel, [y if a == self.axis else p for a, p in enumerate(where_from)])
            put(block, row, [number * lanes], where(within, read(src, spec.dtype, index, lanes), lanes), lanes)
        return row

    @contextmanager
    def outputs(self, block: Block, pixel: Sequence[Expr]) -> Iterator[tuple[Block, Expr, list[Expr]]]:
        """The body of a loop over the tile: which output, and its pixel; ``pixel`` is the first one."""
        outputs = self.spec.out_spatial[self.axis]
        with unrolled(block, self.tile) as (one, x):
            last = one.let(pixel[self.axis] + x)
            with one.when(last < outputs if outputs % self.tile else True) as there:
                yield there, x, [last if a == self.axis else p for a, p in enumerate(pixel)]


def axis_of(spec: ConvSpec) -> int:
    """The axis along which a thread has several outputs."""
    return spec.rank - 1 if spec.layout == "nhwc" else max(0, spec.rank - 2)
