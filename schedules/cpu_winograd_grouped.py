"""Winograd convolution of groups: small kernels, a group's channels in the vector lanes.

Applies to  NCHW grouped convolutions of rank 2 with more taps than the stride along each axis, without dilation,
            with whole vectors of input and of output channels per group.
Strategy    F(m×m, r×r), and its strided form by phases, as cpu_winograd.
            1. Pack weights transformed, as [group][row][oc/lanes][ic][column][lanes].
            2. A task is a group and a block of rows of tiles. Transpose its input with its padding into
               [row][col][channel]; transform it a tile at a time, all of it in registers.
            3. Keep `tile_px` tiles × the positions of one transformed row in registers; loop over the group's
               input channels, broadcast from memory.
            4. Transform those rows back before they are stored, then the columns; transpose; bias, residual,
               activation, store.
            5. One parallel loop over batch × groups × blocks of rows.
Accuracy    m = 2 with 2 or 3 taps is as accurate as plain summation (strict); m up to 4 stays within a third of the
            bound of `standard`, also with 5 taps; m = 6 needs `relaxed`.
Why not     tiles in the lanes: rows of tiles rarely fill a vector. Several groups in a vector: inputs are then
            shuffled as often as multiplied.
"""

from __future__ import annotations

import math

from tvm import te, tirx

from convgen.cpu.vector import Block, finish, interleave, load, store, weighted_sum, written, zeros
from convgen.lowering.compute import Operands, ceildiv, copied, row_times
from convgen.lowering.schedule import Space, Written, require
from convgen.lowering.winograd import admitted, strided

#: Products per output, against the taps, that a transform must save to be worth its passes.
MOST_PRODUCTS = 0.75
#: Products along an axis of a tile: all are written out.
MOST_POSITIONS = 9
#: Channels per group: with more the transformed weights outgrow the caches.
MOST_CHANNELS = 256


