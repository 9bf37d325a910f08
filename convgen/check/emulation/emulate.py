"""Device code on the CPU: CUDA source compiled by a C++ compiler, and a driver that launches it.

What it shows and what it checks is in ``runtime/emulate.cpp``. Kernels run in a child process, their
buffers against guard pages. ``python -m convgen.check.emulation.emulate DIR`` is the child.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...cuda.code import HEADERS
from ...errors import BuildError, KernelError
from ...folders import TemporaryFolder
from ...lowering.interface import PROMOTIONS, SWIZZLES, TENSOR_TYPES, Launch, TensorMap
from ...lowering.runtime import source as runtime_source
from ..sandbox import Guarded

#: Orders in which threads and blocks run one after the other; a number is the seed of a random order.
ORDERS = {"ascending": -1, "descending": -2}
_SHARED = re.compile(
    r"__shared__\s+(?:__align__\(\d+\)\s+)?(?P<type>[\w ]+?)\s+(?P<name>\w+)\s*(?P<sizes>(?:\[[^\]]*\])+);"
)
#: A kernel, with how many blocks of a cluster it has along x, if any.
_KERNEL = re.compile(r"__global__\s+void\s+(?:__cluster_dims__\((\d+)[^)]*\)\s*)?(\w+)\s*\(")
_CHECKS = ("-fsanitize=thread,alignment,bounds,object-size", "-fno-sanitize-recover=all")
_FLAGS = (
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-threadsafe-statics",
    "-fno-gnu-unique",  # else a library stays loaded for good
    "-ffp-contract=off",
    "-ftrivial-auto-var-init=pattern",  # of large numbers
    "-U_FORTIFY_SOURCE",  # its longjmp takes fibers for a corrupt stack
    "-march=native",
)


class Source(Protocol):
    """What is run: :class:`convgen.cuda.code.DeviceSource`."""

    @property
    def text(self) -> str: ...
    @property
    def launches(self) -> tuple[Launch, ...]: ...
    @property
    def workspace(self) -> tuple[int, ...]: ...


def compile_emulated(text: str, directory: Path) -> Path:
    """CUDA source as a shared library that runs its kernels on this CPU.

    Raises:
        BuildError: there is no g++ (``CXX`` may name one), or it failed; gives the command and what it said.
    """
    text = _SHARED.sub(_array, re.sub(r"extern\s+" + _SHARED.pattern, _dynamic, text))
    plain = re.sub(r"__launch_bounds__\([^)]*\)", "", text)
    clusters = {name: size or 1 for size, name in _KERNEL.findall(plain)}
    if not clusters:
        raise BuildError("expected CUDA source with a kernel, found none")
    exports = "".join(f"CG_EMULATE_KERNEL({name}, {size})\n" for name, size in clusters.items())
    handle, library = tempfile.mkstemp(prefix="kernels-", suffix=".so", dir=directory)
    os.close(handle)
    with TemporaryFolder(directory) as folder:
        for name in (*HEADERS, "emulate.h"):
            Path(folder, name).write_text(runtime_source(name), encoding="utf-8")
        Path(folder, "kernels.cpp").write_text(f"{text}\n{exports}", encoding="utf-8")
        Path(folder, "emulate.o").write_bytes(_machine(os.environ.get("CXX", "")))
        _compile(("-DCONVGEN_EMULATE", *_FLAGS, *_CHECKS, "-c", "-o", "kernels.o", "kernels.cpp"), folder)
        # without the checks' libraries: emulate.cpp is what they call
        _compile(("-shared", "-Wl,-Bsymbolic", "-o", library, "kernels.o", "emulate.o"), folder)
    return Path(library)


@functools.cache
def _machine(_compiler: str) -> bytes:
    """The machine that kernels run on (``runtime/emulate.cpp``), compiled."""
    with TemporaryFolder() as folder:
        for name in ("emulate.h", "emulated_map.h", "emulate.cpp"):
            Path(folder, name).write_text(runtime_source(name), encoding="utf-8")
        _compile((*_FLAGS, "-c", "-o", "emulate.o", "emulate.cpp"), folder)
        return Path(folder, "emulate.o").read_bytes()


def _array(match: re.Match[str]) -> str:
    kind, name, sizes = match["type"], match["name"], match["sizes"]
    array = f"*({kind} (*){sizes})emulation::shared_array(sizeof({kind}{sizes}))"
    return f"static {kind} (&{name}){sizes} = {array};"


def _dynamic(match: re.Match[str]) -> str:
    return f"{match['type']} *const {match['name']} = ({match['type']} *)emulation::dynamic_shared();"


def _compile(arguments: Sequence[str], folder: Path) -> None:
    command = [*(shlex.split(os.environ.get("CXX", "")) or ["g++"]), *arguments]
    try:
        environment = {**os.environ, "TMPDIR": str(folder)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, errors="replace", check=False)
    except OSError as error:
        hint = "install g++ (Debian: apt install g++) or name one in CXX"
        raise BuildError(f"{command[0]}: {error.strerror}; {hint}") from error
    if done.returncode:
        raise BuildError(f"exit status {done.returncode} of {shlex.join(command)}\n{done.stderr.strip()}")


def run(
    source: Source,
    buffers: Mapping[str, npt.NDArray[Any]],
    *,
    order: str | int = "ascending",
    library: Path | None = None,
    guard: str = "end",
    timeout: float = 600,
) -> npt.NDArray[Any]:
    """Run the launches on ``buffers``: ``src``, ``packed0`` …, ``residual`` and ``dst``; returns ``dst``.

    ``dst`` and, where given, ``workspace0`` … are written in place; before, they are NaN. The others are read-only
    memory. All buffers touch a page that may not be accessed, at their end or at their beginning (``guard``), except
    those that are a :class:`numpy.memmap` of a whole file, which is mapped and not copied: one with holes may be larger
    than this machine's memory.

    Args:
        order: of threads and blocks: "ascending", "descending", or the seed of a random one.
        library: what :func:`compile_emulated` made of the source, to compile it once for several runs.

    Raises:
        BuildError: the source does not compile.
        KernelError: a kernel did what it may not; the message says which thread of which launch, and what.
    """
    with TemporaryFolder(runs=True) as folder:
        library = compile_emulated(source.text, folder) if library is None else library
        sizes = {f"workspace{i}": size for i, size in enumerate(source.workspace)}
        sizes |= {name: array.nbytes for name, array in buffers.items()}
        written = [name for name in sizes if name == "dst" or name.startswith("workspace")]
        files = {name: str(array.filename) for name, array in buffers.items() if isinstance(array, np.memmap)}
        for name, array in buffers.items():
            if name not in written and name not in files:
                np.save(folder / f"{name}.npy", _bytes(np.ascontiguousarray(array)))
        job = {
            "library": str(library),
            "launches": [dataclasses.asdict(launch) for launch in source.launches],
            "sizes": sizes,
            "files": files,
            "written": written,
            "order": ORDERS.get(order, order) if isinstance(order, str) else order,
            "guard": guard,
        }
        (folder / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-P", "-m", "convgen.check.emulation.emulate", str(folder)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise KernelError(f"expected the launches to end within {timeout:.0f} s, found them running") from None
        if child.returncode:
            cause = f"signal {-child.returncode}" if child.returncode < 0 else child.stderr.strip().rpartition("\n")[2]
            raise KernelError(cause)
        for name in written:
            if name in buffers:
                array = buffers[name]
                array[...] = np.load(folder / f"{name}.npy").view(array.dtype).reshape(array.shape)
    return buffers["dst"]


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def emulated_driver(directory: Path, capability: tuple[int, int] = (8, 0), devices: int = 1) -> Path:
    """A ``libcuda.so.1`` in ``directory`` whose devices are this CPU and take the libraries of
    :func:`compile_emulated` for modules; their compute capability is made up.

    Raises:
        BuildError: there is no g++ (``CXX`` may name one), or it failed.
    """
    library = Path(directory).resolve() / "libcuda.so.1"
    sources = tuple((name, runtime_source(name)) for name in ("emulated_map.h", "emulated_driver.cpp"))
    library.write_bytes(_driver(os.environ.get("CXX", ""), sources, capability, devices))
    return library


@functools.cache
def _driver(_compiler: str, sources: tuple[tuple[str, str], ...], capability: tuple[int, int], devices: int) -> bytes:
    """The driver, compiled; ``sources`` are names and texts."""
    major, minor = capability
    with TemporaryFolder() as folder:
        for name, text in sources:
            Path(folder, name).write_text(text, encoding="utf-8")
        defines = (f"-DMAJOR={major}", f"-DMINOR={minor}", f"-DDEVICES={devices}")
        flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", "-fno-gnu-unique")
        _compile((*flags, *defines, "-o", "libcuda.so.1", "emulated_driver.cpp", "-ldl"), folder)
        return Path(folder, "libcuda.so.1").read_bytes()


# ---- the child --------------------------------------------------------------------------------


def _child(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    library = ctypes.CDLL(job["library"])
    memory: dict[str, npt.NDArray[np.uint8]] = {}
    for name, size in job["sizes"].items():
        if name in job["files"]:
            memory[name] = np.memmap(job["files"][name], np.uint8, "r")
            continue
        room = -(-size // 16) * 16  # as vectors are aligned
        buffer = Guarded(room, job["guard"])
        buffer.bytes.fill(0xFF)  # NaN, in every storage type
        memory[name] = buffer.bytes
        if name not in job["written"]:
            buffer.bytes[:size] = np.load(folder / f"{name}.npy")
            buffer.seal()
    for launch in job["launches"]:
        where = f"{launch['function']}: "
        missing = [name for name in launch["arguments"] if name not in memory]
        if missing:
            sys.exit(f"{where}expected a buffer for {', '.join(missing)}, found none")
        function = getattr(library, f"{launch['function']}_launch")
        function.restype = ctypes.c_char_p
        if getattr(library, f"{launch['function']}_parameters")() != len(launch["arguments"]):
            sys.exit(f"{where}expected its parameters to be {', '.join(launch['arguments'])}, found another number")
        maps = {name: TensorMap(**made) for name, made in launch["maps"].items()}
        values = [_argument(library, memory[name].ctypes.data, maps.get(name)) for name in launch["arguments"]]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        three = ctypes.c_uint * 3
        fault = function(
            three(*launch["grid"]),
            three(*launch["block"]),
            ctypes.c_size_t(launch["shared"]),
            pointers,
            ctypes.c_longlong(job["order"]),
        )
        if fault:
            sys.exit(where + fault.decode())
        for name in job["written"]:
            if (memory[name][job["sizes"][name] :] != 0xFF).any():
                sys.exit(f"{where}writes past the end of {name}")
    for name in job["written"]:
        np.save(folder / f"{name}.npy", memory[name][: job["sizes"][name]])


def _argument(library: ctypes.CDLL, address: int, tensor_map: TensorMap | None) -> Any:
    """A launch's: a pointer, or a map of what is there."""
    if tensor_map is None:
        return ctypes.c_void_p(address)
    storage = np.zeros(128 + 64, np.uint8)  # 128 bytes at a multiple of 64
    encoded = storage[-storage.ctypes.data % 64 :][:128]
    rank, im2col = len(tensor_map.dims), bool(tensor_map.lower)

    def array(kind: Any, values: Sequence[int]) -> Any:
        return (kind * len(values))(*values)

    box = array(ctypes.c_uint32, tensor_map.box)
    shape = [array(ctypes.c_int, tensor_map.lower), array(ctypes.c_int, tensor_map.upper), *box] if im2col else [box]
    function = library.cuTensorMapEncodeIm2col if im2col else library.cuTensorMapEncodeTiled
    refused = function(
        ctypes.c_void_p(encoded.ctypes.data),
        TENSOR_TYPES[tensor_map.dtype],
        rank,
        ctypes.c_void_p(address),
        array(ctypes.c_uint64, tensor_map.dims),
        array(ctypes.c_uint64, tensor_map.strides),
        *shape,
        array(ctypes.c_uint32, tensor_map.steps or (1,) * rank),
        0,
        SWIZZLES[tensor_map.swizzle],
        PROMOTIONS[tensor_map.promotion],
        0,
    )
    if refused:
        sys.exit(f"expected a map within the driver's limits, found {tensor_map}")
    return (ctypes.c_char * 128).from_buffer(encoded.data)


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
