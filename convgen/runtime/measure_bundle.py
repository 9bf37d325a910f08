"""Measure a bundle of compiled candidates, on a machine that has Python and nothing else.

    python3 run.py                  measures what is not yet in results.jsonl, and compares the leaders
    python3 run.py --facts          prints what is to be known about this machine, as JSON

`convgen fleet pack` copies this file into the bundle as ``run.py``. It needs Python 3.8 or later and its standard
library, and for a GPU's kernels the driver: no convgen, no NumPy, no compiler, no network. Every candidate runs in
a process of its own, with limits of time and memory, and its output is compared with what is expected before it is
timed. A result is on the disk before the next candidate begins; the same command goes on where it was stopped,
however that was.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import fcntl
import glob
import hashlib
import itertools
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Sequence  # noqa: UP035 - Python 3.8

#: Version of the manifest and of the results.
FORMAT = 1
OK, WRONG_USAGE, TROUBLE, INTERRUPTED = 0, 2, 3, 130

Call = Callable[[], Any]
Json = Any


class Trouble(Exception):  # noqa: N818 - a message for the user
    """What keeps the bundle from being measured here; the message says what was expected and what was found."""


# ---- timing: as convgen.measure.trial does it --------------------------------------------------------


def repeats(call: Call, seconds: float) -> int:
    """How often to repeat a call in one sample of ``seconds``; warms it up."""
    call()
    start = time.perf_counter()
    call()
    return max(1, min(10_000, int(seconds / max(time.perf_counter() - start, 1e-9))))


def sample(call: Call, count: int) -> float:
    """Seconds per call over ``count`` calls."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def preemptions() -> int:
    """How often the system has taken a CPU away from this process: its involuntary context switches."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def time_calls(
    call: Call, seconds: float, sample_seconds: float, hopeless: float = 0.0, at_least: int = 5
) -> list[float]:
    """Samples of seconds per call for about ``seconds``; only one where it exceeds ``hopeless`` (0: no limit).

    Those during which something else got one of the CPUs are left out where ``at_least`` others remain.
    """
    count = repeats(call, sample_seconds)
    samples: list[float] = []
    quiet: list[float] = []

    def take() -> float:
        before = preemptions()
        samples.append(sample(call, count))
        if preemptions() == before:
            quiet.append(samples[-1])
        return samples[-1]

    first = take()
    if hopeless and first > hopeless:
        return samples
    for _ in range(max(at_least, min(200, int(seconds / max(first * count, 1e-9)))) - 1):
        take()
    return quiet if len(quiet) >= at_least else samples


def alternate(calls: Sequence[Call], rounds: int, seconds: float) -> list[list[float]]:
    """Samples of several calls taken in turn. A disturbed round is taken again, at most ``rounds`` times in all."""
    counts = [repeats(call, seconds) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    kept, again = 0, rounds if calls else 0
    while kept < rounds:
        before = preemptions()
        one_round = [sample(call, counts[i]) for i, call in enumerate(calls)]
        if preemptions() != before and again:
            again -= 1
            continue
        kept += 1
        for i, taken in enumerate(one_round):
            samples[i].append(taken)
    return samples


def pin(threads: int) -> None:
    """Keep this process on as many CPUs, of as many physical cores as there are; where that is allowed."""
    cores: dict[str, int] = {}
    ranked = []
    for cpu in sorted(os.sched_getaffinity(0)):
        core = _core(cpu)
        cores[core] = cores.get(core, -1) + 1
        ranked.append((cores[core], cpu))
    if threads <= len(ranked):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cpu for _, cpu in sorted(ranked)[:threads]})


# ---- this machine ------------------------------------------------------------------------------

#: Lines of /proc/cpuinfo that tell processors apart. It has others: clocks, serial numbers.
_KEPT = {
    *("vendor_id", "cpu family", "model", "stepping", "model name", "flags"),
    *("CPU implementer", "CPU part", "CPU variant", "CPU revision", "Features"),
}


def facts() -> dict[str, Json]:
    """What this machine is: what ``convgen.hardware.machine`` reads, for whoever imports the results."""
    usable = os.sched_getaffinity(0)
    return {
        "cpuinfo": processors(_read("/proc/cpuinfo")),
        "cpus": os.cpu_count() or 1,
        "architecture": platform.machine(),
        "cores": len({_core(cpu) for cpu in usable}),
        "logical": len(usable),
        "caches": _caches(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu": gpu_facts(),
    }


def processors(cpuinfo: str) -> str:
    """Of the text of /proc/cpuinfo what tells processors apart, each kind once."""
    kinds: list[str] = []
    for block in re.split(r"\n\s*\n", cpuinfo.strip()):
        kept = "\n".join(line for line in block.splitlines() if line.partition(":")[0].strip() in _KEPT)
        if kept and kept not in kinds:
            kinds.append(kept)
    return "\n\n".join(kinds)


def _core(cpu: int) -> str:
    """What tells a logical CPU's core from others."""
    return _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu)


