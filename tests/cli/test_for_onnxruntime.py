"""What compile --for onnxruntime hands out has been compared with the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import MODEL as MODEL_OF_ONE
from commands import Run, model_file

from convgen.bridges.onnxruntime import OnnxRuntimeModel, write_for_onnxruntime
from convgen.hardware.target import resolve

MODEL = MODEL_OF_ONE.replace("float[1,", "float[N,")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_file(tmp_path / "model.onnx", MODEL)


def test_outputs_are_compared(model: Path, tmp_path: Path) -> None:
    made = write_for_onnxruntime(model, tmp_path / "fast.onnx", resolve("cpu"), 1, dims={"N": 2})
    assert made.compare(model, {"N": 2}) < 1e-5
    other = model_file(tmp_path / "other.onnx", MODEL.replace("{0.5,", "{0.75,"))
    assert made.compare(other, {"N": 2}) > 1e-3


@pytest.mark.parametrize("dims", ["N=1", "N=1,2"])
def test_what_differs_is_not_handed_out(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, dims: str
) -> None:
    words = ("compile", model, "--for", "onnxruntime", "--dim", dims, "--threads", 1, "--no-records", "--out")
    status, _, err = run(*words, tmp_path / "right")
    assert (status, "not compared" in err) == (0, False)
    assert {path.suffix for path in (tmp_path / "right").iterdir()} == {".onnx", ".so"}
    monkeypatch.setattr(OnnxRuntimeModel, "compare", lambda *_: 0.01)
    status, _, err = run(*words, tmp_path / "wrong")
    assert status == 1
    assert "model.onnx: outputs differ by 1.0e-02 of the largest element, 0.001 is allowed" in err
    assert list((tmp_path / "wrong").iterdir()) == []


@pytest.mark.parametrize(
    "when", ["convgen.api.for_onnxruntime", "convgen.bridges.onnxruntime.OnnxRuntimeModel.compare"]
)
def test_ctrl_c_leaves_nothing_and_says_so(
    when: str, model: Path, tmp_path: Path, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither before it is written nor before it is found to be right."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(when, interrupted)
    words = ("compile", model, "--for", "onnxruntime", "--dim", "N=1", "--threads", 1, "--no-records", "--out")
    found = run_json(*words, tmp_path / "out", status=130)
    assert (found["model"], found["parts"], found["interrupted"]) == (None, [], True)
    assert list(tmp_path.rglob("*.so")) == []
    assert list(tmp_path.rglob("*.onnx")) == [model]


def test_what_onnxruntime_does_not_run_is_not_handed_out(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That only the original cannot be run leaves nothing to compare with; that what was made cannot be, is a fault."""
    compare = OnnxRuntimeModel.compare

    def without_library(made: OnnxRuntimeModel, *given: object) -> float:
        return compare(replace(made, library=tmp_path / "missing.so"), *given)  # type: ignore[arg-type]

    monkeypatch.setattr(OnnxRuntimeModel, "compare", without_library)
    words = ("compile", model, "--for", "onnxruntime", "--dim", "N=1", "--threads", 1, "--no-records", "--out")
    status, _, err = run(*words, tmp_path / "wrong")
    assert status == 1
    assert "ONNX Runtime does not run it" in err
    assert list((tmp_path / "wrong").iterdir()) == []
