"""Whether a machine is as fast as it was: the time of a fixed computation, taken again and again."""

from __future__ import annotations

import statistics

import numpy as np

from .standalone.timing import sample


def reference_kernel(repeats: int = 5) -> float:
    """Seconds of a small fixed computation on one thread: what the machine gives at the moment.

    Multiplications and additions on 32 KiB, about 0.4 ms of them, the median of ``repeats``. A busy core, a lower
    clock or a core shared with another virtual machine slows it as much as anything else.
    """
    values = np.ones(8192, np.float32)

    def compute() -> None:
        for _ in range(200):
            np.multiply(values, np.float32(0.5), out=values)
            np.add(values, np.float32(1.0), out=values)

    compute()
    return statistics.median(sample(compute, 1) for _ in range(repeats))
