"""Direct convolution with output channels in the vector lanes and a tile of pixels in registers.

Applies to  convolutions of any rank, stride, dilation and layout that are not transposed, dense or
            with groups of whole vectors of output channels.
Strategy    1. Pack weights as [oc/t][kernel…][ic][t]: one load fills the lanes with t channels.
            2. Copy the input with its padding, rounded up to whole tiles, so that the inner loop
               has no conditions; skip the copy where there is nothing to pad or round.
            3. Keep a tile of `tile_oh` × `tile_ow` pixels × `tile_oc` channels in registers;
               broadcast src scalars. (The pixels of a 1×1 kernel at stride 1 arrive as one flat row.)
            4. Reduce over the kernel, then ic innermost, and don't unroll it: unrolled, LLVM keeps
               shifted broadcasts alive and spills.
            5. Bias, residual and activation on the tile, then the (NCHW: transposed) store.
            6. One parallel loop over batch × blocks of rows (in 1-D of tiles) × channel blocks; these
               are divided where the weights are the larger operand or rows are few.
Why not     pixels in the lanes: better with few output channels, and done by other schedules (cpu_rows,
            cpu_im2col); im2col: it writes every input k² times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tvm import te, tirx

from convgen.hardware.target import Target
from convgen.lowering.compute import (
    Expr,
    Operands,
    ceildiv,
    dst_loops,
    epilogue,
    finished,
    flat,
    pack_channels,
    partition_edges,
    round_up,
    vectorize_finished,
)
from convgen.lowering.schedule import Picks, Program, Scheduled, Space, busiest, require
from convgen.problem.spec import ConvSpec

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule
    from tvm.s_tir.schedule import LoopRV

# What `cost` counts, in the time of one vector's product. Fitted to measured kernels, not measured alone.
#: Storing an output: channels last; as rows of pixels, of whole squares of vectors, which are transposed by shuffles,
#: or of others; element by element, where a row is not whole tiles.
STORE_CHANNELS, STORE_SQUARES, STORE_ROWS, STORE_ELEMENTS = 8, 10, 20, 55
#: Before AVX-512: a load, as two products begin beside two loads; products that a core has at work at once.
LOAD, AT_WORK = 1.3, 8
#: Vectors of a tile that cover the latency of their products.
COVERING = 10
#: The part of the peak that the inner loop reaches: with AVX-512 in NCHW; elsewhere, where cpu_channels_last is better.
MOST_EFFICIENCY, OTHER_EFFICIENCY = 0.95, 0.85


class CpuDirect(Scheduled):
    id, version = "cpu_direct", 2

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        lanes = target.lanes
        whole = spec.oc // spec.groups % lanes == 0
        require(spec.groups == 1 or whole, f"needs groups 1, or multiples of {lanes} output channels per group")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        lanes = target.lanes
        rows, width = _output(spec)
        per_group = spec.oc // spec.groups
        tiles = [lanes * v for v in (1, 2, 3, 4) if v == 1 or lanes * (v - 1) < per_group]
        widths = {w for w in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 17, 20, 24, 25, 28) if w <= width}
        return Space(
            tile_oc=[t for t in tiles if spec.groups == 1 or per_group % t == 0],
            tile_oh=[h for h in (1, 2, 4) if h <= rows],
            tile_ow=sorted(widths | {min(width, 28)}),
            block=[b for b in (1, 2, 4, 7, 8, 14, 28, 56) if b < 2 * (rows if spec.rank > 1 else width)],
            order=["oc", "pixels"],
            parallel_oc=[1, 2, 4, 8, 16],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        lanes = target.lanes
        pixels, most = picks.tile_oh * picks.tile_ow, target.most_pixels(picks.tile_oc // lanes)
        require(pixels <= most, f"{pixels} pixels in a tile, registers for {most}")
        require(picks.block % picks.tile_oh == 0, "block is not whole tiles")
        count, what = _blockable(spec, picks), "rows" if spec.rank > 1 else "tiles"
        require(picks.block < 2 * count, f"{picks.block} {what} in a block, the output has {count}")
        require(picks.parallel_oc <= ceildiv(spec.oc, picks.tile_oc), "fewer channel blocks than parallel_oc")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        lanes = target.lanes
        rows, _ = _output(spec)
        space = self.space(spec, target).domains
        vectors, tile_ow = _best_tile(spec, target, space["tile_oc"], space["tile_ow"])
        room = target.most_pixels(vectors)
        tile_oh = max(h for h in space["tile_oh"] if h * tile_ow <= room and (h == 1 or rows % h == 0))
        base = Picks(
            tile_oc=vectors * lanes, tile_oh=tile_oh, tile_ow=tile_ow, block=tile_oh, order="oc", parallel_oc=1
        )
        # Enough tasks for every core to stay busy to the end, each as large as possible.
        tasks, count = 4 * target.cores, _blockable(spec, base)
        blocks = [b for b in space["block"] if b % tile_oh == 0 and b < 2 * count] or [tile_oh]
        planes = spec.n * math.prod(spec.out_spatial[:-2])
        channel_blocks = ceildiv(spec.oc, vectors * lanes)
        splits = [p for p in space["parallel_oc"] if p <= channel_blocks]
        if math.prod(spec.weights_shape) > spec.ic * math.prod(spec.in_spatial):
            # The weights are the larger operand: they are split among the cores, not the pixels.
            shares = {p: busiest(_part_sizes(channel_blocks, p), target.cores) for p in splits if p <= tasks}
            parallel_oc = min(shares, key=lambda p: (shares[p], -p))
            block = min((b for b in blocks if b >= count), default=blocks[-1])
        else:
            block = max((b for b in blocks if planes * ceildiv(count, b) >= tasks), default=blocks[0])
            parallel_oc = next((p for p in splits if planes * ceildiv(count, block) * p >= tasks), splits[-1])
        return base.replace(block=block, parallel_oc=parallel_oc)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        lanes = target.lanes
        _, width = _output(spec)
        picks = self.default(spec, target)
        reduction = spec.reduction_length
        used = spec.oc / round_up(spec.oc, picks.tile_oc) * width / round_up(width, picks.tile_ow)
        tile = picks.tile_oh * picks.tile_ow * picks.tile_oc // lanes
        # A tile must cover the latency of its FMAs, and the reduction its prologue and store.
        most = MOST_EFFICIENCY if spec.layout == "nchw" and lanes == 16 else OTHER_EFFICIENCY
        store = _store_time(spec, picks.tile_ow)
        efficiency = most * used * min(1.0, tile / COVERING) * reduction / (reduction + store)
        efficiency /= _product_time(target, picks.tile_oc // lanes, picks.tile_oh * picks.tile_ow)
        return float(spec.flops / (target.peak_flops * efficiency))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, tile = Operands(spec), picks.tile_oc
        packed, (w, *vectors) = pack_channels(ops, tile)
        source = _padded(spec, ops, picks)
        ic_group, oc_group = spec.ic // spec.groups, spec.oc // spec.groups
        c = te.reduce_axis((0, ic_group), "c")
        taps = [te.reduce_axis((0, k), f"k{axis}") for axis, k in enumerate(spec.kernel)]
        # Always with an axis of rows, so that every rank is scheduled alike: [n][oc/t][…][rows][width][t].
        shape = (spec.n, ceildiv(spec.oc, tile), *spec.out_spatial[:-2], *_rounded(spec, picks), tile)

        def product(n: Expr, b: Expr, *rest: Expr) -> Expr:
            *pixel, t = rest
            where = [
                p * s + k * d for p, k, s, d in zip(pixel[-spec.rank :], taps, spec.stride, spec.dilation, strict=True)
            ]
            channel = c if spec.groups == 1 else tirx.floordiv(b * tile, oc_group) * ic_group + c
            return te.sum(source(n, channel, where) * w[b, flat(taps, spec.kernel), c, t], [*taps, c])

        acc = te.compute(shape, product, name="acc")
        sums, done = finished(ops, acc, vectors, lambda index: index[1] * tile + index[-1])

        def value(n: Expr, o: Expr, pixel: tuple[Expr, ...]) -> Expr:
            where = (0, *pixel) if spec.rank == 1 else pixel
            total = sums[(n, tirx.floordiv(o, tile), *where, tirx.floormod(o, tile))]
            residual = ops.residual[ops.order(n, o, pixel)] if ops.residual is not None else None
            return total if done else epilogue(spec, total, residual=residual, **ops.per_channel(vectors, o))

        return Program(pack=ops.pack(*packed), main=ops.main([w, *vectors], ops.store(value)))

    def apply(self, sch: TirSchedule, spec: ConvSpec, target: Target, picks: Picks) -> None:
        task, tile = _tile_output(sch, spec, picks)
        if not spec.residual and spec.activation_op.costly:
            vectorize_finished(sch, tile, target.lanes)
        _keep_sums_in_registers(sch, tile, spec, target)
        if _needs_copy(spec, picks):
            _place_copy(sch, task, spec, picks)


# ---- the schedule -----------------------------------------------------------------------------


def _tile_output(sch: TirSchedule, spec: ConvSpec, picks: Picks) -> tuple[LoopRV, LoopRV]:
    """Tile the output, and go through tasks in parallel; the loop over tasks and the innermost one over tiles."""
    n, spatial, oc = dst_loops(sch, spec)
    if len(spatial) == 1:
        spatial = sch.split(spatial[0], [1, None])
    *outer, h, w = spatial
    channel_block, channel = sch.split(oc, [None, picks.tile_oc])
    channel_task, channel_block = sch.split(channel_block, [picks.parallel_oc, None])
    row_tile, row = sch.split(h, [None, picks.tile_oh])
    pixel_tile, pixel = sch.split(w, [None, picks.tile_ow])
    if spec.rank == 1:
        block, pixel_tile = sch.split(pixel_tile, [None, picks.block])
    else:
        block, row_tile = sch.split(row_tile, [None, picks.block // picks.tile_oh])
    tiles = [channel_block, row_tile, pixel_tile]
    if picks.order == "pixels":
        tiles = [row_tile, pixel_tile, channel_block]
    inner = [channel, row, pixel] if spec.layout == "nchw" else [row, pixel, channel]
    sch.reorder(n, channel_task, *outer, block, *tiles, *inner)
    task = sch.fuse(n, channel_task, *outer, block)
    sch.parallel(task)
    whole = spec.oc % picks.tile_oc == 0 if spec.layout == "nhwc" else _output(spec)[1] % picks.tile_ow == 0
    if whole:
        sch.vectorize(inner[-1])
    return task, tiles[-1]


def _keep_sums_in_registers(sch: TirSchedule, tile: LoopRV, spec: ConvSpec, target: Target) -> None:
    """Compute a tile's sums under its loop: reductions outside, the tile unrolled within, channels in the lanes."""
    acc = sch.get_sblock("acc")
    sch.compute_at(acc, tile, preserve_unit_loops=True)
    reductions = 1 + spec.rank
    block_axes = len(sch.get(acc).iter_vars)
    loops = sch.get_loops(acc)[-block_axes:]
    axes, reduce = loops[:-reductions], loops[-reductions:]
    *units, row, pixel, channel = axes
    vector, lane = sch.split(channel, [None, target.lanes])
    sch.reorder(*reduce, *units, row, pixel, vector, lane)
    sch.vectorize(lane)
    for loop in (vector, pixel, row):
        sch.unroll(loop)
    sch.decompose_reduction(acc, reduce[0])


