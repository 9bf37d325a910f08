"""Exported networks, checked as they lie in their folders: by their models, and by their examples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import own_emulator
import pytest
from network_models import model_of
from onnx import ModelProto, helper

import convgen
from convgen.check.validate import Check
from convgen.cli import main
from convgen.errors import ExportError, UnsupportedError
from convgen.hardware.target import resolve
from convgen.kernel.load import MANIFEST, read_manifest
from convgen.network.check import exported as module
from convgen.network.check.exported import validate_folder

pytestmark = pytest.mark.timeout(600)


def model_with(bias: float = 0.0, batch: str = "N", channels: int = 16) -> ModelProto:
    rng = np.random.default_rng(3)
    shapes = {"w0": (16, 3, 3, 3), "w1": (channels, 16, 3, 3)}
    constants = {name: rng.standard_normal(shape, np.float32) * np.float32(0.25) for name, shape in shapes.items()}
    constants["b"] = np.full(channels, bias, np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["ar"]),
        helper.make_node("Conv", ["ar", "w1", "b"], ["y"], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["y"], ["g"]),
    ]
    made = model_of(nodes, {"x": (1, 3, 12, 12)}, ["y", "g"], constants)
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_param = batch
    return made


@pytest.fixture(scope="module")
def network() -> Any:
    return convgen.compile(model_with(), threads=2, dims={"N": (1, 2)}, records=False)


@pytest.fixture
def folder(network: Any, tmp_path: Path) -> Path:
    network.export(tmp_path / "out")
    return tmp_path / "out"


def altered(folder: Path, *missing: str, **values: Any) -> Path:
    """The folder with other values in its manifest."""
    manifest = {**read_manifest(folder), **values}
    kept = {name: value for name, value in manifest.items() if name not in missing}
    (folder / MANIFEST).write_text(json.dumps(kept))
    return folder


def names(report: Any) -> list[str]:
    return [check.name for check in report.checks]


def test_by_its_model_every_element_is_within_its_bound(folder: Path) -> None:
    report = validate_folder(folder, model_with())
    report.raise_if_failed()
    assert names(report) == ["files", "memory", "threads", "float", "float"]
    assert 0 < report.worst_error <= 1
    assert report.checks[3].found.startswith("N1: ")


def test_another_model_fails_or_is_told(folder: Path) -> None:
    report = validate_folder(folder, model_with(bias=0.5))
    assert not report.passed
    assert {check.name for check in report.checks if not check.passed} == {"float"}
    with pytest.raises(UnsupportedError, match=r"model: expected the outputs \{'y': \(1, 16, .*\(1, 8, 12, 12\)"):
        validate_folder(folder, model_with(channels=8))


def test_by_its_example_it_gives_the_same_bits(folder: Path) -> None:
    report = validate_folder(folder, threads=1)
    report.raise_if_failed()
    assert names(report) == ["files", "memory", "threads", "example", "example"]
    assert (report.threads, report.worst_error) == (1, 0.0)
    assert report.checks[4].found == "N2: 2 outputs are the example's bit for bit"


def test_an_example_with_other_outputs_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a library was changed together with its manifest."""
    output = np.fromfile(folder / "example.output0.N2", np.float32)
    output[5] += np.abs(output).max() / 16
    output.tofile(folder / "example.output0.N2")
    with pytest.raises(ExportError, match=r"example.output0.N2: expected SHA-256"):
        validate_folder(folder)
    monkeypatch.setattr(module, "files_check", lambda *arguments: Check("files", True, ""))
    failed = [check.found for check in validate_folder(folder).checks if not check.passed]
    assert [found.partition(" of the")[0] for found in failed] == ["N2: y: 6.2e-02"]
    assert validate_folder(altered(folder, example={"tolerance": 0.125})).passed
    assert not validate_folder(altered(folder, example={"tolerance": 0.03125})).passed


def test_without_a_model_and_an_example_there_is_nothing_to_compare(network: Any, tmp_path: Path) -> None:
    network.export(tmp_path / "out", example=False)
    with pytest.raises(UnsupportedError, match="expected the model that it was compiled from, or an example"):
        validate_folder(tmp_path / "out")
    assert validate_folder(tmp_path / "out", model_with()).passed


@pytest.mark.parametrize(
    ("missing", "values", "said"),
    [
        (["example"], {}, "example: expected its tolerance, found none, as in exports of earlier versions"),
        (["accuracy"], {}, "expected the manifest of a network, found no 'accuracy'"),
        ([], {"accuracy": "some"}, "accuracy: expected one of strict, .* found 'some'"),
        ([], {"network_abi": 99}, "network_abi: expected 3, found 99"),
        (["sizes"], {}, "found no 'sizes'"),
    ],
)
def test_what_the_manifest_says_wrong_is_told(
    folder: Path, missing: list[str], values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ExportError, match=said):
        validate_folder(altered(folder, *missing, **values))


def test_for_another_processor_its_archive_is_emulated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_emulator.take_its_place(tmp_path, monkeypatch)
    monkeypatch.setattr(module, "resolve", lambda spelling: replace(resolve(spelling), native=False))
    report = validate_folder(folder, model_with())
    report.raise_if_failed()
    assert "emulated by QEMU" in report.checks[1].found


def test_a_separable_problem_of_random_weights_needs_no_model(tmp_path: Path) -> None:
    words = ["separable2d", "ic8", "oc8", "i12x10", "k3x3", "p1x1", "--threads", "1", "--no-records", "--no-validate"]
    assert main(["build", *words, "--out", str(tmp_path / "out")]) == 0
    report = validate_folder(tmp_path / "out")
    report.raise_if_failed()
    assert names(report) == ["files", "memory", "threads", "float"]
