"""Rows of whole networks: our convolutions one after another, beside what other libraries take; and their tables."""

from __future__ import annotations

import hashlib
import math
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..formats.entries import SpecEntry
from ..hardware.machine import Machine, machine
from ..lowering.versions import versions
from ..measure.busy import RELIABLE, BusyWatch
from .markdown import Markdown, Table, code, escaped, markdown_table
from .rows import Compared
from .words import factor, milliseconds, plural

if TYPE_CHECKING:
    from ..kernel.library import Library
    from ..measure.network_model import NetworkModel
    from ..problem.spec import ConvSpec

#: What tells networks' rows apart: the model, its accuracy, the kernels' kind (``default``, ``recorded``), threads.
Key = tuple[str, str, str, int]

#: A row's columns of other libraries' whole models: the heading, the library, and whether it is in f32.
_WHOLE = (
    ("ONNX Runtime", "onnxruntime", True),
    ("OpenVINO f32", "openvino", True),
    ("OpenVINO default", "openvino", False),
    ("torch.compile", "torch", True),
    ("ncnn", "ncnn", True),
)
#: What stands above the tables.
INTRODUCTION = (
    "Milliseconds, batch 1. “ours” is all convolutions of the model one after another, each with weights of its own;"
    " “alone” the sum of the same layers when each is repeated, which is a diagnosis. Beside them the same convolutions"
    " inside the model in ONNX Runtime and OpenVINO (f32), by their own profiles: without changes of layout, and"
    " without activations that they do not fuse. The ratio is the faster of these two over ours, with its 95 %"
    " interval: above 1 ours are faster. The second table has whole models, which our convolutions are only a part of."
)


@dataclass(frozen=True)
class NetworkRow(Compared):
    """A network's row; its ratio is about convolutions in f32, the library's inside the model."""

    @property
    def key(self) -> Key:
        values = self.values
        return str(values["model"]), str(values["accuracy"]), str(values["kernels"]), self.threads

    @property
    def model(self) -> str:
        return str(self.values["model"])

    @property
    def seconds(self) -> float:
        """Of our convolutions, one after another."""
        return float(self.values["seconds"])

    @property
    def warm_seconds(self) -> float:
        """The sum of our layers, each repeated alone."""
        return float(self.values["warm_seconds"])

    def part(self, library: str, what: str, f32: bool = True) -> Mapping[str, Any] | None:
        """What is known of a library's ``model`` or ``convolutions``, in f32 or in what it chooses instead."""
        for part in self.values["parts"]:
            if (part["library"], part["what"], part["precision"] == "f32") == (library, what, f32):
                return dict(part)
        return None

    def part_seconds(self, library: str, what: str, f32: bool = True) -> float | None:
        """What :meth:`part` took. Where a library chooses f32 by itself, that is what it chooses."""
        part = self.part(library, what, f32) or self.part(library, what)
        return part["seconds"] if part else None


def measure_network(
    name: str,
    model: NetworkModel,
    layers: Sequence[SpecEntry],
    kernels: Mapping[ConvSpec, Library],
    peers: Sequence[str],
    threads: int,
    *,
    rounds: int = 7,
    facts: Mapping[str, Any],
) -> NetworkRow:
    """Time a model's convolutions one after another, beside other libraries (:mod:`convgen.measure.networks`).

    Args:
        layers: its convolutions in their order.
        kernels: a kernel of each spec.
        facts: what else tells the row apart: ``accuracy`` and ``kernels``, and what it should say.
    """
    from ..measure.chain import Chain  # loads NumPy, and whoever only reads rows needs none
    from ..measure.networks import compare_network

    chain = Chain(layers, kernels, threads)
    comparison = compare_network(model, chain, peers, threads, rounds=rounds)
    watch = BusyWatch()
    warm, within = chain.warm_seconds(), chain.instance_seconds(rounds)
    busy = max((share for share in (comparison.busy, watch.share()) if share is not None), default=None)
    return NetworkRow(
        {
            "model": name,
            "threads": threads,
            **facts,
            **comparison.to_dict(),
            "warm_seconds": sum(warm[layer.spec] for layer in chain.layers),
            "flops": sum(layer.spec.flops for layer in chain.layers),
            "layers": layers_digest(layers),
            "busy": busy,
            "instances": [
                {
                    "name": "".join(layer.names),
                    "spec": layer.spec.descriptor,
                    "kernel": _kernel_text(kernels[layer.spec]),
                    "seconds": seconds,
                    "warm_seconds": warm[layer.spec],
                }
                for layer, seconds in zip(chain.layers, within, strict=True)
            ],
            "date": datetime.now(UTC).date().isoformat(),
            "cpu": machine().cpu,
            "fingerprint": machine().fingerprint,
            "python": platform.python_version(),
            "versions": versions(),
        }
    )


def _kernel_text(kernel: Any) -> str:
    """``schedule(picks)`` of a kernel that was built here."""
    schedule = getattr(kernel, "schedule", "")
    return f"{schedule}({kernel.picks})" if schedule else str(kernel.name)


