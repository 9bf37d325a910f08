"""Tuning: what is tried, what is kept, and that no candidate can end it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_tuning import Clock, FakeBuilder, FakeRunner, FakeSchedule, Speed, done, fake_pools, fake_tuning
from tvm import te
from worker_jobs import build_with_fault, in_worker

import convgen
from convgen.api import tune
from convgen.errors import BuildError, SpecError
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate, parse_candidate
from convgen.lowering.schedule import Picks, Schedule
from convgen.lowering.versions import versions
from convgen.measure.trial import CandidateModule
from convgen.measure.workers import LocalBuilder, LocalRunner, Pools
from convgen.problem.spec import ConvSpec
from convgen.records.answer import is_final
from convgen.records.claims import Claims, claims_path
from convgen.records.outcome import Result
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.tuning.final import final_comparison
from convgen.tuning.journal import Journal
from convgen.tuning.rounds import begin_round
from convgen.tuning.search import FINALISTS, Progress
from convgen.tuning.tuner import Tuner


def ok(seconds: float) -> Result:
    return Result("ok", (seconds,))


# ---- in worker processes ----------------------------------------------------------------------

SPEC = ConvSpec.parse("conv2d n1 ic3 oc17 i6x7 k3x3 p1 relu")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecordStore]:
    with RecordStore(tmp_path / "records.sqlite") as store:
        yield store


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    """Workers that all tests of this module share: they take seconds to start."""
    pools = Pools(LocalBuilder(2), LocalRunner(timeout=8))
    yield pools
    pools.close()


@pytest.fixture
def tuner(store: RecordStore, pools: Pools, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tuner]:
    monkeypatch.setattr("convgen.tuning.final.ROUNDS", 3)
    with Tuner(resolve(), 1, store, pools=pools) as tuner:
        yield tuner


def searched(store: RecordStore) -> list[TuningRecord]:
    """The trials of the search, oldest first."""
    return [record for record in store.trials() if not is_final(record)]


def test_every_trial_is_kept_and_none_is_made_twice(tuner: Tuner, store: RecordStore) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(state: Progress) -> None:
        seen.append((state.phase, state.done, len(store)))

    winner = tuner.tune(SPEC, trials=6, progress=progress)
    searching = [("search", i, i) for i in range(1, 7)]  # committed before it is reported
    assert seen == [*searching, ("final", 6, 6), ("done", 6, len(store))]
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
        for worker in (LocalBuilder, LocalRunner):
            patch.setattr(worker, "submit", refuse)
        assert tuner.tune(SPEC, trials=6) == winner
        assert tuner.tune(SPEC, trials=3) == winner
    assert len(store) == count

    # Who asks for more gets the rest.
    states: list[tuple[int, int]] = []
    tuner.tune(SPEC, trials=8, progress=lambda state: states.append((state.known, state.done)))
    assert len(searched(store)) == len({record.trial_key for record in searched(store)}) == 8
    assert states[-1] == (6, 8)


@pytest.mark.parametrize("types", ["src_u8 dst_u8 dst_zero", "src_u8 src_zero dst_i32", "dst_f32", "src_u8"])
def test_layers_of_integers_are_searched_whatever_they_give(types: str, tuner: Tuner, store: RecordStore) -> None:
    """Each candidate writes what the layer's results are stored as."""
    winner = tuner.tune(ConvSpec.parse(f"conv2d n1 ic8 oc16 i6x7 k3x3 p1 {types} i8"), trials=2)
    assert winner is not None
    assert {record.outcome for record in store.trials()} == {"ok"}


