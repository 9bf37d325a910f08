"""Gradient of weights as implicit GEMM on tensor cores: output channels × taps and input channels, summed over pixels.

Applies to  the gradient of weights of layers of any rank, stride and dilation, dense or with groups of more than one
            channel, transposed ones too, NCHW and NHWC; on GPUs with ``mma.sync``, ``ldmatrix`` and ``cp.async``: f16
            and bf16; f32 as TF32 where the accuracy is `tf32` or `bf16`.
Strategy    1. Rows are the channels of the gradient of dst, columns the taps × channels of src, and the reduction goes
               over all images' pixels. Of a transposed layer the two tensors have changed places.
            2. Both are read channels last, 16 bytes at a time, straight into shared memory, asynchronously, `stages`
               steps of `tile_k` pixels ahead; src is read as its patches, zeros where the padding is. What is NCHW, or
               whose channels are not whole vectors, a first launch lays out.
            3. In shared memory a row is a pixel, so that the reduction goes down: `ldmatrix` transposes elements of two
               bytes; of four bytes each thread reads its own. Rows are padded so that neither meets a bank twice.
            4. A block of `tile_m` × `tile_n` sums is divided among warps, as cuda_gemm's.
            5. Weights are few, pixels many: `split_k` parts of the pixels are summed up by different blocks, into
               memory that is theirs; a last launch adds the parts up in order. No atomics: always the same bits.
            6. The gradient of bias is summed up in two launches of its own.
Why not     atomic additions to dst: whichever block is first decides how sums round. Tensors transposed in memory, so
            that the reduction is innermost: taps would read pixels at every alignment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from convgen.cuda import model, tensorize
from convgen.cuda.blocks import among_threads, copy_together, divide_among_warps, spread, warp_tile
from convgen.cuda.gradient import (
    Side,
    gradients,
    operands,
    pixel_of,
    read_tap,
    schedule_gradients,
    sides,
    totals_bytes,
)
from convgen.cuda.implicit import lanes_of
from convgen.cuda.operands import channels_last, is_whole
from convgen.deferred import te, tirx
from convgen.lowering.compute import Expr, Operands, flat, round_up, unflat
from convgen.lowering.schedule import Picks, Program, Space, require
from convgen.problem.dtypes import BYTES
from convgen.problem.layout import PLAIN

from .cuda_gemm import CudaGemm

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule

    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec

#: Elements that a row in shared memory is longer than whole multiples of twice as many.
PADDING = 8


class CudaGradient(CudaGemm):
    id, version, directions = "cuda_gradient", 1, ("weights",)
    splits = (1, 2, 4, 8, 16, 32, 64, 128)

    def takes_layouts(self, src: str, dst: str) -> bool:
        return src in PLAIN and dst in PLAIN

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cuda", "needs a GPU")
        require({"ldmatrix", "cp_async"} <= set(target.features), "needs ldmatrix and cp.async (sm_80 or later)")
        channels = min(side.group for side in sides(spec))
        require(channels > 1 or spec.groups == 1, "needs more than one channel in a group")
        need = "tf32" if spec.dtype == "f32" else spec.dtype
        require(need in target.matrix, f"needs matrix units for {need}")
        self.admits(spec)

    def count(self, spec: ConvSpec, picks: Picks) -> int:
        return spec.groups

    def laid_out(self, spec: ConvSpec, picks: Picks) -> int:
        return sum(spec.bytes[side.name] for side in sides(spec) if not _is_whole(spec, side))

    def reduction(self, spec: ConvSpec, merge_g: int = 1) -> int:
        return spec.reduction_length

    def rounded(self, spec: ConvSpec, picks: Picks) -> tuple[int, int, int]:
        rows, columns = _size(spec)
        depth = round_up(spec.reduction_length, picks.tile_k * picks.split_k)
        return round_up(rows, picks.tile_m), round_up(columns, picks.tile_n), depth

    def intrinsic(self, spec: ConvSpec, picks: Picks) -> str:
        return tensorize.mma_across(self.kind(spec), spec.dtype, *warp_tile(picks))

    def space(self, spec: ConvSpec, target: Target) -> Space:
        (rows, columns), domains = _size(spec), super().space(spec, target).domains
        domains["tile_m"] = tuple(m for m in (32, 64, 128, 256) if m < 2 * max(32, rows))
        domains["tile_n"] = tuple(n for n in (32, 64, 128, 256) if n < 2 * max(32, columns))
        return Space(**domains)

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        super().valid(spec, target, picks)
        copies = picks.tile_n * picks.tile_k // lanes_of(spec)
        require(copies >= 32, "a step has less than one copy for each thread of a warp")

    def shared_memory(self, spec: ConvSpec, picks: Picks) -> int:
        row = _padded(picks.tile_m) + _padded(picks.tile_n)
        sums = picks.tile_m * (round_up(picks.tile_n - 8, 32) + 8) * 4
        return round_up(max(picks.stages * picks.tile_k * row * BYTES[spec.dtype], sums), tensorize.ROW)

    def seconds(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        seconds = super().seconds(spec, target, picks)
        if picks.split_k == 1:  # else it is counted
            moved = totals_bytes(spec, 1)
            seconds += model.LAUNCH + moved / (target.rates.memory * model.PARTS_SHARE)
        return seconds + (2 * model.LAUNCH if spec.bias else 0)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec, native=True)
        lanes, (rows, columns, depth) = lanes_of(spec), self.rounded(spec, picks)
        outer, inner = (
            channels_last(operand.tensor, side.blocks, spec.groups, lanes, f"{side.name}_last")
            for operand, side in zip(operands(ops), sides(spec), strict=True)
        )
        left = te.compute((spec.groups, depth, rows // lanes, lanes), _pixels(spec, outer, rows), name="pixels")
        right = te.compute(
            (spec.groups, depth, columns // lanes, lanes), _patches(spec, inner, columns), name="patches"
        )
        summed, length = tensorize.sums_of(spec.dtype), depth // picks.split_k
        k = te.reduce_axis((0, length), "pixel")

        def product(part: Expr, group: Expr, row: Expr, column: Expr) -> Expr:
            at = part * length + k
            one = left[group, at, tirx.floordiv(row, lanes), tirx.floormod(row, lanes)]
            other = right[group, at, tirx.floordiv(column, lanes), tirx.floormod(column, lanes)]
            return te.sum(one.astype(summed) * other.astype(summed), [k])

        sums = te.compute((picks.split_k, spec.groups, rows, columns), product, name="tile_sums")
        tile = te.compute(sums.shape, lambda *index: sums[index], name="tile")
        parts = te.compute(sums.shape, lambda *index: tile[index], name="parts")
        group, whole = sides(spec)[0].group, _whole_channels(spec)[1]

        def place(row: Expr, channel: Expr, *tap: Expr) -> tuple[Expr, ...]:
            column = flat(tap, spec.kernel) * whole + channel
            return tirx.floordiv(row, group), tirx.floormod(row, group), column

        return gradients(spec, ops, parts, place)

    def apply(self, sch: TirSchedule, spec: ConvSpec, target: Target, picks: Picks) -> None:
        block, warp, rows = divide_among_warps(sch, picks)
        parts = sch.get_sblock("parts")
        sch.reverse_compute_at(parts, block, preserve_unit_loops=True)
        among_threads(sch, sch.get_loops(parts)[1:], picks.warps_m * picks.warps_n, 4)
        self.reduce(sch, spec, picks, warp)
        store = tensorize.store(*warp_tile(picks), tensorize.sums_of(spec.dtype))
        tile = tensorize.replace(sch, rows, sch.get_sblock("tile"), store)
        sch.storage_align(tile, 0, axis=2, factor=32, offset=8)  # as cuda_gemm's
        for side in sides(spec):
            if not _is_whole(spec, side):
                spread(sch, sch.get_loops(sch.get_sblock(f"{side.name}_last")), 1)
        schedule_gradients(sch, spec, by_tap=True)

    def steps(self, sch: TirSchedule, spec: ConvSpec, picks: Picks, sums: Any) -> tuple[Any, Any, Any]:
        *_, row, column, k = sch.get_loops(sums)
        depth = tensorize.STEP // BYTES[spec.dtype]
        step, within, k = sch.split(k, [None, picks.tile_k // depth, depth])
        sch.reorder(step, within, row, column, k)
        return step, within, row

    def copies(self, sch: TirSchedule, spec: ConvSpec, picks: Picks, sums: Any, step: Any) -> None:
        for operand in (sch.get_sblock("pixels"), sch.get_sblock("patches")):
            sch.set_scope(operand, 0, "shared.dyn")
            sch.compute_at(operand, step, preserve_unit_loops=True)
            copy_together(sch, sch.get_loops(operand)[-3:], picks.warps_m * picks.warps_n)
            sch.storage_align(operand, 0, axis=1, factor=2 * PADDING, offset=PADDING)


def _pixels(spec: ConvSpec, outer: Callable[..., Expr], rows: int) -> Callable[..., Expr]:
    """Channels of outer ``[group][pixel][vector][lane]``, of which memory only ever has tiles."""
    lanes, whole, zero = lanes_of(spec), _whole_channels(spec)[0], tirx.const(0, tensorize.STORED[spec.dtype])

    def value(group: Expr, number: Expr, vector: Expr, lane: Expr) -> Expr:
        inside = [number < spec.reduction_length]
        if rows != whole:
            inside.append(vector < whole // lanes)
        read = outer(*pixel_of(spec, number), group * whole + vector * lanes + lane)
        return tirx.if_then_else(tirx.all(*inside), read, zero)

    return value


def _patches(spec: ConvSpec, inner: Callable[..., Expr], columns: int) -> Callable[..., Expr]:
    """What a pixel's taps read of inner ``[group][pixel][vector][lane]``, of which memory only ever has tiles."""
    lanes, whole, zero = lanes_of(spec), _whole_channels(spec)[1], tirx.const(0, tensorize.STORED[spec.dtype])
    vectors = whole // lanes

    def value(group: Expr, number: Expr, vector: Expr, lane: Expr) -> Expr:
        tap, channel = tirx.floordiv(vector, vectors), tirx.floormod(vector, vectors) * lanes + lane
        image, *pixel = pixel_of(spec, number)
        position, inside = read_tap(spec, pixel, unflat(tap, spec.kernel))
        inside.append(number < spec.reduction_length)
        if columns != whole * math.prod(spec.kernel):
            inside.append(tap < math.prod(spec.kernel))
        read = inner(image, *position, group * whole + channel)
        return tirx.if_then_else(tirx.all(*inside), read, zero)

    return value


def _is_whole(spec: ConvSpec, side: Side) -> bool:
    return is_whole(side.blocks, spec.groups, lanes_of(spec))


def _whole_channels(spec: ConvSpec) -> tuple[int, int]:
    """Channels of a group of outer and of inner, in whole vectors."""
    outer, inner = (round_up(side.group, lanes_of(spec)) for side in sides(spec))
    return outer, inner


def _size(spec: ConvSpec) -> tuple[int, int]:
    """Rows and columns of a product."""
    rows, channels = _whole_channels(spec)
    return rows, channels * math.prod(spec.kernel)


def _padded(row: int) -> int:
    """Elements from one row in shared memory to the next."""
    return round_up(row - PADDING, 2 * PADDING) + PADDING
