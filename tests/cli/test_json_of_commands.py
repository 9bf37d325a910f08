"""Every command with --json, run for real: what it prints is as its schema says, and each schema is of some command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import documents
import pytest
import stores
from commands import MODEL, SMALL, TINY, Run, model_file
from fleets import Fleet

from convgen.cli import cli
from convgen.cli.schema import DOCUMENTS

RunJson = Callable[..., Any]

#: The same with a node that is not taken.
REFUSED = MODEL.replace("y = Relu(c)", "y = Det(c)").replace("float[1,4,4,4] y", "float[1,4] y")
ONE = ["--threads", 1, "--no-records"]
#: What each command is given; words in capitals are files that :func:`files` makes. A bar parts a document's name from
#: which of its command lines it is.
LINES: dict[str, list[Any]] = {
    "build": ["build", TINY, *ONE, "--out", "OUT"],
    "build|layers": ["build", "LAYERS", *ONE, "--no-validate", "--out", "OUT"],
    "compile": ["compile", "MODEL", *ONE, "--out", "OUT"],
    "compile|refused": ["compile", "REFUSED", *ONE, "--out", "OUT"],
    "compile|profile": ["compile", "MODEL", *ONE, "--out", "OUT", "--profile", "steps.md"],
    "compile --for onnxruntime": ["compile", "MODEL", *ONE, "--out", "OUT", "--for", "onnxruntime"],
    "tune": ["tune", TINY, "--threads", 1, "--trials", 1, "--records", "NEW"],
    "tune|whole": ["tune", "MODEL", "--whole", "--threads", 1, "--trials", 1, "--records", "NEW"],
    "tune --status": ["tune", TINY, "--status", "--records", "STORE"],
    "validate": ["validate", TINY, *ONE],
    "validate|folder": ["validate", "KERNEL"],
    "validate|folders": ["validate", "KERNELS", "--threads", 1],
    "validate --whole": ["validate", "MODEL", "--whole", *ONE],
    "validate --whole|folder": ["validate", "NETWORK"],
    "validate --whole|folder and model": ["validate", "NETWORK", "--model", "MODEL"],
    "bench": ["bench", TINY, *ONE, "--repeats", 1, "--peers", "onnxruntime"],
    "bench --whole": ["bench", "MODEL", "--whole", *ONE, "--repeats", 1, "--peers", "onnxruntime"],
    "show": ["show", SMALL],
    "show (separable)": ["show", "separable2d ic8 oc8 i12x10 k3x3 p1x1 nhwc relu"],
    "show (several layers)": ["show", "LAYERS"],
    "show --ir": ["show", TINY, "--ir", "tir"],
    "convert": ["convert", "LAYERS", "-o", "layers.toml"],
    "schedules": ["schedules"],
    "targets": ["targets"],
    "help": ["help"],
    "help TOPIC": ["help", "json"],
    "fuzz": ["fuzz", "--specs", 1, "--threads", 1],
    "fuzz|networks": ["fuzz", "--networks", "--specs", 1, "--threads", 1],
    "report": ["report", "STORE"],
    "report --whole": ["report", "STORE", "MODEL", "--whole", "--threads", 1],
    "records list": ["records", "list", "--records", "STORE"],
    "records best": ["records", "best", SMALL, "--records", "STORE"],
    "records show": ["records", "show", "RECORD", "--records", "STORE"],
    "records diff": ["records", "diff", "STORE", "OTHER"],
    "records check": ["records", "check", "--records", "STORE"],
    "records prune": ["records", "prune", "--records", "STORE"],
    "records recover": ["records", "recover", "STORE", "NEW"],
    "records merge": ["records", "merge", "STORE", "--records", "OTHER"],
    "records export": ["records", "export", "-o", "new.jsonl", "--records", "STORE"],
    "records import": ["records", "import", "FILE", "--records", "NEW"],
    "fleet status": ["fleet", "status", "--tracker", "TRACKER"],
    "fleet pack": ["fleet", "pack", TINY, *ONE, "--candidates", 1, "-o", "new.zip"],
    "fleet import": ["fleet", "import", "RESULTS", "--records", "NEW"],
}
#: Folders, and the commands that export them.
EXPORTED: dict[str, list[Any]] = {
    "KERNEL": ["build", TINY, "--no-validate"],
    "KERNELS": ["build", "LAYERS.txt", "--no-validate"],
    "NETWORK": ["compile", "MODEL.onnx"],
}
#: Exit statuses that are not 0.
STATUS = {"compile|refused": 2}


def with_json(command: click.Command, *words: str) -> Iterator[str]:
    """The commands that have --json."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from with_json(inner, *words, name)
    elif any("--json" in parameter.opts for parameter in command.params):
        yield " ".join(words)


