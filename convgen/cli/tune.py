"""``convgen tune``: tuning jobs, from the command line or a job file."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UnsupportedError
from ..formats.entries import AccuracyRule, SpecEntry
from ..formats.sources import is_model, is_path, split_sources
from ..measure.standalone.words import printable
from ..report.words import picks_text, plural
from .common import (
    FAILED,
    INTERRUPTED,
    NON_NEGATIVE,
    check_names,
    check_target,
    chosen_records,
    complete_spec,
    duration,
    emit,
    json_option,
    label,
    model_options,
    note,
    note_busy,
    note_left_out,
    rate,
    records_options,
    say,
    skip_option,
    status_of,
    table,
    thread_counts_option,
    tidy,
    trials_option,
    whole_accuracy,
)
from .separable_options import refuse_for_separable, separable_of
from .steps import check_picture, timed_steps, write_steps
from .view import JobView, clock, remaining

if TYPE_CHECKING:
    from onnx import ModelProto

    from ..hardware.target import Target
    from ..measure.workers import Pools
    from ..network.strip_tuning import StripTime
    from ..network.tuning import ModelTuning
    from ..problem.separable import SeparableSpec
    from ..records.opening import Records
    from ..tuning.job import Job
    from ..tuning.job_run import JobRun, Layer
    from ..tuning.networks import NetworkTimes


def _check_targets(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    spellings = dict.fromkeys(part.strip() for part in text.split(","))
    return tuple(check_target(context, parameter, spelling) for spelling in spellings)


@click.command(short_help="Search for fast kernels; fills the record store.")
@click.argument("sources", nargs=-1, metavar="[SPEC|FILE|MODEL.onnx]…", shell_complete=complete_spec)
@click.option(
    "--job",
    "job_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A job file (TOML); other options override what it says.",
)
@model_options
@skip_option
@click.option(
    "--target",
    callback=_check_targets,
    metavar="TARGET[,…]",
    help="What to tune for: cpu, cpu:<LLVM processor>, cuda or cuda:<architecture>.",
)
@thread_counts_option("Threads that kernels run on, such as 1,2.  [default: all cores]")
@click.option(
    "--seconds",
    type=NON_NEGATIVE,
    metavar="S",
    help="Time for the whole job, including that of earlier runs.",
)
@trials_option
@click.option(
    "--total-trials",
    type=click.IntRange(min=0),
    metavar="N",
    help="Trials for the whole job, including those of earlier runs.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many trials without a gain end the search of a layer.",
)
@click.option("--exclude", metavar="ID,…", help="Schedules to leave out.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Seed of the search.  [default: 0]")
@records_options
@click.option(
    "--whole",
    is_flag=True,
    help="Tune the convolutions of one model as `convgen compile` plans them, and keep what makes the running network "
    "faster.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_picture,
    metavar="FILE",
    help="With --whole: then time each step of the model before and after: FILE.html as a page, FILE.svg as a picture, "
    "FILE.md as a table.",
)
@click.option("--tracker", metavar="HOST:PORT", help="Measure on the devices of this RPC tracker.")
@click.option("--device-key", metavar="KEY", help="Key of the devices to measure on.")
@click.option("--cluster", metavar="ADDRESS", help="Compile on this Dask cluster.")
@click.option("--status", is_flag=True, help="Show where the job stands, without measuring.")
@json_option
def tune(
    sources: tuple[str, ...],
    job_file: Path | None,
    dims: dict[str, int],
    accuracy: tuple[AccuracyRule, ...],
    skip: bool,
    records: Path | None,
    no_records: bool,
    whole: bool,
    report: Path | None,
    status: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Search for fast kernels and keep every trial in the record store.

    All layers of all models share the budget: each round goes to the layer where it is expected to save
    most time. Without a budget each layer is tuned until nothing more is gained. Layers that the store
    already answers are skipped. Ctrl-C keeps everything measured so far; the same command goes on from
    there.

    With --whole the layers are those of the network that `convgen compile` makes of a model, in its layouts. The budget
    goes where the network's time goes, and a kernel is kept where the network that has it runs faster.

    Of a separable problem first the height of the strips is found in which it is computed fastest, then the
    convolutions of these are tuned in the same way.
    """
    from ..measure.busy import BusyWatch

    if (separable := separable_of(sources, accuracy)) is not None:
        refuse_for_separable(report=report, status=status, json=as_json)
        return _tune_separable(separable, chosen_records(records, no_records), options)
    job = _job(sources, job_file, dims, options)
    job = replace(job, accuracy=(*job.accuracy, *accuracy))
    if records is not None:
        job = replace(job, records=records)
    if report is not None and not whole:
        raise click.UsageError("--report needs --whole; `convgen report` shows what other jobs have brought")
    kept = chosen_records(records if job.records is None else job.records, no_records)
    tuning = _whole(job) if whole else None
    if tuning is not None:
        job = tuning.job(job)
    if status:
        return _print_status(job, kept, as_json) or status_of(job.skipped, skip)
    interrupted = False
    watch = BusyWatch()
    with _working(job, kept, tuning) as (run, view):
        note_left_out(job.skipped)
        try:
            with view:
                run.run()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            run.close()
    busy = watch.share() if job.tracker is None and run.measured else None  # a device's CPUs are not watched
    if tuning is not None and report is not None and not interrupted:
        profiles = timed_steps(tuning.recorded(kept), lambda _: tuning.network({}))
        write_steps(profiles, tuning.target.spelling, report)
    return _print_results(run, as_json, interrupted, busy) or status_of(run.job.skipped, skip)


