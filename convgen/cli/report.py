"""``convgen report``: what tuning did, as a page."""

from __future__ import annotations

from pathlib import Path

import click

from ..formats.entries import AccuracyRule
from ..formats.sources import is_model, split_sources, write_text
from .common import (
    emit,
    json_option,
    layers_of,
    model_options,
    note,
    note_left_out,
    say,
    skip_option,
    status_of,
    threads_option,
    tidy,
    whole_accuracy,
)
from .completion import one_of, targets_beginning
from .steps import check_picture, report_model
from .wanted import recorded_target
from .whole import existing_model


@click.command(short_help="Show what a store's or job's tuning brought, as one page.")
@click.argument("where", type=click.Path(dir_okay=False, path_type=Path), metavar="STORE|JOB.toml")
@click.argument("sources", nargs=-1, metavar="[SPEC|FILE|MODEL.onnx]…")
@model_options
@skip_option
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_picture,
    metavar="FILE",
    help="File to write: FILE.html as a page, FILE.md as tables, with --whole also FILE.svg as a picture.  "
    "[default: print the tables]",
)
@click.option(
    "--target",
    shell_complete=one_of(targets_beginning),
    metavar="TARGET",
    help="Only what was tuned for this target: cpu, or cpu:<LLVM processor>.",
)
@threads_option("Only what was tuned for N threads.")
@click.option(
    "--bench",
    "benches",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="ROWS.jsonl",
    help="Rows of a bench on the same machine, which add the times of other libraries; may be repeated.",
)
@click.option(
    "--whole",
    is_flag=True,
    help="Time one model as `convgen compile` makes it, with the store's kernels and with the defaults, step by step.",
)
@json_option
def report(
    where: Path,
    sources: tuple[str, ...],
    dims: dict[str, int],
    accuracy: tuple[AccuracyRule, ...],
    skip: bool,
    out: Path | None,
    target: str | None,
    threads: int | None,
    benches: tuple[Path, ...],
    whole: bool,
    as_json: bool,
) -> int:
    """Show what tuning brought, from the records alone.

    Takes a record STORE, or a JOB file, which names a store and models. With models or layers, the report is
    about these alone: each layer with its count, and the time of each model. It says what was gained over
    the default and over other libraries, how far each layer is from the machine's limit, how the search
    went and which schedules won, and lists every trial that failed.

    With --whole the model is compiled and run, now and on this machine: what it takes with the store's kernels and with
    the defaults, all of it and each step, what stands between convolutions included.
    """
    if whole:
        if len(sources) != 1 or not is_model(sources[0]) or where.suffix == ".toml" or benches:
            raise click.UsageError("--whole: expected a STORE and one ONNX model, and no --bench")
        how = {"dims": dims, "accuracy": whole_accuracy(accuracy), "target": target or "cpu", "threads": threads}
        return report_model(existing_model(sources[0]), where, out, as_json, **how)
    if out is not None and out.suffix == ".svg":
        raise click.UsageError(
            "-o FILE.svg: expected --whole and a model, the steps of which can be drawn, or FILE.html"
        )
    from ..records.store import RecordStore
    from ..report.gather import Model, gather, read_rows
    from ..report.tuning_text import markdown
    from ..tuning.job import Job

    given = split_sources(sources)
    read, left_out = layers_of(given, dims, accuracy, fits=False)
    models = [Model(_name(Path(source), source), entries) for source, entries in zip(given, read, strict=True)]
    path: Path | None = where
    title = None
    targets, counts = [target] if target else [], [threads] if threads else []
    if where.suffix == ".toml":
        job = Job.from_file(where)
        path, title = job.records, where.stem
        targets, counts = targets or list(job.targets), counts or list(job.threads)
        if not models:
            models = [Model(_name(job.folder / model, model), entries) for model, entries in job.layers]
            left_out = list(job.skipped)
            note_left_out(left_out)
    notes = [f"Left out: {reason}" for reason in left_out]
    rows = [row for bench in benches for row in read_rows(bench)]
    with RecordStore(path, readonly=True) as store:
        spelled = [recorded_target(name, store) for name in targets]
        found = gather(store, models, title=title, targets=spelled, threads=counts, rows=rows, notes=notes)
    if out is not None:
        if out.suffix == ".md":
            text = markdown(found)
        else:
            from ..report.tuning_page import page  # loads Jinja

            text = page(found)
        write_text(text, out)
        note(f"wrote {tidy(out)}")
    if as_json:
        emit(found.to_dict())
    elif out is None:
        say(markdown(found).removesuffix("\n"))
    return status_of(left_out, skip)


def _name(path: Path, source: str) -> str:
    """A model's name: that of its file, or the spec itself."""
    return path.stem if path.is_file() else source
