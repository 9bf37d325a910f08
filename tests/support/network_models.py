"""Small networks as ONNX models, and what ONNX Runtime makes of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
OPSET = 17
#: What random networks are made of.
PARTS = (
    *("conv", "conv", "conv", "residual", "relu", "norm", "concat", "max", "mean", "split", "squeeze", "shuffle"),
    *("resize", "pad", "swish", "scalar", "head", "lrn"),
)


def model_of(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int]],
    outputs: Sequence[str],
    constants: Mapping[str, Array] | None = None,
    opset: int = OPSET,
) -> ModelProto:
    """A model of f32 inputs."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


def arrays_for(model: ModelProto, seed: int = 0) -> dict[str, Array]:
    """Standard normal inputs."""
    rng = np.random.default_rng(seed)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def expected(model: ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """ONNX Runtime's outputs, without optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def furthest(found: Any, wanted: Mapping[str, Array]) -> float:
    """The largest difference of all outputs, relative to the largest element of each."""
    arrays = found if isinstance(found, dict) else dict(zip(wanted, [found], strict=True))
    assert list(arrays) == list(wanted)
    worst = 0.0
    for name, array in wanted.items():
        assert arrays[name].shape == array.shape
        scale = float(np.abs(array).max()) if array.size else 1.0
        difference = np.abs(arrays[name] - array).max() if array.size else 0.0
        worst = max(worst, float(difference) / (scale or 1.0))
    return worst


class RandomNetwork:
    """A drawn network of convolutions and what stands between them.

    Args:
        seed: what it is drawn by.
        length: how many parts it has.
    """

    def __init__(self, seed: int, length: int = 7) -> None:
        self.rng, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        channels, size = self.rng.choice([3, 8, 16, 32]), self.rng.choice([5, 8, 14])
        self.inputs = {"x": (1, channels, size, size)}
        self.shapes["x"] = self.inputs["x"]
        for _ in range(length):
            self._part()
        read = {name for node in self.nodes for name in node.input}
        self.outputs = [name for name in self.shapes if name not in read] or ["x"]

    @property
    def model(self) -> ModelProto:
        return model_of(self.nodes, self.inputs, self.outputs, self.constants)

    def _constant(self, shape: Sequence[int], scale: float = 1.0) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = (scale * self.numbers.standard_normal(shape)).astype(np.float32)
        return name

    def _integers(self, values: Sequence[int]) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.array(values, np.int64)
        return name

    def _add(self, op: str, inputs: Sequence[str], shape: Sequence[int], **attributes: Any) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        self.shapes[output] = tuple(shape)
        return output

    def _image(self) -> str:
        """A tensor of images, one of the last ones more often."""
        names = [name for name, shape in self.shapes.items() if len(shape) == 4 and shape[2] > 1]
        return self.rng.choice(names[-3:])

    def _part(self) -> None:
        name = self._image()
        n, c, h, w = self.shapes[name]
        choice = self.rng.choice(PARTS)
        if choice in ("conv", "residual"):
            self._convolution(name, choice == "residual")
        elif choice == "relu":
            self._add(self.rng.choice(["Relu", "Sigmoid", "HardSwish", "LeakyRelu"]), [name], (n, c, h, w))
        elif choice == "swish":
            self._add("Mul", [name, self._add("Sigmoid", [name], (n, c, h, w))], (n, c, h, w))
        elif choice == "lrn":
            self._add("LRN", [name], (n, c, h, w), size=self.rng.choice([3, 5]), alpha=0.5, beta=0.75)
        elif choice == "scalar":
            self._add("Div", [name, self._constant(())], (n, c, h, w))
        elif choice == "norm":
            positive = self._constant((c,))
            self.constants[positive] = np.abs(self.constants[positive]) + 0.5
            self._add("BatchNormalization", [name, *(self._constant((c,)) for _ in range(3)), positive], (n, c, h, w))
        elif choice == "concat":
            others = [other for other, shape in self.shapes.items() if shape[2:] == (h, w) and shape[0] == n]
            parts = [name, *self.rng.choices(others, k=self.rng.choice([1, 2]))]
            self._add("Concat", parts, (n, sum(self.shapes[part][1] for part in parts), h, w), axis=1)
        elif choice in ("max", "mean") and min(h, w) >= 3:
            stride, pads = self.rng.choice([1, 2]), [1, 1, 1, 1]
            shape = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
            op = "MaxPool" if choice == "max" else "AveragePool"
            self._add(op, [name], shape, kernel_shape=[3, 3], strides=[stride] * 2, pads=pads)
        elif choice == "split" and c % 2 == 0:
            half = c // 2
            ends = [self._integers([value]) for value in (half, c, 1)]
            self._add("Slice", [name, *ends], (n, c - half, h, w))
        elif choice == "squeeze":
            mean = self._add("GlobalAveragePool", [name], (n, c, 1, 1))
            weights, bias = self._constant((c, c, 1, 1), c**-0.5), self._constant((c,))
            gate = self._add("Conv", [mean, weights, bias], (n, c, 1, 1))
            gate = self._add("HardSigmoid", [gate], (n, c, 1, 1))
            self._add("Mul", [name, gate], (n, c, h, w))
        elif choice == "shuffle" and c % 2 == 0:
            parted = self._add("Reshape", [name, self._integers([n, 2, c // 2, h, w])], (n, 2, c // 2, h, w))
            turned = self._add("Transpose", [parted], (n, c // 2, 2, h, w), perm=[0, 2, 1, 3, 4])
            self._add("Reshape", [turned, self._integers([n, c, h, w])], (n, c, h, w))
        elif choice == "resize" and h * w <= 200:
            scales = self._constant((4,))
            self.constants[scales] = np.array([1, 1, 2, 2], np.float32)
            mode = self.rng.choice(["nearest", "linear"])
            self._add("Resize", [name, "", scales], (n, c, 2 * h, 2 * w), mode=mode)
        elif choice == "pad":
            mode = self.rng.choice(["constant", "edge", *(["reflect"] if min(h, w) > 2 else [])])
            around = self._integers([0, 0, 1, 0, 0, 0, 2, 1])
            self._add("Pad", [name, around], (n, c, h + 3, w + 1), mode=mode)
        elif choice == "head":
            mean = self._add("GlobalAveragePool", [name], (n, c, 1, 1))
            flat = self._add("Flatten", [mean], (n, c))
            rows = self._add("Gemm", [flat, self._constant((10, c), c**-0.5), self._constant((10,))], (n, 10), transB=1)
            self._add("Softmax", [rows], (n, 10))

    def _convolution(self, name: str, residual: bool) -> None:
        n, c, h, w = self.shapes[name]
        groups = self.rng.choice([1, 1, c])
        kernel, stride = self.rng.choice([1, 3]), self.rng.choice([1, 1, 2])
        oc = c if residual or groups > 1 else self.rng.choice([8, 16, 24, 32])
        stride = 1 if residual else stride
        weights = self._constant((oc, c // groups, kernel, kernel), (c // groups * kernel**2) ** -0.5)
        pad = kernel // 2
        shape = (n, oc, (h + 2 * pad - kernel) // stride + 1, (w + 2 * pad - kernel) // stride + 1)
        parameters = [name, weights, *([self._constant((oc,))] if self.rng.random() < 0.5 else [])]
        made = self._add(
            "Conv", parameters, shape, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, group=groups
        )
        if residual:
            made = self._add("Add", [made, name], shape)
        if self.rng.random() < 0.6:
            self._add("Relu", [made], shape)
