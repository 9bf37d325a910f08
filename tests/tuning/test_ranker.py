"""The cost model: what it predicts with and without records, and what it hands on between layers."""

from __future__ import annotations

import importlib
import math
import random
from pathlib import Path
from typing import Any

import pytest
from race_fakes import Fake

from convgen.hardware.target import Target, resolve
from convgen.lowering.candidates import default_candidate
from convgen.lowering.schedule import Candidate, Picks
from convgen.problem.spec import ConvSpec
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.tuning.ranker import WINNERS, Ranker

LAYER = ConvSpec.parse("conv2d n1 ic64 oc64 i28x28 k3x3 p1")
ALIKE = ConvSpec.parse("conv2d n1 ic96 oc64 i28x28 k3x3 p1")
OTHER = ConvSpec.parse("conv1d n1 ic1 oc512 i32000 k16 s8 p8")

SIZES = [1, 2, 4, 8, 16]
FAST, SLOW = Fake("fast", 1e-4, tile_x=SIZES, tile_y=SIZES), Fake("slow", 3e-4, tile_x=SIZES)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """The schedules that records may name."""
    found = {schedule.id: schedule for schedule in (FAST, SLOW)}
    monkeypatch.setattr(importlib.import_module("convgen.tuning.ranker"), "schedules", lambda: found)
    return found


def at(x: int = 1, y: int = 1) -> Candidate:
    return Candidate(FAST, Picks(tile_x=x, tile_y=y))


ALL = [at(x, y) for x in SIZES for y in SIZES]


def record(spec: ConvSpec, candidate: Candidate, seconds: float | None, /, **fields: Any) -> TuningRecord:
    target = resolve()
    values: dict[str, Any] = {
        "spec": spec.descriptor,
        "target": target.spelling,
        "hardware": target.hardware,
        "threads": 2,
        "schedule": candidate.schedule.id,
        "schedule_version": candidate.schedule.version,
        "picks": dict(candidate.picks),
        "outcome": "crash" if seconds is None else "ok",
        "seconds": seconds,
        "versions": {"convgen": "0"},
    }
    return TuningRecord(**values | fields)


def taught(*records: TuningRecord) -> Ranker:
    ranker = Ranker(resolve(), 2)
    for one in records:
        ranker.learn(one)
    return ranker


def best_of(ranker: Ranker, spec: ConvSpec = LAYER) -> Candidate:
    scores = ranker.predict(spec, ALL)
    return ALL[scores.index(min(scores))]


# ---- without records ----------------------------------------------------------------------------


def test_without_records_the_schedules_own_costs_rank(tmp_path: Path) -> None:
    slow = Candidate(SLOW, Picks(tile_x=1))
    candidates = [at(16, 16), slow, at(1, 2), at()]
    with RecordStore(tmp_path / "empty.sqlite") as empty:
        for store in (None, empty):
            scores = Ranker.from_store(store, resolve(), 2).predict(LAYER, candidates)
            assert scores[3] < scores[2] < scores[0]  # the default, one step off it, eight
            assert scores[3] < scores[1]
            assert Ranker.from_store(store, resolve(), 2).similar(LAYER) == []


def test_no_candidates_no_predictions() -> None:
    ranker = taught(record(LAYER, at(), 1e-4))
    assert Ranker(resolve(), 2).predict(LAYER, []) == []
    assert ranker.predict(LAYER, []) == []


# ---- with records of the layer ------------------------------------------------------------------


def test_what_was_measured_is_predicted() -> None:
    times = {at(): 1e-4, at(2, 1): 0.8e-4, at(4, 1): 0.5e-4, at(1, 4): 2e-4}
    ranker = taught(*(record(LAYER, c, s) for c, s in times.items()))
    predicted = ranker.predict(LAYER, list(times))
    assert max(abs(p - math.log(s)) for p, s in zip(predicted, times.values(), strict=True)) < 0.35
    assert sorted(predicted) == [predicted[i] for i in (2, 1, 0, 3)]


