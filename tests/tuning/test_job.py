"""Jobs: what a file says, where the time goes, and that nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from fake_tuning import Clock, FakeRunner, FakeSchedule, Speed, fake_pools, fake_tuning
from onnx import parser
from paths import ROOT, SUPPORT

from convgen.cli.tuned import print_results
from convgen.errors import SpecError
from convgen.hardware.target import resolve
from convgen.problem.spec import ConvSpec
from convgen.records.answer import best_record, is_final
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.tuning.job import Job
from convgen.tuning.job_run import JobRun
from convgen.tuning.job_state import SPENT, JobState

SMALL = "conv1d n1 ic4 oc4 i20 k3 s1 p0"
LARGE = "conv2d n1 ic8 oc16 i10x10 k3x3 s1x1 p1x1 relu"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecordStore]:
    with RecordStore(tmp_path / "records.sqlite") as store:
        yield store


def layers_file(path: Path, *layers: tuple[str, str, int]) -> Path:
    rows = ",\n".join(f'{{ name = "{name}", spec = "{spec}", count = {count} }}' for name, spec, count in layers)
    path.write_text(f"layers = [\n{rows}\n]\n")
    return path


# ---- what a file says ----------------------------------------------------------------------------


def job_file(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text)
    return path


def test_a_file_says_everything(tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    layers_file(tmp_path / "nets" / "a.toml", ("first", LARGE, 3), ("second", SMALL, 1))
    layers_file(tmp_path / "nets" / "b.toml", ("other", SMALL, 2))
    model = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,3,8] x, float[4,3,3] w) => (float[N,4,6] y) { y = Conv(x, w) }"""
    (tmp_path / "nets" / "c.pb").write_bytes(parser.parse_model(model).SerializeToString())
    text = f"""
models = ["nets/a.toml", "nets/b.toml", "{LARGE}", "nets/c.pb"]
target = "cpu"
threads = [1, 2]
seconds = 1800
trials = 500
trials_per_layer = 40
patience = 12
exclude = ["cpu_winograd"]
seed = 7
dims = {{ N = 1 }}
records = "tuned.sqlite"
tracker = "localhost:9190"
device_key = "board"
cluster = "tcp://localhost:8786"
"""
    job = Job.from_file(job_file(tmp_path, text))
    assert job.records == tmp_path / "tuned.sqlite"
    assert (job.threads, job.seconds, job.trials, job.trials_per_layer) == ((1, 2), 1800, 500, 40)
    problems = job.problems()
    assert [(p.spec.descriptor, p.threads, p.count) for p in problems] == [
        (LARGE, 1, 4),
        (SMALL, 1, 3),
        ("conv1d n1 ic3 oc4 i8 k3 s1 p0 nobias", 1, 1),
        (LARGE, 2, 4),
        (SMALL, 2, 3),
        ("conv1d n1 ic3 oc4 i8 k3 s1 p0 nobias", 2, 1),
    ]
    assert problems[0].models == ("nets/a.toml", LARGE)
    assert problems[1].names == ("second", "other")
    again = Job.from_file(job_file(tmp_path, job.to_toml()))
    assert {**vars(again), "_read": None} == {**vars(job), "_read": None}
    assert again.id == job.id


