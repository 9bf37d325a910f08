"""Transposed convolution by stride phases: no multiplication by an inserted zero, no scatter.

Applies to  transposed convolutions of any rank with groups 1, dilated only where the stride is 1.
Strategy    1. Output pixels whose distance to the first one is the same modulo the stride form a
               phase. Each phase is an ordinary convolution at stride 1 with every stride-th tap:
               output s·q + r takes tap (r + pad) mod s + s·t of input pixel q + (r + pad) div s - t.
            2. Pack weights as [phase…][tap][oc/t][ic][t].
            3. Copy the input with zeros around it; a task is a block of rows of tiles.
            4. Per phase keep a tile of `tile_px` pixels × `tile_oc` channels in registers; channels
               in the lanes, broadcast src scalars, ic innermost.
            5. Store the phases interleaved, with bias, residual and activation.
Why not     GEMM and col2im: it writes each product, and adds them up again in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

from convgen.hardware.target import Target
from convgen.lowering.compute import (
    ACCUMULATOR,
    Expr,
    Index,
    Operands,
    ceildiv,
    copied,
    dst_loops,
    epilogue,
    finished,
    flat,
    round_up,
    unflat,
    vectorize_finished,
)
from convgen.lowering.schedule import Picks, Program, Scheduled, Space, require
from convgen.problem.spec import ConvSpec

#: Unrolled multiply-adds of one input channel; more take long to compile.
MOST_UNROLLED = 1024
#: Bytes per second that one core writes of dst, phases interleaved: a round figure that only ranks schedules.
WRITTEN_PER_SECOND = 8e9


class CpuTransposed(Scheduled):
    id, version = "cpu_transposed", 3

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        require(spec.groups == 1, "needs groups 1")
        require(all(s == 1 or d == 1 for s, d in zip(spec.stride, spec.dilation, strict=True)), "dilated and strided")
        g = _Geometry(spec)
        require(g.whole or g.phases <= 64, "needs at most 64 phases where the stride does not divide the kernel")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes = target.lanes
        pixels = _Geometry(spec).pixels
        tiles = {p for p in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 20, 24, 28) if p < pixels[-1]}
        return Space(
            tile_oc=[lanes * v for v in (1, 2, 3, 4) if v == 1 or lanes * (v - 1) < spec.oc],
            tile_px=sorted(tiles | {min(pixels[-1], 28)}),
            block=[1, 2, 4, 8, 16, 32],
            order=["oc", "pixels"],
            parallel_oc=[1, 2, 4, 8],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        g = _Geometry(spec)
        most = target.most_pixels(picks.tile_oc // target.lanes)
        require(picks.tile_px <= most, f"{picks.tile_px} pixels in a tile, registers for {most}")
        require(picks.block < 2 * g.blockable(picks.tile_px), "block exceeds the rows of a phase (in 1-D, its tiles)")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        lanes, g = target.lanes, _Geometry(spec)
        vectors = 2 if spec.oc > lanes else 1
        room = target.most_pixels(vectors)
        space = self.space(spec, target).domains
        width = g.pixels[-1]
        tile_px = min((p for p in space["tile_px"] if p <= room), key=lambda p: (round_up(width, p) / p * (p + 2), -p))
        tasks, count = 4 * target.cores, g.blockable(tile_px)
        blocks = [b for b in space["block"] if b < 2 * count]
        block = max((b for b in blocks if spec.n * ceildiv(count, b) >= tasks), default=1)
        parallel_oc = 1
        if spec.n * ceildiv(count, block) < tasks:
            parallel_oc = max(p for p in space["parallel_oc"] if p <= ceildiv(spec.oc, vectors * lanes))
        return Picks(tile_oc=vectors * lanes, tile_px=tile_px, block=block, order="oc", parallel_oc=parallel_oc)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        picks, g = self.default(spec, target), _Geometry(spec)
        lanes = target.lanes
        pixels = math.prod(g.pixels[:-1]) * round_up(g.pixels[-1], picks.tile_px)
        taps = math.prod(spec.kernel)  # over all phases
        products = 2 * spec.n * pixels * taps * spec.ic * round_up(spec.oc, picks.tile_oc)
        tile = picks.tile_px * picks.tile_oc // lanes
        efficiency = 0.85 * min(1.0, tile / 10)
        traffic = 3 * spec.bytes["dst"] / (target.cores * WRITTEN_PER_SECOND)
        return float(products / (efficiency * target.peak_flops) + traffic)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        steps = _Steps(spec, picks)
        ops = steps.ops
        packed = [steps.packed_weights()]
        packed += [copied(p, steps.oc_blocks * picks.tile_oc) for p in ops.parameters[1:]]
        weights, *vectors = [te.placeholder(p.shape, p.dtype, f"{p.op.name}_in") for p in packed]
        acc = steps.products(steps.padded(), weights)
        dst = steps.stored(acc, vectors)
        return Program(pack=ops.pack(*packed), main=ops.main([weights, *vectors], dst))

    def apply(self, sch: Any, spec: ConvSpec, target: Target, picks: Picks) -> None:
        task, innermost, row_phases = _split_dst(sch, spec, picks)
        if not spec.residual and spec.activation_op.costly:
            vectorize_finished(sch, innermost, target.lanes)
        _schedule_products(sch, spec, target, picks, innermost, row_phases)
        padded = sch.get_sblock("padded")
        if picks.parallel_oc == 1:
            sch.compute_at(padded, task, preserve_unit_loops=True)
        else:  # several tasks read the same rows
            sch.parallel(sch.fuse(*sch.get_loops(padded)[:2]))


class _Geometry:
    """Phases, taps per phase and the pixels of one phase, per axis.

    Attributes:
        phases: how many there are, over all axes.
        taps: taps of the phase that has most.
        whole: whether all phases have as many.
        pixels: output pixels of the phase that has most.
        first: the first input pixel that pixel 0 of any phase reads.
        reach: how many input pixels after the first one pixel 0 of the phases reads.
    """

    def __init__(self, spec: ConvSpec) -> None:
        self.phases = math.prod(spec.stride)
        self.taps = tuple(ceildiv(k, s) for k, s in zip(spec.kernel, spec.stride, strict=True))
        self.whole = all(k % s == 0 for k, s in zip(spec.kernel, spec.stride, strict=True))
        self.pixels = tuple(ceildiv(o, s) for o, s in zip(spec.out_spatial, spec.stride, strict=True))
        begins = [begin for begin, _ in spec.padding]
        back = [(t - 1) * d for t, d in zip(self.taps, spec.dilation, strict=True)]
        self.first = tuple(b // s - r for b, s, r in zip(begins, spec.stride, back, strict=True))
        last = [(s - 1 + b) // s for b, s in zip(begins, spec.stride, strict=True)]
        self.reach = tuple(b - a for a, b in zip(self.first, last, strict=True))

    def blockable(self, tile_px: int) -> int:
        """What a task takes a block of: rows of the first axis; in 1-D, tiles."""
        return ceildiv(self.pixels[0], tile_px) if len(self.pixels) == 1 else self.pixels[0]


class _Steps:
    """The tensor expressions of a candidate, a step per method."""

    def __init__(self, spec: ConvSpec, picks: Picks) -> None:
        self.spec, self.ops, self.geometry = spec, Operands(spec), _Geometry(spec)
        self.tile_oc = picks.tile_oc
        self.oc_blocks = ceildiv(spec.oc, picks.tile_oc)
        #: Pixels of a phase's row, in whole tiles.
        self.width = round_up(self.geometry.pixels[-1], picks.tile_px)
        self.zero = tirx.const(0, ACCUMULATOR)

    def _kernel_taps(self, phase: Index, t: Index) -> tuple[list[Expr], list[Expr]]:
        """The taps of the kernel, per axis, that are the ``t``-th of a phase; and the conditions that they exist."""
        spec = self.spec
        if self.geometry.phases == 1:
            return list(t), []
        taps = [
            tirx.floormod(p + begin, s) + s * i
            for p, (begin, _), s, i in zip(phase, spec.padding, spec.stride, t, strict=True)
        ]
        return taps, [k < size for k, size in zip(taps, spec.kernel, strict=True)]

    def packed_weights(self) -> te.Tensor:
        """``[phase…][tap][oc/t][ic][t]``, zeros where a phase has fewer taps and past the last channel."""
        spec, g = self.spec, self.geometry

        def value(*index: Expr) -> Expr:
            *phase, position, block, ic, lane = index
            taps, exist = self._kernel_taps(phase, unflat(position, g.taps))
            oc = block * self.tile_oc + lane
            return tirx.if_then_else(tirx.all(*exist, oc < spec.oc), self.ops.weights[(ic, oc, *taps)], self.zero)

        shape = (*spec.stride, math.prod(g.taps), self.oc_blocks, spec.ic, self.tile_oc)
        return te.compute(shape, value, name="weights_packed")

    def padded(self) -> te.Tensor:
        """src with zeros around it, in src's layout, from the first pixel on that any phase reads."""
        spec, g = self.spec, self.geometry
        extent = [size + reach for size, reach in zip([*g.pixels[:-1], self.width], g.reach, strict=True)]

        def value(*index: Expr) -> Expr:
            n, ic, pixel = self.ops.logical(index)
            where = [p + first for p, first in zip(pixel, g.first, strict=True)]
            return self.ops.read_src(n, ic, where, always=True)

        return te.compute(self.ops.order(spec.n, spec.ic, extent), value, name="padded")

    def products(self, padded: te.Tensor, weights: te.Tensor) -> te.Tensor:
        """Sums of products ``[n][oc/t][phase…][row…][pixel][t]``, where 1-D layers have one row."""
        spec, g, rank = self.spec, self.geometry, self.spec.rank
        ic = te.reduce_axis((0, spec.ic), "ic")
        t = [te.reduce_axis((0, count), f"t{axis}") for axis, count in enumerate(g.taps)]

        def value(n: Expr, block: Expr, *rest: Expr) -> Expr:
            phase, pixel, lane = rest[:rank], rest[-1 - rank : -1], rest[-1]
            where = [
                p + tirx.floordiv(r + begin, s) - i * d - first
                for p, r, i, s, d, (begin, _), first in zip(
                    pixel, phase, t, spec.stride, spec.dilation, spec.padding, g.first, strict=True
                )
            ]
            product = padded[self.ops.order(n, ic, where)] * weights[(*phase, flat(t, g.taps), block, ic, lane)]
            if not g.whole:  # the last tap of some phases does not exist
                _, exist = self._kernel_taps(phase, t)
                product = tirx.if_then_else(tirx.all(*exist), product, self.zero)
            return te.sum(product, [*t, ic])

        rows = g.pixels[:-1] or (1,)
        # A dimension per axis' phase: TVM 0.27 simplifies (flat_phase // s % s + pad) // s to the wrong value.
        shape = (spec.n, self.oc_blocks, *spec.stride, *rows, self.width, self.tile_oc)
        return te.compute(shape, value, name="acc")

    def stored(self, acc: te.Tensor, vectors: Sequence[te.Tensor]) -> te.Tensor:
        """dst, which interleaves the phases; with the epilogue. ``vectors`` are the packed parameters of channels."""
        spec, ops, tile_oc = self.spec, self.ops, self.tile_oc
        sums, is_finished = finished(ops, acc, vectors, lambda index: index[1] * tile_oc + index[-1])

        def value(n: Expr, oc: Expr, pixel: Index) -> Expr:
            phase = [tirx.floormod(p, s) for p, s in zip(pixel, spec.stride, strict=True)]
            where = [tirx.floordiv(p, s) for p, s in zip(pixel, spec.stride, strict=True)]
            where = [0, *where] if spec.rank == 1 else where
            total = sums[(n, tirx.floordiv(oc, tile_oc), *phase, *where, tirx.floormod(oc, tile_oc))]
            if is_finished:
                return total
            residual = ops.residual[ops.order(n, oc, pixel)] if ops.residual else None
            return epilogue(spec, total, residual=residual, **ops.per_channel(vectors, oc))

        return ops.store(value)


