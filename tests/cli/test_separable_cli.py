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
from convgen.problem.separable import SeparableSpec

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


def test_tune_names_the_command_that_uses_it(run: Run, tmp_path: Path) -> None:
    store = tmp_path / "records.sqlite"
    status, _, err = run("tune", SPEC, "--seconds", "0.01", "--threads", "1", "--records", str(store))
    assert status == 0, err
    assert "rows of a strip" in err
    assert "no convolution is tuned: more --seconds" in err
    assert f"next: `convgen build '{SeparableSpec.parse(SPEC)}' --strips " in err


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
