"""A model's graph -> the files of its library: code, packed weights, and what describes them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BuildError
from ..folders import TemporaryFolder
from ..hardware.target import Target
from ..kernel.library import Library
from ..lowering.interface import HEADER_BYTES, Interface, TensorInfo, round_up
from ..lowering.link import link, link_network
from ..lowering.lower import Workspace, compile_function, compile_object, lower
from ..lowering.schedule import Candidate
from ..problem.spec import ConvSpec
from ..processes import JobError, Worker
from .library import NETWORK_ABI, seal
from .memory import WEIGHTS, Place
from .operators import lowered
from .plan import Function, Plan, Product, Step, packed
from .source import Call, Code, entry_source

#: Functions below which it is not worth while to start a process that compiles some of them.
_FEW = 6


@dataclass(frozen=True)
class Compiled:
    """A function's code.

    Attributes:
        object_file: its bytes.
        workspace: scratch memory that it takes.
        packed: of a convolution, its packed tensors.
    """

    object_file: bytes
    workspace: Workspace
    packed: tuple[TensorInfo, ...] = ()


@dataclass(frozen=True)
class Built:
    """What :func:`compile_plan` leaves in a folder.

    Attributes:
        code: as the runtime has it.
        library, weights: files.
        objects: the functions' code.
        entry: the C file.
    """

    code: Code
    library: Path
    weights: Path
    objects: tuple[bytes, ...]
    entry: str


def compile_plan(
    plan: Plan,
    target: Target,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    processes: int | None = None,
) -> Built:
    """Compile every function once, pack the weights, and link.

    Args:
        folder: where the files are written.
        progress: told how many functions are compiled, and of how many.
        processes: how many compile, at most; as many as there are CPUs to run on where None.

    Raises:
        BuildError: TVM, LLVM or the C compiler failed.
    """
    functions = list(dict.fromkeys(step.function for step in plan.steps))
    compiled = _compile(functions, target, progress, processes or len(os.sched_getaffinity(0)))
    numbers = {function: number for number, function in enumerate(functions)}
    sections, size = _sections(plan, compiled)
    objects = tuple(compiled[function].object_file for function in functions)
    calls = tuple(_call(plan, step, numbers[step.function], compiled[step.function], sections) for step in plan.steps)
    code = _described(plan, target, calls, objects, [compiled[function].workspace for function in functions], size)
    entry = entry_source(code)
    library = link_network(code.name, entry, objects, folder / f"lib{code.name}.so")
    weights = folder / f"{code.name}.weights"
    _write_weights(plan, code, compiled, sections, weights)
    seal(library, code.name, weights)
    return Built(code, library, weights, objects, entry)


def _described(
    plan: Plan,
    target: Target,
    calls: tuple[Call, ...],
    objects: Sequence[bytes],
    workspaces: Sequence[Workspace],
    weights: int,
) -> Code:
    graph = plan.graph
    inputs = tuple(TensorInfo(name, graph.shapes[name]) for name in graph.inputs)
    outputs = tuple(
        TensorInfo(name, graph.shapes[tensor]) for name, tensor in zip(graph.names, graph.outputs, strict=True)
    )
    digest = hashlib.sha256(repr((calls, inputs, outputs, weights)).encode())
    for data in objects:
        digest.update(hashlib.sha256(data).digest())
    identity = digest.hexdigest()[:32]
    return Code(
        name=graph.name,
        inputs=inputs,
        outputs=outputs,
        calls=calls,
        functions=len(objects),
        weights=weights,
        arena=plan.arena,
        workspace_main=max((round_up(workspace.main) for workspace in workspaces), default=0),
        workspace_task=max((round_up(workspace.task) for workspace in workspaces), default=0),
        isa=target.isa,
        identity=identity,
        version=f"convgen network ABI {NETWORK_ABI}; {graph.name}; {identity[:16]}",
    )


# ---- code ---------------------------------------------------------------------------------------


def compile_one(function: Function, target: Target) -> Compiled:
    """A function's code; also what a worker process runs.

    Raises:
        BuildError: TVM or LLVM failed.
    """
    if not isinstance(function, Product):
        module = lowered(function, target)
        names = [*(f"input{number}" for number in range(len(function.inputs))), "output"]
        return Compiled(*compile_function(module, target, names))
    with TemporaryFolder() as folder:
        kernel = lower(function.spec, target, function.candidate)
        workspace = compile_object(kernel, folder / "kernel.o")
        return Compiled((folder / "kernel.o").read_bytes(), workspace, kernel.packed)


def _compile(
    functions: Sequence[Function], target: Target, progress: Callable[[int, int], None] | None, processes: int
) -> dict[Function, Compiled]:
    """All functions' code, in this process or several others."""
    told, lock = [0], threading.Lock()

    def done(made: Compiled) -> Compiled:
        with lock:
            told[0] += 1
            if progress is not None:
                progress(told[0], len(functions))
        return made

    workers = min(processes, -(-len(functions) // _FEW))
    if workers < 2:
        return {function: done(compile_one(function, target)) for function in functions}
    threads = threading.local()
    started: list[Worker] = []

    def start() -> None:
        threads.worker = Worker()
        started.append(threads.worker)

    def run(function: Function) -> Compiled:
        try:
            made: Compiled = threads.worker.call(compile_one, function, target)
        except JobError as error:
            raise BuildError(f"a function does not compile: {error}") from error
        except ChildProcessError as error:
            raise BuildError(f"the process that compiles ended: {error}") from error
        return done(made)

    try:
        # The costly ones first, so that none is left over at the end.
        order = sorted(functions, key=lambda function: not isinstance(function, Product))
        with ThreadPoolExecutor(workers, initializer=start) as executor:
            return dict(zip(order, executor.map(run, order), strict=True))
    finally:
        for worker in started:
            worker.stop()


def _call(plan: Plan, step: Step, number: int, compiled: Compiled, sections: dict[int, tuple[int, ...]]) -> Call:
    """A step's arguments in its function's order."""
    function = step.function
    if not isinstance(function, Product):
        tensors = [(plan.shape(name) or (1,), plan.places[name]) for name in (*step.inputs, step.output)]
        return Call(number, tuple(tensors))
    shapes = function.spec.core.shapes
    names = ["src"] + ["residual"] * function.spec.residual
    given = [(shapes[name], plan.places[tensor]) for name, tensor in zip(names, step.inputs, strict=True)]
    weights = [
        (info.shape, Place(WEIGHTS, 0, offset))
        for info, offset in zip(compiled.packed, sections[id(step)], strict=True)
    ]
    return Call(number, (*given, *weights, (shapes["dst"], plan.places[step.output])))


# ---- weights ------------------------------------------------------------------------------------


def _sections(plan: Plan, compiled: dict[Function, Compiled]) -> tuple[dict[int, tuple[int, ...]], int]:
    """Where the packed tensors of each convolution lie among the weights, and the size of all."""
    end, sections = plan.constant_bytes, dict[int, tuple[int, ...]]()
    for step in plan.steps:
        if isinstance(step.function, Product):
            offsets = []
            for info in compiled[step.function].packed:
                offsets.append(end)
                end += round_up(info.bytes)
            sections[id(step)] = tuple(offsets)
    return sections, end


def _write_weights(
    plan: Plan, code: Code, compiled: dict[Function, Compiled], sections: dict[int, tuple[int, ...]], path: Path
) -> None:
    """The header, constants in their order, and packed weights in the order of the steps."""
    with open(path, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for name in plan.constants:
            file.write(packed(plan.graph.constants[name]))
        with TemporaryFolder(runs=True) as folder:
            packers: dict[Function, Library] = {}
            for step in plan.steps:
                function = step.function
                if isinstance(function, Product):
                    if function not in packers:
                        packers[function] = _packer(function.spec, code, compiled[function], folder, len(packers))
                    file.write(packers[function].pack(**step.parameters)[HEADER_BYTES:].tobytes())


def _packer(spec: ConvSpec, code: Code, compiled: Compiled, folder: Path, number: int) -> Library:
    """A convolution's kernel by itself, which packs its weights."""
    workspace = compiled.workspace
    interface = Interface(f"packer{number}", spec, compiled.packed, workspace.main, workspace.task, code.isa)
    object_file = folder / f"packer{number}.o"
    object_file.write_bytes(compiled.object_file)
    return Library(link(interface, object_file, folder / f"libpacker{number}.so"), spec, interface.name, 1)


def with_candidates(plan: Plan, choose: Callable[[ConvSpec], Candidate | None]) -> None:
    """Give convolutions the candidates that ``choose`` has for their specs."""
    known: dict[ConvSpec, Any] = {}
    for number, step in enumerate(plan.steps):
        function = step.function
        if isinstance(function, Product):
            if function.spec not in known:
                known[function.spec] = choose(function.spec)
            if (candidate := known[function.spec]) is not None:
                plan.steps[number] = replace(step, function=Product(function.spec, candidate))
