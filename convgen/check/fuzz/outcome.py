"""What the fuzzer checks, an :class:`Examined`, and how a check can end, an :class:`Outcome`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

#: How a check can end.
KINDS = {
    "ok": "passed",
    "wrong": "values are not what ONNX Runtime or autograd has, on floats, integers or data of very different scales",
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


@dataclass(frozen=True)
class Outcome:
    """How a check ended: one of :data:`KINDS`, what was found, the checks made, and the largest
    error as a fraction of its bound; of layers of integers also what tells those apart that were checked, which differ
    in their specs, zero points or scales.
    """

    kind: str
    message: str = ""
    checks: tuple[str, ...] = ()
    error: float = 0.0
    layers: tuple[str, ...] = ()


class Examined(Hashable, Protocol):
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
