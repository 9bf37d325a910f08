"""Tables on a terminal, and text that is wrapped to it."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

import click

from ..measure.standalone.words import printable
from ..report.words import shortened
from .common import note, say


class Table(str):
    """A table as text.

    Attributes:
        is_cut: whether it says less than it was given, to fit the terminal.
    """

    is_cut = False


def say_table(text: Table) -> None:
    """Print a table, and how what was cut of it is seen: once in a command."""
    say(text)
    context = click.get_current_context(silent=True)
    if text.is_cut and not (context and context.meta.get(_SAID)):
        note(f"convgen: cut to {_room()} columns; with COLUMNS=999 before the command it is whole")
        if context:
            context.meta[_SAID] = True


#: What a command's context remembers.
_SAID = f"{__name__}.said"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], prose: str = "") -> Table:
    """Aligned columns; empty ones are left out, and those whose name ends in ``>`` are aligned to the right.

    On a terminal, or where ``COLUMNS`` is set, it is as wide as that at most: the widest columns are cut, with ``…``
    where their cells are most alike, and where that is not enough the last ones of numbers are left out. The column
    ``prose`` is wrapped instead.
    """
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    kept = [i for i in range(len(header)) if not texts or any(row[i] for row in texts)]
    header = [header[i] for i in kept]
    texts = [[name.removesuffix(">") for name in header], *([row[i] for i in kept] for row in texts)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]
    shown = _shown(header, widths)
    header, texts = [header[i] for i in shown], [[row[i] for i in shown] for row in texts]
    widths = _cut([widths[i] for i in shown])
    columns = [
        [textwrap.wrap(cell, width, break_on_hyphens=False) for cell in column]
        if name == prose
        else [[cell] for cell in shortened(column, width)]
        for name, column, width in zip(header, zip(*texts, strict=True), widths, strict=True)
    ]
    lines = [line for row in zip(*columns, strict=True) for line in _lines(header, row, widths)]
    lines.insert(1, "  ".join("─" * width for width in widths))
    text = Table("\n".join(lines))
    needed = zip(header, zip(*texts, strict=True), widths, strict=True)
    text.is_cut = len(shown) < len(kept) or any(
        name != prose and max(map(len, column)) > width for name, column, width in needed
    )
    return text


def _lines(header: Sequence[str], row: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    """A row's lines: as many as its longest cell has."""
    for line in zip_longest(*row, fillvalue=""):
        cells = [
            cell.rjust(width) if name.endswith(">") else cell.ljust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def fitted(text: str, indent: int = 2) -> str:
    """A paragraph in lines that fit the terminal, the ones after the first indented; as it is where there is none."""
    room = _room()
    if room is None:
        return text
    indent = min(indent, room // 2)
    return textwrap.fill(text, room, subsequent_indent=" " * indent, break_on_hyphens=False)


#: What a table's column is not cut below.
_NARROWEST = 12


def _room() -> int | None:
    """The columns of the terminal that a table goes to; elsewhere those that ``COLUMNS`` says, None without it."""
    said = os.environ.get("COLUMNS", "")
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or (said.isdecimal() and int(said)) else None


def _shown(header: Sequence[str], widths: Sequence[int]) -> list[int]:
    """The columns that there is room for: without the last ones of numbers where not even cut ones fit."""
    shown, room = list(range(len(header))), _room()
    while room is not None and sum(min(widths[i], _NARROWEST) + 2 for i in shown) - 2 > room:
        numbers = [i for i in shown if header[i].endswith(">")]
        if not numbers:
            break
        shown.remove(numbers[-1])
    return shown


def _cut(widths: list[int]) -> list[int]:
    """The columns' widths, the widest narrowed until all fit on the terminal; as they are where there is none."""
    columns = _room()
    if columns is None:
        return widths
    widths, room = list(widths), columns - 2 * (len(widths) - 1)
    while sum(widths) > room and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return widths
