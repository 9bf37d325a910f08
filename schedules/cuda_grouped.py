"""Convolution with few channels per group on a GPU: a few pixels × channels of a group in a thread's registers.

Applies to  convolutions of at least two groups of at most 32 output channels that are not transposed.
Strategy    1. Pack weights as f32 [taps][group][ic][oc]: a thread's channels are vectors.
            2. A thread has `tile` pixels × `tile_oc` channels of a group: of the width (NHWC), of the
               height (NCHW; in 1-D the width). What their windows read along that axis is loaded once.
            3. Neighbouring threads have neighbouring channels and groups (NHWC) or pixels of a row (NCHW).
            4. Input channels are read in vectors of `tile_ic` (NHWC), which are neighbours in memory.
            5. Bias, residual and activation in registers.
Why not     a product of patches and weights (cuda_direct): it gathers every patch through shared memory for
            the few channels that use it.
"""

from __future__ import annotations

import math

from tvm import te, tirx

from convgen.cpu.vector import Block, written
from convgen.cuda import model
from convgen.cuda.simt import LANES, bound, finish, load, memory, put, unrolled
from convgen.cuda.window import Window, axis_of
from convgen.lowering.compute import ACCUMULATOR, Operands, ceildiv, copied, flat, unflat
from convgen.lowering.schedule import Picks, Space, Written, require

#: Taps along the tile that are written out, and multiply-adds of a pass.
MOST_TAPS, MOST_PRODUCTS = 8, 1024


