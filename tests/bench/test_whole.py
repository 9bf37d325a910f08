"""The runner over whole networks, end to end on a tiny one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from bench_module import load_bench
from tiny_network import chain_model

from convgen.hardware.machine import machine
from convgen.report.networks import processor_slug


def test_a_model_end_to_end(tmp_path: Path) -> None:
    runner = load_bench("whole")
    chain_model(tmp_path / "tiny.onnx")
    fixed = ["--models", str(tmp_path / "tiny.onnx"), "--results", str(tmp_path), "--rounds", "2"]
    assert runner.main([*fixed, "--threads", "1", "--peers", "onnxruntime"]) == 0
    folder = tmp_path / processor_slug(machine())
    (row,) = [json.loads(line) for line in (folder / "whole.jsonl").read_text().splitlines()]
    assert (row["model"], row["threads"], row["best"]) == ("tiny", 1, "onnxruntime")
    own, other = row["parts"]
    assert own["problem"] == ""
    assert own["error"] < 1e-4
    assert row["ratio"] == pytest.approx(other["seconds"] / own["seconds"])
    assert "Geometric mean" in (folder / "whole.md").read_text()


def test_a_network_that_is_written_anew_is_known_by_its_name(tmp_path: Path) -> None:
    runner = load_bench("whole")
    model = tmp_path / "tiny.onnx"
    options = ["--models", str(model), "--results", str(tmp_path), "--rounds", "2", "--threads", "1"]
    options += ["--peers", "onnxruntime"]

    def rows() -> list[dict[str, Any]]:
        file = tmp_path / processor_slug(machine()) / "whole.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    chain_model(model)
    assert runner.main(options) == 0
    again = onnx.load(model)
    again.doc_string = "quantised anew"
    onnx.save(again, model)
    assert runner.main(options) == 0
    (first,) = rows()  # it is not measured again
    assert runner.main([*options, "--fresh"]) == 0
    (second,) = rows()  # and stands there once where it is
    assert first["digest"] != second["digest"]
    assert runner.main([*options, "--accuracy", "strict"]) == 0
    assert [row["accuracy"] for row in rows()] == ["standard", "strict"]


def test_what_is_asked_for_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    runner = load_bench("whole")
    for wrong in (["--peers", "other"], ["--models", "no-such-file.onnx"]):
        with pytest.raises(SystemExit):
            runner.main(wrong)
        assert "expected" in capsys.readouterr().err
