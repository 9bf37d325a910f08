"""The pages of the documentation, which travel with the package: what ``convgen help`` lists and prints.

A topic is a Markdown page of ``docs/``, named as its file: ``docs/networks.md`` is ``networks``. Installed, the pages
lie inside the package; of a checkout, at the top of the tree.
"""

from __future__ import annotations

from pathlib import Path

from .errors import UnsupportedError, meant

_PACKAGE = Path(__file__).parent


def _pages() -> dict[str, Path]:
    installed = _PACKAGE / "docs"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "docs"
    return {path.stem: path for path in sorted(folder.glob("*.md"))}


def topics() -> dict[str, str]:
    """The title of every page, by topic, in alphabetical order."""
    titles = {}
    for topic, path in _pages().items():
        with path.open(encoding="utf-8") as lines:
            titles[topic] = next((line[2:].strip() for line in lines if line.startswith("# ")), topic)
    return titles


def topic_text(topic: str) -> str:
    """A page of the documentation, as Markdown.

    Raises:
        UnsupportedError: there is no such topic; names those there are.
    """
    pages = _pages()
    if topic not in pages:
        raise UnsupportedError(f"topic: expected one of {', '.join(pages)}, found {topic!r}{meant(topic, pages)}")
    return pages[topic].read_text(encoding="utf-8")
