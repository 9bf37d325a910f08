"""CPUs, compiled by LLVM: this machine (``cpu``) or a named model (``cpu:haswell``)."""

from __future__ import annotations

import json
import platform

from convgen.errors import UnsupportedError
from convgen.hardware.machine import Machine
from convgen.hardware.machine import machine as this_machine
from convgen.hardware.target import Target

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

#: The same of Arm, by the names Linux gives features of processors.
CHECKED_ARM = {
    "neon": "asimd",
    "rdm": "asimdrdm",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "complxnum": "fcma",
    "lse": "atomics",
    "bf16": "bf16",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
}

#: Architectures that a spelling begins with: triple and vector facts. NEON has 32 registers of 128 bits.
CROSS = {"aarch64": "aarch64-linux-gnu"}


def resolve(model: str, machine: Machine | None = None) -> Target:
    """The target for an LLVM processor name, prefixed by its architecture unless it is x86-64
    (``aarch64-cortex-a72``); the machine's own where ``model`` is empty.

    Args:
        machine: the one the kernels are to run on; this one where None.

    Raises:
        UnsupportedError: LLVM knows no such processor.
    """
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    here = machine or this_machine()
    own = here.llvm if machine else codegen.llvm_get_system_cpu()
    own = f"{here.arch}-{own}" if here.arch in CROSS else own
    arch, _, cpu = (model or own).partition("-")
    config = {"kind": "llvm", "num-cores": here.cores, "mcpu": model or own}
    if arch in CROSS:
        config |= {"mtriple": CROSS[arch], "mcpu": cpu or "generic"}
    elif platform.machine() != "x86_64":
        config |= {"mtriple": "x86_64-linux-gnu"}
    base = TvmTarget({k: v for k, v in config.items() if k != "mcpu"})
    known = codegen.llvm_get_cpu_archlist(base)
    if config["mcpu"] not in {str(name) for name in known}:
        raise UnsupportedError(f"target: expected a processor LLVM knows, found {config['mcpu']!r}")
    features = {str(f) for f in codegen.llvm_get_cpu_features(TvmTarget(config))}
    if arch in CROSS:
        bits, registers, checked = 128, 32, CHECKED_ARM
    else:
        bits = 512 if "avx512f" in features else 256 if "avx2" in features else 128
        registers, checked = 32 if bits == 512 else 16, CHECKED
    isa = tuple(name for feature, name in checked.items() if feature in features)
    native = here.arch == (arch if arch in CROSS else "x86_64") and set(isa) <= here.features
    return Target(
        kind="cpu",
        spelling=f"cpu:{model or own}",
        tvm_config=json.dumps(config, sort_keys=True),
        vector_bits=bits,
        vector_registers=registers,
        isa=isa,
        l1=here.l1 or 32 << 10,
        l2=here.l2 or 512 << 10,
        l3=here.l3 or 8 << 20,
        cores=here.cores,
        native=native,
        hardware=here.fingerprint if native or (model or own) == own else "unknown",
    )


def fingerprint(machine: Machine) -> str:
    """The fingerprint that records of kernels for that machine's CPU are tied to."""
    return machine.fingerprint


def known() -> list[str]:
    """Spellings worth listing: this machine first."""
    return ["cpu", "cpu:x86-64-v2", "cpu:x86-64-v3", "cpu:haswell", "cpu:znver4", "cpu:aarch64-cortex-a72"]
