"""Small ONNX graphs around a convolution, and what ONNX Runtime computes of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper, parser

from convgen.check.reference import run_onnxruntime
from convgen.formats.onnx.node import OnnxLayer

SCALARS = {"half": 0.5, "nhalf": -0.5, "zero": 0, "one1": 1, "two": 2, "three": 3, "six": 6, "sixth": 1 / 6}
SCALARS |= {"fifth": 0.2, "sqrt2": 2**0.5, "rsqrt2": 0.5**0.5, "cubic": 0.044715, "root": (2 / math.pi) ** 0.5}


CONSTANTS = {"w": (4, 4, 3, 3), "w2": (4, 2, 3, 3), "k": (4,), "mean": (4,), "shift": (4,), "k3": (4, 1, 1)}
CONSTANTS |= {"k4": (1, 4, 1, 1), "one": (1,)}


def graph(
    body: str, outputs: str = "y", inputs: str = "", opset: int = 20, conv: str = "c = Conv<pads=[1,1,1,1]>(x, w)"
) -> onnx.ModelProto:
    """A 4-channel 3x3 convolution of x into c, followed by ``body``; constants that it does not use are absent."""
    declared = ", ".join(f"float[1,4,8,8] {name}" for name in outputs.split())
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[1,4,8,8] x{inputs}) => ({declared})'
    source = parser.parse_model(f"{head} {{ {conv} {body} }}")
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {n: rng.uniform(0.5, 1.5, shape).astype(np.float32) for n, shape in CONSTANTS.items()}
    arrays |= {name: np.float32(value) for name, value in SCALARS.items()}
    arrays |= {"axes12": np.array([1, 2]), "shape": np.array([1, 4, 1, 1]), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    arrays |= {"w8": rng.integers(-9, 9, (4, 4, 3, 3)).astype(np.int8), "z8": np.arange(4, dtype=np.int8)}
    used = {name for node in source.graph.node for name in node.input}
    source.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items() if name in used
    )
    return source


def run_onnx(model: onnx.ModelProto, wanted: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Values of a model, inner ones too, by ONNX Runtime without its own fusions."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(changed.SerializeToString(), options, ["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, feeds)
    return outputs


def same_numbers(model: onnx.ModelProto, layer: OnnxLayer, feeds: dict[str, np.ndarray] | None = None) -> None:
    """The folded spec with the folded arrays computes the value of the model that it says it does."""
    spec = layer.spec
    assert spec is not None
    rng = np.random.default_rng(1)
    if feeds is None:
        feeds = {}
        for value in model.graph.input:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            feeds[value.name] = (3 * rng.standard_normal(shape)).astype(np.float32)
    names = [layer.src, layer.dst] + [layer.residual] * spec.residual
    given = [name for name in names if name in feeds]
    found = dict(zip(rest := [n for n in names if n not in given], run_onnx(model, rest, feeds), strict=True)) | feeds
    residual = {"residual": found[layer.residual]} if spec.residual else {}
    got = run_onnxruntime(spec, found[layer.src], **layer.arrays, **residual, threads=1)
    expected = found[layer.dst]
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * scale, err_msg=str(spec))


#: What follows a convolution without bias -> what the spec has instead of ``nobias``.
