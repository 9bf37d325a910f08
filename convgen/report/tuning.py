"""What tuning did, from its records alone: as facts, as one JSON document and as Markdown.

The page for people is drawn by :mod:`convgen.report.page`. Records are read problem by problem, and
only what is shown of them is kept, so that a store of any size takes the memory of its largest layer.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
import statistics
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import BuildError, MeasureError, RecordError, SpecError
from ..formats.entries import SpecEntry
from ..hardware.machine import machine, measured
from ..hardware.roofline import roofline
from ..problem.spec import ConvSpec
from ..records.answer import is_final, preferred
from ..records.record import TuningRecord
from ..records.store import RecordStore
from ..report import tables as report
from .rows import Row, RowFile

#: The peer that final comparisons time.
ONNXRUNTIME = "onnxruntime"
DEFAULT = "default"
NOT_MEASURED = "not measured"
#: Points a line over time is drawn with, at most.
BINS = 240


# ---- facts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """Another's time over the tuned kernel's, with its 95 % interval where both were timed in turn."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` than the other beyond the interval; ``even`` within it, empty without one."""
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
        """The first line of what it said, without the names of layer and candidate."""
        said = self.error.replace(f"{self.spec}: ", "")
        said = re.sub(rf"{re.escape(self.schedule)}\([^()]*\) ?", "", said).strip()
        return said.splitlines()[0][:300] if said else "no message"

    @property
    def command(self) -> str:
        """What repeats it in a shell."""
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
        names: (model, name) of each place; ``count``: how often it occurs in all.
        trials, failures: of the search.
        cost: seconds spent on search and comparison, None where no record has it; ``costed`` trials do.
        search: seconds of each trial in order; NaN where it failed.
        default_trial, winner_trial: where these candidates were tried, from 1; None where unknown.
        seconds, schedule, picks: what won; None and empty where nothing did.
        compared: whether it won a comparison in turn, not just the search.
        kept_default: whether that is the default: nothing was faster.
        others: the default and the peers.
        limit: least seconds by the roofline, and what bounds them.
        older: records of other versions, which are not part of this.
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
    older: int = 0

    @property
    def trials(self) -> int:
        return len(self.search)

    @property
    def kind(self) -> str:
        """Its class; see :func:`convgen.report.tables.class_of`."""
        return report.class_of(self.spec) if self.spec else "of another version"

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
    """The time of another on the layers it has: ``seconds``, and ``own`` of the tuned kernels on the same."""

    seconds: float
    own: float
    layers: int

    @property
    def ratio(self) -> float:
        return self.seconds / self.own


@dataclass(frozen=True)
class Total:
    """All convolutions of a model: each layer's time with its count, of the ``tuned`` layers of ``layers``."""

    name: str
    layers: int
    tuned: int
    convolutions: int
    seconds: float
    others: Mapping[str, Sum]

    def is_whole(self, name: str) -> bool:
        """Whether another has a time for every layer that was tuned."""
        return self.others[name].layers == self.tuned

    def to_dict(self) -> dict[str, Any]:
        others = {name: {**vars(found), "ratio": found.ratio} for name, found in self.others.items()}
        return {**vars(self), "others": others}


@dataclass(frozen=True)
class Drift:
    """The reference kernel's time over its first, in order: medians, lowest and highest of up to :data:`BINS` parts."""

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
            "peak_flops": self.peak,
            "no_roofline": self.no_limit or None,
        }


@dataclass(frozen=True)
class TuningReport:
    """What there is to say about a store or a job.

    Attributes:
        title: what was tuned.
        notes: what a reader should know, such as what was left out.
    """

    title: str
    settings: list[Setting]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title, "notes": self.notes, "settings": [found.to_dict() for found in self.settings]}


# ---- from records -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Layers that belong together, under a name."""

    name: str
    entries: Sequence[SpecEntry]


