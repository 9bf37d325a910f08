"""What a shell completes a word to: specs and files, and values of options, alone or in lists with commas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import click

from ..problem.separable import SEPARABLE
from ..problem.spec import OPERATORS
from ..problem.tokens import NETWORK_ACCURACIES

#: As options take it: (context, parameter, the word so far) -> what it may become.
Completion = Callable[[click.Context, click.Parameter, str], list[str]]


def complete_spec(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[click.shell_completion.CompletionItem]:
    from click.shell_completion import CompletionItem

    operators = [CompletionItem(name) for name in (*OPERATORS, *SEPARABLE) if name.startswith(incomplete)]
    return operators or [CompletionItem(incomplete, type="file")]


def schedules_beginning(text: str) -> list[str]:
    from ..lowering.discover import schedule_ids

    return [name for name in schedule_ids() if name.startswith(text)]


def outcomes_beginning(text: str) -> list[str]:
    from ..records.record import OUTCOMES

    return [name for name in OUTCOMES if name.startswith(text)]


def targets_beginning(text: str) -> list[str]:
    from ..hardware.discover import target_families

    return [name for family in target_families().values() for name in family.beginning(text)]


def one_of(beginning: Callable[[str], Iterable[str]] | Sequence[str]) -> Completion:
    """Completes a word to those that begin so: of these, or of what a function gives."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        return _beginning(beginning, incomplete)

    return complete


def list_of(beginning: Callable[[str], Iterable[str]] | Sequence[str]) -> Completion:
    """Completes the last word of a list with commas, to those that are not in it already."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{word}" for word in _beginning(beginning, last) if word not in given]

    return complete


def _beginning(words: Callable[[str], Iterable[str]] | Sequence[str], text: str) -> list[str]:
    return list(words(text)) if callable(words) else [word for word in words if word.startswith(text)]


def complete_accuracy(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """A class, or one behind a layer's name."""
    name, equals, begin = incomplete.rpartition("=")
    return [f"{name}{equals}{word}" for word in NETWORK_ACCURACIES if word.startswith(begin)]
