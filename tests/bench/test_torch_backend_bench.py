"""The bench of the backend for PyTorch: what it asks for, and the table of its rows."""

from __future__ import annotations

import pytest
from bench_module import load_bench

pytest.importorskip("torch")


def test_models_are_modules_of_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    runner = load_bench("torch_backend")
    for wrong in ("light_resnet50", "no-such-file.onnx"):
        with pytest.raises(SystemExit):
            runner.main(["--models", wrong])
        assert "expected" in capsys.readouterr().err


def test_the_table_has_calls_and_first_calls() -> None:
    runner = load_bench("torch_backend")
    parts = [
        {"library": "convgen", "seconds": 0.002, "first_call": 12.0},
        {"library": "inductor", "seconds": 0.003, "first_call": 8.0},
        {"library": "eager", "seconds": 0.004, "first_call": 0.1},
    ]
    values = {"model": "net", "threads": 1, "parts": parts, "best": "inductor", "ratio": 1.5, "interval": [1.4, 1.6]}
    lines = runner.page([runner.BackendRow(values)]).splitlines()
    (row,) = [line for line in lines if line.startswith("| net")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["net", "2.000", "3.000", "4.000", "1.50 (1.40–1.60)", "12.0", "8.0"]
    assert "Geometric mean 1.50 over 1 model, least 1.50." in lines