def test_what_is_near_a_fast_one_is_predicted_to_be_fast() -> None:
    ranker = taught(*(record(LAYER, at(x, 1), 1e-4 / x) for x in (1, 2, 4, 8)))
    near, far = ranker.predict(LAYER, [at(8, 2), at(1, 2)])
    assert near < far
    assert best_of(ranker).picks.tile_x >= 8


def test_what_fails_is_ranked_behind_what_was_not_tried() -> None:
    before = Ranker(resolve(), 2).predict(LAYER, [at(4, 4), at(16, 16)])
    ranker = taught(record(LAYER, at(), 1e-4), record(LAYER, at(4, 4), None))
    after = ranker.predict(LAYER, [at(4, 4), at(16, 16)])
    assert before[0] < before[1]
    assert after[0] > after[1]


def test_uncertainty_shrinks_where_there_is_a_measurement() -> None:
    _, before = taught(record(LAYER, at(), 1e-4)).posterior(LAYER, [at(4, 4), at(8, 1)])
    _, after = taught(record(LAYER, at(), 1e-4), record(LAYER, at(4, 4), 1e-4)).posterior(LAYER, [at(4, 4), at(8, 1)])
    assert after[0, 0] < 0.5 * before[0, 0]
    assert after[0, 0] < after[1, 1]


def test_a_trial_heard_of_twice_counts_once() -> None:
    records = [record(LAYER, at(x), 1e-4 / x) for x in (1, 2, 4)]
    once, twice = taught(*records), taught(*records, *records)
    for x in (1, 2, 4):
        twice.observe(LAYER, at(x), 1e-4 / x)
    assert once.predict(LAYER, ALL) == twice.predict(LAYER, ALL)


def test_the_same_records_predict_the_same() -> None:
    records = [record(spec, c, 1e-4 * (1 + i % 5)) for spec in (LAYER, ALIKE) for i, c in enumerate(ALL)]
    assert taught(*records).predict(LAYER, ALL) == taught(*records).predict(LAYER, ALL)


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule_version": 2},
        {"schedule": "gone"},
        {"target": "cpu:another"},
        {"spec": "conv9d what"},
        {"picks": {"tile_x": 1}},
        {"picks": {"tile_x": 3, "tile_y": 1}},
    ],
    ids=["version", "schedule", "target", "spec", "a pick less", "not in the space"],
)
def test_records_that_mean_something_else_say_nothing(fields: dict[str, Any]) -> None:
    ranker = taught(record(LAYER, at(), 5e-4, **fields))
    assert ranker.predict(LAYER, ALL) == Ranker(resolve(), 2).predict(LAYER, ALL)
    assert ranker.similar(ALIKE) == []


def test_where_measurements_scatter_they_leave_more_open() -> None:
    """Nobody says how noisy the machine is: the measurements do."""
    rng = random.Random(0)
    steady = taught(*(record(LAYER, c, 1e-4 * (1 + 0.1 * math.log2(c.picks["tile_x"]))) for c in ALL))
    scattered = taught(*(record(LAYER, c, 1e-4 * math.exp(rng.gauss(0, 0.5))) for c in ALL))
    (_, known), (_, open_) = steady.posterior(LAYER, ALL), scattered.posterior(LAYER, ALL)
    assert all(open_[i, i] > 2 * known[i, i] for i in range(len(ALL)))


# ---- between layers -------------------------------------------------------------------------------


def test_what_a_layer_gained_carries_over_to_one_like_it() -> None:
    """The layer that was measured is faster the larger tile_x is: against what its schedule says by itself."""
    records = [record(ALIKE, at(x, y), 1e-4 / x) for x in SIZES for y in SIZES[:3]]
    assert best_of(Ranker(resolve(), 2)) == at()
    assert best_of(taught(*records)).picks.tile_x > 1
    apart = [record(OTHER, at(x, y), 1e-4 / x) for x in SIZES for y in SIZES[:3]]

    def gain(ranker: Ranker) -> float:
        default, moved = ranker.predict(LAYER, [at(), at(8)])
        return default - moved

    assert gain(taught(*records)) > gain(taught(*apart)) + 0.05


