"""What an export wrote against ONNX Runtime: a kernel by its manifest, a network by the model that it was compiled
from, or by the example that lies beside it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...check.bounds import apart
from ...check.exported import check_device, files_check, known_schedule, validate_exported
from ...check.validate import Check, Report
from ...errors import ExportError, UnsupportedError
from ...hardware.target import Target, resolve
from ...kernel.library import thread_count
from ...kernel.load import MANIFEST, read_manifest, reading
from ...lowering.interface import TensorInfo
from ...problem.dtypes import numpy_dtype
from ...problem.separable import SeparableSpec
from ..choice import check_accuracy
from ..export import example_file
from ..load import check_network, is_network
from .cross import run_archive
from .guarded import Arrays, Runs, run_guarded
from .validate import Files, NetworkReport, Sized, check_files, labelled, run_files

if TYPE_CHECKING:
    from onnx import ModelProto


def validate_folder(
    directory: str | os.PathLike[str],
    model: str | Path | ModelProto | None = None,
    *,
    threads: int | None = None,
    seed: int = 0,
) -> Report | NetworkReport:
    """Check the library in a folder that an export wrote: the files as the manifest has them, and what the library
    computes, as a kernel or network that was just built is checked.

    Args:
        model: of a network, what it was compiled from: ONNX Runtime's outputs of it are compared. Without it, the
            library's are with those of the example in the folder, unless it is a separable problem of random weights,
            whose model is known.
        threads: what it was made for where None.
        seed: of the inputs.

    Returns:
        What was checked and found; nothing is raised where a check fails.

    Raises:
        ExportError: the folder has no such library, or files in it are not those that its manifest describes.
        UnsupportedError: nothing here runs it; or there is neither a model nor an example.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    if is_network(manifest):
        return _validate_network(folder, manifest, model, threads, seed)
    if model is not None:
        raise UnsupportedError(f"{folder}: model: expected none for a kernel, whose manifest says what it computes")
    return validate_exported(folder, threads=threads, seed=seed)


@dataclass(frozen=True)
class _Exported:
    """A network in a folder: what its manifest says."""

    files: Files
    sizes: list[Sized]
    target: Target
    threads: int
    accuracy: str
    arch: str
    isa: list[str]

    @property
    def where(self) -> str:
        """What it is run in, for people."""
        if self.target.on_device:
            return "in device memory, nothing else written"
        return "between guard pages, inputs read-only" + ", emulated by QEMU" * (not self.target.native)

    def run(self, library: Path, name: str, weights: Path, given: Sequence[Arrays], threads: Sequence[int]) -> Runs:
        """Its runs, here or emulated.

        Raises:
            UnsupportedError: nothing here runs it.
        """
        if self.target.on_device:
            check_device(self.target)
            from .device import run_library  # imports TVM

            return run_library(library, name, weights, given, {})
        if self.target.native:
            return run_guarded(library, name, weights, given, threads)
        archive = library.with_suffix(".a")
        return run_archive(archive, name, weights, self.arch, self.isa, self.sizes, given, threads)


def _read(folder: Path, manifest: Mapping[str, Any], threads: int | None) -> _Exported:
    path = folder / MANIFEST
    name, tuned = check_network(path, manifest)
    with reading(path, "a network"):
        spelling, isa = str(manifest["target"]), [str(feature) for feature in manifest["isa"]]
        arch = str(manifest["needs"]["architecture"])
        sizes = [_sized(path, size) for size in manifest["sizes"]]
        accuracy = str(manifest["accuracy"])
        count = tuned if threads is None else thread_count(threads)
        target = resolve(spelling).on(count)
        check_accuracy(accuracy, on_device=target.on_device)
    where = folder.resolve()
    files = Files(where / f"lib{name}.so", name, where / f"{name}.weights")
    return _Exported(files, sizes, target, count, accuracy, arch, isa)


def _sized(path: Path, size: Mapping[str, Any]) -> Sized:
    def tensors(which: str) -> list[TensorInfo]:
        return [TensorInfo(str(one["name"]), tuple(map(int, one["shape"])), str(one["dtype"])) for one in size[which]]

    kernels = [step for step in size["layers"] if "schedule" in step]
    transformed = {str(step["name"]) for step in kernels if known_schedule(path, step["schedule"]).transforms}
    dims = {str(name): int(value) for name, value in size["dims"].items()}
    return Sized(str(size["label"]), dims, tensors("inputs"), tensors("outputs"), frozenset(transformed))


