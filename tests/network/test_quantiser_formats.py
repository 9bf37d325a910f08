"""Every format of ONNX Runtime's quantiser from the file to a program in C: what is shown, compiled, and computed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import quantised_models
from onnx import TensorProto, numpy_helper, parser

import convgen
from convgen.check.validate import Check
from convgen.cli import main
from convgen.formats.onnx.reader import layers_from_onnx
from convgen.network.check.integers import defined
from convgen.network.check.validate import compare_network
from convgen.network.reading import read_graph


def last_step(path: Path) -> float:
    """The scale with which the output is dequantised."""
    graph = onnx.load(path).graph
    (last,) = [node for node in graph.node if graph.output[0].name in node.output]
    assert last.op_type == "DequantizeLinear"
    (scale,) = [tensor for tensor in graph.initializer if tensor.name == last.input[1]]
    return float(numpy_helper.to_array(scale))


@pytest.mark.parametrize("kind", quantised_models.FORMATS)
def test_a_format_goes_all_the_way(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = quantised_models.quantised(tmp_path, kind), tmp_path / "out"
    in_integers = "16" not in kind  # else no layer by itself is one of integers
    assert main(["show", str(path), "--json"]) == (0 if in_integers else 2)
    shown = capsys.readouterr()
    if in_integers:
        layers = json.loads(shown.out)["layers"]
        assert [convgen.ConvSpec.parse(layer["spec"]).is_quantised for layer in layers] == [True] * 3
    else:
        assert "in the whole model, as compile takes it, it is a layer of f32" in shown.err
    assert main(["compile", str(path), "--threads", "1", "--no-records", "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["validation"]["passed"]
    specs = [convgen.ConvSpec.parse(step["spec"]) for step in manifest["sizes"][0]["layers"] if "spec" in step]
    assert [spec.is_quantised for spec in specs] == [in_integers] * 4
    network = convgen.load(out)
    for x in quantised_models.inputs(3):
        found, expected = network(x), quantised_models.run(path, x)
        if kind.startswith("dynamic"):  # whose activations are f32
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        elif in_integers:
            np.testing.assert_array_equal(found, expected)
        else:  # of sums of floats: each of four layers may be a step off
            assert np.abs(found - expected).max() <= 4.01 * last_step(path)
    command = ["cc", "-O2", "example.c", "libquantised.a", "-lm", "-lpthread", "-o", "example"]
    subprocess.run(command, cwd=out, check=True)
    ran = subprocess.run(["./example"], cwd=out, check=True, capture_output=True, text=True)
    assert "ok" in ran.stdout


def test_weights_of_four_bits_are_multiplied_as_such_of_eight(tmp_path: Path) -> None:
    path = quantised_models.quantised(tmp_path, "QDQ u8 i4 channel")
    types = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert TensorProto.INT4 in types
    layers = layers_from_onnx(path, arrays=True)
    for layer in layers:
        assert layer.spec is not None
        assert layer.spec.weights_dtype == "i8"
        assert -8 <= layer.arrays["weights"].min() < layer.arrays["weights"].max() <= 7


def compared(network: convgen.Network, path: Path, steps: int) -> Check:
    """What is said before a library is written, of outputs one of which is so many steps off."""

    def call(*arrays: Any, **options: Any) -> Any:
        found = network(*arrays, **options)
        found.reshape(-1)[3] += np.float32(steps * last_step(path))
        return found

    (check,) = compare_network(network.plans, network.built, call, path, threads=1, accuracy="standard").checks
    return check


def test_the_output_of_a_format_may_be_a_step_off(tmp_path: Path) -> None:
    """Where ONNX Runtime adds up floats; two are a fault."""
    path = quantised_models.quantised(tmp_path, "QDQ u8 i8")
    network = convgen.compile(path, threads=1)
    for steps, passed, text in (
        (0, True, "0 of 5 values differ"),
        (1, True, "1 of 5 values differ, by up to 1 steps, 1 is allowed"),
        (2, False, "1 of 5 values differ, by up to 2 steps, 1 is allowed"),
    ):
        check = compared(network, path, steps)
        assert check.passed is passed
        assert text in check.found


def test_what_is_of_integers_throughout_is_the_same(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1,2,6,6] x) => (float[1,3,6,6] y)
    <float s = {0.05}, uint8 z = {120}, int8[3,2,1,1] w = {9, -70, 33, 127, -128, 5}, float t = {0.02}, int8 o = {0},
     float u = {0.0937}, uint8 v = {110}>
    { q = QuantizeLinear(x, s, z)
      p = QLinearConv(q, s, z, w, t, o, u, v)
      y = DequantizeLinear(p, u, v) }"""
    path = tmp_path / "exact.onnx"
    path.write_bytes(parser.parse_model(text).SerializeToString())
    network = convgen.compile(path, threads=1)
    for steps in (0, 1):
        check = compared(network, path, steps)
        assert check.passed is not bool(steps)
        assert check.found == f"{steps} of 108 values differ, none may"


@pytest.mark.parametrize("kind", ["QDQ u8 i8 channel", "QOperator i8 i8", "dynamic u8"])
def test_the_definition_is_what_is_computed(tmp_path: Path, kind: str) -> None:
    """Step by step, as ONNX Runtime computes nothing in one piece."""
    path = quantised_models.quantised(tmp_path, kind)
    network, graph = convgen.compile(path, threads=1), read_graph(path)
    for x in quantised_models.inputs(3):
        found, expected = network(x), defined(graph, {"x": x})["y"]
        if kind.startswith("dynamic"):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(expected, quantised_models.run(path, x))
