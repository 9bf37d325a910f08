"""A bundle as a file: its archive, the runner in it, and its manifest."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import ExportError
from ...folders import TemporaryFolder
from ...measure.standalone.results import FORMAT
from ...records.kinds import BUNDLE, found_instead
from ...records.record import load_json

RUNNER, MANIFEST = "run.py", "manifest.json"
#: Endings of a bundle's file name.
ENDINGS = (".tar.gz", ".tgz", ".tar.xz", ".zip")
_MANIFEST_BYTES = 1 << 28
#: What Python runs first of the runner.
_MAIN = b"""\
import sys

from standalone.command import main

sys.exit(main())
"""


def bundle_name(path: Path) -> str:
    """A bundle's file name without its ending."""
    name = path.name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return name or "bundle"


def write_archive(folder: Path, out: Path) -> None:
    """Write all files of a folder into an archive, below the folder's name; equal files give equal archives."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if out.name.endswith(".zip"):
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.writestr(zipfile.ZipInfo(path.relative_to(folder.parent).as_posix()), path.read_bytes(), 8)
        return

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.name.endswith(RUNNER) else 0o644
        return member

    # The libraries of a layer's candidates are much alike, further apart than gzip looks back.
    is_xz = out.name.endswith(".xz")
    with tarfile.open(out, "w:xz") if is_xz else tarfile.open(out, "w:gz", compresslevel=6) as tar:
        for path in paths:
            tar.add(path, path.relative_to(folder.parent).as_posix(), filter=plain)


def write_runner(path: Path) -> None:
    """The program that measures a bundle: :mod:`convgen.measure.standalone` as an archive that Python runs.

    Equal sources give equal archives. Nothing in them is compressed: a Python without zlib runs them too.
    """
    package = resources.files("convgen.measure.standalone")
    files = {f"standalone/{file.name}": file.read_bytes() for file in package.iterdir() if file.name.endswith(".py")}
    files["__main__.py"] = _MAIN
    with path.open("wb") as runner:
        runner.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(runner, "w") as archive:
            for name, data in sorted(files.items()):
                archive.writestr(zipfile.ZipInfo(name), data)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The folder of a bundle: the path itself where it is one, else a temporary one that the archive is unpacked into.

    Raises:
        ExportError: there is no bundle.
    """
    if path.is_dir():
        yield path
        return
    with TemporaryFolder(runs=True) as temporary:
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(temporary)
            else:
                with tarfile.open(path) as tar:
                    _unpack(tar, temporary)
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, ValueError) as error:
            found = found_instead(path, BUNDLE) or f"found {error}"
            raise ExportError(f"{path}: expected a bundle, {found}") from error
        folders = [entry for entry in temporary.iterdir() if (entry / MANIFEST).is_file()]
        if len(folders) != 1:
            raise ExportError(f"{path}: expected a bundle with one {MANIFEST}, found {len(folders)}")
        yield folders[0]


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Write an archive's files and folders. (``extractall`` has filters in 3.11.4 and later only.)

    Raises:
        ValueError: something else is in it, or lies outside.
    """
    for member in tar:
        path = PurePosixPath(member.name)
        if not (member.isreg() or member.isdir()) or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{member.name!r}, which is no file or folder inside it")
        place = folder / path
        if member.isdir():
            place.mkdir(parents=True, exist_ok=True)
        elif (source := tar.extractfile(member)) is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            with source, place.open("wb") as file:
                shutil.copyfileobj(source, file)


def read_manifest(path: Path) -> tuple[str, dict[str, Any]]:
    """SHA-256 and contents of a bundle's manifest; the contents have the trials ``by_key`` as well.

    Raises:
        ExportError: it cannot be read, or is not one.
    """
    with unpacked(path) as folder:
        manifest = folder / MANIFEST
        try:
            with manifest.open("rb") as file:
                data = file.read(_MANIFEST_BYTES + 1)
        except OSError as error:
            raise ExportError(f"{manifest}: {error.strerror}") from error
    if len(data) > _MANIFEST_BYTES:
        raise ExportError(f"{path}: expected a manifest of at most {_MANIFEST_BYTES} bytes, found more")
    try:
        values = load_json(data)
        if values["format"] != FORMAT:
            raise ExportError(f"{path}: format: expected {FORMAT}, found {values['format']!r:.80}")
        values["by_key"] = {trial["key"]: trial for trial in values["trials"]}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: expected the manifest of a bundle, found {error}") from None
    return hashlib.sha256(data).hexdigest(), values
