"""Rows of whole models: a compiled network beside what other libraries take; and their tables."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hardware.machine import machine
from ..lowering.versions import versions
from .markdown import markdown_table
from .rows import Compared, KeyedFile
from .tables import geometric_mean, rated
from .words import factor, milliseconds, plural

if TYPE_CHECKING:
    from ..measure.network_model import NetworkModel, Running
    from ..network.library import NetworkLibrary
    from ..network.network import Network
    from ..network.plan import Plan

#: What tells rows apart: what the model is known by, the accuracy, the target, threads, the kernels.
Key = tuple[str, str, str, int, str]
#: The page's columns: the heading, the library, and whether it computes in f32.
COLUMNS = (
    ("convgen", "convgen", True),
    ("ONNX Runtime", "onnxruntime", True),
    ("OpenVINO f32", "openvino", True),
    ("torch.compile", "torch", True),
    ("ncnn", "ncnn", True),
    ("OpenVINO default", "openvino", False),
)
INTRODUCTION = (
    "Milliseconds of whole models, medians of turns in which all libraries alternate. The ratio is the fastest library"
    " in f32 over convgen, with its 95 % interval: above 1 convgen is faster. Of quantised models, and where convgen"
    " multiplies in bf16, it is the fastest library in any precision."
)


@dataclass(frozen=True)
class WholeRow(Compared):
    """A whole model's row. Those of older versions have no digest: their model's name stands for it; and nothing that
    tells the kernels.
    """

    @property
    def key(self) -> Key:
        known_by, kernels = self.values.get("digest") or self.model, self.values.get("kernels", "")
        return str(known_by), self.accuracy, self.target, self.threads, str(kernels)

    @property
    def target(self) -> str:
        return str(self.values.get("target", "cpu"))

    @property
    def model(self) -> str:
        return str(self.values["model"])

    @property
    def accuracy(self) -> str:
        return str(self.values.get("accuracy", "standard"))

    @property
    def kind(self) -> str:
        """What is said of rows that belong together: nothing of f32 in the usual accuracy."""
        ours = self.part("convgen")
        if ours and ours["precision"] == "i8":
            return "quantised models"
        return f"accuracy {self.accuracy}" if self.accuracy != "standard" else ""

    @property
    def own_seconds(self) -> float | None:
        """What convgen takes, in whatever precision."""
        ours = self.part("convgen") or self.part("convgen", f32=False)
        return ours["seconds"] if ours else None

    @property
    def best_part(self) -> Mapping[str, Any] | None:
        """The library that the ratio is about."""
        ours = self.part("convgen")
        is_f32 = ours is not None and ours["precision"] == "f32"
        timed = [
            dict(part)
            for part in self.values["parts"]
            if part["library"] == self.values["best"] and part["seconds"] and (not is_f32 or part["precision"] == "f32")
        ]
        return min(timed, key=lambda part: float(part["seconds"]), default=None)

    def part(self, library: str, f32: bool = True) -> Mapping[str, Any] | None:
        """What is known of a library: as the model says, in f32 or i8; or in what it chooses instead."""
        for part in self.values["parts"]:
            if part["library"] == library and (part["precision"] in ("f32", "i8")) == f32:
                return dict(part)
        return None

    def seconds(self, library: str, f32: bool = True) -> float | None:
        part = self.part(library, f32)
        return part["seconds"] if part else None


@dataclass(frozen=True)
class Bench:
    """What is measured of each model.

    Attributes:
        compiled: makes a model's network for a number of threads.
        planned: its plans at each of its sizes, which say with which kernels; None where these are always the same,
            and no row tells them.
        peers: names in :data:`convgen.measure.network_peers.NETWORK_PEERS`.
        threads: each of the numbers of threads.
        accuracy, target: what tells the rows apart besides the model.
        rounds: of timing.
    """

    compiled: Callable[[NetworkModel, int], Network]
    peers: Sequence[str]
    threads: Sequence[int]
    accuracy: str = "standard"
    target: str = "cpu"
    rounds: int = 7
    planned: Callable[[NetworkModel, int], Sequence[Plan]] | None = None

    def rows(
        self,
        name: str,
        model: NetworkModel,
        known: KeyedFile[WholeRow] | None = None,
        phase: Callable[[str], None] = lambda text: None,
    ) -> Iterator[tuple[WholeRow, bool]]:
        """A row for each number of threads, and whether it is new: what a file has is not measured again, what it has
        not is added to it.

        Args:
            known: the file, whose kind of row says what tells models apart.
            phase: told what happens next.
        """
        kind = WholeRow if known is None else known.kind
        digest = model_digest(model)
        of_model = {"model": name, "digest": digest, "dims": dict(model.dims)}
        for threads in self.threads:
            facts = {**of_model, "accuracy": self.accuracy, "target": self.target, "threads": threads}
            if known is not None:
                if self.planned is not None and any(row.values.get("digest") == digest for row in known.rows.values()):
                    facts["kernels"] = kernels_digest(self.planned(model, threads))
                row = known.rows.get(kind(facts).key)
                if row is not None:
                    yield row, False
                    continue
            phase(f"compiling for {plural(threads, 'thread')}")
            started = time.monotonic()
            network = self.compiled(model, threads)
            compiling = time.monotonic() - started
            if self.planned is not None:
                facts["kernels"] = kernels_digest(network.plans)
            phase(f"timing {', '.join(['convgen', *self.peers])} on {plural(threads, 'thread')}")
            row = kind({**facts, **self._measured(model, network, threads), "compile_seconds": compiling})
            if known is not None:
                known.add(row)
            yield row, True

    def _measured(self, model: NetworkModel, network: Network, threads: int) -> dict[str, Any]:
        """What is found of a model, and where: a row's values besides what it is about."""
        from ..measure.networks import compare_model  # loads NumPy, and whoever only reads rows needs none

        running = running_network(model, network)
        here = versions()
        precision = "bf16" if self.accuracy == "bf16" else model.precision
        comparison = compare_model(model, lambda: running, here["convgen"], self.peers, threads, self.rounds, precision)
        return {
            **comparison.to_dict(),
            "weights_bytes": network.sizes().weights,
            "workspace_bytes": network.sizes().workspace,
            "date": datetime.now(UTC).date().isoformat(),
            "cpu": machine().cpu,
            "fingerprint": machine().fingerprint,
            "python": platform.python_version(),
            "versions": here,
        }


