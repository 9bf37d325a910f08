"""``convgen build`` and ``validate``: layers in, kernels out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BuildError, ExportError, MeasureError, UnsupportedError
from ..formats.entries import AccuracyRule, SpecEntry
from ..formats.sources import write_text
from ..report.words import picks_text, plural
from .common import (
    FAILED,
    INTERRUPTED,
    budget_options,
    candidate_options,
    check_library_name,
    check_picks,
    chosen_records,
    duration,
    emit,
    forced_candidates,
    json_option,
    label,
    layers_argument,
    layers_of,
    libc_option,
    models_argument,
    note,
    note_busy,
    rate,
    records_options,
    say,
    single_sizes,
    skip_option,
    status_of,
    target_option,
    threads_option,
    tidy,
)
from .exported import INDEX, exported_folder, print_checks, refuse_options, validate_exports
from .network import validate_model
from .separable import build_separable, validate_separable
from .separable_options import refuse_for_separable, separable_of, strips_option, weights_option
from .tables import Table, say_table, table
from .view import View

if TYPE_CHECKING:
    from ..check.validate import Report
    from ..hardware.target import Target
    from ..kernel.kernel import Kernel
    from ..lowering.schedule import Candidate
    from ..records.opening import Records
    from ..records.record import TuningRecord
    from ..records.store import RecordStore
    from ..tuning.search import Progress
    from ..tuning.tuner import Tuner


@dataclass
class Work:
    """A command's layers, one after the other, and what they share: target, store and workers.

    ``seconds`` is the tuning time of all layers: each may use an equal part of what is left, so that time
    which one layer did not need serves the layers after it. ``busy`` has, for each layer that was tuned or timed, the
    share of the CPUs' time that other programs had meanwhile.
    """

    entries: list[SpecEntry]
    target: Target
    threads: int
    store: RecordStore | None
    tuner: Tuner | None
    view: View
    trials: int = 0
    seconds: float | None = None
    spent: float = 0.0
    measured: int = 0
    interrupted: bool = False
    busy: list[float | None] = field(default_factory=list)
    state: Progress | None = field(default=None, init=False)

    def layers(self) -> Iterator[SpecEntry]:
        """The layers in order; the view shows each as it begins."""
        for number, entry in enumerate(self.entries, 1):
            self._left = len(self.entries) - number + 1
            self.state = None
            self.view.start(number, entry)
            yield entry

    def tune(self, entry: SpecEntry) -> TuningRecord | None:
        """Spend the layer's part of the budget; returns the record to build from."""
        if self.tuner is None:
            return None
        from ..measure.busy import BusyWatch

        share = None if self.seconds is None else max(0.0, self.seconds - self.spent) / self._left
        start, watch = time.monotonic(), BusyWatch()
        self.view.phase("compiling the first candidates")
        try:
            return self.tuner.tune(entry.spec, trials=self.trials, seconds=share, progress=self._progress)
        finally:
            self.spent += time.monotonic() - start
            self.busy.append(watch.share())
            if self.state:
                self.measured += self.state.done - self.state.known

    def _progress(self, state: Progress) -> None:
        self.state = state
        self.view.progress(state)

    def kernel(self, entry: SpecEntry, forced: Candidate | None = None, name: str | None = None) -> Kernel:
        """The layer's kernel: the forced candidate, else the tuned or best recorded one, else the default."""
        from ..kernel.kernel import compile_candidate
        from ..records.answer import Answer, choose, find_record
        from ..tuning.recheck import recheck

        answer, tuner = Answer(None), self.tuner
        if forced is None and tuner is not None:
            if (self.trials or self.seconds) and entry.spec.n:
                answer = Answer(self.tune(entry), rejected=frozenset(tuner.rejected), note=tuner.note)
            elif self.store is not None and self.target.native:
                answer = find_record(self.store, entry.spec, self.target, self.threads)
                if answer.to_measure:
                    described = self.store, entry.spec, self.target, self.threads
                    answer = recheck(*described, answer, lambda: tuner.pools)
        self.view.phase("compiling")
        record = None
        if forced is not None:
            candidate = forced
        else:
            candidate, record = choose(entry.spec, self.target, answer.record, answer.rejected)
        return compile_candidate(
            entry.spec,
            self.target,
            candidate,
            self.threads,
            record=record,
            name=name,
            origin=answer.origin,
            note=answer.note,
        )

    def say_interrupted(self, done: str = "") -> None:
        """Say in one line what an interrupt left behind, and how to go on."""
        kept = f"kept in {tidy(self.store.path)}" if self.store is not None else "not kept, without a record store"
        trials = f"{plural(self.measured, 'trial')} measured, {kept}"
        note(f"convgen: interrupted: {trials}{done}; the same command goes on from there")


