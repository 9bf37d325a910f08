"""What a command prints of names, files and records is text: it moves no cursor, hides nothing, adds no column."""

from __future__ import annotations

import ast
import io
import itertools
import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, TINY, Run, python
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from paths import ROOT
from stores import fill, record

from convgen import ConvSpec
from convgen.cli.view import View
from convgen.formats.entries import SpecEntry
from convgen.formats.sources import FORMS, format_specs, read_specs
from convgen.measure.standalone.words import tell
from convgen.report.markdown import code, escaped, markdown_table
from convgen.report.render import render

#: A terminal's title and colours, a text that turns, one that hides what is before it, and a page's markup.
TERMINAL = "\x1b]0;pwned\x07\x1b[2J\x1b[31mred\u202e\u2066<script>alert(1)</script>"
MARKUP = "|a|b\n# head\n[x](javascript:alert(1)) `c` \\| _d_ **e** &lt; $f$ "
HIDING = "ok\rno\x08\x9b2K\x7f\u200b\u2028\u2029\u00ad\ufeff\U000e0041[bold]x[/]"
names = st.text(
    st.sampled_from("ab1 |\\`*_[]<>#&$~!-=+.\n\r\t\x00\x1b\x07\x7f\x85\x9b\u00ad\u200b\u202e\u2028\ufeff\U000e0041é")
    | st.characters(codec="utf-8"),
    min_size=1,
    max_size=20,
).map(lambda name: f"x{name}")
few = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
#: Unicode's categories of what is not seen: controls, format characters, separators of lines, halves of characters.
UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Cs"}


def check(text: str) -> str:
    """A text that was printed, with nothing in it that a terminal obeys."""
    assert [c for c in text if unicodedata.category(c) in UNSEEN and c not in "\n\t"] == []
    return text


def lines(text: str) -> list[str]:
    return check(text).removesuffix("\n").split("\n")


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
    assert (status, len(lines(out)), len(lines(err))) == (0, 2 + 3, 1)


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


# ---- Markdown ---------------------------------------------------------------------------------

parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def words(tokens: list[Token]) -> str:
    """The text that Markdown shows; anything else than text and code fails."""
    for token in tokens:
        assert token.type in ("text", "text_special", "code_inline", "html_inline")
        assert token.type != "html_inline" or token.content in ("<code>", "</code>")
    return "".join(token.content for token in tokens if token.type != "html_inline")


def cells(text: str) -> list[list[list[str]]]:
    """The texts in the cells of all tables, as a parser of Markdown finds them."""
    tables: list[list[list[str]]] = []
    tokens = parser.parse(text)
    for token, inner in itertools.pairwise(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            tables[-1][-1].append(words(inner.children or []))
    return tables


def printed(text: str) -> str:
    """A text as Python writes it between quotes, none of which it has."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@settings(max_examples=200, deadline=None)
@given(names, names)
@example(TERMINAL, MARKUP)
@example(MARKUP, HIDING)
@example("1. x", "1) x")
@example("# a #", "    b")
@example("---", "===")
@example("__a__b_c_", "a\\")
@example("`a", "a`")
@example("&#35;", "<a@b.c> <!-- -->")
def test_markdown_shows_what_it_is_given(first: str, second: str) -> None:
    first, second = first.removeprefix("x"), second.removeprefix("x")
    expected = printed(first).strip()
    heading, text = parser.parse(f"# {escaped(first)}"), parser.parse(escaped(first))
    if expected:
        assert [token.type for token in heading] == ["heading_open", "inline", "heading_close"]
        assert [token.type for token in text] == ["paragraph_open", "inline", "paragraph_close"]
        assert words(heading[1].children or []) == words(text[1].children or []) == expected
    found = cells("\n".join(markdown_table(([first, "n>", "code"], [[first, second, code(second)]]))))
    assert found[0][1][:2] == [expected, printed(second).strip()]
    assert found[0][1][2].split() == printed(second).split() or not second.strip()
    assert [len(row) for row in found[0]] == [3, 3]


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


def test_a_bundle_tells_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (TERMINAL, MARKUP, HIDING):
        tell(f"left out: {name}")
        assert len(lines(capsys.readouterr().err)) == 1


def test_pages_show_what_turns_text() -> None:
    text = render("bench.html", title=TERMINAL, notes=[HIDING], sections=[])
    assert r"\x1b]0;pwned\x07" in check(text)
    assert "&lt;script&gt;" in text


def test_names_within_lines_of_benchdnn() -> None:
    line = format_specs([SpecEntry(ConvSpec.parse(SMALL), 1, (HIDING,))], "benchdnn")
    assert 'n"ok_no_2K_[bold]x[/]"' in check(line)


@pytest.mark.parametrize("path", sorted((ROOT / "convgen" / "cli").glob("*.py")), ids=lambda path: path.name)
def test_commands_print_in_one_place(path: Path) -> None:
    """``say``, ``note`` and ``emit`` of ``common.py``, and ``_text`` of ``view.py``, escape what they are given."""
    allowed = {"common.py": {"echo"}, "view.py": {"Text", "print"}}.get(path.name, set())
    found = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    assert found & {"echo", "secho", "print", "Text"} <= allowed
