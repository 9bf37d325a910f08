"""Arrays as a framework has them on a device, of which the memory is the CPU's."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from convgen.cuda.driver import Memory


class Tensor:
    """An array in an emulated device's memory, which is the CPU's."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._memory = Memory(4 * int(np.prod(shape)))
        buffer = (ctypes.c_char * self._memory.size).from_address(self._memory.address)
        self.array = np.frombuffer(memoryview(buffer), np.float32).reshape(shape)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int]) -> Any:
        return self.array.__dlpack__(max_version=max_version)

    def new_empty(self, shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape)
