"""The C text of one kernel's entry points: what describes its tensors, its launches and the CPU that it needs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

from ..errors import BuildError
from ..hardware.isa import CHECKED
from .interface import (
    PROMOTIONS,
    SWIZZLES,
    TENSOR_TYPES,
    DeviceCode,
    Interface,
    Launch,
    TensorInfo,
    TensorMap,
    abi_text,
    read_architecture,
)
from .toolchain import NATIVE

#: Alignment in bytes of what a kernel's launches hand to each other, from the workspace's beginning.
PART_ALIGNMENT = 256
#: Most pointers and maps one launch may take (``launch.h``).
MAX_LAUNCH_ARGUMENTS, MAX_LAUNCH_MAPS = 64, 4


def version_text(interface: Interface, digest: str) -> str:
    """What ``<name>_version()`` returns: the ABI, the layer and a digest of its code."""
    return f"{abi_text(interface.device is not None)}; {interface.spec.descriptor}; {identity(interface, digest)[:16]}"


def identity(interface: Interface, digest: str) -> str:
    """What a packed buffer is tied to: 128 bits, hexadecimal, of the compiled code and the packed tensors.

    ``digest`` is the compiled code's SHA-256. Another schedule, other picks, another compiler: another
    identity.
    """
    text = repr((digest, interface.spec.key, interface.packed))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def code_digest(object_file: bytes, device: DeviceCode | None) -> str:
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

    def place(name: str) -> tuple[str, int]:
        match = re.fullmatch(r"(src|residual|dst|packed|workspace)(\d*)", name)
        offsets = {"packed": interface.packed_offsets, "workspace": workspace_layout(device)[0]}
        tensor, part = (match[1], match[2]) if match else (name, "")
        known = range(len(offsets[tensor])) if tensor in offsets else None
        if match is None or (part == "") != (known is None) or (known is not None and int(part) not in known):
            raise BuildError(f"launch: expected the argument src, residual, packed0, workspace0 or dst, found {name!r}")
        return f"CONVGEN_{tensor.upper()}", offsets[tensor][int(part)] if part else 0

    lines, code = device_code_source(device, "", place)
    return [
        *lines,
        "static const convgen_cuda_kernel kernel = {",
        "    .host = {",
        *(f"    {line}" for line in host),
        "    },",
        f"    .code = {code},",
        "};",
    ]


def device_code_source(
    device: DeviceCode, label: str, place: Callable[[str], tuple[str, int]]
) -> tuple[list[str], str]:
    """The lines that describe a device's code, and the ``convgen_cuda_code`` that it is, as C has it.

    Its images are included from files, ``image0`` …, after the label.

    Args:
        label: part of the names of what the lines define.
        place: of an argument of a launch, the number of its buffer and where it begins there, in bytes.
    """
    lines, launches = [], []
    for index in range(len(device.images)):
        symbol, file = f"convgen_image{label}{index}", f"image{label}{index}"
        # PTX is a C string, so a zero follows.
        lines += [
            f'__asm__(".pushsection .rodata.{file},\\"a\\"\\n.balign 64\\n"',
            f'        "{symbol}: .incbin \\"{file}\\"\\n.byte 0\\n.popsection");',
            f'extern const unsigned char {symbol}[] __attribute__((visibility("hidden")));',
        ]
    images = [f"    {{{_image(what)}, convgen_image{label}{i}}}," for i, (what, _) in enumerate(device.images)]
    for index, launch in enumerate(device.launches):
        taken = ", ".join(_argument(*place(name), launch.maps.get(name)) for name in launch.arguments)
        lines.append(f"static const convgen_cuda_argument arguments{label}{index}[] = {{{taken}}};")
        launches.append(f"    {_launch(launch, f'{label}{index}')},")
    lines += [
        "",
        f"static const convgen_cuda_image images{label}[] = {{",
        *images,
        "};",
        "",
        f"static const convgen_cuda_launch launches{label}[] = {{",
        *launches,
        "};",
        "",
        f"static convgen_cuda_state state{label} = {{PTHREAD_MUTEX_INITIALIZER, 0}};",
        "",
    ]
    return lines, f"{{images{label}, {len(images)}, launches{label}, {len(launches)}, &state{label}}}"


def _image(what: str) -> str:
    """Which GPUs an image is for (``sm_90a``, ``compute_80``), as the first fields of ``convgen_cuda_image``."""
    arch = read_architecture(what)
    return f"{arch.major}, {arch.minor}, {int(arch.exact)}, {int(arch.virtual)}"


def _launch(launch: Launch, label: str) -> str:
    if len(launch.arguments) > MAX_LAUNCH_ARGUMENTS:
        found = len(launch.arguments)
        raise BuildError(f"{launch.function}: expected at most {MAX_LAUNCH_ARGUMENTS} arguments, found {found}")
    if len(launch.maps) > MAX_LAUNCH_MAPS:
        raise BuildError(f"{launch.function}: expected at most {MAX_LAUNCH_MAPS} maps, found {len(launch.maps)}")
    grid, block = (", ".join(map(str, sizes)) for sizes in (launch.grid, launch.block))
    function, count = launch.function, len(launch.arguments)
    return f'{{"{function}", {{{grid}}}, {{{block}}}, {launch.shared}, arguments{label}, {count}}}'


def _argument(buffer: str, offset: int, tensor_map: TensorMap | None) -> str:
    """What an argument of a launch points to or maps, as a ``convgen_cuda_argument``."""
    mapped = f"&(const convgen_cuda_map){_map(tensor_map)}" if tensor_map else "0"
    return f"{{{buffer}, {offset}, {mapped}}}"


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
    fields = [int(bool(tensor_map.lower)), TENSOR_TYPES[tensor_map.dtype], SWIZZLES[tensor_map.swizzle]]
    fields += [PROMOTIONS[tensor_map.promotion], rank]
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
    "i64": (0, 64, 1),
    "bool": (1, 8, 1),
}
