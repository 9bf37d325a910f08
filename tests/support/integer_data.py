"""Small integers for models."""

from __future__ import annotations

import numpy as np

from convgen.problem.dtypes import numpy_dtype
from convgen.problem.spec import ConvSpec


def integers(spec: ConvSpec, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {name: shape for name, shape in spec.shapes.items() if name != "dst"}
    data = {name: rng.integers(-4, 5, shape).astype(numpy_dtype(spec.dtypes[name])) for name, shape in shapes.items()}
    return data | ({"scale": data["scale"] / 4} if "scale" in data else {})
