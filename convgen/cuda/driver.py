"""The CUDA driver: devices, contexts, memory, streams and events.

The library that ``CONVGEN_CUDA_DRIVER`` names, else ``libcuda.so.1``: the one that exported kernels open
(``runtime/launch.c``), called through ctypes, so that a kernel runs where only NumPy is installed. Everything
happens in devices' primary contexts, which CUDA's runtime and with it PyTorch and CuPy use.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from contextlib import suppress
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

from ..errors import KernelError
from ..hardware.machine import Device

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: What of the driver is called; all return a CUresult.
_FUNCTIONS: dict[str, tuple[type, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuCtxSynchronize": (),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemsetD8_v2": (c_uint64, c_ubyte, c_size_t),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}

# enum CUdevice_attribute
_SMS, _L2, _MAJOR, _MINOR = 16, 38, 75, 76
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: apart from the default stream


class Driver:
    """The loaded driver: ``driver("cuCtxSynchronize")`` calls a function.

    Raises:
        KernelError: the library cannot be loaded, is no driver, or finds no device.
    """

    def __init__(self, library: str) -> None:
        try:
            loaded = ctypes.CDLL(library)
            self._functions = {name: getattr(loaded, name) for name in _FUNCTIONS}
        except (OSError, AttributeError) as error:
            raise KernelError(f"expected a CUDA driver, found none: {error}") from error
        for name, arguments in _FUNCTIONS.items():
            self._functions[name].argtypes, self._functions[name].restype = arguments, c_int
        self("cuInit", 0)

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call a function; raise KernelError unless it succeeds."""
        if error := self._functions[function](*arguments):
            name = c_char_p()
            self._functions["cuGetErrorName"](error, ctypes.byref(name))
            raise KernelError(f"{function}: the CUDA driver reported {(name.value or b'').decode() or error}")

    def get(self, function: str, kind: Any, *arguments: Any) -> Any:
        """What a function writes to its first argument, of type ``kind``."""
        value = kind()
        self(function, ctypes.byref(value), *arguments)
        return value.value


def driver() -> Driver:
    """The driver.

    Raises:
        KernelError: there is none, or no device.
    """
    return _loaded(os.environ.get("CONVGEN_CUDA_DRIVER") or "libcuda.so.1")


_loaded = functools.cache(Driver)


# ---- devices -----------------------------------------------------------------------------------


def device() -> Device | None:
    """This machine's first GPU; None where there is no driver or no device."""
    try:
        return _device(driver(), 0)
    except KernelError:
        return None


@functools.cache
def _device(loaded: Driver, ordinal: int) -> Device:
    number = loaded.get("cuDeviceGet", c_int, ordinal)

    def attribute(which: int) -> int:
        return int(loaded.get("cuDeviceGetAttribute", c_int, which, number))

    name = ctypes.create_string_buffer(256)
    loaded("cuDeviceGetName", name, len(name), number)
    return Device(
        name=name.value.decode(errors="replace"),
        capability=(attribute(_MAJOR), attribute(_MINOR)),
        sms=attribute(_SMS),
        l2=attribute(_L2),
        memory=loaded.get("cuDeviceTotalMem_v2", c_size_t, number),
        driver=loaded.get("cuDriverGetVersion", c_int),
    )


class context:  # noqa: N801  (used like the functions of contextlib)
    """A device's primary context, current on this thread for a while.

    Raises:
        KernelError: there is no such device.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._driver = driver()
        self._handle = _primary(self._driver, ordinal)

    def __enter__(self) -> None:
        self._pushed = self._driver.get("cuCtxGetCurrent", c_void_p) != self._handle
        if self._pushed:
            self._driver("cuCtxPushCurrent_v2", self._handle)

    def __exit__(self, *_: object) -> None:
        if self._pushed:
            self._driver("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))


@functools.cache
def _primary(loaded: Driver, ordinal: int) -> int:
    """A primary context; kept until the process ends, like libraries are."""
    count = loaded.get("cuDeviceGetCount", c_int)
    if not 0 <= ordinal < count:
        raise KernelError(f"device: expected one of {count}, counted from 0, found {ordinal}")
    return int(loaded.get("cuDevicePrimaryCtxRetain", c_void_p, loaded.get("cuDeviceGet", c_int, ordinal)))


def synchronize(ordinal: int = 0) -> None:
    """Wait until the device has done all it was given.

    Raises:
        KernelError: something failed meanwhile, such as a kernel.
    """
    with context(ordinal):
        driver()("cuCtxSynchronize")


# ---- memory ------------------------------------------------------------------------------------


class _Handle:
    """Something of the driver's that is given back with the object; the end of the process gives back the rest."""

    def __init__(self, ordinal: int, handle: int, release: str) -> None:
        self.ordinal, self.handle = ordinal, handle
        weakref.finalize(self, _release, driver(), ordinal, handle, release).atexit = False


