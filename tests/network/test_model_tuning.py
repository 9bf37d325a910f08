"""A model tuned as a whole: its layers are those of the compiled network, which judges what wins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from fake_tuning import Clock, FakeSchedule, Speed, fake_pools, fake_tuning
from network_models import arrays_for, expected, furthest, model_of
from onnx import ModelProto, helper

import convgen
from convgen.cli import cli
from convgen.errors import SpecError
from convgen.hardware.target import resolve
from convgen.lowering.candidates import default_candidate, reference_candidate
from convgen.lowering.schedule import Candidate
from convgen.network.choice import recorded_choice
from convgen.network.tuning import ModelTuning
from convgen.problem.spec import ConvSpec
from convgen.records.answer import best_record, candidate_record
from convgen.records.outcome import Result
from convgen.records.store import RecordStore
from convgen.tuning.job import Job
from convgen.tuning.job_run import JobRun
from convgen.tuning.networks import ROUNDS, Choice
from convgen.tuning.search import Search

pytestmark = pytest.mark.timeout(600)
ERROR = 2e-5


def two_layers() -> ModelProto:
    """Two convolutions, pooled in between."""
    rng = np.random.default_rng(5)
    weights = {
        name: (rng.standard_normal(shape) * 0.1).astype(np.float32)
        for name, shape in (("a", (16, 3, 3, 3)), ("b", (24, 16, 1, 1)))
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["first"], name="one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["first"], ["positive"]),
        helper.make_node("MaxPool", ["positive"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["pooled", "b"], ["y"], name="two"),
    ]
    return model_of(nodes, {"x": (1, 3, 20, 20)}, ["y"], weights)


@pytest.fixture(scope="module")
def tuning() -> ModelTuning:
    return ModelTuning(two_layers(), "cpu", 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecordStore]:
    with RecordStore(tmp_path / "records.sqlite") as store:
        yield store


def specs_of(tuning: ModelTuning) -> list[ConvSpec]:
    return [entry.spec for _, entries in tuning.job(Job(())).layers for entry in entries]


class Told:
    """Judges networks by what it is told a layer takes, and everything else."""

    whole = True

    def __init__(self, speed: Speed, rest: Callable[[Choice], float]) -> None:
        self.speed, self.rest, self.asked = speed, rest, list[Choice]()

    def usable(self, search: Search, candidates: list[Candidate]) -> list[Candidate]:
        return candidates

    def times(self, model: str, order: Sequence[ConvSpec], choices: Sequence[Choice]) -> list[list[list[float]]]:
        self.asked += choices

        def run(choice: Choice) -> list[float]:
            own = [float(self.speed(spec.descriptor, "", choice[spec].picks.x)) for spec in order]
            return [*own, self.rest(choice)]

        return [[run(choice)] * ROUNDS for choice in choices]


def gains(descriptor: str, schedule: str, x: int) -> float:
    return 1e-3 / (1 + 0.02 * x)


def judged(patch: pytest.MonkeyPatch, tuning: ModelTuning, store: RecordStore, told: Told) -> JobRun:
    fake_tuning(patch, FakeSchedule(size=12))
    run = JobRun(tuning.job(Job(())), store, fake_pools(gains, clock=Clock()), timing=told, now=Clock())
    run.run()
    run.close()
    return run


def test_layers_are_those_of_the_compiled_network(tuning: ModelTuning) -> None:
    network = convgen.compile(two_layers(), threads=1, records=False)
    listed = [layer["spec"] for layer in network.layers() if "spec" in layer]
    job = tuning.job(Job((), seconds=3.0))
    assert [spec.descriptor for spec in job.networks["small"]] == listed
    assert job.seconds == 3.0
    assert [problem.threads for problem in job.problems()] == [1, 1]
    assert [name for _, entries in job.layers for entry in entries for name in entry.names] == ["one", "two"]


def test_every_size_is_a_network_of_the_job() -> None:
    model = two_layers()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    tuned = ModelTuning(model, "cpu", 1, dims={"N": (1, 2)})
    assert [(name, [spec.n for spec in order]) for name, order in tuned.job(Job(())).networks.items()] == [
        ("small N1", [1, 1]),
        ("small N2", [2, 2]),
    ]


def test_times_are_of_networks_that_have_the_kernels_that_were_chosen(tuning: ModelTuning) -> None:
    first, second = specs_of(tuning)
    chosen = {first: reference_candidate(first, tuning.target)}
    samples = tuning.times("small", [first], [{first: default_candidate(first, tuning.target)}, chosen])
    assert [len(rounds) for rounds in samples] == [ROUNDS, ROUNDS]
    assert all(len(taken) == 2 and min(taken) > 0 for rounds in samples for taken in rounds)  # the layer, the rest
    network = tuning.network(chosen)
    schedules = [layer["schedule"] for layer in network.layers() if "spec" in layer]
    assert schedules == ["reference", default_candidate(second, tuning.target).schedule.id]
    inputs = arrays_for(two_layers())
    assert furthest(network(inputs["x"]), expected(two_layers(), inputs)) < ERROR
    assert tuning.expected().keys() == {first, second}


def test_what_makes_the_network_faster_is_kept(
    tuning: ModelTuning, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(gains, lambda choice: 1e-3)
    run = judged(monkeypatch, tuning, store, told)
    (times,) = run.networks
    assert (times.whole, times.layers, times.won, times.lost, times.reason) == (True, 2, 2, 0, "")
    assert times.default_seconds == pytest.approx(3e-3)
    assert times.seconds == pytest.approx(1e-3 + 2e-3 / 1.22)
    for spec in specs_of(tuning):
        record = best_record(store, spec, tuning.target, 1)
        assert record is not None
        assert record.picks["x"] == 11


def test_layers_that_gain_and_slow_down_the_rest_lose(
    tuning: ModelTuning, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By more than they gain: by so little that a chain, which has no rest, would not count it."""

    def rest(choice: Choice) -> float:
        tuned = any(candidate.picks.x for candidate in choice.values())
        return 1e-3 + (2e-3 - 2e-3 / 1.22 + 1e-5 if tuned else 0.0)

    run = judged(monkeypatch, tuning, store, Told(gains, rest))
    (times,) = run.networks
    assert (times.won, times.lost) == (0, 2)
    assert "all together they were slower than the defaults" in times.reason
    for spec in specs_of(tuning):
        record = best_record(store, spec, tuning.target, 1)
        assert record is not None
        assert record.picks["x"] == 0


