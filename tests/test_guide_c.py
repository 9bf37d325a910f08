"""The programs of the guide for C, compiled and run as it says, beside the library that it builds."""

from __future__ import annotations

import re
import shlex
import subprocess
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
