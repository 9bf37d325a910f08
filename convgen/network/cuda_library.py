"""Loads a network's library for a GPU and runs it there: NumPy, ctypes and the CUDA driver, nothing else."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from ..cuda.driver import Memory, context, synchronize
from ..errors import ExportError, KernelError, UnsupportedError
from ..kernel.cuda_library import TENSOR_ALIGNMENT, stream_handle
from ..kernel.dlpack import View, view
from ..kernel.frameworks import framework_of
from ..kernel.library import Bytes, aligned
from ..kernel.mapped import open_library
from .library import NetworkLibrary, NetworkSizes, Tensors, by_name

#: Version of the C functions and structs of networks on GPUs (``runtime/network_cuda_types.h``).
DEVICE_NETWORK_ABI = 2
#: What a manifest calls such a library.
DEVICE_KIND = "device network"
_DRIVER_ERROR = 35  # enum convgen_cuda_status


class _Args(ctypes.Structure):
    _fields_ = [
        ("inputs", POINTER(c_void_p)),
        ("input_sizes", POINTER(c_size_t)),
        ("outputs", POINTER(c_void_p)),
        ("output_sizes", POINTER(c_size_t)),
        ("weights", c_void_p),
        ("weights_size", c_size_t),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
        ("stream", c_void_p),
        ("size", c_int),
    ]


class CudaNetworkLibrary(NetworkLibrary):
    """A network that runs on a GPU: ``network(x)`` of arrays in the device's memory. Arguments as of
    :class:`~convgen.network.library.NetworkLibrary`; ``threads`` means nothing.

    It loads on any machine; the weights are copied to the device by :meth:`to`, or by the first call.
    """

    def _open(self, path: str | os.PathLike[str], weights: str | os.PathLike[str] | Bytes) -> tuple[Tensors, ...]:
        name, self.threads = self.name, 1
        self._lock = threading.Lock()
        self._device = 0
        self._on_device: Memory | None = None
        self._own_workspaces = dict[int, Memory]()
        self._loaded = set[int]()
        try:
            self._dll = open_library(os.fspath(path))
            self._run, self._load = self._function("run", c_void_p), self._function("load")
            self._device_sizes = self._function("sizes", c_int, c_void_p)
            self._error = self._function("error", c_int, returns=c_char_p)
            self._driver_error = self._function("driver_error", returns=c_char_p)
            self._version = self._function("version", returns=c_char_p)
            expected = f"convgen device network ABI {DEVICE_NETWORK_ABI}"
            if not self.version.startswith(f"{expected}; "):
                raise ExportError(f"{os.fspath(path)}: expected {expected}, found {self.version}")
            verify, unload = self._function("verify_weights", c_void_p, c_size_t), self._function("unload")
            counts = self.sizes()
            values = [
                [self._values("inputs", size, counts.inputs), self._values("outputs", size, counts.outputs)]
                for size in range(counts.sizes)
            ]
        except (OSError, AttributeError) as error:
            raise ExportError(f"{os.fspath(path)}: expected a library of the network {name}, found {error}") from error
        weakref.finalize(self, _unload, unload, self._loaded).atexit = False
        self._weights = weights if isinstance(weights, np.ndarray) else _read(weights)
        if status := verify(self._weights.ctypes.data, self._weights.nbytes):
            where = f"{name}: weights" if isinstance(weights, np.ndarray) else os.fspath(weights)
            raise ExportError(f"{where}: {self._error(status).decode()}")
        return tuple(Tensors(inputs, outputs) for inputs, outputs in values)

    def sizes(self, threads: int | None = None, size: int = 0) -> NetworkSizes:
        sizes = NetworkSizes()
        self._require(self._device_sizes(size, ctypes.byref(sizes)))
        return sizes

    def to(self, device: int) -> None:
        """Load the code for a device and copy the weights there, for the calls from now on.

        Args:
            device: its number, as the driver counts.

        Raises:
            KernelError: there is no driver or no such device, or the library has no code for it.
        """
        self._loaded.add(device)
        with context(device):
            self._require(self._load())
        memory = Memory(self._weights.nbytes, device)
        memory.upload(self._weights)
        self._device, self._on_device = device, memory
        self._own_workspaces.clear()

    def __call__(self, *arrays: Any, out: Any = None, stream: Any = None, **named: Any) -> Any:
        """The network's outputs. Returns when the work is launched, not when it is done.

        Args:
            arrays: the inputs in the model's order and of its types, contiguous, in the device's memory: of PyTorch,
                CuPy or anything else with DLPack. Or one mapping with inputs by their names.
            named: inputs by their names, where these are Python's.
            out: arrays to write outputs to, by name, of one output the array itself too; new ones of the first
                input's framework for others.
            stream: where to run: a handle or an object with ``__cuda_stream__``; the current one of the first input's
                framework where None. Of PyTorch's and CuPy's arrays the workspace comes from their allocator, so that
                calls after the first, or after :meth:`to`, can be captured into a CUDA graph.

        Returns:
            The output; where there are several, all by name.

        Raises:
            KernelError: an argument is not what the network needs, or the driver refused.
        """
        given, out = self._inputs(arrays, named), by_name(self.outputs, out)
        if not given:
            raise UnsupportedError(f"{self.name}: expected a network with inputs, whose framework says where to run")
        first = next(iter(given.values()))
        framework = framework_of(first)
        handle = framework.current_stream(first) if stream is None else stream_handle(stream)
        with self._lock:
            if self._on_device is None:
                self.to(self._device)
            weights = self._on_device
        assert weights is not None
        read = {name: view(name, x, self._device, handle) for name, x in given.items()}
        size = self._size_of(read)
        for name, info in self.at[size].inputs.items():
            read[name].check(info, TENSOR_ALIGNMENT)
        outputs = self.at[size].outputs
        if unknown := [name for name in out if name not in outputs]:
            raise KernelError(f"out: expected names among {', '.join(outputs)}, found {unknown[0]!r}")
        results = {n: out[n] if n in out else framework.empty(first, info.shape) for n, info in outputs.items()}
        written = {name: view(name, x, self._device, handle) for name, x in results.items()}
        for name, info in outputs.items():
            written[name].check(info, TENSOR_ALIGNMENT)
            if not written[name].writable:
                raise KernelError(f"{name}: expected writable memory, found a read-only array")
        needed, kept = int(self.sizes(size=size).workspace), None
        if needed:
            kept = framework.scratch(first, needed, handle) or self._own_workspace(handle)
        self.launch(
            [read[name].address for name in self.at[size].inputs],
            [written[name].address for name in outputs],
            weights.address,
            kept[0] if kept else 0,
            handle,
            size=size,
            device=self._device,
        )
        framework.used((*given.values(), *results.values()), handle)
        del kept  # its allocator gives it to later work of the stream only
        return next(iter(results.values())) if len(results) == 1 else results

    def launch(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        weights: int,
        workspace: int = 0,
        stream: int = 0,
        *,
        size: int = 0,
        device: int = 0,
    ) -> None:
        """Run on buffers in device memory, given by address; the workspace is for one stream at a time.

        Args:
            weights: of a copy of the file of weights.
            size: which of the sizes that the network was made for.

        Raises:
            KernelError: an address is not what the network needs, or it cannot be launched here.
        """
        args, sizes = _Args(size=size, stream=stream or None), self.sizes(size=size)
        tensors = self.at[size]
        for what, given, infos in (("input", inputs, tensors.inputs), ("output", outputs, tensors.outputs)):
            setattr(args, f"{what}s", (c_void_p * len(given))(*given))
            setattr(args, f"{what}_sizes", (c_size_t * len(given))(*(info.bytes for info in infos.values())))
        args.weights, args.weights_size = weights, sizes.weights
        args.workspace, args.workspace_size = workspace or None, sizes.workspace
        with context(device):
            self._require(self._run(ctypes.byref(args)))

    def step_seconds(self, *arrays: Any, **named: Any) -> list[float]:
        raise UnsupportedError(f"{self.name}: expected a network on a CPU: steps on a GPU are not timed one by one")

    def profile(self, size: int = 0, rounds: int = 15, seed: int = 0) -> list[float]:
        return self.step_seconds()

    def on(self, threads: int) -> None:
        """A GPU's blocks and threads are fixed when it is compiled."""

    def _size_of(self, views: Mapping[str, View]) -> int:
        """Which of the sizes the inputs have; the first where there is one only, whose shapes are then checked."""
        found = [
            number
            for number, tensors in enumerate(self.at)
            if all(views[name].shape == info.shape for name, info in tensors.inputs.items())
        ]
        if not found and len(self.at) > 1:
            known = "; ".join(map(str, self.at))
            given = ", ".join(f"{name} {made.shape}" for name, made in views.items())
            raise KernelError(f"inputs: expected shapes that {self.name} was made for ({known}), found {given}")
        return found[0] if found else 0

    def _own_workspace(self, stream: int) -> tuple[int, object]:
        """For a stream of a framework without an allocator that knows streams: its calls follow each other."""
        with self._lock:
            if stream not in self._own_workspaces:
                most = max(int(self.sizes(size=size).workspace) for size in range(len(self.at)))
                self._own_workspaces[stream] = Memory(most, self._device)
            memory = self._own_workspaces[stream]
        return memory.address, memory

    def _require(self, status: int) -> None:
        if status == _DRIVER_ERROR:
            raise KernelError(f"{self.name}: {self._error(status).decode()}: {self._driver_error().decode()}")
        super()._require(status)


def _read(path: str | os.PathLike[str]) -> Bytes:
    """A file's bytes, aligned as the library checks them."""
    try:
        data = np.fromfile(Path(path), np.uint8)
    except OSError as error:
        raise ExportError(f"{os.fspath(path)}: the file of weights cannot be read: {error.strerror}") from error
    buffer = aligned(data.size)
    buffer[:] = data
    return buffer


def _unload(unload: Callable[[], int], devices: set[int]) -> None:
    """Give back what a library's code takes of devices, once they have done what they were given."""
    for device in devices:
        with suppress(KernelError):  # there is no such device, or what a failed kernel left of one
            synchronize(device)
            with context(device):
                unload()
