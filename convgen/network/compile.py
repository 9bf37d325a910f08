"""A model's graph -> the files of its library: code, packed weights, and what describes them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cpu.model import core_of
from ..errors import BuildError
from ..folders import TemporaryFolder
from ..hardware.isa import asked
from ..hardware.target import Target
from ..lowering.interface import DeviceCode, TensorInfo, boundary, round_up
from ..lowering.kept import kept, key_of
from ..lowering.link import link_device_network, link_network
from ..lowering.lower import compile_function, compile_main, compile_packer, lower
from ..processes import JobError, Worker
from .choice import Choose
from .cuda_library import DEVICE_NETWORK_ABI
from .device import argument_names, compile_for_device, device_entry_source, images_of
from .helpers import Helpers
from .layouts import physical
from .library import NETWORK_ABI, seal
from .memory import WEIGHTS, Place
from .operators import lowered
from .packing import Packers
from .plan import Function, Plan, Product, Step
from .sizes import labels_of
from .source import Call, Code, Size, entry_source, sealer_source
from .weights import Compiled, packed_offsets, write_weights


@dataclass(frozen=True)
class Built:
    """What :func:`compile_plans` leaves in a folder.

    Attributes:
        code: as the runtime has it.
        library, weights: files.
        objects: the functions' code.
        entry: the C file.
        device: of a network on a GPU, the functions' code.
    """

    code: Code
    library: Path
    weights: Path
    objects: tuple[bytes, ...]
    entry: str
    device: tuple[DeviceCode, ...] = ()


def compile_plans(
    plans: Sequence[Plan],
    target: Target,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    helpers: Helpers | None = None,
) -> Built:
    """Compile every function once, pack the weights, and link.

    Args:
        plans: of one model, for each of the sizes that the library is made for.
        folder: where the files are written.
        progress: told how many functions are compiled, and of how many.
        helpers: processes that compile, too; where None, some are started here.

    Raises:
        BuildError: TVM, LLVM or the C compiler failed.
    """
    name = plans[0].graph.name
    functions = list(dict.fromkeys(step.function for plan in plans for step in plan.steps))
    compiled = _compile(functions, target, progress, helpers)
    numbers = {function: number for number, function in enumerate(functions)}
    weights = folder / f"{name}.weights"
    with TemporaryFolder(runs=True) as packing:
        products = {function: made for function, made in compiled.items() if isinstance(function, Product)}
        sections, end = write_weights(plans, Packers(products, packing).pack, weights)
    calls = [
        tuple(
            _call(plan, step, numbers[step.function], compiled[step.function].packed, begin, at.constants)
            for step, begin in zip(plan.steps, at.packed, strict=True)
        )
        for plan, at in zip(plans, sections, strict=True)
    ]
    if target.on_device:
        return _link_for_device(plans, target, calls, compiled, functions, end, folder)
    objects = tuple(compiled[function].object_file for function in functions)
    code = _described(plans, target, calls, compiled, objects, end)
    entry = entry_source(code)
    library = link_network(name, entry, objects, folder / f"lib{name}.so", target.architecture)
    if target.native:
        seal(library, name, weights)
    else:  # as the library would, by one of this machine that has its identity and no functions
        sealer = link_network(name, sealer_source(code), (), folder / "sealer.so")
        seal(sealer, name, weights)
    return Built(code, library, weights, objects, entry)


def _link_for_device(
    plans: Sequence[Plan],
    target: Target,
    calls: Sequence[tuple[Call, ...]],
    compiled: Mapping[Function, Compiled],
    functions: Sequence[Function],
    weights: int,
    folder: Path,
) -> Built:
    """The library of a network on a GPU, which runs where there is one and knows its weights everywhere."""
    codes = tuple(made for function in functions if (made := compiled[function].device) is not None)
    code = _described(plans, target, calls, compiled, [repr(made).encode() for made in codes], weights)
    names = [argument_names(function, len(compiled[function].packed)) for function in functions]
    entry = device_entry_source(code, codes, names)
    library = link_device_network(code.name, entry, images_of(codes), folder / f"lib{code.name}.so")
    path = folder / f"{code.name}.weights"
    seal(library, code.name, path)
    return Built(code, library, path, (), entry, codes)


def _described(
    plans: Sequence[Plan],
    target: Target,
    calls: Sequence[tuple[Call, ...]],
    compiled: Mapping[Function, Compiled],
    objects: Sequence[bytes],
    weights: int,
) -> Code:
    labels = labels_of([plan.graph.dims for plan in plans])
    sizes = tuple(map(_size, labels, plans, calls, [compiled] * len(plans)))
    digest = hashlib.sha256(repr((sizes, weights)).encode())
    for data in objects:
        digest.update(hashlib.sha256(data).digest())
    name, identity = plans[0].graph.name, digest.hexdigest()[:32]
    abi = DEVICE_NETWORK_ABI if target.on_device else NETWORK_ABI
    return Code(
        name=name,
        sizes=sizes,
        functions=len(objects),
        weights=weights,
        arch=target.architecture,
        isa=asked(target.isa, _written(compiled)),
        identity=identity,
        version=f"convgen {'device ' * target.on_device}network ABI {abi}; {name}; {identity[:16]}",
    )


def _size(label: str, plan: Plan, calls: tuple[Call, ...], compiled: Mapping[Function, Compiled]) -> Size:
    graph = plan.graph
    named = zip(graph.names, graph.outputs, strict=True)
    workspaces = [compiled[step.function].workspace for step in plan.steps]
    return Size(
        label=label,
        dims=tuple(graph.dims.items()),
        inputs=tuple(TensorInfo(name, graph.shapes[name], graph.dtype(name)) for name in graph.inputs),
        outputs=tuple(TensorInfo(name, graph.shapes[tensor], graph.dtype(tensor)) for name, tensor in named),
        calls=calls,
        arena=plan.arena,
        workspace_main=max((round_up(workspace.main) for workspace in workspaces), default=0),
        workspace_task=max((round_up(workspace.task) for workspace in workspaces), default=0),
    )


def _written(functions: Iterable[Function]) -> set[str]:
    """The CPU features that convolutions' schedules name."""
    products = (function for function in functions if isinstance(function, Product))
    return {name for p in products for name in p.candidate.schedule.instructions(p.spec.core)}


