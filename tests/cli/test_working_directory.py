"""No command imports what happens to lie in the working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = "conv1d n1 ic2 oc3 i9 k3"
#: Modules that are imported by the command line, by what it starts, or by libraries of theirs.
MODULES = """
    numpy tvm tvm_ffi onnx onnxruntime click yaml ml_dtypes platformdirs scipy psutil cloudpickle torch jinja2
    json pickle random tempfile subprocess ctypes sqlite3 fcntl multiprocessing schedules targets cpu_rows
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a module of every such name, which ends the process that imports it."""
    (folder := tmp_path / "folder").mkdir()
    for name in MODULES.split():
        (folder / f"{name}.py").write_text(f"import os\nos.write(2, b'imported {name}')\nos._exit(77)\n")
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=folder, capture_output=True, text=True, check=False
    )


VALIDATE = ("validate", TEXT, "--no-records")


@pytest.mark.parametrize(
    ("way", "arguments"),
    [
        ("module", VALIDATE),
        ("command", VALIDATE),
        ("command", ("tune", TEXT, "--trials", "2", "--no-records")),
        ("command", ("fuzz", "--specs", "1")),
        ("command", ("bench", TEXT, "--no-records", "--repeats", "1", "--threads", "1", "--peers", "onnxruntime")),
    ],
)
def test_commands_import_nothing_from_there(folder: Path, tmp_path: Path, way: str, arguments: tuple[str, ...]) -> None:
    if way == "module":
        command = ["-m", "convgen"]
    else:
        (folder / "convgen.py").write_text("import os\nos._exit(78)\n")
        (script := tmp_path / "convgen").write_text("from convgen.__main__ import main\nmain()\n")
        command = [str(script)]
    done = run(folder, *command, *arguments)
    assert done.returncode == 0, done
    assert "imported" not in done.stderr
    assert not (folder / "__pycache__").exists()


def test_neither_do_tvms_own_processes(folder: Path, tmp_path: Path) -> None:
    """Those that measure on other machines."""
    (script := tmp_path / "script").write_text(
        "from convgen import cli\n"
        "def main():\n"
        "    import os\n"
        "    from tvm.support.popen_pool import PopenWorker\n"
        "    worker = PopenWorker()\n"
        "    worker.send(os.getcwd)\n"
        "    print(worker.recv())\n"
        "cli.main = main\n"
        "from convgen.__main__ import main as command\n"
        "command()\n"
    )
    done = run(folder, str(script))
    assert done.stdout == f"{os.path.realpath(folder)}\n", done
