"""Spec + target + record or default -> Kernel."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..errors import UnsupportedError
from ..folders import TemporaryFolder
from ..hardware.target import Target, check_native
from ..lowering.candidates import default_candidate, is_last_resort
from ..lowering.interface import DeviceCode, Interface
from ..lowering.link import link
from ..lowering.lower import Lowered, compile_object, lower
from ..lowering.lower import source as host_source
from ..lowering.schedule import Candidate
from ..lowering.versions import versions
from ..problem.accuracy import error_factor
from ..problem.spec import ConvSpec
from ..records.record import TuningRecord
from .cuda_library import CudaLibrary
from .export import write_library
from .library import BaseLibrary, Library

#: What a library finds when it is loaded.
_LOADED = ("_dll", "_pack", "_run", "_verify", "_error", "_version", "_sizes", "_check_cpu", "_pool_create")


class Kernel(BaseLibrary):
    """A compiled convolution: a :class:`CpuKernel`, a :class:`CudaKernel`, or a :class:`CrossKernel`, which another
    machine calls.

    ``kernel.bind(weights, bias)`` packs the parameters once and gives a layer, ``layer(src)``;
    ``kernel(src, weights, bias)`` does both at once.

    Attributes:
        spec, target, threads: what it was built for.
        path: its shared library.
        schedule, picks: how it computes.
        record: the tuning record it came from; None where it is a default.
        origin: where the record is from, unless this machine made it; empty otherwise.
        note: what a user should know, such as that no fast schedule applied; empty otherwise.
    """

    #: The kinds of text that :meth:`source` gives.
    sources: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        lowered: Lowered,
        interface: Interface,
        object_file: Path,
        library: Path,
        threads: int,
        record: TuningRecord | None,
        folder: TemporaryFolder,
        origin: str = "",
        note: str = "",
    ) -> None:
        super().__init__(library, interface.spec, interface.name, threads)
        self.path, self.lowered, self.interface, self.object_file = library, lowered, interface, object_file
        self.target, self.record, self.origin, self._note = lowered.target, record, origin, note
        self.schedule: str = lowered.candidate.schedule.id
        self.picks = lowered.candidate.picks
        self._folder = folder

    def __repr__(self) -> str:
        origin = f"record {self.record.id[:12]}" if self.record else "chosen, not measured"
        how = f"{self.lowered.candidate} [{origin}]"
        return f"<{type(self).__name__} {self.spec.descriptor} for {self.target}, {self._where}: {how}>"

    @property
    def candidate(self) -> Candidate:
        """The schedule and its picks."""
        return self.lowered.candidate

    @property
    def error_factor(self) -> float:
        """The ``c`` of its bound for data of one scale (:mod:`convgen.check.bounds`)."""
        return error_factor(self.spec, transforms=self.lowered.candidate.schedule.transforms)

    @property
    def exact(self) -> bool:
        """Whether integer-valued data must match bit for bit: sums are only reordered, or are sums of integers."""
        return self.lowered.candidate.is_exact(self.spec)

    @property
    def note(self) -> str:
        if not self.lowered.candidate.schedule.is_reference:
            return self._note
        if self.record is not None:
            why = f"its record is {self.record.id[:12]}"
        elif is_last_resort(self.spec, self.target):
            why = f"no fast schedule applies on {self.target}"
        elif default_candidate(self.spec, self.target).schedule.is_reference:
            return self._note  # of a layer so small that nothing is predicted to be faster
        else:
            why = "it was asked for, or no fast schedule was right"
        slow = f"{self.spec.descriptor}: {why}; this is the slow reference"
        return f"{self._note}; {slow}" if self._note else slow

    def __call__(
        self,
        src: Any,
        weights: Any = None,
        bias: Any = None,
        slope: Any = None,
        *,
        residual: Any = None,
        out: Any = None,
        **others: Any,
    ) -> Any:
        """Pack and run once; see :meth:`bind` for repeated calls."""
        return self.bind(weights, bias, slope, **others)(src, residual=residual, out=out)

    def source(self, kind: str = "tir") -> str:
        """The code as text, one of :attr:`sources`."""
        return source(self.lowered, kind)

    @classmethod
    @abstractmethod
    def check(cls, target: Target) -> None:
        """Raise:
        UnsupportedError: kernels for the target cannot be loaded on this machine.
        """

    @classmethod
    @abstractmethod
    def device_code(cls, lowered: Lowered) -> DeviceCode | None:
        """The part of a candidate's code that runs on a GPU; None where it has none."""

    @classmethod
    @abstractmethod
    def text(cls, lowered: Lowered, kind: str) -> str:
        """A candidate as text, one of :attr:`sources`."""

    def export(
        self, directory: str | Path, *, facts: Mapping[str, Any] | None = None, libc: str | None = None
    ) -> dict[str, Any]:
        """Write the library, header, manifest and C example; returns the manifest.

        Args:
            facts: what else the manifest should say, such as the validated error.
            libc: the C library that it is for: ``musl``, or the oldest glibc, ``glibc-2.28`` say, which takes zig (the
                Python package ziglang). Whatever the C compiler has where None.

        Raises:
            ExportError: the folder cannot be written.
            BuildError: there is no compiler for that C library.
        """
        known: dict[str, Any] = {
            "target": self.target.spelling,
            "threads": self.threads,
            "schedule": self.schedule,
            "schedule_version": self.lowered.candidate.schedule.version,
            "picks": dict(self.picks),
            "record": self.record.id if self.record else None,
            "record_origin": self.origin,
            "seconds": self.record.seconds if self.record else None,
            "error_factor": self.error_factor,
            "versions": versions(),
        }
        return write_library(Path(directory), self.interface, self.object_file, {**known, **(facts or {})}, libc)


