"""Packs the weights of a network's convolutions by the code that each kernel brings for that."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BuildError
from ..kernel.dlpack import DataType
from ..kernel.library import Bytes, aligned
from ..kernel.mapped import open_library
from ..lowering.entry import DLPACK_DTYPES
from ..lowering.interface import MAX_THREADS, TensorInfo, boundary, round_up
from ..lowering.link import link_packers
from ..problem.dtypes import numpy_dtype
from ..problem.spec import PARAMETERS
from .graph import Array
from .plan import Product
from .weights import Compiled

_NAME = "packers"


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("ndim", c_int32),
        ("dtype", DataType),
        ("shape", POINTER(c_int64)),
        ("bytes", c_size_t),
        ("offset", c_size_t),
    ]


class Packers:
    """The packing functions of a network's convolutions, linked and loaded; they use all CPUs there are to run on.

    Args:
        compiled: each convolution's code.
        folder: that libraries can be loaded from.

    Raises:
        BuildError: the C compiler failed.
    """

    def __init__(self, compiled: Mapping[Product, Compiled], folder: Path) -> None:
        self._compiled, self._threads = compiled, min(len(os.sched_getaffinity(0)), MAX_THREADS)
        self._numbers = {product: number for number, product in enumerate(compiled)}
        if compiled:
            objects = [made.packer or made.object_file for made in compiled.values()]
            library = open_library(str(link_packers(_NAME, objects, folder / f"lib{_NAME}.so")))
            self._pack = library[f"{_NAME}_pack"]
            self._pack.argtypes = (c_int, POINTER(_Tensor), POINTER(c_void_p), c_int, c_int)

    def pack(self, product: Product, parameters: Mapping[str, Any]) -> Bytes:
        """A convolution's packed tensors, each at a multiple of 64 bytes, one after another; between them zeros.

        Args:
            parameters: as the spec has them; a number of elements that are all the same may be given as one.

        Raises:
            BuildError: a parameter is missing, or not as the spec says; or there is no memory.
        """
        spec, packed = product.spec.core, self._compiled[product].packed
        tensors = boundary(spec)
        given = [(tensors[name], _parameter(name, tensors[name], parameters)) for name in PARAMETERS if name in tensors]
        data = aligned(sum(round_up(info.bytes) for info in packed))
        arguments = [(info, array.ctypes.data) for info, array in given]
        begin = 0
        for info in packed:
            arguments.append((info, data.ctypes.data + begin))
            data[begin + info.bytes : begin + round_up(info.bytes)] = 0
            begin += round_up(info.bytes)
        described = (_Tensor * len(arguments))(*(_tensor(info) for info, _ in arguments))
        addresses = (c_void_p * len(arguments))(*(address for _, address in arguments))
        if self._pack(self._numbers[product], described, addresses, len(arguments), self._threads):
            raise BuildError(f"{product.spec.descriptor}: its weights cannot be packed: there is no memory")
        return data


def _parameter(name: str, info: TensorInfo, parameters: Mapping[str, Any]) -> Array:
    dtype, count = numpy_dtype(info.dtype), int(np.prod(info.shape))
    array = np.asarray(parameters.get(name))
    if array.dtype != dtype or array.size not in (1, count):
        raise BuildError(f"{name}: expected {count} elements of {dtype}, found {array.size} of {array.dtype}")
    return np.ascontiguousarray(array if array.size == count else np.full(count, array.reshape(()), dtype))


def _tensor(info: TensorInfo) -> _Tensor:
    shape: Sequence[int] = info.shape
    return _Tensor(len(shape), DataType(*DLPACK_DTYPES[info.dtype]), (c_int64 * len(shape))(*shape), info.bytes, 0)
