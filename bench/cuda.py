"""Measure networks on this machine's GPU beside cuDNN; stops and resumes anywhere.

    python bench/cuda.py bench/problems/resnet50.json                      # the defaults
    python bench/cuda.py bench/problems/resnet50.json --seconds 60         # and tuned, a minute per layer
    python bench/cuda.py bench/problems/*.json --batches 1 --modes f16     # of all networks a part
    python bench/cuda.py --compile bench/problems/*.json                   # without a GPU: what compilers say

For each layer, batch and mode: validate the default (by class of layers a small one under compute-sanitizer as
well, where that program is installed), tune (``--seconds``), and time the tuned kernel, the default and cuDNN through
PyTorch in turn. All calls take the next of several copies of the tensors, which the L2 cache cannot hold together.
Each row is in ``results/cuda/<network>.<mode>.n<batch>.jsonl`` the moment it is known, and is not measured again;
tables are written beside it. A layer that fails is reported and measured again by the next run.

Modes: f16, bf16 and tf32 as channels last, f32 as channels first; cuDNN chooses its own of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import convgen
from convgen.check.validate import validate
from convgen.cuda.code import compile_images, disassembled, generate
from convgen.cuda.driver import device
from convgen.errors import ConvgenError, UnsupportedError, ValidationError
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
from convgen.measure.peers import Torch
from convgen.measure.timing import DUEL_SECONDS
from convgen.measure.trial import Expected, load_inputs
from convgen.measure.workers import _Workers
from convgen.problem.dtypes import distance, load, numpy_dtype, widen
from convgen.problem.spec import ConvSpec
from convgen.records.answer import record_candidate
from convgen.records.outcome import Result
from convgen.records.store import RecordStore
from convgen.report import tables as report
from convgen.report.rows import Row, RowFile
from convgen.report.words import microseconds
from convgen.tuning.tuner import Tuner

HERE = Path(__file__).parent

#: How a layer is changed for each mode.
MODES: dict[str, dict[str, Any]] = {
    "f16": {"dtype": "f16", "layout": "nhwc"},
    "bf16": {"dtype": "bf16", "layout": "nhwc"},
    "tf32": {"accuracy": "tf32", "layout": "nhwc"},
    "f32": {},
}
#: What is compiled only: PyTorch has no such layer of cuDNN's. Without what i8 does not take.
COMPILED = {**MODES, "i8": {"dtype": "i8", "layout": "nhwc", "accuracy": "standard", "residual": False}}
BATCHES = (1, 16, 64)
OK, FAILED, NO_DEVICE, INTERRUPTED = 0, 1, 2, 130
#: Tensors are there so often that they exceed the L2 cache by this factor; and at most so often.
COLD, COPIES = 2, 1024
#: A way of using cuDNN that is so much slower than its best one takes no part in the turns.
WORSE_WAY = 1.25
#: cuDNN may use another algorithm: so many times the bound of an exact one.
SLACK = 16.0
#: Extent of the matrices whose product tells the rate that there is, and bytes that are copied.
GEMM, COPIED = 8192, 1 << 30
#: Pixels per dimension of what runs under compute-sanitizer, besides its window.
SMALL = 6
TOOLS = ("memcheck", "racecheck")
#: Seconds that a layer may take to compile.
COMPILE_SECONDS = 300.0
#: Instructions that are counted: matrix units, asynchronous copies, loads of matrices, sums of f32.
INSTRUCTIONS = ("HMMA", "HGMMA", "IMMA", "IGMMA", "LDGSTS", "UTMALDG", "LDSM", "FFMA")


def in_mode(entry: SpecEntry, mode: str, batch: int | None = None) -> SpecEntry:
    """A layer in a mode, and with a batch where one is given."""
    changes: dict[str, Any] = {**COMPILED[mode], **({"n": batch} if batch else {})}
    if mode == "i8" and entry.spec.activation != "relu":
        changes["activation"] = "none"
    return SpecEntry(entry.spec.with_(**changes), entry.count, entry.names)


# ---- cuDNN --------------------------------------------------------------------------------------


class Cudnn(Torch):
    """cuDNN through PyTorch: both memory formats, and its fused kernels where the layer is one of these."""

    name = "cudnn"

    @classmethod
    def version(cls) -> str | None:
        with contextlib.suppress(ImportError):
            import torch

            found = torch.backends.cudnn.version()
            return f"{found} (PyTorch {torch.__version__})" if found else None
        return None

    def calls(self, spec: ConvSpec, data: dict[str, Any]) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
        """By way: a call, and what gives the output of the first one of the layer's shape.

        Raises:
            UnsupportedError: PyTorch cannot use this machine's GPU.
        """
        import torch

        if not torch.cuda.is_available():
            raise UnsupportedError("expected PyTorch with CUDA, found one without a device")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = spec.accuracy == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = spec.accuracy == "tf32"
        last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(spec.rank)
        found = {}
        for way, form in (("contiguous", torch.contiguous_format), ("channels last", last)):
            if form is None:
                continue
            tensors = self._copies(spec, data, form)
            found[way] = self._turns(spec, [self._layer(spec, one) for one in tensors])
            if fused := self._fused(spec):
                found[f"{way}, fused"] = self._turns(spec, [_bound(fused, one) for one in tensors])
        return found

    def _copies(self, spec: ConvSpec, data: dict[str, Any], form: Any) -> list[dict[str, Any]]:
        import torch

        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[spec.dtype]
        order = (0, spec.rank + 1, *range(1, spec.rank + 1)) if spec.layout == "nhwc" else tuple(range(spec.rank + 2))

        def tensor(name: str, array: Any) -> Any:
            made = torch.from_numpy(np.ascontiguousarray(widen(array))).to("cuda", dtype)
            made = made.permute(order) if name in ("src", "residual") else made
            return made.contiguous(memory_format=form) if made.dim() > 1 else made

        one = {name: tensor(name, array) for name, array in data.items()}
        size = sum(spec.bytes.values())
        count = max(1, min(COPIES, -(-COLD * gpu().facts["l2"] // size), gpu().facts["memory"] // 4 // size))
        return [one, *({name: made.clone() for name, made in one.items()} for _ in range(count - 1))]

    def _layer(self, spec: ConvSpec, one: dict[str, Any]) -> Callable[[], Any]:
        convolve = self._convolution(spec, one["weights"], one.get("bias"))
        activate = self._activation(spec, one.get("slope"))
        src, residual = one["src"], one.get("residual")

        def layer() -> Any:
            dst = convolve(src)
            return activate(dst if residual is None else dst.add_(residual))

        return layer

    def _fused(self, spec: ConvSpec) -> Callable[[dict[str, Any]], Any] | None:
        """cuDNN's kernel for a convolution with bias and ReLU, and perhaps a residual."""
        import torch

        symmetric = all(begin == end for begin, end in spec.padding)
        if spec.rank != 2 or spec.transposed or not spec.bias or spec.activation != "relu" or not symmetric:
            return None
        rest = (list(spec.stride), [begin for begin, _ in spec.padding], list(spec.dilation), spec.groups)
        if spec.residual:
            return lambda one: torch.cudnn_convolution_add_relu(
                one["src"], one["weights"], one["residual"], 1.0, one["bias"], *rest
            )
        return lambda one: torch.cudnn_convolution_relu(one["src"], one["weights"], one["bias"], *rest)

    def _turns(
        self, spec: ConvSpec, layers: Sequence[Callable[[], Any]]
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """A call of the next layer; its output is kept until its turn comes again, so that memory is not used again
        at once.
        """
        outputs: list[Any] = [None] * len(layers)
        state = [0]

        def call() -> None:
            at = state[0]
            outputs[at] = layers[at]()
            state[0] = (at + 1) % len(layers)

        back = (0, *range(2, spec.rank + 2), 1) if spec.layout == "nhwc" else tuple(range(spec.rank + 2))
        return call, lambda: layers[0]().permute(back).float().cpu().numpy()


def _bound(fused: Callable[[dict[str, Any]], Any], one: dict[str, Any]) -> Callable[[], Any]:
    return lambda: fused(one)


def rates(mode: str) -> tuple[float | None, float | None]:
    """FLOP/s of a large product of matrices, and bytes per second of a copy; None where PyTorch cannot measure."""
    try:
        import torch

        if not torch.cuda.is_available():
            return None, None
        torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(mode, torch.float32)
        a, b, c = (torch.randn(GEMM, GEMM, device="cuda", dtype=dtype) for _ in range(3))
        with torch.inference_mode():
            taken = gpu().time_calls(lambda: torch.matmul(a, b, out=c), 0.5, 5e-3)
            x, y = (torch.empty(COPIED, device="cuda", dtype=torch.uint8) for _ in range(2))
            copied = gpu().time_calls(lambda: y.copy_(x), 0.2, 5e-3)
        return 2 * GEMM**3 / statistics.median(taken), 2 * COPIED / statistics.median(copied)
    except ImportError:
        return None, None


# ---- one layer ----------------------------------------------------------------------------------


class Bench:
    """What the layers of a mode share.

    Args:
        tuner: of the device; None: nothing is tuned.
        seconds: of tuning per layer.
        rounds: turns.
        sanitizer: the program, where there is one.
    """

    def __init__(self, mode: str, target: Target, options: argparse.Namespace, tuner: Tuner | None) -> None:
        self.mode, self.target, self.options, self.tuner = mode, target, options, tuner
        self.flops, self.bandwidth = rates(mode)
        self.sanitizer = shutil.which("compute-sanitizer")
        self._sanitized: set[tuple[str, str]] = set()

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
        with tempfile.TemporaryDirectory(prefix="convgen-") as folder:
            return self._timed(entry, candidates, Path(folder))

    def validate(self, spec: ConvSpec, candidate: Candidate) -> None:
        """Raise:
        ValidationError: the kernel is wrong, or compute-sanitizer found an error in a small one of its class.
        """
        validate(compile_candidate(spec, self.target, candidate, 1)).raise_if_failed()
        key = candidate.schedule.id, report.class_of(spec)
        if self.sanitizer and key not in self._sanitized:
            sanitize(self.sanitizer, small(spec), self.target)
            self._sanitized.add(key)

    def _timed(self, entry: SpecEntry, candidates: dict[str, Candidate], folder: Path) -> Row:
        spec = entry.spec
        known = Expected(spec, folder, os.cpu_count() or 1)
        data = load_inputs(spec, str(known.directory))
        expected, bound = load(folder / "expected.npy", spec.dtype), np.load(folder / "bound.npy")
        calls: dict[str, Callable[[], Any]] = {}
        for name, candidate in candidates.items():
            path = library(spec, self.target, candidate, folder / name)
            calls[name] = call = prepare(str(path), name, data)
            call()
            found = output(call, np.empty(spec.dst_shape, numpy_dtype(spec.dtype)))
            if not (distance(found, expected) <= bound).all():
                raise ValidationError(f"{spec.descriptor}: {candidate}: wrong beside its copies")
        with cudnn_ways(spec, data, expected, SLACK * bound) as (ways, problem):
            taken = gpu().alternate([*calls.values(), *ways.values()], self.options.rounds, DUEL_SECONDS)
        for call in calls.values():
            call.close()  # type: ignore[attr-defined]
        version = convgen.__version__
        rounds = dict(zip([*calls, *ways], map(tuple, taken), strict=True))
        kernels = tuple(Timing(n, version, "", statistics.median(rounds[n]), rounds[n]) for n in calls)
        ratio = interval = None
        peer = Timing(Cudnn.name, Cudnn.version(), problem=problem)
        if ways:
            way = min(ways, key=lambda name: statistics.median(rounds[name]))
            peer = Timing(Cudnn.name, Cudnn.version(), way, statistics.median(rounds[way]), rounds[way])
            first = kernels[0]
            ratio = statistics.median(peer.rounds) / statistics.median(first.rounds)
            interval = ratio_interval(peer.rounds, first.rounds)
        comparison = Comparison(spec.descriptor, 1, "cold", spec.flops, kernels, (peer,), ratio, interval)
        return Row({**comparison.to_dict(), **self._facts(entry, candidates)})

    def _facts(self, entry: SpecEntry, candidates: dict[str, Candidate]) -> dict[str, Any]:
        limit = None
        if self.flops and self.bandwidth:
            traffic = sum(entry.spec.bytes.values())
            compute, memory = entry.spec.flops / self.flops, traffic / self.bandwidth
            limit = Roofline(1, self.flops, "memory", self.bandwidth, compute, memory).to_dict()
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
            "sanitized": bool(self.sanitizer),
            "date": datetime.now(UTC).date().isoformat(),
            "cpu": f"{facts['name']}, driver for CUDA {facts['driver'] // 1000}.{facts['driver'] % 1000 // 10}",
            "fingerprint": self.target.hardware,
            "python": platform.python_version(),
            "versions": versions(),
        }


