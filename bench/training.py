"""Measure the convolutions of a training step beside PyTorch, layer by layer; stops and resumes anywhere.

    python bench/training.py                        # ResNet-18 and MobileNetV2, 16 images, all cores
    python bench/training.py --batch 16,64 --threads 1,2
    python bench/training.py --models resnet18 --layout nhwc

A step of a layer is its output, the gradient of its input and that of its weights, each by the default kernel, with the
weights packed anew before the first two: they change at every step. A network's first layer has no gradient of its
input. PyTorch's is ``torch.nn.functional.conv2d`` and the operator that its autograd calls,
``torch.ops.aten.convolution_backward``, in both memory formats, of which a layer's better one counts. All take turns.

For each different layer, batch and thread count: a row in ``results/<processor>/training.jsonl`` the moment it is
known; a row that is there is not measured again unless ``--fresh``. At the end, or when interrupted, the tables are
written beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
from rich.console import Console

from bench.command import add_kept_options, exit_status, listed, threads_listed
from bench.kept import Kept
from bench.networks import check_models, network_model
from convgen.check.data import float_data
from convgen.errors import ConvgenError, UnsupportedError
from convgen.folders import TemporaryFolder
from convgen.formats.onnx.reader import instances_from_onnx
from convgen.hardware.machine import machine
from convgen.hardware.target import check_threads, resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.candidates import default_candidate
from convgen.lowering.versions import versions
from convgen.measure.busy import BusyWatch
from convgen.measure.compare import REST, Contestant, ratio_interval, take_turns
from convgen.measure.peers import Entrant, Torch
from convgen.measure.standalone.timing import repeats, sample
from convgen.problem.spec import ConvSpec
from convgen.report.markdown import code, escaped, markdown_table
from convgen.report.rows import Compared
from convgen.report.tables import geometric_mean, rated
from convgen.report.words import factor, milliseconds, plural

DIRECTIONS = ("forward", "data", "weights")
#: Samples of packing alone, and their length in seconds.
SAMPLES, SAMPLE_SECONDS = 5, 2e-3
#: How far PyTorch's results may be from ours, as a part of the largest: both sum in f32, in orders of their own.
FAR = 2e-3


@dataclass(frozen=True)
class TrainingRow(Compared):
    """A layer's row: its step, and each direction's part of it."""

    @property
    def key(self) -> tuple[str, int]:
        return str(self.values["spec"]), self.threads

    @property
    def batch(self) -> int:
        return ConvSpec.parse(str(self.values["spec"])).n

    @property
    def parts(self) -> dict[str, Compared]:
        """By direction; the first layer of a network has none of its input."""
        return {name: Compared({"threads": self.threads, **part}) for name, part in self.values["parts"].items()}


@dataclass(frozen=True)
class Layer:
    """One of the different layers of some networks: how often it is in each, and whether the gradient of its input is
    asked for.
    """

    spec: ConvSpec
    counts: Mapping[str, int]
    inner: bool


def layers_of(models: Sequence[str], batch: int, layout: str) -> list[Layer]:
    """The different layers, as they train: without what is folded into them to infer."""
    counts: dict[tuple[ConvSpec, bool], dict[str, int]] = {}
    plain: dict[str, Any] = {"bias": False, "activation": "none", "residual": False}
    with TemporaryFolder() as folder:
        for name in models:
            model = network_model(name, folder)
            for number, entry in enumerate(instances_from_onnx(model.path, model.dims)):
                spec = entry.spec.with_(n=batch, layout=layout, dst_layout=layout, **plain)
                own = counts.setdefault((spec, number > 0), {})
                own[model.path.stem] = own.get(model.path.stem, 0) + entry.count
    return [Layer(spec, own, inner) for (spec, inner), own in counts.items()]


# ---- one layer ------------------------------------------------------------------------------------


def measure(layer: Layer, threads: int, rounds: int) -> TrainingRow:
    """Time a layer's step, all directions and libraries in turn.

    Raises:
        UnsupportedError: PyTorch computes something else.
    """
    directions = [d for d in DIRECTIONS if layer.inner or d != "data"]
    ours: dict[str, Contestant] = {}
    theirs: dict[str, list[Contestant]] = {}
    packing, schedules = {}, {}
    target = resolve("cpu").on(threads)
    for direction in directions:
        spec = layer.spec.with_(direction=direction)
        kernel = compile_candidate(spec, target, default_candidate(spec, target, repacked=True), threads)
        data = float_data(spec)
        entrant, packing[direction] = _of_kernel(kernel, data)
        ours[direction] = Contestant("convgen", entrant, is_kernel=True)
        theirs[direction] = [Contestant("torch", other) for other in Torch().entrants(spec, data, threads)]
        schedules[direction] = f"{kernel.schedule}({kernel.picks})"
        for other in theirs[direction]:
            _check(spec, entrant, other.entrant)
    watch = BusyWatch()
    field = [*ours.values(), *(other for others in theirs.values() for other in others)]
    take_turns(field, rounds, REST if threads > 1 else 0.0, all_stay=True)
    parts = {}
    for direction in directions:
        ways = {other.entrant.way: other.rounds for other in theirs[direction]}
        parts[direction] = {
            **_beside(ours[direction].rounds, ways),
            "packing": packing[direction],
            "schedule": schedules[direction],
        }
    steps = {
        other.entrant.way: _sums(theirs[d][number].rounds for d in directions)
        for number, other in enumerate(theirs[directions[0]])
    }
    return TrainingRow(
        {
            "spec": layer.spec.descriptor,
            "threads": threads,
            "counts": dict(layer.counts),
            "inner": layer.inner,
            **_beside(_sums(one.rounds for one in ours.values()), steps),
            "parts": parts,
            "busy": watch.share(),
            "date": datetime.now(UTC).date().isoformat(),
            "cpu": machine().cpu,
            "fingerprint": machine().fingerprint,
            "versions": {**versions(), "torch": Torch.version()},
        }
    )


def _of_kernel(kernel: Kernel, data: Mapping[str, Any]) -> tuple[Entrant, float]:
    """A kernel as a step calls it; and the seconds that packing takes of that, 0 where nothing is packed."""
    spec: ConvSpec = kernel.spec
    parameters = {name: data[name] for name in spec.parameters}
    packed, dst = kernel.pack(**parameters), np.empty(spec.dst_shape, np.float32)
    call = kernel.prepare(data["src"], packed, dst, data.get("residual"))  # type: ignore[attr-defined]
    if not parameters:
        return Entrant("", call, lambda: dst), 0.0

    def pack() -> None:
        kernel.pack(**parameters, packed=packed, checksum=False)

    def run() -> None:
        pack()
        call()

    count = repeats(pack, SAMPLE_SECONDS)
    return Entrant("", run, lambda: dst), statistics.median(sample(pack, count) for _ in range(SAMPLES))


def _check(spec: ConvSpec, ours: Entrant, theirs: Entrant) -> None:
    for entrant in (ours, theirs):
        with entrant.context():
            entrant.run()
    made, expected = ours.output(), theirs.output()
    error = float(np.max(np.abs(made - expected)) / max(float(np.max(np.abs(expected))), 1e-30))
    if not error <= FAR:
        raise UnsupportedError(f"{spec.descriptor}: expected what torch ({theirs.way}) computes, found {error:.2g} off")


def _sums(rounds: Iterable[Sequence[float]]) -> list[float]:
    """Of several contestants' times, round by round."""
    return [sum(times) for times in zip(*rounds, strict=True)]


