"""What rows of a bench say together: tables, totals and means; as text and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..problem.spec import ConvSpec
from .markdown import Table, code, escaped, link, markdown_table
from .rows import Compared, Row
from .words import factor, microseconds, milliseconds, plural

#: Classes of layers that different code is fast for, in the order they are listed.
CLASSES = (
    "stem",
    "1×1, many pixels",
    "1×1",
    "1×1 strided",
    "2-D, large plane",
    "2-D, small plane",
    "2-D strided",
    "2-D dilated",
    "grouped",
    "depthwise 2-D",
    "depthwise 2-D strided",
    "depthwise 1-D",
    "depthwise 3-D",
    "transposed",
    "1-D",
    "1-D dilated",
    "3-D",
)

LIMIT_NOTE = (
    "“of limit” is the least time over the time taken: the operations at the measured peak, or the tensors once"
    " from the nearest cache level that holds them, named beside it."
)
ABOVE_NOTE = (
    "Above 100 %: a transform such as Winograd's does fewer operations than are counted, or part of the tensors stays"
    " nearer."
)


def class_of(spec: ConvSpec) -> str:
    """Which of :data:`CLASSES` a layer belongs to."""
    is_strided = max(spec.stride) > 1
    if spec.transposed:
        return "transposed"
    if spec.is_depthwise:
        return f"depthwise {spec.rank}-D{' strided' * (is_strided and spec.rank == 2)}"
    if spec.groups > 1:
        return "grouped"
    if set(spec.kernel) == {1}:
        if is_strided:
            return "1×1 strided"
        return "1×1, many pixels" if spec.out_pixels >= 2048 and min(spec.ic, spec.oc) <= 64 else "1×1"
    if spec.ic <= 4:
        return "stem"
    if spec.rank == 3:
        return "3-D"
    if max(spec.dilation) > 1:
        return f"{spec.rank}-D dilated"
    if spec.rank == 1:
        return "1-D"
    if is_strided:
        return "2-D strided"
    return "2-D, large plane" if spec.out_pixels >= 28 * 28 else "2-D, small plane"


# ---- figures of several rows ------------------------------------------------------------------


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


@dataclass(frozen=True)
class Totals:
    """Rows of one thread count taken together.

    Attributes:
        layers: how many different layers; ``rated`` of them were compared with a peer.
        mean, default_mean: geometric means of the best peer's time over the kernel's, and over the default's.
        faster, slower: how many layers have a ratio whose interval lies wholly above 1, and below.
        seconds, default_seconds: the time of all layers with their counts, of the kernels and of the defaults.
        peers: the same time of each peer; None where the peer did not run all layers.
        best_peers: the same time with the best peer of each layer; None where some layer has no peer.
    """

    layers: int
    rated: int
    mean: float | None
    default_mean: float | None
    faster: int
    slower: int
    seconds: float
    default_seconds: float
    peers: dict[str, float | None]
    best_peers: float | None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Totals:
        ratios = [(row, row.ratio) for row in rows if row.ratio]

        def total(seconds: Callable[[Row], float | None]) -> float | None:
            times = [seconds(row) for row in rows]
            if not all(times):
                return None
            return sum((time or 0.0) * row.count for time, row in zip(times, rows, strict=True))

        return cls(
            layers=len(rows),
            rated=len(ratios),
            mean=geometric_mean(ratio for _, ratio in ratios),
            default_mean=geometric_mean(ratio * row.seconds / row.default_seconds for row, ratio in ratios),
            faster=sum(row.verdict == "faster" for row in rows),
            slower=sum(row.verdict == "slower" for row in rows),
            seconds=total(lambda row: row.seconds) or 0.0,
            default_seconds=total(lambda row: row.default_seconds) or 0.0,
            peers={name: total(lambda row, name=name: row.peers.get(name)) for name in peer_names(rows)},  # type: ignore[misc]
            best_peers=total(lambda row: row.best_peer_seconds),
        )

    def sentences(self) -> list[str]:
        """What to say below a table of the rows."""
        sentences = []
        if self.mean and self.default_mean:
            sentences.append(
                f"Geometric mean of the ratios: {self.mean:.2f} (default: {self.default_mean:.2f}); beyond the interval"
                f" {self.faster} of {self.rated} layers are faster than the best peer, {self.slower} slower."
            )
        times = {"convgen": self.seconds, **self.peers, "the best peer of each layer": self.best_peers}
        if self.default_seconds != self.seconds:
            times = {"convgen": self.seconds, "its defaults": self.default_seconds, **times}
        listed = ", ".join(f"{name} {milliseconds(seconds)} ms" for name, seconds in times.items() if seconds)
        return [*sentences, f"All layers with their counts: {listed}."]


def peer_names(rows: Iterable[Row]) -> list[str]:
    """The peers of all rows, in order."""
    return list(dict.fromkeys(name for row in rows for name in row.peers))


def by_threads(rows: Iterable[Row]) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.threads, []).append(row)
    return dict(sorted(groups.items()))


def by_accuracy(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Standard ones first."""
    groups: dict[str, list[Row]] = {"standard": []}
    for row in rows:
        groups.setdefault(row.spec.accuracy, []).append(row)
    return {accuracy: group for accuracy, group in groups.items() if group}