def _caches() -> dict[str, int]:
    """Level -> bytes of the data or unified cache of one core, where the system tells."""
    sizes = {}
    for folder in sorted(glob.glob("/sys/devices/system/cpu/cpu0/cache/index*")):
        kind, level, size = (_read(os.path.join(folder, name)).strip() for name in ("type", "level", "size"))
        match = re.match(r"(\d+)([KMG])\Z", size)
        if kind in ("Data", "Unified") and level.isdigit() and match:
            sizes[level] = int(match.group(1)) << {"K": 10, "M": 20, "G": 30}[match.group(2)]
    return sizes


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


# ---- a candidate on a device: in a process of its own ------------------------------------------

_DTYPES = {"f32": 0, "f16": 1, "bf16": 2, "i8": 3}
_PARAMETERS = ("weights", "bias", "slope", "scale")
_ALIGNMENT = 64
_NO_MEMORY = 7  # enum convgen_status
_NO_IMAGE, _DRIVER_ERROR = 34, 35  # enum convgen_cuda_status
#: Addresses that the C library sets aside for a thread: its stack and a heap.
_THREAD_BYTES = 256 << 20


def _fields(*names: str) -> list[tuple[str, Any]]:
    return [field for name in names for field in ((name, ctypes.c_void_p), (name + "_size", ctypes.c_size_t))]


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("src", *_PARAMETERS, "residual", "dst", "packed", "workspace")]


class _PackArgs(ctypes.Structure):
    _fields_ = _fields(*_PARAMETERS, "packed")


class _RunArgs(ctypes.Structure):
    _fields_ = [*_fields("src", "packed", "residual", "dst", "workspace"), ("pool", ctypes.c_void_p)]


class _GpuRunArgs(ctypes.Structure):
    _fields_ = [*_fields("src", "packed", "residual", "dst", "workspace"), ("stream", ctypes.c_void_p)]


class _Difference(ctypes.Structure):
    _fields_ = [
        ("wrong", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("expected", ctypes.c_double),
        ("found", ctypes.c_double),
    ]


class Refused(Exception):  # noqa: N818 - says something about the machine, not about the candidate
    """This machine cannot run what the bundle holds for the target."""


def _pass(args: ctypes.Structure, sizes: _Sizes, data: dict[str, Any], *names: str) -> None:
    """Hand tensors to a function."""
    for name in names:
        if name in data:
            if len(data[name]) != getattr(sizes, name):
                raise RuntimeError(f"{name}: expected {getattr(sizes, name)} bytes, found {len(data[name])}")
            setattr(args, name, ctypes.addressof(data[name]))
            setattr(args, name + "_size", getattr(sizes, name))


def _aligned(size: int) -> ctypes.c_void_p:
    """The address of so many bytes at a multiple of 64, which live as long as the process."""
    memory = (ctypes.c_char * (size + _ALIGNMENT))()
    _kept.append(memory)
    return ctypes.c_void_p(-(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT)


_kept: list[Any] = []


# ---- a GPU -------------------------------------------------------------------------------------

#: What of the CUDA driver is called, and with what; all return a CUresult.
_DRIVER: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDriverGetVersion": (ctypes.c_void_p,),
    "cuDeviceGet": (ctypes.c_void_p, ctypes.c_int),
    "cuDeviceGetName": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuDeviceTotalMem_v2": (ctypes.c_void_p, ctypes.c_int),
    "cuDeviceGetAttribute": (ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.c_void_p, ctypes.c_int),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuStreamSynchronize": (ctypes.c_void_p,),
    "cuMemAlloc_v2": (ctypes.c_void_p, ctypes.c_size_t),
    "cuMemFree_v2": (ctypes.c_uint64,),
    "cuMemcpyHtoD_v2": (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t),
    "cuMemcpyDtoH_v2": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t),
    "cuMemsetD8_v2": (ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t),
    "cuEventCreate": (ctypes.c_void_p, ctypes.c_uint),
    "cuEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cuEventSynchronize": (ctypes.c_void_p,),
    "cuEventElapsedTime": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
    "cuGetErrorName": (ctypes.c_int, ctypes.c_void_p),
}
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_SMS, _L2, _MAJOR, _MINOR = 16, 38, 75, 76  # enum CUdevice_attribute
_GPU_ALIGNMENT = 256
#: Tensors are there so often that a call finds what the last one but so many times the L2 cache has used.
_COLD, _COPIES = 2, 1024
#: Seconds of calls before the first sample, for the clock to rise; calls that fit into the driver's queue.
_WARM_UP, _QUEUE = 20e-3, 256
#: Times the memory is filled at most, to keep the device busy while a sample is launched.
_FILLS = 200