def running_network(model: NetworkModel, network: NetworkLibrary) -> Running:
    """A model's network, with its inputs and with arrays for its outputs."""
    from ..measure.network_model import Running  # as above

    out = {output: model.expected[output].copy() for output in network.outputs}
    inputs = [model.inputs[given] for given in network.inputs]
    return Running(lambda: network(*inputs, out=out), lambda: list(out.values()))


def model_digest(model: NetworkModel) -> str:
    """What tells a model at its sizes from others, whatever its file is called."""
    dims = ",".join(f"{name}={size}" for name, size in sorted(model.dims.items()))
    return hashlib.sha256(model.data + dims.encode()).hexdigest()[:16]


def kernels_digest(plans: Iterable[Plan]) -> str:
    """What tells a model's networks apart by the kernels that compute its convolutions, which records decide."""
    from ..network.plan import Product  # loads NumPy, and whoever only reads rows needs none

    functions = [step.function for plan in plans for step in plan.steps if isinstance(step.function, Product)]
    lines = [f"{made.spec.descriptor} {made.candidate.schedule.version} {made.candidate}" for made in functions]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def whole_file(path: Path) -> KeyedFile[WholeRow]:
    """The rows that a file of JSON lines keeps."""
    return KeyedFile(path, WholeRow)


# ---- tables ---------------------------------------------------------------------------------------


def whole_page(rows: Iterable[WholeRow]) -> str:
    """The rows as a page of Markdown."""
    rows = list(rows)
    document = ["# Whole networks", "", INTRODUCTION, ""]
    for kind, threads in sorted({(row.kind, row.threads) for row in rows}):
        chosen = [row for row in rows if (row.kind, row.threads) == (kind, threads)]
        chosen.sort(key=lambda row: (row.model, row.key))
        cells = [
            [
                row.model,
                milliseconds(row.own_seconds),
                *(milliseconds(row.seconds(*column[1:])) for column in COLUMNS[1:]),
                rated(row),
            ]
            for row in chosen
        ]
        header = ["model", *(f"{heading}>" for heading, *_ in COLUMNS), "ratio>"]
        title = plural(threads, "thread") + (f", {kind}" if kind else "")
        document += [f"## {title}", "", *markdown_table((header, cells)), "", *summary(chosen), ""]
    return "\n".join(document).rstrip("\n") + "\n"


def lines_of(row: WholeRow) -> list[list[str]]:
    """A line for each library: its name and precision, milliseconds, its time over ours, and why it was not timed."""
    own, best, lines = row.own_seconds, row.best_part, []
    for part in row.values["parts"]:
        seconds = part["seconds"]
        ratio = rated(row) if part == best else factor(seconds / own) if own and seconds else ""
        if part["library"] == "convgen":
            ratio = ""
        lines.append([part["library"], part["precision"], milliseconds(seconds), ratio, part["problem"]])
    return lines


def summary(rows: Sequence[Compared]) -> list[str]:
    """The geometric mean of the ratios, of several rows."""
    return mean_and_least(row.ratio for row in rows)


def mean_and_least(ratios: Iterable[float | None]) -> list[str]:
    """A line about the ratios of some models, where there are any."""
    known = [ratio for ratio in ratios if ratio]
    mean = geometric_mean(known)
    if mean is None:
        return []
    return [f"Geometric mean {factor(mean)} over {plural(len(known), 'model')}, least {factor(min(known))}."]
