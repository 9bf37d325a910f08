"""``convgen compile``: a model in, a library that runs it out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BuildError, NotTakenError, UnsupportedError, by_cause
from ..problem.tokens import NETWORK_ACCURACIES
from ..report.words import plural
from .common import (
    CLASSES,
    FAILED,
    INTERRUPTED,
    NON_NEGATIVE,
    OK,
    WRONG,
    Choice,
    check_library_name,
    chosen_records,
    duration,
    emit,
    json_option,
    libc_option,
    note,
    records_options,
    say,
    size,
    sizes_option,
    target_option,
    threads_option,
    tidy,
)
from .separable_options import strips_option
from .steps import check_picture, compiling, timed_steps, write_steps
from .tables import say_table, table

if TYPE_CHECKING:
    from onnx import ModelProto

    from ..bridges.onnxruntime import OnnxRuntimeModel
    from ..hardware.target import Target
    from ..network.check.validate import NetworkReport
    from ..network.network import Network
    from ..network.sizes import Dims
    from ..records.opening import Records
    from ..tuning.networks import NetworkTimes


@click.command("compile")
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="MODEL.onnx")
@sizes_option
@click.option(
    "--accuracy",
    type=Choice(NETWORK_ACCURACIES),
    default="standard",
    show_default=True,
    metavar="CLASS",
    help=f"Accuracy of its convolutions. {CLASSES}",
)
@target_option
@threads_option("Threads that it runs on.  [default: all cores]")
@click.option(
    "--seconds",
    type=NON_NEGATIVE,
    default=0.0,
    metavar="S",
    help="First tune the model for so long, earlier runs included, as `convgen tune --whole` does.",
)
@records_options
@strips_option(
    "0",
    "Rows of the strips in which depthwise convolutions and the 1×1 convolutions after them are computed: takes less "
    "memory; 0: all at once.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, metavar="DIR", help="Folder to export to."
)
@click.option(
    "--for",
    "program",
    type=Choice(["c", "onnxruntime"]),
    default="c",
    show_default=True,
    help="What runs it: a program through a C library, or ONNX Runtime through the model again with custom operators.",
)
@click.option(
    "--profile",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_picture,
    metavar="FILE",
    help="Also time each step, beside its default where a record took its place: FILE.html as a page, FILE.svg as a "
    "picture, FILE.md as a table.",
)
@click.option("--name", metavar="NAME", help="What files and functions are called.  [default: the model's name]")
@libc_option
@click.option(
    "--no-example", is_flag=True, help="Without example.c and its data, which are as large as inputs and outputs."
)
@json_option
def compile_model(
    model: Path,
    dims: dict[str, tuple[int, ...]],
    accuracy: str,
    target: str,
    threads: int | None,
    seconds: float,
    records: Path | None,
    no_records: bool,
    strips: int | None,
    out: Path,
    program: str,
    profile: Path | None,
    name: str | None,
    libc: str | None,
    no_example: bool,
    as_json: bool,
) -> int:
    """Compile a whole model to one library, with its weights packed.

    Convolutions are computed by their recorded kernels, or else by defaults; --seconds, or `convgen tune --whole`,
    records those that make the network faster. The folder holds the library, shared and static, a C header, the
    weights, a manifest, a CMake package, a pkg-config file, and example.c with an input and its outputs.

    A model of which something is not taken is refused, with the exit status 2: all such nodes are listed, and why.

    Its outputs are compared with ONNX Runtime's before it is written; `convgen validate --whole` checks more.

    With another processor as --target, such as cpu:cortex-a72, it is compiled for that one, and checked in QEMU against
    ONNX Runtime; where QEMU is missing, it is said so.

    With a GPU as --target, such as cuda:sm_90a, networks are of floats. Whether the library is right example.c checks
    there, against ONNX Runtime's outputs, and `convgen validate --whole` on that GPU or, slowly, emulated.

    With --for onnxruntime the folder holds an ONNX model and a library of custom operators. What is not taken of the
    model stays in it as it was.
    """
    from ..api import compile as compile_network
    from ..api import for_onnxruntime
    from ..hardware.target import check_native, resolve
    from ..kernel.names import free_name
    from ..network.export import check_folder
    from ..network.reading import identifier

    started = time.monotonic()
    options: dict[str, Any] = {"target": target, "threads": threads, "dims": dims, "accuracy": accuracy}
    kept = chosen_records(records, no_records, writes=bool(seconds))
    if profile is not None:
        check_native(resolve(target))
    check_library_name(name if program == "c" or name is None else identifier(name))
    if program == "onnxruntime":
        _refuse_for_onnxruntime(seconds=seconds, libc=libc, strips=strips != 0, no_example=no_example, profile=profile)
        path, exported = out / f"{name or model.stem}.onnx", None
        try:
            with compiling(quiet=as_json) as progress:
                exported = for_onnxruntime(model, path, records=kept, progress=progress, **options)
            wrong = _wrong_outputs(exported, model, resolve(target), dims or {}, accuracy)
        except KeyboardInterrupt:
            _take_back(exported)
            return say_interrupted(as_json, _NO_MODEL)
        if wrong:
            _take_back(exported)
            note(f"convgen: {model.name}: {wrong}")
            return FAILED
        _say_model(exported, time.monotonic() - started, as_json)
        return 0

    def compiled(records: Records) -> Network:
        with compiling(quiet=as_json) as progress:
            how: dict[str, Any] = {"strips": strips, "records": records, "name": name}
            made: Network = compile_network(model, progress=progress, **how, **options)
        return made

    check_folder(out, name or free_name(identifier(model.stem)))
    try:
        tuned = _tune(model, seconds, {**options, "strips": strips}, kept) if seconds else []
        network = compiled(kept)
        if slow := network.slow():
            counted = plural(len(slow), "convolution")
            note(f"convgen: {counted} by the slow reference, as no fast schedule applies: {', '.join(slow)}")
        facts: dict[str, Any] = {"model": model.name, "accuracy": accuracy}
        report = _compared(network, model)
        if report is not None and not report.passed:
            failed = next(check for check in report.checks if not check.passed)
            note(f"convgen: {network.name}: {failed.name}: {failed.found}")
            return FAILED
        facts["validation"] = None if report is None else report.to_dict()
        manifest = network.export(out, facts=facts, libc=libc, example=not no_example)
    except NotTakenError as error:
        return _refuse(error, as_json)
    except KeyboardInterrupt:
        return say_interrupted(as_json)
    taken = time.monotonic() - started
    profiles = timed_steps(network, compiled) if profile is not None else []
    if profile is not None:
        write_steps(profiles, network.target.spelling, profile)
    if as_json:
        outcome = {"folder": str(out), "seconds": taken, "manifest": manifest, "taken": True, "outside": []}
        outcome["interrupted"] = False
        facts = {"networks": list(map(dataclasses.asdict, tuned)), "profiles": [made.to_dict() for made in profiles]}
        emit({**outcome, **facts})
        return 0
    say_network(network, manifest, out, taken)
    return 0


def _refuse_for_onnxruntime(**given: object) -> None:
    """Raise a usage error where an option was given that is for C libraries alone."""
    for name, value in given.items():
        if value:
            raise click.UsageError(f"--{name.replace('_', '-')}: expected a C library, found --for onnxruntime")


def _wrong_outputs(made: OnnxRuntimeModel, model: Path, target: Target, dims: Dims, accuracy: str) -> str:
    """What is wrong with the outputs of a model for ONNX Runtime; empty where nothing is, or they are not compared,
    which is said with the reason.
    """
    from ..measure.network_model import ROUNDED, NetworkModel, allowed_error

    if not target.native:
        note(f"convgen: not compared: {target.spelling} is another processor's")
        return ""
    sizes = {name: size if isinstance(size, int) else size[0] for name, size in dims.items()}
    is_f32 = accuracy not in ROUNDED and NetworkModel(model).precision == "f32"
    limit = allowed_error(is_f32=is_f32)
    try:
        error = made.compare(model, sizes)
    except UnsupportedError as problem:
        note(f"convgen: not compared: {problem}")
        return ""
    except BuildError as problem:
        return str(problem)
    return "" if error <= limit else f"outputs differ by {error:.1e} of the largest element, {limit} is allowed"


def _tune(model: Path, seconds: float, options: dict[str, Any], records: Records) -> list[NetworkTimes]:
    """Tune a model as a whole."""
    from ..network.tuning import ModelTuning
    from .tuned import network_line, run_whole

    if records is False:
        raise click.UsageError("--seconds: expected records, where what wins is kept, found --no-records")
    found = run_whole(ModelTuning(model, **options), seconds, records)
    for times in found:
        note(network_line(times))
    return found


def _compared(network: Network, model: Path) -> NetworkReport | None:
    """A network's outputs beside ONNX Runtime's; the checks of one for another CPU, in QEMU. None, which is said with
    the reason, where nothing here runs it, or the model.
    """
    if network.target.on_device:
        note("convgen: not validated: no such GPU here; `convgen validate --whole` emulates one, slowly")
        return None
    try:
        return network.compare(model)
    except UnsupportedError as error:
        note(f"convgen: not validated: {error}")
        return None


def say_network(network: Network, manifest: dict[str, Any], out: Path, seconds: float) -> None:
    """What was written as a C library."""
    for made in manifest["sizes"]:
        if made["label"]:
            say(f"{made['label']}:")
        say_table(table(["step", "computes", "by"], map(_row, made["layers"])))
    steps = [step for made in manifest["sizes"] for step in made["layers"]]
    kernels = sum("spec" in step for step in steps)
    sizes = f" for {plural(len(manifest['sizes']), 'size')}" if len(manifest["sizes"]) > 1 else ""
    note(
        f"{manifest['name']}: {plural(kernels, 'convolution')} and {plural(len(steps) - kernels, 'other step')}{sizes} "
        f"in {tidy(out)}; memory {size(network.memory)}, of which weights {size(manifest['weights']['bytes'])}; "
        f"{duration(seconds)}"
    )


_NOTHING: dict[str, Any] = {"folder": None, "seconds": None, "manifest": None, "networks": [], "profiles": []}
_NO_NETWORK: dict[str, Any] = {**_NOTHING, "taken": True, "outside": []}
_NO_MODEL: dict[str, Any] = {"model": None, "library": None, "seconds": None, "parts": [], "outside": {}}


def say_interrupted(as_json: bool, document: dict[str, Any] = _NO_NETWORK) -> int:
    """Say that Ctrl-C ended it before anything was written; the exit status."""
    if as_json:
        emit(document | {"interrupted": True})
    note("convgen: interrupted, and nothing written; what was measured is kept, the same command goes on from there")
    return INTERRUPTED


def _refuse(error: NotTakenError, as_json: bool) -> int:
    """Say which nodes are not taken, and why."""
    if as_json:
        outside = [{"node": node, "reason": reason} for node, reason in error.nodes.items()]
        emit({**_NOTHING, "taken": False, "outside": outside, "interrupted": False})
    else:
        say_table(table(["not taken", "because"], by_cause(error.nodes).items(), prose="because"))
    others = f", {plural(error.taken, 'other node')} would be" if error.taken else ""
    every = "; --json lists each" if not as_json and len(by_cause(error.nodes)) < len(error.nodes) else ""
    note(f"convgen: {error.where}: {error.counted} not taken{others}{every}")
    return WRONG


def _row(step: dict[str, Any]) -> tuple[str, str, str]:
    return step["name"], step.get("spec") or step["operators"], step.get("schedule", "")


def _take_back(made: OnnxRuntimeModel | None) -> None:
    """Remove what was written for ONNX Runtime and not found to be right."""
    if made is not None:
        made.model.unlink()
        made.library.unlink()


def _say_model(made: OnnxRuntimeModel, seconds: float, as_json: bool) -> None:
    """What was written for ONNX Runtime."""
    if as_json:
        parts = [dataclasses.asdict(part) for part in made.parts]
        files = {"model": str(made.model), "library": str(made.library)}
        emit({**files, "seconds": seconds, "parts": parts, "outside": dict(made.outside), "interrupted": False})
        return
    cells = [
        [part.operator, ", ".join(part.inputs), ", ".join(part.outputs), str(part.convolutions), str(part.passes)]
        for part in made.parts
    ]
    say_table(table(["operator", "inputs", "outputs", "convolutions>", "passes>"], cells))
    if made.outside:
        say_table(table(["left to ONNX Runtime", "because"], by_cause(made.outside).items(), prose="because"))
    weights = size(sum(part.weights for part in made.parts))
    note(f"{tidy(made.model)} with {made.library.name}; weights {weights}; {duration(seconds)}")


def validate_model(model: Path | ModelProto, seed: int, as_json: bool, **options: Any) -> int:
    """Compile a whole model, with the options of :func:`convgen.compile`, and check it; the exit status."""
    from ..api import compile as compile_network

    return say_report(compile_network(model, **options).validate(model, seed=seed), as_json)


def say_report(report: NetworkReport, as_json: bool) -> int:
    """Print what was checked of a network; the exit status."""
    if as_json:
        emit(report.to_dict())
    else:
        say(f"{report.name}  {plural(report.threads, 'thread')}")
        for check in report.checks:
            say(f"  {'ok  ' if check.passed else 'FAIL'}  {check.name:<8}  {check.found}")
    return OK if report.passed else FAILED
