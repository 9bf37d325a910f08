"""LLVM's names of processors, what they have, and which of them this machine's is."""

from __future__ import annotations

from functools import cache

from .isa import CHECKED
from .llvm import features_of, numbered_processor
from .machine import machine

#: By architecture, processors from small to large, each a superset of those of its vendor before it. A hypervisor may
#: give a processor another's number, by which LLVM knows it, and tell truly what it has.
_GENERATIONS = {
    "x86_64": (
        "haswell",
        "skylake-avx512",
        "cascadelake",
        "icelake-server",
        "sapphirerapids",
        "znver2",
        "znver3",
        "znver4",
        "znver5",
    ),
    "aarch64": (),
}


@cache
def system_processor() -> str:
    """LLVM's name of this machine's processor: what its number says, unless it has instructions that processors of
    that number lack. Then it is the largest one of :data:`_GENERATIONS` that has nothing it hasn't, if that has more.
    """
    here = machine()
    return recognised(numbered_processor(), here.arch, here.features)


def recognised(numbered: str, arch: str, features: frozenset[str]) -> str:
    """LLVM's name of a processor.

    Args:
        numbered: the name that its number gives.
        features: what it has, by Linux's names.
    """

    def found(name: str) -> set[str]:
        on = features_of({"kind": "llvm", "mcpu": name})
        return {feature.name for feature in CHECKED[arch] if feature.llvm in on}

    asked = {feature.name for feature in CHECKED.get(arch, ())} & features
    if not _GENERATIONS.get(arch) or asked <= found(numbered):
        return numbered
    fitting = {name: found(name) for name in _GENERATIONS[arch]}
    best = max((name for name, has in fitting.items() if has <= asked), key=lambda n: len(fitting[n]), default=numbered)
    return best if len(fitting.get(best, ())) > len(found(numbered) & asked) else numbered
