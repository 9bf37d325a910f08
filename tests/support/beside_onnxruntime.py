"""Models with an input ``x`` through convgen and ONNX Runtime, node by node there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import quantised_models
from onnx import parser

import convgen


def written(folder: Path, model: str | onnx.ModelProto) -> Path:
    """A model, which may be in ONNX's textual form, as a file."""
    path = folder / "model.onnx"
    proto = parser.parse_model(model) if isinstance(model, str) else model
    path.write_bytes(proto.SerializeToString())
    return path


def inputs(shape: tuple[int, ...], count: int, size: float = 1.0) -> list[npt.NDArray[np.float32]]:
    """Random numbers of a standard deviation."""
    return [np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(size) for seed in range(count)]


def same(
    folder: Path, model: str | onnx.ModelProto, shape: tuple[int, ...], count: int = 3, size: float = 1.0
) -> convgen.Network:
    """The network of a model, which gives what ONNX Runtime gives, bit for bit."""
    path = written(folder, model)
    network = convgen.compile(path, threads=1)
    for x in inputs(shape, count, size):
        found: Any = network(x)
        np.testing.assert_array_equal(found, quantised_models.run(path, x))
    return network