def _place_copy(sch: TirSchedule, task: LoopRV, spec: ConvSpec, picks: Picks) -> None:
    """Copy the padded input within each task; or where several tasks read the same of it, before them all."""
    copy = sch.get_sblock("padded")
    if picks.parallel_oc == 1:
        sch.compute_at(copy, task, preserve_unit_loops=True)
    else:
        first, second, *_ = sch.get_loops(copy)
        sch.parallel(sch.fuse(first, second))
    if spec.rank > 1:  # in 1-D the width is what tasks divide
        partition_edges(sch, sch.get_loops(copy)[-1 if spec.layout == "nchw" else -2])


# ---- what it costs ----------------------------------------------------------------------------


def _best_tile(spec: ConvSpec, target: Target, channels: Sequence[int], widths: Sequence[int]) -> tuple[int, int]:
    """(vectors of channels, pixels of a row) of the tile that takes the least time; two vectors where equal."""
    lanes = target.lanes
    _, width = _output(spec)
    most = (2, 1) if lanes == 16 else (4, 2, 1)
    shapes = [(v, w) for v in most if v * lanes in channels for w in widths if w <= target.most_pixels(v)]

    def penalty(shape: tuple[int, int]) -> tuple[float, int]:
        """What tiles compute in all, with the loads around it and the store; then fewer vectors."""
        vectors, tile_ow = shape
        computed = round_up(width, tile_ow) * round_up(spec.oc, vectors * lanes)
        store = _store_time(spec, tile_ow) / spec.reduction_length
        return computed * (_product_time(target, vectors, tile_ow) + 2 / (vectors * tile_ow) + store), -vectors

    return min(shapes, key=penalty)


