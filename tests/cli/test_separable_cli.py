"""Separable problems on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import Run
from onnx.reference import ReferenceEvaluator

import convgen
from convgen.check.onnx_separable import random_parameters, separable_model
from convgen.hardware.target import resolve
from convgen.network.strip_tuning import StripTime, height_records
from convgen.problem.separable import SeparableSpec
from convgen.problem.spec import ConvSpec
from convgen.records.store import RecordStore

SPEC = "separable2d ic8 oc8 i12x10 k3x3 p1x1 nhwc relu"


def test_build_writes_a_library_with_given_weights(run: Run, tmp_path: Path) -> None:
    spec = SeparableSpec.parse(SPEC)
    arrays = random_parameters(spec, 7)
    np.savez(tmp_path / "weights.npz", **arrays)  # type: ignore[arg-type]
    options = ["--weights", str(tmp_path / "weights.npz"), "--strips", "4", "--threads", "1", "--no-records"]
    status, out, err = run("build", str(spec), *options, "--out", str(tmp_path / "out"), "--json")
    assert status == 0, err
    manifest = json.loads(out)["manifest"]
    assert manifest["validation"]["passed"]
    assert manifest["spec"] == str(spec)
    x = np.random.default_rng(0).standard_normal((1, 12, 10, 8), np.float32)
    wanted = ReferenceEvaluator(separable_model(spec, arrays)).run(None, {"src": x})[0]
    np.testing.assert_allclose(convgen.load(tmp_path / "out")(x), wanted, atol=1e-5)


def test_validate_and_show_know_the_problem(run_json: Callable[..., Any]) -> None:
    report = run_json("validate", SPEC, "--threads", "1", "--no-records")
    assert report["passed"]
    shown = run_json("show", SPEC)
    assert shown["spec"] == str(SeparableSpec.parse(SPEC))
    assert shown["weights"]["depthwise_weights"] == [8, 1, 3, 3]


def test_show_names_the_pairs_of_a_model(run: Run, tmp_path: Path) -> None:
    spec = SeparableSpec.parse(SPEC.replace("nhwc ", ""))
    onnx.save(separable_model(spec), tmp_path / "model.onnx")
    status, out, _ = run("show", str(tmp_path / "model.onnx"))
    assert status == 0
    assert str(spec) in out


def test_tune_keeps_the_height_and_names_the_command_that_uses_it(run: Run, tmp_path: Path) -> None:
    store = tmp_path / "records.sqlite"
    options = ["--seconds", "0.01", "--threads", "1", "--records", str(store)]
    status, _, err = run("tune", SPEC, *options)
    assert status == 0, err
    assert "rows of a strip" in err
    assert "no convolution is tuned: more --seconds" in err
    assert f"next: `convgen build '{SeparableSpec.parse(SPEC)}' --threads 1 --records {store} --out DIR`" in err
    status, _, err = run("tune", SPEC, *options)
    assert status == 0, err
    assert "rows of a strip" not in err


def test_status_and_json_say_the_height(run_json: Callable[..., Any], tmp_path: Path) -> None:
    store = tmp_path / "records.sqlite"
    setting = ["--threads", 1, "--records", store]
    before = run_json("tune", SPEC, "--status", *setting)
    assert (before["strips"], before["heights"], before["spent_trials"]) == (None, [], 0)
    assert not store.exists()
    found = run_json("tune", SPEC, "--seconds", 0.01, *setting)
    assert [height["is_default"] for height in found["heights"]].count(True) == 1
    assert found["strips"] in [height["height"] for height in found["heights"]]
    after = run_json("tune", SPEC, "--status", *setting)
    assert (after["strips"], after["heights"]) == (found["strips"], [])
    assert len(after["layers"]) >= 2


def test_dims_of_a_keras_model(run_json: Callable[..., Any], run: Run, tmp_path: Path) -> None:
    """Open sizes are given as those of ONNX models are, and separable layers have them, too."""
    config = {
        "name": "s",
        "filters": 8,
        "kernel_size": [3, 3],
        "padding": "same",
        "batch_input_shape": [None] * 3 + [8],
    }
    (tmp_path / "k.json").write_text(json.dumps({"class_name": "SeparableConv2D", "config": config}))
    shown = run_json("show", tmp_path / "k.json", "--dim", "s[1]=12", "--dim", "s[2]=10")
    assert [ConvSpec.parse(layer["spec"]).in_spatial for layer in shown["layers"]] == [(12, 10), (12, 10)]
    (pair,) = shown["separable"]
    assert "i12x10" in pair
    status, _, err = run("show", tmp_path / "k.json")
    assert (status, "(as in --dim 's[1]=32')" in err) == (2, True)


@pytest.fixture
def with_height(tmp_path: Path) -> Path:
    """A store in which strips of four rows have won."""
    target = resolve("cpu").on(1)
    ratios = [StripTime(0, True, 2e-5, (1.0, 1.0, 1.0)), StripTime(4, False, 1e-5, (2.0, 1.9, 2.1))]
    with RecordStore(tmp_path / "heights.sqlite") as store:
        store.add_all(height_records(SeparableSpec.parse(SPEC), target, 1, ratios))
        return store.path


def test_what_was_found_is_built(run_json: Callable[..., Any], with_height: Path, tmp_path: Path) -> None:
    options = ["--threads", 1, "--records", with_height, "--out"]
    cases: list[tuple[list[str], int]] = [([], 6), (["--strips", "0"], 2)]
    for number, (strips, convolutions) in enumerate(cases):
        made = run_json("build", SPEC, *options, tmp_path / str(number), *strips)
        steps = made["manifest"]["sizes"][0]["layers"]
        assert sum("spec" in step for step in steps) == convolutions  # of twelve rows three strips
    assert run_json("validate", SPEC, *options[:-1])["passed"]


def test_heights_are_records(run: Run, run_json: Callable[..., Any], with_height: Path, tmp_path: Path) -> None:
    kept = ["--records", with_height]
    (best,) = run_json("records", "best", *SPEC.split(), "--threads", 1, *kept)
    assert (best["schedule"], best["picks"]) == ("strips", {"rows": 4})
    assert run_json("records", "best", *kept) == [best]
    assert [record["picks"]["rows"] for record in run_json("records", "list", *SPEC.split(), *kept)] == [0, 4]
    shown = run_json("records", "show", best["id"], *kept)
    assert shown["command"].endswith("--threads 1 --strips 4")
    assert shown["reason_against"] is None
    assert run_json("records", "prune", "--keep", 1, *kept)["reasons"] == {}
    assert run_json("records", "check", *kept)["not_believed"] == []
    assert run_json("records", "export", "--best", "-o", tmp_path / "best.jsonl", *kept)["exported"] == 1
    assert run_json("report", with_height)["settings"]
    status, out, _ = run("records", "check", "--measure", 3, *kept)
    assert (status, "0 measured again" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", SPEC, "--schedule", "reference"], "--schedule: expected layers"),
        (["tune", SPEC, "--trials", "3"], "--trials: expected layers"),
        (["build", "conv1d n1 ic4 oc4 i20 k3", "--weights", __file__], "--weights: expected a separable problem"),
        (["build", "conv1d n1 ic4 oc4 i20 k3", "--strips", "3"], "--strips: expected a separable problem"),
        (["build", SPEC, "--weights", __file__], "weights: expected a file that numpy.savez writes"),
        (["build", SPEC, "--strips", "many"], "expected auto or a number of rows"),
    ],
)
def test_what_means_nothing_is_refused(run: Run, arguments: list[str], said: str) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert said in err
