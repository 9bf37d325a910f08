"""Building and measuring candidates for GPUs; :mod:`convgen.measure.trial` does it for CPUs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check.emulation.standin import emulated_code
from ..cuda.code import Resources, compile_images, device_code, generate
from ..cuda.driver import device
from ..cuda.model import REGISTERS
from ..errors import ResourceError
from ..hardware.target import Target
from ..kernel.mapped import open_library
from ..lowering.interface import DeviceCode
from ..lowering.lower import Lowered
from .standalone.gpu import Gpu, GpuCall

#: Threads of a warp; registers are given to warps in units of ``_UNIT``.
_WARP, _UNIT = 32, 256


def measured_code(lowered: Lowered, directory: Path) -> DeviceCode:
    """A candidate's code, to be measured; for the emulated device where this machine has one.

    Raises:
        ResourceError: it takes more of the device than it may.
        UnsupportedError, BuildError: see :func:`~convgen.cuda.code.compile_images`.
    """
    source = generate(lowered)
    images, resources = compile_images(source, lowered.target)
    check_resources(resources, lowered.target)
    if _is_emulated():
        return emulated_code(lowered, directory)
    return DeviceCode(images, source.launches, source.workspace)


def runnable_code(lowered: Lowered, directory: Path) -> DeviceCode:
    """A candidate's code for this machine's device, whatever it takes of it.

    Raises:
        UnsupportedError, BuildError: see :func:`~convgen.cuda.code.compile_images`.
    """
    return emulated_code(lowered, directory) if _is_emulated() else device_code(lowered)


def _is_emulated() -> bool:
    here = device()
    return here is not None and here.emulated


def check_resources(resources: Sequence[Resources], target: Target) -> None:
    """Refuse what cannot be launched, and what is slow for certain.

    Raises:
        ResourceError: values are spilled from registers to memory, or a block does not fit; names the function.
    """

    def expect(condition: bool, function: str, expected: str, found: object) -> None:
        if not condition:
            raise ResourceError(f"{function}: expected {expected}, found {found}")

    for used in resources:
        name, most = used.function, target.shared_memory
        expect(not used.spilled, name, "all values in registers", f"{used.spilled} bytes spilled")
        warps = -(-used.threads // _WARP)
        registers = warps * -(-used.registers * _WARP // _UNIT) * _UNIT
        expect(registers <= REGISTERS, name, f"at most {REGISTERS} registers of a block", registers)
        expect(used.shared <= most, name, f"at most {most} bytes of shared memory", used.shared)


# ---- in workers --------------------------------------------------------------------------------


@functools.cache
def gpu() -> Gpu:
    """This process's GPU."""
    return Gpu()


def prepare(path: str, name: str, data: Mapping[str, npt.NDArray[Any]]) -> GpuCall:
    """A library's kernel on copies of these tensors."""
    return GpuCall(gpu(), open_library(path), name, {tensor: _bytes(array) for tensor, array in data.items()})


def output(call: GpuCall, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What a call wrote, of another array's type and shape."""
    return np.frombuffer(call.output(), np.uint8).view(like.dtype).reshape(like.shape)


def _bytes(array: npt.NDArray[Any]) -> Any:
    """An array's bytes as ctypes takes them."""
    flat = np.array(array).reshape(-1).view(np.uint8)
    return (ctypes.c_char * flat.size).from_buffer(flat.data)
