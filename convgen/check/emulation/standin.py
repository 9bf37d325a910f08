"""A kernel's library with emulated device code, for machines without a GPU that runs the real one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...cuda.code import generate
from ...lowering.interface import DeviceCode, Interface, read_architecture
from ...lowering.link import link
from ...lowering.lower import Lowered
from .emulate import compile_emulated, emulated_driver


def emulated_code(lowered: Lowered, directory: Path) -> DeviceCode:
    """What an emulated device runs of a candidate.

    Raises:
        BuildError: there is no C++ compiler, or it failed.
    """
    source = generate(lowered)
    code = compile_emulated(source.text, directory).read_bytes()
    return DeviceCode(((lowered.target.arch, code),), source.launches, source.workspace)


def emulated_library(lowered: Lowered, interface: Interface, object_file: Path, directory: Path) -> tuple[Path, Path]:
    """The library, and the driver that ``CONVGEN_CUDA_DRIVER`` must name where it runs.

    All but the instructions is the kernel's own: its packing, its launches, its CUDA source.

    Raises:
        BuildError: there is no C++ compiler, or it failed.
    """
    arch = read_architecture(lowered.target.arch)
    library = directory / f"lib{interface.name}-emulated.so"
    link(dataclasses.replace(interface, device=emulated_code(lowered, directory)), object_file, library)
    return library, emulated_driver(directory, (arch.major, arch.minor))