def _split_dst(sch: Any, spec: ConvSpec, picks: Picks) -> tuple[Any, Any, list[Any]]:
    """Split dst's loops into tasks, tiles and what a tile stores.

    Returns the loop over tasks, the innermost one over tiles, and those over the phases of a block's rows.
    """
    n, spatial, oc = dst_loops(sch, spec)
    channel_block, channel = sch.split(oc, [None, picks.tile_oc])
    channel_task, channel_block = sch.split(channel_block, [picks.parallel_oc, None])
    split_rows = [sch.split(axis, [None, s]) for axis, s in zip(spatial[:-1], spec.stride[:-1], strict=True)]
    rows, row_phases = [row for row, _ in split_rows], [phase for _, phase in split_rows]
    pixel_tile, pixel = sch.split(spatial[-1], [None, picks.tile_px * spec.stride[-1]])
    if spec.rank == 1:
        block, pixel_tile = sch.split(pixel_tile, [None, picks.block])
    else:
        block, rows[0] = sch.split(rows[0], [None, picks.block])
    rows += row_phases
    tiles = [channel_block, *rows, pixel_tile] if picks.order == "oc" else [*rows, pixel_tile, channel_block]
    stored = [channel, pixel] if spec.layout == "nchw" else [pixel, channel]
    sch.reorder(n, channel_task, block, *tiles, *stored)
    task = sch.fuse(n, channel_task, block)
    sch.parallel(task)
    return task, tiles[-1], row_phases


