"""Making a failing case as simple as it can be while it fails in the same way.

One field or pick at a time is made simpler, after Zeller & Hildebrandt, *Simplifying and Isolating Failure-Inducing
Input*, IEEE TSE 28(2), 2002.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ...errors import SpecError
from ...hardware.target import Target
from ...lowering.discover import schedule as find_schedule
from ...lowering.schedule import Picks
from ...problem.layout import BLOCKS, Blocks
from ...problem.spec import TYPES, ConvSpec
from .cases import Case, SeededCase

T = TypeVar("T", bound=Hashable)
Step = Callable[[T], Iterable[T]]


def shrink(value: T, steps: Sequence[Step[T]], fails: Callable[[T], bool], until: float = math.inf) -> T:
    """The simplest value that ``steps`` lead to and that still ``fails``.

    A step gives simpler values, the simplest first. It is repeated while one of them fails, and so are all steps
    in turn, until none helps or the clock says ``until``. Nothing is tried twice.
    """
    tried = {value}

    def simpler(step: Step[T]) -> T | None:
        for candidate in step(value):
            if candidate not in tried and time.monotonic() < until:
                tried.add(candidate)
                if fails(candidate):
                    return candidate
        return None

    before = None
    while before != value:
        before = value
        for step in steps:
            while (found := simpler(step)) is not None:
                value = found
    return value


Changes = dict[str, Any]


def _smaller(value: int, least: int) -> list[int]:
    """Down to ``least``: that itself, the middle, one less."""
    return [v for v in dict.fromkeys((least, (least + value) // 2, value - 1)) if least <= v < value]


def _plain(name: str, neutral: Any) -> Callable[[ConvSpec], Iterator[Changes]]:
    """A field at its neutral value."""

    def step(spec: ConvSpec) -> Iterator[Changes]:
        if getattr(spec, name) != neutral:
            yield {name: neutral}

    return step


def _epilogue(spec: ConvSpec) -> Iterator[Changes]:
    yield {"bias": False, "residual": False, "activation": "none"}
    yield {"residual": False}
    yield {"activation": "none"}
    yield {"bias": False}


#: What an i8 layer is without types and zero points of single tensors.
ALL_I8: Changes = dict.fromkeys(TYPES, "") | {"src_zero": False, "weights_zero": False, "dst_zero": False}


def _storage(spec: ConvSpec) -> Iterator[Changes]:
    """f32; of integers all of one type without zero points, then less of these."""
    if spec.dtype != "f32":
        yield {**ALL_I8, "dtype": "f32"}
    if spec.is_quantised:
        yield ALL_I8
        yield from ({name: plain} for name, plain in ALL_I8.items())


SPATIAL = ("in_spatial", "kernel", "stride", "padding", "dilation", "output_padding")


def _fewer_axes(spec: ConvSpec) -> Iterator[Changes]:
    for axis in range(spec.rank if spec.rank > 1 else 0):
        yield {name: (v := getattr(spec, name))[:axis] + v[axis + 1 :] for name in SPATIAL}


def _not_transposed(spec: ConvSpec) -> Iterator[Changes]:
    if spec.transposed:
        yield {"transposed": False, "output_padding": (0,) * spec.rank}


def _layouts(spec: ConvSpec) -> Iterator[Changes]:
    """One layout of both, the plainest first, then a plainer one of each."""
    known = list(BLOCKS)
    src, dst = known.index(spec.layout), known.index(spec.dst_layout)
    both = known[: max(src, dst) + (src != dst)]
    yield from ({"layout": layout, "dst_layout": layout} for layout in both)
    if src != dst:
        yield from ({"layout": layout} for layout in known[:src])
        yield from ({"dst_layout": layout} for layout in known[:dst])


def _groups(spec: ConvSpec) -> Iterator[Changes]:
    ic, oc = spec.ic // spec.groups, spec.oc // spec.groups
    for groups in _smaller(spec.groups, 1):
        yield {"groups": groups, "ic": ic * groups, "oc": oc * groups}
    if spec.groups > 1 and not (spec.src_blocks.is_plain and spec.dst_blocks.is_plain):
        yield {"groups": 1}  # fewer channels may be no whole blocks


def _channels_of(name: str) -> Callable[[ConvSpec], Iterator[Changes]]:
    def step(spec: ConvSpec) -> Iterator[Changes]:
        blocks = Blocks(*((spec.layout, spec.ic) if name == "ic" else (spec.dst_layout, spec.oc)))
        unit = spec.groups if blocks.layout == "nhwc" else math.lcm(spec.groups, blocks.size)
        for count in _smaller(getattr(spec, name) // unit, 1):
            yield {name: count * unit}

    return step


def _axis_by_axis(name: str, least: int) -> Callable[[ConvSpec], Iterator[Changes]]:
    """Smaller numbers along all axes, then along one."""

    def step(spec: ConvSpec) -> Iterator[Changes]:
        values = getattr(spec, name)
        yield {name: (least,) * spec.rank}
        for axis in range(spec.rank):
            for value in _smaller(values[axis], least):
                yield {name: (*values[:axis], value, *values[axis + 1 :])}

    return step


def _less_padding(spec: ConvSpec) -> Iterator[Changes]:
    yield {"padding": ((0, 0),) * spec.rank}
    for axis, (begin, end) in enumerate(spec.padding):
        for pair in [(b, end) for b in _smaller(begin, 0)] + [(begin, e) for e in _smaller(end, 0)]:
            yield {"padding": (*spec.padding[:axis], pair, *spec.padding[axis + 1 :])}


def _kernel_with_input(spec: ConvSpec) -> Iterator[Changes]:
    """One tap along an axis, and an input that is smaller by the taps that went: the output keeps its size."""
    for axis, (size, window) in enumerate(zip(spec.in_spatial, spec.window, strict=True)):
        if not spec.transposed and 1 < window <= size:
            yield {
                "kernel": (*spec.kernel[:axis], 1, *spec.kernel[axis + 1 :]),
                "in_spatial": (*spec.in_spatial[:axis], size - window + 1, *spec.in_spatial[axis + 1 :]),
            }


SPEC_STEPS: tuple[Callable[[ConvSpec], Iterable[Changes]], ...] = (
    _epilogue,
    _storage,
    _layouts,
    _plain("accuracy", "standard"),
    _plain("direction", "forward"),
    _plain("n", 1),
    _fewer_axes,
    _not_transposed,
    _groups,
    _axis_by_axis("output_padding", 0),
    _axis_by_axis("stride", 1),
    _axis_by_axis("dilation", 1),
    _less_padding,
    _axis_by_axis("kernel", 1),
    _kernel_with_input,
    _axis_by_axis("in_spatial", 1),
    _channels_of("ic"),
    _channels_of("oc"),
)


def case_steps(target: Target) -> list[Step[Case]]:
    """The steps from a case to simpler ones: its spec, its picks, its threads and seed."""

    def of_spec(step: Callable[[ConvSpec], Iterable[Changes]]) -> Step[Case]:
        def simpler(case: Case) -> Iterator[Case]:
            for changes in step(case.spec):
                with suppress(SpecError):
                    yield from _refitted(replace(case, spec=case.spec.with_(**changes)), target)

        return simpler

    return [_one_seed, *map(of_spec, SPEC_STEPS), partial(_simpler_picks, target=target), _simpler_run]


def _refitted(case: Case, target: Target) -> Iterator[Case]:
    """The case with picks of its spec's own space: the nearest to those it has, and the default."""
    core = case.spec.core
    schedule = find_schedule(case.schedule) if case.schedule else None
    if schedule is None or case.picks is None:
        yield case
    elif schedule.reason_against(core, target) is None:
        default = schedule.default(core, target)
        domains = schedule.space(core, target).domains
        near = Picks(**{name: _nearest(values, case.picks.get(name)) for name, values in domains.items()})
        if schedule.reason_against(core, target, near) is None:
            yield replace(case, picks=near)
        yield replace(case, picks=default)


def _nearest(values: Sequence[Any], wanted: Any) -> Any:
    below = [v for v in values if type(v) is type(wanted) is int and v <= wanted]
    return wanted if wanted in values else max(below, default=values[0])


def _simpler_picks(case: Case, target: Target) -> Iterator[Case]:
    """The default, then earlier values of the domains."""
    if not case.schedule or not case.picks:
        return
    schedule, core = find_schedule(case.schedule), case.spec.core
    yield replace(case, picks=schedule.default(core, target))
    for name, values in schedule.space(core, target).domains.items():
        present = case.picks[name]
        for value in values[: values.index(present) if present in values else None]:
            picks = case.picks.replace(**{name: value})
            if schedule.reason_against(core, target, picks) is None:
                yield replace(case, picks=picks)


def _one_seed(case: Case) -> Iterator[Case]:
    """Of several seeds, one after another alone."""
    if isinstance(case, SeededCase) and case.seeds > 1:
        yield from (replace(case, seed=seed, seeds=1) for seed in range(case.seed, case.seed + case.seeds))


def _simpler_run(case: Case) -> Iterator[Case]:
    yield replace(case, seed=0)
    yield from (replace(case, threads=threads) for threads in (1, 2) if threads < case.threads)