class Gpu:
    """The first GPU, used through its driver on the default stream of its primary context, on this thread.

    Raises:
        Refused: there is no driver, or no device.
    """

    def __init__(self) -> None:
        self._driver()
        self("cuCtxPushCurrent_v2", self.get("cuDevicePrimaryCtxRetain", ctypes.c_void_p, self.number))
        self._begin, self._end = (self.get("cuEventCreate", ctypes.c_void_p, 0) for _ in range(2))
        self._scratch_size = max(_COLD * self.facts["l2"], 1 << 20)
        self._scratch = self.allocate(self._scratch_size)
        self._fill_seconds = min(self._elapsed(self._fill, 8) for _ in range(5))

    def _driver(self) -> None:
        """Open the driver, and ask for the device."""
        name = os.environ.get("CONVGEN_CUDA_DRIVER") or "libcuda.so.1"
        try:
            library = ctypes.CDLL(name)
            self._functions = {function: getattr(library, function) for function in _DRIVER}
        except (OSError, AttributeError) as error:
            raise Refused(f"expected a CUDA driver, found none: {error}") from None
        for function, arguments in _DRIVER.items():
            self._functions[function].argtypes = arguments
        try:
            self("cuInit", 0)
            self.number = self.get("cuDeviceGet", ctypes.c_int, 0)
        except RuntimeError as error:
            raise Refused(f"expected a CUDA device, found none: {error}") from None
        text = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", text, len(text), self.number)
        #: What a device's records are tied to, and what tensors are laid out for.
        self.facts: dict[str, Json] = {
            "name": text.value.decode(errors="replace"),
            "capability": [self._attribute(_MAJOR), self._attribute(_MINOR)],
            "sms": self._attribute(_SMS),
            "l2": self._attribute(_L2),
            "memory": self.get("cuDeviceTotalMem_v2", ctypes.c_size_t, self.number),
            "driver": self.get("cuDriverGetVersion", ctypes.c_int),
        }

    @classmethod
    def known(cls) -> dict[str, Json]:
        """A device's facts, without a context on it."""
        made = cls.__new__(cls)
        made._driver()
        return made.facts

    def _attribute(self, which: int) -> int:
        return int(self.get("cuDeviceGetAttribute", ctypes.c_int, which, self.number))

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            MemoryError: the device has not as much.
            RuntimeError: it failed otherwise; what a kernel did shows in whatever is called next.
        """
        error = self._functions[function](*arguments)
        if error:
            name = ctypes.c_char_p()
            self._functions["cuGetErrorName"](error, ctypes.byref(name))
            text = f"{function}: the CUDA driver reported {(name.value or b'').decode() or error}"
            raise MemoryError(text) if error == _OUT_OF_MEMORY else RuntimeError(text)

    def get(self, function: str, kind: Any, *arguments: Any) -> Any:
        """What a function writes to its first argument, of type ``kind``."""
        value = kind()
        self(function, ctypes.byref(value), *arguments)
        return value.value

    def allocate(self, size: int) -> int:
        """The address of so many bytes of device memory, all NaN; 0 of none."""
        if not size:
            return 0
        address = int(self.get("cuMemAlloc_v2", ctypes.c_uint64, size))
        self("cuMemsetD8_v2", address, 0xFF, size)
        return address

    def free(self, address: int) -> None:
        if address:
            self("cuMemFree_v2", address)

    def wait(self) -> None:
        self("cuStreamSynchronize", None)

    # As the functions of the same names do it on a CPU, by the device's clock.

    def sample(self, call: Call, count: int, fills: int = 1) -> float:
        """Seconds per call over ``count`` calls. Filling memory first keeps the device busy while they are launched:
        it never waits for the next one.
        """
        for _ in range(fills):
            self._fill()
        return self._elapsed(call, count)

    def repeats(self, call: Call, seconds: float) -> tuple[int, int]:
        """How often to repeat a call in one sample of ``seconds``, and to fill memory before; warms up."""
        end = time.perf_counter() + _WARM_UP
        while True:
            call()
            self.wait()
            if time.perf_counter() >= end:
                break
        count = max(1, min(_QUEUE, int(seconds / max(self.sample(call, 3), 1e-9))))
        start = time.perf_counter()
        for _ in range(count):
            call()
        launching = time.perf_counter() - start
        self.wait()
        return count, max(1, min(_FILLS, int(1.5 * launching / self._fill_seconds) + 1))

    def time_calls(
        self, call: Call, seconds: float, sample_seconds: float, hopeless: float = 0.0, at_least: int = 5
    ) -> list[float]:
        """Samples of seconds per call for about ``seconds``; only one where it exceeds ``hopeless`` (0: no limit)."""
        count, fills = self.repeats(call, sample_seconds)
        samples = [self.sample(call, count, fills)]
        if hopeless and samples[0] > hopeless:
            return samples
        for _ in range(max(at_least, min(200, int(seconds / max(samples[0] * count, 1e-9)))) - 1):
            samples.append(self.sample(call, count, fills))
        return samples

    def alternate(self, calls: Sequence[Call], rounds: int, seconds: float) -> list[list[float]]:
        """Samples of several calls taken in turn."""
        ways = [self.repeats(call, seconds) for call in calls]
        samples: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for i, call in enumerate(calls):
                samples[i].append(self.sample(call, *ways[i]))
        return samples

    def _elapsed(self, call: Call, count: int = 1) -> float:
        self("cuEventRecord", self._begin, None)
        for _ in range(count):
            call()
        self("cuEventRecord", self._end, None)
        self("cuEventSynchronize", self._end)
        milliseconds: float = self.get("cuEventElapsedTime", ctypes.c_float, self._begin, self._end)
        return max(milliseconds, 1e-6) / 1e3 / count

    def _fill(self) -> None:
        self("cuMemsetD8_v2", self._scratch, 0, self._scratch_size)


def gpu_facts() -> dict[str, Json] | None:
    """What the first GPU is; None where there is none."""
    try:
        return Gpu.known()
    except Refused:
        return None


class GpuCall:
    """A library's kernel on device memory: each call takes the next of several copies of the tensors, which
    together are larger than the L2 cache.

    Args:
        gpu: where it runs.
        library: the loaded library; ``name`` is the prefix of its functions.
        data: the tensors in CPU memory that it reads.

    Raises:
        Refused: the library has no code for this device.
        MemoryError: the device has not enough.
        RuntimeError: the library refused.
    """

    def __init__(self, gpu: Gpu, library: Any, name: str, data: dict[str, Any]) -> None:
        self._gpu, self._library, self._name = gpu, library, name
        self._function("error").restype = self._function("driver_error").restype = ctypes.c_char_p
        sizes = _Sizes()
        self._require(self._function("sizes")(ctypes.byref(sizes)))
        packed = _aligned(sizes.packed)
        pack = _PackArgs(packed=packed, packed_size=sizes.packed)
        _pass(pack, sizes, data, *_PARAMETERS)
        self._require(self._function("pack")(ctypes.byref(pack)))
        self._require(self._function("load")())
        for tensor in ("src", "residual"):
            if len(data.get(tensor, b"")) != getattr(sizes, tensor):
                raise RuntimeError(f"{tensor}: expected {getattr(sizes, tensor)} bytes, found another size")
        parts = {"src": data["src"], "packed": packed, "residual": data.get("residual"), "dst": None}
        places, stride = {}, 0
        for part in parts:
            places[part] = stride
            stride += -(-getattr(sizes, part) // _GPU_ALIGNMENT) * _GPU_ALIGNMENT
        copies = max(1, min(_COPIES, -(-_COLD * gpu.facts["l2"] // max(stride, 1)), gpu.facts["memory"] // 4 // stride))
        self._memory: list[int] = []
        try:
            for size in (copies * stride, sizes.workspace):
                self._memory.append(gpu.allocate(size))
        except MemoryError:
            self._free()
            raise
        self._turns = []
        for first in range(self._memory[0], self._memory[0] + copies * stride, stride):
            args = _GpuRunArgs(workspace=self._memory[1] or None, workspace_size=sizes.workspace)
            for part, source in parts.items():
                size = getattr(sizes, part)
                if size:
                    setattr(args, part, first + places[part])
                    setattr(args, part + "_size", size)
                if size and source is not None:
                    gpu("cuMemcpyHtoD_v2", first + places[part], source, size)
            self._turns.append(args)
        gpu.wait()
        self._run = self._function("run")
        self._next = itertools.cycle([ctypes.byref(args) for args in self._turns])

    def __call__(self) -> None:
        """Launch it; what goes wrong on the device shows when it is waited for."""
        status = self._run(next(self._next))
        if status:
            self._require(status)

    def output(self) -> Any:
        """What the first copy's call has written."""
        first = self._turns[0]
        memory = (ctypes.c_char * first.dst_size)()
        self._gpu.wait()
        self._gpu("cuMemcpyDtoH_v2", memory, first.dst, first.dst_size)
        return memory

    def close(self) -> None:
        """Give the device's memory back."""
        self._gpu.wait()
        self._require(self._function("unload")())
        self._free()

    def _free(self) -> None:
        for address in self._memory:
            self._gpu.free(address)

    def _function(self, suffix: str) -> Any:
        return getattr(self._library, self._name + "_" + suffix)

    def _require(self, status: int) -> None:
        if not status:
            return
        text = self._function("error")(status).decode()
        if status == _NO_IMAGE:
            raise Refused(text)
        if status == _DRIVER_ERROR:
            text += ": " + self._function("driver_error")().decode()
        raise MemoryError(text) if status == _NO_MEMORY or "OUT_OF_MEMORY" in text else RuntimeError(text)


