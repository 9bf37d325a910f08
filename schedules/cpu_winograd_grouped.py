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
Accuracy    as cpu_winograd's; m up to 4 stays within a third of the bound of `standard`, also with 5 taps.
Why not     tiles in the lanes: rows of tiles rarely fill a vector. Several groups in a vector: inputs are then
            shuffled as often as multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from tvm import te, tirx

from convgen.cpu.vector import Block, finish, interleave, load, store, weighted_sum, written, zeros
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, copied, row_times
from convgen.lowering.schedule import Array, Magnitudes, Picks, Program, Space, Written, require
from convgen.lowering.winograd import Matrix, admitted, magnitudes, strided
from convgen.problem.spec import ConvSpec

#: Products per output, against the taps, that a transform must save to be worth its passes.
MOST_PRODUCTS = 0.75
#: Products along an axis of a tile: code is written out for all of them.
MOST_POSITIONS = 9
#: Channels per group: with more the transformed weights outgrow the caches.
MOST_CHANNELS = 256


class CpuWinogradGrouped(Written):
    id, version = "cpu_winograd_grouped", 1
    transforms = True

    def applies(self, spec: ConvSpec, target: Target) -> None:
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

    def space(self, spec: ConvSpec, target: Target) -> Space:
        return Space(
            lanes=_lanes(spec, target),
            tile=_sizes(spec),
            tile_px=[1, 2, 3, 4, 5, 6, 7],
            block_rows=[b for b in (1, 2, 3, 4, 5, 7, 8, 14) if b == 1 or b <= ceildiv(spec.out_spatial[0], 2)],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        used = picks.tile_px * _tile(spec, picks.tile)[1] + 1 + (target.vector_bits != 512)
        require(used <= target.vector_registers, f"{used} vectors in a tile, {target.vector_registers} registers")
        rows, columns = _tiles(spec, picks)
        require(picks.block_rows <= rows, "block_rows exceeds the rows of tiles")
        require(picks.tile_px <= picks.block_rows * columns, "fewer tiles in a block than tile_px")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        options = [p for p in self.space(spec, target) if self.reason_against(spec, target, p) is None]
        return min(options, key=lambda p: _cycles(spec, target, p))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        cycles = _cycles(spec, target, self.default(spec, target))
        return float(cycles * 2 * target.lanes / target.peak_flops)

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        return magnitudes(spec, src, weights, dict.fromkeys(range(spec.rank), picks.tile))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec)
        packed = [_packed_weights(ops, picks), *(copied(p) for p in ops.parameters[1:])]
        return written(ops, packed, lambda *buffers: _Kernel(spec, picks, *buffers).statement())


