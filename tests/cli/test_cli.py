"""The command line as a user meets it: what it prints, what it returns, what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import onnx
import pytest
import stores
from click.testing import CliRunner
from commands import SMALL, TINY, Run, python
from onnx import TensorProto, helper

from convgen.check.validate import Check, Report
from convgen.cli import cli
from convgen.cli.bench import PEER_NAMES
from convgen.cli.common import duration, size
from convgen.cli.show import WAITS
from convgen.cli.tables import table
from convgen.hardware.roofline import roofline
from convgen.lowering.discover import schedule_ids, schedules
from convgen.measure.peers import PEERS
from convgen.problem.spec import ConvSpec

# ---- quick answers ----------------------------------------------------------------------------

HEAVY = ("tvm", "tvm_ffi", "onnx", "onnxruntime", "numpy", "rich", "torch", "yaml", "jinja2")

QUICK: list[tuple[Sequence[str], int]] = [
    (["--help"], 0),
    (["--version"], 0),
    (["build", "--help"], 0),
    (["compile", "--help"], 0),
    (["tune", "--help"], 0),
    (["validate", "--help"], 0),
    (["bench", "--help"], 0),
    (["show", "--help"], 0),
    (["records", "--help"], 0),
    (["records", "list", "--help"], 0),
    (["targets", "--help"], 0),
    (["completion", "zsh"], 0),
    ([], 2),
    (["nonsense"], 2),
    (["build"], 2),
    (["build", "nonsense"], 2),
    (["compile", "missing.onnx", "--out", "out"], 2),
    (["build", "conv2d", "n1", "ic0", "oc4", "i4x4", "k1"], 2),
    (["tune", "conv2d n1 ic8 oc8 i4x4 k9x9"], 2),
    (["show", "conv2d n1 ic8 oc8 i4x4 k3 k3"], 2),
    (["validate", "missing.onnx"], 2),
    (["bench", "missing.toml"], 2),
    (["build", SMALL, "--threads", "0"], 2),
    (["build", SMALL, "--trials", "-1"], 2),
    (["build", SMALL, "--seconds", "soon"], 2),
    *((["build", SMALL, "--seconds", word], 2) for word in ("inf", "nan", "-1", "1e999")),
    *(([command, "--seconds", word], 2) for command in ("tune", "fuzz") for word in ("inf", "nan")),
    (["records", "prune", "--days", "nan"], 2),
    (["build", SMALL, "--target", "gpu"], 2),
    (["build", SMALL, "--schedule", "nonsense"], 2),
    (["build", SMALL, "--picks", "tile=4"], 2),
    (["build", SMALL, "--schedule", "reference", "--trials", "4"], 2),
    (["build", SMALL, "--name", "not a name"], 2),
    (["build", SMALL, "--records", "x.sqlite", "--no-records"], 2),
    (["build", "model.onnx", "--dim", "N"], 2),
    (["bench", SMALL, "--peers", "nobody"], 2),
    (["bench", SMALL, "--threads", "1,none"], 2),
    (["bench", SMALL, "--report", "table.txt"], 2),
    (["show", SMALL, "--schedule", "reference"], 2),
    (["records", "list", "--outcome", "nonsense"], 2),
    (["records", "best", "conv9d"], 2),
]


def every_command(command: click.Command, *words: str) -> Iterator[list[str]]:
    yield list(words)
    if isinstance(command, click.Group):
        for name in command.commands:
            yield from every_command(command.commands[name], *words, name)


@pytest.mark.parametrize("words", list(every_command(cli)), ids=" ".join)
def test_help_fits_into_80_columns(words: list[str]) -> None:
    """Also what is not to be wrapped."""
    told = CliRunner(env={"COLUMNS": "80"}).invoke(cli, [*words, "--help"]).output
    assert told
    assert [line for line in told.splitlines() if len(line) > 80] == []


def test_help_and_wrong_arguments_import_nothing_heavy(tmp_path: Path) -> None:
    script = f"""
