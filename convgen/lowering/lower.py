"""Candidate -> scheduled TIR -> object file."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BuildError, ConvgenError, UnsupportedError
from ..hardware.isa import asked
from ..hardware.target import Target
from ..interrupts import interrupts_held
from ..problem.dtypes import BYTES
from ..problem.spec import PARAMETERS, ConvSpec
from .interface import TensorInfo
from .packing import schedule_packing
from .saved import Saved
from .schedule import Candidate, Program, Scheduled, Written

#: Tensors that the user passes. Any contiguous array is accepted, so only their elements' alignment is sure.
BOUNDARY = frozenset({"src", *PARAMETERS, "residual", "dst"})

_MFD_CLOEXEC = 1
_ALLOCATOR = "TVMBackendAllocWorkspace"


#: Bindings of a module up to which TVM looks for common subexpressions. Its time grows with their square, to half a
#: minute for what schedules write; LLVM looks for them too.
MOST_BINDINGS = 1024


@dataclass(frozen=True)
class Lowered:
    """A candidate's scheduled module: functions ``pack`` and ``main``; and how many bindings these have."""

    spec: ConvSpec
    target: Target
    candidate: Candidate
    module: Any  # tvm.ir.IRModule
    bindings: int
    packed: tuple[TensorInfo, ...]

    @property
    def isa(self) -> tuple[str, ...]:
        """What a kernel asks the CPU for."""
        return asked(self.target.isa, self.candidate.schedule.instructions(self.spec.core))


@dataclass(frozen=True)
class Workspace:
    """Bytes of scratch memory: once per call, and once more per task of a parallel loop."""

    main: int
    task: int


@interrupts_held()
def lower(spec: ConvSpec, target: Target, candidate: Candidate) -> Lowered:
    """Create and schedule a candidate's functions.

    What is lowered is ``spec.core``: the same buffers under the simplest shape.

    Raises:
        Inapplicable: the picks are not valid here.
        BuildError: TVM refused the program or its schedule.
    """
    import tvm
    from tvm import te
    from tvm.s_tir import Schedule as TirSchedule

    from .compute import STORED

    core = spec.core
    schedule, picks = candidate.schedule, candidate.picks
    schedule.check(core, target)
    schedule.valid(core, target, picks)
    try:
        program = schedule.program(core, target, picks)
        _check(program, spec)
        functions = {
            name: te.create_prim_func(args).with_attr("global_symbol", name)
            for name, args in (("pack", program.pack), ("main", program.main))
        }
        sch, packing = (TirSchedule(tvm.IRModule({"main": functions[name]})) for name in ("main", "pack"))
        if isinstance(schedule, Scheduled):
            schedule.apply(sch, core, target, picks)
        schedule_packing(packing, [tensor.op.name for tensor in program.pack[len(spec.parameters) :]])
        module = tvm.IRModule({"pack": packing.mod["main"], "main": sch.mod["main"]})
    except ConvgenError:
        raise
    except Exception as error:  # TVM raises its errors as many types, RuntimeError among them
        raise BuildError(f"{spec.descriptor}: {candidate} cannot be scheduled: {error}") from error
    packed = program.pack[len(program.pack) - _packed_count(program, spec) :]
    infos = tuple(
        TensorInfo(f"packed{i}", tuple(int(d) for d in tensor.shape), STORED[str(tensor.dtype)])
        for i, tensor in enumerate(packed)
    )
    aligned, bindings = _align_boundary(module, spec)
    return Lowered(spec, target, candidate, aligned, bindings, infos)


@interrupts_held()
def compile_object(lowered: Lowered, path: Path) -> Workspace:
    """Write the object file of a lowered candidate; returns the scratch memory it asks for.

    For a GPU that is ``pack`` alone, for this machine's CPU.

    Raises:
        BuildError: TVM or LLVM failed.
        OSError: the file cannot be written.
    """
    code, workspace = _compiled(lowered, ("pack",) if lowered.target.on_device else ("pack", "main"))
    path.write_bytes(code)
    return workspace


@interrupts_held()
def compile_main(lowered: Lowered) -> tuple[bytes, Workspace]:
    """The object file of a candidate's ``main`` alone, for a CPU, and the scratch memory it asks for.

    Raises:
        BuildError: TVM or LLVM failed.
    """
    return _compiled(lowered, ("main",))


def _compiled(lowered: Lowered, names: Iterable[str]) -> tuple[bytes, Workspace]:
    """The object file of some of a candidate's functions, and the scratch memory these ask for."""
    try:
        host = _host_module(lowered, names)
        code = _object(_codegen(host, _llvm(lowered)))
        return code, _workspace(host, code)
    except Exception as error:  # as in lower
        raise BuildError(f"{lowered.spec.descriptor}: {lowered.candidate} does not compile: {error}") from error


