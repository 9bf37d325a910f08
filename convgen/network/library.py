"""Loads a network's library and runs it: NumPy, ctypes and the standard library, nothing else."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import deque
from collections.abc import Mapping
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np

from ..errors import ExportError, KernelError
from ..kernel.library import Array, Bytes, Loaded, Pool, aligned, as_array, check_array, shared_pool, thread_count
from ..kernel.mapped import open_library
from ..lowering.interface import TensorInfo

_OK, _OVERLAP = 0, 6
#: Version of the C functions and structs of networks (``runtime/network_types.h``).
NETWORK_ABI = 1
#: What a manifest calls a network's library.
KIND = "network"


class _Value(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("rank", c_int), ("shape", POINTER(c_int64)), ("bytes", c_size_t)]


class _Sizes(ctypes.Structure):
    _fields_ = [("inputs", c_int), ("outputs", c_int), ("weights", c_size_t), ("workspace", c_size_t)]


class _Args(ctypes.Structure):
    _fields_ = [
        ("inputs", POINTER(c_void_p)),
        ("input_sizes", POINTER(c_size_t)),
        ("outputs", POINTER(c_void_p)),
        ("output_sizes", POINTER(c_size_t)),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
        ("pool", c_void_p),
    ]


class NetworkLibrary(Loaded):
    """A loaded network with its weights: ``network(x)``. Several threads may call one at once.

    Args:
        path: the shared library.
        name: the prefix of its functions.
        weights: the file of its weights.
        threads: how many threads a call runs on.

    Attributes:
        inputs, outputs: the tensors by the model's names, in its order.
        workspaces: those that no call uses at the moment.

    Raises:
        KernelError: ``threads`` is out of range, or the CPU lacks instructions.
        ExportError: the file is no such library, or the weights are not its own, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], name: str, weights: str | os.PathLike[str], threads: int) -> None:
        self.name, self.threads = name, thread_count(threads)
        try:
            self._dll = open_library(os.fspath(path))
            self._run = self._function("run", c_void_p, c_void_p)
            self._sizes = self._function("sizes", c_int, c_void_p)
            self._error = self._function("error", c_int, returns=c_char_p)
            self._version = self._function("version", returns=c_char_p)
            opened = self._function("open", c_char_p, c_void_p)
            close = self._function("close", c_void_p, returns=None)
            counts = self.sizes(1)
            self.inputs = self._values("inputs", counts.inputs)
            self.outputs = self._values("outputs", counts.outputs)
        except (OSError, AttributeError) as error:
            raise ExportError(f"{os.fspath(path)}: expected a library of the network {name}, found {error}") from error
        if not self.version.startswith(f"convgen network ABI {NETWORK_ABI}; "):
            raise ExportError(f"{os.fspath(path)}: expected network ABI {NETWORK_ABI}, found {self.version}")
        self._require(self._function("check_cpu")())
        network = c_void_p()
        status = opened(os.fsencode(weights), ctypes.byref(network))
        if status != _OK:
            raise ExportError(f"{os.fspath(weights)}: {self._error(status).decode()}")
        self._network = network.value
        # Not when the process ends: another thread may be running it.
        weakref.finalize(self, close, self._network).atexit = False
        self._pools: dict[int, Pool] = {}
        self.workspaces: deque[Bytes] = deque()

    def __call__(self, *arrays: Any, out: Mapping[str, Any] | None = None, **named: Any) -> Any:
        """The network's outputs.

        Args:
            arrays: the inputs in the model's order: NumPy arrays or anything with DLPack, f32, contiguous.
            named: inputs by their names, where these are Python's.
            out: arrays to write outputs to, by name.

        Returns:
            The output as an array; where there are several, all of them by name.

        Raises:
            KernelError: an argument is not what the network needs.
        """
        inputs = self._inputs(arrays, named)
        outputs = self._outputs(out or {})
        args = _Args(pool=self._pool(self.threads))
        args.inputs, args.input_sizes = _pointers(inputs)
        args.outputs, args.output_sizes = _pointers(list(outputs.values()))
        try:
            workspace = self.workspaces.pop()
        except IndexError:
            workspace = aligned(max(1, self.sizes(self.threads).workspace))
        args.workspace, args.workspace_size = workspace.ctypes.data, workspace.size
        status = self._run(self._network, ctypes.byref(args))
        self.workspaces.append(workspace)
        self._require(status)
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    @property
    def version(self) -> str:
        """The library's own text: its ABI, name and a digest of its code."""
        return str(self._version().decode())

    def sizes(self, threads: int | None = None) -> _Sizes:
        """How many inputs and outputs there are, and the bytes of weights and workspace."""
        sizes = _Sizes()
        self._require(self._sizes(self.threads if threads is None else thread_count(threads), ctypes.byref(sizes)))
        return sizes

    def on(self, threads: int) -> None:
        """Run on so many threads from now on."""
        self.threads = thread_count(threads)
        self.workspaces.clear()

    # ---- arguments ----

    def _inputs(self, arrays: tuple[Any, ...], named: Mapping[str, Any]) -> list[Array]:
        given = dict(zip(self.inputs, arrays, strict=False))
        if len(arrays) > len(self.inputs):
            raise KernelError(f"inputs: expected {len(self.inputs)}, found {len(arrays)}")
        for name in named:
            if name not in self.inputs or name in given:
                raise KernelError(f"{name}: expected inputs {', '.join(self.inputs)}, each once, found {name!r}")
        given |= named
        found = []
        for name, info in self.inputs.items():
            if name not in given:
                raise KernelError(f"{name}: expected shape {info.shape}, found none")
            array = as_array(name, given[name])
            check_array(info, array)
            found.append(array)
        return found

    def _outputs(self, out: Mapping[str, Any]) -> dict[str, Array]:
        for name in out:
            if name not in self.outputs:
                raise KernelError(f"out: expected names among {', '.join(self.outputs)}, found {name!r}")
        found = {}
        for name, info in self.outputs.items():
            if name in out:
                found[name] = as_array(name, out[name], written=True)
                check_array(info, found[name], written=True)
            else:
                found[name] = np.empty(info.shape, np.float32)
        return found

    def _pool(self, threads: int) -> int | None:
        if threads == 1:
            return None
        if threads not in self._pools:
            create = self._function("pool_create", c_int, c_void_p)
            destroy = self._function("pool_destroy", c_void_p, returns=None)
            self._pools[threads] = shared_pool(threads, create, destroy, self._require)
        return self._pools[threads].address

    # ---- the library's functions ----

    def _function(self, suffix: str, *arguments: type, returns: Any = c_int) -> Any:
        function = self._dll[f"{self.name}_{suffix}"]  # an attribute would keep the library in a cycle
        function.argtypes, function.restype = arguments, returns
        return function

    def _values(self, which: str, count: int) -> dict[str, TensorInfo]:
        values = self._function(which, returns=POINTER(_Value))()
        found = {}
        for value in (values[number] for number in range(count)):
            name = value.name.decode()
            found[name] = TensorInfo(name, tuple(value.shape[axis] for axis in range(value.rank)))
        return found

    def _require(self, status: int) -> None:
        if status == _OVERLAP:
            raise KernelError(f"{self.name}: expected outputs apart from all other arguments, found an overlap")
        if status != _OK:
            raise KernelError(f"{self.name}: {self._error(status).decode()}")


def _pointers(arrays: list[Array]) -> tuple[Any, Any]:
    addresses = (c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    sizes = (c_size_t * len(arrays))(*(array.nbytes for array in arrays))
    return ctypes.cast(addresses, POINTER(c_void_p)), ctypes.cast(sizes, POINTER(c_size_t))


def seal(path: str | os.PathLike[str], name: str, weights: str | os.PathLike[str]) -> None:
    """Let a network's library write the header of its weights, by which it knows them again.

    Raises:
        ExportError: the file has another size than the library expects.
    """
    data = np.memmap(weights, np.uint8, "r+")
    function = open_library(os.fspath(path))[f"{name}_seal"]
    function.argtypes = (c_void_p, c_size_t)
    if function(data.ctypes.data, data.size) != _OK:
        raise ExportError(f"{os.fspath(weights)}: expected weights of {name}, found {data.size} bytes")
    data.flush()
