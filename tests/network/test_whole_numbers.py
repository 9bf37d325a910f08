"""Operators of integers that nothing dequantises, to the bits of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import ModelProto, parser

import convgen
from convgen.errors import NotTakenError

HEAD = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
"""
CONV = """g (float[1,2,6,6] x) => (float[1,3,$size,$size] y)
<float s = {0.05}, $type z = {$src}, int8[3,2,1,1] w = {9, -70, 33, 127, -128, 5}, float t = {0.02}, int8 o = {0},
 float u = {0.0937}, $type v = {$dst}, $type low = {$least}, $type high = {$most}>
{ q = QuantizeLinear(x, s, z)
  p = QLinearConv(q, s, z, w, t, o, u, v)
  $bounds
  y = DequantizeLinear(r, u, v) }"""
BOUNDS = {
    "relu": "r = Relu(p)",
    "clip": "r = Clip(p, low, high)",
    "low": "r = Clip(p, low)",
    "both": "c = Clip(p, low, high) r = Relu(c)",
    "pooled": "c = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (p) r = Clip(c, low, high)",
}


def run(model: ModelProto, *inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """What ONNX Runtime computes."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    given = dict(zip([value.name for value in session.get_inputs()], inputs, strict=True))
    return dict(zip(names, session.run(names, given), strict=True))


def compare(text: str, *inputs: npt.NDArray[Any]) -> convgen.Network:
    """A model as text gives what ONNX Runtime gives, bit for bit, and is valid by its bounds."""
    model = parser.parse_model(HEAD + text)
    network: convgen.Network = convgen.compile(model, threads=1)
    found, expected = network(*inputs, out={}), run(model, *inputs)
    for name, array in expected.items():
        one = found[name] if isinstance(found, dict) else found
        assert one.dtype == array.dtype
        np.testing.assert_array_equal(one, array)
    report = network.validate(model)
    assert report.passed, report
    return network


def floats(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize(
    ("bounds", "types"),
    [
        *((bounds, {"type": "int8", "src": 3, "dst": -7, "least": -40, "most": 60}) for bounds in BOUNDS),
        *((bounds, {"type": "int8", "src": 0, "dst": 0, "least": 5, "most": 127}) for bounds in BOUNDS),
        *(
            (bounds, {"type": "uint8", "src": 120, "dst": 110, "least": 90, "most": 140})
            for bounds in ("clip", "low", "pooled")
        ),
    ],
)
def test_bounds_of_integers(bounds: str, types: dict[str, Any]) -> None:
    """Of what a convolution stores they are its activation; behind a pooling a step of their own."""
    pooled = bounds == "pooled"
    text = Template(CONV).substitute(types, bounds=BOUNDS[bounds], size=3 if pooled else 6)
    network = compare(text, floats(1, 2, 6, 6))
    operators = " ".join(layer.get("operators", "") for layer in network.layers())
    assert ("clamp" in operators) == pooled


BETWEEN = """g (float[2,3,5] x) => (float[2,3,5] y)
<float s = {0.05}, int8 z = {4}, float u = {0.06}, int8 v = {-3}>
{ q = QuantizeLinear(x, s, z)
  r = Relu(q)
  y = DequantizeLinear(r, u, v) }"""


def test_a_relu_between_quantise_and_dequantise() -> None:
    compare(BETWEEN, floats(2, 3, 5))


CASTS = """g (float[4,9] x, int32[4,9] i) => (float[4,9] a, float[4,9] b, float[4,9] c, float[4,9] d, float[4,9] e)
{ whole = Cast <to = 6> (x)
  bytes = Cast <to = 3> (x)
  a = Cast <to = 1> (whole)
  b = Cast <to = 1> (bytes)
  low = Cast <to = 2> (i)
  signed = Cast <to = 3> (i)
  again = Cast <to = 2> (signed)
  wide = Cast <to = 6> (again)
  c = Cast <to = 1> (low)
  d = Cast <to = 1> (signed)
  e = Cast <to = 1> (wide) }"""


def test_casts_of_floats_and_integers() -> None:
    """Of floats what is behind the point is cut off; of integers the lowest bits are kept."""
    x = floats(4, 9) * 40
    i = np.random.default_rng(1).integers(-(1 << 30), 1 << 30, (4, 9), np.int32)
    compare(CASTS, x, i)


def test_what_is_no_number_of_the_wanted_type_becomes_the_nearest() -> None:
    text = "g (float[6] x) => (uint8[6] y, int32[6] z) { y = Cast <to = 2> (x) z = Cast <to = 6> (x) }"
    x = np.array([-1, 300, 1e30, -1e30, np.inf, 254.9], np.float32)
    found = convgen.compile(parser.parse_model(HEAD + text), threads=1)(x)
    assert isinstance(found, dict)
    np.testing.assert_array_equal(found["y"], [0, 255, 255, 0, 255, 254])
    most = (1 << 31) - (1 << 7)
    np.testing.assert_array_equal(found["z"], [-1, 300, most, -(1 << 31), most, 254])


SUMS = """g (float[1,4,6,6] x) => (float[1,3,6,6] y)
<int8[3,4,3,3] w = {$weights}, int32[3,1,1] b = {900, -70000, 16777217}, int32 c = {33554433}, int32 f = {3},
 float h = {0.001}>
{ q, s, z = DynamicQuantizeLinear(x)
  p = ConvInteger <pads = [1, 1, 1, 1]> (q, w, z)
  a = Add(p, b)
  d = Add(a, c)
  e = Sub(d, c)
  m = Mul(e, f)
  n = Max(m, b)
  r = Relu(n)
  g = Cast <to = 1> (r)
  k = Mul(s, h)
  y = Mul(g, k) }"""


def test_sums_take_a_bias_of_integers() -> None:
    """Larger than f32 has them."""
    weights = np.random.default_rng(2).integers(-128, 128, 3 * 4 * 9).astype(str)
    compare(Template(SUMS).substitute(weights=", ".join(weights)), floats(1, 4, 6, 6))


PRODUCT = """g (float[$left] x, float[$right] k) => (int32[$result] y)
<float s = {0.05}, uint8 a = {100}, int8 b = {4}, uint8[$rows] rows = {$row_zeros}, int8[$columns] columns = {$zeros}>
{ q = QuantizeLinear(x, s, a)
  p = QuantizeLinear(k, s, b)
  y = MatMulInteger(q, p, rows, columns) }"""


def product(left: Sequence[int], right: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> str:
    result = (*np.broadcast_shapes(tuple(left[:-2]), tuple(right[:-2])), left[-2], right[-1])
    shapes = {"left": left, "right": right, "result": result, "rows": [len(rows)], "columns": [len(columns)]}
    values = {"row_zeros": rows, "zeros": columns}
    return Template(PRODUCT).substitute({k: ", ".join(map(str, v)) for k, v in (shapes | values).items()})


@pytest.mark.parametrize(("left", "right"), [((3, 300), (300, 7)), ((2, 3, 20), (2, 20, 17)), ((2, 3, 20), (20, 16))])
def test_products_of_two_that_are_computed(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    compare(product(left, right, [100], [4]), floats(*left), floats(*right, seed=1))


def test_each_row_and_column_may_have_a_zero_point() -> None:
    """Of rows ONNX Runtime has none such; integers are exact."""
    rows, columns = [100, 3, 255], [4, -128, 127, 0, 9]
    x, k = floats(3, 40), floats(40, 5, seed=1)
    found = convgen.compile(parser.parse_model(HEAD + product(x.shape, k.shape, rows, columns)), threads=1)(x, k)
    step = np.float32(0.05)
    q = np.clip(np.rint(x / step) + 100, 0, 255).astype(int) - np.array(rows).reshape(3, 1)
    p = np.clip(np.rint(k / step) + 4, -128, 127).astype(int) - np.array(columns)
    np.testing.assert_array_equal(found, q @ p)


LONG = """g (float[1,3,9,9] x) => (float[1,3,9,9] y)
<float s = {0.0003}, uint16 z = {31000}, float t = {0.0005}, int16 o = {0},
 int64[2] shape = {9, 27}, int64[4] back = {1, 3, 9, 9}>
{ q = com.microsoft.QuantizeLinear(x, s, z)
  a = com.microsoft.DequantizeLinear(q, s, z)
  p = Relu(a)
  r = com.microsoft.QuantizeLinear(p, t, o)
  m = Reshape(r, shape)
  k = com.microsoft.DequantizeLinear(m, t, o)
  y = Reshape(k, back) }"""


def test_integers_of_sixteen_bits() -> None:
    """Of versions before 21, too, in which ONNX Runtime alone has them."""
    compare(LONG, floats(1, 3, 9, 9) * 8)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (uint8[4] x) => (uint8[4] y) { y = Add(x, x) }", "add of u8; f32 and i32 are supported; DequantizeLinear"),
        ("g (uint16[4] x) => (uint16[4] y) { y = Identity(x) }", "found uint16"),
        ("g (int8[4] x) => (bool[4] y) { y = Cast <to = 9> (x) }", "a cast from int8 to bool; between f32, u8"),
    ],
)
def test_what_is_not_taken_says_why(text: str, reason: str) -> None:
    with pytest.raises(NotTakenError) as caught:
        convgen.compile(parser.parse_model(HEAD + text), threads=1)
    assert reason in " ".join(caught.value.nodes.values())


def test_integers_of_sixteen_bits_stay_within_a_part(tmp_path: Path) -> None:
    """What hands them to the rest, or has them from there, stays with ONNX Runtime."""
    text = """g (float[1,3,6,6] x) => (float[1,3,6,6] y, uint16[1,3,6,6] q)
    <float s = {0.0003}, uint16 z = {31000}, float[3,3,1,1] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}>
    { q = com.microsoft.QuantizeLinear(x, s, z)
      a = com.microsoft.DequantizeLinear(q, s, z)
      y = Conv(a, w) }"""
    model = parser.parse_model(HEAD + text)
    with pytest.raises(convgen.ConvgenError, match="of u16, of which no part begins or ends"):
        convgen.for_onnxruntime(model, tmp_path / "made.onnx", threads=1)
