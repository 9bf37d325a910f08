"""Every command that takes a model knows it by its content, whatever it is called, and says what else a file is."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from onnx import parser

from convgen.errors import SpecError
from convgen.formats.sources import is_model, is_path, split_sources
from convgen.tuning.job import Job

SMALL = "conv1d n1 ic4 oc4 i20 k3 s1 p0"
LARGE = "conv1d n1 ic8 oc8 i20 k3 s1 p0"
MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,8,8] x, float[4,3,3,3] w) => (float[N,4,6,6] y) { y = Conv(x, w) }"""
LAYER = "conv2d n2 ic3 oc4 i8x8 k3x3 s1x1 p0x0 nobias"
COMMANDS = (
    ["show"],
    ["convert", "-o", "layers.toml"],
    ["tune", "--status"],
    ["records", "best"],
    ["records", "list"],
)
WHOLE = {
    "compile": ["compile", "--out", "net"],
    "validate": ["validate", "--whole"],
    "bench": ["bench", "--whole", "--peers", "onnxruntime"],
    "tune": ["tune", "--whole", "--trials", "1"],
}


@pytest.fixture(params=["model.pb", "model", "model.v1.2", "MODEL.ONNX"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVGEN_RECORDS", str(tmp_path / "store.sqlite"))
    Path(request.param).write_bytes(parser.parse_model(MODEL).SerializeToString())
    return str(request.param)


def test_commands_read_the_layers_of_a_model(run: Run, model: str) -> None:
    for command in COMMANDS:
        status, _, said = run(*command, model, "--dim", "N=2")
        assert status == 0, (command, said)
        status, _, said = run(*command, model)
        assert status == 2, command
        assert "expected a size for 'N'" in said


def test_a_job_knows_the_order_of_a_models_layers(model: str) -> None:
    job = Job((model, SMALL), dims={"N": 2}, folder=Path.cwd())
    assert [spec.descriptor for spec in job.networks[model]] == [LAYER]
    assert set(job.networks) == {model}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_model_is_named_by_what_works_on_wholes(
    run: Run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.onnx.gz").write_bytes(gzip.compress(b"model"))
    Path("model.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    Path("page.onnx").write_bytes(b"\n<!DOCTYPE html>\n<html><head></head></html>\n")
    command, *options = WHOLE[name]
    for file, what in {
        "model.onnx.gz": "a gzip archive: unpack it first",
        "model.onnx": "a pointer of Git LFS: git lfs pull",
        "page.onnx": "a web page: download the file itself",
    }.items():
        status, _, said = run(command, file, *options)
        assert status == 2
        assert f"{file}: file: expected " in said
        assert what in said


@pytest.mark.parametrize("command", [["tune", "--status"], ["records", "best"], ["fleet", "pack", "-o", "b.zip"]])
def test_sizes_that_no_source_takes_are_refused(
    run: Run, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVGEN_RECORDS", str(tmp_path / "store.sqlite"))
    status, _, said = run(*command, SMALL, LARGE, "--dim", "N=2")
    assert status == 2
    assert "dims: expected an ONNX model to use them in, or the JSON of a Keras model, found N for " in said


def test_a_model_beside_layers_takes_the_sizes(run_json: Callable[..., Any], model: str) -> None:
    layers = run_json("tune", "--status", model, SMALL, "--dim", "N=2")["layers"]
    assert sorted(layer["spec"] for layer in layers) == sorted([LAYER, SMALL])


@pytest.mark.parametrize(
    ("source", "is_file"),
    [(SMALL, False), ("nonsense", False), ("nonsense.pb", True), ("a/b", True), ("leaky relu(0.1)", False)],
)
def test_what_names_a_file(source: str, is_file: bool, tmp_path: Path) -> None:
    assert is_path(source) is is_file
    (tmp_path / "nonsense").write_text(SMALL)
    assert is_path("nonsense", tmp_path)
    assert not is_model("nonsense", tmp_path)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(SpecError, match="missing\\.pb"):
        Job(("missing.pb",)).problems()


@pytest.mark.parametrize(
    ("words", "sources"),
    [
        (["a.onnx", "b.toml"], ("a.onnx", "b.toml")),
        (SMALL.split(), (SMALL,)),
        ([SMALL, LARGE], (SMALL, LARGE)),
        ([*SMALL.split(), *LARGE.split()], (SMALL, LARGE)),
        (["a.onnx", *SMALL.split(), "net.txt"], ("a.onnx", SMALL, "net.txt")),
        (["nonsense", "a.onnx"], ("nonsense", "a.onnx")),
    ],
)
def test_words_of_a_command_line(words: list[str], sources: tuple[str, ...]) -> None:
    assert split_sources(words) == sources
