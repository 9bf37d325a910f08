"""The C file that describes a network: its steps, and where their tensors lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import BuildError
from ..lowering.entry import cpu_condition
from ..lowering.entry import described as described_dtype
from ..lowering.interface import TensorInfo
from ..lowering.toolchain import NATIVE
from .memory import ARENA, INPUT, OUTPUT, WEIGHTS, Place

#: Most arguments of a step (``network.c``).
MOST_ARGUMENTS = 256
_SPACES = {ARENA: "CONVGEN_ARENA", WEIGHTS: "CONVGEN_WEIGHTS", INPUT: "CONVGEN_INPUT", OUTPUT: "CONVGEN_OUTPUT"}


@dataclass(frozen=True)
class Call:
    """A step as the runtime sees it.

    Attributes:
        function: its number.
        arguments: each tensor and its place, in the function's order.
    """

    function: int
    arguments: tuple[tuple[TensorInfo, Place], ...]


@dataclass(frozen=True)
class Size:
    """One of the sizes that a network is made for, as the runtime sees it.

    Attributes:
        label: what tells it from the others, such as ``N4_H224``; empty where there is only one.
        dims: the model's symbolic dimensions by name.
        inputs, outputs: by the model's names.
        calls: in order.
        arena, workspace_main, workspace_task: bytes, multiples of 64.
    """

    label: str
    dims: tuple[tuple[str, int], ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    calls: tuple[Call, ...]
    arena: int
    workspace_main: int
    workspace_task: int

    @property
    def fixed(self) -> int:
        """Bytes of the workspace that do not depend on the number of threads."""
        return self.arena + self.workspace_main


@dataclass(frozen=True)
class Code:
    """What the runtime must know about a network, besides its functions.

    Attributes:
        name: prefix of the C functions.
        sizes: it is made for; one at least.
        functions: how many there are.
        weights: bytes, the header included.
        arch: the architecture that it is for, as ``uname -m`` has it.
        isa: CPU features that it needs.
        identity: 128 bits, hexadecimal, that the weights are tied to.
        version: what ``<name>_version()`` returns.
    """

    name: str
    sizes: tuple[Size, ...]
    functions: int
    weights: int
    arch: str
    isa: tuple[str, ...]
    identity: str
    version: str

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Those of the first size: their names, and how many there are, are the same for all."""
        return self.sizes[0].inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return self.sizes[0].outputs

    def memory(self, threads: int) -> int:
        """Bytes that the network takes while it runs at its largest size: weights and workspace."""
        return self.weights + max(size.fixed + threads * size.workspace_task for size in self.sizes)


def entry_source(code: Code) -> str:
    """The C file."""
    shapes: dict[tuple[int, ...], str] = {}
    tables = [line for number, size in enumerate(code.sizes) for line in _tables(size, f"{number}", shapes)]
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
            *tables,
            "static const convgen_network_size sizes[] = {",
            *(_size(size, f"{number}") for number, size in enumerate(code.sizes)),
            "};",
            "",
            f"CONVGEN_CPU_SUPPORTED({cpu_condition(code.isa, code.arch)})",
            "",
            "static const convgen_network_code code = {",
            "    .sizes = sizes,",
            f"    .size_count = {len(code.sizes)},",
            f"    .input_count = {len(code.inputs)},",
            f"    .output_count = {len(code.outputs)},",
            f"    .weights = {code.weights},",
            f"    .identity = {{0x{identity[:16]}, 0x{identity[16:]}}},",
            "    .cpu_supported = cpu_supported,",
            f"    .version = {json.dumps(code.version)},",
            "};",
            "",
            f"CONVGEN_NETWORK_ENTRY_POINTS({code.name}, code)",
            "",
        ]
    )


