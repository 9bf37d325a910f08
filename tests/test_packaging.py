"""What a user installs and imports, and what the repository may say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from paths import ROOT

import convgen
from convgen.cli import main

PUBLIC = set(convgen.__all__)
#: Where the databases that ship with the package are.
SHIPPED = "convgen/records/shipped"


def python(script: str, *arguments: object, **options: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference" / "api.rst").read_text(encoding="utf-8")
    shown = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page, re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert ".. automodule:: convgen.errors\n" in page  # ConvgenError, and all that are one
    assert set(shown) == PUBLIC - {"ConvgenError", "__version__"}


# ---- the package from Python ------------------------------------------------------------------


def test_public_names() -> None:
    assert len(PUBLIC) <= 23  # layers, pairs of them, networks, exported folders, and what is done with each
    for name in PUBLIC:
        assert getattr(convgen, name) is not None
    assert set(dir(convgen)) >= PUBLIC
    assert convgen.__version__ == version("convgen")
    with pytest.raises(AttributeError, match="nonsense"):
        convgen.nonsense  # noqa: B018


def test_import_is_light_and_names_come_when_used() -> None:
    script = """
import sys
import convgen
HEAVY = {"tvm", "onnx", "onnxruntime", "numpy", "click", "rich", "yaml", "jinja2"}
def heavy(): return sorted(HEAVY & set(sys.modules))
print(heavy())
convgen.ConvSpec.parse("conv2d ic4 oc4 i4x4 k1").descriptor
convgen.read_specs("conv2d ic4 oc4 i4x4 k1")
print(heavy())
convgen.load
print(heavy())
"""
    assert python(script).splitlines() == ["[]", "[]", "['numpy']"]


def test_functions_stay_functions_when_their_modules_are_imported() -> None:
    script = """
import convgen.api, convgen.check.validate, convgen.kernel.load, convgen.tuning.tuner
import convgen
assert all(callable(f) for f in (convgen.build, convgen.tune, convgen.validate)), convgen.build
from convgen import build, tune, validate
assert build is convgen.build and all(callable(f) for f in (build, tune, validate))
"""
    python(script)


def test_an_exported_library_loads_with_numpy_alone(tmp_path: Path) -> None:
    kernel = convgen.build("conv2d n1 ic3 oc5 i6x6 k3x3 p1 nobias", threads=1, records=False)
    kernel.export(tmp_path / "out")
    script = """
import importlib.abc, sys
allowed = {"convgen", "numpy", *sys.stdlib_module_names}
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        # The finder of an editable install is not of this project's making.
        if name.partition(".")[0] not in allowed and not name.startswith("__editable__"):
            raise ImportError(f"expected NumPy and the standard library only, found {name}")
sys.meta_path.insert(0, Refuse())
import numpy, convgen
layer = convgen.load(sys.argv[1]).bind(numpy.ones((5, 3, 3, 3), "f4"))
print(layer(numpy.ones((1, 3, 6, 6), "f4"))[0, 0, 2, 2])
"""
    assert float(python(script, tmp_path / "out")) == 27.0


# ---- the wheel --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the tracked tree, built apart from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    for suffix in ("json", "jsonl"):  # a database, whether or not one ships
        (source / SHIPPED / f"planted.{suffix}").touch()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def tracked() -> list[str]:
    """Files of the project: what git tracks, or would; where this is no clone, all but caches."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout:
        return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    ignored = re.compile(r"__pycache__|\.egg-info|^(\.venv|\.git|build|dist|\.\w+_cache|\.hypothesis)(/|$)")
    names = (str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file())
    return [name for name in names if not ignored.search(name)]


