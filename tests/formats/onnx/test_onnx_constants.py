"""Weights, biases and pads that a model computes from constants, by whatever operators."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper, parser
from onnx_graphs import run_onnx, same_numbers

from convgen.formats.onnx import graph as onnx_graph
from convgen.formats.onnx import inference as onnx_inference
from convgen.formats.onnx.node import OnnxLayer
from convgen.formats.onnx.reader import layers_from_onnx

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)


def model(body: str, opset: int = 18, **arrays: Any) -> ModelProto:
    made = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}, "other" : 1, "com.microsoft" : 1, "ai.onnx.ml" : 3]> '
        f"g (float[1,3,9,9] x) => (y) {{ {body} }}"
    )
    used = {name for node in made.graph.node for name in node.input}
    stored = {name: np.asarray(array) for name, array in ({"w": W} | arrays).items() if name in used}
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    return made


def read(made: ModelProto) -> OnnxLayer:
    (layer,) = layers_from_onnx(made, arrays=True)
    assert layer.spec is not None, layer.refusal
    return layer


# ---- pads ----------------------------------------------------------------------------------------

INTEGERS: dict[str, Any] = {"k": 1, "lo": 0, "k2": [1, 1], "s0": 0, "s1": 1, "s3": 3, "f": np.float32(0.6)}
PADS = {
    "Clip": "p = Clip(k, lo)",
    "ReduceSum": "p = ReduceSum<keepdims=0>(k2, ax)",
    "ReduceProd": "p = ReduceProd<keepdims=0>(k2)",
    "Range": "r = Range(s0, s3, s1) p = Gather(r, s1)",
    "Size": "p = Size(k2)",
    "Round": "g = Round(f) p = Cast<to=7>(g)",
    "Split": "q, qq = Split<num_outputs=2>(k2) p = Squeeze(q)",
    "Less": "l = Less(k, s3) p = Where(l, k, s3)",
    "Not": "l = Equal(k, s3) n = Not(l) p = Where(n, k, s3)",
    "And": "l = Less(k, s3) n = And(l, l) p = Cast<to=7>(n)",
    "MatMul": "p = MatMul(k2, k2)",
    "CumSum": "c = CumSum(k2, s0) p = Gather(c, s0)",
    "ArgMax": "a = ArgMax<keepdims=0>(k2) p = Add(a, s1)",
    "Sign": "p = Sign(s3)",
    "BitShift": 'b = Cast<to=13>(s1) v = BitShift<direction="LEFT">(b, b) p = Cast<to=7>(v)',
    "If": "l = Less(k, s3) p = If(l) <then_branch = b () => (o) { o = Identity(k) }, else_branch = b () => (o) "
    "{ o = Identity(s3) }>",
}


@pytest.mark.parametrize("operator", PADS)
def test_pads(operator: str) -> None:
    """An exporter's "same": what the operators give is the layer's padding, as ONNX Runtime pads."""
    body = f"{PADS[operator]} u = Unsqueeze(p, ax) pads = Concat<axis=0>(z2, u, u, z2, u, u) xp = Pad(x, pads) "
    arrays: dict[str, Any] = {name: v if isinstance(v, np.generic) else np.array(v) for name, v in INTEGERS.items()}
    made = model(body + "y = Conv<strides=[2,2]>(xp, w)", **arrays, ax=[0], z2=np.zeros(2, np.int64))
    (padded,) = run_onnx(made, ["xp"], {"x": np.zeros((1, 3, 9, 9), np.float32)})
    amount = (padded.shape[2] - 9) // 2
    layer = read(made)
    assert layer.spec is not None
    assert (layer.src, layer.spec.padding) == ("x", ((amount, amount), (amount, amount)))
    same_numbers(made, layer)


# ---- weights -------------------------------------------------------------------------------------

NORMS = {
    "weight normalisation": "n = ReduceL2<keepdims=1>(w, axes) q = Div(w, n) v = Mul(q, gain)",
    "standardisation": "m = ReduceMean<keepdims=1>(w, axes) d = Sub(w, m) q = Mul(d, d) "
    "s = ReduceMean<keepdims=1>(q, axes) e = Add(s, tiny) r = Sqrt(e) v = Div(d, r)",
    "spectral": "f = Flatten(w) t = Transpose(f) a = MatMul(f, side) b = ReduceL2<keepdims=0>(a) v = Div(w, b)",
    "fake quantisation": "q = QuantizeLinear<axis=0>(w, step, point) v = DequantizeLinear<axis=0>(q, step, point)",
    "a softmax": "v = Softmax<axis=1>(w)",
    "a relu, a tanh": "r = Relu(w) v = Tanh(r)",
    "a product": 'v = Einsum<equation="ab,bcij->acij">(square, w)',
    "flipped by steps": "v = Slice(w, last, first, where, back)",
    "gathered": "v = GatherElements<axis=0>(w, order)",
    "top ones": "s, i = TopK<axis=0>(w, all) v = Identity(s)",
    "padded": "v = Pad(small, around)",
    "resized": "v = Resize(small, , , sizes)",
    "a sum": "u = ConstantOfShape(shape) v = Add(u, w)",
    "scales of blocks": "v = DequantizeLinear<axis=1, block_size=3>(w8, blocks)",
    "dropout that is told not to train": "v = Dropout(w, half, no)",
    "a product of its own": "p = com.microsoft.FusedMatMul<alpha=0.5, transB=1>(tall, wide) v = Reshape(p, shape)",
    "an inverse, then ONNX's own": 'i = com.microsoft.Inverse(square) v = Einsum<equation="ab,bcij->acij">(i, w)',
    "of three results": "n, m, s = com.microsoft.SkipLayerNormalization(flat, flat, gamma) v = Reshape(n, shape)",
    "padded by ONNX Runtime": "v = com.microsoft.Pad(small, around)",
    "scaled by ONNX's of machine learning": "s = ai.onnx.ml.Scaler<offset=[0.5], scale=[2.0]>(tall) "
    "p = MatMul(s, across) v = Reshape(p, shape)",
}
SMALL: dict[str, Any] = {
    "axes": np.array([1, 2, 3]),
    "gain": RNG.uniform(1, 2, (4, 1, 1, 1)).astype(np.float32),
    "tiny": np.float32(1e-5),
    "side": RNG.standard_normal(27).astype(np.float32),
    "step": np.full(4, 0.02, np.float32),
    "point": np.zeros(4, np.int8),
    "square": RNG.standard_normal((4, 4)).astype(np.float32),
    "last": np.array([-1]),
    "first": np.array([-9]),
    "where": np.array([3]),
    "back": np.array([-1]),
    "order": np.tile(np.array([3, 1, 2, 0]).reshape(4, 1, 1, 1), (1, 3, 3, 3)),
    "all": np.array([4]),
    "small": RNG.standard_normal((4, 3, 1, 1)).astype(np.float32),
    "around": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "sizes": np.array([4, 3, 3, 3]),
    "shape": np.array([4, 3, 3, 3]),
    "w8": RNG.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8),
    "blocks": RNG.uniform(0.1, 1, (4, 1, 3, 3)).astype(np.float32),
    "half": np.float32(0.5),
    "no": np.array(False),
    "tall": RNG.standard_normal((12, 2)).astype(np.float32),
    "wide": RNG.standard_normal((9, 2)).astype(np.float32),
    "across": RNG.standard_normal((2, 9)).astype(np.float32),
    "flat": RNG.standard_normal((1, 12, 9)).astype(np.float32),
    "gamma": RNG.uniform(1, 2, 9).astype(np.float32),
}


@pytest.mark.parametrize("what", NORMS)
def test_weights(what: str) -> None:
    made = model(f"{NORMS[what]} y = Conv(x, v)", 21 if "block_size" in NORMS[what] else 18, **SMALL)
    layer = read(made)
    (expected,) = run_onnx(made, ["v"], {"x": np.zeros((1, 3, 9, 9), np.float32)})
    np.testing.assert_array_equal(layer.arrays["weights"], expected)
    assert layer.unknown == ""


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20, onnx.defs.onnx_opset_version()])
def test_weights_of_every_version(opset: int) -> None:
    """Reductions took their axes as an attribute at first; what is too new for ONNX Runtime is computed as well."""
    axes = "m = ReduceMean<axes=[1,2,3]>(w)" if opset < 18 else "m = ReduceMean(w, axes)"
    layer = read(model(f"{axes} v = Sub(w, m) y = Conv(x, v)", opset, axes=np.array([1, 2, 3])))
    np.testing.assert_allclose(layer.arrays["weights"], W - W.mean((1, 2, 3), keepdims=True), atol=1e-6)


def test_bfloat16() -> None:
    """ONNX Runtime multiplies none of these on a processor."""
    made = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (bfloat16[1,3,9,9] x) => (y) { v = Mul(w, w) y = Conv(x, v) }'
    )
    rounded = helper.make_tensor("w", onnx.TensorProto.BFLOAT16, W.shape, W.reshape(-1))
    made.graph.initializer.append(rounded)
    found = read(made).arrays["weights"].astype(np.float32)
    np.testing.assert_allclose(found, W * W, rtol=2**-6)


# ---- what stays unknown --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("v = RandomNormalLike(w) y = Conv(x, v)", "'v' is computed by RandomNormalLike 'v'"),
        ("b = Bernoulli(w) v = Mul(w, b) y = Conv(x, v)", "'v' is computed by Mul 'v'"),
        ("d = Dropout(w, half, yes) y = Conv(x, d)", "'d' is computed by Dropout 'd'"),
        (
            "s = ReduceSum<keepdims=0>(x) t = Cast<to=9>(s) d = Dropout(w, half, t) y = Conv(x, d)",
            "'d' is computed by Dropout 'd'",
        ),
        ("m = ReduceMean<keepdims=0>(x) v = Mul(w, m) y = Conv(x, v)", "'v' is computed by Mul 'v'"),
        ("m = ReduceMean<keepdims=0>(x) b = Expand(m, four) y = Conv(x, w, b)", "'b' is computed by Expand 'b'"),
    ],
)
def test_arrays_that_are_not_known_say_why(body: str, reason: str) -> None:
    layer = read(model(body, half=np.float32(0.5), yes=np.array(True), four=np.array([4])))
    assert layer.arrays == {}
    assert layer.unknown.startswith(reason)


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        ("other.Mystery(w)", "after Mystery 'v': model: value 'v': expected a constant that can be computed"),
        ("com.microsoft.BiasDropout(w, w)", "after BiasDropout 'v'"),
        ("com.microsoft.Mystery(w)", "after Mystery 'v': model: value 'v': expected a constant that can be computed"),
    ],
)
def test_other_domains_that_give_no_shape(operator: str, reason: str) -> None:
    """What ONNX Runtime does not run, or would run with another result every time."""
    (layer,) = layers_from_onnx(model(f"v = {operator} y = Conv(x, v)"), arrays=True)
    assert reason in str(layer.refusal)


def test_large_operands_of_other_domains_are_not_read_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("v = com.microsoft.TransposeMatMul(square, w4) y = Conv(x, v)", square=SMALL["square"], w4=W)
    monkeypatch.setattr(onnx_inference, "MOST_SEEN", 10)
    (layer,) = layers_from_onnx(made)
    assert "a shape that shape inference finds" in str(layer.refusal)


def test_a_dropout_behind_a_convolution() -> None:
    """Told not to train it hands on what it is given; told to train it stays, and nothing behind it is folded."""
    behind = "c = Conv(x, w) d = Dropout(c, half, told) y = Relu(d)"
    layer = read(inference := model(behind, half=np.float32(0.5), told=np.array(False)))
    assert layer.spec is not None
    assert (layer.dst, layer.spec.activation) == ("y", "relu")
    same_numbers(inference, layer)
    assert read(model(behind, half=np.float32(0.5), told=np.array(True))).dst == "c"


def test_weights_that_are_given() -> None:
    made = model("y = Conv(x, given)")
    made.graph.input.append(helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, W.shape))
    assert read(made).unknown == "'given' is an input"


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of many numbers, which has few elements, is not computed."""
    arrays: dict[str, Any] = {
        "a": np.ones((36, 50), np.float32),
        "b": np.ones((50, 3), np.float32),
        "shape": np.array([4, 3, 3, 3]),
    }
    made = model("p = MatMul(a, b) v = Reshape(p, shape) y = Conv(x, v)", **arrays)
    assert (read(made).arrays["weights"] == 50).all()
    monkeypatch.setattr(onnx_graph, "MOST_WORK", 1000.0)
    (layer,) = layers_from_onnx(made, arrays=True)
    assert "value 'v': expected a constant of at most" in str(layer.refusal)
    pooled = model("v = MaxPool<kernel_shape=[9,9], pads=[4,4,4,4]>(w) y = Conv(x, v)")
    (layer,) = layers_from_onnx(pooled, arrays=True)
    assert "value 'v': expected a constant of at most" in str(layer.refusal)


