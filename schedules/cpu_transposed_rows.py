"""Transposed convolution of NCHW planes: neighbouring pixels of a stride phase in the lanes.

Applies to  transposed convolutions of any rank and groups, NCHW, dilated only where the stride is 1.
Strategy    1. Along the last axis, output pixels whose distance to the first one is the same modulo
               the stride form a phase: pixel s·q + r takes every s-th tap, of input pixels q + offset.
            2. A vector is `lanes` neighbouring q of one phase; a tile is all phases × `tile_ow` vectors ×
               `tile_oc` channels. A src vector is loaded where it lies, masked at the edges, and used by
               all phases, taps and channels; weights are broadcast, packed [oc/t][taps][ic][taps of a row][t].
            3. Sums of `tile_phase` phases at once stay in registers over all rows of taps and input channels.
            4. Rows of taps that lie in padding are left out: their loop runs over those inside.
            5. Phases are shuffled together, so that epilogue and store work on whole vectors.
            6. `prefetch_src`: each channel's src of the next tile is fetched ahead; channels lie far apart.
            7. One parallel loop over batch × rows (× parts of a row) × channel blocks.
Why not     channels in the lanes (cpu_transposed): better with many channels, and rows shorter than a vector.
"""

from __future__ import annotations

import math
from contextlib import ExitStack

from tvm import te, tirx

from convgen.cpu.vector import Block, finish, interleave, load, prefetch, runs, written
from convgen.lowering.compute import ACCUMULATOR, Operands, ceildiv, copied, flat, unflat
from convgen.lowering.schedule import Picks, Space, Written, require
from convgen.problem.dtypes import BYTES

#: Unrolled multiply-adds of all tiles that are written out.
MOST_UNROLLED = 4096


class CpuTransposedRows(Written):
    id, version = "cpu_transposed_rows", 1

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.stride[-1] <= 64, "needs a stride of at most 64 along a row")
        require(spec.kernel[-1] <= 256, "needs at most 256 taps along a row")
        require(all(s == 1 or d == 1 for s, d in zip(spec.stride, spec.dilation, strict=True)), "dilated and strided")

    def space(self, spec, target):
        width, phases = ceildiv(spec.out_spatial[-1], spec.stride[-1]), spec.stride[-1]
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * width)]
        return Space(
            lanes=lanes,
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16) if c <= spec.oc // spec.groups],
            tile_ow=[v for v in (1, 2, 3, 4) if v == 1 or lanes[0] * (v - 1) < width],
            tile_phase=sorted({ceildiv(phases, parts) for parts in (1, 2, 3, 4, 6, 8)}),
            parallel_ow=[1, 2, 4, 8, 16],
            prefetch_src=[False, True],
        )

    def valid(self, spec, target, picks):
        width, phases = ceildiv(spec.out_spatial[-1], spec.stride[-1]), spec.stride[-1]
        sums = picks.tile_phase * picks.tile_oc * picks.tile_ow
        most = _most_sums(target)
        require(sums <= most or sums == picks.tile_phase, f"{sums} sums, registers for {most}")
        require(picks.lanes * (picks.tile_ow - 1) < width, "tile_ow exceeds the row")
        require(picks.parallel_ow <= ceildiv(width, picks.lanes * picks.tile_ow), "fewer tiles than parallel_ow")
        one = picks.tile_oc * picks.tile_ow
        unrolled = _Columns(spec, picks).written * one * max(phases, spec.kernel[-1])
        require(unrolled <= MOST_UNROLLED or one == 1, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec, target):
        space = self.space(spec, target).domains
        small = min(space["tile_phase"], key=lambda p: (abs(p - 8), p))
        base = Picks(
            lanes=space["lanes"][-1], tile_oc=1, tile_ow=1, tile_phase=small, parallel_ow=1, prefetch_src=False
        )
        options = [
            Picks(lanes=lanes, tile_oc=c, tile_ow=v, tile_phase=phase, parallel_ow=1, prefetch_src=False)
            for lanes in space["lanes"]
            for c in space["tile_oc"]
            for v in space["tile_ow"]
            for phase in space["tile_phase"]
            if phase * c * v <= _most_sums(target)
        ]
        for picks in sorted(options, key=lambda p: self._cycles(spec, target, p)):
            if self.reason_against(spec, target, picks) is None:
                base = picks
                break
        tasks = spec.n * math.prod(spec.out_spatial[:-1]) * _blocks(spec, base)
        tiles = ceildiv(ceildiv(spec.out_spatial[-1], spec.stride[-1]), base.lanes * base.tile_ow)
        parts = [p for p in space["parallel_ow"] if p <= tiles]
        parts = next((p for p in parts if p * tasks >= 4 * target.cores), parts[-1])
        return base.replace(parallel_ow=parts, prefetch_src=tiles > 1 and spec.bytes["src"] > target.l2)

    def _cycles(self, spec, target, picks):
        """Of one core for the whole layer, where operands come from the nearest cache."""
        taps, phases, depth = spec.kernel[-1], spec.stride[-1], spec.ic // spec.groups
        unit = max(picks.lanes, target.lanes // 2) / target.lanes  # halves of a vector pass two at a time
        vectors = ceildiv(ceildiv(spec.out_spatial[-1], phases), picks.lanes)
        tiles, groups = ceildiv(vectors, picks.tile_ow), ceildiv(phases, picks.tile_phase)
        products = taps * picks.tile_oc * vectors * unit
        reads = groups * min(_offsets(spec), ceildiv(taps, groups)) * vectors * (0.5 + unit / 2)
        reads += taps * picks.tile_oc * tiles / 2
        latency = 4 * groups * ceildiv(taps, phases) * tiles
        step = max(products, reads, latency) + 0.2 * reads + 2 * groups * tiles
        # Taps of the other axes that meet the input, on average over the output.
        sizes = zip(spec.kernel[:-1], spec.in_spatial[:-1], spec.out_spatial[:-1], strict=True)
        met = math.prod(min(k, k * i / o) for k, i, o in sizes)
        finish = (2 + math.log2(phases)) * (3 if spec.activation_op.costly else 1)
        finish = phases * picks.tile_oc * vectors * finish + 12 * tiles
        rows = spec.n * math.prod(spec.out_spatial[:-1]) * _blocks(spec, picks)
        return rows * (depth * met * step + finish + 20)

    def cost(self, spec, target):
        picks = self.default(spec, target)
        tasks = spec.n * math.prod(spec.out_spatial[:-1]) * _blocks(spec, picks) * picks.parallel_ow
        idle = ceildiv(tasks, target.cores) * target.cores / max(1, tasks)
        cycles = self._cycles(spec, target, picks) * idle * 2 * target.lanes / target.peak_flops
        return cycles + (spec.bytes["src"] + 2 * spec.bytes["dst"]) / (target.cores * 12e9)

    def program(self, spec, target, picks):
        ops, tile = Operands(spec), picks.tile_oc
        per_group, leading = spec.oc // spec.groups, spec.kernel[:-1]
        blocks, depth = ceildiv(per_group, tile), spec.ic // spec.groups

        def packed_weights(b, position, c, k, lane):
            o = b % blocks * tile + lane
            value = ops.weights[(b // blocks * depth + c, o, *unflat(position, leading), k)]
            return (
                value if per_group % tile == 0 else tirx.if_then_else(o < per_group, value, tirx.const(0, ACCUMULATOR))
            )

        shape = (blocks * spec.groups, math.prod(leading), depth, spec.kernel[-1], tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p) for p in ops.parameters[1:]]
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, *buffers))