def test_the_final_comparison_has_the_default_and_onnx_runtime(tuner: Tuner, store: RecordStore) -> None:
    winner = tuner.tune(SPEC, trials=5)
    finals = [record for record in store.trials() if is_final(record)]
    assert winner is not None
    default = default_candidate(SPEC, tuner.target.on(tuner.threads))
    (again,) = [record for record in finals if dict(record.picks) == dict(default.picks)]
    assert [record for record in finals if (record.note or {})["winner"]] == [winner]
    for record in finals:
        note = record.note or {}
        assert note["default_seconds"] == again.seconds
        median, low, high = note["ratio_default"]
        assert low <= median <= high
        assert median == pytest.approx((again.seconds or 0) / (record.seconds or 1))
        median, low, high = note["ratio_onnxruntime"]
        assert low <= median <= high
        assert median == pytest.approx(note["onnxruntime_seconds"] / (record.seconds or 1))
        assert record is winner or record == winner or not note["winner"]
    assert winner == again or (winner.note or {})["ratio_default"][1] > 1


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Let the next candidates that are built end as told; those after them as they are."""

    def plant(outcomes: list[str]) -> None:
        left = list(outcomes)

        def submit(self: LocalBuilder, module: CandidateModule) -> Any:
            job = in_worker(build_with_fault, left.pop(0) if left else "ok")
            return self.pool.submit(job, module, str(self.root))

        monkeypatch.setattr(LocalBuilder, "submit", submit)

    return plant


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


def test_a_candidate_that_cannot_be_scheduled_is_an_outcome(
    tuner: Tuner, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct: Any = parse_candidate(SPEC, tuner.target, "cpu_direct").schedule
    program, seen = type(direct).program, list[Picks]()

    def sometimes(self: Schedule, spec: ConvSpec, target: Any, picks: Picks) -> Any:
        if picks not in seen:
            seen.append(picks)
        if picks == seen[0]:
            te.placeholder((1,), "no such type")
        return program(self, spec, target, picks)

    monkeypatch.setattr(type(direct), "program", sometimes)
    assert tuner.tune(SPEC, trials=3) is not None
    assert sorted(record.outcome for record in searched(store)) == ["build_error", "ok", "ok"]
    (failed,) = [record for record in searched(store) if record.outcome == "build_error"]
    assert "no such type" in failed.error


def test_without_a_compiler_no_candidate_is_blamed(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tuner(resolve(), 1, store) as tuner:
        monkeypatch.setenv("CC", "no-such-compiler")
        with pytest.raises(BuildError, match=r"^no-such-compiler: No such file .*install a C compiler"):
            tuner.tune(SPEC, trials=2)
        assert len(store) == 0
        monkeypatch.delenv("CC")
        assert tuner.tune(SPEC, trials=1) is not None


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
        ({"seconds": -0.5}, "seconds: expected a finite number >= 0, found -0.5"),
        ({"seconds": math.nan}, "seconds: expected a finite number >= 0, found nan"),
        ({"seconds": math.inf}, "seconds: expected a finite number >= 0, found inf"),
        ({"seconds": "9"}, "seconds: expected a finite number >= 0, found '9'"),
    ],
)
def test_an_impossible_budget_is_refused(budget: dict[str, Any], message: str, store: RecordStore) -> None:
    with pytest.raises(SpecError) as error:
        tune(SPEC, threads=2, records=store, **budget)
    assert str(error.value) == message


def test_without_a_store_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVGEN_RECORDS", str(tmp_path / "records.sqlite"))
    winner = tune("conv1d n1 ic1 oc1 i9 k3", threads=1, trials=1, records=False)
    assert winner is not None
    assert is_final(winner)
    assert list(tmp_path.iterdir()) == []


# ---- with workers that answer as told ------------------------------------------------------------

LAYER = ConvSpec.parse("conv1d n1 ic4 oc4 i20 k3")


def fakes(
    monkeypatch: pytest.MonkeyPatch, store: RecordStore | None, speed: Speed, *schedules: FakeSchedule, **options: Any
) -> tuple[Tuner, FakeRunner]:
    fake_tuning(monkeypatch, *schedules)
    pools = fake_pools(speed, **options)
    assert isinstance(pools.runner, FakeRunner)
    return Tuner(resolve(), 1, store, pools=pools), pools.runner


def test_a_budget_means_total_trials_and_none_is_repeated(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for total in (3, 5, 5, 9):
        tuner, runner = fakes(monkeypatch, store, lambda *what: 1e-3 + 1e-5 * what[2])
        assert tuner.tune(LAYER, trials=total, seed=total) is not None  # a seed of its own each time
        assert len(searched(store)) == len({record.trial_key for record in searched(store)}) == total
    assert len(runner.trials) == 4


def test_without_a_gain_the_search_ends_and_stays_ended(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, _ = fakes(monkeypatch, store, lambda *_: 1e-3, FakeSchedule(size=90))
    tuner.tune(LAYER, patience=4)
    assert len(searched(store)) == 1 + 4
    again, runner = fakes(monkeypatch, store, lambda *_: 1e-3, FakeSchedule(size=90))
    again.tune(LAYER, patience=4)
    assert runner.trials == runner.duels == []


def test_a_search_that_is_over_still_measures_the_default(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has more than enough trials, but not this one: they were imported, or others were pruned."""
    speed: Speed = lambda *what: 1e-3 + 1e-5 * what[2]  # noqa: E731
    tuner, _ = fakes(monkeypatch, store, speed, FakeSchedule(size=90))
    tuner.tune(LAYER, patience=4)
    (default,) = [record for record in searched(store) if record.picks == dict(tuner.search(LAYER).race.default.picks)]
    store.remove(record.id for record in store.trials() if is_final(record) or record == default)
    again, runner = fakes(monkeypatch, store, speed, FakeSchedule(size=90))
    winner = again.tune(LAYER, patience=3)
    assert winner is not None
    assert is_final(winner)
    assert len(runner.trials) == 1
    assert default.trial_key in {record.trial_key for record in searched(store)}


