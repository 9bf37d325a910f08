"""Tuning: what is tried, what is kept, and that no candidate can end it."""

from __future__ import annotations

import importlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convgen.build import default_candidate, parse_candidate, versions
from convgen.errors import MeasureError, SpecError
from convgen.measure import Result
from convgen.race import BEHIND, ROUND, TRIES, Race
from convgen.records import RecordStore, TuningRecord
from convgen.schedule import Candidate, Picks, Schedule, Space, require
from convgen.spec import ConvSpec
from convgen.target import Target, resolve
from convgen.tune import FINALISTS, Progress, Tuner, tune
from convgen.workers import LocalBuilder, LocalRunner, Pools

# The package's names `build`, `tune` … are the functions.
tune_module, build_module = importlib.import_module("convgen.tune"), importlib.import_module("convgen.build")
race_module = importlib.import_module("convgen.race")

# ---- the race: pure Python --------------------------------------------------------------------

LAYER = ConvSpec.parse("conv1d n1 ic4 oc4 i20 k3")


class Fake(Schedule):
    """A space, the points of it that are valid, and a predicted time."""

    id, version = "fake", 1

    def __init__(self, name: str, cost: float = 1.0, good: Callable[[Picks], bool] | None = None, **domains: Any):
        self.id, self._cost, self._good, self._space = name, cost, good, Space(**domains)  # type: ignore[misc]

    def applies(self, spec: ConvSpec, target: Target) -> None:
        pass

    def space(self, spec: ConvSpec, target: Target) -> Space:
        return self._space

    def valid(self, spec: ConvSpec, target: Target, picks: Picks) -> None:
        require(self._good is None or self._good(picks), "no good")

    def points(self) -> list[Picks]:
        return [picks for picks in self._space if self._good is None or self._good(picks)]

    def default(self, spec: ConvSpec, target: Target) -> Picks:
        return next(picks for picks in self._space if self._good is None or self._good(picks))

    def cost(self, spec: ConvSpec, target: Target) -> float:
        return self._cost

    def program(self, *_: Any) -> Any:
        raise AssertionError("nothing is compiled here")

    apply = program


def race(*schedules: Fake, seed: int = 0) -> Race:
    found = {schedule.id: schedule for schedule in schedules}
    with pytest.MonkeyPatch.context() as patch:
        for module in (race_module, build_module):
            patch.setattr(module, "schedules", lambda: found)
        return Race(LAYER, resolve(), seed)


def ok(seconds: float) -> Result:
    return Result("ok", (seconds,))


def test_the_zero_trial_answer_comes_first_then_the_other_defaults() -> None:
    slow, fast = Fake("a", 2.0, x=[1, 2]), Fake("b", 1.0, x=[1, 2])
    assert race(slow, fast).ask(1) == [Candidate(fast, Picks(x=1))]
    assert race(slow, fast).ask(2) == [Candidate(fast, Picks(x=1)), Candidate(slow, Picks(x=1))]


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


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(0, 2**32))
def test_no_candidate_comes_twice_and_every_one_is_valid(data: st.DataObject, seed: int) -> None:
    sizes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
    schedules = []
    for name in "abc"[: data.draw(st.integers(1, 3))]:
        domains = {f"x{i}": list(range(size)) for i, size in enumerate(data.draw(sizes))}
        modulus = data.draw(st.integers(1, 3))
        schedules.append(Fake(name, good=lambda p, m=modulus: sum(p.values()) % m == 0, **domains))
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


def test_a_schedule_that_stays_behind_drops_out() -> None:
    wide = {"x": list(range(100))}
    leader, close, behind = Fake("leader", **wide), Fake("close", **wide), Fake("behind", **wide)
    speed = {"leader": 1.0, "close": BEHIND - 0.01, "behind": BEHIND + 0.01}
    run, tried = race(leader, close, behind), Counter[str]()
    for _ in range(40):
        for candidate in run.ask(ROUND):
            tried[candidate.schedule.id] += 1
            run.tell(candidate, ok(speed[candidate.schedule.id]))
    assert TRIES <= tried["behind"] < TRIES + ROUND
    assert tried["leader"] == tried["close"] == 100