def gather(
    store: RecordStore,
    models: Sequence[Model] = (),
    *,
    title: str | None = None,
    targets: Collection[str] = (),
    threads: Collection[int] = (),
    rows: Sequence[Row] = (),
    notes: Sequence[str] = (),
) -> TuningReport:
    """The facts of a store.

    Args:
        models: what the report is about; without any, every layer of the store.
        targets, threads: only what was tuned for one of these; none: for any.
        rows: of benches, for times of other libraries on the same machine.
        notes: what else the reader should know.

    Raises:
        RecordError: the store cannot be read, or holds nothing of what is asked for.
    """
    wanted = {entry.spec.descriptor for model in models for entry in model.entries}
    settings: dict[tuple[str, str, int], Setting] = {}
    drifts: dict[tuple[str, str, int], list[tuple[str, float]]] = {}
    left_out = 0
    for spec, target, hardware, count in store.problems():
        key = target, hardware, count
        if (targets and key[0] not in targets) or (threads and key[2] not in threads):
            continue
        if models and spec not in wanted:
            left_out += 1
            continue
        records = store.trials(spec=spec, target=key[0], hardware=key[1], threads=key[2])
        if records:  # none where somebody has pruned the store meanwhile
            setting = settings.setdefault(key, Setting(*key))
            _add(setting, spec, records, drifts.setdefault(key, []))
    if not settings:
        raise RecordError(f"{store.path}: expected records of {_asked(models, targets, threads)}, found none")

    said = list(notes)
    if left_out:
        said.append(
            f"The store has {report.plural(left_out, 'more problem')} (layer, target, threads) of no model here."
        )
    used = 0
    found = sorted(settings.items(), key=lambda item: (item[0][0], item[0][1], item[0][2]))
    for key, setting in found:
        setting.drift = Drift.of([drift for _, drift in sorted(drifts[key])])
        _place(setting, models)
        used += _compare(setting, rows)
        _limits(setting, rows)
        setting.totals = list(_totals(setting, models))
    if unused := len(rows) - used:
        said.append(f"{report.plural(unused, 'row')} of benches left out: of other machines, threads or layers.")
    return TuningReport(title or _title(models, store), [setting for _, setting in found], said)


def read_rows(path: Path) -> list[Row]:
    """The rows that a bench wrote, with warm caches.

    Raises:
        RecordError: they are none.
    """
    try:
        rows = [row for row in RowFile(path).rows.values() if row.mode == "warm"]
        for row in rows:  # what is asked of them below
            _ = row.spec, row.peers, row.values["fingerprint"]
        if not rows:
            raise ValueError("no rows with warm caches")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path}: expected rows of a bench, one JSON object per line, found {error!r}") from error
    return rows


def _asked(models: Sequence[Model], targets: Iterable[str], threads: Iterable[int]) -> str:
    words = [", ".join(model.name for model in models) or "some layer"]
    words += [f"for {' or '.join(targets)}"] if targets else []
    words += [f"with {' or '.join(map(str, threads))} threads"] if threads else []
    return " ".join(words)


def _title(models: Sequence[Model], store: RecordStore) -> str:
    return ", ".join(model.name for model in models) or store.path.name


def _add(setting: Setting, descriptor: str, records: list[TuningRecord], drifts: list[tuple[str, float]]) -> None:
    """What is shown of a problem's records, which are ordered by time.

    Of several versions the newest count: figures of different code are no comparison.
    """
    newest = records[-1].versions
    searched = [record for record in records if not is_final(record)]
    of = searched[-1].versions if searched else newest
    trials = [record for record in searched if record.versions == of]
    current = [record for record in records if record.versions == newest]
    layer = Layer(descriptor, _parsed(descriptor), newest, records[0].when)
    layer.older = sum(record.versions not in (newest, of) for record in records)

    places: dict[str, int] = {}  # trial key -> the number of its trial
    for record in trials:
        attempt = layer.attempts.setdefault(record.schedule, Attempt())
        attempt.trials += 1
        layer.search.append(record.seconds or math.nan)
        places.setdefault(record.trial_key, layer.trials)
        if record.seconds is None:
            attempt.failures += 1
            layer.failures[record.outcome] += 1
        elif record.seconds < (attempt.seconds or math.inf):
            attempt.seconds = record.seconds
        layer.costed += _number(record, "cost") is not None
    for record in [*trials, *(record for record in current if is_final(record))]:
        if (cost := _number(record, "cost")) is not None:
            layer.cost = (layer.cost or 0.0) + cost
        if record.seconds is None:
            named = (descriptor, record.target, record.threads, record.schedule, record.picks)
            setting.failures.append(Failure(*named, record.outcome, record.error, record.when))
        if (drift := _number(record, "drift")) is not None:
            drifts.append((record.when, drift))
        note = record.note or {}
        setting.jobs.update([note["job"]] if isinstance(note.get("job"), str) else [])
        setting.devices.update([note["device"]] if isinstance(note.get("device"), str) else [])
    setting.first = min(setting.first or records[0].when, records[0].when)
    setting.last = max(setting.last, records[-1].when)

    if winner := preferred(current):
        layer.seconds, layer.schedule, layer.picks = winner.seconds, winner.schedule, winner.picks
        layer.compared = is_final(winner)
        layer.winner_trial = places.get(winner.trial_key)
        for name in (DEFAULT, ONNXRUNTIME):
            if other := _other(winner, name):
                layer.others[name] = other
        if default := _default_of(current, winner):
            layer.default_trial = places.get(default.trial_key)
            layer.kept_default = default.trial_key == winner.trial_key
    setting.layers.append(layer)


