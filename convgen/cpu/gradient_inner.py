"""What tiles of a gradient of weights read of inner, where a tap reads one pixel for each of outer's: pixels that lie
apart are put side by side, and those that come next are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..deferred import tirx
from ..hardware.target import Target
from ..lowering.compute import Expr, ceildiv, unflat
from ..lowering.schedule import Picks
from .correlation import Correlation
from .counted import at_most
from .product import LINE
from .vector import Block, gathered, load_within, prefetch, store

#: The part of the L2 cache that is filled.
KEPT = 0.75


class Piece(NamedTuple):
    """What is multiplied at a time: of ``images`` from ``image`` on, ``lines`` of outer from ``line`` on."""

    image: Expr
    images: Expr
    line: Expr
    lines: Expr


class Channels(NamedTuple):
    """A tile's channels of inner: ``number`` from ``first`` on. Of those past ``last`` that one is taken again; where
    it is None, there are none.
    """

    first: Expr
    number: int
    last: Expr | None

    def at(self, index: Expr) -> Expr:
        place = self.first + index
        return place if self.last is None else tirx.min(place, self.last)


def deepened(relation: Correlation, target: Target, picks: Picks, domains: Mapping[str, Sequence[int]]) -> Picks | None:
    """The point with as many rows or images in a piece as fit into the L2 cache, beside the sums and what comes next;
    None where these are none.
    """
    channels, line = picks.blocks * picks.tile_oc, relation.width
    held = channels + (relation.own if relation.inner.layout == "nhwc" else picks.tile_c)
    sums = channels * ceildiv(relation.own, picks.parts)
    depth = (KEPT * target.l2 // 4 - sums) // (2 * held)
    if depth >= relation.lines * line:
        return picks.replace(images=at_most(depth // (relation.lines * line), domains["images"]), rows=relation.lines)
    if depth >= line or picks.blocks == 1:
        return picks.replace(rows=at_most(depth // line, domains["rows"]))
    return None


class Inner:
    """Inner, for tiles of a task.

    Args:
        tensor: its buffer.
        rows, images: of a piece at most.
        blocks: how many tiles take turns on the same of inner.
    """

    def __init__(self, relation: Correlation, tensor: Any, lanes: int, rows: int, images: int, blocks: int) -> None:
        self.relation, self.tensor, self.lanes = relation, tensor, lanes
        self.rows, self.images, self.blocks = rows, images, blocks
        self.is_last = relation.inner.layout == "nhwc"

    # ---- pixels side by side -------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Pixels of a piece."""
        return self.images * self.rows * self.relation.width

    def buffer(self, block: Block, channels: int) -> Any:
        """Scratch memory for the pixels of so many channels."""
        return block.buffer((channels * (self.depth + self.lanes) + self.lanes,))

    def place(self, channels: int, channel: Expr, pixel: Expr) -> Expr:
        """Where a tile's number lies there."""
        return pixel * channels + channel if self.is_last else channel * (self.depth + self.lanes) + pixel

    def gather(self, block: Block, copy: Any, piece: Piece, channels: Channels) -> None:
        """Puts a tile's pixels side by side. Vectors are stored whole: what follows is stored over what is too much."""
        relation, lanes = self.relation, self.lanes
        if self.is_last:
            for image, line, where, at in self._lines(block, piece):
                with line.loop(relation.width) as (pixel, x):
                    column = pixel.let(x * relation.stride[2] - relation.begin[2])
                    for c in range(0, channels.number, lanes):
                        value = self._load(image, channels.first + c, [*where, column], relation.inner.channels)
                        to = self.place(channels.number, c, at + x)
                        pixel.add(store(copy, "f32", [to], value, lanes, lanes))
            return
        stride = relation.stride[2]
        count = ceildiv((min(lanes, relation.width) - 1) * stride + 1, lanes)
        order = [min(i * stride, count * lanes - 1) for i in range(lanes)]
        with block.loop(channels.number) as (channel, c):
            source = channel.let(channels.at(c))
            for image, line, where, at in self._lines(channel, piece):
                with line.loop(ceildiv(relation.width, lanes)) as (step, v):
                    x = step.let(v * (lanes * stride) - relation.begin[2])
                    read = [step.let(self._load(image, source, [*where, x + i * lanes])) for i in range(count)]
                    value = read[0] if stride == 1 else gathered(read, order, lanes)
                    to = self.place(channels.number, c, at + v * lanes)
                    step.add(store(copy, "f32", [to], value, lanes, lanes))

    def _lines(self, block: Block, piece: Piece) -> Iterator[tuple[Expr, Block, list[Expr], Expr]]:
        """Lines of a piece: image, body, plane and line of inner, and the number of the first pixel."""
        relation = self.relation
        with block.loop(piece.images) as (image, j), image.loop(piece.lines) as (line, i):
            at = line.let((j * self.rows + i) * relation.width)
            yield piece.image + j, line, self._source(line, piece.line + i), at

    def _source(self, block: Block, line: Expr) -> list[Expr]:
        """The plane and line of inner that a line of outer reads."""
        pixel = unflat(block.let(line), self.relation.outer.size[:2])
        return [block.let(p) for p in self.relation.line(pixel, (0, 0))]

    def _load(self, image: Expr, channel: Expr, pixel: Sequence[Expr], size: int | None = None) -> Expr:
        place = self.relation.element(self.relation.inner, image, channel, pixel)
        return load_within(self.tensor, self.relation.spec.dtype, place, self.lanes, self.lanes, size=size)

    # ---- what comes next -----------------------------------------------------------------------

    def fetching(self, piece: Piece, channels: Channels, following: Channels, b: Expr) -> Callable[[Block, Expr], None]:
        """What fetches in a step of a tile, by the number of its pixel in its piece, some of what comes next: of NHWC
        the same channels of the next piece, of NCHW the ``following`` channels.

        Args:
            piece: where what comes next is.
            b: which of the tiles it is that take turns.
        """
        if self.is_last:
            return lambda step, pixel: self._fetch_row(step, piece, channels, pixel)
        return lambda step, pixel: self._fetch_plane(step, piece, following, pixel, b)

    def _fetch_row(self, step: Block, piece: Piece, channels: Channels, pixel: Expr) -> None:
        relation = self.relation
        j, line, x = self._pixel(step, pixel)
        where = [*self._source(step, piece.line + line), x * relation.stride[2] - relation.begin[2]]
        for c in range(0, channels.number, LINE):
            place = relation.element(relation.inner, piece.image + j, channels.first + c, where)
            step.add(prefetch(self.tensor, place, level=2))

    def _fetch_plane(self, step: Block, piece: Piece, channels: Channels, pixel: Expr, b: Expr) -> None:
        """With each pixel its share of the memory lines of a line of inner, of all channels."""
        relation = self.relation
        parts = ceildiv((relation.width - 1) * relation.stride[2] + LINE, LINE)
        steps, lines = relation.width * self.blocks, channels.number * parts
        each, apart = ceildiv(lines, steps), max(1, steps // lines)
        j, line, x = self._pixel(step, pixel)
        where = self._source(step, piece.line + line)
        for e in range(each):
            number = step.let(tirx.min(tirx.truncdiv(b * relation.width + x, apart) * each + e, lines - 1))
            column = tirx.truncmod(number, parts) * LINE - relation.begin[2]
            channel = channels.at(tirx.truncdiv(number, parts))
            place = relation.element(relation.inner, piece.image + j, channel, [*where, column])
            step.add(prefetch(self.tensor, place, level=2))

    def _pixel(self, step: Block, pixel: Expr) -> tuple[Expr, Expr, Expr]:
        """Image, line and column of a piece's pixel."""
        width = self.relation.width
        row, x = step.let(tirx.truncdiv(pixel, width)), step.let(tirx.truncmod(pixel, width))
        if self.images == 1:
            return 0, row, x
        return step.let(tirx.truncdiv(row, self.rows)), step.let(tirx.truncmod(row, self.rows)), x