def by_class(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {name: [] for name in CLASSES}
    for row in rows:
        groups[class_of(row.spec)].append(row)
    return {name: group for name, group in groups.items() if group}


# ---- cells ------------------------------------------------------------------------------------


def rated(row: Compared) -> str:
    """A row's ratio with its interval."""
    if row.interval is None:
        return "–"
    low, high = row.interval
    return f"{factor(row.ratio)} ({low:.2f}–{high:.2f})"


def limit(row: Row) -> str:
    """How much of its limit a row reaches, and what that is."""
    return "–" if row.of_limit is None else f"{row.of_limit:.0%} {row.limited_by}"


def layers(rows: Sequence[Row], name: Callable[[Row], str]) -> Table:
    """A row per layer; times in µs. The default has a column where some layer has another kernel."""
    peers = peer_names(rows)
    with_default = any(len(row.values["kernels"]) > 1 for row in rows)
    header = ["layer", "×>", "convgen>", *(["default>"] * with_default), *(f"{peer}>" for peer in peers)]
    header += ["best peer / convgen>", "GFLOP/s>", "of limit>", "schedule"]
    cells = [
        [
            name(row),
            str(row.count),
            microseconds(row.seconds),
            *([microseconds(row.default_seconds)] * with_default),
            *(microseconds(row.peers.get(peer)) for peer in peers),
            rated(row),
            f"{row.gflops:.0f}" if row.gflops >= 10 else f"{row.gflops:.1f}",
            limit(row),
            row.schedule,
        ]
        for row in rows
    ]
    return header, cells


def classes(rows: Sequence[Row]) -> Table:
    """A row per class of layers, and a row of all layers."""
    header = ["class", "layers>", "ratio>", "default ratio>", "faster>", "slower>"]
    cells = []
    for name, group in [*by_class(rows).items(), ("all", rows)]:
        totals = Totals.of(group)
        means = [factor(totals.mean), factor(totals.default_mean)]
        cells.append([name, str(totals.layers), *means, str(totals.faster), str(totals.slower)])
    return header, cells


def problems(rows: Iterable[Row]) -> list[str]:
    """Why peers were not timed, each reason once."""
    rows_of: dict[str, list[Row]] = {}
    for row in rows:
        for timing in row.values["peers"]:
            if timing["problem"]:
                rows_of.setdefault(f"{timing['name']}: {timing['problem']}", []).append(row)
    return [reason if len(group) == 1 else f"{reason} ({len(group)} layers)" for reason, group in rows_of.items()]


# ---- Markdown ---------------------------------------------------------------------------------


def facts(rows: Sequence[Row]) -> str:
    """What the rows were measured on and with."""
    last: Mapping[str, Any] = rows[-1].values
    peers = {peer["name"]: peer["version"] for row in rows for peer in row.values["peers"] if peer["version"]}
    packages = ", ".join(f"{name} {version}" for name, version in {**last["versions"], **peers}.items())
    dates = sorted({row.values["date"] for row in rows})
    date = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    bits = rows[-1].restricted
    rate = f"; measured {last.get('peak_of', 'FMA peak')} {last['peak'] / 1e9:.0f} GFLOP/s" if last["peak"] else ""
    restricted = f"; kernels for {last['target']}, the libraries kept to its vectors of {bits} bits" if bits else ""
    return f"{last['cpu']} ({last['fingerprint']}), {date}, Python {last['python']}, {packages}{rate}{restricted}."


def network(title: str, rows: Sequence[Row]) -> str:
    """The rows of a network as a Markdown page: per thread count, and per accuracy."""
    lines = [f"# {escaped(title)}", ""]
    lines += ["Times in µs, medians of alternating turns; ratio = best peer / convgen (tuned where there is a"]
    lines += ["tuned one), with its 95 % interval.", LIMIT_NOTE]
    if any((row.of_limit or 0) > 1 for row in rows):
        lines.append(ABOVE_NOTE)
    if rows and rows[0].mode == "cold":
        lines.append("Cold: every call finds the caches empty.")
    lines.append("")
    standard = {row.key: row for row in rows if row.spec.accuracy == "standard"}
    for accuracy, chosen in by_accuracy(rows).items():
        for group in by_threads(chosen).values():
            heading = _place(group) + (f", {accuracy}" if accuracy != "standard" else "")
            lines += [f"## {heading}", "", escaped(facts(group)), ""]
            lines += [*markdown_table(layers(group, lambda row: code(str(row.spec)))), ""]
            lines += map(escaped, Totals.of(group).sentences())
            lines += ["", *(f"- {escaped(reason)}" for reason in problems(group)), ""]
            if accuracy != "standard":
                lines += [*markdown_table(_beside(group, standard, accuracy)), ""]
            lines += [*markdown_table(classes(group)), ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _place(rows: Sequence[Row]) -> str:
    """Where rows of one thread count ran."""
    return plural(rows[0].threads, "thread") if rows[0].device == "cpu" else "GPU"


def _beside(group: Sequence[Row], standard: Mapping[tuple[str, int], Row], accuracy: str) -> Table:
    """The rows of another accuracy beside the standard ones."""
    header = [
        "layer",
        "standard>",
        f"{accuracy}>",
        f"{accuracy} / standard>",
        "standard schedule",
        f"{accuracy} schedule",
    ]
    cells = []
    for row in group:
        spec = row.spec.with_(accuracy="standard")
        if other := standard.get((spec.descriptor, row.threads)):
            times = [microseconds(other.seconds), microseconds(row.seconds), factor(row.seconds / other.seconds)]
            cells.append([code(str(spec)), *times, other.schedule, row.schedule])
    return header, cells


def summary(networks: Mapping[str, Sequence[Row]], checks: Mapping[str, Sequence[Row]] | None = None) -> str:
    """All networks as a Markdown page: a row each, a row per class of layers, and what is slower.

    Args:
        checks: sets of rows that get a line each and count nowhere else but among the slower layers.
    """
    lines = ["# What was measured", ""]
    lines += ["Ratios are geometric means of best peer / convgen over the layers, above 1 where convgen is faster;"]
    lines += ["“faster” and “slower” count the layers whose 95 % interval lies on that side of 1. Times are of all"]
    lines += ["convolutions of the network, in ms; “best peers” takes the fastest library of each layer.", ""]
    everything = [row for rows in networks.values() for row in rows]
    peers = peer_names(everything)
    for mode in ("warm", "cold"):
        for accuracy, chosen in by_accuracy(row for row in everything if row.mode == mode).items():
            for threads, chosen_rows in by_threads(chosen).items():
                marks = [mark for mark in (accuracy, f"{mode} caches") if mark not in ("standard", "warm caches")]
                lines += [f"## {', '.join([_place(chosen_rows), *marks])}", ""]
                header = ["network", "layers>", "ratio>", "default ratio>", "faster>", "slower>"]
                header += ["convgen>", "default>", *(f"{peer}>" for peer in peers), "best peers>"]
                cells: list[list[str]] = []
                unique: dict[tuple[str, int], Row] = {}
                for name, rows in networks.items():
                    group = [
                        row for row in rows if (row.mode, row.spec.accuracy, row.threads) == (mode, accuracy, threads)
                    ]
                    if group:
                        cells.append([link(name, f"{name}.md"), *_figures(Totals.of(group), peers)])
                        unique |= {row.key: row for row in group}  # a layer of two networks counts once below
                lines += [*markdown_table((header, cells)), "", *markdown_table(classes(list(unique.values()))), ""]
    if checks:
        lines += ["## Spot checks", ""]
        lines += [*markdown_table(_checks(checks)), ""]
    networks = {**networks, **(checks or {})}
    slower = [(name, row) for name, rows in networks.items() for row in rows if row.verdict == "slower"]
    lines += ["## Slower than the best peer beyond the interval", ""]
    if slower:
        header = ["layer", "network", "threads>", "best peer / convgen>", "of limit>", "schedule"]
        ordered = sorted(slower, key=lambda pair: pair[1].ratio or 0.0)
        cells = [
            [code(str(row.spec)), name, str(row.threads), rated(row), limit(row), row.schedule] for name, row in ordered
        ]
        lines += markdown_table((header, cells))
    else:
        lines.append("None.")
    return "\n".join([*lines, ""])


def _checks(checks: Mapping[str, Sequence[Row]]) -> Table:
    """A line for each set of rows and each thread count."""
    header = ["layers", "threads>", "number>", "ratio>", "default ratio>", "least>", "faster>", "slower>"]
    cells = []
    for name, rows in checks.items():
        for threads, group in by_threads(rows).items():
            totals = Totals.of(group)
            least = min((row for row in group if row.ratio), key=lambda row: row.ratio or 0.0, default=None)
            figures = [
                str(totals.layers),
                factor(totals.mean),
                factor(totals.default_mean),
                rated(least) if least else "",
            ]
            cells.append([link(name, f"{name}.md"), str(threads), *figures, str(totals.faster), str(totals.slower)])
    return header, cells


def _figures(totals: Totals, peers: Sequence[str]) -> list[str]:
    counts = [str(totals.faster), str(totals.slower)]
    times = [totals.seconds, totals.default_seconds, *(totals.peers.get(peer) for peer in peers), totals.best_peers]
    means = [factor(totals.mean), factor(totals.default_mean)]
    return [str(totals.layers), *means, *counts, *(milliseconds(seconds) for seconds in times)]