def _default_of(records: Sequence[TuningRecord], winner: TuningRecord) -> TuningRecord | None:
    """The default's record in the winner's comparison: the one with the time the winner's note gives it."""
    seconds = _number(winner, "default_seconds")
    return next((record for record in records if is_final(record) and record.seconds == seconds), None)


def _other(winner: TuningRecord, name: str) -> Other | None:
    """What the comparison says of the default or ONNX Runtime."""
    seconds = _number(winner, f"{name}_seconds")
    if seconds is None or winner.seconds is None:
        return None
    interval = (winner.note or {}).get(f"ratio_{name}")
    if isinstance(interval, list) and len(interval) == 3 and all(_is_positive(value) for value in interval):
        return Other(seconds, Ratio(*interval))
    return Other(seconds, Ratio(seconds / winner.seconds))


def _number(record: TuningRecord, name: str) -> float | None:
    """A positive number of a record's note; notes of elsewhere may hold anything."""
    value = (record.note or {}).get(name)
    return float(value) if _is_positive(value) else None  # type: ignore[arg-type]


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _parsed(descriptor: str) -> ConvSpec | None:
    try:
        return ConvSpec.parse(descriptor)
    except SpecError:  # of another version
        return None


# ---- models, peers, limits --------------------------------------------------------------------


def _place(setting: Setting, models: Sequence[Model]) -> None:
    """Give the layers their names and counts, in the models' order; without models, in that of time."""
    if not models:
        setting.layers.sort(key=lambda layer: (layer.when, layer.descriptor))
        return
    known = {layer.descriptor: layer for layer in setting.layers}
    order = dict.fromkeys(entry.spec.descriptor for model in models for entry in model.entries)
    setting.layers = [known[descriptor] for descriptor in order if descriptor in known]
    for layer in setting.layers:
        layer.count = 0
    for model in models:
        for entry in model.entries:
            descriptor = entry.spec.descriptor
            if layer := known.get(descriptor):  # type: ignore[assignment]
                layer.count += entry.count
                layer.names += [(model.name, name) for name in entry.names]
            else:
                setting.missing.append((model.name, descriptor))


def _compare(setting: Setting, rows: Sequence[Row]) -> int:
    """Add the peers that benches timed on the same machine; returns how many rows were used."""
    layers = {layer.descriptor: layer for layer in setting.layers}
    used = 0
    for row in rows:
        layer = layers.get(row.values["spec"])
        if layer is None or row.threads != setting.threads or row.values["fingerprint"] != setting.hardware:
            continue
        used += 1
        setting.cpu = setting.cpu or str(row.values.get("cpu") or "") or None
        for name, seconds in row.peers.items():
            if seconds and layer.seconds and name not in layer.others:
                layer.others[name] = Other(seconds, Ratio(seconds / layer.seconds), apart=True)
    return used


def _limits(setting: Setting, rows: Sequence[Row]) -> None:
    """Add the rooflines: of this machine, where it is the records' one, else those that benches noted."""
    if machine().fingerprint == setting.hardware:
        setting.cpu = machine().cpu
        try:
            facts = measured(setting.threads)
        except (BuildError, MeasureError) as error:
            setting.no_limit = f"this machine's peak could not be measured: {str(error).splitlines()[0]}"
            return
        setting.peak = facts.peak
        for layer in setting.layers:
            if layer.spec:
                found = roofline(layer.spec, setting.threads, found=facts)
                layer.limit = found.seconds, found.limited_by
        return
    noted = {
        row.values["spec"]: row.values["roofline"]
        for row in rows
        if row.values.get("roofline")
        and (row.values["fingerprint"], row.threads) == (setting.hardware, setting.threads)
    }
    for layer in setting.layers:
        if limit := noted.get(layer.descriptor):
            layer.limit = limit["seconds"], limit["limited_by"]
            setting.peak = limit.get("peak_flops")
    if not noted:
        setting.no_limit = "the records are of another machine than this one, whose peak is not known"


