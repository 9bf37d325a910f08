"""Layers that are refused do not stop the others: they are listed, and the exit status says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]

LAYERS = {
    "layers": [
        {"name": "good", "spec": "conv1d n1 ic2 oc3 i9 k3"},
        {"name": "odd", "spec": "conv1d n1 ic2 oc3 i9 k3 softmax"},
    ]
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(LAYERS))
    return path


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("build", ["--no-validate", "--no-records", "--out", "{folder}/out"]),
        ("validate", ["--no-records"]),
        ("bench", ["--no-records", "--peers", "onnxruntime", "--repeats", "1"]),
        ("tune", ["--records", "{folder}/r.sqlite", "--trials", "1"]),
    ],
)
def test_the_others_are_worked_on(run: Run, file: Path, tmp_path: Path, command: str, options: list[str]) -> None:
    words = [word.format(folder=tmp_path) for word in options]
    status, out, err = run(command, file, "--threads", "1", *words, "--json")
    assert status == 2, err
    reason = "layer 2 (odd)"
    assert f"left out: {file}: {reason}" in err
    assert "convgen: 1 layer left out, as said above; with --skip that is no failure" in err
    document: dict[str, Any] = json.loads(out)
    assert len(document["layers"]) == 1
    assert len(document["skipped"]) == 1
    assert reason in document["skipped"][0]
    status, _, err = run(command, file, "--threads", "1", *words, "--skip")
    assert status == 0, err
    assert f"left out: {file}: {reason}" in err
    assert "no failure" not in err


def test_a_report_lists_them(run: Run, file: Path, tmp_path: Path) -> None:
    store = tmp_path / "r.sqlite"
    assert run("tune", "conv1d n1 ic2 oc3 i9 k3", "--threads", "1", "--records", store, "--trials", "1")[0] == 0
    status, out, err = run("report", store, file)
    assert status == 2
    assert "left out: " in err
    assert "Left out: " in out
    assert run("report", store, file, "--skip")[0] == 0


def test_where_a_job_stands_and_a_bundle(run: Run, file: Path, tmp_path: Path) -> None:
    """`tune --status` shows the others, `fleet pack` packs them."""
    store, bundle = ["--records", tmp_path / "r.sqlite"], tmp_path / "bundle.zip"
    pack = [
        "fleet",
        "pack",
        file,
        "--target",
        "cpu",
        "--threads",
        "1",
        "--candidates",
        "1",
        "-o",
        bundle,
        "--no-records",
    ]
    for words in (["tune", file, "--status", "--threads", "1", "--trials", "1", *store], pack):
        for options, expected in {(): 2, ("--skip",): 0}.items():
            status, out, err = run(*words, *options, "--json")
            assert status == expected, err
            assert f"left out: {file}: layer 2 (odd)" in err
            assert ("with --skip that is no failure" in err) == (expected == 2)
            (reason,) = json.loads(out)["skipped"]
            assert "layer 2 (odd)" in reason


def test_nothing_that_can_be_read_is_an_error(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"layers": LAYERS["layers"][1:] * 2}))
    for options in ([], ["--skip"]):
        status, out, err = run("validate", path, *options)
        assert (status, out) == (2, "")
        assert err.count("layer 1 (odd)") == 1
