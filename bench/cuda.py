"""Measure networks on this machine's GPU beside cuDNN; stops and resumes anywhere.

    python bench/cuda.py bench/problems/resnet50.json                      # the defaults
    python bench/cuda.py bench/problems/resnet50.json --seconds 60         # and tuned, a minute per layer
    python bench/cuda.py bench/problems/*.json --batches 1 --modes f16     # a part of all networks
    python bench/cuda.py --compile bench/problems/*.json                   # without a GPU: what the compiler says

    python bench/cuda.py bench/problems/resnet50.json --minutes 10         # what ten minutes allow, the rest later

For each layer, batch and mode: validate the default (and once per schedule and class of layers the same schedule on a
small layer under compute-sanitizer, where that program is installed), tune (``--seconds``), and time the tuned kernel,
the default and cuDNN through PyTorch in turn. Each call takes the next of several copies of the tensors, which
together do not fit into the L2 cache. Layers and the rates they are compared with are timed on normally distributed
data: products of small integers take less power, and clocks stay higher.
Each row is in ``results/cuda/<network>.<mode>.n<batch>.jsonl`` the moment it is known, and is not measured again;
tables are written beside it. A layer that fails is reported and measured again by the next run.

Modes: f16, bf16 and tf32 as channels last, f32 as channels first; cuDNN chooses its own of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

HERE = Path(__file__).parent
if __name__ == "__main__":  # Python looks into this folder first, where this file would hide NVIDIA's package `cuda`
    sys.path[0] = str(HERE.parent)

import convgen
from bench.command import console_of_bench
from bench.cuda_compile import compile_layers
from bench.cudnn import Cudnn, cudnn_ways, rates
from convgen.check.bounds import even_tolerance, reference
from convgen.check.data import float_data
from convgen.check.validate import validate
from convgen.cuda.driver import device
from convgen.errors import ConvgenError, UnsupportedError, ValidationError
from convgen.folders import TemporaryFolder
from convgen.formats.entries import SpecEntry
from convgen.formats.sources import read_specs, write_text
from convgen.hardware.roofline import Roofline
from convgen.hardware.target import Target, resolve
from convgen.kernel.kernel import compile_candidate, compile_lowered
from convgen.lowering.candidates import default_candidate
from convgen.lowering.lower import lower
from convgen.lowering.schedule import Candidate
from convgen.lowering.versions import versions
from convgen.measure.compare import Comparison, Timing, ratio_interval
from convgen.measure.gpu import gpu, output, prepare, runnable_code
from convgen.measure.standalone.command import finite
from convgen.measure.standalone.sanitizer import find as find_sanitizer
from convgen.measure.standalone.timing import DUEL_SECONDS
from convgen.problem.dtypes import distance, numpy_dtype
from convgen.problem.spec import ConvSpec
from convgen.records.answer import record_candidate
from convgen.records.store import RecordStore
from convgen.report.rows import Row, RowFile
from convgen.report.tables import class_of, limit, network, rated, summary
from convgen.report.words import microseconds
from convgen.tuning.tuner import Tuner

#: How a layer is changed for each mode.
MODES: dict[str, dict[str, Any]] = {
    "f16": {"dtype": "f16", "layout": "nhwc"},
    "bf16": {"dtype": "bf16", "layout": "nhwc"},
    "tf32": {"accuracy": "tf32", "layout": "nhwc"},
    "f32": {},
}
#: With i8, which is only compiled: PyTorch has no such layer of cuDNN's. i8 takes neither `strict` nor a residual.
COMPILED = {**MODES, "i8": {"dtype": "i8", "layout": "nhwc", "accuracy": "standard", "residual": False}}
BATCHES = (1, 16, 64)
OK, FAILED, NO_DEVICE, INTERRUPTED = 0, 1, 2, 130
#: cuDNN's error may be so many times the bound of convgen's kernels: it may use another algorithm.
SLACK = 16.0
#: Output pixels per dimension of a layer that runs under compute-sanitizer; its tools run it in turn.
SMALL = 6
TOOLS = ("memcheck", "racecheck")
#: The exit status that the tools are told to end with where they found something.
FOUND = 86


def in_mode(entry: SpecEntry, mode: str, batch: int | None = None) -> SpecEntry:
    """A layer in a mode, and with a batch where one is given."""
    changes: dict[str, Any] = {**COMPILED[mode], **({"n": batch} if batch else {})}
    if mode == "i8" and entry.spec.activation != "relu":
        changes["activation"] = "none"
    return SpecEntry(entry.spec.with_(**changes), entry.count, entry.names)


# ---- one layer ----------------------------------------------------------------------------------


class Bench:
    """Measures the layers of one mode.

    Attributes:
        tuner: of the device; None: nothing is tuned.
        flops, bandwidth: what this machine reaches in the mode; None where it cannot be measured.
        sanitizer: the path of compute-sanitizer; empty where it is not installed.
        sanitized: by schedule and class of layers what compute-sanitizer found nothing in, a candidate and its layer;
            or why it did not run.
    """

    def __init__(self, mode: str, target: Target, options: argparse.Namespace, tuner: Tuner | None) -> None:
        self.mode, self.target, self.options, self.tuner = mode, target, options, tuner
        self.flops, self.bandwidth = rates(mode)
        self.sanitizer = find_sanitizer()
        self.sanitized: dict[tuple[str, str], str] = {}

    def row(self, entry: SpecEntry) -> Row:
        """Validate, tune and time a layer.

        Raises:
            ConvgenError: it cannot be built, or is wrong.
        """
        spec = entry.spec
        default = default_candidate(spec, self.target)
        candidates = {"default": default}
        self.validate(spec, default)
        if self.tuner is not None and self.options.seconds:
            record = self.tuner.tune(spec, seconds=self.options.seconds)
            if record is not None and (best := record_candidate(record, spec, self.target)) and best != default:
                self.validate(spec, best)
                candidates = {"tuned": best, "default": default}
        with TemporaryFolder() as folder:
            return self._timed(entry, candidates, folder)

    def validate(self, spec: ConvSpec, candidate: Candidate) -> None:
        """Check a kernel, and once per schedule and class of layers a small one of it under compute-sanitizer.

        Raises:
            ValidationError: one of them is wrong.
        """
        validate(compile_candidate(spec, self.target, candidate, 1)).raise_if_failed()
        kind = candidate.schedule.id, class_of(spec)
        if self.sanitizer and kind not in self.sanitized:
            checked = small(spec)
            same = fitted(candidate, checked, self.target)
            try:
                sanitize(self.sanitizer, checked, same, self.target)
                self.sanitized[kind] = f"{checked.descriptor}: {same}"
            except UnsupportedError as error:
                self.sanitized[kind] = f"not checked: {error}"

    def _timed(self, entry: SpecEntry, candidates: dict[str, Candidate], folder: Path) -> Row:
        spec, cpus = entry.spec, os.cpu_count() or 1
        data = float_data(spec)
        expected, bound = reference(spec, data, cpus), even_tolerance(spec, data, cpus)
        own = {}
        for name, candidate in candidates.items():
            path = library(spec, self.target, candidate, folder / name)
            own[name] = call = prepare(str(path), name, data)
            call()
            computed = output(call, np.empty(spec.dst_shape, numpy_dtype(spec.dst_dtype)))
            if not (distance(computed, expected) <= bound).all():
                raise ValidationError(f"{spec.descriptor}: {candidate}: right alone, wrong with copies of its tensors")
        with cudnn_ways(spec, data, expected, SLACK * bound) as (ways, problem):
            taken = gpu().alternate([*own.values(), *ways.values()], self.options.rounds, DUEL_SECONDS)
        for call in own.values():
            call.close()
        rounds = dict(zip([*own, *ways], map(tuple, taken), strict=True))
        kernels = tuple(_timing(name, convgen.__version__, rounds[name]) for name in own)
        ratio = interval = None
        peer = Timing(Cudnn.name, Cudnn.version(), problem=problem)
        if ways:
            way = min(ways, key=lambda name: statistics.median(rounds[name]))
            peer = _timing(Cudnn.name, Cudnn.version(), rounds[way], way)
            ratio = statistics.median(peer.rounds) / statistics.median(kernels[0].rounds)
            interval = ratio_interval(peer.rounds, kernels[0].rounds)
        comparison = Comparison(spec.descriptor, 1, "cold", spec.flops, kernels, (peer,), ratio, interval)
        return Row({**comparison.to_dict(), **self._facts(entry, candidates)})

    def _facts(self, entry: SpecEntry, candidates: dict[str, Candidate]) -> dict[str, Any]:
        limit = None
        if self.flops and self.bandwidth:
            traffic = sum(entry.spec.bytes.values())
            compute, memory = entry.spec.flops / self.flops, traffic / self.bandwidth
            limit = Roofline(1, entry.spec.dtype, self.flops, "memory", self.bandwidth, compute, memory).to_dict()
        facts = gpu().facts
        return {
            "names": list(entry.names),
            "count": entry.count,
            "device": "cuda",
            "candidates": {name: str(candidate) for name, candidate in candidates.items()},
            "schedule": next(iter(candidates.values())).schedule.id,
            "tuning_seconds": self.options.seconds if self.tuner else 0.0,
            "peak": self.flops or 0.0,
            "peak_of": "GEMM rate",
            "roofline": limit,
            "sanitized": {
                name: self.sanitized.get((candidate.schedule.id, class_of(entry.spec)), "not checked: not installed")
                for name, candidate in candidates.items()
            },
            "date": datetime.now(UTC).date().isoformat(),
            "cpu": f"{facts['name']}, driver for CUDA {facts['driver'] // 1000}.{facts['driver'] % 1000 // 10}",
            "fingerprint": self.target.hardware,
            "python": platform.python_version(),
            "versions": versions(),
        }


def _timing(name: str, version: str | None, rounds: tuple[float, ...], way: str = "") -> Timing:
    return Timing(name, version, way, statistics.median(rounds), rounds)


def library(spec: ConvSpec, target: Target, candidate: Candidate, folder: Path) -> Path:
    """A candidate's library; the prefix of its functions is the folder's name."""
    folder.mkdir()
    lowered = lower(spec, target, candidate)
    return compile_lowered(lowered, folder, folder.name, runnable_code(lowered, folder))[2]


# ---- compute-sanitizer ----------------------------------------------------------------------------


def small(spec: ConvSpec) -> ConvSpec:
    """A layer of the same kind with few pixels and a batch of one."""
    spatial = tuple(
        min(size, window + (SMALL - 1) * stride)
        for size, window, stride in zip(spec.in_spatial, spec.window, spec.stride, strict=True)
    )
    return spec.with_(n=1, in_spatial=spatial)


def fitted(candidate: Candidate, spec: ConvSpec, target: Target) -> Candidate:
    """The candidate for another layer: with its own picks where they are valid there, else with the default ones."""
    schedule, picks = candidate.schedule, candidate.picks
    if schedule.reason_against(spec.core, target, picks) is not None:
        picks = schedule.default(spec.core, target)
    return Candidate(schedule, picks)


def sanitize(program: str, spec: ConvSpec, candidate: Candidate, target: Target) -> None:
    """Validate a candidate under NVIDIA's checkers of memory and of races.

    Raises:
        ValidationError: one of them, or the validation, found an error.
        UnsupportedError: the checkers do not run here, which says nothing of the kernel.
    """
    for tool in TOOLS:
        command = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND)]
        command += [sys.executable, "-m", "convgen", "validate", spec.descriptor, "--target", target.spelling]
        command += ["--schedule", candidate.schedule.id, "--picks", str(candidate.picks), "--json", "--no-records"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        said = (done.stdout + done.stderr).strip()
        last = "\n".join(said.splitlines()[-20:])
        if done.returncode == FOUND or '"passed": false' in said:
            raise ValidationError(f"{spec.descriptor}: {candidate}: compute-sanitizer {tool}: {last}")
        if done.returncode or '"passed": true' not in said:
            reason = next((line for line in said.splitlines() if "rror" in line), last)
            raise UnsupportedError(f"compute-sanitizer {tool} refused, exit status {done.returncode}: {reason}")


# ---- networks -------------------------------------------------------------------------------------

#: Measures one layer; what tests replace.
Measurer = Callable[[Bench, SpecEntry], Row]


class Board:
    """The rows as they come: a table on a terminal, lines elsewhere."""

    def __init__(self, console: Console, live: Live) -> None:
        self.console, self._live = console, live
        self._rows: list[list[str]] = []

    def add(self, place: str, row: Row) -> None:
        times = map(microseconds, (row.seconds, row.default_seconds, row.best_peer_seconds))
        self._rows.append([place, str(row.spec), *times, rated(row), limit(row), row.schedule])
        if self.console.is_terminal:
            self._live.update(self._table(self._rows[-self.console.height + 6 :]), refresh=True)
        else:
            self.console.print("  ".join(self._rows[-1]))

    def print_all(self) -> None:
        """The whole table, on a terminal."""
        if self.console.is_terminal and self._rows:
            self.console.print(self._table(self._rows))

    def _table(self, rows: Sequence[Sequence[str]]) -> Table:
        table = Table(box=None)
        for header in ("", "layer", "µs>", "default>", "cuDNN>", "cuDNN / convgen>", "of limit>", "schedule"):
            table.add_column(header.removesuffix(">"), justify="right" if header.endswith(">") else "left")
        for cells in rows:
            table.add_row(*cells)
        return table


def run(problem: Path, batch: int, bench: Bench, board: Board, measurer: Measurer, until: float) -> list[str]:
    """Measure what is missing of a network, and write its tables; returns what failed.

    Args:
        until: when, by :func:`time.monotonic`, no other layer is begun.
    """
    options, mode = bench.options, bench.mode
    name = f"{problem.stem}.{mode}.n{batch}"
    kept = RowFile(options.results / f"{name}.jsonl")
    entries = [in_mode(entry, mode, batch) for entry in read_specs(problem)]
    failed = []
    try:
        for number, entry in enumerate(entries, 1):
            row = kept.rows.get((entry.spec.descriptor, 1))
            if row is not None and not options.fresh and (row.is_tuned or not options.seconds):
                continue
            if time.monotonic() >= until:
                board.console.print(f"{name}: layers left for the next run: {len(entries) - number + 1}")
                break
            place = f"{name} {number}/{len(entries)}"
            try:
                row = measurer(bench, entry)
            except (ConvgenError, RuntimeError, MemoryError) as error:  # the last two are the driver's
                failed.append(f"{entry.spec.descriptor}: {error}")
                board.console.print(f"{place} {failed[-1]}")
                continue
            kept.add(row)
            board.add(place, row)
    finally:
        if kept.rows:
            order = [(entry.spec.descriptor, 1) for entry in entries]
            kept.compact(order)
            rows = [kept.rows[key] for key in order if key in kept.rows]
            title = f"{name}: convgen {convgen.__version__}"
            write_text(network(title, rows), options.results / f"{name}.md")
    return failed


def run_all(options: argparse.Namespace, console: Console, measurer: Measurer) -> int:
    if device() is None:
        console.print("bench/cuda.py: expected a CUDA device, found none; --compile needs none")
        return NO_DEVICE
    target = resolve("cuda")
    failed: list[str] = []
    until = time.monotonic() + 60 * options.minutes
    store = RecordStore(options.records)
    with store, Live(console=console, auto_refresh=False, transient=True) as live:
        board = Board(console, live)
        for mode in options.modes:
            tuner = Tuner(target, 1, store) if options.seconds else None
            with tuner or contextlib.nullcontext():
                bench = Bench(mode, target, options, tuner)
                for problem in options.problems:
                    for batch in options.batches or BATCHES:
                        failed += run(problem, batch, bench, board, measurer, until)
    board.print_all()
    networks = {path.stem: list(RowFile(path).rows.values()) for path in sorted(options.results.glob("*.n*.jsonl"))}
    write_text(summary(networks), options.results / "README.md")
    console.print(f"wrote {options.results}: README.md has a summary")
    for text in failed:
        console.print(f"failed: {text.splitlines()[0]}")
    return FAILED if failed else OK


# ---- without a device -----------------------------------------------------------------------------


def compile_all(options: argparse.Namespace, console: Console) -> int:
    """Compile every layer's default for every architecture and mode, and write the table."""
    entries = [
        in_mode(entry, mode, batch)
        for problem in options.problems
        for entry in read_specs(problem)
        for mode in options.modes
        if mode != "i8" or not entry.spec.transposed
        for batch in options.batches or (None,)
    ]
    wanted = list(dict.fromkeys((entry.spec.descriptor, f"cuda:{arch}") for arch in options.archs for entry in entries))
    failed = compile_layers(wanted, options.results, console, jobs=options.jobs, fresh=options.fresh)
    return FAILED if failed else OK


