"""Tuning records, and files of them: JSON lines.

A record says what one trial was (``trial_key``: problem, machine, schedule, picks, versions) and how it ended. Its
``id`` is a hash of its whole content, so two sets of records merge as sets, and a record that was altered or torn
shows.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import RecordError
from ..folders import replacing
from .kinds import LINES, found_instead

#: Version of a record's JSON form.
RECORD_SCHEMA = 1
OUTCOMES = ("ok", "build_error", "crash", "timeout", "memory", "wrong", "run_error")

Pick = int | str | bool

_LINE_BYTES = 1 << 24  # of the longest line an import reads
_IDENTITY = ("spec", "target", "hardware", "threads", "schedule", "schedule_version", "picks", "versions")
_MEASURED = ("outcome", "seconds", "samples", "error", "when", "note")
_INT32_MAX = 2**31 - 1
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z\Z")


def now() -> str:
    """The time as records spell it: ISO 8601, UTC, microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def trial_key(
    *,
    spec: str,
    target: str,
    hardware: str,
    threads: int,
    schedule: str,
    schedule_version: int,
    picks: Mapping[str, Pick],
    versions: Mapping[str, str],
) -> str:
    """SHA-256 (hexadecimal) of the fields that make two trials the same trial."""
    values = (spec, target, hardware, threads, schedule, schedule_version, dict(picks), dict(versions))
    return _digest(dict(zip(_IDENTITY, values, strict=True)))


def _digest(value: object) -> str:
    return hashlib.sha256(dump(value).encode()).hexdigest()