def _tune_separable(spec: SeparableSpec, records: Records, options: dict[str, Any]) -> int:
    """Tune a separable problem on this machine, for one target and number of threads; the exit status."""
    from ..check.onnx_separable import separable_model

    taken = ("seconds", "target", "threads")
    refuse_for_separable(**{name: value for name, value in options.items() if name not in taken})
    targets, threads = options["target"] or ("cpu",), options["threads"] or (None,)
    if len(targets) > 1 or len(threads) > 1:
        raise click.UsageError(f"{spec}: expected one target and one number of threads, found several")
    setting = {"target": targets[0], "threads": threads[0]}
    height = tune_separable(spec, separable_model(spec), setting, records, options["seconds"])
    words = [str(spec), "--strips", str(height)]
    words += ["--target", str(targets[0])] if targets[0] != "cpu" else []
    words += ["--threads", str(threads[0])] if threads[0] is not None else []
    words += ["--records", str(records)] if isinstance(records, Path) else []
    note(f"next: `convgen build {shlex.join(words)} --out DIR` uses what was found")
    return 0


def tune_separable(
    spec: SeparableSpec, model: ModelProto, options: dict[str, Any], records: Records, seconds: float | None
) -> int:
    """Find the height of strips with which it is fastest, then tune the convolutions of these; gives the height."""
    from ..network.choice import network_target, recorded_choice
    from ..network.strip_tuning import best_height, strip_times
    from ..network.tuning import ModelTuning

    if records is False:
        raise click.UsageError("expected records, where what wins is kept, found --no-records")
    started = time.monotonic()
    target, threads = network_target(options["target"], options["threads"])
    accuracy = spec.depthwise.accuracy
    with recorded_choice(records, target, threads) as choose:
        times = strip_times(model, target, threads, accuracy=accuracy, choose=choose)
    say(strips_table(times), err=True)
    height = best_height(times)
    left = None if seconds is None else max(0.0, seconds - (time.monotonic() - started))
    if left == 0.0:
        note("convgen: the time went into the height of strips, no convolution is tuned: more --seconds do that")
    tuning = ModelTuning(model, target, threads, accuracy=accuracy, strips=height, name=spec.name)
    for found in tune_whole(tuning, left, records):
        note(network_line(found))
    return height


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


def _job(sources: tuple[str, ...], job_file: Path | None, dims: dict[str, int], options: dict[str, Any]) -> Job:
    """The job that a command line describes."""
    from ..lowering.discover import schedule_ids
    from ..tuning.job import Job

    if bool(sources) == bool(job_file):
        raise click.UsageError("expected either layers or models to tune, or --job FILE" + ", not both" * bool(sources))
    if (options["tracker"] is None) != (options["device_key"] is None):
        raise click.UsageError("--tracker and --device-key belong together")
    job = Job.from_file(job_file) if job_file else Job(split_sources(sources))
    if options["exclude"] is not None:
        options["exclude"] = tuple(check_names("--exclude", options["exclude"], schedule_ids()))
    options["targets"] = options.pop("target")
    options["trials_per_layer"], options["trials"] = options.pop("trials"), options.pop("total_trials")
    job = replace(job, **{name: value for name, value in options.items() if value is not None})
    return replace(job, dims={**job.dims, **dims})


