"""Compilers, and the C libraries that they link with."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import convgen
from convgen.cli import main
from convgen.errors import BuildError
from convgen.lowering.toolchain import NATIVE, compiler, static_libc

LAYER = "conv2d ic3 oc4 i6x6 k3x3 relu"
needs_zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed")


def test_a_choice_of_c_library_takes_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("glibc", "glibc-3.1", "glibc-2.28.1", "uclibc", "musl -x"):
        with pytest.raises(BuildError, match=r"libc: expected musl or a version of glibc such as glibc-2.28, found"):
            compiler(NATIVE, wrong)
    for old in ("glibc-2.4", "glibc-2.16"):
        with pytest.raises(BuildError, match=f"libc: expected glibc-2.17 or later, .*, found {old}"):
            compiler(NATIVE, old)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"libc: musl takes the Python package ziglang \(pip install ziglang\)"):
        compiler(NATIVE, "musl")


@needs_zig
def test_a_library_for_an_older_glibc_runs_here(tmp_path: Path) -> None:
    kernel = convgen.build(LAYER, threads=2, records=False)
    needs = kernel.export(tmp_path, libc="glibc-2.17")["needs"]
    assert (needs["libc"], needs["triple"]) == ("glibc", f"{NATIVE}-linux-gnu")
    assert tuple(map(int, needs["glibc"].split("."))) <= (2, 17)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 3, 6, 6), np.float32), rng.standard_normal((4, 3, 3, 3), np.float32)
    bias = np.zeros(4, np.float32)
    np.testing.assert_array_equal(convgen.load(tmp_path).bind(w, bias)(x), kernel.bind(w, bias)(x))
    command = ["cc", "-std=c11", "example.c", f"lib{kernel.name}.a", "-lm", "-lpthread", "-o", "example"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert "; ok" in subprocess.check_output(["./example"], cwd=tmp_path, text=True)


@needs_zig
def test_a_library_for_musl_is_in_static_programs(tmp_path: Path) -> None:
    kernel = convgen.build(LAYER, threads=2, records=False)
    needs = kernel.export(tmp_path, libc="musl")["needs"]
    assert (needs["libc"], needs["glibc"], needs["triple"]) == ("musl", None, f"{NATIVE}-linux-musl")
    musl = compiler(NATIVE, "musl")
    command = [*musl, "-std=c11", "-static", "example.c", f"lib{kernel.name}.a", "-lm", "-lpthread", "-o", "example"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert "; ok" in subprocess.check_output(["./example"], cwd=tmp_path, text=True)


@needs_zig
def test_zig_alone_builds_for_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "aarch64" if NATIVE == "x86_64" else "x86_64"
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *rest: None if "-linux-gnu-" in name else found(name, *rest))
    assert compiler(other)[1:] == ("cc", "-target", f"{other}-linux-gnu.2.28")
    assert static_libc(other) == "musl"
    command = ["build", LAYER, "--target", f"cpu:{other}" if other == "aarch64" else "cpu:x86-64-v2", "--no-records"]
    assert main([*command, "--out", str(tmp_path), "--name", "layer"]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["needs"]["architecture"] == other
    assert {"layer.h", "liblayer.so", "liblayer.a", "example.c", "layerConfig.cmake", "layer.pc"} <= set(
        manifest["files"]
    )
    zig = [*compiler(other), "-std=c11", "-Wall", "-Werror"]
    subprocess.run([*zig, "example.c", "liblayer.a", "-lm", "-lpthread", "-o", "example"], cwd=tmp_path, check=True)
    assert (tmp_path / "example").read_bytes()[18] == {"aarch64": 183, "x86_64": 62}[other]  # ELF's e_machine
    assert tuple(map(int, manifest["needs"]["glibc"].split("."))) <= (2, 28)
    if found(f"qemu-{other}"):
        assert manifest["validation"]["passed"]
    else:
        assert "not validated" in capsys.readouterr().err


def test_the_command_line_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", LAYER, "--libc", "uclibc", "--no-records"]) == 2
    assert "expected musl or a version of glibc such as glibc-2.28, found 'uclibc'" in capsys.readouterr().err
    assert main(["compile", "none.onnx", "--libc", "glibc-2.4", "--out", "none"]) == 2
    assert main(["build", LAYER, "--libc", "glibc-2.4", "--no-records"]) == 2
    assert "expected glibc-2.17 or later, which has all that is called, found glibc-2.4" in capsys.readouterr().err
