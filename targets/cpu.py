"""CPUs, compiled by LLVM: this machine (``cpu``) or a named model (``cpu:haswell``)."""

from __future__ import annotations

import difflib
import json
import platform
from typing import Any

from convgen.errors import UnsupportedError
from convgen.hardware.isa import CHECKED, forbidden
from convgen.hardware.llvm import features_of, processors_of
from convgen.hardware.machine import Machine
from convgen.hardware.machine import machine as this_machine
from convgen.hardware.processor import system_processor
from convgen.hardware.target import Target

#: Architectures that a spelling begins with: triple and vector facts. NEON has 32 registers of 128 bits.
CROSS = {"aarch64": "aarch64-linux-gnu"}


def resolve(model: str, machine: Machine | None = None) -> Target:
    """The target for an LLVM processor name, prefixed by its architecture unless it is x86-64
    (``aarch64-cortex-a72``), or without it where no x86-64 processor is called so; the machine's own where ``model``
    is empty.

    Args:
        machine: the one the kernels are to run on; this one where None.

    Raises:
        UnsupportedError: LLVM knows no such processor, or it has 32 bits; says which names are close.
    """
    here = machine or this_machine()
    own = here.llvm if machine else system_processor()
    own = f"{here.arch}-{own}" if here.arch in CROSS else own
    arch, cpu = _processor(model or own)
    model = f"{arch}-{cpu}" if arch in CROSS else cpu
    itself = model == own
    config: dict[str, Any] = {**_config(arch), "num-cores": here.cores, "mcpu": cpu}
    has = features_of(config) if cpu in processors_of(_config(arch)) else set()
    if not has or (arch == "x86_64" and "64bit" not in has):  # LLVM lists 32-bit ones, and ends the process over them
        raise UnsupportedError(f"target: expected a 64-bit processor LLVM knows, found {cpu!r}{_close(cpu)}")
    off = forbidden(has, arch)
    if itself and here.features:  # a hypervisor may hide what the model has
        off += sorted(f.llvm for f in CHECKED[arch] if f.llvm in has and f.name not in here.features)
    config |= {"mattr": [f"-{name}" for name in off]}
    has = features_of(config)  # what needs something that is off is off too
    bits = 128 if arch in CROSS else 512 if "avx512f" in has else 256 if "avx2" in has else 128
    isa = tuple(feature.name for feature in CHECKED[arch] if feature.llvm in has)
    native = here.arch == arch and set(isa) <= here.features
    return Target(
        kind="cpu",
        spelling=f"cpu:{model}",
        tvm_config=json.dumps(config, sort_keys=True),
        vector_bits=bits,
        vector_registers=32 if arch in CROSS or bits == 512 else 16,
        isa=isa,
        l1=here.l1 or 32 << 10,
        l2=here.l2 or 512 << 10,
        l3=here.l3 or 8 << 20,
        cores=here.cores,
        native=native,
        hardware=here.fingerprint if native or itself else "unknown",
    )


def _processor(model: str) -> tuple[str, str]:
    """The architecture and LLVM's name of the processor that a spelling means."""
    arch, _, cpu = model.partition("-")
    if arch in CROSS:
        return arch, cpu or "generic"
    known = ("x86_64", *CROSS)
    return next((arch for arch in known if model in processors_of(_config(arch))), known[0]), model


def _config(arch: str) -> dict[str, Any]:
    """TVM's of an architecture."""
    triple = CROSS.get(arch, "x86_64-linux-gnu")
    return {"kind": "llvm"} | ({} if arch not in CROSS and platform.machine() == arch else {"mtriple": triple})


def _close(cpu: str) -> str:
    """Spellings close to a name that is none, as the end of a message."""
    spellings = {
        name: f"cpu:{name}" if arch == "x86_64" else f"cpu:{arch}-{name}"
        for arch in ("x86_64", *CROSS)
        for name in sorted(processors_of(_config(arch)))
        if arch != "x86_64" or "64bit" in features_of({**_config(arch), "mcpu": name})
    }
    found = [spellings[name] for name in difflib.get_close_matches(cpu, spellings, n=2, cutoff=0.7)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def fingerprint(machine: Machine) -> str:
    """The fingerprint that records of kernels for that machine's CPU are tied to."""
    return machine.fingerprint


def known() -> list[str]:
    """Spellings worth listing: this machine first."""
    return [
        "cpu",
        "cpu:x86-64-v2",
        "cpu:x86-64-v3",
        "cpu:haswell",
        "cpu:znver4",
        "cpu:aarch64-cortex-a72",
        "cpu:aarch64-neoverse-n1",
    ]
