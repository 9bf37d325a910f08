"""The bench of networks inside ONNX Runtime, end to end on a tiny one; and its page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from bench_module import load_bench
from tiny_network import chain_model

from convgen.hardware.machine import machine
from convgen.lowering.kept import VARIABLE
from convgen.report.networks import processor_slug


def test_a_model_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, os.environ.get(VARIABLE, ""))  # the bench has one of its own
    runner = load_bench("onnxruntime_bridge")
    chain_model(tmp_path / "tiny.onnx", strange=True)
    given = ["--results", str(tmp_path), "--rounds", "2", "--threads", "1"]
    assert runner.main(["--models", str(tmp_path / "tiny.onnx"), *given]) == 2  # not taken whole: there is no library

    chain_model(tmp_path / "tiny.onnx")
    assert runner.main(["--models", str(tmp_path / "tiny.onnx"), *given]) == 0
    folder = tmp_path / processor_slug(machine())
    text = (folder / "onnxruntime.jsonl").read_text()
    (row,) = [json.loads(line) for line in text.splitlines()]
    alone, inside, theirs = row["parts"]
    assert [part["problem"] for part in row["parts"]] == ["", "", ""]
    assert alone["error"] == inside["error"]  # the same code
    assert row["kept"] == pytest.approx(alone["seconds"] / inside["seconds"])
    assert row["ratio"] == pytest.approx(theirs["seconds"] / inside["seconds"])
    assert (row["nodes"], row["outside"]) == (1, 0)
    assert list(row["starts"]) == list(runner.STARTS)
    assert all(found["memory"] > 0 and found["first"] > 0 for found in row["starts"].values())
    assert "Kept: Geometric mean" in (folder / "onnxruntime.md").read_text()
    assert runner.main(["--models", str(tmp_path / "tiny.onnx"), *given]) == 0  # all of it is known
    assert (folder / "onnxruntime.jsonl").read_text() == text


def made_row(model: str, alone: float, **more: Any) -> dict[str, Any]:
    """Values of a row of a network that takes so long alone, 2 ms inside and 3 ms in ONNX Runtime's operators."""
    times = {"convgen": alone, "inside": 2e-3, "onnxruntime": 3e-3}
    starts = {"convgen": (0.25, 0.5, 10), "c": (0.125, 0.5, 10), "inside": (0.75, 0.5, 20), "onnxruntime": (1.5, 2, 40)}
    return {
        "model": model,
        "threads": 1,
        "parts": [{"library": library, "seconds": seconds, "problem": ""} for library, seconds in times.items()],
        "kept": alone / 2e-3,
        "kept_interval": [0.9, 1.0],
        "ratio": 1.5,
        "interval": [1.4, 1.6],
        "nodes": 1,
        "outside": 3,
        "compile_seconds": 12.0,
        "starts": {
            way: {"load": load, "first": first, "memory": memory << 20} for way, (load, first, memory) in starts.items()
        },
        "busy": 0.02,
        "date": "2026-12-01",
        "versions": {"convgen": "1.0", "onnxruntime": "1.31.1"},
        **more,
    }


def test_the_page_has_times_and_starts() -> None:
    runner = load_bench("onnxruntime_bridge")
    rows = [runner.BridgeRow(made_row("net", 1.8e-3)), runner.BridgeRow(made_row("a_net", 1.62e-3))]
    lines = runner.page(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| net")]
    assert cells == [
        ["net", "1.800", "2.000", "3.000", "0.90 (0.90–1.00)", "1.50 (1.40–1.60)", "1", "3"],
        ["net", "12.0", "0.250 + 0.500", "0.125 + 0.500", "0.750 + 0.500", "1.500 + 2.000", "10.0", "20.0", "40.0"],
    ]
    assert "Kept: Geometric mean 0.85 over 2 models, least 0.81." in lines
    assert "Ratio: Geometric mean 1.50 over 2 models, least 1.50." in lines
    assert lines[-1].endswith("Other programs had at most 2% of the CPUs.")


def test_what_was_not_timed_has_dashes_for_cells() -> None:
    runner = load_bench("onnxruntime_bridge")
    nothing = {"kept": None, "kept_interval": None, "ratio": None, "interval": None}
    values = made_row("net", 1.8e-3, **nothing)
    values["parts"][1] |= {"seconds": None, "problem": "wrong outputs"}
    lines = runner.page([runner.BridgeRow(values)]).splitlines()
    first = next(line for line in lines if line.startswith("| net"))
    assert [cell.strip() for cell in first.strip("|").split("|")][:6] == ["net", "1.800", "–", "3.000", "–", "–"]
    assert not any("Geometric mean" in line for line in lines)


def test_what_is_asked_for_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_bench("onnxruntime_bridge").main(["--models", "no-such-file.onnx"])
    assert "expected" in capsys.readouterr().err
