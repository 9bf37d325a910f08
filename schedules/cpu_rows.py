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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tvm import tirx

from convgen.cpu.vector import Block, Columns, Taps, finish, load, runs, written, zeros
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, copied
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import PARAMETERS, ConvSpec

#: Multiply-adds written out, in all tiles together; more take long to compile.
MOST_UNROLLED = 4096
#: Bytes per second that one core moves of the layer's tensors: a round figure that only ranks schedules.
BYTES_PER_SECOND = 12e9


class CpuRows(Written):
    id, version = "cpu_rows", 2

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        require(spec.rank <= 2, "needs one or two spatial axes")
        require(spec.groups == spec.ic, "needs one input channel per group")
        require(max(spec.stride) <= 4, "needs strides of at most 4")
        require(math.prod(spec.kernel) <= 64, "needs at most 64 taps")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        rows, width = _output(spec)
        lanes = [n for n in (4, 8, 16) if n <= target.lanes and (n == 4 or n < 2 * width)]
        return Space(
            lanes=lanes,
            tile_oh=sorted({h for h in (1, 2, 3, 4, 5, 6, 7, 8, 14) if h <= rows}),
            tile_ow=[v for v in (1, 2, 3, 4) if v == 1 or lanes[-1] * (v - 1) < width],
            parallel_oh=[1, 2, 4, 8],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        rows, width = _output(spec)
        sums = picks.tile_oh * picks.tile_ow
        require(sums + 4 <= target.vector_registers, f"{sums} sums, {target.vector_registers} registers")
        require(picks.lanes * (picks.tile_ow - 1) < width, "tile_ow exceeds the row")
        require(picks.parallel_oh <= ceildiv(rows, picks.tile_oh), "fewer blocks of rows than parallel_oh")
        unrolled = _Geometry(spec, picks).written_tiles * sums * math.prod(spec.kernel)
        require(unrolled <= MOST_UNROLLED or sums == 1, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
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
        return min(options, key=lambda p: _work(spec, p), default=small)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        picks = self.default(spec, target)
        cycles = _work(spec, picks) * spec.n * spec.oc * max(picks.lanes, target.lanes // 2) / target.lanes
        traffic = sum(spec.bytes.values()) / (target.cores * BYTES_PER_SECOND)
        return float(cycles * 2 * target.lanes / target.peak_flops + traffic)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec)
        packed = [copied(p) for p in ops.parameters]
        return written(ops, packed, lambda *buffers: _Kernel(spec, picks, *buffers).statement())


def _work(spec: ConvSpec, picks: Picks) -> float:
    """Vector operations of one plane: loads and multiply-adds, and what a tile costs besides."""
    rows, width = _output(spec)
    tiles = ceildiv(rows, picks.tile_oh) * ceildiv(width, picks.lanes * picks.tile_ow)
    read = (picks.tile_oh - 1) * spec.stride[0] + spec.kernel[0] if spec.rank > 1 else 1
    groups = ceildiv(spec.window[-1], spec.stride[-1])
    loads = read * picks.tile_ow * (spec.kernel[-1] if spec.stride[-1] == 1 else 2 * groups * spec.stride[-1])
    products = picks.tile_oh * picks.tile_ow * math.prod(spec.kernel)
    latency = max(1.0, 6 / (picks.tile_oh * picks.tile_ow))
    # Every input row of a tile lies at another place in memory.
    return float(tiles * (loads + products * latency + 2 * read + 6))


class _BlockRows(NamedTuple):
    """A block of output rows, as the input rows that it meets.

    Attributes:
        outputs: how many output rows it has.
        inputs: each input row inside the image, counted from the block's first one (which may be padding), with
            its uses ``(output row, tap)``.
    """

    outputs: int
    inputs: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


class _Geometry:
    """Which part of the image each tile meets. A one-dimensional layer has one row.

    Attributes:
        rows: the blocks of output rows.
        columns: the tiles along a row.
        written_tiles: tiles that are written out as code.
    """

    def __init__(self, spec: ConvSpec, picks: Picks) -> None:
        missing = (1,) * (2 - spec.rank)
        self.kernel, self.stride = missing + spec.kernel, missing + spec.stride
        self.dilation, self.begin = (missing + spec.dilation)[0], spec.padding[0][0] if spec.rank == 2 else 0
        self.height = (missing + spec.in_spatial)[0]
        out_rows, _ = _output(spec)
        self.rows = [self._block(y, min(picks.tile_oh, out_rows - y)) for y in range(0, out_rows, picks.tile_oh)]
        self.columns = Columns(spec, picks.lanes, picks.tile_ow)
        self.written_tiles = len(runs(self.rows)) * len(self.columns.runs)

    def _block(self, y0: int, count: int) -> _BlockRows:
        """The block of ``count`` output rows from ``y0`` on."""
        uses: dict[int, list[tuple[int, int]]] = {}
        for r in range(count):
            for ky in range(self.kernel[0]):
                row = r * self.stride[0] + ky * self.dilation
                if 0 <= y0 * self.stride[0] + row - self.begin < self.height:
                    uses.setdefault(row, []).append((r, ky))
        return _BlockRows(count, tuple((row, tuple(uses[row])) for row in sorted(uses)))


class _Plane(NamedTuple):
    """What a task works on: an output plane, with its parameters in all lanes.

    Attributes:
        n, oc, ic: image, output channel and input channel.
        weights: by ``(ky, kx)``.
        start: what sums begin with, the bias; None where they begin with their first product.
        epilogue: what :func:`finish` takes, but a bias that is in ``start``.
    """

    n: Expr
    oc: Expr
    ic: Expr
    weights: dict[tuple[int, int], Expr]
    start: Expr | None
    epilogue: dict[str, Expr]


class _Kernel:
    """All of the layer: a loop over planes (and parts of their rows)."""

    def __init__(
        self, spec: ConvSpec, picks: Picks, src: Any, residual: Any, parameters: Mapping[str, Any], dst: Any
    ) -> None:
        self.spec, self.picks, self.lanes = spec, picks, picks.lanes
        self.geometry = _Geometry(spec, picks)
        self.src, self.residual, self.parameters, self.dst = src, residual, parameters, dst

    def statement(self) -> Any:
        spec, parts = self.spec, self.picks.parallel_oh
        blocks = self.geometry.rows
        whole = Block()
        with whole.loop(spec.n * spec.oc * parts, parallel=True) as (task, index):
            if parts == 1:
                self._add_rows(task, self._plane(task, index), runs(blocks))
            else:
                plane, part = self._plane(task, task.let(index // parts)), index % parts
                for number in range(parts):
                    start, end = (i * len(blocks) // parts for i in (number, number + 1))
                    shifted = [(first + start, count, rows) for first, count, rows in runs(blocks[start:end])]
                    with task.when(part == number) as branch:
                        self._add_rows(branch, plane, shifted)
        return whole.statement()

    def _plane(self, task: Block, index: Expr) -> _Plane:
        spec = self.spec
        n, oc = task.let(index // spec.oc), task.let(index % spec.oc)
        ic = task.let(oc // (spec.oc // spec.ic))

        def spread(name: str, *tap: int) -> Expr:
            return task.let(tirx.Broadcast(self.parameters[name][(oc, *tap)], self.lanes))

        kernel_rows, kernel_columns = self.geometry.kernel
        weights = {
            (ky, kx): spread("weights", 0, *(ky, kx)[2 - spec.rank :])
            for ky in range(kernel_rows)
            for kx in range(kernel_columns)
        }
        epilogue = {name: spread(name) for name in PARAMETERS[1:] if name in self.parameters}
        # The bias of i8 is an integer and the sums are f32: `finish` adds it.
        start = None if spec.dtype == "i8" else epilogue.pop("bias", None)
        return _Plane(n, oc, ic, weights, start, epilogue)

    def _add_rows(self, block: Block, plane: _Plane, row_runs: Sequence[tuple[int, int, _BlockRows]]) -> None:
        """Compute blocks of output rows, given as runs of equal ones."""
        columns = self.geometry.columns
        for first_block, block_count, rows in row_runs:
            with block.loop(block_count) as (strip, i):
                y0 = strip.let((i + first_block) * self.picks.tile_oh)
                for first, count, tile in columns.runs:
                    with strip.loop(count) as (body, j):
                        self._add_tile(body, plane, rows, y0, tile, body.let((j + first) * columns.step))

    def _add_tile(
        self, block: Block, plane: _Plane, rows: _BlockRows, y0: Expr, tile: dict[Any, Any], x0: Expr
    ) -> None:
        """Compute the rows from ``y0`` on of the vectors from ``x0`` on; ``tile`` is one of :class:`Columns`."""
        sums = self._sums(block, plane, rows, y0, tile, x0)
        nothing = zeros(self.lanes) if plane.start is None else plane.start
        for r in range(rows.outputs):
            for v in range(self.picks.tile_ow):
                count = tile["stored", v]
                if count > 0:
                    place = self._place(plane.n, plane.oc, y0 + r, x0 + v * self.lanes)
                    value = sums.get((r, v), nothing)
                    finish(block, self.spec, self.dst, self.residual, place, value, self.lanes, count, **plane.epilogue)

    def _sums(
        self, block: Block, plane: _Plane, rows: _BlockRows, y0: Expr, tile: dict[Any, Any], x0: Expr
    ) -> dict[tuple[int, int], Expr]:
        """The sums by ``(output row, vector)``; a sum whose window lies in padding is missing."""
        g = self.geometry
        stored = [v for v in range(self.picks.tile_ow) if tile["stored", v] > 0]
        sums: dict[tuple[int, int], Expr] = {}
        for row, uses in rows.inputs:
            y = y0 * g.stride[0] + row - g.begin

            def read(offset: int, count: int, shift: int, y: Expr = y) -> Expr:
                place = self._place(plane.n, plane.ic, y, x0 * g.stride[1] + offset)
                return load(self.src, self.spec.dtype, place, self.lanes, count, shift)

            inputs = Taps(block, g.columns, tile, read)
            for v in stored:
                for kx in range(g.kernel[1]):
                    value = inputs[v, kx]
                    if value is None:
                        continue
                    for r, ky in uses:
                        product = value * plane.weights[ky, kx]
                        before = sums.get((r, v), plane.start)
                        sums[r, v] = block.let(product if before is None else before + product)
        return sums

    def _place(self, n: Expr, channel: Expr, y: Expr, x: Expr) -> list[Expr]:
        return [n, channel, y, x] if self.spec.rank == 2 else [n, channel, x]


def _output(spec: ConvSpec) -> tuple[int, int]:
    """(rows, width) of the output."""
    return (spec.out_spatial[-2] if spec.rank > 1 else 1), spec.out_spatial[-1]
