"""How long a layer takes at least on this machine.

Its operations at the measured peak, and its tensors once from where they lie between two calls: the
nearest level that holds them all. The weights count as the layer has them, whatever a schedule makes
of them, so that the limit is the layer's and no candidate can raise it.

Three things can beat the limit: a transform does fewer operations than are counted, what stays of the
tensors in a nearer cache comes faster, and the peak is that of f32, whatever narrower types may reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..problem.spec import ConvSpec
from .machine import LEVELS, Machine, Measured, machine, measured


@dataclass(frozen=True)
class Roofline:
    """The two limits of a layer.

    Attributes:
        threads: what was measured: that many.
        peak_flops: operations per second.
        level: where the tensors are read from: ``l2``, ``l3`` or ``dram``.
        bandwidth: bytes per second from there.
        compute_seconds, memory_seconds: the least times of operations and of traffic.
    """

    threads: int
    peak_flops: float
    level: str
    bandwidth: float
    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def limited_by(self) -> str:
        """``compute``, or the level that the tensors come from."""
        return "compute" if self.compute_seconds >= self.memory_seconds else self.level

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"seconds": self.seconds, "limited_by": self.limited_by}


def roofline(
    spec: ConvSpec, threads: int, *, cold: bool = False, here: Machine | None = None, found: Measured | None = None
) -> Roofline:
    """The limits of a layer on this machine.

    Args:
        cold: every call finds the caches empty, and reads memory.
        here, found: another machine and what was measured there.

    Raises:
        BuildError, MeasureError: the machine cannot be measured.
    """
    here, found = here or machine(), found or measured(threads)
    traffic = sum(spec.bytes.values())
    level = "dram" if cold else _level(traffic, threads, here, found)
    bandwidth = getattr(found, level)
    return Roofline(threads, found.peak, level, bandwidth, spec.flops / found.peak, traffic / bandwidth)


def _level(size: int, threads: int, here: Machine, found: Measured) -> str:
    """The nearest level that holds so many bytes. Each thread has an L2 cache; they share the others."""
    capacity = {"l2": (here.l2 or 0) * min(threads, here.cores), "l3": here.l3 or 0}
    return next((level for level in LEVELS if size <= capacity.get(level, 0) and getattr(found, level)), "dram")