def _kernel(spec, picks, src, residual, parameters, dst):
    """All of the layer: a loop over rows (and parts of them) and blocks of channels."""
    lanes, stride, tile_oc, vectors = picks.lanes, spec.stride[-1], picks.tile_oc, range(picks.tile_ow)
    per_group, depth = spec.oc // spec.groups, spec.ic // spec.groups
    blocks, columns, phases = ceildiv(per_group, tile_oc), _Columns(spec, picks), _phases(spec)
    step = lanes * picks.tile_ow
    weights = parameters["weights"]
    tasks = (spec.n, *spec.out_spatial[:-1], picks.parallel_ow, spec.groups, blocks)
    whole = Block()
    with whole.loop(math.prod(tasks), parallel=True) as (task, index):
        n, *row, part, group, block = (task.let(i) for i in unflat(index, tasks))
        first_oc = task.let(group * per_group + block * tile_oc)
        taps = [task.let(value) for axis in range(spec.rank - 1) for value in _taps(spec, axis, row[axis])]
        taps = [taps[i : i + 4] for i in range(0, len(taps), 4)]

        def products(inside, facts, q0, number, sums):
            """Add up one group of phases."""
            inner, where, kernel = inside, [], []
            with ExitStack() as loops:
                for (base, k0, first, count), s, d in zip(taps, spec.stride, spec.dilation, strict=False):
                    inner, t = loops.enter_context(inner.loop(count))
                    t = inner.let(t + first)
                    where.append(inner.let(base - t * d))
                    kernel.append(k0 + t * s)
                position = inner.let(flat(kernel, spec.kernel[:-1]))
                with inner.loop(depth) as (one, c):
                    channel, loaded = one.let(group * depth + c), {}
                    if picks.prefetch_src and number == 0:
                        for x in range(0, step, 64 // BYTES[spec.dtype]):
                            one.add(prefetch(src, [n, channel, *where, q0 + (step + x)]))
                    for r in range(number, min(stride, number + picks.tile_phase)):
                        for k, dx in phases[r]:
                            for i in range(tile_oc):
                                weight = None
                                for v in vectors:
                                    shift, count = facts[v, dx]
                                    if count <= 0:
                                        continue
                                    if (v, dx) not in loaded:
                                        at = [n, channel, *where, q0 + (v * lanes + dx + shift)]
                                        loaded[v, dx] = one.let(load(src, spec.dtype, at, lanes, count, shift))
                                    if weight is None:
                                        weight = weights[(group * blocks + block, position, c, k, i)]
                                        weight = one.let(tirx.Broadcast(weight, lanes))
                                    sums.add(one, (r, i, v), loaded[v, dx] * weight)

        def tile(inside, facts, q0):
            sums = {}
            for number in range(0, stride, picks.tile_phase):
                keys = [
                    (r, i, v)
                    for r in range(number, min(stride, number + picks.tile_phase))
                    for i in range(tile_oc)
                    for v in vectors
                ]
                found = inside.registers(keys, lanes)
                products(inside, facts, q0, number, found)
                sums.update(dict.fromkeys(keys, found))
            for i in range(tile_oc):
                o = first_oc + i
                exists = True if per_group % tile_oc == 0 else block * tile_oc + i < per_group
                with inside.when(exists) as one:
                    per_channel = {
                        name: one.let(tirx.Broadcast(parameters[name][(o,)], lanes))
                        for name in ("bias", "slope")
                        if name in parameters
                    }
                    for v in vectors:
                        apart = [one.let(sums[r, i, v][r, i, v]) for r in range(stride)]
                        for j, value in enumerate(interleave(one, apart, lanes)):
                            count = facts["stored", v, j]
                            if count <= 0:
                                continue
                            at = [n, o, *row, q0 * stride + (v * stride + j) * lanes]
                            finish(one, spec, dst, residual, at, value, lanes, count, **per_channel)

        for first, count, facts in columns.runs:
            start, end = first, first + count
            if picks.parallel_ow > 1:
                start = tirx.max(part * columns.count // picks.parallel_ow, start)
                end = tirx.min((part + 1) * columns.count // picks.parallel_ow, end)
                start, count = task.let(start), task.let(tirx.max(end - start, 0))
            with task.loop(count) as (inside, j):
                tile(inside, dict(facts), inside.let((j + start) * step))
    return whole.statement()


def _most_sums(target):
    """Sums in registers beside a vector of src or two, and a weight."""
    return 28 if target.vector_registers > 16 else 12


def _blocks(spec, picks):
    return spec.groups * ceildiv(spec.oc // spec.groups, picks.tile_oc)


def _offsets(spec):
    """How many input pixels the phases of one q meet."""
    begin, taps, stride = spec.padding[-1][0], spec.kernel[-1], spec.stride[-1]
    return taps if stride == 1 else ceildiv(begin, stride) - ceildiv(begin - taps + 1, stride) + 1


def _phases(spec):
    """Of each phase of a row: its taps, each with the offset of the input pixel it meets."""
    stride, dilation, begin = spec.stride[-1], spec.dilation[-1], spec.padding[-1][0]
    return [
        [
            (k, (r + begin - k * dilation) // stride)
            for k in range(spec.kernel[-1])
            if (r + begin - k * dilation) % stride == 0
        ]
        for r in range(stride)
    ]


def _taps(spec, axis, y):
    """What output row y takes: its input row base - t·d at tap k0 + t·s for the t of a range, as first and count."""
    stride, dilation, size = spec.stride[axis], spec.dilation[axis], spec.in_spatial[axis]
    base, k0 = (y + spec.padding[axis][0]) // stride, (y + spec.padding[axis][0]) % stride
    first = (tirx.max(base - (size - 1), 0) + (dilation - 1)) // dilation
    end = tirx.min((spec.kernel[axis] - 1 - k0 + stride) // stride, base // dilation + 1)
    return base, k0, first, tirx.max(end - first, 0)


class _Columns:
    """What of a row each tile meets, as runs of equal tiles.

    Per vector and offset of a tap how many lanes lie left of the image, and how many elements follow;
    per stored vector how many elements there are.
    """

    def __init__(self, spec, picks):
        stride, step = spec.stride[-1], picks.lanes * picks.tile_ow
        self.spec, self.picks = spec, picks
        self.offsets = sorted({dx for taps in _phases(spec) for _, dx in taps})
        self.count = ceildiv(spec.out_spatial[-1], stride * step)
        # Tiles in the middle meet the whole image.
        left = min(self.count, ceildiv(max(0, -min(self.offsets, default=0)), step))
        right = min(
            (spec.in_spatial[-1] - max(self.offsets, default=0)) // step, spec.out_spatial[-1] // (stride * step)
        )
        right = max(left, right)
        middle = [(left, right - left, self._facts(left * step))] if right > left else []
        last = runs([self._facts(i * step) for i in range(right, self.count)])
        self.runs = runs([self._facts(i * step) for i in range(left)]) + middle
        self.runs += [(right + first, count, facts) for first, count, facts in last]
        #: Tiles that are written out.
        self.written = len(self.runs)

    def _facts(self, q0):
        spec, lanes, stride = self.spec, self.picks.lanes, self.spec.stride[-1]
        facts = {}
        for v in range(self.picks.tile_ow):
            for dx in self.offsets:
                x = q0 + v * lanes + dx
                shift = min(lanes, max(0, -x))
                facts[v, dx] = (shift, max(0, min(lanes - shift, spec.in_spatial[-1] - x - shift)))
            for j in range(stride):
                x = (q0 + v * lanes) * stride + j * lanes
                facts["stored", v, j] = min(lanes, spec.out_spatial[-1] - x)
        return tuple(facts.items())