class CpuKernel(Kernel, Library):
    """A kernel that runs on the CPU; its sources are scheduled TIR, LLVM IR and assembly."""

    sources = ("tir", "ll", "asm")

    @classmethod
    def check(cls, target: Target) -> None:
        check_native(target)

    @classmethod
    def device_code(cls, lowered: Lowered) -> None:
        return None

    @classmethod
    def text(cls, lowered: Lowered, kind: str) -> str:
        return host_source(lowered, kind)


class CrossKernel(CpuKernel):
    """A kernel for a CPU that this machine's is not: built, exported and emulated here, and called there.

    What calls it raises :class:`~convgen.errors.UnsupportedError`.
    """

    @classmethod
    def check(cls, target: Target) -> None:
        """Nothing to check: it is not loaded."""

    def _open(self, path: str | os.PathLike[str]) -> None:
        """Not here."""

    def __getattr__(self, name: str) -> Any:
        # What loading would have found. Of all other names it has to be an ordinary error: hasattr() asks so.
        if name in _LOADED:
            check_native(self.target)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class CudaKernel(Kernel, CudaLibrary):
    """A kernel that runs on a GPU; its sources are scheduled TIR, CUDA C++, PTX and machine code (SASS).

    Building, packing and exporting it takes no device.
    """

    sources = ("tir", "cuda", "ptx", "sass")

    @classmethod
    def check(cls, target: Target) -> None:
        """Nothing to check: any machine loads such kernels."""

    @classmethod
    def device_code(cls, lowered: Lowered) -> DeviceCode:
        from ..cuda.code import device_code  # imports TVM

        return device_code(lowered)

    @classmethod
    def text(cls, lowered: Lowered, kind: str) -> str:
        from ..cuda.listing import listing  # imports TVM

        return host_source(lowered, kind) if kind == "tir" else listing(lowered, kind)


def kernel_type(target: Target) -> type[CpuKernel | CudaKernel]:
    """The class of kernels for a target."""
    return CudaKernel if target.on_device else CpuKernel if target.native else CrossKernel


def source(lowered: Lowered, kind: str) -> str:
    """A candidate as text.

    Raises:
        UnsupportedError: the target has no such kind; says which it has.
    """
    made = kernel_type(lowered.target)
    if kind not in made.sources:
        expected = ", ".join(made.sources)
        raise UnsupportedError(f"{lowered.target}: source: expected one of {expected}, found {kind!r}")
    return made.text(lowered, kind)


def compile_candidate(
    spec: ConvSpec,
    target: Target,
    candidate: Candidate,
    threads: int,
    *,
    record: TuningRecord | None = None,
    name: str | None = None,
    origin: str = "",
    note: str = "",
) -> Kernel:
    """Lower, compile, link and load one candidate.

    Args:
        record, origin, note: kept by the kernel; see :class:`Kernel`.

    Raises:
        Inapplicable: the picks are not valid here.
        BuildError: TVM, LLVM or the C compiler failed.
        UnsupportedError: this machine cannot load the target's code.
        FolderError: the system's temporary folder cannot be used.
    """
    made = kernel_type(target)
    made.check(target)
    lowered = lower(spec, target, candidate)
    folder = TemporaryFolder(runs=True)
    try:
        with folder.writing():
            interface, object_file, library = compile_lowered(lowered, folder.path, name)
            return made(lowered, interface, object_file, library, threads, record, folder, origin, note)
    except BaseException:
        folder.close()
        raise


def compile_lowered(
    lowered: Lowered, directory: Path, name: str | None = None, device: DeviceCode | None = None
) -> tuple[Interface, Path, Path]:
    """The interface, object file and shared library of a lowered candidate, written to ``directory``.

    ``device`` is the code for a GPU where that is compiled already.
    """
    object_file = directory / "kernel.o"
    workspace = compile_object(lowered, object_file)
    device = device or kernel_type(lowered.target).device_code(lowered)
    interface = Interface(
        name=name or lowered.spec.name,
        spec=lowered.spec,
        packed=lowered.packed,
        workspace_main=0 if device else workspace.main,
        workspace_task=0 if device else workspace.task,
        isa=lowered.isa,
        device=device,
    )
    return interface, object_file, link(interface, object_file, directory / f"lib{interface.name}.so")
