"""Where a job stands, in words: nothing is said to be searched that nothing searches."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stores
from commands import TINY, Run
from fake_tuning import Clock, FakeSchedule, fake_pools, fake_tuning
from made_records import TEXT, record
from tiny_network import chain_model

from convgen.cli.tuned import print_results
from convgen.cli.view import remaining
from convgen.tuning.job import Job
from convgen.tuning.job_run import JobRun


def test_a_layer_that_nothing_searches_now_is_begun(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    job = ["tune", TEXT, "--threads", 2, "--records", stores.fill(tmp_path / "r.sqlite", [record()])]
    (layer,) = run_json(*job, "--status")["layers"]
    assert (layer["state"], layer["known_trials"]) == ("begun", 1)
    out = run(*job, "--status")[1]
    assert "begun" in out
    assert "searching" not in out
    (layer,) = run_json(*job, "--trials", 1, "--status")["layers"]  # that many are made
    assert layer["state"] == "begun"


def test_after_ctrl_c_nothing_is_searched(
    tmp_path: Path, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: JobRun) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JobRun, "run", interrupted)
    job = ["tune", TEXT, "--threads", 2, "--records", stores.fill(tmp_path / "r.sqlite", [record()])]
    found = run_json(*job, "--trials", 8, status=130)
    assert [layer["state"] for layer in found["layers"]] == ["begun"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_that_there_is_no_store_is_said(options: list[str], tmp_path: Path, run: Run) -> None:
    """A mistyped one looks like a job that has not begun."""
    path = tmp_path / "typo.sqlite"
    status, out, err = run("tune", TEXT, "--status", "--records", path, *options)
    assert (status, "waiting" in out) == (0, True)
    assert f"{path}: no such file: nothing is recorded there yet" in err
    assert not path.exists()
    assert "no such file" not in run("tune", TEXT, "--status", "--records", stores.fill(path, [record()]), *options)[2]


def gains(descriptor: str, schedule: str, x: int) -> float:
    """The farther from the default, the faster."""
    return 1e-3 / (1 + 0.02 * x)


@pytest.mark.parametrize(("build", "is_late"), [(30.0, True), (0.1, False)])
def test_what_takes_longer_than_the_budget_says_why(
    build: float, is_late: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it does, and in the end."""
    fake_tuning(monkeypatch, FakeSchedule(size=40))
    clock, said = Clock(), list[str]()
    pools = fake_pools(gains, clock=clock, build=build)
    job = Job((TINY,), threads=(1,), seconds=40)
    run = JobRun(job, None, pools, report=lambda run, _: said.append(remaining(run)), now=clock)
    run.run()
    run.close()
    assert (run.over > 5) == is_late
    assert any(re.fullmatch(r"comparing what was found, \S+( s)? over the budget", text) for text in said) == is_late
    print_results(run, False, False, None)
    err = capsys.readouterr().err
    assert ("over the budget of 40 s: what was begun is finished, and what seems faster is compared" in err) == is_late


def test_that_networks_are_timed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is done: their kernels may take minutes to compile."""
    chain_model(tmp_path / "tiny.onnx")
    fake_tuning(monkeypatch, FakeSchedule(size=12))
    clock, said = Clock(), list[str]()
    pools = fake_pools(gains, clock=clock)
    job = Job((str(tmp_path / "tiny.onnx"),), threads=(1,))
    run = JobRun(job, None, pools, report=lambda run, _: said.append(remaining(run)), now=clock)
    chains = pools.runner.chains

    def timed(*arguments: Any) -> Any:
        assert said[-1] == "timing networks with what won"
        return chains(*arguments)

    monkeypatch.setattr(pools.runner, "chains", timed)
    run.run()
    run.close()
    assert run.networks[0].won
    assert said[-1] == "until nothing more is gained"
