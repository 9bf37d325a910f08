"""Convolution with few channels per group: pixels in the vector lanes, masks instead of padding.

Applies to  NCHW convolutions that are not transposed, of any rank, with few channels per group: grouped, and
            dense layers with few products per output (stems); stride along the row at most 8.
Strategy    1. Pack weights as [group][oc/t][rows of the kernel][ic][k][t]: in the order they are used.
            2. Keep a tile of `tile_oc` channels × `tile_ow` vectors of one output row in registers. Nothing is
               copied: input rows are loaded where they lie, edges masked (code of their own).
            3. Loop over those rows of the kernel that meet the image, then over the group's input channels;
               the taps of a row are written out, weights broadcast.
            4. Where there is a stride, vectors are shuffled apart by phase; all channels of the tile use them.
            5. One parallel loop over batch × groups × channel tiles × parts of the rows.
Why not     a padded copy (cpu_grouped): splitting it by phase in memory costs more than the shuffles. A tile of
            several rows, which share loads (cpu_rows): here channels share them, and rows at the edge need no code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm import te, tirx

from convgen.cpu.vector import Block, Columns, Taps, finish, load, meeting, spread_parameters, written
from convgen.hardware.target import Target
from convgen.lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv, copied, flat, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import ConvSpec

#: Unrolled multiply-adds of all tiles that are written out.
MOST_UNROLLED = 4096

# What `cost` counts. Fitted to measured kernels, not measured alone.
#: Cycles from one FMA to the next on the same sum.
FMA_LATENCY = 4
#: Cycles that an instruction which loads, shuffles or broadcasts adds, although products go on beside it.
UNHIDDEN = 0.12
#: Such instructions for a vector that is loaded, and for one that is shuffled.
LOAD, SHUFFLE = 1.5, 2
#: Cycles to store a sum; to begin a tile; for the edges of a row of tiles.
STORE, BEGIN_TILE, EDGES = 2, 10, 3
#: Times the cycles before AVX-512: there no product takes its weight from memory, an instruction loads each.
NARROW = 1.15
#: Bytes per second of memory traffic, for each core.
BANDWIDTH = 80e9


class CpuMasked(Written):
    id, version = "cpu_masked", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        several = spec.ic > spec.groups or spec.oc >= 4 * spec.groups
        require(several, "needs several input channels per group, or at least 4 output channels")
        few = spec.oc // spec.groups <= 32 or spec.reduction_length <= 160
        require(few, "needs at most 32 output channels per group, or at most 160 products per output")
        require(spec.stride[-1] <= 8, "needs a stride along the row of at most 8")
        require(spec.kernel[-1] <= 64, "needs at most 64 taps along the row")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        rows, width = _output(spec)
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * width)]
        return Space(
            lanes=lanes,
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16) if c <= spec.oc // spec.groups],
            tile_ow=[v for v in (1, 2, 3, 4, 6) if v == 1 or lanes[0] * (v - 1) < width],
            parallel_oh=[p for p in (1, 2, 4, 8, 16, 32) if p <= rows],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        sums = picks.tile_oc * picks.tile_ow
        used = sums + picks.tile_ow * spec.stride[-1] + 2
        require(used <= target.vector_registers, f"{used} vectors in a tile, {target.vector_registers} registers")
        require(picks.lanes * (picks.tile_ow - 1) < spec.out_spatial[-1], "tile_ow exceeds the row")
        tiles = len(Columns(spec, picks.lanes, picks.tile_ow).runs)
        unrolled = tiles * sums * spec.kernel[-1] * (1 + (spec.oc // spec.groups % picks.tile_oc > 0))
        require(unrolled <= MOST_UNROLLED or sums == 1, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        space = self.space(spec, target).domains
        base = Picks(lanes=space["lanes"][0], tile_oc=1, tile_ow=1, parallel_oh=1)
        wide = [n for n in space["lanes"] if 2 * n >= target.lanes] or space["lanes"][-1:]
        tiles = [(c, v) for c in space["tile_oc"] for v in space["tile_ow"]]
        options = [base.replace(lanes=n, tile_oc=c, tile_ow=v) for n in wide for c, v in tiles]
        options = [p for p in options if self.reason_against(spec, target, p) is None]
        picks = min(options, key=lambda p: self._cycles(spec, target, p), default=base)
        tasks = spec.n * spec.groups * ceildiv(spec.oc // spec.groups, picks.tile_oc)
        enough = [p for p in space["parallel_oh"] if tasks * p >= 4 * target.cores]
        return picks.replace(parallel_oh=min(enough, default=space["parallel_oh"][-1]))

    def _cycles(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Cycles of one group's image: its products, and what they do not hide of loads, shuffles and broadcasts."""
        rows, width = _output(spec)
        per_group, taps, stride = spec.oc // spec.groups, spec.kernel[-1], spec.stride[-1]
        steps = math.prod(spec.kernel[:-1]) * (spec.ic // spec.groups)
        share = max(picks.lanes, target.lanes // 2) / target.lanes  # of a cycle: narrow vectors go in pairs
        vectors, sums = ceildiv(width, picks.lanes), picks.tile_oc * picks.tile_ow
        columns, tiles = ceildiv(vectors, picks.tile_ow), ceildiv(per_group, picks.tile_oc)
        groups = len({kx * spec.dilation[-1] // stride for kx in range(taps)})
        products = vectors * per_group * taps * share * max(1.0, FMA_LATENCY / (sums * share))
        loads = vectors * tiles * (taps if stride == 1 else groups * stride) * LOAD * share
        shuffles = vectors * tiles * (0 if stride == 1 else taps * max(1, math.log2(stride) / 2)) * SHUFFLE * share
        broadcasts = columns * per_group * taps * (0.25 if picks.tile_ow == 1 else 0.5)
        edges = EDGES * tiles if any(spec.padding[-1]) else 0
        once = vectors * per_group * STORE * share + columns * tiles * BEGIN_TILE
        step = products + UNHIDDEN * (loads + shuffles + broadcasts) + columns * tiles + edges
        return float(rows * (steps * step + once))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        cycles = self._cycles(spec, target, self.default(spec, target)) * spec.n * spec.groups
        if target.vector_bits < 512:
            cycles *= NARROW
        return cycles * 2 * target.lanes / target.peak_flops + sum(spec.bytes.values()) / (target.cores * BANDWIDTH)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, columns = Operands(spec), Columns(spec, picks.lanes, picks.tile_ow)
        per_group, tile = spec.oc // spec.groups, picks.tile_oc
        tiles, rows = ceildiv(per_group, tile), spec.kernel[:-1]

        def packed_weights(block: Expr, row: Expr, c: Expr, kx: Expr, t: Expr) -> Expr:
            group, channel = block // tiles, block % tiles * tile + t
            value = ops.weights[(group * per_group + channel, c, *unflat(row, rows), kx)]
            if per_group % tile == 0:
                return value
            return tirx.if_then_else(channel < per_group, value, tirx.const(0, ACCUMULATOR))

        shape = (spec.groups * tiles, math.prod(rows), spec.ic // spec.groups, spec.kernel[-1], tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p) for p in ops.parameters[1:]]
        return written(ops, packed, lambda *buffers: _Kernel(spec, picks, columns, *buffers).statement())


def _output(spec: ConvSpec) -> tuple[int, int]:
    """(rows, width) of the output."""
    return math.prod(spec.out_spatial[:-1]), spec.out_spatial[-1]


class _Channels(NamedTuple):
    """A tile of output channels: its image, its group, its index in the group, and how many channels it has."""

    image: Expr
    group: Expr
    tile: Expr
    size: int


class _Pixels(NamedTuple):
    """A tile of pixels: its output row, its first pixel there, and what of the image it meets (:class:`Columns`)."""

    row: list[Expr]
    x: Expr
    pattern: dict[Any, Any]


@dataclass(frozen=True)
class _Kernel:
    """The statements of the whole layer."""

    spec: ConvSpec
    picks: Picks
    columns: Columns
    src: tirx.Buffer
    residual: tirx.Buffer
    parameters: dict[str, tirx.Buffer]
    dst: tirx.Buffer

    def statement(self) -> tirx.Stmt:
        """The parallel loop over images, groups, tiles of channels and parts of the rows, around what a task does."""
        spec, parts, tile_oc = self.spec, self.picks.parallel_oh, self.picks.tile_oc
        per_group, rows = spec.oc // spec.groups, math.prod(spec.out_spatial[:-1])
        tiles = ceildiv(per_group, tile_oc)
        full, rest = divmod(per_group, tile_oc)
        whole = Block()
        with whole.loop(spec.n * spec.groups * tiles * parts, parallel=True) as (body, index):
            outer, part = index // parts, body.let(index % parts)
            outer, tile = outer // tiles, body.let(outer % tiles)
            image, group = body.let(outer // spec.groups), body.let(outer % spec.groups)
            first = body.let(part * rows // parts)
            for case, size in body.cases(tile, full, tile_oc, rest):
                channels = _Channels(image, group, tile, size)
                with case.loop(body.let((part + 1) * rows // parts) - first) as (row_body, i):
                    row = [row_body.let(y) for y in unflat(first + i, spec.out_spatial[:-1])]
                    for tile_body, pixels in self.tiles(row_body, row):
                        self.product(tile_body, channels, pixels)
        return whole.statement()

    def tiles(self, body: Block, row: list[Expr]) -> Iterator[tuple[Block, _Pixels]]:
        """Code for the tiles of an output row; those that meet the same part of the image share it."""
        for start, count, pattern in self.columns.runs:
            with body.loop(count) as (inner, i):
                yield inner, _Pixels(row, inner.let((i + start) * self.columns.step), pattern)

    def product(self, body: Block, channels: _Channels, pixels: _Pixels) -> None:
        """The sums of a tile of channels for a tile of pixels, their epilogue and store."""
        spec, lanes = self.spec, self.picks.lanes
        vectors = [v for v in range(self.picks.tile_ow) if pixels.pattern["stored", v] > 0]
        sums = body.registers([(t, v) for t in range(channels.size) for v in vectors], lanes)
        with self.kernel_rows(body, channels, pixels) as (inner, inputs, weights):
            for kx in range(spec.kernel[-1]):
                values = {v: value for v in vectors if (value := inputs[v, kx]) is not None}
                for t in range(channels.size if values else 0):
                    weight = inner.let(tirx.Broadcast(self.parameters["weights"][(*weights, kx, t)], lanes))
                    for v, value in values.items():
                        sums.add(inner, (t, v), value * weight)
        for t in range(channels.size):
            first = channels.group * (spec.oc // spec.groups)
            channel = body.let(first + channels.tile * self.picks.tile_oc + t)
            given = spread_parameters(body, self.parameters, channel, lanes)
            for v in vectors:
                place, count = [channels.image, channel, *pixels.row, pixels.x + v * lanes], pixels.pattern["stored", v]
                finish(body, spec, self.dst, self.residual, place, sums[t, v], lanes, count, **given)

    @contextmanager
    def kernel_rows(
        self, body: Block, channels: _Channels, pixels: _Pixels
    ) -> Iterator[tuple[Block, Taps, Sequence[Expr]]]:
        """Loops over the rows of the kernel that meet the image, and over the group's input channels.

        Gives their body, what the taps of that row of the kernel read, and the index of its packed weights.
        """
        spec, lanes = self.spec, self.picks.lanes
        per_group, depth = spec.oc // spec.groups, spec.ic // spec.groups
        with ExitStack() as loops:
            inner, taps, where = body, [], []
            for axis, y in enumerate(pixels.row):
                first, count = meeting(spec, axis, y)
                inner, k = loops.enter_context(inner.loop(count))
                taps.append(inner.let(first + k))
                where.append(y * spec.stride[axis] + taps[-1] * spec.dilation[axis] - spec.padding[axis][0])
            inner, c = loops.enter_context(inner.loop(depth))
            source = [channels.image, inner.let(channels.group * depth + c), *map(inner.let, where)]

            def read(offset: int, count: int, shift: int) -> Expr:
                index = [*source, pixels.x * spec.stride[-1] + offset]
                return load(self.src, spec.dtype, index, lanes, count, shift)

            block = channels.group * ceildiv(per_group, self.picks.tile_oc) + channels.tile
            yield inner, Taps(inner, self.columns, pixels.pattern, read), [block, flat(taps, spec.kernel[:-1]), c]
