"""Tuning without compiling or timing: schedules, workers and a clock that answer as told."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from convgen.hardware.target import Target
from convgen.lowering.schedule import Candidate, Picks, Schedule, Space
from convgen.measure.trial import Expected
from convgen.measure.workers import Builder, Pools, Runner
from convgen.problem.spec import ConvSpec
from convgen.records.outcome import Result
from convgen.tuning.context import SearchContext

#: Where schedules are looked up.
LOOKUPS = ("lowering.candidates", "records.answer", "tuning.race", "tuning.ranker")
MODULES = [importlib.import_module(f"convgen.{name}") for name in LOOKUPS]


class FakeSchedule(Schedule):
    """A space of one pick ``x``."""

    id, version = "fake", 1

    def __init__(self, name: str = "fake", size: int = 20, cost: float = 1e-3) -> None:
        self.id, self.size, self._cost = name, size, cost  # type: ignore[misc]

    def applies(self, spec: ConvSpec, target: Target) -> None:
        pass

    def takes_layouts(self, src: str, dst: str) -> bool:
        return True

    def space(self, spec: ConvSpec, target: Target) -> Space:
        return Space(x=list(range(self.size)))

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return Picks(x=0)

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return self._cost

    def program(self, *_: Any) -> Any:
        raise AssertionError("nothing is compiled here")

    apply = program


#: What a fake worker is told: the layer's descriptor, the schedule's id and ``x``.
Speed = Callable[[str, str, int], float | str]


class Clock:
    """Time that passes when something is measured or compiled."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def done(value: Any) -> Future[Any]:
    answer: Future[Any] = Future()
    answer.set_result(value)
    return answer


class FakeBuilder(Builder):
    """Compiles at once; ``seconds`` of the clock for each."""

    def __init__(self, clock: Clock, seconds: float, workers: int = 2) -> None:
        self.clock, self.seconds, self.workers = clock, seconds, workers
        self.root = Path("/nowhere")
        self.modules: list[Any] = []

    def submit(self, module: Any) -> Future[str | Result]:
        self.clock.now += self.seconds
        self.modules.append(module)
        return done(f"/nowhere/{module}/lib.so")

    def close(self) -> None:
        pass


class FakeRunner(Runner):
    """Takes ``seconds`` of the clock for each trial; a speed that is text is how the trial fails."""

    def __init__(self, clock: Clock, speed: Speed, seconds: float, isolated: bool = False, devices: int = 1) -> None:
        self.clock, self.speed, self.seconds = clock, speed, seconds
        self.isolated, self.devices = isolated, devices
        self.trials: list[tuple[str, str, int]] = []
        self.duels: list[list[tuple[str, str, int]]] = []
        self.duel_speed = speed
        #: Of an instance in a chain, and the chains that ran: of each choice what ran.
        self.chain_speed = speed
        self.chained: list[list[list[tuple[str, str, int]]]] = []

    @staticmethod
    def what(path: str) -> tuple[str, str, int]:
        descriptor, schedule, x = json.loads(path.removeprefix("/nowhere/").removesuffix("/lib.so"))
        return descriptor, schedule, x

    def submit(
        self, path: str, expected: Expected, threads: int, *, seconds: float, hopeless: float = 0.0
    ) -> Future[Result]:
        self.clock.now += self.seconds
        self.trials.append(self.what(path))
        answer = self.speed(*self.trials[-1])
        return done(Result(answer, error="planted") if isinstance(answer, str) else Result("ok", (answer,) * 5))

    def duel(self, paths: Sequence[str], expected: Expected, threads: int, rounds: int) -> Future[Any]:
        self.clock.now += self.seconds
        self.duels.append([self.what(path) for path in paths])
        return done([[float(self.duel_speed(*found))] * rounds for found in self.duels[-1]])

    def chains(
        self, order: Sequence[ConvSpec], choices: Sequence[Mapping[ConvSpec, str]], threads: int, rounds: int
    ) -> Future[Any]:
        self.clock.now += self.seconds
        self.chained.append([[self.what(choice[spec]) for spec in order] for choice in choices])
        return done([[[float(self.chain_speed(*what)) for what in run]] * rounds for run in self.chained[-1]])

    def close(self) -> None:
        pass


def fake_pools(
    speed: Speed, *, clock: Clock | None = None, build: float = 1.0, run: float = 0.5, **options: Any
) -> Pools:
    """Workers for :func:`fake_tuning`."""
    clock = clock or Clock()
    return Pools(FakeBuilder(clock, build), FakeRunner(clock, speed, run, **options))


def fake_tuning(patch: pytest.MonkeyPatch, *schedules: FakeSchedule) -> None:
    """Let these schedules be all there are, and nothing be lowered or prepared."""
    found = {schedule.id: schedule for schedule in schedules or (FakeSchedule(),)}
    for module in MODULES:
        if hasattr(module, "schedules"):
            patch.setattr(module, "schedules", lambda: found)
        if hasattr(module, "find_schedule"):
            patch.setattr(module, "find_schedule", found.__getitem__)

    def text(spec: ConvSpec, target: Target, candidate: Candidate) -> str:
        return json.dumps([spec.descriptor, candidate.schedule.id, candidate.picks.x])

    for name in ("rounds", "final"):
        patch.setattr(importlib.import_module(f"convgen.tuning.{name}"), "candidate_module", text)
    patch.setattr(SearchContext, "expected", lambda self, spec: None)
