"""From an object file to a library: the C entry points of one kernel, the runtime, the link.

Runs once per tuning candidate, so it is one run of the C compiler: the runtime is compiled once per
compiler and kept in the user's cache directory. The object file says which architecture it is for, and
so which compiler it takes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ..errors import BuildError
from ..folders import TemporaryFolder, replacing, user_cache
from .elf import edited
from .entry import code_digest, entry_source
from .interface import ALIGNMENT, Interface
from .runtime import (
    CUDA_SOURCES,
    CUSTOM_OPS_SOURCES,
    DEVICE_NETWORK_SOURCES,
    NETWORK_SOURCES,
    PACKING_SOURCES,
    SOURCES,
    source,
)
from .stack import check_stack
from .toolchain import NATIVE, architecture, archiver, compiler, run_tool, static_libc

COMPILE_FLAGS = ("-std=c11", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-pthread")
LINK_FLAGS = ("-Wl,-z,defs", "-Wl,-z,noexecstack", "-Wl,-z,relro", "-Wl,-z,now", "-Wl,--as-needed", "-Wl,--strip-debug")
_DIGEST = hashlib.sha256().digest_size
#: The compiled runtime while a library is linked. No library is called so: a name has no dot.
_RUNTIME = "runtime.part.o"


def link(interface: Interface, object_file: Path, out: Path, *, archive: bool = False, libc: str | None = None) -> Path:
    """Link a kernel's object file with the runtime and write ``out``, in one step or not at all.

    Args:
        libc: the C library that it is linked with, as :func:`compiler` has it.

    The shared library, or the static one with ``archive``, defines the functions ``<name>_*`` of
    ``runtime/types.h`` and shows no other symbol; it needs libc, libm and libpthread only, one of a
    kernel for a GPU libdl too, and the driver once it runs. Temporary files lie beside ``out``.

    Raises:
        BuildError: there is no C compiler for the architecture, or it failed; gives the command and what it said.
            Or the kernel takes too much of a thread's stack.
    """
    out = Path(out)
    object_file = Path(object_file).resolve()
    try:
        data = object_file.read_bytes()
        arch, digest = architecture(data), code_digest(data, interface.device)
        check_stack(data, arch)
        sources = SOURCES if interface.device is None else CUDA_SOURCES
        with TemporaryFolder(out.parent) as folder:
            (folder / "entry.c").write_text(entry_source(interface, digest, arch), encoding="utf-8")
            tools = compiler(arch, libc)
            (folder / _RUNTIME).write_bytes(_runtime_object(tools, sources))
            _write_headers(sources, folder)
            for index, (_, image) in enumerate(interface.device.images if interface.device else ()):
                (folder / f"image{index}").write_bytes(image)
            made = (_archive if archive else _shared)(interface.name, [str(object_file)], folder, arch, tools)
            os.replace(made, out)
    except OSError as error:
        raise BuildError(f"{interface.name}: cannot link {object_file} into {out}: {error}") from error
    return out


def link_network(
    name: str,
    entry: str,
    functions: Sequence[bytes],
    out: Path,
    arch: str = NATIVE,
    *,
    archive: bool = False,
    libc: str | None = None,
) -> Path:
    """Link the functions of a network with the runtime and write ``out``, as :func:`link` does for a kernel.

    Args:
        entry: the C file that describes the network. It knows a function by its number: ``function0_main`` ….
        functions: their object files, each of which defines ``__tvm_ffi_main``.
        arch: the architecture that they are for.
        libc: the C library that it is linked with, as :func:`compiler` has it.

    Raises:
        BuildError: as :func:`link`.
    """
    return _link_numbered(name, entry, functions, NETWORK_SOURCES, out, arch, archive, libc)


def link_device_network(
    name: str,
    entry: str,
    images: Mapping[str, bytes],
    out: Path,
    *,
    archive: bool = False,
    libc: str | None = None,
) -> Path:
    """Link a network for a GPU with the runtime and write ``out``, as :func:`link` does for a kernel.

    Args:
        entry: the C file that describes the network; it includes the images.
        images: files that it includes, by their names.

    Raises:
        BuildError: as :func:`link`.
    """
    return _link_numbered(name, entry, (), DEVICE_NETWORK_SOURCES, out, NATIVE, archive, libc, images)


def link_packers(name: str, functions: Sequence[bytes], out: Path) -> Path:
    """Link what packs weights of some kernels into a shared library with one function, which is not for others' use:
    ``int <name>_pack(int function, const convgen_tensor *tensors, void *const *data, int count, int threads)``.

    Args:
        functions: object files of this machine, each of which defines ``__tvm_ffi_pack``.

    Raises:
        BuildError: as :func:`link`.
    """
    numbers = range(len(functions))
    entry = [
        '#include "runtime.h"',
        "",
        *(f"int function{i}_pack(void *, const convgen_any *, int32_t, convgen_any *);" for i in numbers),
        "int convgen_pack(convgen_function, const convgen_tensor *, void *const *, int, int);",
        f"static const convgen_function packers[] = {{{', '.join(f'function{i}_pack' for i in numbers)}}};",
        f"CONVGEN_EXPORT int {name}_pack(int function, const convgen_tensor *tensors, void *const *data,",
        "                                int count, int threads)",
        "{",
        "    return convgen_pack(packers[function], tensors, data, count, threads);",
        "}",
        "",
    ]
    return _link_numbered(name, "\n".join(entry), functions, PACKING_SOURCES, out, NATIVE)


def _link_numbered(
    name: str,
    entry: str,
    functions: Sequence[bytes],
    sources: tuple[str, ...],
    out: Path,
    arch: str,
    archive: bool = False,
    libc: str | None = None,
    included: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Link functions, which the C file ``entry`` knows by their numbers; it includes files by their names."""
    try:
        with TemporaryFolder(out.parent) as folder:
            (folder / "entry.c").write_text(entry, encoding="utf-8")
            for file, content in included.items():
                (folder / file).write_bytes(content)
            tools = compiler(arch, libc)
            (folder / _RUNTIME).write_bytes(_runtime_object(tools, sources))
            _write_headers(sources, folder)
            files = []
            for number, data in enumerate(functions):
                check_stack(data, arch)
                files.append(f"function{number}.part.o")
                names = {f"__tvm_ffi_{part}": f"function{number}_{part}" for part in ("main", "pack")}
                (folder / files[-1]).write_bytes(edited(data, names))
            made = (_archive if archive else _shared)(name, files, folder, arch, tools)
            os.replace(made, out)
    except OSError as error:
        raise BuildError(f"{name}: cannot link {out}: {error}") from error
    return out


