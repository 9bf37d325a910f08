"""Nodes of integers themselves, that nothing dequantises: bounds and casts of them, and products of two that are
computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from onnx import TensorProto

from ..formats.onnx.halves import HALVES
from ..problem.dtypes import RANGES
from .node import DTYPES, LONG_DTYPES, Reading, Refusal
from .nodes import READERS, end_product

#: Types of whole numbers that a Cast gives.
_WHOLE = {number: dtype for number, dtype in DTYPES.items() if dtype != "f32"}
#: The least and the largest number of the types that have bounds.
_RANGES = {**RANGES, "i32": (-(1 << 31), (1 << 31) - 1)}


_Reader: TypeAlias = Callable[[Reading], None]


def _bounded(bounds: Callable[[Reading], tuple[float, float]], read_f32: _Reader) -> _Reader:
    """Relu or Clip: of integers between two of them; else as it would be read."""

    def read(r: Reading) -> None:
        source = r.input()
        if (dtype := r.graph.dtype(source)) not in _RANGES:
            return read_f32(r)
        least, most = _RANGES[dtype]
        low, high = bounds(r)
        if not low <= high:
            raise Refusal(f"bounds {low} and {high}")
        kept = (int(min(max(bound, least), most)) for bound in (low, high))
        return r.end("clamp", [source], **dict(zip(("low", "high"), kept, strict=True)))

    return read


def _clip(r: Reading) -> tuple[float, float]:
    return r.number(1, "min", -math.inf), r.number(2, "max", math.inf)


def _cast(r: Reading) -> None:
    """Between f32, integers and truth values, which are 0 and 1 here, and f16 or bf16. What is no number of the wanted
    type, ONNX leaves open where it was f32: the nearest that there is; of an integer the lowest bits are kept.
    """
    source, wanted = r.input(), r.get("to")
    dtype, given = r.graph.dtype(source), r.scope.dtype(r.given(0))
    if wanted in _WHOLE and dtype != "f32":
        return r.end("wrap", [source], dtype=_WHOLE[wanted])
    if wanted in _WHOLE and (given in (TensorProto.FLOAT, TensorProto.BOOL) or _WHOLE[wanted] == "i32"):
        return r.end("truncate", [source], dtype=_WHOLE[wanted])
    if wanted == TensorProto.FLOAT and dtype != "f32":
        return r.end("cast", [source])
    if wanted in HALVES:
        return r.end("cast", [source], dtype=HALVES[wanted])
    if wanted not in (TensorProto.FLOAT, TensorProto.BOOL) or dtype != "f32":
        known = f"{', '.join(DTYPES.values())} and truth values are supported"
        raise Refusal(f"a cast from {_named(given)} to {_named(wanted)}; between {known}")
    if wanted == TensorProto.BOOL and given in (TensorProto.FLOAT, *LONG_DTYPES):
        return r.end("not_equal", [source, r.constant(0.0, "zero")])
    return r.end("identity", [source])


def _named(dtype: int) -> str:
    return str(TensorProto.DataType.Name(dtype).lower())


def computed_product(r: Reading) -> None:
    """MatMulInteger of two operands that are computed, or have more than two axes: sums of products, i32."""
    operands = []
    for place in (0, 1):
        value = r.add("wrap", [r.input(place)], r.shape(r.given(place)), dtype="i32")
        if zero := r.given(place + 2):
            value = r.add("sub", [value, _zero(r, zero, place, value)], r.shape(value))
        operands.append(value)
    end_product(r, *operands)


def _zero(r: Reading, name: str, place: int, operand: str) -> str:
    """A zero point as i32, which is broadcast to its operand: of each row of the first, each column of the second."""
    zero, shape = r.tensor(name), r.shape(name)
    axes = (1,) * (len(r.shape(operand)) > 1)
    if math.prod(shape) > 1 and len(shape) == 1 and place == 0:
        zero, shape = r.add("reshape", [zero], (*shape, *axes)), (*shape, *axes)
    return r.add("wrap", [zero], shape, dtype="i32")


READ_WHOLE: Mapping[str, _Reader] = {
    "Relu": _bounded(lambda r: (0.0, math.inf), READERS["Relu"]),
    "Clip": _bounded(_clip, READERS["Clip"]),
    "Cast": _cast,
}
