"""How weights are packed: the function ``pack`` of any schedule, scheduled.

A packer permutes, pads with zeros, and may transform; training packs at every step, so it should take little longer
than copying. What a schedule says of it are tensor expressions. Here each of the tensors that these make is walked

1. in the order in which what it reads lies in memory, but for its own last axis, which stays innermost and becomes
   vectors: stores fill whole cache lines, and of lines that are read nothing is left when they go;
2. where neighbours on that axis lie far apart, from a copy of a short run of each of these: addresses a power of two
   apart share a few places in the cache, however small what is read of them;
3. with what is computed on the way, such as Winograd's transforms, made for a part at a time, in vectors as well;
4. in tasks, for the threads of whoever calls.

What is statements already (:mod:`convgen.cpu.weights`) stays as it is. None of it changes what is computed.
"""

from __future__ import annotations

import math
from typing import Any

from ..deferred import tirx
from .compute import flat

#: Elements of a tensor from which on more than a plain loop is worth its while.
LARGE = 1 << 13
#: Steps along what is read that are copied, and computed on the way, at a time.
STEPS = 16
#: Most vectors of what is computed on the way that are written out, which makes numbers of the coefficients.
WRITTEN_OUT = 128


def schedule_packing(sch: Any, tensors: list[str]) -> None:
    """Schedule a function in place.

    Args:
        sch: TIR's schedule of it.
        tensors: the names of those that it makes.
    """
    for name in tensors:
        block = sch.get_sblock(name)
        loops = sch.get_loops(block)
        if len(loops) > 1 and _size(sch, loops) >= LARGE and not _sums(sch, block):
            _walk(sch, block)


def _walk(sch: Any, block: Any) -> None:
    """Schedule what makes a tensor, and what is computed for it alone."""
    *outer, lane = sch.get_loops(block)
    *steps, lane_step = _steps(sch, block)
    order = [loop for _, loop in sorted(zip(steps, outer, strict=True), key=lambda pair: -pair[0])]
    sch.reorder(*order, lane)
    task = order[0]
    made = _producers(sch, block)
    if len(order) > 1:
        extent = int(sch.get(order[1]).extent)
        part, step = sch.split(order[1], [None, STEPS if extent % STEPS == 0 else extent])
        if made:
            _compute_within(sch, made, part, step)
        elif lane_step > sorted(steps)[-2]:
            _copy_within(sch, block, part, STEPS * _size(sch, order[2:]) * int(sch.get(lane).extent))
        task = sch.fuse(task, part)
    if _is_copied(sch, block):
        sch.vectorize(lane)
    sch.parallel(task)


def _size(sch: Any, loops: list[Any]) -> int:
    return math.prod(int(sch.get(loop).extent) for loop in loops)


def _sums(sch: Any, block: Any) -> bool:
    """Whether it, or what is computed for it, sums."""
    blocks = [block, *_producers(sch, block)]
    return any(var.iter_type != tirx.IterVar.DataPar for b in blocks for var in sch.get(b).iter_vars)


def _producers(sch: Any, block: Any) -> list[Any]:
    """What computes what a block reads, the first ones first."""
    found: list[Any] = []
    for producer in sch.get_producers(block):
        found += [*_producers(sch, producer), producer]
    return found


def _steps(sch: Any, block: Any) -> list[int]:
    """How far apart in what it reads first neighbours along each of a block's loops are, at its beginning."""
    from tvm.sym import Analyzer

    node = sch.get(block)
    if not node.reads:
        return [0] * len(node.iter_vars)
    read = node.reads[0]
    place = flat([axis.min for axis in read.region], [int(size) for size in read.source.shape])

    def at(index: int | None) -> int:
        analyzer = Analyzer()
        for i, var in enumerate(node.iter_vars):
            analyzer.bind(var.var, tirx.const(i == index, "int32"))
        return int(analyzer.simplify(place))

    return [abs(at(index) - at(None)) for index in range(len(node.iter_vars))]


def _is_copied(sch: Any, block: Any) -> bool:
    """Whether elements are stored as they are, or zeros."""
    from tvm.ir import Call
    from tvm.ir.expr import TensorLoad

    value = sch.get(block).body.value
    if isinstance(value, Call) and value.op.name == "prim.if_then_else":
        value = value.args[1]
    return isinstance(value, TensorLoad)


def _copy_within(sch: Any, block: Any, part: Any, most: int) -> None:
    """Read a block's source through a copy of what a part reads, where that is little more than it stores.

    What a part reads may be a range whose length TVM does not know as a number: then there is no copy.
    """
    trial = sch.copy()
    copy = trial.cache_read(block, 0, "global", [block])
    trial.compute_at(copy, part)
    loops = trial.get_loops(copy)[2:]
    if not all(isinstance(trial.get(loop).extent, tirx.IntImm) for loop in loops) or _size(trial, loops) > 2 * most:
        return
    copy = sch.cache_read(block, 0, "global", [block])
    sch.compute_at(copy, part)


def _compute_within(sch: Any, made: list[Any], part: Any, step: Any) -> None:
    """Compute what a block reads where it is read: for a part what is read first, the others step by step."""
    for producer in reversed(made):
        sch.compute_at(producer, part if producer is made[0] else step)
    for producer in made:
        *loops, lane = sch.get_loops(producer)
        if producer is not made[0]:
            written_out = 1
            for loop in reversed(loops[2:]):
                written_out *= int(sch.get(loop).extent)
                if written_out <= WRITTEN_OUT:
                    sch.unroll(loop)
        if _is_copied(sch, producer) or _steps(sch, producer)[-1] == 1:
            sch.vectorize(lane)
