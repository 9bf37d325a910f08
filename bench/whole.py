"""Measure whole networks, compiled to one library each, beside other libraries; stops and resumes anywhere.

    python bench/whole.py                                       # every network of bench/networks, one and two threads
    python bench/whole.py --models light_resnet50,model.onnx --threads 1
    python bench/whole.py --accuracy bf16                       # beside what is fastest in any precision

For each model, accuracy and thread count: a row in ``results/<processor>/whole.jsonl`` the moment it is known; a row
that is there is not measured again unless ``--fresh``. A model is known by its name. At the end, or when interrupted,
the table is written beside it.
``convgen bench MODEL.onnx --whole`` measures the same of any model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from rich.console import Console

from bench.command import add_kept_options, exit_status, listed, problems, threads_listed
from bench.kept import Kept
from bench.networks import NAMES, check_models, check_peers, network_model
from convgen.api import compile as compile_network
from convgen.folders import TemporaryFolder
from convgen.measure.network_model import NetworkModel
from convgen.measure.network_peers import NETWORK_PEERS
from convgen.network.network import Network
from convgen.problem.tokens import ACCURACIES
from convgen.report.tables import rated
from convgen.report.whole import Bench, Key, WholeRow, whole_page
from convgen.report.words import milliseconds


class NamedRow(WholeRow):
    """A network's row. It is known by its name: written or quantised anew, weights may differ in their last bits."""

    @property
    def key(self) -> Key:
        return self.model, self.accuracy, self.target, self.threads, ""


def untuned(accuracy: str, model: NetworkModel, threads: int) -> Network:
    """A model's network without the records of a store."""
    return compile_network(model.path, threads=threads, dims=model.dims, accuracy=accuracy, records=False)


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure what is missing, and write the table."""
    kept: Kept[WholeRow] = Kept(options.results, "whole", NamedRow, whole_page, console)
    compiled = partial(untuned, options.accuracy)
    bench = Bench(compiled, options.peers, options.threads, options.accuracy, rounds=options.rounds)
    if options.fresh:
        kept.file.rows.clear()  # what is measured anew stands behind the old rows in the file, and counts
    with kept, TemporaryFolder() as folder:
        for name in options.models:
            model = network_model(name, folder)
            for row, new in bench.rows(model.path.stem, model, kept.file):
                if new:
                    kept.measured.append(row)
                    console.print(f"{name} {row.threads}T: {_line(row)}")


def _line(row: WholeRow) -> str:
    return f"{milliseconds(row.own_seconds)} ms, {rated(row)} {row.values['best'] or ''}{problems(row.values)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=listed, default=list(NAMES), help="names of bench/networks, or ONNX files")
    parser.add_argument("--threads", type=threads_listed, default=[1, 2])
    parser.add_argument("--peers", type=listed, default=list(NETWORK_PEERS), help="libraries to run the models in")
    parser.add_argument("--accuracy", choices=ACCURACIES, default="standard", help="class of the convolutions")
    add_kept_options(parser)
    options = parser.parse_args(arguments)
    check_peers(parser, options.peers)
    check_models(parser, options.models)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda console: run(options, console))


if __name__ == "__main__":
    sys.exit(main())
