"""Exported kernels, checked as they lie in their folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import own_emulator
import pytest
from planted import SPEC, c_kernel

import convgen
from convgen.check.exported import read_kernel, validate_exported
from convgen.check.validate import check_outputs
from convgen.errors import ExportError, SpecError, UnsupportedError
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.kernel.load import MANIFEST, read_manifest
from convgen.lowering.candidates import parse_candidate
from convgen.problem.spec import ConvSpec

CHECKS = ["files", "memory", "threads", "float", "exact", "odd", "special", "refusal"]


def exported(folder: Path, **changes: Any) -> Path:
    """The kernel in C, with other statements in it, in a folder."""
    c_kernel(folder, **changes).export(folder / "out")
    return folder / "out"


def altered(folder: Path, **values: Any) -> Path:
    """The folder with other values in its manifest."""
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_a_right_kernel_passes_with_what_a_new_one_is_checked_for(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    report = validate_exported(folder)
    report.raise_if_failed()
    assert [check.name for check in report.checks] == CHECKS
    assert (report.spec, report.threads, report.candidate) == (SPEC.descriptor, 3, "reference()")
    assert 0 < report.worst_error <= 1
    assert report.repro == f"convgen validate {folder} --threads 3 --seed 0"
    assert validate_exported(folder, threads=1, seed=2).threads == 1


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"store": "t.dst[at] = at == 7 ? v + 1 : v"}, {"float", "exact"}),
        ({"store": "t.dst[at] = v; if (at == DST - 1) t.dst[DST] = 0"}, {"memory"}),
        ({"store": "t.dst[at] = at % 7 ? v : t.dst[at]"}, {"exact"}),
        ({"before": "if (t.dst) *(volatile float *)t.src = 1"}, {"memory"}),
    ],
    ids=["wrong", "beyond the end", "unwritten", "writes its input"],
)
def test_a_wrong_kernel_fails(tmp_path: Path, changes: dict[str, str], failed: set[str]) -> None:
    report = validate_exported(exported(tmp_path, **changes))
    assert failed <= {check.name for check in report.checks if not check.passed}
    assert not report.passed


@pytest.mark.parametrize("name", ["libplanted.so", "libplanted.a", "planted.h"])
def test_a_changed_file_is_told_and_nothing_runs(tmp_path: Path, name: str) -> None:
    folder = exported(tmp_path)
    with (folder / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(ExportError, match=rf"{name}: expected SHA-256 \w+, as manifest.json has it, found"):
        validate_exported(folder)
    (folder / name).unlink()
    with pytest.raises(ExportError, match=rf"{name}: expected a file of the export, found No such file"):
        validate_exported(folder)


def test_what_the_manifest_says_wrong_is_told(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    with pytest.raises(UnsupportedError, match=r"schedule: expected one of .*cpu_direct.*, found 'cpu_gone'"):
        validate_exported(altered(folder, schedule="cpu_gone"))
    manifest = read_manifest(folder)
    del manifest["target"]
    with pytest.raises(ExportError, match="expected the manifest of a library, found no 'target'"):
        read_kernel(folder, manifest)
    with pytest.raises(ExportError, match=r"files: expected names of files beside it, found '\.\./x'"):
        validate_exported(altered(folder, schedule="reference", files={**manifest["files"], "../x": {"sha256": "0"}}))
    with pytest.raises(ExportError, match="expected a manifest, found No such file"):
        validate_exported(tmp_path)


def test_a_transform_has_the_bound_of_its_version(tmp_path: Path) -> None:
    spec, target = ConvSpec.parse("conv2d n1 ic16 oc16 i12x12 k3x3 p1"), resolve().on(2)
    made = compile_candidate(spec, target, parse_candidate(spec, target, "cpu_winograd"), 2)
    made.export(tmp_path / "out")
    report = validate_exported(tmp_path / "out")
    report.raise_if_failed()
    assert report.error_factor == made.error_factor
    assert "a transform" in next(check.found for check in report.checks if check.name == "exact")
    altered(tmp_path / "out", schedule_version=0)
    with pytest.raises(UnsupportedError, match=r"schedule_version: expected \d+ of cpu_winograd, .* found 0"):
        validate_exported(tmp_path / "out")


def test_for_another_processor_its_archive_is_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_emulator.take_its_place(tmp_path, monkeypatch)
    for change, passes in (("t.dst[at] = v", True), ("t.dst[at] = at == 7 ? v + 1 : v", False)):
        folder = exported(tmp_path, store=change)
        kernel = read_kernel(folder, read_manifest(folder))
        other = replace(kernel, target=replace(kernel.target, native=False))
        report = check_outputs(other, other.outputs, 0, "")
        assert report.passed is passes
        assert "emulated by QEMU" in report.checks[0].found


def test_without_the_gpu_it_says_so(tmp_path: Path) -> None:
    spec = "conv2d n1 ic8 oc8 i6x6 k1x1"
    convgen.build(spec, "cuda:sm_80", records=False).export(tmp_path / "out")
    found = read_kernel(tmp_path / "out", read_manifest(tmp_path / "out"))
    if found.target.native:
        pytest.skip("there is such a GPU")
    with pytest.raises(UnsupportedError, match="cuda:sm_80: expected a GPU that runs the exported code, found none"):
        validate_exported(tmp_path / "out")


def test_validate_names_it(tmp_path: Path) -> None:
    library: Any = convgen.load(exported(tmp_path))
    with pytest.raises(SpecError, match=r"found a Library; convgen.validate_folder\(DIR\) checks an exported one"):
        convgen.validate(library)
    assert convgen.validate_folder(tmp_path / "out").passed
    with pytest.raises(UnsupportedError, match="model: expected none for a kernel"):
        convgen.validate_folder(tmp_path / "out", tmp_path / "model.onnx")
    assert np.isfinite(convgen.validate_folder(tmp_path / "out").worst_error)
