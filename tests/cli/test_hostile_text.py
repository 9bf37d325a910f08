"""What a command prints of names, files and records is text: it moves no cursor, hides nothing, adds no column."""

from __future__ import annotations

import ast
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, TINY, Run, python
from hostile import HIDING, MARKUP, TERMINAL, cells, check, lines, names
from hypothesis import HealthCheck, example, given, settings
from paths import ROOT
from stores import fill, record

from convgen import ConvSpec
from convgen.cli.view import View
from convgen.formats.entries import SpecEntry
from convgen.formats.sources import FORMS, read_specs

few = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(name=names)
@example(name=TERMINAL)
@example(name=MARKUP)
@example(name=HIDING)
@example(name="=cmd|' /C calc'!A0")
def test_names_of_layers(name: str, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "layers.json"
    specs = [SMALL, TINY, f"{SMALL} strict"]
    path.write_text(json.dumps({"layers": [{"name": [name, name], "spec": spec} for spec in specs]}))

    status, out, err = run("show", path)
    assert (status, err) == (0, "")
    assert len(lines(out)) == 2 + len(specs) + 1
    copy = tmp_path / f"{name.replace('/', '').replace(chr(0), '')}.json"
    status, out, err = run("convert", path, "-o", copy)
    assert (status, err, len(lines(out))) == (0, "", 1)
    copy.unlink()
    for form in FORMS:
        status, out, _ = run("convert", path, "-o", "-", "--to", form)
        check(out)
        if form in ("toml", "yaml", "json"):
            (tmp_path / f"again.{form}").write_text(out)
            assert read_specs(tmp_path / f"again.{form}") == read_specs(path)


def test_the_status_of_a_job(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "layers.json"
    specs = zip((TERMINAL, MARKUP, HIDING), (SMALL, TINY, f"{SMALL} strict"), strict=True)
    path.write_text(json.dumps([{"name": name, "spec": spec} for name, spec in specs]))
    status, out, err = run("tune", path, "--status", "--records", tmp_path / "none.sqlite")
    assert (status, len(lines(out)), len(lines(err))) == (0, 2 + 3, 2)  # there is no such store, and the budget


@few
@given(name=names)
@example(name=TERMINAL)
@example(name=HIDING)
def test_errors_are_one_line(name: str, tmp_path: Path, run: Run) -> None:
    written: list[tuple[str, str]] = [
        ("json", json.dumps({"layers": [{"name": name, "spec": f"conv2d {name}"}]})),
        ("json", json.dumps({"layers": [{name: 1}]})),
        ("json", json.dumps([{"name": name, "spec": SMALL, name: name}])),
        ("json", json.dumps({"class_name": name, "config": {name: name}})),
        ("json", f'{{"layers": [{{{json.dumps(name)}: 1, {json.dumps(name)}: 2}}]}}'),
        ("yaml", f"layers: [{{{json.dumps(name)}: 1}}]"),
        ("toml", f"[[layers]]\n{name} = 1"),
        ("txt", f"conv2d ic3 {name}"),
    ]
    for suffix, text in written:
        path = tmp_path / f"layers.{suffix}"
        path.write_bytes(text.encode())
        status, out, err = run("show", path)
        assert (status, out) == (2, ""), (suffix, text)
        assert len(lines(err)) == 1
    absent = name.replace("/", "").replace("\0", "")
    for arguments in (
        ["show", f"conv2d {name}"],
        ["show", f"{absent}.onnx"],
        ["show", SMALL, "--target", name],
        ["show", SMALL, f"--{name}"],
        ["build", SMALL, "--name", f"é{name}"],
        ["records", "list", "--records", tmp_path / absent],
        ["records", "show", name, "--records", tmp_path / "none.sqlite"],
        ["report", tmp_path / absent],
        ["tune", "--job", tmp_path / f"{absent}.toml"],
        ["fleet", "status", "--tracker", name],
        [name],
    ):
        status, out, err = run(*arguments)
        assert (out, len(lines(err))) == ("", 1), arguments
        assert status != 0


def test_names_that_no_encoding_has(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "layers.json"
    path.write_text(r'{"layers": [{"name": "\ud800", "spec": "' + SMALL + '"}]}')
    status, _, err = run("show", path)
    assert status == 2
    assert r"name: expected text that UTF-8 can encode, found ('\ud800',)" in err
    status, _, err = run("show", "\udcff.onnx")  # the bytes of a name that are not UTF-8
    assert status == 2
    assert r"\udcff.onnx" in check(err)


def test_letters_that_the_terminal_lacks(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps([{"name": "λ→", "spec": spec} for spec in (SMALL, TINY)]))
    done = python("-m", "convgen", "show", path, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(r"\u03bb\u2192") == 2


@few
@given(name=names)
@example(name=TERMINAL)
@example(name=MARKUP)
@example(name=HIDING)
def test_fields_of_records(name: str, tmp_path: Path, run: Run) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    fields: dict[str, Any] = {"target": name, "hardware": name, "schedule": name, "picks": {name: name}}
    fields |= {"versions": {name: name}, "note": {name: name, "job": name, "device": name}}
    made = [record(**fields), record(**fields, spec=name), record(**fields, outcome="crash", error=name)]
    store = fill(tmp_path / "store.sqlite", made)
    other = fill(tmp_path / "other.sqlite", [record(**fields, seconds=2e-3)])
    options = ["--records", store]

    status, out, err = run("records", "list", *options)
    assert status == 0
    assert len(lines(out)) == 2 + len(made)
    check(err)
    for item in made:
        status, out, _ = run("records", "show", item.id, *options)
        assert status == 0
        assert sum(line.startswith("build it") for line in lines(out)) == 1
    status, out, _ = run("records", "diff", store, other)
    assert status == 0
    assert len(lines(out)) == 2 + len({item.spec for item in made})
    for arguments in (["best", *options], ["check", *options], ["prune", *options], ["list", name, *options]):
        check("".join(map(str, run("records", *arguments)[1:])))
    status, out, _ = run("records", "export", *options)
    assert [json.loads(line) for line in lines(out)] == [item.to_dict() for item in sorted(made, key=lambda i: i.id)]
    status, out, _ = run("records", "list", *options, "--json")
    assert [item["hardware"] for item in json.loads(check(out))] == [name] * len(made)


@few
@given(name=names)
@example(name=TERMINAL)
@example(name=MARKUP)
@example(name=HIDING)
def test_reports(name: str, tmp_path: Path, run: Run) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    fields: dict[str, Any] = {"hardware": name, "schedule": name, "picks": {name: name}}
    note = {"job": name, "default_seconds": 2e-3, "final": True, "winner": True}
    made = [record(**fields, note=note), record(**fields, outcome="crash", error=name, spec=SMALL)]
    store = fill(tmp_path / "store.sqlite", made)
    model = tmp_path / "layers.json"
    model.write_text(json.dumps([{"name": name, "spec": spec} for spec in (record().spec, SMALL, TINY)]))

    status, out, err = run("report", store, model)
    assert status == 0, err
    tables = cells(check(out))
    assert [len(row) for row in tables[0]] == [len(tables[0][0])] * 3
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert " ".join(shown.split()) in " ".join(tables[0][1][0].split())
    for page in ("page.md", "page.html"):
        assert run("report", store, model, "-o", tmp_path / page)[0] == 0
        text = check((tmp_path / page).read_text(encoding="utf-8"))
        assert page == "page.md" or "<script" not in text
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == out


# ---- where text leaves ------------------------------------------------------------------------


def test_a_live_display_shows_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with View(2) as view:
        view.start(1, SpecEntry(ConvSpec.parse(SMALL), 1, (TERMINAL,)))
        view.phase(f"compiling {HIDING}")
        view.finish(f"failed: {MARKUP}")
    shown = screen.getvalue()
    assert r"\x1b]0;pwned\x07" in shown
    assert "[bold]x[/]" in shown
    for piece in ("\x1b]", "\x07", "\x1b[31m", "\u202e", "\u2028", "\x9b"):
        assert piece not in shown


@pytest.mark.parametrize("path", sorted((ROOT / "convgen" / "cli").glob("*.py")), ids=lambda path: path.name)
def test_commands_print_in_one_place(path: Path) -> None:
    """``say``, ``note`` and ``emit`` of ``common.py``, and ``_text`` of ``view.py``, escape what they are given."""
    allowed = {"common.py": {"echo"}, "view.py": {"Text", "print"}}.get(path.name, set())
    found = [
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert set(found) & {"echo", "secho", "print", "Text"} <= allowed
    assert found.count("Text") <= 1
