"""Calls a linked GPU kernel on device memory: NumPy, ctypes and the CUDA driver, nothing else.

Arrays come from PyTorch, CuPy or another framework with DLPack; weights are copied from CPU memory once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from ctypes import c_char_p, c_void_p
from typing import Any

from ..cuda.driver import Memory, context, synchronize
from ..errors import KernelError
from ..problem.spec import ConvSpec
from .dlpack import view
from .frameworks import Framework, framework_of
from .library import BaseLibrary, Loaded, Sizes, SizesStruct, buffer_fields

#: Alignment in bytes of tensors in device memory (``cuda_types.h``).
TENSOR_ALIGNMENT = 16

_DRIVER_ERROR = 35  # enum convgen_cuda_status
_PER_THREAD = 2  # CU_STREAM_PER_THREAD: each thread's own stream, under one handle


class _RunArgs(ctypes.Structure):
    _fields_ = [*buffer_fields("src", "packed", "residual", "dst", "workspace"), ("stream", c_void_p)]


class CudaLibrary(BaseLibrary):
    """A library that runs on a GPU; arguments as :class:`~convgen.kernel.library.BaseLibrary` has them.

    It loads and packs on any machine; running it takes the CUDA driver and a device. A launch's blocks and threads
    are fixed when it is compiled, so ``threads`` is 1 whatever is given.
    """

    on_device = True

    def __init__(self, path: str | os.PathLike[str], spec: ConvSpec, name: str, threads: int = 1) -> None:
        super().__init__(path, spec, name, threads)
        self.threads = 1
        #: The devices its code may be loaded for.
        self._devices = set[int]()
        weakref.finalize(self, _unload, self._unload, self._devices).atexit = False

    def _find_functions(self) -> None:
        self._sizes = self._function("sizes", c_void_p)
        self._load = self._function("load")
        self._unload = self._function("unload")
        self._driver_error = self._function("driver_error", returns=c_char_p)

    def sizes(self) -> Sizes:
        """Bytes of every buffer: the parameters that are packed lie in CPU memory, all others in device memory."""
        sizes = SizesStruct()
        self._require(self._sizes(ctypes.byref(sizes)))
        return Sizes(*(getattr(sizes, name) for name in Sizes._fields))

    def load(self, device: int = 0) -> None:
        """Load the code for a device now rather than at the first run.

        Raises:
            KernelError: there is no driver or no such device, or the library has no code for it.
        """
        self._devices.add(device)
        with context(device):
            self._require(self._load())

    def unload(self, device: int = 0) -> None:
        """Undo :meth:`load`; every run on the device must have ended."""
        with context(device):
            self._require(self._unload())

    def launch(
        self,
        src: int,
        packed: int,
        dst: int,
        residual: int = 0,
        workspace: int = 0,
        stream: int = 0,
        *,
        device: int = 0,
    ) -> None:
        """Run the kernel on buffers in device memory, given by address, each of the size :meth:`sizes` tells.

        Returns when it is launched. The workspace is for one stream at a time.

        Raises:
            KernelError: an address is not what the kernel needs, or it cannot be launched here.
        """
        args = _run_args(self.sizes())
        args.src, args.packed, args.dst, args.residual = src, packed, dst, residual or None
        args.workspace, args.stream = workspace or None, stream or None
        self._devices.add(device)
        with context(device):
            self._require(self._run(ctypes.byref(args)))

    def bind(
        self,
        weights: object = None,
        bias: object = None,
        slope: object = None,
        *,
        device: int = 0,
        **others: Any,
    ) -> CudaLayer:
        """A layer with these weights, packed and copied to a device once.

        Args:
            weights, bias, slope, others: in CPU memory, as :meth:`pack` takes them.
            device: the device's number, as the driver counts.

        Raises:
            KernelError: an argument is not what the layer needs; there is no driver or no such device, or the
                library has no code for it.
        """
        packed = self.pack(weights, bias, slope, **others)
        self.load(device)
        memory = Memory(packed.size, device)
        memory.upload(packed)
        return CudaLayer(self, memory)

    def _require(self, status: int) -> None:
        if status == _DRIVER_ERROR:
            raise KernelError(f"{self.name}: {self._error(status).decode()}: {self._driver_error().decode()}")
        super()._require(status)


def _unload(unload: Callable[[], int], devices: set[int]) -> None:
    """Give back what a library's code takes of devices, once they have done what they were given."""
    for device in devices:
        with suppress(KernelError):  # there is no such device, or what a failed kernel left of one
            synchronize(device)
            with context(device):
                unload()


def _run_args(sizes: Sizes) -> _RunArgs:
    """The struct of a call without addresses."""
    args = _RunArgs()
    for name in ("src", "packed", "residual", "dst", "workspace"):
        setattr(args, f"{name}_size", getattr(sizes, name))
    return args


