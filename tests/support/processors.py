"""Every processor that LLVM knows."""

from __future__ import annotations

from typing import Any


def _config(arch: str) -> dict[str, Any]:
    return {"kind": "llvm", "mtriple": f"{arch}-linux-gnu"}


def names(arch: str) -> list[str]:
    """LLVM's names of an architecture's processors; of x86-64 also those of 32 bits."""
    from tvm.target import Target, codegen

    return sorted(map(str, codegen.llvm_get_cpu_archlist(Target(_config(arch)))))


def features(arch: str, name: str, off: tuple[str, ...] = ()) -> set[str]:
    """What LLVM turns on for one, with some of it turned off."""
    from tvm.target import Target, codegen

    config = {**_config(arch), "mcpu": name, "mattr": [f"-{feature}" for feature in off]}
    return set(map(str, codegen.llvm_get_cpu_features(Target(config))))


def spellings(arch: str) -> list[str]:
    """convgen's names of those with 64 bits."""
    if arch == "x86_64":
        return [f"cpu:{name}" for name in names(arch) if "64bit" in features(arch, name)]
    return [f"cpu:{arch}-{name}" for name in names(arch)]
