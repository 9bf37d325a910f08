"""Results of a bundle's runner -> the records that measuring live would have made."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ...errors import MeasureError, RecordError, SpecError
from ...hardware.discover import target_families
from ...measure.standalone.bundle import IDENTITY
from ...measure.standalone.results import FORMAT, digest
from ...problem.spec import ConvSpec
from ...records.kinds import RESULTS, found_instead
from ...records.outcome import Result
from ...records.record import OUTCOMES, TuningRecord, load_json
from ...records.store import RecordStore
from ..final import judge
from .archive import read_manifest
from .machine import machine_from_facts
from .packing import trial_id

_LINE_BYTES = 1 << 24
_COMMON = {"kind", "when", "digest"}
_HEADER = _COMMON | {"format", "manifest", "facts", "python"}
_TRIAL = _COMMON | {"run", "key", "library_sha256", "outcome", "samples", "error", "cost", "reference", *IDENTITY}
_FINAL = _COMMON | {"run", "group", "trials", "samples"}
_SANITIZED = _COMMON | {"run", "key", "tool", "found", "said"}
_PEER = _COMMON | {"run", "group", "peer", "samples", "versions"}
_FINALIST = {"key", "default", *IDENTITY}


def import_results(path: Path, store: RecordStore, bundle: Path | None = None) -> tuple[int, int]:
    """Add the records of a runner's results to a store, all or none; returns how many there are, and how many are new.

    Raises:
        RecordError: see :func:`read_results`; or the store cannot be written.
    """
    records = read_results(path, bundle)
    return len(records), store.add_all(records)


def read_results(path: Path, bundle: Path | None = None) -> list[TuningRecord]:
    """The records that measuring live would have made.

    Args:
        path: what the runner wrote.
        bundle: what the runner ran; where given, results must be of its trials and libraries.

    Raises:
        RecordError: a line is not what a runner writes, or was changed since; names the file, line and field.
        ExportError: the bundle cannot be read.
    """
    if instead := found_instead(path, RESULTS):
        raise RecordError(f"{path}: expected {RESULTS.name}, {instead}")
    manifest = read_manifest(bundle) if bundle is not None else None
    reader = _Reader(manifest)
    try:
        with path.open("rb") as file:
            for number, data in enumerate(iter(lambda: file.readline(_LINE_BYTES + 1), b""), 1):
                try:
                    reader.line(_parsed(data))
                except (RecordError, MeasureError) as error:
                    raise RecordError(f"{path}: line {number}: {error}") from None
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error
    if not reader.run:
        raise RecordError(f"{path}: expected results, found an empty file")
    return reader.records


def _parsed(data: bytes) -> dict[str, Any]:
    """A line as an object whose digest is right."""
    if len(data) > _LINE_BYTES:
        raise RecordError(f"expected at most {_LINE_BYTES} bytes, found more")
    if not data.endswith(b"\n"):
        raise RecordError("expected a whole line, found one cut short: run the bundle again, it goes on from there")
    try:
        values = load_json(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RecordError(f"expected a JSON object, found {type(values).__name__}")
    fields = {"run": _HEADER, "trial": _TRIAL, "final": _FINAL, "sanitized": _SANITIZED, "peer": _PEER}
    _expect(values.get("kind") in fields, "kind", f"one of {', '.join(fields)}", values.get("kind"))
    _names("", values, fields[values["kind"]])
    try:
        found = digest(values)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"digest: {error}") from None
    _expect(values["digest"] == found, "digest", f"that of the line, {found}", values["digest"])
    return values


def _names(prefix: str, values: dict[str, Any], expected: Collection[str]) -> None:
    for name in sorted(values.keys() ^ set(expected)):
        if name in values:
            raise RecordError(f"{prefix}{name}: expected one of {', '.join(sorted(expected))}, found an unknown field")
        raise RecordError(f"{prefix}{name}: expected a value, found none")


def _expect(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise RecordError(f"{name}: expected {expected}, found {found!r:.120}")


def _samples(name: str, values: object) -> tuple[float, ...]:
    _expect(isinstance(values, list), name, "a list of seconds", values)
    for value in values:  # type: ignore[attr-defined]
        good = type(value) in (int, float) and math.isfinite(value) and value > 0
        _expect(good, name, "positive numbers of seconds", value)
    return tuple(values)  # type: ignore[arg-type]


class _Reader:
    """Results line by line -> records."""

    def __init__(self, manifest: tuple[str, dict[str, Any]] | None) -> None:
        self.manifest = manifest
        self.run = ""
        #: Fingerprint of what the machine has to run kernels on, by family of targets.
        self.hardware: dict[str, str] = {}
        self.reference: float | None = None
        self.keys: set[str] = set()
        self.groups: set[int] = set()
        self.records: list[TuningRecord] = []

    def line(self, values: dict[str, Any]) -> None:
        """Take the next line.

        Raises:
            RecordError: a field is not what it must be.
            MeasureError: a fact of the machine is not.
        """
        if values["kind"] == "run":
            self._header(values)
            return
        _expect(bool(self.run), "kind", "the run's own line first", values["kind"])
        _expect(values["run"] == self.run, "run", f"the digest of the first line, {self.run}", values["run"])
        if values["kind"] == "trial":
            self._trial(values)
        elif values["kind"] == "final":
            self._final(values)
        elif values["kind"] == "sanitized":  # what a checker found makes no record of time, nor does cuDNN's
            _expect(values["key"] in self.keys, "key", "that of a trial before it", values["key"])

    def _header(self, values: dict[str, Any]) -> None:
        _expect(not self.run, "kind", "one run in a file", "another one")
        _expect(values["format"] == FORMAT, "format", str(FORMAT), values["format"])
        if self.manifest is not None:
            expected = self.manifest[0]
            _expect(values["manifest"] == expected, "manifest", f"the bundle's, {expected}", values["manifest"])
        machine = machine_from_facts(values["facts"])
        families = target_families().items()
        self.hardware = {name: found for name, family in families if (found := family.fingerprint(machine))}
        self.run = values["digest"]

    def _identity(self, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """The fields that identify a trial, checked as far as they can be without the schedules."""
        identity = {name: values[name] for name in IDENTITY}
        text = identity["spec"]
        try:
            descriptor = ConvSpec.parse(text).descriptor if isinstance(text, str) else None
        except SpecError as error:
            raise RecordError(f"{prefix}spec: {error}") from None
        _expect(descriptor == text, f"{prefix}spec", "a descriptor in its one spelling", text)
        key = trial_id(identity)
        _expect(values["key"] == key, f"{prefix}key", f"the trial's own, {key}", values["key"])
        if self.manifest is not None:
            _expect(key in self.manifest[1]["by_key"], f"{prefix}key", "a trial of the bundle", key)
        return identity

    def _trial(self, values: dict[str, Any]) -> None:
        identity = self._identity(values)
        key, outcome, reference, cost = (values[name] for name in ("key", "outcome", "reference", "cost"))
        _expect(key not in self.keys, "key", "each trial once", key)
        self.keys.add(key)
        if self.manifest is not None:
            library = self.manifest[1]["by_key"][key]["library_sha256"]
            _expect(values["library_sha256"] == library, "library_sha256", str(library), values["library_sha256"])
        _expect(outcome in OUTCOMES, "outcome", f"one of {OUTCOMES}", outcome)
        samples = _samples("samples", values["samples"])
        _expect(bool(samples) == (outcome == "ok"), "samples", "times where, and only where, it is ok", samples)
        good = type(cost) in (int, float) and math.isfinite(cost) and cost >= 0
        _expect(good, "cost", "seconds", cost)
        note = {"cost": float(cost)}
        if reference is not None:
            _samples("reference", [reference])
            self.reference = self.reference or reference
            note["drift"] = reference / self.reference
        self._add(identity, values["when"], outcome, samples, values["error"], note)

    def _final(self, values: dict[str, Any]) -> None:
        """The comparison of the leaders; see :func:`convgen.tuning.final.final_comparison`."""
        group, trials, samples = values["group"], values["trials"], values["samples"]
        _expect(type(group) is int and group not in self.groups, "group", "each group once", group)
        self.groups.add(group)
        _expect(isinstance(trials, list), "trials", "a list", trials)
        _expect(isinstance(samples, list) and len(samples) == len(trials), "samples", "a list per trial", samples)
        identities, times, defaults = [], [], []
        for i, trial in enumerate(trials):
            _expect(isinstance(trial, dict), f"trials[{i}]", "an object", trial)
            _names(f"trials[{i}].", trial, _FINALIST)
            identities.append(self._identity(trial, f"trials[{i}]."))
            times.append(_samples(f"samples[{i}]", samples[i]))
            _expect(bool(times[i]), f"samples[{i}]", "times", samples[i])
            defaults.append(trial["default"] is True)
        same = {(trial["spec"], trial["target"], trial["threads"]) for trial in identities}
        _expect(len(same) <= 1, "trials", "one layer, target and thread count", sorted(map(str, same)))
        _, notes = judge(times, defaults.index(True) if True in defaults else None)
        for identity, taken, note in zip(identities, times, notes, strict=True):
            self._add(identity, values["when"], "ok", taken, "", note)

    def _add(
        self,
        identity: dict[str, Any],
        when: Any,
        outcome: str,
        samples: tuple[float, ...],
        error: Any,
        note: dict[str, Any],
    ) -> None:
        seconds = Result(outcome, samples).seconds
        family = str(identity["target"]).partition(":")[0]
        expected = f"one of {', '.join(self.hardware)}, which the machine has"
        _expect(family in self.hardware, "target", expected, family)
        self.records.append(
            TuningRecord(
                **identity,
                hardware=self.hardware[family],
                outcome=outcome,
                seconds=seconds,
                samples=samples,
                error=error,
                when=when,
                note=note,
            )
        )