def test_a_schedule_that_only_fails_drops_out_where_another_does_not() -> None:
    works, fails = Fake("works", x=list(range(60))), Fake("fails", x=list(range(60)))
    run, tried = race(works, fails), Counter[str]()
    while batch := run.ask(ROUND):
        for candidate in batch:
            tried[candidate.schedule.id] += 1
            run.tell(candidate, ok(1.0) if candidate.schedule is works else Result("wrong"))
    assert tried["works"] == 60
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


def test_half_of_the_draws_are_neighbours_of_a_leader_in_one_pick() -> None:
    """In so large a space none is one by chance."""
    a = Fake("a", **{f"x{i}": list(range(20)) for i in range(6)})
    run, rng, near, total = race(a, seed=1), random.Random(1), 0, 0
    for _ in range(40):
        leaders = [picks for _, picks in sorted(run.results[a], key=lambda result: result[0])[:3]]
        batch = run.ask(8)
        assert len(batch) == 8
        for candidate in batch:
            distances = [sum(candidate.picks[k] != leader[k] for k in leader) for leader in leaders]
            near += min(distances, default=6) == 1
            total += 1
        for candidate in batch:
            run.tell(candidate, ok(rng.uniform(1, 2)))
    assert 0.35 < near / total < 0.65


def test_faster_schedules_are_tried_more() -> None:
    wide = {"x": list(range(1000))}
    fast, slower = Fake("fast", **wide), Fake("slower", **wide)
    run, tried = race(fast, slower), Counter[str]()
    for _ in range(50):
        for candidate in run.ask(ROUND):
            tried[candidate.schedule.id] += 1
            run.tell(candidate, ok(1.0 if candidate.schedule is fast else 1.25))
    assert tried["fast"] > 1.5 * tried["slower"] > 1.5 * TRIES


def test_the_same_seed_asks_for_the_same() -> None:
    def sequence(seed: int) -> list[list[Candidate]]:
        run, asked = race(a, b, seed=seed), []
        for step in range(6):
            asked.append(run.ask(ROUND))
            for i, candidate in enumerate(asked[-1]):
                run.tell(candidate, ok(1 + (step * ROUND + i) % 7))
        return asked

    a, b = Fake("a", x=list(range(50)), y=[1, 2]), Fake("b", x=list(range(50)))
    assert sequence(3) == sequence(3)
    assert sequence(3) != sequence(4)


def test_the_reference_takes_part_only_where_it_is_the_answer() -> None:
    """Where nothing else applies, or where it is predicted to be the fastest: then it must be beaten."""
    assert race(Fake("reference", 1.0), Fake("fast", 2.0, x=[1])).schedules[0].id == "reference"
    assert [s.id for s in race(Fake("reference", 9.0), Fake("fast", 2.0, x=[1])).schedules] == ["fast"]
    assert [s.id for s in race(Fake("reference", 9.0)).schedules] == ["reference"]


# ---- in worker processes ----------------------------------------------------------------------

SPEC = ConvSpec.parse("conv2d n1 ic3 oc17 i6x7 k3x3 p1 relu")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecordStore]:
    with RecordStore(tmp_path / "records.sqlite") as store:
        yield store


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    """Workers that all tests of this module share: they take seconds to start."""
    pools = Pools(LocalBuilder(2), LocalRunner(timeout=4))
    yield pools
    pools.close()


@pytest.fixture
def tuner(store: RecordStore, pools: Pools) -> Tuner:
    tuner = Tuner(resolve(), 2, store)
    tuner._pools = pools
    return tuner


def is_final(record: TuningRecord) -> bool:
    return bool((record.note or {}).get("final"))


def searched(store: RecordStore) -> list[TuningRecord]:
    """The trials of the search, oldest first."""
    return [record for record in store.trials() if not is_final(record)]


