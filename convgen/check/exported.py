"""An exported kernel against ONNX Runtime: the library as it lies in its folder, by what the manifest says of it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cuda.driver import device
from ..errors import ExportError, UnsupportedError
from ..hardware.target import Target, resolve
from ..kernel.library import thread_count
from ..kernel.load import MANIFEST, Described, changed_files, described, load, read_manifest, reading
from ..lowering.discover import schedules
from ..lowering.schedule import Candidate, Picks
from ..problem.spec import ConvSpec
from .bounds import Stored
from .cross import run_archive
from .data import Arrays
from .sandbox import Run
from .validate import Check, Report, check_outputs, emulated_seconds, run_library


@dataclass(frozen=True)
class ExportedKernel:
    """A kernel in a folder.

    Attributes:
        threads: that it is checked on.
        target, candidate: what it was built for, and how it computes.
        isa: instructions that it needs.
        made: what the manifest says of its library.
    """

    folder: Path
    threads: int
    target: Target
    candidate: Candidate
    arch: str
    isa: Sequence[str]
    made: Described

    @property
    def spec(self) -> ConvSpec:
        return self.made.spec

    def bind(self, weights: object = None, bias: object = None, slope: object = None, **others: Any) -> Any:
        """A layer of the library, loaded now."""
        return load(self.folder, self.threads).bind(weights, bias, slope, **others)

    def outputs(self, cases: dict[str, Arrays], directory: Path) -> tuple[dict[Run, Stored], str]:
        """The library's outputs, and, as the end of a sentence, what emulated it.

        Raises:
            UnsupportedError: nothing here runs it.
        """
        name = self.made.name
        if self.target.on_device:
            check_device(self.target)
        elif not self.target.native:
            archive = self.folder.resolve() / f"lib{name}.a"
            found = run_archive(archive, name, self, self.arch, self.isa, cases, directory, emulated_seconds(self.spec))
            return found, ", emulated by QEMU"
        return run_library(self, self.folder.resolve() / self.made.file, name, None, cases, directory)


def check_device(target: Target) -> None:
    """Raise:
    UnsupportedError: this machine has no GPU that runs a target's code, compiled as it is.
    """
    found = device()
    if not target.native or found is None or found.emulated:
        raise UnsupportedError(f"{target}: expected a GPU that runs the exported code, found none")


def read_kernel(folder: Path, manifest: Mapping[str, Any], threads: int | None = None) -> ExportedKernel:
    """The kernel that an export wrote; ``threads`` is what it was made for where None.

    Raises:
        ExportError: the manifest is none of a kernel.
        UnsupportedError: its target, or its schedule as it was, is not known here.
    """
    path = folder / MANIFEST
    made = described(path, manifest)
    with reading(path, "a library"):
        spelling, name = str(manifest["target"]), str(manifest["schedule"])
        version, picks = manifest["schedule_version"], Picks(**manifest["picks"])
        isa, arch = [str(feature) for feature in manifest["isa"]], str(manifest["needs"]["architecture"])
    schedule = known_schedule(path, name)
    if schedule.transforms and schedule.version != version:
        raise UnsupportedError(
            f"{path}: schedule_version: expected {schedule.version} of {name}, whose bounds are known, found "
            f"{version!r}: build the layer again"
        )
    count = made.threads if threads is None else thread_count(threads)
    target = resolve(spelling).on(count)
    return ExportedKernel(folder, count, target, Candidate(schedule, picks), arch, isa, made)


def known_schedule(path: Path, name: str) -> Any:
    """A schedule that a manifest names.

    Raises:
        UnsupportedError: there is none.
    """
    known = schedules()
    if name not in known:
        raise UnsupportedError(f"{path}: schedule: expected one of {', '.join(known)}, found {name!r}")
    return known[name]


def files_check(folder: Path, manifest: Mapping[str, Any]) -> Check:
    """Whether all files are those that the manifest describes."""
    changed = changed_files(folder, manifest)
    return Check("files", not changed, "; ".join(changed) or f"{len(manifest['files'])} are as {MANIFEST} has them")


def validate_exported(directory: str | os.PathLike[str], *, threads: int | None = None, seed: int = 0) -> Report:
    """Check the library of a kernel in the folder that an export wrote, as :func:`convgen.check.validate.validate`
    checks one that was just built, and that its files are those of the manifest. What is not of the manifest is not
    run.

    Args:
        threads: what it was made for where None.

    Raises:
        ExportError: there is no kernel.
        UnsupportedError: nothing here runs its code, or this convgen does not know its schedule any more.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    kernel, files = read_kernel(folder, manifest, threads), files_check(folder, manifest)
    repro = f"convgen validate {shlex.quote(str(folder))} --threads {kernel.threads} --seed {seed}"
    if not files.passed:
        raise ExportError(f"{folder}: {files.found}")
    return check_outputs(kernel, kernel.outputs, seed, repro, [files])