def library(spec: ConvSpec, target: Target, candidate: Candidate, folder: Path) -> Path:
    """A candidate's library; the prefix of its functions is the folder's name."""
    folder.mkdir()
    lowered = lower(spec, target, candidate)
    return compile_lowered(lowered, folder, folder.name, runnable_code(lowered, folder))[2]


@contextlib.contextmanager
def cudnn_ways(
    spec: ConvSpec, data: dict[str, Any], expected: Any, bound: Any
) -> Iterator[tuple[dict[str, Callable[[], Any]], str]]:
    """The best ways of using cuDNN; or none, and why."""
    try:
        import torch
    except ImportError:
        yield {}, 'PyTorch is not installed; get it with: pip install "convgen[peers]"'
        return
    with torch.inference_mode():
        good: dict[str, Callable[[], Any]] = {}
        times: dict[str, float] = {}
        problems = []
        try:
            found = Cudnn().calls(spec, data)
        except Exception as error:  # a peer's failures are of its own kinds, and part of the answer
            found = {}
            problems.append(_first_line(error))
        for way, (call, result) in found.items():
            try:
                error = distance(result(), widen(expected))
                if (error <= bound).all():
                    good[way], times[way] = call, statistics.median(gpu().time_calls(call, 0.02, 1e-3))
                else:
                    problems.append(f"{way}: wrong output: its error is {float(np.nanmax(error)):.3g}")
            except Exception as error:  # one of cuDNN's fused kernels, for a layer that it does not take
                problems.append(f"{way}: {_first_line(error)}")
        best = min(times.values(), default=0.0)
        yield {way: call for way, call in good.items() if times[way] <= WORSE_WAY * best}, "; ".join(problems)
        if torch.cuda.is_available():
            good.clear()
            torch.cuda.empty_cache()  # for kernels that do not allocate through PyTorch


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---- compute-sanitizer ----------------------------------------------------------------------------