def test_every_trial_is_kept_and_none_is_made_twice(tuner: Tuner, store: RecordStore) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(state: Progress) -> None:
        seen.append((state.phase, state.done, len(store)))

    winner = tuner.tune(SPEC, trials=6, progress=progress)
    assert seen == [("search", i, i) for i in range(1, 7)] + [("final", 6, 6)]  # committed before it is reported
    trials, finals = searched(store), [record for record in store.trials() if is_final(record)]
    assert len({record.trial_key for record in trials}) == len(trials) == 6
    assert {record.outcome for record in trials} == {"ok"}
    assert 1 <= len(finals) <= FINALISTS + 1
    assert winner in finals

    # Who asks for as much again gets the same at once.
    def refuse(*_: Any) -> Any:
        raise AssertionError("nothing is to be built or run")

    count = len(store)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("build", "run", "duel"):
            patch.setattr(Pools, name, refuse)
        assert tuner.tune(SPEC, trials=6) == winner
        assert tuner.tune(SPEC, trials=3) == winner
    assert len(store) == count

    # Who asks for more gets the rest.
    states: list[tuple[int, int]] = []
    tuner.tune(SPEC, trials=8, progress=lambda state: states.append((state.known, state.done)))
    assert len(searched(store)) == len({record.trial_key for record in searched(store)}) == 8
    assert states[-1] == (6, 8)


def test_the_final_comparison_has_the_default_and_the_fastest_of_it_wins(tuner: Tuner, store: RecordStore) -> None:
    winner = tuner.tune(SPEC, trials=5)
    finals = [record for record in store.trials() if is_final(record)]
    assert winner is not None
    assert winner.seconds == min(record.seconds or math.inf for record in finals)
    default = default_candidate(SPEC, tuner.target)
    (again,) = [record for record in finals if dict(record.picks) == dict(default.picks)]
    assert {(record.note or {})["default_seconds"] for record in finals} == {again.seconds}
    assert winner.seconds <= (again.seconds or 0)