def test_every_command_with_json_is_run_and_every_schema_is_of_one() -> None:
    run = {label.partition("|")[0] for label in LINES}
    assert run == {name.removesuffix("[]") for name in DOCUMENTS}
    assert set(with_json(cli)) <= run


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[str]:
    with closing(Fleet(tmp_path)) as fleet:
        fleet.serve("device")
        fleet.wait_for(1)
        yield fleet.tracker


def files(request: pytest.FixtureRequest, words: set[str], run_json: RunJson) -> dict[str, object]:
    """What the words in capitals stand for, made in the working directory."""
    texts = {"LAYERS": f"{SMALL}\n{TINY}\n"}
    for word in texts:
        Path(f"{word}.txt").write_text(texts[word])
    for word, text in {"MODEL": MODEL, "REFUSED": REFUSED}.items():
        model_file(Path(f"{word}.onnx"), text)
    known: dict[str, object] = {"LAYERS": "LAYERS.txt", "MODEL": "MODEL.onnx", "REFUSED": "REFUSED.onnx"}
    for word, command in EXPORTED.items():
        if word in words:
            run_json(*command, *ONE, "--out", word)
    if words & {"STORE", "OTHER", "RECORD", "FILE"}:
        records = stores.some(3)
        for name in ("STORE", "OTHER"):
            stores.fill(Path(name), records[: 3 if name == "STORE" else 2])
        known["RECORD"] = records[0].id
        if "FILE" in words:
            run_json("records", "export", "-o", "FILE", "--records", "STORE")
    if "TRACKER" in words:
        known["TRACKER"] = request.getfixturevalue("tracker")
    if "RESULTS" in words:
        run_json("fleet", "pack", TINY, *ONE, "--candidates", 1, "-o", "bundle.zip")
        command = [sys.executable, "-m", "convgen", "fleet", "run", "bundle.zip", "-o", "RESULTS"]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
    return known


@pytest.mark.parametrize("label", LINES)
def test_what_is_printed_is_as_its_schema_says(
    label: str, request: pytest.FixtureRequest, run_json: RunJson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = LINES[label]
    known = files(request, {str(word) for word in line}, run_json)
    words = [known.get(str(word), word) for word in line]
    document = run_json(*words, status=STATUS.get(label, 0))  # compares it
    name = label.partition("|")[0]
    assert documents.command_of(list(map(str, words)), document) == name


@pytest.mark.parametrize("name", sorted(set(with_json(cli)) - {"schedules", "targets"}))
def test_a_command_that_fails_prints_no_document(name: str, run: Run, tmp_path: Path) -> None:
    """Its reason stands on standard error, and the exit status tells it from success."""
    missing = tmp_path / "missing"
    given = {"fuzz": ["--specs", "none"], "help": ["no-such-topic"], "fleet status": ["--tracker", "nowhere"]}
    wrong = given.get(name, [missing])
    status, out, err = run(*name.split(), *wrong, "--json")
    assert status not in (0, 1)
    assert out == ""
    assert len(err.strip()) > 20