def test_what_was_judged_is_not_judged_again(
    tuning: ModelTuning, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(gains, lambda choice: 1e-3)
    judged(monkeypatch, tuning, store, told)
    before = len(told.asked)
    again = judged(monkeypatch, tuning, store, told)
    assert (len(told.asked), again.measured) == (before, 0)


def test_a_recorded_winner_is_what_the_next_compile_uses(tuning: ModelTuning, store: RecordStore) -> None:
    first, _ = specs_of(tuning)
    won = reference_candidate(first, tuning.target)
    note: dict[str, Any] = {"final": True, "winner": True, "default_seconds": 2e-6, "ratio_default": [2.0, 1.9, 2.1]}
    store.add_all([candidate_record(first, tuning.target, 1, won, Result("ok", (1e-6,) * 3), note)])
    with recorded_choice(store, tuning.target, 1) as choose:
        assert choose(first) == won


def test_a_model_without_convolutions_has_nothing_to_tune() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 3, 4, 4)}, ["y"])
    with pytest.raises(SpecError, match="one with convolutions to tune"):
        ModelTuning(model, "cpu", 1)


def test_from_the_command_line(tmp_path: Path) -> None:
    path, records = tmp_path / "small.onnx", tmp_path / "records.sqlite"
    onnx.save(two_layers(), path)
    arguments = ["tune", str(path), "--whole", "--threads", "1", "--trials", "3", "--records", str(records), "--json"]
    page = tmp_path / "page.html"
    found = CliRunner().invoke(cli, [*arguments, "--report", str(page)])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert all(name in page.read_text() for name in (">one<br>", ">two<br>", "small, 1 thread"))
    without_suffix = shutil.copy(path, tmp_path / "small")
    shown = ["report", str(records), str(without_suffix), "--whole", "--threads", "1", "--out", str(page), "--json"]
    (profile,) = json.loads(CliRunner().invoke(cli, shown).stdout)["profiles"]
    assert [step["name"] for step in profile["steps"] if step["schedule"]] == ["one", "two"]
    assert [layer["names"] for layer in document["layers"]] == [["one"], ["two"]]
    assert all(layer["best"] for layer in document["layers"])
    again = CliRunner().invoke(cli, arguments)
    assert [layer["trials"] for layer in json.loads(again.stdout)["layers"]] == [0, 0]
    compiled = ["compile", str(path), "--threads", "1", "--seconds", "1", "--records", str(records)]
    made = CliRunner().invoke(cli, [*compiled, "--out", str(tmp_path / "out"), "--json"])
    assert made.exit_code == 0, made.output
    layers = json.loads(made.stdout)["manifest"]["sizes"][0]["layers"]
    best = {layer["spec"]: layer["best"]["schedule"] for layer in document["layers"]}
    assert {layer["spec"]: layer["schedule"] for layer in layers if "spec" in layer}.keys() == best.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "conv2d n1 ic3 oc4 i8x8 k3x3", "--whole"], "expected one ONNX model, found conv2d"),
        (["tune", "{model}", "{model}", "--whole"], "expected one ONNX model"),
        (["tune", "{model}", "--whole", "--threads", "1,2"], "expected one target and one number of threads"),
        (["tune", "{model}", "--whole", "--accuracy", "one=strict"], "expected an accuracy class for the whole model"),
        (["tune", "{model}", "--report", "page.html"], "--report needs --whole"),
        (["report", "records.sqlite", "--whole"], "expected a STORE and one ONNX model"),
        (["compile", "{model}", "--seconds", "1", "--no-records", "--out", "x"], "expected records"),
        (["compile", "{model}", "--seconds", "1", "--for", "onnxruntime", "--out", "x"], "expected a C library"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    onnx.save(two_layers(), path)
    found = CliRunner().invoke(cli, [word.format(model=path) for word in arguments])
    assert found.exit_code == 2
    assert message in found.output


def test_a_budget_needs_records() -> None:
    with pytest.raises(SpecError, match="records, where what wins is kept"):
        convgen.compile(two_layers(), threads=1, seconds=1, records=False)


def test_the_target_is_this_machines(tuning: ModelTuning) -> None:
    assert tuning.target == resolve("cpu").on(1)