# ---- kinds of devices ------------------------------------------------------------------------


class Cpu:
    """Candidates as shared libraries with convgen's C runtime; on the CPU.

    Args:
        root: the bundle.
        layer: the manifest's entry: the shapes, and the files of inputs and expected output.
        check: the library that compares outputs.
        threads: of the calls.
    """

    #: Whether a process is held to its memory.
    is_limited = True

    def __init__(self, root: str, layer: dict[str, Json], check: str, threads: int) -> None:
        self.root, self.layer, self.threads = root, layer, threads
        self.data = {name: self._load(file) for name, file in layer["data"].items()}
        self.check = self._open(check)
        self._pool = ctypes.c_void_p()

    def prepare(self, trial: dict[str, Json]) -> tuple[Call, Call]:
        """A call of a candidate on the layer's inputs, and what gives the memory it writes."""
        library, name = self._open(trial["library"]), trial["name"]

        def function(suffix: str) -> Any:
            return getattr(library, name + "_" + suffix)

        error = function("error")
        error.restype = ctypes.c_char_p

        def require(status: int) -> None:
            if status == _NO_MEMORY:
                raise MemoryError(error(status).decode())
            if status:
                raise RuntimeError(error(status).decode())

        if function("check_cpu")():
            raise Refused("this CPU lacks instructions of " + trial["target"])
        sizes = _Sizes()
        require(function("sizes")(self.threads, ctypes.byref(sizes)))
        packed, workspace = _aligned(sizes.packed), _aligned(sizes.workspace)
        pack = _PackArgs(packed=packed, packed_size=sizes.packed)
        _pass(pack, sizes, self.data, *_PARAMETERS)
        require(function("pack")(ctypes.byref(pack)))
        if self.threads > 1 and not self._pool:  # one pool serves all libraries
            require(function("pool_create")(self.threads, ctypes.byref(self._pool)))
        dst = (ctypes.c_char * sizes.dst)()
        ctypes.memset(dst, 0xFF, sizes.dst)  # NaN
        run_args = _RunArgs(packed=packed, packed_size=sizes.packed, dst=ctypes.addressof(dst), dst_size=sizes.dst)
        run_args.workspace, run_args.workspace_size, run_args.pool = workspace, sizes.workspace, self._pool
        _pass(run_args, sizes, self.data, "src", "residual")
        run, reference = function("run"), ctypes.byref(run_args)

        def call(_memory: Any = (run_args, packed, workspace, dst)) -> None:
            status = run(reference)
            if status:
                require(status)

        return call, lambda: dst

    def difference(self, dst: Any, exact: bool) -> str:
        """How an output differs from the expected one; empty where it does not."""
        shape = self.layer["shape"]
        count = 1
        for extent in shape:
            count *= extent
        bound = None if exact else self.data["bound"]
        result = _Difference()
        found = (dst, self.data["expected"], bound, ctypes.c_uint64(count), _DTYPES[self.layer["dtype"]])
        self.check.convgen_compare(*found, ctypes.byref(result))
        if not result.wrong:
            return ""
        at: list[int] = []
        rest = int(result.first)
        for extent in reversed(shape):
            rest, index = divmod(rest, extent)
            at.insert(0, index)
        values = "expected %.9g, found %.9g" % (result.expected, result.found)  # noqa: UP031
        return f"{result.wrong} of {count} elements; at {tuple(at)} {values}"

    def time(self, call: Call, timing: dict[str, Json], hopeless: float) -> list[float]:
        """Samples of a call."""
        return time_calls(call, timing["trial_seconds"], timing["sample_seconds"], hopeless)

    def compare(self, calls: Sequence[Call], timing: dict[str, Json]) -> list[list[float]]:
        """Samples of several calls taken in turn."""
        return alternate(calls, timing["rounds"], timing["duel_seconds"])

    def reference(self) -> float | None:
        """Seconds of a fixed piece of arithmetic: whether the machine is as fast as it was."""
        return statistics.median(sample(self.check.convgen_reference_kernel, 1) for _ in range(5))

    def _load(self, file: str) -> Any:
        with open(os.path.join(self.root, file), "rb") as source:
            memory = (ctypes.c_char * os.fstat(source.fileno()).st_size)()
            source.readinto(memory)
        return memory

    def _open(self, file: str) -> Any:
        try:
            return ctypes.CDLL(os.path.join(self.root, file))
        except OSError as error:  # its bytes are right: the C library is another, or too old
            raise Refused(str(error)) from None


