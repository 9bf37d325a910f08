"""Convolution as a product of patches and weights, on the ordinary units of a GPU.

Applies to  convolutions of any rank, stride, dilation, groups, layout and dtype that are not transposed.
Strategy    1. Pack weights as f32 [group][tap, ic][oc]: a slice of them is contiguous, in whole tiles.
            2. A thread block computes `tile_m` pixels × `tile_n` channels of a group. Slices of `tile_k` of
               the reduction pass through shared memory; patches are gathered there, not written to memory.
            3. A thread keeps `thread_m` × `thread_n` sums in registers; what it reads from shared memory are
               vectors, and neighbours read neighbouring ones.
            4. Loads of src are vectors along channels (NHWC) or pixels (NCHW, 1×1) where those are whole.
            5. Bias, residual and activation in registers; stores run along dst's last axis.
Why not     matrix units (cuda_gemm): they round f32, and want channels in whole tiles; here every layer fits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convgen.cpu.vector import Block, written
from convgen.cuda import tiles
from convgen.cuda.simt import LANES, Buffers, Product, finish, multiply, packed, read, stores, where
from convgen.cuda.tiles import Size, Tile
from convgen.lowering.compute import Expr, Operands, copied, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, require

if TYPE_CHECKING:
    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec


class CudaDirect(Written):
    id, version = "cuda_direct", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cuda", "needs a GPU")
        require(not spec.transposed, "needs a convolution that is not transposed")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        return tiles.space(_size(spec))

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        tiles.check(target, tiles.of(picks))

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return tiles.default(target, _size(spec), _gather(spec))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return tiles.cost(spec, target, _size(spec), _gather(spec))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, tile, size = Operands(spec), tiles.of(picks), _size(spec)
        channels = spec.ic // spec.groups

        def weight(group: Expr, k: Expr, column: Expr) -> Expr:
            return ops.weights[(group * size.columns + column, k % channels, *unflat(k // channels, spec.kernel))]

        weights = [packed(size, tile, weight), *map(copied, ops.parameters[1:])]

        def kernel(*buffers: Any) -> Any:
            product = _product(ops, tile, Buffers(*buffers))
            return multiply(product, tile, Buffers(*buffers).parameters["weights"])

        return written(ops, weights, kernel, offsets=False)


def _product(ops: Operands, tile: Tile, buffers: Buffers) -> Product:
    """The products of patches, fetched from src, and weights: one for each group."""
    spec, size = ops.spec, _size(ops.spec)
    channels = spec.ic // spec.groups

    def fetch(block: Block, group: Expr, row: Expr, start: Expr, offset: Expr, lanes: int) -> Expr:
        image, *pixel = unflat(row, (spec.n, *spec.out_spatial))
        if channels % tile.tile_k == 0:  # a slice is of one tap
            tap, channel = block.let(start // channels), start % channels + offset
        else:
            k = block.let(start + offset)
            tap, channel = block.let(k // channels), k % channels
        axes = zip(pixel, unflat(tap, spec.kernel), spec.stride, spec.dilation, spec.padding, strict=True)
        position = [block.let(p * stride + t * dilation - begin) for p, t, stride, dilation, (begin, _) in axes]
        inside = [row < size.rows] * (size.rows % tile.tile_m != 0)
        inside += [start + offset < size.depth] * (size.depth % tile.tile_k != 0)
        for y, extent, (begin, end) in zip(position, spec.in_spatial, spec.padding, strict=True):
            inside += [y >= 0] * (begin > 0) + [y < extent] * (end > 0)
        index = ops.order(image, group * channels + channel, position)
        return where(inside, read(buffers.src, spec.dtype, index, lanes), lanes)

    def store(block: Block, group: Expr, row: Expr, column: Expr, sums: Any, count: int) -> None:
        image, *pixel = unflat(row, (spec.n, *spec.out_spatial))
        channel, along_channels = group * size.columns + column, spec.layout == "nhwc"
        place = ops.order(image, channel, pixel)
        finish(block, spec, buffers, place, lambda e: channel + e * along_channels, sums, count)

    return Product(size, fetch, _vectors(spec), store, *stores(spec, size.columns))


def _size(spec: ConvSpec) -> Size:
    """Of the products: rows are pixels, columns the output channels of a group."""
    return Size(spec.groups, spec.n * spec.out_pixels, spec.oc // spec.groups, spec.reduction_length)


def _vectors(spec: ConvSpec) -> str:
    """The axis along which four elements of a patch are neighbours, in whole vectors."""
    if spec.layout == "nhwc":
        return "depth" if spec.ic // spec.groups % LANES == 0 else ""
    return "row" if spec.is_pointwise and spec.out_pixels % LANES == 0 else ""


def _gather(spec: ConvSpec) -> int:
    """Instructions that fetch an element of a patch, counted about."""
    return 3 if _vectors(spec) else 12
