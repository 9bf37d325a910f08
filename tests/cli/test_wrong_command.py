"""Files with records, or with what becomes records, that were given to another command are told the right one."""

from __future__ import annotations

import json
import os
import threading
import zipfile
from pathlib import Path

import pytest
import stores
from commands import Run

from convgen.records.kinds import BUNDLE, LINES, RESULTS, STORE, kind_of
from convgen.records.record import write_lines

#: What takes a kind of file in, before its name, and what says so to others.
TAKES = {
    "store": (["records", "merge"], "found a record store: `convgen records merge {}` takes it"),
    "lines": (["records", "import"], "found records as lines of JSON: `convgen records import {}` takes them"),
    "results": (["fleet", "import"], "found results of a bundle: `convgen fleet import {}` takes them"),
    "bundle": (["fleet", "run"], "found an archive, as bundles are: `convgen fleet run {}` measures a bundle"),
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {name: tmp_path / name for name in TAKES}
    stores.fill(made["store"], stores.some(2))
    write_lines(made["lines"], stores.some(2))
    header = {"kind": "run", "format": 2, "manifest": "0" * 64, "facts": {"cpuinfo": "x" * 9000}, "when": ""}
    made["results"].write_text(json.dumps(header) + "\n")
    with zipfile.ZipFile(made["bundle"], "w") as archive:
        archive.writestr("manifest.json", "{}")
    return made


@pytest.mark.parametrize("found", TAKES)
@pytest.mark.parametrize("wanted", TAKES)
def test_the_right_command_is_named(wanted: str, found: str, files: dict[str, Path], tmp_path: Path, run: Run) -> None:
    command = TAKES[wanted][0]
    where = ["-o", tmp_path / "new"] if wanted == "bundle" else ["--records", tmp_path / "new"]
    status, _, err = run(*command, files[found], *where)
    said = TAKES[found][1].format(files[found])
    if wanted == found:
        assert "takes" not in err
        assert "measures" not in err
    else:
        assert (status, said in err) == (3, True), err
        assert "recover" not in err


@pytest.mark.parametrize("found", ["lines", "results", "bundle"])
def test_as_a_store_that_is_used(found: str, files: dict[str, Path], run: Run) -> None:
    before = files[found].read_bytes()
    for command in (["records", "list"], ["records", "merge", files["store"]]):
        status, _, err = run(*command, "--records", files[found])
        assert status == 3
        assert "expected a record store, " + TAKES[found][1].format(files[found]) in err
    assert files[found].read_bytes() == before


def test_the_help_of_each_names_the_others(run: Run) -> None:
    for words, _ in (TAKES["store"], TAKES["lines"], TAKES["results"]):
        said = " ".join(run(*words, "--help")[1].split())
        for others, _ in (TAKES["store"], TAKES["lines"], TAKES["results"]):
            assert others == words or f"convgen {' '.join(others)}" in said


def test_what_can_be_read_once_is_not_looked_at(tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "pipe")
    write_lines(tmp_path / "copy", stores.some(2))
    data = (tmp_path / "copy").read_bytes()
    sender = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,), daemon=True)
    sender.start()
    stores.fill(tmp_path / "store", [])
    status, out, _ = run("records", "import", tmp_path / "pipe", "--records", tmp_path / "store")
    assert (status, out[:7]) == (0, "2 added")


def test_what_is_none_of_these(tmp_path: Path, files: dict[str, Path]) -> None:
    kinds = {"store": STORE, "lines": LINES, "results": RESULTS, "bundle": BUNDLE}
    assert {name: kind_of(path) for name, path in files.items()} == kinds
    for text in ("", "[1]", '{"spec": 1, "target": "cpu", "schedule": "x", "outcome": "ok"}', "conv2d n1", "[" * 10**5):
        (tmp_path / "other").write_text(text)
        assert kind_of(tmp_path / "other") is None
    assert kind_of(tmp_path) is None
    assert kind_of(tmp_path / "none") is None
