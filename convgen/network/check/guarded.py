"""Runs a network's library in a process of its own, every buffer against a page that may not be accessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...check.sandbox import Guarded
from ...errors import MeasureError
from ...problem.dtypes import numpy_dtype
from ...processes import JobError, Worker
from ..library import NetworkLibrary

#: Seconds that the runs of one network may take.
SECONDS = 300.0
Arrays = dict[str, npt.NDArray[Any]]
#: The outputs of each run, which is named, at each size.
Runs = list[dict[str, Arrays]]


@contextmanager
def answered(name: str, seconds: float) -> Iterator[None]:
    """A call to another process, which runs a network: an error there, or no answer in time, is a MeasureError."""
    try:
        yield
    except TimeoutError:
        raise MeasureError(f"{name}: expected an answer within {seconds:.0f} s, found none") from None
    except JobError as error:
        raise MeasureError(f"{name}: {str(error).strip().rpartition(chr(10))[2]}") from error


def run_guarded(library: Path, name: str, weights: Path, inputs: Sequence[Arrays], threads: Sequence[int]) -> Runs:
    """The outputs, at each of a network's sizes, of a run on each number of threads, and with guard pages at the
    beginning and the end of buffers, the weights among them.

    Inputs and weights are read-only; outputs and the workspace are filled with NaN.

    Raises:
        MeasureError: the process was killed, by an access outside a buffer for one, or did not answer in time.
    """
    worker = Worker()
    try:
        with answered(name, SECONDS):
            found: Runs = worker.call(guarded_runs, library, name, weights, inputs, threads, seconds=SECONDS)
        return found
    except ChildProcessError:
        status = worker.status or 0
        cause = f"signal {-status}" if status < 0 else f"exit status {status}"
        raise MeasureError(f"{name}: expected a clean run between guard pages, found {cause}") from None
    finally:
        worker.stop()


def guarded_runs(library: Path, name: str, weights: Path, inputs: Sequence[Arrays], threads: Sequence[int]) -> Runs:
    """The same in this process, which an access outside a buffer ends."""
    found: Runs = [{} for _ in inputs]
    for guard in ("end", "start"):
        network = NetworkLibrary(library, name, _placed(np.fromfile(weights, np.uint8), guard), threads[0])
        for count in threads:
            network.on(count)
            for size, arrays in enumerate(inputs):
                found[size][f"{count} threads, guard page at the {guard}"] = _run(network, size, arrays, guard)
        del network  # its weights may be large
    return found


def _placed(array: npt.NDArray[Any], guard: str) -> npt.NDArray[np.uint8]:
    """An array's bytes, read-only, against a guard page."""
    buffer = Guarded(array.nbytes, guard)
    buffer.bytes[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    buffer.seal()
    return buffer.bytes


def _run(network: NetworkLibrary, size: int, inputs: Arrays, guard: str) -> Arrays:
    given = []
    for name, info in network.at[size].inputs.items():
        placed = _placed(inputs[name], guard)
        given.append(placed.view(numpy_dtype(info.dtype)).reshape(info.shape))
    out: Arrays = {}
    for name, info in network.at[size].outputs.items():
        memory = Guarded(info.bytes, guard).bytes
        memory.fill(0xFF)
        out[name] = memory.view(numpy_dtype(info.dtype)).reshape(info.shape)
    workspace = Guarded(max(1, network.sizes(None, size).workspace), guard).bytes
    workspace.fill(0xFF)
    network.workspaces.clear()
    network.workspaces.append(workspace)
    network(*given, out=out)
    network.workspaces.clear()
    return {name: array.copy() for name, array in out.items()}
