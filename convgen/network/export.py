"""Writes a network's library: shared and static, its weights, a C header, a manifest, and an example that checks it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError
from ..folders import TemporaryFolder
from ..kernel.arrays import Array, drawn
from ..kernel.cuda_library import TENSOR_ALIGNMENT
from ..kernel.destination import check_destination, move
from ..kernel.export import devices_text, write_manifest
from ..kernel.load import MANIFEST
from ..kernel.names import check_export_name
from ..kernel.packages import Package, package_files
from ..kernel.templates import (
    byte_constants,
    element_constants,
    example_driver,
    example_helpers,
    filled,
    header_parts,
    needed_cpu,
    workspace_constant,
)
from ..lowering.interface import ABI, ALIGNMENT, DeviceCode, TensorInfo
from ..lowering.link import link_device_network, link_network
from ..lowering.runtime import source
from ..lowering.stack import STACK
from ..measure.standalone.words import printable
from .compile import Built
from .cuda_library import DEVICE_KIND, DEVICE_NETWORK_ABI
from .device import images_of
from .library import KIND, NETWORK_ABI
from .source import Code, Size


@dataclass(frozen=True)
class Example:
    """What ``example.c`` compares with.

    Attributes:
        outputs: computes the outputs, in their order, of inputs by name.
        tolerance: how far they may be from the library's, as a fraction of the largest; 0 where they are its own.
    """

    outputs: Callable[[Mapping[str, Array]], Sequence[Array]]
    tolerance: float


def write_network(
    directory: str | os.PathLike[str],
    built: Built,
    example: Example | None,
    layers: Sequence[Sequence[Mapping[str, Any]]],
    facts: Mapping[str, Any],
    seed: int = 0,
    libc: str | None = None,
) -> dict[str, Any]:
    """Write ``lib<name>.so``, ``lib<name>.a``, ``<name>.h``, ``<name>.weights``, a CMake package, a pkg-config file,
    ``manifest.json``, and ``example.c`` with inputs and outputs.

    All of it or nothing; an earlier export of the same name is replaced.

    Args:
        example: the outputs that are written; neither these nor ``example.c`` where None.
        layers: of each size, its steps as JSON values.
        facts: what else the manifest says, as JSON values.
        seed: of the example's inputs.
        libc: the C library that it is for, ``musl`` or ``glibc-2.28``, say; the compiler's own where None.

    Returns:
        The manifest.

    Raises:
        ExportError: the directory holds something else, or cannot be written; the name is taken.
        BuildError: linking failed.
    """
    code = built.code
    check_export_name(code.name)
    target = Path(os.path.abspath(directory))
    try:
        names = [*_file_names(code, example), MANIFEST]
        check_destination(target, code.name, names)
        existing = next(parent for parent in target.parents if parent.exists())
        with TemporaryFolder(existing) as temporary:
            folder = temporary / target.name
            folder.mkdir()  # with the usual permissions
            _write_files(folder, built, example, seed, libc)
            package = _package(built)
            package.write(folder, libc)
            needs = package.needs(folder / f"lib{code.name}.so", libc)
            shown = None if example is None else {"tolerance": example.tolerance}
            manifest = _manifest(code, layers, {"needs": needs, "example": shown}, facts, bool(built.device))
            write_manifest(folder, manifest, [folder / name for name in _file_names(code, example)])
            move(folder, target, code.name, names)
    except OSError as error:
        raise ExportError(f"{target}: cannot write the network {code.name}: {error}") from error
    return manifest


def check_folder(directory: str | os.PathLike[str], name: str) -> None:
    """Whether a network's library of that name may be exported to a folder, before the minutes that making it may take.

    Raises:
        ExportError: something else is there.
    """
    check_destination(Path(os.path.abspath(directory)), name, [*_own_files(name), MANIFEST])


def _own_files(name: str) -> list[str]:
    return [f"lib{name}.so", f"lib{name}.a", f"{name}.h", f"{name}.weights", *package_files(name)]


def _file_names(code: Code, example: Example | None) -> list[str]:
    files = _own_files(code.name)
    if example is None:
        return files
    files.append("example.c")
    for size in code.sizes:
        files += [example_file("input", number, size.label) for number in range(len(size.inputs))]
        files += [example_file("output", number, size.label) for number in range(len(size.outputs))]
    return files


def example_file(kind: str, number: int, label: str) -> str:
    """The file of an example's input or output: ``example.input0``, of several sizes ``example.input0.N4``."""
    return f"example.{kind}{number}{'.' * bool(label)}{label}"