import contextlib, io, json, sys
from convgen.cli import main
found = []
for arguments in {[list(arguments) for arguments, _ in QUICK]!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    found.append([status, err.getvalue(), sorted(set({HEAVY!r}) & set(sys.modules))])
print(json.dumps(found))
"""
    # What processors LLVM knows, it is asked once for each TVM: its names, too, are compared with one that is unknown.
    assert python("-m", "convgen", "build", SMALL, "--target", "gpu", cwd=tmp_path).returncode == 2
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for (arguments, status), (found, err, heavy) in zip(QUICK, json.loads(done.stdout), strict=True):
        assert (found, heavy) == (status, []), arguments
        if status and arguments:  # one line that begins with the program's name
            assert re.fullmatch(r"convgen: [^\n]+\n", err), arguments
    assert not list(tmp_path.iterdir())


def test_the_command_line_loads_no_metadata_before_it_needs_them() -> None:
    slow = {"importlib.metadata", "email.message", "multiprocessing", "sqlite3"}
    done = python("-c", f"import sys, convgen.cli; print(sorted({slow!r} & set(sys.modules)))")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_report_as_tables_loads_nothing_heavy(tmp_path: Path) -> None:
    store = stores.fill(tmp_path / "records.sqlite", stores.some(1))
    script = f"import sys; from convgen.cli import main; main(['report', {str(store)!r}]); heavy = {HEAVY!r}"
    done = python("-c", f"{script}; print(sorted(set(heavy) & set(sys.modules)), file=sys.stderr)")
    assert done.stdout.startswith("# "), done.stderr
    assert done.stderr == "[]\n"


def test_a_report_is_a_picture_where_steps_are_drawn(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    store, picture = stores.fill(tmp_path / "records.sqlite", stores.some(1)), tmp_path / "r.svg"
    status, _, err = run("report", store, "-o", picture)
    assert (status, picture.exists()) == (2, False)
    assert "-o FILE.svg: expected --whole and a model" in err
    assert "expected a file name that ends in .html, .svg or .md" in run("report", store, "-o", tmp_path / "r.pdf")[2]
    drawn: list[Path] = []

    def draw(model: Path, where: Path, out: Path, *_: Any, **__: Any) -> int:
        drawn.append(out)
        return 0

    monkeypatch.setattr("convgen.cli.report.report_model", draw)
    (tmp_path / "m.onnx").write_bytes(b"")
    assert run("report", store, tmp_path / "m.onnx", "--whole", "-o", picture)[0] == 0
    assert drawn == [picture]


def test_the_installed_command_and_the_module_agree() -> None:
    command = shutil.which("convgen", path=str(Path(sys.executable).parent))
    assert command
    by_name = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert by_name == python("-m", "convgen", "--version").stdout
    assert re.fullmatch(r"convgen \d+\.\d+\.\d+\S*\n", by_name)


def test_wrong_spec_names_field_expected_and_found(run: Run) -> None:
    status, out, err = run("build", "conv2d", "n1", "ic8", "oc8", "i4x4", "k9x9")
    assert (status, out) == (2, "")
    assert err == "convgen: kernel[0]: expected a dilated kernel within the padded input (4), found 9\n"


def test_impossible_memory_is_a_wrong_spec(run: Run) -> None:
    status, out, err = run("build", "conv3d n512 ic1 oc1 i1024x64x64 k1", "--no-records")
    if status == 0:
        pytest.skip("this machine has the memory")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_name_that_is_taken_is_refused_at_once(tmp_path: Path, run: Run) -> None:
    status, out, err = run("build", SMALL, "--name", "math", "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert "name: expected one that nothing else has, found 'math': <math.h> is a header" in err
    assert not (tmp_path / "out").exists()


def test_every_schedule_is_named_after_its_file() -> None:
    assert schedule_ids() == sorted(schedules())


def test_peer_names_are_the_peers() -> None:
    assert tuple(PEERS) == PEER_NAMES


def test_broken_pipe_is_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "convgen", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# ---- show, schedules, targets -----------------------------------------------------------------


def test_show_explains_a_layer(run: Run, run_json: Callable[..., Any]) -> None:
    found = run_json("show", SMALL, "--threads", 1)
    spec = ConvSpec.parse(SMALL)
    assert (found["spec"], found["flops"], found["bytes"]) == (SMALL, spec.flops, spec.bytes)
    assert found["shapes"]["dst"] == [1, 16, 10, 10]
    assert found["roofline"] == roofline(spec, 1).to_dict()
    reasons = {s["id"]: s["reason_against"] for s in found["schedules"]}
    assert reasons["reference"] is None
    assert "transposed" in reasons["cpu_transposed"]
    assert sum(s.get("is_default", False) for s in found["schedules"]) == 1
    status, out, _ = run("show", *SMALL.split(), "--threads", 1)  # the same, in several words
    assert status == 0
    assert out.startswith(SMALL)
    assert "no: needs a transposed convolution" in out
    assert f"limited by {found['roofline']['limited_by']}\n" in out


def test_threads_that_share_cpus_are_told(run: Run, tmp_path: Path) -> None:
    count = len(os.sched_getaffinity(0)) + 1
    build = ["build", TINY, "--no-records", "--no-validate", "--out", tmp_path / "out"]
    for command in (["show", SMALL], build):
        assert f"{count} threads shared" in run(*command, "--threads", count)[2]
        assert "shared" not in run(*command, "--threads", 1)[2]


def test_show_lists_the_layers_of_a_file(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    file = tmp_path / "net.txt"
    file.write_text(f"{SMALL}\n{TINY}\n{SMALL}\n")
    found = run_json("show", file)
    assert [(layer["spec"], layer["count"]) for layer in found["layers"]] == [(SMALL, 2), (TINY, 1)]
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)
    assert "2 different layers, 3 in all" in run("show", file)[1]
    file.write_text(f"{TINY}\n{TINY}\nconv1d ic4 oc4 i20 k99\n")
    assert "1 different layer, 2 in all" in run("show", file)[1]


def test_show_lists_the_layers_of_a_model(tmp_path: Path, run: Run, run_json: Callable[..., Any]) -> None:
    """With the node that each came from, and those that could not be read, with the reason."""
    from onnx import parser

    source = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4,8,8] x, float[4,4,3,3] w, float[4,4,1,1] v, double[4,4,3,3] u) => (float y) {
          [one] a = Conv(x, w) r = Relu(a) b = Conv<pads=[1,1,1,1]>(r, w) s = Relu(b)
          [two] c = Conv<pads=[1,1,1,1]>(s, w) t = Relu(c)
          [last] d = Conv(t, v) e = Cast<to=11>(d) [wide] y = Conv(e, u) }"""
    file = tmp_path / "net.onnx"
    file.write_bytes(parser.parse_model(source).SerializeToString())
    found = run_json("show", file, "--dim", "N=2")
    assert [layer["names"] for layer in found["layers"]] == [["one"], ["b", "two"], ["last"]]
    assert [layer["count"] for layer in found["layers"]] == [1, 2, 1]
    assert found["convolutions"] == 4
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)
    assert found["flops"] == sum(layer["count"] * layer["flops"] for layer in found["layers"])
    reason = f"{file}: Conv 'wide': weights 'u' has dtype double; supported are f32, f16, bf16"
    assert found["skipped"] == [reason]
    status, out, err = run("show", file, "--dim", "N=2")
    assert status == 0
    assert "b +1" in out
    assert "3 different layers, 4 in all" in out
    assert f"left out: {reason}" in err
    status, out, err = run("show", file)
    assert (status, out) == (2, "")
    assert "a size for 'N' (as in --dim 'N=1')" in err


