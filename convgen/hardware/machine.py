"""Facts about this machine: told by the system, and measured.

Imports neither NumPy nor TVM.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import BuildError, FolderError, MeasureError, SpecError
from ..folders import TemporaryFolder, open_shared, replacing, user_cache
from ..problem.spec import ConvSpec

#: Where reads can be served from, nearest first.
LEVELS = ("l2", "l3", "dram")

_SYSFS = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
#: What identifies a processor: the fields of x86, and those of Arm.
MODEL_FIELDS = (
    ("vendor_id", "cpu family", "model", "stepping"),
    ("CPU implementer", "CPU part", "CPU variant", "CPU revision"),
)
#: The features code generation looks at. Linux lists others too, and more with every release.
ISA = re.compile(r"(sse|ssse|avx|fma|f16c|bmi|amx|gfni|popcnt|movbe|fp|asimd|sve|sme|bf16|i8mm|neon|vfp)")
#: Features that the C compilers call by other names than Linux: Linux's name -> theirs.
_RENAMED = {"pni": "sse3", "sse4_1": "sse4.1", "sse4_2": "sse4.2", "bmi1": "bmi", "abm": "lzcnt"}


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        capability: its compute capability.
        sms: its streaming multiprocessors.
        l2, memory: bytes.
        driver: the driver's version, as ``1000 * major + 10 * minor`` of the CUDA it is for.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    l2: int
    memory: int
    driver: int

    @property
    def fingerprint(self) -> str:
        """What tuning records are tied to."""
        text = repr((self.name, self.capability, self.sms, self.memory, self.driver))
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-{self.sms}"

    @property
    def emulated(self) -> bool:
        """Whether it is a CPU (``runtime/emulated_driver.cpp``), which runs no machine code of GPUs."""
        return self.name.startswith("Emulated")

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Device:
        """Its fields from JSON.

        Raises:
            MeasureError: they are not the facts of a GPU; names ``where`` they are from.
        """
        try:
            made = cls(**{field.name: values[field.name] for field in fields(cls)})
            major, minor = made.capability
            numbers = [major, made.sms, made.l2, made.memory, made.driver]
            if type(made.name) is not str or not made.name or type(minor) is not int or minor < 0:
                raise ValueError(f"found {values!r:.80}")
            if not all(type(number) is int and number > 0 for number in numbers):
                raise ValueError(f"found {values!r:.80}")
        except (KeyError, TypeError, ValueError) as error:
            raise MeasureError(f"{where}: expected the facts of a GPU, found {error}") from error
        return replace(made, capability=(major, minor))


@dataclass(frozen=True)
class Machine:
    """What the system tells about this machine.

    Attributes:
        cpu: the processor's name.
        fingerprint: what tuning records are tied to: model, instruction set and number of CPUs. The
            same in every run, whatever CPUs the process may use.
        features: what the processor supports, by Linux's names; vector extensions of x86 by those
            of ``__builtin_cpu_supports``.
        cores: physical cores this process may use.
        logical: logical CPUs this process may use.
        l1, l2, l3: data cache sizes in bytes, as seen by one core; None where the system does not tell.
        memory: physical memory in bytes.
        arch: the architecture, as Linux calls it: ``x86_64``, ``aarch64``.
        llvm: LLVM's name of the processor, of a machine that was asked for it; empty otherwise.
        gpu: its first one, of a machine that was asked for it.
    """

    cpu: str
    fingerprint: str
    features: frozenset[str]
    cores: int
    logical: int
    l1: int | None
    l2: int | None
    l3: int | None
    memory: int
    arch: str = platform.machine()
    llvm: str = ""
    gpu: Device | None = None

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON can say them."""
        return asdict(self) | {"features": sorted(self.features)}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Machine:
        """What :meth:`to_dict` gave, on another machine.

        Raises:
            MeasureError: they are not the facts of a machine; names ``where`` they are from.
        """
        try:
            made = cls(**{field.name: values[field.name] for field in fields(cls)})
            gpu = Device.from_dict(made.gpu, where) if made.gpu is not None else None
            made = replace(made, gpu=gpu, features=frozenset(map(str, made.features)))
            numbers = [made.cores, made.logical, made.memory, made.l1 or 1, made.l2 or 1, made.l3 or 1]
            if not made.fingerprint or not all(type(number) is int and number > 0 for number in numbers):
                raise ValueError(f"found {values!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise MeasureError(f"{where}: expected the facts of a machine, found {error}") from error
        return made

    @classmethod
    def detect(cls) -> Machine:
        """Read the facts now; :func:`machine` keeps them."""
        text = _CPUINFO.read_text(errors="replace") if _CPUINFO.exists() else ""
        name, model, features = parse_cpuinfo(text)
        isa = " ".join(sorted(feature for feature in features if ISA.match(feature)))
        digest = hashlib.sha256(isa.encode()).hexdigest()[:12]
        usable = os.sched_getaffinity(0)
        caches = _caches(_SYSFS / "cpu0" / "cache")
        return cls(
            cpu=name,
            fingerprint=f"{model}-{digest}-{os.cpu_count()}",
            features=features,
            cores=_physical(usable, _SYSFS),
            logical=len(usable),
            l1=caches.get(1),
            l2=caches.get(2),
            l3=caches.get(3),
            memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        )


@functools.cache
def machine() -> Machine:
    """This machine, as it was at the first call."""
    return Machine.detect()


def check_memory(spec: ConvSpec) -> None:
    """Raise:
    SpecError: the layer's tensors cannot fit into this machine's memory.
    """
    needed, available = sum(spec.bytes.values()), machine().memory
    if available and needed > available:
        raise SpecError("memory", f"tensors of at most {available:,} bytes", f"{needed:,}", spec.descriptor)


def parse_cpuinfo(text: str) -> tuple[str, str, frozenset[str]]:
    """Name, model and features from the text of ``/proc/cpuinfo``.

    Cores of several kinds in one machine give a model that names each kind, and the features that
    all of them have.
    """
    processors = []
    for block in re.split(r"\n\s*\n", text.strip()):
        pairs = (line.partition(":") for line in block.splitlines())
        processors.append({key.strip(): value.strip() for key, _, value in pairs})
    models = {
        "-".join(processor.get(name, "") for name in names)
        for processor in processors
        for names in MODEL_FIELDS
        if names[0] in processor
    }
    model = re.sub(r"[^\w+.-]+", "_", "+".join(sorted(models))) or platform.machine() or "unknown"
    flags = [p.get("flags") or p.get("Features", "") for p in processors]
    features = [frozenset(map(_feature, words.split())) for words in flags if words]
    common = frozenset.intersection(*features) if features else frozenset()
    name = next((p["model name"] for p in processors if p.get("model name")), model)
    return name, model, common


def _feature(flag: str) -> str:
    """Linux's name of a feature -> the C compilers'."""
    return _RENAMED.get(flag) or re.sub(r"^(avx512|avx)_", r"\1", flag).replace("amx_", "amx-")


def _physical(usable: set[int], sysfs: Path) -> int:
    """How many cores the logical CPUs belong to; each its own where the system does not tell."""
    return len({_core(cpu, sysfs) for cpu in usable})


# -- CPUs of one's own --------------------------------------------------------------------------------

#: Seconds to wait for CPUs that others measure on before sharing them.
PATIENCE = 2.0
_LOCK_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[bool]:
    """Keep this process on ``threads`` CPUs, of as many physical cores as there are; gives whether it could.

    Processes of one user that measure at the same time claim different CPUs, and take turns where
    there are too few: a claim is a lock on a file, which goes with its process.
    """
    try:
        before = os.sched_getaffinity(0)
        cpus = _by_core(before, _SYSFS)
    except (AttributeError, OSError):  # not this system, or not in this sandbox
        yield False
        return
    with contextlib.ExitStack() as claims:
        chosen = _claim(cpus, threads, claims) if threads <= len(cpus) else set(cpus)
        try:
            _set_affinity(chosen)
        except OSError:
            yield False
            return
        try:
            yield threads <= len(cpus)
        finally:
            _set_affinity(before)


def _set_affinity(cpus: set[int]) -> None:
    """Set the CPUs of every thread of this process, because a thread pool of an earlier measurement is used again."""
    os.sched_setaffinity(0, cpus)
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), cpus)


