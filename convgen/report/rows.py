"""Rows of a bench: a layer's times here and beside other libraries, and what they were measured with."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ..errors import UnsupportedError
from ..formats.entries import SpecEntry
from ..formats.sources import write_text
from ..hardware.machine import machine
from ..hardware.roofline import roofline
from ..hardware.target import resolve
from ..lowering.versions import versions
from ..measure.busy import BusyWatch
from ..problem.spec import ConvSpec

if TYPE_CHECKING:
    from ..kernel.kernel import Kernel

#: What tells the rows of a file apart: the layer's descriptor and the threads.
Key = tuple[str, int]


@dataclass(frozen=True)
class Compared:
    """A row of any bench, as the JSON values that are kept in its file: what is ours beside other libraries'."""

    values: Mapping[str, Any]

    @property
    def threads(self) -> int:
        return int(self.values["threads"])

    @property
    def ratio(self) -> float | None:
        """The fastest library's time over ours."""
        ratio: float | None = self.values["ratio"]
        return ratio

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of :attr:`ratio`."""
        if self.values["interval"] is None:
            return None
        low, high = self.values["interval"]
        return low, high

    @property
    def busy(self) -> float | None:
        """The share of the CPUs' time that other programs had meanwhile; None where it is not known."""
        share: float | None = self.values.get("busy")
        return share


@dataclass(frozen=True)
class Row(Compared):
    """A layer's row.

    Ratios are about the first of its kernels; the last one is the zero-trial default. Rows of older versions lack
    some values: properties that need such a value are None.
    """

    @cached_property
    def spec(self) -> ConvSpec:
        return ConvSpec.parse(self.values["spec"])

    @property
    def key(self) -> Key:
        return self.values["spec"], self.threads

    @property
    def device(self) -> str:
        """The kind of target that the row was measured on."""
        return str(self.values.get("device", "cpu"))

    @property
    def mode(self) -> str:
        """What a call finds in the caches: ``warm`` or ``cold``."""
        return str(self.values.get("mode", "warm"))

    @property
    def restricted(self) -> int | None:
        """Bits of the vectors that the other libraries were kept to; None where they were not restricted."""
        bits: int | None = self.values.get("restricted")
        return bits

    @property
    def count(self) -> int:
        """How often the layer occurs in its network."""
        return int(self.values["count"])

    @property
    def name(self) -> str:
        return next(iter(self.values["names"]), "")

    @property
    def schedule(self) -> str:
        return str(self.values["schedule"])

    @property
    def seconds(self) -> float:
        return float(self.values["kernels"][0]["seconds"])

    @property
    def default_seconds(self) -> float:
        return float(self.values["kernels"][-1]["seconds"])

    @property
    def is_tuned(self) -> bool:
        """Whether the layer was tuned before it was measured."""
        return bool(self.values.get("tuning_seconds")) or len(self.values["kernels"]) > 1

    @property
    def peers(self) -> dict[str, float | None]:
        """Seconds of each peer; None where it was not timed."""
        return {timing["name"]: timing["seconds"] for timing in self.values["peers"]}

    @property
    def best_peer_seconds(self) -> float | None:
        return min((seconds for seconds in self.peers.values() if seconds), default=None)

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` than the best peer beyond the interval; ``even`` within it."""
        if self.interval is None:
            return ""
        low, high = self.interval
        return "faster" if low > 1 else "slower" if high < 1 else "even"

    @property
    def gflops(self) -> float:
        return float(self.values["flops"]) / self.seconds / 1e9

    @property
    def limited_by(self) -> str | None:
        """What bounds the layer's time: ``compute``, ``l2``, ``l3`` or ``dram``."""
        roofline = self.values.get("roofline")
        return roofline["limited_by"] if roofline else None

    @property
    def of_limit(self) -> float | None:
        """The least time that :mod:`convgen.hardware.roofline` allows over the time taken."""
        roofline = self.values.get("roofline")
        return roofline["seconds"] / self.seconds if roofline else None


def measure(
    entry: SpecEntry,
    kernels: Mapping[str, Kernel],
    peers: Sequence[str],
    threads: int,
    *,
    rounds: int = 7,
    cold: bool = False,
) -> Row:
    """Time a layer's kernels, the default one last, beside other libraries, with :mod:`convgen.measure.compare`.

    Where the kernels' target has narrower vectors than this machine, the libraries are restricted to such vectors.

    Raises:
        UnsupportedError: the kernels run on a GPU, the other libraries on the CPU.
    """
    from ..kernel.library import Library  # loads NumPy, and whoever only reads rows needs none
    from ..measure.compare import compare

    on_cpu = {name: kernel for name, kernel in kernels.items() if isinstance(kernel, Library)}
    if len(on_cpu) < len(kernels):
        raise UnsupportedError(
            f"{entry.spec.descriptor}: expected kernels for the CPU to compare, found some for a GPU"
        )
    target = next(iter(kernels.values())).target
    narrower = target.vector_bits if target.vector_bits < resolve("cpu").vector_bits else None
    watch = BusyWatch()
    comparison = compare(on_cpu, peers, threads, rounds=rounds, cold=cold, vector_bits=narrower)
    busy = watch.share()
    limit = roofline(entry.spec, threads, cold=cold)
    return Row(
        {
            **comparison.to_dict(),
            "names": list(entry.names),
            "count": entry.count,
            "target": target.spelling,
            "restricted": narrower,
            "candidates": {name: f"{kernel.schedule}({kernel.picks})" for name, kernel in kernels.items()},
            "schedule": next(iter(kernels.values())).schedule,
            "peak": limit.peak_flops,
            "peak_of": f"{limit.peak_of} peak",
            "roofline": limit.to_dict(),
            "busy": busy,
            "date": datetime.now(UTC).date().isoformat(),
            "cpu": machine().cpu,
            "fingerprint": machine().fingerprint,
            "python": platform.python_version(),
            "versions": versions(),
        }
    )


class Keyed(Protocol):
    """A row of some kind: its values as JSON can say them, and what tells it apart from others."""

    @property
    def values(self) -> Mapping[str, Any]: ...

    @property
    def key(self) -> Hashable: ...


R = TypeVar("R", bound=Keyed)


class KeyedFile(Generic[R]):
    """Rows in a file of JSON lines; of two rows with the same key the later one counts.

    Each row is in the file as soon as it is added, whatever happens afterwards: a line that was cut off is
    skipped when the file is read.

    Args:
        kind: makes a row of a line's values.
    """

    def __init__(self, path: Path, kind: Callable[[Mapping[str, Any]], R]) -> None:
        self.path, self.kind = path, kind
        self.rows: dict[Hashable, R] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    row = kind(json.loads(line))
                    self.rows[row.key] = row

    def add(self, row: R) -> None:
        """Append a row, in one write."""
        self.rows[row.key] = row
        line = json.dumps(dict(row.values)) + "\n"
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # behind a line that was cut off
                    line = "\n" + line
            file.write(line.encode())

    def compact(self, order: Iterable[Hashable] = ()) -> None:
        """Write the file anew with each key's row once, those of ``order`` first: whole or not at all."""
        rows = KeyedFile(self.path, self.kind).rows  # with what another process may have added
        keys = dict.fromkeys([*(key for key in order if key in rows), *rows])
        self.rows = {key: rows[key] for key in keys}
        write_text("".join(json.dumps(dict(row.values)) + "\n" for row in self.rows.values()), self.path)


class RowFile(KeyedFile[Row]):
    """The rows of layers."""

    rows: dict[Key, Row]  # type: ignore[assignment]

    def __init__(self, path: Path) -> None:
        super().__init__(path, Row)
