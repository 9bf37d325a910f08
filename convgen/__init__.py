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
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

# ONNX Runtime 1.31 and later reports on its use over the network, and leaves a file in the working directory.
# A user's layers are nobody's business; who wants the reports sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .build import Kernel, build
    from .errors import ConvgenError
    from .formats.keras import specs_from_keras
    from .formats.pytorch import spec_from_torch
    from .library import Layer, Library, load
    from .onnx_reader import specs_from_onnx
    from .sources import SpecEntry, read_specs
    from .spec import ConvSpec
    from .tune import tune
    from .validate import Report, validate

    __version__: str

__all__ = [
    "ConvSpec",
    "ConvgenError",
    "Kernel",
    "Layer",
    "Library",
    "Report",
    "SpecEntry",
    "__version__",
    "build",
    "load",
    "read_specs",
    "spec_from_torch",
    "specs_from_keras",
    "specs_from_onnx",
    "tune",
    "validate",
]

_MODULES = {
    "ConvSpec": "spec",
    "ConvgenError": "errors",
    "Kernel": "build",
    "Layer": "library",
    "Library": "library",
    "Report": "validate",
    "SpecEntry": "sources",
    "build": "build",
    "load": "library",
    "read_specs": "sources",
    "spec_from_torch": "formats.pytorch",
    "specs_from_keras": "formats.keras",
    "specs_from_onnx": "onnx_reader",
    "tune": "tune",
    "validate": "validate",
}


class _Package(ModuleType):
    """This package, where ``build``, ``tune`` and ``validate`` stay the functions.

    They have the names of the modules that define them, and importing a submodule sets an attribute
    of that name on the package. Such a module is reached as ``from convgen.build import …``.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("convgen")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
