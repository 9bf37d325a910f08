"""Pages and figures from the templates beside this module, which say how things look.

Drawn by hand rather than with a plotting library: a few kinds of marks placed in percent of their box
make a page that is read on a telephone, in print and in dark mode, where a drawing of fixed size would
only shrink; and the packages for it are ten times the size of this one's dependencies or need a script
from elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2

from ..measure.standalone.words import printable

#: How many kinds of marks the templates have, one per library; further libraries take turns.
MARKS = 4


@dataclass(frozen=True)
class Bar:
    """A named bar with a figure beside it.

    Attributes:
        kind: whose colour it has: ``own``, or that of a mark, such as ``p0``.
        share: its length as a part of the longest one's; 0: no bar is drawn.
    """

    name: str
    figure: str
    kind: str = ""
    share: float = 0.0

    @property
    def width(self) -> str:
        return f"{100 * self.share:.2f}%" if self.share else ""


def meter(of_limit: float | None) -> str:
    """The width of the meter that shows a part of a limit; empty where the part is not known."""
    return "" if of_limit is None else f"{100 * min(of_limit, 1):.1f}%"


def _shown(value: Any) -> Any:
    """A value as a page has it: text that turns other text's direction, say, is seen and not obeyed."""
    return printable(value) if type(value) is str else value  # what is marked as HTML is another type


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("convgen.report"),
        autoescape=jinja2.select_autoescape(["html", "svg"]),
        finalize=_shown,
        undefined=jinja2.StrictUndefined,  # a misspelt name is an error, not an empty place
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> str:
    """A template, filled in; what is HTML in the values is shown, not obeyed."""
    return _environment().get_template(template).render(values)
