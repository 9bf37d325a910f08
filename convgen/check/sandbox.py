"""Runs a compiled kernel in a process of its own, its buffers against guard pages.

A kernel under test may read or write where it must not. Here that ends a child process, not the
caller: every input is read-only memory, and every buffer touches a page that may not be accessed,
at its end or at its beginning. In a GPU's memory, which has no such pages, what lies beside a buffer and
what is only read must be what it was before. ``python -m convgen.check.sandbox DIR`` is the child.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cuda.driver import Memory, Stream
from ..errors import MeasureError
from ..kernel.cuda_library import CudaLibrary
from ..kernel.library import Library
from ..lowering.interface import MAX_THREADS
from ..problem.dtypes import UNIT_ROUNDOFF, load, numpy_dtype, save
from ..problem.spec import PARAMETERS, ConvSpec
from .data import Arrays


@dataclass(frozen=True)
class Run:
    """One call: the case, the number of threads, and the end of the buffers that touches a guard page."""

    case: str
    threads: int
    guard: str  # "end" or "start"

    def __str__(self) -> str:
        return f"{self.case} data, {self.threads} thread{'s' * (self.threads > 1)}, guard page at the {self.guard}"


def run_guarded(
    library: Path,
    name: str,
    spec: ConvSpec,
    cases: Mapping[str, Arrays],
    threads: int,
    directory: Path,
    timeout: float,
    *,
    on_device: bool = False,
    environment: Mapping[str, str] | None = None,
) -> dict[Run, npt.NDArray[Any]]:
    """The kernel's output for each case, on 1, ``threads`` and one more thread, between guard pages.

    ``cases`` maps a name to the tensors of one call: ``src weights [bias] [slope] [scale] [residual]``.
    The output is filled with NaN before each call, or with integers that differ.

    Args:
        on_device: the library runs on a GPU; then every case runs twice.
        environment: variables of the child besides this process's.

    Raises:
        MeasureError: the child was killed (the message says in which run and by what), ran longer
            than ``timeout`` seconds or refused the call.
    """
    runs = runs_of(cases, threads, on_device=on_device)
    for case, arrays in cases.items():
        for tensor, array in arrays.items():
            save(directory / f"{case}.{tensor}.npy", array)
    job = {
        "library": str(library),
        "name": name,
        "spec": spec.descriptor,
        "threads": threads,
        "on_device": on_device,
        "cases": {case: list(arrays) for case, arrays in cases.items()},
        "runs": [vars(run) for run in runs],
    }
    (directory / "job.json").write_text(json.dumps(job))
    command = [
        sys.executable,
        "-P",
        "-m",
        "convgen.check.sandbox",
        str(directory),
    ]  # -P: no module of the working directory
    run_child(command, spec.descriptor, runs, timeout, environment or {})
    return {run: load(directory / f"out.{index}.npy", spec.dst_dtype) for index, run in enumerate(runs)}


def runs_of(cases: Iterable[str], threads: int, *, on_device: bool = False) -> list[Run]:
    """The runs of every case: on 1, ``threads`` and one more thread; on a GPU two."""
    ways = [(1, "end"), (threads, "start")]
    if not on_device:
        ways.append((min(threads + 1, MAX_THREADS), "end"))
    return [Run(case, count, guard) for case in cases for count, guard in ways]


def run_child(
    command: Sequence[str],
    what: str,
    runs: Sequence[Run | str],
    timeout: float,
    environment: Mapping[str, str],
    *,
    folder: Path | None = None,
    allowed: int = 0,
) -> int:
    """Run a program that makes runs of something, and writes a line after each; returns its exit status.

    Args:
        what: that is run, for messages.
        timeout: seconds that it may take.
        environment: variables besides this process's.
        folder: in which it runs.
        allowed: an exit status that is no failure, besides 0.

    Raises:
        MeasureError: it was killed (the message says in which run and by what), ran longer, or failed.
    """
    try:
        child = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MeasureError(f"{what}: expected an answer within {timeout:.0f} s, found none") from None
    if child.returncode not in (0, allowed):
        done = child.stdout.count("\n")
        cause = f"signal {-child.returncode}" if child.returncode < 0 else child.stderr.strip().rpartition("\n")[2]
        where = runs[min(done, len(runs) - 1)]
        raise MeasureError(f"{what}: expected a clean run, found {cause} ({where})")
    return child.returncode


# ---- the child --------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_NONE, _READ, _WRITE = 0, 1, 2


class Guarded:
    """``size`` bytes between two pages that may not be touched, flush with one of them."""

    def __init__(self, size: int, guard: str) -> None:
        page = mmap.PAGESIZE
        inner = max(page, -(-size // page) * page)
        self._map = mmap.mmap(-1, inner + 2 * page)
        whole = np.frombuffer(self._map, np.uint8)
        self._address, self._inner = whole.ctypes.data, inner
        for offset in (0, page + inner):
            self._protect(offset, page, _NONE)
        start = page + (inner - size if guard == "end" else 0)
        self.bytes = whole[start : start + size]

    def _protect(self, offset: int, size: int, access: int) -> None:
        if _libc.mprotect(ctypes.c_void_p(self._address + offset), ctypes.c_size_t(size), access):
            raise MeasureError(f"mprotect: errno {ctypes.get_errno()}")

    def seal(self) -> None:
        """Make the contents read-only."""
        self._protect(mmap.PAGESIZE, self._inner, _READ)


def _filled(array: npt.NDArray[Any], guard: str) -> npt.NDArray[Any]:
    """A read-only copy between guard pages."""
    buffer = Guarded(array.nbytes, guard)
    buffer.bytes[:] = array.reshape(-1).view(np.uint8)
    buffer.seal()
    return _as(buffer.bytes, array.dtype, array.shape)


def _as(memory: npt.NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    return memory.view(dtype).reshape(shape)


def _run_on_cpu(library: Library, run: Run, data: Arrays) -> npt.NDArray[Any]:
    spec, sizes = library.spec, library.sizes(run.threads)
    placed = {tensor: _filled(array, run.guard) for tensor, array in data.items()}
    packed = Guarded(sizes.packed, run.guard)
    library.pack(**{name: placed[name] for name in spec.parameters}, packed=packed.bytes)
    packed.seal()
    out = Guarded(sizes.dst, run.guard).bytes
    # NaN, in every storage type of floats: what is left unwritten then differs between runs.
    out.fill(0x55 if spec.dst_dtype not in UNIT_ROUNDOFF and run.guard == "start" else 0xFF)
    dst = _as(out, numpy_dtype(spec.dst_dtype), spec.dst_shape)
    workspace = Guarded(sizes.workspace, run.guard).bytes
    workspace.fill(0xFF)  # NaN
    library.run(placed["src"], packed.bytes, dst, placed.get("residual"), workspace=workspace, threads=run.threads)
    return dst


class Placed:
    """``size`` bytes of a GPU's memory, all NaN, flush with the end of an allocation or with its beginning."""

    MARGIN = 4096

    def __init__(self, size: int, guard: str) -> None:
        self._memory = Memory(size + self.MARGIN)
        self._memory.fill(0xFF)
        self._start = self.MARGIN if guard == "end" else 0
        self._before, self.size = self._memory.download(), size

    @property
    def address(self) -> int:
        return self._memory.address + self._start if self.size else 0

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        return self._memory.download(self._start, self.size)

    def fill(self, array: npt.NDArray[Any]) -> None:
        self._memory.upload(array, self._start)
        self._before = self._memory.download()

    def check(self, name: str, *, written: bool) -> None:
        """Raise MeasureError if a kernel wrote beside it, or into it where it must not."""
        changed = self._memory.download() != self._before
        if written:
            changed[self._start : self._start + self.size] = False
        where = np.flatnonzero(changed)
        if len(where):
            raise MeasureError(
                f"{name}: expected {len(where)} bytes to stay, found them written: {where[0] - self._start}"
            )