def network_tables(code: Code) -> tuple[list[str], int]:
    """The lines that describe every size but for its steps, and how many sizes there are."""
    shapes: dict[tuple[int, ...], str] = {}
    values, sizes = list[str](), list[str]()
    for number, size in enumerate(code.sizes):
        values += _values(f"inputs{number}", size.inputs, shapes)
        values += _values(f"outputs{number}", size.outputs, shapes)
        sizes.append(_size(size, f"{number}", steps="0"))
    return [
        *(f"static const int64_t {name}[] = {{{_sizes(shape)}}};" for shape, name in shapes.items()),
        "",
        *values,
        "",
        "static const convgen_network_size sizes[] = {",
        *sizes,
        "};",
        "",
    ], len(sizes)


def place_text(place: Place) -> str:
    """Where a tensor lies, as a ``convgen_device_place``."""
    return f"{{{_SPACES[place.space]}, {place.number}, {place.offset}}}"


def sealer_source(code: Code) -> str:
    """The C file of a library that this machine loads to write the header of weights for another one's."""
    functions = range(code.functions)
    stubs = [
        f"int function{number}_main(void *self, const convgen_any *args, int32_t count, convgen_any *result)\n"
        "{ (void)self, (void)args, (void)count, (void)result; return -1; }"
        for number in functions
    ]
    return "\n".join([entry_source(replace(code, arch=NATIVE, isa=())), *stubs, ""])


def _tables(size: Size, suffix: str, shapes: dict[tuple[int, ...], str]) -> list[str]:
    """The steps of a size with their arguments, its inputs and outputs; the arrays' names end in ``suffix``."""
    steps, arguments = [], []
    for number, call in enumerate(size.calls):
        if len(call.arguments) > MOST_ARGUMENTS:
            raise BuildError(f"step {number}: expected at most {MOST_ARGUMENTS} tensors, found {len(call.arguments)}")
        made = ", ".join(_argument(tensor, place, shapes) for tensor, place in call.arguments)
        name = f"arguments{suffix}_{number}"
        arguments.append(f"static const convgen_argument {name}[] = {{{made}}};")
        steps.append(f"    {{function{call.function}_main, {name}, {len(call.arguments)}}},")
    return [
        *arguments,
        "",
        f"static const convgen_step steps{suffix}[] = {{",
        *steps,
        "};",
        "",
        *_values(f"inputs{suffix}", size.inputs, shapes),
        *_values(f"outputs{suffix}", size.outputs, shapes),
        "",
    ]


def _size(size: Size, suffix: str, steps: str = "") -> str:
    fields = {
        "inputs": f"inputs{suffix}",
        "outputs": f"outputs{suffix}",
        "steps": steps or f"steps{suffix}",
        "step_count": len(size.calls),
        "arena": size.arena,
        "workspace_main": size.workspace_main,
        "workspace_task": size.workspace_task,
    }
    return f"    {{{', '.join(f'.{name} = {value}' for name, value in fields.items())}}},"


def _sizes(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape)) or "0"


def _shape(shape: tuple[int, ...], known: dict[tuple[int, ...], str]) -> str:
    return known.setdefault(shape, f"shape{len(known)}")


def _argument(tensor: TensorInfo, place: Place, known: dict[tuple[int, ...], str]) -> str:
    described = f"{len(tensor.shape)}, {described_dtype(tensor.dtype)}, {_shape(tensor.shape, known)}"
    return f"{{{described}, {_SPACES[place.space]}, {place.number}, {place.offset}}}"


def _values(what: str, tensors: Sequence[TensorInfo], known: dict[tuple[int, ...], str]) -> list[str]:
    lines = [
        f"    {{{text(one.name)}, {len(one.shape)}, {_shape(one.shape, known)}, {one.bytes}, {text(one.dtype)}}},"
        for one in tensors
    ]
    return [f"static const convgen_value {what}[] = {{", *lines, "};"]


def text(value: str) -> str:
    """A text as a string of C: what is not plain ASCII as its bytes."""
    plain = [chr(b) if 32 <= b < 127 and b not in b'"\\?' else f"\\{b:03o}" for b in value.encode()]
    return f'"{"".join(plain)}"'
