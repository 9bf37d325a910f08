"""``convgen compile``: a model in, a library that runs it out."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..problem.spec import ACCURACIES
from ..report.words import plural
from .common import (
    FAILED,
    OK,
    chosen_records,
    duration,
    emit,
    json_option,
    note,
    records_options,
    say,
    size,
    sizes_option,
    table,
    target_option,
    threads_option,
    tidy,
)

if TYPE_CHECKING:
    from ..bridges.onnxruntime import OnnxRuntimeModel
    from ..records.opening import Records


@click.command("compile")
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="MODEL.onnx")
@sizes_option
@click.option("--accuracy", type=click.Choice(ACCURACIES), default="standard", show_default=True, metavar="CLASS")
@target_option
@threads_option("Threads that it runs on.  [default: all cores]")
@records_options
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, metavar="DIR", help="Folder to export to."
)
@click.option(
    "--for",
    "program",
    type=click.Choice(["c", "onnxruntime"]),
    default="c",
    show_default=True,
    help="What runs it: a program through a C library, or ONNX Runtime through the model again with custom operators.",
)
@click.option("--name", metavar="NAME", help="What files and functions are called.  [default: the model's name]")
@json_option
def compile_model(
    model: Path,
    dims: dict[str, tuple[int, ...]],
    accuracy: str,
    target: str,
    threads: int | None,
    records: Path | None,
    no_records: bool,
    out: Path,
    program: str,
    name: str | None,
    as_json: bool,
) -> None:
    """Compile a whole model to one library, with its weights packed.

    Convolutions are computed by their recorded kernels, or else by defaults. The specs in the manifest's layers, each
    in the layouts it has in the network, are what `convgen tune` would record kernels for. The folder holds the
    library, shared and static, a C header, the weights, a manifest, and example.c with an input and its outputs. A
    model of which something is not taken is refused: each such node is named.

    With --for onnxruntime the folder holds an ONNX model and a library of custom operators. What is not taken of the
    model stays in it as it was.
    """
    from ..api import compile as compile_network
    from ..api import for_onnxruntime

    started = time.monotonic()
    with _progress(as_json) as progress:
        options: dict[str, Any] = {"target": target, "threads": threads, "dims": dims, "accuracy": accuracy}
        options |= {"records": chosen_records(records, no_records), "progress": progress}
        if program == "onnxruntime":
            made = for_onnxruntime(model, out / f"{name or model.stem}.onnx", **options)
        else:
            network = compile_network(model, name=name, **options)
    if program == "onnxruntime":
        _say_model(made, time.monotonic() - started, as_json)
        return
    manifest = network.export(out, facts={"model": model.name, "accuracy": accuracy})
    seconds = time.monotonic() - started
    if as_json:
        emit({"folder": str(out), "seconds": seconds, "manifest": manifest})
        return
    steps = manifest["sizes"][0]["layers"]
    say(table(["step", "computes", "by"], [[s["name"], s.get("spec") or s["operators"], _by(s)] for s in steps]))
    kernels = sum("spec" in step for step in steps)
    weights, workspace = manifest["weights"]["bytes"], network.sizes().workspace
    note(
        f"{manifest['name']}: {kernels} convolutions and {len(steps) - kernels} passes in {tidy(out)}; weights "
        f"{size(weights)}, workspace {size(workspace)}; {duration(seconds)}"
    )


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar that shows how many functions are compiled, where somebody looks at it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    quiet = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("compiling functions", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say_model(made: OnnxRuntimeModel, seconds: float, as_json: bool) -> None:
    """What was written for ONNX Runtime."""
    if as_json:
        parts = [dataclasses.asdict(part) for part in made.parts]
        files = {"model": str(made.model), "library": str(made.library)}
        emit({**files, "seconds": seconds, "parts": parts, "outside": dict(made.outside)})
        return
    cells = [
        [part.operator, ", ".join(part.inputs), ", ".join(part.outputs), str(part.convolutions), str(part.passes)]
        for part in made.parts
    ]
    say(table(["operator", "inputs", "outputs", "convolutions>", "passes>"], cells))
    if made.outside:
        say(table(["left to ONNX Runtime", "because"], [[node, reason] for node, reason in made.outside.items()]))
    weights = size(sum(part.weights for part in made.parts))
    note(f"{tidy(made.model)} with {made.library.name}; weights {weights}; {duration(seconds)}")


def validate_model(
    model: Path,
    dims: dict[str, int],
    accuracy: str,
    target: str,
    threads: int | None,
    records: Records,
    seed: int,
    as_json: bool,
) -> int:
    """Compile a whole model and check it; the exit status."""
    from ..api import compile as compile_network

    options: dict[str, Any] = {"dims": dims, "accuracy": accuracy, "records": records}
    report = compile_network(model, target, threads, **options).validate(model, seed=seed)
    if as_json:
        emit(report.to_dict())
    else:
        say(f"{report.name}  {plural(report.threads, 'thread')}")
        for check in report.checks:
            say(f"  {'ok  ' if check.passed else 'FAIL'}  {check.name:<8}  {check.found}")
    return OK if report.passed else FAILED


def _by(step: dict[str, str]) -> str:
    return step.get("schedule", "")
