"""Loads what an export wrote: a kernel's library, or a network's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..kernel.library import thread_count
from ..kernel.load import MANIFEST, check_architecture, checked, read_manifest, reading
from ..kernel.load import load as load_kernel
from ..lowering.interface import check_name
from .cuda_library import DEVICE_KIND, DEVICE_NETWORK_ABI, CudaNetworkLibrary
from .library import KIND, NETWORK_ABI, NetworkLibrary


def load(directory: str | os.PathLike[str], threads: int | None = None) -> Any:
    """The library that an export wrote into ``directory``: a kernel's :class:`~convgen.kernel.library.Library` or
    :class:`~convgen.kernel.cuda_library.CudaLibrary`, or a :class:`~convgen.network.library.NetworkLibrary`, of a GPU
    a :class:`~convgen.network.cuda_library.CudaNetworkLibrary`.
    ``threads`` is what it was made for where None.

    A kernel for a GPU loads without a driver and a device; its layers need both.

    Raises:
        ExportError: there is no manifest, or a file is not the one it describes, or for another architecture.
    """
    manifest = read_manifest(Path(directory))
    if is_network(manifest):
        return _network(Path(directory), manifest, threads)
    return load_kernel(directory, threads)


def is_network(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is a network's, not a kernel's."""
    return manifest.get("kind") in (KIND, DEVICE_KIND)


def check_network(path: Path, manifest: Mapping[str, Any]) -> tuple[str, int]:
    """The name of a network, and the number of threads that it was made for, of the manifest read from ``path``.

    Raises:
        ExportError: it is none, or of another ABI.
    """
    with reading(path, "a network"):
        abi = DEVICE_NETWORK_ABI if manifest["kind"] == DEVICE_KIND else NETWORK_ABI
        if manifest["network_abi"] != abi:
            raise ExportError(f"{path}: network_abi: expected {abi}, found {manifest['network_abi']!r}")
        return check_name(manifest["name"]), thread_count(manifest["threads"])


def _network(folder: Path, manifest: dict[str, Any], threads: int | None) -> NetworkLibrary:
    path, on_device = folder / MANIFEST, manifest["kind"] == DEVICE_KIND
    name, made_for = check_network(path, manifest)
    with reading(path, "a network"):
        file = f"lib{name}.so"
        expected = manifest["files"][file]["sha256"]
    check_architecture(path, manifest)
    with checked(folder / file, expected):
        made = CudaNetworkLibrary if on_device else NetworkLibrary
        return made(folder / file, name, folder / f"{name}.weights", made_for if threads is None else threads)
