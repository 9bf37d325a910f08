"""Markdown and pages show the text they are given."""

from __future__ import annotations

from typing import Any

from bench_rows import A, B, row
from hostile import HIDING, MARKUP, TERMINAL, cells, check, names, parser, words
from hypothesis import example, given, settings

from convgen.report.bench_page import page
from convgen.report.markdown import code, escaped, markdown_table
from convgen.report.render import render
from convgen.report.tables import network, summary


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


def test_pages_show_what_turns_text() -> None:
    text = render("bench.html", title=TERMINAL, notes=[HIDING], sections=[])
    assert r"\x1b]0;pwned\x07" in check(text)
    assert "&lt;script&gt;" in text


def test_rows_of_a_bench() -> None:
    for text in (TERMINAL, MARKUP, HIDING, "//a.b/c"):
        facts: dict[str, Any] = {
            "cpu": text,
            "schedule": text,
            "versions": {text: text},
            "python": text,
            "limited_by": text,
        }
        rows = [row(A, torch=None, **facts), row(B, torch=None, **facts)]
        for one in rows:
            one.values["peers"][1] |= {"name": text, "problem": text}
        (layers, classes) = cells(check(network(text, rows)))
        assert [len(line) for line in layers] == [len(layers[0])] * 3
        assert layers[1][-1] == printed(text).strip()
        assert [len(line) for line in classes] == [len(classes[0])] * len(classes)
        for table in cells(check(summary({text: rows}))):
            assert {len(line) for line in table} == {len(table[0])}
        assert "<script" not in check(page(text, rows))
