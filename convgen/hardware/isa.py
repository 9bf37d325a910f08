"""Instructions: which of them kernels may use, and how the CPU that a kernel meets is asked whether it has them.

A compiler may use those that all CPUs of an architecture have and those of :data:`CHECKED`, for which a kernel asks
before it runs. Whatever else LLVM turns on for a processor, known here or not, :func:`forbidden` tells to turn off.

Imports neither NumPy nor TVM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """A group of instructions that a CPU has or lacks.

    Attributes:
        llvm: LLVM's name.
        name: the name in :attr:`~convgen.hardware.machine.Machine.features`, manifests and error texts.
        word: where a CPU tells, as arguments of ``convgen_cpu_tells`` (``runtime/cpu.h``): CPUID's leaf, subleaf and
            register, or the word of Linux's hardware capabilities.
        bit: which bit of it.
        state: registers that the system must save between threads, as bits of XCR0.
    """

    llvm: str
    name: str
    word: str
    bit: int
    state: int = 0


#: Vector registers of 256 bits; those of 512 bits with their masks; matrix tiles.
_AVX, _AVX512, _AMX = 0x06, 0xE6, 0x60000
#: Features whose instructions no compiler makes of ordinary code: a kernel asks for those that its schedule writes.
WRITTEN = ("amx-tile", "amx-bf16", "amx-int8")

#: LLVM, C compilers and :func:`~convgen.hardware.machine.parse_cpuinfo` call features of x86 by the same names.
_X86 = {
    "0x1, 0, CONVGEN_ECX": {
        "sse3": 0, "ssse3": 9, "sse4.1": 19, "sse4.2": 20, "popcnt": 23, "movbe": 22, "avx": 28, "f16c": 29, "fma": 12,
    },
    "0x80000001, 0, CONVGEN_ECX": {"lzcnt": 5, "sse4a": 6},
    "0x7, 0, CONVGEN_EBX": {
        "bmi": 3, "bmi2": 8, "avx2": 5, "avx512f": 16, "avx512bw": 30, "avx512cd": 28, "avx512dq": 17, "avx512vl": 31,
        "avx512ifma": 21,
    },
    "0x7, 0, CONVGEN_ECX": {
        "avx512vbmi": 1, "avx512vbmi2": 6, "avx512vnni": 11, "avx512bitalg": 12, "avx512vpopcntdq": 14, "gfni": 8,
    },
    "0x7, 0, CONVGEN_EDX": {"avx512fp16": 23, "amx-bf16": 22, "amx-tile": 24, "amx-int8": 25},
    "0x7, 1, CONVGEN_EAX": {"avx512bf16": 5, "avxvnni": 4},
}  # fmt: skip

#: LLVM's names of Arm features: Linux's, which tells them, and their bits.
_ARM = {
    "AT_HWCAP": {
        "neon": ("asimd", 1), "rdm": ("asimdrdm", 12), "dotprod": ("asimddp", 20), "fullfp16": ("asimdhp", 10),
        "fp16fml": ("asimdfhm", 23), "complxnum": ("fcma", 14), "lse": ("atomics", 8), "sve": ("sve", 22),
    },
    "AT_HWCAP2": {"bf16": ("bf16", 14), "i8mm": ("i8mm", 13), "sve2": ("sve2", 1)},
}  # fmt: skip


def _state(name: str) -> int:
    if name in WRITTEN:
        return _AMX
    return _AVX512 if name.startswith("avx512") else _AVX if name.startswith("avx") or name in ("fma", "f16c") else 0


#: What kernels ask for, by architecture: all that LLVM makes of ordinary code and that is worth having.
CHECKED = {
    "x86_64": tuple(
        Feature(name, name, word, bit, _state(name)) for word, bits in _X86.items() for name, bit in bits.items()
    ),
    "aarch64": tuple(
        Feature(llvm, name, word, bit) for word, bits in _ARM.items() for llvm, (name, bit) in bits.items()
    ),
}

#: LLVM's features that need no question, by architecture: first what every CPU of it has, then what decides which of
#: the allowed instructions LLVM prefers, names of processor families among them.
_FREE = {
    "x86_64": re.compile(
        r"64bit(-mode)?|x87|cx8|cmov|mmx|fxsr|sse2?|nopl|"
        r"((tuning-)?(fast|faster|slow|prefer|allow|no|false-deps|use|lea|pad|idiv[lq])-.+)|"
        r"(macro|branch)fusion|branch-hint|ermsb|fsrm|sbb-dep-breaking|vzeroupper"
    ),
    "aarch64": re.compile(
        r"fp-armv8|v\d+(\.\d+)?a|"
        r"(aggressive|alternate|avoid|balance|disable|enable|force|fuse|max|no|slow|use|zc[mz])-.+|"
        r"(addr-lsl-slow|alu-lsl-fast|exynos-cheap|predictable-select|store-pair-suppress|strict-align).*|"
        r"(arith|cmp)-\w+-fusion|(ld|st)p-aligned-only|"
        r"(cortex-)?[arx]\d+\w*|(ampere|apple-|c1-|carmel|exynosm|falkor|fujitsu-|kryo|neoverse).*|"
        r"(olympus|oryon-|saphira|thunderx|tsv).*"
    ),
}


def asked(isa: Iterable[str], written: Iterable[str]) -> tuple[str, ...]:
    """What a kernel asks for, of what its target has: all but what only some schedules write, and has ``written``."""
    own = set(written)
    return tuple(name for name in isa if name not in WRITTEN or name in own)


def forbidden(features: Iterable[str], arch: str) -> list[str]:
    """Those of a processor's features, as LLVM names them, that no kernel may use: nothing asks for them."""
    asked = {feature.llvm for feature in CHECKED[arch]}
    return sorted(name for name in features if name not in asked and not _FREE[arch].fullmatch(name))
