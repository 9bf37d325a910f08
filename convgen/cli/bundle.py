"""``convgen fleet pack``, ``run`` and ``import``: measuring where there is no compiler and no network."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import MeasureError
from ..formats.entries import AccuracyRule, SpecEntry, merge
from ..formats.sources import split_sources
from ..report.words import plural
from .common import (
    FiniteRange,
    check_names,
    check_target,
    chosen_records,
    emit,
    json_option,
    layers_of,
    model_options,
    note,
    records_options,
    say,
    size,
    skip_option,
    status_of,
    store_option,
    thread_counts_option,
    tidy,
)
from .completion import complete_spec, list_of, schedules_beginning, targets_beginning
from .separable_options import separable_of

if TYPE_CHECKING:
    from ..hardware.machine import Machine


@click.command(short_help="Compile candidates into a bundle for a machine without compiler or network.")
@click.argument("spec", nargs=-1, metavar="SPEC|FILE|MODEL.onnx", shell_complete=complete_spec)
@model_options
@skip_option
@click.option(
    "--target",
    "targets",
    multiple=True,
    callback=lambda context, parameter, given: [
        check_target(context, parameter, part.strip()) for text in given for part in text.split(",")
    ],
    shell_complete=list_of(targets_beginning),
    metavar="TARGET[,…]",
    help="What to compile for: cpu:<LLVM processor>, such as cpu:znver4 or cpu:aarch64-cortex-a72, or a GPU's "
    "architecture, such as cuda:sm_90a; may be repeated.  [default: cpu]",
)
@thread_counts_option("Thread counts of the kernels, such as 1,2.  [default: all cores of that machine]")
@click.option(
    "--candidates",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="N",
    help="Candidates per layer, target and thread count: the default and the most promising ones.",
)
@click.option(
    "--facts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What `run.py --facts` printed on the machine that will measure, or earlier results from there.",
)
@click.option(
    "--self-check",
    is_flag=True,
    help="Begin with small layers that have one feature each, by every schedule's default: is the device right? "
    "No layer need be given then.",
)
@click.option(
    "--exclude",
    default="",
    shell_complete=list_of(schedules_beginning),
    metavar="ID,…",
    help="Schedules to leave out.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the choice of candidates."
)
@records_options
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("bundle.tar.gz"),
    show_default=True,
    metavar="FILE",
    help="The bundle to write: .tar.gz, .tar.xz, which is smallest, or .zip.",
)
@json_option
def pack(
    spec: tuple[str, ...],
    dims: dict[str, int],
    accuracy: tuple[AccuracyRule, ...],
    skip: bool,
    targets: list[str],
    threads: tuple[int, ...] | None,
    candidates: int,
    facts: Path | None,
    self_check: bool,
    exclude: str,
    seed: int,
    records: Path | None,
    no_records: bool,
    out: Path,
    as_json: bool,
) -> int:
    """Compile candidates, and write them with inputs and expected outputs into one file.

    Carry it to the machine that measures, unpack it there and run `python3 run.py`, which needs Python 3.8,
    for a GPU its driver, and nothing else. `convgen fleet import` takes the results back.

    With --facts the candidates are chosen for that machine's caches and cores, and what the record
    store already knows of that machine is not measured again.
    """
    if separable_of(spec, accuracy) is not None:
        found = "a separable problem, which is tuned as a network, where that runs: `convgen tune`"
        raise click.UsageError(f"expected layers or a model, found {found}")
    if not spec and not self_check:
        raise click.UsageError("expected a layer, a file or a model, or --self-check, found none of them")
    entries, left_out = _read(spec, dims, accuracy) if spec else ([], [])

    from ..hardware.target import resolve
    from ..lowering.discover import schedule_ids
    from ..records.opening import open_store
    from ..tuning.bundle import pack as write

    machine, asked = _machine(facts), targets or ["cpu"]
    if machine is not None and not machine.llvm and "cpu" in asked:
        found = f"{'cpu' if targets else 'none'}: {facts} has no name that LLVM knows, but {machine.cpu!r}"
        raise click.UsageError(
            f"--target: expected cpu:<LLVM processor> beside --facts, found {found}; `convgen targets` lists some"
        )
    # Plain names are those of the machine that measures.
    resolved = [resolve(target, machine if ":" not in target else None) for target in dict.fromkeys(asked)]
    counts = threads or (machine.cores if machine else resolved[0].cores,)
    with open_store(chosen_records(records, no_records), write=False) as store:
        packed = write(
            [entry.spec for entry in entries],
            resolved,
            counts,
            out,
            candidates=candidates,
            machine=machine,
            store=store,
            exclude=check_names("--exclude", exclude, schedule_ids()),
            seed=seed,
            self_check=self_check,
            progress=note,
        )
    facts_of = {"layers": packed.layers, "trials": packed.trials, "known": packed.known, "failed": packed.failed}
    if as_json:
        reasons = {"errors": packed.errors, "skipped": left_out}
        emit({"bundle": str(out), "bytes": packed.bytes, **facts_of, **reasons})
        return status_of(left_out, skip)
    for error in packed.errors[:5]:
        note(f"convgen: did not compile: {error.splitlines()[0] if error else ''}")
    failed = f", {packed.failed} of which did not compile" if packed.failed else ""
    known = f"; {packed.known} more are known already and take part in the comparisons" if packed.known else ""
    packed_up = f"{plural(packed.trials, 'trial')} of {plural(packed.layers, 'layer')}"
    say(f"{packed_up}{failed}{known}: {tidy(out)}, {size(packed.bytes)}")
    return status_of(left_out, skip)


def _read(
    words: tuple[str, ...], dims: dict[str, int], accuracy: tuple[AccuracyRule, ...]
) -> tuple[list[SpecEntry], list[str]]:
    """Layers of several files, or of one spec in several words; and why others are left out."""
    models, left_out = layers_of(split_sources(words), dims, accuracy, fits=False)
    return merge(chain(*models)), left_out


def _machine(facts: Path | None) -> Machine | None:
    from ..tuning.bundle import read_facts

    try:
        return read_facts(facts) if facts is not None else None
    except MeasureError as error:
        raise click.UsageError(f"--facts: {error}") from error


@click.command(short_help="Measure a bundle on this machine.")
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File of the results.  [default: the bundle's name with .results.jsonl, in this folder]",
)
@click.option(
    "--timeout",
    type=FiniteRange(min=0, min_open=True),
    metavar="S",
    help="Seconds that a candidate may take.  [default: 60]",
)
@click.option(
    "--memory",
    type=click.IntRange(min=0),
    metavar="MIB",
    help="Memory that a candidate may take; 0: any amount.  [default: by the layer's size]",
)
@click.option(
    "--minutes",
    type=FiniteRange(min=0, min_open=True),
    metavar="M",
    help="Begin no candidate later than that; the same command goes on from there.  [default: no limit]",
)
@click.option(
    "--sanitizer",
    is_flag=True,
    help="Run the right candidates of small layers under NVIDIA's compute-sanitizer too, of a bundle for a GPU.",
)
@click.pass_context
def run(
    context: click.Context,
    bundle: Path,
    out: Path | None,
    timeout: float | None,
    memory: int | None,
    minutes: float | None,
    sanitizer: bool,
) -> None:
    """Measure a bundle, packed or unpacked; the same command goes on where it stopped.

    It does what `python3 run.py` does in the unpacked bundle. A bundle holds compiled code: run only
    bundles of people whose programs you would run.
    """
    from ..measure.standalone.command import main as measure
    from ..tuning.bundle import bundle_name, unpacked

    results = (out or Path(f"{bundle_name(bundle)}.results.jsonl")).absolute()
    options = ["--out", str(results)]
    options += ["--timeout", str(timeout)] if timeout is not None else []
    options += ["--memory", str(memory)] if memory is not None else []
    options += ["--minutes", str(minutes)] if minutes is not None else []
    options += ["--sanitizer"] * sanitizer
    with unpacked(bundle) as folder:
        context.exit(measure([str(folder), *options]))


@click.command("import", short_help="Take in the results of a bundle, all or none.")
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--bundle",
    type=click.Path(exists=True, path_type=Path),
    metavar="FILE",
    help="Check that the results belong to this bundle: to its trials and libraries.",
)
@store_option("store_path")
@json_option
def import_(results: Path, bundle: Path | None, store_path: Path | None, as_json: bool) -> None:
    """Make records of a bundle's results: the same as measuring here would have made.

    Each line is checked; where one is wrong, no result is taken. Results that were imported before
    add nothing. Records that are such already are for `convgen records import`, lines of JSON, and `convgen records
    merge`, a store.
    """
    from ..records.opening import open_to_fill
    from ..records.store import default_path
    from ..tuning.bundle import read_results

    found = read_results(results, bundle)
    path = store_path or default_path()
    with open_to_fill(path) as store:
        added, total = store.add_all(found), len(store)
    if as_json:
        emit({"results": len(found), "added": added, "records": total})
    else:
        say(f"{len(found)} results, {added} of them new; {total} records in {tidy(path)}")
