"""Exported libraries loaded again, with NumPy alone; those that were changed are refused."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_script
from naive import compile_naive, convolve, link_naive, operands

from convgen.errors import ExportError, KernelError
from convgen.kernel.export import write_library
from convgen.kernel.library import Library
from convgen.kernel.load import load
from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv2d n2 ic3 oc5 i20x20 k3x3 p1 relu")


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return operands(SPEC)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    interface, path = compile_naive(SPEC, tmp_path, "staged", name="exported")
    write_library(tmp_path / "out", interface, path, {"threads": 2})
    return tmp_path / "out"


def test_load(exported: Path, inputs: dict[str, np.ndarray]) -> None:
    loaded = load(exported)
    assert (loaded.spec, loaded.threads, loaded.name) == (SPEC, 2, "exported")
    assert SPEC.descriptor in loaded.version
    layer = loaded.bind(inputs["weights"], inputs["bias"])
    np.testing.assert_array_equal(layer(inputs["src"]), convolve(SPEC, inputs))
    assert load(exported, threads=1).threads == 1


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"tvm", "tvm_ffi", "onnx", "onnxruntime", "platformdirs", "yaml", "click", "rich"}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
"""


def test_loading_needs_nothing_but_numpy(exported: Path, tmp_path: Path, inputs: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "io.npz", expected=convolve(SPEC, inputs), **inputs)  # type: ignore[arg-type]
    code = BLOCKED + textwrap.dedent(
        """
        import numpy as np
        from convgen.kernel.load import load
        arrays = np.load(sys.argv[2])
        layer = load(sys.argv[1]).bind(arrays["weights"], arrays["bias"])
        assert (layer(arrays["src"]) == arrays["expected"]).all()
        print("fine")
        """
    )
    done = run_script(code, exported, tmp_path / "io.npz")
    assert done.stdout == "fine\n", done.stderr


def test_a_changed_library_is_refused(exported: Path) -> None:
    path = exported / "libexported.so"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExportError, match=r"expected SHA-256 [0-9a-f]{64}.*, found [0-9a-f]{64}"):
        load(exported)
    path.unlink()
    with pytest.raises(ExportError, match="expected a library, found No such file"):
        load(exported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"abi": 1}, "abi: expected 4, found 1"),
        ({"name": "../../evil"}, "name: expected a C identifier"),
        ({"spec": {"fields": {"n": 1}}}, "ic: expected a value"),
        ({"files": {}}, "found no 'libexported.so'"),
        ({"threads": 0}, "threads: expected 1 to 1024"),
        (
            {"needs": {"architecture": "riscv64", "triple": "riscv64-linux-gnu"}},
            "needs: expected a library for .*, this machine's architecture, found one for riscv64-linux-gnu",
        ),
        ([], "expected the manifest of a library"),
        ("{", "expected JSON"),
        (None, "expected a manifest, found No such file"),
    ],
)
def test_a_wrong_manifest_is_refused(exported: Path, change: Any, message: str) -> None:
    path = exported / "manifest.json"
    manifest = json.loads(path.read_text())
    path.unlink()
    if isinstance(change, dict):
        path.write_text(json.dumps({**manifest, **change}))
    elif change is not None:
        path.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises((ExportError, KernelError), match=message):
        load(exported)


def test_a_library_exported_anew_is_loaded_anew(exported: Path, tmp_path: Path) -> None:
    """The loader knows files by their path; the one it knows must not stand in for the new one."""
    old = load(exported)
    spec = SPEC.with_(activation="none")
    interface, path = compile_naive(spec, tmp_path, name="exported")
    write_library(exported, interface, path, {"threads": 1})
    new = load(exported)
    assert new.version != old.version
    given = operands(spec)
    np.testing.assert_array_equal(new.bind(given["weights"], given["bias"])(given["src"]), convolve(spec, given))


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "libx.so").write_text("text")
    with pytest.raises(ExportError, match=r"libx.so: expected a library with the kernel x, found"):
        Library(tmp_path / "libx.so", SPEC, "x", 1)
    with pytest.raises(ExportError, match="expected a library with the kernel wrong_name"):
        Library(link_naive(SPEC, tmp_path)[1], SPEC, "wrong_name", 1)
