"""TVM and NumPy, imported when something of them is first used, and without PyTorch in processes of convgen's own.

Schedules answer most questions (whether they apply, their picks, what they cost) without TVM, whose import takes a
second, and without NumPy: modules that only sometimes need them say ``from ..deferred import np, te, tirx``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import tvm
    from tvm import te, tirx

__all__ = ["keep_torch_out", "np", "te", "tirx", "tvm"]


class _Deferred(ModuleType):
    """Stands for a module; imports it for the first of its names that is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what looks at modules must not load one
            raise AttributeError(name)
        module = import_module(self.__name__)
        self.__dict__.update({key: value for key, value in vars(module).items() if not key.startswith("__")})
        return getattr(module, name)


if not TYPE_CHECKING:
    np, tvm, te, tirx = map(_Deferred, ("numpy", "tvm", "tvm.te", "tvm.tirx"))


# ---- without PyTorch --------------------------------------------------------------------------

_TORCH = "torch"


class _Alone(Loader):
    """Loads a module as its own loader does; PyTorch, unless it is loaded already, is not found meanwhile."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        hidden = _TORCH not in sys.modules
        if hidden:
            sys.modules[_TORCH] = None  # type: ignore[assignment]  # an import of it raises ImportError
        try:
            self._loader.exec_module(module)
        finally:
            if hidden:
                del sys.modules[_TORCH]

    def __getattr__(self, name: str) -> Any:  # what readers of sources and resources ask a loader for
        return getattr(self.__dict__["_loader"], name)


class _TvmAlone(MetaPathFinder):
    """Finds TVM and its FFI."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in ("tvm", "tvm_ffi") else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Alone(spec.loader)
        return spec


def keep_torch_out() -> None:
    """From now on TVM does not import PyTorch, which takes seconds and is of no use to it here.

    For the command line and its workers. Not where convgen is a library: whoever imports it may hand tensors of
    PyTorch to functions of TVM's, which then would not know them.
    """
    if not any(isinstance(finder, _TvmAlone) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TvmAlone())
