"""Runs a compiled kernel in a process of its own, its buffers against guard pages.

A kernel under test may read or write where it must not. Here that ends a child process, not the
caller: every input is read-only memory, and every buffer touches a page that may not be accessed,
at its end or at its beginning. ``python -m convgen.sandbox DIR`` is the child.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import load, numpy_dtype, save
from .errors import MeasureError
from .interface import MAX_THREADS
from .library import Library
from .spec import ConvSpec

Arrays = dict[str, npt.NDArray[Any]]
PARAMETERS = ("weights", "bias", "slope")


@dataclass(frozen=True)
class Run:
    """One call: which case, on how many threads, with the guard page at which end of the buffers."""

    case: str
    threads: int
    guard: str  # "end" or "start"

    def __str__(self) -> str:
        return f"{self.case} data, {self.threads} thread{'s' * (self.threads > 1)}, guard page at the {self.guard}"


def run_guarded(
    library: Path, name: str, spec: ConvSpec, cases: Mapping[str, Arrays], threads: int, directory: Path, timeout: float
) -> dict[Run, npt.NDArray[Any]]:
    """The kernel's output for each case, on 1, ``threads`` and one more thread, between guard pages.

    ``cases`` maps a name to the tensors of one call: ``src weights [bias] [slope] [residual]``.
    The output is filled with NaN before each call.

    Raises:
        MeasureError: the child was killed (the message says in which run and by what), ran longer
            than ``timeout`` seconds or refused the call.
    """
    ways = [(1, "end"), (threads, "start"), (min(threads + 1, MAX_THREADS), "end")]
    runs = [Run(case, count, guard) for case in cases for count, guard in ways]
    for case, arrays in cases.items():
        for tensor, array in arrays.items():
            save(directory / f"{case}.{tensor}.npy", array)
    job = {
        "library": str(library),
        "name": name,
        "spec": spec.descriptor,
        "threads": threads,
        "cases": {case: list(arrays) for case, arrays in cases.items()},
        "runs": [vars(run) for run in runs],
    }
    (directory / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-P", "-m", "convgen.sandbox", str(directory)]  # -P: no module of the working directory
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise MeasureError(f"{spec.descriptor}: expected an answer within {timeout:.0f} s, found none") from None
    if child.returncode:
        done = child.stdout.count("\n")
        cause = f"signal {-child.returncode}" if child.returncode < 0 else child.stderr.strip().rpartition("\n")[2]
        where = runs[min(done, len(runs) - 1)]
        raise MeasureError(f"{spec.descriptor}: expected a clean run, found {cause} ({where})")
    return {run: load(directory / f"out.{index}.npy", spec.dtype) for index, run in enumerate(runs)}


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


def _child(directory: Path) -> None:
    job = json.loads((directory / "job.json").read_text())
    spec = ConvSpec.parse(job["spec"])
    library = Library(Path(job["library"]), spec, job["name"], job["threads"])
    for index, run in enumerate(job["runs"]):
        case, threads, guard = run["case"], run["threads"], run["guard"]
        data = {t: load(directory / f"{case}.{t}.npy", spec.dtype) for t in job["cases"][case]}
        placed = {tensor: _filled(array, guard) for tensor, array in data.items()}
        packed = Guarded(library.sizes(threads).packed, guard)
        weights, bias, slope = (placed.get(name) for name in PARAMETERS)
        library.pack(weights, bias, slope, packed.bytes)
        packed.seal()
        out = Guarded(library.sizes(threads).dst, guard).bytes
        out.fill(0xFF)  # NaN, in every storage type
        dst = _as(out, numpy_dtype(spec.dtype), spec.dst_shape)
        workspace = Guarded(library.sizes(threads).workspace, guard).bytes
        workspace.fill(0xFF)  # NaN
        library.run(placed["src"], packed.bytes, dst, placed.get("residual"), workspace=workspace, threads=threads)
        save(directory / f"out.{index}.npy", dst)
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
