"""How tensors of channels and pixels lie in memory: one formula of all layouts.

A block of channels is innermost: element ``(n, channel, pixel)`` is at ``[n][channel / B][pixel][channel % B]`` of a
dense tensor. Of NCHW a block is one channel, of NHWC all of them, of ``nchw16c`` sixteen. An axis that has one element
whatever the size of the tensor, NCHW's last and NHWC's second, is left out.

Nothing here depends on what indices are: numbers, expressions or names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Canonical layout -> channels of a block; 0 = all there are.
BLOCKS = {"nchw": 1, "nhwc": 0, "nchw8c": 8, "nchw16c": 16}
#: Layouts that frameworks have at their boundary; the others are between the layers of a network.
PLAIN = ("nchw", "nhwc")
#: Every accepted layout token -> (canonical layout, rank it names; 0 = any).
LAYOUTS = {
    "nchw": ("nchw", 0),
    "nhwc": ("nhwc", 0),
    "ncw": ("nchw", 1),
    "nwc": ("nhwc", 1),
    "ncdhw": ("nchw", 3),
    "ndhwc": ("nhwc", 3),
    **{
        f"nc{spatial}{size}c": (f"nchw{size}c", rank)
        for size in (8, 16)
        for spatial, rank in (("hw", 0), ("w", 1), ("dhw", 3))
    },
}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a tensor's channels.

    Args:
        layout: canonical.
        channels: of the tensor, a multiple of the block.
    """

    layout: str
    channels: int

    @property
    def size(self) -> int:
        """Channels of a block, which are neighbours in memory."""
        return BLOCKS[self.layout] or self.channels

    @property
    def is_plain(self) -> bool:
        """Whether channels are one axis: all of them are in a block, or each is one."""
        return self.layout in PLAIN

    def order(self, n: Any, channel: Any, spatial: Sequence[Any]) -> tuple[Any, ...]:
        """The index of an element of the tensor."""
        if self.layout == "nchw":
            return (n, channel, *spatial)
        if self.layout == "nhwc":
            return (n, *spatial, channel)
        return (n, channel // self.size, *spatial, channel % self.size)

    def logical(self, index: Sequence[Any]) -> tuple[Any, Any, tuple[Any, ...]]:
        """The inverse of :meth:`order`: ``(n, channel, spatial)``."""
        if self.layout == "nchw":
            return index[0], index[1], tuple(index[2:])
        if self.layout == "nhwc":
            return index[0], index[-1], tuple(index[1:-1])
        return index[0], index[1] * self.size + index[-1], tuple(index[2:-1])

    def shape(self, n: int, spatial: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape; with 1 for images and pixels, that of a vector of channels beside the tensor."""
        if self.is_plain:
            return self.order(n, self.channels, spatial)
        return (n, self.channels // self.size, *spatial, self.size)

    def axes(self, channel: str, spatial: Sequence[str]) -> list[str]:
        """The names of the tensor's axes, outermost first; of a channel's parts, how it is divided."""
        if self.is_plain:
            return list(self.order("n", channel, spatial))
        return ["n", f"{channel}/{self.size}", *spatial, f"{channel}%{self.size}"]

    def channels_first(self, array: Any) -> Any:
        """A NumPy array of this layout as ``[n, channel, *spatial]``: a view where channels are one axis."""
        if self.layout == "nchw":
            return array
        if self.layout == "nhwc":
            return array.transpose(0, array.ndim - 1, *range(1, array.ndim - 1))
        n, parts, *spatial, size = array.shape
        return array.transpose(0, 1, array.ndim - 1, *range(2, array.ndim - 1)).reshape(n, parts * size, *spatial)

    def stored(self, array: Any) -> Any:
        """The inverse of :meth:`channels_first`: a view where it can be one."""
        if self.layout == "nchw":
            return array
        if self.layout == "nhwc":
            return array.transpose(0, *range(2, array.ndim), 1)
        n, channels, *spatial = array.shape
        parted = array.reshape(n, channels // self.size, self.size, *spatial)
        return parted.transpose(0, 1, *range(3, parted.ndim), 2)
