"""The import path that documentation has always named for reading models with their weights."""

from __future__ import annotations

from .formats.onnx.node import OnnxLayer
from .formats.onnx.reader import layers_from_onnx, specs_from_onnx

__all__ = ["OnnxLayer", "layers_from_onnx", "specs_from_onnx"]
