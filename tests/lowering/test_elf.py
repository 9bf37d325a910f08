"""Symbols of object files, as binutils see them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from convgen.errors import BuildError
from convgen.lowering.elf import edited

SOURCE = """
static int hidden(int x) { return x * 3; }
int counter = 4;
__attribute__((weak)) int weak_one(void) { return 5; }
int inner(int x) { return hidden(x) + counter + weak_one(); }
int outside(int x);
int kept_call(int x) { return inner(x) + outside(x); }
int (*pointer)(int) = inner;
"""
OTHER = """
#include <stdio.h>
int other_call(int);
int kept_call(int);
int outside(int x) { return x + 1000; }
int counter = 77, weak_one = 88; /* nobody's business */
int main(void) { printf("%d\\n", kept_call(2) + other_call(1)); return 0; }
"""
COMPILERS = ["cc", "aarch64-linux-gnu-gcc"]


def compiled(compiler: str, text: str, path: Path) -> Path:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    path.with_suffix(".c").write_text(text)
    subprocess.run([compiler, "-O1", "-fno-inline", "-c", path.with_suffix(".c"), "-o", path], check=True)
    return path


def symbols(path: Path) -> dict[str, str]:
    """Each symbol's binding and where it is, as readelf tells."""
    said = subprocess.check_output(["readelf", "-sW", str(path)], text=True)
    rows = [line.split() for line in said.splitlines() if re.match(r"\s*\d+:", line) and len(line.split()) > 7]
    return {row[7]: f"{row[4]} {'UND' if row[6] == 'UND' else 'here'}" for row in rows}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_what_is_not_kept_is_local(compiler: str, tmp_path: Path) -> None:
    path = compiled(compiler, SOURCE, tmp_path / "a.o")
    before = symbols(path)
    assert before["inner"] == "GLOBAL here"
    assert before["weak_one"] == "WEAK here"
    path.write_bytes(edited(path.read_bytes(), {"kept_call": "other_call"}, lambda name: name == "other_call"))
    after = symbols(path)
    assert {name: after[name] for name in ("other_call", "outside", "inner", "counter", "weak_one", "pointer")} == {
        "other_call": "GLOBAL here",
        "outside": "GLOBAL UND",
        **dict.fromkeys(("inner", "counter", "weak_one", "pointer"), "LOCAL here"),
    }
    assert "kept_call" not in after
    relocations = subprocess.check_output(["readelf", "-rW", str(path)], text=True)
    assert "Error" not in relocations
    assert {"outside"} <= set(re.findall(r"\w+", relocations))


def test_programs_of_edited_files_compute_what_they_did(tmp_path: Path) -> None:
    """Two copies with symbols of the same names, each of which calls its own."""
    first, main = compiled("cc", SOURCE, tmp_path / "a.o"), compiled("cc", OTHER, tmp_path / "main.o")
    second = tmp_path / "b.o"
    second.write_bytes(edited(first.read_bytes(), {"kept_call": "other_call"}, lambda name: name == "other_call"))
    first.write_bytes(edited(first.read_bytes(), keep=lambda name: name == "kept_call"))
    subprocess.run(["cc", "-o", tmp_path / "program", first, second, main], check=True)
    value = {x: x * 3 + 4 + 5 + x + 1000 for x in (1, 2)}
    assert int(subprocess.check_output([tmp_path / "program"])) == value[1] + value[2]


def test_nothing_to_do_changes_no_symbol(tmp_path: Path) -> None:
    path = compiled("cc", SOURCE, tmp_path / "a.o")
    before = symbols(path)
    path.write_bytes(edited(path.read_bytes()))
    assert symbols(path) == before


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x01\x01" + bytes(80), b"\x7fELF\x02\x01" + bytes(80), b"!<arch>\n"])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(BuildError, match="expected a relocatable ELF file of 64 bits"):
        edited(data)
