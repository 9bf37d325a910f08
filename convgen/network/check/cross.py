"""Runs a network for another processor in QEMU's user mode, as :mod:`convgen.network.check.guarded` runs others."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ...check.cross import UNSUPPORTED, emulator, guarded_text, lacking
from ...check.sandbox import run_child
from ...folders import TemporaryFolder
from ...kernel.templates import filled
from ...lowering.interface import TensorInfo
from ...lowering.link import link_network, link_program
from ...lowering.toolchain import static_libc
from ...problem.dtypes import numpy_dtype
from ..compile import Built
from ..export import header_text
from .guarded import Arrays, Runs

#: Seconds that the runs of one network may take in the emulator.
SECONDS = 3600.0


def run_emulated(built: Built, inputs: Sequence[Arrays], threads: Sequence[int]) -> Runs:
    """The outputs, at each of a network's sizes, of a run on each number of threads, with guard pages at the end of
    buffers and at their beginning in turn.

    Raises:
        UnsupportedError: there is no emulator for its architecture, or it lacks instructions.
        MeasureError: the program was killed, or did not answer in time.
        BuildError: there is no C compiler for the architecture.
    """
    code = built.code
    emulator(code.arch)  # before anything is linked
    with TemporaryFolder(runs=True) as folder:
        (folder / f"{code.name}.h").write_text(header_text(code), encoding="utf-8")
        path, libc = folder / f"lib{code.name}.a", static_libc(code.arch)
        archive = link_network(code.name, built.entry, built.objects, path, code.arch, archive=True, libc=libc)
        return run_archive(archive, code.name, built.weights, code.arch, code.isa, code.sizes, inputs, threads)


class Tensors(Protocol):
    """A network's at one of its sizes."""

    @property
    def inputs(self) -> Sequence[TensorInfo]: ...

    @property
    def outputs(self) -> Sequence[TensorInfo]: ...


def run_archive(
    archive: Path,
    name: str,
    weights: Path,
    arch: str,
    isa: Sequence[str],
    sizes: Sequence[Tensors],
    inputs: Sequence[Arrays],
    threads: Sequence[int],
) -> Runs:
    """The same of a static library, which its header lies beside.

    Args:
        name: the prefix of its functions.
        arch, isa: what it is for.
    """
    command = emulator(arch)
    ways = [
        (size, count, ("end", "start")[number % 2])
        for size in range(len(sizes))
        for number, count in enumerate(threads)
    ]
    with TemporaryFolder(runs=True) as folder:
        parts = {"inputs": len(sizes[0].inputs), "outputs": len(sizes[0].outputs)}
        text = filled("run_network.template.c", name=name, guarded=guarded_text(name), **parts)
        program = link_program(text, archive, arch, folder / "run")
        shutil.copyfile(weights, folder / f"{name}.weights")
        for size, arrays in enumerate(inputs):
            for number, info in enumerate(sizes[size].inputs):
                np.ascontiguousarray(arrays[info.name]).tofile(folder / f"{size}.input{number}")
        names = [f"{count} threads, guard page at the {guard}" for _, count, guard in ways]
        words = [str(word) for way in ways for word in way]
        command = (*command, str(program), *words)
        if run_child(command, name, names, SECONDS, {}, folder=folder, allowed=UNSUPPORTED) == UNSUPPORTED:
            raise lacking(command, isa)
        found: Runs = [{} for _ in sizes]
        for index, ((size, _, _), way) in enumerate(zip(ways, names, strict=True)):
            found[size][way] = {
                info.name: np.fromfile(folder / f"out.{index}.{number}", numpy_dtype(info.dtype)).reshape(info.shape)
                for number, info in enumerate(sizes[size].outputs)
            }
        return found
