"""Target: where a kernel runs, as the facts a schedule may read.

Facts, never names: a schedule asks how wide a vector is, not which processor this is.
The families (``cpu``, ``cuda`` …) are files in ``targets/``, found by :mod:`convgen.lowering.discover`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import platform
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import SpecError, UnsupportedError, meant_by
from ..problem.dtypes import ACCUMULATOR, BYTES
from ..problem.hashing import hashed_once
from .discover import target_families
from .machine import Machine
from .machine import machine as this_machine


class Rates(NamedTuple):
    """What a device's cores do at best, as schedules weigh candidates by it.

    Attributes:
        clock: cycles in a second.
        fma: f32 multiply-adds that a core begins in a cycle.
        shared: bytes a cycle between a core and its shared memory.
        l2: bytes a cycle from L2 to a core while all cores read.
        memory: bytes a second between the device's memory and all cores.
        mma: multiply-adds a cycle of a core's matrix units for a warp's instructions, by operand type.
        wgmma: those for a warpgroup's instructions, where there are any.
        cluster: bytes a cycle from a core to the others of its cluster.
    """

    clock: float
    fma: int
    shared: int
    l2: int
    memory: float
    mma: tuple[tuple[str, int], ...] = ()
    wgmma: tuple[tuple[str, int], ...] = ()
    cluster: int = 0


#: Of what is no device.
_NO_RATES = Rates(0, 0, 0, 0, 0)


@hashed_once
@dataclass(frozen=True)
class Target:
    """A compilation target.

    Attributes:
        kind: the family, ``cpu``.
        spelling: what :func:`resolve` reads back, e.g. ``cpu:znver4``.
        tvm_config: the TVM target as JSON text.
        vector_bits: width of a SIMD register in bits.
        vector_registers: number of architectural SIMD registers.
        isa: all CPU features a kernel may use beyond its architecture's, as :mod:`convgen.hardware.isa` names them.
        l1, l2, l3: data cache sizes in bytes (l1, l2 per core).
        cores: cores a kernel may use.
        native: whether kernels run on the machine: this one, or the one the target was resolved for.
        hardware: fingerprint of the machine records are tied to.
        arch: of a GPU, ``sm_90a``; its cores are the streaming multiprocessors. All below is of GPUs.
        shared_memory, shared_per_core: bytes of shared memory a block may have, and a core has.
        threads_per_core: threads a core holds at once.
        matrix: operand types its matrix units take with f32 sums: ``f16``, ``bf16``, ``tf32``.
        features: groups of instructions there are: ``ldmatrix``, ``cp_async``, ``tma``, ``wgmma``.
        rates: what its cores do in a cycle; of GPUs alone.
    """

    kind: str
    spelling: str
    tvm_config: str
    vector_bits: int
    vector_registers: int
    isa: tuple[str, ...]
    l1: int
    l2: int
    l3: int
    cores: int
    native: bool
    hardware: str
    arch: str = ""
    shared_memory: int = 0
    shared_per_core: int = 0
    threads_per_core: int = 0
    matrix: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    rates: Rates = _NO_RATES

    def __repr__(self) -> str:
        cores = f"{self.cores} core{'s' * (self.cores > 1)}"
        units = (
            f"matrix units for {', '.join(self.matrix)}" if self.on_device else f"vectors of {self.vector_bits} bits"
        )
        runs = "runs here" if self.native else "does not run here"
        return f"<Target {self.spelling}: {cores}, {units}, {runs}>"

    @property
    def on_device(self) -> bool:
        """Whether kernels run on a device that has memory of its own."""
        return bool(self.arch)

    @property
    def architecture(self) -> str:
        """The CPU's, by the name ``uname -m`` has: ``x86_64``, ``aarch64``; of a GPU, this machine's."""
        return str(json.loads(self.tvm_config).get("mtriple", platform.machine())).partition("-")[0]

    @cached_property
    def lanes(self) -> int:
        """How many sums a SIMD register holds; sums are f32 however tensors are stored."""
        return self.vector_bits // (8 * BYTES[ACCUMULATOR])

    def on(self, threads: int) -> Target:
        """The target as kernels of so many threads see it; a GPU's cores are what they are."""
        return self if self.on_device or threads == self.cores else replace(self, cores=threads)

    def places(self, apart: int) -> int:
        """Cache lines ``apart`` bytes from each other that the L1 cache holds at once: its ways are pages long."""
        page = 4096
        ways = max(1, self.l1 // page)
        return ways * (page // math.gcd(page, max(apart, 64)))

    def missing(self, machine: Machine) -> str:
        """What a machine that cannot run a CPU kernel lacks."""
        return ", ".join(name for name in self.isa if name not in machine.features) or "another architecture"

    def tvm(self) -> Any:
        """The ``tvm.target.Target``."""
        from tvm.target import Target as TvmTarget

        return TvmTarget(json.loads(self.tvm_config))

    @property
    def peak_flops(self) -> float:
        """A nominal f32 peak in FLOP/s, all cores: one FMA per vector and cycle at 3.5 GHz. It only
        scales predicted times; :func:`convgen.hardware.machine.measured_peak` is the real one.
        """
        return self.cores * 2 * self.lanes * 3.5e9

    @property
    def key(self) -> str:
        """A short hash of everything code generation depends on."""
        return hashlib.sha256(f"{self.tvm_config}|{self.vector_bits}|{self.vector_registers}".encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return self.spelling


def resolve(spelling: str | Target = "cpu", machine: Machine | None = None) -> Target:
    """The target that ``cpu``, ``cpu:haswell`` … names.

    Args:
        machine: the one the kernels are to run on; this one where None. Cores, caches and what
            ``cpu`` names are that machine's.

    Raises:
        UnsupportedError: no such family or processor.
    """
    if isinstance(spelling, Target):
        return spelling
    family, _, model = spelling.partition(":")
    families = target_families()
    if family not in families:
        expected = f"target: expected one of {', '.join(sorted(families))}"
        raise UnsupportedError(f"{expected}, found {spelling!r}{meant_target(spelling)}")
    resolved: Target = families[family].resolve(model) if machine is None else families[family].resolve(model, machine)
    return resolved


def meant_target(spelling: str) -> str:
    """What a spelling of no family means, as the end of a message."""
    families, (family, _, model) = target_families(), spelling.partition(":")
    name = model or family
    close = [found for module in families.values() for found in module.close(name)] if name else []
    return meant_by(close or difflib.get_close_matches(family.lower(), families))


def check_native(target: Target) -> None:
    """Raise:
    UnsupportedError: this machine cannot run the target's code.
    """
    if not target.native:
        found = f"no GPU that runs {target.arch}"
        if not target.on_device:
            found = f"one that needs {target.missing(this_machine())}"
        raise UnsupportedError(f"{target}: expected a target that runs on this machine, found {found}")


def check_threads(threads: int | None, target: Target) -> int:
    """How many threads a kernel has: all cores where none are asked for; on a GPU one, as its launches say how many of
    the device's run.

    Raises:
        SpecError: the number is not between 1 and 1024.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise SpecError("threads", "an integer between 1 and 1024", repr(threads))
    return 1 if target.on_device else target.cores if threads is None else threads