def _claim(cpus: list[int], threads: int, claims: contextlib.ExitStack) -> set[int]:
    """CPUs that no other process measures on; after :data:`PATIENCE` without enough of them, simply the first ones."""
    end = time.monotonic() + PATIENCE
    with contextlib.suppress(OSError, FolderError), contextlib.ExitStack() as folder_open:
        folder = open_shared("convgen-cpus")
        folder_open.callback(os.close, folder)
        while time.monotonic() < end:
            with contextlib.ExitStack() as locks:
                claimed: set[int] = set()
                for cpu in cpus:
                    file = os.open(str(cpu), _LOCK_FILE, 0o600, dir_fd=folder)
                    locks.callback(os.close, file)
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        claimed.add(cpu)
                    if len(claimed) == threads:
                        claims.push(locks.pop_all())
                        return claimed
            time.sleep(0.005)
    return set(cpus[:threads])


def _by_core(usable: set[int], sysfs: Path) -> list[int]:
    """The CPUs, one of each physical core first."""
    cores: dict[str, int] = {}
    rank = {}
    for cpu in sorted(usable):
        core = _core(cpu, sysfs)
        rank[cpu] = cores[core] = cores.get(core, -1) + 1
    return sorted(usable, key=lambda cpu: (rank[cpu], cpu))


def _core(cpu: int, sysfs: Path) -> str:
    """An identifier of the physical core that a logical CPU belongs to."""
    siblings = sysfs / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    return siblings.read_text().strip() if siblings.exists() else str(cpu)


def _caches(folder: Path) -> dict[int, int]:
    """Level -> bytes of the data or unified cache, where the system tells."""
    sizes = {}
    for index in folder.glob("index*"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # some virtual machines leave files out
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
            if kind in ("Data", "Unified"):
                sizes[int(level)] = int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]]
    return sizes


