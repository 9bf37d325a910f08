"""What the search tries next, on spaces made up for it: nothing is compiled or timed."""

from __future__ import annotations

import importlib
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from race_fakes import Fake

from convgen.errors import UnsupportedError
from convgen.hardware.target import resolve
from convgen.lowering import candidates
from convgen.lowering.schedule import Candidate, Picks
from convgen.problem.spec import ConvSpec
from convgen.records.outcome import Result
from convgen.tuning import race as race_module
from convgen.tuning.race import BEHIND, ROUND, TRIES, Race
from convgen.tuning.ranker import Ranker

LAYER = ConvSpec.parse("conv1d n1 ic4 oc4 i20 k3")


def race(*schedules: Fake, seed: int = 0, **options: Any) -> Race:
    found = {schedule.id: schedule for schedule in schedules}
    with pytest.MonkeyPatch.context() as patch:
        for module in (race_module, candidates):
            patch.setattr(module, "schedules", lambda: found)
        return Race(LAYER, resolve(), 2, seed, **options)


def divisible(modulus: int) -> Callable[[Picks], bool]:
    """Whether the sum of a point's numbers is."""
    return lambda picks: sum(map(int, picks.values())) % modulus == 0


def ok(seconds: float) -> Result:
    return Result("ok", (seconds,))


# ---- what comes first -------------------------------------------------------------------------


def test_the_zero_trial_answer_comes_first_then_the_other_defaults() -> None:
    slow, fast = Fake("a", 1.5, x=[1, 2]), Fake("b", 1.0, x=[1, 2])
    assert race(slow, fast).ask(1) == [Candidate(fast, Picks(x=1))]
    assert race(slow, fast).ask(2) == [Candidate(fast, Picks(x=1)), Candidate(slow, Picks(x=1))]


def test_every_default_is_tried_in_the_order_of_predictions_before_anything_is_drawn() -> None:
    """However far behind one is predicted to be: that may be what is wrong."""
    wide: dict[str, Any] = {"x": list(range(50))}
    costs = {"far": 9.0, "best": 1.0, "near": 1.2, "last": 99.0}
    run = race(*(Fake(name, cost, **wide) for name, cost in costs.items()))
    assert [(c.schedule.id, c.picks.x) for c in run.ask(4)] == [("best", 0), ("near", 0), ("far", 0), ("last", 0)]


def test_what_won_elsewhere_comes_right_after_the_default() -> None:
    a, b = Fake("a", 1.0, x=list(range(1, 40))), Fake("b", 1.1, x=list(range(1, 40)))
    taught = Ranker(resolve(), 1)
    for x, seconds in ((1, 1.0), (7, 0.5), (9, 0.9)):
        taught.observe(LAYER, Candidate(b, Picks(x=x)), seconds)
    taught.threads = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("convgen.tuning.ranker"), "schedules", lambda: {"a": a, "b": b})
        assert taught.similar(LAYER) == [Candidate(b, Picks(x=7))]
        run = race(a, b, ranker=taught)
    assert run.ask(2) == [Candidate(a, Picks(x=1)), Candidate(b, Picks(x=7))]


def test_schedules_that_are_excluded_take_no_part_but_for_the_default_of_a_build() -> None:
    a, b, c = (Fake(name, cost, x=[1, 2, 3]) for name, cost in (("a", 1.0), ("b", 3.0), ("c", 2.0)))
    assert race(a, b, c).default == Candidate(a, Picks(x=1))
    run = race(a, b, c, exclude=["a"])
    assert run.default == Candidate(a, Picks(x=1))
    asked = list[Candidate]()
    while batch := run.ask(4):
        asked += batch
        for candidate in batch:
            run.tell(candidate, ok(1.0))
    assert Counter(candidate.schedule.id for candidate in asked) == {"a": 1, "b": 3, "c": 3}
    assert asked[0] == run.default
    assert race(a, b, c, exclude={"b"}).default == Candidate(a, Picks(x=1))
    with pytest.raises(UnsupportedError, match="exclude: expected to leave a schedule for conv1d"):
        race(a, b, c, exclude=("a", "b", "c"))


