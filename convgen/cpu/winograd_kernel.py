"""Winograd's convolution on a CPU: how weights are packed, and the statements of ``main``, as
``schedules/cpu_winograd.py`` says what they do. The ways in and out are in :mod:`convgen.cpu.winograd_passes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..deferred import te, tirx
from ..lowering.compute import Expr, Operands, ceildiv, copied, unflat
from ..lowering.schedule import Picks
from ..problem.spec import ConvSpec
from .model import Core
from .product import blocks_ahead, fetching, multiply, register_tiles
from .tasks import Buffers
from .vector import Block, load, store
from .weights import Channels, WeightRows, packed_by_panels
from .window import meeting
from .winograd import Grid, transformed
from .winograd_passes import Task, Values, WayIn, WayOut


def packed(ops: Operands, g: Grid, tile_oc: int) -> list[te.Tensor]:
    """Transformed weights ``[oc/t][position][taps of the depth][ic][t]``, zeros past the last channel, and the other
    parameters as they are.
    """
    spec, rows, lanes = ops.spec, WeightRows(ops, g.lanes, tile_oc), g.lanes
    height, width = (len(axis.weights[0]) for axis in (g.rows, g.columns))
    direct = rows.taps // (height * width)

    def stores(body: Block, packed: tirx.Buffer, to: tuple[Expr, Expr], panel: tirx.Buffer, channels: Channels) -> None:
        # A row of positions of all the channels, then the next row: each position lies in pages of its own.
        with body.loop(direct) as (each, tap):
            for i, weights in enumerate(g.rows.weights):
                with each.loop(channels.count) as (row, c), row.loop(tile_oc // lanes) as (one, v):

                    def read(y: int, x: int, one: Block = one, c: Expr = c, v: Expr = v) -> Expr:
                        at = rows.row(c, (tap * height + y) * width + x)
                        return one.let(load(panel, "f32", [at, v * lanes], lanes, lanes))

                    met = [y for y in range(height) if weights[y]]
                    factors = (tuple(weights[y] for y in met),)
                    columns = [transformed(one, factors, [read(y, x) for y in met])[0] for x in range(width)]
                    for j, value in enumerate(transformed(one, g.columns.weights, columns)):
                        place = [to[0], i * g.columns.positions + j, tap, channels.first + c, to[1] + v * lanes]
                        one.add(store(packed, "f32", place, value, lanes, lanes))

    shape = (spec.groups * ceildiv(g.outputs, tile_oc), g.positions, direct, g.own, tile_oc)
    return [packed_by_panels(ops, rows, shape, stores, together=True), *map(copied, ops.parameters[1:])]


class _Slab(NamedTuple):
    """Weights of a block of channels at a position, and what they are multiplied by: the taps of the depth that meet
    src, ``count`` from ``first`` on; the first plane they read; the vectors of channels.
    """

    b: Expr
    position: Expr
    z: Expr
    first: Expr
    count: Expr
    plane: Expr
    vectors: int


@dataclass(frozen=True)
class WinogradKernel:
    """The statements of the whole layer."""

    buffers: Buffers
    spec: ConvSpec
    picks: Picks
    g: Grid
    core: Core

    @property
    def lanes(self) -> int:
        return self.g.lanes

    @property
    def weights(self) -> tirx.Buffer:
        return self.buffers.parameters["weights"]

    @cached_property
    def way_in(self) -> WayIn:
        return WayIn(self.spec.dtype, self.g, self.buffers.src)

    @cached_property
    def way_out(self) -> WayOut:
        return WayOut(self.spec, self.g, self.lanes, self.picks.tile_oc, *self.buffers[1:])

    def statement(self) -> tirx.Stmt:
        """One parallel region over blocks, or one for the input of all and one over blocks of channels."""
        tasks = (self.spec.n, self.spec.groups, self.g.plane_blocks.count, self.g.groups.count)
        whole = Block()
        if self.picks.parallel == "rows":
            with whole.loop(math.prod(tasks), parallel=True) as (body, index):
                self.block(body, self.task(body, *unflat(index, tasks)))
        else:
            self.by_channels(whole, tasks)
        return whole.statement()

    def block(self, body: Block, task: Task) -> None:
        """All of a block."""
        g, (stride, _, begin, _) = self.g, self.g.depth
        shape = (1, 1, g.window, g.positions, g.most_tiles * g.channels)
        first = body.let(task.part * ceildiv(g.own, self.lanes))
        values = Values(body.buffer(shape), 0, 0, body.let(task.plane * stride - begin), first)
        lines, half = self.way_in.scratch(body)
        with body.loop(g.window) as (plane_body, z):
            plane = plane_body.let(values.first_plane + z)
            exists = True if self.spec.rank < 3 else tirx.all(plane >= 0, plane < g.planes_in)
            with plane_body.when(exists) as inside, inside.loop(ceildiv(g.own, self.lanes)) as (part, c):
                self.way_in.transform(part, task, values, plane, part.let(first + c), lines, half)
        sums, pixels = self.way_out.scratch(body)
        with body.loop(ceildiv(g.outputs, self.picks.tile_oc)) as (part, b):
            self.channels(part, task, values, b, sums, pixels)

    def by_channels(self, whole: Block, tasks: Sequence[int]) -> None:
        """All input first; then blocks of channels, each of which reads all of that and weights of its own."""
        spec, g, oc_blocks = self.spec, self.g, ceildiv(self.spec.oc, self.picks.tile_oc)
        of_input = (spec.n, g.groups.count, g.planes_in, ceildiv(spec.ic, self.lanes))
        buffer = whole.buffer((*of_input[:3], g.positions, g.most_tiles * g.channels))
        with whole.loop(math.prod(of_input), parallel=True) as (body, index):
            image, block, plane, c = map(body.let, unflat(index, of_input))
            task, scratch = self.task(body, image, 0, 0, block), self.way_in.scratch(body)
            self.way_in.transform(body, task, Values(buffer, image, block, 0, 0), plane, c, *scratch)
        with whole.loop(oc_blocks * math.prod(tasks), parallel=True) as (body, index):
            b, image, _, plane_block, block = map(body.let, unflat(index, (oc_blocks, *tasks)))
            task, scratch = self.task(body, image, 0, plane_block, block), self.way_out.scratch(body)
            self.channels(body, task, Values(buffer, image, block, 0, 0), b, *scratch)

    def task(self, body: Block, image: Expr, part: Expr, plane_block: Expr, block: Expr) -> Task:
        """A block by its indices."""
        cuts = ((self.g.plane_blocks, body.let(plane_block)), (self.g.groups, body.let(block)))
        (plane, planes), (group, groups) = ((body.let(cut.start(i)), body.let(cut.size_of(i))) for cut, i in cuts)
        return Task(body.let(image), body.let(part), plane, planes, group, groups)

    def channels(
        self, body: Block, task: Task, values: Values, b: Expr, sums: tirx.Buffer, pixels: tirx.Buffer | None
    ) -> None:
        """A block of channels: products, transformed back and stored."""
        g, lanes, tile_oc = self.g, self.lanes, self.picks.tile_oc
        width, blocks = tile_oc // lanes, ceildiv(g.outputs, tile_oc)
        full, rest = divmod(ceildiv(g.outputs, lanes), width)
        for case, vectors in body.cases(b, full, width, rest):
            self.products(case, task, values, case.let(task.part * blocks + b), vectors, sums)
        count = body.let(tirx.Select(b < full, width, rest)) if rest else width
        first = body.let(task.part * g.outputs + b * tile_oc)
        with body.loop(task.planes) as (plane_body, z), plane_body.loop(count) as (one, v):
            self.way_out.transform(one, task, z, one.let(first + v * lanes), (sums, v * lanes), pixels)

    def products(self, body: Block, task: Task, values: Values, b: Expr, vectors: int, sums: tirx.Buffer) -> None:
        """The sums of a block of channels, a position after another."""
        g, (stride, dilation, begin, _) = self.g, self.g.depth
        with body.loop(g.positions) as (position_body, position), position_body.loop(task.planes) as (plane_body, z):
            out = plane_body.let(task.plane + z)
            # A plane in padding meets no tap, though there be only one.
            met = meeting(self.spec, 0, out) if self.spec.rank > 2 else (0, 1)
            first, count = map(plane_body.let, met)
            plane = plane_body.let(out * stride - begin - values.first_plane + first * dilation)
            slab = _Slab(b, position, z, first, count, plane, vectors)
            for inner, start, pixels, i, tiles in register_tiles(
                plane_body, g.groups, task.groups, g.tiles, self.picks.tile_px
            ):
                share = (z * tiles + i, tiles * g.plane_blocks.full)
                self.register_tile(inner, values, slab, start, pixels, share, sums)

    def register_tile(
        self,
        body: Block,
        values: Values,
        slab: _Slab,
        start: Expr,
        pixels: int,
        share: tuple[Expr, int],
        sums: tirx.Buffer,
    ) -> None:
        """The sums of ``pixels`` tiles from one on. ``share``: which of how many fetches of the next slab this does."""
        g, lanes = self.g, self.lanes
        taps, dilation = g.depth[3], g.depth[1]
        registers = body.registers([(t, v) for t in range(pixels) for v in range(slab.vectors)], lanes)
        following = slab.b * g.positions + slab.position + blocks_ahead(g.own * slab.vectors * g.most_tiles)
        following = (following * taps + slab.first) * (g.own * self.picks.tile_oc)
        steps, fmas = slab.count * g.own, pixels * slab.vectors
        fetched = fetching(body, self.core, self.weights, following, steps, fmas, share)
        with body.loop(slab.count) as (tap_body, tap):

            def scalar(t: int, k: Expr) -> Expr:
                where = [values.image, values.block, slab.plane + tap * dilation, slab.position]
                return values.buffer[*where, (start + t) * g.channels + k]

            def vector(v: int, k: Expr) -> Expr:
                return load(self.weights, "f32", [slab.b, slab.position, slab.first + tap, k, v * lanes], lanes, lanes)

            def fetch(step: Block, k: Expr) -> None:
                fetched(step, tap * g.own + k)

            multiply(tap_body, registers, g.own, scalar, vector, fetch)
        for t, v in registers.keys:
            place = [slab.z, slab.position, start + t, v * lanes]
            body.add(store(sums, "f32", place, registers[t, v], lanes, lanes))
