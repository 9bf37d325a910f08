"""Compile, verify, time: what is done to one candidate; :mod:`convgen.measure.workers` says where.

An artifact is a private folder with the linked library and ``candidate.json``; what all candidates
of a spec share, inputs and the expected output, lies in one folder beside (:class:`Expected`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..check.bounds import even_tolerance, reference
from ..check.data import exact_data
from ..check.drawn import Draws
from ..hardware.machine import pinned
from ..hardware.target import Target
from ..kernel.kernel import compile_lowered
from ..kernel.library import Library
from ..lowering.discover import schedule
from ..lowering.interface import TensorInfo
from ..lowering.link import check_compiler
from ..lowering.lower import Lowered, lower
from ..lowering.schedule import Candidate, Picks
from ..problem.dtypes import distance, load, numpy_dtype, save
from ..problem.spec import ConvSpec
from ..records.outcome import OUTCOME_KEY
from .drift import reference_kernel
from .rotation import rotating
from .standalone.timing import DUEL_SECONDS, SAMPLE_SECONDS, alternate, time_calls

#: Bytes a worker may have: this and so many times the layer's tensors. It has TVM and NumPy in it, packed
#: weights (a Winograd transform's are up to 11 times the layer's), a workspace, and perhaps a GPU's driver.
WORKER_BYTES, LAYER_FACTOR = 3 << 29, 32


# ---- what a worker needs besides the artifact -----------------------------------------------


class Expected:
    """Inputs and expected output of a spec in a folder, made once per tuning run.

    Integer data, so that a schedule that only reorders sums must match bit for bit; ``bound`` is
    for those that do not.
    """

    def __init__(self, spec: ConvSpec, directory: Path, threads: int, draws: Draws | None = None) -> None:
        self.directory = directory
        data = exact_data(spec, draws or 0)
        for name, array in (data | {"expected": reference(spec, data, threads)}).items():
            save(directory / f"{name}.npy", array)
        np.save(directory / "bound.npy", even_tolerance(spec, data, threads))
        self.bytes = sum(file.stat().st_size for file in self.files)

    @property
    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*.npy"))

    @functools.cached_property
    def digest(self) -> str:
        """What tells these data from others."""
        return digest_of(self.files)

    @property
    def memory(self) -> int:
        """Bytes a worker may use for one candidate."""
        return memory_limit(self.bytes)


def digest_of(files: Sequence[Path]) -> str:
    """SHA-256, hexadecimal, of files and their names."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def memory_limit(layer: int) -> int:
    """Bytes a worker may use for a candidate of a layer whose data take ``layer`` bytes; never the last tenth."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(WORKER_BYTES + LAYER_FACTOR * layer, physical // 10 * 9)


# ---- what builders take -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CandidateModule:
    """A lowered candidate as plain data, which travels to worker processes and other machines.

    Attributes:
        tir: the module, as TVM's JSON.
        spec: the layer's descriptor.
        target: all its facts, because the machine that compiles would resolve its name to others.
        schedule, picks: the candidate's.
        bindings: how many the TIR has.
        packed: the packed tensors.
    """

    tir: str
    spec: str
    target: Target
    schedule: str
    picks: Picks
    bindings: int
    packed: tuple[TensorInfo, ...]

    def lowered(self) -> Lowered:
        """The lowered candidate, from the data."""
        from tvm.ir import load_json

        candidate, module = Candidate(schedule(self.schedule), self.picks), load_json(self.tir)
        return Lowered(ConvSpec.parse(self.spec), self.target, candidate, module, self.bindings, self.packed)


def candidate_module(spec: ConvSpec, target: Target, candidate: Candidate) -> CandidateModule:
    """A candidate lowered, as builders take it.

    Raises:
        Inapplicable, BuildError: see :func:`convgen.lowering.lower.lower`.
    """
    return serialised(lower(spec, target, candidate))


def serialised(lowered: Lowered) -> CandidateModule:
    """A lowered candidate, as builders take it."""
    from tvm.ir import save_json

    return CandidateModule(
        str(save_json(lowered.module)),
        lowered.spec.descriptor,
        lowered.target,
        lowered.candidate.schedule.id,
        lowered.candidate.picks,
        lowered.bindings,
        lowered.packed,
    )


def check_compilers(target: Target) -> None:
    """See that there is what compiles candidates for a target: without it they fail through no fault of theirs.

    Raises:
        UnsupportedError: NVIDIA's compiler is not installed, or does not know the architecture.
        BuildError: there is no C compiler for the architecture, or it fails.
    """
    if target.on_device:
        from ..cuda.code import compiler

        compiler(target.arch)
    check_compiler(target.architecture, on_device=target.on_device)


# ---- functions that run in workers ------------------------------------------------------------


def build_artifact(module: CandidateModule, root: str) -> str:
    """Compile and link a candidate into a private folder below ``root``; returns the library's path."""
    lowered = module.lowered()
    directory = Path(tempfile.mkdtemp(dir=root))
    spec, device = lowered.spec, None
    if lowered.target.on_device:
        from .gpu import measured_code

        device = measured_code(lowered, directory)
    interface, _, library = compile_lowered(lowered, directory, "candidate", device)
    exact = lowered.candidate.is_exact(spec) and spec.activation_op.exact
    (directory / "candidate.json").write_text(
        json.dumps({"spec": module.spec, "name": interface.name, "exact": exact, "on_device": lowered.target.on_device})
    )
    return str(library)


