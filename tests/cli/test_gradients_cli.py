"""A gradient on its way through the command line, from tuning to a comparison: each step knows its direction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Run

import convgen
from convgen.measure.peers import PEERS
from convgen.problem.spec import ConvSpec

FORWARD = "conv2d n2 ic8 oc12 i9x8 k3x3 s1x1 p1x1 nobias"


@pytest.mark.parametrize("direction", ["data", "weights"])
def test_a_gradient_is_tuned_recorded_reported_exported_and_timed(
    direction: str, tmp_path: Path, run: Run, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convgen.tuning.final.ROUNDS", 3)
    monkeypatch.setattr("convgen.measure.compare.REST", 0.0)
    spec, path = ConvSpec.parse(f"{FORWARD} {direction}"), tmp_path / "records.sqlite"
    text, one, store = spec.descriptor, ["--threads", 1], ["--records", path]
    (layer,) = run_json("tune", text, *one, "--trials", 2, *store)["layers"]
    assert (layer["spec"], layer["trials"], layer["best"]["outcome"]) == (text, 2, "ok")
    (best,) = run_json("records", "best", text, *store)
    assert best["spec"] == text
    assert run_json("records", "best", FORWARD, *store) == []  # another layer than the one it is the gradient of

    assert run("report", path, "-o", tmp_path / "report.md")[0] == 0
    page = (tmp_path / "report.md").read_text()
    assert text in page
    assert best["schedule"] in page

    (built,) = run_json("build", text, *one, "--out", tmp_path / "out", *store)["layers"]
    assert (built["record"], built["validation"]["passed"]) == (best["id"], True)
    library: Any = convgen.load(tmp_path / "out")
    assert library.spec == spec
    ones = {name: np.ones(shape, np.float32) for name, shape in spec.shapes.items()}
    given = {"residual": ones["residual"]} if direction == "weights" else {}
    dst = library.bind(**{name: ones[name] for name in spec.parameters})(ones["src"], **given)
    # Away from the borders each weight meets every pixel of both images; each pixel of src every tap and channel.
    assert dst[0, 0, 1, 1] == (2 * 9 * 8 if direction == "weights" else 9 * 12)

    peers = [name for name in ("onnxruntime", "torch") if PEERS[name].version() is not None]
    (row,) = run_json("bench", text, *one, "--repeats", 1, "--peers", ",".join(peers), *store)["layers"]
    assert (row["spec"], row["schedule"]) == (text, best["schedule"])
    assert [(peer["name"], peer["problem"]) for peer in row["peers"]] == [(name, "") for name in peers]
    assert all(peer["seconds"] > 0 for peer in row["peers"])