def small(spec: ConvSpec) -> ConvSpec:
    """A layer of the same kind with few pixels and a batch of one."""
    spatial = tuple(
        min(size, window + (SMALL - 1) * stride)
        for size, window, stride in zip(spec.in_spatial, spec.window, spec.stride, strict=True)
    )
    return spec.with_(n=1, in_spatial=spatial)


def sanitize(program: str, spec: ConvSpec, target: Target) -> None:
    """Validate a layer under NVIDIA's checkers of memory and of races.

    Raises:
        ValidationError: one of them, or the validation, found an error.
    """
    for tool in TOOLS:
        command = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", "86", sys.executable]
        command += ["-m", "convgen", "validate", spec.descriptor, "--target", target.spelling]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
            raise ValidationError(f"{spec.descriptor}: compute-sanitizer {tool}: exit status {done.returncode}: {said}")


# ---- networks -------------------------------------------------------------------------------------

#: Measures one layer; what tests replace.
Measurer = Callable[[Bench, SpecEntry], Row]


def run(
    problem: Path,
    mode: str,
    batch: int,
    bench: Bench,
    console: Console,
    measurer: Measurer,
    live: Live,
    shown: list[Any],
) -> list[str]:
    """Measure what is missing of a network, and write its tables; returns what failed."""
    options = bench.options
    name = f"{problem.stem}.{mode}.n{batch}"
    kept = RowFile(options.results / f"{name}.jsonl")
    entries = [in_mode(entry, mode, batch) for entry in read_specs(problem)]
    failed = []
    try:
        for number, entry in enumerate(entries, 1):
            row = kept.rows.get((entry.spec.descriptor, 1))
            if row is not None and not options.fresh and (row.is_tuned or not options.seconds):
                continue
            place = f"{name} {number}/{len(entries)}"
            try:
                row = measurer(bench, entry)
            except (ConvgenError, RuntimeError, MemoryError) as error:  # the last two are the driver's
                failed.append(f"{entry.spec.descriptor}: {error}")
                console.print(f"{place} {failed[-1]}")
                continue
            kept.add(row)
            peers = microseconds(row.best_peer_seconds)
            cells = [microseconds(row.seconds), microseconds(row.default_seconds), peers]
            shown.append([place, str(entry.spec), *cells, report.rated(row), report.limit(row), row.schedule])
            if console.is_terminal:
                live.update(table(shown[-console.height + 6 :]), refresh=True)
            else:
                console.print("  ".join(shown[-1]))
    finally:
        if kept.rows:
            order = [(entry.spec.descriptor, 1) for entry in entries]
            kept.compact(order)
            rows = [kept.rows[key] for key in order if key in kept.rows]
            title = f"{name}: convgen {convgen.__version__}"
            write_text(report.network(title, rows), options.results / f"{name}.md")
    return failed