def test_the_search_does_not_outweigh_the_final_comparison(
    tuner: Tuner, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was fastest in the search loses where the default is faster side by side."""
    monkeypatch.setattr(Pools, "duel", lambda self, paths, *_: [[9.0 - i] * 3 for i in range(len(paths))])
    speeds = iter([3.0, 2.0, 1.0, 2.5, 2.5, 2.5, 2.5])
    monkeypatch.setattr(Pools, "run", lambda self, *_, **__: ok(next(speeds)))
    winner = tuner.tune(SPEC, trials=7)
    default = default_candidate(SPEC, tuner.target)
    assert winner is not None
    assert dict(winner.picks) == dict(default.picks)  # the last to be compared, as it was the slowest
    assert winner.seconds == 9.0 - FINALISTS
    assert winner.note == {"final": True, "default_seconds": winner.seconds}


#: C statements of a kernel that does not compute the layer -> the outcome of its trial.
BODIES = {
    "crash": "*(volatile int *)0 = 1;",
    "timeout": "for (volatile int i = 0;;) i = 0;",
    "wrong": "",  # dst stays NaN
    "run_error": "return -1;",
}


def injected(module: str, root: str, body: str | None, outcome: str) -> str:
    """In a worker: build a module, but for a kernel in C where there is a ``body``."""
    import importlib
    import subprocess

    from convgen.measure import build_artifact

    if outcome == "build_error":
        raise RuntimeError("planted")
    build = importlib.import_module("convgen.build")
    original = build.compile_object

    def replaced(lowered: Any, path: Any) -> Any:
        workspace = original(lowered, path)
        text = "int __tvm_ffi_pack(void *s, void *a, int n, void *r) { return 0; }"
        text += f"int __tvm_ffi_main(void *s, void *a, int n, void *r) {{ {body} return 0; }}"
        path.with_suffix(".c").write_text(text)
        subprocess.run(["cc", "-fPIC", "-w", "-c", path.with_suffix(".c"), "-o", path], check=True)
        return workspace

    if body is not None:
        build.compile_object = replaced
    try:
        return build_artifact(module, root)
    finally:
        build.compile_object = original


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Let the next candidates that are built end as told; those after them as they are."""
    # Workers cannot import this module: what they run must travel by value.
    cloudpickle = pytest.importorskip("cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def plant(outcomes: list[str]) -> None:
        left = list(outcomes)

        def build(self: Pools, modules: list[str]) -> list[Any]:
            futures = []
            builder = self.builder
            assert isinstance(builder, LocalBuilder)
            for module in modules:
                outcome = left.pop(0) if left else "ok"
                arguments = (injected, module, str(builder.root), BODIES.get(outcome), outcome)
                futures.append(builder._workers.submit(*arguments))
            return [self._wait(future) for future in futures]

        monkeypatch.setattr(Pools, "build", build)

    yield plant  # type: ignore[misc]
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_failures_are_outcomes_and_the_run_goes_on(
    tuner: Tuner, store: RecordStore, inject: Callable[[list[str]], None]
) -> None:
    planned = ["ok", "wrong", "crash", "ok", "build_error", "run_error", "timeout", "ok", "crash", "ok"]
    inject(planned)
    states: list[Progress] = []
    winner = tuner.tune(SPEC, trials=len(planned), progress=states.append)
    trials = searched(store)
    assert [record.outcome for record in trials] == planned
    assert winner is not None
    assert winner.outcome == "ok"
    assert states[-1].failures == Counter(outcome for outcome in planned if outcome != "ok")
    for record in trials:
        assert (record.seconds is None) == (record.outcome != "ok")
        assert bool(record.error) == (record.outcome != "ok")
    assert {r.outcome: r.error for r in trials}["wrong"].startswith("714 of 714 elements; at (0, 0, 0, 0) expected ")
    assert "planted" in {r.outcome: r.error for r in trials}["build_error"]
    assert tuner.tune(SPEC, trials=len(planned)) == winner  # failures are not tried again either


def test_where_no_candidate_is_right_there_is_no_winner(
    tuner: Tuner, store: RecordStore, inject: Callable[[list[str]], None]
) -> None:
    inject(["wrong"] * 3)
    assert tuner.tune(SPEC, trials=3) is None
    assert [record.outcome for record in store.trials()] == ["wrong"] * 3


def test_a_candidate_that_cannot_be_scheduled_is_an_outcome(
    tuner: Tuner, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = parse_candidate(SPEC, tuner.target, "cpu_direct").schedule
    apply, seen = type(direct).apply, list[Picks]()

    def sometimes(self: Schedule, sch: Any, spec: ConvSpec, target: Any, picks: Picks) -> None:
        if picks not in seen:
            seen.append(picks)
        if picks == seen[0]:
            sch.get_sblock("no such block")
        apply(self, sch, spec, target, picks)

    monkeypatch.setattr(type(direct), "apply", sometimes)
    assert tuner.tune(SPEC, trials=3) is not None
    assert sorted(record.outcome for record in searched(store)) == ["build_error", "ok", "ok"]
    (failed,) = [record for record in searched(store) if record.outcome == "build_error"]
    assert "no such block" in failed.error


def test_a_finalist_that_fails_in_the_comparison_does_not_end_it(
    tuner: Tuner, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runs by itself then, and the one that fails again is out."""
    run, alone = Pools.run, list[str]()

    def duel(self: Pools, paths: list[str], *_: Any) -> Any:
        monkeypatch.setattr(Pools, "run", once_more)
        raise MeasureError("re-measuring: crash: the worker process died")

    def once_more(self: Pools, path: str, *arguments: Any, **options: Any) -> Result:
        alone.append(path)
        return Result("crash", error="again") if len(alone) == 1 else run(self, path, *arguments, **options)

    monkeypatch.setattr(Pools, "duel", duel)
    winner = tuner.tune(SPEC, trials=3)
    finals = [record for record in store.trials() if is_final(record)]
    assert [record.outcome for record in finals] == ["crash", *["ok"] * (len(alone) - 1)]
    assert winner in finals
    assert winner.outcome == "ok"


def test_records_of_another_version_of_a_schedule_are_not_the_answer(tuner: Tuner, store: RecordStore) -> None:
    default = default_candidate(SPEC, tuner.target)
    fields: dict[str, Any] = {
        "spec": SPEC.descriptor,
        "target": tuner.target.spelling,
        "hardware": tuner.target.hardware,
        "threads": 2,
        "schedule": default.schedule.id,
        "picks": dict(default.picks),
        "outcome": "ok",
        "seconds": 1e-9,
        "versions": versions(),
        "note": {"final": True},
    }
    store.add(TuningRecord(schedule_version=default.schedule.version + 1, **fields))
    store.add(TuningRecord(schedule_version=default.schedule.version, **fields | {"threads": 3}))
    store.add(TuningRecord(schedule_version=default.schedule.version, **fields | {"hardware": "another"}))
    store.add(TuningRecord(schedule_version=default.schedule.version, **fields | {"versions": {"convgen": "0"}}))
    winner = tuner.tune(SPEC, trials=1)
    assert winner is not None
    assert winner.seconds != 1e-9
    assert winner.schedule_version == default.schedule.version


def test_a_layer_with_one_candidate_is_done_after_it(
    tuner: Tuner, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any budget."""
    reference = parse_candidate(SPEC, tuner.target, "reference").schedule
    for module in (race_module, build_module):
        monkeypatch.setattr(module, "schedules", lambda: {"reference": reference})
    winner = tuner.tune(SPEC)
    assert winner is not None
    assert winner.schedule == "reference"
    assert [record.schedule for record in searched(store)] == ["reference"]


def test_without_a_gain_the_search_ends(tuner: Tuner, store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "PATIENCE", 4)
    monkeypatch.setattr(Pools, "run", lambda self, *_, **__: ok(1.0))
    tuner.tune(SPEC)
    assert len(searched(store)) == 1 + 4


def test_no_time_no_trials(store: RecordStore) -> None:
    with Tuner(resolve(), 2, store) as tuner:
        assert tuner.tune(SPEC, seconds=0) is None
    assert len(store) == 0


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"trials": -1}, "trials: expected an integer >= 0, found -1"),
        ({"trials": 2.5}, "trials: expected an integer >= 0, found 2.5"),
        ({"trials": True}, "trials: expected an integer >= 0, found True"),
        ({"seconds": -0.5}, "seconds: expected a number >= 0, found -0.5"),
        ({"seconds": math.nan}, "seconds: expected a number >= 0, found nan"),
        ({"seconds": "9"}, "seconds: expected a number >= 0, found '9'"),
    ],
)
def test_an_impossible_budget_is_refused(budget: dict[str, Any], message: str, store: RecordStore) -> None:
    with pytest.raises(SpecError) as error:
        tune(SPEC, threads=2, records=store, **budget)
    assert str(error.value) == message