def _totals(setting: Setting, models: Sequence[Model]) -> Iterator[Total]:
    layers = {layer.descriptor: layer for layer in setting.layers}
    if not models:
        yield _total("All layers, each once", [(layer, 1) for layer in setting.layers], len(setting.layers))
    for model in models:
        entries = [(layers.get(entry.spec.descriptor), entry.count) for entry in model.entries]
        yield _total(model.name, [(layer, count) for layer, count in entries if layer], len(entries))


def _total(name: str, layers: Sequence[tuple[Layer, int]], known: int) -> Total:
    tuned = [(layer, layer.seconds, count) for layer, count in layers if layer.seconds]
    names = dict.fromkeys(other for layer, _, _ in tuned for other in layer.others)
    others = {}
    for other in sorted(names, key=lambda found: (found != DEFAULT, found != ONNXRUNTIME)):
        both = [(layer.others[other].seconds * n, own * n) for layer, own, n in tuned if other in layer.others]
        theirs, own = (math.fsum(column) for column in zip(*both, strict=True))
        others[other] = Sum(theirs, own, len(both))
    seconds = math.fsum(own * count for _, own, count in tuned)
    return Total(name, known, len(tuned), sum(count for _, _, count in tuned), seconds, others)


# ---- which schedule won where -----------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A schedule on a class of layers.

    Attributes:
        wins: layers it won, of the ``layers`` it was tried on.
        behind: geometric mean of its best time over the best of any schedule; None where all its trials failed.
    """

    wins: int
    layers: int
    behind: float | None


def wins(layers: Iterable[Layer]) -> dict[str, dict[str, Cell]]:
    """Class of layers -> schedule -> how it did there; schedules with most wins first."""
    groups: dict[str, list[Layer]] = {name: [] for name in report.CLASSES}
    for layer in layers:
        if layer.attempts:
            groups.setdefault(layer.kind, []).append(layer)
    found = {}
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
            cells[schedule] = Cell(won, len(tried), report.geometric_mean(behind))
        if cells:
            ordered = sorted(cells.items(), key=lambda item: (-item[1].wins, item[1].behind or math.inf))
            found[kind] = dict(ordered)
    return found


# ---- failures ---------------------------------------------------------------------------------


def grouped(failures: Iterable[Failure]) -> list[list[Failure]]:
    """Failures that ended alike and said the same but for numbers, the largest group first."""
    groups: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        groups.setdefault((failure.outcome, re.sub(r"[\d.,()\s-]+", " ", failure.message)), []).append(failure)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0].outcome))


# ---- words ------------------------------------------------------------------------------------


def picks_text(picks: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in picks.items())


def span(seconds: float | None) -> str:
    """``2 h 5 min``: a time people wait."""
    if seconds is None:
        return NOT_MEASURED
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def machine_text(setting: Setting) -> str:
    return f"{setting.cpu} ({setting.hardware})" if setting.cpu else setting.hardware


def versions_text(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def failures_text(failures: Mapping[str, int]) -> str:
    """``3 crash, 1 wrong``."""
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in Counter(failures).most_common())


def facts(setting: Setting) -> dict[str, str]:
    """What was measured where, when and at what cost."""
    begin, end = (when[:16].replace("T", " ") for when in (setting.first, setting.last))
    lasted = (datetime.fromisoformat(setting.last) - datetime.fromisoformat(setting.first)).total_seconds()
    spent = span(setting.cost)
    if setting.cost is not None and setting.costed < setting.trials:
        spent += f" on {setting.costed} of the trials"
    failed = sum(setting.outcomes.values())
    found = {
        "machine": machine_text(setting),
        "target": setting.target,
        "threads": str(setting.threads),
        "versions": "; ".join(map(versions_text, setting.versions)),
        "measured": f"{begin} to {end} UTC ({span(lasted)})",
        "trials": f"{setting.trials:,} on {report.plural(len(setting.layers), 'layer')}",
        "failures": f"{failed}: {failures_text(setting.outcomes)}" if failed else "none",
        "spent on trials": spent,
    }
    if setting.peak:
        found["measured peak"] = f"{setting.peak / 1e9:.0f} GFLOP/s"
    if setting.devices:
        found["devices"] = ", ".join(f"{name} ({count})" for name, count in setting.devices.most_common())
    if setting.older:
        found["left out"] = report.plural(setting.older, "record") + " of older versions of convgen, TVM or LLVM"
    return found


def headline(total: Total) -> str:
    """What tuning brought, in a sentence."""
    if not total.tuned:
        return f"{total.name}: no layer has a kernel yet."
    said = f"{total.name}: {report.milliseconds(total.seconds)} ms tuned"
    parts = []
    for name, found in total.others.items():
        whole = "" if total.is_whole(name) else f" on {found.layers} of {report.plural(total.tuned, 'layer')}"
        label = "by default" if name == DEFAULT else f"with {name}"
        parts.append(f"{report.milliseconds(found.seconds)} ms {label}{whole} ({found.ratio:.2f}×)")
    part = "" if total.tuned == total.layers else f" Of {total.layers} layers {total.tuned} were tuned."
    return f"{said}, {', '.join(parts)}.{part}" if parts else f"{said}.{part}"


def limit_text(layer: Layer) -> str:
    return f"{layer.of_limit:.0%} {layer.limit[1]}" if layer.of_limit and layer.limit else NOT_MEASURED


def drift_text(drift: Drift) -> str:
    """The range of the reference kernel's time."""
    low, high, middle = min(drift.lows), max(drift.highs), statistics.median(drift.medians)
    return f"{low:.2f} to {high:.2f} of its first time in the run, {middle:.2f} in the median of {drift.count:,} trials"


