"""How build systems find an exported library: a CMake package and a pkg-config file, and what the library needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..lowering.runtime import source

#: What CMake calls an architecture, besides the name that ``uname -m`` has.
_PROCESSORS = {"x86_64": "x86_64|AMD64|amd64", "aarch64": "aarch64|arm64|ARM64"}


@dataclass(frozen=True)
class Package:
    """A library as build systems see it.

    Attributes:
        name: of the library.
        version: of its C interface, ``major.minor``: programs made for the same major version and no newer minor one
            find what they need.
        description: a line.
        arch: what it runs on.
        libraries: of the system, that an archive is linked with: ``m`` ….
        weights: of a network, the name of the file of its weights.
    """

    name: str
    version: str
    description: str
    arch: str
    libraries: tuple[str, ...] = ("m", "pthread")
    weights: str | None = None

    def write(self, folder: Path, libc: str | None = None) -> None:
        """Write the files of :func:`package_files` to the folder in which the library and its header lie; ``libc`` is
        as of its linking.
        """
        note = f"; {self.name}_WEIGHTS is the file of the weights" if self.weights else ""
        kept = f'set({self.name}_WEIGHTS "${{CMAKE_CURRENT_LIST_DIR}}/{self.weights}")\n' if self.weights else ""
        major = int(self.version.partition(".")[0])
        values = {
            "name": self.name,
            "version": self.version,
            "major": str(major),
            "next": str(major + 1),
            "arch": self.arch,
            "libc": _c_library(libc),
            "processors": _PROCESSORS.get(self.arch, self.arch),
            "description": " ".join(self.description.split()),
            "libraries": ";".join(self.libraries),
            "private": " ".join(f"-l{library}" for library in self.libraries),
        }
        config, version, pkg_config = package_files(self.name)
        texts = {
            config: ("package.template.cmake", {"weights_note": note, "weights": kept}),
            version: ("package_version.template.cmake", {}),
            pkg_config: (
                "package.template.pc",
                {"weights": f"weights=${{prefix}}/{self.weights}\n" * bool(self.weights)},
            ),
        }
        for file, (template, own) in texts.items():
            (folder / file).write_text(_filled(source(template), {**values, **own}), encoding="utf-8")

    def needs(self, library: Path, libc: str | None = None) -> dict[str, Any]:
        """What a program that runs the shared library must have, for a manifest; ``libc`` is as of its linking."""
        c_library = _c_library(libc)
        glibc = glibc_of(library)
        return {
            "architecture": self.arch,
            "triple": f"{self.arch}-linux-{'musl' if c_library == 'musl' else 'gnu'}",
            "libc": c_library,
            "glibc": glibc,
            "libraries": list(self.libraries),
        }


def _c_library(libc: str | None) -> str:
    """Of a linking for a C library, which one it is."""
    return "musl" if libc == "musl" else "glibc"


def package_files(name: str) -> tuple[str, str, str]:
    """The names of a library's CMake configuration, the version of it, and the pkg-config file."""
    return f"{name}Config.cmake", f"{name}ConfigVersion.cmake", f"{name}.pc"


def glibc_of(library: Path) -> str | None:
    """The oldest glibc that a shared library runs with; None where it takes nothing that has a version."""
    # The names of the versions that symbols are bound to stand in the file as they are, between zeros.
    found = re.findall(rb"\0GLIBC_(\d+(?:\.\d+)+)(?=\0)", library.read_bytes())
    newest = max((tuple(map(int, version.split(b"."))) for version in found), default=None)
    return ".".join(map(str, newest)) if newest else None


def _filled(template: str, values: dict[str, str]) -> str:
    """A template with its ``@names@`` replaced: both kinds of files have their own use for dollars."""
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], template)
