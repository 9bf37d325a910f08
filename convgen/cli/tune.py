"""``convgen tune``: tuning jobs, from the command line or a job file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..formats.entries import AccuracyRule
from ..formats.sources import is_model, split_sources
from ..measure.standalone.words import printable
from .common import (
    NON_NEGATIVE,
    check_names,
    check_target,
    chosen_records,
    json_option,
    model_options,
    records_options,
    skip_option,
    status_of,
    thread_counts_option,
    trials_option,
    whole_accuracy,
)
from .completion import complete_spec, list_of, schedules_beginning, targets_beginning
from .separable_options import refuse_for_separable, separable_of
from .steps import check_picture, timed_steps, write_steps
from .tuned import print_results, print_status, run_job

if TYPE_CHECKING:
    from ..network.tuning import ModelTuning
    from ..tuning.job import Job


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
    shell_complete=list_of(targets_beginning),
    metavar="TARGET[,…]",
    help="What to tune for: cpu, cpu:<LLVM processor>, cuda or cuda:<architecture>.",
)
@thread_counts_option("Threads that kernels run on, such as 1,2.  [default: all cores]")
@click.option(
    "--seconds",
    type=NON_NEGATIVE,
    metavar="S",
    help="Time for the whole job, including that of earlier runs; 0: none.",
)
@trials_option
@click.option(
    "--total-trials",
    type=click.IntRange(min=0),
    metavar="N",
    help="Trials for the whole job, including those of earlier runs; 0: none.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many trials without a gain end the search of a layer.",
)
@click.option("--exclude", shell_complete=list_of(schedules_beginning), metavar="ID,…", help="Schedules to leave out.")
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

    Of a separable problem first the height of the strips is found in which it is computed fastest, and recorded; then
    the convolutions of these are tuned in the same way.
    """
    if (separable := separable_of(sources, accuracy)) is not None:
        taken = ("seconds", "target", "threads")
        refuse_for_separable(report=report, **{name: value for name, value in options.items() if name not in taken})
        setting = _only_setting(options["target"] or ("cpu",), options["threads"] or (None,))
        from .separable import tune_problem  # and what compiles networks

        return tune_problem(
            separable,
            setting,
            chosen_records(records, no_records, True),
            options["seconds"],
            status=status,
            as_json=as_json,
        )
    job = _job(sources, job_file, dims, options)
    job = replace(job, accuracy=(*job.accuracy, *accuracy))
    if records is not None:
        job = replace(job, records=records)
    if report is not None and not whole:
        raise click.UsageError("--report needs --whole; `convgen report` shows what other jobs have brought")
    kept = chosen_records(records if job.records is None else job.records, no_records, writes=True)
    tuning, asked = _whole(job) if whole else None, job
    if tuning is not None:
        job = tuning.job(job)
    if status:
        return print_status(job, kept, as_json) or status_of(job.skipped, skip)
    run, interrupted, busy = run_job(job, kept, tuning)
    if tuning is not None and report is not None and not interrupted:
        profiles = timed_steps(tuning.recorded(kept), lambda _: tuning.network({}))
        write_steps(profiles, tuning.target.spelling, report)
    return print_results(run, as_json, interrupted, busy, asked=asked) or status_of(run.job.skipped, skip)


def _only_setting(targets: Sequence[str], threads: Sequence[int | None]) -> dict[str, Any]:
    """Target and number of threads of what is tuned for one of each."""
    if len(targets) > 1 or len(threads) > 1:
        raise click.UsageError("expected one target and one number of threads for a separable problem, found several")
    return {"target": targets[0], "threads": threads[0]}


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
