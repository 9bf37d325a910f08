"""Real networks with random weights, against ONNX Runtime: the smallest always, all of them in the exhaustive run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_module import load_bench
from network_models import furthest

from convgen.hardware.target import resolve
from convgen.network.network import compile_network

pytestmark = pytest.mark.timeout(1800)

#: What outputs may differ by, relative to the largest element.
ERROR = 2e-4
ALWAYS = ("light_squeezenet",)
NETWORKS = load_bench("networks")


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS.NAMES]
)
def test_a_network_computes_what_onnxruntime_does(name: str, tmp_path: Path) -> None:
    if not name.startswith("light_"):
        pytest.importorskip("torch")
    model = NETWORKS.network_model(name, tmp_path)
    network = compile_network(model.path, resolve("cpu").on(1), 1)
    inputs = [model.inputs[given] for given in network.inputs]
    found = network(*inputs)
    assert furthest(found, model.expected) < ERROR
    network.on(2)
    again = network(*inputs)
    for name, array in (found if isinstance(found, dict) else {"": found}).items():
        other = again[name] if isinstance(again, dict) else again
        np.testing.assert_array_equal(array, other)