def artifact_facts(path: str) -> dict[str, Any]:
    """What is to be known about an artifact: its spec, its library's prefix, whether it is exact, where it runs."""
    facts: dict[str, Any] = json.loads((Path(path).parent / "candidate.json").read_text())
    return {"on_device": False} | facts


def load_artifact(path: str, threads: int) -> tuple[Library, bool]:
    """An artifact's library, and whether its results must be exact."""
    meta = artifact_facts(path)
    return Library(Path(path), ConvSpec.parse(meta["spec"]), meta["name"], threads), meta["exact"]


def load_inputs(spec: ConvSpec, directory: str) -> dict[str, Any]:
    """The inputs of a layer."""
    return {name: load(Path(directory) / f"{name}.npy", dtype) for name, dtype in spec.dtypes.items() if name != "dst"}


def prepare_artifact(library: Library, directory: str, threads: int) -> tuple[Callable[[], Any], Any]:
    """A call of the library on the expected inputs, its weights cold, and the output it writes."""
    spec, data = library.spec, load_inputs(library.spec, directory)
    packed = library.pack(**{name: data[name] for name in spec.parameters})
    dst = np.empty(spec.dst_shape, numpy_dtype(spec.dst_dtype))
    dst.reshape(-1).view(np.uint8).fill(0xFF)  # NaN, but of i8
    return rotating(library, data["src"], packed, dst, data.get("residual"), threads), dst


def run_artifact(path: str, directory: str, threads: int, seconds: float, hopeless: float) -> dict[str, Any]:
    """Verify a library against the expected output, then time it on CPUs of its own; an outcome as a dictionary.

    Beside the samples it has the seconds of the reference kernel, and whether the threads could be pinned.
    """
    try:
        return _run_artifact(path, directory, threads, seconds, hopeless)
    except MemoryError as error:  # a workspace larger than any memory
        return {OUTCOME_KEY: "memory", "error": str(error)}


def _run_artifact(path: str, directory: str, threads: int, seconds: float, hopeless: float) -> dict[str, Any]:
    if artifact_facts(path)["on_device"]:
        return _run_on_gpu(path, directory, seconds, hopeless)
    library, exact = load_artifact(path, threads)
    with pinned(threads) as is_pinned:
        call, dst = prepare_artifact(library, directory, threads)
        call()
        if text := _difference(library.spec, directory, dst, exact):
            return {OUTCOME_KEY: "wrong", "error": text}
        samples = time_calls(call, seconds=seconds, hopeless=hopeless)
        return {OUTCOME_KEY: "ok", "samples": samples, "reference": reference_kernel(), "pinned": is_pinned}


def _run_on_gpu(path: str, directory: str, seconds: float, hopeless: float) -> dict[str, Any]:
    from .gpu import gpu, output, prepare  # TVM comes with it, and what runs a CPU's library does without

    facts = artifact_facts(path)
    spec = ConvSpec.parse(facts["spec"])
    dst = np.empty(spec.dst_shape, numpy_dtype(spec.dst_dtype))
    call = prepare(path, facts["name"], load_inputs(spec, directory))
    call()
    text, samples = _difference(spec, directory, output(call, dst), facts["exact"]), []
    if not text:
        samples = gpu().time_calls(call, seconds, SAMPLE_SECONDS, hopeless)
        # What races is wrong now and then.
        text = _difference(spec, directory, output(call, dst), facts["exact"])
    call.close()  # not where it failed: the worker ends then
    return {OUTCOME_KEY: "wrong", "error": text} if text else {OUTCOME_KEY: "ok", "samples": samples}


def _difference(spec: ConvSpec, directory: str, dst: Any, exact: bool) -> str:
    """How an output differs from the expected one; empty where it does not."""
    expected = load(Path(directory) / "expected.npy", spec.dst_dtype)
    error = distance(dst, expected)
    bound = np.zeros((), np.float32) if exact else np.load(Path(directory) / "bound.npy")
    wrong = ~(error <= bound)  # NaN is wrong too
    if not wrong.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{int(wrong.sum())} of {wrong.size} elements; at {at} expected {expected[at]}, found {dst[at]}"


def run_duel(paths: list[str], directory: str, threads: int, rounds: int) -> list[list[float]]:
    """Time several libraries of one spec in turn, on CPUs of their own or on the GPU."""
    facts = [artifact_facts(path) for path in paths]
    if facts and facts[0]["on_device"]:
        from .gpu import gpu, prepare

        data = load_inputs(ConvSpec.parse(facts[0]["spec"]), directory)
        running = [prepare(path, known["name"], data) for path, known in zip(paths, facts, strict=True)]
        samples = gpu().alternate(running, rounds, DUEL_SECONDS)
        for call in running:
            call.close()
        return samples
    libraries = [load_artifact(path, threads)[0] for path in paths]
    with pinned(threads):
        prepared = [prepare_artifact(library, directory, threads) for library in libraries]
        return alternate([call for call, _ in prepared], rounds=rounds, seconds=DUEL_SECONDS)