@contextmanager
def working(
    entries: list[SpecEntry],
    target: str,
    threads: int | None,
    records: Records,
    trials: int | None = None,
    seconds: float | None = None,
) -> Iterator[Work]:
    """The work on some layers. An interrupt ends the block and is noted in ``Work.interrupted``."""
    from ..hardware.target import check_native, check_threads, resolve
    from ..kernel.kernel import kernel_type
    from ..records.opening import open_store
    from ..tuning.tuner import Tuner

    resolved = resolve(target)
    kernel_type(resolved).check(resolved)
    count = check_threads(threads, resolved)
    resolved = resolved.on(count)
    if trials or seconds:
        check_native(resolved)  # before there is a store
    with ExitStack() as stack:
        store = stack.enter_context(open_store(records, write=bool(trials or seconds)))
        tunes = resolved.native or trials or seconds
        tuner = stack.enter_context(Tuner(resolved, count, store)) if tunes else None
        view = stack.enter_context(View(len(entries)))
        work = Work(entries, resolved, count, store, tuner, view, trials or 0, seconds)
        try:
            yield work
        except KeyboardInterrupt:
            work.interrupted = True


def describe(entry: SpecEntry) -> dict[str, Any]:
    """A layer as JSON values."""
    return {"names": list(entry.names), "count": entry.count, "spec": entry.spec.descriptor}


def chosen(kernel: Kernel) -> dict[str, Any]:
    """How a kernel was made, as JSON values."""
    seconds = kernel.record.seconds if kernel.record else None
    return {
        "schedule": kernel.schedule,
        "picks": dict(kernel.picks),
        "record": kernel.record.id if kernel.record else None,
        "seconds": seconds,
        "gflops": kernel.spec.flops / seconds / 1e9 if seconds else None,
        "note": kernel.note,
    }


# ---- build ------------------------------------------------------------------------------------


