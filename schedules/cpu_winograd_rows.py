"""Winograd convolution along the row alone: pixels in the vector lanes, all of a tile in registers.

Applies to  dense NCHW convolutions of any rank with 2 to 7 taps along the row at stride 1; any dilation there
            that divides the vector, or is no less; the other axes are direct.
Strategy    F(m, r) along the row (see cpu_winograd) makes m outputs with m + r - 1 products instead of m r.
            1. Pack weights transformed, as [oc/t][rows of the kernel][ic][position][t].
            2. A lane is a tile: the m outputs at the dilation's distance. A task is a block of rows × vectors of
               tiles: its input rows are transformed once into [row][ic][position][lanes], padding by masks.
            3. Keep all positions of `tile_oc` channels in registers; one pass over the kernel's rows and ic.
            4. Transform back in registers; bias, residual, activation; vectors are shuffled back into pixels.
            5. One parallel loop over batch × blocks.
Why not     two axes (cpu_winograd): half the products, but its stages pass through memory, which only many
            channels pay for.
"""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack, contextmanager

from tvm import te, tirx

from convgen.cpu.vector import (
    Block,
    finish,
    gathered,
    load,
    load_within,
    meeting,
    prefetch,
    store,
    weighted_sum,
    written,
)
from convgen.lowering.compute import ACCUMULATOR, Operands, ceildiv, copied, flat, row_times, unflat
from convgen.lowering.schedule import Picks, Space, Written, require
from convgen.lowering.winograd import admitted, toom_cook


