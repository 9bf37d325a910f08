"""What the fuzzer checks, an :class:`Examined` as a :class:`Case` is, and how a check can end, an :class:`Outcome`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ...errors import SpecError
from ...lowering.schedule import Picks
from ...problem.spec import ConvSpec

#: How a check can end.
KINDS = {
    "ok": "passed",
    "wrong": "values are not what ONNX Runtime computes, on floats, integers or data of very different scales",
    "memory": "an access outside a buffer, or the kernel refused the call",
    "threads": "the result depends on the number of threads or the placement of the buffers",
    "special": "NaN or infinities are not where ONNX Runtime has them",
    "refusal": "a buffer was accepted that must be refused",
    "build": "lowering, compiling or linking failed",
    "refused": "a default or valid picks, the reference or the default candidate was said not to apply",
    "descriptor": "the spec is another one after it was written down and read back",
    "error": "an exception that is not raised on purpose",
    "crash": "the process died",
    "hang": "no answer in time",
}


class Examined(Protocol):
    """What is checked, in a process of its own; frozen and hashable."""

    @property
    def command(self) -> str:
        """The command that repeats the check."""

    @property
    def group(self) -> str:
        """What it is counted with; findings of one group are likely to be one."""

    @property
    def operator(self) -> str:
        """What of its group it is counted as."""

    def flaw(self) -> Outcome | None:
        """What is wrong about it before it is checked."""

    def job(self) -> Callable[[], Outcome]:
        """The check, which another process can import."""


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
class Outcome:
    """How a check ended: one of :data:`KINDS`, what was found, the checks made, and the largest
    error as a fraction of its bound.
    """

    kind: str
    message: str = ""
    checks: tuple[str, ...] = ()
    error: float = 0.0


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
