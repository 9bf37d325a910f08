"""Layers on a GPU, and the driver from Python, with a driver made up."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import (
    PLAIN,
    SIMPLE,
    SPEC,
    Fake,
    compile_cuda,
    packed_offsets,
)
from naive import operands

from convgen.cuda import driver as driver_module
from convgen.cuda.driver import Event, Memory, Stream, context, device, synchronize
from convgen.errors import KernelError
from convgen.kernel.cuda_library import CudaLayer, CudaLibrary
from convgen.kernel.dlpack import _read, _Tensor
from convgen.kernel.frameworks import framework_of
from convgen.lowering.link import link

# ---- the driver from Python ----------------------------------------------------------------------


def test_the_device_is_what_the_driver_says(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    found = device()
    assert found is not None
    assert (found.name, found.sms, found.l2, found.memory) == ("Fake 0", 132, 50 << 20, 1 << 30)
    assert found.driver == 12090
    other = dataclasses.replace(found, driver=12080)
    assert re.fullmatch(r"Fake 0-[0-9a-f]{8}-132", found.fingerprint)
    assert other.fingerprint != found.fingerprint
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", "/none")
    assert device() is None


def test_a_machine_without_a_device_has_none(folder: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copy(fake.path, folder / "libempty-cuda.so"))
    other = Fake(copy)
    monkeypatch.setenv("CONVGEN_CUDA_DRIVER", str(copy))
    other.fail("cuInit", 100)
    assert device() is None
    with pytest.raises(KernelError, match="cuInit: the CUDA driver reported CUDA_ERROR_NO_DEVICE"):
        synchronize()


def test_memory_takes_and_gives_bytes(fake: Fake) -> None:
    memory = Memory(64)
    memory.upload(np.arange(16, dtype=np.float32))
    np.testing.assert_array_equal(memory.download().view(np.float32), np.arange(16))
    memory.upload(np.array([-1, -2], np.float32), 8)
    np.testing.assert_array_equal(memory.download(4, 12).view(np.float32), [1, -1, -2])
    memory.fill(0xFF)
    assert (memory.download() == 0xFF).all()
    for offset, size in ((60, 8), (-4, 4), (0, 65)):
        with pytest.raises(KernelError, match="expected a part of 64 bytes"):
            memory.download(offset, size)
    with pytest.raises(KernelError, match="expected a part of 64 bytes"):
        memory.upload(np.zeros(17, np.float32))
    assert "free" not in fake.log
    del memory
    assert fake.log[-1] == "free"


def test_no_memory_is_an_error(fake: Fake) -> None:
    fake.fail("cuMemAlloc_v2", 2)
    with pytest.raises(KernelError, match="cuMemAlloc_v2: the CUDA driver reported CUDA_ERROR_OUT_OF_MEMORY"):
        Memory(1)


def test_contexts_are_current_for_a_while(fake: Fake) -> None:
    loaded = driver_module.driver()
    current = fake.context(1)
    outer = loaded.get("cuCtxGetCurrent", ctypes.c_void_p)
    with context(0):
        inner = loaded.get("cuCtxGetCurrent", ctypes.c_void_p)
        with context(0):
            assert loaded.get("cuCtxGetCurrent", ctypes.c_void_p) == inner
        assert loaded.get("cuCtxGetCurrent", ctypes.c_void_p) == inner
    assert inner != outer
    assert loaded.get("cuCtxGetCurrent", ctypes.c_void_p) == outer
    fake.current(-1)
    fake.destroy(current)
    with pytest.raises(KernelError, match="device: expected one of 2, counted from 0, found 2"), context(2):
        pass


def test_events_tell_seconds(fake: Fake) -> None:
    start, end, stream = Event(), Event(), Stream()
    start.record(stream.handle)
    end.record(stream.handle)
    end.synchronize()
    stream.synchronize()
    assert end.seconds_since(start) == pytest.approx(2.5e-3)
    assert fake.log == ["stream 1", "synchronize stream"]


# ---- layers ------------------------------------------------------------------------------------


class Array:
    """An array of a framework with arrays on a GPU, as DLPack shows it; its memory is the CPU's."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (2, 0), version: int | None = 1) -> None:
        self.array, self._device, self._version = array, device, version
        self.dtype, self.device = array.dtype, "fake"
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: int, **options: Any) -> Any:
        if self._version is None and options:
            raise TypeError("max_version")
        self.streams.append(stream)
        array = self.array.view("i2") if self.array.dtype.name == "bfloat16" else self.array
        return array.__dlpack__(**options)

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(empty=lambda shape, dtype, device: Array(aligned_empty(shape, dtype)))

    @property
    def address(self) -> str:
        return f"{self.array.ctypes.data:#x}"


