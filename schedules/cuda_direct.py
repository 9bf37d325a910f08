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

from convgen.cpu.vector import written
from convgen.cuda import tiles
from convgen.cuda.simt import LANES, Product, finish, multiply, packed, read, stores, where
from convgen.cuda.tiles import Size
from convgen.lowering.compute import Operands, copied, unflat
from convgen.lowering.schedule import Written, require


class CudaDirect(Written):
    id, version = "cuda_direct", 1

    def applies(self, spec, target):
        require(target.kind == "cuda", "needs a GPU")
        require(not spec.transposed, "needs a convolution that is not transposed")

    def space(self, spec, target):
        return tiles.space(_size(spec))

    def valid(self, spec, target, picks):
        tiles.check(target, tiles.of(picks))

    def default(self, spec, target):
        return tiles.default(target, _size(spec), _gather(spec))

    def cost(self, spec, target):
        return tiles.cost(spec, target, _size(spec), _gather(spec))

    def program(self, spec, target, picks):
        ops, tile = Operands(spec), tiles.of(picks)
        size = _size(spec)
        channels = spec.ic // spec.groups

        def weight(g, k, o):
            return ops.weights[(g * size.columns + o, k % channels, *unflat(k // channels, spec.kernel))]

        weights = [packed(size, tile, weight), *map(copied, ops.parameters[1:])]

        def kernel(src, residual, parameters, dst):
            def fetch(block, g, row, start, offset, lanes):
                n, *pixel = unflat(row, (spec.n, *spec.out_spatial))
                if channels % tile.tile_k == 0:  # a slice is of one tap
                    tap, c = block.let(start // channels), start % channels + offset
                else:
                    k = block.let(start + offset)
                    tap, c = block.let(k // channels), k % channels
                taps = unflat(tap, spec.kernel)
                axes = zip(pixel, taps, spec.stride, spec.dilation, spec.padding, strict=True)
                at = [block.let(p * s + t * d - b) for p, t, s, d, (b, _) in axes]
                inside = [row < size.rows] * (size.rows % tile.tile_m != 0) + [start + offset < size.depth] * (
                    size.depth % tile.tile_k != 0
                )
                for p, extent, (begin, end) in zip(at, spec.in_spatial, spec.padding, strict=True):
                    inside += [p >= 0] * (begin > 0) + [p < extent] * (end > 0)
                index = ops.order(n, g * channels + c, at)
                value = read(src, spec.dtype, index, lanes)
                return where(inside, value, lanes)

            def store(block, g, row, column, sums, count):
                n, *pixel = unflat(row, (spec.n, *spec.out_spatial))
                o = g * size.columns + column
                by_row = spec.layout == "nhwc"
                place = ops.order(n, o, pixel)
                finish(block, spec, (dst, residual, parameters), place, lambda e: o + e * by_row, sums, count)

            product = Product(size, fetch, _vectors(spec), store, *stores(spec, size.columns))
            return multiply(product, tile, parameters["weights"])

        return written(ops, weights, kernel, offsets=False)


def _size(spec):
    return Size(spec.groups, spec.n * spec.out_pixels, spec.oc // spec.groups, spec.reduction_length)


def _vectors(spec):
    """The axis along which four elements of a patch are neighbours, in whole vectors."""
    if spec.layout == "nhwc":
        return "depth" if spec.ic // spec.groups % LANES == 0 else ""
    return "row" if spec.is_pointwise and spec.out_pixels % LANES == 0 else ""


def _gather(spec):
    """Instructions that fetch an element of a patch."""
    return 3 if _vectors(spec) else 12
