"""cuda_wgmma with Hopper's copy engine (TMA): one thread asks for whole tiles, and products run while it fetches.

Applies to  what cuda_wgmma does, not transposed, within what im2col mode encodes: strides up to 8, corners of
            the padding and offsets of the taps that fit into 16 bits over the rank, groups of whole steps.
Strategy    1. A step is 128 bytes of a tap: 64 channels, of i8 128. Its patches are one copy in im2col mode: the
               tap, times the dilation, is the copy's offset; the padding sets the corners of its box, outside of
               which zeros are read. Its weights are another copy; both land swizzled where wgmma reads. The maps
               that describe the copies are made at each call.
            2. Every stage has an mbarrier, which counts the bytes that arrive. All threads wait for it.
            3. The products of a step are still under way when those of the next begin; a stage is filled
               again once those that read it have ended in all warpgroups.
            4. Layout of NCHW, stores, bias and split_k are those of cuda_gemm.
Why not     channels that do not fill a step: the rest of it is zeros, which are multiplied too. A warp of its own for
            the copies: cuda_wgmma_persistent has one, and its blocks take more than a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from convgen.cuda import tensorize
from convgen.cuda.implicit import lanes_of, needs_layout
from convgen.deferred import te
from convgen.lowering.compute import Expr, round_up
from convgen.lowering.interface import TensorMap
from convgen.lowering.schedule import Picks, require
from convgen.problem.dtypes import BYTES

from .cuda_wgmma import CudaWgmma

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule

    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec

#: Bytes that a swizzled tile's place in shared memory is a multiple of.
ALIGNMENT = 8 * tensorize.ROW
#: Seconds of cuda_wgmma's that this takes: no thread computes addresses or issues copies beside the products. The
#: figure is a guess, not measured.
SHARE = 0.9


class CudaWgmmaTma(CudaWgmma):
    id, version = "cuda_wgmma_tma", 2
    whole = tensorize.ROW  # a step is of one tap

    def applies(self, spec: ConvSpec, target: Target) -> None:
        super().applies(spec, target)
        require("tma" in target.features, "needs TMA (sm_90a)")

    def admits(self, spec: ConvSpec) -> None:
        super().admits(spec)
        require(not spec.transposed, "needs a convolution that is not transposed")
        channels = tensorize.ROW // BYTES[spec.dtype]
        # A step past a group's last channel would read channels of the next group, not zeros.
        whole = spec.groups == 1 or spec.ic // spec.groups % channels == 0
        require(whole, f"needs groups of whole {channels} channels")
        require(max(spec.stride) <= 8, "needs strides up to 8")
        corner = 1 << (16 // spec.rank - 1)
        begin, end = _corners(spec)
        inside = all(-corner <= c < corner for c in (*begin, *end))
        require(inside, f"needs corners of the padding within [{-corner}, {corner - 1}]")
        reach = max((k - 1) * d for k, d in zip(spec.kernel, spec.dilation, strict=True))
        require(reach < 2 * corner, f"needs taps less than {2 * corner} apart")

    def shared_memory(self, spec: ConvSpec, picks: Picks) -> int:
        barriers = round_up(8 * picks.stages, ALIGNMENT)
        stages: int = picks.stages * (picks.tile_m + picks.tile_n) * tensorize.ROW
        return max(super().shared_memory(spec, picks), stages + barriers)

    def step_cycles(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Cycles of a warpgroup's products: those of the next step are under way before they end."""
        return self.product_cycles(spec, target, picks)

    def seconds(self, spec: ConvSpec, target: Target, picks: Picks) -> float:
        """Predicted seconds: those of cuda_wgmma times :data:`SHARE`."""
        return SHARE * super().seconds(spec, target, picks)

    def sums(self, spec: ConvSpec, source: Callable[..., Expr], weights: te.Tensor, products: te.Tensor) -> te.Tensor:
        """What the intrinsic computes, from no more than where src and the weights begin."""
        if tensorize.is_described():
            return products
        starts = source(*[0] * (spec.rank + 2)), weights(0, 0, 0, 0)
        return te.compute(products.shape, lambda *_: tensorize.opaque(products.dtype, *starts), name="tile_sums")

    def reduce(self, sch: TirSchedule, spec: ConvSpec, picks: Picks, warp: Any) -> None:
        if tensorize.is_described():
            super().reduce(sch, spec, picks, warp)
            return
        sums = sch.get_sblock("tile_sums")
        sch.compute_at(sums, warp, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        *_, row, _ = sch.get_loops(sums)
        tensorize.replace(sch, row, sums, self.whole_reduction(spec, picks))

    def whole_reduction(self, spec: ConvSpec, picks: Picks) -> str:
        """The name of the intrinsic that computes a warpgroup's tile, from the first step to the last."""
        axes, sizes = self.reduction_text(spec, picks)
        return tensorize.tma(
            self.kind(spec), spec.dtype, picks.tile_n, picks.warps_m // 4, picks.stages, spec.rank, axes, sizes
        )

    def reduction_text(self, spec: ConvSpec, picks: Picks) -> tuple[str, list[int]]:
        """What the functions of hopper.h are told: along the spatial axes, and the sizes of the product."""
        m, n, k = self.rounded(spec, picks)
        steps = self.reduction(spec) // picks.tile_k
        axes = [spec.out_spatial, spec.kernel, spec.stride, spec.dilation, [begin for begin, _ in spec.padding]]
        sizes = [m // picks.tile_m, n // picks.tile_n, spec.groups, _channels(spec) // spec.groups]
        return tensorize.axes_text(axes), [
            *sizes, steps // math.prod(spec.kernel), k // picks.tile_k // picks.split_k
        ]  # fmt: skip

    def maps(self, spec: ConvSpec, picks: Picks) -> dict[str, TensorMap]:
        size = BYTES[spec.dtype]
        _, n, k = self.rounded(spec, picks)
        dims = (_channels(spec), *reversed(spec.in_spatial), spec.n)
        lower, upper = (tuple(reversed(corner)) for corner in _corners(spec))
        return {
            "workspace0" if needs_layout(spec, picks) else "src": TensorMap(
                spec.dtype, dims, strides_of(dims, size), (picks.tile_k, picks.tile_m), tensorize.ROW,
                lower, upper, (1, *reversed(spec.stride), 1), _promotion(dims[0] * size),
            ),
            "packed0": TensorMap(
                spec.dtype, (k, spec.groups * n), (k * size,), (picks.tile_k, picks.tile_n), tensorize.ROW,
                promotion=_promotion(k * size),
            ),
        }  # fmt: skip


def _channels(spec: ConvSpec) -> int:
    """Channels of src, or of the copy of it that is laid out."""
    return spec.groups * round_up(spec.ic // spec.groups, lanes_of(spec))


def _corners(spec: ConvSpec) -> tuple[Sequence[int], Sequence[int]]:
    """Where the first tap of the first output lies, from the first input, and where that of the last output lies, from
    the last input; per axis.
    """
    lower = [-begin for begin, _ in spec.padding]
    axes = zip(spec.padding, spec.kernel, spec.dilation, strict=True)
    return lower, [end - (k - 1) * d for (_, end), k, d in axes]


def _promotion(row: int) -> int:
    """Bytes of a row that L2 reads together: those of the next step too, where they follow."""
    return 256 if row % 256 == 0 else 128


def strides_of(dims: Sequence[int], size: int) -> tuple[int, ...]:
    """Bytes from one element to the next, of every axis but the innermost."""
    return tuple(size * math.prod(dims[: i + 1]) for i in range(len(dims) - 1))