def _cycles(spec: ConvSpec, target: Target, picks: Picks) -> float:
    """Cycles of the whole layer, over the cores in even shares; the factors were measured."""
    (rows, columns), (depth, outputs), (high, wide) = _tiles(spec, picks), _channels(spec), _tile(spec, picks.tile)
    blocks, tiles = ceildiv(rows, picks.block_rows), picks.block_rows * columns
    # Cycles of a vector operation: two narrow ones begin where one of whole length does.
    share = max(picks.lanes, target.lanes // 2) / target.lanes
    # Inputs are broadcast from memory, weights loaded for all tiles: narrow vectors wait for them.
    loads = 1 if picks.lanes == target.lanes else 1.25
    products = outputs * depth * high * wide * (loads * tiles + 0.5 * ceildiv(tiles, picks.tile_px))
    # Larger tiles do not stay in registers; of a stride's phases some have a single tap.
    per_value = 6 if high * wide > 36 else 4 if spec.stride == (1, 1) else 2
    transforms = per_value * (depth + outputs) * high * wide * tiles
    copied_pixels = depth * 5.3 * math.prod(_read(spec, picks))
    task = share / picks.lanes * (products + transforms + copied_pixels)
    tasks = spec.n * spec.groups * blocks
    # What a task keeps should leave the L1 cache room.
    kept = 4 * tiles * high * (depth * wide + outputs * picks.tile)
    return float(task * ceildiv(tasks, target.cores) * target.cores * (1 if kept <= target.l1 else 1.05))


def _packed_weights(ops: Operands, picks: Picks) -> te.Tensor:
    """Transformed weights ``[group][row][oc/lanes][ic][column][lanes]``."""
    spec, lanes, (depth, outputs), (high, wide) = (
        ops.spec,
        picks.lanes,
        _channels(ops.spec),
        _tile(ops.spec, picks.tile),
    )
    down, along = (strided(picks.tile, *axis)[1] for axis in zip(spec.kernel, spec.stride, strict=True))
    columns = te.compute(
        (spec.oc, depth, high, spec.kernel[1]),
        lambda o, c, i, x: row_times(down, i, lambda y: ops.weights[o, c, y, x]),
        name="columns",
    )
    transformed = te.compute(
        (spec.oc, depth, high, wide),
        lambda o, c, i, j: row_times(along, j, lambda x: columns[o, c, i, x]),
        name="rows",
    )
    return te.compute(
        (spec.groups, high, outputs // lanes, depth, wide, lanes),
        lambda g, i, v, c, j, t: transformed[g * outputs + v * lanes + t, c, i, j],
        name="weights_packed",
    )


class _Task(NamedTuple):
    """What a task works on: an image's group and a block of rows of tiles, with its scratch memory.

    Attributes:
        n, group: the image and the group.
        top: the first row of tiles.
        image: the group's input with its padding, ``[ic/lanes][row][column][lanes]``.
        inputs: the transformed input, ``[position down][tile][position along][ic]``.
        sums: sums of products, transformed back along the rows, ``[oc/lanes][tile][position down][column][lanes]``.
        lines: the output of a row of tiles, ``[row][column][lanes]``.
    """

    n: Expr
    group: Expr
    top: Expr
    image: Any
    inputs: Any
    sums: Any
    lines: Any


class _Kernel:
    """All of the layer: a loop over images, groups and blocks of rows of tiles."""

    def __init__(
        self, spec: ConvSpec, picks: Picks, src: Any, residual: Any, parameters: Mapping[str, Any], dst: Any
    ) -> None:
        self.spec, self.picks, self.lanes, self.m = spec, picks, picks.lanes, picks.tile
        self.src, self.residual, self.parameters, self.dst = src, residual, parameters, dst
        (self.back_y, _, self.forward_y), (self.back_x, _, self.forward_x) = (
            strided(self.m, *axis) for axis in zip(spec.kernel, spec.stride, strict=True)
        )
        self.high, self.wide = _tile(spec, self.m)
        self.depth, self.outputs = _channels(spec)
        self.rows, self.columns = _tiles(spec, picks)
        self.tiles = picks.block_rows * self.columns
        self.read = _read(spec, picks)

    def statement(self) -> Any:
        spec, lanes, m, block_rows = self.spec, self.lanes, self.m, self.picks.block_rows
        blocks = ceildiv(self.rows, block_rows)
        whole = Block()
        with whole.loop(spec.n * spec.groups * blocks, parallel=True) as (body, index):
            rest, top = index // blocks, body.let(index % blocks * block_rows)
            n, group = body.let(rest // spec.groups), body.let(rest % spec.groups)
            task = _Task(
                n,
                group,
                top,
                image=body.buffer((self.depth // lanes, *self.read, lanes)),
                inputs=body.buffer((self.high, self.tiles, self.wide, self.depth)),
                sums=body.buffer((self.outputs // lanes, self.tiles, self.high, m, lanes)),
                lines=body.buffer((m, ceildiv(self.columns * m, lanes) * lanes, lanes)),
            )
            self._gather(body, task)
            self._transform(body, task)
            self._multiply(body, task)
            self._transform_back(body, task)
        return whole.statement()

    def _gather(self, body: Block, task: _Task) -> None:
        """Transpose the input that a block of rows reads, with its padding: channels in the lanes."""
        lanes, (rows, columns) = self.lanes, self.read
        (above, _), _ = self.spec.padding
        first_ic = body.let(task.group * self.depth)
        first_y = task.top * (self.m * self.spec.stride[0]) - above
        with body.loop(self.depth // lanes) as (part, v), part.loop(rows) as (row, r):
            y = row.let(first_y + r)
            inside = tirx.all(y >= 0, y < self.spec.in_spatial[0])
            with row.when(inside) as branch:
                self._gather_row(branch, task, [v, r], first_ic + v * lanes, y)
            with row.when(tirx.Not(inside)) as branch, branch.loop(columns) as (pixel, x):
                pixel.add(store(task.image, "f32", [v, r, x, 0], zeros(lanes), lanes, lanes))

    def _gather_row(self, block: Block, task: _Task, place: Sequence[Expr], ic: Expr, y: Expr) -> None:
        """One row of ``lanes`` channels from ``ic`` on, which the image has, to a place of ``task.image``."""
        lanes, width = self.lanes, self.spec.in_spatial[1]
        _, (left, _) = self.spec.padding
        for x in [*range(left), *range(left + width, self.read[1])]:
            block.add(store(task.image, "f32", [*place, x, 0], zeros(lanes), lanes, lanes))
        read = min(width, self.read[1] - left)
        for x in range(0, read, lanes):
            pixels = [
                block.let(load(self.src, self.spec.dtype, [task.n, ic + c, y, x], lanes, width - x))
                for c in range(lanes)
            ]
            for i, value in enumerate(interleave(block, pixels, lanes)[: read - x]):
                block.add(store(task.image, "f32", [*place, x + left + i, 0], value, lanes, lanes))

    def _transform(self, body: Block, task: _Task) -> None:
        """The input's transform, a tile at a time.

        Of the rows two opposite points at once: more than that would not stay in registers.
        """
        lanes, stride = self.lanes, self.spec.stride
        with body.loop(self.depth // lanes) as (part, v), part.loop(self.tiles) as (block, tile):
            y0 = block.let(tile // self.columns * (self.m * stride[0]))
            x0 = block.let(tile % self.columns * (self.m * stride[1]))
            for pair in _pairs(self.forward_y):
                rows = self._transform_down(block, task, pair, v, y0, x0)
                for i in pair:
                    for pair_x in _pairs(self.forward_x):
                        values = _forward(block, [self.forward_x[j] for j in pair_x], rows[i])
                        for j, value in zip(pair_x, values, strict=True):
                            block.add(store(task.inputs, "f32", [i, tile, j, v * lanes], value, lanes, lanes))

    def _transform_down(
        self, block: Block, task: _Task, points: Sequence[int], v: Expr, y0: Expr, x0: Expr
    ) -> dict[int, list[Expr]]:
        """For each of the points the transformed row of the tile at ``(y0, x0)``, by column."""
        factors = [self.forward_y[i] for i in points]
        rows: dict[int, list[Expr]] = {i: [] for i in points}
        for x in range(self.wide):
            column = {
                y: block.let(load(task.image, "f32", [v, y0 + y, x0 + x, 0], self.lanes, self.lanes))
                for y in range(self.high)
                if any(row[y] for row in factors)
            }
            for i, value in zip(points, _forward(block, factors, column), strict=True):
                rows[i].append(value)
        return rows

    def _multiply(self, body: Block, task: _Task) -> None:
        """Every transformed row times the weights, and back along the row."""
        tile_px = self.picks.tile_px
        full, rest = divmod(self.tiles, tile_px)
        with body.loop(self.high) as (row, i), row.loop(self.outputs // self.lanes) as (part, v):
            with part.loop(full) as (inner, number):
                self._multiply_tiles(inner, task, i, v, inner.let(number * tile_px), tile_px)
            if rest:
                self._multiply_tiles(part, task, i, v, full * tile_px, rest)

    def _multiply_tiles(self, block: Block, task: _Task, i: Expr, v: Expr, tile: Expr, count: int) -> None:
        """Row ``i`` of ``count`` tiles, for the v-th vector of output channels."""
        lanes, wide = self.lanes, range(self.wide)
        sums = block.registers([(t, j) for t in range(count) for j in wide], lanes)
        with block.loop(self.depth) as (step, c):
            for j in wide:
                weight = step.let(load(self.parameters["weights"], "f32", [task.group, i, v, c, j, 0], lanes, lanes))
                for t in range(count):
                    value = tirx.Broadcast(tirx.BufferLoad(task.inputs, [i, tile + t, j, c]), lanes)
                    sums.add(step, (t, j), value * weight)
        for t in range(count):
            for q, value in enumerate(_back(block, self.back_x, [sums[t, j] for j in wide])):
                block.add(store(task.sums, "f32", [v, tile + t, i, q, 0], value, lanes, lanes))

    def _transform_back(self, body: Block, task: _Task) -> None:
        """Back along the columns; a row of tiles at a time its lines, which are finished at once."""
        lanes, m = self.lanes, self.m
        first_oc = body.let(task.group * self.outputs)
        with body.loop(self.outputs // lanes) as (part, v), part.loop(self.picks.block_rows) as (row, ty):
            with row.loop(self.columns) as (block, tx):
                for q in range(m):
                    places = [[v, ty * self.columns + tx, i, q, 0] for i in range(self.high)]
                    column = [block.let(load(task.sums, "f32", place, lanes, lanes)) for place in places]
                    for p, value in enumerate(_back(block, self.back_y, column)):
                        block.add(store(task.lines, "f32", [p, tx * m + q, 0], value, lanes, lanes))
            with row.loop(m) as (line, p):
                y = line.let((task.top + ty) * m + p)
                with line.when(y < self.spec.out_spatial[0]) as branch:
                    self._finish_line(branch, task, p, first_oc + v * lanes, y)

    def _finish_line(self, block: Block, task: _Task, p: Expr, oc: Expr, y: Expr) -> None:
        """Transpose line ``p``: pixels in the lanes; epilogue and store."""
        lanes, width = self.lanes, self.spec.out_spatial[1]
        channels = {name: vector for name, vector in self.parameters.items() if name != "weights"}
        for x in range(0, width, lanes):
            count = min(lanes, width - x)
            pixels = [
                block.let(load(task.lines, "f32", [p, x + i, 0], lanes, lanes if i < count else 0))
                for i in range(lanes)
            ]
            for c, value in enumerate(interleave(block, pixels, lanes)):
                given = {name: tirx.Broadcast(vector[oc + c], lanes) for name, vector in channels.items()}
                place = [task.n, oc + c, y, x]
                finish(block, self.spec, self.dst, self.residual, place, value, lanes, count, **given)


def _pairs(rows: Sequence[Sequence[Fraction]]) -> list[tuple[int, ...]]:
    """Indices of the input's transform, by twos where they are opposite points, which share what they compute."""
    pairs: list[tuple[int, ...]] = []
    index = 0
    while index < len(rows):
        is_pair = index + 1 < len(rows) and list(map(abs, rows[index])) == list(map(abs, rows[index + 1]))
        pairs.append((index, index + 1) if is_pair else (index,))
        index += len(pairs[-1])
    return pairs


def _sum(block: Block, terms: Iterable[tuple[Any, Expr]]) -> Expr:
    """A variable with the sum of ``(coefficient, value)``, subtracted ones last, so that nothing is negated."""
    return block.let(weighted_sum(sorted(terms, key=lambda term: term[0] < 0)))


def _forward(block: Block, rows: Matrix, values: Mapping[int, Expr] | Sequence[Expr]) -> list[Expr]:
    """One row, or two of opposite points, times the values by index."""
    if len(rows) == 1:
        return [_sum(block, [(c, values[k]) for k, c in enumerate(rows[0]) if c])]
    first, second = rows
    columns = list(enumerate(zip(first, second, strict=True)))
    same = [(c, values[k]) for k, (c, d) in columns if c and c == d]
    opposite = [(c, values[k]) for k, (c, d) in columns if c and c == -d]
    scale = abs(opposite[0][0])
    even, odd = _sum(block, same), _sum(block, [(c / scale, value) for c, value in opposite])
    return [_sum(block, [(1, even), (sign * scale, odd)]) for sign in (1, -1)]


def _back(block: Block, rows: Matrix, values: Sequence[Expr]) -> list[Expr]:
    """The rows times the values; columns of opposite points are added and subtracted first."""
    terms: list[list[tuple[Fraction, Expr]]] = [[] for _ in rows]
    for pair in _pairs(list(zip(*rows, strict=True))):
        total = difference = values[pair[0]]
        if len(pair) == 2:
            total, difference = (_sum(block, [(1, values[pair[0]]), (sign, values[pair[1]])]) for sign in (1, -1))
        for row, row_terms in zip(rows, terms, strict=True):
            c = row[pair[0]]
            if c:
                row_terms.append((c, total if c == row[pair[-1]] else difference))
    return [_sum(block, row_terms) for row_terms in terms]


def _lanes(spec: ConvSpec, target: Target) -> list[int]:
    """Lengths of vectors that fill a group's inputs and outputs."""
    sizes = [n for n in (4, 8, 16) if target.lanes <= 2 * n <= 2 * target.lanes]
    return [n for n in sizes if all(channels % n == 0 for channels in _channels(spec))]


def _sizes(spec: ConvSpec) -> list[int]:
    """Output pixels per tile and axis that the accuracy class admits and that save enough products."""
    taps = max(ceildiv(k, s) for k, s in zip(spec.kernel, spec.stride, strict=True))
    sizes = []
    for m in admitted(spec.accuracy, taps):
        positions = _tile(spec, m)
        saves = math.prod(positions) <= MOST_PRODUCTS * m**2 * math.prod(spec.kernel)
        if saves and max(positions) <= MOST_POSITIONS:
            sizes.append(m)
    return sizes


def _tile(spec: ConvSpec, m: int) -> tuple[int, int]:
    """(rows, columns) of a tile's inputs; it has as many products."""
    high, wide = (s * (m - 1) + k for k, s in zip(spec.kernel, spec.stride, strict=True))
    return high, wide


def _channels(spec: ConvSpec) -> tuple[int, int]:
    """(inputs, outputs) of a group."""
    return spec.ic // spec.groups, spec.oc // spec.groups


def _tiles(spec: ConvSpec, picks: Picks) -> tuple[int, int]:
    """(rows, columns) of tiles."""
    rows, columns = (ceildiv(size, picks.tile) for size in spec.out_spatial)
    return rows, columns


def _read(spec: ConvSpec, picks: Picks) -> tuple[int, int]:
    """(rows, columns) of the input that a block of tiles reads."""
    high, wide = _tile(spec, picks.tile)
    step_y, step_x = (picks.tile * s for s in spec.stride)
    return (picks.block_rows - 1) * step_y + high, (_tiles(spec, picks)[1] - 1) * step_x + wide
