"""Depthwise convolution on a GPU: a few neighbouring outputs in a thread's registers.

Applies to  convolutions with one input channel per group that are not transposed, any multiplier.
Strategy    1. Pack weights as f32 [taps][oc].
            2. Neighbouring threads compute neighbouring elements of dst: channels, in vectors of `tile_c`
               (NHWC), or pixels of a row (NCHW).
            3. A thread has `tile` pixels along another axis: of the width (NHWC), of the height (NCHW; in
               1-D the width). Their windows overlap; what they read along that axis is loaded once.
            4. Rows and columns that other threads read too come from L1: nothing is shared by hand.
            5. Bias, residual and activation in registers.
Why not     a product of patches and weights (cuda_direct): with one column it has no reuse in a tile.
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

#: Taps along the tile that are written out; of a longer kernel each is loaded for itself.
MOST_TAPS = 32


class CudaDepthwise(Written):
    id, version = "cuda_depthwise", 1

    def applies(self, spec, target):
        require(target.kind == "cuda", "needs a GPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups == spec.ic, "needs one input channel per group")

    def space(self, spec, target):
        vectors = spec.layout == "nhwc" and spec.oc == spec.ic
        return Space(
            tile=[t for t in (1, 2, 4, 8) if t == 1 or t < 2 * spec.out_spatial[axis_of(spec)]],
            tile_c=[c for c in (1, 2, LANES) if c == 1 or (vectors and spec.oc % c == 0)],
            threads=[32, 64, 128, 256],
        )

    def valid(self, spec, target, picks):
        needed = _registers(spec, picks)
        require(needed <= 200, f"about {needed} registers of a thread, at most 200")

    def default(self, spec, target):
        space = self.space(spec, target).domains
        points = [Picks(tile=t, tile_c=c, threads=128) for t in space["tile"] for c in space["tile_c"]]
        fitting = [p for p in points if _registers(spec, p) <= 128] or points[:1]
        # The most reuse that leaves every SM two blocks; else the most threads.
        enough = [p for p in fitting if _items(spec, p) >= 2 * 128 * target.cores]
        if not enough:
            return max(fitting, key=lambda p: _items(spec, p)).replace(threads=32)
        return max(enough, key=lambda p: (p.tile_c * p.tile, p.tile_c))

    def cost(self, spec, target):
        picks = self.default(spec, target)
        window = _window(spec, picks)
        blocks = ceildiv(_items(spec, picks), picks.threads)
        # An FMA, and the loads it shares with its neighbours.
        instructions = 2 + 6 * len(window.offsets) / (picks.tile * picks.tile_c * window.inner)
        macs = picks.threads * picks.tile * picks.tile_c * math.prod(spec.kernel) * instructions
        resident = model.blocks_per_core(target, picks.threads, 0, _registers(spec, picks))
        return model.seconds(target, blocks, macs, sum(spec.bytes.values()), picks.threads, resident)

    def program(self, spec, target, picks):
        ops = Operands(spec)

        def weight(tap, o):
            return ops.weights[(o, 0, *unflat(tap, spec.kernel))]

        packed = te.compute((math.prod(spec.kernel), spec.oc), weight, name="weights_packed")

        def kernel(src, residual, parameters, dst):
            return _kernel(ops, picks, src, parameters, (dst, residual, parameters))

        return written(ops, [packed, *map(copied, ops.parameters[1:])], kernel, offsets=False)


def _kernel(ops, picks, src, parameters, buffers):
    spec, lanes, window, items = ops.spec, picks.tile_c, _window(ops.spec, picks), _items(ops.spec, picks)
    whole = Block()
    with (
        bound(whole, ceildiv(items, picks.threads), "blockIdx.x") as (grid, block),
        bound(grid, picks.threads, "threadIdx.x") as (every, thread),
        every.when(block * picks.threads + thread < items if items % picks.threads else True) as body,
    ):
        index = unflat(block * picks.threads + thread, window.grid(spec.oc // lanes))
        n, c, pixel = ops.logical([body.let(i) for i in index])
        o = body.let(c * lanes)
        pixel = [body.let(p * picks.tile) if a == window.axis else p for a, p in enumerate(pixel)]
        sums = memory(body, (picks.tile * lanes,), "local", "sums")
        with unrolled(body, picks.tile * lanes) as (one, i):
            put(one, sums, [i], tirx.const(0, ACCUMULATOR))
        with window.loop(body) as (turn, i):
            taps = window.taps(i)
            row = window.read(turn, ops, src, (n, o // (spec.oc // spec.ic), pixel), taps, lanes)
            for k in range(window.inner):
                factors = memory(turn, (lanes,), "local", "factors")
                tap = flat(window.along(taps, k), spec.kernel)
                put(turn, factors, [0], load(parameters["weights"], [tap, o], lanes), lanes)
                for x in range(picks.tile):
                    first = window.place(x, k) * lanes
                    with unrolled(turn, lanes) as (one, e):
                        product = load(row, [first + e]) * load(factors, [e])
                        put(one, sums, [x * lanes + e], load(sums, [x * lanes + e]) + product)
        with window.outputs(body, pixel) as (there, x, where):
            taken = memory(there, (lanes,), "local", "taken")
            with unrolled(there, lanes) as (copy, e):
                put(copy, taken, [e], load(sums, [x * lanes + e]))
            finish(there, spec, buffers, ops.order(n, o, where), lambda e: o + e, taken, lanes)
    return whole.statement()


def _window(spec, picks):
    return Window(spec, picks.tile, MOST_TAPS)


def _items(spec, picks):
    """Threads there is work for."""
    return _window(spec, picks).items(spec.oc // picks.tile_c)


def _registers(spec, picks):
    """Of a thread, about."""
    return (picks.tile + len(_window(spec, picks).offsets) + 2) * picks.tile_c + 40