class CpuWinogradGrouped(Written):
    id, version = "cpu_winograd_grouped", 1
    transforms = True

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nchw" and spec.rank == 2, "needs NCHW of rank 2")
        require(spec.groups > 1, "needs groups")
        require(spec.dilation == (1, 1), "needs dilation 1")
        few = all(k > s for k, s in zip(spec.kernel, spec.stride, strict=True))
        require(few, "needs more taps than the stride along each axis")
        require(bool(_sizes(spec)), f"no transform saves enough products at accuracy {spec.accuracy}")
        require(min(spec.out_spatial) > 2, "needs more than 2 output pixels along each axis")
        # Where a window lies in nothing but padding the exact result admits no error; a transform has one.
        covered = all(2 * max(p) <= k + 1 for p, k in zip(spec.padding, spec.kernel, strict=True))
        require(covered, "needs windows with half of their taps, or one less, inside the input")
        require(max(_channels(spec)) <= MOST_CHANNELS, f"needs at most {MOST_CHANNELS} channels per group")
        require(bool(_lanes(spec, target)), "needs whole vectors of channels per group")

    def space(self, spec, target):
        return Space(
            lanes=_lanes(spec, target),
            tile=_sizes(spec),
            tile_px=[1, 2, 3, 4, 5, 6, 7],
            block_rows=[b for b in (1, 2, 3, 4, 5, 7, 8, 14) if b == 1 or b <= ceildiv(spec.out_spatial[0], 2)],
        )

    def valid(self, spec, target, picks):
        used = picks.tile_px * _tile(spec, picks.tile)[1] + 1 + (target.vector_bits != 512)
        require(used <= target.vector_registers, f"{used} vectors in a tile, {target.vector_registers} registers")
        rows, columns = _tiles(spec, picks)
        require(picks.block_rows <= rows, "block_rows exceeds the rows of tiles")
        require(picks.tile_px <= picks.block_rows * columns, "fewer tiles in a block than tile_px")

    def default(self, spec, target):
        options = [p for p in self.space(spec, target) if self.reason_against(spec, target, p) is None]
        return min(options, key=lambda p: self._cycles(spec, target, p))

    def _cycles(self, spec, target, picks):
        """Cycles of all, spread evenly over the cores; the factors were measured."""
        (rows, columns), (depth, outputs), (high, wide) = _tiles(spec, picks), _channels(spec), _tile(spec, picks.tile)
        blocks, tiles = ceildiv(rows, picks.block_rows), picks.block_rows * columns
        share = max(picks.lanes, target.lanes // 2) / target.lanes  # of a cycle: narrow vectors go in pairs
        # Inputs are broadcast from memory, weights loaded for all tiles: narrow vectors wait for them.
        loads = 1 if picks.lanes == target.lanes else 1.25
        products = outputs * depth * high * wide * (loads * tiles + 0.5 * ceildiv(tiles, picks.tile_px))
        # Larger tiles do not stay in registers; of a stride's phases some have a single tap.
        each = 6 if high * wide > 36 else 4 if spec.stride == (1, 1) else 2
        transforms = each * (depth + outputs) * high * wide * tiles
        copied = depth * 5.3 * math.prod(_read(spec, picks))
        task = share / picks.lanes * (products + transforms + copied)
        tasks = spec.n * spec.groups * blocks
        # What a task keeps should leave the L1 cache room.
        kept = 4 * tiles * high * (depth * wide + outputs * picks.tile)
        return task * ceildiv(tasks, target.cores) * target.cores * (1 if kept <= target.l1 else 1.05)

    def cost(self, spec, target):
        cycles = self._cycles(spec, target, self.default(spec, target))
        return cycles * 2 * target.lanes / target.peak_flops

    def program(self, spec, target, picks):
        ops, lanes, (depth, outputs), (high, wide) = (
            Operands(spec),
            picks.lanes,
            _channels(spec),
            _tile(spec, picks.tile),
        )

        down, along = (strided(picks.tile, *axis)[1] for axis in zip(spec.kernel, spec.stride, strict=True))
        halfway = te.compute(
            (spec.oc, depth, high, spec.kernel[1]),
            lambda o, c, i, x: row_times(down, i, lambda y: ops.weights[o, c, y, x]),
            name="columns",
        )
        transformed = te.compute(
            (spec.oc, depth, high, wide),
            lambda o, c, i, j: row_times(along, j, lambda x: halfway[o, c, i, x]),
            name="rows",
        )
        packed = [
            te.compute(
                (spec.groups, high, outputs // lanes, depth, wide, lanes),
                lambda g, i, v, c, j, t: transformed[g * outputs + v * lanes + t, c, i, j],
                name="weights_packed",
            )
        ]
        packed += [copied(p) for p in ops.parameters[1:]]
        return written(ops, packed, lambda *buffers: _kernel(spec, picks, *buffers))


def _kernel(spec, picks, src, residual, parameters, dst):
    """All of the layer: a loop over images, blocks of channels and of rows."""
    lanes, m, (high, wide) = picks.lanes, picks.tile, _tile(spec, picks.tile)
    (back_y, _, forward_y), (back_x, _, forward_x) = (
        strided(m, *axis) for axis in zip(spec.kernel, spec.stride, strict=True)
    )
    (rows, columns), (depth, outputs) = _tiles(spec, picks), _channels(spec)
    blocks = ceildiv(rows, picks.block_rows)
    (height, width), (out_height, out_width) = spec.in_spatial, spec.out_spatial
    (above, _), (left, _) = spec.padding
    stride_y, stride_x = spec.stride
    tiles, read = picks.block_rows * columns, _read(spec, picks)
    whole = Block()

    def gathered(block, image, n, first, y0):
        """The input from row y0 on, with its padding, channels in the lanes."""
        with block.loop(depth // lanes) as (part, v), part.loop(read[0]) as (row, r):
            y = row.let(y0 + r)
            inside = tirx.all(y >= 0, y < height)
            with row.when(inside) as found:
                for x in [*range(left), *range(left + width, read[1])]:
                    found.add(store(image, "f32", [v, r, x, 0], zeros(lanes), lanes, lanes))
                for x in range(0, min(width, read[1] - left), lanes):
                    pixels = [
                        found.let(load(src, spec.dtype, [n, first + v * lanes + c, y, x], lanes, width - x))
                        for c in range(lanes)
                    ]
                    for i, value in enumerate(interleave(found, pixels, lanes)[: min(width, read[1] - left) - x]):
                        found.add(store(image, "f32", [v, r, x + left + i, 0], value, lanes, lanes))
            with row.when(tirx.Not(inside)) as missing, missing.loop(read[1]) as (pixel, x):
                pixel.add(store(image, "f32", [v, r, x, 0], zeros(lanes), lanes, lanes))

    def transformed(block, image, inputs):
        """A tile at a time; of its rows two opposite points at once, so that all of them stay in registers."""
        with block.loop(depth // lanes) as (part, v), part.loop(tiles) as (at, tile):
            y0, x0 = at.let(tile // columns * (m * stride_y)), at.let(tile % columns * (m * stride_x))
            for pair in _pairs(forward_y):
                found = {i: [] for i in pair}
                for x in range(wide):
                    column = {
                        y: at.let(load(image, "f32", [v, y0 + y, x0 + x, 0], lanes, lanes))
                        for y in range(high)
                        if any(forward_y[i][y] for i in pair)
                    }
                    for i, value in zip(pair, _forward(at, [forward_y[i] for i in pair], column), strict=True):
                        found[i].append(value)
                for i in pair:
                    row_of = dict(enumerate(found[i]))
                    for those in _pairs(forward_x):
                        values = _forward(at, [forward_x[j] for j in those], row_of)
                        for j, value in zip(those, values, strict=True):
                            place = [i, tile, j, v * lanes]
                            at.add(store(inputs, "f32", place, value, lanes, lanes))

    def products(block, inputs, group, sums):
        """Every transformed row times the weights, and back along the row."""

        def some(inside, i, v, tile, count):
            acc = inside.registers([(t, j) for t in range(count) for j in range(wide)], lanes)
            with inside.loop(depth) as (step, c):
                for j in range(wide):
                    weight = step.let(load(parameters["weights"], "f32", [group, i, v, c, j, 0], lanes, lanes))
                    for t in range(count):
                        value = tirx.Broadcast(tirx.BufferLoad(inputs, [i, tile + t, j, c]), lanes)
                        acc.add(step, (t, j), value * weight)
            for t in range(count):
                for q, value in enumerate(_back(inside, back_x, [acc[t, j] for j in range(wide)])):
                    inside.add(store(sums, "f32", [v, tile + t, i, q, 0], value, lanes, lanes))

        with block.loop(high) as (row, i), row.loop(outputs // lanes) as (part, v):
            full, rest = divmod(tiles, picks.tile_px)
            with part.loop(full) as (inside, k):
                some(inside, i, v, inside.let(k * picks.tile_px), picks.tile_px)
            if rest:
                some(part, i, v, full * picks.tile_px, rest)

    def finished(block, sums, lines, n, first, top):
        """Back along the columns; transposed, and the epilogue."""
        with block.loop(outputs // lanes) as (part, v), part.loop(picks.block_rows) as (row, ty):
            with row.loop(columns) as (at, tx):
                for q in range(m):
                    column = [
                        at.let(load(sums, "f32", [v, ty * columns + tx, i, q, 0], lanes, lanes)) for i in range(high)
                    ]
                    for p, value in enumerate(_back(at, back_y, column)):
                        at.add(store(lines, "f32", [p, tx * m + q, 0], value, lanes, lanes))
            with row.loop(m) as (line, p):
                y = line.let((top + ty) * m + p)
                with line.when(y < out_height) as inside:
                    for x in range(0, out_width, lanes):
                        count = min(lanes, out_width - x)
                        pixels = [
                            inside.let(load(lines, "f32", [p, x + i, 0], lanes, lanes if i < count else 0))
                            for i in range(lanes)
                        ]
                        for c, value in enumerate(interleave(inside, pixels, lanes)):
                            o = first + v * lanes + c
                            given = {k: tirx.Broadcast(a[o], lanes) for k, a in parameters.items() if k != "weights"}
                            place = [n, o, y, x]
                            finish(inside, spec, dst, residual, place, value, lanes, count, **given)

    with whole.loop(spec.n * spec.groups * blocks, parallel=True) as (task, index):
        rest, top = index // blocks, task.let(index % blocks * picks.block_rows)
        n, group = task.let(rest // spec.groups), task.let(rest % spec.groups)
        image = task.buffer((depth // lanes, *read, lanes))
        inputs = task.buffer((high, tiles, wide, depth))
        sums = task.buffer((outputs // lanes, tiles, high, m, lanes))
        lines = task.buffer((m, ceildiv(columns * m, lanes) * lanes, lanes))
        gathered(task, image, n, task.let(group * depth), top * (m * stride_y) - above)
        transformed(task, image, inputs)
        products(task, inputs, group, sums)
        finished(task, sums, lines, n, task.let(group * outputs), top)
    return whole.statement()


def _pairs(rows):
    """Indices of the input's transform, by twos: opposite points share what they compute."""
    found, index = [], 0
    while index < len(rows):
        pair = index + 1 < len(rows) and list(map(abs, rows[index])) == list(map(abs, rows[index + 1]))
        found.append((index, index + 1) if pair else (index,))
        index += len(found[-1])
    return found


def _sum(block, terms):
    """Of ``(coefficient, value)``; what is subtracted comes last, so that nothing is negated."""
    return block.let(weighted_sum(sorted(terms, key=lambda term: term[0] < 0)))


def _forward(block, rows, values):
    """One row, or two of opposite points, times the values by index."""
    if len(rows) == 1:
        return [_sum(block, [(c, values[k]) for k, c in enumerate(rows[0]) if c])]
    one, other = rows
    same = [(c, values[k]) for k, (c, d) in enumerate(zip(one, other, strict=True)) if c and c == d]
    opposite = [(c, values[k]) for k, (c, d) in enumerate(zip(one, other, strict=True)) if c and c == -d]
    scale = abs(opposite[0][0])
    even, odd = _sum(block, same), _sum(block, [(c / scale, value) for c, value in opposite])
    return [_sum(block, [(1, even), (sign * scale, odd)]) for sign in (1, -1)]


def _back(block, rows, values):
    """The rows times the values; columns of opposite points are added and subtracted first."""
    terms = [[] for _ in rows]
    for pair in _pairs(list(zip(*rows, strict=True))):
        chosen = [values[k] for k in pair]
        if len(pair) == 2:
            total, difference = (_sum(block, [(1, chosen[0]), (sign, chosen[1])]) for sign in (1, -1))
        for row, found in zip(rows, terms, strict=True):
            c = row[pair[0]]
            if c and len(pair) == 2:
                found.append((c, total if c == row[pair[1]] else difference))
            elif c:
                found.append((c, chosen[0]))
    return [_sum(block, found) for found in terms]


def _lanes(spec, target):
    """Lengths of vectors that fill a group's inputs and outputs."""
    sizes = [n for n in (4, 8, 16) if target.lanes <= 2 * n <= 2 * target.lanes]
    return [n for n in sizes if all(channels % n == 0 for channels in _channels(spec))]


def _sizes(spec):
    """Output pixels per tile and axis that the accuracy class admits and that save enough products."""
    taps = max(ceildiv(k, s) for k, s in zip(spec.kernel, spec.stride, strict=True))
    found = []
    for m in admitted(spec.accuracy, taps):
        points = _tile(spec, m)
        if math.prod(points) <= MOST_PRODUCTS * m**2 * math.prod(spec.kernel) and max(points) <= MOST_POSITIONS:
            found.append(m)
    return found


def _tile(spec, m):
    """(rows, columns) of a tile: of inputs, and of products as many."""
    return tuple(s * (m - 1) + k for k, s in zip(spec.kernel, spec.stride, strict=True))


def _channels(spec):
    """(inputs, outputs) of a group."""
    return spec.ic // spec.groups, spec.oc // spec.groups


def _tiles(spec, picks):
    """(rows, columns) of tiles."""
    return tuple(ceildiv(size, picks.tile) for size in spec.out_spatial)


def _read(spec, picks):
    """(rows, columns) of the input that a block of tiles reads."""
    high, wide = _tile(spec, picks.tile)
    step_y, step_x = (picks.tile * s for s in spec.stride)
    return (picks.block_rows - 1) * step_y + high, (_tiles(spec, picks)[1] - 1) * step_x + wide