def _schedule_products(
    sch: Any, spec: ConvSpec, target: Target, picks: Picks, innermost: Any, row_phases: Sequence[Any]
) -> None:
    """A tile of the products in registers, for each pass of the loop ``innermost``."""
    g, lanes, acc = _Geometry(spec), target.lanes, sch.get_sblock("acc")
    sch.compute_at(acc, innermost, preserve_unit_loops=True)
    reductions = len(g.taps) + 1
    loops = sch.get_loops(acc)
    axes, (*taps, ic) = loops[:-reductions], loops[-reductions:]
    after_phases = max(1, spec.rank - 1) + 2  # rows, pixel, channel
    phases = axes[-after_phases - spec.rank : -after_phases]
    *_, last_row, pixel, channel = axes
    vector, lane = sch.split(channel, [None, lanes])
    sch.reorder(*taps, ic, pixel, vector, lane)
    sch.vectorize(lane)
    sch.unroll(vector)
    sch.unroll(pixel)
    # Where some taps do not exist, unrolling makes their conditions constants; unless that is too much code.
    unrolled = g.phases * math.prod(g.taps) * picks.tile_px * picks.tile_oc // lanes
    if not g.whole and unrolled <= MOST_UNROLLED:
        for loop in (*phases, *taps, *row_phases):
            sch.unroll(loop)
    registers = sch.cache_write(acc, 0, "global")
    sch.reverse_compute_at(registers, last_row, preserve_unit_loops=True)
    _, lane = sch.split(sch.get_loops(registers)[-1], [None, lanes])
    sch.vectorize(lane)
    sch.decompose_reduction(acc, taps[0])