class CpuWinogradRows(Written):
    id, version = "cpu_winograd_rows", 1
    transforms = True

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed and spec.groups == 1, "needs groups 1, not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        taps, dilation = spec.kernel[-1], spec.dilation[-1]
        require(taps >= 2 and bool(admitted(spec.accuracy, taps)), "needs 2 to 7 taps along the row, strict 2 or 3")
        require(spec.stride[-1] == 1, "needs stride 1 along the row")
        # Where a window lies in nothing but padding the exact result admits no error; a transform has one.
        if any(spec.padding[-1]):
            require(max(spec.padding[-1]) <= (taps - 1) * dilation, "needs windows that all meet the image")
            require(spec.in_spatial[-1] >= dilation, "needs windows that all meet the image")
        require(_lanes(spec, target), "needs a dilation that divides the vector, or is no less")

    def space(self, spec, target):
        return Space(
            tile=admitted(spec.accuracy, spec.kernel[-1]),
            lanes=_lanes(spec, target),
            tile_oc=[c for c in (1, 2, 3, 4, 5, 6, 7, 8) if c <= spec.oc],
            tile_px=[1, 2, 3],
            block_px=[1, 2, 4, 8],
            block_rows=[r for r in (1, 2, 4, 7, 8, 14) if (spec.rank > 1 and r <= spec.out_spatial[-2]) or r == 1],
        )

    def valid(self, spec, target, picks):
        g = _Geometry(spec, picks)
        used = picks.tile_oc * g.positions * picks.tile_px + picks.tile_px + 1
        require(used <= target.vector_registers, f"{used} vectors in a tile, {target.vector_registers} registers")
        require(
            picks.block_px == 1 or picks.block_px * picks.tile_px < 2 * g.vectors,
            "block_px exceeds the vectors of a row",
        )

    def default(self, spec, target):
        domains = self.space(spec, target).domains
        picks = Picks(tile=2, lanes=domains["lanes"][0], tile_oc=1, tile_px=1, block_px=1, block_rows=1)
        tiles = itertools.product(*(domains[name] for name in ("tile", "lanes", "tile_oc")))
        options = [picks.replace(tile=m, lanes=lanes, tile_oc=c) for m, lanes, c in tiles]
        options = [p for p in options if self.reason_against(spec, target, p) is None]
        picks = min(options, key=lambda p: self._cycles(spec, target, p), default=picks)
        g = _Geometry(spec, picks)
        weights = 4 * spec.oc * spec.ic * math.prod(spec.kernel[:-1]) * g.positions

        def suits(option):
            """Whether the transformed rows leave the cache room, and every core has enough to do."""
            o = _Geometry(spec, option)
            panel = 4 * option.block_px * o.lanes * math.prod(spec.kernel[:-2]) * o.rows_in * spec.ic * o.positions
            tasks = spec.n * math.prod(o.planes) * ceildiv(o.height, option.block_rows)
            enough = tasks * ceildiv(o.vectors, option.block_px) >= 4 * target.cores
            return self.reason_against(spec, target, option) is None and enough and panel <= target.l2 // 2

        # Rows share what is transformed; vectors of a row share weights, where they are many.
        taller = [o for r in domains["block_rows"] if r <= 4 and suits(o := picks.replace(block_rows=r))]
        picks = taller[-1] if taller else picks
        wider = picks.replace(block_px=4)
        return wider if weights > target.l2 // 4 and suits(wider) else picks

    def _cycles(self, spec, target, picks):
        """Cycles of all: products, and the transforms' loads, stores and sums."""
        g = _Geometry(spec, picks)
        # Of a cycle: narrow vectors go in pairs.
        share = max(picks.lanes, target.lanes // 2) / target.lanes * (1 if picks.lanes == target.lanes else 1.2)
        steps = math.prod(spec.kernel[:-1]) * spec.ic * g.positions
        products = steps * (spec.oc * max(1.0, 8 / (picks.tile_oc * g.positions)) + ceildiv(spec.oc, picks.tile_oc) / 4)
        shuffles = 0 if g.apart else 3
        inputs = spec.ic * g.positions * (6 + shuffles)
        back = spec.oc * (3 * g.positions + (4 + shuffles) * g.m)
        return spec.n * math.prod(spec.out_spatial[:-1]) * g.vectors * share * (products + inputs + back)

    def cost(self, spec, target):
        cycles = self._cycles(spec, target, self.default(spec, target))
        return cycles * 2 * target.lanes / target.peak_flops + sum(spec.bytes.values()) / (target.cores * 80e9)

    def program(self, spec, target, picks):
        ops, g = Operands(spec), _Geometry(spec, picks)
        _, weight_rows, _ = toom_cook(picks.tile, spec.kernel[-1])
        rows, tile = spec.kernel[:-1], picks.tile_oc

        def packed_weights(block, row, c, position, t):
            o = block * tile + t
            value = row_times(weight_rows, position, lambda k: ops.weights[(o, c, *unflat(row, rows), k)])
            return value if spec.oc % tile == 0 else tirx.if_then_else(o < spec.oc, value, tirx.const(0, ACCUMULATOR))

        shape = (ceildiv(spec.oc, tile), math.prod(rows), spec.ic, g.positions, tile)
        packed = [te.compute(shape, packed_weights, name="weights_packed")]
        packed += [copied(p) for p in ops.parameters[1:]]
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, *buffers))


class _Geometry:
    """How a row of outputs falls into vectors of tiles.

    With dilation d, output ``m d q + d i + r`` is the i-th of the tile that is lane ``d q + r``, for ``r < d``.
    Where d is a vector or more, lanes run along r; where less, over d lanes of several q.
    """

    def __init__(self, spec, picks):
        self.m, self.taps, self.d, self.lanes = picks.tile, spec.kernel[-1], spec.dilation[-1], picks.lanes
        self.positions = self.m + self.taps - 1
        width = spec.out_spatial[-1]
        self.apart = self.d >= self.lanes  # a vector's outputs lie apart, each a vector of neighbours
        if self.apart:
            self.per_period = ceildiv(self.d, self.lanes)
            self.vectors = ceildiv(width, self.m * self.d) * self.per_period
        else:
            self.vectors = ceildiv(width, self.m * self.lanes)
        self.planes, self.height = spec.out_spatial[:-2], spec.out_spatial[-2] if spec.rank > 1 else 1
        # A block's input rows.
        if spec.rank > 1:
            self.rows_in = (picks.block_rows - 1) * spec.stride[-2] + (spec.kernel[-2] - 1) * spec.dilation[-2] + 1
        else:
            self.rows_in = 1

    def first(self, vector):
        """The first output pixel of a vector of tiles."""
        if not self.apart:
            return vector * (self.m * self.lanes)
        return vector // self.per_period * (self.m * self.d) + vector % self.per_period * self.lanes

    def element(self, i, lane):
        """Where tile ``lane``'s i-th element lies, from the first pixel on; narrow dilation."""
        return lane // self.d * (self.m * self.d) + i * self.d + lane % self.d

    @property
    def reach(self):
        """Elements of the input row that a vector of tiles meets, from its first on."""
        if self.apart:
            return (self.positions - 1) * self.d + self.lanes
        return self.element(self.positions - 1, self.lanes - 1) + 1

    @property
    def covered(self):
        """Output pixels from a vector's first to its last."""
        return (self.m - 1) * self.d + self.lanes if self.apart else self.m * self.lanes


