"""Calls that find their weights in memory, as in a network.

A layer that is repeated finds its weights where the last call left them. Here each call takes the next of many copies
of the packed weights, which together are more than the last cache holds; src, dst and residual stay what they are, as
in a network the layer before has just written them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..hardware.machine import machine
from ..kernel.library import Library, aligned

#: How many times the last cache the copies fill; and copies at most: of small weights fewer do, as they are fetched in
#: no time that matters.
CACHES, MOST_COPIES = 2, 256
#: Bytes of copies at most, whatever the cache.
MOST_BYTES = 1 << 30

Bytes = npt.NDArray[np.uint8]


def rotating(
    library: Library, src: object, packed: Bytes, dst: object, residual: object = None, threads: int | None = None
) -> Callable[[], None]:
    """A function that runs the kernel with cold weights; arguments as of :meth:`Library.prepare`.

    Raises:
        MemoryError: there is none for the copies.
    """
    workspace = aligned(max(1, library.sizes(threads).workspace))
    calls = [
        library.prepare(src, copy, dst, residual, workspace, threads)
        for copy in _copies(packed, copies_of(packed.size))
    ]
    following = itertools.cycle(calls).__next__

    def call() -> None:
        following()()

    return call


def copies_of(size: int) -> int:
    """How many copies of so many bytes are cold when their turn comes again."""
    wanted = min(CACHES * (machine().l3 or 32 << 20), MOST_BYTES)
    return max(1, min(MOST_COPIES, math.ceil(wanted / max(size, 1))))


def _copies(packed: Bytes, count: int) -> list[Bytes]:
    found = [packed]
    for _ in range(count - 1):
        copy = aligned(packed.size)
        copy[:] = packed
        found.append(copy)
    return found
