"""Tuned convolution kernels from a declarative spec, lowered through Apache TVM.

>>> import convgen
>>> kernel = convgen.build("conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1 relu")  # doctest: +SKIP
>>> layer = kernel.bind(weights, bias)  # doctest: +SKIP
>>> y = layer(x)  # doctest: +SKIP

Names are imported when they are first used: ``import convgen`` takes a millisecond, a spec needs
the standard library only, :func:`load` NumPy besides, and TVM comes with :func:`build`.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# ONNX Runtime 1.31 and later reports on its use over the network, and leaves a file in the working directory.
# A user's layers are nobody's business; who wants the reports sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .api import build, compile, for_onnxruntime, tune  # noqa: A004  (convgen.compile, as torch.compile)
    from .check.onnx_separable import separable_model
    from .check.validate import Report, validate
    from .errors import ConvgenError
    from .formats.entries import SpecEntry
    from .formats.keras import specs_from_keras
    from .formats.onnx.reader import specs_from_onnx
    from .formats.pytorch import layers_from_torch, spec_from_torch
    from .formats.sources import read_specs
    from .kernel.kernel import Kernel
    from .kernel.library import Layer, Library
    from .network.check.exported import validate_folder
    from .network.load import load
    from .network.network import Network
    from .problem.separable import SeparableSpec
    from .problem.spec import ConvSpec

    __version__: str

__all__ = [
    "ConvSpec",
    "ConvgenError",
    "Kernel",
    "Layer",
    "Library",
    "Network",
    "Report",
    "SeparableSpec",
    "SpecEntry",
    "__version__",
    "build",
    "compile",
    "for_onnxruntime",
    "layers_from_torch",
    "load",
    "read_specs",
    "separable_model",
    "spec_from_torch",
    "specs_from_keras",
    "specs_from_onnx",
    "tune",
    "validate",
    "validate_folder",
]

#: The modules that define the names above.
_MODULES = {
    "ConvSpec": "problem.spec",
    "ConvgenError": "errors",
    "Kernel": "kernel.kernel",
    "Layer": "kernel.library",
    "Library": "kernel.library",
    "Network": "network.network",
    "Report": "check.validate",
    "SeparableSpec": "problem.separable",
    "SpecEntry": "formats.entries",
    "build": "api",
    "compile": "api",
    "for_onnxruntime": "api",
    "load": "network.load",
    "read_specs": "formats.sources",
    "separable_model": "check.onnx_separable",
    "layers_from_torch": "formats.pytorch",
    "spec_from_torch": "formats.pytorch",
    "specs_from_keras": "formats.keras",
    "specs_from_onnx": "formats.onnx.reader",
    "tune": "api",
    "validate": "check.validate",
    "validate_folder": "network.check.exported",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith(f"{__name__}."):
            raise
        found = "found convgen-runtime, which loads compiled libraries and no more"
        raise ImportError(f"convgen.{name}: expected the whole of convgen, {found}") from error
    globals()[name] = value
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("convgen")
    except PackageNotFoundError:
        return version("convgen-runtime")  # the part of this package that has no compiler


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
