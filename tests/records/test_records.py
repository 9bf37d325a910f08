"""Tuning records: identity, strict JSON, and a store that loses nothing."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import (
    IDENTITY,
    MEMORY,
    PLACE,
    SPEC,
    contents,
    fill,
    other_database,
    record,
    records,
    some,
    unprivileged,
    writer,
)

from convgen.errors import RecordError
from convgen.records.record import TuningRecord, now
from convgen.records.store import RecordStore, default_path

# -- the store -------------------------------------------------------------------------------------


def test_adding_is_idempotent(store: RecordStore) -> None:
    item = record()
    assert not store.has(item.trial_key)
    assert store.add(item)
    assert not store.add(item)
    assert store.add(record(when=now()))
    assert store.has(item.trial_key)
    assert len(store) == 2
    assert store.check().ok


def test_trials_match_every_filter(store: RecordStore) -> None:
    base = record()
    others = {name: record(**{name: IDENTITY[name]}) for name in ("spec", "target", "hardware", "threads", "schedule")}
    others["outcome"] = record(outcome="timeout")
    others["trial_key"] = others["outcome"]
    for item in {base, *others.values()}:
        store.add(item)
    assert set(store.trials()) == {base, *others.values()}
    for name, item in others.items():
        found = store.trials(**{name: getattr(item, name)})
        assert item in found
        assert all(getattr(each, name) == getattr(item, name) for each in found)
    assert store.trials(spec=SPEC, schedule="cpu_rows", outcome="crash") == []


def test_trials_come_in_the_order_they_were_added(store: RecordStore) -> None:
    """Whatever a clock said; by time where that is asked for."""
    times = [f"2026-01-{day:02}T00:00:00Z" for day in range(1, 10)]
    mixed = random.Random(1).sample(times, len(times))
    for when in mixed:
        store.add(record(when=when))
    assert [item.when for item in store.trials()] == [item.when for item in store.each()] == mixed
    assert [item.when for item in store.trials(limit=3)] == mixed[-3:]
    assert [item.when for item in store.each(oldest_first=True)] == times


def test_best_is_the_fastest_that_fits(store: RecordStore) -> None:
    here = (SPEC, "cpu:znver4", "AuthenticAMD-25-17-1", 2)
    assert store.best(*here) is None
    good, slow = record(seconds=2e-3), record(seconds=3e-3)
    faster = [
        record(outcome="wrong", picks={}),
        record(spec=IDENTITY["spec"]),
        record(target="cpu:haswell"),
        record(hardware="another"),
        record(threads=1),
        record(versions={"convgen": "0.0.9"}),
        record(schedule_version=0),
    ]
    for item in (slow, good, *faster):
        store.add(item)

    def current(item: TuningRecord) -> bool:
        return item.schedule_version == 1

    assert store.best(*here, versions={"convgen": "0.1.0"}, accept=current) == good
    found = store.best(*here, versions={"convgen": "0.1.0"})
    assert found is not None
    assert found.schedule_version == 0
    assert store.best(*here, versions={"convgen": "9"}) is None
    assert store.best(SPEC, "cpu:znver4", "another", 1) is None


def test_merge_is_a_union_of_sets(tmp_path: Path) -> None:
    parts = [some(20, 0), some(20, 10), some(20, 25)]
    union = set(itertools.chain(*parts))
    for number, order in enumerate(itertools.permutations(range(3))):
        sources = [fill(tmp_path / f"{number}-{i}.sqlite", parts[i]) for i in order]
        with RecordStore(tmp_path / f"{number}.sqlite") as target:
            added = [target.merge(path) for path in sources]
            assert sum(added) == len(union)
            assert [target.merge(path) for path in (*sources, target.path)] == [0, 0, 0, 0]
            assert set(target.trials()) == union
            assert target.check().ok
            target.export(tmp_path / f"{number}.jsonl")
    assert len({(tmp_path / f"{number}.jsonl").read_bytes() for number in range(6)}) == 1


@settings(max_examples=25, deadline=None)
@given(st.lists(records(), max_size=8))
def test_export_and_import_give_the_same_set(items: list[TuningRecord]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        lines, first, second = (Path(folder) / name for name in ("r.jsonl", "a.sqlite", "b.sqlite"))
        with RecordStore(first) as source, RecordStore(second) as target:
            for item in items:
                source.add(item)
            assert source.export(lines) == len(set(items))
            assert target.import_(lines) == len(set(items))
            assert target.import_(lines) == 0
            assert set(target.trials()) == set(source.trials()) == set(items)
            assert target.check().ok


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(records(), max_size=5), min_size=1, max_size=3), st.data())
def test_stores_merge_as_sets(parts: list[list[TuningRecord]], data: st.DataObject) -> None:
    """Any order, any number of times, some of it shared, and into a store that has some already."""
    parts = [[*part, *parts[0][:1]] for part in parts]
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        paths = [fill(Path(folder) / f"{i}.sqlite", part) for i, part in enumerate(parts)]
        order = data.draw(st.permutations(range(len(parts))))
        again = data.draw(st.lists(st.sampled_from(order), max_size=3))
        with RecordStore(Path(folder) / "all.sqlite") as target:
            target.add_all(data.draw(st.sampled_from(parts)))
            for i in [*order, *again]:
                target.merge(paths[i])
            assert set(target.trials()) == set(itertools.chain(*parts))
            assert len(target) == len(set(itertools.chain(*parts)))
            assert target.check().ok
        assert [contents(path) for path in paths] == [set(part) for part in parts]


def test_a_record_is_found_by_the_first_digits_of_its_id(store: RecordStore) -> None:
    items = some(40)
    store.add_all(items)
    for item in items:
        assert store.find(item.id) == store.find(item.id[:16]) == item
    shared = next(digit for digit in "0123456789abcdef" if sum(item.id[0] == digit for item in items) > 1)
    for prefix, message in ((shared, "found [0-9a-f]{16}, [0-9a-f]{16}"), ("0" * 64, "found none")):
        with pytest.raises(
            RecordError, match=rf"r.*\.sqlite: id {prefix}: expected it to begin one record's, {message}"
        ):
            store.find(prefix)
    for prefix in ("", "g", "%", "A" * 3, "0" * 65, "0\n"):
        with pytest.raises(RecordError, match="id: expected the first hexadecimal digits"):
            store.find(prefix)


def test_removed_records_are_gone_and_leave_no_trace(store: RecordStore, tmp_path: Path) -> None:
    """Nor a gap, which recovery would take for a loss."""
    long = [record(picks={"tile_ow": i}, error="e" * 20_000, outcome="crash") for i in range(9)]
    items = [*some(600), *long]
    store.add_all(items)
    goes = random.Random(2).sample(items, 400)
    with RecordStore(store.path) as other:
        assert store.remove(item.id for item in [*goes, record(seconds=7.0)]) == 400
        assert store.remove(item.id for item in goes) == 0
        stays = set(items) - set(goes)
        assert set(store.trials()) == set(other.trials()) == stays
        assert other.add(goes[0])
        assert store.remove([goes[0].id]) == 1
        size = store.path.stat().st_size
        for compact in (False, True):
            if compact:
                other.compact()
                assert store.path.stat().st_size < size
            found = RecordStore.recover(store.path, tmp_path / f"{compact}.sqlite")
            assert (found.saved, found.lost, found.missing_pages) == (len(stays), 0, 0)
            assert contents(tmp_path / f"{compact}.sqlite") == stays
            assert other.check().ok
        assert other.add(record(seconds=8.0))
    with pytest.raises(RecordError, match="readonly"), RecordStore(store.path, readonly=True) as readonly:
        readonly.remove([some(1)[0].id])


def test_export_where_it_cannot_be_written(store: RecordStore, tmp_path: Path) -> None:
    store.add(record())
    with pytest.raises(RecordError, match=r"nowhere/r\.jsonl: No such file"):
        store.export(tmp_path / "nowhere" / "r.jsonl")
    with pytest.raises(RecordError, match=r"missing\.jsonl: No such file"):
        store.import_(tmp_path / "missing.jsonl")


def test_the_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CONVGEN_RECORDS", raising=False)
    assert default_path() == tmp_path / "cache" / "convgen" / "records.sqlite"
    monkeypatch.setenv("CONVGEN_RECORDS", str(tmp_path / "odd ?#%é" / "mine.sqlite"))
    with RecordStore() as store:
        store.add(record())
        assert store.path.is_file()
    assert contents(default_path()) == {record()}


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    with RecordStore(tmp_path / "r.sqlite") as store:
        pass
    with pytest.raises(RecordError, match="closed"):
        store.add(record())


# -- several writers, and their sudden end ---------------------------------------------------------


def test_processes_write_at_once(tmp_path: Path) -> None:
    path, count = tmp_path / "deep" / "er" / "r.sqlite", 100
    running = [writer(path, number, count) for number in range(8)]  # they race to create the file, too
    printed: list[str] = []
    for process in running:
        printed += process.communicate()[0].split()
        assert process.returncode == 0
    assert len(set(printed)) == 8 * count
    with RecordStore(path) as store:
        assert {item.id for item in store.trials()} == set(printed)
        report = store.check()
        assert (report.ok, report.rows) == (True, 8 * count)


RACER = """
import sys, time
from convgen.records.store import RecordStore
folder, start = sys.argv[1], float(sys.argv[2])
for i in range(60):
    while time.time() < start + i * 0.02:
        time.sleep(0.0002)
    with RecordStore(f"{folder}/{i}.sqlite") as store:
        assert len(store) == 0
