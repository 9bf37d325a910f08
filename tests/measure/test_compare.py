"""Kernels and libraries side by side: honest figures, and no more turns than they need."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

import convgen
from convgen.errors import SpecError
from convgen.hardware.machine import machine
from convgen.kernel.kernel import CpuKernel
from convgen.measure import compare as module
from convgen.measure.compare import Contestant, Flush, compare, ratio_interval, take_turns
from convgen.measure.peers import PEERS, Entrant, OnnxRuntime, Peer
from convgen.problem.spec import ConvSpec


class Fake(Peer):
    name, package = "fake", "fake"

    @classmethod
    def version(cls) -> str | None:
        return "1.0"

    def entrants(self, spec: ConvSpec, data: Any, threads: int) -> list[Entrant]:
        return [Entrant("wrong", lambda: None, lambda: np.zeros(spec.dst_shape, np.float32))]


class Half(Fake):
    """Two ways, of which the faster one is wrong."""

    def entrants(self, spec: ConvSpec, data: Any, threads: int) -> list[Entrant]:
        (right,) = OnnxRuntime().entrants(spec, data, threads)
        return [*super().entrants(spec, data, threads), dataclasses.replace(right, way="right")]


class Broken(Fake):
    def entrants(self, spec: ConvSpec, data: Any, threads: int) -> list[Entrant]:
        raise RuntimeError("no such\noperator")


class Missing(Fake):
    @classmethod
    def version(cls) -> str | None:
        return None


def built(descriptor: str) -> CpuKernel:
    kernel = convgen.build(descriptor, threads=1, records=False)
    assert isinstance(kernel, CpuKernel)
    return kernel


def test_compare_times_only_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peer in {"fake": Fake, "broken": Broken, "missing": Missing}.items():
        monkeypatch.setitem(PEERS, name, peer)
    kernel = built("conv1d n1 ic4 oc4 i20 k3 p1")
    names = ["missing", "onnxruntime", "fake", "broken"]
    found = compare({"convgen": kernel}, names, 1, rounds=3, rest=0.0)
    assert [timing.name for timing in found.peers] == names
    problems = {timing.name: timing.problem for timing in found.peers}
    assert "pip install" in problems["missing"]
    assert "wrong output" in problems["fake"]
    assert problems["broken"] == "no such"
    (timed,) = [timing for timing in found.peers if timing.seconds]
    assert timed.name == "onnxruntime"
    assert 3 <= len(timed.rounds) <= 9
    assert found.best_peer is timed
    assert found.ratio == pytest.approx(timed.seconds / found.kernels[0].seconds)  # type: ignore[operator]
    assert compare({"convgen": kernel}, [], 1, rounds=1, rest=0.0).ratio is None


def test_of_a_library_s_ways_those_count_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "half", Half)
    found = compare({"convgen": built("conv1d n1 ic4 oc4 i20 k3 p1")}, ["half"], 1, rounds=1, rest=0.0)
    assert [(timing.way, timing.problem) for timing in found.peers] == [("right", "")]
    assert found.best_peer is found.peers[0]


def test_a_peer_is_kept_to_narrower_vectors_or_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(Fake):
        package = "narrow"
        restrictions: ClassVar = {256: {"NARROW_ISA": "AVX2"}}

        def entrants(self, spec: ConvSpec, data: Any, threads: int) -> list[Entrant]:
            assert os.environ["NARROW_ISA"] == "AVX2"
            return OnnxRuntime().entrants(spec, data, threads)

    monkeypatch.setitem(PEERS, "narrow", Narrow)
    monkeypatch.setenv("NARROW_ISA", "AVX512")  # so that it is restored
    kernel = built("conv1d n1 ic4 oc4 i20 k3 p1")

    def problems(bits: int | None) -> list[str]:
        return [
            t.problem
            for t in compare(
                {"convgen": kernel}, ["onnxruntime", "narrow"], 1, rounds=1, rest=0.0, vector_bits=bits
            ).peers
        ]

    assert problems(128) == ["cannot be restricted to vectors of 128 bits"] * 2
    assert problems(256) == ["cannot be restricted to vectors of 256 bits", ""]
    monkeypatch.setenv("NARROW_ISA", "AVX512")
    monkeypatch.setitem(sys.modules, "narrow", sys)
    assert problems(256)[1] == "was in use before it could be restricted to narrower vectors"


def test_compare_refuses_what_it_cannot_time() -> None:
    kernel = built("conv1d n0 ic4 oc4 i20 k3")
    with pytest.raises(SpecError, match="at least 1"):
        compare({"convgen": kernel}, [], 1)


def test_ratio_interval() -> None:
    assert ratio_interval([2.0] * 5, [1.0] * 5) == (2.0, 2.0)
    low, high = ratio_interval([2.0, 2.1, 1.9, 2.2, 6.0, 2.0, 2.05], [1.0, 1.1, 0.9, 1.0, 1.0, 1.05, 0.95])
    assert 1.7 < low < 2.05 < high < 2.6


# ---- turns ------------------------------------------------------------------------------------


def contestants(monkeypatch: pytest.MonkeyPatch, **scripts: list[float]) -> dict[str, Contestant]:
    """Contestants whose turns take what is written, the last value again and again. Names: library_way."""
    made = {}
    values: dict[int, Iterator[float]] = {}

    def forever(script: list[float]) -> Iterator[float]:
        yield from script
        while True:
            yield script[-1]

    for name, script in scripts.items():
        entrant = Entrant(name.partition("_")[2], lambda: None, lambda: np.zeros(1, np.float32))
        made[name] = Contestant(name.partition("_")[0], entrant, name.startswith("kernel"))
        values[id(entrant)] = forever(script)
    monkeypatch.setattr(module, "_turn", lambda entrant, flush: next(values[id(entrant)]))
    return made


def lengths(made: dict[str, Contestant]) -> dict[str, int]:
    return {name: len(one.rounds) for name, one in made.items()}


def test_only_what_may_matter_takes_part_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    made = contestants(
        monkeypatch, kernel=[1.0], kernel_default=[9.0], good=[2.0], good_other=[2.6], poor=[5.9], hopeless=[6.1]
    )
    take_turns(list(made.values()), 5)
    assert lengths(made) == {
        "kernel": 5,
        "kernel_default": 5,
        "good": 5,
        "good_other": 2,
        "poor": 5,
        "hopeless": 2,
    }


def test_more_rounds_while_the_ratio_straddles_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = contestants(monkeypatch, kernel=[1.0, 1.1], best=[1.1, 1.0], near=[1.12], far=[1.5])
    take_turns(list(made.values()), 2)
    assert lengths(made) == {"kernel": 6, "best": 6, "near": 6, "far": 2}


def test_no_more_rounds_than_settle_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disturbed round makes it wide; some more make it narrow."""
    made = contestants(monkeypatch, kernel=[1.0], best=[1.2, 2.4, 1.2])
    take_turns(list(made.values()), 3)
    (count,) = set(lengths(made).values())
    assert 3 < count < 9


