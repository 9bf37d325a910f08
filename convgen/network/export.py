"""Writes a network's library: shared and static, its weights, a C header, a manifest, and an example that checks it."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from ..errors import ExportError
from ..folders import TemporaryFolder
from ..kernel.export import check_destination, move, write_manifest
from ..kernel.load import MANIFEST
from ..kernel.names import check_export_name
from ..lowering.interface import ALIGNMENT, TensorInfo
from ..lowering.link import link_network, source
from ..lowering.stack import STACK
from .compile import Built
from .library import KIND, NETWORK_ABI, NetworkLibrary
from .source import Code


def write_network(
    directory: str | os.PathLike[str], built: Built, loaded: NetworkLibrary, facts: Mapping[str, Any], seed: int = 0
) -> dict[str, Any]:
    """Write ``lib<name>.so``, ``lib<name>.a``, ``<name>.h``, ``<name>.weights``, ``manifest.json``, and ``example.c``
    with inputs and outputs.

    All of it or nothing; an earlier export of the same name is replaced.

    Args:
        loaded: the same library, which computes the example's outputs.
        facts: what else the manifest says, as JSON values.
        seed: of the example's inputs.

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
        check_destination(target, code.name, [*_file_names(code), MANIFEST])
        existing = next(parent for parent in target.parents if parent.exists())
        with TemporaryFolder(existing) as temporary:
            folder = temporary / target.name
            folder.mkdir()  # with the usual permissions
            _write_files(folder, built, loaded, seed)
            manifest = _manifest(code, facts)
            write_manifest(folder, manifest, [folder / name for name in _file_names(code)])
            move(folder, target)
    except OSError as error:
        raise ExportError(f"{target}: cannot write the network {code.name}: {error}") from error
    return manifest


def _file_names(code: Code) -> list[str]:
    name = code.name
    numbers = [f"example.input{i}" for i in range(len(code.inputs))]
    numbers += [f"example.output{i}" for i in range(len(code.outputs))]
    return [f"lib{name}.so", f"lib{name}.a", f"{name}.h", f"{name}.weights", "example.c", *numbers]


def _write_files(folder: Path, built: Built, loaded: NetworkLibrary, seed: int) -> None:
    code = built.code
    shutil.copyfile(built.library, folder / f"lib{code.name}.so")
    (folder / f"lib{code.name}.so").chmod(0o755)
    link_network(code.name, built.entry, built.objects, folder / f"lib{code.name}.a", archive=True)
    shutil.copyfile(built.weights, folder / f"{code.name}.weights")
    (folder / f"{code.name}.h").write_text(header_text(code), encoding="utf-8")
    counts = {"inputs": len(code.inputs), "outputs": len(code.outputs)}
    example = Template(source("example_network.template.c")).substitute(name=code.name, **counts)
    (folder / "example.c").write_text(example, encoding="utf-8")
    rng = np.random.default_rng(seed)
    inputs = [rng.standard_normal(info.shape, np.float32) for info in code.inputs]
    outputs = {info.name: np.empty(info.shape, np.float32) for info in code.outputs}
    loaded(*inputs, out=outputs)
    for kind, arrays in (("input", inputs), ("output", list(outputs.values()))):
        for number, array in enumerate(arrays):
            (folder / f"example.{kind}{number}").write_bytes(array.tobytes())


def _manifest(code: Code, facts: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        "kind": KIND,
        "network_abi": NETWORK_ABI,
        "name": code.name,
        "inputs": [_value(info) for info in code.inputs],
        "outputs": [_value(info) for info in code.outputs],
        "weights": {"bytes": code.weights, "alignment": ALIGNMENT},
        "workspace": {
            "formula": "fixed + threads * per_thread",
            "fixed": code.arena + code.workspace_main,
            "per_thread": code.workspace_task,
            "alignment": ALIGNMENT,
        },
        "isa": list(code.isa),
        "version": code.version,
    }
    if clash := sorted({*own, "files"} & facts.keys()):
        raise ExportError(f"facts: expected none that the manifest has of its own, found {', '.join(clash)}")
    return {**own, **facts}


def _value(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "shape": list(info.shape), "dtype": info.dtype, "bytes": info.bytes}


def header_text(code: Code) -> str:
    """``<name>.h``, which includes nothing but ``stddef.h`` and ``stdint.h``; C11 and C++."""
    lines = []
    for what, tensors in (("input", code.inputs), ("output", code.outputs)):
        for number, info in enumerate(tensors):
            plain = "".join(c if c.isalnum() or c in "._:" else "_" for c in info.name)
            lines.append(f" *   {what} {number} ({plain}) = {list(info.shape)}, {info.bytes} bytes")
    isa = f"Needs a CPU with {', '.join(code.isa)}." if code.isa else "Runs on every CPU of its kind."
    return Template(source("header_network.template.h")).substitute(
        name=code.name,
        values="\n".join(lines),
        weights=code.weights,
        fixed=code.arena + code.workspace_main,
        share=code.workspace_task,
        alignment=ALIGNMENT,
        isa="\n * ".join(textwrap.wrap(isa, 96)),
        types=source("types.h").strip(),
        network_types=source("network_types.h").strip(),
        stack=STACK >> 10,
    )
