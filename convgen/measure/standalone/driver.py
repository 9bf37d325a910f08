"""The CUDA driver's functions, through ctypes."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from .errors import Refused

#: What of the driver is called, with the types of its arguments; all functions return a CUresult.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDriverGetVersion": (ctypes.c_void_p,),
    "cuDeviceGet": (ctypes.c_void_p, ctypes.c_int),
    "cuDeviceGetName": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuDeviceTotalMem_v2": (ctypes.c_void_p, ctypes.c_int),
    "cuDeviceGetAttribute": (ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.c_void_p, ctypes.c_int),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuStreamSynchronize": (ctypes.c_void_p,),
    "cuMemAlloc_v2": (ctypes.c_void_p, ctypes.c_size_t),
    "cuMemFree_v2": (ctypes.c_uint64,),
    "cuMemcpyHtoD_v2": (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t),
    "cuMemcpyDtoH_v2": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t),
    "cuMemsetD8_v2": (ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t),
    "cuEventCreate": (ctypes.c_void_p, ctypes.c_uint),
    "cuEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cuEventSynchronize": (ctypes.c_void_p,),
    "cuEventElapsedTime": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
    "cuGetErrorName": (ctypes.c_int, ctypes.c_void_p),
}
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_SMS, _L2, _MAJOR, _MINOR = 16, 38, 75, 76  # enum CUdevice_attribute


class Driver:
    """The driver of the first GPU; it makes no context on it.

    Attributes:
        number: the device's number.
        facts: what a device's records are tied to, and what tensors are laid out for.

    Raises:
        Refused: there is no driver, or no device.
    """

    def __init__(self) -> None:
        name = os.environ.get("CONVGEN_CUDA_DRIVER") or "libcuda.so.1"
        try:
            library = ctypes.CDLL(name)
            self._functions = {function: getattr(library, function) for function in _FUNCTIONS}
        except (OSError, AttributeError) as error:
            raise Refused(f"expected a CUDA driver, found none: {error}") from None
        for function, arguments in _FUNCTIONS.items():
            self._functions[function].argtypes = arguments
        try:
            self("cuInit", 0)
            self.number = self.get("cuDeviceGet", ctypes.c_int, 0)
        except RuntimeError as error:
            raise Refused(f"expected a CUDA device, found none: {error}") from None
        text = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", text, len(text), self.number)
        self.facts: dict[str, Any] = {
            "name": text.value.decode(errors="replace"),
            "capability": [self._attribute(_MAJOR), self._attribute(_MINOR)],
            "sms": self._attribute(_SMS),
            "l2": self._attribute(_L2),
            "memory": self.get("cuDeviceTotalMem_v2", ctypes.c_size_t, self.number),
            "driver": self.get("cuDriverGetVersion", ctypes.c_int),
        }

    def _attribute(self, which: int) -> int:
        return int(self.get("cuDeviceGetAttribute", ctypes.c_int, which, self.number))

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            MemoryError: the device has not as much memory.
            RuntimeError: it failed otherwise. What a kernel has done wrong shows in whichever function is called next.
        """
        error = self._functions[function](*arguments)
        if error:
            name = ctypes.c_char_p()
            self._functions["cuGetErrorName"](error, ctypes.byref(name))
            text = f"{function}: the CUDA driver reported {(name.value or b'').decode() or error}"
            raise MemoryError(text) if error == _OUT_OF_MEMORY else RuntimeError(text)

    def get(self, function: str, kind: Any, *arguments: Any) -> Any:
        """The value, of type ``kind``, that a function writes to where its first argument points."""
        value = kind()
        self(function, ctypes.byref(value), *arguments)
        return value.value


def gpu_facts() -> dict[str, Any] | None:
    """What the first GPU is; None where there is none."""
    try:
        return Driver().facts
    except Refused:
        return None
