"""Running emulated kernels in several orders of their threads."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from convgen.lowering.lower import Lowered

ORDERS: tuple[str | int, ...] = ("ascending", "descending", 1)


def packed(lowered: Lowered, data: dict[str, Any]) -> list[Any]:
    """What ``pack`` makes of the parameters."""
    import tvm

    def bits(array: Any) -> Any:  # the compiled code takes bfloat16 as its bits
        return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array

    shapes, dtypes = lowered.spec.core.shapes, {"f32": "float32", "f16": "float16", "bf16": "uint16"}
    dtypes |= {"i8": "int8", "i32": "int32"}
    parameters = [bits(data[n].reshape(shapes[n])) for n in ("weights", "bias", "slope", "scale") if n in data]
    outs = [tvm.runtime.empty(t.shape, dtypes[t.dtype]) for t in lowered.packed]
    function = tvm.compile(tvm.IRModule({"pack": lowered.module["pack"]}), target="llvm")["pack"]
    function(*map(tvm.runtime.tensor, parameters), *outs)
    return [out.numpy() for out in outs]
