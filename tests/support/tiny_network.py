"""A small ONNX model: four convolutions in a row, two of them alike; and kernels of layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import convgen
from convgen.formats.entries import SpecEntry
from convgen.kernel.library import Library
from convgen.problem.spec import ConvSpec


def chain_model(path: Path, *, strange: bool = False) -> None:
    """Write it.

    Args:
        strange: with a convolution of doubles beside, which specs do not have.
    """
    rng = np.random.default_rng(1)
    shapes = {"first": (8, 3, 3, 3), "second": (8, 8, 3, 3), "third": (8, 8, 3, 3), "fourth": (4, 8, 1, 1)}
    nodes, weights, value = [], [], "x"
    for name, shape in shapes.items():
        fan_in = np.prod(shape[1:])
        weights.append(numpy_helper.from_array(rng.normal(0, fan_in**-0.5, shape).astype(np.float32), f"{name}.w"))
        weights.append(numpy_helper.from_array(rng.normal(0, 1, shape[0]).astype(np.float32), f"{name}.b"))
        pads = [shape[2] // 2] * 4
        nodes.append(helper.make_node("Conv", [value, f"{name}.w", f"{name}.b"], [f"{name}.y"], name=name, pads=pads))
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [f"{name}.relu"]))
        value = f"{name}.relu"
    outputs = [helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, 4, 12, 12])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])]
    if strange:
        inputs.append(helper.make_tensor_value_info("d", TensorProto.DOUBLE, [1, 1, 4, 4]))
        outputs.append(helper.make_tensor_value_info("e", TensorProto.DOUBLE, [1, 1, 4, 4]))
        weights.append(numpy_helper.from_array(np.ones((1, 1, 1, 1)), "double.w"))
        nodes.append(helper.make_node("Conv", ["d", "double.w"], ["e"], name="double"))
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def kernels_for(layers: list[SpecEntry], threads: int = 1) -> dict[ConvSpec, Library]:
    """The default kernel of each spec."""
    kernels: dict[ConvSpec, Library] = {}
    for layer in layers:
        if layer.spec not in kernels:
            kernel = convgen.build(layer.spec, threads=threads, records=False)
            assert isinstance(kernel, Library)
            kernels[layer.spec] = kernel
    return kernels
