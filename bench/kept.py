"""The rows that a program which measures keeps of this machine's processor, and their page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from rich.console import Console

from convgen.formats.sources import write_text
from convgen.hardware.machine import machine
from convgen.measure.busy import busy_warning
from convgen.report.networks import processor_slug
from convgen.report.rows import Keyed, KeyedFile


class Timed(Keyed, Protocol):
    """A row that says what share of the CPUs other programs had meanwhile."""

    @property
    def busy(self) -> float | None: ...


R = TypeVar("R", bound=Timed)


class Kept(Generic[R]):
    """Rows in ``<results>/<processor>/<name>.jsonl``.

    As a context it writes ``<name>.md`` beside the file in the end, also where it was interrupted, and says where other
    programs used the CPUs.

    Attributes:
        file: the rows.
        measured: those that this process has measured.

    Args:
        kind: makes a row of its values.
        page: makes the page of all rows.
    """

    def __init__(
        self,
        results: Path,
        name: str,
        kind: Callable[[Mapping[str, Any]], R],
        page: Callable[[list[R]], str],
        console: Console,
    ) -> None:
        folder = results / processor_slug(machine())
        folder.mkdir(parents=True, exist_ok=True)
        self.file = KeyedFile(folder / f"{name}.jsonl", kind)
        self.measured: list[R] = []
        self._page, self._console = page, console

    def add(self, row: R) -> None:
        """Keep what was measured."""
        self.file.add(row)
        self.measured.append(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if warning := busy_warning(row.busy for row in self.measured):
            self._console.print(f"bench: {warning}")
        file = KeyedFile(self.file.path, self.file.kind)  # with rows that are to be measured again, and were not yet
        if file.rows:
            file.compact()
            path = file.path.with_suffix(".md")
            write_text(self._page(list(file.rows.values())), path)
            self._console.print(f"wrote {path}")
