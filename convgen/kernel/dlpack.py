"""Where other frameworks' arrays lie and what they hold: DLPack's structs (dlpack.h, version 1), through ctypes."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

from ..errors import KernelError
from ..lowering.interface import TensorInfo

#: DLPack's device types whose memory kernels reach: a device's own, and managed memory.
CUDA_DEVICES = frozenset({2, 13})
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8", "i32": "int32"}
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


class _Device(Structure):
    _fields_ = [("type", c_int32), ("id", c_int32)]


class DataType(Structure):
    """``DLDataType``."""

    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class _Tensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", _Device),
        ("ndim", c_int32),
        ("dtype", DataType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class _Versioned(Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", _Tensor),
    ]


_name: Any = ctypes.pythonapi.PyCapsule_GetName
_name.argtypes, _name.restype = (ctypes.py_object,), c_char_p
_pointer: Any = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = (ctypes.py_object, c_char_p), c_void_p


class View(NamedTuple):
    """An array in device memory.

    Attributes:
        strides: in elements.
        capsule: keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    writable: bool
    capsule: object

    def check(self, info: TensorInfo, alignment: int) -> None:
        """Raise KernelError unless it is what the kernel reads or writes."""
        if self.shape != info.shape:
            raise KernelError(f"{info.name}: expected shape {info.shape}, found {self.shape}")
        if self.dtype != _DTYPES[info.dtype]:
            raise KernelError(f"{info.name}: expected dtype {_DTYPES[info.dtype]}, found {self.dtype}")
        if not self._contiguous:
            raise KernelError(f"{info.name}: expected a C-contiguous array, found strides {self.strides} (elements)")
        if info.bytes and self.address % alignment:
            raise KernelError(
                f"{info.name}: expected an address that is a multiple of {alignment}, found {self.address:#x}"
            )

    @property
    def _contiguous(self) -> bool:
        dense = _dense(self.shape)
        if self.strides == dense or 0 in self.shape:
            return True
        return all(
            size == 1 or found == step for size, found, step in zip(self.shape, self.strides, dense, strict=True)
        )


def pending(array: Any) -> str | None:
    """Which bit of PyTorch's says that a tensor's values are not those in its memory, if one does.

    ``neg`` says that the sign is to change, ``conj`` that the values are conjugates: views have them, and DLPack tells
    nothing of the first.
    """
    return next((bit for bit in ("conj", "neg") if getattr(array, f"is_{bit}", bool)()), None)


def check_memory_has_values(name: str, array: Any) -> None:
    """Raise KernelError where a tensor's values are not those in its memory."""
    if bit := pending(array):
        raise KernelError(
            f"{name}: expected a tensor whose values are in its memory, found one with PyTorch's {bit} bit; "
            f"resolve_{bit}() gives such a tensor"
        )


def view(name: str, array: Any, ordinal: int, stream: int) -> View:
    """An array of another framework that is ready for use on a stream of a device.

    Raises:
        KernelError: it has no DLPack, or is not in that device's memory, or that memory has not its values.
    """
    check_memory_has_values(name, array)
    kind = type(array).__name__
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        raise KernelError(f"{name}: expected an array on a CUDA device with __dlpack__, found {kind}")
    device_type, device = (int(number) for number in array.__dlpack_device__())
    if device_type not in CUDA_DEVICES:
        raise KernelError(f"{name}: expected an array on CUDA device {ordinal}, found {kind} of {_place(device_type)}")
    if device != ordinal:
        raise KernelError(f"{name}: expected an array on CUDA device {ordinal}, found one on CUDA device {device}")
    try:
        capsule = _export(array, stream or 1)  # 1 is DLPack's word for the default stream, whose handle is 0
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise KernelError(f"{name}: expected an array that can be shared, found {kind}: {error}") from error
    return _read(name, capsule)


def _place(device_type: int) -> str:
    return "the CPU" if device_type == 1 else f"DLPack device type {device_type}"


def _export(array: Any, stream: int) -> object:
    try:
        return array.__dlpack__(stream=stream, max_version=(1, 0))
    except TypeError:  # from before version 1
        return array.__dlpack__(stream=stream)


def _read(name: str, capsule: object) -> View:
    """The array in a capsule. It still belongs to the capsule, whose owner frees it."""
    tensor, writable = _struct(name, capsule)
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else _dense(shape)
    address = (tensor.data or 0) + tensor.byte_offset
    return View(address, shape, strides, _dtype(tensor.dtype), writable, capsule)


def _struct(name: str, capsule: object) -> tuple[_Tensor, bool]:
    """The struct in a capsule, and whether its memory may be written."""
    try:
        kind = _name(capsule)
    except ValueError:
        raise KernelError(f"{name}: expected a DLPack capsule, found {type(capsule).__name__}") from None
    if kind == b"dltensor_versioned":
        versioned = _Versioned.from_address(_pointer(capsule, kind))
        if versioned.major != 1:
            raise KernelError(f"{name}: expected DLPack version 1, found {versioned.major}")
        return versioned.tensor, not versioned.flags & _READ_ONLY
    if kind == b"dltensor":
        return _Tensor.from_address(_pointer(capsule, kind)), True
    raise KernelError(f"{name}: expected a DLPack capsule, found {kind!r}")


class Relabelled:
    """An array whose DLPack says of its elements that they are of another kind, of the same size.

    Args:
        array: anything with DLPack.
        code: DLPack's code of the type: 0 of integers, 4 of bfloat.
    """

    def __init__(self, array: Any, code: int) -> None:
        self._array, self._code = array, code

    def __dlpack_device__(self) -> tuple[int, int]:
        found: tuple[int, int] = self._array.__dlpack_device__()
        return found

    def __dlpack__(self, **options: Any) -> object:
        capsule: object = self._array.__dlpack__(**options)
        tensor, _ = _struct("array", capsule)  # made for this call
        tensor.dtype.code = self._code
        return capsule


@functools.lru_cache(maxsize=1024)
def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _dtype(dtype: DataType) -> str:
    """A type's name, as NumPy has it."""
    lanes = f"x{dtype.lanes}" if dtype.lanes != 1 else ""
    return f"{_CODES.get(dtype.code, f'type {dtype.code} of ')}{dtype.bits}{lanes}"
