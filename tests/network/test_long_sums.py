"""Sums over many elements, beside double precision: as exact as short ones, whatever is summed in whatever layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from network_models import Array, model_of
from onnx import helper

from convgen.hardware.target import resolve
from convgen.network.network import compile_network

#: Planes of many pixels: whole vectors and runs; neither; a long line.
PLANES = [(1, 16, 512, 512), (2, 3, 331, 257), (1, 5, 1, 70001)]


def outputs_of(operators: dict[str, tuple[str, dict[str, Any]]], x: Array, before: str = "") -> dict[str, Array]:
    """What operators make of a tensor, or of a convolution of it that changes nothing but where channels lie."""
    nodes = [helper.make_node(operator, [before or "x"], [name], **how) for name, (operator, how) in operators.items()]
    constants: dict[str, Array] = {}
    if before:
        channels = x.shape[1]
        constants["w"] = np.eye(channels, dtype=np.float32).reshape(channels, channels, 1, 1)
        nodes.insert(0, helper.make_node("Conv", ["x", "w"], [before]))
    model = model_of(nodes, {"x": x.shape}, list(operators), constants, opset=17)
    found: dict[str, Array] = compile_network(model, resolve("cpu").on(2), 2, name="sums")(x)
    return found


@pytest.mark.parametrize("before", ["", "conv"])
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_roundings_do_not_grow_with_what_is_summed(shape: tuple[int, ...], before: str) -> None:
    """One after another, 262,144 alike numbers are wrong by 1e-4 of their sum."""
    x = (np.random.default_rng(3).random(shape, np.float32) + 1).astype(np.float32)
    wide = x.astype(np.float64)
    operators: dict[str, tuple[str, dict[str, Any]]] = {
        "pooled": ("GlobalAveragePool", {}),
        "mean": ("ReduceMean", {"axes": [0, 1, 2, 3]}),
        "rows": ("ReduceMean", {"axes": [1, 3], "keepdims": 0}),
        "norm": ("ReduceL2", {"axes": [2, 3], "keepdims": 0}),
        "square": ("ReduceSumSquare", {"axes": [1, 2, 3]}),
        "exponents": ("ReduceLogSumExp", {"axes": [1, 2, 3]}),
    }
    wanted = {
        "pooled": wide.mean((2, 3), keepdims=True),
        "mean": wide.mean(keepdims=True),
        "rows": wide.mean((1, 3)),
        "norm": np.sqrt((wide * wide).sum((2, 3))),
        "square": (wide * wide).sum((1, 2, 3), keepdims=True),
        "exponents": np.log(np.exp(wide).sum((1, 2, 3), keepdims=True)),
    }
    found = outputs_of(operators, x, before)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


def test_whole_numbers_are_summed_exactly() -> None:
    x = np.random.default_rng(4).integers(0, 2, (1, 16, 300, 300)).astype(np.float32)
    found = outputs_of({"sum": ("ReduceSum", {}), "square": ("ReduceSumSquare", {"axes": [2, 3]})}, x, "conv")
    assert found["sum"].item() == x.sum(dtype=np.int64)
    np.testing.assert_array_equal(found["square"], x.sum((2, 3), dtype=np.int64, keepdims=True))


def test_a_normalised_plane_far_from_zero() -> None:
    x = (np.random.default_rng(5).random((1, 4, 400, 401), np.float32) + 30).astype(np.float32)
    model = model_of(
        [helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"])],
        {"x": x.shape},
        ["y"],
        {"s": np.ones(4, np.float32), "b": np.zeros(4, np.float32)},
        opset=17,
    )
    found: Any = compile_network(model, resolve("cpu").on(1), 1, name="normal")(x)
    wide = x.astype(np.float64)
    mean, spread = wide.mean((2, 3), keepdims=True), wide.std((2, 3), keepdims=True)
    assert np.abs(found - (wide - mean) / np.sqrt(spread**2 + 1e-5)).max() < 5e-5