def _whole(job: Job) -> ModelTuning:
    """The model of a job that is tuned as a whole."""
    (model, *others), (target, *targets), threads = job.models, job.targets, job.threads
    if others or not is_model(model, job.folder):
        raise click.UsageError(f"--whole: expected one ONNX model, found {', '.join(map(printable, job.models))}")
    if targets or len(threads) > 1:
        raise click.UsageError("--whole: expected one target and one number of threads, found several")
    if job.tracker is not None:
        raise click.UsageError("--whole: expected this machine, where the network runs, found --tracker")

    from ..network.tuning import ModelTuning

    accuracy, path = whole_accuracy(job.accuracy), job.folder / model
    return ModelTuning(path, target, threads[0] if threads else None, dims=job.dims, accuracy=accuracy)


def tune_whole(tuning: ModelTuning, seconds: float | None, records: Records) -> list[NetworkTimes]:
    """Tune a model before it is compiled, and show that; what it takes before and after.

    Raises:
        KeyboardInterrupt: what was measured until then is in the store.
    """
    from ..tuning.job import Job

    with _working(tuning.job(Job((), seconds=seconds)), records, tuning) as (run, view):
        try:
            with view:
                run.run()
        finally:
            run.close()
    return run.networks


@contextmanager
def _working(job: Job, records: Records, tuning: ModelTuning | None = None) -> Iterator[tuple[JobRun, JobView]]:
    """A job ready to run, with its workers; of a model that is tuned as a whole where that is given."""
    from ..hardware.target import check_native
    from ..hardware.target import resolve as resolve_here

    if job.tracker is None or "cuda" not in job.targets:  # else the device says which GPU that is
        job.problems(resolve_here)  # what is wrong shows before anything starts, or is loaded

    from ..records.opening import open_store
    from ..tuning.job_run import JobRun

    resolve: Callable[[str], Target] | None = None
    with open_store(records) as store:
        if job.tracker is None:
            for problem in job.problems():
                check_native(problem.target)
        pools, resolve = _pools(job)
        try:
            view, expected = JobView(), None
            if tuning is not None:
                note("running the network with its defaults")
                expected = tuning.expected()
            yield (
                JobRun(job, store, pools, report=view.update, resolve=resolve, timing=tuning, expected=expected),
                view,
            )
        finally:
            pools.close()


def _pools(job: Job) -> tuple[Pools, Callable[[str], Target] | None]:
    """Who compiles and measures, and what resolves a target's spelling on the device; None for this machine."""
    from ..hardware.target import resolve
    from ..measure.cluster import DaskBuilder
    from ..measure.fleet import RemoteRunner
    from ..measure.workers import Builder, LocalBuilder, LocalRunner, Pools, Runner

    runner: Runner
    builder: Builder
    facts: Callable[[str], Target] | None = None
    if job.tracker is not None and job.device_key is not None:
        runner = remote = RemoteRunner(job.tracker, job.device_key)

        def facts(spelling: str) -> Target:
            return resolve(spelling, machine=remote.machine())
    else:
        runner = LocalRunner()
    try:
        builder = DaskBuilder(job.cluster) if job.cluster is not None else LocalBuilder(resolve().cores)
    except BaseException:
        runner.close()
        raise
    return Pools(builder, runner), facts


# ---- results ----------------------------------------------------------------------------------


def _entry(layer: Layer) -> SpecEntry:
    return SpecEntry(layer.problem.spec, layer.problem.count, layer.problem.names)


def _result(layer: Layer) -> dict[str, Any]:
    """A layer as JSON values."""
    from ..records.answer import is_final

    problem, search, state = layer.problem, layer.search, layer.progress
    winner = search.winner if search else None
    if winner is None and layer.best is not None and is_final(layer.best):  # compared in an earlier run
        winner = layer.best
    said = (winner.note or {}) if winner else {}
    result = {
        "names": list(problem.names),
        "models": list(problem.models),
        "count": problem.count,
        "spec": problem.spec.descriptor,
        "target": problem.target.spelling,
        "threads": problem.threads,
        "state": layer.state,
        "reason": layer.reason,
        "trials": search.made if search else 0,
        "known_trials": state.done - search.made if state and search else 0,
        "failures": dict(state.failures) if state else {},
        "tuning_seconds": state.elapsed if state else 0.0,
        "default_seconds": said.get("default_seconds", state.default if state else None),
        "onnxruntime_seconds": said.get("onnxruntime_seconds"),
        "ratio_default": said.get("ratio_default"),
        "ratio_onnxruntime": said.get("ratio_onnxruntime"),
        "compared": "default_seconds" in said,
        "network": said.get("network"),
        "best": layer.best.to_dict() if layer.best else None,
    }
    if layer.state == "failed":
        result["error"] = layer.reason
    return result