def _write_headers(sources: Sequence[str], folder: Path) -> None:
    for header in (name for name in sources if name.endswith(".h")):
        (folder / header).write_text(source(header), encoding="utf-8")


def link_shared(sources: Sequence[str], out: Path, arch: str, *, headers: Sequence[str] = ()) -> Path:
    """Compile some of the runtime's C files, as :func:`source` names them, to a shared library for an architecture.

    Raises:
        BuildError: there is no C compiler for it, or it failed; gives the command and what it said.
    """
    with TemporaryFolder(out.parent) as folder:
        for name in (*sources, *headers):
            (folder / name).write_text(source(name), encoding="utf-8")
        run_tool((*compiler(arch), *COMPILE_FLAGS, "-shared", *LINK_FLAGS, "-o", "made", *sources), folder)
        os.replace(folder / "made", out)
    return out


def link_custom_ops(entry: str, weights: Sequence[Path], archives: Sequence[Path], out: Path) -> Path:
    """Link networks with what makes them ONNX Runtime's custom operators, and write ``out``.

    Args:
        entry: the C file that describes the operators. It has the weights' bytes between ``weights0`` and
            ``weights0_end`` ….
        weights: files, which become part of the library.
        archives: the networks, as :func:`link_network` makes them.

    Raises:
        BuildError: as :func:`link`.
    """
    data = [line for number in range(len(weights)) for line in embedded(f"weights{number}", f"weights{number}")]
    try:
        with TemporaryFolder(out.parent) as folder:
            (folder / "entry.c").write_text("\n".join([*data, entry]), encoding="utf-8")
            (folder / "symbols").write_text("{ global: RegisterCustomOps; local: *; };\n", encoding="utf-8")
            for name in CUSTOM_OPS_SOURCES:
                (folder / name).write_text(source(name), encoding="utf-8")
            for number, file in enumerate(weights):
                (folder / f"weights{number}").symlink_to(file.resolve())
            inputs = ["entry.c", *(name for name in CUSTOM_OPS_SOURCES if name.endswith(".c"))]
            flags = (*COMPILE_FLAGS, "-shared", *LINK_FLAGS, "-Wl,--version-script,symbols")
            libraries = [*(str(archive.resolve()) for archive in archives), "-lm"]
            run_tool((*compiler(NATIVE), *flags, f"-Wl,-soname,{out.name}", "-o", "made", *inputs, *libraries), folder)
            os.replace(folder / "made", out)
    except OSError as error:
        raise BuildError(f"{out.name}: cannot link {out}: {error}") from error
    return out


