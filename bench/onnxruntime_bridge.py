"""Measure networks inside ONNX Runtime beside themselves alone and ONNX Runtime's own; stops and resumes anywhere.

    python bench/onnxruntime_bridge.py                                    # every network of bench/networks
    python bench/onnxruntime_bridge.py --models light_resnet50,model.onnx --threads 1

For each model and thread count: a row in ``results/<processor>/onnxruntime.jsonl`` the moment it is known; a row that
is there is not measured again unless ``--fresh``. At the end, or when interrupted, the tables are written beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from rich.console import Console

from bench.command import add_kept_options, exit_status, listed, problems, threads_listed
from bench.kept import Kept
from bench.networks import NAMES, check_models, network_model
from bench.starting import LOADED, OPENED, SESSION, start
from convgen.api import for_onnxruntime
from convgen.bridges.onnxruntime import OnnxRuntimeModel
from convgen.errors import BuildError
from convgen.folders import TemporaryFolder
from convgen.hardware.machine import machine
from convgen.lowering.kept import VARIABLE
from convgen.lowering.versions import versions
from convgen.measure.network_model import NetworkModel, Part, ready
from convgen.measure.network_peers import bound_session
from convgen.measure.networks import quotient, time_in_turns
from convgen.measure.peers import OnnxRuntime
from convgen.network.load import load
from convgen.report.markdown import Table, escaped, markdown_table
from convgen.report.rows import Compared
from convgen.report.tables import rated
from convgen.report.whole import mean_and_least, running_network, summary
from convgen.report.words import factor, milliseconds, plural

HERE = Path(__file__).parent
#: The ways of running a model: our network alone, in nodes of a session of ONNX Runtime, and without us.
ALONE, INSIDE, THEIRS = "convgen", "inside", "onnxruntime"
#: The processes that start a model: by ``convgen.load``, by the C functions alone, and sessions with and without ours.
STARTS = (ALONE, "c", INSIDE, THEIRS)
INTRODUCTION = (
    "Milliseconds of whole models, medians of turns in which all ways alternate: convgen's library alone, the same as"
    " nodes of a model in ONNX Runtime, and ONNX Runtime's own operators. *Kept* is the first over the second: how much"
    " of its speed a network keeps inside. The ratio is the third over the second, above 1 where convgen's nodes make"
    " ONNX Runtime faster. Both have their 95 % intervals. *Outside* are the nodes of the model that stay as they were."
)
STARTING = (
    "Seconds of `convgen compile` with nothing kept from earlier ones; and in a process of its own each, seconds to"
    " load the model and to run it the first time, and what that added to the process's memory, at most, in MiB. The C"
    " functions are `open` and `run` of the library, without the checks of `convgen.load`."
)


@dataclass(frozen=True)
class BridgeRow(Compared):
    """A model's row; its ratio is about the network inside ONNX Runtime."""

    @property
    def key(self) -> tuple[str, int]:
        return str(self.values["model"]), self.threads

    @property
    def kept(self) -> Compared:
        """How much of its speed the network keeps inside, as a row's ratio."""
        return Compared({"ratio": self.values["kept"], "interval": self.values["kept_interval"]})

    def seconds(self, way: str) -> float | None:
        return next((part["seconds"] for part in self.values["parts"] if part["library"] == way), None)

    def start(self, way: str) -> Mapping[str, float]:
        found: Mapping[str, float] = self.values["starts"][way]
        return found


@dataclass(frozen=True)
class Made:
    """What is made of a model.

    Attributes:
        exported: the folder that ``convgen compile`` has written.
        seconds: that it took, with nothing kept from earlier ones.
        inside: the model for ONNX Runtime.
    """

    exported: Path
    seconds: float
    inside: OnnxRuntimeModel


