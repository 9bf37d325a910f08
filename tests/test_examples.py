"""The examples run as they stand, in a folder of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from network_models import model_of
from onnx import helper
from paths import ROOT

EXAMPLES = ROOT / "examples"


def test_the_demo_ends_with_a_kernel_and_its_time_beside_onnx_runtime(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "conv2d n1 ic4 oc8 i8x8 k3x3 p1x1 relu", "--seconds", "1"]
    environment = {**os.environ, "CONVGEN_RECORDS": str(tmp_path / "records.sqlite"), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (library,) = (tmp_path / "build" / "demo").glob("lib*.so")
    assert library.name in done.stdout
    assert re.search(r"of its limit\W+\d+ %", done.stdout)
    assert re.search(r"ratio\W+[\d.]+× as fast \(95 % interval [\d.]+ to [\d.]+\)", done.stdout)


def test_a_model_in_onnx_runtime_with_and_without(tmp_path: Path) -> None:
    weights = np.full((8, 4), 0.5, np.float32)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (2, 8)}, ["y"], {"w": weights})
    onnx.save(model, tmp_path / "model.onnx")
    command = [sys.executable, str(EXAMPLES / "in_onnxruntime.py"), "model.onnx"]
    environment = {**os.environ, "CONVGEN_RECORDS": str(tmp_path / "records.sqlite")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"largest difference: (\S+)", done.stdout)[0]) < 1e-6
    assert re.search(r"ONNX Runtime alone [\d.]+ ms, with convgen [\d.]+ ms", done.stdout)


def test_a_module_in_pytorch_and_an_exported_program(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, str(EXAMPLES / "in_pytorch.py")]
    environment = {**os.environ, "CONVGEN_RECORDS": str(tmp_path / "records.sqlite"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *2 * ["scores [1, 10] are PyTorch's"],
        "exported: 1 network, 0 nodes outside",
    ]
    assert "cumsum" in done.stderr


def test_lenet_trains_alike_with_both_libraries_convolutions(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_lenet.py"), "--steps", "3", "--plot", "losses.svg"]
    environment = {**os.environ, "CONVGEN_RECORDS": str(tmp_path / "records.sqlite"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "replaced: 0, 3" in done.stdout
    assert float(re.findall(r"largest difference of the losses: (\S+)", done.stdout)[0]) < 1e-4
    assert (tmp_path / "losses.svg").read_text().count("<polyline") == 2