def _kernel(spec, picks, src, residual, parameters, dst):
    """All of the layer: a loop over images and blocks of rows × vectors of tiles."""
    g = _Geometry(spec, picks)
    lanes, begin, width_in, width = g.lanes, spec.padding[-1][0], spec.in_spatial[-1], spec.out_spatial[-1]
    back_rows, _, input_rows = toom_cook(g.m, g.taps)
    outer, taps = spec.out_spatial[:-1], spec.kernel[:-1]
    width_block = picks.tile_px * picks.block_px  # in vectors
    blocks_x, blocks_y = ceildiv(g.vectors, width_block), ceildiv(g.height, picks.block_rows)
    # Past the block: the next one, in all probability this thread's next.
    ahead = width_block * (lanes if g.apart else g.m * lanes)
    whole = Block()

    def transform(block, panel, place, source, x0, image):
        """One channel of the vector of tiles whose first output is x0; ``image``: it meets nothing else."""

        def read(offset, count=lanes):
            index = [*source, x0 - begin + offset]
            block.add(prefetch(src, [*source, x0 - begin + offset + ahead]))
            read_row = load if image else load_within
            return block.let(read_row(src, spec.dtype, index, lanes, count))

        if g.apart:
            elements = [read(i * g.d) for i in range(g.positions)]
        else:
            row = [read(x, min(lanes, g.reach - x)) for x in range(0, g.reach, lanes)]
            orders = [[g.element(i, lane) for lane in range(lanes)] for i in range(g.positions)]
            elements = [block.let(gathered(row, order, lanes)) for order in orders]
        for p, factors in enumerate(input_rows):
            value = weighted_sum(zip(factors, elements, strict=True))
            block.add(store(panel, "f32", [*place, p, 0], value, lanes, lanes))

    def transformed_back(block, sums, v, channels, o, at, x0):
        """Outputs of ``channels`` from o on."""
        pixels = [i * g.d if g.apart else i * lanes for i in range(g.m)]
        for t in range(channels):
            given = {k: block.let(tirx.Broadcast(q[o + t], lanes)) for k, q in parameters.items() if k != "weights"}
            positions = [sums[v, t, p] for p in range(g.positions)]
            values = [block.let(weighted_sum(zip(factors, positions, strict=True))) for factors in back_rows]
            if not g.apart:
                place = {g.element(i, lane): i * lanes + lane for i in range(g.m) for lane in range(lanes)}
                orders = [[place[x + lane] for lane in range(lanes)] for x in pixels]
                values = [block.let(gathered(values, order, lanes)) for order in orders]
            for complete in (True, False):
                with block.when(x0 + g.covered <= width if complete else x0 + g.covered > width) as branch:
                    for x, value in zip(pixels, values, strict=True):
                        place = [at[0], o + t, *at[1:], x0 + x]
                        finish(branch, spec, dst, residual, place, value, lanes, lanes, within=not complete, **given)

    @contextmanager
    def meeting_taps(block, at):
        """Loops over the taps of the first axes that lie in the image for the outputs ``at``: the block, the taps."""
        with ExitStack() as loops:
            found = []
            for axis, y in enumerate(at):
                start, count = meeting(spec, axis, y)
                block, k = loops.enter_context(block.loop(count))
                found.append(block.let(start + k))
            yield block, found

    def source_rows(block, plane, first):
        """Code for each input row that a block of rows meets: ``(block, row of the panel, place in src)``."""
        with meeting_taps(block, plane) as (inner, found):
            if not outer:
                yield inner, 0, []
                return
            at = [
                inner.let(z * s + k * d - start)
                for z, s, k, d, (start, _) in zip(plane, spec.stride, found, spec.dilation, spec.padding, strict=False)
            ]
            with inner.loop(g.rows_in) as (each, row):
                y = each.let(first * spec.stride[-2] + row - spec.padding[-2][0])
                with each.when(tirx.all(y >= 0, y < spec.in_spatial[-2])) as inside:
                    yield inside, inside.let(flat(found, taps[:-1]) * g.rows_in + row), [*at, y]

    def product(block, panel, b, channels, plane, first_row, r, x):
        """The sums of ``channels`` of block b for a tile of vectors, by vector, channel and position."""
        vectors = range(picks.tile_px)
        sums = block.registers(list(itertools.product(vectors, range(channels), range(g.positions))), lanes)
        with meeting_taps(block, [*plane, first_row + r][: len(outer)]) as (inner, found):
            tap = inner.let(flat(found, taps))
            row = 0
            if outer:
                *found, k = found
                row = inner.let(flat(found, taps[:-1]) * g.rows_in + r * spec.stride[-2] + k * spec.dilation[-2])
            with inner.loop(spec.ic) as (step, c):
                for p in range(g.positions):
                    places = [[x * picks.tile_px + v, row, c, p, 0] for v in vectors]
                    values = [step.let(load(panel, "f32", place, lanes, lanes)) for place in places]
                    for t in range(channels):
                        weight = step.let(tirx.Broadcast(parameters["weights"][b, tap, c, p, t], lanes))
                        for v, value in enumerate(values):
                            sums.add(step, (v, t, p), value * weight)
        return sums

    planes = math.prod(g.planes)
    with whole.loop(spec.n * planes * blocks_y * blocks_x, parallel=True) as (task, index):
        rest, block_x = index // blocks_x, task.let(index % blocks_x)
        rest, block_y = rest // blocks_y, task.let(rest % blocks_y)
        n, plane = task.let(rest // planes), [task.let(z) for z in unflat(rest % planes, g.planes)]
        panel = task.buffer((width_block, math.prod(taps[:-1]) * g.rows_in, spec.ic, g.positions, lanes))
        first_vector, first_row = task.let(block_x * width_block), task.let(block_y * picks.block_rows)
        # In whole tiles: what lies past the row reads zeros and is not stored.
        tiles = task.let(tirx.min(picks.block_px, (g.vectors - first_vector + picks.tile_px - 1) // picks.tile_px))
        rows = task.let(tirx.min(picks.block_rows, g.height - first_row))
        for where, row, at in source_rows(task, plane, first_row):
            with where.loop(spec.ic) as (channel, c), channel.loop(tiles * picks.tile_px) as (one, v):
                x0 = one.let(g.first(first_vector + v))
                image = tirx.all(x0 >= begin, x0 - begin + g.reach <= width_in)
                for all_image, condition in ((True, image), (False, tirx.Not(image))):
                    with one.when(condition) as branch:
                        transform(branch, panel, [v, row, c], [n, c, *at], x0, all_image)
        with task.loop(ceildiv(spec.oc, picks.tile_oc)) as (outputs, b):
            whole_blocks, remaining = divmod(spec.oc, picks.tile_oc)
            for these, channels in outputs.cases(b, whole_blocks, picks.tile_oc, remaining):
                with these.loop(tiles) as (each, x), each.loop(rows) as (one, r):
                    sums = product(one, panel, b, channels, plane, first_row, r, x)
                    at = [n, *plane, *[one.let(first_row + r)][: len(outer)]]
                    for v in range(picks.tile_px):
                        x0 = one.let(g.first(first_vector + x * picks.tile_px + v))
                        transformed_back(one, sums, v, channels, one.let(b * picks.tile_oc), at, x0)
    return whole.statement()


def _lanes(spec, target):
    """Vector lengths that the dilation suits."""
    dilation = spec.dilation[-1]
    return [n for n in (4, 8, 16) if n <= target.lanes and (dilation >= n or n % dilation == 0)]
