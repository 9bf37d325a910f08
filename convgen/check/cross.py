"""Runs kernels for another processor in QEMU's user mode, which takes the place of that processor and of its Linux.

They run between guard pages as :mod:`convgen.check.sandbox` runs others, called by a C program that is compiled with
them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedError
from ..kernel.export import header_text
from ..kernel.kernel import Kernel
from ..kernel.templates import filled
from ..lowering.link import link, link_program
from ..lowering.toolchain import architecture, static_libc
from ..problem.dtypes import UNIT_ROUNDOFF, numpy_dtype
from .data import Arrays
from .sandbox import Run, run_child, runs_of

#: The exit status of a program that finds that its CPU lacks instructions (``runtime/guarded.template.h``).
UNSUPPORTED = 3


def emulator(arch: str) -> tuple[str, ...]:
    """The command that runs programs for an architecture: what ``QEMU_AARCH64``, say, names, else ``qemu-aarch64``,
    with every instruction that it knows.

    Raises:
        UnsupportedError: it is not installed.
    """
    program = os.environ.get(f"QEMU_{arch.upper()}") or f"qemu-{arch}"
    if shutil.which(program) is None:
        hint = "install it (Debian: apt install qemu-user)"
        raise UnsupportedError(f"expected {program}, which runs code for {arch} here, found none: {hint}")
    return program, "-cpu", "max"


def run_emulated(
    kernel: Kernel, cases: Mapping[str, Arrays], directory: Path, timeout: float
) -> dict[Run, npt.NDArray[Any]]:
    """The output for each case, as :func:`~convgen.check.sandbox.run_guarded` has it, of a kernel for another CPU.

    Raises:
        UnsupportedError: there is no emulator for its architecture, or it lacks instructions.
        MeasureError: the program was killed, ran longer than ``timeout`` seconds, or the kernel refused a call.
        BuildError: there is no C compiler for its architecture.
    """
    spec, arch = kernel.spec, architecture(kernel.object_file.read_bytes())
    command = emulator(arch)
    (directory / f"{kernel.name}.h").write_text(header_text(kernel.interface), encoding="utf-8")
    archive = link(
        kernel.interface, kernel.object_file, directory / f"lib{kernel.name}.a", archive=True, libc=static_libc(arch)
    )
    text = filled(
        "run_kernel.template.c",
        name=kernel.name,
        guarded=guarded_text(kernel.name),
        other_fill="0xff" if spec.dst_dtype in UNIT_ROUNDOFF else "0x55",
    )
    program = link_program(text, archive, arch, directory / "run")
    for case, arrays in cases.items():
        for tensor, array in arrays.items():
            np.ascontiguousarray(array).tofile(directory / f"{case}.{tensor}")
    runs = runs_of(cases, kernel.threads)
    words = [word for run in runs for word in (run.case, str(run.threads), run.guard)]
    command = (*command, str(program), *words)
    if run_child(command, spec.descriptor, runs, timeout, {}, folder=directory, allowed=UNSUPPORTED) == UNSUPPORTED:
        raise lacking(command, kernel.interface.isa)
    shape, dtype = spec.dst_shape, numpy_dtype(spec.dst_dtype)
    return {run: np.fromfile(directory / f"out.{index}", dtype).reshape(shape) for index, run in enumerate(runs)}


def guarded_text(name: str) -> str:
    """What templates of programs that run libraries between guard pages call ``guarded``."""
    return filled("guarded.template.h", name=name).rstrip()


def lacking(command: tuple[str, ...], isa: tuple[str, ...]) -> UnsupportedError:
    """The error of an emulator that lacks instructions."""
    return UnsupportedError(f"expected an emulator that has {', '.join(isa)}, found {command[0]}, which lacks some")
