"""convgen-runtime, which loads what was compiled with NumPy alone."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from network_models import model_of
from onnx import helper
from paths import ROOT

import convgen

PROJECT = ROOT / "distributions" / "runtime" / "pyproject.toml"
#: Most bytes that it may take when it is installed, NumPy aside.
MOST_BYTES = 5 << 20


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_it_has_the_modules_that_loading_imports_and_no_others() -> None:
    script = "import sys, convgen; convgen.load, convgen.Layer, convgen.Library, convgen.ConvSpec, convgen.ConvgenError"
    listed = "print(*(name for name in sys.modules if name.partition('.')[0] == 'convgen'))"
    imported = set(run(sys.executable, "-c", f"{script}; {listed}").split())
    modules = tomllib.loads(PROJECT.read_text())["tool"]["setuptools"]["py-modules"]
    assert {name.removesuffix(".__init__") for name in modules} == imported
    assert modules == sorted(set(modules))


def test_it_is_of_the_same_version_and_needs_numpy_alone() -> None:
    own = tomllib.loads(PROJECT.read_text())["project"]
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert own["version"] == whole["version"]
    assert own["requires-python"] == whole["requires-python"]
    (numpy,) = own["dependencies"]
    assert numpy in whole["dependencies"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distribution, installed from its wheel, and NumPy."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    modules = ROOT / "convgen"
    for path in [*modules.rglob("*.py"), *PROJECT.parent.iterdir(), ROOT / "LICENSE"]:
        linked = modules / "schedules", modules / "targets"  # of a development checkout
        if path.is_file() and not any(path.is_relative_to(other) for other in linked):
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "wheels"]
    run(*build, source / "distributions" / "runtime")
    (wheel,) = (source / "wheels").glob("*.whl")
    assert wheel.name == f"convgen_runtime-{convgen.__version__}-py3-none-any.whl"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--compile"]
    run(*pip, "--target", folder, wheel)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MOST_BYTES
    packages = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (packages / name).exists():
            (folder / name).symlink_to(packages / name)
    return folder


def alone(installed: Path, script: str, *arguments: object) -> str:
    """What a script prints that sees the folder and Python's own library, nothing else."""
    start = f"import sys; sys.path.insert(0, {str(installed)!r})"
    return run(sys.executable, "-I", "-S", "-c", f"{start}\n{script}", *arguments)


def test_it_runs_a_kernel_and_a_network(installed: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 3, 6, 6), np.float32), rng.standard_normal((5, 3, 3, 3), np.float32)
    kernel = convgen.build("conv2d n1 ic3 oc5 i6x6 k3x3 p1 nobias relu", threads=2, records=False)
    kernel.export(tmp_path / "kernel")
    model = model_of(
        [helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4), helper.make_node("Relu", ["a"], ["y"])],
        {"x": x.shape}, ["y"], {"w": w},
    )  # fmt: skip
    convgen.compile(model, threads=2, records=False).export(tmp_path / "network")
    np.savez(tmp_path / "given.npz", x=x, w=w)
    script = """
import convgen, numpy
given = numpy.load(sys.argv[1] + "/given.npz")
kernel, network = convgen.load(sys.argv[1] + "/kernel"), convgen.load(sys.argv[1] + "/network")
numpy.savez(sys.argv[1] + "/made.npz", kernel=kernel.bind(given["w"])(given["x"]), network=network(given["x"]))
others = {"tvm", "onnx", "onnxruntime", "click", "platformdirs", "ml_dtypes"} & set(sys.modules)
print(convgen.__version__, others or "nothing else")
"""
    assert alone(installed, script, tmp_path) == f"{convgen.__version__} nothing else\n"
    made = np.load(tmp_path / "made.npz")
    np.testing.assert_array_equal(made["kernel"], kernel.bind(w)(x))
    np.testing.assert_allclose(made["network"], made["kernel"], rtol=1e-4, atol=1e-4)


def test_what_it_lacks_is_said(installed: Path) -> None:
    script = """
import convgen
for name in sorted(set(convgen.__all__) - {"load", "Layer", "Library", "ConvSpec", "ConvgenError", "__version__"}):
    try:
        getattr(convgen, name)
    except ImportError as error:
        print(error)
try:
    convgen.nonsense
except AttributeError as error:
    print(error)
"""
    *lacking, unknown = alone(installed, script).splitlines()
    assert {line.partition(":")[0] for line in lacking} >= {"convgen.build", "convgen.compile", "convgen.tune"}
    assert all("expected the whole of convgen, found convgen-runtime" in line for line in lacking)
    assert unknown == "module 'convgen' has no attribute 'nonsense'"


def test_faults_are_told_there_as_everywhere(installed: Path, tmp_path: Path) -> None:
    script = """
import convgen
try:
    convgen.load(sys.argv[1])
except convgen.ConvgenError as error:
    print(type(error).__name__, error)
"""
    assert alone(installed, script, tmp_path / "none").startswith("ExportError")
