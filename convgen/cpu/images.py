"""Images in memory: any layout as blocks of channels, and a task's own copy of the rows that it reads.

Spatial axes are always three here, those that a tensor lacks of size 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..deferred import tirx
from ..lowering.compute import Expr, narrow, round_up
from ..problem.layout import Blocks
from ..problem.spec import ConvSpec
from .vector import Block, Narrow, finish, load_within, prefetch, store, zeros


@dataclass(frozen=True)
class Images:
    """How a tensor of images lies in memory.

    Attributes:
        layout: its name in a spec.
        size: planes, rows and columns.
        rank: how many of these axes the tensor has, the last ones.
    """

    layout: str
    channels: int
    size: tuple[int, ...]
    rank: int

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.layout, self.channels)

    @property
    def block(self) -> int:
        """Channels that lie innermost: one in NCHW, all in NHWC."""
        return self.blocks.size

    def place(self, image: Expr, block: Expr, pixel: Sequence[Expr], at: Expr) -> list[Expr]:
        """The index of number ``at`` of a row of a block of channels, the row of a ``pixel``."""
        plane_line = pixel[3 - self.rank : 2]
        if self.layout == "nchw":
            return [image, block, *plane_line, at]
        return [image, *([] if self.layout == "nhwc" else [block]), *plane_line, 0, at]

    def element(self, image: Expr, channel: Expr, pixel: Sequence[Expr]) -> list[Expr]:
        """The index of a channel of a pixel."""
        return list(self.blocks.order(image, channel, pixel[3 - self.rank :]))

    def fetch(
        self, block: Block, tensor: Any, place: tuple[Expr, Expr, Sequence[Expr]], columns: Iterable[int]
    ) -> None:
        """Fetch pixels of a row of a channel into the L2 cache, those so many columns from one on, and what lies in
        their lines. Each may lie past the end.

        Args:
            place: image, channel and pixel.
        """
        image, channel, (*outer, x) = place
        for column in columns:
            block.add(prefetch(tensor, self.element(image, channel, [*outer, x + column]), level=2))

    def copied(
        self,
        body: Block,
        tensor: Any,
        dtype: str,
        image: Expr,
        corner: Sequence[Expr],
        extent: Sequence[int],
        lanes: int,
    ) -> tirx.Buffer:
        """A copy in f32 of an ``extent`` of an image from the pixel ``corner`` on, with zeros outside the image.

        ``[plane, line, block of channels, column and channel]``.
        """
        planes, lines, columns = extent
        width, blocks = round_up(columns * self.block, lanes), self.channels // self.block
        panel = body.buffer((planes, lines, blocks, width))
        with body.loop(planes) as (plane, z), plane.loop(lines) as (line, y):
            source = [line.let(c + i) for c, i in zip(corner, (z, y), strict=False)]
            inside = tirx.all(*(c for i, size in zip(source, self.size, strict=False) for c in (i >= 0, i < size)))
            for condition, stored in ((inside, True), (tirx.Not(inside), False)):
                with (
                    line.when(condition) as case,
                    case.loop(blocks) as (one, block),
                    one.loop(width // lanes) as (step, i),
                ):
                    value = zeros(lanes)
                    if stored:
                        at = step.let(corner[2] * self.block + i * lanes)
                        place = self.place(image, block, [*source, 0], at)
                        value = load_within(tensor, dtype, place, lanes, lanes, size=self.size[2] * self.block)
                    step.add(store(panel, "f32", [z, y, block, i * lanes], value, lanes, lanes))
        return panel

    def finish(
        self,
        body: Block,
        spec: ConvSpec,
        tensors: tuple[Any, Any],
        place: tuple[Expr, Expr, Sequence[Expr]],
        value: Expr,
        lanes: int,
        count: int,
        given: Mapping[str, Expr],
        narrowed: Narrow = narrow,
    ) -> None:
        """The epilogue and store of ``count`` sums of a pixel, from a channel on: block by block where a block has
        fewer channels than a vector has lanes.

        Args:
            tensors: dst and the residual.
            place: image, channel and pixel.
            given: bias, slope and scale, as :func:`~convgen.cpu.vector.finish` takes them.
            narrowed: makes of f32 what is stored.
        """
        image, channel, pixel = place
        size = lanes if self.blocks.is_plain else min(lanes, self.block)
        for start in range(0, count, size):

            def part(vector: Expr, start: int = start) -> Expr:
                return vector if size == lanes else body.let(tirx.Shuffle([vector], list(range(start, start + size))))

            index, some = self.element(image, channel + start, pixel), min(size, count - start)
            parts = {name: part(vector) for name, vector in given.items()}
            finish(body, spec, *tensors, index, part(value), size, some, narrowed=narrowed, **parts)


def three(values: Sequence[int], fill: int = 1) -> tuple[int, ...]:
    """Values of the last axes, as of three."""
    return (fill,) * (3 - len(values)) + tuple(values)


def src_images(spec: ConvSpec) -> Images:
    """How src lies."""
    return Images(spec.layout, spec.ic, three(spec.in_spatial), spec.rank)


def dst_images(spec: ConvSpec) -> Images:
    """How dst lies, and the residual."""
    return Images(spec.dst_layout, spec.oc, three(spec.out_spatial), spec.rank)
