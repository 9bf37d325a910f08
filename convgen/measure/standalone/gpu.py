"""Kernels on a GPU, and their times by the device's own clock."""

from __future__ import annotations

import ctypes
import itertools
import time
from typing import Any, Sequence

from .driver import Driver
from .errors import Refused
from .interface import (
    DRIVER_ERROR,
    NO_IMAGE,
    NO_MEMORY,
    PARAMETERS,
    GpuRunArgs,
    PackArgs,
    Sizes,
    aligned,
    pass_tensors,
)
from .timing import SAMPLE_SECONDS, TRIAL_SECONDS, Call

_ALIGNMENT = 256
#: The copies of a kernel's tensors exceed the L2 cache so many times, so that each call finds its own outside of
#: the cache; there are at most ``_COPIES``.
_COLD, _COPIES = 2, 1024
#: Seconds of calls before the first sample, for the clock to rise.
_WARM_UP = 20e-3
#: Calls that fit into the driver's queue.
_QUEUE = 256
#: Times the memory is filled at most, to keep the device busy while a sample is launched.
_FILLS = 200


class Gpu(Driver):
    """The first GPU, used on the default stream of its primary context by this thread.

    Raises:
        Refused: there is no driver, or no device.
    """

    def __init__(self) -> None:
        super().__init__()
        self("cuCtxPushCurrent_v2", self.get("cuDevicePrimaryCtxRetain", ctypes.c_void_p, self.number))
        self._begin, self._end = (self.get("cuEventCreate", ctypes.c_void_p, 0) for _ in range(2))
        self._scratch_size = max(_COLD * self.facts["l2"], 1 << 20)
        self._scratch = self.allocate(self._scratch_size)
        self._fill_seconds = min(self._elapsed(self._fill, 8) for _ in range(5))

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes of device memory filled with NaN; 0 where the size is 0."""
        if not size:
            return 0
        address = int(self.get("cuMemAlloc_v2", ctypes.c_uint64, size))
        self("cuMemsetD8_v2", address, 0xFF, size)
        return address

    def free(self, address: int) -> None:
        if address:
            self("cuMemFree_v2", address)

    def wait(self) -> None:
        """Until all that was launched is done."""
        self("cuStreamSynchronize", None)

    # What the functions of these names in timing.py do for calls on a CPU.

    def sample(self, call: Call, count: int, fills: int = 1) -> float:
        """Seconds per call over ``count`` calls.

        Memory is filled first, which keeps the device busy while the calls are launched: it never waits for one.
        """
        for _ in range(fills):
            self._fill()
        return self._elapsed(call, count)

    def repeats(self, call: Call, seconds: float) -> tuple[int, int]:
        """How often to repeat a call in one sample of ``seconds``, and to fill memory before; warms up."""
        end = time.perf_counter() + _WARM_UP
        while True:
            call()
            self.wait()
            if time.perf_counter() >= end:
                break
        count = max(1, min(_QUEUE, int(seconds / max(self.sample(call, 3), 1e-9))))
        start = time.perf_counter()
        for _ in range(count):
            call()
        launching = time.perf_counter() - start
        self.wait()
        return count, max(1, min(_FILLS, int(1.5 * launching / self._fill_seconds) + 1))

    def time_calls(
        self,
        call: Call,
        seconds: float = TRIAL_SECONDS,
        sample_seconds: float = SAMPLE_SECONDS,
        hopeless: float = 0.0,
        at_least: int = 5,
    ) -> list[float]:
        """Samples of seconds per call for about ``seconds``; only one where it exceeds ``hopeless`` (0: no limit)."""
        count, fills = self.repeats(call, sample_seconds)
        samples = [self.sample(call, count, fills)]
        if hopeless and samples[0] > hopeless:
            return samples
        for _ in range(max(at_least, min(200, int(seconds / max(samples[0] * count, 1e-9)))) - 1):
            samples.append(self.sample(call, count, fills))
        return samples

    def alternate(self, calls: Sequence[Call], rounds: int, seconds: float) -> list[list[float]]:
        """Samples of several calls taken in turn."""
        counts = [self.repeats(call, seconds) for call in calls]
        samples: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for taken, call, (count, fills) in zip(samples, calls, counts):
                taken.append(self.sample(call, count, fills))
        return samples

    def _elapsed(self, call: Call, count: int = 1) -> float:
        self("cuEventRecord", self._begin, None)
        for _ in range(count):
            call()
        self("cuEventRecord", self._end, None)
        self("cuEventSynchronize", self._end)
        milliseconds: float = self.get("cuEventElapsedTime", ctypes.c_float, self._begin, self._end)
        return max(milliseconds, 1e-6) / 1e3 / count

    def _fill(self) -> None:
        self("cuMemsetD8_v2", self._scratch, 0, self._scratch_size)


class GpuCall:
    """A library's kernel on device memory: each call takes the next of several copies of the tensors, which
    together are larger than the L2 cache.

    Args:
        gpu: where it runs.
        library: the loaded library; ``name`` is the prefix of its functions.
        data: the tensors in CPU memory that it reads.
        apart: one copy, each tensor of which is memory of its own.

    Attributes:
        copies: a call's arguments for each copy.

    Raises:
        Refused: the library has no code for this device.
        MemoryError: the device has not enough memory.
        RuntimeError: the library refused.
    """

    def __init__(self, gpu: Gpu, library: Any, name: str, data: dict[str, Any], apart: bool = False) -> None:
        self._gpu, self._library, self._name = gpu, library, name
        self._function("error").restype = self._function("driver_error").restype = ctypes.c_char_p
        sizes = Sizes()
        self._require(self._function("sizes")(ctypes.byref(sizes)))
        packed = aligned(sizes.packed)
        pack = PackArgs(packed=packed, packed_size=sizes.packed)
        pass_tensors(pack, sizes, data, *PARAMETERS)
        self._require(self._function("pack")(ctypes.byref(pack)))
        self._require(self._function("load")())
        for tensor in ("src", "residual"):
            if len(data.get(tensor, b"")) != getattr(sizes, tensor):
                raise RuntimeError(f"{tensor}: expected {getattr(sizes, tensor)} bytes, found another size")
        self._memory: list[int] = []
        parts = {"src": data["src"], "packed": packed, "residual": data.get("residual"), "dst": None}
        self.copies = [self._place_apart(sizes, parts)] if apart else self._place(sizes, parts)
        gpu.wait()
        self._run = self._function("run")
        self._next = itertools.cycle([ctypes.byref(args) for args in self.copies])

    def _place(self, sizes: Sizes, parts: dict[str, Any]) -> list[GpuRunArgs]:
        """Copy the tensors to device memory, again and again; the arguments of a call on each copy."""
        offsets, stride = {}, 0
        for part in parts:
            offsets[part] = stride
            stride += -(-getattr(sizes, part) // _ALIGNMENT) * _ALIGNMENT
        facts = self._gpu.facts
        count = max(1, min(_COPIES, -(-_COLD * facts["l2"] // max(stride, 1)), facts["memory"] // 4 // stride))
        try:
            for size in (count * stride, sizes.workspace):
                self._memory.append(self._gpu.allocate(size))
        except MemoryError:
            self._free()
            raise
        tensors, workspace = self._memory
        copies = []
        for first in range(tensors, tensors + count * stride, stride):
            args = GpuRunArgs(workspace=workspace or None, workspace_size=sizes.workspace)
            for part, source in parts.items():
                self._give(args, part, first + offsets[part], getattr(sizes, part), source)
            copies.append(args)
        return copies

    def _place_apart(self, sizes: Sizes, parts: dict[str, Any]) -> GpuRunArgs:
        """Copy the tensors to device memory, each to its own; the arguments of a call."""
        args = GpuRunArgs()
        for part, source in {**parts, "workspace": None}.items():
            self._memory.append(self._gpu.allocate(getattr(sizes, part)))
            self._give(args, part, self._memory[-1], getattr(sizes, part), source)
        return args

    def _give(self, args: GpuRunArgs, part: str, address: int, size: int, source: Any) -> None:
        """Name a buffer in a call's arguments, and fill it from the CPU's memory where that has something for it."""
        if size:
            setattr(args, part, address)
            setattr(args, part + "_size", size)
        if size and source is not None:
            self._gpu("cuMemcpyHtoD_v2", address, source, size)

    def __call__(self) -> None:
        """Launch it; what goes wrong on the device shows when it is waited for."""
        status = self._run(next(self._next))
        if status:
            self._require(status)

    def output(self) -> Any:
        """What the first copy's call has written."""
        first = self.copies[0]
        memory = (ctypes.c_char * first.dst_size)()
        self._gpu.wait()
        self._gpu("cuMemcpyDtoH_v2", memory, first.dst, first.dst_size)
        return memory

    def close(self) -> None:
        """Give the device's memory back."""
        self._gpu.wait()
        self._require(self._function("unload")())
        self._free()

    def _free(self) -> None:
        for address in self._memory:
            self._gpu.free(address)

    def _function(self, suffix: str) -> Any:
        return getattr(self._library, self._name + "_" + suffix)

    def _require(self, status: int) -> None:
        if not status:
            return
        text = self._function("error")(status).decode()
        if status == NO_IMAGE:
            raise Refused(text)
        if status == DRIVER_ERROR:
            text += ": " + self._function("driver_error")().decode()
        raise MemoryError(text) if status == NO_MEMORY or "OUT_OF_MEMORY" in text else RuntimeError(text)
