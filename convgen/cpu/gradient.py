"""The gradient of weights by register tiles: what a task of :mod:`convgen.schedules.cpu_gradient` does, statement by
statement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..deferred import tirx
from ..lowering.compute import ACCUMULATOR, Expr, ceildiv, narrow, unflat, widen
from ..lowering.schedule import Picks
from .correlation import Correlation
from .gradient_inner import Channels, Inner, Piece
from .product import multiply, pieces
from .vector import Block, interleave, load_within, prefetch

#: What fetches ahead in a step of a tile, by the number of its pixel.
Fetch: TypeAlias = Callable[[Block, Expr], None]


class Reach(NamedTuple):
    """Pixels of a line of outer whose taps from ``first`` on all lie in inner: from ``start`` to ``end``."""

    first: int
    taps: int
    start: int
    end: int


def reaches(relation: Correlation, most: int) -> list[Reach]:
    """The taps of a row of the kernel, at most so many at a time."""
    found, first = [], 0
    for taps, times in pieces(relation.kernel[2], most):
        for _ in range(times):
            start, end = relation.valid(first)[0], relation.valid(first + taps - 1)[1]
            found.append(Reach(first, taps, start, max(start, end)))
            first += taps
    return found


def _either(condition: Expr, first: Expr, second: Expr) -> Expr:
    """The first value where a condition holds, which may be known; else the second one."""
    if isinstance(condition, bool):
        return first if condition else second
    return tirx.Select(condition, first, second)


class Fetches(NamedTuple):
    """Whether what comes next of outer, and of inner, is fetched into the L2 cache while products are made."""

    outer: bool
    inner: bool


class WeightsGradient:
    """The statements of ``main``.

    Args:
        relation: of the layer's tensors; its outer is what is put in order, in the vector lanes.
        picks: ``tile_oc tile_c blocks images rows parts``, as the schedule's docstring explains them.
        most_taps: of a row of the kernel in one tile.
        src, gradient, dst: buffers.
    """

    def __init__(
        self,
        relation: Correlation,
        picks: Picks,
        lanes: int,
        most_taps: int,
        fetches: Fetches,
        src: Any,
        gradient: Any,
        dst: Any,
    ) -> None:
        self.relation, self.picks, self.lanes, self.fetches, self.dst = relation, picks, lanes, fetches, dst
        self.inner, self.outer = relation.ordered(src, gradient)
        self.dtype, self.groups = relation.spec.dtype, relation.spec.groups
        self.own, self.group, self.width = relation.own, relation.group, relation.width
        self.vectors, self.most_taps = picks.tile_oc // lanes, most_taps
        self.lines, self.taps = relation.lines, relation.kernel
        self.channels = ceildiv(self.own, picks.parts)
        self.with_bias = relation.spec.bias and not relation.is_swapped
        self.reader = Inner(relation, self.inner, lanes, picks.rows, picks.images, picks.blocks)

    def statement(self) -> Any:
        picks = self.picks
        block, tasks = Block(), ceildiv(self.group, picks.tile_oc) // picks.blocks
        with block.loop(self.groups * tasks * picks.parts, parallel=True) as (task, i):
            part, rest = task.let(i % picks.parts), task.let(i // picks.parts)
            group, first = task.let(rest // tasks), task.let(rest % tasks * (picks.blocks * picks.tile_oc))
            start = task.let(self.own * part // picks.parts)
            self._task(task, part, group, first, start)
        return block.statement()

    def _task(self, task: Block, part: Expr, group: Expr, first: Expr, start: Expr) -> None:
        """The gradients of ``blocks`` times ``tile_oc`` output channels of a group, from ``first`` on, and a part of
        its input channels, from ``start`` on.
        """
        picks, lanes, n = self.picks, self.lanes, self.relation.spec.n
        rows, images, blocks = picks.rows, picks.images, picks.blocks
        count = self.channels * math.prod(self.taps)
        sums = task.buffer((blocks, count, self.vectors, lanes))
        ordered = task.buffer((blocks, self.reader.depth + lanes, self.vectors, lanes))
        copy = self.reader.buffer(task, min(picks.tile_c, self.channels)) if self.relation.is_gathered else None
        of_bias = task.buffer((blocks, self.vectors, lanes)) if self.with_bias else None
        with task.loop(blocks) as (one, b):
            self._clear(one, sums, b, count)
            if of_bias is not None:
                self._clear(one, of_bias, b)
        with task.loop(ceildiv(n, images)) as (image, i), image.loop(ceildiv(self.lines, rows)) as (body, at):
            line, from_image = body.let(at * rows), body.let(i * images)
            lines = rows if self.lines % rows == 0 else body.let(tirx.min(rows, self.lines - line))
            several = images if n % images == 0 else body.let(tirx.min(images, n - from_image))
            piece = Piece(from_image, several, line, lines)
            with body.loop(several) as (one, j), one.loop(blocks) as (each, b):
                self._order(each, ordered, piece, j, b, group, first + b * picks.tile_oc)
            if of_bias is not None:
                with body.when(part == 0) as case, case.loop(blocks) as (one, b):
                    self._add_bias(one, of_bias, ordered, b, several * lines * self.width)
            self._products(body, (sums, ordered, copy), piece, (group, first, start))
        end = self.own * (part + 1) // picks.parts
        with task.loop(blocks) as (one, b):
            self._store(one, sums, b, group, one.let(first + b * picks.tile_oc), start, end)
        if of_bias is not None:
            with task.when(part == 0) as case, case.loop(blocks) as (one, b):
                self._store_bias(one, of_bias, b, group, one.let(first + b * picks.tile_oc))

    def _row(self, lanes: int) -> Expr:
        return tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)

    def _vector(self, buffer: Any, *index: Expr) -> Expr:
        return tirx.BufferLoad(buffer, [*index, self._row(self.lanes)])

    def _put(self, block: Block, buffer: Any, value: Expr, *index: Expr) -> None:
        place = [tirx.const(i, "int32") if isinstance(i, int) else i for i in index]
        block.add(tirx.BufferStore(buffer, value, [*place, self._row(self.lanes)]))

    def _clear(self, block: Block, buffer: Any, b: Expr, count: int = 0) -> None:
        nothing = tirx.Broadcast(tirx.const(0, ACCUMULATOR), self.lanes)
        if not count:
            for v in range(self.vectors):
                self._put(block, buffer, nothing, b, v)
            return
        with block.loop(count) as (one, i):
            for v in range(self.vectors):
                self._put(one, buffer, nothing, b, i, v)

    # ---- gradients of dst ----------------------------------------------------------------------

    def _order(self, body: Block, ordered: Any, piece: Piece, j: Expr, b: Expr, group: Expr, first: Expr) -> None:
        """``[pixel][channel]`` of an image's lines, the j-th of a piece, for the b-th block, whose channels begin at
        ``first``; those past the group's last are not used.
        """
        pixels, lanes, relation = self.lines * self.width, self.lanes, self.relation
        images, n, count = relation.outer, piece.image + j, piece.lines * self.width
        start, at = body.let(piece.line * self.width), body.let(j * (self.picks.rows * self.width))
        if images.layout == "nhwc":
            end = body.let((group + 1) * self.group)
            with body.loop(count) as (one, p):
                pixel = one.let((start + p) * images.channels)
                for v in range(self.vectors):
                    place = images.place(n, 0, (0, 0, 0), pixel + group * self.group + first + v * lanes)
                    value = load_within(self.outer, self.dtype, place, lanes, lanes, size=pixel + end)
                    self._put(one, ordered, value, b, at + p, v)
            return
        with body.loop((count + (lanes - 1)) // lanes) as (square, s):
            for v in range(self.vectors):
                read = []
                for i in range(lanes):
                    channel = group * self.group + tirx.min(first + (v * lanes + i), self.group - 1)
                    place = images.place(n, channel, (0, 0, 0), start + s * lanes)
                    read.append(square.let(load_within(self.outer, self.dtype, place, lanes, lanes, size=pixels)))
                for i, value in enumerate(interleave(square, read, lanes)):
                    self._put(square, ordered, value, b, at + s * lanes + i, v)

    def _add_bias(self, body: Block, of_bias: Any, ordered: Any, b: Expr, count: Expr) -> None:
        sums = body.registers(range(self.vectors), self.lanes)
        with body.loop(count) as (one, p):
            for v in range(self.vectors):
                sums.add(one, v, self._vector(ordered, b, p, v))
        for v in range(self.vectors):
            self._put(body, of_bias, self._vector(of_bias, b, v) + sums[v], b, v)

    # ---- products ------------------------------------------------------------------------------

    def _products(
        self, body: Block, buffers: tuple[Any, Any, Any], piece: Piece, chosen: tuple[Expr, Expr, Expr]
    ) -> None:
        """Tile after tile of channels, for each those of taps, and of these the tiles of each block."""
        sums, ordered, copy = buffers
        group, first, start = chosen
        begin, each, number, blocks = 0, reaches(self.relation, self.most_taps), 0, self.picks.blocks
        rows = self.taps[0] * self.taps[1]
        tiles = ceildiv(self.channels, self.picks.tile_c) * rows * len(each) * blocks
        following = self._following(body, piece) if any(self.fetches) else piece
        origin = body.let(group * self.own + start)
        for channels, times in pieces(self.channels, self.picks.tile_c):
            with body.loop(times) as (tile, i):
                channel = tile.let(begin + i * channels)
                own = self._channels(tile, origin, group, channel, channels)
                if copy is not None:
                    self.reader.gather(tile, copy, piece, own)
                with tile.loop(rows) as (row, tap):
                    for index, reach in enumerate(each):
                        with row.loop(blocks) as (one, b):
                            share = (((number + i) * rows + tap) * len(each) + index) * blocks + b
                            fetch = []
                            if self.fetches.outer:
                                ahead = one.let(group * self.group + first)
                                fetch.append(self._fetching(one, following, ahead, share, tiles))
                            if self.fetches.inner:
                                fetch.append(self._fetching_inner(one, piece, following, own, origin, channel, b))
                            self._tile(one, (sums, ordered, copy), piece, (own, channel, b), tap, reach, fetch)
            begin += times * channels
            number += times

    def _channels(self, block: Block, origin: Expr, group: Expr, channel: Expr, count: int) -> Channels:
        """A tile's. A part may have a channel less: the one before is taken again, and not stored."""
        last = None if self.own % self.picks.parts == 0 else block.let((group + 1) * self.own - 1)
        return Channels(block.let(origin + channel), count, last)

    def _following(self, body: Block, piece: Piece) -> Piece:
        """What is put in order next: lines of the same images, or of the next ones."""
        after = piece.line + piece.lines
        is_last = after >= self.lines
        image = body.let(_either(is_last, piece.image + self.picks.images, piece.image))
        return Piece(image, self.picks.images, body.let(_either(is_last, 0, after)), self.picks.rows)

    def _fetching(self, body: Block, ahead: Piece, channel: Expr, tile: Expr, tiles: int) -> Fetch:
        """What fetches a tile's share of what follows, a line or more with each pixel; those that have none left fetch
        the last one's again, which costs less than a branch.
        """
        lanes, vectors = self.lanes, self.vectors * self.picks.blocks
        each, size = ceildiv(vectors, tiles), self.picks.rows * self.width
        first = body.let(tirx.min(tile * each, vectors - each)) if tiles > 1 else 0
        start = body.let(ahead.line * self.width)

        def fetch(step: Block, pixel: Expr) -> None:
            image = ahead.image
            if self.picks.images > 1:
                image, pixel = image + tirx.truncdiv(pixel, size), step.let(tirx.truncmod(pixel, size))
            for v in range(each):
                vector = (first + v) * lanes
                if self.relation.outer.layout == "nhwc":
                    at = (start + pixel) * self.relation.outer.channels + channel + vector
                    place = self.relation.outer.place(image, 0, (0, 0, 0), at)
                else:  # of as many pixels as a vector has lanes, a line of each of its channels
                    lane = pixel % lanes
                    place = self.relation.outer.place(image, channel + vector + lane, (0, 0, 0), start + pixel - lane)
                step.add(prefetch(self.outer, place, level=2))

        return fetch

    def _fetching_inner(
        self, body: Block, piece: Piece, following: Piece, own: Channels, origin: Expr, channel: Expr, b: Expr
    ) -> Fetch:
        """Of NCHW the next tile's, after the last one the first one's of what follows; of NHWC that follows at once."""
        if self.reader.is_last:
            return self.reader.fetching(following, own, own, b)
        is_last = channel + own.number >= self.channels
        first = body.let(_either(is_last, origin, own.first + own.number))
        image = body.let(_either(is_last, following.image, piece.image))
        line = body.let(_either(is_last, following.line, piece.line))
        there = Piece(image, piece.images, line, piece.lines)
        return self.reader.fetching(there, own, own._replace(first=first), b)

    def _tile(
        self,
        body: Block,
        buffers: tuple[Any, Any, Any],
        piece: Piece,
        chosen: tuple[Channels, Expr, Expr],
        tap: Expr,
        reach: Reach,
        fetch: Sequence[Fetch],
    ) -> None:
        sums, ordered, copy = buffers
        own, channel, b = chosen
        keys = [(c, k) for c in range(own.number) for k in range(reach.taps)]
        made = body.registers([(key, v) for key in keys for v in range(self.vectors)], self.lanes)

        def run(block: Block, first: Expr, length: Expr, scalar: Callable[[Any, Expr], Expr]) -> None:
            def ahead(step: Block, k: Expr) -> None:
                for one in fetch:
                    one(step, first + k)

            multiply(block, made, length, scalar, lambda v, k: self._vector(ordered, b, first + k, v), ahead)

        if copy is not None:
            place = self.reader.place
            run(body, 0, piece.images * piece.lines * self.width, lambda key, k: copy[place(own.number, key[0], k)])
        else:
            self._lines(body, piece, own, tap, reach, run)
        at = body.let(channel * math.prod(self.taps) + tap * self.taps[2] + reach.first)
        for (c, k), v in made.keys:
            place = at + (c * math.prod(self.taps) + k)
            self._put(body, sums, self._vector(sums, b, place, v) + made[(c, k), v], b, place, v)

    def _lines(
        self, body: Block, piece: Piece, own: Channels, tap: Expr, reach: Reach, run: Callable[..., None]
    ) -> None:
        """The products of each line of a piece."""
        first = [body.let(own.at(c)) for c in range(own.number)] if own.last is not None else None
        kz, ky = unflat(tap, self.taps[:2])
        with body.loop(piece.images) as (image, j), image.loop(piece.lines) as (one, i):
            pixel = unflat(one.let(piece.line + i), self.relation.outer.size[:2])
            reached = [one.let(p) for p in self.relation.line(pixel, (kz, ky))]
            with one.when(self.relation.is_inside(reached)) as row:
                base = row.let((j * self.picks.rows + i) * self.width)
                for begin, end, checked in self._runs(reach):
                    channels = first or [own.first + c for c in range(own.number)]
                    scalar = self._scalar(piece.image + j, channels, reached, begin, reach, checked)
                    run(row, base + begin, end - begin, scalar)

    def _runs(self, reach: Reach) -> list[tuple[int, int, bool]]:
        """Pixels of a row, and whether a tap of theirs may lie outside it."""
        found = [(0, reach.start, True), (reach.start, reach.end, False), (reach.end, self.width, True)]
        return [run for run in found if run[0] < run[1]]

    def _scalar(
        self, n: Expr, channels: Sequence[Expr], where: Sequence[Expr], begin: int, reach: Reach, checked: bool
    ) -> Callable[[tuple[int, int], Expr], Expr]:
        """What a tap of a channel reads for the pixels of a line from ``begin`` on."""
        relation = self.relation
        stride, step, size = relation.stride[2], relation.dilation[2], relation.inner.size[2]
        shift = begin * stride - relation.begin[2]

        def scalar(key: tuple[int, int], k: Expr) -> Expr:
            c, tap = key
            x = k * stride + (shift + (reach.first + tap) * step)
            near = tirx.max(0, tirx.min(x, size - 1)) if checked else x
            place = relation.element(relation.inner, n, channels[c], [*where, near])
            value = widen(self.inner[tuple(place)], self.dtype)
            return tirx.Select(tirx.all(x >= 0, x < size), value, tirx.const(0, ACCUMULATOR)) if checked else value

        return scalar

    # ---- what is stored ------------------------------------------------------------------------

    def _store(self, task: Block, sums: Any, b: Expr, group: Expr, first: Expr, start: Expr, end: Expr) -> None:
        """The sums, which lie ``[channel and tap][output channel]``, the other way round."""
        taps, rank = math.prod(self.taps), len(self.dst.shape)
        with task.loop(tirx.min(self.picks.tile_oc, self.group - first)) as (channel, o):
            row = channel.let((group * self.group + first + o) * self.own + start)
            with channel.loop((end - start) * taps) as (element, i):
                lane = [tirx.floordiv(o, self.lanes), tirx.floormod(o, self.lanes)]
                value = narrow(sums[(b, i, *lane)], self.dtype)
                element.add(tirx.BufferStore(self.dst, value, [*[0] * (rank - 1), row * taps + i]))

    def _store_bias(self, task: Block, of_bias: Any, b: Expr, group: Expr, first: Expr) -> None:
        """No condition, but the end of a loop: LLVM 22 makes of a store with a mask of one lane one of 32 bits."""
        weights = math.prod(self.relation.spec.weights_shape)
        with task.loop(tirx.min(self.picks.tile_oc, self.group - first)) as (channel, o):
            lane = (b, tirx.floordiv(o, self.lanes), tirx.floormod(o, self.lanes))
            value = narrow(of_bias[lane], self.dtype)
            channel.add(tirx.BufferStore(self.dst, value, [weights + group * self.group + first + o]))