def table(shown: Sequence[Sequence[str]]) -> Table:
    made = Table(box=None)
    for header in ("", "layer", "µs>", "default>", "cuDNN>", "cuDNN / convgen>", "of limit>", "schedule"):
        made.add_column(header.removesuffix(">"), justify="right" if header.endswith(">") else "left")
    for cells in shown:
        made.add_row(*cells)
    return made


def run_all(options: argparse.Namespace, console: Console, measurer: Measurer) -> int:
    if device() is None:
        console.print("bench/cuda.py: expected a CUDA device, found none; --compile needs none")
        return NO_DEVICE
    target = resolve("cuda")
    failed: list[str] = []
    shown: list[Any] = []
    store = RecordStore(options.records)
    with store, Live(console=console, auto_refresh=False, transient=True) as live:
        for mode in options.modes:
            tuner = Tuner(target, 1, store) if options.seconds else None
            with tuner or contextlib.nullcontext():
                bench = Bench(mode, target, options, tuner)
                for problem in options.problems:
                    for batch in options.batches or BATCHES:
                        failed += run(problem, mode, batch, bench, console, measurer, live, shown)
    if console.is_terminal and shown:
        console.print(table(shown))
    networks = {path.stem: list(RowFile(path).rows.values()) for path in sorted(options.results.glob("*.n*.jsonl"))}
    write_text(report.summary(networks), options.results / "README.md")
    console.print(f"wrote {options.results}: README.md has a summary")
    for text in failed:
        console.print(f"failed: {text.splitlines()[0]}")
    return FAILED if failed else OK


