"""How long a layer takes at least on this machine.

Its operations at the measured peak, and its tensors once from where they lie between two calls: the
nearest level that holds them all. The weights count as the layer has them, whatever a schedule makes
of them, so that the limit is the layer's and no candidate can raise it.

The peak is that of what the layer multiplies: of integers, of bf16 where the processor multiplies it, else of f32.

Two things can beat the limit: a transform does fewer operations than are counted, and what stays of the
tensors in a nearer cache comes faster.
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
        peak_of: what is multiplied: ``f32``, ``i8`` or ``bf16``.
        peak_flops: operations per second, of that.
        level: where the tensors are read from: ``l2``, ``l3`` or ``dram``.
        bandwidth: bytes per second from there.
        compute_seconds, memory_seconds: the least times of operations and of traffic.
    """

    threads: int
    peak_of: str
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
    kind, peak = _peak(spec, found)
    return Roofline(threads, kind, peak, level, bandwidth, spec.flops / peak, traffic / bandwidth)


def _peak(spec: ConvSpec, found: Measured) -> tuple[str, float]:
    """What a layer multiplies where the machine is fastest at it, and the peak of that."""
    narrow = "i8" if spec.is_quantised else "bf16" if "bf16" in (spec.dtype, spec.accuracy) else "f32"
    peak: float | None = getattr(found, f"peak_{narrow}", None)
    return (narrow, peak) if peak and peak > found.peak else ("f32", found.peak)


def _level(size: int, threads: int, here: Machine, found: Measured) -> str:
    """The nearest level that holds so many bytes. Each thread has an L2 cache; they share the others."""
    capacity = {"l2": (here.l2 or 0) * min(threads, here.cores), "l3": here.l3 or 0}
    return next((level for level in LEVELS if size <= capacity.get(level, 0) and getattr(found, level)), "dram")
