"""Spec + target + record or default -> Kernel."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .best import Answer, find_record
from .best import best_record as best_record
from .best import choose as choose
from .best import record_candidate as record_candidate
from .cuda.library import CudaLibrary
from .discover import schedule as find_schedule
from .discover import schedules
from .errors import Inapplicable, SpecError, UnsupportedError
from .interface import DeviceCode, Interface
from .library import BaseLibrary, Library
from .link import link
from .lower import Lowered, compile_object, lower
from .lower import source as host_source
from .machine import machine
from .records import RecordStore, TuningRecord, default_path
from .schedule import Candidate, Picks
from .spec import ConvSpec
from .target import Target, resolve

if TYPE_CHECKING:
    from .search import Progress

Records = RecordStore | str | Path | bool | None


@cache
def versions() -> dict[str, str]:
    """What a kernel's code depends on besides its schedule: written into records and manifests."""
    from tvm.target import codegen

    return {
        "convgen": importlib.metadata.version("convgen"),
        "tvm": importlib.metadata.version("apache-tvm"),
        "llvm": str(codegen.llvm_version_major()),
    }


class Kernel(BaseLibrary):
    """A compiled, callable convolution: a :class:`CpuKernel` or a :class:`CudaKernel`.

    ``kernel.bind(weights, bias)`` packs the parameters once and gives a layer, ``layer(src)``;
    ``kernel(src, weights, bias)`` does both at once.

    Attributes:
        spec, target, threads: what it was built for.
        path: its shared library.
        schedule, picks: how.
        record: the tuning record it came from; None where it is the schedule's default.
        origin: where the record is from, unless this machine made it; empty otherwise.
        note: what a user should know, such as that no fast schedule applied; empty otherwise.
    """

    #: What :meth:`source` gives.
    sources: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        lowered: Lowered,
        interface: Interface,
        object_file: Path,
        library: Path,
        threads: int,
        record: TuningRecord | None,
        directory: Path,
        origin: str = "",
        note: str = "",
    ) -> None:
        super().__init__(library, interface.spec, interface.name, threads)
        self.path, self.lowered, self.interface, self.object_file = library, lowered, interface, object_file
        self.target, self.record, self.origin, self._note = lowered.target, record, origin, note
        self.schedule: str = lowered.candidate.schedule.id
        self.picks = lowered.candidate.picks
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)

    @property
    def exact(self) -> bool:
        """Whether integer-valued data must match bit for bit: the schedule only reorders sums, or all is integers."""
        return self.lowered.candidate.is_exact(self.spec)

    @property
    def note(self) -> str:
        if self.schedule != "reference":
            return self._note
        why = f"no fast schedule applies on {self.target}, or none was right"
        slow = f"{self.spec.descriptor}: {why}; this is the slow reference"
        return f"{self._note}; {slow}" if self._note else slow

    def __call__(
        self,
        src: Any,
        weights: Any,
        bias: Any = None,
        slope: Any = None,
        *,
        scale: Any = None,
        residual: Any = None,
        out: Any = None,
    ) -> Any:
        """Pack and run once; see :meth:`bind` for repeated calls."""
        return self.bind(weights, bias, slope, scale=scale)(src, residual=residual, out=out)

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
    def threads_for(cls, threads: int | None, target: Target) -> int:
        """The thread count of a kernel where this many are asked for."""

    @classmethod
    @abstractmethod
    def device_code(cls, lowered: Lowered) -> DeviceCode | None:
        """What runs on a GPU of a candidate."""

    @classmethod
    @abstractmethod
    def text(cls, lowered: Lowered, kind: str) -> str:
        """A candidate as text, one of :attr:`sources`."""

    def export(self, directory: str | Path, *, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write the library, header, manifest and C example; returns the manifest.

        Args:
            facts: what else the manifest should say, such as the validated error.

        Raises:
            ExportError: the folder cannot be written.
        """
        from .export import write_library
        from .validate import error_factor

        known: dict[str, Any] = {
            "target": self.target.spelling,
            "threads": self.threads,
            "schedule": self.schedule,
            "schedule_version": self.lowered.candidate.schedule.version,
            "picks": dict(self.picks),
            "record": self.record.id if self.record else None,
            "record_origin": self.origin,
            "seconds": self.record.seconds if self.record else None,
            "error_factor": error_factor(self.spec),
            "versions": versions(),
        }
        return write_library(Path(directory), self.interface, self.object_file, {**known, **(facts or {})})


class CpuKernel(Kernel, Library):
    """A kernel that runs on the CPU; its sources are scheduled TIR, LLVM IR and assembly."""

    sources = ("tir", "ll", "asm")

    @classmethod
    def check(cls, target: Target) -> None:
        check_native(target)

    @classmethod
    def threads_for(cls, threads: int | None, target: Target) -> int:
        return target.cores if threads is None else threads

    @classmethod
    def device_code(cls, lowered: Lowered) -> None:
        return None

    @classmethod
    def text(cls, lowered: Lowered, kind: str) -> str:
        return host_source(lowered, kind)


class CudaKernel(Kernel, CudaLibrary):
    """A kernel that runs on a GPU; its sources are scheduled TIR, CUDA C++, PTX and machine code (SASS).

    It is built, packed for and exported without a device.
    """

    sources = ("tir", "cuda", "ptx", "sass")

    @classmethod
    def check(cls, target: Target) -> None:
        """Any machine loads it."""

    @classmethod
    def threads_for(cls, threads: int | None, target: Target) -> int:
        """One: how many threads of the device run is fixed in its launches."""
        return 1

    @classmethod
    def device_code(cls, lowered: Lowered) -> DeviceCode:
        from .cuda.code import device_code

        return device_code(lowered)

    @classmethod
    def text(cls, lowered: Lowered, kind: str) -> str:
        from .cuda.listing import listing

        return host_source(lowered, kind) if kind == "tir" else listing(lowered, kind)


def kernel_type(target: Target) -> type[CpuKernel | CudaKernel]:
    """How kernels for a target run."""
    return CudaKernel if target.kind == "cuda" else CpuKernel


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


def default_candidate(spec: ConvSpec, target: Target) -> Candidate:
    """The zero-trial answer: the applicable schedule that predicts the shortest time, at its default.

    Raises:
        UnsupportedError: no schedule applies on this target; says why each does not.
    """
    core = spec.core
    reasons, ranked = [], []
    for schedule in schedules().values():
        reason = schedule.reason_against(core, target)
        if reason is None:
            ranked.append((schedule.cost(core, target), schedule.id, schedule))
        else:
            reasons.append(f"{schedule.id}: {reason}")
    if not ranked:
        raise UnsupportedError(f"{spec.descriptor} on {target}: no schedule applies ({'; '.join(reasons)})")
    best = min(ranked, key=lambda entry: entry[:2])[2]
    return Candidate(best, best.default(core, target))


@contextmanager
def open_store(records: Records, *, write: bool = True) -> Iterator[RecordStore | None]:
    """The store for a while. None: the default one; False: none at all; a path; or an open store, left open.

    Where nothing must be written, one that this process may only read is opened read-only.
    """
    if isinstance(records, RecordStore):
        yield records
    elif records is False:
        yield None
    else:
        path = default_path() if records is None or records is True else Path(records)
        readonly = not write and path.exists() and not _is_writable(path)
        with RecordStore(path, readonly=readonly) as store:
            yield store


def _is_writable(path: Path) -> bool:
    """Whether a store can be: SQLite writes its log beside it."""
    path = path.resolve()
    return all(os.access(each, os.W_OK, effective_ids=True) for each in (path, path.parent))


def check_memory(spec: ConvSpec) -> None:
    """Raise:
    SpecError: the layer's tensors cannot fit into this machine's memory.
    """
    needed, available = sum(spec.bytes.values()), machine().memory
    if available and needed > available:
        raise SpecError("memory", f"tensors of at most {available:,} bytes", f"{needed:,}", spec.descriptor)


def check_native(target: Target) -> None:
    """Raise:
    UnsupportedError: this machine cannot run the target's code.
    """
    if not target.native:
        found = "one that does not" if target.kind == "cpu" else f"no GPU that runs {target.arch}"
        raise UnsupportedError(f"{target}: expected a target that runs on this machine, found {found}")


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
    """
    made = kernel_type(target)
    made.check(target)
    lowered = lower(spec, target, candidate)
    directory = Path(tempfile.mkdtemp(prefix="convgen-"))
    try:
        interface, object_file, library = compile_lowered(lowered, directory, name)
        return made(lowered, interface, object_file, library, threads, record, directory, origin, note)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def compile_lowered(
    lowered: Lowered, directory: Path, name: str | None = None, device: DeviceCode | None = None
) -> tuple[Interface, Path, Path]:
    """The interface, object file and shared library of a lowered candidate, written to ``directory``.

    ``device`` is the code for a GPU where it is compiled already.
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
        isa=lowered.target.isa,
        device=device,
    )
    return interface, object_file, link(interface, object_file, directory / f"lib{interface.name}.so")


def check_threads(threads: int | None, target: Target) -> int:
    """The thread count: all cores where none is given, 1 on a GPU whatever is given.

    Raises:
        SpecError: it is not between 1 and 1024.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise SpecError("threads", "an integer between 1 and 1024", repr(threads))
    return kernel_type(target).threads_for(threads, target)


def build(
    spec: ConvSpec | str,
    target: str | Target = "cpu",
    threads: int | None = None,
    trials: int = 0,
    seconds: float | None = None,
    records: Records = None,
    *,
    progress: Callable[[Progress], None] | None = None,
    name: str | None = None,
) -> Kernel:
    """A compiled kernel for one layer.

    Args:
        spec: a spec, or its descriptor.
        target: ``cpu`` (this machine) or ``cpu:<LLVM processor>``; ``cuda`` (this machine's GPU) or an architecture
            such as ``cuda:sm_90a``, which needs no device until a layer is bound.
        threads: threads the kernel is for; all cores by default. On a GPU it means nothing and is 1.
        trials, seconds: tuning budget; with neither, the best matching record answers, from the store or
            the package, else the schedule's default: always a kernel at once. A record of other versions
            is first measured again, in one or two seconds; :attr:`Kernel.note` says so.
        records: the store: None the default one, False no records at all, or a path.
        progress: called after every trial.
        name: prefix of the exported C functions; made from the descriptor by default.

    Raises:
        SpecError: the spec, the thread count, the budget or the memory it takes is impossible.
        UnsupportedError: the target is unknown, or is a CPU's and cannot run here.
        BuildError: TVM, LLVM, NVIDIA's or the C compiler failed.
        RecordError: the store cannot be read or written.
    """
    spec = ConvSpec.parse(spec) if isinstance(spec, str) else spec
    resolved = resolve(target)
    threads = check_threads(threads, resolved)
    check_memory(spec)
    answer = Answer(None)
    with open_store(records, write=bool(trials or seconds)) as store:
        if (trials or seconds) and spec.n:
            from .tune import Tuner

            with Tuner(resolved, threads, store) as tuner:
                record = tuner.tune(spec, trials=trials, seconds=seconds, progress=progress)
                answer = Answer(record, rejected=frozenset(tuner.rejected))
        elif store is not None and resolved.native:
            answer = find_record(store, spec, resolved, threads)
    candidate, record = choose(spec, resolved, answer.record, answer.rejected)
    return compile_candidate(
        spec, resolved, candidate, threads, record=record, name=name, origin=answer.origin, note=answer.note
    )


def parse_candidate(spec: ConvSpec, target: Target, schedule_id: str, picks: str | None = None) -> Candidate:
    """A candidate from text such as ``tile_oc=32 tile_ow=14``; the default picks where none are given.

    Raises:
        UnsupportedError: no such schedule.
        Inapplicable: it does not apply, or the picks are malformed or not valid.
    """
    schedule = find_schedule(schedule_id)
    core = spec.core
    schedule.check(core, target)
    if picks is None:
        return Candidate(schedule, schedule.default(core, target))
    domains = schedule.space(core, target).domains
    chosen: dict[str, Any] = {}
    for part in picks.split():
        key, separator, text = part.partition("=")
        values = {str(value): value for value in domains.get(key, ())}
        if not separator or text not in values or key in chosen:
            known = "; ".join(f"{k}={'|'.join(map(str, v))}" for k, v in domains.items())
            raise Inapplicable(f"picks: expected each of {known} once, found {part!r}")
        chosen[key] = values[text]
    for key in domains.keys() - chosen.keys():
        raise Inapplicable(f"picks: expected a value for {key}, found none")
    candidate = Candidate(schedule, Picks(**{key: chosen[key] for key in domains}))
    schedule.valid(core, target, candidate.picks)
    return candidate