def _document(run: JobRun, results: list[dict[str, Any]]) -> dict[str, Any]:
    layers = run.layers
    targets = list(dict.fromkeys(layer.problem.target.spelling for layer in layers))
    threads = list(dict.fromkeys(layer.problem.threads for layer in layers))
    return {
        "job": run.job.id,
        "target": targets[0] if len(targets) == 1 else targets,
        "threads": threads[0] if len(threads) == 1 else threads,
        "records": str(run.store.path) if run.store is not None else None,
        "seconds": run.job.seconds,
        "trials": run.job.trials,
        "spent_seconds": run.spent,
        "spent_trials": run.trials,
        "skipped": list(run.job.skipped),
        "networks": [asdict(times) for times in run.networks],
        "layers": results,
    }


def _print_results(run: JobRun, as_json: bool, interrupted: bool, busy: float | None) -> int:
    results = [_result(layer) for layer in run.layers]
    failed = [result for result in results if "error" in result]
    reached = [result for result in results if result["state"] != "waiting"]
    if as_json:
        emit(_document(run, results) | {"interrupted": interrupted, "busy": busy})
    elif len(results) > 1:
        say(summary(run.layers))
    elif reached and not failed:
        say(line(run.layers[0]))
    if not as_json:
        for times in run.networks:
            say(network_line(times))
        if len(results) > 1 and not any(times.seconds for times in run.networks):
            say("\n".join(brought(results)))
        _note_compared_alone(run.layers)
        _note_next(run, results)
    note_busy([busy])
    if interrupted:
        where = f"kept in {tidy(run.store.path)}" if run.store is not None else "not kept, without a record store"
        trials = f"{plural(run.measured, 'trial')} measured, {where}"
        note(f"convgen: interrupted: {trials}; the same command goes on from there")
        return INTERRUPTED
    for result in failed:
        note(f"convgen: {result['spec']}: {result['error']}")
    if len(reached) < len(results):
        rest = len(results) - len(reached)
        note(
            f"convgen: {rest} of {len(results)} layers not reached within the budget; "
            "the same command with a larger budget goes on from here"
        )
    return FAILED if failed or not reached else 0


def _print_status(job: Job, records: Records, as_json: bool) -> int:
    """Where a job stands, from the store alone."""
    from ..records.store import RecordStore, default_path
    from ..tuning.job_run import JobRun

    if job.tracker is not None:
        raise UnsupportedError(
            "--status: expected a job that measures on this machine, found one for devices; `convgen report` shows "
            "what was measured there"
        )
    path = default_path() if records in (None, True) else records
    store = RecordStore(path, readonly=True) if isinstance(path, Path) and path.exists() else None
    try:
        run = JobRun(job, store)
        run.close()
    finally:
        if store is not None:
            store.close()
    results = [_result(layer) for layer in run.layers]
    note_left_out(job.skipped)
    if as_json:
        emit(_document(run, results))
        return 0
    if results:
        say(summary(run.layers))
    trials = plural(run.trials, "trial") + (f" of {job.trials}" if job.trials is not None else "")
    budget = f" of {clock(job.seconds)}" if job.seconds is not None else ""
    note(f"job {job.id}: {trials} in {clock(run.spent)}{budget}, {remaining(run)}")
    return 0


def network_line(times: NetworkTimes) -> str:
    """What a model's layers take one after another."""
    who = f"{printable(times.model)}, {times.target} {times.threads}T"
    if times.seconds is None or times.default_seconds is None or times.ratio_default is None:
        return f"{who}: not timed: {times.reason}"
    gain, low, high = times.ratio_default
    what = "the whole takes" if times.whole else f"{plural(times.layers, 'convolution')} one after another take"
    said = f"{who}: {what} {duration(times.seconds)}, {duration(times.default_seconds)} with the defaults"
    kept = f"tuned kernels are kept for {plural(times.won, 'layer')}"
    if times.lost:
        kept += f"; those of {times.lost} more won alone and do not pay here"
    if times.reason:
        kept += f" ({times.reason})"
    return f"{said} ({gain:.3f}×, {low:.3f}–{high:.3f}); {kept}"


