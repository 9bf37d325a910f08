"""Measure whole networks, compiled to one library each, beside other libraries; stops and resumes anywhere.

    python bench/whole.py                                       # every network of bench/networks, one and two threads
    python bench/whole.py --models light_resnet50,model.onnx --threads 1

For each model and thread count: a row in ``results/<processor>/whole.jsonl`` the moment it is known; a row that is
there is not measured again unless ``--fresh``. At the end, or when interrupted, the table is written beside it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from rich.console import Console

from bench.command import exit_status, listed
from bench.networks import NAMES, check_models, check_peers, network_model
from convgen.api import compile as compile_network
from convgen.folders import TemporaryFolder
from convgen.formats.sources import write_text
from convgen.hardware.machine import machine
from convgen.lowering.versions import versions
from convgen.measure.busy import BusyWatch, busy_warning
from convgen.measure.compare import REST, ratio_interval, take_turns
from convgen.measure.network_model import MODEL, NetworkModel, Part, Running, ready
from convgen.measure.network_peers import NETWORK_PEERS
from convgen.report.markdown import markdown_table
from convgen.report.networks import processor_slug
from convgen.report.rows import Compared, KeyedFile
from convgen.report.tables import rated
from convgen.report.words import factor, milliseconds, plural

HERE = Path(__file__).parent
#: The tables' columns: the heading, the library, and whether it computes in f32.
COLUMNS = (
    ("convgen", "convgen", True),
    ("ONNX Runtime", "onnxruntime", True),
    ("OpenVINO f32", "openvino", True),
    ("torch.compile", "torch", True),
    ("ncnn", "ncnn", True),
    ("OpenVINO default", "openvino", False),
)
INTRODUCTION = (
    "Milliseconds of whole models, batch 1, f32, medians of turns in which all libraries alternate. Convgen's networks"
    " are compiled without tuning. The ratio is the fastest library in f32 over convgen, with its 95 % interval: above"
    " 1 convgen is faster."
)


class WholeRow(Compared):
    """A whole model's row."""

    @property
    def key(self) -> tuple[str, int]:
        return str(self.values["model"]), self.threads

    def seconds(self, library: str, f32: bool) -> float | None:
        found = [p for p in self.values["parts"] if p["library"] == library and (p["precision"] == "f32") == f32]
        return found[0]["seconds"] if found else None


def measure(name: str, model: NetworkModel, threads: int, peers: Sequence[str], rounds: int) -> WholeRow:
    """Compile a model and time it in turns with other libraries."""
    started = time.monotonic()
    network = compile_network(model.path, threads=threads, dims=model.dims, records=False)
    compiling = time.monotonic() - started
    out = {name: model.expected[name].copy() for name in network.outputs}
    inputs = [model.inputs[name] for name in network.inputs]
    running = Running(lambda: network(*inputs, out=out), lambda: list(out.values()))
    own = ready(model, Part("convgen", versions()["convgen"]), lambda: running)
    others = [part for peer in peers for part in NETWORK_PEERS[peer](model, threads) if part.what == MODEL]
    parts = [own, *others]
    watch = BusyWatch()
    contestants = [part.contestant for part in parts if part.contestant]
    take_turns(contestants, rounds, REST if threads > 1 else 0.0, all_stay=True)
    timed = [part for part in others if part.seconds and part.precision == "f32"]
    best = min(timed, key=lambda part: part.seconds or math.inf, default=None)
    compared = best is not None and own.seconds
    return WholeRow(
        {
            "model": name,
            "threads": threads,
            "parts": [part.to_dict() for part in parts],
            "best": best.library if best else None,
            "ratio": (best.seconds or 0.0) / own.seconds if compared and best and own.seconds else None,
            "interval": ratio_interval(best.rounds, own.rounds) if compared and best else None,
            "compile_seconds": compiling,
            "weights_bytes": network.sizes().weights,
            "workspace_bytes": network.sizes().workspace,
            "busy": watch.share(),
            "machine": machine().fingerprint,
            "versions": versions(),
        }
    )


def page(rows: Sequence[WholeRow]) -> str:
    """The rows as a page of Markdown."""
    document = ["# Whole networks", "", INTRODUCTION, ""]
    for threads in sorted({row.threads for row in rows}):
        chosen = sorted((row for row in rows if row.threads == threads), key=lambda row: row.key)
        cells = [
            [row.key[0], *(milliseconds(row.seconds(*column[1:])) for column in COLUMNS), rated(row)] for row in chosen
        ]
        header = ["model", *(f"{heading}>" for heading, *_ in COLUMNS), "ratio>"]
        ratios = [row.ratio for row in chosen if row.ratio]
        document += [f"## {plural(threads, 'thread')}", "", *markdown_table((header, cells)), ""]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            document += [f"Geometric mean {factor(mean)} over {len(ratios)} models, least {factor(min(ratios))}.", ""]
    return "\n".join(document) + "\n"


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure what is missing, and write the table."""
    here = options.results / processor_slug(machine())
    here.mkdir(parents=True, exist_ok=True)
    kept = KeyedFile(here / "whole.jsonl", WholeRow)
    measured: list[WholeRow] = []
    try:
        with TemporaryFolder() as folder:
            for name in options.models:
                model = network_model(name, folder)
                for threads in options.threads:
                    if (model.path.stem, threads) in kept.rows and not options.fresh:
                        continue
                    row = measure(model.path.stem, model, threads, options.peers, options.rounds)
                    kept.add(row)
                    measured.append(row)
                    problems = [p["problem"] for p in row.values["parts"] if p["problem"]]
                    said = "".join(f"; {problem}" for problem in problems)
                    own = milliseconds(row.seconds("convgen", True))
                    console.print(f"{name} {threads}T: {own} ms, {rated(row)} {row.values['best'] or ''}{said}")
    finally:
        if warning := busy_warning(row.busy for row in measured):
            console.print(f"bench: {warning}")
        if kept.rows:
            kept.compact()
            write_text(page(list(kept.rows.values())), here / "whole.md")
            console.print(f"wrote {here / 'whole.md'}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=listed, default=list(NAMES), help="names of bench/networks, or ONNX files")
    parser.add_argument("--threads", type=lambda text: [int(t) for t in text.split(",")], default=[1, 2])
    parser.add_argument("--peers", type=listed, default=list(NETWORK_PEERS), help="libraries to run the models in")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where results are kept")
    parser.add_argument("--fresh", action="store_true", help="measure known rows again")
    options = parser.parse_args(arguments)
    check_peers(parser, options.peers)
    check_models(parser, options.models)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    return exit_status(lambda: run(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
