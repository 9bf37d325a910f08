"""Loads a linked kernel and calls it: NumPy, ctypes and the standard library, nothing else.

Tuned, measured and exported kernels all run through here, on the C runtime linked into each library.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from ctypes import c_char, c_char_p, c_int, c_size_t, c_void_p
from typing import Any, ClassVar, NamedTuple, NoReturn, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ExportError, KernelError
from ..folders import is_noexec
from ..lowering.interface import ALIGNMENT, MAX_THREADS, TensorInfo, abi_text, boundary
from ..problem.dtypes import RANGES, numpy_dtype
from ..problem.spec import PARAMETERS, ConvSpec
from .arrays import Array, in_place, readable, returned, values
from .mapped import open_library

Bytes: TypeAlias = NDArray[np.uint8]

# enum convgen_status
_OK, _WRONG_PACKED, _OVERLAP = 0, 4, 6


class Sizes(NamedTuple):
    """Bytes of every buffer of a kernel; 0 where the layer has no such tensor."""

    src: int
    weights: int
    bias: int
    slope: int
    scale: int
    src_zero: int
    weights_zero: int
    dst_zero: int
    sum: int
    residual: int
    dst: int
    packed: int
    workspace: int


class SizesStruct(ctypes.Structure):
    _fields_ = [(name, c_size_t) for name in Sizes._fields]


def buffer_fields(*names: str) -> list[tuple[str, type]]:
    return [field for name in names for field in ((name, c_void_p), (f"{name}_size", c_size_t))]


class _PackArgs(ctypes.Structure):
    _fields_ = [*buffer_fields(*PARAMETERS, "packed"), ("pool", c_void_p)]


class _RunArgs(ctypes.Structure):
    _fields_ = [*buffer_fields("src", "packed", "residual", "dst", "workspace"), ("pool", c_void_p)]


# ---- arrays ------------------------------------------------------------------------------------


def aligned(size: int) -> Bytes:
    """``size`` uninitialised bytes at a multiple of 64."""
    raw = np.empty(size + ALIGNMENT - 1, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def _address(array: NDArray[Any]) -> int:
    """The address of an array's first byte. The quick way works for writable arrays that are not empty."""
    try:
        return ctypes.addressof(_from_buffer(array))
    except (TypeError, ValueError):
        return int(array.ctypes.data)


_from_buffer: Any = c_char.from_buffer


