"""What is computed between 8-bit integers, in steps of them: numbers are multiplied where a graph dequantises, scales
and divides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..formats.onnx.quantised import stored_activation
from ..lowering.requantise import CLAMPS
from ..problem.activation import Activation
from ..problem.dtypes import RANGES
from .graph import F32, Array, Graph, Node, Operator
from .integers import is_of_tensor, operator_alone, scale_and_zero
from .kinds import KINDS

#: Of so many neighbouring numbers of f32 a shift is looked for, on either side.
_NEIGHBOURS = 64
#: Numbers below this have the neighbours of one of its size.
_SMALL = np.float32(2.0**-20)


def dequantise_apart(graph: Graph) -> None:
    """Each operator that computes its operands' elements with its own dequantises for itself: to read bytes once more
    takes less than to write, and read, four times as many.
    """
    for node in list(graph.nodes):
        if not isinstance(node, Operator) or node.kind != "dequantise" or node.output in graph.outputs:
            continue
        readers = list({id(user): user for user in graph.users()[node.output]}.values())
        apart = [user for user in readers if isinstance(user, Operator) and _takes_in(user)]
        for user in apart if len(apart) < len(readers) else apart[1:]:
            name = graph.fresh(f"{node.output}/again")
            graph.shapes[name] = graph.shapes[node.output]
            inputs = tuple(name if given == node.output else given for given in user.inputs)
            changed = {id(user): dataclasses.replace(user, inputs=inputs)}
            graph.nodes = [changed.get(id(other), other) for other in graph.nodes]
            graph.nodes.append(dataclasses.replace(node, output=name))
    graph.order()


def _takes_in(node: Operator) -> bool:
    return KINDS[node.kind].elementwise or KINDS[node.kind].moves


class _Scaled(NamedTuple):
    """What is dequantised, scaled and shifted by channels, and quantised: its operators, and the activation between."""

    dequantise: Operator
    scale_shift: Operator
    activation: str
    quantise: Operator


def scale_in_steps(graph: Graph) -> None:
    """What is dequantised, scaled and shifted by channels, and quantised, is scaled and shifted once, from steps of the
    one to steps of the other, where that gives the same for all numbers: a division takes as long as ten products.
    """
    producers = graph.producers()
    for node in list(graph.nodes):
        if (scaled := _scaled(graph, producers, node)) is None:
            continue
        stored = graph.dtype(scaled.dequantise.inputs[0])
        scale, shift = (graph.constants[name] for name in scaled.scale_shift.inputs[1:])
        by_steps = _Steps(
            (scale.reshape(-1), shift.reshape(-1)),
            (scale_and_zero(graph, scaled.dequantise), scale_and_zero(graph, scaled.quantise)),
            (stored, scaled.quantise.attributes["dtype"]),
            scaled.activation,
        )
        if (found := by_steps.found()) is not None:
            _replace(graph, scaled, by_steps.stored_activation, [part.reshape(scale.shape) for part in found])
    graph.order()


def _scaled(graph: Graph, producers: Mapping[str, Node], node: Node) -> _Scaled | None:
    if not isinstance(node, Operator) or node.kind != "quantise" or not is_of_tensor(graph, node):
        return None
    made, activation = operator_alone(graph, producers, node.inputs[0]), "none"
    if made is not None and made.kind == "activate":
        activation, made = made.attributes["activation"], operator_alone(graph, producers, made.inputs[0])
    if made is None or made.kind != "scale_shift" or Activation.parse(activation).name not in CLAMPS:
        return None
    source = operator_alone(graph, producers, made.inputs[0])
    if source is None or source.kind != "dequantise" or not is_of_tensor(graph, source):
        return None
    known = all(name in graph.constants for name in made.inputs[1:])
    by_channel = known and len({graph.constants[name].shape for name in made.inputs[1:]}) == 1
    return _Scaled(source, made, activation, node) if by_channel and graph.dtype(source.inputs[0]) in RANGES else None


def _replace(graph: Graph, scaled: _Scaled, activation: str, vectors: list[F32]) -> None:
    dequantise, scale_shift, _, quantise = scaled
    names = []
    for what, array in zip(("step", "scale", "shift"), (np.ones((), np.float32), *vectors), strict=True):
        names.append(graph.fresh(f"{quantise.output}/{what}"))
        graph.shapes[names[-1]], graph.constants[names[-1]] = array.shape, array
    step, *by_channel = names
    # The activation between, if there is one, is no longer read.
    bounded = scale_shift.output if activation == "none" else graph.fresh(f"{quantise.output}/bounded")
    made = [
        dataclasses.replace(dequantise, inputs=(dequantise.inputs[0], step)),
        dataclasses.replace(scale_shift, inputs=(scale_shift.inputs[0], *by_channel)),
        dataclasses.replace(quantise, inputs=(bounded, step, *quantise.inputs[2:])),
    ]
    if activation != "none":
        graph.shapes[bounded] = graph.shapes[quantise.output]
        made.append(Operator(quantise.name, "activate", (scale_shift.output,), bounded, {"activation": activation}))
    outputs = {node.output for node in made}
    graph.nodes = [node for node in graph.nodes if node.output not in outputs] + list[Node](made)


class _Steps(NamedTuple):
    """Numbers of 8 bits that become such by channels.

    Attributes:
        vectors: scale and shift of each channel, f32.
        ends: the scale and zero point of the numbers before and after.
        dtypes: their types.
        activation: before they are rounded.
    """

    vectors: tuple[F32, F32]
    ends: tuple[tuple[np.float32, int], tuple[np.float32, int]]
    dtypes: tuple[str, str]
    activation: str

    @property
    def stored_activation(self) -> str:
        """The activation in steps of what is stored."""
        return stored_activation(self.activation, *self.ends[1], self.dtypes[1])

    def found(self) -> tuple[F32, F32] | None:
        """A scale and a shift of each channel, from steps to steps, that give what the graph's do for all numbers,
        whether product and sum are rounded together or one after the other; None where there are none.
        """
        (scale, shift), ((first, zero), (last, _)) = self.vectors, self.ends
        low, high = RANGES[self.dtypes[0]]
        numbers = np.arange(low, high + 1).astype(np.float32)
        with np.errstate(all="ignore"):
            real = (numbers - np.float32(zero)) * first * scale[:, None] + shift[:, None]
            wanted = self._rounded(real / last)
            factor = np.float64(first) * scale / last
            begin = (shift - zero * np.float64(first) * scale) / last
            factors, shifts = factor.astype(np.float32), begin.astype(np.float32)
            if not (np.isfinite(factors).all() and np.isfinite(shifts).all() and np.isfinite(real).all()):
                return None
            near = np.spacing(np.maximum(abs(shifts), _SMALL))
            left = np.arange(len(scale))
            for away in sorted(range(-_NEIGHBOURS, _NEIGHBOURS + 1), key=abs):
                tried = shifts[left] + np.float32(away) * near[left]
                products = numbers.astype(np.float64) * factors[left, None]
                together = (products + tried[:, None]).astype(np.float32)
                apart = products.astype(np.float32) + tried[:, None]
                fits = [(self._rounded(value) == wanted[left]).all(axis=1) for value in (together, apart)]
                shifts[left[fits[0] & fits[1]]] = tried[fits[0] & fits[1]]
                left = left[~(fits[0] & fits[1])]
                if not len(left):
                    return factors, shifts
        return None

    def _rounded(self, steps: Array) -> Array:
        """What is stored, without the zero point, of numbers in steps of it."""
        low, high = (bound - self.ends[1][1] for bound in RANGES[self.dtypes[1]])
        op = Activation.parse(self.stored_activation)
        least, most = CLAMPS[op.name] or op.params
        return np.clip(np.rint(steps), max(low, np.rint(least)), min(high, np.rint(most)))