"""


def test_processes_create_a_store_at_once(tmp_path: Path) -> None:
    start = str(time.time() + 1)
    running = [subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), start]) for _ in range(4)]
    assert [process.wait() for process in running] == [0, 0, 0, 0]


def test_threads_share_a_store(store: RecordStore) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(50):
                item = record(picks={"writer": number, "i": i})
                store.add(item)
                assert store.has(item.trial_key)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store) == 400
    assert store.check().ok


def test_a_killed_writer_loses_nothing(tmp_path: Path) -> None:
    path, moments = tmp_path / "r.sqlite", random.Random(7)
    acknowledged: set[str] = set()
    for number in range(12):
        process = writer(path, number, 100_000)
        assert process.stdout is not None
        for _ in range(moments.randrange(1, 60)):
            acknowledged.add(process.stdout.readline().strip())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        acknowledged.update(rest.split("\n")[:-1])  # the last line may be torn: it was not printed whole
        with RecordStore(path) as store:
            assert acknowledged <= {item.id for item in store.trials()}
            assert store.check().ok


FORK = """
import os, sys
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
store = RecordStore(sys.argv[1])
def add(i):
    store.add(TuningRecord(spec="s", target="cpu", hardware="here", threads=1, schedule="reference", schedule_version=1,
                           picks={"i": i}, outcome="crash", versions={}))