def _run_on_device(library: CudaLibrary, run: Run, data: Arrays) -> npt.NDArray[Any]:
    # An emulated device's threads then run in the other order.
    os.environ["CONVGEN_EMULATED_ORDER"] = "-1" if run.guard == "end" else "-2"
    spec, sizes = library.spec, library.sizes()
    buffers = {
        name: Placed(getattr(sizes, name), run.guard) for name in ("src", "packed", "dst", "residual", "workspace")
    }
    buffers["packed"].fill(library.pack(**{name: data[name] for name in spec.parameters}))
    for name in data.keys() - set(PARAMETERS):
        buffers[name].fill(data[name])
    stream = Stream()
    library.launch(**{name: buffer.address for name, buffer in buffers.items()}, stream=stream.handle)
    stream.synchronize()
    for name, buffer in buffers.items():
        buffer.check(name, written=name in ("dst", "workspace"))
    return _as(buffers["dst"].bytes, numpy_dtype(spec.dst_dtype), spec.dst_shape)


def _child(directory: Path) -> None:
    job = json.loads((directory / "job.json").read_text())
    spec = ConvSpec.parse(job["spec"])
    arguments = Path(job["library"]), spec, job["name"], job["threads"]
    call: Callable[[Run, Arrays], npt.NDArray[Any]]
    if job["on_device"]:
        call = functools.partial(_run_on_device, CudaLibrary(*arguments))
    else:
        call = functools.partial(_run_on_cpu, Library(*arguments))
    for index, fields in enumerate(job["runs"]):
        run = Run(**fields)
        data = {t: load(directory / f"{run.case}.{t}.npy", spec.dtypes[t]) for t in job["cases"][run.case]}
        save(directory / f"out.{index}.npy", call(run, data))
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