def _release(loaded: Driver, ordinal: int, handle: int, function: str) -> None:
    with suppress(KernelError), context(ordinal):  # of a context that a failed kernel ended there is nothing left
        loaded(function, handle)


class Memory(_Handle):
    """``size`` bytes of a device's memory at ``address``, freed with the object.

    Raises:
        KernelError: there is no device, or not as much memory.
    """

    def __init__(self, size: int, ordinal: int = 0) -> None:
        with context(ordinal):
            address = int(driver().get("cuMemAlloc_v2", c_uint64, max(size, 1)))
        super().__init__(ordinal, address, "cuMemFree_v2")
        self.address, self.size = address, size

    def upload(self, array: NDArray[Any], offset: int = 0) -> None:
        """Copy an array's bytes here; they have arrived, for all streams, when this returns."""
        import numpy as np  # here: whoever asks which device there is needs none

        data = np.ascontiguousarray(array)
        self._check(offset, data.nbytes)
        if not data.nbytes:
            return
        with context(self.ordinal):
            driver()("cuMemcpyHtoD_v2", self.address + offset, data.ctypes.data, data.nbytes)
            driver()("cuStreamSynchronize", None)  # a copy from pageable memory may still be under way

    def download(self, offset: int = 0, size: int | None = None) -> NDArray[np.uint8]:
        """The bytes from ``offset`` on, once the default stream has come here."""
        import numpy as np

        data = np.empty(self.size - offset if size is None else size, np.uint8)
        self._check(offset, data.nbytes)
        if not data.nbytes:
            return data
        with context(self.ordinal):
            driver()("cuMemcpyDtoH_v2", data.ctypes.data, self.address + offset, data.nbytes)
        return data

    def fill(self, byte: int) -> None:
        """Set every byte."""
        if not self.size:
            return
        with context(self.ordinal):
            driver()("cuMemsetD8_v2", self.address, byte, self.size)
            driver()("cuStreamSynchronize", None)

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or offset + size > self.size:
            raise KernelError(f"memory: expected a part of {self.size} bytes, found {size} from {offset} on")


# ---- streams and events --------------------------------------------------------------------------


class Stream(_Handle):
    """A stream that does not wait for the default one; ``handle`` is its CUstream."""

    def __init__(self, ordinal: int = 0) -> None:
        with context(ordinal):
            handle = int(driver().get("cuStreamCreate", c_void_p, _NON_BLOCKING))
        super().__init__(ordinal, handle, "cuStreamDestroy_v2")

    def synchronize(self) -> None:
        """Wait until it is done.

        Raises:
            KernelError: something failed meanwhile, such as a kernel.
        """
        with context(self.ordinal):
            driver()("cuStreamSynchronize", self.handle)


class Event(_Handle):
    """A point in a stream's work."""

    def __init__(self, ordinal: int = 0) -> None:
        with context(ordinal):
            handle = int(driver().get("cuEventCreate", c_void_p, 0))
        super().__init__(ordinal, handle, "cuEventDestroy_v2")

    def record(self, stream: int = 0) -> None:
        """Put it after what the stream, by its handle, was given so far."""
        with context(self.ordinal):
            driver()("cuEventRecord", self.handle, stream)

    def synchronize(self) -> None:
        """Wait until the stream has come here."""
        with context(self.ordinal):
            driver()("cuEventSynchronize", self.handle)

    def seconds_since(self, start: Event) -> float:
        """The time between two events, on the device."""
        with context(self.ordinal):
            milliseconds: float = driver().get("cuEventElapsedTime", c_float, start.handle, self.handle)
        return milliseconds / 1e3
