"""Compile, verify, time: what is done to one candidate; :mod:`convgen.workers` says where.

An artifact is a private folder with the linked library and ``candidate.json``; what all candidates
of a spec share, inputs and the expected output, lies in one folder beside (:class:`Expected`).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dtypes import distance, load, numpy_dtype, save
from .library import Library
from .schedule import Candidate, Picks
from .spec import ConvSpec

#: A sample repeats the call until it lasts about this long (seconds): long against the clock's tick
#: and the cost of a call, short against what disturbs a shared machine.
SAMPLE_SECONDS = 1e-3
#: Seconds of samples taken of one candidate.
TRIAL_SECONDS = 0.1
#: A candidate this many times slower than the best is timed only once.
HOPELESS = 2.0
OUTCOME_KEY = "outcome"


# ---- timing -----------------------------------------------------------------------------------


def repeats(call: Callable[[], Any], seconds: float = SAMPLE_SECONDS) -> int:
    """How often to repeat a call in one sample; warms it up."""
    call()
    start = time.perf_counter()
    call()
    return max(1, min(10_000, int(seconds / max(time.perf_counter() - start, 1e-9))))


def sample(call: Callable[[], Any], count: int) -> float:
    """Seconds per call over ``count`` calls."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def time_calls(
    call: Callable[[], Any], *, seconds: float = 0.1, at_least: int = 5, hopeless: float = 0.0
) -> list[float]:
    """Samples of seconds per call, for about ``seconds`` in all.

    Only the first is taken where it exceeds ``hopeless`` (0: no limit).
    """
    count = repeats(call)
    samples = [sample(call, count)]
    if hopeless and samples[0] > hopeless:
        return samples
    total = max(at_least, min(200, int(seconds / max(samples[0] * count, 1e-9))))
    samples += [sample(call, count) for _ in range(total - 1)]
    return samples


def alternate(
    calls: Sequence[Callable[[], Any]], *, rounds: int, seconds: float = 5e-3, rest: float = 0.0
) -> list[list[float]]:
    """Samples of several calls taken in turn, so that a drifting machine hits all of them alike.

    Args:
        rounds: samples per call.
        seconds: length of a sample.
        rest: pause before each sample, for another library's spinning threads to go to sleep.
    """
    counts = [repeats(call, seconds) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, taken in zip(calls, counts, samples, strict=True):
            if rest:
                time.sleep(rest)
                call()
            taken.append(sample(call, count))
    return samples


# ---- what a worker needs besides the artifact -----------------------------------------------


class Expected:
    """Inputs and expected output of a spec in a folder, made once per tuning run.

    Integer data, so that a schedule that only reorders sums must match bit for bit; ``bound`` is
    for those that do not.
    """

    def __init__(self, spec: ConvSpec, directory: Path, threads: int) -> None:
        from .validate import exact_data, reference, tolerance

        self.directory = directory
        data = exact_data(spec)
        for name, array in (data | {"expected": reference(spec, data, threads)}).items():
            save(directory / f"{name}.npy", array)
        np.save(directory / "bound.npy", tolerance(spec, data, threads))


@dataclass(frozen=True)
class Result:
    """How a trial ended: one of the outcomes of :class:`~convgen.records.TuningRecord`."""

    outcome: str
    samples: tuple[float, ...] = ()
    error: str = ""

    @property
    def seconds(self) -> float | None:
        return statistics.median(self.samples) if self.outcome == "ok" else None


#: Not an outcome of the trial: it was never finished.
INTERRUPTED = Result("interrupted")


# ---- modules --------------------------------------------------------------------------------------


def measure_module(lowered: Any) -> Any:
    """A lowered candidate's module with all a build worker must know as an attribute."""
    meta = {
        "spec": lowered.spec.descriptor,
        "target": lowered.target.spelling,
        "schedule": lowered.candidate.schedule.id,
        "picks": dict(lowered.candidate.picks),
        "packed": lowered.packed,
    }
    return lowered.module.with_attr("convgen", json.dumps(meta))


def measured_candidate(module: Any) -> Candidate:
    """The candidate a module of :func:`measure_module` was made from."""
    from .discover import schedule

    meta = json.loads(str(module.attrs["convgen"]))
    return Candidate(schedule(meta["schedule"]), Picks(**meta["picks"]))


# ---- functions that run in workers ------------------------------------------------------------


def build_artifact(module_json: str, root: str) -> str:
    """Compile and link a measure candidate's module into a private folder; returns the library's path."""
    import tvm

    from .build import compile_lowered
    from .lower import Lowered
    from .target import resolve

    module = tvm.ir.load_json(module_json)
    meta = json.loads(str(module.attrs["convgen"]))
    spec, candidate = ConvSpec.parse(meta["spec"]), measured_candidate(module)
    lowered = Lowered(spec, resolve(meta["target"]), candidate, module, tuple(map(tuple, meta["packed"])))
    directory = Path(tempfile.mkdtemp(dir=root))
    interface, _, library = compile_lowered(lowered, directory, "candidate")
    exact = not candidate.schedule.transforms and spec.activation_op.exact
    (directory / "candidate.json").write_text(
        json.dumps({"spec": meta["spec"], "name": interface.name, "exact": exact})
    )
    return str(library)


def _load(path: str, threads: int) -> tuple[Library, bool]:
    meta = json.loads((Path(path).parent / "candidate.json").read_text())
    return Library(Path(path), ConvSpec.parse(meta["spec"]), meta["name"], threads), meta["exact"]


def _prepare(library: Library, directory: str, threads: int) -> tuple[Callable[[], Any], Any]:
    """A call of the library on the expected inputs, and the output it writes."""
    spec, folder = library.spec, Path(directory)
    data = {name: load(folder / f"{name}.npy", spec.dtype) for name in spec.shapes if name != "dst"}
    packed = library.pack(data["weights"], data.get("bias"), data.get("slope"))
    dst = np.full(spec.dst_shape, np.nan, numpy_dtype(spec.dtype))
    return library.prepare(data["src"], packed, dst, data.get("residual"), threads=threads), dst


def run_artifact(path: str, directory: str, threads: int, seconds: float, hopeless: float) -> dict[str, Any]:
    """Verify a library against the expected output, then time it; an outcome as a dictionary."""
    library, exact = _load(path, threads)
    call, dst = _prepare(library, directory, threads)
    call()
    expected = load(Path(directory) / "expected.npy", library.spec.dtype)
    error = distance(dst, expected)
    bound = np.zeros((), np.float32) if exact else np.load(Path(directory) / "bound.npy")
    wrong = ~(error <= bound)  # NaN is wrong too
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        text = f"{int(wrong.sum())} of {wrong.size} elements; at {at} expected {expected[at]}, found {dst[at]}"
        return {OUTCOME_KEY: "wrong", "error": text}
    return {OUTCOME_KEY: "ok", "samples": time_calls(call, seconds=seconds, hopeless=hopeless)}


def run_duel(paths: list[str], directory: str, threads: int, rounds: int) -> list[list[float]]:
    """Time several libraries in turn."""
    prepared = [_prepare(_load(path, threads)[0], directory, threads) for path in paths]
    return alternate([call for call, _ in prepared], rounds=rounds)
