"""The C interface of candidates' libraries and of the library that compares outputs, for ctypes: ``runtime/types.h``,
``runtime/cuda_types.h`` and ``runtime/check.c``.
"""

from __future__ import annotations

import ctypes
from typing import Any

#: The C code of each storage type, for the comparison.
DTYPES = {"f32": 0, "f16": 1, "bf16": 2, "i8": 3, "u8": 4}
#: Bytes of an element of each.
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i8": 1, "u8": 1}
PARAMETERS = ("weights", "bias", "slope", "scale", "src_zero", "weights_zero", "dst_zero", "sum")
NO_MEMORY = 7  # enum convgen_status
NO_IMAGE, DRIVER_ERROR = 34, 35  # enum convgen_cuda_status
_ALIGNMENT = 64


def _fields(*names: str) -> list[tuple[str, Any]]:
    return [field for name in names for field in ((name, ctypes.c_void_p), (name + "_size", ctypes.c_size_t))]


class Sizes(ctypes.Structure):
    """Bytes of every buffer."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("src", *PARAMETERS, "residual", "dst", "packed", "workspace")]


class PackArgs(ctypes.Structure):
    _fields_ = [*_fields(*PARAMETERS, "packed"), ("pool", ctypes.c_void_p)]


class RunArgs(ctypes.Structure):
    _fields_ = [*_fields("src", "packed", "residual", "dst", "workspace"), ("pool", ctypes.c_void_p)]


class GpuRunArgs(ctypes.Structure):
    _fields_ = [*_fields("src", "packed", "residual", "dst", "workspace"), ("stream", ctypes.c_void_p)]


class Difference(ctypes.Structure):
    _fields_ = [
        ("wrong", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("expected", ctypes.c_double),
        ("found", ctypes.c_double),
    ]


def pass_tensors(args: ctypes.Structure, sizes: Sizes, data: dict[str, Any], *names: str) -> None:
    """Put the addresses and sizes of those tensors that there are into a function's arguments.

    Raises:
        RuntimeError: one has another size than the library expects.
    """
    for name in names:
        if name in data:
            if len(data[name]) != getattr(sizes, name):
                raise RuntimeError(f"{name}: expected {getattr(sizes, name)} bytes, found {len(data[name])}")
            setattr(args, name, ctypes.addressof(data[name]))
            setattr(args, name + "_size", getattr(sizes, name))


def aligned(size: int) -> ctypes.c_void_p:
    """The address of ``size`` bytes at a multiple of 64; the memory lives as long as the process."""
    memory = (ctypes.c_char * (size + _ALIGNMENT))()
    _memory.append(memory)
    return ctypes.c_void_p(-(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT)


_memory: list[Any] = []
