"""One tuning record: its checks, its JSON, its keys."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from stores import (
    IDENTITY,
    record,
    records,
)

from convgen.errors import RecordError
from convgen.records.record import TuningRecord, trial_key
from convgen.records.store import RecordStore

# -- records ---------------------------------------------------------------------------------------


@given(records())
def test_json_and_pickle_give_the_same_record_back(item: TuningRecord) -> None:
    line = item.to_json()
    assert "\n" not in line
    for copy in (TuningRecord.from_json(line), pickle.loads(pickle.dumps(item))):
        assert copy == item
        assert (copy.id, copy.trial_key, hash(copy)) == (item.id, item.trial_key, hash(item))


MEASUREMENT: dict[str, Any] = {
    "seconds": 2e-3,
    "samples": [1e-3],
    "error": "warm",
    "when": "2026-01-31T12:00:00.000002Z",
    "note": {"default": 2e-3},
}


@pytest.mark.parametrize("name", IDENTITY)
def test_identity_makes_another_trial(name: str) -> None:
    other = record(**{name: IDENTITY[name]})
    assert other.trial_key != record().trial_key
    assert other.id != record().id


@pytest.mark.parametrize("name", MEASUREMENT)
def test_a_measurement_makes_another_record_of_the_same_trial(name: str) -> None:
    other = record(**{name: MEASUREMENT[name]})
    assert other.trial_key == record().trial_key
    assert other.id != record().id


def test_the_trial_is_known_before_it_is_measured() -> None:
    item = record()
    assert item.trial_key == trial_key(**{name: getattr(item, name) for name in IDENTITY})
    assert record(picks={"a": 1, "b": 2}).id == record(picks={"b": 2, "a": 1}).id


def test_what_is_given_later_does_not_change_a_record() -> None:
    given_picks = {"tile_ow": 14}
    item = record(picks=given_picks)
    given_picks["tile_ow"] = 7
    assert item.picks == {"tile_ow": 14}
    assert TuningRecord.from_json(item.to_json()) == item


def test_a_crash_may_print_what_is_not_text(store: RecordStore) -> None:
    item = record(outcome="crash", error="bad \udcff byte")
    store.add(item)
    assert store.trials() == [item]
    assert "\udcff" not in item.error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spec", ""),
        ("spec", "a\udcffb"),
        ("threads", 0),
        ("threads", True),
        ("threads", 1.0),
        ("threads", 2**40),
        ("schedule_version", "1"),
        ("picks", [1]),
        ("picks", {"tile_ow": 1.5}),
        ("picks", {1: 1}),
        ("versions", {"tvm": 27}),
        ("outcome", "fine"),
        ("seconds", None),
        ("seconds", 0.0),
        ("seconds", float("nan")),
        ("seconds", 10**400),
        ("samples", 1e-3),
        ("samples", [1e-3, "x"]),
        ("error", None),
        ("when", "yesterday"),
        ("when", "2026-02-31T12:00:00Z"),
        ("when", "2026-01-31T12:00:00+01:00"),
        ("note", [1]),
        ("note", {"x": float("inf")}),
        ("note", {"x": object()}),
    ],
)
def test_a_wrong_field_is_named(name: str, value: object) -> None:
    with pytest.raises(RecordError, match=f"^{name}"):
        record(**{name: value})


def test_a_failure_has_no_time() -> None:
    values = {**record().to_dict(), "outcome": "crash"}
    with pytest.raises(RecordError, match="seconds: expected none"):
        TuningRecord.from_dict(values)


def altered(**changes: Any) -> str:
    return json.dumps({**record().to_dict(), **changes})


BAD_LINES: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ("{", "not JSON"),
    "not an object": ("[1]", "record: expected a JSON object"),
    "too deep": ("[" * 100_000, "not JSON"),
    "not UTF-8": (b"\xff\xfe\xff", "not JSON"),
    "NaN": (altered(seconds=float("nan")), "NaN is not a JSON value"),
    "twice": (altered()[:-1] + ', "threads": 2}', "twice"),
    "newer form": (altered(schema=2), "schema: expected 1, found 2"),
    "no form": (json.dumps({k: v for k, v in record().to_dict().items() if k != "schema"}), "schema: expected 1"),
    "missing": (json.dumps({k: v for k, v in record().to_dict().items() if k != "picks"}), "picks: expected a value"),
    "unknown": (altered(speed=1), "speed: expected one of"),
    "mistyped": (altered(threads="2"), "threads: expected an integer"),
    "other id": (altered(id="0" * 64), "id: expected the hash"),
    "other key": (altered(trial_key="0" * 64), "trial_key: expected the hash"),
    "other time": (altered(seconds=1e-9), "id: expected the hash"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_imported(case: str, store: RecordStore, tmp_path: Path) -> None:
    line, message = BAD_LINES[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([record().to_json().encode(), line if isinstance(line, bytes) else line.encode()]))
    with pytest.raises(RecordError, match=message) as raised:
        store.import_(path)
    assert str(raised.value).startswith(f"{path}: line 2: ")
    assert len(store) == 0
