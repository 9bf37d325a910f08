"""The programs in ``bench/``, which are not installed, as modules."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from paths import ROOT


def load_bench(name: str) -> ModuleType:
    """``bench/<name>.py``."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module(f"bench.{name}")