def _package(built: Built) -> Package:
    code = built.code
    description, weights = f"the network {code.name}", f"{code.name}.weights"
    if built.device:
        version, libraries = f"{ABI}.{DEVICE_NETWORK_ABI}", ("m", "pthread", "dl")
        return Package(code.name, version, description, code.arch, libraries, weights=weights)
    return Package(code.name, f"{ABI}.{NETWORK_ABI}", description, code.arch, weights=weights)


def _write_files(folder: Path, built: Built, example: Example | None, seed: int, libc: str | None) -> None:
    code = built.code
    shared, archive = folder / f"lib{code.name}.so", folder / f"lib{code.name}.a"
    if libc is None:
        shutil.copyfile(built.library, shared)
        shared.chmod(0o755)
    else:
        _link(built, shared, libc=libc)
    _link(built, archive, archive=True, libc=libc)
    shutil.copyfile(built.weights, folder / f"{code.name}.weights")
    text = header_text(code, has_example=example is not None, device=built.device)
    (folder / f"{code.name}.h").write_text(text, encoding="utf-8")
    if example is not None:
        _write_example(folder, built, example, seed)


def _link(built: Built, out: Path, **how: Any) -> None:
    code = built.code
    if built.device:
        images = images_of(built.device)
        link_device_network(code.name, built.entry, images, out, **how)
    else:
        link_network(code.name, built.entry, built.objects, out, code.arch, **how)


def _write_example(folder: Path, built: Built, example: Example, seed: int) -> None:
    """A program, and for each size its inputs and outputs."""
    code = built.code
    if built.device:
        calls = filled("example_network_cuda.template.c", name=code.name, driver=example_driver(code.name))
    else:
        calls = filled("example_network_cpu.template.c", name=code.name)
    text = filled(
        "example_network.template.c",
        name=code.name,
        helpers=example_helpers(code.name),
        calls=calls.rstrip(),
        libraries="-lm -lpthread -ldl" if built.device else "-lm -lpthread",
        inputs=len(code.inputs),
        outputs=len(code.outputs),
        sizes=len(code.sizes),
        label=f".{code.sizes[0].label}" if code.sizes[0].label else "",
        labels=", ".join(f'"{size.label}"' for size in code.sizes),
        tolerance=repr(float(example.tolerance)),
    )
    (folder / "example.c").write_text(text, encoding="utf-8")
    for size in code.sizes:
        rng = np.random.default_rng(seed)
        inputs = {info.name: drawn(rng, info) for info in size.inputs}
        for kind, arrays in (("input", inputs.values()), ("output", example.outputs(inputs))):
            for number, array in enumerate(arrays):
                (folder / example_file(kind, number, size.label)).write_bytes(array.tobytes())


def _manifest(
    code: Code,
    layers: Sequence[Sequence[Mapping[str, Any]]],
    written: Mapping[str, Any],
    facts: Mapping[str, Any],
    on_device: bool,
) -> dict[str, Any]:
    own = {
        "kind": DEVICE_KIND if on_device else KIND,
        "network_abi": DEVICE_NETWORK_ABI if on_device else NETWORK_ABI,
        "name": code.name,
        "weights": {"bytes": code.weights, "alignment": ALIGNMENT},
        "sizes": [
            {
                "label": size.label,
                "dims": dict(size.dims),
                "inputs": [_value(info) for info in size.inputs],
                "outputs": [_value(info) for info in size.outputs],
                "workspace": {
                    "formula": "fixed + threads * per_thread",
                    "fixed": size.fixed,
                    "per_thread": size.workspace_task,
                    "alignment": ALIGNMENT,
                },
                "memory_bytes": code.weights + size.fixed + facts["threads"] * size.workspace_task,
                "layers": list(steps),
            }
            for size, steps in zip(code.sizes, layers, strict=True)
        ],
        "isa": list(code.isa),
        **written,
        "version": code.version,
    }
    if clash := sorted({*own, "files"} & facts.keys()):
        raise ExportError(f"facts: expected none that the manifest has of its own, found {', '.join(clash)}")
    return {**own, **facts}


