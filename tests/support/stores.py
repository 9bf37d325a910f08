"""Record stores for tests: records made up, written and read back."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from convgen.records.record import OUTCOMES, TuningRecord
from convgen.records.store import RecordStore

SPEC = "conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1 relu"


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no disk: every commit waits for one


PLACE: dict[str, Any] = {"target": "cpu:znver4", "hardware": "AuthenticAMD-25-17-1", "threads": 2}


def record(**changes: Any) -> TuningRecord:
    values: dict[str, Any] = {
        "spec": SPEC,
        **PLACE,
        "schedule": "cpu_direct",
        "schedule_version": 1,
        "picks": {"tile_ow": 14, "order": "ic", "unroll": True},
        "outcome": "ok",
        "seconds": 1e-3,
        "samples": [1e-3, 1.1e-3],
        "versions": {"convgen": "0.1.0", "tvm": "0.27.0"},
        "when": "2026-01-31T12:00:00.000001Z",
    }
    values.update(changes)
    if values["outcome"] != "ok":
        values |= {"seconds": None}
    return TuningRecord(**values)


def some(count: int, start: int = 0) -> list[TuningRecord]:
    return [record(picks={"tile_ow": i}, seconds=1e-3 + i * 1e-6) for i in range(start, start + count)]


def fill(path: Path, records: list[TuningRecord]) -> Path:
    with RecordStore(path) as store:
        for item in records:
            store.add(item)
    return path


def contents(path: Path) -> set[TuningRecord]:
    with RecordStore(path) as store:
        return set(store.trials())


text = st.text(max_size=20)


seconds = st.floats(min_value=1e-9, max_value=1e3)


picks = st.dictionaries(text, st.integers() | text | st.booleans(), max_size=4)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def records(draw: st.DrawFn) -> TuningRecord:
    outcome = draw(st.sampled_from(OUTCOMES))
    name = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
    return TuningRecord(
        spec=draw(name),
        target=draw(name),
        hardware=draw(name),
        threads=draw(st.integers(1, 1024)),
        schedule=draw(name),
        schedule_version=draw(st.integers(0, 9)),
        picks=draw(picks),
        outcome=outcome,
        seconds=draw(seconds) if outcome == "ok" else None,
        samples=tuple(draw(st.lists(seconds, max_size=4))),
        error=draw(st.text(st.characters(), max_size=40)),
        versions=draw(st.dictionaries(text, text, max_size=3)),
        when=draw(st.datetimes()).isoformat() + "Z",
        note=draw(st.none() | st.dictionaries(text, json_values, max_size=3)),
    )


WRITER = """
import sys
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
path, writer, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with RecordStore(path) as store:
    for i in range(count):
        item = TuningRecord(
            spec="conv1d n1 ic1 oc1 i8 k1 s1 p0", target="cpu", hardware="here", threads=1, schedule="reference",
            schedule_version=1, picks={"writer": writer, "i": i}, outcome="ok", seconds=1e-3,
            samples=[1e-3] * (i % 400), error="e" * (i * 97 % 9000), versions={},
        )
        assert store.add(item)
        print(item.id, flush=True)
"""


def writer(path: Path, number: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(number), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def other_database(path: Path, script: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(script)


@contextlib.contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Make a folder read-only for the body; root, whom no mode stops, becomes nobody."""
    nobody = 65534
    is_root = os.geteuid() == 0
    folder.chmod(0o555)
    if is_root:
        os.seteuid(nobody)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


IDENTITY: dict[str, Any] = {
    "spec": "conv2d n1 ic3 oc64 i8x8 k1x1 s1x1 p0x0",
    "target": "cpu:haswell",
    "hardware": "another",
    "threads": 1,
    "schedule": "cpu_rows",
    "schedule_version": 2,
    "picks": {"tile_ow": 14, "order": "ic", "unroll": 1},
    "versions": {"convgen": "0.1.0", "tvm": "0.28.0"},
}