def test_the_wheel_is_one_package_with_all_its_parts(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {PurePosixPath(name).parts[0] for name in names} == {"convgen"}
    expected = {"convgen/py.typed"}
    sources = [name for name in tracked() if name.endswith(".py")]
    expected |= {name for name in sources if name.startswith("convgen/")}
    expected |= {f"convgen/{name}" for name in sources if name.startswith(("schedules/", "targets/"))}
    expected |= {f"convgen/runtime/{path.name}" for path in (ROOT / "convgen/runtime").iterdir() if path.is_file()}
    expected |= {f"{SHIPPED}/{path.name}" for path in (ROOT / SHIPPED).glob("*.*")}
    expected |= {f"{SHIPPED}/planted.json", f"{SHIPPED}/planted.jsonl", f"{SHIPPED}/README.md"}
    expected |= {f"convgen/report/templates/{path.name}" for path in (ROOT / "convgen/report/templates").iterdir()}
    expected |= {f"convgen/docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}  # what `convgen help` prints
    assert {"convgen/schedules/reference.py", "convgen/targets/cpu.py", "convgen/runtime/pool.c"} <= expected
    assert {"convgen/measure/standalone/command.py", "convgen/runtime/emulate.cpp"} <= expected
    assert expected <= set(names)


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = wheel.read(name).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: apache-tvm-ffi==0.1.14.post0" in metadata
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "convgen = convgen.__main__:main" in wheel.read(entry).decode()


# ---- the repository ---------------------------------------------------------------------------


def test_nothing_tracked_points_outside_the_project() -> None:
    forbidden = ["../" + "shared", "/" + "work/", "/tmp/" + "venv", "/opt/" + "pypi"]
    found = []
    for name in tracked():
        text = (ROOT / name).read_bytes().decode("utf-8", errors="replace")
        found += [f"{name}: {word}" for word in forbidden if word in text]
    assert found == []


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {normal(name): pin for name, pin in pins.items()}
    for requirement in wanted:
        name, operator, bound = re.fullmatch(r"([\w.-]+)\s*([=>]=)\s*(\S+)", requirement).groups()  # type: ignore[union-attr]
        assert normal(name) in pins, requirement
        if operator == "==":
            assert pins[normal(name)] == bound


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_checks_run_by_themselves() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    command = ["make", "--dry-run", "check", "docs", "test", "test-python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "ruff check" in done.stdout
    assert "mypy" in done.stdout
    assert "sphinx" in done.stdout
    assert "--fail-on-warning" in done.stdout
    assert "pytest" in done.stdout
    made = {word for line in re.findall(r"^\s*make (.*)$", script.read_text(), re.MULTILINE) for word in line.split()}
    assert made >= {"check", "docs", "test", "test-python"}


def test_the_oldest_python_promised_is_found(tmp_path: Path) -> None:
    for name, script in (("python3.19", "echo 3.19.0 made-up"), ("python3.18", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    listed = subprocess.check_output([ROOT / ".ci" / "pythons"], env=environment, text=True).splitlines()
    versions = [tuple(map(int, line.split()[0].split("."))) for line in listed]
    assert versions == sorted(set(versions))
    assert versions[0] >= (3, 11)
    assert listed[-1] == "3.19.0 made-up"
    assert not any(version[:2] == (3, 18) for version in versions)
    for line in listed[:-1]:
        version, program = line.split(" ", 1)
        assert subprocess.check_output([program, "--version"], text=True) == f"Python {version}\n"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "conv" / "manifest.json").exists()


def test_the_page_about_gradients_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """With two images, for the time it takes: its commands; and its Python, against PyTorch's autograd."""
    page = (ROOT / "docs" / "gradients.md").read_text(encoding="utf-8").replace("n16", "n2")
    commands = re.findall(r"^convgen (validate .*)$", page, re.MULTILINE)
    assert [command.split()[-1].strip('"') for command in commands] == ["data", "weights"]
    for command in commands:
        assert main([*shlex.split(command), "--no-records"]) == 0, command
        assert "FAIL" not in capsys.readouterr().out

    code, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code.count("ConvSpec(16, ") == 1
    rng = np.random.default_rng(0)
    x, weights, gradient = (
        rng.integers(-3, 4, shape).astype(np.float32) for shape in ((2, 64, 56, 56), (128, 64, 3, 3), (2, 128, 28, 28))
    )
    found: dict[str, Any] = {"convgen": convgen, "weights": weights, "x": x, "gradient": gradient}
    exec(code.replace("ConvSpec(16, ", "ConvSpec(2, "), found)
    torch = pytest.importorskip("torch")
    given = [torch.from_numpy(array).requires_grad_() for array in (x, weights, np.zeros(128, np.float32))]
    torch.nn.functional.conv2d(*given, stride=2, padding=1).backward(torch.from_numpy(gradient))
    for name, tensor in zip(("of_src", "of_weights", "of_bias"), given, strict=True):
        expected = tensor.grad.numpy()  # of integers: a tap too few would be 1 away, rounding is far less
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def test_the_python_example_runs() -> None:
    command = [sys.executable, str(ROOT / "examples" / "python_api.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout.endswith("the exported library computes the same bits\n")
