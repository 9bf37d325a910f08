"""NVIDIA GPUs, compiled through CUDA C: this machine's (``cuda``) or an architecture (``cuda:sm_90a``).

An architecture needs no device: kernels are built, inspected, emulated and exported without one.

Sources of the facts: CUDA C++ Programming Guide, "Compute Capabilities" and, for f32, "Arithmetic Instructions";
PTX ISA, the "Target ISA Notes" of the instructions. Rates of matrix units, clocks (boost) and memory are those of a
usual device's data sheet: dense operations a second, sums of 32 bits, over multiprocessors and clock. They are V100
SXM2, T4, A100 SXM4 40 GB, A40, Jetson AGX Orin, GeForce RTX 4090, H100 SXM5, B200 and GeForce RTX 5090. L2: the
whitepapers of V100 and A100 give 2048 and 5120 bytes a cycle; H100 is taken for A100's. On Hopper ``mma.sync``
reaches 63 % of the data sheet's rate, and a core moves 14 bytes a cycle to others of a cluster of four (2.8 TB/s of 114
cores at 1.755 GHz): Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", IPDPS workshops 2024.
Guesses, as nobody publishes them: L2 of the others, and sm_100's rate of ``mma.sync``, which is
taken for A100's.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import NamedTuple

from convgen.errors import UnsupportedError, meant_by
from convgen.hardware.machine import Machine
from convgen.hardware.target import Rates, Target
from convgen.lowering.interface import read_architecture


class Architecture(NamedTuple):
    """What every device of a compute capability has.

    Attributes:
        shared_block, shared_sm: bytes of shared memory a block may ask for, and an SM has.
        threads_sm: threads an SM holds.
        l2: bytes of L2 of the capability's usual device.
        sms: its streaming multiprocessors; a device's own where there is one.
        rates: what a multiprocessor of the usual device does.
        features: instructions a schedule may use: ``ldmatrix``, ``cp_async``, ``tma``, ``wgmma``.
    """

    shared_block: int
    shared_sm: int
    threads_sm: int
    l2: int
    sms: int
    rates: Rates
    features: tuple[str, ...] = ()

    @property
    def matrix(self) -> tuple[str, ...]:
        """Operand types its tensor cores take with sums of 32 bits."""
        return tuple(dtype for dtype, _ in self.rates.mma)


def _matrix(f16: int, tf32: int, i8: int) -> tuple[tuple[str, int], ...]:
    """Multiply-adds of a multiprocessor's tensor cores in a cycle, by operand type."""
    return ("f16", f16), ("bf16", f16), ("tf32", tf32), ("i8", i8)


_VOLTA = Rates(1.53e9, 64, 128, 25, 900e9)
_TURING = Rates(1.59e9, 64, 128, 25, 320e9, (("f16", 512),))
_A100 = Rates(1.41e9, 64, 128, 47, 1555e9, _matrix(1024, 512, 2048))
_A40 = Rates(1.74e9, 128, 128, 24, 696e9, _matrix(512, 256, 1024))
_ORIN = Rates(1.30e9, 128, 128, 24, 205e9, _matrix(1024, 512, 2048))
_ADA = Rates(2.52e9, 128, 128, 24, 1008e9, _matrix(256, 128, 1024))
_H100 = Rates(1.83e9, 128, 128, 38, 3350e9, _matrix(1290, 645, 2580), _matrix(2048, 1024, 4096), 14)
_B200 = Rates(1.85e9, 128, 128, 38, 7700e9, _matrix(1024, 512, 2048))
_BLACKWELL = Rates(2.41e9, 128, 128, 24, 1792e9, _matrix(256, 128, 1024))

_ASYNC = ("ldmatrix", "cp_async")
_TMA = (*_ASYNC, "tma")

ARCHITECTURES = {
    "sm_70": Architecture(96 << 10, 96 << 10, 2048, 6 << 20, 80, _VOLTA),
    "sm_75": Architecture(64 << 10, 64 << 10, 1024, 4 << 20, 40, _TURING, ("ldmatrix",)),
    "sm_80": Architecture(163 << 10, 164 << 10, 2048, 40 << 20, 108, _A100, _ASYNC),
    "sm_86": Architecture(99 << 10, 100 << 10, 1536, 6 << 20, 84, _A40, _ASYNC),
    "sm_87": Architecture(163 << 10, 164 << 10, 1536, 4 << 20, 16, _ORIN, _ASYNC),
    "sm_89": Architecture(99 << 10, 100 << 10, 1536, 72 << 20, 128, _ADA, _ASYNC),
    "sm_90": Architecture(227 << 10, 228 << 10, 2048, 50 << 20, 132, _H100._replace(wgmma=()), _TMA),
    "sm_90a": Architecture(227 << 10, 228 << 10, 2048, 50 << 20, 132, _H100, (*_TMA, "wgmma")),
    "sm_100": Architecture(227 << 10, 228 << 10, 2048, 126 << 20, 148, _B200, _TMA),
    "sm_120": Architecture(99 << 10, 100 << 10, 1536, 96 << 20, 170, _BLACKWELL, _TMA),
}