# ---- without a device -----------------------------------------------------------------------------


def compiled(descriptor: str, spelling: str) -> dict[str, Any]:
    """What the compiler makes of a layer's default: runs in a worker."""
    answer: dict[str, Any] = {"spec": descriptor, "target": spelling, "versions": versions()}
    try:
        spec, target = ConvSpec.parse(descriptor), resolve(spelling)
        candidate = default_candidate(spec, target)
        answer |= {"schedule": candidate.schedule.id, "candidate": str(candidate)}
        source = generate(lower(spec, target, candidate))
        images, resources = compile_images(source, target)
        counted: dict[str, int] = dict.fromkeys(INSTRUCTIONS, 0)
        for found in re.findall(rf"\b({'|'.join(INSTRUCTIONS)})\b", disassembled(dict(images)[target.arch])):
            counted[found] += 1
        answer |= {"functions": [asdict(one) for one in resources], "instructions": counted, "error": ""}
    except ConvgenError as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    except Exception as error:  # a schedule's bug is what this is to find
        answer["error"] = f"{type(error).__name__}: {error}".strip()
    return answer


def compile_all(options: argparse.Namespace, console: Console) -> int:
    """Compile every layer's default for every architecture and mode, and write the table."""
    path = options.results / "compile.jsonl"
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError, KeyError):
                values = json.loads(line)
                kept[values["spec"], values["target"]] = values
    entries = [
        in_mode(entry, mode, batch)
        for problem in options.problems
        for entry in read_specs(problem)
        for mode in options.modes
        if mode != "i8" or not entry.spec.transposed
        for batch in options.batches or (None,)
    ]
    wanted = list(dict.fromkeys((entry.spec.descriptor, f"cuda:{arch}") for arch in options.archs for entry in entries))
    missing = [key for key in wanted if options.fresh or key not in kept or kept[key]["error"]]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    workers = _Workers(options.jobs, "build_error", COMPILE_SECONDS, uses=64)
    try:
        with (
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
            path.open("a", encoding="utf-8") as file,
        ):
            task = progress.add_task("compiling", total=len(missing))
            futures = {workers.submit(compiled, *key): key for key in missing}
            for future in as_completed(futures):
                values = future.result()
                if isinstance(values, Result):  # the compiler crashed, or takes too long
                    spec, target = futures[future]
                    error = f"{values.outcome}: {values.error}"
                    values = {"spec": spec, "target": target, "versions": versions(), "error": error}
                kept[values["spec"], values["target"]] = values
                file.write(json.dumps(values) + "\n")
                file.flush()
                progress.advance(task)
                if values["error"]:
                    said = values["error"].strip().splitlines()[-1]
                    progress.print(f"{values['spec']} {values['target']}: {said[:300]}")
    finally:
        workers.close()
    rows = [kept[key] for key in wanted if key in kept]
    write_text("".join(json.dumps(values) + "\n" for values in kept.values()), path)
    write_text(compile_report(rows), options.results / "compile.md")
    failed = sum(bool(values["error"]) for values in rows)
    spilled = sum(any(one["spilled"] for one in values.get("functions", [])) for values in rows)
    console.print(f"{len(rows)} layers, {failed} failed, {spilled} spill; wrote {options.results / 'compile.md'}")
    return FAILED if failed else OK


