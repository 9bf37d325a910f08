"""Text in Markdown: what names, files and machines bring is shown there, not obeyed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote

from ..measure.standalone.words import printable

#: A table: its columns, those aligned to the right ending in ``>``, and its rows.
Table = tuple[list[str], list[list[str]]]


class Markdown(str):
    """Text that is Markdown already, and is not escaped again."""

    __slots__ = ()


#: What means something anywhere in a line (an underscore does not within a word), at its beginning, or at its end.
_MARKS = re.compile(r"[\\`*\[\]<|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|^[#>+=-]|^\d+[.)](?!\S)| #+$")


def escaped(text: str) -> Markdown:
    """The Markdown that shows a text, in one line; what is Markdown already stays."""
    if isinstance(text, Markdown):
        return text
    return Markdown(_MARKS.sub(lambda mark: f"{mark[0][:-1]}\\{mark[0][-1]}", printable(text).strip()))


def code(text: str) -> Markdown:
    """A text in the font of code."""
    if "`" in text or "|" in text:  # which no code within a table can hold
        return Markdown(f"<code>{escaped(text)}</code>")
    return Markdown(f"`{printable(text)}`")


def link(name: str, file: str) -> Markdown:
    """A link to a file beside the page."""
    return Markdown(f"[{escaped(name)}]({quote(file, safe='')})")


def markdown_table(table: Table) -> list[str]:
    """The lines of a table."""
    header, rows = table
    names = [name.removesuffix(">") for name in header]
    ruler = [Markdown("--:" if name.endswith(">") else "---") for name in header]
    return [_row(names), _row(ruler), *map(_row, rows)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"
