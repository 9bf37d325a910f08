"""Loads a network's library and runs it: NumPy, ctypes and the standard library, nothing else."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import deque
from collections.abc import Mapping
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ExportError, KernelError
from ..kernel.arrays import Array, as_array, drawn, in_place, readable, returned
from ..kernel.library import Bytes, Loaded, Pool, aligned, shared_pool, thread_count
from ..kernel.mapped import open_library
from ..lowering.interface import TensorInfo
from ..problem.dtypes import numpy_dtype

# enum convgen_status, and what networks add to it
_OK, _OVERLAP = 0, 6
#: Version of the C functions and structs of networks (``runtime/network_types.h``).
NETWORK_ABI = 3
#: What a manifest calls a network's library.
KIND = "network"


class _Value(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("rank", c_int),
        ("shape", POINTER(c_int64)),
        ("bytes", c_size_t),
        ("dtype", c_char_p),
    ]


class NetworkSizes(ctypes.Structure):
    """``convgen_network_sizes`` of ``runtime/network_types.h``."""

    _fields_ = [
        *((name, c_int) for name in ("inputs", "outputs", "steps", "sizes")),
        *((name, c_size_t) for name in ("weights", "workspace")),
    ]


class _Args(ctypes.Structure):
    _fields_ = [
        ("inputs", POINTER(c_void_p)),
        ("input_sizes", POINTER(c_size_t)),
        ("outputs", POINTER(c_void_p)),
        ("output_sizes", POINTER(c_size_t)),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
        ("pool", c_void_p),
        ("size", c_int),
        ("seconds", POINTER(c_double)),
    ]


@dataclass(frozen=True)
class Tensors:
    """The inputs and outputs of a network at one of its sizes, by the model's names, in its order."""

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]

    def accept(self, arrays: Mapping[str, Array]) -> bool:
        """Whether the arrays are inputs of this size."""
        return all(array.shape == self.inputs[name].shape for name, array in arrays.items())

    def __str__(self) -> str:
        return ", ".join(f"{name} {info.shape}" for name, info in self.inputs.items())


