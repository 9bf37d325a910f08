"""``convgen convert``: what it writes, prints and returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from convgen.cli import main
from convgen.formats.entries import SpecEntry
from convgen.formats.sources import FORMS, read_specs
from convgen.problem.spec import ConvSpec

ONE = ConvSpec.parse("conv2d ic4 oc8 i8x8 k3 p1")
TWO = ConvSpec.parse("conv1d n2 ic4 oc4 i9 k3 relu")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``convgen convert`` in an empty folder; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(["convert", *map(str, arguments)]), *capsys.readouterr()

    return call


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    path = tmp_path / "layers.toml"
    path.write_text(f'layers = [{{name = "a", count = 2, spec = "{ONE}"}}, {{name = "b", spec = "{TWO}"}}]\n')
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_from_a_file(form: str, run: Run, layers: Path, tmp_path: Path) -> None:
    suffix = form if form in ("toml", "yaml", "json") else "txt"
    skip = ["--skip"] if form == "miopen" else []
    status, out, err = run(layers, "-o", f"out.{suffix}", "--to", form, *skip)
    assert status == 0
    named = form not in ("descriptors", "miopen")
    one, two = SpecEntry(ONE, 2, ("a",) * named), SpecEntry(TWO, 1, ("b",) * named)
    assert read_specs(tmp_path / f"out.{suffix}") == ([one] if skip else [one, two])
    if skip:
        assert err == "left out: layer 2 (b): in_spatial: expected 2 or 3 sizes for MIOpenDriver, found (9,)\n"
        assert out == "1 different layer in out.txt as miopen\n"
    else:
        assert (out, err) == (f"2 different layers in out.{suffix} as {form}\n", "")


@pytest.mark.parametrize("suffix", ["toml", "yaml", "yml", "json", "txt"])
def test_the_suffix_says_the_form(suffix: str, run: Run) -> None:
    assert run(ONE, "-o", f"out.{suffix}")[0] == 0
    assert read_specs(f"out.{suffix}") == [SpecEntry(ONE)]


def test_lines_to_standard_output(run: Run) -> None:
    assert run("mb1_ic4oc8_ih8kh3ph1", "-o", "-") == (0, f"{ONE}\n", "")
    status, out, _ = run("-o", "-", "--to", "miopen", *str(ONE).split())
    assert status == 0
    assert run("-o", "-", "--", *out.split()) == (0, f"{ONE}\n", "")
    assert run("-o", "-", "--", "--deconv", "--dir=FWD_D", "mb1ic3ih8oc4kh3") == (
        0,
        "convtranspose2d n1 ic3 oc4 i8x8 k3x3 s1x1 p0x0 nobias\n",
        "",
    )


def test_models(run: Run) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3], pads=[1] * 4)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8, 8, 8])],
        [helper.make_tensor("w", TensorProto.FLOAT, [8, 4, 3, 3], [0.5] * 288)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), "m.onnx")
    assert run("m.onnx", "--dim", "N=3", "-o", "out.txt")[0] == 0
    assert [entry.spec for entry in read_specs("out.txt")] == [ONE.with_(n=3, bias=False)]


def test_json_report(run: Run, layers: Path) -> None:
    status, out, _ = run(layers, "-o", "out.log", "--to", "miopen", "--skip", "--json")
    assert status == 0
    report = json.loads(out)
    assert report == {"output": "out.log", "form": "miopen", "layers": 1, "skipped": report["skipped"]}
    assert len(report["skipped"]) == 1


def test_lines_that_cannot_be_read_are_left_out(run: Run) -> None:
    Path("in.txt").write_text("".join(f"--dt=f64 mb{n}ic4oc4ih5kh1\n" for n in range(30)) + f"{TWO}\n")
    assert run("in.txt", "-o", "out.txt")[0] == 2
    assert not Path("out.txt").exists()
    status, _, err = run("in.txt", "-o", "out.txt", "--skip")
    assert status == 0
    assert err.count("left out: in.txt: line") == 20
    assert err.endswith("left out: 10 more\n")
    assert Path("out.txt").read_text() == f"{TWO}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["layers.toml", "-o", "out", "--to", "miopen"], 2, "layer 2 (b): in_spatial: expected 2 or 3 sizes"),
        ([str(TWO), "-o", "out", "--to", "miopen", "--skip"], 2, "layers: expected one that can be written as miopen"),
        (["layers.toml", "-o", "out"], 2, "the suffix of out does not tell the notation: give --to"),
        (["layers.toml"], 2, "Missing option '-o'"),
        (["layers.toml", "-o", "out", "--to", "onnx"], 2, "'--to': expected one of descriptors, benchdnn"),
        (["layers.toml", "-o", "./layers.toml"], 2, "./layers.toml is the file that is read"),
        (["layers.toml", "-o", "-", "--json"], 2, "--json needs -o FILE"),
        (["layers.toml", "-o", "no/out.txt"], 3, "No such file or directory: "),
        (["layers.toml", "-o", ".", "--to", "json"], 3, "Is a directory"),
        (["missing.toml", "-o", "out.txt"], 2, "missing.toml: file: expected an existing file"),
        (["layers.toml", "-o", "out.txt", "--dim", "N=1"], 2, "dims: expected an ONNX model"),
    ],
)
def test_refused(arguments: list[str], status: int, message: str, run: Run, layers: Path, tmp_path: Path) -> None:
    before = layers.read_bytes()
    found, out, err = run(*arguments)
    assert (found, out) == (status, "")
    assert message in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["layers.toml"]
    assert layers.read_bytes() == before