class CudaGrouped(Written):
    id, version = "cuda_grouped", 1

    def applies(self, spec, target):
        require(target.kind == "cuda", "needs a GPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups > 1, "needs at least two groups")
        require(spec.oc // spec.groups <= 32, "needs at most 32 output channels per group")

    def space(self, spec, target):
        per_group = spec.oc // spec.groups
        vectors = spec.layout == "nhwc"
        return Space(
            tile=[t for t in (1, 2, 4, 8) if t == 1 or t < 2 * spec.out_spatial[axis_of(spec)]],
            tile_oc=[c for c in (1, 2, 4, 8, 16) if per_group % c == 0],
            tile_ic=[c for c in (1, 2, LANES) if c == 1 or (vectors and spec.ic // spec.groups % c == 0)],
            threads=[32, 64, 128, 256],
        )

    def valid(self, spec, target, picks):
        needed = _registers(spec, picks)
        require(needed <= 200, f"about {needed} registers of a thread, at most 200")
        products = picks.tile * picks.tile_oc * picks.tile_ic * _window(spec, picks).inner
        require(products <= MOST_PRODUCTS, f"{products} multiply-adds of a pass, at most {MOST_PRODUCTS}")

    def default(self, spec, target):
        space = self.space(spec, target).domains
        tile_ic = space["tile_ic"][-1]
        points = [
            Picks(tile=t, tile_oc=o, tile_ic=tile_ic, threads=128) for t in space["tile"] for o in space["tile_oc"]
        ]
        fitting = [p for p in points if _registers(spec, p) <= 128 and not self.reason_against(spec, target, p)]
        fitting = fitting or [points[0].replace(tile_ic=1)]
        return min(fitting, key=lambda p: (_seconds(spec, target, p), -p.tile))

    def cost(self, spec, target):
        return _seconds(spec, target, self.default(spec, target))

    def program(self, spec, target, picks):
        ops, per_group = Operands(spec), spec.oc // spec.groups

        def weight(tap, g, c, o):
            return ops.weights[(g * per_group + o, c, *unflat(tap, spec.kernel))]

        shape = (math.prod(spec.kernel), spec.groups, spec.ic // spec.groups, per_group)
        packed = te.compute(shape, weight, name="weights_packed")

        def kernel(src, residual, parameters, dst):
            return _kernel(ops, picks, src, parameters, (dst, residual, parameters))

        return written(ops, [packed, *map(copied, ops.parameters[1:])], kernel, offsets=False)


def _kernel(ops, picks, src, parameters, buffers):
    spec, window, items = ops.spec, _window(ops.spec, picks), _items(ops.spec, picks)
    channels, blocks = spec.ic // spec.groups, spec.oc // spec.groups // picks.tile_oc
    lanes, size = picks.tile_ic, min(LANES, picks.tile_oc)
    whole = Block()
    with (
        bound(whole, ceildiv(items, picks.threads), "blockIdx.x") as (grid, block),
        bound(grid, picks.threads, "threadIdx.x") as (every, thread),
        every.when(block * picks.threads + thread < items if items % picks.threads else True) as body,
    ):
        index = unflat(block * picks.threads + thread, window.grid(spec.oc // picks.tile_oc))
        n, part, pixel = ops.logical([body.let(i) for i in index])
        g, o = body.let(part // blocks), body.let(part % blocks * picks.tile_oc)
        pixel = [body.let(p * picks.tile) if a == window.axis else p for a, p in enumerate(pixel)]
        sums = memory(body, (picks.tile * picks.tile_oc,), "local", "sums")
        with unrolled(body, picks.tile * picks.tile_oc) as (one, i):
            put(one, sums, [i], tirx.const(0, ACCUMULATOR))
        with body.loop(channels // lanes) as (outer, i), window.loop(outer) as (turn, j):
            taps, c = window.taps(j), turn.let(i * lanes)
            row = window.read(turn, ops, src, (n, g * channels + c, pixel), taps, lanes)
            for k in range(window.inner):
                tap = turn.let(flat(window.along(taps, k), spec.kernel))
                for e in range(lanes):
                    factors = memory(turn, (picks.tile_oc,), "local", "factors")
                    for v in range(0, picks.tile_oc, size):
                        put(turn, factors, [v], load(parameters["weights"], [tap, g, c + e, o + v], size), size)
                    for x in range(picks.tile):
                        source = window.place(x, k) * lanes + e
                        with unrolled(turn, picks.tile_oc) as (one, f):
                            at = [x * picks.tile_oc + f]
                            put(one, sums, at, load(sums, at) + load(row, [source]) * load(factors, [f]))
        piece = size if spec.layout == "nhwc" else 1
        with window.outputs(body, pixel) as (there, x, where), unrolled(there, picks.tile_oc // piece) as (one, v):
            taken = memory(one, (piece,), "local", "taken")
            with unrolled(one, piece) as (copy, e):
                put(copy, taken, [e], load(sums, [x * picks.tile_oc + v * piece + e]))
            channel = one.let(part * picks.tile_oc + v * piece)
            finish(one, spec, buffers, ops.order(n, channel, where), lambda e: channel + e, taken, piece)
    return whole.statement()


def _window(spec, picks):
    return Window(spec, picks.tile, MOST_TAPS)


def _items(spec, picks):
    """Threads there is work for."""
    return _window(spec, picks).items(spec.oc // picks.tile_oc)


def _registers(spec, picks):
    """Of a thread, about."""
    row = len(_window(spec, picks).offsets) * picks.tile_ic
    return picks.tile * picks.tile_oc + row + 2 * picks.tile_oc + 40


def _seconds(spec, target, picks):
    """Predicted."""
    window = _window(spec, picks)
    blocks = ceildiv(_items(spec, picks), picks.threads)
    reads = len(window.offsets) / (window.inner * picks.tile * picks.tile_oc)  # of each multiply-add
    # What is issued, and what L1 gives: a quarter of a warp's loads for each of its multiply-adds.
    slowdown = max(1.2 + 4 * reads + 1 / (LANES * picks.tile), 4 * reads + 1 / picks.tile)
    macs = picks.threads * picks.tile * picks.tile_oc * spec.reduction_length * slowdown
    resident = model.blocks_per_core(target, picks.threads, 0, _registers(spec, picks))
    return model.seconds(target, blocks, macs, sum(spec.bytes.values()), picks.threads, resident)