def _part_sizes(blocks: int, parts: int) -> list[int]:
    """Blocks of each part: as many for all but the last ones."""
    size = ceildiv(blocks, parts)
    return [max(0, min(size, blocks - part * size)) for part in range(parts)]


def _product_time(target: Target, vectors: int, pixels: int) -> float:
    """Time of a product of a tile, of which an FMA is 1: before AVX-512 loads may take longer, or a sum's latency."""
    tile = vectors * pixels
    return 1.0 if target.lanes == 16 else max(1.0, LOAD * (vectors + pixels) / tile, AT_WORK / tile)


def _store_time(spec: ConvSpec, tile_ow: int) -> int:
    """Time of storing an output, in products."""
    if spec.layout == "nhwc":
        return STORE_CHANNELS
    if _output(spec)[1] % tile_ow:
        return STORE_ELEMENTS
    return STORE_SQUARES if tile_ow % 16 == 0 else STORE_ROWS


# ---- sizes ------------------------------------------------------------------------------------


def _output(spec: ConvSpec) -> tuple[int, int]:
    """(rows, width) of the output as the tiles see it."""
    return (spec.out_spatial[-2] if spec.rank > 1 else 1), spec.out_spatial[-1]


def _blockable(spec: ConvSpec, picks: Picks) -> int:
    """What a task takes a block of: rows; in 1-D, tiles."""
    rows, width = _output(spec)
    return rows if spec.rank > 1 else ceildiv(width, picks.tile_ow)


