"""Calls that find their weights in memory, as in a network.

A layer that is repeated finds its weights where the last call left them. Here each call takes the next of many copies
of the packed weights, which together are more than the last cache holds; src, dst and residual stay what they are, as
in a network the layer before has just written them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..hardware.machine import machine
from ..kernel.library import Library, aligned
from .standalone.rotation import copies_of

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
        for copy in _copies(packed, copies_of(packed.size, machine().l3 or 0))
    ]
    following = itertools.cycle(calls).__next__

    def call() -> None:
        following()()

    return call


def _copies(packed: Bytes, count: int) -> list[Bytes]:
    found = [packed]
    for _ in range(count - 1):
        copy = aligned(packed.size)
        copy[:] = packed
        found.append(copy)
    return found
