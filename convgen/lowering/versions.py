"""The versions that code generation depends on."""

from __future__ import annotations

import importlib.metadata
from functools import cache

from ..hardware.llvm import llvm_version


@cache
def versions() -> dict[str, str]:
    """What a kernel's code depends on besides its schedule: written into records and manifests."""
    return {
        "convgen": importlib.metadata.version("convgen"),
        "tvm": importlib.metadata.version("apache-tvm"),
        "llvm": llvm_version(),
    }
