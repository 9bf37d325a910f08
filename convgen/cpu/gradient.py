"""The gradient of weights by register tiles: what a task of :mod:`convgen.schedules.cpu_gradient` does, statement by
statement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..deferred import tirx
from ..lowering.compute import ACCUMULATOR, Expr, ceildiv, narrow, unflat, widen
from ..lowering.schedule import Picks
from .correlation import Correlation
from .product import multiply, pieces
from .vector import Block, Registers, interleave, load_within, prefetch


class Reach(NamedTuple):
    """Pixels of a line of outer whose taps from ``first`` on all lie in inner: from ``start`` to ``end``."""

    first: int
    taps: int
    start: int
    end: int


class _Following(NamedTuple):
    """What of outer is put in order next: of an image from a pixel on, from a channel on."""

    image: Expr
    pixel: Expr
    channel: Expr


def reaches(relation: Correlation, most: int) -> list[Reach]:
    """The taps of a row of the kernel, at most so many at a time."""
    found, first = [], 0
    for taps, times in pieces(relation.kernel[2], most):
        for _ in range(times):
            start, end = relation.valid(first)[0], relation.valid(first + taps - 1)[1]
            found.append(Reach(first, taps, start, max(start, end)))
            first += taps
    return found


class WeightsGradient:
    """The statements of ``main``.

    Args:
        relation: of the layer's tensors; its outer is what is put in order, in the vector lanes.
        picks: ``tile_oc tile_c rows parts``, as the schedule's docstring explains them.
        most_taps: of a row of the kernel in one tile.
        fetches: whether rows of outer are fetched into the L2 cache while the products of those before are made.
        src, gradient, dst: buffers.
    """

    def __init__(
        self,
        relation: Correlation,
        picks: Picks,
        lanes: int,
        most_taps: int,
        fetches: bool,
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

    def statement(self) -> Any:
        block, blocks = Block(), ceildiv(self.group, self.picks.tile_oc)
        with block.loop(self.groups * blocks * self.picks.parts, parallel=True) as (task, i):
            part, rest = task.let(i % self.picks.parts), task.let(i // self.picks.parts)
            group, first = task.let(rest // blocks), task.let(rest % blocks * self.picks.tile_oc)
            start = task.let(self.own * part // self.picks.parts)
            self._task(task, part, group, first, start)
        return block.statement()

    def _task(self, task: Block, part: Expr, group: Expr, first: Expr, start: Expr) -> None:
        """The gradients of ``tile_oc`` output channels of a group, from ``first`` on, and a part of its input channels,
        from ``start`` on.
        """
        rows, lanes = self.picks.rows, self.lanes
        size = (self.channels * math.prod(self.taps), self.vectors, lanes)
        sums, ordered = task.buffer(size), task.buffer((rows * self.width + lanes, self.vectors, lanes))
        of_bias = task.buffer((self.vectors, lanes)) if self.with_bias else None
        self._clear(task, sums, size[0])
        if of_bias is not None:
            self._clear(task, of_bias)
        with task.loop(self.relation.spec.n) as (image, n), image.loop(ceildiv(self.lines, rows)) as (body, at):
            line = body.let(at * rows)
            count = rows if self.lines % rows == 0 else body.let(tirx.min(rows, self.lines - line))
            self._order(body, ordered, n, line, count, group, first)
            if of_bias is not None:
                with body.when(part == 0) as case:
                    self._add_bias(case, of_bias, ordered, count)
            self._products(body, sums, ordered, (n, line, count), (group, first, start))
        self._store(task, sums, group, first, start, self.own * (part + 1) // self.picks.parts)
        if of_bias is not None:
            with task.when(part == 0) as case:
                self._store_bias(case, of_bias, group, first)

    def _row(self, lanes: int) -> Expr:
        return tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)

    def _vector(self, buffer: Any, *index: Expr) -> Expr:
        return tirx.BufferLoad(buffer, [*index, self._row(self.lanes)])

    def _put(self, block: Block, buffer: Any, value: Expr, *index: Expr) -> None:
        place = [tirx.const(i, "int32") if isinstance(i, int) else i for i in index]
        block.add(tirx.BufferStore(buffer, value, [*place, self._row(self.lanes)]))

    def _clear(self, block: Block, buffer: Any, count: int = 0) -> None:
        nothing = tirx.Broadcast(tirx.const(0, ACCUMULATOR), self.lanes)
        if not count:
            for v in range(self.vectors):
                self._put(block, buffer, nothing, v)
            return
        with block.loop(count) as (one, i):
            for v in range(self.vectors):
                self._put(one, buffer, nothing, i, v)

    # ---- gradients of dst ----------------------------------------------------------------------

    def _order(self, body: Block, ordered: Any, n: Expr, line: Expr, count: Expr, group: Expr, first: Expr) -> None:
        """``[pixel][channel]`` of ``count`` lines of an image; channels past the group's last are not used."""
        pixels, lanes, relation = self.lines * self.width, self.lanes, self.relation
        images = relation.outer
        start = body.let(line * self.width)
        if images.layout == "nhwc":
            end = body.let((group + 1) * self.group)
            with body.loop(count * self.width) as (one, p):
                pixel = one.let((start + p) * images.channels)
                for v in range(self.vectors):
                    place = images.place(n, 0, (0, 0, 0), pixel + group * self.group + first + v * lanes)
                    value = load_within(self.outer, self.dtype, place, lanes, lanes, size=pixel + end)
                    self._put(one, ordered, value, p, v)
            return
        with body.loop((count * self.width + (lanes - 1)) // lanes) as (square, s):
            for v in range(self.vectors):
                read = []
                for i in range(lanes):
                    channel = group * self.group + tirx.min(first + (v * lanes + i), self.group - 1)
                    place = images.place(n, channel, (0, 0, 0), start + s * lanes)
                    read.append(square.let(load_within(self.outer, self.dtype, place, lanes, lanes, size=pixels)))
                for i, value in enumerate(interleave(square, read, lanes)):
                    self._put(square, ordered, value, s * lanes + i, v)

    def _add_bias(self, body: Block, of_bias: Any, ordered: Any, count: Expr) -> None:
        sums = body.registers(range(self.vectors), self.lanes)
        with body.loop(count * self.width) as (one, p):
            for v in range(self.vectors):
                sums.add(one, v, self._vector(ordered, p, v))
        for v in range(self.vectors):
            self._put(body, of_bias, self._vector(of_bias, v) + sums[v], v)

    # ---- products ------------------------------------------------------------------------------

    def _products(
        self,
        body: Block,
        sums: Any,
        ordered: Any,
        where: tuple[Expr, Expr, Expr],
        chosen: tuple[Expr, Expr, Expr],
    ) -> None:
        """Tile after tile of channels, and of taps for each."""
        group, first, start = chosen
        begin, each, number = 0, reaches(self.relation, self.most_taps), 0
        rows = self.taps[0] * self.taps[1]
        tiles = ceildiv(self.channels, self.picks.tile_c) * rows * len(each)
        ahead = self._following(body, where, group, first) if self.fetches else None
        for channels, times in pieces(self.channels, self.picks.tile_c):
            with body.loop(times) as (tile, i):
                channel = tile.let(begin + i * channels)
                with tile.loop(rows) as (row, tap):
                    for index, reach in enumerate(each):
                        fetch = None
                        if ahead is not None:
                            share = ((number + i) * rows + tap) * len(each) + index
                            fetch = self._fetching(row, ahead, share, tiles)
                        self._tile(row, sums, ordered, where, (group, start, channel, channels), tap, reach, fetch)
            begin += times * channels
            number += times

    def _following(self, body: Block, where: tuple[Expr, Expr, Expr], group: Expr, first: Expr) -> _Following:
        """What is put in order after some lines of an image: lines of the same, or of the next one."""
        n, line, count = where
        is_last = line + count >= self.lines
        image = body.let(tirx.Select(is_last, n + 1, n))
        pixel = body.let(tirx.Select(is_last, 0, (line + count) * self.width))
        return _Following(image, pixel, body.let(group * self.group + first))

    def _fetching(self, body: Block, ahead: _Following, tile: Expr, tiles: int) -> Callable[[Block, Expr], None]:
        """What fetches a tile's share of what follows, a line or more with each pixel; those that have none left fetch
        the last one's again, which costs less than a branch.
        """
        lanes, each = self.lanes, ceildiv(self.vectors, tiles)
        first = body.let(tirx.min(tile * each, self.vectors - each)) if tiles > 1 else 0

        def fetch(step: Block, pixel: Expr) -> None:
            for v in range(each):
                vector = (first + v) * lanes
                if self.relation.outer.layout == "nhwc":
                    at = (ahead.pixel + pixel) * self.relation.outer.channels + ahead.channel + vector
                    place = self.relation.outer.place(ahead.image, 0, (0, 0, 0), at)
                else:  # of as many pixels as a vector has lanes, a line of each of its channels
                    lane = pixel % lanes
                    channel = ahead.channel + vector + lane
                    place = self.relation.outer.place(ahead.image, channel, (0, 0, 0), ahead.pixel + pixel - lane)
                step.add(prefetch(self.outer, place, level=2))

        return fetch

    def _tile(
        self,
        body: Block,
        sums: Any,
        ordered: Any,
        where: tuple[Expr, Expr, Expr],
        chosen: tuple[Expr, Expr, Expr, int],
        tap: Expr,
        reach: Reach,
        fetch: Callable[[Block, Expr], None] | None,
    ) -> None:
        n, line, count = where
        group, start, channel, channels = chosen
        keys = [(c, k) for c in range(channels) for k in range(reach.taps)]
        made = body.registers([(key, v) for key in keys for v in range(self.vectors)], self.lanes)
        # A part may have a channel less: the one before is taken again, and not stored.
        first = [body.let(group * self.own + tirx.min(start + channel + c, self.own - 1)) for c in range(channels)]
        kz, ky = unflat(tap, self.taps[:2])
        with body.loop(count) as (one, i):
            pixel = unflat(one.let(line + i), self.relation.outer.size[:2])
            reached = [one.let(p) for p in self.relation.line(pixel, (kz, ky))]
            with one.when(self.relation.is_inside(reached)) as row:
                base = row.let(i * self.width)
                for begin, end, checked in self._runs(reach):
                    self._run(row, made, ordered, n, first, reached, base, (begin, end, checked), reach, fetch)
        at = body.let(channel * math.prod(self.taps) + tap * self.taps[2] + reach.first)
        for (c, k), v in made.keys:
            place = at + (c * math.prod(self.taps) + k)
            self._put(body, sums, self._vector(sums, place, v) + made[(c, k), v], place, v)

    def _runs(self, reach: Reach) -> list[tuple[int, int, bool]]:
        """Pixels of a row, and whether a tap of theirs may lie outside it."""
        found = [(0, reach.start, True), (reach.start, reach.end, False), (reach.end, self.width, True)]
        return [run for run in found if run[0] < run[1]]

    def _run(
        self,
        row: Block,
        made: Registers,
        ordered: Any,
        n: Expr,
        first: Sequence[Expr],
        where: Sequence[Expr],
        base: Expr,
        run: tuple[int, int, bool],
        reach: Reach,
        fetch: Callable[[Block, Expr], None] | None,
    ) -> None:
        begin, end, checked = run
        relation = self.relation
        stride, step, size = relation.stride[2], relation.dilation[2], relation.inner.size[2]
        shift = begin * stride - relation.begin[2]

        def scalar(key: tuple[int, int], k: Expr) -> Expr:
            c, tap = key
            x = k * stride + (shift + (reach.first + tap) * step)
            near = tirx.max(0, tirx.min(x, size - 1)) if checked else x
            value = widen(self.inner[tuple(relation.element(relation.inner, n, first[c], [*where, near]))], self.dtype)
            return tirx.Select(tirx.all(x >= 0, x < size), value, tirx.const(0, ACCUMULATOR)) if checked else value

        ahead = None if fetch is None else lambda step, k: fetch(step, base + begin + k)
        multiply(row, made, end - begin, scalar, lambda v, k: self._vector(ordered, base + begin + k, v), ahead)

    # ---- what is stored ------------------------------------------------------------------------

    def _store(self, task: Block, sums: Any, group: Expr, first: Expr, start: Expr, end: Expr) -> None:
        """The sums, which lie ``[channel and tap][output channel]``, the other way round."""
        taps, rank = math.prod(self.taps), len(self.dst.shape)
        with task.loop(tirx.min(self.picks.tile_oc, self.group - first)) as (channel, o):
            row = channel.let((group * self.group + first + o) * self.own + start)
            with channel.loop((end - start) * taps) as (element, i):
                lane = [tirx.floordiv(o, self.lanes), tirx.floormod(o, self.lanes)]
                value = narrow(sums[(i, *lane)], self.dtype)
                element.add(tirx.BufferStore(self.dst, value, [*[0] * (rank - 1), row * taps + i]))

    def _store_bias(self, task: Block, of_bias: Any, group: Expr, first: Expr) -> None:
        """No condition, but the end of a loop: LLVM 22 makes of a store with a mask of one lane one of 32 bits."""
        weights = math.prod(self.relation.spec.weights_shape)
        with task.loop(tirx.min(self.picks.tile_oc, self.group - first)) as (channel, o):
            lane = (tirx.floordiv(o, self.lanes), tirx.floormod(o, self.lanes))
            value = narrow(of_bias[lane], self.dtype)
            channel.add(tirx.BufferStore(self.dst, value, [weights + group * self.group + first + o]))
