"""Whole models of ONNX Runtime's quantiser: computed in integers, to the bits of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import quantised_models

import convgen


@pytest.mark.parametrize("kind", ["QDQ i8 i8 channel", "QOperator u8 u8", "dynamic"])
def test_models_of_the_quantiser_compile(tmp_path: Path, kind: str) -> None:
    path = quantised_models.quantised(tmp_path, kind)
    network = convgen.compile(path, threads=1)
    specs = [convgen.ConvSpec.parse(layer["spec"]) for layer in network.layers() if "spec" in layer]
    assert len(specs) == 4
    assert all(spec.is_quantised for spec in specs)
    for x in quantised_models.inputs(5):
        found, expected = network(x), quantised_models.run(path, x)
        if kind == "dynamic":  # whose activations are f32
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(found, expected)
    report = network.validate(path)
    assert report.passed, report


def test_a_quantised_model_is_exported_and_loaded(tmp_path: Path) -> None:
    path = quantised_models.quantised(tmp_path, "QDQ u8 i8")
    network = convgen.compile(path, threads=1)
    network.export(tmp_path / "out")
    loaded = convgen.load(tmp_path / "out")
    x = next(quantised_models.inputs(1))
    np.testing.assert_array_equal(loaded(x), quantised_models.run(path, x))
    operators = [layer["operators"].split()[0] for layer in network.layers() if "operators" in layer]
    assert operators.count("pool") == 1
    assert "mul" not in operators