def brought(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the layers take together before and after by their final comparisons, for each target and thread count.

    Args:
        results: layers as :func:`_result` gives them; each counts as often as it occurs in all models.
    """
    lines = []
    settings = dict.fromkeys((result["target"], result["threads"]) for result in results)
    for target, threads in settings:
        own = [result for result in results if (result["target"], result["threads"]) == (target, threads)]
        models = list(dict.fromkeys(model for result in own for model in result["models"]))
        who = printable(models[0]) if len(models) == 1 else plural(len(models), "model")
        who += f" on {target}, {plural(threads, 'thread')}" if len(settings) > 1 else ""
        compared = [r for r in own if r["compared"] and r["default_seconds"] and r["best"] and r["best"]["seconds"]]
        missing = f"{plural(len(own) - len(compared), 'layer')} without a final comparison"
        if not compared:
            lines.append(f"{who}: {missing}")
            continue
        before = sum(result["default_seconds"] * result["count"] for result in compared)
        after = sum(result["best"]["seconds"] * result["count"] for result in compared)
        gain = f"{duration(after)} tuned, {duration(before)} with the defaults ({before / after:.2f}×)"
        counted = f"{plural(len(compared), 'layer')}, each as often as it occurs"
        lines.append(f"{who}: {gain}: {counted}{f'; {missing} left out' * (len(compared) < len(own))}")
    return lines


def _note_next(run: JobRun, results: Sequence[Mapping[str, Any]]) -> None:
    """Say which command uses what was found."""
    if run.store is None or not any(result["best"] for result in results) or run.job.tracker is not None:
        return
    source, folder = run.job.models[0] if len(run.job.models) == 1 else "MODEL", run.job.folder
    name = str(folder / source)
    command = ["convgen", "build", *([name] if is_path(source, folder) else source.split())]
    if is_model(source, folder):
        command = ["convgen", "compile", name, "--out", "DIR"]
    for rule in run.job.accuracy:
        command += ["--accuracy", str(rule)]
    for dim, size in run.job.dims.items():
        command += ["--dim", f"{dim}={size}"]
    command += ["--target", run.job.targets[0]] if run.job.targets[0] != "cpu" else []
    command += ["--threads", str(results[0]["threads"])] if run.job.threads else []
    command += ["--records", str(run.store.path)] if run.job.records is not None else []
    others = [f"--target {target}" for target in run.job.targets[1:]]
    others += [f"--threads {count}" for count in run.job.threads[1:]]
    note(f"next: `{shlex.join(command)}` uses what was found{'; so it does with ' * bool(others)}{', '.join(others)}")


def _note_compared_alone(layers: list[Layer]) -> None:
    """Say of how many layers the winner was not judged in a network."""
    alone = sum(layer.is_compared_alone for layer in layers)
    if alone:
        what = "a tuned kernel that was" if alone == 1 else "tuned kernels that were"
        note(f"convgen: {plural(alone, 'layer')} with {what} compared alone, with cold weights, not in a network")


def _cells(layer: Layer) -> list[str]:
    """Time, rate, gains over the default and over ONNX Runtime, trials, failures, state, candidate."""
    result, best, flops = _result(layer), layer.best, layer.problem.spec.flops
    trials = str(result["trials"] + result["known_trials"])
    failures = sum(result["failures"].values())
    if best is None or best.seconds is None:
        return ["–", "–", "–", "–", trials, str(failures), layer.state, layer.reason]
    default, peer = result["default_seconds"], result["onnxruntime_seconds"]
    return [
        duration(best.seconds),
        rate(flops, best.seconds),
        f"{default / best.seconds:.2f}" if default else "–",
        f"{peer / best.seconds:.2f}" if peer else "–",
        trials,
        str(failures),
        layer.state,
        f"{best.schedule}({picks_text(best.picks)})",
    ]


def line(layer: Layer) -> str:
    """How a layer ended."""
    time, gflops, gain, peer, trials, failures, _, candidate = _cells(layer)
    if layer.best is None:
        return f"no kernel: {candidate}"
    spent = layer.progress.elapsed if layer.progress else 0.0
    said = f"{trials} trials" + (f", {failures} failed," if failures != "0" else "") + f" in {spent:.0f} s"
    against = f"{gain}× the default" + (f"  {peer}× ONNX Runtime" if peer != "–" else "")
    return f"{time}  {gflops} GFLOP/s  {against}  {candidate}  {said}"


def summary(layers: list[Layer]) -> str:
    """A table of all layers."""
    several = len({(layer.problem.target.spelling, layer.problem.threads) for layer in layers}) > 1
    rows = []
    for layer in layers:
        where = f"{layer.problem.target.spelling} {layer.problem.threads}T" if several else ""
        rows.append([label(_entry(layer)), layer.problem.spec, where, *_cells(layer)])
    return table(
        [
            *("layer", "spec", "for", "time>", "GFLOP/s>", "× default>", "× ONNX Runtime>", "trials>", "failed>"),
            *("state", "candidate"),
        ],
        rows,
    )
