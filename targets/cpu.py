"""CPUs, compiled by LLVM: this machine (``cpu``) or a named model (``cpu:haswell``)."""

from __future__ import annotations

import difflib
import json
import platform
import re
from typing import Any

from convgen.errors import UnsupportedError, meant_by
from convgen.hardware.isa import CHECKED, forbidden
from convgen.hardware.llvm import features_of, processors_of
from convgen.hardware.machine import Machine
from convgen.hardware.machine import machine as this_machine
from convgen.hardware.processor import system_processor
from convgen.hardware.target import Target

#: Architectures that a spelling begins with: triple and vector facts. NEON has 32 registers of 128 bits.
CROSS = {"aarch64": "aarch64-linux-gnu"}
#: This machine's processor, as C compilers call it.
OWN = ("native", "host")
#: What people call processors, in small letters and digits alone, and the spellings of what they mean.
CALLED = {
    **dict.fromkeys(("x8664", "x64", "x86", "amd64", "intel64", "x8664v1"), ("x86-64",)),
    "sse4": ("x86-64-v2",),
    "sse42": ("x86-64-v2",),
    "avx": ("sandybridge",),
    "avx2": ("x86-64-v3", "haswell"),
    "avx512": ("x86-64-v4", "skylake-avx512"),
    "avx512vnni": ("cascadelake", "znver4"),
    "avx512bf16": ("cooperlake", "znver4"),
    "amx": ("sapphirerapids",),
    "icelake": ("icelake-server", "icelake-client"),
    "spr": ("sapphirerapids",),
    "emr": ("emeraldrapids",),
    "gnr": ("graniterapids",),
    "zen": ("znver1",),
    **{f"zen{number}": (f"znver{number}",) for number in range(1, 6)},
    **dict.fromkeys(("arm", "arm64", "armv8", "neon", "arm64v8"), ("aarch64",)),
    "sve": ("aarch64-neoverse-v1",),
    **{
        f"{maker}{called}": (f"aarch64-apple-{core}",)
        for maker in ("", "apple")
        for called, core in (("m1", "a14"), ("m2", "a15"), ("m3", "a16"), ("m4", "m4"), ("m5", "m5"))
    },
    **{
        f"{board}{number}": (f"aarch64-{core}",)
        for board in ("raspberrypi", "raspberry", "rpi", "pi")
        for number, core in ((3, "cortex-a53"), (4, "cortex-a72"), (5, "cortex-a76"))
    },
    **{
        f"{name}{number}": (f"aarch64-neoverse-{core}",)
        for name in ("graviton", "awsgraviton")
        for number, core in ((2, "n1"), (3, "v1"), (4, "v2"))
    },
    "graviton": ("aarch64-cortex-a72", "aarch64-neoverse-n1"),
    "altra": ("aarch64-neoverse-n1",),
    "ampere": ("aarch64-neoverse-n1", "aarch64-ampere1"),
    "rk3399": ("aarch64-cortex-a72",),
    "rk3588": ("aarch64-cortex-a76",),
    "jetsonorin": ("aarch64-cortex-a78ae",),
    "orin": ("aarch64-cortex-a78ae",),
}


def resolve(model: str, machine: Machine | None = None) -> Target:
    """The target for an LLVM processor name, prefixed by its architecture unless it is x86-64
    (``aarch64-cortex-a72``), or without it where no x86-64 processor is called so; the machine's own where ``model``
    is empty or ``native``.

    Args:
        machine: the one the kernels are to run on; this one where None.

    Raises:
        UnsupportedError: LLVM knows no such processor, or it has 32 bits; says which names are close.
    """
    here = machine or this_machine()
    own = here.llvm if machine else system_processor()
    own = f"{here.arch}-{own}" if here.arch in CROSS else own
    arch, cpu = _processor(own if not model or model in OWN else model)
    model = f"{arch}-{cpu}" if arch in CROSS else cpu
    itself = model == own
    config: dict[str, Any] = {**_config(arch), "num-cores": here.cores, "mcpu": cpu}
    has = features_of(config) if cpu in processors_of(_config(arch)) else set()
    if not has or (arch == "x86_64" and "64bit" not in has):  # LLVM lists 32-bit ones, and ends the process over them
        raise UnsupportedError(f"target: expected a 64-bit processor LLVM knows, found {cpu!r}{meant_by(close(model))}")
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


def close(name: str) -> list[str]:
    """Spellings of what a name that is none may mean: a word that people have for a processor, or one that is typed
    almost right.
    """
    model = name.lower()
    if model in (*OWN, "cpu"):
        return ["cpu"]
    plain = re.sub(r"[^a-z0-9]", "", model)
    for prefix in ("", *CROSS):
        if (said := plain.removeprefix(prefix)) in CALLED:
            return [f"cpu:{model}" for model in CALLED[said]]
    spellings: dict[str, str] = {}
    for arch in ("x86_64", *CROSS):
        for cpu in _processors(arch):
            spellings.setdefault(cpu, f"cpu:{cpu}" if arch == "x86_64" else f"cpu:{arch}-{cpu}")
    if model in spellings:  # without its family
        return [spellings[model]]
    for arch in CROSS:
        model = model.removeprefix(f"{arch}-")
    return [spellings[found] for found in difflib.get_close_matches(model, spellings, n=2, cutoff=0.7)]


def _processors(arch: str, begin: str = "") -> list[str]:
    """LLVM's names of an architecture's processors of 64 bits that begin so, in alphabetical order."""
    config = _config(arch)
    names = sorted(name for name in processors_of(config) if name.startswith(begin))
    return [name for name in names if arch != "x86_64" or "64bit" in features_of({**config, "mcpu": name})]


def beginning(text: str) -> list[str]:
    """Spellings that begin so: those worth listing, and where it names a processor's first letters, all of LLVM's."""
    found = [spelling for spelling in known() if spelling.startswith(text)]
    begin = text.removeprefix("cpu:")
    if begin and begin != text:
        found += [f"cpu:{name}" for arch in ("x86_64", *CROSS) for name in _processors(arch, begin)]
        for arch in CROSS:
            rest = begin.removeprefix(f"{arch}-")
            if rest != begin:
                found += [f"cpu:{arch}-{name}" for name in _processors(arch, rest)]
    return list(dict.fromkeys(found))


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
