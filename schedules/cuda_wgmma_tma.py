"""cuda_wgmma with Hopper's copy engine (TMA): one thread asks for whole tiles, and products run while it fetches.

Applies to  what cuda_wgmma does, not transposed, within what im2col mode encodes: strides up to 8, corners of
            the padding and offsets of the taps that fit into 16 bits over the rank, groups of whole steps.
Strategy    1. A step is 128 bytes of a tap: 64 channels, of i8 128. Its patches are one copy in im2col mode: the
               tap is the offset, dilation included, the padding the corners of the box, outside of which are
               zeros. Its weights are another copy; both land swizzled where wgmma reads. The maps are made at
               each call.
            2. Every stage has an mbarrier, which counts the bytes that arrive. All threads wait for it.
            3. The products of a step are still under way when those of the next begin; a stage is filled
               again once those that read it have ended in all warpgroups.
            4. Layout of NCHW, stores, bias and split_k are those of cuda_gemm.
Why not     channels that fill no step: the rest is multiplied as zeros. A warp of its own for the copies:
            it needs barriers in both directions, for what two copies a step cost one thread.
"""

from __future__ import annotations

import math

from tvm import te

from convgen.cuda import tensorize
from convgen.lowering.compute import round_up
from convgen.lowering.interface import TensorMap
from convgen.lowering.schedule import require
from convgen.problem.dtypes import BYTES

from .cuda_gemm import _lanes, _needs_layout
from .cuda_wgmma import CudaWgmma

#: Bytes of shared memory from one tile to where another may begin, swizzled.
ALIGNMENT = 8 * tensorize.ROW


class CudaWgmmaTma(CudaWgmma):
    id, version = "cuda_wgmma_tma", 1
    whole = tensorize.ROW

    def applies(self, spec, target):
        super().applies(spec, target)
        require("tma" in target.features, "needs TMA (sm_90a)")

    def admits(self, spec):
        super().admits(spec)
        require(not spec.transposed, "needs a convolution that is not transposed")
        channels = tensorize.ROW // BYTES[spec.dtype]
        # Past a group's last channel are those of the next, not zeros.
        whole = spec.groups == 1 or spec.ic // spec.groups % channels == 0
        require(whole, f"needs groups of whole {channels} channels")
        require(max(spec.stride) <= 8, "needs strides up to 8")
        corner = 1 << (16 // spec.rank - 1)
        begin, end = _corners(spec)
        inside = all(-corner <= c < corner for c in (*begin, *end))
        require(inside, f"needs corners of the padding within [{-corner}, {corner - 1}]")
        reach = max((k - 1) * d for k, d in zip(spec.kernel, spec.dilation, strict=True))
        require(reach < 2 * corner, f"needs taps less than {2 * corner} apart")

    def shared_memory(self, spec, picks):
        barriers = round_up(8 * picks.stages, ALIGNMENT)
        return max(
            super().shared_memory(spec, picks),
            picks.stages * (picks.tile_m + picks.tile_n) * tensorize.ROW + barriers,
        )

    def step_cycles(self, spec, picks):
        """The next step's products are there when one's end."""
        return 64 * picks.tile_n * picks.tile_k / self.rate(spec)

    def seconds(self, spec, target, picks):
        """A tenth less than what bounds cuda_wgmma: no thread computes addresses or issues copies beside the
        products. A guess; no device has told.
        """
        return 0.9 * super().seconds(spec, target, picks)

    def sums(self, spec, source, weights, products):
        if tensorize.is_described():
            return products
        ends = source(*[0] * (spec.rank + 2)), weights(0, 0, 0, 0)
        return te.compute(products.shape, lambda *_: tensorize.opaque(products.dtype, *ends), name="tile_sums")

    def reduce(self, sch, spec, picks, warp):
        if tensorize.is_described():
            super().reduce(sch, spec, picks, warp)
            return
        sums = sch.get_sblock("tile_sums")
        sch.compute_at(sums, warp, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        *_, i, _ = sch.get_loops(sums)
        tensorize.replace(sch, i, sums, self.product(spec, picks))

    def product(self, spec, picks):
        """The intrinsic of all a warpgroup's tile is the sum of."""
        m, n, k = self.rounded(spec, picks)
        steps = self.reduction(spec) // picks.tile_k
        return tensorize.tma(
            self.kind(spec), spec.dtype, picks.tile_n, picks.warps_m // 4, picks.stages,
            axes=[spec.out_spatial, spec.kernel, spec.stride, spec.dilation, [begin for begin, _ in spec.padding]],
            sizes=[m // picks.tile_m, n // picks.tile_n, spec.groups, _channels(spec) // spec.groups,
                   steps // math.prod(spec.kernel), k // picks.tile_k // picks.split_k],
        )  # fmt: skip

    def maps(self, spec, picks):
        size = BYTES[spec.dtype]
        _, n, k = self.rounded(spec, picks)
        dims = (_channels(spec), *reversed(spec.in_spatial), spec.n)
        lower, upper = (tuple(reversed(corner)) for corner in _corners(spec))
        return {
            "workspace0" if _needs_layout(spec, picks) else "src": TensorMap(
                spec.dtype, dims, _strides(dims, size), (picks.tile_k, picks.tile_m), tensorize.ROW,
                lower, upper, (1, *reversed(spec.stride), 1),
            ),
            "packed0": TensorMap(
                spec.dtype, (k, spec.groups * n), (k * size,), (picks.tile_k, picks.tile_n), tensorize.ROW
            ),
        }  # fmt: skip


def _channels(spec):
    """As src has them, or the copy of it that is laid out."""
    return spec.groups * round_up(spec.ic // spec.groups, _lanes(spec))


def _corners(spec):
    """Per axis, where the first tap of the first and the last output lies, from the first and the last input."""
    axes = zip(spec.padding, spec.kernel, spec.dilation, strict=True)
    return zip(*[(-begin, end - (k - 1) * d) for (begin, end), k, d in axes], strict=True)


def _strides(dims, size):
    """Bytes from one element to the next, of every axis but the innermost."""
    return tuple(size * math.prod(dims[: i + 1]) for i in range(len(dims) - 1))