@interrupts_held()
def compile_packer(lowered: Lowered) -> bytes:
    """The object file of a candidate's ``pack`` alone, for this machine whatever the candidate is for.

    It is for packing once. LLVM optimises nothing: vectors are placed by then, so that it would take five times longer
    to compile, and pack no faster.

    Raises:
        BuildError: TVM or LLVM failed.
    """
    import tvm

    try:
        here = json.loads(lowered.target.tvm_config) if lowered.target.native else {"kind": "llvm"}
        module, config = tvm.IRModule({"pack": lowered.module["pack"]}), _tvm_target({**here, "opt-level": 0})
        return _object(_codegen(_lowered_builtins(module, lowered.bindings, config), config))
    except Exception as error:  # as in lower
        raise BuildError(f"{lowered.spec.descriptor}: the packing of weights does not compile: {error}") from error


@interrupts_held()
def compile_function(module: Any, target: Target, dtypes: Mapping[str, str]) -> tuple[bytes, Workspace]:
    """The object file of a module whose function ``main`` is not a convolution, for a CPU; and its scratch memory.

    Args:
        dtypes: of its buffers, by name, which are aligned to their element only.

    Raises:
        BuildError: TVM or LLVM failed.
    """
    try:
        config = _tvm_target(json.loads(target.tvm_config))
        functions, bindings = _aligned(module, {name: BYTES[dtype] for name, dtype in dtypes.items()})
        host = _lowered_builtins(functions, bindings, config)
        code = _object(_codegen(host, config))
        return code, _workspace(host, code)
    except Exception as error:  # as in lower
        raise BuildError(f"a pass does not compile: {error}") from error


def source(lowered: Lowered, kind: str) -> str:
    """A candidate as text: ``tir`` (scheduled), ``ll`` (LLVM IR) or ``asm``.

    Raises:
        UnsupportedError: another kind.
    """
    formats = {"ll": "ll", "asm": "s"}
    if kind == "tir":
        return str(lowered.module.script())
    if kind not in formats:
        raise UnsupportedError(f"source: expected one of tir, {', '.join(formats)}, found {kind!r}")
    names = ("pack",) if lowered.target.on_device else ("pack", "main")
    return str(_codegen(_host_module(lowered, names), _llvm(lowered)).inspect_source(formats[kind]))


def _host_module(lowered: Lowered, names: Iterable[str]) -> Any:
    """The TIR of some functions that LLVM is given: what ``tvm.compile`` does, kept apart so that it can be seen."""
    import tvm

    functions = tvm.IRModule({name: lowered.module[name] for name in names})
    return _lowered_builtins(functions, lowered.bindings, _llvm(lowered), compact=not _is_compact(lowered))


def _is_compact(lowered: Lowered) -> bool:
    """Whether no block has a buffer that could be smaller. TVM takes longer to find that out than for all else: where
    statements are placed by hand, ``main`` is one block, and has none.
    """
    if not isinstance(lowered.candidate.schedule, Written):
        return False
    return not any(len(function.body.block.alloc_buffers) for function in lowered.module.functions.values())


def _lowered_builtins(functions: Any, bindings: int, target: Any, compact: bool = True) -> Any:
    """A module in the form that LLVM's code is generated from.

    Args:
        bindings: how many it has.
        compact: whether buffers may be larger than what of them is used.
    """
    import tvm
    from tvm.s_tir.pipeline import default_s_tir_pipeline
    from tvm.tirx import transform

    passes, _, _ = default_s_tir_pipeline()
    left_out = ["tirx.CommonSubexprElim"] if bindings > MOST_BINDINGS else []
    left_out += [] if compact else ["s_tir.CompactBufferAllocation"]
    with tvm.transform.PassContext(opt_level=3, disabled_pass=left_out):
        module = transform.BindTarget(target.with_host(target))(functions)
        return transform.LowerTVMBuiltin()(passes(module))


def _codegen(host_module: Any, target: Any) -> Any:
    from tvm.tirx import transform
    from tvm.tirx.build import codegen_build

    return codegen_build(transform.LowerIntrin()(host_module), target)


def _object(module: Any) -> bytes:
    """A module's object file. LLVM writes it to memory: where a disk is full, it would end the process."""
    # Not by os.memfd_create, which a Python has that was built where the C library is new enough.
    number = ctypes.CDLL(None, use_errno=True).memfd_create(b"convgen", _MFD_CLOEXEC)
    if number < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with open(number, "rb") as file:
        module.write_to_file(f"/proc/self/fd/{file.fileno()}", "o")
        return file.read()


