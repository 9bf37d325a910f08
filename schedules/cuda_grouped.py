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

#: Taps along the tile that are written out, and multiply-adds that are written out in a pass, at most.
MOST_TAPS, MOST_PRODUCTS = 8, 1024
#: Registers of a thread, at most: of any point, and of the default.
MOST_REGISTERS, DEFAULT_REGISTERS = 200, 128


class CudaGrouped(Written):
    id, version = "cuda_grouped", 1

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cuda", "needs a GPU")
        require(not spec.transposed, "needs a convolution that is not transposed")
        require(spec.groups > 1, "needs at least two groups")
        require(spec.oc // spec.groups <= 32, "needs at most 32 output channels per group")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        per_group = spec.oc // spec.groups
        vectors = spec.layout == "nhwc"
        return Space(
            tile=[t for t in (1, 2, 4, 8) if t == 1 or t < 2 * spec.out_spatial[axis_of(spec)]],
            tile_oc=[c for c in (1, 2, 4, 8, 16) if per_group % c == 0],
            tile_ic=[c for c in (1, 2, LANES) if c == 1 or (vectors and spec.ic // spec.groups % c == 0)],
            threads=[32, 64, 128, 256],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        needed = _registers(spec, picks)
        require(needed <= MOST_REGISTERS, f"about {needed} registers of a thread, at most {MOST_REGISTERS}")
        products = picks.tile * picks.tile_oc * picks.tile_ic * _window(spec, picks).inner
        require(products <= MOST_PRODUCTS, f"{products} multiply-adds of a pass, at most {MOST_PRODUCTS}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        space = self.space(spec, target).domains
        tile_ic = space["tile_ic"][-1]
        points = [
            Picks(tile=t, tile_oc=o, tile_ic=tile_ic, threads=128) for t in space["tile"] for o in space["tile_oc"]
        ]
        fitting = [
            p for p in points
            if _registers(spec, p) <= DEFAULT_REGISTERS and not self.reason_against(spec, target, p)
        ]  # fmt: skip
        fitting = fitting or [points[0].replace(tile_ic=1)]
        return min(fitting, key=lambda p: (_seconds(spec, target, p), -p.tile))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return _seconds(spec, target, self.default(spec, target))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops, per_group = Operands(spec), spec.oc // spec.groups

        def weight(tap: Expr, group: Expr, ic: Expr, oc: Expr) -> Expr:
            return ops.weights[(group * per_group + oc, ic, *unflat(tap, spec.kernel))]

        shape = (math.prod(spec.kernel), spec.groups, spec.ic // spec.groups, per_group)
        weights = te.compute(shape, weight, name="weights_packed")

        def kernel(*buffers: Any) -> Any:
            return _kernel(ops, picks, Buffers(*buffers))

        return written(ops, [weights, *map(copied, ops.parameters[1:])], kernel, offsets=False)


def _kernel(ops: Operands, picks: Picks, buffers: Buffers) -> Any:
    """The launch: every thread reads `tile_ic` channels of what its window reads at a time, and multiplies them."""
    spec, window, launch = ops.spec, _window(ops.spec, picks), Block()
    ic_group, parts_of_group = spec.ic // spec.groups, spec.oc // spec.groups // picks.tile_oc
    vector = min(LANES, picks.tile_oc)
    with window.each_thread(launch, ops, picks.threads) as (body, image, part, tile):
        group, oc = body.let(part // parts_of_group), body.let(part % parts_of_group * picks.tile_oc)
        pixel = window.first_pixel(body, tile)
        sums = zero_sums(body, picks.tile * picks.tile_oc)
        with body.loop(ic_group // picks.tile_ic) as (channels, ic_part), window.each_pass(channels) as (step, number):
            first_tap, ic = window.first_tap(number), step.let(ic_part * picks.tile_ic)
            read_from = Place(image, group * ic_group + ic, pixel)
            row = window.read(step, ops, buffers.src, read_from, first_tap, picks.tile_ic)
            for inner in range(window.inner):
                tap = step.let(flat(window.tap(first_tap, inner), spec.kernel))
                for c in range(picks.tile_ic):
                    weights = memory(step, (picks.tile_oc,), "local", "tap_weights")
                    for o in range(0, picks.tile_oc, vector):
                        value = load(buffers.parameters["weights"], [tap, group, ic + c, oc + o], vector)
                        put(step, weights, [o], value, vector)
                    inputs = [window.place(x, inner) * picks.tile_ic + c for x in range(picks.tile)]
                    _multiply_tap(step, inputs, row, weights, sums, picks.tile_oc)
        count = vector if spec.layout == "nhwc" else 1
        with window.each_store(body, pixel, sums, count) as (store, position, first, stored_sums):
            channel = store.let(part * picks.tile_oc + first)
            place = ops.order(image, channel, position)
            finish(store, spec, buffers, place, lambda e: channel + e, stored_sums, count)
    return launch.statement()


def _multiply_tap(block: Block, inputs: list[int], row: Any, weights: Any, sums: Any, channels: int) -> None:
    """Add an input channel's products with a tap to all sums: of pixel ``x`` it is element ``inputs[x]`` of ``row``."""
    for x, read_from in enumerate(inputs):
        with unrolled(block, channels) as (body, o):
            place = [x * channels + o]
            put(body, sums, place, load(sums, place) + load(row, [read_from]) * load(weights, [o]))


def _window(spec: ConvSpec, picks: Picks) -> Window:
    return Window(spec, picks.tile, picks.tile_oc, MOST_TAPS)


def _registers(spec: ConvSpec, picks: Picks) -> int:
    """Registers of a thread, estimated: sums, inputs and weights, and 40 for addresses and counters."""
    row = len(_window(spec, picks).offsets) * picks.tile_ic
    return int(picks.tile * picks.tile_oc + row + 2 * picks.tile_oc + 40)


def _seconds(spec: ConvSpec, target: Target, picks: Picks) -> float:
    """Predicted seconds of a launch."""
    window = _window(spec, picks)
    blocks = ceildiv(window.threads, picks.threads)
    reads = len(window.offsets) / (window.inner * picks.tile * picks.tile_oc)  # per multiply-add
    # The slower of two: issuing instructions, and L1, which serves a quarter of a warp's loads in the time of one
    # multiply-add of the warp.
    slowdown = max(1.2 + 4 * reads + 1 / (LANES * picks.tile), 4 * reads + 1 / picks.tile)
    macs = picks.threads * picks.tile * picks.tile_oc * spec.reduction_length * slowdown
    resident = model.blocks_per_core(target, picks.threads, 0, _registers(spec, picks))
    return model.seconds(target, blocks, macs, sum(spec.bytes.values()), picks.threads, resident)
