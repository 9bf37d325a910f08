"""Weights on their way into vectors of output channels: read as they lie, transposed in registers.

In memory an output channel's weights follow each other; a kernel with channels in the lanes wants those of all its
lanes side by side. One by one, each costs a load and a shuffle: so squares are read, as many numbers of as many
channels, and transposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..deferred import te, tirx
from ..lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv, flat, round_up, unflat
from ..lowering.packing import LARGE
from .vector import Block, interleave, load, load_within, store, zeros

#: Input channels that are transposed at a time.
PART = 16


class WeightRows:
    """How a layer's weights lie, and panels of them: channels of one group, taps as a convolution reads them.

    Args:
        tile_oc: output channels of a block of a group's, of which the last may lack some.

    Attributes:
        lanes: of a vector of output channels.
        outputs, own: output and input channels of a group.
        taps: of the kernel.
        pitch: rows of a panel from an input channel to the next.
    """

    def __init__(self, ops: Operands, lanes: int, tile_oc: int) -> None:
        spec, self.lanes, self._dtype = ops.spec, lanes, ops.weights.dtype
        self.outputs, self.own, self.taps = spec.oc // spec.groups, spec.ic // spec.groups, math.prod(spec.kernel)
        self._is_ragged = self.outputs % tile_oc > 0
        shape = [int(size) for size in ops.weights.tensor.shape]
        self._size, self._rank = math.prod(shape), len(shape)

        def place(group: int, output: int, channel: int, taps: tuple[int, ...]) -> int:
            o, c = group * self.outputs + output, channel
            if spec.transposed:
                o, c = group * self.own + channel, output
            return int(flat(ops.weights.place((o, c, *taps)), shape))

        first, last = (0,) * spec.rank, tuple(k - 1 for k in spec.kernel)
        origin = place(0, 0, 0, first)
        self._is_mirrored = place(0, 0, 0, last) < origin
        self._group = place(1, 0, 0, first) - origin if spec.groups > 1 else 0
        self._output = place(0, 1, 0, first) - origin if self.outputs > 1 else 0
        self._channel = place(0, 0, 1, first) - origin if self.own > 1 else self.taps
        self._is_row = self._channel == self.taps  # input channels follow each other: all of an output channel does
        self.pitch = self.taps if self._is_row else round_up(self.taps, lanes)

    @property
    def are_apart(self) -> bool:
        """Whether neighbouring output channels lie apart: else there is nothing to transpose."""
        return self._output > 1

    @property
    def panel_rows(self) -> int:
        """Of :data:`PART` channels: ``[input channel and tap]``."""
        return round_up(PART * self.pitch, self.lanes)

    def row(self, channel: Expr, tap: Expr) -> Expr:
        """Which row of a panel is a tap of a channel."""
        return channel * self.pitch + (self.taps - 1 - tap if self._is_mirrored else tap)

    def panel(
        self, body: Block, source: Any, to: tuple[Any, Expr], group: Expr, output: Expr, channel: Expr, count: Expr
    ) -> None:
        """Fill a panel, from a lane on, with ``count`` input channels of a vector of output channels, from a channel on
        of each; zeros past a group's last output channel.
        """
        start = body.let(group * self._group + channel * self._channel)
        if self._is_row:
            rows, length = 1, count * self.taps
        else:
            rows, length = count, self.taps
        squares = ceildiv(length, self.lanes) if isinstance(length, int) else (length + (self.lanes - 1)) // self.lanes
        with body.loop(rows) as (row, c), row.loop(squares) as (square, s):
            self._square(square, source, to, start + c * self._channel, output, (c * self.pitch, s * self.lanes))

    def _square(
        self, body: Block, source: Any, to: tuple[Any, Expr], start: Expr, output: Expr, at: tuple[Expr, Expr]
    ) -> None:
        """Transpose as many numbers as lanes of as many output channels."""
        lanes, dtype, (panel, lane) = self.lanes, self._dtype, to
        exists = [tirx.min(output + i, self.outputs - 1) if self._is_ragged else output + i for i in range(lanes)]
        places = [body.let(start + at[1] + o * self._output) for o in exists]
        inside = places[-1] <= self._size - lanes
        for condition, whole in ((inside, True), (tirx.Not(inside), False)):
            with body.when(condition) as case:
                read = [self._read(case, source, dtype, place, whole) for place in places]
                for i, value in enumerate(interleave(case, read, lanes)):
                    case.add(store(panel, "f32", [at[0] + at[1] + i, lane], self._kept(value, output), lanes, lanes))

    def _read(self, body: Block, source: Any, dtype: str, place: Expr, whole: bool) -> Expr:
        index, lanes = [*[0] * (self._rank - 1), place], self.lanes
        if whole:
            return body.let(load(source, dtype, index, lanes, lanes))
        return body.let(load_within(source, dtype, index, lanes, lanes, size=self._size))

    def _kept(self, value: Expr, output: Expr) -> Expr:
        """Without what stands in lanes past the last channel."""
        if not self._is_ragged:
            return value
        ramp = tirx.Ramp(output, tirx.const(1, "int32"), self.lanes)
        exists = ramp < tirx.Broadcast(tirx.const(self.outputs, "int32"), self.lanes)
        return tirx.Select(exists, value, zeros(self.lanes))


class Channels(NamedTuple):
    """Input channels in a panel: the index of the first in its group, and how many there are."""

    first: Expr
    count: Expr


#: Stores what is packed of input channels for output channels. It gets a packed tensor, the index of a block in it and
#: of a lane there, a panel of those that are stored from that lane on, and the input channels.
Stores = Callable[[Block, Any, tuple[Expr, Expr], Any, Channels], None]


def packed_by_panels(
    ops: Operands, rows: WeightRows, shape: tuple[int, ...], stores: Stores, *, together: bool = False
) -> te.Tensor:
    """Packed weights ``[oc/t]…[t]`` of a shape, blocks of each group's output channels, part by part of the input's.

    ``together``: ``stores`` gets all vectors of a block side by side, not one after another.
    """
    blocks, lanes, parts = shape[0] // ops.spec.groups, rows.lanes, ceildiv(rows.own, PART)

    def statement(ins: Any, outs: Any) -> Any:
        whole = Block()
        with whole.loop(shape[0] * parts, parallel=math.prod(shape) >= LARGE) as (body, index):
            b, channel = body.let(tirx.floordiv(index, parts)), body.let(tirx.floormod(index, parts) * PART)
            count = PART if rows.own % PART == 0 else body.let(tirx.min(PART, rows.own - channel))
            group, first = (body.let(part) for part in unflat(b, (ops.spec.groups, blocks)))
            panel, channels = body.buffer((rows.panel_rows, shape[-1] if together else lanes)), Channels(channel, count)
            with body.loop(shape[-1] // lanes) as (vector, v):
                output = vector.let(first * shape[-1] + v * lanes)
                rows.panel(vector, ins[0], (panel, v * lanes if together else 0), group, output, channel, count)
                if not together:
                    stores(vector, outs[0], (b, v * lanes), panel, channels)
            if together:
                stores(body, outs[0], (b, 0), panel, channels)
        return whole.statement()

    return te.extern(shape, [ops.weights.tensor], statement, name="weights_packed", dtype=ACCUMULATOR)
