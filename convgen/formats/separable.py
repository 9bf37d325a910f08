"""Separable problems from what people have: pairs of convolutions of an ONNX model, layers of a Keras model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import SpecError
from ..problem.separable import SeparableSpec
from .keras import separables_from_keras
from .keras_sizes import is_keras, with_sizes
from .onnx.node import OnnxLayer
from .onnx.reader import layers_from_onnx


def read_separables(source: str | Path, dims: Mapping[str, int] | None = None) -> list[SeparableSpec]:
    """The separable problems in a file: an ONNX model, or the JSON of a Keras layer or model; none of other files.

    Raises:
        SpecError: it cannot be read.
    """
    path = Path(source)
    if path.suffix.lower() == ".onnx":
        return separable_pairs(layers_from_onnx(path, dims))
    if path.suffix.lower() != ".json":
        return []
    config = json.loads(path.read_text(encoding="utf-8-sig"))
    return separables_from_keras(with_sizes(config, dims or {}, str(path))) if is_keras(config) else []


def separable_pairs(layers: Sequence[OnnxLayer]) -> list[SeparableSpec]:
    """Depthwise layers that one 1×1 layer reads and no other layer, each with that one, in the order of the graph."""
    readers = Counter(layer.src for layer in layers)
    producers = {layer.dst: layer.spec for layer in layers if layer.dst and readers[layer.dst] == 1}
    found = []
    for layer in layers:
        first = producers.get(layer.src)
        if first is not None and layer.spec is not None:
            try:
                found.append(SeparableSpec(first, layer.spec))
            except SpecError:  # another two convolutions
                continue
    return found