class CudaLayer(Loaded):
    """A kernel with its weights in a device's memory: ``layer(x)``. Several threads may call one layer at once."""

    def __init__(self, library: CudaLibrary, packed: Memory) -> None:
        self.library, self.packed, self.device = library, packed, packed.ordinal
        self.spec, self._sizes = library.spec, library.sizes()
        tensors = library._tensors
        self._src = dataclasses.replace(tensors["src"], name="x")
        self._dst = dataclasses.replace(tensors["dst"], name="out")
        self._residual = tensors.get("residual")
        #: A workspace for every stream on which the layer was called with arrays of a framework that gives none: calls
        #: on one stream follow each other. A thread's own stream has its workspace in the thread.
        self._workspaces: dict[int, Memory] = {}
        self._of_thread = threading.local()
        self._args = _run_args(self._sizes)
        self._args.packed = packed.address
        #: Held while a call's launches are put on a stream, so that those of another call do not come between them.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.library!r}, {self._sizes.packed} bytes of packed weights>"

    def __call__(self, x: Any, *, residual: Any = None, out: Any = None, stream: Any = None) -> Any:
        """The layer's output for ``x``. Returns when the work is launched, not when it is done.

        Args:
            x: of the spec's dtype, ``spec.src_shape``: an array of PyTorch, CuPy or anything else with DLPack,
                in the layer's device's memory, contiguous and at a multiple of 16 bytes.
            residual: ``spec.dst_shape``, given exactly where the spec has one.
            out: where to write, ``spec.dst_shape``; a new array of x's framework where None.
            stream: where to run: a handle (``cudaStream_t`` as an integer) or an object with ``__cuda_stream__``;
                the current one of x's framework where None. A call of PyTorch's or CuPy's arrays takes its workspace
                from their allocator, so that it can be captured into a CUDA graph; with other arrays the first call
                on a stream allocates one, unless :meth:`reserve` did.

        Returns:
            ``out``, or the new array.

        Raises:
            KernelError: an argument is not what the layer needs, or the driver refused.
        """
        framework = framework_of(x)
        handle = framework.current_stream(x) if stream is None else stream_handle(stream)
        source = view("x", x, self.device, handle)
        source.check(self._src, TENSOR_ALIGNMENT)
        added = self._added(residual, handle)
        if out is None:
            out = framework.empty(x, self._dst.shape)
        target = view("out", out, self.device, handle)
        target.check(self._dst, TENSOR_ALIGNMENT)
        if not target.writable:
            raise KernelError("out: expected writable memory, found a read-only array")
        with self._lock, context(self.device):
            args = self._args
            args.src, args.dst, args.residual, args.stream = source.address, target.address, added, handle or None
            args.workspace, memory = self._workspace(framework, x, handle)
            self.library._require(self.library._run(ctypes.byref(args)))
        framework.used((x, residual, out), handle)
        del memory  # its allocator gives it to later work of the stream only
        return out

    def reserve(self, stream: Any = 0) -> None:
        """Allocate now what calls on a stream need, for arrays of a framework without an allocator that knows streams:
        allocating is not allowed while the stream is captured into a CUDA graph.

        Args:
            stream: a handle or an object with ``__cuda_stream__``.

        Raises:
            KernelError: it is neither, or there is no memory.
        """
        if self._sizes.workspace:
            self._own_workspace(stream_handle(stream))

    def _added(self, residual: Any, stream: int) -> int | None:
        """The residual's address."""
        descriptor = self.spec.descriptor
        if self._residual is None:
            if residual is not None:
                raise KernelError(f"residual: expected none ({descriptor}), found {type(residual).__name__}")
            return None
        if residual is None:
            raise KernelError(f"residual: expected shape {self._residual.shape} ({descriptor}), found none")
        source = view("residual", residual, self.device, stream)
        source.check(self._residual, TENSOR_ALIGNMENT)
        return source.address

    def _workspace(self, framework: Framework, x: Any, stream: int) -> tuple[int | None, object]:
        """A workspace's address, and what keeps it."""
        if not self._sizes.workspace:
            return None, None
        given = framework.scratch(x, self._sizes.workspace, stream)
        if given is not None:
            return given
        own = self._own_workspace(stream)
        return own.address, own

    def _own_workspace(self, stream: int) -> Memory:
        if stream == _PER_THREAD:
            if not hasattr(self._of_thread, "workspace"):
                self._of_thread.workspace = Memory(self._sizes.workspace, self.device)
            mine: Memory = self._of_thread.workspace
            return mine
        if stream not in self._workspaces:
            self._workspaces[stream] = Memory(self._sizes.workspace, self.device)
        return self._workspaces[stream]


def stream_handle(stream: Any) -> int:
    """The handle of a stream: of itself, or of an object with ``__cuda_stream__``.

    Raises:
        KernelError: it is neither.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        _, handle = stream.__cuda_stream__()
        return int(handle)
    if hasattr(stream, "cuda_stream"):  # PyTorch before 2.9
        return int(stream.cuda_stream)
    raise KernelError(f"stream: expected a handle or an object with __cuda_stream__, found {type(stream).__name__}")