def test_the_reference_takes_part_only_where_it_is_the_answer() -> None:
    """Where nothing else is left, or where it is predicted to be the fastest: then it must be beaten."""
    assert race(Fake("reference", 1.0), Fake("fast", 2.0, x=[1])).schedules[0].id == "reference"
    assert [s.id for s in race(Fake("reference", 9.0), Fake("fast", 2.0, x=[1])).schedules] == ["fast"]
    assert [s.id for s in race(Fake("reference", 9.0)).schedules] == ["reference"]
    left = race(Fake("reference", 9.0), Fake("fast", 2.0, x=[1]), exclude=["fast"])
    assert [s.id for s in left.schedules] == ["reference"]
    assert left.default.schedule.id == "fast"


def test_a_default_that_is_excluded_may_be_awaited_while_others_are_chosen() -> None:
    wide: dict[str, Any] = {"x": list(range(400))}
    run = race(Fake("a", 1.0, **wide), Fake("b", 2.0, **wide), exclude=["a"])
    assert run.ask(2) == [Candidate(run.default.schedule, Picks(x=0)), Candidate(run.schedules[0], Picks(x=0))]
    assert {candidate.schedule.id for candidate in run.ask(4)} == {"b"}


# ---- all of a space, each once ------------------------------------------------------------------


def test_a_small_space_is_exhausted_and_then_there_is_nothing() -> None:
    a, b = Fake("a", x=[1, 2, 3], y=[0, 1]), Fake("b", x=list(range(9)), good=lambda picks: picks.x % 2 == 0)
    run, asked = race(a, b), list[Candidate]()
    while batch := run.ask(4):
        assert len(batch) <= 4
        asked += batch
        for candidate in batch:
            run.tell(candidate, ok(1.0))
    assert len(asked) == len(set(asked)) == 6 + 5
    assert set(asked) == {Candidate(s, p) for s in (a, b) for p in s.points()}
    assert run.ask(1) == []


def test_the_last_valid_points_of_a_large_space_are_found() -> None:
    """Chance does not: three of 2,000."""
    a = Fake("a", x=list(range(2_000)), good=lambda picks: picks.x in (17, 900, 1_999))
    assert {candidate.picks.x for candidate in race(a).ask(5)} == {17, 900, 1_999}


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(0, 2**32))
def test_no_candidate_comes_twice_and_every_one_is_valid(data: st.DataObject, seed: int) -> None:
    sizes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
    schedules = []
    for name in "abc"[: data.draw(st.integers(1, 3))]:
        domains: dict[str, Any] = {f"x{i}": list(range(size)) for i, size in enumerate(data.draw(sizes))}
        modulus = data.draw(st.integers(1, 3))
        schedules.append(Fake(name, good=divisible(modulus), **domains))
    run, rng, asked = race(*schedules, seed=seed), random.Random(seed), list[Candidate]()
    while batch := run.ask(rng.randint(1, 10)):
        asked += batch
        for candidate in batch:
            failed = rng.random() < 0.3
            run.tell(candidate, Result("crash") if failed else ok(rng.choice([1.0, 1.2, 5.0])))
    assert len(asked) == len(set(asked))
    for schedule in schedules:
        points, tried = set(schedule.points()), {c.picks for c in asked if c.schedule is schedule}
        assert tried <= points
        assert tried == points or len(tried) >= TRIES, f"{schedule.id} dropped out after {len(tried)} trials"


def test_what_was_told_before_is_not_asked_for() -> None:
    a = Fake("a", x=list(range(10)))
    run = race(a)
    for x in range(9):
        run.tell(Candidate(a, Picks(x=x)), ok(1.0))
    assert run.ask(5) == [Candidate(a, Picks(x=9))]


def test_what_was_asked_and_never_told_is_not_asked_for_again() -> None:
    """A process that measures for another one may die, or take its time."""
    a = Fake("a", x=list(range(40)))
    run, asked = race(a), list[Candidate]()
    while batch := run.ask(ROUND):
        asked += batch
    assert len(asked) == len(set(asked)) == 40


def test_the_same_seed_asks_for_the_same() -> None:
    def sequence(seed: int) -> list[list[Candidate]]:
        run, asked = race(a, b, seed=seed), []
        for step in range(6):
            asked.append(run.ask(ROUND))
            for i, candidate in enumerate(asked[-1]):
                run.tell(candidate, ok(1 + (step * ROUND + i) % 7))
        return asked

    a, b = Fake("a", x=list(range(90)), y=[1, 2, 3, 4]), Fake("b", x=list(range(300)))
    assert sequence(3) == sequence(3)
    assert sequence(3) != sequence(4)


# ---- where the trials go --------------------------------------------------------------------------