def link_program(text: str, archive: Path, arch: str, out: Path) -> Path:
    """Compile a C program, link it with an archive that :func:`link` made, and write ``out``. It needs nothing else to
    run, but on this machine's architecture the system's libraries.

    Raises:
        BuildError: there is no C compiler for the archive's architecture ``arch``, or it failed.
    """
    with TemporaryFolder(out.parent) as folder:
        (folder / "program.c").write_text(text, encoding="utf-8")
        static = () if arch == NATIVE else ("-static",)
        flags = ("-std=c11", "-O1", *static, f"-I{archive.parent.resolve()}", "-o", "made")
        tools, inputs = compiler(arch, static_libc(arch)), ("program.c", str(archive.resolve()), "-lm", "-lpthread")
        run_tool((*tools, *flags, *inputs), folder)
        os.replace(folder / "made", out)
    return out


def embedded(symbol: str, file: str) -> list[str]:
    """Lines of C: a file's bytes, aligned as tensors are, from ``symbol`` to ``symbol_end``."""
    hidden = '__attribute__((visibility("hidden")))'
    return [
        f'__asm__(".pushsection .rodata.{symbol},\\"a\\"\\n.balign {ALIGNMENT}\\n"',
        f'        "{symbol}: .incbin \\"{file}\\"\\n{symbol}_end: .byte 0\\n.popsection");',
        f"extern const char {symbol}[] {hidden}, {symbol}_end[] {hidden};",
    ]


def _shared(name: str, objects: Sequence[str], folder: Path, arch: str, tools: tuple[str, ...]) -> Path:
    made = folder / f"lib{name}.so"
    (folder / "symbols").write_text(f"{{ global: {name}_*; local: *; }};\n", encoding="utf-8")
    inputs = ("entry.c", _RUNTIME, *objects, "-lm", "-ldl")
    flags = (*COMPILE_FLAGS, "-shared", *LINK_FLAGS, f"-Wl,-soname,{made.name}", "-Wl,--version-script,symbols")
    run_tool((*tools, *flags, "-o", made.name, *inputs), folder)
    return made


def _archive(name: str, objects: Sequence[str], folder: Path, arch: str, tools: tuple[str, ...]) -> Path:
    made = folder / f"lib{name}.a"
    inputs = ("entry.c", _RUNTIME, *objects)
    _relocatable(tools, f"{name}.o", inputs, folder)
    # Local from here on: the archives of several kernels must not see each other's runtime.
    whole = folder / f"{name}.o"
    whole.write_bytes(edited(whole.read_bytes(), keep=lambda symbol: symbol.startswith(f"{name}_")))
    run_tool((*archiver(arch, tools), "rcsD", made.name, whole.name), folder)
    return made


def _relocatable(compiler: tuple[str, ...], made: str, inputs: Sequence[str], folder: Path) -> None:
    """One object file of C and object files. They are compiled one by one: not every compiler takes more at once."""
    objects = []
    for file in inputs:
        if file.endswith(".c"):
            objects.append(file.removesuffix(".c") + ".part.o")
            run_tool((*compiler, *COMPILE_FLAGS, "-c", "-o", objects[-1], file), folder)
        else:
            objects.append(file)
    run_tool((*compiler, "-r", "-nostdlib", "-Wl,--strip-debug", "-o", made, *objects), folder)


# ---- the C compiler ----------------------------------------------------------------------------


def check_compiler(arch: str, *, on_device: bool = False) -> None:
    """See that kernels can be linked for an architecture, by compiling the runtime that all of them have.

    Raises:
        BuildError: there is no C compiler for it, or it fails; gives the command and what it said.
    """
    _runtime_object(compiler(arch), CUDA_SOURCES if on_device else SOURCES)


@functools.cache
def _runtime_object(compiler: tuple[str, ...], sources: tuple[str, ...] = SOURCES) -> bytes:
    """The compiled runtime, from the cache directory where it can be read and kept there.

    It is identified by the compiler's file, the flags and the sources. Its SHA-256 is kept with it: what
    a full disk or a crash left behind is not linked into kernels.
    """
    program = shutil.which(compiler[0])
    stamp = [os.path.realpath(program), str(os.stat(program).st_mtime_ns)] if program else []
    texts = {name: source(name) for name in sources}
    identity = "\0".join([*stamp, *compiler, *COMPILE_FLAGS, *texts.values()])
    name = f"runtime-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.o"
    cache = _cache_directory()
    if cache is not None:
        with contextlib.suppress(OSError):
            data = (cache / name).read_bytes()
            if hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
                return data[_DIGEST:]

    with TemporaryFolder() as folder:
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        inputs = [file for file in sources if file.endswith(".c")]
        _relocatable(compiler, name, inputs, folder)
        data = (folder / name).read_bytes()
    if cache is not None:
        # A cache that cannot be written costs time, nothing else.
        with contextlib.suppress(OSError), replacing(cache / name) as new:
            new.write_bytes(hashlib.sha256(data).digest() + data)
    return data


def _cache_directory() -> Path | None:
    """Where compiled runtimes are kept; None where there is no such place."""
    if (cache := user_cache()) is None:
        return None
    path = cache / "runtime"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path
