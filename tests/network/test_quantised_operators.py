"""ONNX Runtime's own operators of 8-bit integers, and what moves them: the bits of what they are documented to be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import quantised_models
from beside_onnxruntime import inputs, same, written

import convgen
from convgen.network.graph import Operator

SHAPE = (2, 6, 9, 7)
STEP = 0.0613
MODEL = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
g (float[2,6,9,7] x) => (float[RESULT] y)
<float s = {0.0431}, TYPE z = {ZERO}, float t = {0.0277}, TYPE o = {OTHER}, float u = {STEP}, TYPE v = {STORED}>
{ n = Neg(x)
  q = QuantizeLinear(x, s, z)
  p = QuantizeLinear(n, t, o)
  NODES
  y = DequantizeLinear(m, u, v) }"""

BOTH = "a = DequantizeLinear(q, s, z) b = DequantizeLinear(p, t, o)"
POOL = "kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1]"
#: The operator, what its documentation says that it is, and the shape of what it gives.
OPERATORS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "concat": (
        "m = com.microsoft.QLinearConcat <axis = 1> (u, v, q, s, z, p, t, o)",
        f"{BOTH} c = Concat <axis = 1> (a, b) m = QuantizeLinear(c, u, v)",
        (2, 12, 9, 7),
    ),
    "concat of the last axis": (
        "m = com.microsoft.QLinearConcat <axis = -1> (u, v, p, t, o, q, s, z, p, t, o)",
        f"{BOTH} c = Concat <axis = -1> (b, a, b) m = QuantizeLinear(c, u, v)",
        (2, 6, 9, 21),
    ),
    "average": (
        f"m = com.microsoft.QLinearAveragePool <{POOL}> (q, s, z, u, v)",
        f"{BOTH} c = AveragePool <{POOL}> (a) m = QuantizeLinear(c, u, v)",
        (2, 6, 5, 7),
    ),
    "average, padding counted": (
        f"m = com.microsoft.QLinearAveragePool <{POOL}, count_include_pad = 1> (q, s, z, u, v)",
        f"{BOTH} c = AveragePool <{POOL}, count_include_pad = 1> (a) m = QuantizeLinear(c, u, v)",
        (2, 6, 5, 7),
    ),
    "average, channels last": (
        (
            "f = Transpose <perm = [0, 2, 3, 1]> (q) "
            f"w = com.microsoft.QLinearAveragePool <{POOL}, channels_last = 1> (f, s, z, u, v) "
            "m = Transpose <perm = [0, 3, 1, 2]> (w)"
        ),
        f"{BOTH} c = AveragePool <{POOL}> (a) m = QuantizeLinear(c, u, v)",
        (2, 6, 5, 7),
    ),
    "product": (
        "m = com.microsoft.QLinearMul (q, s, z, p, t, o, u, v)",
        f"{BOTH} c = Mul(a, b) m = QuantizeLinear(c, u, v)",
        SHAPE,
    ),
    "sigmoid": (
        "m = com.microsoft.QLinearSigmoid (q, s, z, u, v)",
        f"{BOTH} c = Sigmoid(a) m = QuantizeLinear(c, u, v)",
        SHAPE,
    ),
    "leaky relu": (
        "m = com.microsoft.QLinearLeakyRelu <alpha = 0.3> (q, s, z, u, v)",
        f"{BOTH} c = LeakyRelu <alpha = 0.3> (a) m = QuantizeLinear(c, u, v)",
        SHAPE,
    ),
}


def model(nodes: str, shape: Sequence[int], signed: bool, step: float) -> str:
    values = {
        "RESULT": ",".join(map(str, shape)),
        "STORED": "-13" if signed else "110",
        "OTHER": "21" if signed else "127",
        "ZERO": "-3" if signed else "120",
        "TYPE": "int8" if signed else "uint8",
        "STEP": str(step),
        "NODES": nodes,
    }
    text = MODEL
    for word, value in values.items():
        text = text.replace(word, value)
    return text


