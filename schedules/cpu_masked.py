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
            several rows (cpu_rows): channels share the loads as well, and rows at the edge need no code.
"""

from __future__ import annotations

import math
from contextlib import ExitStack

from tvm import te, tirx

from convgen.cpu.vector import Block, Columns, Taps, finish, load, meeting, spread_parameters, written
from convgen.lowering.compute import ACCUMULATOR, Operands, ceildiv, copied, flat, unflat
from convgen.lowering.schedule import Picks, Space, Written, require

#: Unrolled multiply-adds of all tiles that are written out.
MOST_UNROLLED = 4096


class CpuMasked(Written):
    id, version = "cpu_masked", 1

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        several = spec.ic > spec.groups or spec.oc >= 4 * spec.groups
        require(several, "needs several input channels per group, or at least 4 output channels")
        few = spec.oc // spec.groups <= 32 or spec.reduction_length <= 160
        require(few, "needs at most 32 output channels per group, or at most 160 products per output")
        require(spec.stride[-1] <= 8, "needs a stride along the row of at most 8")
        require(spec.kernel[-1] <= 64, "needs at most 64 taps along the row")

    def space(self, spec, target):
        rows, width = _output(spec)
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * width)]
        return Space(
            lanes=lanes,
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16) if c <= spec.oc // spec.groups],
            tile_ow=[v for v in (1, 2, 3, 4, 6) if v == 1 or lanes[0] * (v - 1) < width],
            parallel_oh=[p for p in (1, 2, 4, 8, 16, 32) if p <= rows],
        )

    def valid(self, spec, target, picks):
        sums = picks.tile_oc * picks.tile_ow
        used = sums + picks.tile_ow * spec.stride[-1] + 2
        require(used <= target.vector_registers, f"{used} vectors in a tile, {target.vector_registers} registers")
        require(picks.lanes * (picks.tile_ow - 1) < spec.out_spatial[-1], "tile_ow exceeds the row")
        tiles = len(Columns(spec, picks.lanes, picks.tile_ow).runs)
        unrolled = tiles * sums * spec.kernel[-1] * (1 + (spec.oc // spec.groups % picks.tile_oc > 0))
        require(unrolled <= MOST_UNROLLED or sums == 1, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec, target):
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

    def _cycles(self, spec, target, picks):
        """Cycles of one group's image: products, and in their shade loads, shuffles and broadcasts."""
        rows, width = _output(spec)
        per_group, taps, stride = spec.oc // spec.groups, spec.kernel[-1], spec.stride[-1]
        steps = math.prod(spec.kernel[:-1]) * (spec.ic // spec.groups)
        share = max(picks.lanes, target.lanes // 2) / target.lanes  # of a cycle: narrow vectors go in pairs
        vectors, sums = ceildiv(width, picks.lanes), picks.tile_oc * picks.tile_ow
        columns, tiles = ceildiv(vectors, picks.tile_ow), ceildiv(per_group, picks.tile_oc)
        groups = len({kx * spec.dilation[-1] // stride for kx in range(taps)})
        products = vectors * per_group * taps * share * max(1.0, 4 / (sums * share))
        reads = vectors * tiles * (taps if stride == 1 else groups * stride) * 1.5 * share
        shuffles = vectors * tiles * (0 if stride == 1 else taps * max(1, math.log2(stride) / 2)) * 2 * share
        broadcasts = columns * per_group * taps * (0.25 if picks.tile_ow == 1 else 0.5)
        edges = 3 * tiles if any(spec.padding[-1]) else 0
        once = vectors * per_group * 2 * share + columns * tiles * 10
        return rows * (steps * (products + 0.12 * (reads + shuffles + broadcasts) + columns * tiles + edges) + once)

    def cost(self, spec, target):
        cycles = self._cycles(spec, target, self.default(spec, target)) * spec.n * spec.groups
        if target.vector_bits < 512:  # no product takes its weight from memory: each is loaded by an instruction
            cycles *= 1.15
        return cycles * 2 * target.lanes / target.peak_flops + sum(spec.bytes.values()) / (target.cores * 80e9)

    def program(self, spec, target, picks):
        ops = Operands(spec)
        per_group, tile = spec.oc // spec.groups, picks.tile_oc
        tiles, rows = ceildiv(per_group, tile), spec.kernel[:-1]

        def packed_weights(block, row, c, kx, t):
            group, channel = block // tiles, block % tiles * tile + t
            value = ops.weights[(group * per_group + channel, c, *unflat(row, rows), kx)]
            if per_group % tile == 0:
                return value
            return tirx.if_then_else(channel < per_group, value, tirx.const(0, ACCUMULATOR))

        shape = (spec.groups * tiles, math.prod(rows), spec.ic // spec.groups, spec.kernel[-1], tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p) for p in ops.parameters[1:]]
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, *buffers))


def _kernel(spec, picks, src, residual, parameters, dst):
    """All of the layer: a loop over images, groups, tiles of channels and parts of the rows."""
    lanes, parts = picks.lanes, picks.parallel_oh
    columns = Columns(spec, lanes, picks.tile_ow)
    per_group, depth = spec.oc // spec.groups, spec.ic // spec.groups
    tiles, rows = ceildiv(per_group, picks.tile_oc), math.prod(spec.out_spatial[:-1])
    whole = Block()

    def tile_of(block, n, group, b, channels, at, x0, tile):
        """``channels`` × the pixels from x0 on, in the row ``at``; ``tile`` tells what of the image they meet."""
        live = [v for v in range(picks.tile_ow) if tile["stored", v] > 0]
        sums = block.registers([(t, v) for t in range(channels) for v in live], lanes)
        with ExitStack() as loops:
            inner, taps, where = block, [], []
            for axis, y in enumerate(at):
                first, count = meeting(spec, axis, y)
                inner, k = loops.enter_context(inner.loop(count))
                taps.append(inner.let(first + k))
                where.append(y * spec.stride[axis] + taps[-1] * spec.dilation[axis] - spec.padding[axis][0])
            inner, c = loops.enter_context(inner.loop(depth))
            source = [n, inner.let(group * depth + c), *map(inner.let, where)]
            weights = [group * tiles + b, flat(taps, spec.kernel[:-1]), c]

            def read(offset, count, shift):
                index = [*source, x0 * spec.stride[-1] + offset]
                return load(src, spec.dtype, index, lanes, count, shift)

            inputs = Taps(inner, columns, tile, read)
            for kx in range(spec.kernel[-1]):
                values = {v: value for v in live if (value := inputs[v, kx]) is not None}
                for t in range(channels if values else 0):
                    weight = inner.let(tirx.Broadcast(parameters["weights"][(*weights, kx, t)], lanes))
                    for v, value in values.items():
                        sums.add(inner, (t, v), value * weight)
        for t in range(channels):
            o = block.let(group * per_group + b * picks.tile_oc + t)
            given = spread_parameters(block, parameters, o, lanes)
            for v in live:
                place, count = [n, o, *at, x0 + v * lanes], tile["stored", v]
                finish(block, spec, dst, residual, place, sums[t, v], lanes, count, **given)

    with whole.loop(spec.n * spec.groups * tiles * parts, parallel=True) as (task, index):
        rest, part = index // parts, task.let(index % parts)
        rest, b = rest // tiles, task.let(rest % tiles)
        n, group = task.let(rest // spec.groups), task.let(rest % spec.groups)
        first = task.let(part * rows // parts)
        for these, channels in task.cases(b, per_group // picks.tile_oc, picks.tile_oc, per_group % picks.tile_oc):
            with these.loop(task.let((part + 1) * rows // parts) - first) as (row, i):
                at = [row.let(y) for y in unflat(first + i, spec.out_spatial[:-1])]
                for start, count, tile in columns.runs:
                    with row.loop(count) as (inside, j):
                        x0 = inside.let((j + start) * columns.step)
                        tile_of(inside, n, group, b, channels, at, x0, tile)
    return whole.statement()


def _output(spec):
    """(rows, width) of the output."""
    return math.prod(spec.out_spatial[:-1]), spec.out_spatial[-1]
