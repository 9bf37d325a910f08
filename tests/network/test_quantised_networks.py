"""Whole models of ONNX Runtime's quantiser: computed in integers, to the bits of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import quantised_models
from onnx import parser

import convgen


@pytest.mark.parametrize("kind", ["QDQ i8 i8 channel", "QOperator u8 u8", "dynamic u8"])
def test_models_of_the_quantiser_compile(tmp_path: Path, kind: str) -> None:
    path = quantised_models.quantised(tmp_path, kind)
    network = convgen.compile(path, threads=1)
    specs = [convgen.ConvSpec.parse(layer["spec"]) for layer in network.layers() if "spec" in layer]
    assert len(specs) == 4
    assert all(spec.is_quantised for spec in specs)
    for x in quantised_models.inputs(5):
        found, expected = network(x), quantised_models.run(path, x)
        if kind.startswith("dynamic"):  # whose activations are f32
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


@pytest.mark.parametrize("opset", [11, 12, 13])
def test_models_of_older_operators_compile(tmp_path: Path, opset: int) -> None:
    """Before version 13 DequantizeLinear has no axis."""
    path = quantised_models.quantised(tmp_path, "QOperator u8 i8", opset)
    network = convgen.compile(path, threads=1)
    for x in quantised_models.inputs(3):
        np.testing.assert_array_equal(network(x), quantised_models.run(path, x))


GEMM = """<ir_version: 8, opset_import: ["" : OPSET, "com.microsoft" : 1]>
g (float[3,5] x) => (float[3,2] y)
<float s = {0.05}, uint8 z = {120}, int8[SIZES] w = {9, -70, 33, 127, -128, 5, 60, -41, 2, 17}, float[OF] t = {STEPS},
 int8[OF] o = {ZEROS}, int32[2] b = {900, -700}, float u = {0.1}, uint8 v = {110}>
{ q = QuantizeLinear(x, s, z)
  m = com.microsoft.QGemm <ATTRIBUTES> (q, s, z, w, t, o, b, u, v)
  y = DequantizeLinear(m, u, v) }"""


@pytest.mark.parametrize("steps", ["0.02", "0.02, 0.03"])
@pytest.mark.parametrize("attributes", ["alpha = 1.0", "alpha = 0.5", "transB = 1, alpha = 3.0"])
@pytest.mark.parametrize("opset", [12, 13])
def test_products_with_factors(tmp_path: Path, opset: int, attributes: str, steps: str) -> None:
    """The bias of a QGemm is in steps of the product with its factor, as its documentation says."""
    of = steps.count(",") + 1
    text = GEMM.replace("OPSET", str(opset)).replace("ATTRIBUTES", attributes).replace("STEPS", steps)
    text = text.replace("SIZES", "2,5" if "transB" in attributes else "5,2").replace("OF", str(of))
    compare(tmp_path, text.replace("ZEROS", ", ".join(["0"] * of)), (3, 5))


SOFTMAX = """<ir_version: 8, opset_import: ["" : OPSET, "com.microsoft" : 1]>
g (float[2,3,5] x) => (float[2,3,5] y)
<float s = {0.05}, uint8 z = {120}, float u = {0.00390625}, uint8 v = {0}>
{ q = QuantizeLinear(x, s, z)
  m = com.microsoft.QLinearSoftmax <axis = AXIS, opset = MEANT> (q, s, z, u, v)
  y = DequantizeLinear(m, u, v) }"""


@pytest.mark.parametrize(("opset", "meant", "axis"), [(12, 12, 1), (13, 12, 1), (13, 12, 2), (13, 13, 1), (12, 13, -1)])
def test_softmax_is_of_the_version_that_it_says(tmp_path: Path, opset: int, meant: int, axis: int) -> None:
    """Below 13 all axes from one on are one; which version it is of, it says itself."""
    text = SOFTMAX.replace("OPSET", str(opset)).replace("MEANT", str(meant)).replace("AXIS", str(axis))
    compare(tmp_path, text, (2, 3, 5))


CASTS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1,2,6,6] x) => (float[1,3,6,6] y)
<float s = {0.05}, uint8 z = {120}, int8[3,2,1,1] w = {9, -70, 33, 127, -128, 5}, float t = {0.02}, int8 o = {0},
 float u = {0.0937}, uint8 v = {110}>
{ q = QuantizeLinear(x, s, z)
  qc = Cast <to = 2> (q)
  a = DequantizeLinear(qc, s, z)
  wc = Cast <to = 3> (w)
  k = DequantizeLinear(wc, t, o)
  c = Conv(a, k)
  p = QuantizeLinear(c, u, v)
  pc = Cast <to = 2> (p)
  y = DequantizeLinear(pc, u, v) }"""


def test_a_cast_to_the_own_type_stands_in_no_way(tmp_path: Path) -> None:
    """PyTorch's exporter writes them between QuantizeLinear and DequantizeLinear."""
    network = compare(tmp_path, CASTS, (1, 2, 6, 6))
    (spec,) = [convgen.ConvSpec.parse(layer["spec"]) for layer in network.layers() if "spec" in layer]
    assert spec.is_quantised


DYNAMIC = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2,3] x) => (float s) { y, s, z = DynamicQuantizeLinear(x) }"""


def test_the_scale_of_zeros_is_one(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(parser.parse_model(DYNAMIC).SerializeToString())
    network = convgen.compile(path, threads=1)
    for x in (np.zeros((2, 3), np.float32), np.linspace(-1, 3, 6, dtype=np.float32).reshape(2, 3)):
        np.testing.assert_array_equal(network(x), quantised_models.run(path, x))


def test_a_scale_of_zero_is_refused(tmp_path: Path) -> None:
    text = CASTS.replace("float s = {0.05}", "float s = {0.0}")
    path = tmp_path / "model.onnx"
    path.write_bytes(parser.parse_model(text).SerializeToString())
    with pytest.raises(convgen.ConvgenError, match="scale"):
        convgen.compile(path, threads=1)


def compare(folder: Path, text: str, shape: tuple[int, ...]) -> convgen.Network:
    """A model as text gives what ONNX Runtime gives, bit for bit."""
    path = folder / "model.onnx"
    path.write_bytes(parser.parse_model(text).SerializeToString())
    network = convgen.compile(path, threads=1)
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal(shape, np.float32)
        np.testing.assert_array_equal(network(x), quantised_models.run(path, x))
    return network
