"""Arrays that callers give and get: NumPy's, and those of any framework with DLPack, in memory that the CPU reads.

DLPack is how frameworks share memory. NumPy's own reader of it does not know bfloat16, so an array of that type goes
through it as 16-bit integers, in either direction.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import KernelError
from ..lowering.interface import TensorInfo
from ..problem.dtypes import BYTES, RANGES, UNIT_ROUNDOFF, narrow, numpy_dtype
from .dlpack import Relabelled, check_memory_has_values, pending

Array: TypeAlias = NDArray[Any]

_CPU_DEVICES = {1: "cpu", 3: "cuda_host"}  # DLPack's device types whose memory the CPU reads
_INT, _BFLOAT = 0, 4  # DLPack's codes of types


def as_array(name: str, value: object, *, written: bool = False) -> Array:
    """``value`` as an array that shares its memory: a NumPy array, or anything with DLPack.

    A tensor of PyTorch whose memory has its values' opposites, as ``z.conj().imag`` has, is copied.

    Raises:
        KernelError: it is neither, is in another memory, or is read-only where it is to be ``written``.
    """
    if isinstance(value, np.ndarray):
        return value
    kind = type(value).__name__
    if not hasattr(value, "__dlpack__"):
        raise KernelError(f"{name}: expected a NumPy array or one with __dlpack__, found {kind}")
    while bit := pending(value):
        value = getattr(value, f"resolve_{bit}")()
    is_bfloat16 = "bfloat16" in str(getattr(value, "dtype", ""))
    try:
        device = int(value.__dlpack_device__()[0]) if hasattr(value, "__dlpack_device__") else 1
        if device in _CPU_DEVICES:
            array: Array = np.from_dlpack(Relabelled(value, _INT) if is_bfloat16 else value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise KernelError(f"{name}: expected an array NumPy can share, found {kind}: {error}") from error
    if device not in _CPU_DEVICES:
        raise KernelError(f"{name}: expected an array in CPU memory, found DLPack device type {device}")
    if written and not array.flags.writeable:
        raise KernelError(f"{name}: expected writable memory, found {kind}, shared read-only")
    return array.view(numpy_dtype("bf16")) if is_bfloat16 else array


def values(name: str, value: object) -> Array:
    """As :func:`as_array`; a tensor that PyTorch would compute gradients for counts as its values."""
    if getattr(value, "requires_grad", False) and hasattr(value, "detach"):
        value = value.detach()
    return as_array(name, value)


def returned(array: Array, given: object) -> Any:
    """An array as what the caller gave is one: a tensor of PyTorch, say, which shares its memory."""
    if isinstance(given, np.ndarray):
        return array
    if hasattr(given, "__array_namespace__"):  # the array API's standard
        framework: Any = given.__array_namespace__()
        converters = [getattr(framework, "from_dlpack", None)]
    else:  # a class of the user's derives from one of its framework
        roots = dict.fromkeys(cls.__module__.partition(".")[0] for cls in type(given).__mro__)
        converters = [getattr(sys.modules.get(root), "from_dlpack", None) for root in roots]
    convert = next(filter(None, converters), None)
    if convert is None:
        return array
    is_bfloat16 = array.dtype.kind == "V"  # the only type here that is not NumPy's own
    return convert(Relabelled(array.view(np.int16), _BFLOAT) if is_bfloat16 else array)


def drawn(rng: np.random.Generator, info: TensorInfo) -> Array:
    """Random elements of a tensor: standard normal ones, 8 bits of integers, truth values."""
    dtype = numpy_dtype(info.dtype)
    if info.dtype in UNIT_ROUNDOFF:
        return narrow(rng.standard_normal(info.shape, np.float32), info.dtype)
    low, high = {**RANGES, "bool": (0, 1)}.get(info.dtype, RANGES["i8"])
    return rng.integers(low, high, info.shape, np.int32, endpoint=True).astype(dtype)


def in_place(info: TensorInfo, value: object, *, written: bool = False) -> Array:
    """``value`` as the array that the kernel reads or writes where it is.

    Raises:
        KernelError: it is no such array.
    """
    check_memory_has_values(info.name, value)
    array = as_array(info.name, value, written=written)
    _check_values(info, array)
    name, flags = info.name, array.flags
    if not flags.c_contiguous:
        raise KernelError(f"{name}: expected a C-contiguous array, found strides {array.strides}")
    if not flags.aligned:
        element = BYTES[info.dtype]
        raise KernelError(f"{name}: expected an address that is a multiple of {element}, found {array.ctypes.data:#x}")
    if written and not flags.writeable:
        raise KernelError(f"{name}: expected writable memory, found a read-only array")
    return array


def readable(info: TensorInfo, value: object) -> Array:
    """``value`` as the kernel reads it: where it is if it lies so, else as a copy that does.

    Raises:
        KernelError: it is no array in CPU memory, or its shape or dtype is another one.
    """
    array = as_array(info.name, value)
    _check_values(info, array)
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy(order="C")


def _check_values(info: TensorInfo, array: Array) -> None:
    if array.shape != info.shape:
        raise KernelError(f"{info.name}: expected shape {info.shape}, found {array.shape}")
    if array.dtype != (dtype := numpy_dtype(info.dtype)):
        raise KernelError(f"{info.name}: expected dtype {dtype.name} in native byte order, found {_dtype_text(array)}")


def _dtype_text(array: Array) -> str:
    """A dtype's name; in the other byte order NumPy's code, which says the order too."""
    return array.dtype.name if array.dtype.isnative else array.dtype.str