def test_show_needs_no_compiler(run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = run_json("show", SMALL)
    assert found["roofline"] is None
    assert found["schedules"]


@pytest.mark.parametrize(("kind", "mark"), [("tir", "def main"), ("ll", "define "), ("asm", ".text")])
def test_show_prints_a_candidate(run: Run, kind: str, mark: str) -> None:
    status, out, _ = run("show", TINY, "--ir", kind, "--schedule", "reference")
    assert status == 0
    assert mark in out


def test_show_refuses_picks_outside_the_space(run: Run) -> None:
    status, out, err = run("show", SMALL, "--ir", "tir", "--schedule", "cpu_direct", "--picks", "tile_oc=7")
    assert (status, out) == (2, "")
    assert "tile_oc=" in err


def test_a_forced_schedule_must_apply_to_every_layer(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "net.txt"
    file.write_text(f"conv2d ic16 oc16 i8x8 k1x1\n{SMALL}\n")
    status, out, err = run("build", file, "--schedule", "cpu_winograd_rows", "--no-records", "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.startswith("convgen: --schedule cpu_winograd_rows: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("columns", [80, 130])
@pytest.mark.parametrize("words", ["targets", "schedules", "records list"])
def test_lists_fit_the_terminal(words: str, columns: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, _ = run(*words.split())
    assert status == 0
    assert max(map(len, out.splitlines()), default=0) <= columns


def test_schedules_and_targets(run: Run, run_json: Callable[..., Any]) -> None:
    shown = run("targets")[1]
    assert "``" not in shown
    listed = run_json("schedules")
    assert {row["id"] for row in listed} == set(schedules())
    assert all(row["summary"] for row in listed)
    targets = run_json("targets")
    assert any(row["native"] and row["family"] == "cpu" for row in targets)
    waits = {row["target"]: row["core"]["waits"] for row in targets if row["core"]}
    assert all(f"{facts[name]:.3g}" in shown for facts in waits.values() for name in WAITS)
    assert all(facts["origin"] in shown for facts in waits.values())
    assert {waits["cpu:znver4"]["origin"], waits["cpu:aarch64-cortex-a72"]["origin"]} == {"measured", "none known"}


# ---- build ------------------------------------------------------------------------------------


def check_example(folder: Path) -> None:
    """Compile the exported example and let it check the library."""
    library = next(folder.glob("lib*.a"))
    program = folder / "example"
    flags = ["-std=c11", "-Wall", "-Werror", "-O1"]
    command = ["cc", *flags, "-o", program, folder / "example.c", library, "-lm", "-lpthread"]
    subprocess.run(list(map(str, command)), check=True, timeout=60)
    subprocess.run([str(program)], check=True, timeout=60, capture_output=True)


def test_build_exports_one_layer_into_the_folder(tmp_path: Path, run_json: Callable[..., Any]) -> None:
    found = run_json("build", SMALL, "--no-records", "--threads", 2, "--out", tmp_path / "out", "--name", "small")
    (layer,) = found["layers"]
    assert layer["spec"] == SMALL
    assert layer["validation"]["passed"]
    assert layer["record"] is None
    assert found["complete"]
    assert {"libsmall.so", "libsmall.a", "small.h", "manifest.json", "example.c"} <= set(os.listdir(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["schedule"] is not None
    check_example(tmp_path / "out")


def test_build_forces_a_candidate(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("build", TINY, "--no-records", "--threads", 1, "--schedule", "reference", "--no-validate")
    assert status == 0
    assert "reference()" in out
    assert "checks     none made" in out
    assert "slow reference" in err
    assert (tmp_path / "convgen-out" / ConvSpec.parse(TINY).name / "manifest.json").exists()


def two_convolutions(path: Path) -> Path:
    """A model: Conv, Relu, Conv, the weights as inputs."""
    shapes = {"x": [1, 4, 8, 8], "w": [8, 4, 3, 3], "b": [8], "v": [8, 8, 1, 1], "y": [1, 8, 8, 8]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["y"], name="second"),
    ]
    graph = helper.make_graph(nodes, "two", [values[name] for name in ("x", "w", "b", "v")], [values["y"]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_build_of_a_model_writes_an_index(tmp_path: Path, run: Run) -> None:
    model = two_convolutions(tmp_path / "two.onnx")
    status, out, err = run("build", model, "--no-records", "--threads", 1, "--out", tmp_path / "out")
    assert status == 0, err
    assert "first" in out
    assert "2 of 2 layers" in err
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["complete"]
    assert [layer["names"] for layer in index["layers"]] == [["first"], ["second"]]
    assert index["layers"][0]["spec"].endswith("relu")
    for layer in index["layers"]:
        assert layer["validation"]["passed"]
        check_example(tmp_path / "out" / layer["folder"])


def failing(kernel: Any, *, seed: int = 0) -> Report:
    checks = (Check("float", False, "largest error 7 of the bound"),)
    return Report(kernel.spec.descriptor, "x()", 1, checks, 1.0, float("inf"), "convgen validate …")


def test_a_kernel_that_fails_validation_is_not_exported(
    tmp_path: Path, run: Run, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["convgen.check.validate"], "validate", failing)
    status, _, err = run("build", TINY, "--no-records", "--threads", 1, "--out", tmp_path / "out")
    assert status == 1
    assert "float: largest error 7 of the bound; repeat with: convgen validate …" in err
    assert not (tmp_path / "out").exists()
    found = run_json("validate", TINY, "--no-records", "--threads", 1, status=1)
    assert found["passed"] is False
    assert found["layers"][0]["worst_error"] is None  # JSON has no infinity

    file = tmp_path / "net.txt"
    file.write_text(f"{SMALL}\n{TINY}\n")
    found = run_json("build", file, "--no-records", "--threads", 1, "--out", tmp_path / "out", status=1)
    assert [("error" in layer, "folder" in layer) for layer in found["layers"]] == [(True, False)] * 2


def test_build_where_nothing_can_be_written(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("")
    for source in (TINY, two_convolutions(tmp_path / "two.onnx")):
        out = tmp_path / "file" / "out"
        status, _, err = run("build", source, "--no-records", "--threads", 1, "--no-validate", "--out", out)
        assert status == 3
        assert re.fullmatch(r"convgen: [^\n]+\n", err.splitlines(keepends=True)[-1])


# ---- formatting -------------------------------------------------------------------------------


def test_formatting() -> None:
    assert [duration(value) for value in (None, 2.5, 1.5e-3, 12.345e-6, 3e-9)] == [
        "–",
        "2.5 s",
        "1.5 ms",
        "12.35 µs",
        "3 ns",
    ]
    assert [size(value) for value in (4, 2048, 3 << 20, 5 << 30)] == ["4 B", "2 KiB", "3 MiB", "5 GiB"]
    assert table(["a", "b>"], [["x", 1], ["long", 22]]) == "a      b\n────  ──\nx      1\nlong  22"


def test_commands_are_documented() -> None:
    assert all(command.get_short_help_str() for command in cli.commands.values())
