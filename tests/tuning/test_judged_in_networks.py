"""What wins alone must win in its network: which kernels a job keeps of a model whose order is known."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_tuning import Clock, FakeRunner, FakeSchedule, Speed, fake_pools, fake_tuning
from tiny_network import chain_model

from convgen.cli.tuned import network_line
from convgen.formats.onnx.reader import instances_from_onnx
from convgen.hardware.target import resolve
from convgen.measure.workers import LocalBuilder, LocalRunner, Pools
from convgen.problem.spec import ConvSpec
from convgen.records.answer import best_record, is_final
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
from convgen.tuning.job import Job
from convgen.tuning.job_run import JobRun
from convgen.tuning.networks import ROUNDS, whole_ratio, whole_seconds


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecordStore]:
    with RecordStore(tmp_path / "records.sqlite") as store:
        yield store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers in a row, the second and third alike."""
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    chain_model(path)
    return path


def gains(descriptor: str, schedule: str, x: int) -> float:
    """The farther from the default, the faster."""
    return 1e-3 / (1 + 0.02 * x)


def loses(descriptor: str, schedule: str, x: int) -> float:
    """The default is the fastest."""
    return 1e-3 * (1 + 0.02 * x)


def run_job(
    patch: pytest.MonkeyPatch, job: Job, store: RecordStore | None, chain_speed: Speed, **options: Any
) -> tuple[JobRun, FakeRunner]:
    """A job whose layers gain alone, and in a chain take what they are told."""
    fake_tuning(patch, FakeSchedule(size=12))
    pools = fake_pools(gains, clock=Clock(), **options)
    assert isinstance(pools.runner, FakeRunner)
    pools.runner.chain_speed = chain_speed
    run = JobRun(job, store, pools, now=Clock())
    run.run()
    run.close()
    return run, pools.runner


def layers_of(model: Path) -> list[ConvSpec]:
    return list(dict.fromkeys(entry.spec for entry in instances_from_onnx(model)))


def answer(store: RecordStore, spec: ConvSpec) -> TuningRecord:
    record = best_record(store, spec, resolve(), 1)
    assert record is not None
    return record


def job_of(*models: object, **options: Any) -> Job:
    return Job(tuple(map(str, models)), threads=(1,), **options)


# ---- what a job knows of order --------------------------------------------------------------------


def test_a_model_has_an_order_and_a_list_of_layers_has_none(model: Path, tmp_path: Path) -> None:
    names = [entry.spec.descriptor for entry in instances_from_onnx(model)]
    (tmp_path / "net.txt").write_text("\n".join(names))
    job = job_of(model, tmp_path / "net.txt", names[0])
    assert [spec.descriptor for spec in job.networks[str(model)]] == names
    assert list(job.networks) == [str(model)]
    assert [entry.count for entry in job.layers[0][1]] == [1, 2, 1]


def test_an_order_has_the_accuracy_that_was_asked_for(model: Path) -> None:
    from convgen.formats.entries import AccuracyRule

    job = job_of(model, accuracy=(AccuracyRule.parse("third=strict"),))
    assert [spec.accuracy for spec in job.networks[str(model)]] == ["standard", "standard", "strict", "standard"]


# ---- what is kept ---------------------------------------------------------------------------------


