"""Where a plan's tensors lie, checked by going through its steps as the library will: without its reasons.

Memory is arrays that say of every byte which tensor it belongs to, and which of its bytes it is. A step that
reads must find what it reads, whole; what it writes is its own from then on.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ...errors import ValidationError
from ...lowering.interface import HEADER_BYTES
from ...problem.dtypes import BYTES
from ..memory import ARENA, INPUT, OUTPUT, WEIGHTS, Place
from ..plan import Plan

_Space = tuple[str, int]


class Memory:
    """The spaces of one run: which tensor each byte is of, and which of its bytes.

    Args:
        sizes: bytes of each space.
    """

    def __init__(self, sizes: Mapping[_Space, int]) -> None:
        self._owner = {space: np.full(size, -1, np.int32) for space, size in sizes.items()}
        self._index = {space: np.zeros(size, np.int64) for space, size in sizes.items()}
        self._numbers: dict[str, int] = {}

    def _part(self, what: str, place: Place, size: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        space, begin = (place.space, place.number), place.offset
        known = self._owner.get(space)
        if known is None or not 0 <= begin <= len(known) - size:
            end = None if known is None else len(known)
            raise ValidationError(f"{what}: expected a place within {end} bytes, found {place} and {size} bytes")
        return known[begin : begin + size], self._index[space][begin : begin + size]

    def write(self, what: str, place: Place, whole: str, first: int, size: int) -> None:
        """Bytes of a whole tensor, from the ``first`` on, are there now."""
        owner, index = self._part(what, place, size)
        owner[:] = self._numbers.setdefault(whole, len(self._numbers))
        index[:] = np.arange(first, first + size)

    def read(self, what: str, place: Place, whole: str, first: int, size: int) -> None:
        """Require that bytes are there.

        Raises:
            ValidationError: something else is, or nothing.
        """
        owner, index = self._part(what, place, size)
        wrong = np.flatnonzero((owner != self._numbers.get(whole, -2)) | (index != np.arange(first, first + size)))
        if wrong.size:
            names = [*self._numbers, "nothing"]
            found = names[int(owner[wrong[0]])]
            raise ValidationError(
                f"{what}: expected byte {first + int(wrong[0])} of {whole}, found byte "
                f"{int(index[wrong[0]])} of {found} at {place}"
            )


def check_places(plan: Plan) -> int:
    """How many tensors were read, each where it was written and nothing had been written since.

    Raises:
        ValidationError: two tensors share memory while both are wanted; one is read that was not written, an input or
            constant is written, or an output is not; names the step.
    """
    graph = plan.graph
    ends = [offset + graph.bytes(name) for name, offset in plan.constants.items()]
    sizes: dict[_Space, int] = {(ARENA, 0): plan.arena, (WEIGHTS, 0): max(ends, default=0)}
    sizes |= {(INPUT, number): graph.bytes(name) for number, name in enumerate(graph.inputs)}
    sizes |= {(OUTPUT, number): graph.bytes(name) for number, name in enumerate(graph.outputs)}
    memory, count = Memory(sizes), 0
    for number, name in enumerate(graph.inputs):
        memory.write(name, Place(INPUT, number, 0), name, 0, graph.bytes(name))
    for name, offset in plan.constants.items():
        if offset < HEADER_BYTES:
            raise ValidationError(f"{name}: expected a constant after the header, found it at byte {offset}")
        memory.write(name, Place(WEIGHTS, 0, offset), name, 0, graph.bytes(name))

    def part(name: str) -> tuple[str, int, int]:
        """The whole that a tensor is of, the byte it begins with, and how many it has."""
        view = plan.views.get(name)
        whole, first = (view.of, view.offset) if view else (name, 0)
        return whole, first, graph.bytes(name)

    for name, place in plan.places.items():
        if place.offset % BYTES[graph.dtype(name)]:
            raise ValidationError(f"{name}: expected a multiple of {BYTES[graph.dtype(name)]} bytes, found {place}")
    for step in plan.steps:
        output, place = step.output, plan.places[step.output]
        if place.space in (INPUT, WEIGHTS):
            raise ValidationError(f"{step.name}: expected an output in the arena, found {output} at {place}")
        for written in (False, True):  # while a step writes, what it reads must stay
            for name in step.inputs:
                memory.read(f"{step.name}: {name}", plan.places[name], *part(name))
                count += not written
            if not written:
                memory.write(f"{step.name}: {output}", place, *part(output))
    for number, name in enumerate(graph.outputs):
        memory.read(name, Place(OUTPUT, number, 0), name, 0, graph.bytes(name))
    return count
