"""Transposed convolution of a single input pixel: a matrix-vector product.

Applies to  transposed convolutions of one input pixel that every output pixel meets, groups 1: the first
            layer of a generator.
Strategy    1. Every output element meets one tap: it is the product of src's channels with one column
               of the weights. The stride does not matter, and padding only crops.
            2. Output elements of all channels and pixels, in dst's order, are in the lanes: a tile is
               `tile_n` images × `tile_dst` elements. Weights are packed [dst/t][ic][t]; bias and slope
               are repeated for every pixel.
            3. One pass over the weights, which are nearly all that is read; broadcast src scalars.
Why not     phases (cpu_transposed, cpu_transposed_rows): they compute a row of pixels per tap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tvm import te, tirx

from convgen.cpu.vector import Block, Registers, finish, load, written
from convgen.hardware.target import Target
from convgen.lowering.compute import ACCUMULATOR, Expr, Operand, Operands, ceildiv, unflat, widen
from convgen.lowering.schedule import Picks, Program, Space, Written, require
from convgen.problem.spec import ConvSpec

#: Bytes per second that one core reads of weights, in sequence, and writes of dst: round figures that only rank
#: schedules.
READ_PER_SECOND = 30e9
WRITTEN_PER_SECOND = 12e9


class CpuTransposedPixel(Written):
    id, version = "cpu_transposed_pixel", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cpu", "needs a CPU")
        require(spec.transposed, "needs a transposed convolution")
        require(math.prod(spec.in_spatial) == 1, "needs an input of one pixel")
        require(spec.groups == 1, "needs groups 1")
        for size, kernel, dilation, (begin, _) in zip(
            spec.out_spatial, spec.kernel, spec.dilation, spec.padding, strict=True
        ):
            dense = dilation == 1 or (size == 1 and begin % dilation == 0)
            require(dense and (size - 1 + begin) // dilation < kernel, "needs a tap for every output pixel")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        elements, lanes = math.prod(spec.dst_shape[1:]), target.lanes
        return Space(
            tile_dst=[lanes * v for v in (1, 2, 3, 4, 6, 8, 12) if v == 1 or lanes * (v - 1) < elements],
            tile_n=[b for b in (1, 2, 3, 4, 6, 8, 12) if b == 1 or (spec.n and spec.n % b == 0)],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        most = target.most_pixels(picks.tile_dst // target.lanes)
        require(picks.tile_n <= most, f"{picks.tile_n} images in a tile, registers for {most}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        space, lanes = self.space(spec, target).domains, target.lanes
        most = (8 if spec.n == 1 else 4) * lanes
        tile_dst = max(d for d in space["tile_dst"] if d <= most and target.most_pixels(d // lanes))
        tile_n = max(b for b in space["tile_n"] if b <= min(6, target.most_pixels(tile_dst // lanes)))
        return Picks(tile_dst=tile_dst, tile_n=tile_n)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        elements = math.prod(spec.dst_shape[1:])
        products = 2 * spec.n * spec.ic * elements
        read = 4 * spec.ic * elements * ceildiv(spec.n, self.default(spec, target).tile_n)
        traffic = read / READ_PER_SECOND + 2 * spec.bytes["dst"] / WRITTEN_PER_SECOND
        return products / target.peak_flops + traffic / target.cores

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, elements, tile = Operands(spec), math.prod(spec.dst_shape[1:]), picks.tile_dst
        blocks, zero = ceildiv(elements, tile), tirx.const(0, ACCUMULATOR)

        def channel_and_pixel(element: Expr) -> tuple[Expr, tuple[Expr, ...]]:
            """Where an element of dst lies."""
            _, channel, pixel = ops.logical((0, *unflat(element, spec.dst_shape[1:])))
            return channel, pixel

        def packed_weights(block: Expr, ic: Expr, lane: Expr) -> Expr:
            oc, pixel = channel_and_pixel(block * tile + lane)
            taps = [(p + begin) // d for p, (begin, _), d in zip(pixel, spec.padding, spec.dilation, strict=True)]
            return tirx.if_then_else(block * tile + lane < elements, ops.weights[(ic, oc, *taps)], zero)

        def repeated(parameter: Operand) -> te.Tensor:
            """A parameter of the channels, for every element."""

            def value(element: Expr) -> Expr:
                return tirx.if_then_else(element < elements, parameter[channel_and_pixel(element)[0]], zero)

            return te.compute((blocks * tile,), value, name=f"{parameter.name}_packed")

        packed = [te.compute((blocks, spec.ic, tile), packed_weights, name="weights_packed")]
        packed += [repeated(p) for p in ops.parameters[1:]]
        return written(ops, packed, lambda *buffers: _Kernel(spec, target.lanes, picks, *buffers).statement())


class _Kernel:
    """All of the layer: a loop over tiles of dst's elements, and over images."""

    def __init__(
        self,
        spec: ConvSpec,
        lanes: int,
        picks: Picks,
        src: Any,
        residual: Any,
        parameters: Mapping[str, Any],
        dst: Any,
    ) -> None:
        self.spec, self.picks, self.lanes = spec, picks, lanes
        self.src, self.residual, self.parameters, self.dst = src, residual, parameters, dst
        self.vectors, self.images = range(picks.tile_dst // lanes), range(picks.tile_n)

    def statement(self) -> Any:
        spec, tile = self.spec, self.picks.tile_dst
        elements, parts = math.prod(spec.dst_shape[1:]), spec.n // self.picks.tile_n
        whole_blocks, rest = divmod(elements, tile)
        whole = Block()
        with whole.loop(ceildiv(elements, tile) * spec.n // self.picks.tile_n, parallel=True) as (task, index):
            block, part = task.let(index // parts), task.let(index % parts)
            n = task.let(part * self.picks.tile_n)
            sums = self._sums(task, block, n)
            for branch, size in task.cases(block, whole_blocks, tile, rest):
                self._finish(branch, sums, block, n, size)
        return whole.statement()

    def _sums(self, task: Block, block: Expr, n: Expr) -> Registers:
        """The sums of a tile by ``(image, vector)``: a pass over the input channels."""
        sums = task.registers([(i, v) for i in self.images for v in self.vectors], self.lanes)
        with task.loop(self.spec.ic) as (step, ic):
            places = [[block, ic, v * self.lanes] for v in self.vectors]
            weights = [step.let(load(self.parameters["weights"], "f32", p, self.lanes, self.lanes)) for p in places]
            pixel = [0] * self.spec.rank
            for i in self.images:
                at = (n + i, ic, *pixel) if self.spec.layout == "nchw" else (n + i, *pixel, ic)
                scalar = step.let(tirx.Broadcast(widen(self.src[at], self.spec.dtype), self.lanes))
                for v in self.vectors:
                    sums.add(step, (i, v), scalar * weights[v])
        return sums

    def _finish(self, branch: Block, sums: Registers, block: Expr, n: Expr, size: int) -> None:
        """Epilogue and store of the ``size`` elements that the block has."""
        lanes = self.lanes
        for v in self.vectors:
            count = min(lanes, size - v * lanes)
            if count <= 0:
                continue
            first = branch.let(block * self.picks.tile_dst + v * lanes)
            per_element = {
                name: branch.let(load(self.parameters[name], "f32", [first], lanes, lanes))
                for name in ("bias", "slope")
                if name in self.parameters
            }
            for i in self.images:
                place = [n + i, *[0] * self.spec.rank, first]  # elements lie one after the other
                finish(branch, self.spec, self.dst, self.residual, place, sums[i, v], lanes, count, **per_element)
