"""Networks for another processor: compiled here, validated in QEMU, and called there."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from network_models import model_of
from onnx import helper

import convgen
from convgen.cli import main
from convgen.errors import UnsupportedError
from convgen.hardware.machine import machine
from convgen.network.network import CrossNetwork

CROSS = "aarch64" if machine().arch == "x86_64" else "x86_64"
TARGET = "cpu:cortex-a72" if CROSS == "aarch64" else "cpu:x86-64-v2"


@pytest.fixture(autouse=True)
def tools() -> None:
    for tool in (f"{CROSS}-linux-gnu-gcc", f"qemu-{CROSS}"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")


def small() -> onnx.ModelProto:
    """Convolutions of several schedules, one of them with weights that are transformed, and passes between them."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (16, 3, 3, 3), "w1": (16, 1, 3, 3), "w2": (24, 16, 3, 3), "b": (16,), "fc": (24, 10)}
    constants = {name: rng.standard_normal(shape, np.float32) * np.float32(0.2) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["ar"]),
        helper.make_node("Conv", ["ar", "w1"], ["d"], pads=[1] * 4, group=16),
        helper.make_node("Add", ["d", "ar"], ["s"]),
        helper.make_node("MaxPool", ["s"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["m", "w2"], ["c"], pads=[1] * 4),
        helper.make_node("Sigmoid", ["c"], ["cs"]),
        helper.make_node("GlobalAveragePool", ["cs"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "fc"], ["y"]),
    ]
    return model_of(nodes, {"x": (1, 3, 16, 16)}, ["y", "cs"], constants)


def test_a_network_for_another_processor_is_checked_exported_and_not_called(tmp_path: Path) -> None:
    network = convgen.compile(small(), TARGET, 2, records=False)
    assert isinstance(network, CrossNetwork)
    report = network.validate(small())
    report.raise_if_failed()
    assert {check.name for check in report.checks} == {"places", "memory", "threads", "float"}
    with pytest.raises(UnsupportedError, match="expected a target that runs on this machine"):
        network(np.zeros((1, 3, 16, 16), np.float32))
    assert not hasattr(network, "nonsense")
    assert network.memory > network.built.code.weights > 0

    manifest = network.export(tmp_path / "out")
    assert manifest["needs"]["architecture"] == CROSS
    out, gcc = tmp_path / "out", f"{CROSS}-linux-gnu-gcc"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-static", "-o", "example"]
    subprocess.run([gcc, *flags, "example.c", "libsmall.a", "-lm", "-lpthread"], cwd=out, check=True)
    run = [f"qemu-{CROSS}", "./example"]
    assert subprocess.check_output(run, cwd=out, text=True) == "small: 2 outputs as expected; ok\n"

    # What it compares with is not its own, and yet it does compare.
    data = np.fromfile(out / "example.output0", np.float32)
    (data + np.float32(0.01) * np.abs(data).max()).astype(np.float32).tofile(out / "example.output0")
    done = subprocess.run(run, cwd=out, capture_output=True, text=True, check=False)
    assert (done.returncode, "other numbers than expected" in done.stderr) == (1, True)
    # Weights that are not this library's are refused there, too.
    weights = bytearray((out / "small.weights").read_bytes())
    weights[-100] ^= 1
    (out / "small.weights").write_bytes(weights)
    done = subprocess.run(run, cwd=out, capture_output=True, text=True, check=False)
    assert (done.returncode, "damaged" in done.stderr) == (1, True)


def test_weights_that_another_machine_would_pack_are_those_packed_here(tmp_path: Path) -> None:
    """Where nothing is computed in packing, that is; transformed weights may be rounded otherwise."""
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    weights = np.random.default_rng(0).standard_normal((16, 8, 1, 1), np.float32)
    network = convgen.compile(model_of([node], {"x": (1, 8, 6, 6)}, ["y"], {"w": weights}), TARGET, 1, records=False)
    packed = np.fromfile(network.built.weights, np.float32)
    assert set(weights.reshape(-1)) <= set(packed)


def test_several_sizes(tmp_path: Path) -> None:
    model = small()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    network = convgen.compile(model, TARGET, 1, dims={"N": (1, 3)}, records=False)
    network.validate(model).raise_if_failed()


def test_the_command_says_what_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(small(), tmp_path / "small.onnx")
    command = ["compile", str(tmp_path / "small.onnx"), "--target", TARGET, "--no-records", "--threads", "2"]
    assert main([*command, "--out", str(tmp_path / "checked")]) == 0
    capsys.readouterr()
    validation = json.loads((tmp_path / "checked" / "manifest.json").read_text())["validation"]
    assert validation["passed"]
    assert [check["name"] for check in validation["checks"]] == ["places", "memory", "threads", "float"]

    monkeypatch.setenv(f"QEMU_{CROSS.upper()}", "no-such-program")
    assert main([*command, "--out", str(tmp_path / "unchecked")]) == 0
    assert "not validated: expected no-such-program" in capsys.readouterr().err
    assert json.loads((tmp_path / "unchecked" / "manifest.json").read_text())["validation"] is None

    assert main([*command, "--out", str(tmp_path / "no"), "--profile", str(tmp_path / "p.md")]) == 2
    assert "expected a target that runs on this machine" in capsys.readouterr().err
