"""The public functions: a kernel for a layer, at once or tuned; a library for a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from .errors import SpecError
from .hardware.machine import check_memory
from .hardware.target import Target, check_threads, resolve
from .kernel.kernel import Kernel, compile_candidate
from .problem.separable import SEPARABLE, SeparableSpec
from .problem.spec import OPERATORS, ConvSpec
from .records.answer import Answer, choose, find_record
from .records.opening import Records, open_store
from .records.record import TuningRecord
from .tuning.recheck import recheck
from .tuning.search import Progress
from .tuning.tuner import Tuner, check_budget

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

    from .bridges.onnxruntime import OnnxRuntimeModel
    from .bridges.torch.exported import TorchProgram
    from .network.network import Network


def _layer(given: object) -> ConvSpec:
    """The layer that a spec or its descriptor says.

    Raises:
        SpecError: it is something else; says what to call with that.
    """
    if isinstance(given, ConvSpec):
        return given
    is_file = isinstance(given, str) and given.rpartition(".")[2] in ("onnx", "toml", "yaml", "yml", "json", "txt")
    if isinstance(given, str) and not is_file and not given.startswith("separable"):
        return ConvSpec.parse(given)
    raise SpecError("spec", "a ConvSpec or its descriptor", f"{_named(given)}{_instead(given)}")


def _check_model(given: object, programs: bool = True) -> None:
    """Raise SpecError where something is no model, nor a program of PyTorch's where these are taken; says what to call
    with that.
    """
    instead = _instead(given)
    if not programs and _is_exported(given):
        instead += "; torch.onnx.export makes an ONNX model"
    if isinstance(given, str) and given.partition(" ")[0] in OPERATORS and not os.path.exists(given):
        instead = "; convgen.build takes descriptors"
    elif isinstance(given, str) and given.partition(" ")[0] in SEPARABLE and not os.path.exists(given):
        pass
    elif isinstance(given, (str, Path)) or hasattr(given, "SerializeToString"):
        return
    expected = "a path, an ONNX model or an exported program of PyTorch" if programs else "a path or an ONNX model"
    raise SpecError("source", expected, f"{_named(given)}{instead}")


def _named(given: object) -> str:
    if isinstance(given, (str, Path)):
        return repr(str(given))
    kind = type(given).__qualname__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def _is_exported(given: object) -> bool:
    """Whether it is a program of PyTorch's, which is not imported for that."""
    return (type(given).__module__, type(given).__name__) == ("torch.export.exported_program", "ExportedProgram")


def _instead(given: object) -> str:
    """What to call with something that people hand over, as the end of a message; empty where nothing takes it."""
    roots = {base.__module__.partition(".")[0] for base in type(given).__mro__} - {"builtins"}
    if hasattr(given, "state_dict") and "torch" in roots:
        return (
            "; of one layer, convgen.spec_from_torch(module, input_shape) gives the spec; "
            "convgen.compile(torch.export.export(module, (x,))) compiles a whole module"
        )
    if _is_exported(given):
        return "; convgen.compile takes it"
    if roots & {"keras", "tensorflow", "tf_keras"}:
        return "; convgen.specs_from_keras gives the layers of a model's JSON"
    if isinstance(given, SeparableSpec) or (isinstance(given, str) and given.startswith("separable")):
        return "; convgen.compile takes convgen.separable_model(descriptor)"
    if hasattr(given, "SerializeToString") or (isinstance(given, (str, Path)) and str(given).endswith(".onnx")):
        return "; convgen.compile takes whole models, and convgen.read_specs gives a file's layers"
    if isinstance(given, (str, Path)):
        return "; convgen.read_specs gives a file's layers"
    if isinstance(given, ConvSpec) or hasattr(given, "spec"):
        return "; convgen.build takes specs" + ", such as its .spec" * (not isinstance(given, ConvSpec))
    return ""