def test_without_a_store_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVGEN_RECORDS", str(tmp_path / "records.sqlite"))
    monkeypatch.setattr(Pools, "run", lambda self, *_, **__: ok(1.0))
    winner = tune("conv1d n1 ic1 oc1 i9 k3", threads=1, trials=1, records=False)
    assert winner is not None
    assert is_final(winner)
    assert list(tmp_path.iterdir()) == []


# ---- interrupts -------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_measured(tuner: Tuner, store: RecordStore) -> None:
    def progress(state: Progress) -> None:
        if state.done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tuner.tune(SPEC, trials=50, progress=progress)
    assert len(store) == 3
    assert not any(is_final(record) for record in store.trials())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert tuner.tune(SPEC, trials=3) is not None  # and it goes on from there
    assert len(searched(store)) == 3


def test_an_error_in_the_callback_keeps_what_was_measured(tuner: Tuner, store: RecordStore) -> None:
    def progress(state: Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tuner.tune(SPEC, trials=50, progress=progress)
    assert len(store) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_process_that_is_ended_leaves_its_records_and_nothing_else(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    code = f"import convgen; convgen.tune({SPEC.descriptor!r}, threads=1, trials=1000, records={str(path)!r})"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        with RecordStore(path) as store:
            while len(store) < 2:
                assert process.poll() is None
                time.sleep(0.05)
            if number is signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                process.kill()
            _, error = process.communicate(timeout=60)
            assert process.returncode == -number
            assert store.check().ok
            assert all(record.outcome == "ok" for record in store.trials())
        if number is signal.SIGINT:
            assert error.count("Traceback") == 1  # no worker's
            assert error.rstrip().endswith("KeyboardInterrupt")
            assert [p.name for p in tmp_path.iterdir() if p.name.startswith("convgen-")] == []
        give_up = time.monotonic() + 30
        while _alive(process.pid):
            assert time.monotonic() < give_up, "workers outlive the process"
            time.sleep(0.1)
    finally:
        if _alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def _alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
