"""What of a layer the busiest core does, and what it reads and writes beyond its L2 cache, where tasks are alike."""

from __future__ import annotations

from collections.abc import Sequence

from ..hardware.target import Target
from ..lowering.compute import ceildiv
from ..problem.spec import ConvSpec
from .model import Stream

#: Tasks of each core that even out what some take longer.
TASKS_OF_A_CORE = 4
#: Bytes of a page, at whose end the processor stops fetching ahead.
PAGE = 4096


def busiest_share(tasks: int, cores: int) -> float:
    """The part of all work that the busiest core has."""
    return ceildiv(tasks, cores) / tasks


def enough_parts(choices: Sequence[int], tasks: int, cores: int) -> int:
    """In how many parts tasks are cut, of an ascending choice: the fewest that make enough of them, else the most."""
    return next((parts for parts in choices if parts * tasks >= TASKS_OF_A_CORE * cores), choices[-1])


def image_bytes(spec: ConvSpec) -> int:
    """What is read and written of images: a line of dst is read before it is written."""
    return spec.bytes["src"] + (2 + spec.residual) * spec.bytes["dst"]


def of_images(size: int, share: float) -> Stream:
    """A core's share of images of so many bytes, which are fetched ahead, and come round again with the next layer."""
    return Stream(size * share, ahead=True, footprint=size)


def is_read_again(spec: ConvSpec, target: Target, blocks: float) -> bool:
    """Whether several blocks of channels read images that follow each other, each a large part of the L2 cache: rows
    then come from beyond it each time, in strips too short for the processor to fetch ahead.
    """
    return blocks > 1 and spec.n > 1 and spec.bytes["src"] // spec.n > target.l2 // 4
