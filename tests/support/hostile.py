"""Text that means harm, and what it must look like where it is shown."""

from __future__ import annotations

import itertools
import re
import unicodedata

from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

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
#: Unicode's categories of what is not seen: controls, format characters, separators of lines, halves of characters.
UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Cs"}


def check(text: str) -> str:
    """A text that was printed, with nothing in it that a terminal obeys."""
    assert [c for c in text if unicodedata.category(c) in UNSEEN and c not in "\n\t"] == []
    return text


def lines(text: str) -> list[str]:
    return check(text).removesuffix("\n").split("\n")


#: Finds tables as GitHub does.
parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def words(tokens: list[Token]) -> str:
    """The text that Markdown shows; anything else than text, code and links to pages beside it fails."""
    for token in tokens:
        assert token.type in ("text", "text_special", "code_inline", "html_inline", "link_open", "link_close")
        assert token.type != "link_open" or re.fullmatch(r"[^:/]+\.md", str(token.attrs["href"]))
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
