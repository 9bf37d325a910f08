"""Loads what an export wrote: a kernel's library, or a network's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import BuildError, ExportError, KernelError
from ..kernel.library import thread_count
from ..kernel.load import MANIFEST, check_architecture, checked, read_manifest
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
    if manifest.get("kind") in (KIND, DEVICE_KIND):
        return _network(Path(directory), manifest, threads)
    return load_kernel(directory, threads)


def _network(folder: Path, manifest: dict[str, Any], threads: int | None) -> NetworkLibrary:
    path = folder / MANIFEST
    try:
        on_device = manifest["kind"] == DEVICE_KIND
        abi = DEVICE_NETWORK_ABI if on_device else NETWORK_ABI
        if manifest["network_abi"] != abi:
            raise ExportError(f"{path}: network_abi: expected {abi}, found {manifest['network_abi']!r}")
        name, made_for = check_name(manifest["name"]), thread_count(manifest["threads"])
        file = f"lib{name}.so"
        expected = manifest["files"][file]["sha256"]
        check_architecture(path, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ExportError(f"{path}: expected the manifest of a network, found {found}") from error
    except (BuildError, KernelError) as error:
        raise ExportError(f"{path}: {error}") from error
    with checked(folder / file, expected):
        made = CudaNetworkLibrary if on_device else NetworkLibrary
        return made(folder / file, name, folder / f"{name}.weights", made_for if threads is None else threads)