add(0)
children = []
for child in range(1, 4):
    pid = os.fork()
    if not pid:
        for i in range(20):
            add(100 * child + i)
        os._exit(0)
    children.append(pid)
for i in range(1, 20):
    add(i)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
assert len(store) == 80
assert store.check().ok
"""


def test_a_store_may_cross_a_fork(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORK, str(tmp_path / "r.sqlite")], check=True)


# -- what can go wrong with a file -----------------------------------------------------------------


def test_a_file_that_is_no_database_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    path.write_text("picks\n" * 1000)
    with pytest.raises(RecordError, match=r"r\.sqlite: file is not a database; .*recover"):
        RecordStore(path)
    assert path.read_text() == "picks\n" * 1000


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", [record()])
    other_database(path, "PRAGMA user_version = 2")
    with pytest.raises(RecordError, match="newer convgen: expected store version 1, found 2"):
        RecordStore(path)
    with RecordStore(tmp_path / "other.sqlite") as store, pytest.raises(RecordError, match="newer convgen"):
        store.merge(path)
    other_database(path, "PRAGMA user_version = 0")
    with pytest.raises(RecordError, match="expected store version 1, found 0"):
        RecordStore(path)


def test_another_program_s_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    other_database(path, "CREATE TABLE songs (title TEXT); PRAGMA user_version = 1")
    before = path.read_bytes()
    with pytest.raises(RecordError, match="not a record store"):
        RecordStore(path)
    assert path.read_bytes() == before


def test_a_missing_file_is_not_merged(store: RecordStore, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"missing\.sqlite: no such file"):
        store.merge(tmp_path / "missing.sqlite")
    assert not (tmp_path / "missing.sqlite").exists()


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match=r"file/r\.sqlite: (Not a directory|File exists)"):
        RecordStore(tmp_path / "file" / "r.sqlite")
    with pytest.raises(RecordError, match="expected a file"):
        RecordStore(tmp_path)


def test_a_folder_that_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as copies:
        folder = Path(name)
        path = fill(folder / "r.sqlite", some(3))
        Path(copies).chmod(0o777)
        with unprivileged(folder):
            with pytest.raises(RecordError, match=r"new\.sqlite: Permission denied"):
                RecordStore(folder / "new.sqlite")
            with pytest.raises(RecordError, match=r"sub/r\.sqlite: Permission denied"):
                RecordStore(folder / "sub" / "r.sqlite")
            with RecordStore(path, readonly=True) as store:
                assert set(store.trials()) == set(some(3))
                with pytest.raises(RecordError, match=r"r\.sqlite: attempt to write a readonly database"):
                    store.add(record())
            with RecordStore(Path(copies) / "mine.sqlite") as store:
                assert store.merge(path) == 3


def test_a_full_disk_loses_nothing_that_was_added(tmp_path: Path) -> None:
    with RecordStore(tmp_path / "r.sqlite") as store:
        for item in some(10):
            store.add(item)
        pages = store._run(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
        store._run(lambda db: db.execute(f"PRAGMA max_page_count = {pages + 5}").fetchall())
        added = set(some(10))

        def add_until_it_fails() -> None:
            for item in some(1000, 10):
                store.add(item)
                added.add(item)

        with pytest.raises(RecordError, match=r"r\.sqlite: database or disk is full"):
            add_until_it_fails()
        assert set(store.trials()) == added
        store._run(lambda db: db.execute("PRAGMA max_page_count = 100000").fetchall())
        assert store.add(record())
        assert store.check().ok


FULL = """
import resource, sys
from convgen.errors import RecordError
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
store = RecordStore(sys.argv[1])
try:
    for i in range(10_000):
        item = TuningRecord(spec="s", target="cpu", hardware="here", threads=1, schedule="reference",
                            schedule_version=1, picks={"i": i}, outcome="crash", versions={})
        store.add(item)
        print(item.id, flush=True)
