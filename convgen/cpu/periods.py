"""Output rows of a strided transposed convolution, as many as the stride at a time: all that a few rows of src give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..deferred import tirx
from ..lowering.compute import Expr, ceildiv
from ..problem.spec import ConvSpec
from .vector import Block, stretches


class Period(NamedTuple):
    """What a period of output rows meets: how many rows there are, and the rows of src that lie in the image, counted
    from the period's number: each with ``(output row, row of the kernel)`` of its readers.
    """

    rows: int
    met: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


class Periods:
    """Output rows as periods of as many as the stride, and runs of periods that are alike.

    Row ``stride * p + j`` is met by tap k of src's row ``p + (j + begin - k * dilation) / stride``, where that divides.
    """

    def __init__(self, spec: ConvSpec) -> None:
        self.stride, self._size, self._out = spec.stride[0], spec.in_spatial[0], spec.out_spatial[0]
        begin, dilation, taps = spec.padding[0][0], spec.dilation[0], range(spec.kernel[0])
        reads = [(j, k, j + begin - k * dilation) for j in range(self.stride) for k in taps]
        self._met: dict[int, list[tuple[int, int]]] = {}
        for j, k, distance in reads:
            if distance % self.stride == 0:
                self._met.setdefault(distance // self.stride, []).append((j, k))
        self.count = ceildiv(self._out, self.stride)
        start = min(self.count, max(0, -min(self._met, default=0)))
        whole = min(self._size - max(self._met, default=0), self._out // self.stride)
        self.runs = stretches(self.count, start, max(start, min(self.count, whole)), self._period)

    @property
    def read(self) -> int:
        """Rows of src that a period reads."""
        return len(self._met)

    def _period(self, p: int) -> Period:
        rows = min(self.stride, self._out - p * self.stride)
        inside = sorted(offset for offset in self._met if 0 <= p + offset < self._size)
        met = ((offset, tuple((j, k) for j, k in self._met[offset] if j < rows)) for offset in inside)
        return Period(rows, tuple(met))

    def periods(self, body: Block, start: Expr = 0, end: Expr = None) -> Iterator[tuple[Block, Expr, Period]]:
        """Code for the periods, or those from ``start`` to ``end``: ``(its body, the number, the period)``."""
        for first, count, period in self.runs:
            if end is not None:
                low = body.let(tirx.max(start, first))
                first, count = low, body.let(tirx.max(tirx.min(end, first + count) - low, 0))
            with body.loop(count) as (inner, i):
                yield inner, inner.let(first + i), period