def _value(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "shape": list(info.shape), "dtype": info.dtype, "bytes": info.bytes}


def header_text(code: Code, has_example: bool = True, device: Sequence[DeviceCode] = ()) -> str:
    """``<name>.h``, which includes nothing but ``stddef.h`` and ``stdint.h``; C11 and C++.

    Args:
        device: the functions' code, of a network on a GPU.
    """
    lines = []
    for size in code.sizes:
        if size.label:
            lines.append(f" * {size.label}:")
        for what, tensors in (("input", size.inputs), ("output", size.outputs)):
            for number, info in enumerate(tensors):
                facts = f"{list(info.shape)} of {info.dtype}, {info.bytes} bytes"
                lines.append(f" *   {what} {number} ({_in_comment(info.name)}) = {facts}")
        bytes_ = f"{size.fixed} + threads * {size.workspace_task}" if not device else str(size.fixed)
        lines.append(f" *   workspace {bytes_} bytes, aligned to {ALIGNMENT}")
    common = {
        **header_parts(code.name),
        "name": code.name,
        "made": "Made by convgen; example.c beside this file shows every call." if has_example else "Made by convgen.",
        "values": "\n".join(lines),
        "weights": code.weights,
        "alignment": ALIGNMENT,
        "network_types": source("network_types.h").strip(),
        "constants": "\n".join(_constants(code, on_device=bool(device))),
        "stack": STACK >> 10,
    }
    if not device:
        return filled("header_network.template.h", **common, isa=needed_cpu(code.isa))
    types = {name: source(f"{name}.h").strip() for name in ("cuda_types", "network_cuda_types")}
    own = {**types, "devices": devices_text(device[0]), "tensor_alignment": TENSOR_ALIGNMENT}
    return filled("header_network_cuda.template.h", **common, **own)


def _in_comment(text: str) -> str:
    """Text as a comment of C can have it: on one line, and nothing ends the comment or seems to begin another."""
    return printable(text).replace("*/", "*\\/").replace("/*", "/\\*")


def _constants(code: Code, on_device: bool) -> list[str]:
    """The sizes' numbers, and the bytes of every buffer: of all sizes the largest, and of each."""
    lines = []
    if len(code.sizes) > 1:
        numbers = [f"{code.name}_{size.label} = {number}" for number, size in enumerate(code.sizes)]
        lines += [f"/* The sizes that it was made for. */\nenum {{ {', '.join(numbers)} }};", ""]
    share = "" if on_device else "(1)"
    lines += [
        "/* Bytes and elements of every buffer, for those that are static. A workspace may be of 0 bytes, and C has no",
        f" * such arrays: workspace[{code.name}_WORKSPACE_BYTES{share} + 1], as more is welcome. */",
    ]

    def workspace(prefix: str, fixed: int, share: int) -> list[str]:
        if on_device:
            return byte_constants(prefix, {"workspace": fixed})
        return [workspace_constant(prefix, fixed, share)]

    lines += byte_constants(code.name, {"weights": code.weights})
    lines += byte_constants(code.name, _largest(_buffers(size) for size in code.sizes))
    lines += element_constants(code.name, _largest(_elements(size) for size in code.sizes))
    fixed, task = (max(getattr(size, part) for size in code.sizes) for part in ("fixed", "workspace_task"))
    lines += workspace(code.name, fixed, task)
    for size in code.sizes if len(code.sizes) > 1 else ():
        prefix = f"{code.name}_{size.label}"
        lines += byte_constants(prefix, _buffers(size))
        lines += element_constants(prefix, _elements(size))
        lines += workspace(prefix, size.fixed, size.workspace_task)
    return lines


def _largest(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    largest: dict[str, int] = {}
    for name, count in (item for each in counts for item in each.items()):
        largest[name] = max(count, largest.get(name, 0))
    return largest


def _elements(size: Size) -> dict[str, int]:
    given = {"input": size.inputs, "output": size.outputs}
    return {
        f"{what}{number}": math.prod(one.shape) for what, infos in given.items() for number, one in enumerate(infos)
    }


def _buffers(size: Size) -> dict[str, int]:
    given = {"input": size.inputs, "output": size.outputs}
    return {f"{what}{number}": info.bytes for what, infos in given.items() for number, info in enumerate(infos)}
