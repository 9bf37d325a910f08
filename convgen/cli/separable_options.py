"""How the command line says a separable problem, and what goes with one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ..formats.entries import AccuracyRule
from ..problem.separable import SEPARABLE, SeparableSpec
from .common import Option, whole_accuracy


def separable_of(words: Sequence[str], accuracy: Sequence[AccuracyRule] = ()) -> SeparableSpec | None:
    """The separable problem that a command line's words are; None where they are something else.

    Raises:
        SpecError: its descriptor is wrong.
    """
    text = " ".join(words)
    if text.partition(" ")[0] not in SEPARABLE:
        return None
    spec = SeparableSpec.parse(text)
    return spec.with_accuracy(whole_accuracy(accuracy)) if accuracy else spec


def refuse_for_separable(**given: object) -> None:
    """Refuse options that are given and mean nothing to separable problems."""
    for name, value in given.items():
        if value:
            option = name.replace("_", "-")
            raise click.UsageError(f"--{option}: expected layers, found a separable problem, compiled as a network")


def _check_strips(context: click.Context, parameter: click.Parameter, text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise click.BadParameter(f"expected auto or a number of rows, found {text!r}")
    return int(text)


def strips_option(default: str, meaning: str) -> Option:
    """``--strips``, None where they are what suits the caches."""
    return click.option(
        "--strips", callback=_check_strips, default=default, show_default=True, metavar="ROWS|auto", help=meaning
    )


weights_option = click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.npz",
    help="Of a separable problem: its weights by name, as `convgen show` lists them.  [default: random ones]",
)
