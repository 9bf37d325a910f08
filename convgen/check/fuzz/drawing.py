"""The specs and candidates of a seed.

Spec ``k`` of a seed and its candidates depend on the seed, ``k``, the target and the schedules there are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ...errors import SpecError, UnsupportedError
from ...hardware.target import Target
from ...lowering.candidates import default_candidate
from ...lowering.discover import schedule as find_schedule
from ...lowering.discover import schedules, schedules_of
from ...lowering.schedule import Picks, Schedule
from ...problem.dtypes import DTYPES
from ...problem.spec import ConvSpec
from ..random_specs import SMALL, Seeded, Source, in_a_direction, input_size, near_tiles, random_spec
from .cases import Case, SeededCase

#: Specs drawn for a schedule until it applies; points of a space until one is valid.
DRAWS = 6000

#: What the draw is weighted towards.
FEATURES: dict[str, Callable[[ConvSpec], bool]] = {
    "batch 0": lambda s: s.n == 0,
    "batch 1": lambda s: s.n == 1,
    "batch 2": lambda s: s.n == 2,
    "one channel": lambda s: 1 in (s.ic, s.oc),
    "one pixel": lambda s: 1 in (math.prod(s.in_spatial), s.out_pixels),
    "groups = 1": lambda s: s.groups == 1,
    "groups in between": lambda s: 1 < s.groups < s.ic,
    "groups = ic": lambda s: s.is_depthwise,
    "kernel = input": lambda s: s.kernel == s.in_spatial,
    "stride > kernel": lambda s: any(t > k for t, k in zip(s.stride, s.kernel, strict=True)),
    "dilation past the input": lambda s: any(
        k > 1 and d > i for k, d, i in zip(s.kernel, s.dilation, s.in_spatial, strict=True)
    ),
    "padding > kernel": lambda s: any(max(p) > k for p, k in zip(s.padding, s.kernel, strict=True)),
    "gradient of src": lambda s: s.direction == "data",
    "gradient of weights": lambda s: s.direction == "weights",
    "asymmetric padding": lambda s: any(begin != end for begin, end in s.padding),
}


@dataclass(frozen=True)
class Draw:
    """A spec, the candidates to check, and what could not be drawn, with the reason."""

    spec: ConvSpec
    cases: tuple[Case, ...]
    skipped: tuple[str, ...]

    @property
    def operators(self) -> tuple[str, ...]:
        return (self.spec.operator,)

    @property
    def dtypes(self) -> tuple[str, ...]:
        return (self.spec.dtype,)

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(name for name, has in FEATURES.items() if has(self.spec))


def draw(
    seed: int,
    index: int,
    target: Target,
    *,
    threads: int | None = None,
    schedule: str | None = None,
    directions: Sequence[str] = (),
    seeds: int = 0,
) -> Draw:
    """Spec ``index`` of a seed with its candidates.

    A schedule is drawn first and then specs until it applies, so that each is reached equally often. The candidates:
    the layer's default; that schedule's default and a random valid point; and one of any schedule that applies.
    Defaults that are not valid, and a reference that does not apply, are candidates too: checking them fails.

    Args:
        threads: of the kernels; drawn where None.
        schedule: the only one to draw candidates of.
        directions: of the layers, which are of floats where ``forward`` is not among them; mostly that where empty.
        seeds: where not 0, layers of integers alone, whose values are checked with the data of so many seeds; of each
            the default candidate and a random point of the schedule's that was drawn.
    """
    rng = random.Random(f"{seed} {index}")
    if seeds:
        return _integers(rng, target, threads, schedule, seeds)
    wanted = find_schedule(schedule or rng.choice(_schedules(target, directions)))
    spec, why = _spec_for(Seeded(rng), wanted, target, directions)
    skipped = [f"{wanted.id} applies to none of {DRAWS} specs: {why}"] if why else []
    core = spec.core
    applicable = [s for s in schedules().values() if s.reason_against(core, target) is None]

    common = Case(spec, target.spelling, threads or rng.choice((2, 3, 3, 5)), rng.randrange(1000))
    cases = [] if schedule else _default_cases(common, applicable, target)
    if wanted in applicable:
        cases.append(replace(common, schedule=wanted.id, picks=wanted.default(core, target)))
        for chosen in (wanted, wanted if schedule else rng.choice(applicable)):
            picks = _valid_picks(rng, chosen, core, target)
            if picks is None:
                skipped.append(f"{chosen.id}: none of {DRAWS} points of a space is valid")
            else:
                cases.append(replace(common, schedule=chosen.id, picks=picks))
    return Draw(spec, tuple(dict.fromkeys(cases)), tuple(skipped))


def _integers(rng: random.Random, target: Target, threads: int | None, schedule: str | None, seeds: int) -> Draw:
    """A layer of integers: its default, and a random point of a schedule that applies, or of one, with other data."""
    source, why = Seeded(rng), None
    if schedule:
        spec, why = _spec_for(source, find_schedule(schedule), target, (), integers=True)
    else:
        spec = random_spec(source, SMALL, (target.vector_bits // 32,), ("i8",))
    common = SeededCase(spec, target.spelling, threads or rng.choice((2, 3, 3, 5)), rng.randrange(1000), seeds=seeds)
    core = spec.core
    chosen = [s for s in schedules().values() if s.reason_against(core, target) is None and schedule in (None, s.id)]
    cases = []
    if not schedule:
        best = default_candidate(spec, target)
        cases.append(replace(common, schedule=best.schedule.id, picks=best.picks))
    if chosen and (picks := _valid_picks(rng, wanted := rng.choice(chosen), core, target)) is not None:
        cases.append(replace(common, schedule=wanted.id, picks=picks, seed=common.seed + seeds))
    skipped = (f"{schedule} applies to none of {DRAWS} specs: {why}",) if why else ()
    return Draw(spec, tuple(cases), skipped)


def _schedules(target: Target, directions: Sequence[str]) -> list[str]:
    """The schedules that layers of these directions may have: a gradient of src is a forward layer."""
    needed = {"forward" if direction == "data" else direction for direction in directions}
    known = schedules_of(target.kind)
    return [
        name
        for name, schedule in known.items()
        if not needed
        or (needed & set(schedule.directions) and not (schedule.only_integers and "forward" not in directions))
    ]


def _spec_for(
    source: Source, schedule: Schedule, target: Target, directions: Sequence[str], *, integers: bool = False
) -> tuple[ConvSpec, str | None]:
    """A spec that the schedule applies to and None; or the last one drawn, and why it does not apply to that."""
    lanes = (target.vector_bits // 32,)
    for _ in range(DRAWS):
        layer = random_spec(source, SMALL, lanes, ("i8",) if integers else DTYPES)
        if layer.is_quantised and directions and "forward" not in directions:
            continue
        spec = in_a_direction(source, layer, directions)
        why = schedule.reason_against(spec.core, target)
        if why is not None:
            loosened = _loosened(spec, directions, integers=integers or schedule.only_integers)
            loose = next((one for one in loosened if schedule.reason_against(one.core, target) is None), None)
            if loose is not None:
                spec, why = loose, None
        if why is None:
            return _beside_tiles(source, spec, schedule, target), None
    return spec, why


def _loosened(spec: ConvSpec, directions: Sequence[str], *, integers: bool) -> Iterator[ConvSpec]:
    """Layers like a spec that are likelier to be one of a schedule's: less accurate and of floats, or of integers."""
    if not integers:
        yield spec.with_(accuracy="relaxed", dtype="f32" if spec.dtype == "i8" else spec.dtype)
        yield spec.with_(accuracy="bf16", dtype="f32", direction=spec.direction if directions else "forward")
    elif not (spec.is_quantised or spec.direction != "forward" or spec.mirrored):
        yield spec.with_(dtype="i8", accuracy="standard", activation="none", residual=False)


