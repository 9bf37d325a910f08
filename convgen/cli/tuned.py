"""A tuning job at work, and what it brought: what the commands that tune share."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..formats.entries import SpecEntry
from ..formats.sources import is_model, is_path
from ..measure.standalone.words import printable
from ..report.words import picks_text, plural
from .common import FAILED, INTERRUPTED, duration, emit, label, note, note_busy, note_left_out, rate, say, tidy
from .tables import Table, say_table, table
from .view import JobView, clock, remaining

if TYPE_CHECKING:
    from ..hardware.target import Target
    from ..measure.workers import Pools
    from ..network.tuning import ModelTuning
    from ..records.opening import Records
    from ..tuning.job import Job
    from ..tuning.job_run import JobRun
    from ..tuning.job_state import JobState, Layer
    from ..tuning.networks import NetworkTimes


#: A job that takes so much longer than its budget says why.
LATE_SECONDS, LATE_SHARE = 5.0, 0.1


def run_job(job: Job, records: Records, tuning: ModelTuning | None = None) -> tuple[JobRun, bool, float | None]:
    """Run a job as far as its budget goes, and show that: the job as it ended, whether Ctrl-C ended it, and the share
    of the CPUs that other programs had meanwhile; None where nothing was measured here.

    Args:
        tuning: of a model that is tuned as a whole.
    """
    from ..measure.busy import BusyWatch

    interrupted, watch = False, BusyWatch()
    with working(job, records, tuning) as (run, view):
        note_left_out(job.skipped)
        try:
            with view:
                run.run()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            run.rest()
            run.close()
    return run, interrupted, watch.share() if job.tracker is None and run.measured else None


def run_whole(tuning: ModelTuning, seconds: float | None, records: Records) -> list[NetworkTimes]:
    """Tune a model before it is compiled, and show that; what it takes before and after.

    Raises:
        KeyboardInterrupt: what was measured until then is in the store.
    """
    from ..tuning.job import Job

    run, interrupted, busy = run_job(tuning.job(Job((), seconds=seconds)), records, tuning)
    note_busy([busy], [layer.problem.threads for layer in run.layers] if run.measured else [])
    if interrupted:
        raise KeyboardInterrupt
    return run.networks


@contextmanager
def working(job: Job, records: Records, tuning: ModelTuning | None = None) -> Iterator[tuple[JobRun, JobView]]:
    """A job ready to run, with its workers; of a model that is tuned as a whole where that is given."""
    from ..hardware.target import check_native
    from ..hardware.target import resolve as resolve_here

    if job.tracker is None or "cuda" not in job.targets:  # else the device says which GPU that is
        job.problems(resolve_here)  # what is wrong shows before anything starts, or is loaded
    if job.tracker is None:
        for problem in job.problems():
            check_native(problem.target)

    from ..records.opening import expect_writable, open_store
    from ..tuning.job_run import JobRun

    expect_writable(records)  # the store is made when all is there that fills it
    pools, resolve = _pools(job)
    try:
        view, expected = JobView(), None
        if resolve is not None:
            job.problems(resolve)  # waits for a device
        if tuning is not None:
            note("compiling the network and running it with its defaults; the budget begins after that")
            expected = tuning.expected()
        with open_store(records) as store:
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


def job_document(run: JobState, results: list[dict[str, Any]]) -> dict[str, Any]:
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


def print_results(
    run: JobRun,
    as_json: bool,
    interrupted: bool,
    busy: float | None,
    *,
    asked: Job | None = None,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """What a job brought; the exit status.

    Args:
        interrupted, busy: as :func:`run_job` gives them.
        asked: what the command line said, of which the next command is made; none is named without.
        facts: what else the document has.
    """
    results = [_result(layer) for layer in run.layers]
    failed = [result for result in results if "error" in result]
    reached = [result for result in results if result["state"] != "waiting"]
    if as_json:
        emit(job_document(run, results) | {"interrupted": interrupted, "busy": busy} | dict(facts or {}))
    elif len(results) > 1:
        say_table(summary(run.layers))
    elif reached and not failed:
        say(line(run.layers[0]))
    if not as_json:
        for times in run.networks:
            say(network_line(times))
        if len(results) > 1 and not any(times.seconds for times in run.networks):
            say("\n".join(brought(results)))
        _note_compared_alone(run.layers)
        if asked is not None:
            _note_next(run, results, asked)
    here = reached if run.measured and run.job.tracker is None else []  # devices have CPUs of their own
    note_busy([busy], [result["threads"] for result in here])
    if interrupted:
        where = f"kept in {tidy(run.store.path)}" if run.store is not None else "not kept, without a record store"
        trials = f"{plural(run.measured, 'trial')} measured, {where}"
        note(f"convgen: interrupted: {trials}; the same command goes on from there")
        return INTERRUPTED
    for result in failed:
        note(f"convgen: {result['spec']}: {result['error']}")
    if run.measured and run.over > max(LATE_SECONDS, LATE_SHARE * (run.job.seconds or 0.0)):
        what = "what was begun is finished, and what seems faster is compared, however long that takes"
        note(f"convgen: {clock(run.over)} over the budget of {clock(run.job.seconds or 0.0)}: {what}")
    if len(reached) < len(results):
        rest = len(results) - len(reached)
        note(
            f"convgen: {rest} of {len(results)} layers not reached within the budget; "
            "the same command with a larger budget goes on from here"
        )
    elif not run.measured and run.is_spent() and any(layer.state in ("done", "out of budget") for layer in run.layers):
        spent = f"the budget is spent ({_budget(run)}), and nothing was measured"
        note(f"convgen: {spent}; the same command with a larger one goes on from here")
    return FAILED if failed or not reached else 0


def _budget(run: JobState) -> str:
    """What is spent of a job's budget, by the options that say it."""
    job, parts = run.job, []
    if job.seconds is not None:
        parts.append(f"{run.spent:.0f} of --seconds {job.seconds:g}")
    if job.trials is not None:
        parts.append(f"{run.trials} of --total-trials {job.trials}")
    return ", ".join(parts) or f"--trials {job.trials_per_layer}"


