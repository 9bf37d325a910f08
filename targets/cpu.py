"""CPUs, compiled by LLVM: this machine (``cpu``) or a named model (``cpu:haswell``)."""

from __future__ import annotations

import json

from convgen.errors import UnsupportedError
from convgen.machine import machine
from convgen.target import Target

#: What a kernel's CPU check asks for: the features LLVM may use for f32 kernels, by the names of
#: the C compilers' __builtin_cpu_supports, keyed by LLVM's.
CHECKED = {
    "sse4.2": "sse4.2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "bmi": "bmi",
    "bmi2": "bmi2",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512vbmi2",
    "avx512ifma": "avx512ifma",
    "avx512vnni": "avx512vnni",
}

#: Architectures without CPUID: triple and vector facts. NEON has 32 registers of 128 bits.
CROSS = {"aarch64": "aarch64-linux-gnu"}


def resolve(model: str) -> Target:
    """The target for an LLVM processor name, prefixed by its architecture unless it is x86-64
    (``aarch64-cortex-a72``); this machine's own where ``model`` is empty.

    Raises:
        UnsupportedError: LLVM knows no such processor.
    """
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    here = machine()
    own = codegen.llvm_get_system_cpu()
    arch, _, cpu = model.partition("-")
    config = {"kind": "llvm", "num-cores": here.cores}
    if arch in CROSS:
        config |= {"mtriple": CROSS[arch], "mcpu": cpu or "generic"}
    else:
        config |= {"mcpu": model or own}
    base = TvmTarget({k: v for k, v in config.items() if k != "mcpu"})
    known = codegen.llvm_get_cpu_archlist(base)
    if config["mcpu"] not in {str(name) for name in known}:
        raise UnsupportedError(f"target: expected a processor LLVM knows, found {config['mcpu']!r}")
    features = {str(f) for f in codegen.llvm_get_cpu_features(TvmTarget(config))}
    if arch in CROSS:
        bits, registers, native = 128, 32, False
    else:
        bits = 512 if "avx512f" in features else 256 if "avx2" in features else 128
        registers = 32 if bits == 512 else 16
        isa = tuple(name for feature, name in CHECKED.items() if feature in features)
        native = set(isa) <= set(here.features)
    is_own = config["mcpu"] == own and arch not in CROSS
    return Target(
        kind="cpu",
        spelling=f"cpu:{model or own}",
        tvm_config=json.dumps(config, sort_keys=True),
        vector_bits=bits,
        vector_registers=registers,
        isa=() if arch in CROSS else isa,
        l1=here.l1 or 32 << 10,
        l2=here.l2 or 512 << 10,
        l3=here.l3 or 8 << 20,
        cores=here.cores,
        native=native,
        hardware=here.fingerprint if is_own or native else "unknown",
    )


def known() -> list[str]:
    """Spellings worth listing: this machine first."""
    return ["cpu", "cpu:x86-64-v2", "cpu:x86-64-v3", "cpu:haswell", "cpu:znver4", "cpu:aarch64-cortex-a72"]
