"""The definition itself, lowered as it stands: slow, and always right.

Applies to  every spec on every target, of any layouts.
Strategy    1. Weights and other parameters are copied, not rearranged.
            2. A task is one output row; the reduction of an output element is one scalar loop. On a GPU a
               thread computes one output element.
Why not     anything faster: this is what the others are checked against, and what computes a spec that
            no other schedule takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convgen.cpu.model import SCALAR_FLOPS
from convgen.cuda.model import scalar_seconds
from convgen.deferred import te, tirx
from convgen.hardware.target import Target
from convgen.lowering.compute import (
    Expr,
    Operands,
    convolution,
    copied,
    epilogue,
    nothing_packed,
    store_gradients,
    weights_gradient,
)
from convgen.lowering.requantise import requantise, rounded_product
from convgen.lowering.schedule import Picks, Program, Scheduled, Space
from convgen.problem.spec import SUM, ConvSpec
from convgen.problem.tokens import DIRECTIONS

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule

#: Threads of a block, on a GPU.
THREADS = 128
#: Operations below which a layer is one task. Of rows that small LLVM makes vectors, of as many as a task has, and what
#: is left over may round otherwise.
PARALLEL = 1 << 13


class Reference(Scheduled):
    id, version, sums_integers, is_reference = "reference", 3, True, True
    directions = DIRECTIONS

    def takes_layouts(self, src: str, dst: str) -> bool:
        return True

    def takes_integers(self, spec: ConvSpec) -> bool:
        return True

    def applies(self, spec: ConvSpec, target: Target) -> None:
        pass

    def space(self, spec: ConvSpec, target: Target) -> Space:
        return Space()

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return Picks()

    def cost(self, spec: ConvSpec, target: Target) -> float:
        if target.kind == "cuda":
            return scalar_seconds(target, spec.flops)
        return spec.flops / SCALAR_FLOPS

    def program(self, spec: ConvSpec, target: Target, picks: Picks) -> Program:
        ops = Operands(spec, integers=True)
        if spec.direction == "weights":
            taken = [te.placeholder((1,), "float32", "nothing_packed_in")]
            return Program(
                ops.pack(nothing_packed()), ops.main(taken, store_gradients(spec, weights_gradient(spec, ops)))
            )
        packed = [copied(parameter) for parameter in ops.parameters]
        taken = [te.placeholder(t.shape, t.dtype, f"{t.op.name}_in") for t in packed]
        given = {parameter.name: tensor for parameter, tensor in zip(ops.parameters, taken, strict=True)}
        src_zero, weights_zero, dst_zero = (given.pop(f"{name}_zero", None) for name in ("src", "weights", "dst"))
        addends = given.pop("sum", None)
        acc = convolution(spec, ops, given.pop("weights"), src_zero, weights_zero)

        def value(n: Expr, o: Expr, pixel: tuple[Expr, ...]) -> Expr:
            sums, terms = acc[(n, o, *pixel)], {name: vector[o] for name, vector in given.items()}
            residual = ops.residual[ops.dst_order(n, o, pixel)] if ops.residual is not None else None
            if addends is not None and residual is not None:
                terms |= {name: addends[i] for i, name in enumerate(SUM)} | {"residual": residual.astype("float32")}
            if spec.is_quantised:
                times = _product_on_gpu if target.kind == "cuda" else rounded_product
                zero = None if dst_zero is None else dst_zero[0]
                return requantise(spec, sums, dst_zero=zero, times=times, **terms)
            return epilogue(spec, sums, residual=residual, **terms)

        return Program(pack=ops.pack(*packed), main=ops.main(taken, ops.store(value, stored=spec.is_quantised)))

    def apply(self, sch: TirSchedule, spec: ConvSpec, target: Target, picks: Picks) -> None:
        dst, acc = sch.get_sblock("dst"), sch.get_sblock("acc")
        if spec.direction == "weights":  # sums as long as all images, each a task; then they are stored
            for block in (acc, *([sch.get_sblock("bias_acc")] if spec.bias else []), dst):
                _each(sch, target, sch.get_loops(block)[: spec.rank + 2 if block is acc else len(spec.dst_shape)])
            return
        if target.kind == "cuda":
            _each(sch, target, sch.get_loops(dst))
            sch.set_scope(acc, 0, "local")
            sch.compute_at(acc, sch.get_loops(dst)[-1], preserve_unit_loops=True)
            return
        *outer, _ = sch.get_loops(dst)
        rows = sch.fuse(*outer)
        sch.compute_at(acc, sch.get_loops(dst)[-1], preserve_unit_loops=True)
        if spec.flops >= PARALLEL:
            sch.parallel(rows)


def _product_on_gpu(a: Expr, b: Expr) -> Expr:
    """A product that the compiler of CUDA does not take together with a sum."""
    return tirx.call_pure_extern("float32", "__fmul_rn", a, b)


def _each(sch: TirSchedule, target: Target, loops: list[Any]) -> None:
    """Every element by itself: on a thread of a GPU, or in a task."""
    if target.kind != "cuda":
        sch.parallel(sch.fuse(*loops))
        return
    blocks, threads = sch.split(sch.fuse(*loops), [None, THREADS])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(threads, "threadIdx.x")
