"""A model for ONNX Runtime whose convolutions, and what stands between them, convgen computes.

What convgen takes of a model becomes nodes of the domain ``convgen``; the rest stays as it was. A library of custom
operators holds the code of these nodes and their weights, and runs in every program that has ONNX Runtime.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.message import EncodeError

from ..errors import BuildError, ExportError, SpecError, UnsupportedError, by_cause
from ..folders import TemporaryFolder
from ..formats.onnx.file import ModelFile
from ..hardware.target import Target, check_native
from ..kernel.names import check_export_name
from ..lowering.link import link_custom_ops, link_network
from ..lowering.versions import versions
from ..measure.network_model import NetworkModel
from ..network.choice import Choose
from ..network.compile import Built, compile_plans
from ..network.graph import Graph
from ..network.network import plan_graph
from ..network.parts import split
from ..network.plan import Plan, Product
from ..network.reading import identifier, read_partly
from ..network.sizes import Dims, every_size
from ..network.source import Code
from .rewritten import PartNode, rewritten

if TYPE_CHECKING:
    from onnx import ModelProto

#: Most inputs, and most outputs, of an operator (``runtime/onnxruntime.h``).
MOST_VALUES = 256
#: Under which the model's metadata name the library's file.
LIBRARY_KEY = "convgen.library"


@dataclass(frozen=True)
class Part:
    """What became one node.

    Attributes:
        operator: the node's, of the domain ``convgen``.
        inputs, outputs: values of the model.
        convolutions, passes: how many steps it computes, at the first size.
        weights, workspace: bytes; the workspace is a run's, at the size that takes the most.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    convolutions: int
    passes: int
    weights: int
    workspace: int


@dataclass(frozen=True)
class OnnxRuntimeModel:
    """What :func:`convgen.for_onnxruntime` has written.

    Attributes:
        model: the ONNX file.
        library: for ``SessionOptions.register_custom_ops_library``.
        parts: what convgen computes.
        outside: nodes that ONNX Runtime computes, with the reasons.
    """

    model: Path
    library: Path
    parts: tuple[Part, ...]
    outside: Mapping[str, str]

    def compare(self, source: Path, dims: Mapping[str, int]) -> float:
        """How far its outputs are from the original model's, which ONNX Runtime computes without optimisations, in
        parts of the largest element (:func:`convgen.check.bounds.apart`).

        Args:
            dims: sizes of the dimensions that are open, by name.

        Raises:
            UnsupportedError: the original cannot be run here, or has outputs that are not finite.
            BuildError: ONNX Runtime does not run what was made.
        """
        import onnxruntime

        original = NetworkModel(source, dims)
        try:
            expected = list(original.expected)
        except Exception as error:  # of ONNX Runtime's own kinds
            raise UnsupportedError(str(error)) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        try:
            options.register_custom_ops_library(str(self.library))
            session = onnxruntime.InferenceSession(str(self.model), options, providers=["CPUExecutionProvider"])
            return original.error(session.run(expected, original.inputs))
        except Exception as error:  # likewise
            raise BuildError(f"{self.model}: ONNX Runtime does not run it: {error}") from error


