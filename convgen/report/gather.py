"""The facts of a record store about tuning.

Records are read problem by problem, and only what is shown of them is kept, so that a store of any size takes the
memory of its largest layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BuildError, MeasureError, RecordError, SpecError
from ..formats.entries import SpecEntry
from ..hardware.machine import machine, measured
from ..hardware.roofline import roofline
from ..problem.spec import ConvSpec
from ..records.answer import is_final, preferred
from ..records.record import TuningRecord
from ..records.store import RecordStore
from .rows import Row, RowFile
from .tuning import (
    DEFAULT,
    ONNXRUNTIME,
    Attempt,
    Drift,
    Failure,
    Layer,
    Other,
    Ratio,
    Setting,
    Sum,
    Total,
    TuningReport,
)
from .words import plural


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
        targets, threads: report only what was tuned for these; without any, everything.
        rows: of benches on the same machine, which add the times of other libraries.
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
        others = "; there are others: those of a model tuned as a whole are shown with --whole" if left_out else ""
        raise RecordError(f"{store.path}: expected records of {_asked(models, targets, threads)}, found none{others}")

    all_notes = list(notes)
    if left_out:
        all_notes.append(f"The store has {plural(left_out, 'more problem')} (layer, target, threads) of no model here.")
    used = 0
    ordered = sorted(settings.items())
    for key, setting in ordered:
        setting.drift = Drift.of([drift for _, drift in sorted(drifts[key])])
        _place(setting, models)
        used += _compare(setting, rows)
        _limits(setting, rows)
        setting.totals = list(_totals(setting, models))
    if unused := len(rows) - used:
        all_notes.append(f"{plural(unused, 'row')} of benches left out: of other machines, threads or layers.")
    return TuningReport(title or _title(models, store), [setting for _, setting in ordered], all_notes)


def read_rows(path: Path) -> list[Row]:
    """The rows that a bench wrote, with warm caches.

    Raises:
        RecordError: the file does not hold such rows.
    """
    try:
        rows = [row for row in RowFile(path).rows.values() if row.mode == "warm"]
        for row in rows:  # what reports ask of a row
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
    """Add a layer to a setting, from the records of its problem in the order in which they were added.

    Of several versions only the newest count: times of different code cannot be compared.
    """
    newest = records[-1].versions
    searched = [record for record in records if not is_final(record)]
    newest_searched = searched[-1].versions if searched else newest
    trials = [record for record in searched if record.versions == newest_searched]
    current = [record for record in records if record.versions == newest]
    layer = Layer(descriptor, _parsed(descriptor), newest, min(record.when for record in records))
    layer.older = sum(record.versions not in (newest, newest_searched) for record in records)

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
            trial = (descriptor, record.target, record.threads, record.schedule, record.picks)
            setting.failures.append(Failure(*trial, record.outcome, record.error, record.when))
        if (drift := _number(record, "drift")) is not None:
            drifts.append((record.when, drift))
        if (busy := _share(record)) is not None:
            setting.busy.add(busy)
        note = record.note or {}
        setting.jobs.update([note["job"]] if isinstance(note.get("job"), str) else [])
        setting.devices.update([note["device"]] if isinstance(note.get("device"), str) else [])
    times = [record.when for record in records]
    setting.first = min([*times, *filter(None, [setting.first])])
    setting.last = max([*times, setting.last])

    if winner := preferred(current):
        layer.seconds, layer.schedule, layer.picks = winner.seconds, winner.schedule, winner.picks
        layer.compared = is_final(winner)
        layer.busy = _share(winner)
        layer.winner_trial = places.get(winner.trial_key)
        for name in (DEFAULT, ONNXRUNTIME):
            if other := _other(winner, name):
                layer.others[name] = other
        if default := _default_of(current, winner):
            layer.default_trial = places.get(default.trial_key)
            layer.kept_default = default.trial_key == winner.trial_key
    setting.layers.append(layer)


def _default_of(records: Sequence[TuningRecord], winner: TuningRecord) -> TuningRecord | None:
    """The default's record in the winner's comparison: that with the time which the winner's note says."""
    seconds = _number(winner, "default_seconds")
    return next((record for record in records if is_final(record) and record.seconds == seconds), None)


def _other(winner: TuningRecord, name: str) -> Other | None:
    """What the winner's comparison says of the default or of ONNX Runtime."""
    seconds = _number(winner, f"{name}_seconds")
    if seconds is None or winner.seconds is None:
        return None
    interval = (winner.note or {}).get(f"ratio_{name}")
    if isinstance(interval, list) and len(interval) == 3 and all(_is_positive(value) for value in interval):
        return Other(seconds, Ratio(*interval))
    return Other(seconds, Ratio(seconds / winner.seconds))


def _share(record: TuningRecord) -> float | None:
    """The share of the CPUs that other programs used, from 0 to 1; a note from elsewhere may hold anything."""
    value = (record.note or {}).get("busy")
    return float(value) if value == 0 or (_is_positive(value) and value <= 1) else None  # type: ignore[arg-type,operator]


def _number(record: TuningRecord, name: str) -> float | None:
    """A positive number of a record's note; a note from elsewhere may hold anything."""
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
    """Give the layers their names and counts, and the models' order; without models, the order of time."""
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
    """Add the rooflines: this machine's where the records are of it, else those in the rows of benches."""
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
                least = roofline(layer.spec, setting.threads, found=facts)
                layer.limit = least.seconds, least.limited_by
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
    for other in sorted(names, key=lambda name: (name != DEFAULT, name != ONNXRUNTIME)):
        both = [(layer.others[other].seconds * n, own * n) for layer, own, n in tuned if other in layer.others]
        theirs, own = (math.fsum(column) for column in zip(*both, strict=True))
        others[other] = Sum(theirs, own, len(both))
    seconds = math.fsum(own * count for _, own, count in tuned)
    searched = sum(not layer.compared for layer, _, _ in tuned)
    return Total(name, known, len(tuned), searched, sum(count for _, _, count in tuned), seconds, others)
