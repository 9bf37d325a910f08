"""Measure whole networks: our convolutions one after another beside other libraries; stops and resumes anywhere.

    python bench/network.py                                     # every network of bench/networks, one and two threads
    python bench/network.py --models light_resnet50,model.onnx --threads 1
    python bench/network.py --recorded --records job.sqlite     # with the kernels that a tuning job has found

For each model and thread count: a row in ``results/<processor>/network.jsonl`` the moment it is known; a row that is
there is not measured again. At the end, or when interrupted, the tables are written beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.command import add_kept_options, exit_status, listed, threads_listed
from bench.kept import Kept
from bench.networks import NAMES, check_models, check_peers, network_model
from bench.networks.layouts import CHOICES, between_layers
from convgen.errors import ConvgenError
from convgen.folders import TemporaryFolder
from convgen.formats.entries import SpecEntry
from convgen.formats.onnx.reader import instances_from_onnx
from convgen.hardware.target import Target, check_threads, resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.candidates import default_candidate
from convgen.lowering.schedule import Candidate
from convgen.measure.network_model import NetworkModel
from convgen.measure.network_peers import NETWORK_PEERS
from convgen.problem.spec import ConvSpec
from convgen.problem.tokens import ACCURACIES
from convgen.records.answer import best_record, record_candidate
from convgen.records.store import RecordStore
from convgen.report.networks import (
    NetworkMeasurer,
    NetworkRow,
    layers_digest,
    measure_network,
    networks_page,
)
from convgen.report.rows import KeyedFile
from convgen.report.words import factor, milliseconds


class Kernels:
    """The kernels of a run, each compiled once."""

    def __init__(self, target: Target, records: RecordStore | None) -> None:
        self.target, self.records = target, records
        self._compiled: dict[tuple[ConvSpec, Candidate], Kernel] = {}

    def of(self, spec: ConvSpec, threads: int) -> Kernel:
        """The kernel that the store has for the layer, else its default."""
        candidate = None
        if self.records and (record := best_record(self.records, spec, self.target, threads)):
            candidate = record_candidate(record, spec, self.target)
        candidate = candidate or default_candidate(spec, self.target.on(threads))
        key = spec, candidate
        if key not in self._compiled:
            self._compiled[key] = compile_candidate(spec, self.target, candidate, threads)
        return self._compiled[key]


def run(options: argparse.Namespace, console: Console, measurer: NetworkMeasurer) -> None:
    """Measure what is missing, and write the tables."""
    kept = Kept(options.results, "network", NetworkRow, networks_page, console)
    records = RecordStore(options.records) if options.recorded else None
    kernels = Kernels(resolve(), records)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    quiet = not console.is_terminal
    with (
        kept,
        TemporaryFolder() as folder,
        Progress(*columns, console=console, auto_refresh=False, transient=True, disable=quiet) as progress,
    ):
        task = progress.add_task("networks", total=len(options.models) * len(options.threads))
        for name in options.models:
            progress.update(task, description=name, refresh=True)
            for row in _rows(name, folder, options, kept.file, kernels, measurer):
                if row is not None:
                    kept.add(row)
                    progress.print(f"{row.model} {row.threads}T: {_line(row)}")
                progress.advance(task)


def _rows(
    name: str,
    folder: Path,
    options: argparse.Namespace,
    kept: KeyedFile[NetworkRow],
    kernels: Kernels,
    measurer: NetworkMeasurer,
) -> Iterator[NetworkRow | None]:
    """A row for each number of threads; None where it is known."""
    model = network_model(name, folder, dict(options.dim))
    layers = between_layers(changed_layers(model, options.accuracy), options.layout)
    accuracy = options.accuracy or "standard"
    kind = "recorded" if options.recorded else "default"
    facts = {"accuracy": accuracy, "kernels": kind, "layout": options.layout}
    for threads in options.threads:
        key = model.path.stem, accuracy, facts["kernels"], threads
        known = kept.rows.get(key)
        if known is not None and not options.fresh and known.values["layers"] == layers_digest(layers):
            yield None
            continue
        chosen = {layer.spec: kernels.of(layer.spec, threads) for layer in layers}
        yield measurer(
            model.path.stem, model, layers, chosen, options.peers, threads, rounds=options.rounds, facts=facts
        )


def changed_layers(model: NetworkModel, accuracy: str | None) -> list[SpecEntry]:
    """A model's convolutions in their order, in an accuracy class where one is given."""
    layers = instances_from_onnx(model.path, model.dims)
    if accuracy is None:
        return layers
    return [SpecEntry(layer.spec.with_(accuracy=accuracy), layer.count, layer.names) for layer in layers]


def _line(row: NetworkRow) -> str:
    """What is said of a row when it is known."""
    best = f" beside {row.values['best']}" if row.values["best"] else ""
    return f"{milliseconds(row.seconds)} ms, {factor(row.ratio)}{best}; alone {milliseconds(row.warm_seconds)} ms"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=listed, default=list(NAMES), help="names of bench/networks, or ONNX files")
    parser.add_argument("--threads", type=threads_listed, default=[1, 2])
    parser.add_argument(
        "--dim", type=_size, action="append", default=[], metavar="NAME=SIZE", help="a symbolic size in ONNX files"
    )
    parser.add_argument("--accuracy", choices=ACCURACIES, help="accuracy of every layer, instead of standard")
    parser.add_argument(
        "--layout", choices=CHOICES, default="blocked", help="between layers (bench/networks/layouts.py)"
    )
    parser.add_argument("--recorded", action="store_true", help="take the kernels that --records has, not the defaults")
    parser.add_argument("--records", type=Path, help="record store; the default one unless given")
    parser.add_argument("--peers", type=listed, default=list(NETWORK_PEERS), help="libraries to run the models in")
    add_kept_options(parser)
    options = parser.parse_args(arguments)
    try:
        for count in options.threads:
            check_threads(count, resolve())
    except ConvgenError as error:
        parser.error(str(error))
    check_peers(parser, options.peers)
    check_models(parser, options.models)
    return options


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name or not size.isdecimal():
        raise argparse.ArgumentTypeError(f"expected NAME=SIZE, found {text!r}")
    return name, int(size)


def main(arguments: Sequence[str] | None = None, measurer: NetworkMeasurer = measure_network) -> int:
    options = parse(arguments)
    return exit_status(lambda console: run(options, console, measurer))


if __name__ == "__main__":
    sys.exit(main())
