"""How far networks in less than f32 are from themselves in f32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_module import load_bench
from tiny_network import chain_model


def test_a_model_beside_itself_in_f32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("openvino")
    chain_model(tmp_path / "tiny.onnx")
    assert load_bench("accuracy").main(["--models", str(tmp_path / "tiny.onnx"), "--images", "4"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    _, model, choices, right, precision, signal, same, *_ = (cell.strip() for cell in row.split("|"))
    assert (model.endswith("tiny.onnx"), right, precision) == (True, "", "bf16")
    assert "OpenVINO" in row
    assert 1 <= int(choices) <= 4
    assert same.endswith(" of 4")
    assert float(signal) > 15


def test_decibels_are_of_squares() -> None:
    exact = np.array([[3.0, 4.0]])
    assert load_bench("accuracy").decibels(exact, exact + np.array([[0.3, 0.4]])) == pytest.approx(20)
