"""Runs a network for another processor in QEMU's user mode, as :mod:`convgen.network.check.guarded` runs others."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import numpy as np

from ...check.cross import UNSUPPORTED, emulator, guarded_text, lacking
from ...check.sandbox import run_child
from ...folders import TemporaryFolder
from ...kernel.templates import filled
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
    command = emulator(code.arch)
    ways = [
        (size, count, ("end", "start")[number % 2])
        for size in range(len(code.sizes))
        for number, count in enumerate(threads)
    ]
    with TemporaryFolder(runs=True) as folder:
        (folder / f"{code.name}.h").write_text(header_text(code), encoding="utf-8")
        path, libc = folder / f"lib{code.name}.a", static_libc(code.arch)
        archive = link_network(code.name, built.entry, built.objects, path, code.arch, archive=True, libc=libc)
        parts = {"inputs": len(code.inputs), "outputs": len(code.outputs)}
        text = filled("run_network.template.c", name=code.name, guarded=guarded_text(code.name), **parts)
        program = link_program(text, archive, code.arch, folder / "run")
        shutil.copyfile(built.weights, folder / f"{code.name}.weights")
        for size, arrays in enumerate(inputs):
            for number, info in enumerate(code.sizes[size].inputs):
                np.ascontiguousarray(arrays[info.name]).tofile(folder / f"{size}.input{number}")
        names = [f"{count} threads, guard page at the {guard}" for _, count, guard in ways]
        words = [str(word) for way in ways for word in way]
        command = (*command, str(program), *words)
        if run_child(command, code.name, names, SECONDS, {}, folder=folder, allowed=UNSUPPORTED) == UNSUPPORTED:
            raise lacking(command, code.isa)
        found: Runs = [{} for _ in code.sizes]
        for index, ((size, _, _), name) in enumerate(zip(ways, names, strict=True)):
            found[size][name] = {
                info.name: np.fromfile(folder / f"out.{index}.{number}", numpy_dtype(info.dtype)).reshape(info.shape)
                for number, info in enumerate(code.sizes[size].outputs)
            }
        return found