# ---- code ---------------------------------------------------------------------------------------


def compile_one(function: Function, target: Target) -> Compiled:
    """A function's code; also what a worker process runs.

    Raises:
        BuildError: TVM or LLVM failed.
    """
    if target.on_device:
        return compile_for_device(function, target)
    if not isinstance(function, Product):
        module = lowered(function, target)
        dtypes = {f"input{number}": dtype for number, (_, _, dtype) in enumerate(function.inputs)}
        return Compiled(*compile_function(module, target, dtypes | {"output": function.output[2]}))
    kernel = lower(function.spec, target, function.candidate)
    return Compiled(*compile_main(kernel), kernel.packed, compile_packer(kernel))


class RecentCode:
    """The functions that this process has compiled last: a network for other weights has the same ones again."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[tuple[Function, Target], Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, functions: Sequence[Function], target: Target) -> dict[Function, Compiled]:
        with self._lock:
            found = {function: self._known.get((function, target)) for function in functions}
        return {function: compiled for function, compiled in found.items() if compiled is not None}

    def add(self, compiled: Mapping[Function, Compiled], target: Target) -> None:
        with self._lock:
            for function, code in compiled.items():
                self._known[function, target] = code
                self._known.move_to_end((function, target))
            while len(self._known) > self._most:
                self._known.popitem(last=False)


recent_code = RecentCode(512)


def _compile(
    functions: Sequence[Function],
    target: Target,
    progress: Callable[[int, int], None] | None,
    helpers: Helpers | None,
) -> dict[Function, Compiled]:
    """All functions' code: what this process knows or another one has kept, and the rest compiled in it or several
    others.
    """
    known = recent_code.find(functions, target)
    cache = kept()
    keys = {function: _key(function, target) for function in functions if function not in known}
    found = cache.find(list(keys.values()))
    known |= {function: Compiled.from_bytes(found[key]) for function, key in keys.items() if key in found}
    missing = [function for function in functions if function not in known]

    def told(done: int) -> None:
        if progress is not None:
            progress(len(known) + done, len(functions))

    told(0)
    with Helpers() if helpers is None else nullcontext(helpers) as others:
        others.begin(len(missing))
        compiled = _compile_missing(missing, target, told, others.ready)
    cache.add({keys[function]: made.to_bytes() for function, made in compiled.items()})
    everything = known | compiled
    recent_code.add(everything, target)
    return everything


def _key(function: Function, target: Target) -> bytes:
    """What a function's code depends on."""
    if not isinstance(function, Product):
        return key_of("pass", function, target)
    schedule, picks = function.candidate.schedule, sorted(function.candidate.picks.items())
    core = None if target.on_device else core_of(target)
    return key_of("product", function.spec, schedule.id, schedule.version, picks, core, target)


