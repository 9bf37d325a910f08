"""The functions of a network on a GPU: their source, their code, and the C file that describes the network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..cuda.code import DeviceSource, compile_images, generate, generate_function
from ..errors import BuildError
from ..folders import TemporaryFolder
from ..hardware.target import Target
from ..lowering.entry import device_code_source, workspace_layout
from ..lowering.interface import DeviceCode
from ..lowering.lower import Workspace, compile_object, lower
from .operators import lowered
from .plan import Function, Product
from .source import Call, Code, network_tables, place_text
from .weights import Compiled


def device_source(function: Function, target: Target) -> DeviceSource:
    """The CUDA source of a function.

    Raises:
        BuildError: TVM failed.
    """
    if isinstance(function, Product):
        return generate(lower(function.spec, target, function.candidate))
    return generate_function(lowered(function, target), target)


def compile_for_device(function: Function, target: Target) -> Compiled:
    """A function's code for a GPU, and of a convolution what packs its weights on this machine.

    Raises:
        BuildError: TVM, LLVM or NVIDIA's compiler failed.
        UnsupportedError: NVIDIA's compiler is not installed.
    """
    source = device_source(function, target)
    images, _ = compile_images(source, target)
    device = DeviceCode(images, source.launches, source.workspace)
    workspace = Workspace(workspace_layout(device)[1], 0)
    if not isinstance(function, Product):
        return Compiled(b"", workspace, device=device)
    kernel = lower(function.spec, target, function.candidate)
    with TemporaryFolder() as folder:
        compile_object(kernel, folder / "pack.o")
        return Compiled((folder / "pack.o").read_bytes(), workspace, kernel.packed, device=device)


def argument_names(function: Function, packed: int) -> list[str]:
    """What a function's launches call its arguments, in their order."""
    if not isinstance(function, Product):
        return [*(f"input{number}" for number in range(len(function.inputs))), "output"]
    residual = ["residual"] * function.spec.residual
    return ["src", *residual, *(f"packed{number}" for number in range(packed)), "dst"]


def images_of(codes: Sequence[DeviceCode]) -> dict[str, bytes]:
    """The files that :func:`device_entry_source` includes."""
    return {f"image{n}_{i}": image for n, code in enumerate(codes) for i, (_, image) in enumerate(code.images)}


def device_entry_source(code: Code, codes: Sequence[DeviceCode], names: Sequence[Sequence[str]]) -> str:
    """The C file.

    Args:
        codes: of each function.
        names: of its arguments, as :func:`argument_names` has them.
    """
    lines, functions = list[str](), list[str]()
    for number, (device, arguments) in enumerate(zip(codes, names, strict=True)):
        made, value = device_code_source(device, f"{number}_", _Numbers(device, arguments))
        lines += [*made, f"static const convgen_cuda_code code{number} = {value};", ""]
        functions.append(f"&code{number}")
    for number, size in enumerate(code.sizes):
        for at, call in enumerate(size.calls):
            places = ", ".join(place_text(place) for _, place in call.arguments)
            lines.append(f"static const convgen_device_place places{number}_{at}[] = {{{places}}};")
        lines += [
            f"static const convgen_device_step steps{number}[] = {{",
            *(f"    {_step(call, number, at)}," for at, call in enumerate(size.calls)),
            "};",
        ]
    tables, sizes = network_tables(code)
    identity, steps = code.identity, ", ".join(f"steps{number}" for number in range(len(code.sizes)))
    return "\n".join(
        [
            '#include "network_cuda.h"',
            '#include "cpu.h"',
            "",
            *lines,
            "",
            *tables,
            f"static const convgen_cuda_code *const functions[] = {{{', '.join(functions)}}};",
            f"static const convgen_device_step *const steps[] = {{{steps}}};",
            "",
            "static const convgen_device_network network = {",
            "    .host = {",
            "        .sizes = sizes,",
            f"        .size_count = {sizes},",
            f"        .input_count = {len(code.inputs)},",
            f"        .output_count = {len(code.outputs)},",
            f"        .weights = {code.weights},",
            f"        .identity = {{0x{identity[:16]}, 0x{identity[16:]}}},",
            f"        .version = {json.dumps(code.version)},",
            "    },",
            "    .steps = steps,",
            "    .functions = functions,",
            f"    .function_count = {len(functions)},",
            "};",
            "",
            f"CONVGEN_DEVICE_NETWORK_ENTRY_POINTS({code.name}, network)",
            "",
        ]
    )


class _Numbers:
    """Which buffer of a step an argument of a launch points into, and where."""

    def __init__(self, device: DeviceCode, names: Sequence[str]) -> None:
        self._known: Mapping[str, tuple[str, int]] = {name: (str(number), 0) for number, name in enumerate(names)} | {
            f"workspace{part}": (str(len(names)), offset) for part, offset in enumerate(workspace_layout(device)[0])
        }

    def __call__(self, name: str) -> tuple[str, int]:
        if name not in self._known:
            raise BuildError(f"launch: expected an argument among {', '.join(self._known)}, found {name!r}")
        return self._known[name]


def _step(call: Call, size: int, number: int) -> str:
    return f"{{&code{call.function}, places{size}_{number}, {len(call.arguments)}}}"
