"""Processes that end at any moment, and many that write at once: a store is whole, and has what was added."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stores import fill, some, writer

from convgen.records.store import RecordStore

# -- sudden ends -----------------------------------------------------------------------------------

IMPORT = """
import sys
from convgen.records.store import RecordStore
with RecordStore(sys.argv[1]) as store:
    print("ready", flush=True)
    store.import_(sys.argv[2])
"""


def test_a_killed_import_is_whole_or_nothing(tmp_path: Path) -> None:
    lines = tmp_path / "r.jsonl"
    lines.write_text("".join(item.to_json() + "\n" for item in some(4000)))
    killed = 0
    for number in range(6):
        path = fill(tmp_path / f"{number}.sqlite", some(1, 5000))
        command = [sys.executable, "-c", IMPORT, str(path), str(lines)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(number * 0.04)
            process.kill()
        killed += process.returncode == -signal.SIGKILL
        with RecordStore(path) as store:
            assert len(store) in (1, 4001)
            assert store.check().ok
    assert killed


REMOVE = """
import sys
from convgen.records.store import RecordStore
with RecordStore(sys.argv[1]) as store:
    ids = [record.id for record in store.trials()]
    print("ready", flush=True)
    store.remove(ids[::2])
    store.compact()
"""


def test_a_killed_removal_is_whole_or_nothing(tmp_path: Path) -> None:
    items, killed = some(3000), 0
    for number in range(8):
        path = tmp_path / f"{number}.sqlite"
        with RecordStore(path) as store:
            store.add_all(items)
        with subprocess.Popen([sys.executable, "-c", REMOVE, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(number * 0.02)
            process.kill()
        killed += process.returncode == -signal.SIGKILL
        with RecordStore(path) as store:
            assert len(store) in (1500, 3000)
            assert store.check().ok
            count = len(store)
        found = RecordStore.recover(path, tmp_path / "new.sqlite")
        assert (found.saved, found.lost) == (count, 0)
    assert killed


def test_records_are_removed_while_others_write(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    old, count = some(500), 60
    with RecordStore(path) as store:
        store.add_all(old)
        running = [writer(path, number, count) for number in range(4)]
        for item in old:
            assert store.remove([item.id]) == 1
            if all(process.poll() is not None for process in running):
                break
        store.remove(item.id for item in old)
        store.compact()
        printed: set[str] = set()
        for process in running:
            printed |= set(process.communicate()[0].split())
            assert process.returncode == 0
        assert len(printed) == 4 * count
        assert {item.id for item in store.trials()} == printed
        assert store.check().ok
    assert RecordStore.recover(path, tmp_path / "new.sqlite").lost == 0


# -- load --------------------------------------------------------------------------------------------


LOADER = """
import sys
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
path, writer, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with RecordStore(path) as store:
    for i in range(count):
        item = TuningRecord(
            spec="conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1 relu", target="cpu", hardware="here", threads=2,
            schedule="reference", schedule_version=1, picks={"writer": writer, "i": i}, outcome="ok", seconds=1e-3,
            samples=[1e-3 + j * 1e-6 for j in range(15)], versions={"convgen": "0.1.0", "tvm": "0.27.0"},
        )
        assert store.add(item)
        print(item.id, flush=True)
"""


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_eight_writers_lose_and_tear_nothing(count: int, tmp_path: Path) -> None:
    """Each adds its records one by one, and a ninth process reads meanwhile."""
    path = tmp_path / "r.sqlite"
    fill(path, some(1))
    outputs = [(tmp_path / f"{number}.txt").open("w+") for number in range(8)]
    command = [sys.executable, "-c", LOADER, str(path)]
    running = [
        subprocess.Popen([*command, str(number), str(count)], stdout=output) for number, output in enumerate(outputs)
    ]
    seen = 1
    while any(process.poll() is None for process in running):
        with RecordStore(path, readonly=True) as store:
            found = len(store)
            assert found >= seen  # what was added stays
            seen = found
        time.sleep(0.5)
    assert [process.returncode for process in running] == [0] * 8
    printed: set[str] = set()
    for output in outputs:
        output.seek(0)
        printed |= set(output.read().split())
        output.close()
    assert len(printed) == 8 * count
    with RecordStore(path) as store:
        report = store.check()  # every record against its hash
        assert (report.ok, report.rows) == (True, 8 * count + 1)
        ids = store._run(lambda db: db.execute("SELECT id FROM records").fetchall())
        assert {id_ for (id_,) in ids} == printed | {some(1)[0].id}