def layers_digest(layers: Iterable[SpecEntry]) -> str:
    """What tells a model's convolutions from those of another model of the same name."""
    text = "\n".join(f"{layer.spec.descriptor} {layer.count}" for layer in layers)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def processor_slug(here: Machine) -> str:
    """A processor's name and model as the name of a folder: ``amd-epyc-26-2-1``. Some names say little: virtual
    machines hide theirs.
    """
    _, *numbers = here.fingerprint.rsplit("-", 2)[0].split("-")
    return re.sub(r"[^a-z0-9]+", "-", " ".join([here.cpu, *numbers]).lower()).strip("-")


# ---- tables ---------------------------------------------------------------------------------------


def networks_page(rows: Sequence[NetworkRow]) -> str:
    """All rows of a processor as Markdown."""
    cpus = sorted({str(row.values["cpu"]) for row in rows})
    lines = [f"# Networks on {escaped(', '.join(cpus))}", "", INTRODUCTION, ""]
    groups: dict[tuple[str, str, int], list[NetworkRow]] = {}
    for row in rows:
        groups.setdefault(row.key[1:], []).append(row)
    for (accuracy, kernels, threads), group in groups.items():
        lines += [f"## {plural(threads, 'thread')}, {accuracy}, {kernels} kernels", ""]
        lines += [*markdown_table(_convolutions(group)), "", _means(group), ""]
        lines += [*markdown_table(_models(group)), "", *_problems(group), *_provenance(group), ""]
    return "\n".join(lines)


def _convolutions(rows: Sequence[NetworkRow]) -> Table:
    header = ["model", "ours>", "alone>", "ONNX Runtime>", "OpenVINO f32>", "ratio>", "interval>"]
    cells = []
    for row in rows:
        interval = "–" if row.interval is None else f"{row.interval[0]:.2f}–{row.interval[1]:.2f}"
        libraries = [milliseconds(row.part_seconds(name, "convolutions")) for name in ("onnxruntime", "openvino")]
        cells.append(
            [
                _name(row),
                milliseconds(row.seconds),
                milliseconds(row.warm_seconds),
                *libraries,
                factor(row.ratio),
                interval,
            ]
        )
    return header, cells


def _models(rows: Sequence[NetworkRow]) -> Table:
    """Whole models; of a library without f32 the precision that it has chosen."""
    chosen = {str(part["precision"]) for row in rows if (part := row.part("openvino", "model", f32=False))}
    header = ["model", "our convolutions>"]
    header += [
        f"{title.replace('default', ', '.join(sorted(chosen))) if chosen and not f32 else title}>"
        for title, _, f32 in _WHOLE
    ]
    cells = []
    for row in rows:
        times = [milliseconds(row.part_seconds(library, "model", f32)) for _, library, f32 in _WHOLE]
        cells.append([_name(row), milliseconds(row.seconds), *times])
    return header, cells


def _name(row: NetworkRow) -> str:
    mark = " (busy)" if (row.busy or 0.0) > RELIABLE else ""
    return Markdown(code(row.model) + mark)


def _means(rows: Sequence[NetworkRow]) -> str:
    mean = _geometric(row.ratio for row in rows)
    cold = _geometric(row.warm_seconds / row.seconds for row in rows)
    parts = [f"geometric mean of {plural(len(rows), 'ratio')}: **{factor(mean)}**"]
    parts.append(f"alone over one after another: {factor(cold)}")
    for title, library, f32 in _WHOLE:
        mean = _geometric(
            seconds / row.seconds for row in rows if (seconds := row.part_seconds(library, "model", f32)) is not None
        )
        if mean:
            parts.append(f"{title}'s whole models over our convolutions: {factor(mean)}")
    return "; ".join(parts) + "."


def _geometric(values: Iterable[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _problems(rows: Sequence[NetworkRow]) -> list[str]:
    """Who was not timed, and why."""
    lines = []
    for row in rows:
        for part in row.values["parts"]:
            if part["problem"]:
                what = f"{part['library']} {part['precision']} {part['what']}"
                lines.append(f"- {code(row.model)}: {escaped(what)}: {escaped(part['problem'])}")
    return [*lines, ""] if lines else []


def _provenance(rows: Sequence[NetworkRow]) -> list[str]:
    """Dates, versions, and how busy the machine was with other things."""
    dates = sorted({str(row.values["date"]) for row in rows})
    libraries = sorted(
        {f"{part['library']} {part['version']}" for row in rows for part in row.values["parts"] if part["version"]}
    )
    ours = sorted({f"convgen {row.values['versions'].get('convgen', '?')}" for row in rows})
    machines = sorted({str(row.values["fingerprint"]) for row in rows})
    busy = max((row.busy for row in rows if row.busy is not None), default=None)
    said = "" if busy is None else f" Other programs had at most {busy:.0%} of the CPUs."
    named = ", ".join(escaped(text) for text in [*ours, *libraries])
    return [f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {', '.join(map(code, machines))}; {named}.{said}"]


#: Makes a row; what tests of the runner replace.
NetworkMeasurer = Callable[..., NetworkRow]