@pytest.mark.parametrize("signed", [False, True], ids=["u8", "i8"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_the_quantiser_are_what_they_are_documented_to_be(tmp_path: Path, name: str, signed: bool) -> None:
    """Bit for bit; ONNX Runtime's own code for them may be one step off where it rounds otherwise."""
    written_as, meant, shape = OPERATORS[name]
    step = 1 / 256 if name == "sigmoid" else STEP
    (tmp_path / "meant").mkdir()
    path = written(tmp_path, model(written_as, shape, signed, step))
    definition = written(tmp_path / "meant", model(meant, shape, signed, step))
    network = convgen.compile(path, threads=1)
    for x in inputs(SHAPE, 3, 2.0):
        found = np.asarray(network(x))
        assert len(np.unique(found)) > 20
        np.testing.assert_array_equal(found, quantised_models.run(definition, x))
        steps = np.rint((found - quantised_models.run(path, x)) / np.float32(step))
        assert np.abs(steps).max() <= (0 if "concat" in name else 1)
        assert (steps == 0).mean() > 0.97


#: Between two convolutions: what it does to a tensor [1, 8, 6, 10], and the shape that it gives.
MOVES = {
    "Reshape": ("m = Reshape(d, sizes)", (1, 8, 10, 6)),
    "Transpose": ("m = Transpose <perm = [0, 1, 3, 2]> (d)", (1, 8, 10, 6)),
    "Slice": ("m = Slice(d, begins, ends, axes, steps)", (1, 8, 3, 7)),
    "all of them": (
        "e = Transpose <perm = [0, 1, 3, 2]> (d) f = Reshape(e, back) m = Slice(f, begins, ends, axes, steps)",
        (1, 8, 3, 7),
    ),
}
#: Scales are powers of two, sums small: ONNX Runtime computes them in f32 without rounding.
MOVED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1,4,6,10] x) => (float[RESULT] y)
<float s = {0.03125}, uint8 z = {120}, float t = {0.015625}, int8 o = {0}, float u = {0.125}, uint8 v = {110},
 float r = {0.5}, uint8 w = {128}, int64[4] sizes = {1, 8, 10, 6}, int64[4] back = {1, 8, 6, 10},
 int64[2] begins = {1, 8}, int64[2] ends = {6, 1}, int64[2] axes = {2, 3}, int64[2] steps = {2, -1}>
{ q = QuantizeLinear(x, s, z)
  a = DequantizeLinear(q, s, z)
  k = DequantizeLinear(first, t, o)
  c = Conv(a, k)
  h = QuantizeLinear(c, u, v)
  d = DequantizeLinear(h, u, v)
  NODES
  i = QuantizeLinear(m, u, v)
  j = DequantizeLinear(i, u, v)
  l = DequantizeLinear(second, t, o)
  n = Conv(j, l)
  g = QuantizeLinear(n, r, w)
  y = DequantizeLinear(g, r, w) }"""


@pytest.mark.parametrize("name", MOVES)
def test_integers_are_moved_as_they_are_stored(tmp_path: Path, name: str) -> None:
    nodes, shape = MOVES[name]
    rng = np.random.default_rng(4)
    text = MOVED.replace("RESULT", ",".join(map(str, (1, 5, *shape[2:])))).replace("NODES", nodes)
    for what, size in (("first", (8, 4, 1, 1)), ("second", (5, 8, 1, 1))):
        numbers = ", ".join(map(str, rng.integers(-90, 90, size).reshape(-1)))
        text = text.replace("float r =", f"int8[{','.join(map(str, size))}] {what} = {{{numbers}}}, float r =")
    network = same(tmp_path, text, (1, 4, 6, 10))
    kinds = [node.kind for node in network.plan.graph.nodes if isinstance(node, Operator)]
    assert (kinds.count("quantise"), kinds.count("dequantise")) == (1, 1)
    convolutions = [convgen.ConvSpec.parse(layer["spec"]) for layer in network.layers() if "spec" in layer]
    assert [(spec.src_dtype, spec.dst_dtype) for spec in convolutions] == [("u8", "u8")] * 2