except RecordError as error:
    sys.exit(f"RecordError: {error}")
"""


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"RecordError: {path}: ")
    printed = set(done.stdout.split())
    assert printed
    assert printed <= {item.id for item in contents(path)}


# -- damage and recovery ---------------------------------------------------------------------------

PAGE = 4096


def damage(path: Path, page: int, count: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[page * PAGE : (page + count) * PAGE] = random.Random(page).randbytes(count * PAGE)
    path.write_bytes(data)


def leaves(path: Path) -> list[int]:
    """Pages (from 0) that hold rows of the table."""
    data = path.read_bytes()
    return [page for page in range(1, len(data) // PAGE) if data[page * PAGE] == 0x0D]


def test_a_row_that_was_altered_is_found(tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", some(3))
    other_database(path, f"UPDATE records SET seconds = 1e-9 WHERE id = '{some(3)[1].id}'")
    with RecordStore(path) as store:
        report = store.check()
        assert report.rows == 3
        assert len(report.problems) == 1
        assert some(3)[1].id in report.problems[0]
        with pytest.raises(RecordError, match="id: expected the hash"):
            store.best(spec=SPEC, **PLACE)
        with RecordStore(tmp_path / "other.sqlite") as other, pytest.raises(RecordError, match="id: expected the hash"):
            other.merge(path)
    assert RecordStore.recover(path, tmp_path / "new.sqlite").lost == 1
    assert contents(tmp_path / "new.sqlite") == {some(3)[0], some(3)[2]}


@pytest.mark.parametrize("detail", ["", "[]", "{}", '{"picks":1}', "\x00"])
def test_a_row_that_holds_no_json_is_named(detail: str, tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", some(1))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE records SET detail = ?", (detail,))
    with RecordStore(path) as store:
        with pytest.raises(RecordError, match=some(1)[0].id):
            store.trials()
        assert not store.check().ok


def test_a_damaged_header(tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", some(200))
    damage(path, 0)
    with pytest.raises(RecordError, match="recover"):
        RecordStore(path)
    before = path.read_bytes()
    recovery = RecordStore.recover(path, tmp_path / "new.sqlite")
    assert (recovery.saved, recovery.lost) == (200, 0)
    assert contents(tmp_path / "new.sqlite") == set(some(200))
    assert path.read_bytes() == before


def test_a_damaged_root_hides_no_row(tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", some(200))
    damage(path, 1)
    with RecordStore(path) as store:
        report = store.check()
        assert not report.ok
        with pytest.raises(RecordError, match=r"malformed; .*recover"):
            store.trials()
    recovery = RecordStore.recover(path, tmp_path / "new.sqlite")
    assert (recovery.saved, recovery.lost) == (200, 0)
    assert contents(tmp_path / "new.sqlite") == set(some(200))


def test_damaged_leaves_are_counted(tmp_path: Path) -> None:
    long = [record(picks={"tile_ow": i}, error="e" * 50_000) for i in range(1000, 1005)]  # over several pages each
    path = fill(tmp_path / "r.sqlite", some(300) + long)
    first, *_, last = leaves(path)
    damage(path, first)
    damage(path, last)
    recovery = RecordStore.recover(path, tmp_path / "new.sqlite")
    assert recovery.lost > 0
    assert recovery.saved + recovery.lost == 305
    saved = contents(tmp_path / "new.sqlite")
    assert len(saved) == recovery.saved
    assert saved < set(some(300) + long)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_file(part: float, tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", some(300))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(RecordError, match="recover"):
        RecordStore(path)
    recovery = RecordStore.recover(path, tmp_path / "new.sqlite")
    assert 0 < recovery.saved < 300
    assert recovery.lost > 0
    assert contents(tmp_path / "new.sqlite") < set(some(300))


@given(st.binary(max_size=3 * PAGE), st.booleans())
@settings(max_examples=30, deadline=None)
def test_recovery_survives_any_bytes(garbage: bytes, in_the_middle: bool) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path, new = Path(folder) / "r.sqlite", Path(folder) / "new.sqlite"
        if in_the_middle:
            data = fill(path, some(40)).read_bytes()
            middle = len(data) // 2
            path.write_bytes(data[:middle] + garbage + data[middle + len(garbage) :])
        else:
            path.write_bytes(garbage)
        if not in_the_middle:
            with pytest.raises(RecordError, match="no trace"):
                RecordStore.recover(path, new)
            return
        assert RecordStore.recover(path, new).saved <= 40
        assert contents(new) <= set(some(40))


def test_recovery_refuses_the_same_file(tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", some(3))
    with pytest.raises(RecordError, match="found the same"):
        RecordStore.recover(path, path)
    with pytest.raises(RecordError, match="no such file"):
        RecordStore.recover(tmp_path / "missing.sqlite", tmp_path / "new.sqlite")