def aligned_empty(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    array: np.ndarray = raw[-raw.ctypes.data % 64 :][:size].view(dtype).reshape(shape)
    return array


@pytest.fixture
def layer(library: CudaLibrary) -> CudaLayer:
    given = operands(SPEC)
    return library.bind(given["weights"], given["bias"])


@pytest.fixture
def x() -> Array:
    return Array(aligned_empty(SPEC.src_shape))


@pytest.fixture
def z() -> Array:
    return Array(aligned_empty(SPEC.dst_shape))


def launches(fake: Fake) -> list[list[str]]:
    return [line.split(": ")[1].split() for line in fake.log if line.startswith("launch")]


def test_binding_loads_and_uploads_what_was_packed(fake: Fake, library: CudaLibrary, layer: CudaLayer) -> None:
    given = operands(SPEC)
    packed = library.pack(given["weights"], given["bias"])
    np.testing.assert_array_equal(layer.packed.download(), packed)
    size = packed.size
    assert fake.log[:5] == [
        "load CUBIN90a into 0",
        "attribute 8 of first = 70000",
        f"allocate {size}",
        f"upload {size}",
        "synchronize default",
    ]


@pytest.mark.parametrize("version", [1, None])
def test_a_call_launches_on_the_arrays_memory(
    fake: Fake, library: CudaLibrary, layer: CudaLayer, z: Array, version: int | None
) -> None:
    x = Array(aligned_empty(SPEC.src_shape), version=version)
    y = layer(x, residual=z)
    assert isinstance(y, Array)
    assert y.array.shape == SPEC.dst_shape
    packed, (workspace,) = layer.packed.address, layer._workspaces.values()
    weights, bias = packed_offsets(library)
    assert launches(fake) == [
        [x.address, f"{packed + weights:#x}", f"{workspace.address:#x}", f"{workspace.address + 256:#x}"],
        [f"{workspace.address + 256:#x}", z.address, f"{packed + bias:#x}", y.address],
    ]
    assert not any(line.startswith("synchronize") for line in fake.log[5:])


def test_out_is_written_and_returned(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    out = Array(aligned_empty(SPEC.dst_shape))
    assert layer(x, residual=z, out=out) is out
    assert launches(fake)[1][3] == out.address


class Owner:
    """A stream of CUDA's Python protocol."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0x770


def test_streams_are_the_callers_and_have_a_workspace_each(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    for stream in (None, 0x550, Owner(), SimpleNamespace(cuda_stream=0x990), 0x550, 0):
        layer(x, residual=z, stream=stream)
    used = re.findall(r"^launch first.*?stream (\S+):", "\n".join(fake.log), re.MULTILINE)
    assert used == ["0", "0x550", "0x770", "0x990", "0x550", "0"]
    assert x.streams == [1, 0x550, 0x770, 0x990, 0x550, 1]  # DLPack's word for the default stream is 1
    workspaces = [arguments[2] for arguments in launches(fake)[::2]]
    assert workspaces[0] == workspaces[5]
    assert workspaces[1] == workspaces[4]
    assert len(set(workspaces)) == 4
    with pytest.raises(KernelError, match=r"stream: expected a handle or an object with __cuda_stream__, found str"):
        layer(x, residual=z, stream="main")


def test_each_threads_default_stream_has_a_workspace(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    threads = [threading.Thread(target=layer, args=(x,), kwargs={"residual": z, "stream": 2}) for _ in range(2)]
    layer(x, residual=z, stream=2)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = [arguments[2] for arguments in launches(fake)[::2]]
    assert used[0] not in used[1:]
    assert not layer._workspaces
    assert sum(line == "free" for line in fake.log) == 2  # of the threads that ended


def test_the_launches_of_calls_from_several_threads_do_not_mix(
    fake: Fake, layer: CudaLayer, x: Array, z: Array
) -> None:
    outs = [Array(aligned_empty(SPEC.dst_shape)) for _ in range(4)]

    def work(out: Array) -> None:
        for _ in range(20):
            layer(x, residual=z, out=out)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [line.split()[1] for line in fake.log if line.startswith("launch")]
    assert names == ["first", "second"] * 80


def test_a_device_other_than_the_first(fake: Fake, library: CudaLibrary) -> None:
    given = operands(SPEC)
    layer = library.bind(given["weights"], given["bias"], device=1)
    assert fake.log[0] == "load CUBIN90a into 1"
    x, z, y = (Array(aligned_empty(s), (2, 1)) for s in (SPEC.src_shape, SPEC.dst_shape, SPEC.dst_shape))
    layer(x, residual=z, out=y)
    with pytest.raises(KernelError, match="x: expected an array on CUDA device 1, found one on CUDA device 0"):
        layer(Array(x.array), residual=z, out=y)
    with pytest.raises(KernelError, match="device: expected one of 2"):
        library.bind(given["weights"], given["bias"], device=2)


def refused(layer: CudaLayer, message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(KernelError, match=message):
        layer(*arguments, **options)


def test_arrays_the_layer_cannot_take_are_refused(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    before = len(fake.log)
    shape = SPEC.src_shape
    refused(layer, r"x: expected an array on CUDA device 0, found ndarray of the CPU", x.array, residual=z)
    refused(layer, r"x: expected an array on a CUDA device with __dlpack__, found list", [1.0], residual=z)
    refused(layer, r"x: expected .* found Array of DLPack device type 10", Array(x.array, (10, 0)), residual=z)
    wide = Array(aligned_empty((*shape[:-1], 2 * shape[-1]))[..., ::2])
    refused(layer, r"x: expected a C-contiguous array, found strides \(2400, 800, 40, 2\)", wide, residual=z)
    refused(layer, r"x: expected shape .*, found \(2, 3, 20\)", Array(aligned_empty(shape[:-1])), residual=z)
    refused(layer, "x: expected dtype float32, found float64", Array(aligned_empty(shape, np.float64)), residual=z)
    refused(layer, "x: expected dtype float32, found int32", Array(aligned_empty(shape, np.int32)), residual=z)
    moved = Array(aligned_empty((x.array.size + 1,))[1:].reshape(shape))
    refused(layer, "x: expected an address that is a multiple of 16, found 0x", moved, residual=z)
    refused(layer, "residual: expected shape .* found none", x)
    refused(layer, "residual: expected .* of the CPU", x, residual=z.array)
    refused(layer, "out: expected .* of the CPU", x, residual=z, out=z.array)
    frozen = aligned_empty(SPEC.dst_shape)
    frozen.flags.writeable = False
    refused(layer, "out: expected writable memory, found a read-only array", x, residual=z, out=Array(frozen))
    refused(layer, r"out \(dst\): expected memory apart from all other arguments", x, residual=z, out=z)
    assert not launches(fake), fake.log[before:]


def test_an_axis_of_one_has_any_stride_and_managed_memory_is_taken(fake: Fake, folder: Path) -> None:
    interface, object_file = compile_cuda(PLAIN, folder, SIMPLE, "plain")
    made = CudaLibrary(link(interface, object_file, folder / "libplain.so"), PLAIN, "plain")
    given = operands(PLAIN)
    layer = made.bind(given["weights"], given["bias"])
    x = np.lib.stride_tricks.as_strided(aligned_empty(PLAIN.src_shape), PLAIN.src_shape, (4, 324, 36, 4))
    y = layer(Array(x, (13, 0)))
    assert launches(fake) == [[f"{x.ctypes.data:#x}", f"{layer.packed.address + 64:#x}", y.address]]
    assert not layer._workspaces
    refused(layer, "residual: expected none", Array(x), residual=y)


def test_an_array_that_cannot_make_others_needs_out(fake: Fake, layer: CudaLayer, z: Array) -> None:
    class Bare:
        def __init__(self) -> None:
            self._of = Array(aligned_empty(SPEC.src_shape))
            self.__dlpack__, self.__dlpack_device__ = self._of.__dlpack__, self._of.__dlpack_device__

    refused(layer, "out: expected an array to write to, as Bare cannot make one", Bare(), residual=z)
    assert layer(Bare(), residual=z, out=Array(aligned_empty(SPEC.dst_shape)))


def test_an_array_that_refuses_to_be_shared_is_named(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    def refuse(**options: Any) -> None:
        raise BufferError("requires grad")

    x.__dlpack__ = refuse  # type: ignore[method-assign]
    refused(layer, "x: expected an array that can be shared, found Array: requires grad", x, residual=z)
    x.__dlpack__ = lambda **options: object()  # type: ignore[method-assign]
    refused(layer, "x: expected a DLPack capsule, found object", x, residual=z)


def test_a_view_begins_at_its_offset_and_may_lack_strides() -> None:
    shape = (ctypes.c_int64 * 2)(3, 4)
    tensor = _Tensor(data=0x1000, ndim=2, shape=shape, byte_offset=0x40)
    tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = 2, 32, 1
    new = ctypes.pythonapi.PyCapsule_New
    new.argtypes, new.restype = (ctypes.c_void_p,) * 3, ctypes.py_object
    name = ctypes.create_string_buffer(b"dltensor")
    found = _read("x", new(ctypes.addressof(tensor), ctypes.addressof(name), None))
    assert (found.address, found.shape, found.strides) == (0x1040, (3, 4), (4, 1))
    assert (found.dtype, found.writable) == ("float32", True)


@pytest.mark.parametrize("version", [None, (1, 0)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_pytorch_says_of_its_tensors_is_read(dtype: str, version: tuple[int, int] | None) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(2, 6, 5, dtype=getattr(torch, dtype))[:, 1::2]
    found = _read("x", tensor.__dlpack__(max_version=version) if version else tensor.__dlpack__())
    assert found.address == tensor.data_ptr()
    assert (found.shape, found.strides) == ((2, 3, 5), (30, 10, 1))
    assert (found.dtype, found.writable) == (dtype, True)


class Tensor(Array):
    """A tensor of :func:`made_torch`, on its first GPU."""

    is_cuda = True

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array)
        self.recorded: list[int] = []

    def record_stream(self, stream: SimpleNamespace) -> None:
        self.recorded.append(stream.cuda_stream)

    def new_empty(self, shape: tuple[int, ...]) -> Tensor:
        return Tensor(aligned_empty(shape))

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor]]:
    """What is asked of PyTorch's allocator, made up here: the stream that is current, and the memory."""
    taken: list[tuple[int, Tensor]] = []
    current = [SimpleNamespace(cuda_stream=0xA0)]

    @contextmanager
    def stream(of: SimpleNamespace) -> Iterator[None]:
        current.append(of)
        yield
        current.pop()

    def empty(size: int, dtype: object, device: object) -> Tensor:
        taken.append((current[-1].cuda_stream, Tensor(aligned_empty((size,), dtype))))
        return taken[-1][1]

    cuda = SimpleNamespace(
        current_stream=lambda device: current[-1],
        stream=stream,
        ExternalStream=lambda handle, device: SimpleNamespace(cuda_stream=handle),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=Tensor, cuda=cuda, empty=empty, uint8=np.uint8))
    return taken


def test_pytorchs_allocator_gives_workspaces_so_that_calls_can_be_captured(
    fake: Fake, layer: CudaLayer, taken: list[tuple[int, Tensor]]
) -> None:
    """Allocating by the driver ends a capture."""
    x, z = Tensor(aligned_empty(SPEC.src_shape)), Tensor(aligned_empty(SPEC.dst_shape))
    before = len(fake.log)
    y = layer(x, residual=z)
    layer(x, residual=z, stream=0x550)
    assert not any(line.startswith(("allocate", "synchronize")) for line in fake.log[before:])
    assert [stream for stream, _ in taken] == [0xA0, 0x550]
    assert [arguments[2] for arguments in launches(fake)[::2]] == [memory.address for _, memory in taken]
    assert all(memory.array.nbytes == layer.library.sizes().workspace for _, memory in taken)
    # What works on another stream than PyTorch's is told to its allocator.
    assert x.recorded == z.recorded == [0x550]
    assert y.recorded == []


def test_arrays_on_a_foreign_stream_are_recorded(fake: Fake, layer: CudaLayer, taken: list[tuple[int, Tensor]]) -> None:
    x, z = Tensor(aligned_empty(SPEC.src_shape)), Tensor(aligned_empty(SPEC.dst_shape))
    assert layer(x, residual=z, stream=0x770).recorded == [0x770]


def test_a_workspace_is_reserved_before_a_capture(fake: Fake, layer: CudaLayer, x: Array, z: Array) -> None:
    layer.reserve(0x550)
    before = len(fake.log)
    layer(x, residual=z, stream=0x550)
    assert not any(line.startswith("allocate") for line in fake.log[before:])
    with pytest.raises(KernelError, match="stream: expected a handle"):
        layer.reserve("main")


def test_the_stream_is_the_frameworks_current_one(
    monkeypatch: pytest.MonkeyPatch, taken: list[tuple[int, Tensor]]
) -> None:
    cupy = SimpleNamespace(ndarray=list, cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0xB0)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for x, stream in ((Tensor(aligned_empty((1,))), 0xA0), ([], 0xB0), ("another", 0)):
        assert framework_of(x).current_stream(x) == stream


def test_a_layer_is_freed_with_its_memory(fake: Fake, library: CudaLibrary, x: Array, z: Array) -> None:
    given = operands(SPEC)
    layer = library.bind(given["weights"], given["bias"])
    layer(x, residual=z)
    del layer
    assert sum(line == "free" for line in fake.log) == 2  # packed and workspace
