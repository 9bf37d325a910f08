"""ONNX models run by ONNX Runtime, in the place of networks."""

from __future__ import annotations

from typing import Any

import onnxruntime

from convgen.network.reading import read_graph


class Reference:
    """An ONNX model that networks are read from, run by ONNX Runtime."""

    def __init__(self, model: Any) -> None:
        read_graph(model)
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, *arrays: Any, out: dict[str, Any]) -> None:
        inputs = {value.name: array for value, array in zip(self.session.get_inputs(), arrays, strict=True)}
        for name, array in zip(self.outputs, self.session.run(None, inputs), strict=True):
            assert out[name].shape == array.shape
            assert out[name].flags.c_contiguous  # as networks require
            out[name][...] = array
