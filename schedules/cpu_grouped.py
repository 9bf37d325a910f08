"""Convolution with few channels per group: pixels in the vector lanes, rows strung together.

Applies to  NCHW convolutions that are not transposed, with few channels per group: depthwise with any
            multiplier, grouped, and dense layers with few output channels or few products per output.
Strategy    1. Copy a block of rows (in 1-D a stretch of the row) of one group's input with its padding,
               split by stride phase, so that neighbouring output pixels read neighbouring elements.
            2. Treat the padded rows as one flat row: an output pixel `f` reads `f + offset` for each
               tap. Short rows still fill vectors; at the ends of rows a few pixels are computed in vain.
            3. Keep a tile of `tile_oc` channels × `tile_px` flat pixels in registers; taps unrolled,
               weights broadcast.
            4. Copy the wanted pixels out, with bias, residual and activation.
            5. One parallel loop over batch × groups × blocks of rows.
Why not     channels in the lanes: NCHW would have to be transposed in and out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tvm import te, tirx

from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, ceildiv, copied, epilogue, partition_edges, read_whole
from convgen.lowering.schedule import Picks, Program, Scheduled, Space, require
from convgen.problem.spec import ConvSpec

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule
    from tvm.s_tir.schedule import LoopRV

#: Unrolled multiply-adds of one tile; more makes the code outgrow the instruction cache.
MOST_UNROLLED = 1024

# What `cost` counts. Fitted to measured kernels, not measured alone.
#: Sums of a tile that cover the latency of their products.
COVERING = 8
#: A load, in products.
LOAD = 2
#: Bytes per second that a core copies, in and out.
COPIED = 8e9


class CpuGrouped(Scheduled):
    id, version = "cpu_grouped", 2

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.layout == "nchw", "needs NCHW")
        few = spec.oc // spec.groups <= 32 or spec.reduction_length <= 160
        require(few, "needs at most 32 output channels per group, or at most 160 products per output")
        require(math.prod(spec.kernel) <= MOST_UNROLLED, f"needs at most {MOST_UNROLLED} taps")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes = target.lanes
        per_group = spec.oc // spec.groups
        return Space(
            tile_oc=[c for c in (1, 2, 3, 4, 6, 8) if per_group % c == 0],
            tile_oh=[1, 2, 4] if spec.rank > 1 else [1],
            tile_px=[lanes * v for v in (1, 2, 3, 4, 6, 8, 12, 16)],
            block=_blocks(spec),
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        lanes = target.lanes
        vectors = picks.tile_px // lanes * picks.tile_oh
        used = vectors * picks.tile_oc + min(vectors, 2) + 1
        require(used <= target.vector_registers, f"{used} vectors in a tile, {target.vector_registers} registers")
        unrolled = vectors * picks.tile_oc * math.prod(spec.kernel)
        require(unrolled <= MOST_UNROLLED, f"{unrolled} unrolled multiply-adds, at most {MOST_UNROLLED}")
        g = _Geometry(spec, picks)
        width = g.wanted if picks.tile_oh == 1 else spec.out_spatial[-1]
        require(vectors == 1 or picks.tile_px - lanes < width, "tile_px exceeds the pixels there are")
        require(spec.rank == 1 or picks.block % picks.tile_oh == 0, "block is not whole tiles")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        lanes, rows = target.lanes, _rows(spec)
        space = self.space(spec, target).domains
        tile_oc = max(c for c in space["tile_oc"] if c <= (8 if spec.oc // spec.groups > 16 else 4))

        # The block's input should stay in the L1 cache; and there must be tasks for every core.
        def block_bytes(block: int) -> int:
            g = _Geometry(spec, Picks(tile_oc=1, tile_oh=1, tile_px=lanes, block=block))
            return 4 * g.phases * g.copied_rows * g.pitch * (spec.ic // spec.groups)

        room = target.l1 if spec.oc // spec.groups <= 16 else target.l2 // 4
        fitting = [b for b in space["block"] if block_bytes(b) <= room or b == space["block"][0]]
        busy = [b for b in fitting if spec.n * spec.groups * ceildiv(rows, b) >= 4 * target.cores]
        base = Picks(tile_oc=tile_oc, tile_oh=1, tile_px=lanes, block=max(busy, default=min(fitting)))
        options = [base.replace(tile_oh=h, tile_px=px) for h in space["tile_oh"] for px in space["tile_px"]]
        # More independent sums than these hide no more latency, and their loads outgrow the load buffers.
        most = (8 if tile_oc == 1 else 12) * lanes
        options = [
            p for p in options if p.tile_oh <= (2 if tile_oc == 1 else 1) and p.tile_oc * p.tile_oh * p.tile_px <= most
        ]
        good = [p for p in options if self.reason_against(spec, target, p) is None]
        return min(good, key=lambda p: self._work(spec, target, p), default=base.replace(tile_oc=1))

    def _work(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Time of one channel's block with one input channel, in products of vectors; the copies are left out."""
        g, lanes = _Geometry(spec, picks), target.lanes
        vectors, taps = picks.tile_px // lanes, math.prod(spec.kernel)
        rows_read = picks.tile_oh if g.axes == 1 else (picks.tile_oh - 1) + spec.kernel[-2]
        loads = rows_read * vectors * taps // (spec.kernel[-2] if g.axes == 2 else 1) / picks.tile_oc
        products = picks.tile_oh * vectors * taps
        sums = picks.tile_oc * picks.tile_oh * vectors
        return float(math.prod(g.tiles) * (LOAD * loads + products) * max(1.0, COVERING / sums))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        picks = self.default(spec, target)
        g = _Geometry(spec, picks)
        vectors = self._work(spec, target, picks) * spec.n * spec.oc * g.blocks * (spec.ic // spec.groups)
        vectors *= math.prod(spec.out_spatial[: g.front])
        moved = spec.bytes["src"] * g.copied_rows / (picks.block * g.phases**0.5) + 2 * spec.bytes["dst"]
        cycle = 2 * target.lanes / target.peak_flops  # seconds of a product of vectors
        return float(vectors * cycle + moved / (target.cores * COPIED))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, g = Operands(spec), _Geometry(spec, picks)
        packed = [copied(p) for p in ops.parameters]
        weights, *vectors = [te.placeholder(p.shape, p.dtype, f"{p.op.name}_in") for p in packed]
        acc = _sums(spec, g, picks, _source(spec, g, picks, ops), weights)

        def value(n: Expr, o: Expr, pixel: tuple[Expr, ...]) -> Expr:
            front, plane = pixel[: g.front], pixel[-g.axes :]
            block, row = tirx.floordiv(plane[0], picks.block), tirx.floormod(plane[0], picks.block)
            row, x = (row, plane[-1]) if g.axes == 2 else (0, row)
            if picks.tile_oh == 1:  # one long row
                row, x = 0, row * g.pitch + x
            where = (row // picks.tile_oh, x // picks.tile_px, row % picks.tile_oh, x % picks.tile_px)
            total = read_whole(acc, (n, o, block, *front, *where))
            residual = ops.residual[(n, o, *pixel)] if ops.residual is not None else None
            return epilogue(spec, total, residual=residual, **ops.per_channel(vectors, o))

        return Program(pack=ops.pack(*packed), main=ops.main([weights, *vectors], ops.store(value)))

    def apply(self, sch: TirSchedule, spec: ConvSpec, target: Target, picks: Picks) -> None:
        g = _Geometry(spec, picks)
        task, tiles = _divide_output(sch, spec, g, picks)
        _keep_sums_in_registers(sch, tiles, spec, g, target)
        _place_copies(sch, task, g)


# ---- what is computed -------------------------------------------------------------------------


def _source(spec: ConvSpec, g: _Geometry, picks: Picks, ops: Operands) -> te.Tensor:
    """Blocks of src with their padding, ``[n, ic, block, …, row, pitch]``.

    Where there is a stride they are split by phase, ``[n, ic, block, …, phase, row, pitch]``.
    """
    stride = spec.stride[-g.axes :]
    steps = stride if g.axes == 2 else (1, *stride)

    def padded_block(*index: Expr) -> Expr:
        n, c, block, *front, row, x = index
        y = [block * picks.block * stride[0] + row] if g.axes == 2 else []
        x = x if g.axes == 2 else block * picks.block * stride[0] + x
        where = [p - b for p, (b, _) in zip([*front, *y, x], spec.padding, strict=True)]
        return ops.read_src(n, c, where, always=True)

    outer = (spec.n, spec.ic, g.blocks, *spec.padded_spatial[: g.front])
    padded = te.compute((*outer, g.copied_rows * steps[0], g.pitch * steps[1]), padded_block, name="padded")
    if g.phases == 1:
        return padded

    def phase_of(*index: Expr) -> Expr:
        *at, phase, row, column = index
        y = row * steps[0] + tirx.floordiv(phase, steps[1])
        return padded[(*at, y, column * steps[1] + tirx.floormod(phase, steps[1]))]

    return te.compute((*outer, g.phases, g.copied_rows, g.pitch), phase_of, name="phases")


def _sums(spec: ConvSpec, g: _Geometry, picks: Picks, source: te.Tensor, weights: te.Tensor) -> te.Tensor:
    """Sums of products of the flat rows' tiles, ``[n, oc, block, …, row tile, tile, row, pixel]``."""
    ic_group, oc_group = spec.ic // spec.groups, spec.oc // spec.groups
    stride, dilation = spec.stride[-g.axes :], spec.dilation[-g.axes :]
    c = te.reduce_axis((0, ic_group), "c")
    taps = [te.reduce_axis((0, k), f"k{axis}") for axis, k in enumerate(spec.kernel)]

    def product(*index: Expr) -> Expr:
        n, o, block, *front, row_tile, tile, row, pixel = index
        flat_pixel = (row_tile * picks.tile_oh + row) * g.pitch + tile * picks.tile_px + pixel
        positions = [t * d for t, d in zip(taps[-g.axes :], dilation, strict=True)]
        phase, offset = 0, flat_pixel
        for position, s, step in zip(positions, stride, ([g.pitch, 1])[-g.axes :], strict=True):
            phase = phase * s + tirx.floormod(position, s)
            offset = offset + tirx.floordiv(position, s) * step
        deep = [p * s + t * d for p, t, s, d in zip(front, taps, spec.stride, spec.dilation, strict=False)]
        where = [tirx.floordiv(offset, g.pitch), tirx.floormod(offset, g.pitch)]
        where = [phase, *where] if g.phases > 1 else where
        channel = tirx.floordiv(o, oc_group) * ic_group + c
        return te.sum(source[(n, channel, block, *deep, *where)] * weights[(o, c, *taps)], [c, *taps])

    shape = (spec.n, spec.oc, g.blocks, *spec.out_spatial[: g.front], *g.tiles, picks.tile_oh, picks.tile_px)
    return te.compute(shape, product, name="acc")


# ---- the schedule -----------------------------------------------------------------------------


def _divide_output(sch: TirSchedule, spec: ConvSpec, g: _Geometry, picks: Picks) -> tuple[LoopRV, LoopRV]:
    """Divide the output among tasks; the loop over tasks and the one under which sums are computed."""
    n, oc, *spatial = sch.get_loops(sch.get_sblock("dst"))
    front, plane = spatial[: g.front], spatial[-g.axes :]
    group, channel = sch.split(oc, [spec.groups, spec.oc // spec.groups])
    block, plane[0] = sch.split(plane[0], [None, picks.block])
    channel_tile, channel = sch.split(channel, [None, picks.tile_oc])
    sch.reorder(n, group, block, channel_tile, *front, channel, *plane)
    task = sch.fuse(n, group, block)
    sch.parallel(task)
    return task, front[-1] if front else channel_tile


def _keep_sums_in_registers(sch: TirSchedule, under: LoopRV, spec: ConvSpec, g: _Geometry, target: Target) -> None:
    """Compute sums under a loop, a tile at a time: all its sums unrolled, pixels in the lanes; then copy them out."""
    acc = sch.get_sblock("acc")
    sch.compute_at(acc, under, preserve_unit_loops=True)
    axes = 7 + g.front
    loops = sch.get_loops(acc)[-(axes + 1 + spec.rank) :]
    (n, channel, *units, row_tile, tile, row, pixel), (c, *taps) = loops[:axes], loops[axes:]
    vector, lane = sch.split(pixel, [None, target.lanes])
    sch.reorder(n, *units, row_tile, tile, c, *taps, channel, row, vector, lane)
    sch.vectorize(lane)
    for loop in (vector, row, channel, *reversed(taps)):
        sch.unroll(loop)
    result = sch.cache_write(acc, 0, "global")
    sch.reverse_compute_at(result, tile, preserve_unit_loops=True)
    *_, pixel = sch.get_loops(result)
    vector, lane = sch.split(pixel, [None, target.lanes])
    sch.vectorize(lane)
    sch.decompose_reduction(acc, c)


def _place_copies(sch: TirSchedule, task: LoopRV, g: _Geometry) -> None:
    """Copy a block's input in each task, split it by phase, and string its rows together."""
    padded = source = sch.get_sblock("padded")
    if g.phases > 1:
        source = sch.get_sblock("phases")
        sch.compute_at(source, task, preserve_unit_loops=True)
        if g.phases <= 4:  # with a constant phase the strided reads become shuffles
            sch.unroll(sch.get_loops(source)[-3])
    sch.compute_at(padded, task, preserve_unit_loops=True)
    if g.axes == 2 or g.blocks == 1:  # else the edges move with the block
        partition_edges(sch, sch.get_loops(padded)[-1])
    # Rows strung together: now `f + offset` is one address, however many rows it spans.
    sch.transform_layout(source, ("write", 0), lambda *index: [*index[:-2], index[-2] * g.pitch + index[-1]])


# ---- sizes ------------------------------------------------------------------------------------


class _Geometry:
    """Sizes of the flattened rows of one block."""

    def __init__(self, spec: ConvSpec, picks: Picks) -> None:
        #: Spatial axes of a block: the last two, or the only one; and those in front of them.
        self.axes = axes = min(spec.rank, 2)
        self.front = spec.rank - axes
        width: int = spec.out_spatial[-1] if axes == 2 else picks.block
        stride, window = spec.stride[-axes:], spec.window[-axes:]
        reach = [(w - 1) // s for w, s in zip(window, stride, strict=True)]  # in elements of one phase
        self.phases = math.prod(stride)
        self.pitch = width + reach[-1]
        self.blocks = ceildiv(_rows(spec), picks.block)
        #: Flat pixels from a block's first wanted one to its last.
        self.wanted = (picks.block - 1) * self.pitch + width if axes == 2 else width
        # Tiles of one long row, or of the block's rows.
        rows, row = (1, self.wanted) if picks.tile_oh == 1 else (picks.block, width)
        self.tiles = ceildiv(rows, picks.tile_oh), ceildiv(row, picks.tile_px)
        # Rows that the last tile reads, also for the pixels that it computes in vain.
        last = (self.tiles[0] * picks.tile_oh - 1) * self.pitch + self.tiles[1] * picks.tile_px - 1
        last += reach[-1] + (reach[0] * self.pitch if axes == 2 else 0)
        self.copied_rows: int = last // self.pitch + 1


def _blocks(spec: ConvSpec) -> list[int]:
    """Sizes of a block: rows; in 1-D pixels, the row or parts of it that are as equal as possible."""
    rows = _rows(spec)
    if spec.rank == 1:
        return sorted({ceildiv(rows, parts) for parts in (1, 2, 4, 8, 16, 32, 64)})
    return sorted({b for b in (1, 2, 4, 7, 8, 14, 16, 28, 56) if b < rows} | {rows})


def _rows(spec: ConvSpec) -> int:
    """What a task takes a block of: rows; in 1-D pixels."""
    return spec.out_spatial[max(-2, -spec.rank)]
