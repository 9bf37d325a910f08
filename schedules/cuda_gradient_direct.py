"""Gradient of weights on the ordinary units of a GPU: sums of a few channels and taps in a thread's registers.

Applies to  the gradient of weights of every layer, of any rank, groups, NCHW, NHWC and dtype.
Strategy    1. A thread has `tile_o` × `tile_c` channels and the taps of the kernel's last axes, as many as registers
               allow, and of the pixels one of `parts`.
            2. For each pixel it reads the gradients of its output channels and the numbers that its taps meet of its
               input channels, and multiplies each by each.
            3. Neighbouring threads have neighbouring channels, so that of NHWC they read neighbouring numbers.
            4. A last launch adds up the parts, always in the same order.
Why not     matrix units (cuda_gradient): they round f32, and want more than a channel in a group. Slices of both
            operands in shared memory, as cuda_direct has them: depthwise layers share nothing between channels.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from convgen.cuda import model
from convgen.cuda.blocks import OTHER_THREADS
from convgen.cuda.gradient import (
    AT_ONCE,
    each_thread,
    gradients,
    operands,
    pixel_of,
    read_tap,
    schedule_gradients,
    sides,
    totals_bytes,
)
from convgen.deferred import te, tirx
from convgen.lowering.compute import ACCUMULATOR, Expr, Operands, ceildiv
from convgen.lowering.schedule import Picks, Program, Scheduled, Space, require
from convgen.problem.layout import PLAIN

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule

    from convgen.hardware.target import Target
    from convgen.problem.spec import ConvSpec

#: Taps that a thread has of one pair of channels, and sums in all, at most.
MOST_TAPS, MOST_SUMS = 16, 64
#: Instructions that read a number of src and of the gradient: where it is, and whether it is inside.
READ_SRC, READ_GRADIENT = 10, 3
#: Registers of a thread besides its numbers.
OTHER_REGISTERS = 48


class CudaGradientDirect(Scheduled):
    id, version, directions = "cuda_gradient_direct", 1, ("weights",)

    def takes_layouts(self, src: str, dst: str) -> bool:
        return src in PLAIN and dst in PLAIN

    def applies(self, spec: ConvSpec, target: Target) -> None:
        require(target.kind == "cuda", "needs a GPU")

    def space(self, spec: ConvSpec, target: Target) -> Space:
        outer, inner = sides(spec)
        return Space(
            tile_o=[t for t in (1, 2, 4, 8) if outer.group % t == 0],
            tile_c=[t for t in (1, 2, 4, 8) if inner.group % t == 0],
            parts=[1 << i for i in range(12) if 1 << i <= spec.reduction_length],
        )

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        sums = picks.tile_o * picks.tile_c * math.prod(_own_taps(spec))
        require(sums <= MOST_SUMS, f"{sums} sums of a thread, at most {MOST_SUMS}")

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        points = [p for p in self.space(spec, target) if self.reason_against(spec, target, p) is None]
        return min(points, key=lambda picks: _seconds(spec, target, picks))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return _seconds(spec, target, self.default(spec, target))

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec)
        (outer, inner), (of_outer, of_inner) = sides(spec), operands(ops)
        pixels, groups, zero = spec.reduction_length, spec.groups, tirx.const(0, ACCUMULATOR)
        length = ceildiv(pixels, picks.parts)

        def gradient(number: Expr, group: Expr, row: Expr) -> Expr:
            image, *pixel = pixel_of(spec, number)
            value = of_outer[outer.blocks.order(image, group * outer.group + row, pixel)]
            return tirx.if_then_else(number < pixels, value, zero)

        def patch(number: Expr, group: Expr, channel: Expr, *tap: Expr) -> Expr:
            image, *pixel = pixel_of(spec, number)
            position, inside = read_tap(spec, pixel, tap)
            value = of_inner[inner.blocks.order(image, group * inner.group + channel, position)]
            return tirx.if_then_else(tirx.all(number < pixels, *inside), value, zero)

        rows = te.compute((length * picks.parts, groups, outer.group), gradient, name="rows")
        patches = te.compute((length * picks.parts, groups, inner.group, *spec.kernel), patch, name="patches")
        k = te.reduce_axis((0, length), "pixel")

        def product(part: Expr, group: Expr, row: Expr, channel: Expr, *tap: Expr) -> Expr:
            at = part * length + k
            return te.sum(rows[at, group, row] * patches[(at, group, channel, *tap)], [k])

        sums = te.compute((picks.parts, groups, outer.group, inner.group, *spec.kernel), product, name="sums")
        parts = te.compute(sums.shape, lambda *index: sums[index], name="parts")

        def place(row: Expr, channel: Expr, *tap: Expr) -> tuple[Expr, ...]:
            return tirx.floordiv(row, outer.group), tirx.floormod(row, outer.group), channel, *tap

        return gradients(spec, ops, parts, place)

    def apply(self, sch: TirSchedule, spec: ConvSpec, target: Target, picks: Picks) -> None:
        part, group, row, channel, *taps = sch.get_loops(sch.get_sblock("parts"))
        row, rows = sch.split(row, [None, picks.tile_o])
        channel, channels = sch.split(channel, [None, picks.tile_c])
        own = len(_own_taps(spec))
        far, near = taps[: len(taps) - own], taps[len(taps) - own :]
        sch.reorder(part, *far, group, row, channel, rows, channels, *near)
        thread = each_thread(sch, [part, *far, group, row, channel])
        sums = sch.get_sblock("sums")
        sch.compute_at(sums, thread, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        *inner, pixel = sch.get_loops(sums)[2:]
        sch.reorder(pixel, *inner)
        for operand in (sch.get_sblock("rows"), sch.get_sblock("patches")):
            sch.compute_at(operand, pixel, preserve_unit_loops=True)
            sch.set_scope(operand, 0, "local")
        for block in (sums, sch.get_sblock("rows"), sch.get_sblock("patches")):
            _unroll(sch, block, 3)
        _unroll(sch, sch.get_sblock("parts"), 2)
        schedule_gradients(sch, spec)


def _unroll(sch: TirSchedule, block: Any, first: int) -> None:
    """Unroll a block's loops from the ``first`` on: what they index are registers then."""
    for loop in sch.get_loops(block)[first:]:
        sch.unroll(loop)