def _llvm(lowered: Lowered) -> Any:
    """The target as LLVM gets it: weights of a device's kernel are packed on this machine's CPU."""
    config = {"kind": "llvm"} if lowered.target.on_device else json.loads(lowered.target.tvm_config)
    return _tvm_target(config)


def _tvm_target(config: dict[str, Any]) -> Any:
    from tvm.target import Target as TvmTarget

    return TvmTarget(config)


def _packed_count(program: Program, spec: ConvSpec) -> int:
    return len(program.main) - 2 - ("residual" in spec.shapes)


def _check(program: Program, spec: ConvSpec) -> None:
    """A schedule's program must have the arguments the C entry points pass."""
    parameters = spec.parameters
    leading = [name for name in ("src", "residual") if name in spec.shapes]
    count = _packed_count(program, spec)
    pack, main = program.pack, program.main
    outputs, inputs = pack[len(parameters) :], main[len(leading) : -1]
    if [t.op.name for t in pack[: len(parameters)]] != parameters or len(outputs) != count:
        raise BuildError(f"pack: expected {parameters} and {count} packed tensors, found {[t.op.name for t in pack]}")
    if [t.op.name for t in main[: len(leading)]] != leading or main[-1].op.name != "dst":
        raise BuildError(f"main: expected {leading}, packed tensors and dst, found {[t.op.name for t in main]}")
    for output, taken in zip(outputs, inputs, strict=True):
        if [int(d) for d in output.shape] != [int(d) for d in taken.shape]:
            raise BuildError(f"packed tensor {taken.op.name}: expected {output.shape}, found {taken.shape}")


def _align_boundary(module: Any, spec: ConvSpec) -> tuple[Any, int]:
    """Declare the boundary buffers with the alignment of their element; gives the number of bindings, too."""
    dtypes = spec.dtypes
    return _aligned(module, {name: BYTES[dtypes[name]] for name in dtypes if name in BOUNDARY})


def _aligned(module: Any, alignments: Mapping[str, int]) -> tuple[Any, int]:
    """Declare buffers, by their names, with an alignment; gives the number of a module's bindings, too.

    ``te.create_prim_func`` promises 64 bytes for every argument and has no option for it, and TIR
    has no mutator in Python, so the serialised form is edited.
    """
    saved = Saved(module)
    names = {number: name for name in alignments for number in saved.having(f'"data":"{name}"')}
    for number in list(saved.of_type("ir.Var")):
        data = saved[number]["data"]
        buffer = saved[data["ty"]] if data["name"] in names else None
        if buffer is not None and buffer["type"] == "tirx.BufferType":
            buffer["data"]["data_alignment"] = alignments[names[data["name"]]]
            saved[data["ty"]] = buffer
    return saved.module(), sum(1 for _ in saved.of_type("tirx.Bind"))


def _workspace(module: Any, code: bytes) -> Workspace:
    """Sum the allocations of lowered TIR, outside and inside parallel loops (an upper bound of both).

    Args:
        code: its object file, which has the allocator's name where it is called: in most it is not.
    """
    if _ALLOCATOR.encode() not in code:
        return Workspace(0, 0)
    nodes = Saved(module)
    allocators = nodes.having(f'"data":"tirx.{_ALLOCATOR}"')
    sizes = {
        call: _allocated(nodes, call) for number in allocators for call in nodes.of_type("ir.Call", f'"op":{number},')
    }

    def within(root: int) -> int:
        """Bytes allocated by the calls reachable from a node, each counted once."""
        seen, todo = set[int](), [root]
        while todo:
            number = todo.pop()
            if number not in seen and 0 <= number < len(nodes):
                seen.add(number)
                todo.extend(_children(nodes[number]))
        return sum(sizes[number] for number in seen & sizes.keys())

    loops = [nodes[number]["data"] for number in nodes.of_type("tirx.For")]
    # Parallel loops follow one another and free what they take: the largest counts.
    tasks = [within(loop["body"]) for loop in loops if loop["kind"] == 1]
    return Workspace(main=max(0, sum(sizes.values()) - sum(tasks)), task=max(tasks, default=0))


def _allocated(nodes: Saved, call: int) -> int:
    """Bytes that a call of the allocator gives."""
    size = nodes[nodes[nodes[nodes[call]["data"]["args"]]["data"][2]]["data"]["value"]]
    return -(-int(size["data"]) // 64) * 64


def _children(node: dict[str, Any]) -> Iterable[int]:
    data = node.get("data")
    if node["type"] in ("ffi.Array", "ffi.Map"):
        return (v for v in data or () if isinstance(v, int))
    if isinstance(data, dict):
        return (v for k, v in data.items() if isinstance(v, int) and k not in ("kind", "span", "data_alignment"))
    return ()
