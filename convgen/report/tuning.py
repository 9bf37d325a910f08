"""What tuning did: the facts of a record store, as objects and as one JSON document.

:mod:`convgen.report.gather` reads them from records, :mod:`convgen.report.tuning_text` writes them as Markdown and
:mod:`convgen.report.tuning_page` as a page.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..measure.busy import RELIABLE
from ..problem.spec import ConvSpec
from .tables import CLASSES, class_of, geometric_mean
from .words import picks_text

#: The peer that final comparisons time.
ONNXRUNTIME = "onnxruntime"
DEFAULT = "default"
#: Points a line over time is drawn with, at most.
BINS = 240


@dataclass(frozen=True)
class Ratio:
    """The time of the default or of a peer over the tuned kernel's, with its 95 % interval where both ran in turn."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` where the interval excludes 1, ``even`` where it does not; empty without one."""
        if self.low is None or self.high is None:
            return ""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "even"

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.2f}–{self.high:.2f})"
        return f"{self.value:.2f}{interval}"


@dataclass(frozen=True)
class Other:
    """What a layer's tuned kernel is compared with: seconds and ratio. ``apart``: timed in another run."""

    seconds: float
    ratio: Ratio
    apart: bool = False


@dataclass
class Attempt:
    """What one schedule did on a layer: trials, those that failed, and its best seconds."""

    trials: int = 0
    failures: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Failure:
    """A trial that failed."""

    spec: str
    target: str
    threads: int
    schedule: str
    picks: Mapping[str, Any]
    outcome: str
    error: str
    when: str

    @property
    def message(self) -> str:
        """The first line of the error, without the names of layer and candidate."""
        text = self.error.replace(f"{self.spec}: ", "")
        text = re.sub(rf"{re.escape(self.schedule)}\([^()]*\) ?", "", text).strip()
        return text.splitlines()[0][:300] if text else "no message"

    @property
    def command(self) -> str:
        """The command that repeats the trial in a shell."""
        words = ["convgen", "validate", self.spec, "--schedule", self.schedule]
        if self.picks:
            words += ["--picks", picks_text(self.picks)]
        return shlex.join([*words, "--threads", str(self.threads), "--target", self.target])

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "picks": dict(self.picks), "command": self.command}


@dataclass
class Layer:
    """One layer on one machine.

    Attributes:
        spec: None where this version cannot read the descriptor.
        names: (model, name) of each place where the layer occurs; ``count``: how often it occurs in all models.
        trials, failures: how many the search made.
        cost: seconds spent on search and comparison, as ``costed`` trials say; None where no record says it.
        search: seconds of each trial in order; NaN for a failed one.
        default_trial, winner_trial: numbers of the trials of these candidates, from 1; None where not known.
        seconds, schedule, picks: the winner; None and empty where there is no winner.
        compared: whether the winner won a comparison in turn, not just the search.
        kept_default: whether the winner is the default: nothing was faster.
        others: what the default and the peers took.
        limit: least seconds by the roofline, and what bounds them.
        busy: the share of the CPUs that other programs used in the comparison that the winner won.
        older: how many records of other versions were left out.
    """

    descriptor: str
    spec: ConvSpec | None
    versions: Mapping[str, str]
    when: str
    names: list[tuple[str, str]] = field(default_factory=list)
    count: int = 1
    failures: Counter[str] = field(default_factory=Counter)
    cost: float | None = None
    costed: int = 0
    search: array[float] = field(default_factory=lambda: array("d"))
    attempts: dict[str, Attempt] = field(default_factory=dict)
    default_trial: int | None = None
    winner_trial: int | None = None
    seconds: float | None = None
    schedule: str = ""
    picks: Mapping[str, Any] = field(default_factory=dict)
    compared: bool = False
    kept_default: bool = False
    others: dict[str, Other] = field(default_factory=dict)
    limit: tuple[float, str] | None = None
    busy: float | None = None
    older: int = 0

    @property
    def trials(self) -> int:
        return len(self.search)

    @property
    def kind(self) -> str:
        """Its class; see :func:`convgen.report.tables.class_of`."""
        return class_of(self.spec) if self.spec else "of another version"

    @property
    def of_limit(self) -> float | None:
        """The roofline's least time over the time taken."""
        return self.limit[0] / self.seconds if self.limit and self.seconds else None

    @property
    def fastest(self) -> float | None:
        """Of the search, in seconds."""
        return min((attempt.seconds for attempt in self.attempts.values() if attempt.seconds), default=None)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """The trials that were faster than all before, from 1, with their seconds."""
        points: list[tuple[int, float]] = []
        for number, seconds in enumerate(self.search, 1):
            if seconds < (points[-1][1] if points else math.inf):
                points.append((number, seconds))
        return points

    def to_dict(self) -> dict[str, Any]:
        return {
            "spec": self.descriptor,
            "class": self.kind,
            "names": [{"model": model, "name": name} for model, name in self.names],
            "count": self.count,
            "seconds": self.seconds,
            "compared": self.compared,
            "kept_default": self.kept_default,
            "schedule": self.schedule or None,
            "picks": dict(self.picks),
            "others": {
                name: {"seconds": other.seconds, "ratio": vars(other.ratio), "another_run": other.apart}
                for name, other in self.others.items()
            },
            "limit_seconds": self.limit[0] if self.limit else None,
            "limited_by": self.limit[1] if self.limit else None,
            "of_limit": self.of_limit,
            "busy": self.busy,
            "trials": self.trials,
            "failures": dict(self.failures),
            "cost_seconds": self.cost,
            "default_trial": self.default_trial,
            "winner_trial": self.winner_trial,
            "curve": [{"trial": number, "seconds": seconds} for number, seconds in self.curve],
            "schedules": {name: vars(attempt) for name, attempt in self.attempts.items()},
            "versions": dict(self.versions),
            "records_of_other_versions": self.older,
        }


