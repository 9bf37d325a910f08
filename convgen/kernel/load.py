"""Loads an exported kernel: the file its manifest describes, or none."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BuildError, ExportError, KernelError, SpecError
from ..lowering.interface import ABI, check_name
from ..problem.spec import ConvSpec
from .cuda_library import CudaLibrary
from .library import Library, thread_count

#: The file that describes an exported library.
MANIFEST = "manifest.json"
#: What a manifest has while its library's files are being put into place.
UNFINISHED = "unfinished"
_MANIFEST_BYTES = 1 << 20  # more than any manifest has


# ---- exported libraries ------------------------------------------------------------------------


def load(directory: str | os.PathLike[str], threads: int | None = None) -> Library | CudaLibrary:
    """The kernel that an export wrote into ``directory``; see :func:`convgen.network.load.load`.

    Raises:
        ExportError: there is no manifest, or the library is not the one it describes, or for another architecture.
    """
    folder = Path(directory)
    path, manifest = folder / MANIFEST, read_manifest(folder)
    made = described(path, manifest)
    check_architecture(path, manifest)
    with checked(folder / made.file, made.sha256):
        kind = CudaLibrary if made.on_device else Library
        return kind(folder / made.file, made.spec, made.name, made.threads if threads is None else threads)


class Described(NamedTuple):
    """What a manifest says of a kernel's library.

    Attributes:
        spec, name, threads: the layer, the prefix of the functions, and what it was made for.
        file, sha256: the shared library.
    """

    spec: ConvSpec
    name: str
    threads: int
    file: str
    sha256: str
    on_device: bool


def described(path: Path, manifest: Mapping[str, Any]) -> Described:
    """What the manifest of a kernel, read from ``path``, says.

    Raises:
        ExportError: it is none, or of another ABI.
    """
    with reading(path, "a library"):
        if manifest["abi"] != ABI:
            raise ExportError(f"{path}: abi: expected {ABI}, found {manifest['abi']!r}")
        spec, name = ConvSpec.from_dict(manifest["spec"]["fields"], str(path)), check_name(manifest["name"])
        file, tuned = f"lib{name}.so", thread_count(manifest["threads"])
        return Described(spec, name, tuned, file, manifest["files"][file]["sha256"], manifest.get("device") is not None)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """What is wrong with the fields of a manifest, which are looked up in here, as an ExportError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ExportError(f"{path}: expected the manifest of {what}, found {found}") from error
    except (BuildError, KernelError, SpecError) as error:
        raise ExportError(f"{path}: {error}") from error


def changed_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Why files of an export are not those that its manifest describes; empty where all are.

    Raises:
        ExportError: the manifest does not describe files.
    """
    found = []
    with reading(folder / MANIFEST, "a library"):
        files = {str(name): str(facts["sha256"]) for name, facts in manifest["files"].items()}
    for name, expected in files.items():
        if Path(name).name != name:
            raise ExportError(f"{folder / MANIFEST}: files: expected names of files beside it, found {name!r}")
        try:
            with checked(folder / name, expected, "a file of the export"):
                pass
        except ExportError as error:
            found.append(str(error))
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ExportError: there is none, or the file is none.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(_read(path, "a manifest", _MANIFEST_BYTES).data)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(manifest, dict):
        raise ExportError(f"{path}: expected the manifest of a library, found a {type(manifest).__name__} of JSON")
    if UNFINISHED in manifest:
        raise ExportError(f"{path}: expected a whole library, found an export that was interrupted: repeat it")
    return manifest


def check_architecture(path: Path, manifest: Mapping[str, Any]) -> None:
    """Whether this machine is of the architecture that a manifest's library needs, and has its C library.

    Raises:
        ExportError: it is of another, or has another; names both. Or it is no manifest of a library.
    """
    native = platform.machine()
    with reading(path, "a library"):
        needs = manifest["needs"]
        found, triple = needs["architecture"], needs["triple"]
    if found != native:
        raise ExportError(
            f"{path}: needs: expected a library for {native}, this machine's architecture, found one for {triple}"
        )
    if platform.libc_ver()[0] == "glibc" != needs.get("libc", "glibc"):
        raise ExportError(f"{path}: needs: expected a library for glibc, this machine's, found one for {triple}")


@contextmanager
def checked(path: Path, expected: str, what: str = "a library") -> Iterator[None]:
    """A file of an export is used in here, such as a library loaded: the file that has the SHA-256 it should have,
    before and after.

    Raises:
        ExportError: it is another file.
    """
    found = _read(path, what)
    digest = hashlib.sha256(found.data).hexdigest()
    if digest != expected:
        raise ExportError(f"{path}: expected SHA-256 {expected}, as {MANIFEST} has it, found {digest}")
    yield
    if _read(path, what) != found:
        raise ExportError(f"{path}: expected the file that was checked, found one that was put in its place")


class _File(NamedTuple):
    """A file's bytes; which file it was, and when it was changed."""

    data: bytes
    device: int
    inode: int
    changed: int


def _read(path: Path, what: str, most: int | None = None) -> _File:
    """A file, of which no more than ``most`` bytes are read.

    Raises:
        ExportError: there is none, or it is larger, or no regular file.
    """
    try:
        if not path.is_file() and path.exists():
            raise ExportError(f"{path}: expected {what}, found no file but something else")
        with open(path, "rb") as file:
            data = file.read() if most is None else file.read(most + 1)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise ExportError(f"{path}: expected {what}, found {error.strerror}") from error
    if most is not None and len(data) > most:
        raise ExportError(f"{path}: expected {what} of at most {most} bytes, found more")
    return _File(data, status.st_dev, status.st_ino, status.st_ctime_ns)