#: What devices are called, in small letters and digits alone, and their architecture.
CALLED = (
    ("v100|titanv|volta", "sm_70"),
    ("t4|rtx20..|gtx16..|titanrtx|turing", "sm_75"),
    ("a100|a30", "sm_80"),
    ("a10|a16|a2|a40|a[2456]000|rtxa[2456]000|rtx30..", "sm_86"),
    ("(agx)?orin(nano|nx)?", "sm_87"),
    ("l4|l40s?|ada|rtx40..|rtx6000ada", "sm_89"),
    ("h100|h200|h800|h20|gh200|hopper", "sm_90a"),
    ("b100|b200|gb200", "sm_100"),
    ("rtx50..|rtxpro6000", "sm_120"),
)

#: Words beside a device's name that say nothing of its architecture.
NO_NAME = r"nvidia|geforce|tesla|jetson|gpu|pcie|nvl|sxm\d?|\d+gb|ti|super|laptop"


def resolve(model: str, machine: Machine | None = None) -> Target:
    """The target of an architecture such as ``sm_80``; that of this machine's first device where ``model`` is empty.

    Raises:
        UnsupportedError: no such architecture, or there is no device.
    """
    from convgen.cuda.driver import device

    found = device() if machine is None else machine.gpu
    if not model and found is None:
        raise UnsupportedError("target: expected a CUDA device for 'cuda', found none; name one such as cuda:sm_90a")
    arch = model or _of_device(found.capability if found else (0, 0))
    if arch not in ARCHITECTURES:
        found_text = f"found {f'cuda:{model}'!r}{meant_by(close(model))}"
        raise UnsupportedError(f"target: expected one of {', '.join(known())}, {found_text}")
    facts = ARCHITECTURES[arch]
    native = found is not None and runs(arch, found.capability)
    config = {
        "kind": "cuda",
        "arch": arch,
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": facts.shared_block,
        "thread_warp_size": 32,
        "registers_per_block": 1 << 16,
    }
    return Target(
        kind="cuda",
        spelling=f"cuda:{arch}",
        tvm_config=json.dumps(config, sort_keys=True),
        vector_bits=128,
        vector_registers=255,
        isa=(),
        l1=facts.shared_sm,
        l2=found.l2 if native and found else facts.l2,
        l3=0,
        cores=found.sms if native and found else facts.sms,
        native=native,
        hardware=found.fingerprint if native and found else "unknown",
        arch=arch,
        shared_memory=facts.shared_block,
        shared_per_core=facts.shared_sm,
        threads_per_core=facts.threads_sm,
        matrix=facts.matrix,
        features=facts.features,
        rates=facts.rates,
    )


def fingerprint(machine: Machine) -> str | None:
    """The fingerprint that records of kernels for that machine's GPU are tied to; None where it has none."""
    return machine.gpu.fingerprint if machine.gpu else None


def known() -> list[str]:
    """Spellings worth listing: this machine's device first, where there is one."""
    from convgen.cuda.driver import device

    return [*(["cuda"] if device() else []), *(f"cuda:{arch}" for arch in ARCHITECTURES)]


def beginning(text: str) -> list[str]:
    """Spellings that begin so."""
    return [spelling for spelling in known() if spelling.startswith(text)]


def close(name: str) -> list[str]:
    """Spellings of what a name that is none may mean: a device, a capability, or one that is typed almost right."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    plain = "".join(word for word in words if not re.fullmatch(NO_NAME, word))
    plain = plain.removeprefix("compute").removeprefix("sm")
    if plain in ("", "cuda"):
        return ["cuda"]
    for pattern, arch in CALLED:
        if re.fullmatch(f"({pattern})(ti|super)?", plain):
            return [f"cuda:{arch}"]
    if plain.rstrip("a").isdigit():
        begin = [arch for arch in ARCHITECTURES if arch.startswith(f"sm_{plain}")]
        if begin:
            return [f"cuda:{arch}" for arch in sorted(begin, key=len, reverse=True)[:2]]
    return [f"cuda:{arch}" for arch in difflib.get_close_matches(name.lower(), ARCHITECTURES, n=2)]


def capability(arch: str) -> tuple[int, int]:
    """``(9, 0)`` of ``sm_90a``."""
    read = read_architecture(arch)
    return read.major, read.minor


def runs(arch: str, device: tuple[int, int]) -> bool:
    """Whether a device runs an architecture's code: the same major capability and no later minor; exactly the
    same for an ``a`` architecture, whose instructions no other has.
    """
    own = capability(arch)
    return own == device if arch.endswith("a") else own[0] == device[0] and own[1] <= device[1]


def _of_device(device: tuple[int, int]) -> str:
    """The best architecture a device runs."""
    fitting = [arch for arch in ARCHITECTURES if runs(arch, device)]
    if not fitting:
        raise UnsupportedError(f"target: expected a device of {', '.join(known())}, found capability {device}")
    return max(fitting, key=lambda arch: (capability(arch), arch))