@dataclass(frozen=True)
class Sum:
    """The time of the default or of a peer on the layers that it has times of: ``seconds``; and that of the tuned
    kernels on the same layers: ``own``.
    """

    seconds: float
    own: float
    layers: int

    @property
    def ratio(self) -> float:
        return self.seconds / self.own


@dataclass(frozen=True)
class Total:
    """All convolutions of a model: each layer's time with its count, of the ``tuned`` layers of ``layers``, of which
    ``searched`` have no final comparison: their times are of the search.
    """

    name: str
    layers: int
    tuned: int
    searched: int
    convolutions: int
    seconds: float
    others: Mapping[str, Sum]

    def is_whole(self, name: str) -> bool:
        """Whether the default or a peer has a time for every layer that was tuned."""
        return self.others[name].layers == self.tuned

    def to_dict(self) -> dict[str, Any]:
        others = {name: {**vars(other), "ratio": other.ratio} for name, other in self.others.items()}
        return {**vars(self), "others": others}


@dataclass(frozen=True)
class Drift:
    """How a reference kernel's time changed during a job: its times over the first, in order, as median, least and
    largest of up to :data:`BINS` parts.
    """

    count: int
    medians: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Drift | None:
        if not values:
            return None
        parts = min(BINS, len(values))
        cuts = [len(values) * i // parts for i in range(parts + 1)]
        bins = [values[begin:end] for begin, end in itertools.pairwise(cuts)]
        return cls(len(values), tuple(map(statistics.median, bins)), tuple(map(min, bins)), tuple(map(max, bins)))


@dataclass
class Busy:
    """How much of the CPUs other programs used while something was timed.

    Attributes:
        watched: how many measurements say it.
        disturbed: of these, how many had others use more than :data:`~convgen.measure.busy.RELIABLE`.
        most: the largest share.
    """

    watched: int = 0
    disturbed: int = 0
    most: float = 0.0

    def add(self, share: float) -> None:
        self.watched += 1
        self.disturbed += share > RELIABLE
        self.most = max(self.most, share)


@dataclass
class Setting:
    """Everything tuned for one target, on one kind of machine, with one number of threads.

    Attributes:
        cpu: the processor's name, where it is known.
        totals: of each model, or of all layers once.
        missing: (model, descriptor) of layers without a record.
        peak: f32 operations per second that the rooflines reckon with.
        no_limit: why there is no roofline, where there is none.
    """

    target: str
    hardware: str
    threads: int
    cpu: str | None = None
    layers: list[Layer] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    totals: list[Total] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    drift: Drift | None = None
    busy: Busy = field(default_factory=Busy)
    jobs: set[str] = field(default_factory=set)
    devices: Counter[str] = field(default_factory=Counter)
    first: str = ""
    last: str = ""
    peak: float | None = None
    no_limit: str = ""

    @property
    def trials(self) -> int:
        return sum(layer.trials for layer in self.layers)

    @property
    def outcomes(self) -> Counter[str]:
        """Failures by kind."""
        return sum((layer.failures for layer in self.layers), Counter())

    @property
    def cost(self) -> float | None:
        """Seconds spent on the trials; None where no record has them."""
        costs = [layer.cost for layer in self.layers if layer.cost is not None]
        return math.fsum(costs) if costs else None

    @property
    def costed(self) -> int:
        """Trials that say what they cost."""
        return sum(layer.costed for layer in self.layers)

    @property
    def older(self) -> int:
        return sum(layer.older for layer in self.layers)

    @property
    def versions(self) -> list[dict[str, str]]:
        """The distinct ones, those of most layers first."""
        counts = Counter(tuple(sorted(layer.versions.items())) for layer in self.layers)
        return [dict(items) for items, _ in counts.most_common()]

    @property
    def peers(self) -> list[str]:
        """Others than the default that some layer has, ONNX Runtime first."""
        names = dict.fromkeys(name for layer in self.layers for name in layer.others if name != DEFAULT)
        return sorted(names, key=lambda name: name != ONNXRUNTIME)

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "hardware": self.hardware,
            "cpu": self.cpu,
            "threads": self.threads,
            "versions": self.versions,
            "first": self.first,
            "last": self.last,
            "jobs": sorted(self.jobs),
            "devices": dict(self.devices),
            "trials": self.trials,
            "failures_by_outcome": dict(self.outcomes),
            "cost_seconds": self.cost,
            "trials_with_cost": self.costed,
            "records_of_other_versions": self.older,
            "totals": [total.to_dict() for total in self.totals],
            "layers": [layer.to_dict() for layer in self.layers],
            "layers_without_records": [{"model": model, "spec": spec} for model, spec in self.missing],
            "wins": {
                kind: {name: vars(cell) for name, cell in cells.items()} for kind, cells in wins(self.layers).items()
            },
            "failures": [failure.to_dict() for failure in self.failures],
            "drift": vars(self.drift) if self.drift else None,
            "busy": vars(self.busy),
            "peak_flops": self.peak,
            "no_roofline": self.no_limit or None,
        }