def test_a_layer_with_one_candidate_is_done_after_it(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, runner = fakes(monkeypatch, store, lambda *_: 1e-3, FakeSchedule(size=1))
    winner = tuner.tune(LAYER)
    assert winner is not None
    assert len(runner.trials) == 1


def test_where_no_candidate_is_right_there_is_no_winner(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, _ = fakes(monkeypatch, store, lambda *_: "wrong", FakeSchedule(size=3))
    assert tuner.tune(LAYER) is None
    assert [record.outcome for record in store.trials()] == ["wrong"] * 3


@pytest.mark.parametrize(("final", "wins"), [(0.5e-3, True), (1.0e-3, False), (2.0e-3, False)])
def test_a_candidate_wins_only_where_it_beats_the_default_side_by_side(
    final: float, wins: bool, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the search has found: there ``x = 3`` is twice as fast."""
    tuner, runner = fakes(monkeypatch, store, lambda *what: 0.5e-3 if what[2] == 3 else 1e-3, FakeSchedule(size=5))
    runner.duel_speed = lambda *what: final if what[2] == 3 else 1e-3
    winner = tuner.tune(LAYER)
    assert winner is not None
    assert winner.picks["x"] == (3 if wins else 0)
    note = winner.note or {}
    assert (note["winner"], note["default_seconds"]) == (True, 1e-3)
    assert note["ratio_default"] == ([2.0] * 3 if wins else [1.0] * 3)
    assert sum((record.note or {}).get("winner", False) for record in store.trials()) == 1
    assert store.trials()[-1].note is not None


def test_a_default_that_fails_is_no_rival(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, runner = fakes(monkeypatch, store, lambda *what: 1e-3 if what[2] else "crash", FakeSchedule(size=3))
    winner = tuner.tune(LAYER)
    assert winner is not None
    assert winner.picks["x"] != 0
    assert (winner.note or {})["default_seconds"] is None
    assert all(x != 0 for _, _, x in runner.duels[0])
    assert {candidate.picks["x"] for candidate in tuner.rejected} == {0}


@pytest.mark.parametrize(("size", "said"), [(1, "the one trial failed"), (3, "all 3 trials failed")])
def test_where_everything_fails_nothing_is_rejected(
    size: int, said: str, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing of the default, which is faster by far than what others are checked against."""
    tuner, _ = fakes(monkeypatch, store, lambda *what: "crash", FakeSchedule(size=size))
    assert tuner.tune(LAYER) is None
    assert tuner.rejected == set()
    assert f"{said}: the untuned default answers; first crash: planted" in tuner.note


def test_a_build_where_every_trial_fails_takes_the_default_and_says_why(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRunner, "submit", lambda *_, **options: done(Result("crash", error="planted")))
    kernel = convgen.build(SPEC, threads=2, trials=2, records=store)
    default = default_candidate(SPEC, resolve().on(2))
    assert (kernel.schedule, kernel.picks, kernel.record) == (default.schedule.id, default.picks, None)
    assert "2 trials failed: the untuned default answers; first crash: planted" in kernel.note


def test_a_comparison_that_fails_lets_each_run_by_itself(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, runner = fakes(monkeypatch, store, lambda *what: 1e-3 - 1e-5 * what[2], FakeSchedule(size=3))
    monkeypatch.setattr(runner, "duel", lambda *_: done(Result("crash", error="the worker process died")))
    failing = iter([0, 0, 0, 1, 0, 0])  # after the search the first of three
    speed = runner.speed
    runner.speed = lambda *what: "crash" if next(failing) else speed(*what)
    winner = tuner.tune(LAYER)
    finals = [record for record in store.trials() if is_final(record)]
    assert sorted(record.outcome for record in finals) == ["crash", "ok", "ok"]
    assert winner in finals
    assert winner.outcome == "ok"


def test_nothing_new_is_not_compared_again(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, runner = fakes(monkeypatch, store, lambda *what: 1e-3 + 1e-5 * what[2], FakeSchedule(size=30))
    winner = tuner.tune(LAYER, trials=6)
    assert len(runner.duels) == 1
    assert tuner.tune(LAYER, trials=6) == winner
    assert len(runner.duels) == 1
    runner.speed = lambda *what: 1e-4  # from now on all are faster
    runner.duel_speed = lambda *what: 1e-4 if what[2] else 1e-3
    assert tuner.tune(LAYER, trials=8) != winner
    assert len(runner.duels) == 2


def test_records_of_other_versions_or_machines_are_not_the_answer(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner, _ = fakes(monkeypatch, store, lambda *_: 1e-3)
    fields: dict[str, Any] = {
        "spec": LAYER.descriptor,
        "target": tuner.target.spelling,
        "hardware": tuner.target.hardware,
        "threads": 1,
        "schedule": "fake",
        "schedule_version": 1,
        "picks": {"x": 0},
        "outcome": "ok",
        "seconds": 1e-9,
        "versions": versions(),
        "note": {"final": True, "winner": True},
    }
    changes = ({"schedule_version": 2}, {"threads": 3}, {"hardware": "another"}, {"versions": {"convgen": "0"}})
    for change in changes:
        store.add(TuningRecord(**fields | change))
    winner = tuner.tune(LAYER, trials=1)
    assert winner is not None
    assert winner.seconds == 1e-3
    store.add(TuningRecord(**fields))  # and one that travelled without its search is
    again = tuner.tune(LAYER, trials=1)
    assert again is not None
    assert again.seconds == 1e-9


def test_costs_add_up_to_the_time_spent(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    tuner, _ = fakes(monkeypatch, Journal(store, "job", now=clock), lambda *_: 1e-3, clock=clock)  # type: ignore[arg-type]
    start = clock.now
    tuner.tune(LAYER, trials=7)
    notes = [record.note or {} for record in store.trials()]
    assert {note["job"] for note in notes} == {"job"}
    assert sum(note["cost"] for note in notes) == pytest.approx(clock.now - start)
    before = clock.now
    tuner.tune(LAYER, seconds=10.0)
    assert 10.0 <= clock.now - before <= 10.0 + 1.5 + 4 * 1.0 + 0.5  # a trial, a round's compiling, the comparison


class Busy(FakeRunner):
    """Measures in threads; knows how many run."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.running, self.most = 0, 0
        self.lock = threading.Lock()
        self.threads = ThreadPoolExecutor(self.devices)

    def submit(self, *arguments: Any, **options: Any) -> Any:
        with self.lock:
            self.running += 1

        def measure() -> Any:
            with self.lock:
                self.most = max(self.most, self.running)
            time.sleep(0.01)
            answer = FakeRunner.submit(self, *arguments, **options).result()
            with self.lock:
                self.running -= 1
            return answer

        return self.threads.submit(measure)

    def close(self) -> None:
        self.threads.shutdown()


@pytest.mark.parametrize(("isolated", "devices"), [(False, 1), (True, 1), (True, 3)])
def test_other_machines_are_kept_busy_and_this_one_is_left_in_peace(
    isolated: bool, devices: int, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tuning(monkeypatch, FakeSchedule(size=60))
    clock = Clock()
    runner = Busy(clock, lambda *what: 1e-3 + 1e-5 * what[2], 0.0, isolated=isolated, devices=devices)
    meanwhile: list[bool] = []

    class Watching(FakeBuilder):
        def submit(self, module: CandidateModule) -> Any:
            meanwhile.append(runner.running > 0)
            return super().submit(module)

    pools = Pools(Watching(clock, 0.0), runner)
    try:
        with Tuner(resolve(), 1, store, pools=pools) as tuner:
            tuner.tune(LAYER, trials=24)
    finally:
        pools.close()
    assert len(searched(store)) == len({record.trial_key for record in searched(store)}) == 24
    assert any(meanwhile) == isolated
    assert runner.most == 1 if not isolated else runner.most >= devices


# ---- beside other jobs --------------------------------------------------------------------------


def test_what_another_job_is_measuring_is_left_to_it(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, runner = fakes(monkeypatch, store, lambda *what: 1e-3 + 1e-5 * what[2], FakeSchedule(size=6))
    search = tuner.search(LAYER)
    with Claims(claims_path(store.path)) as other:
        taken = [c for c in search.race.ask(6) if c.picks["x"] in (2, 4)]
        for candidate in taken:
            assert other.take(search.key(candidate))
        search = tuner.search(LAYER)
        round_ = begin_round(search, 6)
        round_.measure(lambda: False)
        assert {x for _, _, x in runner.trials} == {0, 1, 3, 5}
        assert (search.blocked, search.over) == (True, "")
        assert not begin_round(search, 6).building
    round_ = begin_round(search, 6)  # the other one has ended without a result
    round_.measure(lambda: False)
    assert {x for _, _, x in runner.trials} == set(range(6))
    assert not begin_round(search, 1).building
    assert search.over == "exhausted"
    search.close()


def test_what_another_job_has_measured_is_learnt(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, runner = fakes(monkeypatch, store, lambda *what: 1e-3 + 1e-5 * what[2], FakeSchedule(size=8))
    with RecordStore(store.path) as same:
        one, other = tuner.search(LAYER), Tuner(resolve(), 1, same, pools=tuner.pools).search(LAYER)
        while not (one.over and other.over):
            for search in (one, other):
                begin_round(search, 2).measure(lambda: False)
        assert len(runner.trials) == len(set(runner.trials)) == 8
        assert one.state.done == other.state.done == 8
        assert one.state.best == other.state.best == 1e-3
        final_comparison(one)
        final_comparison(other)
    assert len(runner.duels) == 1


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
    path, script = tmp_path / "records.sqlite", tmp_path / "script.py"
    call = f"convgen.tune({SPEC.descriptor!r}, threads=1, trials=1000, records={str(path)!r})"
    script.write_text(f"import convgen\nprint('once', flush=True)\n{call}\n")  # no `if __name__ == "__main__"`
    process = subprocess.Popen(
        [sys.executable, str(script)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        with RecordStore(path) as store:
            while len(store) < 2:
                assert process.poll() is None
                time.sleep(0.05)
            assert len(_processes_of(tmp_path)) > 1
            if number is signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                process.kill()
            said, error = process.communicate(timeout=60)
            assert (process.returncode, said) == (-number, "once\n")
            assert store.check().ok
            assert all(record.outcome == "ok" for record in store.trials())
        if number is signal.SIGINT:
            assert error.count("Traceback") == 1  # no worker's
            assert error.rstrip().endswith("KeyboardInterrupt")
            left = {path.name for path in tmp_path.iterdir()} - {f"convgen-cpus-{os.getuid()}"}  # locks
            assert left <= {
                "script.py",
                "records.sqlite",
                "records.sqlite-wal",
                "records.sqlite-shm",
                "records.sqlite.claims",
            }
        _, alive = psutil.wait_procs(_processes_of(tmp_path), timeout=30)
        assert not alive, "workers outlive the process"
    finally:
        for left in _processes_of(tmp_path):
            left.kill()


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Those whose temporary files go there: the workers have process groups of their own."""

    def folder_of(process: psutil.Process) -> str | None:
        with suppress(psutil.Error):
            return str(process.environ().get("TMPDIR"))
        return None

    return [process for process in psutil.process_iter() if folder_of(process) == str(folder)]