def test_winners_of_similar_layers_and_other_thread_counts() -> None:
    records = [record(LAYER, at(x), 1e-4 / x, threads=1) for x in (1, 2, 8)]
    assert taught(*records).similar(LAYER) == [at(8)]
    records += [record(ALIKE, at(1, y), 1e-4 / y) for y in (1, 4)]
    assert taught(*records).similar(LAYER) == [at(8), at(1, 4)]  # the same layer is the more alike
    assert taught(*(record(OTHER, at(x), 1e-4 / x) for x in (1, 2, 8))).similar(LAYER) == []
    assert taught(*(record(ALIKE, at(x), None) for x in (1, 2, 8))).similar(LAYER) == []
    many = [record(ALIKE.with_(ic=96 + i), at(2, SIZES[i % 5]), 1e-4) for i in range(10)]
    assert 1 <= len(taught(*many).similar(LAYER)) <= WINNERS


def test_a_winner_is_adapted_to_the_layer() -> None:
    class Wide(Fake):
        """Its tiles depend on the layer, and so does its default."""

        def space(self, spec: ConvSpec, target: Target) -> Any:
            return Fake("", tile_x=[spec.ic // 32, spec.ic // 16, spec.ic], order=["a", "b"])._space

        def default(self, spec: ConvSpec, target: Target) -> Picks:
            return Picks(tile_x=spec.ic // 32, order="a")

    wide = Wide("wide", 1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("convgen.tuning.ranker"), "schedules", lambda: {"wide": wide})
        default = Candidate(wide, Picks(tile_x=3, order="b"))
        assert taught(record(ALIKE, default, 1e-4)).similar(LAYER) == [Candidate(wide, Picks(tile_x=2, order="b"))]
        moved = Candidate(wide, Picks(tile_x=6, order="a"))
        assert taught(record(ALIKE, moved, 1e-4)).similar(LAYER) == [Candidate(wide, Picks(tile_x=4, order="a"))]


def test_a_winner_that_is_not_valid_here_is_left_out(fakes: dict[str, Fake]) -> None:
    odd = Fake("odd", 1e-4, lambda picks: picks.tile_x != 8, tile_x=SIZES)
    fakes["odd"] = odd
    assert taught(record(ALIKE, Candidate(odd, Picks(tile_x=8)), 1e-4)).similar(LAYER) == []


# ---- from a store -----------------------------------------------------------------------------------


def test_a_store_teaches_of_every_thread_count_and_machine(tmp_path: Path) -> None:
    with RecordStore(tmp_path / "records.sqlite") as store:
        for i, x in enumerate(SIZES):
            store.add(record(ALIKE, at(x), 1e-4 / x, threads=1 + i % 2, hardware=f"machine {i % 3}"))
        ranker = Ranker.from_store(store, resolve(), 2)
        assert best_of(ranker).picks.tile_x > 1
        assert ranker.similar(LAYER)


def test_real_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of a real layer, and all the neighbours of it that are valid, get finite and different scores."""
    from convgen.lowering.discover import schedules

    monkeypatch.setattr(importlib.import_module("convgen.tuning.ranker"), "schedules", schedules)
    target = resolve()
    default = default_candidate(LAYER, target)
    space = default.schedule.space(LAYER.core, target)
    near = [
        Candidate(default.schedule, picks)
        for picks in space.neighbours(default.picks)
        if default.schedule.reason_against(LAYER.core, target, picks) is None
    ]
    with RecordStore(tmp_path / "records.sqlite") as store:
        store.add(record(LAYER, default, 1e-4))
        store.add(record(LAYER, near[0], 0.5e-4))
        scores = Ranker.from_store(store, target, 2).predict(LAYER, [default, *near])
    assert all(math.isfinite(score) for score in scores)
    assert len(set(scores)) > len(scores) // 4
    assert scores[1] < scores[0]