def build(
    spec: ConvSpec | str,
    target: str | Target = "cpu",
    threads: int | None = None,
    trials: int = 0,
    seconds: float | None = None,
    records: Records = None,
    *,
    progress: Callable[[Progress], None] | None = None,
    name: str | None = None,
) -> Kernel:
    """A compiled kernel for one layer.

    Args:
        spec: a spec, or its descriptor.
        target: ``cpu`` (this machine) or ``cpu:<LLVM processor>``; ``cuda`` (this machine's GPU) or an architecture
            such as ``cuda:sm_90a``, which needs no device until a layer is bound.
        threads: threads the kernel is for; all cores by default. On a GPU it means nothing and is 1.
        trials, seconds: tuning budget; with neither, the best matching record answers, from the store or
            the package, else the schedule's default: always a kernel at once. A record of other versions,
            or one that cannot be, is first measured again, in one or two seconds; :attr:`Kernel.note` says so.
        records: the store: None the default one, False no records at all, or a path.
        progress: called after every trial.
        name: prefix of the exported C functions; made from the descriptor by default.

    Raises:
        SpecError: the spec, the thread count, the budget or the memory it takes is impossible.
        UnsupportedError: the target is unknown, or is a CPU's and cannot run here.
        BuildError: TVM, LLVM, NVIDIA's or the C compiler failed.
        RecordError: the store cannot be read or written.
        FolderError: the temporary folder cannot be written, is full, or nothing can be loaded from it.
    """
    spec = _layer(spec)
    resolved = resolve(target)
    threads = check_threads(threads, resolved)
    resolved = resolved.on(threads)
    check_memory(spec)
    answer = Answer(None)
    with open_store(records, write=bool(trials or seconds)) as store:
        if (trials or seconds) and spec.n:
            with Tuner(resolved, threads, store) as tuner:
                record = tuner.tune(spec, trials=trials, seconds=seconds, progress=progress)
                answer = Answer(record, rejected=frozenset(tuner.rejected), note=tuner.note)
        elif store is not None and resolved.native:
            answer = find_record(store, spec, resolved, threads)
            if answer.to_measure:  # in one or two seconds
                answer = recheck(store, spec, resolved, threads, answer)
    candidate, record = choose(spec, resolved, answer.record, answer.rejected)
    return compile_candidate(
        spec, resolved, candidate, threads, record=record, name=name, origin=answer.origin, note=answer.note
    )


@overload
def compile(  # noqa: A001  (convgen.compile, as torch.compile)
    source: str | Path | ModelProto,
    target: str | Target = ...,
    threads: int | None = ...,
    *,
    dims: Mapping[str, int | Sequence[int]] | None = ...,
    accuracy: str = ...,
    strips: int | None = ...,
    seconds: float | None = ...,
    records: Records = ...,
    progress: Callable[[int, int], None] | None = ...,
    name: str | None = ...,
) -> Network: ...
@overload
def compile(  # type: ignore[overload-cannot-match]  # noqa: A001  (ModelProto has no types)
    source: ExportedProgram,
    target: str | Target = ...,
    threads: int | None = ...,
    *,
    dims: Mapping[str, int | Sequence[int]] | None = ...,
    accuracy: str = ...,
    strips: int | None = ...,
    seconds: float | None = ...,
    records: Records = ...,
    progress: Callable[[int, int], None] | None = ...,
    name: str | None = ...,
) -> TorchProgram: ...
def compile(  # noqa: A001
    source: str | Path | ModelProto | ExportedProgram,
    target: str | Target = "cpu",
    threads: int | None = None,
    *,
    dims: Mapping[str, int | Sequence[int]] | None = None,
    accuracy: str = "standard",
    strips: int | None = 0,
    seconds: float | None = None,
    records: Records = None,
    progress: Callable[[int, int], None] | None = None,
    name: str | None = None,
) -> Any:
    """A whole ONNX model as one library: ``network(x)`` runs it. Or a program that ``torch.export`` has made.

    Args:
        source: a path or a model, of f32 tensors of known shapes, whose weights are constants; or an exported program
            of PyTorch, of which nodes that are not taken stay PyTorch's.
        target: ``cpu`` or ``cpu:<LLVM processor>``; ``cuda`` or an architecture such as ``cuda:sm_90a``, of models of
            floats: the network then takes arrays on the GPU.
        threads: threads that it runs on; all cores by default. On a GPU it means nothing.
        dims: sizes of symbolic dimensions, ``{"N": 1}``; with several, ``{"N": (1, 4, 16)}``, the network computes
            with each of them, by the inputs' shapes.
        accuracy: of its convolutions: ``strict``, ``standard``, ``relaxed``, ``tf32`` or ``bf16``; on a GPU
            ``f16`` too, which stores the tensors between its steps so.
        strips: rows of the strips in which depthwise convolutions and the 1×1 convolutions after them are computed,
            which takes less memory, and where images are large, less time; None: as many as suit the caches.
        seconds: for which a model is first tuned as a whole, earlier runs included; kernels that make the running
            network faster are recorded and used.
        records: the store whose kernels are used where it has some: None the default one, False none, or a path.
        progress: called with the number of functions that are compiled, and of all.
        name: prefix of the exported C functions; the model's by default.

    Raises:
        SpecError: it cannot be read, or is not an ONNX model; or an argument is wrong.
        NotTakenError: of nodes that are not taken: names each, and why.
        UnsupportedError: the target cannot run here.
        ExportError: nothing may be called as the model is; another ``name`` helps.
        BuildError: TVM, LLVM or the C compiler failed.
        FolderError: the temporary folder cannot be written, is full, or nothing can be loaded from it.
    """
    from .network.network import compile_model  # imports TVM and ONNX

    if _is_exported(source):
        from .bridges.torch.exported import TorchProgram  # imports PyTorch
        from .network.choice import check_accuracy, check_strips, network_target

        def compiled(model: ModelProto) -> Network:
            own = str(model.graph.name)
            return compile_model(
                model, target, threads, accuracy=accuracy, strips=strips, records=records, progress=progress, name=own
            )

        # Before nodes are taken one by one, where an error says no more than that one stays PyTorch's.
        target, threads = network_target(target, threads)
        check_accuracy(accuracy)
        check_strips(strips)
        if dims:
            raise SpecError("dims", "none for an exported program, whose sizes are its own", repr(dict(dims)))
        if seconds:
            raise SpecError("seconds", "none for an exported program: its networks use the records there are", seconds)
        return TorchProgram(source, compiled, name or "network")
    _check_model(source)
    if seconds:
        from .network.tuning import ModelTuning, tune_model

        if records is False:
            raise SpecError("seconds", "records, where what wins is kept", "records=False")
        check_budget(0, seconds)
        with open_store(records) as store:
            how: dict[str, Any] = {"dims": dims, "accuracy": accuracy, "strips": strips, "name": name}
            tune_model(ModelTuning(source, target, threads, **how), store, seconds)
    return compile_model(
        source,
        target,
        threads,
        dims=dims,
        accuracy=accuracy,
        strips=strips,
        records=records,
        progress=progress,
        name=name,
    )


