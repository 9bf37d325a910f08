"""Depthwise convolution of NCHW planes: rows in registers, masks instead of padding.

Applies to  depthwise convolutions (any multiplier) of rank 1 and 2, NCHW, stride at most 4.
Strategy    1. A vector is `lanes` neighbouring output pixels of a row; a tile is `tile_oh` rows ×
               `tile_ow` vectors. Nothing is copied: input rows are loaded where they lie.
            2. At the left edge a vector is shifted in from zero, at the right edge loads and stores are
               masked, rows above and below the image are left out: no multiplication by padding.
            3. Where there is a stride, as many vectors are loaded and shuffled apart by phase.
            4. Each input vector is used by all rows and taps that read it before the next is loaded.
            5. Edges are separate code, written out; the middle is a loop without conditions.
            6. One parallel loop over batch × channels (× blocks of rows).
Why not     a padded copy (cpu_grouped): for small planes the copying costs more than the arithmetic.
"""

from __future__ import annotations

import math

from tvm import tirx

from convgen.cpu.vector import Block, Columns, Taps, finish, load, runs, written, zeros
from convgen.lowering.compute import Operands, ceildiv, copied
from convgen.lowering.schedule import Picks, Space, Written, require
from convgen.problem.spec import PARAMETERS

#: Unrolled multiply-adds of all tiles that are written out.
MOST_UNROLLED = 4096


class CpuRows(Written):
    id, version = "cpu_rows", 2

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.rank <= 2, "needs one or two spatial axes")
        require(spec.groups == spec.ic, "needs one input channel per group")
        require(max(spec.stride) <= 4, "needs strides of at most 4")
        require(math.prod(spec.kernel) <= 64, "needs at most 64 taps")

    def space(self, spec, target):
        rows, width = _output(spec)
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * width)]
        return Space(
            lanes=lanes,
            tile_oh=sorted({h for h in (1, 2, 3, 4, 5, 6, 7, 8, 14) if h <= rows}),
            tile_ow=[v for v in (1, 2, 3, 4) if v == 1 or lanes[-1] * (v - 1) < width],
            parallel_oh=[1, 2, 4, 8],
        )

    def valid(self, spec, target, picks):
        rows, width = _output(spec)
        sums = picks.tile_oh * picks.tile_ow
        require(sums + 4 <= target.vector_registers, f"{sums} sums, {target.vector_registers} registers")
        require(picks.lanes * (picks.tile_ow - 1) < width, "tile_ow exceeds the row")
        require(picks.parallel_oh <= ceildiv(rows, picks.tile_oh), "fewer blocks of rows than parallel_oh")
        g = _Geometry(spec, picks)
        unrolled = g.written * sums * math.prod(spec.kernel)
        require(unrolled <= MOST_UNROLLED or sums == 1, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec, target):
        rows, width = _output(spec)
        space = self.space(spec, target).domains
        # Two half vectors take a whole one's time to multiply, but twice its time to shuffle apart.
        shuffled = 8 if spec.stride[-1] > 1 else 0
        lanes = min(space["lanes"], key=lambda n: (ceildiv(width, n) * (max(n, 8) + shuffled), -n))
        parallel_oh = 1
        if spec.n * spec.oc < 4 * target.cores:
            parallel_oh = max(p for p in space["parallel_oh"] if p == 1 or p <= rows)
        options = [
            Picks(lanes=lanes, tile_oh=h, tile_ow=v, parallel_oh=parallel_oh)
            for h in space["tile_oh"]
            for v in space["tile_ow"]
        ]
        options = [p for p in options if self.reason_against(spec, target, p) is None and p.tile_oh * p.tile_ow <= 8]
        small = Picks(lanes=lanes, tile_oh=1, tile_ow=1, parallel_oh=1)
        return min(options, key=lambda p: self._work(spec, p), default=small)

    def _work(self, spec, picks):
        """Vector operations of one plane, loads and multiply-adds, and what a tile costs besides."""
        rows, width = _output(spec)
        tiles = ceildiv(rows, picks.tile_oh) * ceildiv(width, picks.lanes * picks.tile_ow)
        read = (picks.tile_oh - 1) * spec.stride[0] + spec.kernel[0] if spec.rank > 1 else 1
        groups = ceildiv(spec.window[-1], spec.stride[-1])
        loads = read * picks.tile_ow * (spec.kernel[-1] if spec.stride[-1] == 1 else 2 * groups * spec.stride[-1])
        products = picks.tile_oh * picks.tile_ow * math.prod(spec.kernel)
        latency = max(1.0, 6 / (picks.tile_oh * picks.tile_ow))
        # Every row of a tile is a place of its own in memory.
        return tiles * (loads + products * latency + 2 * read + 6)

    def cost(self, spec, target):
        picks = self.default(spec, target)
        cycles = self._work(spec, picks) * spec.n * spec.oc * max(picks.lanes, target.lanes // 2) / target.lanes
        return cycles * 2 * target.lanes / target.peak_flops + sum(spec.bytes.values()) / (target.cores * 12e9)

    def program(self, spec, target, picks):
        ops = Operands(spec)
        packed = [copied(p) for p in ops.parameters]
        g = _Geometry(spec, picks)
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, g, *buffers))


