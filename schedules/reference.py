"""The definition itself, lowered as it stands: slow, and always right.

Applies to  every spec on every target.
Strategy    1. Weights and other parameters are copied, not rearranged.
            2. One output row at a time is a task; the reduction of a pixel is one scalar loop. On a GPU
               one output element is a thread's.
Why not     anything faster: this is what the others are checked against, and what a spec falls back
            to that no other schedule takes.
"""

from __future__ import annotations

from tvm import te

from convgen.lowering.compute import Operands, convolution, copied, epilogue
from convgen.lowering.schedule import Picks, Program, Scheduled, Space

#: Of a block, on a GPU.
THREADS = 128


class Reference(Scheduled):
    id, version, sums_integers, is_reference = "reference", 2, True, True

    def applies(self, spec, target):
        pass

    def space(self, spec, target):
        return Space()

    def default(self, spec, target):
        return Picks()

    def cost(self, spec, target):
        if target.kind == "cuda":
            return spec.flops / (target.cores * 5e9) + 1e-5
        return spec.flops / 1e9  # about what a scalar loop does in a second

    def program(self, spec, target, picks):
        ops = Operands(spec, integers=True)
        packed = [copied(t) for t in ops.parameters]
        weights, *vectors = [te.placeholder(t.shape, t.dtype, f"{t.op.name}_in") for t in packed]
        acc = convolution(spec, ops, weights)

        def value(n, o, pixel):
            residual = ops.residual[ops.order(n, o, pixel)] if spec.residual else None
            return epilogue(spec, acc[(n, o, *pixel)], residual=residual, **ops.per_channel(vectors, o))

        return Program(pack=ops.pack(*packed), main=ops.main([weights, *vectors], ops.store(value)))

    def apply(self, sch, spec, target, picks):
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
