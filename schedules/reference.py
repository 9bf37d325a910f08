"""The definition itself, lowered as it stands: slow, and always right.

Applies to  every spec on every target, of any layouts.
Strategy    1. Weights and other parameters are copied, not rearranged.
            2. A task is one output row; the reduction of an output element is one scalar loop. On a GPU a
               thread computes one output element.
Why not     anything faster: this is what the others are checked against, and what computes a spec that
            no other schedule takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convgen.cpu.model import SCALAR_FLOPS
from convgen.cuda.model import scalar_seconds
from convgen.deferred import te
from convgen.hardware.target import Target
from convgen.lowering.compute import Expr, Operands, convolution, copied, epilogue, requantise
from convgen.lowering.schedule import Picks, Program, Scheduled, Space
from convgen.problem.spec import ConvSpec

if TYPE_CHECKING:
    from tvm.s_tir import Schedule as TirSchedule

#: Threads of a block, on a GPU.
THREADS = 128


class Reference(Scheduled):
    id, version, sums_integers, is_reference = "reference", 2, True, True

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
        packed = [copied(parameter) for parameter in ops.parameters]
        taken = [te.placeholder(t.shape, t.dtype, f"{t.op.name}_in") for t in packed]
        given = {parameter.name: tensor for parameter, tensor in zip(ops.parameters, taken, strict=True)}
        src_zero, weights_zero, dst_zero = (given.pop(f"{name}_zero", None) for name in ("src", "weights", "dst"))
        acc = convolution(spec, ops, given.pop("weights"), src_zero, weights_zero)

        def value(n: Expr, o: Expr, pixel: tuple[Expr, ...]) -> Expr:
            sums, terms = acc[(n, o, *pixel)], {name: vector[o] for name, vector in given.items()}
            if spec.is_quantised:
                return requantise(spec, sums, dst_zero=None if dst_zero is None else dst_zero[0], **terms)
            residual = ops.residual[ops.dst_order(n, o, pixel)] if ops.residual is not None else None
            return epilogue(spec, sums, residual=residual, **terms)

        return Program(pack=ops.pack(*packed), main=ops.main(taken, ops.store(value, stored=spec.is_quantised)))

    def apply(self, sch: TirSchedule, spec: ConvSpec, target: Target, picks: Picks) -> None:
        dst, acc = sch.get_sblock("dst"), sch.get_sblock("acc")
        if target.kind == "cuda":
            blocks, threads = sch.split(sch.fuse(*sch.get_loops(dst)), [None, THREADS])
            sch.bind(blocks, "blockIdx.x")
            sch.bind(threads, "threadIdx.x")
            sch.set_scope(acc, 0, "local")
            sch.compute_at(acc, threads, preserve_unit_loops=True)
            return
        *outer, _ = sch.get_loops(dst)
        rows = sch.fuse(*outer)
        sch.compute_at(acc, sch.get_loops(dst)[-1], preserve_unit_loops=True)
        sch.parallel(rows)
