"""Winograd's algorithm for the gradient of weights: what a task of :mod:`convgen.schedules.cpu_gradient_winograd` does,
statement by statement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from ..deferred import tirx
from ..hardware.target import Target
from ..lowering.compute import Expr, ceildiv, unflat
from ..lowering.schedule import Picks
from ..lowering.winograd import admitted_of_gradient, of_gradient
from ..problem.spec import ConvSpec
from .images import dst_images, src_images
from .product import Even, multiply
from .vector import Block, interleave, load, store
from .winograd import (
    ROWS,
    TILES,
    Axis,
    Matrix,
    Tiles,
    outputs_of,
    rounded,
    tile_sizes,
    transformed,
    transformed_axes,
)
from .winograd_passes import Task, Values, WayIn


@lru_cache(maxsize=1024)
def gradient_axes(spec: ConvSpec, axis: int, m: int) -> tuple[Matrix, Axis, Axis]:
    """Of an axis, in tiles of ``m`` gradients of dst: the way back; the axis as src's tiles, and as the gradient's."""
    kernel, stride, m = spec.kernel[axis], spec.stride[axis], outputs_of(spec, axis, m)
    back, gradients, inputs = map(rounded, of_gradient(m, kernel, stride))
    size, period = spec.out_spatial[axis], spec.dilation[axis] if kernel > 1 else 1
    of_src = Axis(back, gradients, inputs, m, size, -spec.padding[axis][0], m * stride, period)
    return back, of_src, Axis(back, gradients, gradients, m, size, 0, m, period)


def gradient_tile_sizes(spec: ConvSpec) -> list[int]:
    """The tile sizes that the accuracy class admits and that save enough products."""
    return tile_sizes(spec, admitted_of_gradient)


def groups_of(spec: ConvSpec, m: int) -> int:
    """Rows of tiles; in 1-D tiles. Those that interleave count as one."""
    return gradient_axes(spec, transformed_axes(spec)[0], m)[1].groups


def blocks_of(spec: ConvSpec, m: int) -> list[int]:
    """Choices for the rows of tiles of a part; in 1-D, its tiles."""
    groups = groups_of(spec, m)
    return sorted({b for b in (ROWS if spec.rank > 1 else TILES) if b <= groups} | {groups})


class GradientGrid:
    """The sizes of a candidate.

    Attributes:
        src, gradient: tiles of each: the same ones.
        back: Aᵀ of each transformed axis.
        images, groups: how images, and rows of tiles, are cut into parts that are worked on one after another.
        depth: tiles of a part, at most.
        inner, outer: vectors of src's and of the gradient's channels.
        blocks: tasks of a part: blocks of the gradient's channels, and of vectors of src's.
        tiles_oc: register tiles of a block's channels of the gradient.
    """

    def __init__(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        self.spec, self.lanes = spec, target.lanes
        axes = [gradient_axes(spec, axis, picks.tile) for axis in transformed_axes(spec)]
        self.back = [back for back, *_ in axes]
        self.images = Even(spec.n, picks.images)
        most = Tiles([axis for _, axis, _ in axes], picks.block_rows, src_images(spec), 1, self.lanes).most_tiles
        self.depth = self.images.full * most
        self.inner, self.outer = ceildiv(spec.ic, self.lanes), ceildiv(spec.oc, self.lanes)
        self.src, self.gradient = (
            Tiles(list(of_images), picks.block_rows, images, 1, self.lanes, self.depth)
            for of_images, images in (
                ([axis for _, axis, _ in axes], src_images(spec)),
                ([axis for _, _, axis in axes], dst_images(spec)),
            )
        )
        self.groups, self.positions = self.src.groups, self.src.positions
        self.tiles_oc = min(picks.block_oc, self.outer) * self.lanes // picks.tile_oc
        self.all_tiles_oc = self.outer * self.lanes // picks.tile_oc
        self.blocks = (ceildiv(self.all_tiles_oc, self.tiles_oc), ceildiv(self.inner, picks.tile_ic))

    @property
    def parts(self) -> int:
        """Parts that are worked on one after another."""
        return self.images.count * self.groups.count

    @property
    def taps(self) -> int:
        return math.prod(self.spec.kernel)

    def values(self, vectors: int) -> int:
        """Numbers of a position of so many vectors of channels: an odd number of vectors, as a power of two would put
        a tile's positions in few sets of the cache.
        """
        return (vectors * self.depth | 1) * self.lanes

    def sums(self, picks: Picks) -> tuple[int, ...]:
        """The shape of a task's sums: ``[channel of the gradient][vector of src's channels][position][lane]``."""
        return self.tiles_oc * picks.tile_oc, picks.tile_ic, self.positions, self.lanes


class Part(NamedTuple):
    """Some images and rows of tiles: where they begin, how many there are, and whether they are the first and the last
    of all.
    """

    image: Expr
    images: Expr
    group: Expr
    groups: Expr
    is_first: Expr
    is_last: Expr


@dataclass(frozen=True)
class GradientKernel:
    """The statements of ``main``, but for the gradient of bias."""

    g: GradientGrid
    picks: Picks
    src: Any
    gradient: Any
    dst: Any

    @cached_property
    def of_src(self) -> WayIn:
        return WayIn(self.g.spec.dtype, self.g.src, self.src)

    @cached_property
    def of_gradient(self) -> WayIn:
        return WayIn(self.g.spec.dtype, self.g.gradient, self.gradient)

    def statement(self) -> Any:
        """Part after part: both transformed, then products in tasks that have sums of their own."""
        g, whole = self.g, Block()
        shape = (1, 1, 1, g.positions)
        src, gradient = (whole.buffer((*shape, g.values(vectors))) for vectors in (g.inner, g.outer))
        sums = whole.buffer((math.prod(g.blocks), *g.sums(self.picks))) if g.parts > 1 else None
        with whole.loop(g.images.count) as (outer, i), outer.loop(g.groups.count) as (body, j):
            self.transform(body, (i, j), self.of_src, g.inner, src)
            self.transform(body, (i, j), self.of_gradient, g.outer, gradient)
            with body.loop(math.prod(g.blocks), parallel=True) as (task, index):
                kept = (task.buffer((1, *g.sums(self.picks))), 0) if sums is None else (sums, index)
                self.task(task, self.part(task, i, j), index, (src, gradient), kept)
        return whole.statement()

    def part(self, body: Block, i: Expr, j: Expr) -> Part:
        cuts = ((self.g.images, i), (self.g.groups, j))
        (image, images), (group, groups) = ((body.let(cut.start(k)), body.let(cut.size_of(k))) for cut, k in cuts)
        many = [(cut, k) for cut, k in cuts if cut.count > 1]
        ends = [k < 1 for _, k in many], [k > cut.count - 2 for cut, k in many]
        first, last = (body.let(tirx.all(*conditions)) if conditions else True for conditions in ends)
        return Part(image, images, group, groups, first, last)

    def transform(self, body: Block, which: tuple[Expr, Expr], way: WayIn, vectors: int, values: Any) -> None:
        """Of a part's images every vector of channels is a task."""
        g, most = self.g, self.g.images.full
        with body.loop(most * vectors, parallel=True) as (task, index):
            image, c = map(task.let, unflat(index, (most, vectors)))
            part, scratch = self.part(task, *which), way.scratch(task)
            with task.when(True if g.images.many == g.images.count else image < part.images) as case:
                tiles = Task(case.let(part.image + image), 0, 0, 1, part.group, part.groups)
                first = case.let(image * self.tiles(part))
                way.transform(case, tiles, Values(values, 0, 0, 0, 0, first), 0, c, *scratch)

    def tiles(self, part: Part) -> Expr:
        """Tiles of an image of a part."""
        return part.groups * self.g.src.tiles(1)

    def task(self, task: Block, part: Part, index: Expr, values: tuple[Any, Any], kept: tuple[Any, Expr]) -> None:
        """The sums of a block of the gradient's channels and a few vectors of src's, position after position; after the
        last part they are transformed back and stored.
        """
        g, picks = self.g, self.picks
        o, i = map(task.let, unflat(index, g.blocks))
        depth = task.let(part.images * self.tiles(part))
        rest = g.all_tiles_oc % g.tiles_oc
        count = task.let(tirx.min(g.tiles_oc, g.all_tiles_oc - o * g.tiles_oc)) if rest else g.tiles_oc
        for case, vectors in task.cases(i, g.inner // picks.tile_ic, picks.tile_ic, g.inner % picks.tile_ic):
            first = case.let(i * picks.tile_ic)
            with case.loop(g.positions) as (position, p), position.loop(count) as (tile, t):
                channel = tile.let((o * g.tiles_oc + t) * picks.tile_oc)
                self.register_tile(tile, (p, channel, first, vectors), depth, values, kept, t, part.is_first)
            with case.when(part.is_last) as last:
                self.store(last, kept, o, first, vectors)

    def register_tile(
        self,
        body: Block,
        chosen: tuple[Expr, Expr, Expr, int],
        depth: Expr,
        values: tuple[Any, Any],
        kept: tuple[Any, Expr],
        t: Expr,
        is_first: Expr,
    ) -> None:
        """At a position, the products of ``tile_oc`` channels of the gradient with some vectors of src's channels."""
        g, lanes, (p, channel, first, vectors), (src, gradient) = self.g, self.lanes, chosen, values
        made = body.registers([(s, v) for s in range(self.picks.tile_oc) for v in range(vectors)], lanes)
        scalars = body.let(channel // lanes * (g.depth * lanes) + channel % lanes)
        start = body.let(first * (g.depth * lanes))

        def scalar(s: int, k: Expr) -> Expr:
            return gradient[0, 0, 0, p, scalars + k * lanes + s]

        def vector(v: int, k: Expr) -> Expr:
            return load(src, "f32", [0, 0, 0, p, start + k * lanes + v * (g.depth * lanes)], lanes, lanes)

        multiply(body, made, depth, scalar, vector)
        sums, row = kept
        ways = [(True, False)] if g.parts == 1 else [(is_first, False), (tirx.Not(is_first), True)]
        for condition, adds in ways:
            with body.when(condition) as case:
                for s, v in made.keys:
                    place = [row, t * self.picks.tile_oc + s, v, p, 0]
                    more = load(sums, "f32", place, lanes, lanes) + made[s, v] if adds else made[s, v]
                    case.add(store(sums, "f32", place, more, lanes, lanes))

    @property
    def lanes(self) -> int:
        return self.g.lanes

    def store(self, body: Block, kept: tuple[Any, Expr], o: Expr, first: Expr, vectors: int) -> None:
        """Transform sums back and store them: taps innermost, as many as there are of each of src's channels."""
        g, lanes, spec, (sums, row) = self.g, self.lanes, self.g.spec, kept
        size = g.tiles_oc * self.picks.tile_oc
        count = size if spec.oc % size == 0 else body.let(tirx.min(size, spec.oc - o * size))
        with body.loop(count) as (channel, c), channel.loop(vectors) as (one, v):
            taps = self.taps(one, [row, c, v], sums)
            vector = one.let(first + v)
            at = one.let(((o * size + c) * spec.ic + vector * lanes) * g.taps)
            for case, channels in one.cases(vector, spec.ic // lanes, lanes, spec.ic % lanes):
                for i, value in enumerate(interleave(case, taps, lanes)):
                    stored = min(lanes, channels * g.taps - i * lanes)
                    if stored > 0:
                        place = [*[0] * (len(self.dst.shape) - 1), at + i * lanes]
                        case.add(store(self.dst, spec.dtype, place, value, lanes, stored))

    def taps(self, body: Block, where: list[Expr], sums: Any) -> list[Expr]:
        """The taps of a vector of src's channels."""
        lanes, (*rows, columns) = self.lanes, self.g.back
        across, half = len(columns[0]), []
        for j in range(across):
            places = [[*where, i * across + j, 0] for i in range(self.g.positions // across)]
            read = [body.let(load(sums, "f32", place, lanes, lanes)) for place in places]
            half.append(transformed(body, rows[0], read) if rows else read)
        return [tap for k in range(len(half[0])) for tap in transformed(body, columns, [made[k] for made in half])]
