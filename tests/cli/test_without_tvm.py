"""Commands that compile nothing load no compiler; those that do load no PyTorch with it. Start-up is what is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import stores
from commands import SMALL, python

from convgen.hardware.target import resolve
from convgen.lowering.discover import schedule
from convgen.lowering.versions import versions
from convgen.records.record import TuningRecord

#: ``{store}`` holds one record, ``{id}``, that answers for SMALL here.
LIGHT: list[list[str]] = [
    ["schedules"],
    ["targets"],
    ["show", SMALL],
    ["show", SMALL, "--target", "cuda:sm_90a"],
    ["tune", SMALL, "--status", "--records", "{store}"],
    ["records", "list", "--records", "{store}"],
    ["records", "best", "--records", "{store}"],
    ["records", "show", "{id}", "--records", "{store}"],
    ["records", "check", "--records", "{store}"],
    ["records", "prune", "--records", "{store}"],
    ["report", "{store}"],
]

SCRIPT = """
import contextlib, io, json, sys
from convgen.cli import main
out = io.StringIO()
with contextlib.redirect_stdout(out):
    status = main({arguments!r})
print(json.dumps([status, out.getvalue(), sorted({{"tvm", "tvm_ffi", "torch"}} & set(sys.modules))]))
"""


def command(arguments: Sequence[str], folder: Path) -> tuple[int, str, list[str]]:
    """Status, output and which of TVM and PyTorch was loaded, where a PyTorch is that must not be.

    Args:
        folder: of caches, and of that PyTorch.
    """
    (folder / "torch.py").write_text("raise AssertionError('PyTorch was imported')\n")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": path}
    done = python("-c", SCRIPT.format(arguments=list(arguments)), env=environment)
    assert done.returncode == 0, done.stderr
    status, out, loaded = json.loads(done.stdout)
    return status, out, loaded


def test_what_compiles_nothing_loads_no_compiler(tmp_path: Path) -> None:
    """Once LLVM has said what the machine is, which is kept."""
    target = resolve("cpu")
    record = TuningRecord(
        spec=SMALL,
        target=target.spelling,
        hardware=target.hardware,
        threads=target.cores,
        schedule="reference",
        schedule_version=schedule("reference").version,
        picks={},
        outcome="ok",
        seconds=1e-3,
        samples=(1e-3,),
        versions=versions(),
        when="2026-01-31T12:00:00.000001Z",
        note={"final": True, "winner": True},
    )
    store = stores.fill(tmp_path / "records.sqlite", [record])
    first = command(["targets"], tmp_path)
    assert first[0] == 0
    assert "torch" not in first[2]
    assert command(["targets"], tmp_path) == (0, first[1], [])
    for words in LIGHT:
        arguments = [word.format(store=store, id=record.id) for word in words]
        status, _, loaded = command(arguments, tmp_path)
        assert (status, loaded) == (0, []), arguments


def test_what_llvm_said_is_asked_again_where_the_cache_is_damaged(tmp_path: Path) -> None:
    first = command(["targets"], tmp_path)
    (kept,) = (tmp_path / "cache").rglob("llvm/*.json")
    for damage in ("{", "[]", '{"version": []}', '{"version": 3}'):
        kept.write_text(damage)
        assert command(["targets"], tmp_path)[:2] == first[:2]


def test_a_compiling_command_loads_tvm_without_pytorch(tmp_path: Path) -> None:
    status, out, loaded = command(["show", SMALL, "--ir", "tir", "--schedule", "reference"], tmp_path)
    assert (status, loaded) == (0, ["tvm", "tvm_ffi"])
    assert "def main" in out


def test_pytorch_can_be_imported_after_tvm(tmp_path: Path) -> None:
    """And is what it is, as TVM is."""
    (tmp_path / "torch.py").write_text("answer = 42\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from convgen.deferred import keep_torch_out, te\n"
        "keep_torch_out(); keep_torch_out(); import tvm; assert 'torch' not in sys.modules\n"
        "import torch; assert te.compute is tvm.te.compute; assert tvm.__spec__.loader.get_filename('tvm')\n"
        "print(torch.answer)"
    )
    done = python("-c", script)
    assert (done.stdout, done.stderr) == ("42\n", "")


#: What takes long to import; each of these commands answers without any of it.
HEAVY = {"numpy", "onnx", "onnxruntime", "tvm", "tvm_ffi", "torch", "rich", "jinja2", "yaml", "ml_dtypes", "psutil"}
QUICK = (
    ["--help"],
    ["help", "json"],
    ["schedules"],
    ["targets"],
    ["show", SMALL],
    ["show", SMALL, "--target", "cuda:sm_90a"],
    ["tune", SMALL, "--status", "--records", "{store}"],
    ["records", "list", "--records", "{store}"],
    ["records", "show", "{id}", "--records", "{store}"],
)
#: Modules that a command loads, at most, Python's own included: about a millisecond each.
MODULES = 380


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_what_answers_at_once_loads_little(arguments: list[str], tmp_path: Path) -> None:
    (record,) = stores.some(1)
    store = stores.fill(tmp_path / "records.sqlite", [record])
    words = [word.format(store=store, id=record.id) for word in arguments]
    script = f"""
import contextlib, io, json, sys
from convgen.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    status = main({words!r})
print(json.dumps([status, sorted(sys.modules)]))
"""
    for _ in range(2):  # the first time what LLVM and the machine say is asked and kept
        done = python("-c", script, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")})
        assert done.returncode == 0, done.stderr
    status, modules = json.loads(done.stdout)
    assert status == 0
    assert not HEAVY & set(modules)
    assert len(modules) <= MODULES
    shared = {"convgen.cli.common", "convgen.cli.completion", "convgen.cli.tables"}
    commands = {name for name in modules if name.startswith("convgen.cli.")} - shared
    assert len(commands) <= 3 or arguments[0] in ("--help", "tune")  # a group's may be in three modules
