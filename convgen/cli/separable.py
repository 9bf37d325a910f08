"""Commands about a separable problem, which is compiled as the network of its two convolutions."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SpecError
from ..problem.separable import SeparableSpec
from .common import FAILED, duration, emit, note, note_busy, say
from .network import say_interrupted, say_network, validate_model
from .steps import compiling
from .tables import say_table, table
from .tuned import network_line, print_results, print_status, run_job, run_whole

if TYPE_CHECKING:
    from onnx import ModelProto

    from ..network.network import Network
    from ..network.strip_tuning import StripTime
    from ..network.tuning import ModelTuning
    from ..records.opening import Records
    from ..report.whole import Bench


def model_of(spec: SeparableSpec, weights: Path | None) -> ModelProto:
    """The problem as a model, with the weights of a file.

    Raises:
        SpecError: the file is none of NumPy's, or arrays in it are wrong.
    """
    import numpy as np

    from ..check.onnx_separable import separable_model

    if weights is None:
        return separable_model(spec)
    try:
        with np.load(weights, allow_pickle=False) as arrays:
            found = dict(arrays)
    except (ValueError, OSError) as error:
        raise SpecError("weights", "a file that numpy.savez writes", str(error), str(weights)) from None
    return separable_model(spec, found)


def show_separable(spec: SeparableSpec, as_json: bool) -> None:
    """What a problem is."""
    parts = {name: part.descriptor for name, part in spec.parts.items()}
    weights = {name: list(shape) for name, shape in spec.parameters.items()}
    between = spec.depthwise.bytes["dst"]
    if as_json:
        emit({"spec": spec.descriptor, "flops": spec.flops, "between": between, "parts": parts, "weights": weights})
        return
    say(f"{spec}\n")
    rows = [[name, part.descriptor, f"{part.flops / 1e9:.4g}"] for name, part in spec.parts.items()]
    say_table(table(["part", "computes", "GFLOP>"], rows))
    say(f"\n{between / 1024:.4g} KiB are between the two.\n")
    say_table(table(["weights", "shape"], [[name, "x".join(map(str, shape))] for name, shape in weights.items()]))


def build_separable(
    spec: SeparableSpec,
    options: dict[str, Any],
    records: Records,
    *,
    weights: Path | None,
    strips: int | None,
    seconds: float | None,
    out: Path | None,
    name: str | None,
    libc: str | None,
    check: bool,
    as_json: bool,
) -> int:
    """Compile, validate and export; the exit status.

    Args:
        options: target and threads.
        strips: rows of a strip; None: what is recorded, or wins in ``seconds``, else what suits the caches.
    """
    from ..api import compile as compile_network
    from ..network.export import check_folder

    started, folder = time.monotonic(), out or Path("convgen-out", spec.name)
    model = model_of(spec, weights)
    check_folder(folder, name or spec.name)
    try:
        if strips is None and (seconds or records is not False):
            strips, _ = _height(spec, model, options, records, measure=bool(seconds))
        if seconds and (left := _left(started, seconds)):
            for times in run_whole(_tuning(spec, model, options, strips), left, records):
                note(network_line(times))
        options = {**options, "accuracy": spec.depthwise.accuracy}
        with compiling(quiet=as_json) as progress:
            network: Network = compile_network(
                model, strips=strips, records=records, name=name or spec.name, progress=progress, **options
            )
        report = network.validate(model) if check else None
        if report is not None and not report.passed:
            failed = next(found for found in report.checks if not found.passed)
            note(f"convgen: {spec}: {failed.name}: {failed.found}")
            return FAILED
        facts: dict[str, Any] = {"spec": spec.descriptor, "parameters": "random" if weights is None else weights.name}
        facts["validation"] = None if report is None else report.to_dict()
        manifest = network.export(folder, facts=facts, libc=libc)
    except KeyboardInterrupt:
        return say_interrupted(as_json)
    taken = time.monotonic() - started
    if as_json:
        facts = {"networks": [], "profiles": [], "taken": True, "outside": [], "interrupted": False}
        emit({"folder": str(folder), "seconds": taken, "manifest": manifest, **facts})
        return 0
    say_network(network, manifest, folder, taken)
    if weights is None:
        note(f"convgen: weights are random; for others give --weights FILE.npz with {', '.join(spec.parameters)}")
    return 0


def tune_problem(
    spec: SeparableSpec,
    options: dict[str, Any],
    records: Records,
    seconds: float | None,
    *,
    status: bool,
    as_json: bool,
) -> int:
    """Find the height of strips with which it is fastest, unless that is recorded, and tune the convolutions of these;
    the exit status.

    Args:
        options: target and threads.
        status: only show where it stands.
    """
    from ..tuning.job import Job

    if records is False:
        raise click.UsageError("expected records, where what wins is kept, found --no-records")
    started, model = time.monotonic(), model_of(spec, None)
    height, times = _height(spec, model, options, records, measure=not status)
    facts: dict[str, Any] = {"strips": height, "heights": list(map(asdict, times))}
    tuning = _tuning(spec, model, options, height)
    left = _left(started, seconds)
    job = tuning.job(Job((), seconds=left if times and left else seconds))
    if status or left == 0.0:
        facts |= {} if status else {"interrupted": False, "busy": None}
        note(f"{spec}: {_strips_text(height)}")
        found = print_status(job, records, as_json, facts)
    else:
        run, interrupted, busy = run_job(job, records, tuning)
        found = print_results(run, as_json, interrupted, busy, facts=facts)
    if not status and not as_json:
        words = [str(spec)]
        words += ["--target", options["target"]] if options["target"] != "cpu" else []
        words += ["--threads", str(options["threads"])] if options["threads"] is not None else []
        words += ["--records", str(records)] if isinstance(records, Path) else []
        note(f"next: `convgen build {shlex.join(words)} --out DIR` uses what was found")
    return found


def _strips_text(height: int | None) -> str:
    if height is None:
        return "no height of strips is recorded"
    return f"strips of {height} rows" if height else "no strips"


def _left(started: float, seconds: float | None) -> float | None:
    """What is left of a budget; None where there is no limit. Says so where nothing is."""
    if seconds is None:
        return None
    left = max(0.0, seconds - (time.monotonic() - started))
    if not left:
        note("convgen: the time went into the height of strips, no convolution is tuned: more --seconds do that")
    return left


def _tuning(spec: SeparableSpec, model: ModelProto, options: dict[str, Any], height: int | None) -> ModelTuning:
    from ..network.tuning import ModelTuning

    accuracy = spec.depthwise.accuracy
    return ModelTuning(model, **options, accuracy=accuracy, strips=height, name=spec.name)


def _height(
    spec: SeparableSpec, model: ModelProto, options: dict[str, Any], records: Records, *, measure: bool
) -> tuple[int | None, list[StripTime]]:
    """The recorded height of strips, and no times; where there is none the one that is the fastest, which is recorded,
    and the times of all, or None where nothing is to be measured.
    """
    from ..measure.busy import BusyWatch
    from ..network.choice import network_target, recorded_choice
    from ..network.strip_tuning import fastest, height_records, strip_times
    from ..records.opening import open_store
    from ..records.strips import best_height, rows_of

    target, threads = network_target(options["target"], options["threads"])
    is_new = isinstance(records, Path) and not records.exists()  # looking makes no store
    with open_store(not is_new and records, write=False) as store:
        known = best_height(store, spec, target, threads) if store is not None else None
    if known is not None:
        return rows_of(known), []
    if not measure:
        return None, []
    watch = BusyWatch()
    with recorded_choice(records, target, threads) as choose:
        times = strip_times(model, target, threads, accuracy=spec.depthwise.accuracy, choose=choose)
    note_busy([watch.share()], [threads])
    with open_store(records) as store:
        if store is not None:
            store.add_all(height_records(spec, target, threads, times))
    say(strips_table(times), err=True)
    return fastest(times).height, times


def strips_table(times: Sequence[StripTime]) -> str:
    """A line for each height."""
    rows = [
        [
            f"{time.height or 'all'}{' (auto)' if time.is_default else ''}",
            duration(time.seconds),
            f"{time.ratio[0]:.3f} ({time.ratio[1]:.3f}–{time.ratio[2]:.3f})",
        ]
        for time in times
    ]
    return table(["rows of a strip", "time>", "auto over it>"], rows)


def validate_separable(spec: SeparableSpec, options: dict[str, Any], seed: int, as_json: bool) -> int:
    """Check what build makes of random weights; the exit status."""
    model, records = model_of(spec, None), options["records"]
    setting = {name: options[name] for name in ("target", "threads")}
    strips, _ = (None, []) if records is False else _height(spec, model, setting, records, measure=False)
    how = {"accuracy": spec.depthwise.accuracy, "strips": strips, "name": spec.name}
    return validate_model(model, seed, as_json, **how, **options)


def bench_separable(spec: SeparableSpec, bench: Bench, rows: Path | None, report: Path | None, as_json: bool) -> int:
    """Time it beside other libraries, which get it as a model; the exit status."""
    from .whole import bench_whole

    with _file_of(spec) as path:
        return bench_whole([str(path)], {}, bench, rows, report, as_json)


@contextmanager
def _file_of(spec: SeparableSpec) -> Iterator[Path]:
    """The problem as a file, for a while."""
    import onnx

    from ..folders import TemporaryFolder

    with TemporaryFolder() as folder:
        path = folder / f"{spec.name}.onnx"
        onnx.save(model_of(spec, None), path)
        yield path
