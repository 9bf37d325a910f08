"""Transposed convolution of a single input pixel: a matrix-vector product.

Applies to  transposed convolutions of one input pixel that every output pixel meets, groups 1: the first
            layer of a generator.
Strategy    1. Every output element meets one tap: it is the product of src's channels with one column
               of the weights. The stride has no say; padding only crops.
            2. Output elements of all channels and pixels, in dst's order, are in the lanes: a tile is
               `tile_n` images × `tile_dst` elements. Weights are packed [dst/t][ic][t]; bias and slope
               are repeated for every pixel.
            3. One pass over the weights, which are all there is to read; broadcast src scalars.
Why not     phases (cpu_transposed, cpu_transposed_rows): they compute a row of pixels per tap.
"""

from __future__ import annotations

import math

from tvm import te, tirx

from convgen.cpu.vector import Block, finish, load, written
from convgen.lowering.compute import ACCUMULATOR, Operands, ceildiv, unflat, widen
from convgen.lowering.schedule import Picks, Space, Written, require


class CpuTransposedPixel(Written):
    id, version = "cpu_transposed_pixel", 1

    def applies(self, spec, target):
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        require(math.prod(spec.in_spatial) == 1, "needs an input of one pixel")
        require(spec.groups == 1, "needs groups 1")
        for size, kernel, dilation, (begin, _) in zip(
            spec.out_spatial, spec.kernel, spec.dilation, spec.padding, strict=True
        ):
            dense = dilation == 1 or (size == 1 and begin % dilation == 0)
            require(dense and (size - 1 + begin) // dilation < kernel, "needs a tap for every output pixel")

    def space(self, spec, target):
        elements, lanes = math.prod(spec.dst_shape[1:]), target.lanes
        return Space(
            tile_dst=[lanes * v for v in (1, 2, 3, 4, 6, 8, 12) if v == 1 or lanes * (v - 1) < elements],
            tile_n=[b for b in (1, 2, 3, 4, 6, 8, 12) if b == 1 or (spec.n and spec.n % b == 0)],
        )

    def valid(self, spec, target, picks):
        most = target.most_pixels(picks.tile_dst // target.lanes)
        require(picks.tile_n <= most, f"{picks.tile_n} images in a tile, registers for {most}")

    def default(self, spec, target):
        space, lanes = self.space(spec, target).domains, target.lanes
        most = (8 if spec.n == 1 else 4) * lanes
        tile_dst = max(d for d in space["tile_dst"] if d <= most and target.most_pixels(d // lanes))
        tile_n = max(b for b in space["tile_n"] if b <= min(6, target.most_pixels(tile_dst // lanes)))
        return Picks(tile_dst=tile_dst, tile_n=tile_n)

    def cost(self, spec, target):
        elements = math.prod(spec.dst_shape[1:])
        products = 2 * spec.n * spec.ic * elements
        read = 4 * spec.ic * elements * ceildiv(spec.n, self.default(spec, target).tile_n)
        return products / target.peak_flops + (read / 30e9 + 2 * spec.bytes["dst"] / 12e9) / target.cores

    def program(self, spec, target, picks):
        ops, elements, tile = Operands(spec), math.prod(spec.dst_shape[1:]), picks.tile_dst
        blocks, zero = ceildiv(elements, tile), tirx.const(0, ACCUMULATOR)

        def element(position):
            """Channel and pixel of an element of dst."""
            _, channel, pixel = ops.logical((0, *unflat(position, spec.dst_shape[1:])))
            return channel, pixel

        def packed_weights(b, c, lane):
            o, pixel = element(b * tile + lane)
            taps = [(p + begin) // d for p, (begin, _), d in zip(pixel, spec.padding, spec.dilation, strict=True)]
            return tirx.if_then_else(b * tile + lane < elements, ops.weights[(c, o, *taps)], zero)

        def repeated(parameter):
            def value(f):
                return tirx.if_then_else(f < elements, parameter[element(f)[0]], zero)

            return te.compute((blocks * tile,), value, name=f"{parameter.name}_packed")

        packed = [te.compute((blocks, spec.ic, tile), packed_weights, name="weights_packed")]
        packed += [repeated(p) for p in ops.parameters[1:]]
        return written(ops, packed, lambda *buffers: _kernel(spec, target.lanes, picks, *buffers))


def _kernel(spec, lanes, picks, src, residual, parameters, dst):
    """All of the layer: a loop over tiles of dst's elements, and over images."""
    elements, pixel = math.prod(spec.dst_shape[1:]), [0] * spec.rank
    vectors, images = range(picks.tile_dst // lanes), range(picks.tile_n)
    whole_blocks, rest = divmod(elements, picks.tile_dst)
    whole = Block()
    with whole.loop(ceildiv(elements, picks.tile_dst) * spec.n // picks.tile_n, parallel=True) as (task, index):
        block, n = task.let(index // (spec.n // picks.tile_n)), task.let(index % (spec.n // picks.tile_n))
        n = task.let(n * picks.tile_n)
        sums = task.registers([(i, v) for i in images for v in vectors], lanes)
        with task.loop(spec.ic) as (one, c):
            weights = [
                one.let(load(parameters["weights"], "f32", [block, c, v * lanes], lanes, lanes)) for v in vectors
            ]
            for i in images:
                at = (n + i, c, *pixel) if spec.layout == "nchw" else (n + i, *pixel, c)
                scalar = one.let(tirx.Broadcast(widen(src[at], spec.dtype), lanes))
                for v in vectors:
                    sums.add(one, (i, v), scalar * weights[v])
        for branch, size in task.cases(block, whole_blocks, picks.tile_dst, rest):
            for v in vectors:
                count = min(lanes, size - v * lanes)
                if count <= 0:
                    continue
                first = branch.let(block * picks.tile_dst + v * lanes)
                per_channel = {
                    name: branch.let(load(parameters[name], "f32", [first], lanes, lanes))
                    for name in ("bias", "slope")
                    if name in parameters
                }
                for i in images:
                    at = [n + i, *[0] * spec.rank, first]  # elements lie one after the other
                    finish(branch, spec, dst, residual, at, sums[i, v], lanes, count, **per_channel)
    return whole.statement()