def _beside(own: Sequence[float], ways: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Our median and each way's; the better way's over ours, with its interval."""
    best = min(ways, key=lambda way: statistics.median(ways[way]))
    return {
        "seconds": statistics.median(own),
        "ways": {way: statistics.median(times) for way, times in ways.items()},
        "ratio": statistics.median(ways[best]) / statistics.median(own),
        "interval": ratio_interval(ways[best], own),
    }


# ---- all ------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure what is missing, and write the tables."""
    kept = Kept(options.results, "training", TrainingRow, page, console)
    with kept:
        for batch in options.batch:
            for layer in layers_of(options.models, batch, options.layout):
                for threads in options.threads:
                    known = kept.file.rows.get((layer.spec.descriptor, threads))
                    if known is None or options.fresh:
                        row = measure(layer, threads, options.rounds)
                        console.print(
                            f"{row.key[0]} {threads}T: {milliseconds(row.values['seconds'])} ms, {rated(row)}"
                        )
                        kept.add(row)
                    elif not dict(layer.counts).items() <= known.values["counts"].items():  # of another network, too
                        more = {**known.values, "counts": {**known.values["counts"], **layer.counts}}
                        kept.file.add(TrainingRow(more))


# ---- tables ---------------------------------------------------------------------------------------

INTRODUCTION = (
    "Milliseconds of a training step's convolutions; ratios are the better of PyTorch's two memory formats over ours, "
    "with 95 % intervals. Ours include packing the weights, for each of the first two directions. See "
    "[how](../../README.md#training)."
)


def page(rows: Sequence[TrainingRow]) -> str:
    """All rows of a processor as Markdown: whole steps, networks, and each direction."""
    document = ["# Training", "", INTRODUCTION, ""]
    for layout, batch, threads in sorted({(_layout(row), row.batch, row.threads) for row in rows}):
        group = [row for row in rows if (_layout(row), row.batch, row.threads) == (layout, batch, threads)]
        document += [f"## {plural(batch, 'image')}, {plural(threads, 'thread')}, {layout.upper()}", ""]
        document += [*markdown_table(_networks(group)), "", _means("step", group), ""]
        document += ["### Step", "", *markdown_table(_table(group)), ""]
        for direction in DIRECTIONS:
            found = {row.key: part for row in group if (part := row.parts.get(direction))}
            document += [f"### {direction.capitalize()}", "", *markdown_table(_parts(found)), ""]
            document += [_means(direction, list(found.values())), ""]
        dates = sorted({str(row.values["date"]) for row in group})
        used = sorted({f"{name} {row.values['versions'].get(name)}" for row in group for name in ("convgen", "torch")})
        busy = max((row.busy for row in group if row.busy is not None), default=None)
        said = "" if busy is None else f" Other programs had at most {busy:.0%} of the CPUs."
        document += [f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {escaped(', '.join(used))}.{said}", ""]
    return "\n".join(document).rstrip("\n") + "\n"


def _layout(row: TrainingRow) -> str:
    return ConvSpec.parse(str(row.values["spec"])).layout


def _ways(rows: Iterable[Compared]) -> list[str]:
    return list(dict.fromkeys(way for row in rows for way in row.values["ways"]))


def _table(rows: Sequence[TrainingRow]) -> tuple[list[str], list[list[str]]]:
    ways = _ways(rows)
    header = ["layer", "times>", "ours>", "packing>", *(f"torch {way}>" for way in ways), "ratio>"]
    cells = []
    for row in rows:
        packing = sum(part.values["packing"] for part in row.parts.values())
        times = [milliseconds(row.values["ways"].get(way)) for way in ways]
        count = str(sum(row.values["counts"].values()))
        cells.append(
            [code(row.key[0]), count, milliseconds(row.values["seconds"]), milliseconds(packing), *times, rated(row)]
        )
    return header, cells


def _parts(parts: Mapping[tuple[str, int], Compared]) -> tuple[list[str], list[list[str]]]:
    ways = _ways(parts.values())
    header = ["layer", "schedule", "ours>", "packing>", *(f"torch {way}>" for way in ways), "ratio>"]
    cells = [
        [
            code(key[0]),
            code(str(part.values["schedule"]).partition("(")[0]),
            milliseconds(part.values["seconds"]),
            milliseconds(part.values["packing"]),
            *(milliseconds(part.values["ways"].get(way)) for way in ways),
            rated(part),
        ]
        for key, part in parts.items()
    ]
    return header, cells


def _networks(rows: Sequence[TrainingRow]) -> tuple[list[str], list[list[str]]]:
    """Each network's layers as often as it has them: ours, each of PyTorch's formats throughout, and their ratio."""
    names, ways = list(dict.fromkeys(name for row in rows for name in row.values["counts"])), _ways(rows)
    cells = []
    for name in names:
        own = [(row, row.values["counts"][name]) for row in rows if name in row.values["counts"]]
        ours = sum(row.values["seconds"] * count for row, count in own)
        totals = [sum(row.values["ways"][way] * count for row, count in own) for way in ways]
        cells.append([name, milliseconds(ours), *map(milliseconds, totals), factor(min(totals) / ours)])
    return ["network", "ours>", *(f"torch {way}>" for way in ways), "ratio>"], cells


def _means(what: str, rows: Sequence[Compared]) -> str:
    slower = sum(1 for row in rows if row.interval is not None and row.interval[1] < 1)
    mean = factor(geometric_mean([row.ratio for row in rows if row.ratio]))
    return f"Geometric mean of {plural(len(rows), 'ratio')} ({what}): **{mean}**; certainly slower: {slower}."


# ---- command --------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--models", type=listed, default=["resnet18", "mobilenet_v2"], help="as bench/whole.py has them"
    )
    parser.add_argument("--batch", type=_sizes, default=[16], metavar="N,…", help="images of a step (16)")
    parser.add_argument("--threads", type=threads_listed, default=[resolve().cores])
    parser.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw", help="of our kernels; PyTorch has both")
    add_kept_options(parser, rounds=5)
    options = parser.parse_args(arguments)
    try:
        for count in options.threads:
            check_threads(count, resolve())
    except ConvgenError as error:
        parser.error(str(error))
    check_models(parser, options.models)
    return options


def _sizes(text: str) -> list[int]:
    sizes = [int(word) for word in text.split(",") if word.isdecimal() and int(word) > 0]
    if not sizes or len(sizes) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers of images from 1 on, between commas, found {text!r}")
    return sizes


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda console: run(options, console))


if __name__ == "__main__":
    sys.exit(main())