def dump(value: object) -> str:
    """JSON in the one spelling that hashes are made of: ASCII, sorted keys, no NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _expect(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise RecordError(f"{name}: expected {expected}, found {reprlib.repr(found)}")


def _text(name: str, value: object) -> str:
    _expect(isinstance(value, str) and bool(value), name, "text", value)
    text = str(value)
    _expect(text.encode(errors="replace").decode() == text, name, "text that UTF-8 can encode", value)
    return text


def _positive(name: str, value: object) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _expect(is_number and 0 < value < 1e300, name, "a positive number of seconds", value)  # type: ignore[operator]
    return float(value)  # type: ignore[arg-type]


def _count(name: str, value: object, minimum: int) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    _expect(is_integer and minimum <= value <= _INT32_MAX, name, f"an integer >= {minimum}", value)  # type: ignore[operator]


def _mapping(name: str, value: object, kinds: tuple[type, ...], expected: str) -> dict[str, Any]:
    _expect(isinstance(value, Mapping), name, "a mapping", value)
    items: dict[str, Any] = dict(value)  # type: ignore[call-overload]
    for key, item in items.items():
        _expect(isinstance(key, str), name, "names as keys", key)
        _expect(type(item) in kinds, f"{name}.{key}", expected, item)
    return items


@dataclass(frozen=True, kw_only=True)
class TuningRecord:
    """One trial: a candidate on a machine, and how it ended.

    Args:
        spec: the problem's descriptor.
        target: its spelling, e.g. ``cpu:znver4``.
        hardware: fingerprint of the machine (:attr:`convgen.hardware.machine.Machine.fingerprint`).
        threads: threads the kernel was compiled for and timed with.
        schedule, schedule_version, picks: the candidate.
        outcome: ``ok``, or how it failed: ``build_error``, ``crash``, ``timeout``, ``memory`` (it took
            too much), ``wrong`` (its output), ``run_error``.
        seconds: median time of one call; given exactly where the outcome is ``ok``.
        samples: the times whose median ``seconds`` is.
        error: the text of a failure.
        versions: the versions of convgen, TVM, LLVM … that made the kernel.
        when: ISO 8601 UTC, :func:`now` unless given.
        note: any JSON object. ``cost``: seconds that the trial took; ``job``: whose it is; ``exclude``: ids of
            schedules that its search left out; ``busy``: the share of the CPUs that other programs used meanwhile. Of
            a final comparison: ``final``; ``winner``: whether it answers; ``default_seconds``,
            ``onnxruntime_seconds`` and the ratios of these times to its own, ``ratio_default`` and
            ``ratio_onnxruntime`` [median, low, high]. ``network``, where the layer was then judged in the ``models``
            that it is of, among all their layers one after another: ``default_seconds`` of all its instances
            together, and their ``ratio_default``.

    Attributes:
        trial_key: SHA-256 of everything except the measurement; see :func:`trial_key`.
        id: SHA-256 of the whole content.

    Raises:
        RecordError: a field is not what it must be.
    """

    spec: str
    target: str
    hardware: str
    threads: int
    schedule: str
    schedule_version: int
    picks: Mapping[str, Pick]
    outcome: str
    seconds: float | None = None
    samples: tuple[float, ...] = ()
    error: str = ""
    versions: Mapping[str, str]
    when: str = field(default_factory=now)
    note: Mapping[str, Any] | None = None
    trial_key: str = field(init=False)
    id: str = field(init=False)

    def __repr__(self) -> str:
        where = f"{self.spec} for {self.target}, {self.threads} thread{'s' * (self.threads > 1)}"
        took = f"{self.seconds * 1e6:.4g} µs" if self.seconds else self.outcome
        picks = " ".join(f"{name}={value}" for name, value in sorted(self.picks.items()))
        return f"<TuningRecord {self.id[:12]} of {where}: {self.schedule}({picks}), {took}>"

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("spec", "target", "hardware", "schedule"):
            _text(name, getattr(self, name))
        _count("threads", self.threads, 1)
        _count("schedule_version", self.schedule_version, 0)
        put("picks", _mapping("picks", self.picks, (int, str, bool), "an integer, text, true or false"))
        put("versions", _mapping("versions", self.versions, (str,), "text"))
        _expect(self.outcome in OUTCOMES, "outcome", f"one of {OUTCOMES}", self.outcome)
        if self.outcome == "ok":
            put("seconds", _positive("seconds", self.seconds))
        else:
            _expect(self.seconds is None, "seconds", "none where the outcome is not ok", self.seconds)
        _expect(isinstance(self.samples, (list, tuple)), "samples", "a list of seconds", self.samples)
        put("samples", tuple(_positive(f"samples[{i}]", v) for i, v in enumerate(self.samples)))
        _expect(isinstance(self.error, str), "error", "text", self.error)
        # What a crashed process printed need not be text.
        put("error", self.error.encode(errors="replace").decode())
        is_time = isinstance(self.when, str) and _TIME.match(self.when) is not None
        _expect(is_time and _exists(self.when), "when", "ISO 8601 UTC, as 2026-01-31T12:00:00Z", self.when)
        if self.note is not None:
            _expect(isinstance(self.note, Mapping), "note", "a JSON object", self.note)
            try:
                put("note", json.loads(dump(dict(self.note))))
            except (TypeError, ValueError, RecursionError) as error:
                raise RecordError(f"note: expected a JSON object, found one that is not: {error}") from None
        put("trial_key", trial_key(**{name: getattr(self, name) for name in _IDENTITY}))
        put("id", _digest([self.trial_key, *(getattr(self, name) for name in _MEASURED)]))

    def __hash__(self) -> int:
        return hash(self.id)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, with the form's version; :meth:`from_dict` reads them."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {"schema": RECORD_SCHEMA, **values, "samples": list(self.samples)}

    def to_json(self) -> str:
        """One line of JSON."""
        return dump(self.to_dict())

    @classmethod
    def from_dict(cls, values: object) -> TuningRecord:
        """The record of which :meth:`to_dict` gave the values.

        Raises:
            RecordError: a field is missing, unknown or mistyped, the form's version is another, or
                ``id`` or ``trial_key`` is not the content's.
        """
        if not isinstance(values, dict):
            raise RecordError(f"record: expected a JSON object, found {reprlib.repr(values)}")
        schema = values.get("schema")
        if type(schema) is not int or schema != RECORD_SCHEMA:
            raise RecordError(f"schema: expected {RECORD_SCHEMA}, found {reprlib.repr(schema)}")
        for name in sorted(values.keys() ^ {"schema", *FIELDS}):
            if name in values:
                raise RecordError(f"{name}: expected one of {', '.join(FIELDS)}, found an unknown field")
            raise RecordError(f"{name}: expected a value, found none")
        record = cls(**{name: values[name] for name in FIELDS if name not in ("id", "trial_key")})
        for name in ("trial_key", "id"):
            _expect(values[name] == getattr(record, name), name, "the hash of the content", values[name])
        return record

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "") -> TuningRecord:
        """The record in one line of JSON.

        Raises:
            RecordError: as :meth:`from_dict` raises it, or the line is not JSON; the message begins with ``where``.
        """
        try:
            return cls.from_dict(load_json(text))
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where}: not JSON: {error}" if where else f"not JSON: {error}") from None
        except RecordError as error:
            raise RecordError(f"{where}: {error}" if where else str(error)) from None


#: The names of a record's fields.
FIELDS = tuple(field.name for field in fields(TuningRecord))


def _exists(when: str) -> bool:
    """Whether a time has a date that exists."""
    try:
        datetime.fromisoformat(when)
    except ValueError:
        return False
    return True


def load_json(text: str | bytes) -> Any:
    """Strict JSON: no NaN, no name twice in an object.

    Raises:
        ValueError: the text is not strict JSON (``RecursionError`` where it nests too deep).
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON value")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a name occurs twice in an object")
        return values

    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def read_lines(path: Path | str) -> Iterator[TuningRecord]:
    """The records of a JSON-lines file, one after the other.

    Raises:
        RecordError: the file cannot be read, or a line is not a record; names the file, line and field.
    """
    if instead := found_instead(Path(path), LINES):
        raise RecordError(f"{path}: expected {LINES.name}, {instead}")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES + 1), b""), 1):
                where = f"{path}: line {number}"
                if len(line) > _LINE_BYTES:
                    raise RecordError(f"{where}: expected at most {_LINE_BYTES} bytes, found more")
                if line.strip():
                    yield TuningRecord.from_json(line, where)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error


def write_lines(path: Path | str, records: Iterable[TuningRecord]) -> None:
    """Write records to a JSON-lines file, which appears whole or not at all.

    Raises:
        RecordError: it cannot be written.
    """
    write_whole(Path(path), (record.to_json() + "\n" for record in records))


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write a text file, which appears whole or not at all.

    Raises:
        RecordError: it cannot be written.
    """
    try:
        with replacing(path) as new, new.open("w", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error