class Cuda(Cpu):
    """Candidates whose libraries run on a GPU; their inputs come from and their outputs go to the CPU's memory."""

    is_limited = False  # a driver sets aside more addresses than there is memory

    def __init__(self, root: str, layer: dict[str, Json], check: str, threads: int) -> None:
        super().__init__(root, layer, check, threads)
        self.gpu = Gpu()

    def prepare(self, trial: dict[str, Json]) -> tuple[Call, Call]:
        call = GpuCall(self.gpu, self._open(trial["library"]), trial["name"], self.data)
        return call, call.output

    def time(self, call: Call, timing: dict[str, Json], hopeless: float) -> list[float]:
        return self.gpu.time_calls(call, timing["trial_seconds"], timing["sample_seconds"], hopeless)

    def compare(self, calls: Sequence[Call], timing: dict[str, Json]) -> list[list[float]]:
        return self.gpu.alternate(calls, timing["rounds"], timing["duel_seconds"])

    def reference(self) -> None:
        """Its clock is not what the CPU's arithmetic tells of."""


#: Kinds of devices by the manifest's name for them.
DEVICES: dict[str, Any] = {"cpu": Cpu, "cuda": Cuda}


def child() -> int:
    """Do the job that standard input describes; the answer, a line of JSON, goes to standard output."""
    job = json.load(sys.stdin)
    answer = os.dup(1)
    os.dup2(2, 1)  # what a candidate prints is no answer
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: never outlive the parent
    if os.getppid() != job["parent"]:
        return TROUBLE
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))  # standard error is a file
    if job["memory"] and DEVICES[job["device"]].is_limited:
        resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
    pin(job["trials"][0]["threads"])
    try:
        result = _compare(job) if job["kind"] == "final" else _measure(job)
    except Refused as error:
        result = {"refused": str(error)}
    except MemoryError as error:
        limit = f"expected at most {job['memory']} bytes; " if DEVICES[job["device"]].is_limited else ""
        result = {"outcome": "memory", "error": f"{limit}{error}".rstrip("; ")}
    except Exception as error:  # whatever it raised is this trial's outcome
        result = {"outcome": "run_error", "error": f"{type(error).__name__}: {error}"[-2000:]}
    os.write(answer, json.dumps(result).encode())
    return OK


