"""The site of the documentation: Sphinx over the Markdown pages of ``docs/``. ``make docs`` builds it.

Sphinx, because docstrings use its roles, which then become links, and are checked. Nothing is fetched when it is built
or read: the theme has its own scripts and fonts are the reader's.
"""

from __future__ import annotations

import re
from importlib.metadata import version as installed

from sphinx.application import Sphinx

project = "convgen"
copyright = "the authors of convgen"  # noqa: A001 - Sphinx's name
release = version = installed("convgen")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
html_theme = "furo"
html_title = "convgen"
html_show_sourcelink = html_copy_source = False
smartquotes = False  # an option's -- is no dash
default_role = "literal"  # what the command line's help has in single backquotes
exclude_patterns = ["site/**"]
nitpicky = False

# Headings of pages are link targets, as on the web pages of repositories.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_use_rtype = False

#: A link to a Markdown file of the repository that is no page of the site, such as a table in ``bench/``.
OUTSIDE = re.compile(r"\]\((\.\./[^)#\s]+\.md)\)")


def setup(app: Sphinx) -> None:
    """Files of the repository that pages refer to are offered as files, Markdown too."""

    def as_file(app: Sphinx, page: str, source: list[str]) -> None:
        if "/" not in page:
            source[0] = OUTSIDE.sub(r"](path:\1)", source[0])

    app.connect("source-read", as_file)
