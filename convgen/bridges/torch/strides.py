"""How tensors of PyTorch lie in memory, as an order of their axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

#: Axes from the outermost in memory to the innermost: (0, 2, 3, 1) is channels_last.
Perm: TypeAlias = tuple[int, ...]


def storage_order(tensor: Any) -> Perm | None:
    """The order of a tensor's axes in memory, their own where it is contiguous; None where elements have gaps."""
    sizes, strides = [int(size) for size in tensor.shape], [int(stride) for stride in tensor.stride()]
    own = tuple(range(len(sizes)))
    for perm in (own, tuple(sorted(own, key=lambda axis: -strides[axis]))):
        if _is_dense([sizes[axis] for axis in perm], [strides[axis] for axis in perm]):
            return perm
    return None


def _is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    step = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def moves(perm: Perm, sizes: Sequence[int]) -> Perm:
    """The axes that have an order at all: those of more than one element."""
    return tuple(axis for axis in perm if sizes[axis] != 1)


def inverse(perm: Perm) -> Perm:
    """The permutation that undoes one."""
    return tuple(perm.index(axis) for axis in range(len(perm)))