def _measure(job: dict[str, Json]) -> dict[str, Json]:
    trial, device = job["trials"][0], _device(job)
    call, output = device.prepare(trial)
    call()
    difference, samples = device.difference(output(), trial["exact"]), []
    if not difference:
        samples = device.time(call, job["timing"], job["hopeless"])
        # What races is wrong now and then.
        difference = device.difference(output(), trial["exact"])
    if difference:
        return {"outcome": "wrong", "error": difference}
    return {"outcome": "ok", "samples": samples, "reference": device.reference()}


def _compare(job: dict[str, Json]) -> dict[str, Json]:
    device = _device(job)
    calls = [device.prepare(trial)[0] for trial in job["trials"]]
    return {"outcome": "ok", "samples": device.compare(calls, job["timing"])}


def _device(job: dict[str, Json]) -> Any:
    return DEVICES[job["device"]](job["root"], job["layer"], job["check"], job["trials"][0]["threads"])


# ---- results -----------------------------------------------------------------------------------


def digest(line: dict[str, Json]) -> str:
    """SHA-256 of a line of the results without its own ``digest``."""
    rest = {name: value for name, value in line.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def now() -> str:
    """ISO 8601, UTC, microseconds."""
    utc = datetime.timezone.utc  # noqa: UP017 - Python 3.8
    return datetime.datetime.now(utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Results:
    """The file of results: one JSON object per line, each on the disk before the next trial begins.

    The first line says which bundle and machine they are of. What a kill left of the last line is cut off.
    """

    def __init__(self, path: str, manifest: str, machine: dict[str, Json], device: str = "cpu") -> None:
        self.path = path
        self.lines: list[dict[str, Json]] = []
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise Trouble(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Trouble(f"{path}: another process is writing it") from None
        self._size = self._resume()
        if not self.lines:
            run = {"kind": "run", "format": FORMAT, "manifest": manifest, "facts": machine, "when": now()}
            self.add({**run, "python": platform.python_version()})
        header: dict[str, Json] = self.lines[0]
        self.run: str = header["digest"]
        if header.get("manifest") != manifest:
            raise Trouble(f"{path}: expected results of this bundle, found those of another one: name a new file")
        found = header["facts"]
        names = ["cpuinfo", "cpus", "architecture"] + ["gpu"] * (device == "cuda")
        if any(found.get(name) != machine[name] for name in names):
            raise Trouble(f"{path}: expected results of this machine, found those of another one: name a new file")

    def _resume(self) -> int:
        """Read the whole lines; cut off what is left of one that was being written."""
        data = b""
        while True:
            part = os.read(self._file, 1 << 20)
            if not part:
                break
            data += part
        end = data.rfind(b"\n") + 1
        for number, text in enumerate(data[:end].splitlines(), 1):
            try:
                line = json.loads(text)
                whole = line["digest"] == digest(line)
            except (ValueError, TypeError, KeyError):
                whole = False
            if not whole:
                raise Trouble(f"{self.path}: line {number}: expected a line of results, found a damaged one")
            self.lines.append(line)
        if end < len(data):
            os.ftruncate(self._file, end)
        return end

    def add(self, line: dict[str, Json]) -> None:
        """Append a line; it is on the disk when this returns, or there is nothing of it.

        Raises:
            Trouble: it cannot be written.
        """
        if self.lines:
            line = {**line, "run": self.run}
        line = {**line, "digest": digest(line)}
        data = json.dumps(line, sort_keys=True).encode() + b"\n"
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._size + written)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise Trouble(f"{self.path}: {error.strerror}; what was measured before is kept") from None
        self._size += len(data)
        self.lines.append(line)


# ---- the bundle --------------------------------------------------------------------------------

#: What makes two trials the same, but for the machine.
IDENTITY = ("spec", "target", "threads", "schedule", "schedule_version", "picks", "versions")


class Bundle:
    """An unpacked bundle.

    Raises:
        Trouble: it is not one, of another version, or a file is not what the manifest says.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        path = os.path.join(self.root, "manifest.json")
        try:
            with open(path, "rb") as file:
                data = file.read()
            self.manifest: dict[str, Json] = json.loads(data)
            found = self.manifest["format"]
        except OSError as error:
            raise Trouble(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise Trouble(f"{path}: expected the manifest of a bundle, found {error}") from None
        if found != FORMAT:
            raise Trouble(f"{path}: format: expected {FORMAT}, found {found}")
        if self.manifest["device"] not in DEVICES:
            raise Trouble(f"{path}: device: expected {' or '.join(DEVICES)}, found {self.manifest['device']}")
        self.digest = hashlib.sha256(data).hexdigest()
        for name, expected in self.manifest["files"].items():
            self._check(name, expected)

    def _check(self, name: str, expected: str) -> None:
        path = os.path.join(self.root, name)
        if not os.path.realpath(path).startswith(os.path.realpath(self.root) + os.sep):
            raise Trouble(f"manifest.json: files: expected names within the bundle, found {name!r}")
        sha = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                for part in iter(lambda: file.read(1 << 20), b""):
                    sha.update(part)
        except OSError as error:
            raise Trouble(f"{path}: {error.strerror}") from None
        if sha.hexdigest() != expected:
            raise Trouble(f"{path}: expected SHA-256 {expected}, found {sha.hexdigest()}: the bundle was damaged")


class Session:
    """One run over a bundle.

    Args:
        timeout: seconds a candidate may take.
        memory: bytes it may take, 0: no limit; None: what the bundle says of the layer.
    """

    def __init__(self, bundle: Bundle, results: Results, timeout: float, memory: int | None) -> None:
        self.bundle, self.results, self.timeout, self.memory = bundle, results, timeout, memory
        self.trials: list[dict[str, Json]] = bundle.manifest["trials"]
        self.timing: dict[str, Json] = bundle.manifest["timing"]
        #: Targets whose code does not run here, and why.
        self.refused: dict[str, str] = {}
        self.done = {line["key"]: line for line in results.lines if line["kind"] == "trial"}
        self.compared = {line["group"] for line in results.lines if line["kind"] == "final"}
        self._start, self._count = time.monotonic(), 0

    def measure(self) -> None:
        """Measure every group of trials that race with each other, each to its end."""
        groups: dict[int, list[dict[str, Json]]] = {}
        for trial in self.trials:
            groups.setdefault(trial["group"], []).append(trial)
        here = platform.machine()
        for target in self.bundle.manifest["targets"]:
            if target["architecture"] != here:
                self._refuse(target["spelling"], f"for {target['architecture']}, and this machine is {here}")
        for number, trials in groups.items():
            for trial in trials:
                if trial["target"] not in self.refused and trial["key"] not in self.done and not trial["known"]:
                    self._trial(trial, trials)
            if trials[0]["target"] not in self.refused and number not in self.compared:
                self._final(number, trials)

    @property
    def left(self) -> int:
        """Trials that are still to be measured."""
        return sum(
            t["key"] not in self.done and not t["known"] and t["target"] not in self.refused for t in self.trials
        )

    def _trial(self, trial: dict[str, Json], rivals: list[dict[str, Json]]) -> None:
        start = time.monotonic()
        if trial["failed"]:  # to compile
            answer: dict[str, Json] = trial["failed"]
        else:
            best = min((seconds for seconds, _ in self._ranked(rivals)), default=0.0)
            answer = self._ask("trial", [trial], self.timing["hopeless"] * best)
        if "refused" in answer:
            self._refuse(trial["target"], answer["refused"])
            return
        line = {name: trial[name] for name in ("key", "library_sha256", *IDENTITY)}
        line.update(outcome=answer["outcome"], samples=answer.get("samples", []), error=answer.get("error", ""))
        line.update(kind="trial", when=now(), cost=round(time.monotonic() - start, 3))
        line.update(reference=answer.get("reference"))
        self.results.add(line)
        self.done[trial["key"]] = line
        self._count += 1
        self._say(trial, line)

    def _final(self, number: int, trials: list[dict[str, Json]]) -> None:
        """Compare the leaders and the default in turn."""
        good = [trial for _, trial in self._ranked(trials)]
        chosen = good[: self.timing["finalists"]]
        chosen += [trial for trial in good if trial["default"] and trial not in chosen]
        chosen = [trial for trial in chosen if trial["library"]]
        samples: list[list[float]] = []
        if chosen:
            answer = self._ask("final", chosen, 0.0)
            if "refused" in answer:
                self._refuse(chosen[0]["target"], answer["refused"])
                return
            samples = answer.get("samples", [])
            if not samples:  # one of them fails now and then: it shows when each runs by itself
                alone = [(trial, self._ask("trial", [trial], 0.0)) for trial in chosen]
                chosen = [trial for trial, found in alone if found.get("outcome") == "ok"]
                samples = [found["samples"] for _, found in alone if found.get("outcome") == "ok"]
        finalists = [{name: trial[name] for name in ("key", "default", *IDENTITY)} for trial in chosen]
        self.results.add({"kind": "final", "group": number, "trials": finalists, "samples": samples, "when": now()})
        if chosen:
            seconds, winner = min((statistics.median(taken), i) for i, taken in enumerate(samples))
            _tell(f"         {_time(seconds)}  is the best of {chosen[winner]['spec']}: {_candidate(chosen[winner])}")

    def _ranked(self, trials: list[dict[str, Json]]) -> list[tuple[float, dict[str, Json]]]:
        """Median seconds and trial of those that are right, fastest first."""
        found = []
        for trial in trials:
            line = self.done.get(trial["key"])
            if line is not None and line["outcome"] == "ok":
                found.append((statistics.median(line["samples"]), trial))
            elif trial["known"]:
                found.append((trial["known"], trial))
        return sorted(found, key=lambda pair: pair[0])

    def _ask(self, kind: str, trials: list[dict[str, Json]], hopeless: float) -> dict[str, Json]:
        """What a process of its own answers for one trial, or for several that are compared."""
        manifest = self.bundle.manifest
        job = {
            "kind": kind,
            "parent": os.getpid(),
            "root": self.bundle.root,
            "device": manifest["device"],
            "check": next(t["check"] for t in manifest["targets"] if t["spelling"] == trials[0]["target"]),
            "layer": manifest["layers"][trials[0]["layer"]],
            "trials": trials,
            "timing": self.timing,
            "hopeless": hopeless,
            "memory": self._memory(trials),
        }
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--child"]
        with tempfile.TemporaryFile() as errors:
            # A session of its own: Ctrl-C is this process's, and what it started ends with it.
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            ) as process:
                try:
                    output, _ = process.communicate(json.dumps(job).encode(), self.timeout * len(trials))
                except subprocess.TimeoutExpired:
                    return {"outcome": "timeout", "error": f"killed after {self.timeout:.0f} s"}
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            try:
                answer: dict[str, Json] = json.loads(output)
                return answer
            except ValueError:
                errors.seek(0)
                said = errors.read(1 << 16).decode(errors="replace").strip()[-1000:]
                code = process.returncode
                if code == -signal.SIGKILL:
                    return {"outcome": "memory", "error": "killed by the system: memory ran out"}
                why = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                return {"outcome": "crash", "error": f"the process died: {why} {said}".strip()}

    def _memory(self, trials: list[dict[str, Json]]) -> int:
        """Bytes of address space for a process that loads these trials; 0: no limit."""
        layer = self.bundle.manifest["layers"][trials[0]["layer"]]
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        size: int = min(layer["memory"], physical // 10 * 9) if self.memory is None else self.memory
        # Threads take addresses for their stacks and heaps that they hardly use.
        return size and size * len(trials) + trials[0]["threads"] * _THREAD_BYTES

    def _refuse(self, target: str, why: str) -> None:
        self.refused[target] = why
        _tell(f"{target}: left out: {why}")

    def _say(self, trial: dict[str, Json], line: dict[str, Json]) -> None:
        total = self._count + self.left
        rate = (time.monotonic() - self._start) / self._count
        found = _time(statistics.median(line["samples"])) if line["outcome"] == "ok" else f"{line['outcome']:>11}"
        seconds = round(self.left * rate)
        end = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        place = f"{trial['spec']}, {trial['threads']} threads"
        _tell(f"[{self._count:>{len(str(total))}}/{total}] {found}  {place}: {_candidate(trial)}  ({end})")


def _candidate(trial: dict[str, Json]) -> str:
    return f"{trial['schedule']}({' '.join(f'{name}={value}' for name, value in trial['picks'].items())})"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:8.1f} µs" if seconds < 1e-2 else f"{seconds * 1e3:8.1f} ms"


def _tell(text: str) -> None:
    """A line for people, on standard error, in whatever letters it has."""
    encoding = sys.stderr.encoding or "ascii"
    sys.stderr.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own where None); returns its exit status."""
    if arguments is None and sys.argv[1:] == ["--child"]:
        return child()
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description="Measure the candidates of this bundle; goes on where it stopped.")
    parser.add_argument("bundle", nargs="?", default=here, help="the unpacked bundle [default: where this file is]")
    parser.add_argument("-o", "--out", metavar="FILE", help="where results go [default: results.jsonl in the bundle]")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds a candidate may take [60]")
    parser.add_argument(
        "--memory", type=int, metavar="MIB", help="memory a candidate may take, 0: any [default: by the layer's size]"
    )
    parser.add_argument("--facts", action="store_true", help="print what is to be known about this machine")
    given = parser.parse_args(arguments)
    if given.facts:
        sys.stdout.write(json.dumps(facts(), indent=1) + "\n")
        return OK
    try:
        machine = facts()
        memory = None if given.memory is None else given.memory << 20
        bundle = Bundle(given.bundle)
        out = given.out or os.path.join(bundle.root, "results.jsonl")
        session = Session(
            bundle, Results(out, bundle.digest, machine, bundle.manifest["device"]), given.timeout, memory
        )
        try:
            session.measure()
        except KeyboardInterrupt:
            _tell(f"interrupted; {len(session.done)} results are in {out}: the same command goes on from there")
            return INTERRUPTED
    except Trouble as trouble:
        _tell(f"convgen: {trouble}")
        return TROUBLE
    _tell(f"{len(session.done)} results in {out}: take them back with `convgen fleet import`")
    return TROUBLE if session.refused and not session.done else OK


if __name__ == "__main__":
    sys.exit(main())