# ---- what PyTorch exports ------------------------------------------------------------------------


def _modules() -> dict[str, Callable[[Any], Any]]:
    def standardised(torch: Any) -> Any:
        class Standardised(torch.nn.Conv2d):
            def forward(self, x: Any) -> Any:
                w = self.weight
                w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
                return torch.nn.functional.conv2d(x, w, self.bias)

        return Standardised(3, 4, 3)

    def quantised(torch: Any) -> Any:
        class Quantised(torch.nn.Conv2d):
            def forward(self, x: Any) -> Any:
                scale, zero = torch.full((4,), 0.01), torch.zeros(4, dtype=torch.int32)
                w = torch.fake_quantize_per_channel_affine(self.weight, scale, zero, 0, -128, 127)
                return torch.nn.functional.conv2d(x, w, self.bias)

        return Quantised(3, 4, 3)

    return {
        "weight_norm": lambda torch: torch.nn.utils.weight_norm(torch.nn.Conv2d(3, 4, 3)),
        "parametrised": lambda torch: torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 4, 3)),
        "spectral_norm": lambda torch: torch.nn.utils.spectral_norm(torch.nn.Conv2d(3, 4, 3)),
        "standardised": standardised,
        "quantised": quantised,
    }


@pytest.mark.parametrize("name", _modules())
def test_normalised_modules_of_pytorch(name: str) -> None:
    torch = pytest.importorskip("torch")
    file, x = io.BytesIO(), torch.randn(1, 3, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = _modules()[name](torch).eval()
        torch.onnx.export(module, (x,), file, dynamo=False)
    layer = read(onnx.load_from_string(file.getvalue()))
    assert sorted(layer.arrays) == ["bias", "weights"]
    got = torch.nn.functional.conv2d(x, *(torch.from_numpy(layer.arrays[key].copy()) for key in ("weights", "bias")))
    torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-5)
