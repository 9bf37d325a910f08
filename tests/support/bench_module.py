"""The programs in ``bench/``, which are no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from paths import ROOT


def load_bench(name: str) -> ModuleType:
    """``bench/<name>.py``, known to pickle and to worker processes as ``bench_<name>``."""
    path = ROOT / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