def _kernel(spec, picks, g, src, residual, parameters, dst):
    """All of the layer: a loop over planes (and parts of their rows)."""
    lanes, taps = picks.lanes, g.kernel
    whole = Block()
    with whole.loop(spec.n * spec.oc * picks.parallel_oh, parallel=True) as (task, index):
        plane, part = index, 0
        if picks.parallel_oh > 1:
            plane, part = task.let(index // picks.parallel_oh), index % picks.parallel_oh
        n, o = task.let(plane // spec.oc), task.let(plane % spec.oc)
        c = task.let(o // (spec.oc // spec.ic))

        def where(channel, y, x):
            return [n, channel, y, x] if spec.rank == 2 else [n, channel, x]

        def parameter(name, *tap):
            return task.let(tirx.Broadcast(parameters[name][(o, *tap)], lanes)) if name in parameters else None

        weights = {
            (ky, kx): parameter("weights", 0, *(ky, kx)[2 - spec.rank :])
            for ky in range(taps[0])
            for kx in range(taps[1])
        }
        # Of i8 the bias is another type than the sums in f32, to which it comes last.
        given = {name: value for name in PARAMETERS[1:] if (value := parameter(name)) is not None}
        bias = None if spec.dtype == "i8" else given.pop("bias", None)

        def tile(block, rows, y0, columns, x0):
            """Rows from y0 on, vectors from x0 on; ``rows`` and ``columns`` tell what of the image they meet."""
            sums = {}
            for row, uses in rows[1]:
                y = y0 * g.stride[0] + row - g.begin

                def read(offset, count, shift, y=y):
                    return load(src, spec.dtype, where(c, y, x0 * g.stride[1] + offset), lanes, count, shift)

                inputs = Taps(block, g.columns, columns, read)
                for v in range(picks.tile_ow):
                    for kx in range(taps[1]):
                        for r, ky in uses if columns["stored", v] > 0 else ():
                            if (value := inputs[v, kx]) is None:
                                break
                            before = sums.get((r, v), bias)
                            product = value * weights[ky, kx]
                            sums[r, v] = block.let(product if before is None else before + product)
            for r in range(rows[0]):
                for v in range(picks.tile_ow):
                    count = columns["stored", v]
                    if count > 0:
                        at = where(o, y0 + r, x0 + v * lanes)
                        value = sums.get((r, v), zeros(lanes) if bias is None else bias)
                        finish(block, spec, dst, residual, at, value, lanes, count, **given)

        def rows_of(block, blocks):
            for first_row, row_count, rows in blocks:
                with block.loop(row_count) as (strip, i):
                    y0 = strip.let((i + first_row) * picks.tile_oh)
                    for first, count, columns in g.columns.runs:
                        with strip.loop(count) as (inside, j):
                            tile(inside, rows, y0, columns, inside.let((j + first) * g.columns.step))

        if picks.parallel_oh == 1:
            rows_of(task, runs(g.rows))
        for number in range(picks.parallel_oh if picks.parallel_oh > 1 else 0):
            with task.when(part == number) as branch:
                start, end = (i * len(g.rows) // picks.parallel_oh for i in (number, number + 1))
                rows_of(branch, [(first + start, count, rows) for first, count, rows in runs(g.rows[start:end])])
    return whole.statement()


class _Geometry:
    """What of the image each tile meets; one-dimensional layers have one row.

    ``rows`` lists, per block of output rows, the input rows that are there with their uses: a tuple of
    ``(row, ((r, ky), …))``, the row counted from the block's first input row, padding included, and last
    the number of output rows.
    """

    def __init__(self, spec, picks):
        one = (1,) * (2 - spec.rank)
        self.kernel, self.stride = one + spec.kernel, one + spec.stride
        self.dilation, self.begin = (one + spec.dilation)[0], spec.padding[0][0] if spec.rank == 2 else 0
        self.size, self.out = (one + spec.in_spatial)[0], (one + spec.out_spatial)[0]
        self.rows = [self._rows(y, min(picks.tile_oh, self.out - y)) for y in range(0, self.out, picks.tile_oh)]
        self.columns = Columns(spec, picks.lanes, picks.tile_ow)
        #: Tiles that are written out.
        self.written = len(runs(self.rows)) * len(self.columns.runs)

    def _rows(self, y0, count):
        uses = {}
        for r in range(count):
            for ky in range(self.kernel[0]):
                row = r * self.stride[0] + ky * self.dilation
                if 0 <= y0 * self.stride[0] + row - self.begin < self.size:
                    uses.setdefault(row, []).append((r, ky))
        return (count, tuple((row, tuple(uses[row])) for row in sorted(uses)))


def _output(spec):
    """(rows, width) of the output."""
    return (spec.out_spatial[-2] if spec.rank > 1 else 1), spec.out_spatial[-1]
