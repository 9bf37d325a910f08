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
import re
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ..errors import BuildError
from ..folders import TemporaryFolder, replacing, user_cache
from ..hardware.isa import CHECKED
from .interface import (
    ABI,
    ALIGNMENT,
    SWIZZLES,
    TENSOR_TYPES,
    DeviceCode,
    Interface,
    Launch,
    TensorInfo,
    TensorMap,
    read_architecture,
)
from .stack import check_stack
from .toolchain import NATIVE, architecture, archiver, compiler, run_tool, static_libc

SOURCES = ("types.h", "cpu.h", "runtime.h", "pool.c", "kernel.c")
#: Those of a library that runs a whole network.
NETWORK_SOURCES = ("types.h", "network_types.h", "cpu.h", "runtime.h", "network.h", "pool.c", "kernel.c", "network.c")
#: Those of a library that packs the weights of a network's convolutions.
PACKING_SOURCES = ("types.h", "cpu.h", "runtime.h", "pool.c", "kernel.c", "packing.c")
#: The runtime's C files for a kernel that runs on a GPU.
CUDA_SOURCES = ("types.h", "cuda_types.h", "cpu.h", "runtime.h", "launch.h", "kernel.c", "launch.c")
#: Those of a library of ONNX Runtime's custom operators, beside the networks' own.
CUSTOM_OPS_SOURCES = ("types.h", "network_types.h", "runtime.h", "onnxruntime.h", "pool.c", "onnxruntime.c")
#: Alignment in bytes of what a kernel's launches hand to each other, from the workspace's beginning.
PART_ALIGNMENT = 256
#: Most pointers and maps one launch may take (``launch.h``).
MAX_LAUNCH_ARGUMENTS, MAX_LAUNCH_MAPS = 64, 4
COMPILE_FLAGS = ("-std=c11", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-pthread")
LINK_FLAGS = ("-Wl,-z,defs", "-Wl,-z,noexecstack", "-Wl,-z,relro", "-Wl,-z,now", "-Wl,--as-needed", "-Wl,--strip-debug")
_DIGEST = hashlib.sha256().digest_size
#: The compiled runtime while a library is linked. No library is called so: a name has no dot.
_RUNTIME = "runtime.part.o"


def source(name: str) -> str:
    """The text of one of the runtime's C files."""
    return resources.files("convgen").joinpath("runtime", name).read_text(encoding="utf-8")


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
        arch, digest = architecture(data), _digest(data, interface.device)
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


def link_packers(name: str, functions: Sequence[bytes], out: Path) -> Path:
    """Link what packs weights of some kernels into a shared library with one function, which is not for others' use:
    ``int <name>_pack(int function, const convgen_tensor *tensors, void *const *data, int count)``.

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
        "int convgen_pack(convgen_function, const convgen_tensor *, void *const *, int);",
        f"static const convgen_function packers[] = {{{', '.join(f'function{i}_pack' for i in numbers)}}};",
        f"CONVGEN_EXPORT int {name}_pack(int function, const convgen_tensor *tensors, void *const *data, int count)",
        "{",
        "    return convgen_pack(packers[function], tensors, data, count);",
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
) -> Path:
    """Link functions, which the C file ``entry`` knows by their numbers."""
    from .elf import edited  # imports NumPy, which commands that link nothing do without

    try:
        with TemporaryFolder(out.parent) as folder:
            (folder / "entry.c").write_text(entry, encoding="utf-8")
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
    from .elf import edited

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


# ---- the entry points --------------------------------------------------------------------------


def version_text(interface: Interface, digest: str) -> str:
    """What ``<name>_version()`` returns: the ABI, the layer and a digest of its code."""
    return f"{abi_text(interface.device is not None)}; {interface.spec.descriptor}; {identity(interface, digest)[:16]}"


def abi_text(device: bool) -> str:
    """How a library names its ABI; a library for a GPU has other functions, and so another name."""
    return f"convgen CUDA ABI {ABI}" if device else f"convgen ABI {ABI}"


def identity(interface: Interface, digest: str) -> str:
    """What a packed buffer is tied to: 128 bits, hexadecimal, of the compiled code and the packed tensors.

    ``digest`` is the compiled code's SHA-256. Another schedule, other picks, another compiler: another
    identity.
    """
    text = repr((digest, interface.spec.key, interface.packed))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(object_file: bytes, device: DeviceCode | None) -> str:
    """The SHA-256 of a kernel's compiled code."""
    digest = hashlib.sha256(object_file)
    if device is not None:
        digest.update(repr(device).encode())
    return digest.hexdigest()


def entry_source(interface: Interface, digest: str, arch: str = NATIVE) -> str:
    """The C file that describes one kernel and defines its exported functions.

    The images of a kernel for a GPU are included from files beside it, ``image0`` ….
    """
    device = interface.device
    arguments = interface.lowered_arguments
    shapes = [_shape(name, tensor) for name, tensor in arguments.items()]
    shapes += [_shape(f"packed{i}", tensor) for i, tensor in enumerate(interface.packed)]
    offsets = interface.packed_offsets
    packed = [f"    {_tensor(f'packed{i}', t, offsets[i])}," for i, t in enumerate(interface.packed)]
    words = identity(interface, digest)
    functions = ("pack", "main") if device is None else ("pack",)
    workspace = interface.workspace_main if device is None else workspace_layout(device)[1]
    fields = [
        *(f"    .{name} = {_tensor(name, tensor, 0)}," for name, tensor in arguments.items()),
        "    .packed = packed,",
        f"    .packed_count = {len(interface.packed)},",
        f"    .empty = {int(interface.spec.n == 0)},",
        f"    .packed_size = {interface.packed_size},",
        f"    .workspace_main = {workspace},",
        f"    .workspace_task = {interface.workspace_task},",
        f"    .identity = {{0x{words[:16]}, 0x{words[16:]}}},",
        *(f"    .{name} = __tvm_ffi_{name}," for name in functions),
        "    .cpu_supported = cpu_supported,",
        f'    .version = "{version_text(interface, digest)}",',
    ]
    host = "static const convgen_kernel kernel = {"
    return "\n".join(
        [
            f'#include "{"runtime.h" if device is None else "launch.h"}"',
            '#include "cpu.h"',
            "",
            *(f"int __tvm_ffi_{name}(void *, const convgen_any *, int32_t, convgen_any *);" for name in functions),
            "",
            *shapes,
            "",
            "static const convgen_tensor packed[] = {",
            *packed,
            "};",
            "",
            f"CONVGEN_CPU_SUPPORTED({cpu_condition(interface.isa, arch)})",
            "",
            *([host, *fields, "};"] if device is None else _device_source(interface, device, fields)),
            "",
            f"CONVGEN_{'' if device is None else 'CUDA_'}ENTRY_POINTS({interface.name}, kernel)",
            "",
        ]
    )


# ---- device code -------------------------------------------------------------------------------


def workspace_layout(device: DeviceCode) -> tuple[tuple[int, ...], int]:
    """The offset in bytes of each part of a device's workspace, and the size of the whole."""
    offsets, end = [], 0
    for size in device.workspace:
        offsets.append(end)
        end += -(-size // PART_ALIGNMENT) * PART_ALIGNMENT
    return tuple(offsets), end


def _device_source(interface: Interface, device: DeviceCode, host: list[str]) -> list[str]:
    """The lines that describe a kernel with its images and launches; ``host`` are the fields of its host part."""
    lines, launches = [], []
    for index in range(len(device.images)):
        # PTX is a C string, so a zero follows.
        lines += [
            f'__asm__(".pushsection .rodata.image{index},\\"a\\"\\n.balign 64\\n"',
            f'        "convgen_image{index}: .incbin \\"image{index}\\"\\n.byte 0\\n.popsection");',
            f'extern const unsigned char convgen_image{index}[] __attribute__((visibility("hidden")));',
        ]
    images = [f"    {{{_image(what)}, convgen_image{i}}}," for i, (what, _) in enumerate(device.images)]
    for index, launch in enumerate(device.launches):
        taken = ", ".join(_argument(interface, device, name, launch.maps.get(name)) for name in launch.arguments)
        lines.append(f"static const convgen_cuda_argument arguments{index}[] = {{{taken}}};")
        launches.append(f"    {_launch(launch, index)},")
    return [
        *lines,
        "",
        "static const convgen_cuda_image images[] = {",
        *images,
        "};",
        "",
        "static const convgen_cuda_launch launches[] = {",
        *launches,
        "};",
        "",
        "static convgen_cuda_state state = {PTHREAD_MUTEX_INITIALIZER, 0};",
        "",
        "static const convgen_cuda_kernel kernel = {",
        "    .host = {",
        *(f"    {line}" for line in host),
        "    },",
        "    .images = images,",
        f"    .image_count = {len(images)},",
        "    .launches = launches,",
        f"    .launch_count = {len(launches)},",
        "    .state = &state,",
        "};",
    ]


def _image(what: str) -> str:
    """Which GPUs an image is for (``sm_90a``, ``compute_80``), as the first fields of ``convgen_cuda_image``."""
    arch = read_architecture(what)
    return f"{arch.major}, {arch.minor}, {int(arch.exact)}, {int(arch.virtual)}"


def _launch(launch: Launch, index: int) -> str:
    if len(launch.arguments) > MAX_LAUNCH_ARGUMENTS:
        found = len(launch.arguments)
        raise BuildError(f"{launch.function}: expected at most {MAX_LAUNCH_ARGUMENTS} arguments, found {found}")
    if len(launch.maps) > MAX_LAUNCH_MAPS:
        raise BuildError(f"{launch.function}: expected at most {MAX_LAUNCH_MAPS} maps, found {len(launch.maps)}")
    grid, block = (", ".join(map(str, sizes)) for sizes in (launch.grid, launch.block))
    function, count = launch.function, len(launch.arguments)
    return f'{{"{function}", {{{grid}}}, {{{block}}}, {launch.shared}, arguments{index}, {count}}}'


def _argument(interface: Interface, device: DeviceCode, name: str, tensor_map: TensorMap | None) -> str:
    """The buffer that an argument of a launch points to or maps, as a ``convgen_cuda_argument``."""
    match = re.fullmatch(r"(src|residual|dst|packed|workspace)(\d*)", name)
    offsets = {"packed": interface.packed_offsets, "workspace": workspace_layout(device)[0]}
    tensor, part = (match[1], match[2]) if match else (name, "")
    known = range(len(offsets[tensor])) if tensor in offsets else None
    if match is None or (part == "") != (known is None) or (known is not None and int(part) not in known):
        raise BuildError(f"launch: expected the argument src, residual, packed0, workspace0 or dst, found {name!r}")
    mapped = f"&(const convgen_cuda_map){_map(tensor_map)}" if tensor_map else "0"
    return f"{{CONVGEN_{tensor.upper()}, {offsets[tensor][int(part)] if part else 0}, {mapped}}}"


def _map(tensor_map: TensorMap) -> str:
    """The fields of a ``convgen_cuda_map``."""
    rank = len(tensor_map.dims)
    arrays = {
        "dims": tensor_map.dims,
        "strides": tensor_map.strides,
        "box": tensor_map.box,
        "steps": tensor_map.steps or (1,) * rank,
        "lower": tensor_map.lower,
        "upper": tensor_map.upper,
    }
    fields = [int(bool(tensor_map.lower)), TENSOR_TYPES[tensor_map.dtype], SWIZZLES[tensor_map.swizzle], rank]
    named = [f".{name} = {{{', '.join(map(str, values))}}}" for name, values in arrays.items() if values]
    return f"{{{', '.join([*map(str, fields), *named])}}}"


# ---- CPU features ------------------------------------------------------------------------------


def cpu_condition(isa: Sequence[str], arch: str) -> str:
    """A C expression: whether the CPU has these features.

    Raises:
        BuildError: there is no way to ask for one.
    """
    features = {feature.name: feature for feature in CHECKED.get(arch, ())}
    unknown = sorted(set(isa) - set(features))
    if unknown:
        raise BuildError(f"isa: expected features that a CPU of {arch} can be asked for, found {', '.join(unknown)}")
    bits, state = dict[str, int](), 0
    for feature in map(features.__getitem__, isa):
        bits[feature.word] = bits.get(feature.word, 0) | 1 << feature.bit
        state |= feature.state
    asked = [f"convgen_cpu_tells({word}, {mask:#x})" for word, mask in bits.items()]
    return " && ".join([*asked, f"convgen_system_saves({state:#x})"] if state else asked) or "1"


def _shape(name: str, tensor: TensorInfo) -> str:
    return f"static const int64_t {name}_shape[] = {{{', '.join(map(str, tensor.shape))}}};"


def _tensor(name: str, tensor: TensorInfo, offset: int) -> str:
    return f"{{{len(tensor.shape)}, {described(tensor.dtype)}, {name}_shape, {tensor.bytes}, {offset}}}"


def described(dtype: str) -> str:
    """A stored type as C has it in DLPack's words."""
    code, bits, lanes = DLPACK_DTYPES[dtype]
    return f"{{{code}, {bits}, {lanes}}}"


#: DLPack's code, bits and lanes of stored types; the compiled code takes bfloat16 as its bits.
DLPACK_DTYPES = {
    "f32": (2, 32, 1),
    "f16": (2, 16, 1),
    "bf16": (1, 16, 1),
    "i8": (0, 8, 1),
    "u8": (1, 8, 1),
    "i32": (0, 32, 1),
}
