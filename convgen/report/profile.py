"""Where a network's time goes: a line for each step, operators between convolutions included."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .markdown import markdown_table
from .words import factor, microseconds, milliseconds, plural

if TYPE_CHECKING:
    from ..network.network import Network


@dataclass(frozen=True)
class StepTime:
    """A step of a network.

    Attributes:
        name: of the node it was.
        computes: the convolution's spec, or the operators.
        schedule: of a convolution; empty of other steps.
        seconds: that it takes.
        before: what its default takes; None where the network was compiled without records.
        predicted: what its default is predicted to take, by which layouts were chosen; None of other steps.
    """

    name: str
    computes: str
    schedule: str
    seconds: float
    before: float | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class NetworkProfile:
    """The steps of a network at one of its sizes, in the order in which they run, on a number of threads."""

    title: str
    threads: int
    steps: tuple[StepTime, ...]

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def before(self) -> float | None:
        """Seconds of the defaults."""
        times = [step.before for step in self.steps if step.before is not None]
        return sum(times) if times else None

    @property
    def headline(self) -> str:
        """What the steps take together."""
        kernels = sum(step.seconds for step in self.steps if step.schedule)
        share = f"{kernels / self.seconds:.0%} of it in convolutions" if self.seconds else ""
        text = f"{milliseconds(self.seconds)} ms on {plural(self.threads, 'thread')}, {share}"
        if self.before is not None:
            text += (
                f"; {milliseconds(self.before)} ms with defaults, {factor(self.before / self.seconds)} times as much"
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {
            "title": self.title,
            "threads": self.threads,
            "seconds": self.seconds,
            "before": self.before,
            "steps": [asdict(step) for step in self.steps],
        }


def profile_network(
    network: Network, defaults: Network | None = None, size: int = 0, turns: int = 5, rounds: int = 5
) -> NetworkProfile:
    """Time every step; in turns with the same network of defaults, where it is given.

    Args:
        turns: of each network.
        rounds: runs of a turn, of which the median counts.
    """
    own, others = list[list[float]](), list[list[float]]()
    for _ in range(turns):
        own.append(network.profile(size, rounds))
        if defaults is not None:
            others.append(defaults.profile(size, rounds))
    seconds, before = map(_medians, (own, others))
    layers = network.layers(size)
    if len(before) != len(layers):  # the defaults alone would have other steps
        before = [None] * len(layers)
    steps = tuple(
        StepTime(layer["name"], layer.get("spec") or layer["operators"], layer.get("schedule", ""), time, *others)
        for layer, time, *others in zip(layers, seconds, before, network.predicted(size), strict=True)
    )
    label = network.built.code.sizes[size].label
    return NetworkProfile(f"{network.name} {label}".rstrip(), network.threads, steps)


def _medians(turns: Sequence[Sequence[float]]) -> list[Any]:
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def profile_page(profiles: Sequence[NetworkProfile]) -> str:
    """Tables in Markdown."""
    lines: list[str] = []
    for profile in profiles:
        header = ["step", "computes", "by", "µs>", "share>", "default µs>", "predicted µs>"]
        cells = [
            [
                step.name,
                step.computes,
                step.schedule,
                microseconds(step.seconds),
                f"{step.seconds / profile.seconds:.1%}",
                microseconds(step.before),
                microseconds(step.predicted),
            ]
            for step in profile.steps
        ]
        lines += [f"# {profile.title}", "", f"{profile.headline}.", "", *markdown_table((header, cells)), ""]
    return "\n".join(lines)
