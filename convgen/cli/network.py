"""``convgen compile``: a model in, a library that runs it out."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from ..problem.spec import ACCURACIES
from .common import (
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
@click.option("--name", metavar="NAME", help="Prefix of the exported C functions.  [default: the model's name]")
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
    name: str | None,
    as_json: bool,
) -> None:
    """Compile a whole model to one library, with its weights packed.

    Convolutions are computed by their recorded kernels, or else by defaults. The specs in the manifest's layers, each
    in the layouts it has in the network, are what `convgen tune` would record kernels for. The folder holds the
    library, shared and static, a C header, the weights, a manifest, and example.c with an input and its outputs. A
    model of which something is not taken is refused: each such node is named.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..api import compile as compile_network

    started, quiet = time.monotonic(), as_json or not sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("compiling functions", total=None)
        network = compile_network(
            model,
            target,
            threads,
            dims=dims,
            accuracy=accuracy,
            records=chosen_records(records, no_records),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            name=name,
        )
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


def _by(step: dict[str, str]) -> str:
    return step.get("schedule", "")
