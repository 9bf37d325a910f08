"""Runs kernels for another processor in QEMU's user mode, which takes the place of that processor and of its Linux.

They run between guard pages as :mod:`convgen.check.sandbox` runs others, called by a C program that is compiled with
them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedError
from ..kernel.export import header_text
from ..kernel.kernel import Kernel
from ..kernel.templates import filled
from ..lowering.link import link, link_program
from ..lowering.toolchain import architecture, static_libc
from ..problem.dtypes import UNIT_ROUNDOFF, numpy_dtype
from ..problem.spec import ConvSpec
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
    arch = architecture(kernel.object_file.read_bytes())
    emulator(arch)  # before anything is linked
    (directory / f"{kernel.name}.h").write_text(header_text(kernel.interface), encoding="utf-8")
    path, libc = directory / f"lib{kernel.name}.a", static_libc(arch)
    archive = link(kernel.interface, kernel.object_file, path, archive=True, libc=libc)
    return run_archive(archive, kernel.name, kernel, arch, kernel.interface.isa, cases, directory, timeout)


class Layer(Protocol):
    """A kernel as it is run here."""

    @property
    def spec(self) -> ConvSpec: ...

    @property
    def threads(self) -> int: ...


def run_archive(
    archive: Path,
    name: str,
    kernel: Layer,
    arch: str,
    isa: Sequence[str],
    cases: Mapping[str, Arrays],
    directory: Path,
    timeout: float,
) -> dict[Run, npt.NDArray[Any]]:
    """The same of a static library, which its header lies beside.

    Args:
        name: the prefix of its functions.
        arch, isa: what it is for.
    """
    spec, command = kernel.spec, emulator(arch)
    text = filled(
        "run_kernel.template.c",
        name=name,
        guarded=guarded_text(name),
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
        raise lacking(command, isa)
    shape, dtype = spec.dst_shape, numpy_dtype(spec.dst_dtype)
    return {run: np.fromfile(directory / f"out.{index}", dtype).reshape(shape) for index, run in enumerate(runs)}


def guarded_text(name: str) -> str:
    """What templates of programs that run libraries between guard pages call ``guarded``."""
    return filled("guarded.template.h", name=name).rstrip()


def lacking(command: tuple[str, ...], isa: Sequence[str]) -> UnsupportedError:
    """The error of an emulator that lacks instructions."""
    return UnsupportedError(f"expected an emulator that has {', '.join(isa)}, found {command[0]}, which lacks some")
