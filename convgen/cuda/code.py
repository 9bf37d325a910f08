"""Lowered TIR -> CUDA source -> code for the device.

TVM's own header is left behind with its helpers: what the kernels need of it is in ``runtime/device.h``,
which also compiles for a CPU (:mod:`convgen.check.emulation.emulate`).
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cuda import model
from ..errors import BuildError, UnsupportedError
from ..folders import TemporaryFolder
from ..hardware.target import Target
from ..interrupts import interrupts_held
from ..lowering.compute import round_up
from ..lowering.interface import DeviceCode, Launch, TensorMap
from ..lowering.lower import Lowered
from ..lowering.runtime import source as runtime_source
from .persistent import persistent
from .tensorize import ROW, wgmma_definition

#: What CUDA sources include, in ``runtime/``.
HEADERS = ("device.h", "hopper.h")
#: TVM's words -> those of device.h. Its copies are told the type's name and sizes in the function's name.
_WORDS = (
    (r"tvm_builtin_ptx_cp_async_commit_group\w*\(\)", "cg_commit()"),
    (r"tvm_builtin_ptx_cp_async_wait_group\w*_(\d+)\(\)", r"cg_wait<\1>()"),
    (r"\b(max|min)\(", r"cg_\1("),
    # A warp's tile: each of the 32 threads holds its share.
    (r"alignas\(\d+\) (float|int) (\w*tile_sums\w*)\[(\d+)\]", lambda m: f"{m[1]} {m[2]}[{int(m[3]) // 32}]"),
)
#: Sixteen 8-bit integers, or zeros, on their way to shared memory: TVM makes asynchronous copies of floats alone.
_COPY_OR_ZERO = re.compile(
    r"int4 (\w+);\s*if \((.*)\) \{\s*\1 = \*\(int4\*\)\((\w+) \+ (.*)\);\s*"
    r"\} else \{\s*\1 = make_int4\((?:\(signed char\)0(?:, )?){16}\);\s*\}\s*"
    r"\*\(int4\*\)\(\(\(signed char\*\)(\w+)\) \+ (.*)\) = \1;"
)
_COPY = r"cg_copy_async<16>((char*)(\5) + \6, (const char*)(\3) + \4, \2);"
_AXES = ("x", "y", "z")
#: Declares a parameter that is a map.
_MAP = "const __grid_constant__ cg_tensor_map"
#: Declares a kernel's shared memory.
_SHARED = re.compile(r"(extern __shared__ __align__)\((\d+)\)")
#: Registers a thread with a tile of sums is left, at least.
_REGISTERS = 168


@dataclass(frozen=True)
class DeviceSource:
    """CUDA source, what is launched of it, and bytes of what the launches hand to each other."""

    text: str
    launches: tuple[Launch, ...]
    workspace: tuple[int, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What the compiler reports of one device function.

    Attributes:
        registers: per thread.
        spilled: bytes of registers kept in memory instead.
        shared: bytes of shared memory, dynamic ones included.
        threads: of a block.
    """

    function: str
    registers: int
    spilled: int
    shared: int
    threads: int


@interrupts_held()
def generate(lowered: Lowered) -> DeviceSource:
    """The CUDA source of a lowered candidate's ``main``.

    Raises:
        BuildError: TVM failed.
    """
    names = [f"packed{i}" for i in range(len(lowered.packed))]
    try:
        source = _generated(lowered.module, lowered.target, _arguments(lowered, names), _maps(lowered))
        return _persistent(source, lowered)
    except BuildError:
        raise
    except Exception as error:  # TVM raises its errors as many types, RuntimeError among them
        raise BuildError(f"{lowered.spec.descriptor}: {lowered.candidate} does not compile: {error}") from error


@interrupts_held()
def generate_function(module: Any, target: Target) -> DeviceSource:
    """The CUDA source of a scheduled module's function ``main`` that is not a convolution; its launches' arguments have
    the names of its buffers.

    Raises:
        BuildError: TVM failed.
    """
    names = [str(parameter.name) for parameter in module["main"].params]
    try:
        return _generated(module, target, dict(zip(names, names, strict=True)), {})
    except BuildError:
        raise
    except Exception as error:  # as in generate
        raise BuildError(f"a pass does not compile: {error}") from error


