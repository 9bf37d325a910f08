"""What matrix units are fed with, as tensor expressions: images whose channels are whole vectors."""

from __future__ import annotations

from collections.abc import Callable

from ..deferred import te, tirx
from ..lowering.compute import Expr, round_up
from ..problem.layout import Blocks


def is_whole(blocks: Blocks, groups: int, lanes: int) -> bool:
    """Whether channels are last, and those of each group whole vectors of so many lanes."""
    return blocks.layout == "nhwc" and blocks.channels // groups % lanes == 0


def channels_last(
    tensor: te.Tensor, blocks: Blocks, groups: int, lanes: int, name: str = "channels_last"
) -> Callable[..., Expr]:
    """A tensor of images as a function of ``(n, *spatial, channel)``, every group whole vectors of channels.

    That is the tensor itself, or what a launch of its own lays out: a stage of this ``name``.

    Args:
        blocks: how the tensor lies in memory, NCHW or NHWC.
        lanes: elements of a vector.
    """
    if is_whole(blocks, groups, lanes):
        return lambda *index: tensor(*index)
    n, _, spatial = blocks.logical([int(size) for size in tensor.shape])
    channels = blocks.channels // groups
    whole = round_up(channels, lanes)

    def value(image: Expr, *rest: Expr) -> Expr:
        *position, channel = rest
        if whole == channels:
            return tensor(*blocks.order(image, channel, position))
        group, channel = tirx.floordiv(channel, whole), tirx.floormod(channel, whole)
        read = tensor(*blocks.order(image, group * channels + channel, position))
        return tirx.if_then_else(channel < channels, read, tirx.const(0, tensor.dtype))

    staged = te.compute((n, *spatial, groups * whole), value, name=name)
    return lambda *index: staged(*index)
