"""The gradient of weights as what it is of any layer: a correlation of two tensors of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..deferred import tirx
from ..lowering.compute import Expr, Operands, ceildiv, narrow, nothing_packed
from ..lowering.schedule import Program
from ..problem.spec import ConvSpec
from .images import Images, three
from .product import LINE
from .vector import Block, load_within, written

#: Pixels of a line of what are a single line's.
LONGEST = 512


@dataclass(frozen=True)
class Correlation:
    """``dst[o, c, k] = sum over n, p of outer[n, o, p] * inner[n, c, p * stride + k * dilation - begin]``, group by
    group; ``dst`` lies ``[channel of outer][channel of inner, of the group's][tap]``.

    Of a convolution, outer is the gradient of dst and inner is src. Of a transposed layer they have changed places.
    Spatial axes are always three.
    """

    spec: ConvSpec

    @property
    def is_swapped(self) -> bool:
        """Whether outer is src."""
        return self.spec.transposed

    def ordered(self, src: Any, gradient: Any) -> tuple[Any, Any]:
        """``(inner, outer)``."""
        return (gradient, src) if self.is_swapped else (src, gradient)

    @cached_property
    def inner(self) -> Images:
        return self._gradient if self.is_swapped else self._src

    @cached_property
    def outer(self) -> Images:
        return self._src if self.is_swapped else self._gradient

    @property
    def _src(self) -> Images:
        return Images(self.spec.layout, self.spec.ic, self._lines(self.spec.in_spatial), self.spec.rank)

    @property
    def _gradient(self) -> Images:
        return Images(self.spec.dst_layout, self.spec.oc, self._lines(self.spec.out_spatial), self.spec.rank)

    @cached_property
    def is_folded(self) -> bool:
        """Whether the pixels of a pointwise layer, a single line, are taken for several: a task works on some lines at
        a time, which then stay in the cache.
        """
        return self.spec.is_pointwise and self.spec.rank == 1 and _line_of(self.spec.in_spatial[0]) > 0

    def _lines(self, spatial: Sequence[int]) -> tuple[int, ...]:
        if self.is_folded:
            width = _line_of(spatial[0])
            return (1, spatial[0] // width, width)
        return three(spatial)

    def element(self, images: Images, image: Expr, channel: Expr, pixel: Sequence[Expr]) -> list[Expr]:
        """The index of a channel of a pixel of inner or outer, in its tensor."""
        if self.is_folded:
            pixel = (0, 0, pixel[1] * images.size[2] + pixel[2])
        return images.element(image, channel, pixel)

    @property
    def inner_bytes(self) -> int:
        return self.spec.bytes["residual" if self.is_swapped else "src"]

    @property
    def outer_bytes(self) -> int:
        return self.spec.bytes["src" if self.is_swapped else "residual"]

    @property
    def own(self) -> int:
        """Channels of inner in a group."""
        return self.inner.channels // self.spec.groups

    @property
    def group(self) -> int:
        """Channels of outer in a group."""
        return self.outer.channels // self.spec.groups

    @property
    def channels(self) -> ConvSpec:
        """A layer from the channels of inner to those of outer."""
        return ConvSpec(1, self.inner.channels, self.outer.channels, (1,), (1,), groups=self.spec.groups)

    @property
    def width(self) -> int:
        """Pixels of a line of outer."""
        return self.outer.size[2]

    @property
    def lines(self) -> int:
        """Lines of an image of outer."""
        return self.outer.size[0] * self.outer.size[1]

    @cached_property
    def kernel(self) -> tuple[int, ...]:
        return three(self.spec.kernel)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @cached_property
    def stride(self) -> tuple[int, ...]:
        return three(self.spec.stride)

    @cached_property
    def dilation(self) -> tuple[int, ...]:
        return three(self.spec.dilation)

    @cached_property
    def begin(self) -> tuple[int, ...]:
        return three(tuple(begin for begin, _ in self.spec.padding), 0)

    def valid(self, tap: int) -> tuple[int, int]:
        """The pixels of a line, from the first to past the last, whose ``tap`` of a row lies in inner."""
        shift, stride, size = tap * self.dilation[2] - self.begin[2], self.stride[2], self.inner.size[2]
        start = min(self.width, max(0, ceildiv(-shift, stride)))
        return start, max(start, min(self.width, (size - 1 - shift) // stride + 1))

    @cached_property
    def is_single(self) -> bool:
        """Whether a pixel of outer meets a single pixel of inner, which there is for each."""
        axes = zip(self.outer.size, self.inner.size, self.stride, self.begin, strict=True)
        inside = all(begin <= 0 and (out - 1) * stride - begin < size for out, size, stride, begin in axes)
        return self.taps == 1 and inside

    @property
    def is_gathered(self) -> bool:
        """Whether these pixels lie apart, near enough to be put side by side."""
        return self.is_single and max(self.stride) > 1 and self.stride[2] <= LINE

    def line(self, pixel: Sequence[Expr], tap: Sequence[Expr]) -> Iterator[Expr]:
        """The plane and line of inner that a tap reads for a plane and line of outer."""
        for p, t, stride, step, begin in zip(pixel, tap, self.stride, self.dilation, self.begin, strict=False):
            yield p * stride + t * step - begin

    def is_inside(self, line: Sequence[Expr]) -> Expr:
        """Whether there is such a plane and line of inner."""
        return tirx.all(*(c for x, size in zip(line, self.inner.size, strict=False) for c in (x >= 0, x < size)))


def _line_of(pixels: int) -> int:
    """The longest line, of few pixels, of which so many pixels are several; 0 where there is none."""
    longest = max(size for size in range(1, LONGEST + 1) if pixels % size == 0)
    return longest if LONGEST // 8 <= longest < pixels else 0


def total(block: Block, value: Expr, lanes: int) -> Expr:
    """The sum of a vector's lanes, halves added to halves."""
    while lanes > 1:
        lanes //= 2
        low, high = (
            tirx.Shuffle([value], list(range(first, first + lanes)) if lanes > 1 else [first]) for first in (0, lanes)
        )
        value = block.let(low + high)
    return value


def gradient_program(spec: ConvSpec, lanes: int, kernel: Callable[[Any, Any, Any], Any], *, with_bias: bool) -> Program:
    """The program of a gradient of weights: what ``kernel(src, gradient, dst)`` states.

    ``with_bias``: followed by the gradient of the bias, which the kernel does not make.
    """

    def statement(src: Any, gradient: Any, parameters: dict[str, Any], dst: Any) -> Any:
        block = Block()
        block.add(kernel(src, gradient, dst))
        if with_bias:
            _add_sums_of_channels(block, spec, lanes, gradient, dst)
        return block.statement()

    return written(Operands(spec), [nothing_packed()], statement)


def _add_sums_of_channels(block: Block, spec: ConvSpec, lanes: int, gradient: Any, dst: Any) -> None:
    """The gradient of the bias from that of dst, NCHW or NHWC, where it is read for nothing else in this order: sums
    over images and pixels, stored after the gradient of weights. A task has a channel, or a vector of them.
    """
    images, dtype = Images(spec.dst_layout, spec.oc, three(spec.out_spatial), spec.rank), spec.dtype
    first = math.prod(spec.weights_shape)
    planes, height, width = images.size
    is_last = spec.dst_layout == "nhwc"
    with block.loop(ceildiv(spec.oc, lanes) if is_last else spec.oc, parallel=True) as (task, i):
        sums = task.registers([0], lanes)
        steps = width if is_last else ceildiv(width, lanes)
        with (
            task.loop(spec.n) as (image, n),
            image.loop(planes) as (plane, z),
            plane.loop(height) as (line, y),
            line.loop(steps) as (step, x),
        ):
            place = images.element(n, i * lanes, (z, y, x)) if is_last else images.element(n, i, (z, y, x * lanes))
            sums.add(step, 0, load_within(gradient, dtype, place, lanes, lanes))
        if not is_last:
            task.add(tirx.BufferStore(dst, narrow(total(task, sums[0], lanes), dtype), [first + i]))
            return
        kept = task.buffer((lanes,))
        task.add(tirx.BufferStore(kept, sums[0], [tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)]))
        with task.loop(tirx.min(lanes, spec.oc - i * lanes)) as (channel, lane):
            channel.add(tirx.BufferStore(dst, narrow(kept[lane], dtype), [first + i * lanes + lane]))