def _generated(module: Any, target: Target, arguments: dict[str, str], maps: dict[str, TensorMap]) -> DeviceSource:
    """The source of a module's ``main``; ``arguments``: names of its buffers, by those in TIR."""
    host, device = _split(module, target)
    source = _launches(host, device, _cuda_text(device, target), arguments, maps)
    return replace(source, text=_bounded(source, target))


def _split(scheduled: Any, target: Target) -> tuple[Any, Any]:
    """A module's ``main`` as its host function and its device functions."""
    import tvm
    from tvm.s_tir.pipeline import finalize_device_passes
    from tvm.target import Target as TvmTarget
    from tvm.tirx import transform

    config = TvmTarget(json.loads(target.tvm_config), host="llvm")
    with tvm.transform.PassContext(opt_level=3, config={"tirx.use_async_copy": True}):
        module = transform.BindTarget(config)(tvm.IRModule({"main": scheduled["main"]}))
        module = tvm.ir.transform.Sequential(_passes())(module)
    device = {name: function for name, function in module.functions.items() if name.name_hint != "main"}
    return module["main"], finalize_device_passes()(tvm.IRModule(device))


def _passes() -> list[Any]:
    """TVM's default pipeline for GPUs, less what no kernel here has. StorageRewrite would let buffers in shared
    memory share a name; one pass that reuses memory is enough.
    """
    import tvm
    from tvm import s_tir, tirx

    s, t = s_tir.transform, tirx.transform
    return [
        s.CanonicalizeLoop(),
        s.LowerCrossThreadReduction(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.LiftThreadBinding(),
        s.CompactBufferAllocation(),
        s.UnifyThreadBinding(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.AnnotateIrregularLoop(),
        s.InjectSoftwarePipeline(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.NarrowDataType(32),
        s.LoopPartition(),
        t.VectorizeLoop(True),
        s.InjectVirtualThread(),
        s.LowerAsyncDMA(),
        s.HoistIfThenElse(),
        t.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        t.CommonSubexprElim(),
        t.VerifyMemory(),
        t.AnnotateEntryFunc(),
        s.ThreadSync("shared"),
        s.ThreadSync("shared.dyn"),
        s.LowerThreadAllreduce(),
        s.InjectPTXAsyncCopy(),
        s.MergeSharedMemoryAllocations(),
        tvm.transform.module_pass(lambda module, _: _resolve_pointers(module), opt_level=0, name="ResolvePointers"),
        t.SplitHostDevice(),
        t.MakePackedAPI(),
    ]


def _resolve_pointers(module: Any) -> Any:
    """Pointers into shared memory as calls of device.h's ``cg_at``.

    Buffers of several element types are parts of one there, and TVM refuses pointers of another type than the
    buffer it takes for the whole. TIR has no mutator in Python: the serialised form is edited.
    """
    import tvm

    graph = json.loads(tvm.ir.save_json(module))
    nodes = graph["nodes"]
    operators = {node["data"]: i for i, node in enumerate(nodes) if node["type"] == "ir.Op"}
    pointer, extern = operators.get("tirx.tvm_access_ptr"), operators.get("tirx.call_extern")
    if pointer is None or extern is None:
        return module
    text = next(node for node in nodes if node["type"] == "ir.StringImm")["data"]
    for node in list(nodes):
        if node["type"] != "ir.Call" or node["data"]["op"] != pointer:
            continue
        element, data, offset, _, _ = nodes[node["data"]["args"]]["data"]
        if nodes[nodes[nodes[data]["data"]["ty"]]["data"]["storage_scope"]]["data"] != "shared.dyn":
            continue
        bits = int(re.sub(r"\D", "", nodes[nodes[element]["data"]["ty"]]["data"]["dtype"]))
        nodes.append({"type": "ffi.String", "data": f"cg_at<{bits // 8}>"})
        nodes.append({"type": "ir.StringImm", "data": {**text, "value": len(nodes) - 1}})
        nodes.append({"type": "ffi.Array", "data": [len(nodes) - 1, data, offset]})
        node["data"] |= {"op": extern, "args": len(nodes) - 1}
    return tvm.ir.load_json(json.dumps(graph))


def _cuda_text(device: Any, target: Target) -> str:
    """What TVM generates, in the words of device.h."""
    import tvm
    import tvm_ffi

    # TVM compiles what it generates at once; the text is wanted, for several compilers.
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", lambda code, _: code, override=True)
    module = tvm.get_global_func("target.build.cuda")(device, target.tvm())
    text = str(module.inspect_source("cuda"))
    kernels = text[text.index('extern "C" __global__') :]
    # Every function is declared first.
    kernels = re.sub(r'extern "C" __global__[^{};]*;\n', "", kernels)
    kernels = _COPY_OR_ZERO.sub(_COPY, _asynchronous(kernels))
    for pattern, word in _WORDS:
        kernels = re.sub(pattern, word, kernels)
    head = '#include "device.h"\n\n'
    wide = set(re.findall(r"cg_(?:wgmma|tma)_tile<cg_(\w+), (\d+)", kernels))
    head += _definitions(wide)
    return head + "".join(_mapped(_swizzled(kernel)) for kernel in re.split(r'(?=extern "C" __global__)', kernels))


def _definitions(products: set[tuple[str, str]]) -> str:
    """Of the warpgroup's products that a text has, by types and columns; the emulator has its own."""
    text = "".join(wgmma_definition(kind, int(cols)) for kind, cols in sorted(products))
    return f"#ifndef CONVGEN_EMULATE\n{text}#endif\n\n" if text else ""


def _swizzled(kernel: str) -> str:
    """A kernel whose copies go where its products read; others as they are."""
    product = re.search(r"cg_(wg)?mma_tile<[^>]*>\(", kernel)
    if product is None:
        return kernel
    row = int(_parts(kernel[product.end() :])[1][2])
    kernel = kernel.replace("cg_copy_async<16>(", f"cg_copy_swizzled<{row}>(")
    if product[1]:  # it does not see what threads wrote before the fence
        kernel = re.sub(r"cg_wait<\d+>\(\);", r"\g<0> cg_fence_async();", kernel)
    return _SHARED.sub(rf"\1({8 * row})", kernel)


def _mapped(kernel: str) -> str:
    """A kernel whose tiles the copy engine fetches, given maps of the tensors; others as they are."""
    pointers = []
    for call in re.finditer(r"cg_tma_tile<.*?>>\(|cg_piece_(?:sums|added)\(", kernel):
        parts = _parts(kernel[call.end() :])[1]
        pointers += parts[1:] if call[0].startswith("cg_piece_") else parts[2:4]
    if not pointers:
        return kernel
    for pointer in pointers:
        tensor = re.findall(r"\w+", pointer)[0]
        kernel = kernel.replace(pointer, tensor)
        kernel = re.sub(rf"(signed )?\w+\* __restrict__ {tensor}\b", f"{_MAP} {tensor}", kernel)
    return _SHARED.sub(rf"\1({8 * ROW})", kernel)


def _asynchronous(text: str) -> str:
    """``ptx_cp_async…_<bytes>_<dst size>_<src size>(dst, offset, src, offset, …)`` as ``cg_copy_async``."""

    def copy(match: re.Match[str]) -> str:
        size, dst_size, src_size = int(match[1]), int(match[2]), int(match[3])
        end, parts = _parts(text_after := text[match.end() :])
        dst, dst_offset, src, src_offset, *valid = parts
        made = (
            f"cg_copy_async<{size}>((char*)({dst}) + ({dst_offset}) * {dst_size}, "
            # Elements are counted in 32 bits, bytes are not: a tensor may have 2 GiB and more.
            f"(const char*)({src}) + (long long)({src_offset}) * {src_size}{''.join(', ' + v for v in valid)})"
        )
        spans.append((match.start(), len(text) - len(text_after) + end, made))
        return ""

    spans: list[tuple[int, int, str]] = []
    for match in re.finditer(r"ptx_cp_async\w*?_cg?a?_?(\d+)_(\d+)_(\d+)\w*\(", text):
        copy(match)
    for start, end, made in reversed(spans):
        text = text[:start] + made + text[end:]
    return text


def _parts(text: str) -> tuple[int, list[str]]:
    """The arguments of a call whose opening parenthesis precedes ``text``, and where it ends."""
    depth, start, parts = 0, 0, []
    for i, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}" and depth:
            depth -= 1
        elif letter == ")" or (letter == "," and not depth):
            parts.append(text[start:i].strip())
            start = i + 1
            if letter == ")":
                return i + 1, parts
    raise BuildError("expected a call in the generated code to end, found the end of the text")


def _arguments(lowered: Lowered, packed: list[str]) -> dict[str, str]:
    """The interface's names of main's buffers, by those in TIR."""
    main = lowered.module["main"]
    names = [str(parameter.name) for parameter in main.params]
    leading = len(names) - len(packed) - 1
    return dict(zip(names, [*names[:leading], *packed, names[-1]], strict=True))


def _maps(lowered: Lowered) -> dict[str, TensorMap]:
    return lowered.candidate.schedule.maps(lowered.spec.core, lowered.candidate.picks)


def _launches(host: Any, device: Any, text: str, arguments: dict[str, str], maps: dict[str, TensorMap]) -> DeviceSource:
    """The launches the host function makes, from its calls."""
    functions = {
        str(f.attrs["global_symbol"]) if "global_symbol" in f.attrs else n.name_hint: f
        for n, f in device.functions.items()
    }
    sizes = _intermediates(host)
    spaces: dict[str, int] = {}
    launches = []
    for name, tags, extents in _calls(host):
        parameters = re.search(rf"\b{name}\(([^)]*)\)", text)
        if parameters is None or name not in functions:
            raise BuildError(f"expected a device function {name}, found none")
        taken, mapped = [], {}
        for parameter in parameters[1].split(","):
            variable = parameter.split()[-1].removesuffix("_ptr")
            if variable in arguments:
                taken.append(arguments[variable])
            elif variable in sizes:
                position = spaces.setdefault(variable, len(spaces))
                taken.append(f"workspace{position}")
            else:
                raise BuildError(f"{name}: expected a tensor, found the parameter {variable}")
            if _MAP in parameter:
                mapped[taken[-1]] = maps[taken[-1]]
        shared = dict(zip(tags, extents, strict=True)).get("tirx.use_dyn_shared_memory", 0)
        if declared := _SHARED.search(_body(text, name)):
            shared = round_up(shared, int(declared[2]))
        grid, block = _three(tags, extents, "blockIdx"), _three(tags, extents, "threadIdx")
        launches.append(Launch(name, grid, block, shared, tuple(taken), mapped))
    return DeviceSource(text, tuple(launches), tuple(sizes[name] for name in spaces))


def _persistent(source: DeviceSource, lowered: Lowered) -> DeviceSource:
    """The source, where its blocks are to take one tile after another, made so."""
    made = lowered.candidate.schedule.persistent(lowered.spec.core, lowered.candidate.picks)
    if made is None:
        return source
    text, launches = source.text, list(source.launches)
    number = next(i for i, launch in enumerate(launches) if "cg_piece_sums(" in _body(text, launch.function))
    text, launches[number] = persistent(text, launches[number], made, lowered.target.cores)
    product = re.findall(r"cg_persistent<cg_(\w+), (\d+)", made.type)
    text = text.replace('#include "device.h"\n\n', '#include "device.h"\n\n' + _definitions(set(product)), 1)
    return replace(source, text=text, launches=tuple(launches))


def _bounded(source: DeviceSource, target: Target) -> str:
    """The text, kernels with matrix units told how many blocks a core is to hold: as many as shared memory allows,
    with registers for sums and fragments. Untold, the compiler saves registers for more, and spills.
    """
    text = source.text
    for launch in source.launches:
        if launch.shared and "_tile<" in _body(text, launch.function):
            text = _told(text, launch, target)
    return text


def _told(text: str, launch: Launch, target: Target) -> str:
    """The text, in which a launch's function says how many blocks a core is to hold, if it does not yet."""
    threads = math.prod(launch.block)
    blocks = min(target.shared_per_core // (launch.shared + model.RESERVED), model.REGISTERS // (threads * _REGISTERS))
    bounds = f"__launch_bounds__({threads}) {launch.function}("
    return text.replace(bounds, f"__launch_bounds__({threads}, {max(1, blocks)}) {launch.function}(")


def _roomier(text: str, launch: Launch, target: Target) -> str:
    """The text, in which a core is to hold fewer blocks of a launch's function: a block less than it says, or as few as
    :func:`_told` says. A persistent one divides a core's registers itself, and stays as it is.
    """
    body = _body(text, launch.function)
    said = re.search(rf"__launch_bounds__\((\d+), (\d+)\) {launch.function}\(", text)
    if "cg_persistent<" in body or (said and said[2] == "1"):
        return text
    if said is None:
        return _told(text, launch, target)
    return text.replace(said[0], f"__launch_bounds__({said[1]}, {int(said[2]) - 1}) {launch.function}(")


def _body(text: str, name: str) -> str:
    """A function's text."""
    start = text.index(f" {name}(")
    end = text.find('extern "C" __global__', start)
    return text[start:end] if end >= 0 else text[start:]


def _three(tags: list[str], extents: list[int], kind: str) -> tuple[int, int, int]:
    x, y, z = (extents[tags.index(f"{kind}.{a}")] if f"{kind}.{a}" in tags else 1 for a in _AXES)
    return x, y, z


def _calls(host: Any) -> list[tuple[str, list[str], list[int]]]:
    """Of each launch the function's name, what its last arguments are, and these."""
    found = []
    for match in re.finditer(r'T\.call_ffi_kernel\("(\w+)", (.*?), launch_params=\[(.*?)\]', host.script()):
        tags = re.findall(r'"([\w.]+)"', match[3])
        values = match[2].split(", ")[-len(tags) :] if tags else []
        found.append((match[1], tags, [int(re.sub(r"T\.int64\((\d+)\)", r"\1", value)) for value in values]))
    if not found:
        raise BuildError("expected the scheduled program to launch a kernel, found none: no loop is bound to blocks")
    return found


def _intermediates(host: Any) -> dict[str, int]:
    """Bytes of the buffers that host code allocates for its launches, by name."""
    sizes = {}
    for match in re.finditer(r"(\w+)(?:: [^=\n]*)? = T\.alloc_buffer\(\(([\d, ]*)\)(?:, \"(\w+)\")?", host.script()):
        shape = [int(size) for size in match[2].split(",") if size.strip()]
        bits = int(re.search(r"\d+", match[3] or "float32")[0])  # type: ignore[index]
        sizes[match[1]] = math.prod(shape) * bits // 8
    return sizes


# ---- the compiler ------------------------------------------------------------------------------


def compile_images(source: DeviceSource, target: Target) -> tuple[tuple[tuple[str, bytes], ...], tuple[Resources, ...]]:
    """Code for the target's architecture, and PTX for later devices where the architecture has any.

    Returns:
        ``((what it is for, code), …)`` as :class:`~convgen.lowering.interface.DeviceCode` has them, and what each
        function takes of the device.

    Raises:
        UnsupportedError: the compiler is not installed, or does not know the architecture.
        BuildError: it refused the source.
    """
    text = source.text
    cubin, ptx, log = compiled(text, target.arch)
    while True:  # saving registers for more blocks is not worth a spill
        roomier = text
        for launch in source.launches:
            if _resources(log, launch).spilled:
                roomier = _roomier(roomier, launch, target)
        if roomier == text:
            break
        text = roomier
        cubin, ptx, log = compiled(text, target.arch)
    images = [(target.arch, cubin)]
    later = target.arch.replace("sm_", "compute_")
    if not later.endswith("a"):
        images.append((later, ptx))
    elif "cg_wgmma" not in text:  # nothing of what only this architecture has
        later = later.removesuffix("a")
        images.append((later, compiled(text, later)[1]))
    return tuple(images), tuple(_resources(log, launch) for launch in source.launches)


def _resources(log: str, launch: Launch) -> Resources:
    """What ``ptxas -v`` says of a function."""
    said = re.search(
        rf"Compiling entry function '{launch.function}'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        log,
        re.DOTALL,
    )
    if said is None:
        raise BuildError(f"expected the compiler to report on {launch.function}, found {log!r}")
    static = re.search(r"(\d+) bytes smem", said[4])
    shared = launch.shared + (int(static[1]) if static else 0)
    return Resources(launch.function, int(said[3]), int(said[1]) + int(said[2]), shared, math.prod(launch.block))


@functools.cache
def _compiler() -> Any:
    try:
        from cuda.bindings import nvrtc

        error, _, _ = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the library it loads is missing
        raise UnsupportedError(
            f"target cuda: expected NVIDIA's compiler library, found none ({error}): "
            "pip install 'cuda-bindings<13' nvidia-cuda-nvrtc-cu12"
        ) from error
    return nvrtc


def compiler(arch: str) -> Any:
    """NVIDIA's compiler library, for an architecture.

    Raises:
        UnsupportedError: it is not installed, or does not know the architecture.
    """
    nvrtc = _compiler()
    numbers = nvrtc.nvrtcGetSupportedArchs()[1]
    if int(re.sub(r"\D", "", arch)) not in numbers:
        known = ", ".join(f"sm_{number}" for number in numbers)
        raise UnsupportedError(f"target cuda:{arch}: expected an architecture the compiler knows ({known})")
    return nvrtc


def compiled(text: str, arch: str) -> tuple[bytes, bytes, str]:
    """Cubin, PTX and log of a source, for an architecture ``sm_…``; no cubin for a virtual one, ``compute_…``.

    Raises:
        UnsupportedError: the compiler is not installed, or does not know the architecture.
        BuildError: it refused the source; quotes what it said.
    """
    nvrtc = compiler(arch)
    headers = [runtime_source(name).encode() for name in HEADERS]
    names = [name.encode() for name in HEADERS]
    error, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", len(names), headers, names)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"NVRTC: {error.name}")
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"-std=c++17", b"--ptxas-options=-v", b"--diag-suppress=177"]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(f"NVRTC refuses the generated code for {arch}: {log.strip()}")
        cubin = _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        ptx = _bytes(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
        return cubin, ptx, log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _bytes(size_of: Any, get: Any, program: Any) -> bytes:
    _, size = size_of(program)
    data = bytearray(size)
    get(program, data)
    return bytes(data)


def device_code(lowered: Lowered) -> DeviceCode:
    """A lowered candidate's code for its target.

    Raises:
        UnsupportedError, BuildError: see :func:`compile_images`.
    """
    source = generate(lowered)
    images, _ = compile_images(source, lowered.target)
    return DeviceCode(images, source.launches, source.workspace)


def disassembled(cubin: bytes) -> str:
    """A cubin's instructions (SASS).

    Raises:
        UnsupportedError: nvdisasm is not installed.
    """
    program = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    with TemporaryFolder() as folder:
        file = folder / "code.cubin"
        file.write_bytes(cubin)
        command = [str(program) if program.exists() else "nvdisasm", "-c", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise UnsupportedError("source: expected nvdisasm, found none: pip install nvidia-cuda-nvdisasm") from error
    if done.returncode:
        raise BuildError(f"nvdisasm: {done.stderr.strip()}")
    return done.stdout
