"""The C++ project in ``examples/cmake``, on a whole model."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from network_models import expected, model_of
from onnx import helper
from paths import ROOT
from programs import cmake

import convgen

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("static", ["OFF", "ON"])
def test_a_program_runs_a_model(tmp_path: Path, static: str) -> None:
    rng = np.random.default_rng(2)
    constants = {"w": rng.standard_normal((8, 3, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalMaxPool", ["c"], ["m"]),
        helper.make_node("Flatten", ["m"], ["y"]),
    ]
    model = model_of(nodes, {"x": (1, 3, 9, 9)}, ["y"], constants)
    convgen.compile(model, threads=1, records=False, name="net").export(tmp_path / "net")
    build = tmp_path / "build"
    options = [f"-DCMAKE_PREFIX_PATH={tmp_path / 'net'}", f"-DSTATIC={static}"]
    cmake("-S", ROOT / "examples" / "cmake", "-B", build, *options)
    cmake("--build", build)
    done = subprocess.run([build / "classify"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    x = (np.arange(3 * 9 * 9) % 17 / 8 - 1).astype(np.float32).reshape(1, 3, 9, 9)
    wanted = expected(model, {"x": x})["y"].reshape(-1)
    name, place, value = done.stdout.replace(": largest at ", " ").replace(":", "").split()
    assert (name, int(place)) == ("y", int(wanted.argmax()))
    assert float(value) == pytest.approx(float(wanted.max()), rel=1e-5)
    missing = subprocess.run([build / "classify", "no such file"], capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (1, "open: the file of weights cannot be read\n")
