"""SeparableSpec to ONNX: two nodes ``Conv``, which say what it means."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import compose

from ..errors import SpecError, meant
from ..problem.separable import SeparableSpec
from .data import Arrays
from .onnx_model import onnx_model


def random_parameters(spec: SeparableSpec, seed: int = 0) -> Arrays:
    """Normal numbers by name, such that what is in between and dst are about as large as src."""
    rng = np.random.default_rng(seed)
    found: Arrays = {}
    for name, shape in spec.parameters.items():
        part = spec.parts[name.partition("_")[0]]
        scale = part.reduction_length**-0.5 if name.endswith("weights") else 0.25
        found[name] = scale * rng.standard_normal(shape, np.float32)
    return {name: array.astype(np.float32) for name, array in found.items()}


def separable_model(
    spec: SeparableSpec | str, parameters: Mapping[str, npt.ArrayLike] | None = None
) -> onnx.ModelProto:
    """The problem as a model ``src, [residual] -> dst`` of two convolutions, which :func:`convgen.compile` takes.

    Args:
        spec: or its descriptor.
        parameters: arrays of f32 by the names, and of the shapes, of :attr:`SeparableSpec.parameters`; random ones
            where None.

    Raises:
        SpecError: an array is missing, unknown, or has another shape or dtype.
    """
    spec = SeparableSpec.parse(spec) if isinstance(spec, str) else spec
    given = random_parameters(spec) if parameters is None else dict(parameters)
    for name in spec.parameters.keys() - given.keys():
        raise SpecError(name, f"an array {list(spec.parameters[name])}", "none", str(spec))
    for name in given.keys() - spec.parameters.keys():
        known = ", ".join(spec.parameters)
        raise SpecError(name, f"one of {known}", f"an unknown array{meant(name, spec.parameters)}", str(spec))
    models = {}
    for part, own in spec.parts.items():
        arrays = {name: given[f"{part}_{name}"] for name in own.parameters}
        models[part] = compose.add_prefix(onnx_model(own, **arrays), f"{part}_")
    model = compose.merge_models(models["depthwise"], models["pointwise"], [("depthwise_dst", "pointwise_src")])
    model.graph.name = spec.name
    _rename(model.graph, {"depthwise_src": "src", "pointwise_residual": "residual", "pointwise_dst": "dst"})
    return model


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Give tensors other names."""
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
