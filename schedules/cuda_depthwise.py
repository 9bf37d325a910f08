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

from convgen.compute import ACCUMULATOR, Operands, ceildiv, copied, flat, unflat
from convgen.cuda import model
from convgen.cuda.simt import LANES, bound, finish, load, memory, put, read, unrolled, where
from convgen.schedule import Picks, Schedule, Space, require
from convgen.vector import Block, written

#: Taps along the tile that are written out; of a longer kernel each is loaded for itself.
MOST_TAPS = 32
#: Passes over the other taps that the CUDA compiler unrolls.
MOST_UNROLLED = 9


class CudaDepthwise(Schedule):
    id, version = "cuda_depthwise", 1

    def applies(self, spec, target):
        require(target.kind == "cuda", "needs a GPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups == spec.ic, "needs one input channel per group")

    def space(self, spec, target):
        vectors = spec.layout == "nhwc" and spec.oc == spec.ic
        return Space(
            tile=[t for t in (1, 2, 4, 8) if t == 1 or t < 2 * spec.out_spatial[_axis(spec)]],
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
        blocks = ceildiv(_items(spec, picks), picks.threads)
        # An FMA, and the loads it shares with its neighbours.
        instructions = 2 + 6 * len(_offsets(spec, picks)) / (picks.tile * picks.tile_c * _inner(spec))
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

    def apply(self, sch, spec, target, picks):
        pass  # the statements are final


def _kernel(ops, picks, src, parameters, buffers):
    spec, axis, lanes = ops.spec, _axis(ops.spec), picks.tile_c
    multiplier, size, items = spec.oc // spec.ic, spec.in_spatial[axis], _items(spec, picks)
    stride, pad, offsets, inner = spec.stride[axis], spec.padding[axis][0], _offsets(spec, picks), _inner(spec)
    whole = Block()
    with (
        bound(whole, ceildiv(items, picks.threads), "blockIdx.x") as (grid, block),
        bound(grid, picks.threads, "threadIdx.x") as (every, thread),
        every.when(block * picks.threads + thread < items if items % picks.threads else True) as body,
    ):
        index = unflat(block * picks.threads + thread, _grid(spec, picks))
        n, c, pixel = ops.logical([body.let(i) for i in index])
        o = body.let(c * lanes)
        first = body.let(pixel[axis] * picks.tile)
        sums = memory(body, (picks.tile * lanes,), "local", "sums")
        with unrolled(body, picks.tile * lanes) as (one, i):
            put(one, sums, [i], tirx.const(0, ACCUMULATOR))
        # Taps along the tile's axis are written out; those along the others are passes.
        passes = [1 if a == axis and inner > 1 else k for a, k in enumerate(spec.kernel)]
        count = math.prod(passes)
        with unrolled(body, count) if count <= MOST_UNROLLED else body.loop(count) as (turn, i):
            taps = unflat(i, passes)
            at, inside = [], []
            for a, (p, t) in enumerate(zip(pixel, taps, strict=True)):
                begin, end = spec.padding[a]
                y = turn.let((first if a == axis else p) * spec.stride[a] + t * spec.dilation[a] - begin)
                at.append(y)
                if a != axis:
                    inside += [y >= 0] * (begin > 0) + [y < spec.in_spatial[a]] * (end > 0)
            row = memory(turn, (len(offsets) * lanes,), "local", "row")
            overhang = spec.padding[axis][1] > 0 or spec.out_spatial[axis] % picks.tile
            for number, offset in enumerate(offsets):
                y = turn.let(at[axis] + offset)
                within = inside + [y >= 0] * (pad > 0) + [y < size] * bool(overhang)
                place = ops.order(n, o // multiplier, [y if a == axis else p for a, p in enumerate(at)])
                put(turn, row, [number * lanes], where(within, read(src, spec.dtype, place, lanes), lanes), lanes)
            for k in range(inner):
                tap = [k if a == axis and inner > 1 else t for a, t in enumerate(taps)]
                factors = memory(turn, (lanes,), "local", "factors")
                put(turn, factors, [0], load(parameters["weights"], [flat(tap, spec.kernel), o], lanes), lanes)
                for x in range(picks.tile):
                    number = offsets.index(x * stride + k * spec.dilation[axis])
                    with unrolled(turn, lanes) as (one, e):
                        product = load(row, [number * lanes + e]) * load(factors, [e])
                        put(one, sums, [x * lanes + e], load(sums, [x * lanes + e]) + product)
        with unrolled(body, picks.tile) as (one, x):
            last = one.let(first + x)
            with one.when(last < spec.out_spatial[axis] if spec.out_spatial[axis] % picks.tile else True) as there:
                taken = memory(there, (lanes,), "local", "taken")
                with unrolled(there, lanes) as (copy, e):
                    put(copy, taken, [e], load(sums, [x * lanes + e]))
                place = ops.order(n, o, [last if a == axis else p for a, p in enumerate(pixel)])
                finish(there, spec, buffers, place, lambda e: o + e, taken, lanes)
    return whole.statement()


def _axis(spec):
    """The spatial axis along which a thread has several outputs: not the one its neighbours run along."""
    return spec.rank - 1 if spec.layout == "nhwc" else max(0, spec.rank - 2)


def _inner(spec):
    """Taps along that axis that are written out."""
    taps = spec.kernel[_axis(spec)]
    return taps if taps <= MOST_TAPS else 1


def _offsets(spec, picks):
    """What a thread reads along that axis in one pass, from its first input on."""
    stride, dilation = spec.stride[_axis(spec)], spec.dilation[_axis(spec)]
    return sorted({x * stride + k * dilation for x in range(picks.tile) for k in range(_inner(spec))})


def _grid(spec, picks):
    """What threads are numbered by: dst's axes, in tiles."""
    spatial = [ceildiv(y, picks.tile) if a == _axis(spec) else y for a, y in enumerate(spec.out_spatial)]
    channels = spec.oc // picks.tile_c
    return (spec.n, channels, *spatial) if spec.layout == "nchw" else (spec.n, *spatial, channels)


def _items(spec, picks):
    return math.prod(_grid(spec, picks))


def _registers(spec, picks):
    """Of a thread, about."""
    return (picks.tile + len(_offsets(spec, picks)) + 2) * picks.tile_c + 40