# ---- the command line -------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def several(known: Sequence[str] = ()) -> Callable[[str], list[str]]:
        def parts(text: str) -> list[str]:
            names = text.split(",")
            if known and not set(names) <= set(known):
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {text!r}")
            return names

        return parts

    def batches(text: str) -> list[int]:
        counts = [int(part) for part in text.split(",")]
        if min(counts) < 1:
            raise argparse.ArgumentTypeError(f"expected integers >= 1, found {text!r}")
        return counts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("problems", type=Path, nargs="*", help="spec files or ONNX models [resnet50]")
    parser.add_argument(
        "--modes",
        type=several(list(COMPILED)),
        default=list(MODES),
        metavar="M,…",
        help=f"{', '.join(MODES)}; with --compile i8 too",
    )
    parser.add_argument("--batches", type=batches, metavar="N,…", help="[1,16,64; with --compile, the layers' own]")
    parser.add_argument("--seconds", type=finite, default=0.0, help="tuning time per layer; 0: defaults only")
    parser.add_argument("--minutes", type=finite, default=math.inf, help="begin no layer later than that  [no limit]")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each comparison")
    parser.add_argument("--records", type=Path, help="record store; the default one unless given")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cuda", help="where results are kept")
    parser.add_argument("--fresh", action="store_true", help="measure or compile known rows again")
    parser.add_argument("--compile", action="store_true", help="compile and measure nothing; needs no device")
    parser.add_argument(
        "--archs", type=several(), default=["sm_80", "sm_90a", "sm_100"], help="with --compile: architectures"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="with --compile: worker processes")
    options = parser.parse_args(arguments)
    if "i8" in options.modes and not options.compile:
        parser.error("i8 is compiled only: PyTorch has no such layer of cuDNN's to compare with")
    options.problems = options.problems or [HERE / "problems" / "resnet50.json"]
    if not options.minutes > 0:
        parser.error(f"expected --minutes > 0, found {options.minutes:g}")
    if not math.isfinite(options.seconds) or options.seconds < 0 or options.rounds < 3 or options.jobs < 1:
        parser.error("expected --seconds >= 0, --rounds >= 3 and --jobs >= 1")
    return options


def main(arguments: Sequence[str] | None = None, measurer: Measurer = Bench.row) -> int:
    options = parse(arguments)
    console = console_of_bench()
    options.results.mkdir(parents=True, exist_ok=True)
    try:
        return compile_all(options, console) if options.compile else run_all(options, console, measurer)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from here")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