@click.command()
@layers_argument
@skip_option
@target_option
@threads_option()
@budget_options
@records_options
@candidate_options
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder to export into.  [default: convgen-out, or convgen-out/LAYER for a single layer]",
)
@click.option("--name", metavar="NAME", help="Prefix of the exported C functions, for a single layer.")
@libc_option
@weights_option
@strips_option(
    "auto",
    "Of a separable problem: rows of the strips in which it is computed; 0: all at once; auto: what tuning found, else "
    "what suits the caches.",
)
@click.option("--no-validate", is_flag=True, help="Export without checking against ONNX Runtime.")
@json_option
def build(
    spec: tuple[str, ...],
    dims: dict[str, int],
    accuracy: tuple[AccuracyRule, ...],
    skip: bool,
    target: str,
    threads: int | None,
    trials: int | None,
    seconds: float | None,
    records: Path | None,
    no_records: bool,
    schedule: str | None,
    picks: str | None,
    out: Path | None,
    name: str | None,
    libc: str | None,
    weights: Path | None,
    strips: int | None,
    no_validate: bool,
    as_json: bool,
) -> int:
    """Build, validate and export kernels.

    With a tuning budget (--trials, --seconds) each layer is tuned first. Without one it is built from its
    best record, or else as the default, so that there is always a kernel at once. A single layer is
    exported into --out itself; several are exported into a folder each, listed in index.json.

    A separable problem (separable1d, separable2d …: a depthwise and a 1×1 convolution) is compiled as `convgen compile`
    does models, with its weights; with --seconds the height of its strips is found first.

    With another processor as --target, such as cpu:cortex-a72 or cpu:x86-64-v4, it is built for that one with its cross
    compiler (a GCC, or the Python package ziglang), and validated in QEMU; where that is missing, it is said so.
    """
    check_picks(schedule, picks)
    if (separable := separable_of(spec, accuracy)) is not None:
        refuse_for_separable(schedule=schedule, trials=trials)
        check_library_name(name)
        return build_separable(
            separable,
            {"target": target, "threads": threads},
            chosen_records(records, no_records, writes=bool(seconds)),
            weights=weights,
            strips=strips,
            seconds=seconds,
            out=out,
            name=name,
            libc=libc,
            check=not no_validate,
            as_json=as_json,
        )
    if weights is not None:
        raise click.UsageError("--weights: expected a separable problem, found layers, whose kernels are given theirs")
    if strips is not None:
        raise click.UsageError("--strips: expected a separable problem, found layers, which are computed one by one")
    if trials == 0:  # as with no seconds
        seconds = None
    if schedule and (trials or seconds):
        raise click.UsageError("--schedule fixes the candidate: there is nothing left to tune")
    (entries,), left_out = layers_of([" ".join(spec)], dims, accuracy)
    several = len(entries) + len(left_out) > 1
    if name is not None:
        if several:
            raise click.UsageError(f"--name: expected a single layer, found {len(entries) + len(left_out)}")
        check_library_name(name)
    root = out or Path("convgen-out", *(() if several else (entries[0].spec.name,)))
    results, made = list[dict[str, Any]](), list[Path]()
    kept = chosen_records(records, no_records, writes=bool(trials or seconds))
    folders = _checked_folders(entries, root, several, name)  # before there is a store
    with working(entries, target, threads, kept, trials, seconds) as work:
        forced = forced_candidates(entries, work.target, schedule, picks)
        made = _make_folder(root) if several else []
        for entry, candidate, folder in zip(work.layers(), forced, folders, strict=True):
            try:
                result = _build_layer(work, entry, folder, candidate, name, libc, not no_validate)
            except (BuildError, MeasureError) as error:
                if not several:
                    raise
                result = {"error": str(error)}
                work.view.finish(f"failed: {error}")
            if several and "folder" in result:
                result["folder"] = folder.name
            results.append(describe(entry) | result)
            if several:
                _write_index(root, work, " ".join(spec), results, left_out)

    _remove_empty(made)
    is_written = any(several or "folder" in result for result in results)
    failed = [result for result in results if "error" in result]
    document = _index(work, " ".join(spec), results, left_out)
    if as_json:
        busy = max((share for share in work.busy if share is not None), default=None)
        emit(document | {"folder": str(root) if is_written else None, "interrupted": work.interrupted, "busy": busy})
    elif several and results:
        say_table(_summary(entries, results))
        note(f"{len(results) - len(failed)} of {len(entries)} layers in {tidy(root)}, listed in {INDEX}")
    elif results and not failed:
        say(_single(results[0]))
    note_busy(work.busy, [work.threads] if work.busy else [])
    if work.interrupted:
        work.say_interrupted(f"; {len(results) - len(failed)} of {len(entries)} layers exported" if several else "")
        return INTERRUPTED
    for result in failed:
        note(f"convgen: {result['spec']}: {result['error']}")
    return FAILED if failed else status_of(left_out, skip)


def _build_layer(
    work: Work,
    entry: SpecEntry,
    folder: Path,
    forced: Candidate | None,
    name: str | None,
    libc: str | None,
    check: bool,
) -> dict[str, Any]:
    """Build, validate and export one layer; a result with ``error`` was not exported."""
    kernel = work.kernel(entry, forced, name)
    if kernel.note:
        note(f"convgen: {kernel.note}")
    result: dict[str, Any] = {"name": kernel.name, **chosen(kernel), "validation": None}
    report = _validated(work, kernel) if check else None
    result["validation"] = report.to_dict() if report else None
    line = f"{kernel.schedule}({kernel.picks})"
    if report is None or report.passed:
        result |= _timed(work, kernel)
    if seconds := result["seconds"]:
        line = f"{duration(seconds)}  {rate(entry.spec.flops, seconds)} GFLOP/s  {line}"
    if report is not None and not report.passed:
        work.view.finish(f"{line}  failed validation")
        return result | {"error": f"{_first_failure(report)}; repeat with: {report.repro}"}
    work.view.phase("exporting")
    kernel.export(folder, facts={"validation": None if report is None else _summarised(report)}, libc=libc)
    work.view.finish(f"{line}  {'validated' if report else 'not validated'}")
    return result | {"folder": str(folder)}