def names_text(layer: Layer, models: int) -> str:
    """Where the layer occurs, the models named where there are several."""
    names = [f"{model}: {name}" if models > 1 else name for model, name in layer.names]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} ×{layer.count}".strip() if layer.count > 1 else shown


# ---- Markdown ---------------------------------------------------------------------------------


def markdown(found: TuningReport) -> str:
    """The report as a Markdown page."""
    lines = [f"# Tuning: {found.title}", ""]
    for setting in found.settings:
        heading = f"{setting.cpu or setting.hardware}, {report.plural(setting.threads, 'thread')}"
        lines += [f"## {heading}", "", *(f"- {name}: {value}" for name, value in facts(setting).items()), ""]
        lines += [*(headline(total) for total in setting.totals), ""]
        lines += ["### Layer by layer", "", *report.markdown(_layers(setting)), ""]
        if setting.no_limit:
            lines += [f"Of limit {NOT_MEASURED}: {setting.no_limit}.", ""]
        if setting.missing:
            lines += [*(f"- no record: {model} `{spec}`" for model, spec in setting.missing), ""]
        lines += ["### Which schedule won where", "", *report.markdown(_wins(setting)), ""]
        lines += ["### Failures", ""]
        for group in grouped(setting.failures):
            lines += [f"{len(group)} × {group[0].outcome}: {group[0].message}", ""]
            lines += [*(f"    {failure.command}" for failure in group), ""]
        lines += [] if setting.failures else ["None.", ""]
        drift = drift_text(setting.drift) if setting.drift else NOT_MEASURED
        lines += [f"The reference kernel took {drift}." if setting.drift else f"Drift of the machine: {drift}.", ""]
    return "\n".join([*lines, *found.notes, ""]).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _layers(setting: Setting) -> report.Table:
    peers, models = setting.peers, len({model for layer in setting.layers for model, _ in layer.names})
    header = ["layer", "×>", "tuned µs>", "default / tuned>", *(f"{peer} / tuned>" for peer in peers)]
    header += ["of limit>", "schedule", "trials>", "failed>"]
    cells = []
    for layer in setting.layers:
        ratios = [layer.others.get(name) for name in (DEFAULT, *peers)]
        name = names_text(layer, models)
        cells.append(
            [
                f"`{layer.descriptor}`" + (f" {name}" if name else ""),
                str(layer.count),
                report.microseconds(layer.seconds),
                *(str(other.ratio) if other else NOT_MEASURED for other in ratios),
                limit_text(layer),
                f"{layer.schedule}({picks_text(layer.picks)})" if layer.schedule else "–",
                str(layer.trials),
                failures_text(layer.failures) or "0",
            ]
        )
    return header, cells


def _wins(setting: Setting) -> report.Table:
    found = wins(setting.layers)
    header = ["class", "schedule", "layers>", "wins>", "best time / winner's>"]
    return header, [
        [kind, name, str(cell.layers), str(cell.wins), report.factor(cell.behind)]
        for kind, cells in found.items()
        for name, cell in cells.items()
    ]