def test_defaults(tmp_path: Path) -> None:
    job = Job.from_file(job_file(tmp_path, f'models = ["{SMALL}"]'))
    (problem,) = job.problems()
    assert (problem.target, problem.threads) == (resolve(), resolve().cores)
    assert (job.seconds, job.trials, job.records) == (None, None, None)
    assert Job.from_file(job_file(tmp_path, job.to_toml())) == job


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file: expected some content, found an empty file"),
        ("seed = 1", "models: expected a list of files or descriptors, found no such key"),
        ("models = []", "models: expected a list of files or descriptors, found []"),
        ("models = [1]", "models: expected a list of files or descriptors, found [1]"),
        ('models = "a.onnx"', 'models: expected a list of files or descriptors, found "a.onnx"'),
        ('models = ["a.onnx"]', "models[0]: expected an existing file or a descriptor, found 'a.onnx'"),
        ("model = []", "model: expected one of models, target, "),
        ("{}\nthread = 1", "thread: expected one of models"),
        ("{}\nthreads = 0", "threads: expected a number of threads, or a list of them, found 0"),
        ("{}\nthreads = [1, true]", "threads: expected a number of threads, or a list of them, found [1, true]"),
        ('{}\nseconds = "soon"', 'seconds: expected a number >= 0, found "soon"'),
        ("{}\nseconds = nan", "seconds: expected a number >= 0, found NaN"),
        ("{}\ntrials = 2.5", "trials: expected an integer >= 0, found 2.5"),
        ("{}\npatience = 0", "patience: expected an integer >= 1, found 0"),
        ('{}\ntarget = "gpu"', "targets[0]: expected one of "),
        ('{}\ntarget = "cpu"\ntargets = ["cpu"]', "targets: expected one of target and targets, found both"),
        ('{}\nexclude = ["nothing"]', "exclude: expected some of "),
        ('{}\ndims = {{ N = "1" }}', 'dims: expected a table of sizes, such as {{ N = 1 }}, found {{"N": "1"}}'),
        ('{}\ntracker = "host"', 'tracker: expected host:port, found "host"'),
        ('{}\ntracker = "host:1"', "device_key: expected the key of devices, beside its companion, found no such key"),
        ("{}\nwhen = 2026-01-01", "when: expected one of models"),
        ("models = [", "file: expected TOML, found "),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = job_file(tmp_path, text.format(f'models = ["{SMALL}"]') if text.startswith("{}") else text)
    with pytest.raises(SpecError) as error:
        Job.from_file(path)
    assert str(error.value).startswith(f"{path}: {message.replace('{{', '{').replace('}}', '}')}")


def test_who_writes_layers_is_told_of_models(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"layers: expected one of models, .*; did you mean models\?$"):
        Job.from_file(job_file(tmp_path, f'layers = ["{SMALL}"]'))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"{tmp_path}/none.toml: file: expected an existing file"):
        Job.from_file(tmp_path / "none.toml")


def test_the_id_is_of_what_is_tuned_not_of_the_budget(tmp_path: Path) -> None:
    job = Job((SMALL, LARGE), threads=(1,))
    layers_file(tmp_path / "net.toml", ("x", LARGE, 5), ("y", SMALL, 1))
    same = [
        Job((SMALL, LARGE), threads=(1,), seconds=9, trials=3, patience=5, trials_per_layer=7),
        Job((LARGE, SMALL), threads=(1,)),
        Job(("net.toml",), threads=(1,), folder=tmp_path),
    ]
    other = [
        Job((SMALL,), threads=(1,)),
        Job((SMALL, LARGE), threads=(2,)),
        Job((SMALL, LARGE), threads=(1,), seed=1),
        Job((SMALL, LARGE), threads=(1,), exclude=("reference",)),
        Job((SMALL, LARGE), ("cpu:haswell",), threads=(1,)),
    ]
    assert {one.id for one in same} == {job.id}
    assert len({one.id for one in [job, *other]}) == 6


# ---- running -------------------------------------------------------------------------------------

FAST = "conv1d n1 ic4 oc4 i20 k3 s1 p0"
SLOW = "conv1d n1 ic8 oc8 i20 k3 s1 p0"


def gains(descriptor: str, schedule: str, x: int) -> float:
    """The farther from the default, the faster."""
    return 1e-3 / (1 + 0.02 * x)


def run_job(
    patch: pytest.MonkeyPatch,
    job: Job,
    store: RecordStore | None,
    speed: Speed = gains,
    size: int = 40,
    clock: Clock | None = None,
    **options: Any,
) -> tuple[JobRun, FakeRunner]:
    fake_tuning(patch, FakeSchedule(size=size))
    clock = clock or Clock()
    pools = fake_pools(speed, clock=clock, **options)
    run = JobRun(job, store, pools, now=clock)
    run.run()
    run.close()
    assert isinstance(pools.runner, FakeRunner)
    return run, pools.runner


def searched(store: RecordStore) -> list[TuningRecord]:
    return [record for record in store.trials() if not is_final(record)]