def _timed(work: Work, kernel: Kernel) -> dict[str, Any]:
    """The time of a kernel without a record, which is taken now where it runs here; nothing of others."""
    from ..kernel.kernel import CpuKernel

    if kernel.record or not kernel.spec.n or not (work.target.native and isinstance(kernel, CpuKernel)):
        return {"measured": False}
    from ..measure.busy import BusyWatch
    from ..measure.compare import quick_seconds

    work.view.phase("timing")
    watch = BusyWatch()
    seconds = quick_seconds(kernel)
    work.busy.append(watch.share())
    return {"measured": True, "seconds": seconds, "gflops": kernel.spec.flops / seconds / 1e9}


def _validated(work: Work, kernel: Kernel) -> Report | None:
    """The checks of a kernel; None, which is said with the reason, where nothing here runs it."""
    from ..check.validate import validate

    if work.target.on_device and not work.target.native:
        note("convgen: not validated: no such GPU here; `convgen validate` emulates one, slowly")
        return None
    work.view.phase("validating")
    try:
        return validate(kernel)
    except UnsupportedError as error:  # another CPU's
        note(f"convgen: not validated: {error}")
        return None


def _summarised(report: Report) -> dict[str, Any]:
    """What a manifest says of the checks that a kernel has passed."""
    checks = {check.name: check.found for check in report.checks}
    return {"passed": report.passed, "worst_error": report.to_dict()["worst_error"], "checks": checks}


def _first_failure(report: Report) -> str:
    check = next(check for check in report.checks if not check.passed)
    return f"{check.name}: {check.found}"


def _index(work: Work, source: str, results: list[dict[str, Any]], left_out: list[str]) -> dict[str, Any]:
    from importlib.metadata import version  # loads email and zipfile, a seventh of the start-up time

    return {
        "convgen": version("convgen"),
        "source": source,
        "target": work.target.spelling,
        "threads": work.threads,
        "complete": len(results) == len(work.entries),
        "layers": results,
        "skipped": left_out,
    }


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder; it and those above it that were not there, the innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{folder}: expected a folder that can be made, found {error.strerror}") from error
    return made


def _checked_folders(entries: Sequence[SpecEntry], root: Path, several: bool, name: str | None) -> list[Path]:
    """Where each layer goes, as far as nothing is in the way there: before the minutes that tuning takes."""
    from ..kernel.export import check_folder

    folders = [root / entry.spec.name if several else root for entry in entries]
    for entry, folder in zip(entries, folders, strict=True):
        check_folder(folder, name or entry.spec.name, entry.spec)
    return folders


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that were made for nothing, as long as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _write_index(root: Path, work: Work, source: str, results: list[dict[str, Any]], left_out: list[str]) -> None:
    """Write the index of the layers so far, whole or not at all."""
    try:
        write_text(json.dumps(_index(work, source, results, left_out), indent=2) + "\n", root / INDEX)
    except OSError as error:
        raise ExportError(f"{root / INDEX}: {error.strerror}") from error


def _summary(entries: list[SpecEntry], results: list[dict[str, Any]]) -> Table:
    rows = []
    for entry, result in zip(entries, results, strict=False):
        if "error" in result:
            rows.append([label(entry), result["spec"], "failed", "", "", ""])
            continue
        checked = f"{result['validation']['worst_error']:.3f}" if result["validation"] else "–"
        rows.append(
            [
                label(entry),
                result["spec"],
                duration(result["seconds"]),
                rate(entry.spec.flops, result["seconds"]),
                checked,
                _candidate(result),
            ]
        )
    return table(["layer", "spec", "time>", "GFLOP/s>", "error/bound>", "candidate"], rows)


def _candidate(result: dict[str, Any]) -> str:
    return f"{result['schedule']}({picks_text(result['picks'])})"


def _single(result: dict[str, Any]) -> str:
    origin = f"record {result['record'][:12]}" if result["record"] else "default"
    lines = [result["spec"], f"  candidate  {_candidate(result)}  [{origin}]"]
    if result["seconds"]:
        how = ", measured now" if result["measured"] else ", as recorded"
        lines.append(f"  time       {duration(result['seconds'])}, {result['gflops']:.4g} GFLOP/s{how}")
    if validation := result["validation"]:
        lines.append(
            f"  checks     {len(validation['checks'])} passed, error {validation['worst_error']:.3g} of its bound"
        )
    else:
        lines.append("  checks     none made")
    return "\n".join([*lines, f"  library    {tidy(Path(result['folder'], 'lib' + result['name'] + '.so'))}"])


