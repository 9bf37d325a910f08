"""Every command that times something says so where other programs had the CPUs meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from commands import TINY, Run

from convgen.check.onnx_separable import separable_model
from convgen.measure.busy import BusyWatch
from convgen.problem.separable import SeparableSpec

PAIR = "separable2d ic8 oc8 i12x10 k3x3 p1x1 relu"
#: The commands, by what they time.
COMMANDS = {
    "a search": ["tune", TINY, "--trials", "1", "--records", "STORE"],
    "a search before a build": ["build", TINY, "--trials", "1", "--records", "STORE", "--out", "OUT"],
    "a build": ["build", TINY, "--no-records", "--out", "OUT"],
    "a comparison": ["bench", TINY, "--peers", "onnxruntime", "--repeats", "1", "--no-records"],
    "the height of strips": ["tune", PAIR, "--seconds", "0.01", "--records", "STORE"],
    "the height of strips, before a build": ["build", PAIR, "--seconds", "0.01", "--records", "STORE", "--out", "OUT"],
    "the steps of a network": ["compile", "MODEL", "--no-records", "--out", "OUT", "--profile", "STEPS"],
}


@pytest.mark.parametrize("share", [0.5, 0.01])
@pytest.mark.parametrize("what", COMMANDS)
def test_a_busy_machine_is_said(
    what: str, share: float, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convgen.measure.compare.REST", 0.0)
    monkeypatch.setattr(BusyWatch, "share", lambda self: share)
    onnx.save(separable_model(SeparableSpec.parse(PAIR)), tmp_path / "model.onnx")
    places = {"STORE": "r.sqlite", "OUT": "out", "MODEL": "model.onnx", "STEPS": "steps.md"}
    words = [tmp_path / places[word] if word in places else word for word in COMMANDS[what]]
    status, _, err = run(*words, "--threads", "1")
    assert status == 0, err
    assert ("other programs used up to 50% of the CPUs" in err) == (share > 0.05)


def test_documents_have_the_share(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convgen.measure.compare.REST", 0.0)
    monkeypatch.setattr(BusyWatch, "share", lambda self: 0.25)
    for what, place in {"a search": "busy", "a build": "busy"}.items():
        words = [tmp_path / word.lower() if word in ("STORE", "OUT") else word for word in COMMANDS[what]]
        status, out, err = run(*words, "--threads", "1", "--json")
        assert status == 0, err
        assert json.loads(out)[place] == 0.25