def _default_cases(common: Case, applicable: Sequence[Schedule], target: Target) -> list[Case]:
    """The layer's default candidate, and what must be valid for every layer and is not."""
    spec = common.spec
    try:
        best = default_candidate(spec, target)
        cases = [replace(common, schedule=best.schedule.id, picks=best.picks)]
    except UnsupportedError:
        cases = [common]
    if find_schedule("reference") not in applicable:
        cases.append(replace(common, schedule="reference"))
    for schedule in applicable:
        default = schedule.default(spec.core, target)
        if schedule.reason_against(spec.core, target, default):
            cases.append(replace(common, schedule=schedule.id, picks=default))
    return cases


def _valid_picks(rng: random.Random, schedule: Schedule, core: ConvSpec, target: Target) -> Picks | None:
    """A random valid point of the schedule's space; None where none was met."""
    space = schedule.space(core, target)
    points = (space.sample(rng) for _ in range(DRAWS))
    return next((p for p in points if schedule.reason_against(core, target, p) is None), None)


def _beside_tiles(source: Source, spec: ConvSpec, schedule: Schedule, target: Target) -> ConvSpec:
    """The spec with sizes at and beside multiples of the schedule's own numbers, where it still applies."""
    domains = schedule.space(spec.core, target).domains.values()
    tiles = [v for v in dict.fromkeys(v for values in domains for v in values) if type(v) is int and v > 1]
    if not tiles:
        return spec
    for _ in range(8):
        changes: dict[str, Any] = {}
        if source.chance(70):
            ic, oc = (near_tiles(source, tiles, SMALL.channels) for _ in range(2))
            if spec.is_depthwise:
                changes = {"ic": ic, "groups": ic, "oc": ic * (spec.oc // spec.ic)}
            else:
                changes = {"ic": ic * spec.groups, "oc": oc * spec.groups}
        if source.chance(60):
            changes["in_spatial"] = tuple(
                input_size(
                    source, near_tiles(source, tiles, SMALL.pixels[spec.rank]), *axis, transposed=spec.transposed
                )
                for axis in zip(spec.kernel, spec.stride, spec.dilation, spec.padding, strict=True)
            )
        with suppress(SpecError):
            changed = spec.with_(**changes)
            if SMALL.admit(changed) and schedule.reason_against(changed.core, target) is None:
                return changed
    return spec
