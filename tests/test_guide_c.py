"""The programs of the guide for C, compiled and run as it says, beside the library that it builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from convgen.cli import main

GUIDE = (ROOT / "docs" / "guide-c.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the guide's library is, as its command makes it."""
    (command,) = re.findall(r"^convgen (build conv2d .* --out) conv$", GUIDE, re.MULTILINE)
    path = tmp_path_factory.mktemp("guide")
    assert main([*shlex.split(command), str(path / "conv"), "--no-records", "--no-validate"]) == 0
    return path


@pytest.mark.parametrize("name", ["program", "lend"])
def test_programs_print_what_the_guide_says(folder: Path, name: str) -> None:
    """A loop of the program's own among them, which a library runs on: with the same result as without."""
    before, compiling, line, said = re.findall(
        rf"```c\n((?:(?!```).)*)```\n\n```sh\n(cc [^\n]* -o ({name}))\n\./{name} +# ([^\n]*)\n```", GUIDE, re.DOTALL
    )[0]
    (folder / f"{line}.c").write_text(before)
    built = subprocess.run([*shlex.split(compiling), "-Wall", "-Werror"], cwd=folder, capture_output=True, text=True)
    if "-fopenmp" in compiling and "omp" in built.stderr and built.returncode:
        pytest.skip("the C compiler has no OpenMP")
    assert built.returncode == 0, built.stderr
    assert subprocess.check_output([f"./{line}"], cwd=folder, text=True) == f"{said}\n"


def test_a_whole_model_as_the_guide_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, shell = r"```python\n((?:(?!```).)*)```", r"```sh\npython model\.py\nconvgen (compile [^\n]*)"
    c = r"cd net\n(cc [^\n]*)\n(\S+) +# ([^\n]*)\n```"
    ((program, command, building, running, said),) = re.findall(rf"{python}\n\n{shell}\n{c}", GUIDE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", program], check=True)
    assert main([*shlex.split(command), "--no-records"]) == 0
    subprocess.run(shlex.split(building), check=True, cwd="net")
    assert subprocess.check_output([running], cwd="net", text=True) == f"{said}\n"
