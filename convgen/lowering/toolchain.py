"""The compilers that are run: which there is for an architecture and a C library, and how."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..errors import BuildError
from ..folders import user_cache

#: This machine's architecture.
NATIVE = platform.machine()
#: ELF's numbers of architectures -> their names in ``uname -m`` and in the names of cross compilers.
_MACHINES = {62: "x86_64", 183: "aarch64"}
#: Names of C libraries; the version of glibc is the oldest that what is made runs with.
_LIBC = re.compile(r"musl|glibc-2\.(\d{1,2})")
#: The oldest glibc that has all that the runtime calls (aligned_alloc is of 2.16, secure_getenv of 2.17), 2.x.
_OLDEST_GLIBC = 17
#: The C library that zig links against: any later one serves.
_ZIG_GLIBC = "2.28"


def architecture(object_file: bytes) -> str:
    """What an ELF file's code runs on, by the name ``uname -m`` has for it; this machine's where the file does
    not tell.
    """
    is_elf = object_file[:4] == b"\x7fELF" and len(object_file) >= 20
    number = int.from_bytes(object_file[18:20], "little" if object_file[5] == 1 else "big") if is_elf else None
    return _MACHINES.get(number or 0, NATIVE)


def _tool(variable: str, default: str) -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get(variable, ""))) or (default,)


def compiler(arch: str, libc: str | None = None) -> tuple[str, ...]:
    """The C compiler for an architecture, with its own arguments.

    For this machine's ``CC``, else ``cc``. For another, such as aarch64, the first there is of ``CC_AARCH64``,
    ``aarch64-linux-gnu-gcc`` and the one in the Python package ziglang, which links with glibc 2.28.

    Args:
        libc: the C library that what it makes is for: ``glibc-2.17``, say, or ``musl``; zig alone has a choice. None
            where there is none to make.

    Raises:
        BuildError: there is none for another architecture, or zig is missing; names these ways. Or there is no such
            C library.
    """
    if libc is not None:
        check_libc(libc)
        if (zig := _zig()) is None:
            raise BuildError(f"libc: {libc} takes the Python package ziglang (pip install ziglang), found none")
        return zig, "cc", "-target", f"{arch}-linux-{libc.replace('glibc-', 'gnu.')}"
    if arch == NATIVE:
        return _tool("CC", "cc")
    variable, gcc = f"CC_{arch.upper()}", f"{arch}-linux-gnu-gcc"
    if os.environ.get(variable) or shutil.which(gcc):
        return _tool(variable, gcc)
    if (zig := _zig()) is not None:
        return zig, "cc", "-target", f"{arch}-linux-gnu.{_ZIG_GLIBC}"
    raise BuildError(
        f"expected a C compiler for {arch}, found none: install {gcc} (Debian: apt install gcc-{arch}-linux-gnu) "
        f"or the Python package ziglang (pip install ziglang), or name one in {variable}"
    )


def check_libc(libc: str) -> None:
    """Raise:
    BuildError: nothing can be made for a C library of that name; says what can.
    """
    match = _LIBC.fullmatch(libc)
    if not match:
        raise BuildError(f"libc: expected musl or a version of glibc such as glibc-2.28, found {libc!r}")
    if match[1] and int(match[1]) < _OLDEST_GLIBC:
        raise BuildError(f"libc: expected glibc-2.{_OLDEST_GLIBC} or later, which has all that is called, found {libc}")


def static_libc(arch: str) -> str | None:
    """The C library that programs for an architecture are linked with statically, where it is not the one that
    :func:`compiler` takes by itself: zig has no static glibc.
    """
    return "musl" if arch != NATIVE and len(compiler(arch)) > 1 and compiler(arch)[1] == "cc" else None


def _zig() -> str | None:
    """The program of the Python package ziglang, where that is installed."""
    found = importlib.util.find_spec("ziglang")
    if found is None or not found.submodule_search_locations:
        return None
    return str(Path(found.submodule_search_locations[0]) / "zig")


def archiver(arch: str, tools: tuple[str, ...]) -> tuple[str, ...]:
    """``ar`` for an architecture: what ``AR``, for another ``AR_AARCH64``, names, else the compiler's companion."""
    variable = "AR" if arch == NATIVE else f"AR_{arch.upper()}"
    if tools[1:2] == ("cc",) and not os.environ.get(variable):
        return tools[0], "ar"
    return _tool(variable, "ar" if arch == NATIVE else f"{arch}-linux-gnu-ar")


def run_tool(command: Sequence[str], folder: Path) -> None:
    # A compiler that is killed leaves its own temporary files.
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig")}
    if (cache := user_cache()) is not None:  # zig's own is elsewhere in the user's folder; it compiles its libc into it
        environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(cache / "zig"))
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, errors="replace"
        )
    except OSError as error:
        hint = "install a C compiler (Debian: apt install gcc) or name one in CC"
        if command[0].endswith("ar"):
            hint = "install the binutils of the target's architecture"
        raise BuildError(f"{command[0]}: {error.strerror}; {hint}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise BuildError(f"exit status {done.returncode} of {shlex.join(command)}\n{said}")
