"""A network's plan run with NumPy: its steps in their order, in memory laid out as the library's is.

Convolutions are ONNX Runtime's, passes follow the rules of :mod:`convgen.network.check.bounds`; no code is generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from convgen.check.reference import run_onnxruntime
from convgen.network.check.bounds import RULES, Call, Measured
from convgen.network.graph import ROW_MAJOR, Operator
from convgen.network.operators import Pass
from convgen.network.plan import Plan, Product, Step
from convgen.problem.dtypes import BYTES
from convgen.problem.layout import BLOCKS

F64 = npt.NDArray[np.float64]


class Interpreted:
    """Memory, and what steps do to it.

    There is a number for each byte: the first of an element's bytes has it.
    """

    def __init__(self, plan: Plan, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        graph = self.graph = plan.graph
        self.plan = plan
        self.memory: dict[tuple[str, int], F64] = {("arena", 0): np.full(plan.arena, np.nan)}
        ends = [offset + graph.bytes(name) for name, offset in plan.constants.items()]
        self.memory["weights", 0] = np.full(max(ends, default=0), np.nan)
        for name, offset in plan.constants.items():
            self._at(("weights", 0), offset, name)[:] = graph.constants[name].ravel()
        for number, name in enumerate(graph.inputs):
            self.memory["input", number] = np.full(graph.bytes(name), np.nan)
            self._at(("input", number), 0, name)[:] = inputs[name].ravel()
        for number, name in enumerate(graph.outputs):
            self.memory["output", number] = np.full(graph.bytes(name), np.nan)

    def run(self) -> dict[str, F64]:
        """The outputs by the model's names."""
        for step in self.plan.steps:
            if isinstance(step.function, Product):
                self._product(step, step.function)
            else:
                self._pass(step, step.function)
        named = enumerate(zip(self.graph.names, self.graph.outputs, strict=True))
        return {
            name: self._at(("output", number), 0, tensor).reshape(self.graph.shapes[tensor])
            for number, (name, tensor) in named
        }

    def _elements(self, name: str) -> F64:
        """A tensor as it lies, to read and to write."""
        place = self.plan.places[name]
        return self._at((place.space, place.number), place.offset, name)

    def _at(self, memory: tuple[str, int], offset: int, name: str) -> F64:
        """The elements of a tensor that lies there."""
        element = BYTES[self.graph.dtype(name)]
        return self.memory[memory][offset : offset + self.graph.bytes(name) : element]

    def _product(self, step: Step, function: Product) -> None:
        spec = function.spec
        plain = spec.with_(layout=ROW_MAJOR, dst_layout=ROW_MAJOR)
        shapes = ((spec.n, spec.ic, *spec.in_spatial), (spec.n, spec.oc, *spec.out_spatial))
        layouts = (spec.layout, spec.dst_layout)
        data: dict[str, Any] = {
            what: np.ascontiguousarray(logical(self._elements(name), layout, shape), np.float32)
            for what, name, layout, shape in zip(("src", "residual"), step.inputs, layouts, shapes, strict=False)
        }
        found = np.asarray(run_onnxruntime(plain, **data, **step.parameters), np.float64)
        self._elements(step.output)[:] = physical(found, spec.dst_layout).ravel()

    def _pass(self, step: Step, function: Pass) -> None:
        known = [
            exact(logical(self._elements(name), layout, shape))
            for name, (shape, layout, _) in zip(step.inputs, function.inputs, strict=True)
        ]
        for kind, attributes, numbers, shape in function.operators:
            operands = [exact(np.array(n)) if isinstance(n, float) else known[n] for n in numbers]
            with np.errstate(all="ignore"):
                made = RULES[kind](Call(Operator("", kind, (), "", dict(attributes)), operands, shape))
            known.append(exact(np.broadcast_to(made.value, shape)))
        self._elements(step.output)[:] = physical(known[-1].value, function.output[1]).ravel()


def exact(value: F64) -> Measured:
    return Measured(value, np.zeros(value.shape))


def physical(array: F64, layout: str) -> F64:
    """A tensor of images as a layout has it."""
    if layout == ROW_MAJOR:
        return array
    if layout == "nhwc":
        return np.moveaxis(array, 1, -1)
    n, c, *pixels = array.shape
    return np.moveaxis(array.reshape(n, c // BLOCKS[layout], BLOCKS[layout], *pixels), 2, -1)


def logical(elements: F64, layout: str, shape: tuple[int, ...]) -> F64:
    """The other way round, from elements as they lie."""
    if layout == ROW_MAJOR:
        return elements.reshape(shape)
    n, c, *pixels = shape
    if layout == "nhwc":
        return np.moveaxis(elements.reshape(n, *pixels, c), -1, 1)
    block = BLOCKS[layout]
    return np.moveaxis(elements.reshape(n, c // block, *pixels, block), -1, 2).reshape(shape)
