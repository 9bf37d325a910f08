"""Streams and memory of the frameworks whose arrays lie on a GPU.

PyTorch and CuPy have allocators that know their streams: what is taken of them belongs to a stream, can be given back
while the stream still works on it, and may be taken while a CUDA graph is captured. Others only show their arrays by
DLPack.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Protocol

from ..errors import KernelError


class Framework(Protocol):
    """What a layer asks of the framework whose array it was given."""

    def current_stream(self, x: Any) -> int:
        """The handle of the stream that the framework works on, on x's device."""

    def empty(self, x: Any, shape: tuple[int, ...]) -> Any:
        """A new array of x's dtype and device.

        Raises:
            KernelError: the framework cannot make one.
        """

    def scratch(self, x: Any, size: int, stream: int) -> tuple[int, object] | None:
        """The address of ``size`` bytes for work on a stream of x's device, and what keeps them; None where the
        framework has no allocator that knows streams.
        """

    def used(self, arrays: Iterable[Any], stream: int) -> None:
        """Tell the framework that a stream works on arrays: they may be freed meanwhile."""


class _Torch:
    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def current_stream(self, x: Any) -> int:
        return int(self._torch.cuda.current_stream(x.device).cuda_stream)

    def empty(self, x: Any, shape: tuple[int, ...]) -> Any:
        return x.new_empty(shape)

    def scratch(self, x: Any, size: int, stream: int) -> tuple[int, object]:
        with self._torch.cuda.stream(self._stream(x, stream)):
            memory = self._torch.empty(size, dtype=self._torch.uint8, device=x.device)
        return memory.data_ptr(), memory

    def used(self, arrays: Iterable[Any], stream: int) -> None:
        for array in arrays:
            if isinstance(array, self._torch.Tensor) and self.current_stream(array) != stream:
                array.record_stream(self._stream(array, stream))

    def _stream(self, x: Any, handle: int) -> Any:
        return self._torch.cuda.ExternalStream(handle, device=x.device)


class _Cupy:
    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy

    def current_stream(self, x: Any) -> int:
        return int(self._cupy.cuda.get_current_stream().ptr)

    def empty(self, x: Any, shape: tuple[int, ...]) -> Any:
        return self._cupy.empty(shape, x.dtype)

    def scratch(self, x: Any, size: int, stream: int) -> tuple[int, object]:
        with self._cupy.cuda.ExternalStream(stream):
            memory = self._cupy.empty(size, "uint8")
        return memory.data.ptr, memory

    def used(self, arrays: Iterable[Any], stream: int) -> None:
        """Its pool frees by the stream that was current at allocation, and has no way to be told of others."""


class _Other:
    def current_stream(self, x: Any) -> int:
        return 0

    def empty(self, x: Any, shape: tuple[int, ...]) -> Any:
        if hasattr(x, "new_empty"):  # as tensors of PyTorch have
            return x.new_empty(shape)
        if hasattr(x, "__array_namespace__"):
            return x.__array_namespace__().empty(shape, dtype=x.dtype, device=x.device)
        raise KernelError(f"out: expected an array to write to, as {type(x).__name__} cannot make one; found none")

    def scratch(self, x: Any, size: int, stream: int) -> None:
        return None

    def used(self, arrays: Iterable[Any], stream: int) -> None:
        pass


def framework_of(x: Any) -> Framework:
    """The framework of an array on a GPU."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(x, torch.Tensor) and x.is_cuda:
        return _Torch(torch)
    if cupy is not None and isinstance(x, cupy.ndarray):
        return _Cupy(cupy)
    return _Other()