def print_status(job: Job, records: Records, as_json: bool, facts: Mapping[str, Any] | None = None) -> int:
    """Where a job stands, from the store alone; ``facts``: what else the document has."""
    from ..records.store import RecordStore, default_path
    from ..tuning.job_state import JobState

    if job.tracker is not None:
        raise UnsupportedError(
            "--status: expected a job that measures on this machine, found one for devices; `convgen report` shows "
            "what was measured there"
        )
    path = default_path() if records in (None, True) else records
    store = RecordStore(path, readonly=True) if isinstance(path, Path) and path.exists() else None
    try:
        run = JobState(job, store)
        if run.is_spent():
            run.settle()
        run.rest()
        run.close()
    finally:
        if store is not None:
            store.close()
    results = [_result(layer) for layer in run.layers]
    note_left_out(job.skipped)
    if isinstance(path, Path) and store is None:
        note(f"convgen: {tidy(path)}: no such file: nothing is recorded there yet")
    if as_json:
        emit(job_document(run, results) | dict(facts or {}))
        return 0
    if results:
        say_table(summary(run.layers))
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


def _note_next(run: JobRun, results: Sequence[Mapping[str, Any]], job: Job) -> None:
    """Say which command uses what was found."""
    if run.store is None or not any(result["best"] for result in results) or job.tracker is not None:
        return
    source, folder = job.models[0] if len(job.models) == 1 else "MODEL", job.folder
    name = str(folder / source)
    command = ["convgen", "build", *([name] if is_path(source, folder) else source.split())]
    if is_model(source, folder):
        command = ["convgen", "compile", name, "--out", "DIR"]
    for rule in job.accuracy:
        command += ["--accuracy", str(rule)]
    for dim, size in job.dims.items():
        command += ["--dim", f"{dim}={size}"]
    command += ["--target", job.targets[0]] if job.targets[0] != "cpu" else []
    command += ["--threads", str(results[0]["threads"])] if job.threads else []
    command += ["--records", str(run.store.path)] if job.records is not None else []
    others = [f"--target {target}" for target in job.targets[1:]]
    others += [f"--threads {count}" for count in job.threads[1:]]
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
        return f"no kernel: {candidate}" if candidate else "no kernel yet"
    spent = layer.progress.elapsed if layer.progress else 0.0
    said = plural(int(trials), "trial") + (f", {failures} failed," if failures != "0" else "") + f" in {spent:.0f} s"
    against = f"{gain}× the default" + (f"  {peer}× ONNX Runtime" if peer != "–" else "")
    return f"{time}  {gflops} GFLOP/s  {against}  {candidate}  {said}"


def summary(layers: list[Layer]) -> Table:
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