class NetworkLibrary(Loaded):
    """A loaded network with its weights: ``network(x)``. Several threads may call one at once.

    One that was made for several sizes computes with the one that its inputs have.

    Args:
        path: the shared library.
        name: the prefix of its functions.
        weights: the file of its weights; or these themselves, bytes at a multiple of 64 that several networks may
            share.
        threads: how many threads a call runs on.

    Attributes:
        at: the inputs and outputs at each of its sizes.
        inputs, outputs: those of the first size.
        workspaces: those that no call uses at the moment.

    Raises:
        KernelError: ``threads`` is out of range, or the CPU lacks instructions.
        ExportError: the file is no such library, or the weights are not its own, or damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str], name: str, weights: str | os.PathLike[str] | Bytes, threads: int
    ) -> None:
        self.name, self.threads = name, thread_count(threads)
        self._pools: dict[int, Pool] = {}
        self.workspaces: deque[Bytes] = deque()
        self.at = self._open(path, weights)
        self.inputs, self.outputs = self.at[0].inputs, self.at[0].outputs

    def _open(self, path: str | os.PathLike[str], weights: str | os.PathLike[str] | Bytes) -> tuple[Tensors, ...]:
        """Load the library and its weights; returns the inputs and outputs at each of its sizes."""
        name = self.name
        try:
            self._dll = open_library(os.fspath(path))
            self._run = self._function("run", c_void_p, c_void_p)
            self._sizes = self._function("sizes", c_int, c_int, c_void_p)
            self._error = self._function("error", c_int, returns=c_char_p)
            self._version = self._function("version", returns=c_char_p)
            if not self.version.startswith(f"convgen network ABI {NETWORK_ABI}; "):
                raise ExportError(f"{os.fspath(path)}: expected network ABI {NETWORK_ABI}, found {self.version}")
            opened = self._function("open", c_char_p, c_void_p)
            opened_memory = self._function("open_memory", c_void_p, c_size_t, c_void_p)
            close = self._function("close", c_void_p, returns=None)
            counts = self.sizes(1)
            values = [
                [
                    self._values(which, size, count)
                    for which, count in (("inputs", counts.inputs), ("outputs", counts.outputs))
                ]
                for size in range(counts.sizes)
            ]
        except (OSError, AttributeError) as error:
            raise ExportError(f"{os.fspath(path)}: expected a library of the network {name}, found {error}") from error
        self._require(self._function("check_cpu")())
        network = c_void_p()
        if isinstance(weights, np.ndarray):
            self._weights = weights  # stays while the network does
            status = opened_memory(weights.ctypes.data, weights.nbytes, ctypes.byref(network))
            where = f"{name}: weights"
        else:
            where = os.fspath(weights)
            status = opened(os.fsencode(weights), ctypes.byref(network))
        if status != _OK:
            raise ExportError(f"{where}: {self._error(status).decode()}")
        self._network = network.value
        # Not when the process ends: another thread may be running it.
        weakref.finalize(self, close, self._network).atexit = False
        return tuple(Tensors(inputs, outputs) for inputs, outputs in values)

    def __call__(self, *arrays: Any, out: Any = None, **named: Any) -> Any:
        """The network's outputs.

        Args:
            arrays: the inputs in the model's order: NumPy arrays or anything with DLPack, of the types
                that :attr:`inputs` has. They are read where they
                are where they are contiguous, and copied first where they are not. Or one mapping with inputs by their
                names, whatever these are.
            named: inputs by their names, where these are Python's.
            out: arrays to write outputs to, by name, contiguous; of one output the array itself too.

        Returns:
            The output, as what the first input is: an array, or a tensor of PyTorch; where there are several, all by
            name. Those that ``out`` has are its own.

        Raises:
            KernelError: an argument is not what the network needs.
        """
        return self._call(self._inputs(arrays, named), by_name(self.outputs, out), None)

    def step_seconds(self, *arrays: Any, **named: Any) -> list[float]:
        """What each step of one run takes, in seconds and in the order in which they run; arguments as of a call."""
        given = self._inputs(arrays, named)
        size, _ = self._sized(_as_arrays(given))
        seconds = (c_double * self.sizes(1, size).steps)()
        self._call(given, {}, seconds)
        return list(seconds)

    def profile(self, size: int = 0, rounds: int = 15, seed: int = 0) -> list[float]:
        """The median of what each step takes, in seconds, on random inputs of one of the sizes."""
        rng = np.random.default_rng(seed)
        inputs = [drawn(rng, info) for info in self.at[size].inputs.values()]
        self(*inputs)
        medians: Array = np.median([self.step_seconds(*inputs) for _ in range(rounds)], axis=0)
        return [float(seconds) for seconds in medians]

    def _call(self, given: Mapping[str, Any], out: Mapping[str, Any], seconds: Any) -> Any:
        size, inputs = self._sized(_as_arrays(given))
        outputs = self._outputs(size, out)
        args = _Args(pool=self._pool(self.threads), size=size, seconds=seconds)
        args.inputs, args.input_sizes = _pointers(list(inputs.values()))
        args.outputs, args.output_sizes = _pointers(list(outputs.values()))
        try:
            workspace = self.workspaces.pop()
        except IndexError:
            workspace = aligned(max(1, *(self.sizes(None, number).workspace for number in range(len(self.at)))))
        args.workspace, args.workspace_size = workspace.ctypes.data, workspace.size
        status = self._run(self._network, ctypes.byref(args))
        self.workspaces.append(workspace)
        self._require(status)
        first = next(iter(given.values()), None)
        results = {name: out[name] if name in out else returned(array, first) for name, array in outputs.items()}
        return next(iter(results.values())) if len(results) == 1 else results

    @property
    def version(self) -> str:
        """The library's own text: its ABI, name and a digest of its code."""
        return str(self._version().decode())

    def sizes(self, threads: int | None = None, size: int = 0) -> NetworkSizes:
        """How many inputs, outputs, steps and sizes there are, and the bytes of weights and workspace.

        Args:
            threads: that a call runs on; the network's own where None.
            size: which of its sizes.
        """
        sizes, count = NetworkSizes(), self.threads if threads is None else thread_count(threads)
        self._require(self._sizes(size, count, ctypes.byref(sizes)))
        return sizes

    @property
    def memory(self) -> int:
        """Bytes that the network takes while it runs at its largest size: weights and workspace, not its inputs and
        outputs.
        """
        each = [self.sizes(None, size) for size in range(len(self.at))]
        return int(each[0].weights) + max(int(sizes.workspace) for sizes in each)

    def __repr__(self) -> str:
        sizes = "; ".join(map(str, self.at))
        outputs = ", ".join(self.outputs)
        return (
            f"<{type(self).__name__} {self.name}: {sizes} -> {outputs}; threads {self.threads}, "
            f"{self.memory / (1 << 20):.1f} MiB of memory>"
        )

    def on(self, threads: int) -> None:
        """Run on so many threads from now on."""
        self.threads = thread_count(threads)
        self.workspaces.clear()

    # ---- arguments ----

    def _inputs(self, arrays: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs by name, as they were given."""
        if len(arrays) == 1 and isinstance(arrays[0], Mapping):
            mapping, arrays = arrays[0], ()
            if twice := mapping.keys() & named.keys():
                raise KernelError(f"{min(twice)}: expected inputs each once, found it twice")
            named = {**mapping, **named}
        given = dict(zip(self.inputs, arrays, strict=False))
        if len(arrays) > len(self.inputs):
            raise KernelError(f"inputs: expected {len(self.inputs)}, found {len(arrays)}")
        for name in named:
            if name not in self.inputs or name in given:
                raise KernelError(f"{name}: expected inputs {', '.join(self.inputs)}, each once, found {name!r}")
        given |= named
        for name, info in self.inputs.items():
            if name not in given:
                raise KernelError(f"{name}: expected shape {info.shape}, found none")
        return given

    def _sized(self, inputs: Mapping[str, Array]) -> tuple[int, dict[str, Array]]:
        """Which of the sizes the inputs have, and these as they are read."""
        found = [size for size, tensors in enumerate(self.at) if tensors.accept(inputs)]
        if not found and len(self.at) > 1:
            known = "; ".join(map(str, self.at))
            given = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
            raise KernelError(f"inputs: expected shapes that {self.name} was made for ({known}), found {given}")
        size = found[0] if found else 0
        return size, {name: readable(info, inputs[name]) for name, info in self.at[size].inputs.items()}

    def _outputs(self, size: int, out: Mapping[str, Any]) -> dict[str, Array]:
        outputs = self.at[size].outputs
        for name in out:
            if name not in outputs:
                raise KernelError(f"out: expected names among {', '.join(outputs)}, found {name!r}")
        found = {}
        for name, info in outputs.items():
            if name in out:
                found[name] = in_place(info, out[name], written=True)
            else:
                found[name] = np.empty(info.shape, numpy_dtype(info.dtype))
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

    def _values(self, which: str, size: int, count: int) -> dict[str, TensorInfo]:
        values = self._function(which, c_int, returns=POINTER(_Value))(size)
        found = {}
        for value in (values[number] for number in range(count)):
            name = value.name.decode()
            shape = tuple(value.shape[axis] for axis in range(value.rank))
            found[name] = TensorInfo(name, shape, value.dtype.decode())
        return found

    def _require(self, status: int) -> None:
        if status == _OVERLAP:
            raise KernelError(f"{self.name}: expected outputs apart from all other arguments, found an overlap")
        if status != _OK:
            raise KernelError(f"{self.name}: {self._error(status).decode()}")


def by_name(outputs: Mapping[str, TensorInfo], out: Any) -> Mapping[str, Any]:
    """Arrays for outputs by the names of these; of a network with one output an array is that.

    Raises:
        KernelError: one array for several outputs.
    """
    if out is None or isinstance(out, Mapping):
        return out or {}
    if len(outputs) != 1:
        names = ", ".join(outputs)
        raise KernelError(f"out: expected arrays by the names of outputs ({names}), found a {type(out).__name__}")
    return dict.fromkeys(outputs, out)


def _as_arrays(given: Mapping[str, Any]) -> dict[str, Array]:
    return {name: as_array(name, value) for name, value in given.items()}


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