def for_onnxruntime(
    source: str | Path | ModelProto,
    out: str | Path,
    target: str | Target = "cpu",
    threads: int | None = None,
    *,
    dims: Mapping[str, int | Sequence[int]] | None = None,
    accuracy: str = "standard",
    records: Records = None,
    progress: Callable[[int, int], None] | None = None,
) -> OnnxRuntimeModel:
    """An ONNX model that runs faster in ONNX Runtime: what convgen takes of it is computed by a library of custom
    operators, which is written beside it as ``lib<name>.so``; all else stays as it is.

    ::

        made = convgen.for_onnxruntime("model.onnx", "fast.onnx", threads=2)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.register_custom_ops_library(str(made.library))
        session = onnxruntime.InferenceSession("fast.onnx", options)

    Args:
        source: a path or a model.
        out: the file to write, ``<name>.onnx``.
        threads: in how many parts work is split, which the session's threads share; all cores by default.

    The other arguments are those of :func:`compile`.

    Raises:
        SpecError: it cannot be read, or is not an ONNX model; or an argument is wrong.
        UnsupportedError: nothing of it is taken: names each node, and why. Or the target cannot run here.
        ExportError: the files cannot be written.
        BuildError: TVM, LLVM or the C compiler failed.
        FolderError: the temporary folder cannot be written, is full, or nothing can be loaded from it.
    """
    _check_model(source, programs=False)
    from .bridges.onnxruntime import write_for_onnxruntime  # imports TVM and ONNX
    from .network.choice import network_target, recorded_choice

    resolved, threads = network_target(target, threads)
    with recorded_choice(records, resolved, threads) as choose:
        return write_for_onnxruntime(
            source, out, resolved, threads, dims=dims, accuracy=accuracy, choose=choose, progress=progress
        )


def tune(
    spec: ConvSpec | str,
    target: str | Target = "cpu",
    threads: int | None = None,
    *,
    trials: int = 0,
    seconds: float | None = None,
    records: Records = None,
    progress: Callable[[Progress], None] | None = None,
    seed: int = 0,
) -> TuningRecord | None:
    """Tune one layer; see :meth:`Tuner.tune`, and :func:`convgen.build` for the arguments it shares."""
    spec = _layer(spec)
    resolved = resolve(target)
    with open_store(records) as store, Tuner(resolved, check_threads(threads, resolved), store) as tuner:
        return tuner.tune(spec, trials=trials, seconds=seconds, progress=progress, seed=seed)
