"""The bench of training steps, end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_module import load_bench
from tiny_network import chain_model

from convgen.errors import UnsupportedError
from convgen.hardware.machine import machine
from convgen.report.networks import processor_slug

pytest.importorskip("torch")


def test_a_model_s_steps_end_to_end(tmp_path: Path) -> None:
    runner = load_bench("training")
    chain_model(tmp_path / "tiny.onnx")
    arguments = ["--models", str(tmp_path / "tiny.onnx"), "--results", str(tmp_path), "--rounds", "2"]
    arguments += ["--threads", "1", "--batch", "2"]
    assert runner.main(arguments) == 0
    folder = tmp_path / processor_slug(machine())
    lines = (folder / "training.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [" n2 " in row["spec"] for row in rows] == [True] * len(rows)
    assert [list(row["parts"]) for row in rows if not row["inner"]] == [
        ["forward", "weights"]
    ]  # its input is the image
    assert {tuple(row["parts"]) for row in rows if row["inner"]} == {("forward", "data", "weights")}
    for row in rows:
        assert set(row["ways"]) == {"contiguous", "channels last"}
        assert row["ratio"] == pytest.approx(min(row["ways"].values()) / row["seconds"])
        assert row["parts"]["forward"]["packing"] > 0
        assert row["parts"]["weights"]["packing"] == 0
        assert row["counts"]["tiny"] >= 1
    table = (folder / "training.md").read_text()
    assert [line for line in table.splitlines() if line.startswith("### ")] == [
        "### Step",
        "### Forward",
        "### Data",
        "### Weights",
    ]
    assert all(row["spec"] in table for row in rows)
    assert runner.main(arguments) == 0  # all of it is known
    assert (folder / "training.jsonl").read_text().splitlines() == lines


def test_what_is_wrong_is_not_timed() -> None:
    runner = load_bench("training")
    spec = runner.ConvSpec.parse("conv2d n1 ic4 oc4 i6x6 k3x3 s1x1 p1x1 nobias")
    ours, other = (runner.Entrant("", lambda: None, lambda value=value: runner.np.full(4, value)) for value in (1, 1.1))
    runner._check(spec, ours, ours)
    with pytest.raises(UnsupportedError, match="torch"):
        runner._check(spec, ours, other)


def test_what_is_asked_for_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    runner = load_bench("training")
    for wrong in (["--batch", "0"], ["--batch", "2,x"], ["--models", "no-such-file.onnx"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            runner.main(wrong)
        assert "expected" in capsys.readouterr().err