def _check_bytes(name: str, array: object, size: int, *, written: bool, at_least: bool = False) -> Bytes:
    """A buffer of bytes the caller gives for ``packed`` or ``workspace``, checked."""
    wanted = f"{'at least ' if at_least else ''}{size} contiguous bytes (uint8)"
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 1:
        raise KernelError(f"{name}: expected an array of {wanted}, found {_describe(array)}")
    if (array.size < size if at_least else array.size != size) or not array.flags.c_contiguous:
        raise KernelError(f"{name}: expected {wanted}, found {_describe(array)}")
    if array.ctypes.data % ALIGNMENT:
        raise KernelError(f"{name}: expected an address that is a multiple of {ALIGNMENT}, found {_describe(array)}")
    if written and not array.flags.writeable:
        raise KernelError(f"{name}: expected writable memory, found a read-only array")
    return array


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} with strides {value.strides} at {value.ctypes.data:#x}"
    return type(value).__name__


# ---- what all libraries of the process share ---------------------------------------------------

#: Pools by their number of threads, each kept by the libraries that use it.
_pools: weakref.WeakValueDictionary[int, Pool] = weakref.WeakValueDictionary()


def shared_pool(threads: int, create: Any, destroy: Any, require: Callable[[int], None]) -> Pool:
    """The process's pool of that many threads; a library's own functions make one where there is none."""
    return _pools.get(threads) or _pools.setdefault(threads, Pool(threads, create, destroy, require))


#: Workspaces that no call uses at the moment. A call takes one, replaces it where it is too small, and gives it
#: back; adding to and taking from the end of a deque is atomic.
_workspaces: deque[tuple[int, int, Bytes]] = deque()


def _take_workspace(size: int) -> tuple[int, int, Bytes]:
    """(address, size, its memory), of at least ``size`` bytes."""
    try:
        workspace = _workspaces.pop()
    except IndexError:
        workspace = (0, 0, np.empty(0, np.uint8))
    if workspace[1] < size:
        memory = aligned(size)
        return memory.ctypes.data, size, memory
    return workspace


class Loaded:
    """An object that belongs to this process: copying it gives the object itself, and pickling it fails."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"cannot pickle {name}: it is loaded into this process; build or load it in the other one")


class BaseLibrary(Loaded, ABC):
    """A loaded shared library with one kernel: what CPUs and GPUs have in common.

    Args:
        path: the library.
        spec: its layer.
        name: the prefix of its functions.
        threads: how many threads a layer runs on.

    Raises:
        KernelError: ``threads`` is out of range.
        ExportError: the file is no library, or not one with these functions and this layer.
    """

    #: Whether it runs on a GPU.
    on_device: ClassVar[bool]

    def __init__(self, path: str | os.PathLike[str], spec: ConvSpec, name: str, threads: int) -> None:
        self.spec, self.name, self.threads = spec, name, thread_count(threads)
        self._tensors = boundary(spec)
        self._open(path)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec.descriptor}: {self.name}, {self._where}>"

    @property
    def _where(self) -> str:
        """What it runs on, for people."""
        return "a GPU" if self.on_device else f"{self.threads} thread{'s' * (self.threads > 1)}"

    def _open(self, path: str | os.PathLike[str]) -> None:
        """Load the library and find its functions."""
        try:
            self._dll = open_library(os.fspath(path))
            self._pack = self._function("pack", c_void_p)
            self._run = self._function("run", c_void_p)
            self._verify = self._function("verify_packed", c_void_p, c_size_t)
            self._error = self._function("error", c_int, returns=c_char_p)
            self._version = self._function("version", returns=c_char_p)
            self._find_functions()
        except (OSError, AttributeError) as error:
            found = f"{error}; it lies on a file system mounted noexec" if is_noexec(path) else str(error)
            raise ExportError(
                f"{os.fspath(path)}: expected a library with the kernel {self.name}, found {found}"
            ) from error
        self._check_layer(os.fspath(path))

    @abstractmethod
    def _find_functions(self) -> None:
        """Find the functions that only libraries of this kind have."""

    @abstractmethod
    def sizes(self) -> Sizes:
        """Bytes of every buffer."""

    @abstractmethod
    def bind(self, weights: object = None, bias: object = None, slope: object = None, **others: Any) -> Any:
        """A layer with these weights, packed once; arguments as in :meth:`pack`."""

    def _check_layer(self, path: str) -> None:
        """Raise ExportError unless the library is of the spec's layer: arrays are checked against the spec."""
        expected = f"{abi_text(self.on_device)}; {self.spec.descriptor}"
        if not self.version.startswith(f"{expected}; "):
            raise ExportError(f"{path}: expected {expected}, found {self.version}")
        sizes = self.sizes()._asdict()
        for name in ("src", *PARAMETERS, "residual", "dst"):
            size = self._tensors[name].bytes if name in self._tensors else 0
            if sizes[name] != size:
                raise ExportError(f"{path}: {name}: expected {size} bytes, found {sizes[name]}")

    def _pool(self, threads: int) -> int | None:
        """The address of a pool of that many threads; None where the thread that calls is alone."""
        return None

    def _function(self, suffix: str, *arguments: type, returns: type = c_int) -> Any:
        function = self._dll[f"{self.name}_{suffix}"]  # an attribute would keep the library in a cycle
        function.argtypes, function.restype = arguments, returns
        return function

    @property
    def version(self) -> str:
        """The library's own text: its ABI, layer and a digest of its code."""
        return str(self._version().decode())

    def pack(
        self,
        weights: object = None,
        bias: object = None,
        slope: object = None,
        packed: Bytes | None = None,
        *,
        checksum: object = True,
        **others: Any,
    ) -> Bytes:
        """The parameters as the kernel reads them; into ``packed`` where given.

        Args:
            weights: ``spec.shapes["weights"]``, with any strides, unless it is a gradient of them: a NumPy array or
                anything with DLPack in CPU memory; like all tensors stored as ``spec.dtypes`` says: float32, float16,
                bfloat16 (ml_dtypes' where it is NumPy's), int8, uint8 or int32. Of a tensor with gradients its values.
            bias: ``[oc]``, given exactly where the spec has one.
            slope: prelu's, ``[oc]`` or one number.
            others: of a layer of integers ``scale`` ``[oc]``, and what it has of ``src_zero`` ``[1]``,
                ``weights_zero`` ``[oc]``, ``dst_zero`` ``[1]`` and ``sum`` ``[4]``; a number stands for equal elements.
            packed: ``sizes().packed`` bytes at a multiple of 64.
            checksum: whether :meth:`verify_packed` can tell later that nothing has changed; it takes up to as long as
                packing. Without one it says no, and a run does as ever: for weights that change at every call, as in
                training.

        Raises:
            KernelError: an argument is not what the layer needs.
        """
        given = {"weights": weights, "bias": bias, "slope": slope, **others}
        if unknown := given.keys() - set(PARAMETERS):
            raise KernelError(f"{min(unknown)}: expected parameters among {', '.join(PARAMETERS)}, found another")
        args, arrays = _PackArgs(), []
        for name in PARAMETERS:
            array = self._operand(name, self._filled(name, given.get(name)), readable)
            if array is not None:
                arrays.append(array)
                setattr(args, name, array.ctypes.data)
                setattr(args, f"{name}_size", array.nbytes)
        size = self.sizes().packed
        packed = aligned(size) if packed is None else _check_bytes("packed", packed, size, written=True)
        args.packed, args.packed_size, args.pool = packed.ctypes.data, size, self._pool(self.threads)
        self._require(self._packer(checksum)(ctypes.byref(args)))
        return packed

    def _packer(self, checksum: object) -> Any:
        """The library's function that packs, with or without a checksum."""
        if not isinstance(checksum, bool):
            raise KernelError(f"checksum: expected True or False, found {_describe(checksum)}")
        if checksum:
            return self._pack
        try:
            return self._function("repack", c_void_p)
        except AttributeError as error:
            expected = f"a library with the function {self.name}_repack"
            raise KernelError(f"checksum: expected {expected}, found one that an earlier convgen made") from error

    def _filled(self, name: str, value: object) -> object:
        """A parameter's values; a number stands for a vector of it, as one element of a slope does."""
        if value is None or name not in self._tensors:
            return value
        number = value.item() if isinstance(value, np.generic) else value
        if not isinstance(number, int | float):
            array = values(name, value)
            if name != "slope" or array.size != 1:
                return array
            number = array.item()
        if name in ("weights", "bias"):
            return value
        info = self._tensors[name]
        if info.dtype in RANGES and number not in range(RANGES[info.dtype][0], RANGES[info.dtype][1] + 1):
            raise KernelError(f"{name}: expected a number of {info.dtype}, found {number}")
        return np.full(info.shape, number, numpy_dtype(info.dtype))

    def _operand(self, name: str, value: object, take: Callable[[TensorInfo, object], Array]) -> Array | None:
        """An input of the kernel as ``take`` has it; None where the layer has no such input and none is given."""
        if name in self._tensors:
            return self._required(name, value, take)
        if value is not None:
            raise KernelError(f"{name}: expected none ({self.spec.descriptor}), found {type(value).__name__}")
        return None

    def _required(self, name: str, value: object, take: Callable[[TensorInfo, object], Array]) -> Array:
        info = self._tensors[name]
        if value is None:
            raise KernelError(f"{name}: expected shape {info.shape} ({self.spec.descriptor}), found none")
        return take(info, value)

    def verify_packed(self, packed: Bytes) -> bool:
        """Whether ``packed`` is what :meth:`pack` of this library wrote, to the last bit."""
        size = self.sizes().packed
        address = _check_bytes("packed", packed, size, written=False).ctypes.data
        status = self._verify(address, size)
        if status != _WRONG_PACKED:
            self._require(status)
        return bool(status == _OK)

    def _require(self, status: int) -> None:
        if status != _OK:
            text = self._error(status).decode()
            if status == _OVERLAP:
                text = "out (dst): expected memory apart from all other arguments, found an overlap"
            raise KernelError(f"{self.name}: {text}")


class Library(BaseLibrary):
    """A library that runs on the CPU; arguments as :class:`BaseLibrary` has them."""

    on_device = False

    def __init__(self, path: str | os.PathLike[str], spec: ConvSpec, name: str, threads: int) -> None:
        super().__init__(path, spec, name, threads)
        self._used_pools: dict[int, Pool] = {}

    def _find_functions(self) -> None:
        self._sizes = self._function("sizes", c_int, c_void_p)
        self._check_cpu = self._function("check_cpu")
        self._pool_create = self._function("pool_create", c_int, c_void_p)

    def check_cpu(self) -> None:
        """Raise KernelError unless this CPU has the instructions the library was compiled for."""
        self._require(self._check_cpu())

    def sizes(self, threads: int | None = None) -> Sizes:
        """Bytes of every buffer for calls on ``threads`` threads (the library's own where None)."""
        threads = self.threads if threads is None else thread_count(threads)
        sizes = SizesStruct()
        self._require(self._sizes(threads, ctypes.byref(sizes)))
        return Sizes(*(getattr(sizes, name) for name in Sizes._fields))

    def run(
        self,
        src: object,
        packed: Bytes,
        dst: object,
        residual: object = None,
        workspace: Bytes | None = None,
        threads: int | None = None,
    ) -> None:
        """Run the kernel once; arguments as in :meth:`prepare`, the workspace is the process's own where None.

        Raises:
            KernelError: an argument is not what the layer needs.
        """
        if workspace is not None:
            self.prepare(src, packed, dst, residual, workspace, threads)()
            return
        taken = _take_workspace(self.sizes(threads).workspace)
        try:
            self.prepare(src, packed, dst, residual, taken[2], threads)()
        finally:
            _workspaces.append(taken)

    def prepare(
        self,
        src: object,
        packed: Bytes,
        dst: object,
        residual: object = None,
        workspace: Bytes | None = None,
        threads: int | None = None,
    ) -> Callable[[], None]:
        """Check the arguments of a run once; returns a function that runs the kernel and does nothing else.

        Args:
            src: ``spec.src_shape``, like dst and residual of the spec's dtype and contiguous: all are read and
                written where they are, at every run.
            packed: as :meth:`pack` returned it.
            dst: ``spec.dst_shape``, written; overlaps no other argument.
            residual: ``spec.shapes["residual"]``, given exactly where the spec has one.
            workspace: at least ``sizes(threads).workspace`` bytes at a multiple of 64; new memory
                where None. Only one call at a time can use it.
            threads: the library's own where None.

        Raises:
            KernelError: an argument is not what the layer needs (overlaps: when it is run).
        """
        threads = self.threads if threads is None else thread_count(threads)
        source, added = self._required("src", src, in_place), self._operand("residual", residual, in_place)
        out = in_place(self._tensors["dst"], dst, written=True)
        sizes = self.sizes(threads)
        _check_bytes("packed", packed, sizes.packed, written=False)
        if workspace is None:
            workspace = aligned(sizes.workspace)
        else:
            _check_bytes("workspace", workspace, sizes.workspace, written=True, at_least=True)
        args = self._run_args(packed, sizes, threads)
        args.workspace, args.workspace_size = workspace.ctypes.data, workspace.size
        args.src, args.dst = source.ctypes.data, out.ctypes.data
        if added is not None:
            args.residual = added.ctypes.data
        # The struct has their addresses only; and the library has the pool.
        memory = (source, packed, out, added, workspace, self)
        run, reference, require = self._run, ctypes.byref(args), self._require

        def call(_memory: object = memory) -> None:
            status = run(reference)
            if status:
                require(status)

        return call

    def bind(self, weights: object = None, bias: object = None, slope: object = None, **others: Any) -> Layer:
        """A layer with these weights, packed once; arguments as in :meth:`pack`."""
        return Layer(self, self.pack(weights, bias, slope, **others))

    def _run_args(self, packed: Bytes, sizes: Sizes, threads: int) -> _RunArgs:
        """The struct of a call, without the addresses of src, residual, dst and workspace."""
        args = _RunArgs(packed=packed.ctypes.data, pool=self._pool(threads))
        for name in ("src", "packed", "residual", "dst"):
            setattr(args, f"{name}_size", getattr(sizes, name))
        return args

    def _pool(self, threads: int) -> int | None:
        """The process's pool of that many threads, whichever library made it; None for one thread."""
        if threads == 1:
            return None
        if threads not in self._used_pools:
            pool = shared_pool(threads, self._pool_create, self._function("pool_destroy", c_void_p), self._require)
            self._used_pools.setdefault(threads, pool)
        return self._used_pools[threads].address


class Pool:
    """Threads of the process, ended with the object. They run code of the library that made them, and keep it."""

    def __init__(self, threads: int, create: Any, destroy: Any, require: Callable[[int], None]) -> None:
        pool = c_void_p()
        require(create(threads, ctypes.byref(pool)))
        self.address = pool.value or 0
        # Not when the process ends: a thread that is not waited for may be calling a layer.
        weakref.finalize(self, destroy, self.address).atexit = False


def thread_count(threads: object) -> int:
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= MAX_THREADS:
        raise KernelError(f"threads: expected 1 to {MAX_THREADS}, found {threads!r}")
    return threads


class Layer(Loaded):
    """A kernel with its weights: ``layer(x)``. Several threads may call one layer at once."""

    def __init__(self, library: Library, packed: Bytes) -> None:
        self.library, self.packed = library, packed
        self.spec, self.threads = library.spec, library.threads
        tensors, self._sizes = library._tensors, library.sizes()
        self._src = dataclasses.replace(tensors["src"], name="x")
        self._dst = dataclasses.replace(tensors["dst"], name="out")
        self._has_residual = "residual" in tensors
        #: Structs for this layer's calls that no call uses at the moment.
        self._free_args: deque[_RunArgs] = deque()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.library!r}, {self._sizes.packed} bytes of packed weights>"

    def __call__(self, x: Any, *, residual: Any = None, out: Any = None) -> Any:
        """The layer's output for ``x``.

        Args:
            x: of the spec's dtype, ``spec.src_shape``: a NumPy array or anything with DLPack, in CPU memory. It is
                read where it is where it is contiguous, and copied first where it is not.
            residual: ``spec.shapes["residual"]``, given exactly where the spec has one, the gradient of dst with
                direction weights; likewise.
            out: where to write, ``spec.dst_shape``, contiguous; a new array where None.

        Returns:
            ``out``, or what ``x`` is: an array, or a tensor of PyTorch.

        Raises:
            KernelError: an argument is not what the layer needs, or ``out`` overlaps another one.
        """
        library = self.library
        src = readable(self._src, x)
        if out is None:
            dst = np.empty(self._dst.shape, numpy_dtype(self._dst.dtype))
        else:
            dst = in_place(self._dst, out, written=True)
        added = None
        if residual is not None or self._has_residual:
            added = library._operand("residual", residual, readable)
        try:
            args = self._free_args.pop()
        except IndexError:
            args = library._run_args(self.packed, self._sizes, self.threads)
        args.src, args.dst = _address(src), _address(dst)
        if added is not None:
            args.residual = _address(added)
        workspace = _take_workspace(self._sizes.workspace)
        args.workspace, args.workspace_size = workspace[0], workspace[1]
        status = library._run(ctypes.byref(args))
        _workspaces.append(workspace)
        self._free_args.append(args)
        if status:
            library._require(status)
        return returned(dst, x) if out is None else out