def _own_taps(spec: ConvSpec) -> tuple[int, ...]:
    """The last axes of the kernel, those whose taps are a thread's own."""
    own = itertools.takewhile(lambda count: math.prod(spec.kernel[-count:]) <= MOST_TAPS, range(1, spec.rank + 1))
    return spec.kernel[spec.rank - max(own, default=0) :]


def _seconds(spec: ConvSpec, target: Target, picks: Picks) -> float:
    """Predicted: a thread's instructions, or where threads are few, their waiting for memory; and adding up."""
    taps, length = math.prod(_own_taps(spec)), ceildiv(spec.reduction_length, picks.parts)
    sums, read = picks.tile_o * picks.tile_c * taps, picks.tile_c * taps
    threads = picks.parts * math.prod(spec.weights_shape) // sums
    step = sums + READ_SRC * read + READ_GRADIENT * picks.tile_o
    registers = sums + read + picks.tile_o + OTHER_REGISTERS
    resident, moved = model.blocks_per_core(target, OTHER_THREADS, 0, registers), sum(spec.bytes.values())
    blocks = ceildiv(threads, OTHER_THREADS)
    seconds = model.seconds(target, blocks, OTHER_THREADS * length * step, moved, OTHER_THREADS, resident)
    waits = (length + ceildiv(picks.parts, AT_ONCE)) * model.L2_CYCLES / target.rates.clock
    added = totals_bytes(spec, picks.parts) / (target.rates.memory * model.PARTS_SHARE)
    return max(seconds, waits) + added + model.LAUNCH * (1 + 2 * spec.bias)