def test_what_wins_in_its_network_is_kept(model: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run, runner = run_job(monkeypatch, job_of(model), store, gains)
    (times,) = run.networks
    assert (times.layers, times.won, times.lost, times.reason) == (4, 3, 0, "")
    assert (times.default_seconds, times.ratio_default) == (pytest.approx(4e-3), pytest.approx([1.22] * 3))
    for spec in layers_of(model):
        record = answer(store, spec)
        network = (record.note or {})["network"]
        assert record.picks["x"] == 11
        assert network["models"] == [str(model)]
        assert network["ratio_default"] == pytest.approx([1.22] * 3)
    assert (answer(store, layers_of(model)[1]).note or {})["network"]["default_seconds"] == pytest.approx(2e-3)
    # All at once: the defaults, the winners, and what came next.
    (chained,) = runner.chained
    assert [[x for _, _, x in choice] for choice in chained] == [[0] * 4, [11] * 4, [10] * 4]


def test_what_loses_in_its_network_is_an_outcome_and_the_default_answers(
    model: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = layers_of(model)[1]

    def speed(descriptor: str, schedule: str, x: int) -> float:
        return (loses if descriptor == second.descriptor else gains)(descriptor, schedule, x)

    run, runner = run_job(monkeypatch, job_of(model), store, speed)
    (times,) = run.networks
    assert (times.won, times.lost) == (2, 1)
    assert times.seconds == pytest.approx(2e-3 + 2e-3 / 1.22)
    assert [answer(store, spec).picks["x"] for spec in layers_of(model)] == [11, 0, 11]
    lost = [r for r in store.trials(spec=second.descriptor) if is_final(r) and "network" in (r.note or {})]
    assert {r.picks["x"]: (r.note or {})["winner"] for r in lost} == {11: False, 10: False, 0: True}
    assert (lost[0].note or {})["network"]["ratio_default"][0] < 1
    assert run.layers[1].best is not None
    assert run.layers[1].best.picks["x"] == 0
    # What is kept is timed as a whole.
    assert [[x for _, _, x in choice] for choice in runner.chained[1]] == [[0] * 4, [11, 0, 0, 11]]
    said = network_line(times)
    assert said.startswith(f"{model}, {resolve().spelling} 1T: 4 convolutions one after another take 3.639 ms, 4 ms")
    assert said.endswith("tuned kernels are kept for 2 layers; those of 1 more won alone and do not pay here")


def test_what_came_second_alone_may_win_in_the_network(
    model: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_job(monkeypatch, job_of(model), store, lambda d, s, x: 2e-3 if x == 11 else gains(d, s, x))
    assert [answer(store, spec).picks["x"] for spec in layers_of(model)] == [10, 10, 10]
    assert run.networks[0].won == 3


def test_a_network_that_is_slower_as_a_whole_keeps_its_defaults(
    model: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer but the last seems to gain; together they slow each other down."""
    *_, last = layers_of(model)
    fake_tuning(monkeypatch, FakeSchedule(size=12))
    pools = fake_pools(gains, clock=Clock())
    runner = pools.runner
    assert isinstance(runner, FakeRunner)

    def speed(descriptor: str, schedule: str, x: int) -> float:
        return (loses if descriptor == last.descriptor or len(runner.chained) > 1 else gains)(descriptor, schedule, x)

    runner.chain_speed = speed
    run = JobRun(job_of(model), store, pools, now=Clock())
    run.run()
    run.close()
    (times,) = run.networks
    assert (times.won, times.lost, times.ratio_default) == (0, 3, [1.0, 1.0, 1.0])
    assert "all together they were slower than the defaults: 0.858×" in times.reason
    assert [answer(store, spec).picks["x"] for spec in layers_of(model)] == [0, 0, 0]


def test_no_model_pays_for_what_another_gains(
    model: Path, tmp_path: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What gains more in one model than it loses in the other makes the other slower."""
    other = tmp_path / "other.onnx"
    chain_model(other)
    calls: list[int] = []

    def speed(descriptor: str, schedule: str, x: int) -> float:
        calls.append(x)
        # The first model's three chains of four layers, then the other's.
        return gains(descriptor, schedule, x) if len(calls) <= 12 else 1e-3 * (1 + 0.001 * x)

    run, _ = run_job(monkeypatch, job_of(model, other), store, speed)
    assert [times.model for times in run.networks] == [str(model), str(other)]
    assert {answer(store, spec).picks["x"] for spec in layers_of(model)} == {0}
    assert (answer(store, layers_of(model)[0]).note or {})["network"]["models"] == [str(model), str(other)]


def test_what_disturbs_a_round_disturbs_few_instances() -> None:
    """A whole is judged by its instances' medians: in every round another one is disturbed."""
    rounds = [[1e-3 + 5e-3 * (i == number) for i in range(ROUNDS)] for number in range(ROUNDS)]
    quiet = [[0.9e-3] * ROUNDS] * ROUNDS
    assert whole_seconds(rounds) == pytest.approx(ROUNDS * 1e-3)
    middle, low, high = whole_ratio(rounds, quiet)
    assert middle == pytest.approx(1 / 0.9)
    assert 1.1 < low <= middle <= high < 1.25


# ---- when ----------------------------------------------------------------------------------------


def test_what_was_judged_is_not_judged_again(model: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(monkeypatch, job_of(model), store, gains)
    count = len(store)
    run, runner = run_job(monkeypatch, job_of(model), store, gains)
    assert (runner.chained, run.networks, len(store)) == ([], [], count)


def test_what_another_job_compared_alone_is_judged(
    model: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = job_of(*(spec.descriptor for spec in layers_of(model)), seed=1)
    alone, runner = run_job(monkeypatch, other, store, loses)
    assert (runner.chained, alone.networks) == ([], [])
    assert [layer.is_compared_alone for layer in alone.layers] == [True] * 3
    run, runner = run_job(monkeypatch, job_of(model), store, loses)
    assert {layer.state for layer in run.layers} == {"skipped"}
    assert (len(runner.trials), run.networks[0].lost) == (0, 3)
    assert [answer(store, spec).picks["x"] for spec in layers_of(model)] == [0, 0, 0]
    assert not any(layer.is_compared_alone for layer in run.layers)


def test_what_ctrl_c_left_is_judged_the_next_time(
    model: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(descriptor: str, schedule: str, x: int) -> float:
        signal.raise_signal(signal.SIGINT)
        return 1e-3

    with pytest.raises(KeyboardInterrupt):
        run_job(monkeypatch, job_of(model), store, interrupted)
    assert not any("network" in (record.note or {}) for record in store.trials())
    run, runner = run_job(monkeypatch, job_of(model), store, loses)
    assert (len(runner.trials), run.networks[0].lost) == (0, 3)


def test_layers_that_were_not_reached_take_no_part(
    model: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = layers_of(model)
    run_job(monkeypatch, job_of(first.descriptor), store, gains)
    run, runner = run_job(monkeypatch, job_of(model, trials=0), store, gains)
    assert (run.networks[0].layers, run.networks[0].won) == (1, 1)
    assert [len(choice) for choice in runner.chained[0]] == [1, 1, 1]


def test_where_nothing_runs_a_network_that_is_said(
    model: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, runner = run_job(monkeypatch, job_of(model), store, loses, isolated=True)
    assert runner.chained == []
    assert network_line(run.networks[0]).endswith("not timed: layers were compared alone, as on other machines")
    assert [layer.is_compared_alone for layer in run.layers] == [True] * 3


# ---- really measured ------------------------------------------------------------------------------


def test_a_small_model_is_tuned_and_timed_as_a_whole(model: Path, store: RecordStore) -> None:
    pools = Pools(LocalBuilder(2), LocalRunner())
    try:
        run = JobRun(job_of(model, trials_per_layer=3), store, pools)
        run.run()
        run.close()
        order = run.job.networks[str(model)]
        for layer in run.layers:  # whatever won: the answers run as a network
            assert layer.search is not None
            assert layer.best is not None
            assert (layer.best.note or {}).get("network") or layer.best.picks == dict(layer.search.race.default.picks)
        assert all(times.layers == len(order) and not times.reason for times in run.networks)
    finally:
        pools.close()


def test_a_chain_that_takes_too_long_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convgen.errors import MeasureError
    from convgen.lowering.candidates import default_candidate
    from convgen.measure.chain import run_chains
    from convgen.measure.trial import candidate_module

    pools = Pools(LocalBuilder(2), LocalRunner())
    try:
        specs = layers_of(model)
        target = resolve().on(1)
        paths = pools.build([candidate_module(spec, target, default_candidate(spec, target)) for spec in specs])
        libraries = {spec: path for spec, path in zip(specs, paths, strict=True) if isinstance(path, str)}
        order = [specs[0], specs[1], specs[1], specs[2]]
        samples = pools.chains(order, [libraries, libraries], 1, ROUNDS)
        assert [(len(rounds), {len(seconds) for seconds in rounds}) for rounds in samples] == [(ROUNDS, {4})] * 2
        named = {spec.descriptor: path for spec, path in libraries.items()}
        with pytest.raises(MeasureError, match=r"chain: expected 5 rounds within 0 s, found one to take"):
            run_chains([spec.descriptor for spec in order], [named], 1, ROUNDS, 1e-9)
        with pytest.raises(MeasureError, match="expected one for conv2d"):
            pools.chains(order, [{specs[0]: libraries[specs[0]]}], 1, ROUNDS)
    finally:
        pools.close()