def _validate_network(
    folder: Path,
    manifest: Mapping[str, Any],
    model: str | Path | ModelProto | None,
    threads: int | None,
    seed: int,
) -> NetworkReport:
    network, files = _read(folder, manifest, threads), files_check(folder, manifest)
    if not files.passed:
        raise ExportError(f"{folder}: {files.found}")
    if model is None and manifest.get("parameters") == "random":
        from ...check.onnx_separable import separable_model

        with reading(folder / MANIFEST, "a network"):
            model = separable_model(SeparableSpec.parse(manifest["spec"]))
    if model is None:
        return _against_example(folder, manifest, network, files)
    how: dict[str, Any] = {"threads": network.threads, "accuracy": network.accuracy, "seed": seed}
    _check_tensors(folder, network.sizes, model)
    return check_files(network.files, network.sizes, model, run=network.run, where=network.where, first=[files], **how)


def _check_tensors(folder: Path, sizes: Sequence[Sized], model: str | Path | ModelProto) -> None:
    """Raise UnsupportedError where a model's inputs and outputs are not the network's."""
    from ..reading import read_graph

    for size in sizes:
        graph = read_graph(model, size.dims)
        for what, infos, names, tensors in (
            ("inputs", size.inputs, graph.inputs, graph.inputs),
            ("outputs", size.outputs, graph.names, graph.outputs),
        ):
            expected = {info.name: info.shape for info in infos}
            found = {name: graph.shapes[tensor] for name, tensor in zip(names, tensors, strict=True)}
            if expected != found:
                raise UnsupportedError(f"{folder}: model: expected the {what} {expected}, found {found}")


def _against_example(folder: Path, manifest: Mapping[str, Any], network: _Exported, files: Check) -> NetworkReport:
    """The library's outputs and those in the files of the example."""
    if "example.c" not in manifest["files"]:
        raise UnsupportedError(f"{folder}: expected the model that it was compiled from, or an example, found neither")
    with reading(folder / MANIFEST, "a network"):
        if "example" not in manifest:
            raise ExportError(
                f"{folder / MANIFEST}: example: expected its tolerance, found none, as in exports of earlier versions: "
                "give the model that it was compiled from"
            )
        tolerance = float(manifest["example"]["tolerance"])
    given = [_values(folder, "input", size, size.inputs) for size in network.sizes]
    checks, runs = run_files(network.files, given, network.threads, network.run, network.where)
    ratio = math.inf if runs is None else 0.0
    for size, found in zip(network.sizes, runs or (), strict=runs is not None):
        expected, made = _values(folder, "output", size, size.outputs), next(iter(found.values()))
        check, error = _compared(made, expected, tolerance)
        checks.append(labelled(size, check))
        ratio = max(ratio, error)
    return NetworkReport(network.files.name, network.threads, (files, *checks), ratio)


def _values(folder: Path, kind: str, size: Sized, tensors: Sequence[TensorInfo]) -> Arrays:
    """Arrays in files such as ``example.input0``, by name."""
    found = {}
    for number, info in enumerate(tensors):
        path = folder / example_file(kind, number, size.label)
        array = np.fromfile(path, numpy_dtype(info.dtype))
        if array.nbytes != info.bytes:
            raise ExportError(f"{path}: expected {info.bytes} bytes, found {array.nbytes}")
        found[info.name] = array.reshape(info.shape)
    return found


def _compared(found: Arrays, expected: Arrays, tolerance: float) -> tuple[Check, float]:
    """Outputs beside the example's, and the largest error as a fraction of what is allowed."""
    differ = [name for name, array in expected.items() if array.tobytes() != found[name].tobytes()]
    if not differ:
        return Check("example", True, f"{len(expected)} outputs are the example's bit for bit"), 0.0
    error = max(apart(found[name], expected[name]) for name in differ)
    text = f"{', '.join(differ)}: {error:.1e} of the largest element away from the example's, {tolerance:g} is allowed"
    return Check("example", error <= tolerance and tolerance > 0, text), error / tolerance if tolerance else math.inf