def test_nobody_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    made = contestants(monkeypatch, kernel=[1.0, 2.0])
    take_turns(list(made.values()), 4)
    assert lengths(made) == {"kernel": 4}


def test_a_rest_before_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    made = contestants(monkeypatch, kernel=[1.0], kernel_default=[1.0], a=[2.0], a_other=[2.0], b=[2.0])
    rests: list[float] = []
    monkeypatch.setattr("convgen.measure.compare.time.sleep", rests.append)
    take_turns(list(made.values()), 2, rest=0.5)
    assert rests == [0.5] * 5  # kernels, a, b; then back: a, kernels


def test_threads_decide_about_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    rests = []

    def turns(ready: list[Contestant], rounds: int, rest: float, flush: object) -> None:
        rests.append(rest)
        _one_round(ready)

    monkeypatch.setattr(module, "take_turns", turns)
    kernel = built("conv1d n1 ic4 oc4 i20 k3 p1")
    for threads in (1, 2):
        compare({"convgen": kernel}, [], threads)
    assert rests == [0.0, module.REST]


def _one_round(ready: list[Contestant]) -> None:
    for one in ready:
        one.rounds.append(1.0)


# ---- cold caches ------------------------------------------------------------------------------


def test_cold_calls_find_the_caches_empty() -> None:
    """A flush before every call that is timed, after one that wakes the library."""
    log: list[str] = []
    made = [
        Contestant(name, Entrant("", functools.partial(log.append, name), lambda: np.zeros(1, np.float32)))
        for name in ("a", "b")
    ]
    take_turns(made, 1, flush=lambda: log.append("flush"))
    turns = ["a", *["flush", "a"] * module.SAMPLES, "b", *["flush", "b"] * module.SAMPLES]
    assert log[: len(turns)] == turns


def test_flush_reads_more_than_the_caches_and_leaves_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    here = dataclasses.replace(machine(), l2=4 << 10, l3=64 << 10)
    flush = Flush(here, threads=2)
    assert flush._buffer.nbytes >= 2 * here.l3  # type: ignore[operator]
    flush()
    assert os.sched_getaffinity(0) == before


def test_cold_comparison() -> None:
    kernel = built("conv1d n1 ic4 oc4 i20 k3 p1")
    found = compare({"convgen": kernel}, ["onnxruntime"], 1, rounds=1, cold=True)
    assert found.mode == "cold"
    assert found.ratio
