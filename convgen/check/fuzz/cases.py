"""A kernel as the fuzzer checks it: a :class:`Case`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...errors import SpecError
from ...lowering.schedule import Picks
from ...problem.spec import ConvSpec
from .outcome import Outcome


@dataclass(frozen=True)
class Case:
    """A candidate to check, in the words of the command line.

    Without a ``schedule``, it is the layer's default candidate; without ``picks``, the schedule's default ones.
    """

    spec: ConvSpec
    target: str
    threads: int
    seed: int
    schedule: str | None = None
    picks: Picks | None = None

    @property
    def command(self) -> str:
        """The command that repeats the check."""
        chosen = "--no-records" if self.schedule is None else f"--schedule {self.schedule}"
        if self.picks is not None:
            chosen += f' --picks "{self.picks}"'
        layer = f'"{self.spec.descriptor}" --target {self.target} --threads {self.threads}'
        return f"convgen validate {layer} {chosen} --seed {self.seed}"

    @property
    def group(self) -> str:
        """Its schedule's id."""
        return self.schedule or "default"

    @property
    def operator(self) -> str:
        return self.spec.operator

    def flaw(self) -> Outcome | None:
        """Whether its spec is another one after it was written down."""
        return misread(self.spec)

    def job(self) -> Callable[[], Outcome]:
        """The full validation of a kernel."""
        from .checking import check  # imports TVM

        return partial(check, **self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The arguments of :func:`convgen.check.fuzz.checking.check`."""
        picks = None if self.picks is None else str(self.picks)
        return {**vars(self), "spec": self.spec.descriptor, "picks": picks}


@dataclass(frozen=True)
class SeededCase(Case):
    """A candidate of a layer of integers, whose values alone are checked, with the data of ``seeds`` seeds from its own
    on: zero points, scales and tensors.
    """

    seeds: int = 1

    def job(self) -> Callable[[], Outcome]:
        """Its values with all data."""
        from .checking import check_values  # imports TVM

        return partial(check_values, **self.to_dict())


def misread(spec: ConvSpec) -> Outcome | None:
    """A ``descriptor`` outcome where the spec is not the same after it was written down and read back, else None."""
    readers: dict[str, Callable[[], ConvSpec]] = {
        "descriptor": lambda: ConvSpec.parse(spec.descriptor),
        "dictionary": lambda: ConvSpec.from_dict(json.loads(json.dumps(spec.to_dict()))),
    }
    for form, read in readers.items():
        try:
            found = read()
        except SpecError as error:
            return Outcome("descriptor", f"{form}: {error}")
        if found != spec or found.key != spec.key:
            return Outcome("descriptor", f"{form}: expected {spec}, found {found}")
    return None