def _rounded(spec: ConvSpec, picks: Picks) -> tuple[int, int]:
    """(rows, width) rounded up to whole tiles."""
    rows, width = _output(spec)
    return round_up(rows, picks.tile_oh), round_up(width, picks.tile_ow)


def _extent(spec: ConvSpec, picks: Picks) -> list[int]:
    """Input size per axis that whole tiles of output pixels read."""
    pixels = [*spec.out_spatial[:-2], *_rounded(spec, picks)][-spec.rank :]
    return [(p - 1) * s + w for p, s, w in zip(pixels, spec.stride, spec.window, strict=True)]


def _needs_copy(spec: ConvSpec, picks: Picks) -> bool:
    """Whether there is padding, or the last tiles read past the input."""
    padded = any(b or e for b, e in spec.padding)
    return padded or any(e > size for e, size in zip(_extent(spec, picks), spec.in_spatial, strict=True))


def _padded(spec: ConvSpec, ops: Operands, picks: Picks) -> Callable[[Expr, Expr, Sequence[Expr]], Expr]:
    """src as ``f(n, c, where)``: as it is, or through a copy with its padding and whole tiles."""
    if not _needs_copy(spec, picks):
        return lambda n, c, where: ops.src[ops.order(n, c, where)]

    def value(*index: Expr) -> Expr:
        n, c, where = ops.logical(index)
        return ops.read_src(n, c, [p - b for p, (b, _) in zip(where, spec.padding, strict=True)], always=True)

    extent = _extent(spec, picks)
    copy = te.compute(ops.order(spec.n, spec.ic, extent), value, name="padded")
    return lambda n, c, where: copy[ops.order(n, c, where)]
