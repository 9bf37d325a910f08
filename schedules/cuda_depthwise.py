"""Depthwise convolution on a GPU: a few neighbouring outputs in a thread's registers.

Applies to  convolutions with one input channel per group that are not transposed, any multiplier.
Strategy    1. Pack weights as f32 [taps][oc].
            2. Neighbouring threads compute neighbouring elements of dst: channels, in vectors of `tile_c`
               (NHWC), or pixels of a row (NCHW).
            3. A thread has `tile` pixels along another axis: of the width (NHWC), of the height (NCHW; in
               1-D the width). Their windows overlap; what they read along that axis is loaded once.
            4. Rows and columns that other threads read too come from L1, not through shared memory.
            5. Bias, residual and activation in registers.
Why not     a product of patches and weights (cuda_direct): with one column it has no reuse in a tile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from convgen.cpu.vector import Block, written
from convgen.cuda import model
from convgen.cuda.simt import LANES, Buffers, finish, load, memory, put, unrolled, zero_sums
from convgen.cuda.window import Place, Window, axis_of
from convgen.deferred import te
from convgen.lowering.compute import Expr, Operands, ceildiv, copied, flat, unflat
from convgen.lowering.schedule import Picks, Program, Space, Written, require

if TYPE_CHECKING:
    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec

#: Taps along the tile that are written out, at most; of a longer kernel each tap is a pass with loads of its own.
MOST_TAPS = 32
#: Registers of a thread, at most: of any point, and of the default.
MOST_REGISTERS, DEFAULT_REGISTERS = 200, 128


class CudaDepthwise(Written):
    id, version = "cuda_depthwise", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cuda", "needs a GPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups == spec.ic, "needs one input channel per group")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        vectors = spec.layout == "nhwc" and spec.oc == spec.ic
        return Space(
            tile=[t for t in (1, 2, 4, 8) if t == 1 or t < 2 * spec.out_spatial[axis_of(spec)]],
            tile_c=[c for c in (1, 2, LANES) if c == 1 or (vectors and spec.oc % c == 0)],
            threads=[32, 64, 128, 256],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        needed = _registers(spec, picks)
        require(needed <= MOST_REGISTERS, f"about {needed} registers of a thread, at most {MOST_REGISTERS}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        space = self.space(spec, target).domains
        points = [Picks(tile=t, tile_c=c, threads=128) for t in space["tile"] for c in space["tile_c"]]
        fitting = [p for p in points if _registers(spec, p) <= DEFAULT_REGISTERS] or points[:1]
        # The most reuse that leaves two blocks for every SM; if no tile leaves as many, the most threads.
        enough = [p for p in fitting if _window(spec, p).threads >= 2 * 128 * target.cores]
        if not enough:
            return max(fitting, key=lambda p: _window(spec, p).threads).replace(threads=32)
        return max(enough, key=lambda p: (p.tile_c * p.tile, p.tile_c))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        picks = self.default(spec, target)
        window = _window(spec, picks)
        blocks = ceildiv(window.threads, picks.threads)
        # Per multiply-add: the FMA itself, and its share of the loads.
        instructions = 2 + 6 * len(window.offsets) / (picks.tile * picks.tile_c * window.inner)
        macs = picks.threads * picks.tile * picks.tile_c * math.prod(spec.kernel) * instructions
        resident = model.blocks_per_core(target, picks.threads, 0, _registers(spec, picks))
        return model.seconds(target, blocks, macs, sum(spec.bytes.values()), picks.threads, resident)

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec)

        def weight(tap: Expr, channel: Expr) -> Expr:
            return ops.weights[(channel, 0, *unflat(tap, spec.kernel))]

        weights = te.compute((math.prod(spec.kernel), spec.oc), weight, name="weights_packed")

        def kernel(*buffers: Any) -> Any:
            return _kernel(ops, picks, Buffers(*buffers))

        return written(ops, [weights, *map(copied, ops.parameters[1:])], kernel, offsets=False)


def _kernel(ops: Operands, picks: Picks, buffers: Buffers) -> Any:
    """The launch: every thread multiplies what its window reads by the taps, pass by pass, and stores its sums."""
    spec, window, launch = ops.spec, _window(ops.spec, picks), Block()
    with window.each_thread(launch, ops, picks.threads) as (body, image, part, tile):
        channel = body.let(part * picks.tile_c)
        pixel = window.first_pixel(body, tile)
        sums = zero_sums(body, picks.tile * picks.tile_c)
        with window.each_pass(body) as (step, number):
            first_tap = window.first_tap(number)
            read_from = Place(image, channel // (spec.oc // spec.ic), pixel)
            row = window.read(step, ops, buffers.src, read_from, first_tap, picks.tile_c)
            for inner in range(window.inner):
                tap = flat(window.tap(first_tap, inner), spec.kernel)
                weights = memory(step, (picks.tile_c,), "local", "tap_weights")
                value = load(buffers.parameters["weights"], [tap, channel], picks.tile_c)
                put(step, weights, [0], value, picks.tile_c)
                _multiply_tap(step, window, inner, row, weights, sums)
        with window.each_store(body, pixel, sums, picks.tile_c) as (store, position, _, stored_sums):
            place = ops.order(image, channel, position)
            finish(store, spec, buffers, place, lambda e: channel + e, stored_sums, picks.tile_c)
    return launch.statement()


def _multiply_tap(block: Block, window: Window, inner: int, row: Any, weights: Any, sums: Any) -> None:
    """Add a tap's products to the sums of all pixels of the tile: channel by channel."""
    for x in range(window.tile):
        read_from = window.place(x, inner) * window.channels
        with unrolled(block, window.channels) as (body, c):
            product = load(row, [read_from + c]) * load(weights, [c])
            place = [x * window.channels + c]
            put(body, sums, place, load(sums, place) + product)


def _window(spec: ConvSpec, picks: Picks) -> Window:
    return Window(spec, picks.tile, picks.tile_c, MOST_TAPS)


def _registers(spec: ConvSpec, picks: Picks) -> int:
    """Registers of a thread, estimated: sums, inputs and weights, and 40 for addresses and counters."""
    return int((picks.tile + len(_window(spec, picks).offsets) + 2) * picks.tile_c + 40)
