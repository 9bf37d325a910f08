"""Passes over tensors as functions of TIR, with one schedule for all: parallel outside, vectors inside.

On a GPU a thread has an element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..deferred import te
from ..errors import BuildError, ConvgenError
from ..hardware.target import Target
from ..lowering.compute import ACCUMULATOR, INTEGER, STORAGE, Expr, nearest_bf16, widen
from ..problem.dtypes import UNIT_ROUNDOFF
from ..problem.layout import Blocks
from .graph import ROW_MAJOR, Graph, Shape
from .kinds import INTEGER_KINDS, KINDS, kind
from .layouts import physical
from .lazy import BLOCK, Lazy, Operation, const
from .views import Group, is_number

#: Name of a stage whose last axis is computed as vectors.
_LANES = "lanes"
#: Name of what a pass computes in the end.
OUTPUT = "output"
#: Tasks for each core, below which inner loops are distributed, too.
_TASKS = 4
#: Elements below which a pass is not worth a parallel region.
PARALLEL = 1 << 13


@dataclass(frozen=True)
class Pass:
    """A group of operators without names: what its code depends on, and nothing else.

    Attributes:
        operators: kind, attributes, operands and shape of each. Operands are numbers: inputs first, then operators.
        inputs: shape, layout and dtype of each input.
        output: the same.
    """

    operators: tuple[tuple[str, tuple[tuple[str, Any], ...], tuple[int | float, ...], Shape], ...]
    inputs: tuple[tuple[Shape, str, str], ...]
    output: tuple[Shape, str, str]

    @property
    def descriptor(self) -> str:
        """For people: what is computed, a reduction by its mode, and of what shape and layout."""
        kinds = " ".join(
            f"{kind}_{dict(attributes)['mode']}" if kind == "reduce" else kind
            for kind, attributes, *_ in self.operators
        )
        shape, layout, _ = self.output
        return f"{kinds} {'x'.join(map(str, shape))} {layout}" if shape else f"{kinds} scalar"

    @property
    def flat(self) -> Pass:
        """The same with tensors of one axis, where each element is computed from those at its place: their layout means
        nothing then. Of several axes, TVM does not see that neighbours lie side by side across the ends of rows.
        """
        given = [*self.inputs, self.output]
        alike = all(pair[:2] == self.output[:2] for pair in self.inputs)
        same = all(KINDS[name].elementwise and shape == self.output[0] for name, _, _, shape in self.operators)
        if not (alike and same):
            return self
        *inputs, output = (((math.prod(shape),), ROW_MAJOR, dtype) for shape, _, dtype in given)
        operators = [(name, attributes, read, output[0]) for name, attributes, read, _ in self.operators]
        return Pass(tuple(operators), tuple(inputs), output)


def as_pass(group: Group, graph: Graph, layouts: Mapping[str, str]) -> Pass:
    """What a group computes. Constants of one element are operands that are floats."""
    numbers: dict[str, int] = {name: number for number, name in enumerate(group.inputs)}
    operators = []
    for operator in group.operators:
        operands = [
            float(graph.constants[name].reshape(())) if is_number(graph, operator, name) else numbers[name]
            for name in operator.inputs
        ]
        attributes = tuple(sorted(operator.attributes.items()))
        operators.append((operator.kind, attributes, tuple(operands), graph.shapes[operator.output]))
        numbers[operator.output] = len(numbers)
    inputs = tuple((graph.shapes[name], layouts.get(name, ROW_MAJOR), graph.dtype(name)) for name in group.inputs)
    output = graph.shapes[group.output], layouts[group.output], graph.dtype(group.output)
    return Pass(tuple(operators), inputs, output)


# ---- what is computed ---------------------------------------------------------------------------


def _input(number: int, shape: Shape, layout: str, dtype: str, stays: bool) -> tuple[te.Tensor, Lazy]:
    """A placeholder and its elements, as f32; i32, and what ``stays`` as it is stored, as themselves."""
    tensor = te.placeholder(physical(shape, layout) or (1,), STORAGE[dtype], f"input{number}")

    def at(index: Sequence[Expr]) -> Expr:
        if not index:
            index = [0]
        elif layout != ROW_MAJOR:
            index = Blocks(layout, shape[1]).order(index[0], index[1], list(index[2:]))
        element = tensor(*index)
        return element if stays else widen(element, dtype)

    return tensor, Lazy(shape, at)


def _number(value: float) -> Lazy:
    return Lazy((), lambda index: const(value), value)


def program(made: Pass) -> list[te.Tensor]:
    """Inputs and output of a pass as tensor expressions."""
    placeholders, known = [], list[Lazy]()
    stays = all(name in INTEGER_KINDS for name, *_ in made.operators) and made.output[2] not in UNIT_ROUNDOFF
    for number, given in enumerate(made.inputs):
        tensor, lazy = _input(number, *given, stays)
        placeholders.append(tensor)
        known.append(lazy)
    stages = iter(range(1 << 20))

    def stage(shape: Shape, at: Callable[..., Expr], lanes: bool = False) -> Lazy:
        tensor = te.compute(shape or (1,), at, name=f"{_LANES if lanes else 'stage'}{next(stages)}")
        return Lazy(shape, lambda index: tensor[tuple(index)])

    for position, (name, attributes, operands, shape) in enumerate(made.operators):
        read = [_number(value) if isinstance(value, float) else known[value] for value in operands]
        operation = Operation(dict(attributes), read, shape, made.output[1])
        formula = kind(name).formula(operation, stage)
        if position < len(made.operators) - 1 and KINDS[name].reduces:
            known.append(stage(shape, lambda *index, formula=formula: formula(index)))
        else:
            known.append(Lazy(shape, formula))
    shape, layout, dtype = made.output
    last = known[-1]

    def value(*index: Expr) -> Expr:
        if not shape:
            return last.at(())
        if layout == ROW_MAJOR:
            return last.at(index)
        n, channel, pixel = Blocks(layout, shape[1]).logical(index)
        return last.at((n, channel, *pixel))

    size = physical(shape, layout) or (1,)
    if KINDS[made.operators[-1][0]].reduces and dtype in UNIT_ROUNDOFF and dtype != "f32":  # a sum stands alone
        name = f"{_LANES if _vectors(made) else 'stage'}{next(stages)}"
        sums = te.compute(size, value, name=name)
        return [*placeholders, te.compute(size, lambda *i: stored(sums(*i), dtype), name=OUTPUT)]
    return [*placeholders, te.compute(size, lambda *i: stored(value(*i), dtype), name=OUTPUT)]


def stored(value: Expr, dtype: str) -> Expr:
    """An element as its tensor is stored: whole numbers of a type of integers were rounded to it before."""
    if dtype == "bf16" and str(value.ty.dtype) == ACCUMULATOR:
        return nearest_bf16(value)
    if dtype == "f32" or str(value.ty.dtype) == STORAGE[dtype]:
        return value
    if dtype == "f16":
        return value.astype(STORAGE[dtype])
    return value.astype(INTEGER).astype(STORAGE[dtype])


# ---- how it is computed -------------------------------------------------------------------------


def lowered(made: Pass, target: Target) -> Any:
    """The scheduled module, its function ``main``.

    Raises:
        BuildError: TVM refused it.
    """
    import tvm
    from tvm.s_tir import Schedule as TirSchedule

    made = made.flat
    try:
        function = te.create_prim_func(program(made)).with_attr("global_symbol", "main")
        sch = TirSchedule(tvm.IRModule({"main": function}))
        blocks = sch.get_child_blocks(sch.get_sblock("root"))
        for block in blocks:
            if target.on_device:
                _schedule_on_device(sch, block)
            else:
                _schedule(sch, block, made, target)
        return sch.mod
    except ConvgenError:
        raise
    except Exception as error:  # TVM raises its errors as many types
        raise BuildError(f"{made.descriptor}: cannot be scheduled: {error}") from error


#: Of an iteration variable: each value is computed by itself.
_DATA_PARALLEL = 0
#: Neighbours that are worth a loop within that over the elements of a sum.
_NEIGHBOURS = 4


def _schedule(sch: Any, block: Any, made: Pass, target: Target) -> None:
    """Outer loops in parallel where there is enough to do; within, those of a sum; of the innermost vectors."""
    loops = sch.get_loops(block)
    free = [int(var.iter_type) == _DATA_PARALLEL for var in sch.get(block).iter_vars]
    extents = [int(sch.get(loop).extent) for loop in loops]
    spatial = [loop for loop, is_free in zip(loops, free, strict=True) if is_free]
    sizes = [extent for extent, is_free in zip(extents, free, strict=True) if is_free]
    reduced = [loop for loop, is_free in zip(loops, free, strict=True) if not is_free]
    name = str(sch.get(block).name_hint)
    joined = _joined(made, len(spatial)) if name == OUTPUT else 1
    outer, inner = spatial[:-joined], spatial[-joined:]
    extent, columns = math.prod(sizes[-joined:]), []
    if reduced and len(outer) > 1 and math.prod(sizes[: len(outer) - 1]) >= _TASKS * target.cores:
        columns = [outer.pop()]  # a loop of its own: to find the place of a pixel takes as long as its few elements
    alike = _vectors(made) if name == OUTPUT else name.startswith(_LANES)
    width = _width(extent, target.lanes) if alike else 1
    last = sch.fuse(*inner) if len(inner) > 1 else inner[0]
    lanes = None
    if width > 1:
        last, lanes = sch.split(last, [None, width])
    rows = sch.fuse(*outer) if len(outer) > 1 else outer[0] if outer else None
    if reduced:
        is_inside = lanes is None and rows is not None and extent >= _NEIGHBOURS
        ahead = [loop for loop in (rows, *columns, None if is_inside else last) if loop is not None]
        sch.reorder(*ahead, *reduced, *([last] if is_inside else []), *([lanes] if lanes is not None else []))
    head = last if rows is None else rows
    if rows is not None and lanes is not None and math.prod(sizes[:-joined]) < _TASKS * target.cores:
        last = head = sch.fuse(rows, last)
    if lanes is not None:
        sch.vectorize(lanes)
    if math.prod(extents) >= PARALLEL:
        sch.parallel(head)
    if reduced and lanes is not None:  # sums stay in a register
        stored = sch.cache_write(block, 0, "local")
        sch.reverse_compute_at(stored, last)
        sch.vectorize(sch.get_loops(stored)[-1])
    if reduced:
        sch.decompose_reduction(block, reduced[0])


#: Threads of a block of a GPU.
_THREADS = 256


def _schedule_on_device(sch: Any, block: Any) -> None:
    """A launch whose threads have an element each, neighbours in memory beside each other."""
    free = [int(var.iter_type) == _DATA_PARALLEL for var in sch.get(block).iter_vars]
    loops = sch.get_loops(block)
    spatial = [loop for loop, is_free in zip(loops, free, strict=True) if is_free]
    reduced = [loop for loop, is_free in zip(loops, free, strict=True) if not is_free]
    sch.reorder(*spatial, *reduced)
    blocks, threads = sch.split(sch.fuse(*spatial), [None, _THREADS])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(threads, "threadIdx.x")
    if reduced:
        sums = sch.cache_write(block, 0, "local")
        sch.reverse_compute_at(sums, threads)
        sch.decompose_reduction(block, reduced[0])


def _joined(made: Pass, rank: int) -> int:
    """How many of the innermost loops are one: neighbours in memory that are computed alike."""
    shape, layout, _ = made.output
    each = all(KINDS[name].elementwise for name, *_ in made.operators)
    return rank - 2 if each and layout == ROW_MAJOR and len(shape) > 3 and _per_channel(made) else 1


def _per_channel(made: Pass) -> bool:
    """Whether inputs are tensors like the output, or have an element per channel or image."""
    shape, layout, _ = made.output
    return all(
        given[:2] == (shape, layout)
        or (math.prod(size[2 - len(shape) :]) == 1 if len(size) > len(shape) - 2 else False)
        for given, size in ((pair, pair[0]) for pair in made.inputs)
    )


def _vectors(made: Pass) -> bool:
    """Whether neighbours are computed as a vector: without conditions on which of them it is."""
    shape, layout, _ = made.output
    along = {"any", "rows" if layout == ROW_MAJOR else "channels"}
    if layout != ROW_MAJOR and shape[1] % BLOCK == 0:
        along.add("blocks")
    return all(KINDS[name].lanes in along for name, *_ in made.operators)


def _width(extent: int, lanes: int) -> int:
    """The largest power of 2, up to the target's lanes, of which the extent is a multiple; 1 where it is small."""
    width = lanes
    while extent % width:
        width //= 2
    return width if width >= 4 else 1