# ---- validate ---------------------------------------------------------------------------------


@click.command()
@models_argument
@skip_option
@target_option
@threads_option()
@records_options
@candidate_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random data.")
@click.option("--whole", is_flag=True, help="Compile the model as one network, as compile does, and check that.")
@click.option(
    "--model",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="MODEL.onnx",
    help="With the folder of an exported network: what it was compiled from.",
)
@json_option
@click.pass_context
def validate(
    context: click.Context,
    spec: tuple[str, ...],
    dims: dict[str, tuple[int, ...]],
    accuracy: tuple[AccuracyRule, ...],
    skip: bool,
    target: str,
    threads: int | None,
    records: Path | None,
    no_records: bool,
    schedule: str | None,
    picks: str | None,
    seed: int,
    whole: bool,
    model: Path | None,
    as_json: bool,
) -> int:
    """Check kernels against ONNX Runtime.

    Checks exact integer data, float data against its error bound, NaN and infinities, memory accesses
    between guard pages, and that one thread and all threads compute the same bits. Each failure
    is followed by the command that repeats it. A GPU's kernel is emulated, slowly, where there is no such GPU, and
    another processor's by QEMU (qemu-user).

    With --whole, SPEC is a model, which is compiled to one library and checked as such: every element of its outputs
    against a bound that is accumulated through the graph, guard pages, threads, and where its tensors lie; at
    each of its sizes, where --dim gives several.

    SPEC may also be the folder of an export: its files are checked against its manifest, and its library as it is, a
    kernel by what the manifest says, a network with --model by that model, else by its example.
    """
    if (folder := exported_folder(spec)) is not None:
        refuse_options(context)
        return validate_exports(folder, model, threads, seed, as_json)
    if model is not None:
        raise click.UsageError("--model: expected the folder of an exported network, found layers or a model")
    check_picks(schedule, picks)
    if (separable := separable_of(spec, accuracy)) is not None:
        refuse_for_separable(schedule=schedule)
        store = chosen_records(records, no_records)
        return validate_separable(separable, {"target": target, "threads": threads, "records": store}, seed, as_json)
    if whole:
        if schedule or len(spec) != 1 or len(accuracy) > 1 or any(rule.pattern for rule in accuracy):
            raise click.UsageError("--whole takes one model and one accuracy class, and no --schedule")
        classes = accuracy[0].accuracy if accuracy else "standard"
        store = chosen_records(records, no_records)
        how = {"target": target, "threads": threads, "dims": dims, "accuracy": classes, "records": store}
        return validate_model(Path(spec[0]), seed, as_json, **how)
    (entries,), left_out = layers_of([" ".join(spec)], single_sizes(dims), accuracy)
    results: list[dict[str, Any]] = []
    with working(entries, target, threads, chosen_records(records, no_records)) as work:
        forced = forced_candidates(entries, work.target, schedule, picks)
        for entry, candidate in zip(work.layers(), forced, strict=True):
            try:
                results.append(describe(entry) | _checked(work, entry, candidate, seed))
            except (BuildError, MeasureError) as error:
                results.append(describe(entry) | {"passed": False, "error": str(error), "checks": []})
            work.view.finish("passed" if results[-1]["passed"] else "failed")
            if not as_json:
                print_checks(results[-1])

    failed = sum(not result["passed"] for result in results)
    if as_json:
        facts = {"target": work.target.spelling, "threads": work.threads, "interrupted": work.interrupted}
        passed = not failed and not work.interrupted
        emit(facts | {"passed": passed, "layers": results, "skipped": left_out})
    if work.interrupted:
        note(f"convgen: interrupted: {len(results)} of {len(entries)} layers checked")
        return INTERRUPTED
    return FAILED if failed else status_of(left_out, skip)


def _checked(work: Work, entry: SpecEntry, forced: Candidate | None, seed: int) -> dict[str, Any]:
    from ..check.validate import validate

    kernel = work.kernel(entry, forced)
    work.view.phase("validating")
    return chosen(kernel) | validate(kernel, seed=seed).to_dict()
