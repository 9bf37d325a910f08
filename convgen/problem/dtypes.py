"""Storage types of tensors: their names, sizes, rounding, and NumPy forms.

How a layer's tensors are stored follows from its spec's dtype (:attr:`~convgen.problem.spec.ConvSpec.dtypes`).
Arithmetic is float32 whatever the storage, and dst is rounded once, at the end; of i8, sums of products are 32-bit
integers.

This module needs the standard library only; NumPy (and ml_dtypes, for bf16) are imported where used.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Bytes of one element.
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i8": 1, "u8": 1, "i32": 4, "i64": 8, "bool": 1}
#: What a spec's dtype may be.
DTYPES = ("f32", "f16", "bf16", "i8")
#: What the tensors of a layer of 8-bit integers may be.
QUANTISED = {"src": ("i8", "u8"), "weights": ("i8", "u8"), "dst": ("i8", "u8", "i32", "f32"), "residual": ("i8", "u8")}
#: The least and the largest number of the types that results are rounded to.
RANGES = {"i8": (-128, 127), "u8": (0, 255)}
#: The same of integers of 16 bits, which networks keep in f32: it has them all.
LONG_RANGES = {"i16": (-(1 << 15), (1 << 15) - 1), "u16": (0, (1 << 16) - 1)}
#: Half the distance from 1 to the next number: the largest relative error of rounding to it.
UNIT_ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
#: The largest absolute error of rounding numbers so small that they lose digits (subnormal ones).
UNDERFLOW = {"f32": 2.0**-150, "f16": 2.0**-25, "bf16": 2.0**-134}
#: The largest number.
LARGEST = {"f32": (2 - 2.0**-23) * 2.0**127, "f16": 65504.0, "bf16": (2 - 2.0**-7) * 2.0**127}
#: Up to which whole numbers are f32.
EXACT = 1 << 24
#: What sums are kept in.
ACCUMULATOR = "f32"

_NUMPY = {
    "f32": "float32",
    "f16": "float16",
    "i8": "int8",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
    "bool": "bool",
}


@functools.cache
def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """NumPy's type; ml_dtypes' bfloat16, which NumPy lacks."""
    import numpy as np

    if dtype == "bf16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(_NUMPY[dtype])


def narrow(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """The array rounded to nearest, ties to even, as ``dtype``; itself where it is that already."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinity
        return array.astype(numpy_dtype(dtype), copy=False)


def widen(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The array as float32, which holds every value that src and dst can have; a float32 array itself."""
    import numpy as np

    return array.astype(np.float32, copy=False)


def distance(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """``|found - expected|`` in float32, and 0 where they are equal, infinities included."""
    import numpy as np

    a, b = widen(found), widen(expected)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(a == b, np.float32(0), np.abs(a - b))


def save(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array as ``.npy``, as its bits: NumPy's format does not know bfloat16."""
    import numpy as np

    np.save(path, array.reshape(-1).view(f"u{array.itemsize}").reshape(array.shape))


def load(path: Path, dtype: str) -> npt.NDArray[Any]:
    """What :func:`save` wrote."""
    import numpy as np

    bits = np.load(path)
    array: npt.NDArray[Any] = bits.reshape(-1).view(numpy_dtype(dtype)).reshape(bits.shape)
    return array
