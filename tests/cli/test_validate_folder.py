"""``convgen validate DIR``, of what build and compile export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, TINY, Run
from planted import c_kernel

ONE = ["--threads", 1, "--no-records"]


@pytest.fixture
def kernel(run: Run, tmp_path: Path) -> Path:
    assert run("build", TINY, *ONE, "--no-validate", "--out", tmp_path / "kernel dir")[0] == 0
    return tmp_path / "kernel dir"


def test_a_kernel(run: Run, run_json: Callable[..., Any], kernel: Path) -> None:
    status, out, _ = run("validate", kernel)
    assert status == 0
    assert out.startswith(TINY)
    assert [name for name in ("files", "exact", "float", "memory") if f"ok    {name}" not in out] == []
    assert "FAIL" not in out
    found = run_json("validate", kernel, "--threads", 2, "--seed", 3)
    (layer,) = found["layers"]
    assert (found["passed"], found["threads"], layer["threads"], layer["spec"]) == (True, 2, 2, TINY)


def test_a_wrong_kernel_and_the_command_that_repeats_it(run: Run, tmp_path: Path) -> None:
    c_kernel(tmp_path, store="t.dst[at] = v + 1").export(tmp_path / "out dir")
    status, out, _ = run("validate", tmp_path / "out dir")
    assert status == 1
    assert f"repeat with: convgen validate '{tmp_path / 'out dir'}' --threads 3 --seed 0" in out


def test_several_layers(run: Run, run_json: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "net.txt").write_text(f"{SMALL}\n{TINY}\n")
    folder = tmp_path / "out"
    assert run("build", tmp_path / "net.txt", *ONE, "--no-validate", "--out", folder)[0] == 0
    found = run_json("validate", folder)
    assert [layer["spec"] for layer in found["layers"]] == [SMALL, TINY]
    assert found["passed"]
    status, _, err = run("validate", folder, "--model", __file__)
    assert (status, "expected the folder of a network" in err) == (2, True)
    (folder / "index.json").write_text('{"layers": [{"folder": "../x"}], "target": "cpu", "threads": 1}')
    status, _, err = run("validate", folder)
    assert status == 3
    assert "index.json: expected the index of exported layers, found a folder that is not below it" in err


def test_what_says_what_to_build_does_not_go_with_a_folder(run: Run, kernel: Path) -> None:
    for words in (["--target", "cpu"], ["--schedule", "reference"], ["--no-records"], ["--whole"]):
        status, _, err = run("validate", kernel, *words)
        assert status == 2
        assert f"{words[0]}: expected layers or a model, found the folder of an export" in err
    status, _, err = run("validate", TINY, "--model", __file__)
    assert status == 2
    assert "--model: expected the folder of an exported network, found layers or a model" in err


def test_other_folders_are_told(run: Run, tmp_path: Path, kernel: Path) -> None:
    status, _, err = run("validate", tmp_path)
    assert status == 3
    assert f"{tmp_path}: expected manifest.json, which build and compile write for C, or index.json" in err
    (kernel / "example.c").write_text("changed\n")
    status, _, err = run("validate", kernel)
    assert status == 3
    assert "example.c: expected SHA-256" in err
