"""A CUDA driver made up, and kernels whose device code is none."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from naive import compile_naive

from convgen.kernel.cuda_library import CudaLibrary, _RunArgs
from convgen.lowering.interface import DeviceCode, Interface, Launch
from convgen.problem.spec import ConvSpec

SPEC = ConvSpec.parse("conv2d n2 ic3 oc5 i20x20 k3x3 p1 relu residual")


PLAIN = ConvSpec.parse("conv2d n1 ic3 oc5 i9x9 k3x3")


#: Two launches that hand two buffers to each other.
DEVICE = DeviceCode(
    images=(("sm_90a", b"CUBIN90a"), ("sm_80", b"CUBIN80"), ("sm_86", b"CUBIN86".ljust(64)), ("compute_80", b"PTX80")),
    launches=(
        Launch("first", (3, 2, 1), (128, 1, 1), 70000, ("src", "packed0", "workspace0", "workspace1")),
        Launch("second", (4, 1, 5), (64, 2, 3), 0, ("workspace1", "residual", "packed1", "dst")),
    ),
    workspace=(100, 300),
)


SIMPLE = DeviceCode(
    images=(("sm_90", b"CUBIN90"),), launches=(Launch("only", (2, 1, 1), (32, 1, 1), 512, ("src", "packed0", "dst")),)
)


STRICT = ("-std=c11", "-Wall", "-Wextra", "-Werror")


(OK, NULL_POINTER, WRONG_SIZE, MISALIGNED, WRONG_PACKED, _, OVERLAP) = range(7)


NO_DRIVER, NO_CONTEXT, NO_IMAGE, DRIVER_ERROR = range(32, 36)


def compile_cuda(spec: ConvSpec, folder: Path, device_code: DeviceCode, name: str = "kernel") -> tuple[Interface, Path]:
    """A kernel whose pack is real and whose device code is not."""
    interface, path = compile_naive(spec, folder, name=name)
    return dataclasses.replace(interface, workspace_main=0, workspace_task=0, device=device_code), path


class Fake:
    """The driver of ``fake_cuda_driver.c``."""

    def __init__(self, path: Path) -> None:
        self.path, self._dll = path, ctypes.CDLL(str(path))
        self._dll.fake_log.restype = ctypes.c_char_p

    @property
    def log(self) -> list[str]:
        log: bytes = self._dll.fake_log()
        return log.decode().splitlines()

    def reset(self) -> None:
        self._dll.fake_reset()
        for function, count in (("first", 4), ("second", 4), ("only", 3)):
            self._dll.fake_parameters(function.encode(), count)

    def capability(self, major: int, minor: int, number: int = 0) -> None:
        self._dll.fake_capability(number, major, minor)

    def fail(self, function: str, error: int) -> None:
        self._dll.fake_fail(function.encode(), error)

    def context(self, number: int = 0) -> int:
        """A new context of a device, made current."""
        made = self._dll.fake_context(number)
        self.current(made)
        return int(made)

    def current(self, number: int) -> None:
        """-1: none."""
        self._dll.fake_current(number)

    def destroy(self, number: int) -> None:
        self._dll.fake_destroy(number)


class Buffers:
    """The buffers of a call, in memory the fake driver takes for a device's, and their struct."""

    def __init__(self, library: CudaLibrary) -> None:
        self.sizes = library.sizes()
        self.args = _RunArgs()
        self.memory = {}
        for name in ("src", "packed", "residual", "dst", "workspace"):
            size = getattr(self.sizes, name)
            raw = np.zeros(size + 512, np.uint8)
            self.memory[name] = raw[-raw.ctypes.data % 256 :]
            if size:
                setattr(self.args, name, self.memory[name].ctypes.data)
                setattr(self.args, f"{name}_size", size)

    def address(self, name: str, offset: int = 0) -> str:
        return f"{self.memory[name].ctypes.data + offset:#x}"


def packed_offsets(library: CudaLibrary) -> tuple[int, ...]:
    """Where the packed tensors of SPEC's naive kernel lie: the weights, then the bias."""
    weights = -(-library.sizes().weights // 64) * 64
    return 64, 64 + weights


def run(library: CudaLibrary, args: Any) -> int:
    return int(library._run(ctypes.byref(args)))
