"""The gradient of weights on a GPU, as tensor expressions: what is correlated, and what becomes of sums of parts.

``dst[o, c, k] = sum over n, p of outer[n, o, p] * inner[n, c, p * stride + k * dilation - begin]``, group by group.
Of a convolution, outer is the gradient of dst and inner is src; of a transposed layer they have changed places. The
pixels are divided into parts that blocks or threads sum up at once; a last launch adds the parts up, always in the
same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..deferred import te, tirx
from ..lowering.compute import ACCUMULATOR, Expr, Operand, Operands, ceildiv, nothing_packed, store_gradients, unflat
from ..lowering.schedule import Program
from ..problem.layout import Blocks
from ..problem.spec import ConvSpec
from .blocks import OTHER_THREADS

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule

#: Numbers that a thread loads at once where it adds up many.
AT_ONCE = 8


class Side(NamedTuple):
    """One of the two tensors of images.

    Attributes:
        blocks: how it lies in memory.
        spatial: its size per axis.
        group: its channels of a group.
    """

    name: str
    blocks: Blocks
    spatial: tuple[int, ...]
    group: int


def sides(spec: ConvSpec) -> tuple[Side, Side]:
    """``(outer, inner)``."""
    src = Side("src", spec.src_blocks, spec.in_spatial, spec.ic // spec.groups)
    gradient = Side("residual", spec.dst_blocks, spec.out_spatial, spec.oc // spec.groups)
    return (src, gradient) if spec.transposed else (gradient, src)


def operands(ops: Operands) -> tuple[Operand, Operand]:
    """The tensors of ``(outer, inner)``."""
    gradient: Any = ops.residual
    return (ops.src, gradient) if ops.spec.transposed else (gradient, ops.src)


def pixel_of(spec: ConvSpec, number: Expr) -> list[Expr]:
    """``[image, *position]`` of a pixel of outer; of all images there are ``spec.reduction_length``."""
    return unflat(number, (spec.n, *sides(spec)[0].spatial))


def read_tap(spec: ConvSpec, pixel: Sequence[Expr], tap: Sequence[Expr]) -> tuple[list[Expr], list[Expr]]:
    """The position in inner that a tap reads for a pixel of outer, and the conditions for that to be inside."""
    outer, inner = sides(spec)
    position, inside = [], []
    for axis, (p, t) in enumerate(zip(pixel, tap, strict=True)):
        stride, dilation, begin = spec.stride[axis], spec.dilation[axis], spec.padding[axis][0]
        y = p * stride + t * dilation - begin
        last = (outer.spatial[axis] - 1) * stride + (spec.kernel[axis] - 1) * dilation - begin
        position.append(y)
        inside += [y >= 0] * (begin > 0) + [y < inner.spatial[axis]] * (last >= inner.spatial[axis])
    return position, inside


def gradients(spec: ConvSpec, ops: Operands, parts: te.Tensor, place: Callable[..., tuple[Expr, ...]]) -> Program:
    """The program that adds up the sums of parts of the pixels.

    Args:
        parts: sums ``[part][…]``.
        place: ``place(o, c, *tap)`` is where they lie after the part.
    """
    part = te.reduce_axis((0, int(parts.shape[0])), "part")
    made = [te.compute(spec.weights_shape, lambda *w: te.sum(parts(part, *place(*w)), [part]), name="acc")]
    if spec.bias:
        made.append(_bias(spec, ops))
    taken = [te.placeholder((1,), ACCUMULATOR, "nothing_packed_in")]
    return Program(ops.pack(nothing_packed()), ops.main(taken, store_gradients(spec, made)))


def _bias(spec: ConvSpec, ops: Operands) -> te.Tensor:
    """Sums of the gradient of dst ``[oc]``: of so many parts of the pixels as a part has pixels, about."""
    gradient: Any = ops.residual
    pixels = spec.n * spec.out_pixels
    length = 1 << ceildiv(pixels.bit_length(), 2)
    i = te.reduce_axis((0, length), "pixel")

    def part(number: Expr, channel: Expr) -> Expr:
        at = number * length + i
        image, *pixel = unflat(at, (spec.n, *spec.out_spatial))
        value = gradient[ops.dst_order(image, channel, pixel)]
        return te.sum(tirx.if_then_else(at < pixels, value, tirx.const(0, ACCUMULATOR)), [i])

    parts = te.compute((ceildiv(pixels, length), spec.oc), part, name="bias_parts")
    number = te.reduce_axis((0, int(parts.shape[0])), "part")
    return te.compute((spec.oc,), lambda o: te.sum(parts(number, o), [number]), name="bias_acc")


def schedule_gradients(sch: TirSchedule, spec: ConvSpec, *, by_tap: bool = False) -> None:
    """Schedule what :func:`gradients` adds: a thread has an element of dst.

    Args:
        by_tap: sums of neighbouring channels of inner lie beside each other, not those of neighbouring taps.
    """
    loops = sch.get_loops(sch.get_sblock("dst"))
    if by_tap and not spec.bias:  # else dst is flat
        outer, inner, *taps = loops
        loops = [outer, *taps, inner]
        sch.reorder(*loops)
    thread = each_thread(sch, loops)
    for name in ("acc", "bias_acc")[: 1 + spec.bias]:
        sums = sch.get_sblock(name)
        sch.compute_at(sums, thread, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        part = sch.get_loops(sums)[-1]
        _, few = sch.split(part, [None, min(AT_ONCE, int(sch.get(part).extent))])
        sch.unroll(few)
    if spec.bias:
        each_thread(sch, sch.get_loops(sch.get_sblock("bias_parts"))[:2])


def each_thread(sch: TirSchedule, loops: Sequence[Any], threads: int = OTHER_THREADS) -> Any:
    """A launch in blocks of so many threads, each of which does one pass of these loops; returns a thread's loop."""
    blocks, thread = sch.split(sch.fuse(*loops), [None, threads])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread


def totals_bytes(spec: ConvSpec, parts: int) -> int:
    """Bytes that the last launch reads and writes."""
    return (4 * parts + 4) * math.prod(spec.weights_shape)
