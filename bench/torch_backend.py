"""Measure convgen as a backend of torch.compile beside PyTorch's own; stops and resumes anywhere.

    python bench/torch_backend.py                             # networks of bench/networks that are PyTorch modules
    python bench/torch_backend.py --models resnet18 --threads 2

For each model and thread count: a row in ``results/<processor>/torch.jsonl`` the moment it is known; a row that
is there is not measured again unless ``--fresh``. At the end, or when interrupted, the table is written beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._inductor import config

from bench.command import add_kept_options, exit_status, listed, problems, threads_listed
from bench.kept import Kept
from bench.networks import check_models, network_model
from bench.networks.modules import MODULES
from convgen.bridges.torch.backend import backend
from convgen.folders import TemporaryFolder
from convgen.hardware.machine import machine
from convgen.lowering.kept import VARIABLE
from convgen.lowering.versions import versions
from convgen.measure.network_model import NetworkModel, Part, Running, ready
from convgen.measure.networks import compare_parts
from convgen.report.markdown import markdown_table
from convgen.report.rows import Compared
from convgen.report.tables import rated
from convgen.report.whole import summary
from convgen.report.words import milliseconds, plural

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "squeezenet1_1", "densenet121")
#: How PyTorch runs a model: the name, and what makes its function of the module.
WAYS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "convgen": lambda module: torch.compile(module, backend=backend),
    "inductor": lambda module: torch.compile(module),
    "eager": lambda module: module,
}
INTRODUCTION = (
    "Milliseconds of a call, batch 1, f32, medians of turns in which all ways alternate; and seconds of the first call,"
    " which compiles: everything anew, without what earlier ones have kept on disk. Inductor has its"
    " weights frozen. The ratio is the faster of inductor and eager over convgen, with its 95 % interval: above 1"
    " convgen is faster."
)


class BackendRow(Compared):
    """A model's row."""

    @property
    def key(self) -> tuple[str, int]:
        return str(self.values["model"]), self.threads

    def part(self, way: str) -> dict[str, Any]:
        found: dict[str, Any] = next(part for part in self.values["parts"] if part["library"] == way)
        return found


def frozen() -> AbstractContextManager[Any]:
    """In which inductor takes weights as constants, and what it compiles from no cache."""
    patched: AbstractContextManager[Any] = config.patch(freezing=True, force_disable_caches=True)
    return patched


def running(model: NetworkModel, way: str, first: dict[str, float]) -> Running:
    """A way, compiled by a first call whose seconds are kept."""
    assert model.module is not None
    module: nn.Module = model.module()
    inputs: list[Tensor] = [torch.from_numpy(array) for array in model.inputs.values()]
    results: list[Any] = [None]
    function = WAYS[way](module)

    def run() -> None:
        results[0] = function(*inputs)

    with torch.no_grad(), frozen() if way == "inductor" else nullcontext():
        started = time.perf_counter()
        run()
        first[way] = time.perf_counter() - started

    def outputs() -> list[Any]:
        found = results[0] if isinstance(results[0], tuple) else (results[0],)
        return [tensor.numpy() for tensor in found]

    return Running(run, outputs, torch.no_grad)


def measure(name: str, model: NetworkModel, threads: int, rounds: int) -> BackendRow:
    """Compile a model in every way and time them in turns."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()  # once: it drops what was compiled, and a call would compile anew, without frozen weights
    first: dict[str, float] = {}
    made = versions()
    libraries = {"convgen": made["convgen"], "inductor": torch.__version__, "eager": torch.__version__}
    parts = []
    for way in WAYS:
        part = ready(model, Part(way, libraries[way]), lambda way=way: running(model, way, first))  # type: ignore[misc]
        parts.append(part)
    found = compare_parts(parts[0], parts[1:], threads, rounds).to_dict()
    return BackendRow(
        {
            "model": name,
            "threads": threads,
            **found,
            "parts": [{**part, "first_call": first.get(part["library"])} for part in found["parts"]],
            "machine": machine().fingerprint,
            "versions": made,
        }
    )


def warm_up() -> None:
    """What the first compilation in a process has to import and start is no model's."""
    layer, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad(), frozen():
        for make in WAYS.values():
            make(layer)(x)


def page(rows: Sequence[BackendRow]) -> str:
    """The rows as a page of Markdown."""
    document = ["# A backend of torch.compile", "", INTRODUCTION, ""]
    for threads in sorted({row.threads for row in rows}):
        chosen = sorted((row for row in rows if row.threads == threads), key=lambda row: row.key)
        cells = []
        for row in chosen:
            times = [milliseconds(row.part(way)["seconds"]) for way in WAYS]
            firsts = [row.part(way)["first_call"] for way in ("convgen", "inductor")]
            cells.append([row.key[0], *times, rated(row), *(f"{seconds:.1f}" if seconds else "" for seconds in firsts)])
        header = [
            "model",
            *(f"{way}>" for way in WAYS),
            "ratio>",
            "convgen's first call, s>",
            "inductor's first call, s>",
        ]
        document += [f"## {plural(threads, 'thread')}", "", *markdown_table((header, cells)), ""]
        document += [*summary(chosen), ""]
    return "\n".join(document) + "\n"


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure what is missing, and write the table."""
    kept = Kept(options.results, "torch", BackendRow, page, console)
    with kept, TemporaryFolder() as folder:
        for name in options.models:
            model = network_model(name, folder)
            for threads in options.threads:
                if (name, threads) in kept.file.rows and not options.fresh:
                    continue
                os.environ[VARIABLE] = str(folder / f"{name}-{threads}.sqlite")  # where nothing is kept yet
                if not kept.measured:
                    warm_up()
                row = measure(name, model, threads, options.rounds)
                kept.add(row)
                console.print(f"{name} {threads}T: {rated(row)} {row.values['best'] or ''}{problems(row.values)}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=listed, default=list(MODELS), help="modules of bench/networks")
    parser.add_argument("--threads", type=threads_listed, default=[1])
    add_kept_options(parser)
    options = parser.parse_args(arguments)
    check_models(parser, options.models)
    if others := [name for name in options.models if name not in MODULES]:
        parser.error(f"--models: expected some of {', '.join(MODULES)}, found {', '.join(others)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda console: run(options, console))


if __name__ == "__main__":
    sys.exit(main())
