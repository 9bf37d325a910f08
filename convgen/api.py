"""The public functions: a kernel for a layer, at once or tuned."""

from __future__ import annotations

from collections.abc import Callable

from .hardware.machine import check_memory
from .hardware.target import Target, resolve
from .kernel.kernel import Kernel, check_threads, compile_candidate
from .problem.spec import ConvSpec
from .records.answer import Answer, choose, find_record
from .records.opening import Records, open_store
from .records.record import TuningRecord
from .tuning.recheck import recheck
from .tuning.search import Progress
from .tuning.tuner import Tuner


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
    spec = ConvSpec.parse(spec) if isinstance(spec, str) else spec
    resolved = resolve(target)
    threads = check_threads(threads, resolved)
    resolved = resolved.on(threads)
    check_memory(spec)
    answer = Answer(None)
    with open_store(records, write=bool(trials or seconds)) as store:
        if (trials or seconds) and spec.n:
            with Tuner(resolved, threads, store) as tuner:
                record = tuner.tune(spec, trials=trials, seconds=seconds, progress=progress)
                answer = Answer(record, rejected=frozenset(tuner.rejected))
        elif store is not None and resolved.native:
            answer = find_record(store, spec, resolved, threads)
            if answer.to_measure:  # in one or two seconds
                answer = recheck(store, spec, resolved, threads, answer)
    candidate, record = choose(spec, resolved, answer.record, answer.rejected)
    return compile_candidate(
        spec, resolved, candidate, threads, record=record, name=name, origin=answer.origin, note=answer.note
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
    spec = ConvSpec.parse(spec) if isinstance(spec, str) else spec
    resolved = resolve(target)
    with open_store(records) as store, Tuner(resolved, check_threads(threads, resolved), store) as tuner:
        return tuner.tune(spec, trials=trials, seconds=seconds, progress=progress, seed=seed)