def test_trials_are_totals_over_all_runs(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for total in (7, 7, 20):
        run, _ = run_job(monkeypatch, Job((FAST, SLOW), threads=(1,), trials=total), store)
        assert run.trials == len(searched(store)) == len({record.trial_key for record in searched(store)}) == total
    assert {layer.state for layer in run.layers} == {"done"}
    assert {(r.note or {})["job"] for r in store.trials()} == {run.job.id}


def test_seconds_are_totals_over_all_runs(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of four costs four times the compiling and half a second each."""
    clock = Clock()
    for total in (60.0, 60.0, 100.0):
        run, _ = run_job(monkeypatch, Job((FAST, SLOW), threads=(1,), seconds=total), store, clock=clock, size=900)
        spent = sum((record.note or {}).get("cost", 0.0) for record in store.trials())
        assert run.spent == pytest.approx(spent)
        assert total - 12.0 <= spent <= total + 6.0
        assert 1000.0 + spent == pytest.approx(clock.now, abs=6.5)  # but for what was compiled in vain


def test_what_was_begun_within_a_budget_is_kept(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default, however long it takes; and no more, now or in another run."""
    for _ in range(2):
        run, _ = run_job(monkeypatch, Job((FAST, SLOW), threads=(1,), seconds=10), store, build=30.0)
        assert [record.picks["x"] for record in searched(store)] == [0]
        assert sorted((layer.state, layer.reason) for layer in run.layers) == [("done", SPENT), ("waiting", "")]
        assert run.spent > 10


def test_a_layer_whose_search_the_budget_has_ended_is_not_being_searched(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was not compared, as nothing seems better than the default, and there was no time; another one was."""
    job = Job((FAST, SLOW), threads=(1,), seconds=30)
    run, _ = run_job(monkeypatch, job, store, lambda *_: 1e-3, size=900)
    states = {layer.state for layer in run.layers}
    assert "searching" not in states
    assert {layer.reason for layer in run.layers if layer.state != "waiting"} == {SPENT}
    asked = JobState(replace(job, seconds=1.0), store)
    asked.settle()
    asked.close()
    assert {(layer.state, layer.reason) for layer in asked.layers if layer.search and not layer.search.answered} <= {
        ("out of budget", SPENT)
    }
    again, _ = run_job(monkeypatch, replace(job, seconds=1.0), store, lambda *_: 1e-3, size=900)
    assert again.measured == 0
    print_results(again, False, False, None)
    assert "the budget is spent (" in (said := capsys.readouterr().err)
    assert " of --seconds 1), and nothing was measured; the same command with a larger one goes on" in said


def test_a_budget_of_no_trials_is_none(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job((FAST, SLOW), threads=(1,))
    for none in (replace(job, trials=0), replace(job, trials_per_layer=0), replace(job, seconds=0)):
        run, _ = run_job(monkeypatch, none, store)
        assert {layer.state for layer in run.layers} == {"waiting"}
    assert not len(store)


def test_without_time_layers_are_not_reached(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_job(monkeypatch, Job((FAST, SLOW), threads=(1,), seconds=0), store)
    assert [(layer.state, layer.reason) for layer in run.layers] == [("waiting", "")] * 2


def test_trials_per_layer_and_patience(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(monkeypatch, Job((FAST, SLOW), threads=(1, 2), trials_per_layer=6), store)
    assert Counter((r.spec, r.threads) for r in searched(store)) == {
        (spec, threads): 6 for spec in (FAST, SLOW) for threads in (1, 2)
    }
    other = Job((LARGE,), threads=(1,), patience=5)
    run_job(monkeypatch, other, store, lambda *_: 1e-3, size=500)
    assert sum(record.spec == LARGE for record in searched(store)) == 6


def test_every_default_comes_first_then_what_pays_most(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layers gain alike, but one occurs nine times: it gets the time until the other is worth more."""
    folder = store.path.parent
    layers_file(folder / "net.toml", ("rare", FAST, 1), ("frequent", SLOW, 9))
    job = Job(("net.toml",), threads=(1,), trials=20, folder=folder)
    _, runner = run_job(monkeypatch, job, store, size=300)
    order = [descriptor for descriptor, _, _ in runner.trials]
    assert set(order[:4]) == {FAST, SLOW}
    assert runner.trials[0][2] == 0
    assert Counter(order)[SLOW] > 2 * Counter(order)[FAST]


def test_the_defaults_of_all_schedules_come_before_any_search(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a small budget finds out where the wrong schedule is taken, in all layers."""
    fake_tuning(monkeypatch, FakeSchedule("taken", cost=1e-3), FakeSchedule("other", cost=2e-3))
    pools = fake_pools(lambda descriptor, schedule, x: 1e-3 if schedule == "other" else 2e-3)
    run = JobRun(Job((FAST, SLOW, LARGE), threads=(1,), trials=8), store, pools, now=Clock())
    run.run()
    run.close()
    assert isinstance(pools.runner, FakeRunner)
    defaults = [(spec, schedule, 0) for spec in (FAST, SLOW, LARGE) for schedule in ("taken", "other")]
    assert sorted(pools.runner.trials[:6]) == sorted(defaults)
    assert all(x for _, _, x in pools.runner.trials[6:])
    assert {layer.best.schedule for layer in run.layers if layer.best} == {"other"}


def test_time_goes_where_there_is_something_to_gain(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(descriptor: str, schedule: str, x: int) -> float:
        return gains(descriptor, schedule, x) if descriptor == FAST else 1e-3

    _, runner = run_job(monkeypatch, Job((FAST, SLOW), threads=(1,), trials=40), store, speed, size=300)
    counts = Counter(descriptor for descriptor, _, _ in runner.trials)
    assert counts[FAST] > counts[SLOW]


def test_what_the_store_answers_is_skipped(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(monkeypatch, Job((FAST,), threads=(1,), trials=8), store)
    run, runner = run_job(monkeypatch, Job((FAST, SLOW), threads=(1,), trials=8), store)
    assert [layer.state for layer in run.layers] == ["skipped", "done"]
    assert {descriptor for descriptor, _, _ in runner.trials} == {SLOW}
    assert run.layers[0].best is not None
    # Unless more trials are asked for.
    run, runner = run_job(monkeypatch, Job((FAST, SLOW), threads=(1,), trials_per_layer=10), store)
    assert {descriptor for descriptor, _, _ in runner.trials} == {FAST, SLOW}
    assert [layer.progress.done for layer in run.layers if layer.progress] == [10, 10]


def test_nothing_is_slower_than_the_default(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the search was misled, the default answers."""
    rng = random.Random(0)
    fake_tuning(monkeypatch, FakeSchedule(size=40))
    pools = fake_pools(lambda *_: rng.uniform(0.5e-3, 1.5e-3))
    assert isinstance(pools.runner, FakeRunner)
    true = {spec: {x: rng.uniform(0.7e-3, 2e-3) for x in range(40)} for spec in (FAST, SLOW, LARGE)}
    pools.runner.duel_speed = lambda spec, _, x: true[spec][x]
    run = JobRun(Job((FAST, SLOW, LARGE), threads=(1,), trials=30), store, pools, now=Clock())
    run.run()
    for spec in true:
        chosen = best_record(store, ConvSpec.parse(spec), resolve(), 1)
        assert chosen is not None
        assert true[spec][int(chosen.picks["x"])] <= true[spec][0]
    run.close()


def test_what_is_excluded_does_not_make_builds_slower(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default, and what won before, are compared with whatever is searched."""
    seconds = {"good": 1e-3, "bad": 3e-3}

    def speed(descriptor: str, schedule: str, x: int) -> float:
        return seconds[schedule] / (1 + 0.02 * x)

    fake_tuning(monkeypatch, FakeSchedule("good", cost=1e-3), FakeSchedule("bad", cost=2e-3))

    def run_without(*exclude: str) -> tuple[JobRun, FakeRunner]:
        pools = fake_pools(speed)
        run = JobRun(Job((FAST,), threads=(1,), exclude=exclude, patience=40), store, pools, now=Clock())
        run.run()
        run.close()
        assert isinstance(pools.runner, FakeRunner)
        return run, pools.runner

    def answer() -> tuple[str, int]:
        chosen = best_record(store, ConvSpec.parse(FAST), resolve(), 1)
        assert chosen is not None
        return chosen.schedule, int(chosen.picks["x"])

    run, runner = run_without("good")
    assert answer() == ("good", 0)
    assert {(schedule, x) for _, schedule, x in runner.trials if schedule == "good"} == {("good", 0)}
    assert run.layers[0].best is not None
    assert (run.layers[0].best.note or {})["ratio_default"][0] == 1.0
    assert run_without("good")[1].trials == []  # it is done
    assert "good" in {schedule for _, schedule, _ in run_without()[1].trials}
    assert answer() == ("good", 19)
    runner = run_without("good", "reference")[1]
    assert answer() == ("good", 19)
    assert (FAST, "good", 19) in runner.duels[-1]


def test_failures_of_every_kind_are_counted_and_the_job_goes_on(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["crash", "timeout", "memory", "wrong", "run_error"]

    def speed(descriptor: str, schedule: str, x: int) -> float | str:
        return kinds[x % 7] if x % 7 < 5 and x else 1e-3

    run, _ = run_job(monkeypatch, Job((FAST,), threads=(1,), trials=21), store, speed, size=21)
    (layer,) = run.layers
    assert layer.progress is not None
    assert layer.progress.failures == {"crash": 2, **dict.fromkeys(kinds[1:], 3)}
    assert layer.state == "done"


def test_a_layer_that_cannot_be_tuned_does_not_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(descriptor: str, *_: Any) -> float | str:
        return "wrong" if descriptor == FAST else 1e-3

    large = "conv3d n512 ic64 oc64 i1024x256x256 k1"
    (tmp_path / "net.txt").write_text(f"{FAST}\nconv1d n0 ic4 oc4 i20 k3\n{large}\n{SLOW}\n")
    job = Job(("net.txt",), threads=(1,), trials=60, folder=tmp_path)
    run, _ = run_job(monkeypatch, job, None, speed, size=5)
    assert [layer.state for layer in run.layers] == ["failed", "skipped", "done"]
    assert [reason.partition("found")[0] for reason in job.skipped] == [
        f"{tmp_path}/net.txt: line 3: src: expected at most 2147483647 elements (int32 indexing), "
    ]
    with pytest.raises(SpecError, match="src: expected at most 2147483647 elements"):
        _ = Job((large,)).layers
    assert run.layers[0].reason == "no candidate was right: wrong 5"


def test_status_measures_nothing(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job((FAST, SLOW), threads=(1,), trials=6)
    before, _ = run_job(monkeypatch, job, store)
    count = len(store)
    run = JobState(job, store)
    run.close()
    assert len(store) == count
    assert (run.trials, run.spent) == (6, pytest.approx(before.spent, abs=1.0))
    assert [layer.best for layer in run.layers] == [layer.best for layer in before.layers]
    assert [layer.progress.failures for layer in run.layers if layer.progress] == [Counter(), Counter()]


def test_ctrl_c_keeps_what_was_measured(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(descriptor: str, schedule: str, x: int) -> float:
        if len(store) == 5:
            signal.raise_signal(signal.SIGINT)
        return 1e-3

    with pytest.raises(KeyboardInterrupt):
        run_job(monkeypatch, Job((FAST, SLOW), threads=(1,)), store, speed)
    assert 5 <= len(store) <= 6
    assert not any(is_final(record) for record in store.trials())
    run, _ = run_job(monkeypatch, Job((FAST, SLOW), threads=(1,), trials=8), store)
    assert run.trials == len(searched(store)) == 8


# ---- sudden ends, and company ---------------------------------------------------------------------

SCRIPT = """
import json, sys, time
import pytest
from fake_tuning import FakeSchedule, fake_pools, fake_tuning
from convgen.tuning.job import Job
from convgen.tuning.job_run import JobRun
from convgen.records.store import RecordStore

path, trials = sys.argv[1], int(sys.argv[2])
patch = pytest.MonkeyPatch()
fake_tuning(patch, FakeSchedule(size=60))

def speed(descriptor, schedule, x):
    time.sleep(0.004)
    return 1e-3 / (1 + x % 7)

with RecordStore(path) as store:
    run = JobRun(Job(tuple(sys.argv[3:]), threads=(1,), trials=trials), store, fake_pools(speed))
    print("ready", flush=True)
    run.run()
    print(json.dumps([run.measured, run.trials, [layer.state for layer in run.layers]]))
"""


def start(path: Path, trials: int, *models: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    command = [sys.executable, "-c", SCRIPT, str(path), str(trials), *models]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_kill_9_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    path, total = tmp_path / "records.sqlite", 60
    with RecordStore(path) as store:
        for stop in (1, 15, 40):
            process = start(path, total, FAST, SLOW)
            try:
                give_up = time.monotonic() + 60
                while len(store) < stop:
                    assert process.poll() is None
                    assert time.monotonic() < give_up
                    time.sleep(0.002)
            finally:
                process.kill()
                process.communicate()
            assert store.check().ok
        before = len(store)
        process = start(path, total, FAST, SLOW)
        out, _ = process.communicate(timeout=120)
        measured, trials, states = json.loads(out.splitlines()[-1])
        assert (trials, states) == (total, ["done", "done"])
        assert measured == total - before  # neither more nor less than what was missing
        assert len({record.trial_key for record in searched(store)}) == len(searched(store)) == total
        assert sum((record.note or {}).get("winner", False) for record in store.trials()) == 2


def test_two_jobs_on_one_store_do_not_repeat_each_other(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    with RecordStore(path) as store:
        # Other jobs, because of another layer each, that share two.
        processes = [start(path, 10_000, FAST, SLOW, own) for own in (LARGE, "conv1d n1 ic2 oc2 i9 k3")]
        outs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
        measured = [json.loads(out.splitlines()[-1])[0] for out in outs]
        assert len({record.trial_key for record in searched(store)}) == len(searched(store)) == sum(measured)
        jobs = {(record.note or {})["job"] for record in searched(store) if record.spec in (FAST, SLOW)}
        assert min(measured) > 0
        assert len(jobs) >= 1


@pytest.mark.parametrize("hours", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_hours_stay_flat_in_memory(hours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many trials by a false clock; what a trial leaves in memory is a fraction of its record."""
    clock = Clock()
    models = tuple(f"conv1d n1 ic4 oc{oc} i20 k3" for oc in range(1, 41))
    fake_tuning(monkeypatch, FakeSchedule(size=400))
    cheap: Callable[..., Any] = lambda self, pool, count: pool[:count]  # noqa: E731 - no ranking of thousands
    monkeypatch.setattr("convgen.tuning.race.Race._choose", cheap)
    monkeypatch.setattr("convgen.tuning.race.Race._alive", lambda self, schedule: True)
    pools = fake_pools(lambda *what: 1e-3 / (1 + what[2] % 97), clock=clock, build=3.0, run=1.0)
    job = Job(models, threads=(1,), seconds=hours * 3600.0, patience=100_000)
    sizes: list[tuple[int, int]] = []

    def report(run: JobState, layer: Any) -> None:
        if run.measured % 250 == 0:
            sizes.append((run.measured, tracemalloc.get_traced_memory()[0]))

    monkeypatch.setattr(RecordStore, "_flush", lambda self: None)
    with RecordStore(tmp_path / "records.sqlite") as store:
        store._run(lambda db: db.execute("PRAGMA synchronous = OFF"))  # hours in seconds
        run = JobRun(job, store, pools, report=report, now=clock)
        tracemalloc.start()
        try:
            run.run()
        finally:
            tracemalloc.stop()
            run.close()
    assert run.spent == pytest.approx(hours * 3600.0, rel=0.02)
    assert run.measured > 500 * hours
    # The median: that Python's own table of interned strings doubles now and then is nobody's leak.
    growth = [(most - least) / (last - first) for (first, least), (last, most) in pairwise(sizes[1:])]
    assert len(growth) >= 2
    assert median(growth) < 2000


def test_the_example_is_a_job() -> None:
    job = Job.from_file(ROOT / "examples" / "job.toml")
    assert (job.threads, job.seconds) == ((1, 2), 120)
    assert len(job.problems()) == 4