def make(name: str, model: NetworkModel, threads: int, folder: Path) -> Made:
    """Compile a model for a number of threads, in every way.

    Raises:
        BuildError: the command failed.
    """
    os.environ[VARIABLE] = str(folder / "kept.sqlite")  # where nothing is kept yet
    exported = folder / "exported"
    command = [sys.executable, "-m", "convgen", "compile", str(model.path.absolute()), "--no-records"]
    command += ["--threads", str(threads), "--out", str(exported)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode != 0:
        raise BuildError(f"{name}: convgen compile ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    inside = for_onnxruntime(model.path, folder / f"{model.path.stem}.onnx", threads=threads, records=False)
    return Made(exported, seconds, inside)


def measure(name: str, model: NetworkModel, threads: int, rounds: int, folder: Path) -> BridgeRow:
    """Compile a model, start it in processes of their own, and time it in every way in turns."""
    made, here = make(name, model, threads, folder), versions()
    inside, library = made.inside.model, made.inside.library
    starts = {
        ALONE: start(LOADED, made.exported, model, threads),
        "c": start(OPENED, made.exported, model, threads),
        INSIDE: start(SESSION, inside, model, threads, library),
        THEIRS: start(SESSION, model.path, model, threads),
    }
    version = OnnxRuntime.version()
    alone = ready(
        model, Part(ALONE, here["convgen"]), lambda: running_network(model, load(made.exported, threads=threads))
    )
    within = ready(
        model, Part(INSIDE, version), lambda: bound_session(model, inside.read_bytes(), threads, library=library)
    )
    theirs = ready(model, Part(THEIRS, version), lambda: bound_session(model, model.data, threads))
    parts = (alone, within, theirs)
    busy = time_in_turns([part.contestant for part in parts if part.contestant], threads, rounds)
    (kept, kept_interval), (ratio, interval) = quotient(alone, within), quotient(theirs, within)
    return BridgeRow(
        {
            "model": name,
            "threads": threads,
            "parts": [part.to_dict() for part in parts],
            "kept": kept,
            "kept_interval": kept_interval,
            "ratio": ratio,
            "interval": interval,
            "nodes": len(made.inside.parts),
            "outside": len(made.inside.outside),
            "compile_seconds": made.seconds,
            "starts": {way: found.to_dict() for way, found in starts.items()},
            "busy": busy,
            "date": datetime.now(UTC).date().isoformat(),
            "cpu": machine().cpu,
            "fingerprint": machine().fingerprint,
            "versions": {**here, "onnxruntime": version},
        }
    )


# ---- tables ---------------------------------------------------------------------------------------


def page(rows: Sequence[BridgeRow]) -> str:
    """The rows as a page of Markdown."""
    document = ["# Inside ONNX Runtime", "", INTRODUCTION, "", STARTING, ""]
    for threads in sorted({row.threads for row in rows}):
        chosen = sorted((row for row in rows if row.threads == threads), key=lambda row: row.key)
        document += [f"## {plural(threads, 'thread')}", "", *markdown_table(_times(chosen)), ""]
        document += [f"Kept: {line}" for line in mean_and_least(row.kept.ratio for row in chosen)]
        document += ["", *(f"Ratio: {line}" for line in summary(chosen)), ""]
        document += [*markdown_table(_starting(chosen)), "", _measured(chosen), ""]
    return "\n".join(document).rstrip("\n") + "\n"


def _times(rows: Sequence[BridgeRow]) -> Table:
    header = ["model", "alone>", "inside>", "ONNX Runtime>", "kept>", "ratio>", "nodes>", "outside>"]
    cells = []
    for row in rows:
        times = [milliseconds(row.seconds(way)) for way in (ALONE, INSIDE, THEIRS)]
        counts = [str(row.values[what]) for what in ("nodes", "outside")]
        cells.append([escaped(row.key[0]), *times, rated(row.kept), rated(row), *counts])
    return header, cells


def _starting(rows: Sequence[BridgeRow]) -> Table:
    headings = ("convgen", "C functions", "inside", "ONNX Runtime")
    header = ["model", "compile>", *(f"{heading}: load + first>" for heading in headings)]
    header += [f"{heading}: MiB>" for heading in headings if heading != "C functions"]
    cells = []
    for row in rows:
        starts = [row.start(way) for way in STARTS]
        firsts = [f"{found['load']:.3f} + {found['first']:.3f}" for found in starts]
        sizes = [f"{row.start(way)['memory'] / (1 << 20):.1f}" for way in STARTS if way != "c"]
        cells.append([escaped(row.key[0]), f"{row.values['compile_seconds']:.1f}", *firsts, *sizes])
    return header, cells


def _measured(rows: Sequence[BridgeRow]) -> str:
    """Where and when."""
    dates = sorted({str(row.values["date"]) for row in rows})
    names = ("convgen", "onnxruntime")
    used = sorted({f"{name} {row.values['versions'].get(name)}" for row in rows for name in names})
    busy = max((row.busy for row in rows if row.busy is not None), default=None)
    said = "" if busy is None else f" Other programs had at most {busy:.0%} of the CPUs."
    return escaped(f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {', '.join(used)}.{said}")


# ---- command --------------------------------------------------------------------------------------


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure what is missing, and write the tables."""
    kept = Kept(options.results, "onnxruntime", BridgeRow, page, console)
    with kept:
        for given in options.models:
            name = Path(given).stem
            missing = [count for count in options.threads if options.fresh or (name, count) not in kept.file.rows]
            if not missing:
                continue
            with TemporaryFolder() as folder:
                model = network_model(given, folder)
                for threads in missing:
                    with TemporaryFolder(runs=True) as made:
                        row = measure(name, model, threads, options.rounds, made)
                    kept.add(row)
                    console.print(f"{name} {threads}T: {_line(row)}")


def _line(row: BridgeRow) -> str:
    times = "/".join(milliseconds(row.seconds(way)) for way in (ALONE, INSIDE, THEIRS))
    first = row.start(ALONE)["load"] + row.start(ALONE)["first"]
    seconds = f"compiled in {row.values['compile_seconds']:.0f} s, first result in {first:.2f} s"
    return f"{times} ms, kept {rated(row.kept)}, ratio {factor(row.ratio)}; {seconds}{problems(row.values)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=listed, default=list(NAMES), help="names of bench/networks, or ONNX files")
    parser.add_argument("--threads", type=threads_listed, default=[1, 2])
    add_kept_options(parser)
    options = parser.parse_args(arguments)
    check_models(parser, options.models)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda console: run(options, console))


if __name__ == "__main__":
    sys.exit(main())