def test_a_schedule_that_stays_behind_drops_out() -> None:
    wide: dict[str, Any] = {"x": list(range(24))}
    leader, close, behind = Fake("leader", **wide), Fake("close", **wide), Fake("behind", **wide)
    speed = {"leader": 1.0, "close": BEHIND - 0.01, "behind": BEHIND + 0.01}
    run, tried = race(leader, close, behind), Counter[str]()
    while batch := run.ask(ROUND):
        for candidate in batch:
            tried[candidate.schedule.id] += 1
            run.tell(candidate, ok(speed[candidate.schedule.id]))
    assert TRIES <= tried["behind"] < TRIES + ROUND
    assert tried["leader"] == tried["close"] == 24


def test_a_schedule_that_only_fails_drops_out_where_another_does_not() -> None:
    works, fails = Fake("works", x=list(range(24))), Fake("fails", x=list(range(24)))
    run, tried = race(works, fails), Counter[str]()
    while batch := run.ask(ROUND):
        for candidate in batch:
            tried[candidate.schedule.id] += 1
            run.tell(candidate, ok(1.0) if candidate.schedule is works else Result("wrong"))
    assert tried["works"] == 24
    assert TRIES <= tried["fails"] < TRIES + ROUND


def test_where_everything_fails_everything_is_tried() -> None:
    a = Fake("a", x=list(range(40)))
    run, count = race(a), 0
    while batch := run.ask(ROUND):
        count += len(batch)
        for candidate in batch:
            run.tell(candidate, Result("crash"))
    assert count == 40
    assert run.best == math.inf


def test_faster_schedules_are_tried_more() -> None:
    wide: dict[str, Any] = {"x": list(range(1000))}
    fast, slower = Fake("fast", **wide), Fake("slower", **wide)
    run, tried = race(fast, slower), Counter[str]()
    for _ in range(10):
        for candidate in run.ask(ROUND):
            tried[candidate.schedule.id] += 1
            run.tell(candidate, ok(1.0 if candidate.schedule is fast else 1.25))
    assert tried["fast"] > 2 * tried["slower"] > 0


def test_candidates_that_are_awaited_spread_the_next_ones() -> None:
    """Several processes ask before any of them has told: both schedules, and not one corner of a space."""
    a, b = Fake("a", 1.0, x=[2**i for i in range(8)], y=[2**i for i in range(8)]), Fake("b", 1.0, x=[1, 2, 4, 8])
    run = race(a, b)
    asked = [candidate for _ in range(12) for candidate in run.ask(1)]
    assert {c.schedule for c in asked} == {a, b}
    assert len({c.picks.x for c in asked if c.schedule is a}) >= 3
    assert len({c.picks.y for c in asked if c.schedule is a}) >= 3


def landscape(picks: Picks) -> float:
    """Seconds: best at (8, 4, on, 2), three steps from the default; a step off costs 8 to 40 %."""
    x, y, z = (math.log2(picks[name]) for name in ("tile_x", "tile_y", "block"))
    return math.exp(0.2 * abs(x - 3) + 0.25 * abs(y - 2) + 0.08 * abs(z - 1)) * (1.0 if picks.copy else 1.3)


def trials_to(share: float, asks: Any, optimum: float) -> int:
    """Trials after which a search has a share of the best speed."""
    for number, candidate in enumerate(asks, 1):
        if landscape(candidate.picks) <= optimum / share:
            return number
    return 1 << 20


def test_few_trials_come_near_the_best_of_a_smooth_space() -> None:
    """Of 1,176 candidates the best is found by what the trials before said, sooner than by chance."""
    sizes = [2**i for i in range(7)]
    a = Fake("a", tile_x=sizes, tile_y=sizes, block=sizes[:6], copy=[False, True], flag=[0, 1])
    optimum = min(landscape(picks) for picks in a.points())

    def searched(seed: int) -> Any:
        run = race(a, seed=seed)
        while batch := run.ask(ROUND):
            yield from batch
            for candidate in batch:
                run.tell(candidate, ok(landscape(candidate.picks)))

    def drawn(seed: int) -> Any:
        points = a.points()
        random.Random(seed).shuffle(points)
        return [Candidate(a, picks) for picks in points]

    ours = [trials_to(0.95, searched(seed), optimum) for seed in range(5)]
    chance = [trials_to(0.95, drawn(seed), optimum) for seed in range(50)]
    assert 3 * statistics.median(ours) < statistics.median(chance)
