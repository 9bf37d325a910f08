"""Real networks, against ONNX Runtime: small ones always, all of them in the exhaustive run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bench_module import load_bench
from network_models import furthest

from convgen.hardware.target import resolve
from convgen.measure.network_model import NetworkModel
from convgen.network.network import compile_network

pytestmark = pytest.mark.timeout(1800)

#: What outputs may differ by, relative to the largest element.
ERROR = 2e-4
NETWORKS = load_bench("networks")
#: What every run of the tests compiles, and the sides of its images where it can be had for smaller ones.
ALWAYS = {"light_squeezenet": None, "mobilenet_v3_large": 64, "shufflenet_v2": 64}
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def agrees(model: NetworkModel) -> dict[str, Any]:
    """Compile a model, compare it with ONNX Runtime, and its results on two and three threads; returns those."""
    network = compile_network(model.path, resolve("cpu").on(2), 1)
    inputs = [model.inputs[given] for given in network.inputs]
    first = network(*inputs)
    found = first if isinstance(first, dict) else dict.fromkeys(model.expected, first)
    assert furthest(found, model.expected) < ERROR
    for threads in (2, 3):
        network.on(threads)
        again = network(*inputs)
        for name, array in found.items():
            assert array.tobytes() == (again[name] if isinstance(again, dict) else again).tobytes()
    return found


@pytest.mark.parametrize("name", ALWAYS)
def test_a_small_network_computes_what_onnxruntime_does(name: str, tmp_path: Path) -> None:
    side = ALWAYS[name]
    if side is None:
        model = NETWORKS.network_model(name, tmp_path)
    else:
        pytest.importorskip("torch")
        model = NetworkModel(load_bench("networks.modules").write_module(name, tmp_path, side))
    (found,) = agrees(model).values()
    assert found.std() > 0.01 * np.abs(found).max()


def test_a_network_as_it_ships_computes_what_ships_with_it() -> None:
    """Its weights are no numbers in the file, but nodes that make them, all the same."""
    model = NetworkModel(LIGHT / "light_squeezenet.onnx")
    (found,) = agrees(model).values()
    shipped = onnx.numpy_helper.to_array(onnx.load_tensor(LIGHT / "light_squeezenet_output_0.pb"))
    np.testing.assert_allclose(found, shipped, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS.NAMES)
def test_a_network_computes_what_onnxruntime_does(name: str, tmp_path: Path) -> None:
    if not name.startswith("light_"):
        pytest.importorskip("torch")
    agrees(NETWORKS.network_model(name, tmp_path))
