"""What compile --for onnxruntime hands out has been compared with the original."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Run
from onnx import parser

from convgen.bridges.onnxruntime import OnnxRuntimeModel, write_for_onnxruntime
from convgen.hardware.target import resolve

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,6,6] x) => (float[N,4,4,4] y)
<float[4,3,3,3] w = {WEIGHTS}> { c = Conv(x, w)  y = Relu(c) }""".replace("WEIGHTS", ", ".join(["0.5"] * 108))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(parser.parse_model(MODEL).SerializeToString())
    return path


def test_outputs_are_compared(model: Path, tmp_path: Path) -> None:
    made = write_for_onnxruntime(model, tmp_path / "fast.onnx", resolve("cpu"), 1, dims={"N": 2})
    assert made.compare(model, {"N": 2}) < 1e-5
    other = tmp_path / "other.onnx"
    other.write_bytes(parser.parse_model(MODEL.replace("{0.5,", "{0.75,")).SerializeToString())
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