def write_for_onnxruntime(
    source: str | Path | ModelProto,
    out: str | Path,
    target: Target,
    threads: int,
    *,
    dims: Dims | None = None,
    accuracy: str = "standard",
    choose: Choose | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OnnxRuntimeModel:
    """See :func:`convgen.for_onnxruntime`.

    Args:
        choose: the candidate of a convolution, where something better than the default is known.
    """
    check_native(target)
    sizes = every_size(dims or {})
    path, library = _checked(source, Path(os.path.abspath(out)))
    name = check_export_name(identifier(path.stem))  # before the minutes that compiling may take
    parts, outside = _parts(source, sizes, name)
    nodes = [PartNode.of(part) for part in parts]
    plans = [[plan_graph(graph, target, accuracy, choose) for graph in part] for part in parts]
    with TemporaryFolder(runs=True) as folder:
        built = _compiled(plans, target, folder, progress)
        nodes = [replace(node, operator=operator(made.code)) for node, made in zip(nodes, built, strict=True)]
        facts = {LIBRARY_KEY: library.name, "convgen.versions": json.dumps(versions(), sort_keys=True)}
        with ModelFile(source) as file:
            # What has one size only is written into the model; the rest stays open.
            known = {dim: size for dim, size in sizes[0].items() if all(other[dim] == size for other in sizes)}
            model = rewritten(file, known, nodes, facts)
        _write(model, built, threads, folder, path, library)
    made = tuple(map(_facts, nodes, plans, built, [threads] * len(nodes)))
    return OnnxRuntimeModel(path, library, made, outside)


def _parts(
    source: str | Path | ModelProto, sizes: Sequence[Mapping[str, int]], name: str
) -> tuple[list[list[Graph]], dict[str, str]]:
    """Each part at every size, and what is outside of all."""
    found: list[list[Graph]] = []
    outside: dict[str, str] = {}
    for size in sizes:
        with ModelFile(source) as file:
            read = read_partly(file, size)
        parts = split(read.graph, read.outside, name, read.types)
        for part in parts.networks:
            part.dims = dict(size)
        found.append(parts.networks)
        outside |= {node.name: node.reason for node in read.outside} | parts.outside
        if _ends(found[0]) != _ends(parts.networks):
            raise UnsupportedError(f"dims: expected the same parts at every size, found others at {size}")
    if not found[0]:
        reasons = "; ".join(f"{node}: {reason}" for node, reason in by_cause(outside).items())
        raise UnsupportedError(f"{file.where}: expected something that is taken, found nothing: {reasons}")
    return [list(part) for part in zip(*found, strict=True)], outside


def _ends(parts: Sequence[Graph]) -> list[tuple[list[str], list[str]]]:
    return [(part.inputs, part.outputs) for part in parts]


def operator(code: Code) -> str:
    """The operator that a network is: its name has a digest of its code, so that no other library's is taken for it."""
    return f"{code.name}_{code.identity[:16]}"


def _checked(source: str | Path | ModelProto, path: Path) -> tuple[Path, Path]:
    """Where to write the model, and its library.

    Raises:
        ExportError: something is there that was not written here.
    """
    if path.suffix != ".onnx":
        raise ExportError(f"{path}: expected a name that ends in .onnx, found {path.name!r}")
    library = path.with_name(f"lib{path.stem}.so")
    for file in (path, library):
        if file.exists() and not file.is_file():
            raise ExportError(f"{file}: expected a file or nothing, found a directory")
    is_file = isinstance(source, str | os.PathLike) and path.exists() and os.path.exists(source)
    if is_file and os.path.samefile(source, path):
        raise ExportError(f"{path}: expected another file than the model itself")
    if path.exists() and not _is_written_here(path, library):
        raise ExportError(f"{path}: expected an earlier model of convgen's or nothing, found another file")
    if library.exists() and not path.exists():
        raise ExportError(
            f"{library}: expected it beside the {path.name} that it belongs to or nothing, found it alone"
        )
    return path, library


def _is_written_here(path: Path, library: Path) -> bool:
    """Whether a file is a model that was written with a library of that name."""
    try:
        with ModelFile(path) as file:
            entries = {entry.key: entry.value for entry in file.proto.metadata_props}
    except SpecError:
        return False
    return entries.get(LIBRARY_KEY) == library.name


def _compiled(
    parts: Sequence[Sequence[Plan]], target: Target, folder: Path, progress: Callable[[int, int], None] | None
) -> list[Built]:
    counts = [len({step.function for plan in plans for step in plan.steps}) for plans in parts]
    built: list[Built] = []
    for number, plans in enumerate(parts):

        def told(done: int, _: int, before: int = sum(counts[:number])) -> None:
            if progress is not None:
                progress(before + done, sum(counts))

        built.append(compile_plans(plans, target, folder, told))
    return built


def _write(model: ModelProto, built: Sequence[Built], threads: int, folder: Path, path: Path, library: Path) -> None:
    """Both files or none."""
    archives = [
        link_network(made.code.name, made.entry, made.objects, folder / f"lib{made.code.name}.a", archive=True)
        for made in built
    ]
    try:
        data = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ExportError(f"{path}: expected a model below 2 GiB, found {error}") from error
    try:
        existing = next(parent for parent in path.parents if parent.exists())
        with TemporaryFolder(existing) as beside:
            entry = entry_source([made.code for made in built], threads)
            link_custom_ops(entry, [made.weights for made in built], archives, beside / library.name)
            (beside / path.name).write_bytes(data)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / library.name, library)
            os.replace(beside / path.name, path)
    except OSError as error:
        raise ExportError(f"{path}: cannot write the model or its library: {error}") from error


def _facts(node: PartNode, plans: Sequence[Plan], built: Built, threads: int) -> Part:
    code, steps = built.code, plans[0].steps
    convolutions = sum(isinstance(step.function, Product) for step in steps)
    return Part(
        operator=node.operator,
        inputs=node.inputs,
        outputs=node.outputs,
        convolutions=convolutions,
        passes=len(steps) - convolutions,
        weights=code.weights,
        workspace=max(size.fixed + threads * size.workspace_task for size in code.sizes),
    )


def entry_source(codes: Sequence[Code], threads: int) -> str:
    """The C file that makes networks operators; see :func:`~convgen.lowering.link.link_custom_ops`.

    Raises:
        BuildError: a network has more inputs or outputs than operators may have.
    """
    lines = ['#include "onnxruntime.h"', ""]
    for number, code in enumerate(codes):
        counts = len(code.inputs), len(code.outputs)
        if max(counts) > MOST_VALUES:
            raise BuildError(f"{code.name}: expected at most {MOST_VALUES} inputs and outputs, found {max(counts)}")
        weights = f"weights{number}, weights{number}_end"
        lines.append(
            f'CONVGEN_ORT_OP({code.name}, "{operator(code)}", {threads}, {counts[0]}, {counts[1]}, {weights});'
        )
    return "\n".join(
        [
            *lines,
            "",
            "static const convgen_ort_op *const ops[] = {",
            *(f"    &{code.name}," for code in codes),
            "};",
            "",
            f"CONVGEN_ORT_REGISTER(ops, {len(codes)})",
            "",
        ]
    )
