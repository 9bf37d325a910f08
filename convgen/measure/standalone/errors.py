"""What goes wrong, and the exit statuses that say so."""

from __future__ import annotations

OK, TROUBLE, INTERRUPTED = 0, 3, 130


class Trouble(Exception):  # noqa: N818 - a message for the user
    """The bundle cannot be measured here; the message says what was expected and what was found."""


class Refused(Exception):  # noqa: N818 - about the machine, not about the candidate
    """This machine cannot run what the bundle holds for a target; the message says why."""