# -- measured --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What this machine reaches with a number of threads.

    Attributes:
        peak: f32 operations per second, a fused multiply-add counting two.
        l2, l3, dram: bytes per second read from there; None where the size of the cache is not known.
        date: when, ISO 8601 UTC.
        peak_i8, peak_bf16: operations per second of the instruction that adds most products of bytes, or of bf16, at
            once; None where there is none.
    """

    peak: float
    l2: float | None
    l3: float | None
    dram: float
    date: str
    peak_i8: float | None = None
    peak_bf16: float | None = None


def measured_peak(threads: int, *, refresh: bool = False) -> float:
    """f32 operations per second that ``threads`` threads reach; see :func:`measured`."""
    return measured(threads, refresh=refresh).peak


def measured_bandwidth(threads: int, level: str = "dram", *, refresh: bool = False) -> float:
    """Bytes per second that ``threads`` threads read from ``l2``, ``l3`` or ``dram``; see :func:`measured`.

    Raises:
        MeasureError: the system does not tell how large that cache is.
    """
    if level not in LEVELS:
        raise MeasureError(f"level: expected one of {', '.join(LEVELS)}, found {level!r}")
    value: float | None = getattr(measured(threads, refresh=refresh), level)
    if value is None:
        raise MeasureError(f"level: expected a cache whose size the system tells, found {level}")
    return value


def measured(threads: int, *, refresh: bool = False) -> Measured:
    """Measure this machine, in about a second, or look up what was measured before.

    Results are kept in the user's cache directory; ``refresh`` measures again. More threads than
    this process has CPUs count as one per CPU.

    Raises:
        BuildError: there is no C compiler, or it failed.
        MeasureError: the measurement failed.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise MeasureError(f"threads: expected an integer >= 1, found {threads!r}")
    here = machine()
    threads = min(threads, here.logical)
    path = _cache_path(here, threads)
    if path and not refresh and (kept := _kept(path)):
        return kept
    found = _measure(here, threads)
    if path is None:
        return found
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"fingerprint": here.fingerprint, "threads": threads, **asdict(found)}
        with replacing(path) as new:
            new.write_text(json.dumps(values, indent=1))
    return found


def _cache_path(here: Machine, threads: int) -> Path | None:
    cache = user_cache()
    return cache / "machine" / f"{here.fingerprint}-{threads}t.json" if cache else None


def _kept(path: Path) -> Measured | None:
    try:
        values = json.loads(path.read_text())
        numbers = {name: values[name] for name in ("peak", "peak_i8", "peak_bf16", *LEVELS)}
        is_sound = all(value is None or value > 0 for value in numbers.values()) and numbers["peak"] and numbers["dram"]
        return Measured(**numbers, date=str(values["date"])) if is_sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing or damaged: measure again


def _measure(here: Machine, threads: int) -> Measured:
    command = [str(threads)]
    for level, size in _buffers(here, threads).items():
        command += [level, str(size)]
    with TemporaryFolder(runs=True) as folder:
        program = _compile(folder)
        try:
            done = subprocess.run([program, *command], capture_output=True, text=True, timeout=60)
            done.check_returncode()
            values = {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}
            date = datetime.now(UTC).isoformat(timespec="seconds")
            narrow = {name: values.get(name) for name in ("peak_i8", "peak_bf16")}
            return Measured(values["peak"], values.get("l2"), values.get("l3"), values["dram"], date, **narrow)
        except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
            raise MeasureError(f"measuring this machine with {threads} threads failed: {error}") from error


def _buffers(here: Machine, threads: int) -> dict[str, int]:
    """How many bytes each thread must read so that they come from a level, by level."""
    sizes = {}
    if here.l2:
        sizes["l2"] = here.l2 // 2
        if here.l3:
            sizes["l3"] = max(2 * here.l2, here.l3 // (2 * threads))
    # Twice the cache, so that data is evicted before it is read again. Larger buffers take long to allocate.
    sizes["dram"] = max(64 << 20, min(2 * (here.l3 or 0), 512 << 20)) // threads
    return {level: max(size, 64 << 10) for level, size in sizes.items()}


def _compile(folder: Path) -> Path:
    """The measuring program, for exactly this machine."""
    source = resources.files("convgen").joinpath("runtime", "machine.c").read_text(encoding="utf-8")
    (folder / "machine.c").write_text(source, encoding="utf-8")
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    said = ""
    for native in ("-march=native", "-mcpu=native"):  # a compiler for Arm may know only one of the two options
        command = [*compiler, "-O3", native, "-pthread", "-o", "machine", "machine.c"]
        try:
            environment = {**os.environ, "TMPDIR": str(folder)}
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", check=False
            )
        except OSError as error:
            hint = "install a C compiler (Debian: apt install gcc) or name one in CC"
            raise BuildError(f"{compiler[0]}: {error.strerror}; {hint}") from error
        if not done.returncode:
            return folder / "machine"
        said = said or f"exit status {done.returncode} of {shlex.join(command)}\n{done.stderr.strip()}"
    raise BuildError(said)
