"""Runs a network for a GPU: on this machine's, or where it has none that runs it, emulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...check.emulation.emulate import compile_emulated, emulated_driver
from ...cuda.driver import Memory, Stream
from ...errors import MeasureError
from ...folders import TemporaryFolder
from ...hardware.target import Target
from ...kernel.library import Bytes
from ...lowering.interface import DeviceCode, read_architecture
from ...lowering.link import link_device_network
from ...problem.dtypes import numpy_dtype
from ...processes import Worker
from ..compile import Built
from ..cuda_library import CudaNetworkLibrary
from ..device import argument_names, device_entry_source, device_source, images_of
from ..plan import Function, Plan, Product
from .guarded import Arrays, Runs, answered

#: Seconds that the runs of one network may take, emulated.
SECONDS = 3600.0
#: Bytes around each buffer, which must stay as they are.
MARGIN = 256


def run_on_device(built: Built, plans: Sequence[Plan], target: Target, inputs: Sequence[Arrays]) -> Runs:
    """The outputs, at each of a network's sizes, of two runs with buffers at different places.

    Outputs and the workspace are filled with NaN, and so is what is around all buffers.

    Raises:
        MeasureError: the process ended, or did not answer in time; or a run failed.
        BuildError: there is no C++ compiler for the emulation, or it failed.
    """
    with TemporaryFolder(runs=True) as folder:
        library, environment = built.library, dict[str, str]()
        if not target.native:
            library, driver = emulated_network(built, plans, target, folder)
            environment["CONVGEN_CUDA_DRIVER"] = str(driver)
        return run_library(library, built.code.name, built.weights, inputs, environment)


def run_library(
    library: Path, name: str, weights: Path, inputs: Sequence[Arrays], environment: Mapping[str, str]
) -> Runs:
    """The same of a library, in a process with these variables besides this one's."""
    worker = Worker(environment=environment)
    try:
        with answered(name, SECONDS):
            found: Runs = worker.call(device_runs, library, name, weights, inputs, seconds=SECONDS)
        return found
    except ChildProcessError:
        raise MeasureError(f"{name}: expected a clean run, found status {worker.status}") from None
    finally:
        worker.stop()


def emulated_network(built: Built, plans: Sequence[Plan], target: Target, folder: Path) -> tuple[Path, Path]:
    """The library with emulated code, all else being the network's own; and the driver that ``CONVGEN_CUDA_DRIVER``
    must name where it runs.

    Raises:
        BuildError: there is no C++ compiler, or it failed.
    """
    functions: list[Function] = list(dict.fromkeys(step.function for plan in plans for step in plan.steps))
    counts = {call.function: len(call.arguments) for size in built.code.sizes for call in size.calls}
    codes, names = [], []
    for number, function in enumerate(functions):
        source = device_source(function, target)
        image = compile_emulated(source.text, folder).read_bytes()
        codes.append(DeviceCode(((target.arch, image),), source.launches, source.workspace))
        packed = counts[number] - 2 - function.spec.residual if isinstance(function, Product) else 0
        names.append(argument_names(function, packed))
    entry, name = device_entry_source(built.code, codes, names), built.code.name
    library = link_device_network(name, entry, images_of(codes), folder / f"lib{name}.so")
    arch = read_architecture(target.arch)
    return library, emulated_driver(folder, (arch.major, arch.minor))


def device_runs(library: Path, name: str, weights: Path, inputs: Sequence[Arrays]) -> Runs:
    """The same in this process."""
    network = CudaNetworkLibrary(library, name, weights, 1)
    network.to(0)
    data = np.fromfile(weights, np.uint8)
    found: Runs = []
    for size, arrays in enumerate(inputs):
        runs = {f"buffers {shift} bytes on": _run(network, size, arrays, data, shift) for shift in (0, 64)}
        found.append(runs)
    return found


def _run(network: CudaNetworkLibrary, size: int, arrays: Arrays, weights: Bytes, shift: int) -> Arrays:
    tensors, workspace = network.at[size], int(network.sizes(size=size).workspace)
    given = {name: _Buffer(info.bytes, shift) for name, info in tensors.inputs.items()}
    out = {name: _Buffer(info.bytes, shift) for name, info in tensors.outputs.items()}
    scratch, packed, stream = _Buffer(workspace, shift), _Buffer(weights.size, shift), Stream()
    packed.upload(weights)
    for name, buffer in given.items():
        buffer.upload(np.ascontiguousarray(arrays[name]))
    network.launch(
        [buffer.address for buffer in given.values()],
        [buffer.address for buffer in out.values()],
        packed.address,
        scratch.address if workspace else 0,
        stream.handle,
        size=size,
    )
    stream.synchronize()
    for what, buffer in {**given, **out, "workspace": scratch, "weights": packed}.items():
        buffer.check(what)
    return {
        name: out[name].download().view(numpy_dtype(info.dtype)).reshape(info.shape)
        for name, info in tensors.outputs.items()
    }


class _Buffer:
    """Device memory with bytes around it that must stay as they are."""

    def __init__(self, size: int, shift: int) -> None:
        self._begin, self._size = MARGIN + shift, size
        self._memory = Memory(size + 2 * MARGIN + shift)
        self._memory.fill(0xFF)  # NaN

    @property
    def address(self) -> int:
        return self._memory.address + self._begin

    def upload(self, array: Bytes) -> None:
        self._memory.upload(array.reshape(-1).view(np.uint8), self._begin)

    def download(self) -> Bytes:
        return self._memory.download(self._begin, self._size)

    def check(self, name: str) -> None:
        """Raise MeasureError where something was written around it."""
        before = self._memory.download(0, self._begin)
        after = self._memory.download(self._begin + self._size)
        if (before != 0xFF).any() or (after != 0xFF).any():
            raise MeasureError(f"{name}: expected what is around it untouched, found it written")