def _compile_missing(
    functions: Sequence[Function], target: Target, progress: Callable[[int], None], others: Sequence[Future[Worker]]
) -> dict[Function, Compiled]:
    """All of them, compiled by this process and others, each one function after another."""
    made, lock = dict[Function, Compiled](), threading.Lock()
    # The costly ones first, so that none is left over at the end.
    waiting = deque(sorted(functions, key=lambda function: not isinstance(function, Product)))

    def compile_all(compile_next: Callable[[Function, Target], Compiled]) -> None:
        while True:
            try:
                function = waiting.popleft()
            except IndexError:
                return
            compiled = compile_next(function, target)
            with lock:
                made[function] = compiled
                progress(len(made))

    def compile_elsewhere(other: Future[Worker]) -> None:
        worker = _told(other.result)
        compile_all(lambda function, target: _told(worker.call, compile_one, function, target))

    if not functions or not others:
        compile_all(compile_one)
        return made
    with ThreadPoolExecutor(len(others)) as executor:
        running = [executor.submit(compile_elsewhere, other) for other in others]
        try:
            compile_all(compile_one)
            for one in running:
                one.result()
        finally:
            waiting.clear()  # where one failed, the others end after what they are at
    return made


def _told(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives that another process has part in.

    Raises:
        BuildError: TVM or LLVM failed; or the process ended.
    """
    try:
        return call(*arguments)
    except JobError as error:
        raise BuildError(f"a function does not compile: {error}") from error
    except ChildProcessError as error:
        raise BuildError(f"the process that compiles ended: {error}") from error


def _call(plan: Plan, step: Step, number: int, packed: Sequence[TensorInfo], begin: int, constants: int) -> Call:
    """A step's arguments in its function's order.

    Args:
        packed, begin: of a convolution, its packed tensors, and where they begin among the weights.
        constants: what is added to the offsets of constants.
    """
    function = step.function

    def place(name: str) -> Place:
        found = plan.places[name]
        return replace(found, offset=found.offset + constants) if found.space == WEIGHTS else found

    if not isinstance(function, Product):
        made = function.flat
        described = zip((*step.inputs, step.output), (*made.inputs, made.output), strict=True)
        infos = [TensorInfo(name, physical(shape, layout) or (1,), dtype) for name, (shape, layout, dtype) in described]
        return Call(number, tuple((info, place(info.name)) for info in infos))
    tensors = boundary(function.spec.core)
    names = ["src"] + ["residual"] * function.spec.residual
    given = [(tensors[name], place(tensor)) for name, tensor in zip(names, step.inputs, strict=True)]
    offsets = packed_offsets(packed, begin)
    weights = [(info, Place(WEIGHTS, 0, offset)) for info, offset in zip(packed, offsets, strict=True)]
    return Call(number, (*given, *weights, (tensors["dst"], place(step.output))))


def with_candidates(plan: Plan, choose: Choose) -> Plan:
    """The plan, its convolutions with the candidates that ``choose`` has for their specs."""
    specs = {step.function.spec for step in plan.steps if isinstance(step.function, Product)}
    known = {spec: candidate for spec in specs if (candidate := choose(spec)) is not None}

    def chosen(step: Step) -> Step:
        function = step.function
        if not isinstance(function, Product) or function.spec not in known:
            return step
        return replace(step, function=Product(function.spec, known[function.spec]))

    return replace(plan, steps=[chosen(step) for step in plan.steps])