def compile_report(rows: Sequence[dict[str, Any]]) -> str:
    """What compilers say, as Markdown: per architecture and kind of layer, failures first."""
    said = ", ".join(f"{name} {version}" for name, version in rows[-1]["versions"].items()) if rows else ""
    lines = ["# What the compiler makes of the defaults", "", f"{datetime.now(UTC).date().isoformat()}, {said}.", ""]
    if failures := [values for values in rows if values["error"]]:
        lines += ["## Failures", ""]
        lines += [f"- `{v['spec']}` {v['target']}: {v['error'].strip().splitlines()[-1][:300]}" for v in failures]
        lines.append("")
    header = ["layer", "schedule", "launches>", "registers>", "spilled bytes>", "shared KiB>", "threads>"]
    header += [f"{name}>" for name in INSTRUCTIONS]
    groups: dict[str, list[dict[str, Any]]] = {}
    for values in rows:
        spec = ConvSpec.parse(values["spec"])
        others = (mode for mode, given in MODES.items() if spec.with_(**given) == spec)
        kind = "i8" if spec.dtype == "i8" else next(others)
        groups.setdefault(f"{values['target']}, {kind}", []).append(values)
    for name, group in groups.items():
        cells = []
        for values in group:
            if values["error"]:
                continue
            functions = values["functions"]
            most = {field: max(one[field] for one in functions) for field in ("registers", "shared", "threads")}
            spilled = sum(one["spilled"] for one in functions)
            figures = [len(functions), most["registers"], spilled, f"{most['shared'] / 1024:.1f}", most["threads"]]
            figures += [values["instructions"][instruction] for instruction in INSTRUCTIONS]
            cells.append([f"`{values['spec']}`", values["schedule"], *map(str, figures)])
        lines += [f"## {name}", "", *report.markdown_table((header, cells)), ""]
    return "\n".join(lines)


# ---- the command line -------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def several(known: Sequence[str] = ()) -> Callable[[str], list[str]]:
        def parts(text: str) -> list[str]:
            found = text.split(",")
            if known and not set(found) <= set(known):
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {text!r}")
            return found

        return parts

    def batches(text: str) -> list[int]:
        found = [int(part) for part in text.split(",")]
        if min(found) < 1:
            raise argparse.ArgumentTypeError(f"expected integers >= 1, found {text!r}")
        return found

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
    parser.add_argument("--seconds", type=float, default=0.0, help="tuning time per layer; 0: defaults only")
    parser.add_argument("--rounds", type=int, default=15, help="turns of a comparison")
    parser.add_argument("--records", type=Path, help="record store; the default one unless given")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cuda", help="where results are kept")
    parser.add_argument("--fresh", action="store_true", help="measure or compile again what is there")
    parser.add_argument("--compile", action="store_true", help="compile and measure nothing; needs no device")
    parser.add_argument("--archs", type=several(), default=["sm_80", "sm_90a", "sm_75"], help="with --compile")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="with --compile: processes")
    options = parser.parse_args(arguments)
    if "i8" in options.modes and not options.compile:
        parser.error("i8 is compiled only: PyTorch has no such layer of cuDNN's to compare with")
    options.problems = options.problems or [HERE / "problems" / "resnet50.json"]
    if not math.isfinite(options.seconds) or options.seconds < 0 or options.rounds < 3 or options.jobs < 1:
        parser.error("expected --seconds >= 0, --rounds >= 3 and --jobs >= 1")
    return options


def main(arguments: Sequence[str] | None = None, measurer: Measurer = Bench.row) -> int:
    options = parse(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    options.results.mkdir(parents=True, exist_ok=True)
    try:
        return compile_all(options, console) if options.compile else run_all(options, console, measurer)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from here")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
