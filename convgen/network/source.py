"""The C file that describes a network: its steps, and where their tensors lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BuildError
from ..lowering.interface import TensorInfo
from ..lowering.link import NATIVE, cpu_condition
from .memory import ARENA, INPUT, OUTPUT, WEIGHTS, Place

#: Most arguments of a step (``network.c``).
MOST_ARGUMENTS = 256
_SPACES = {ARENA: "CONVGEN_ARENA", WEIGHTS: "CONVGEN_WEIGHTS", INPUT: "CONVGEN_INPUT", OUTPUT: "CONVGEN_OUTPUT"}


@dataclass(frozen=True)
class Call:
    """A step as the runtime sees it.

    Attributes:
        function: its number.
        arguments: shape and place of each tensor, in the function's order.
    """

    function: int
    arguments: tuple[tuple[tuple[int, ...], Place], ...]


@dataclass(frozen=True)
class Code:
    """What the runtime must know about a network, besides its functions.

    Attributes:
        name: prefix of the C functions.
        inputs, outputs: by the model's names.
        calls: in order.
        functions: how many there are.
        weights: bytes, the header included.
        arena, workspace_main, workspace_task: bytes, multiples of 64.
        isa: CPU features that it needs.
        identity: 128 bits, hexadecimal, that the weights are tied to.
        version: what ``<name>_version()`` returns.
    """

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    calls: tuple[Call, ...]
    functions: int
    weights: int
    arena: int
    workspace_main: int
    workspace_task: int
    isa: tuple[str, ...]
    identity: str
    version: str


def entry_source(code: Code) -> str:
    """The C file."""
    shapes: dict[tuple[int, ...], str] = {}
    steps, arguments = [], []
    for number, call in enumerate(code.calls):
        if len(call.arguments) > MOST_ARGUMENTS:
            raise BuildError(f"step {number}: expected at most {MOST_ARGUMENTS} tensors, found {len(call.arguments)}")
        made = ", ".join(_argument(shape, place, shapes) for shape, place in call.arguments)
        arguments.append(f"static const convgen_argument arguments{number}[] = {{{made}}};")
        steps.append(f"    {{function{call.function}_main, arguments{number}, {len(call.arguments)}}},")
    values = [*_values("inputs", code.inputs, shapes), *_values("outputs", code.outputs, shapes)]
    identity = code.identity
    return "\n".join(
        [
            '#include "network.h"',
            '#include "cpu.h"',
            "",
            *(
                f"int function{number}_main(void *, const convgen_any *, int32_t, convgen_any *);"
                for number in range(code.functions)
            ),
            "",
            *(f"static const int64_t {name}[] = {{{_sizes(shape)}}};" for shape, name in shapes.items()),
            "",
            *arguments,
            "",
            "static const convgen_step steps[] = {",
            *steps,
            "};",
            "",
            *values,
            "",
            f"CONVGEN_CPU_SUPPORTED({cpu_condition(code.isa, NATIVE)})",
            "",
            "static const convgen_network_code code = {",
            "    .inputs = inputs,",
            "    .outputs = outputs,",
            f"    .input_count = {len(code.inputs)},",
            f"    .output_count = {len(code.outputs)},",
            "    .steps = steps,",
            f"    .step_count = {len(code.calls)},",
            f"    .weights = {code.weights},",
            f"    .arena = {code.arena},",
            f"    .workspace_main = {code.workspace_main},",
            f"    .workspace_task = {code.workspace_task},",
            f"    .identity = {{0x{identity[:16]}, 0x{identity[16:]}}},",
            "    .cpu_supported = cpu_supported,",
            f"    .version = {json.dumps(code.version)},",
            "};",
            "",
            f"CONVGEN_NETWORK_ENTRY_POINTS({code.name}, code)",
            "",
        ]
    )


def _sizes(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape)) or "0"


def _shape(shape: tuple[int, ...], known: dict[tuple[int, ...], str]) -> str:
    return known.setdefault(shape, f"shape{len(known)}")


def _argument(shape: tuple[int, ...], place: Place, known: dict[tuple[int, ...], str]) -> str:
    return f"{{{len(shape)}, {_shape(shape, known)}, {_SPACES[place.space]}, {place.number}, {place.offset}}}"


def _values(what: str, tensors: Sequence[TensorInfo], known: dict[tuple[int, ...], str]) -> list[str]:
    lines = [
        f"    {{{text(tensor.name)}, {len(tensor.shape)}, {_shape(tensor.shape, known)}, {tensor.bytes}}},"
        for tensor in tensors
    ]
    return [f"static const convgen_value {what}[] = {{", *lines, "};"]


def text(value: str) -> str:
    """A text as a string of C: what is not plain ASCII as its bytes."""
    plain = [chr(b) if 32 <= b < 127 and b not in b'"\\?' else f"\\{b:03o}" for b in value.encode()]
    return f'"{"".join(plain)}"'