@dataclass(frozen=True)
class TuningReport:
    """What tuning did in a store or a job, per setting.

    Attributes:
        title: what was tuned.
        notes: what a reader should know, such as what was left out.
    """

    title: str
    settings: list[Setting]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title, "notes": self.notes, "settings": [setting.to_dict() for setting in self.settings]}


# ---- which schedule won where -----------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A schedule on a class of layers.

    Attributes:
        wins: how many layers the schedule won, of the ``layers`` that it was tried on.
        behind: geometric mean of its best time over the best of all schedules; None where all its trials failed.
    """

    wins: int
    layers: int
    behind: float | None


def wins(layers: Iterable[Layer]) -> dict[str, dict[str, Cell]]:
    """Class of layers -> schedule -> how the schedule did there; the schedules with most wins first."""
    groups: dict[str, list[Layer]] = {name: [] for name in CLASSES}
    for layer in layers:
        if layer.attempts:
            groups.setdefault(layer.kind, []).append(layer)
    cells_of = {}
    for kind, group in groups.items():
        cells = {}
        for schedule in dict.fromkeys(name for layer in group for name in layer.attempts):
            tried = [layer for layer in group if schedule in layer.attempts]
            behind = [
                seconds / fastest
                for layer in tried
                if (seconds := layer.attempts[schedule].seconds) and (fastest := layer.fastest)
            ]
            won = sum(layer.schedule == schedule for layer in group)
            cells[schedule] = Cell(won, len(tried), geometric_mean(behind))
        if cells:
            ordered = sorted(cells.items(), key=lambda item: (-item[1].wins, item[1].behind or math.inf))
            cells_of[kind] = dict(ordered)
    return cells_of


# ---- failures ---------------------------------------------------------------------------------


def grouped(failures: Iterable[Failure]) -> list[list[Failure]]:
    """Failures by outcome and message, where numbers in messages do not matter; the largest group first."""
    groups: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        groups.setdefault((failure.outcome, re.sub(r"[\d.,()\s-]+", " ", failure.message)), []).append(failure)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0].outcome))
