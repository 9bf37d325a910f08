"""What is wrong with where something is written shows before the minutes that making it takes; what Ctrl-C leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, TINY, Run, model_file

from convgen.cli.generate import Work
from convgen.problem.spec import ConvSpec
from convgen.tuning.job_run import JobRun

PAIR = "separable2d ic8 oc8 i12x10 k3x3 p1x1 nhwc relu"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_file(tmp_path / "net.onnx")


def never(*_: object, **__: object) -> None:
    raise AssertionError("the work has begun")


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def forbid(monkeypatch: pytest.MonkeyPatch, instead: Callable[..., None]) -> None:
    """Something else in place of all that tunes and compiles."""
    monkeypatch.setattr(Work, "kernel", instead)
    monkeypatch.setattr("convgen.api.compile", instead)
    monkeypatch.setattr("convgen.cli.tuned.run_whole", instead)
    monkeypatch.setattr("convgen.cli.separable.run_whole", instead)
    monkeypatch.setattr("convgen.cli.separable._height", instead)


@pytest.mark.parametrize(
    ("words", "budget", "folder"),
    [
        (["compile", "MODEL"], ["--seconds", 20], "out"),
        (["compile", "MODEL", "--name", "mine"], [], "out"),
        (["build", TINY], ["--seconds", 20], "out"),
        (["build", TINY, "--name", "mine"], [], "out"),
        (["build", "LAYERS"], ["--trials", 20], f"out/{ConvSpec.parse(SMALL).name}"),
        (["build", PAIR], ["--seconds", 20], "out"),
    ],
)
def test_a_folder_of_another_export_is_refused_before_anything_is_tuned(
    words: list[str], budget: list[Any], folder: str, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    Path("layers.txt").write_text(f"{TINY}\n{SMALL}\n")
    Path(folder).mkdir(parents=True)
    (Path(folder) / "manifest.json").write_text(json.dumps({"name": "another"}))
    forbid(monkeypatch, never)
    given = [{"MODEL": model, "LAYERS": "layers.txt"}.get(word, word) for word in words]
    status, out, err = run(
        *given, *budget, "--threads", 1, "--out", "out", *(["--records", "new.sqlite"] * bool(budget))
    )
    assert (status, out) == (3, "")
    assert "expected an earlier export of" in err
    assert "found another" in err
    assert not Path("new.sqlite").exists()


@pytest.mark.parametrize("words", [["build", TINY], ["build", "LAYERS"], ["compile", "MODEL"], ["build", PAIR]])
def test_ctrl_c_before_anything_is_written_leaves_no_folder(
    words: list[str], model: Path, run: Run, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    Path("layers.txt").write_text(f"{TINY}\n{SMALL}\n")
    forbid(monkeypatch, interrupted)
    given = [{"MODEL": model, "LAYERS": "layers.txt"}.get(word, word) for word in words]
    budget = ["--seconds", 20, "--threads", 1, "--records", "s.sqlite"]
    found = run_json(*given, *budget, "--out", "deep/out", status=130)
    assert (found["folder"], found["interrupted"], Path("deep").exists()) == (None, True, False)
    _, out, err = run(*given, *budget, "--out", "deep/out")
    assert (out, "listed in" in err, err.count("convgen: interrupted")) == ("", False, 1)
    Path("deep/out").mkdir(parents=True)  # who made it keeps it
    assert run_json(*given, *budget, "--out", "deep/out", status=130)["folder"] is None
    assert list(Path("deep/out").iterdir()) == []


def test_a_layer_of_which_nothing_is_known_yet_is_said_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = JobRun._choose

    def chosen(run: JobRun) -> None:
        begun(run)
        interrupted()

    monkeypatch.setattr(JobRun, "_choose", chosen)
    status, out, err = run("tune", TINY, "--threads", 1, "--trials", 1, "--records", tmp_path / "s.sqlite")
    assert status == 130
    assert out == "no kernel yet\n"
    assert "interrupted: 0 trials measured" in err
