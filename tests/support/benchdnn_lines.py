"""What lines of benchdnn mean."""

from __future__ import annotations

from collections.abc import Iterator

from convgen.formats import benchdnn
from convgen.problem.spec import ConvSpec


def problems(text: str) -> Iterator[ConvSpec]:
    """What benchdnn's command line or batch file means."""
    for outcome in benchdnn.Reader(lambda path: ()).read(text, "here"):
        if not isinstance(outcome, tuple):
            raise outcome
        yield outcome[0]


def problem(text: str) -> str:
    (spec,) = problems(text)
    return spec.descriptor
