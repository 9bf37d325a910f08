"""How far the outputs of a quantised model may be from ONNX Runtime's: not at all, or by a step of what stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto

from ...check.bounds import apart
from ...check.reference import run_onnxruntime
from ...formats.onnx.constants import ROOTS
from ...measure.network_model import F32_ERROR
from ...problem.dtypes import LONG_RANGES, RANGES, numpy_dtype
from ..graph import Convolution, Graph, Operator
from .bounds import RULES, Call, Measured

Arrays = Mapping[str, npt.NDArray[Any]]

#: Operators whose results are the same to the last bit wherever they are computed: sums are of integers, and f32 is
#: rounded once, from integers that are known, or kept as it is.
_EXACT = frozenset({"QLinearConv", "ConvInteger", "MatMulInteger", "QuantizeLinear", "DequantizeLinear", "Cast"})
_EXACT |= {"MaxPool", "Relu", "Clip", "Max", "Min", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat"}
_EXACT |= {"Split", "Slice", "Gather", "Pad", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Identity", "Constant"}
_EXACT |= {"Shape"}
#: Operators of a network that hand on elements of their operands.
_KEEPING = frozenset({"identity", "reshape", "transpose", "slice", "concat", "expand", "cast"})
#: Roundings of a step that is computed in f32.
_ROUNDED = 1 + 2.0**-16


def quantises(graph: Graph) -> bool:
    """Whether something in a graph is rounded to integers."""
    return any(
        node.kind == "quantise" if isinstance(node, Operator) else node.spec.is_quantised for node in graph.nodes
    )


def is_exact(source: str | Path | ModelProto) -> bool:
    """Whether a model has nothing but operators that are exact everywhere."""
    model = source if isinstance(source, ModelProto) else onnx.load(source, load_external_data=False)
    nodes = model.graph.node
    return not model.functions and all(node.op_type in _EXACT and node.domain in ROOTS for node in nodes)


def step_of(graph: Graph, name: str) -> float | None:
    """The distance of two neighbours among the numbers that a tensor may have, the largest of several; None where it
    is not of integers, nor dequantised from such.
    """
    if graph.dtype(name) in (*RANGES, "i32"):
        return 1.0
    node = graph.producers().get(name)
    if not isinstance(node, Operator) or not node.inputs:
        return None
    if node.kind == "dequantise":
        scale = graph.constants.get(node.inputs[1])
        return None if scale is None else float(np.abs(scale).max(initial=0.0))
    if node.kind not in _KEEPING:
        return None
    steps = [step_of(graph, given) for given in node.inputs]
    return None if None in steps else max(step for step in steps if step is not None)


@dataclass(frozen=True)
class Differences:
    """What outputs differ by.

    Attributes:
        count, of: elements that differ, and all.
        share: the largest difference as a share of what is allowed of its output; infinite where none is.
        text: for people.
    """

    count: int
    of: int
    share: float
    text: str


def differences(graph: Graph, found: Arrays, expected: Arrays, exact: bool) -> Differences:
    """How far the outputs of a graph, as it was read, are from what is expected.

    Args:
        exact: they must be the same; else they may be a step apart, and those without steps as floats may be.
    """
    count, of, share, steps, rest = 0, 0, 0.0, 0.0, 0.0
    for name, tensor in zip(graph.names, graph.outputs, strict=True):
        a, b = (np.asarray(given[name], np.float64) for given in (found, expected))
        if a.shape != b.shape:
            return Differences(1, 1, np.inf, f"{name}: expected shape {b.shape}, found {a.shape}")
        error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        error = np.where(np.isnan(error), np.inf, error)
        largest, step = float(error.max(initial=0.0)), step_of(graph, tensor)
        count, of = count + int((error > 0).sum()), of + error.size
        if step is not None and largest:
            steps = max(steps, largest / step if step else np.inf)
            share = max(share, largest / (step * _ROUNDED) if step else np.inf)
        elif largest:
            far = apart(np.asarray(found[name]), np.asarray(expected[name]))
            rest, share = max(rest, far), max(share, far / F32_ERROR)
    how = [f"by up to {steps:.3g} steps, 1 is allowed"] if steps else []
    how += [f"by up to {rest:.1e} of the largest element, {F32_ERROR} is allowed"] if rest else []
    text = f"{count} of {of} values differ" + "".join(f", {one}" for one in (["none may"] if exact else how))
    return Differences(count, of, (np.inf if count else 0.0) if exact else share, text)


# ---- what is defined ---------------------------------------------------------------------------

#: Operators that are rounded to f32 once.
_ROUNDED_ONCE: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "dequantise": lambda x, scale, zero=0.0: (x - zero) * scale,
}


def defined(graph: Graph, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
    """A graph's outputs by its names, computed step by step as integers and f32 are defined: convolutions by ONNX
    Runtime's, each by itself.
    """
    known: dict[str, npt.NDArray[Any]] = {**graph.constants, **inputs}
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            operands = [known[name] for name in node.inputs]
            found = _convolved(node, operands) if isinstance(node, Convolution) else _operated(graph, node, operands)
            array = found.reshape(graph.shapes[node.output])
            known[node.output] = np.asarray(array, numpy_dtype(graph.dtype(node.output)))
    return {name: known[tensor] for name, tensor in zip(graph.names, graph.outputs, strict=True)}


def _convolved(node: Convolution, operands: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    spec, names = node.spec, ("src", "residual")
    data: dict[str, Any] = {
        name: np.asarray(array.reshape(spec.shapes[name]), numpy_dtype(spec.dtypes[name]))
        for name, array in zip(names, operands, strict=False)
    }
    return run_onnxruntime(spec, **data | dict(node.parameters))


def _operated(graph: Graph, node: Operator, operands: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    shape = graph.shapes[node.output]
    floats = [np.asarray(array, np.float32) for array in operands]
    once = len(floats) == 2 or node.kind == "dequantise"
    if once and node.kind in _ROUNDED_ONCE and graph.dtype(node.output) == "f32":
        return np.asarray(_ROUNDED_ONCE[node.kind](*floats))
    if node.kind == "quantise":
        steps, zero = np.rint(floats[0] / floats[1]), floats[2] if len(floats) > 2 else np.float32(0)
        return np.asarray(np.clip(steps + zero, *(RANGES | LONG_RANGES)[node.attributes["dtype"]]))
    given = [Measured(np.asarray(array, np.float64), np.zeros(array.shape)) for array in operands]
    return np.broadcast_to(RULES[node.kind](Call(node, given, shape)).value, shape)
