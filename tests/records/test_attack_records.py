"""Records under attack: nothing that was added is lost, and nothing that is lost is lost in silence."""

from __future__ import annotations

import ast
import contextlib
import gzip
import json
import os
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SUPPORT
from stores import PLACE, SPEC, contents, fill, json_values, other_database, record, some, writer

from convgen.errors import RecordError
from convgen.records import record as records_module
from convgen.records import salvage
from convgen.records.record import TuningRecord
from convgen.records.store import RecordStore

PAGE = 4096


def examine(path: Path, good: set[TuningRecord], *, exact: bool = False) -> None:
    """A damaged store is refused, or read as it was, or :meth:`RecordStore.check` tells; and recovery
    tells what is lost: ``exact``, to the record.
    """
    data = path.read_bytes()
    with contextlib.suppress(RecordError), RecordStore(path) as store:
        found = None
        with contextlib.suppress(RecordError):
            found = set(store.trials())
        assert found is None or found <= good
        assert found == good or not store.check().ok

    path.write_bytes(data)
    path.with_name(path.name + "-wal").unlink(missing_ok=True)
    into = path.with_name("into.sqlite")
    into.unlink(missing_ok=True)
    try:
        recovery = RecordStore.recover(path, into)
    except RecordError:
        assert not data[100:]
        return
    saved = contents(into)
    assert path.read_bytes() == data
    assert saved <= good
    assert len(saved) == recovery.saved
    assert saved == good or recovery.lost or recovery.missing_pages
    assert not exact or recovery.saved + recovery.lost == len(good)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, set[TuningRecord]]:
    """A store's bytes, and its records: some of several pages each, and a trial that was measured twice."""
    long = [record(picks={"tile_ow": i}, error="e" * 9000, outcome="crash") for i in range(3)]
    items = [*some(40), *long, record(picks={"tile_ow": 0}, seconds=2e-3)]
    return fill(tmp_path_factory.mktemp("whole") / "r.sqlite", items).read_bytes(), set(items)


def test_a_damaged_byte_is_never_silent(whole: tuple[bytes, set[TuningRecord]], tmp_path: Path) -> None:
    """Anywhere, and in the headers of the file and of its pages more often than chance would have it."""
    data, good = whole
    rng, path = random.Random(3), tmp_path / "r.sqlite"
    heads = [page + at for page in range(0, len(data), PAGE) for at in range(12)]
    places = [*rng.sample(range(len(data)), 120), *rng.sample(range(112), 30), *rng.sample(heads, 50)]
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        examine(path, good, exact=at >= 112)


def test_a_truncated_file_is_never_silent(whole: tuple[bytes, set[TuningRecord]], tmp_path: Path) -> None:
    data, good = whole
    rng, path = random.Random(4), tmp_path / "r.sqlite"
    lengths = [0, 1, 15, 16, 50, 99, 100, 512, *range(PAGE, len(data), 3 * PAGE), *rng.sample(range(len(data)), 30)]
    for length in lengths:
        path.write_bytes(data[:length])
        examine(path, good)


def test_a_damaged_text_is_named(tmp_path: Path) -> None:
    """Whatever reads it: a byte that is no UTF-8, a value of another kind, an altered outcome."""
    columns = {"target": b"cpu\xff", "seconds": "fast", "outcome": "wrong", "threads": 2**40, "detail": b"\x80"}
    for name, value in columns.items():
        path = fill(tmp_path / f"{name}.sqlite", some(2))
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            damaged = db.execute("SELECT id FROM records LIMIT 1").fetchone()[0]
            text = f"CAST(? AS {'TEXT' if isinstance(value, bytes) else 'BLOB'})" if name != "threads" else "?"
            db.execute(f"UPDATE records SET {name} = {text} WHERE id = ?", (value, damaged))
        with RecordStore(path) as store:
            with pytest.raises(RecordError, match=rf"{damaged}: .*recover"):
                store.trials()
            with pytest.raises(RecordError, match=damaged):
                store.export(tmp_path / "r.jsonl")
            assert [damaged in problem for problem in store.check().problems].count(True) == 1
        assert not (tmp_path / "r.jsonl").exists()


# -- the log ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["gone", "flipped", "cut", "no index", "wrong index"])
def test_a_damaged_log_loses_nothing_that_was_added(how: str, tmp_path: Path) -> None:
    """Eight writers are killed at once; then the log beside the file is damaged.

    Where one died while it moved the log into the file, both are needed: that shows, and recovery has it all.
    """
    path, rng = tmp_path / "r.sqlite", random.Random(how)
    running = [writer(path, number, 100_000) for number in range(8)]
    added: set[str] = set()
    for process in running:
        assert process.stdout is not None
        added |= {process.stdout.readline().strip() for _ in range(rng.randrange(1, 8))}
    for process in rng.sample(running, 8):
        process.kill()
    for process in running:
        assert process.stdout is not None
        added |= {line for line in process.stdout.read().split("\n")[:-1] if len(line) == 64}
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    log, index = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
    if how == "gone":
        log.unlink(missing_ok=True)
    elif how == "no index":
        index.unlink(missing_ok=True)
    elif how == "wrong index":
        index.write_bytes(rng.randbytes(2**15))
    elif data := bytearray(log.read_bytes() if log.exists() else b""):
        at = rng.randrange(len(data))
        data[at] ^= 0x10
        log.write_bytes(data if how == "flipped" else data[:at])
    with contextlib.suppress(RecordError), RecordStore(path) as store:
        found = {item.id for item in store.trials()}
        if store.check().ok:
            assert added <= found
            return
    recovery = RecordStore.recover(path, tmp_path / "new.sqlite")
    assert added <= {item.id for item in contents(tmp_path / "new.sqlite")} or recovery.lost


def test_what_was_added_is_in_the_file_itself(tmp_path: Path) -> None:
    with RecordStore(tmp_path / "r.sqlite") as store:
        for count, item in enumerate(some(5), 1):
            store.add(item)
            copy = tmp_path / f"{count}.sqlite"
            shutil.copy(store.path, copy)
            assert contents(copy) == set(some(count))


def with_log(path: Path, items: list[TuningRecord]) -> Path:
    """Add records to a store such that only its log has them, as another program or version may leave it."""
    other = fill(path.with_name("more.sqlite"), items)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("ATTACH ? AS more", (str(other),))
        db.execute("INSERT INTO records SELECT * FROM more.records")
        db.commit()
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{path}.copy{suffix}")
    return path.with_name(path.name + ".copy")


def test_recovery_reads_the_log(tmp_path: Path) -> None:
    path = with_log(fill(tmp_path / "r.sqlite", some(5)), some(60, 5))
    log = path.with_name(path.name + "-wal")
    assert log.stat().st_size > 10 * PAGE
    damaged = bytearray(log.read_bytes())
    for frame in (3, 5):
        damaged[32 + frame * (PAGE + 24) + 9] ^= 1  # of its salt: SQLite would take it for the end
    log.write_bytes(damaged)
    data = bytearray(path.read_bytes())
    data[:PAGE] = bytes(PAGE)
    path.write_bytes(data)
    (tmp_path / "link.sqlite").symlink_to(path)
    found = RecordStore.recover(tmp_path / "link.sqlite", tmp_path / "new.sqlite")
    assert (found.saved, found.lost) == (65, 0)
    assert contents(tmp_path / "new.sqlite") == set(some(65))


def test_a_log_without_its_store_is_kept(tmp_path: Path) -> None:
    """A new store must not take up the log of the one before it, nor lose what it has."""
    path = with_log(fill(tmp_path / "r.sqlite", some(5)), some(60, 5))
    path.unlink()
    with pytest.raises(RecordError, match=r"no such file, but the log of one beside it; .*recover"):
        RecordStore(path)
    assert not path.exists()
    found = RecordStore.recover(path, tmp_path / "new.sqlite")
    assert contents(tmp_path / "new.sqlite") == set(some(65)) or found.lost


# -- what is no store ------------------------------------------------------------------------------


def test_an_empty_file_is_no_store(tmp_path: Path) -> None:
    """It may be one that lost everything."""
    path = tmp_path / "r.sqlite"
    path.touch()
    for readonly in (False, True):
        with pytest.raises(RecordError, match=r"r\.sqlite: expected a record store or no file, found an empty file"):
            RecordStore(path, readonly=readonly)
    assert path.stat().st_size == 0
    with pytest.raises(RecordError, match="found no trace of one"):
        RecordStore.recover(path, tmp_path / "new.sqlite")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """None of it is waited for: a pipe that nobody writes, a device that takes everything and keeps nothing."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null"), Path("/dev/zero")):
        for readonly in (False, True):
            with pytest.raises(RecordError, match=f"{path}: expected a file, found something else"):
                RecordStore(path, readonly=readonly)
        with pytest.raises(RecordError, match=f"{path}: no such file"):
            RecordStore.recover(path, tmp_path / "new.sqlite")
    with pytest.raises(RecordError, match="null"):
        RecordStore(f"{tmp_path}/r\0.sqlite")
    assert not (tmp_path / "r").exists()


def test_a_link_to_a_store_is_the_store(tmp_path: Path) -> None:
    (tmp_path / "link.sqlite").symlink_to(tmp_path / "r.sqlite")
    fill(tmp_path / "link.sqlite", some(2))
    assert contents(tmp_path / "r.sqlite") == set(some(2))


HOSTILE = {
    "a view": """
        ALTER TABLE records RENAME TO kept;
        CREATE VIEW records AS WITH RECURSIVE forever(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM forever)
            SELECT kept.* FROM kept, forever;""",
    "a trigger": "CREATE TRIGGER forget AFTER INSERT ON records BEGIN DELETE FROM records; END;",
    "another column": "ALTER TABLE records ADD COLUMN more",
    "no index": "DROP INDEX by_speed",
    "a unique index": "DROP INDEX by_trial; CREATE UNIQUE INDEX by_trial ON records (trial_key);",
    "no table": "DROP TABLE records",
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_store_with_another_schema_is_refused(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fill(tmp_path / "r.sqlite", some(2))
    other_database(path, HOSTILE[how])
    with pytest.raises(RecordError, match="expected the table of a record store, found another"):
        RecordStore(path)
    with RecordStore(tmp_path / "mine.sqlite") as store, pytest.raises(RecordError, match="found another"):
        store.merge(path)
    if how != "no table":
        assert RecordStore.recover(path, tmp_path / "new.sqlite").saved == 2


def test_recovery_ends_whatever_a_file_says(tmp_path: Path) -> None:
    """Every cell of every page claims all of the file, through overflow pages in a circle."""
    count = 200
    cell = bytes(
        [0x80 | (count * PAGE - PAGE) >> 14, 0x80 | ((count - 1) * PAGE >> 7) & 0x7F, (count - 1) * PAGE & 0x7F, 1]
    )
    page = bytearray(PAGE)
    page[0], page[3:5] = 0x0D, (2000).to_bytes(2, "big")
    for pointer in range(8, 4008, 2):
        page[pointer : pointer + 2] = (4050).to_bytes(2, "big")
    page[4050:4054] = cell
    path = tmp_path / "r.sqlite"
    path.write_bytes(bytes(PAGE) + bytes(page) * (count - 1))
    file = salvage.read(path)
    assert sum(1 for _ in file.cells()) <= 4 * count


# -- versions --------------------------------------------------------------------------------------

#: Written by convgen 0.1.0.
FIRST = SUPPORT / "records-1.sqlite.gz"


def test_the_first_version_s_store_is_read(tmp_path: Path) -> None:
    """Not only opened: its identities must still be what a build would compute today."""
    path = tmp_path / "r.sqlite"
    path.write_bytes(gzip.decompress(FIRST.read_bytes()))
    place: dict[str, Any] = {"target": "cpu:znver4", "hardware": "AuthenticAMD-25-17-1", "threads": 2}
    with RecordStore(path) as store:
        assert store.check().rows == 3
        assert store.check().ok
        assert [item.id[:8] for item in store.trials()] == ["0fefd652", "a1fecab4", "5e9991d2"]
        best = store.best(SPEC, **place)
        assert best is not None
        assert (best.picks, best.seconds) == ({"tile_ow": 28}, 5.123456789e-4)
        key: dict[str, Any] = {"schedule": "cpu_direct", "schedule_version": 1, "picks": {"tile_ow": 7}}
        versions = {"tvm": "0.27.0", "convgen": "0.1.0"}
        assert store.has(records_module.trial_key(spec=SPEC, **place, **key, versions=versions))
        assert not store.add(record())  # the first of the three
        assert store.add(some(1)[0])
        store.export(tmp_path / "r.jsonl")
    with RecordStore(fill(tmp_path / "new.sqlite", [record()])) as store:
        assert store.import_(tmp_path / "r.jsonl") == 3


def test_a_newer_store_is_left_alone(tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", some(3))
    other_database(path, "ALTER TABLE records ADD COLUMN joules REAL; PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(RecordError, match="written by a newer convgen: expected store version 1, found 2"):
        RecordStore(path)
    assert os.listdir(tmp_path) == ["r.sqlite"]
    with pytest.raises(RecordError, match="written by a newer convgen"):
        RecordStore(path, readonly=True)
    assert path.read_bytes() == before


def test_a_removal_from_a_damaged_store_says_so(tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", some(300))
    data = bytearray(path.read_bytes())
    data[PAGE : 2 * PAGE] = random.Random(1).randbytes(PAGE)  # the root of the table
    path.write_bytes(data)
    with RecordStore(path) as store, pytest.raises(RecordError, match=r"malformed; .*recover"):
        store.remove([some(1)[0].id])
    assert RecordStore.recover(path, tmp_path / "new.sqlite").saved == 300


# -- hostile lines ---------------------------------------------------------------------------------


def test_a_line_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(record().to_json() + "\n")
    os.truncate(path, 2**40)  # a terabyte, of which the disk has nothing
    with RecordStore(tmp_path / "r.sqlite") as store:
        with pytest.raises(RecordError, match=r"line 2: expected at most 16777216 bytes, found more"):
            store.import_(path)
        with pytest.raises(RecordError, match=r"line 1: expected at most 16777216 bytes, found more"):
            store.import_("/dev/zero")
        with pytest.raises(RecordError, match="Is a directory"):
            store.import_(tmp_path)
        assert len(store) == 0


def test_a_long_line_is_read_or_named(tmp_path: Path) -> None:
    lines = {
        '{"schema": 1' + "0" * 10_000 + "}": "not JSON",
        '{"a":' * 50_000: "not JSON",
        json.dumps({**record().to_dict(), "note": "x" * 2**20}): "note: expected",
        json.dumps({**record().to_dict(), "samples": ["1"] * 10**5}): r"samples\[0\]: expected",
        json.dumps({**record().to_dict(), "threads": 10**400}): "threads: expected",
        json.dumps({**record().to_dict(), "seconds": 1}).replace(
            '"seconds": 1', '"seconds": 1e999'
        ): "seconds: expected",
    }
    path = tmp_path / "r.jsonl"
    with RecordStore(tmp_path / "r.sqlite") as store:
        for line, message in lines.items():
            path.write_text(line + "\n")
            with pytest.raises(RecordError, match=f"line 1: {message}") as raised:
                store.import_(path)
            assert len(str(raised.value)) < 1000
        long = record(outcome="crash", error="e" * 2**20)
        path.write_text(long.to_json() + "\r\n\n")
        assert store.import_(path) == 1
        assert store.trials() == [long]


anything = json_values | st.sampled_from([-1, 2**63, 10**400, 1e308, "\ud800", "\0", [[]], True])


@given(st.sampled_from(sorted(record().to_dict())), anything)
@settings(max_examples=200, deadline=None)
def test_any_value_in_any_field_is_a_record_or_an_error(name: str, value: Any) -> None:
    line = json.dumps({**record().to_dict(), name: value})
    try:
        found = TuningRecord.from_json(line)
    except RecordError:
        return
    assert found == record()  # another record has another id


# -- the clock -------------------------------------------------------------------------------------


def test_a_clock_that_runs_backwards_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    years = iter([2026, 2020, 1970, 9999, 2026])

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(next(years), 1, 1, tzinfo=UTC)

    monkeypatch.setattr(records_module, "datetime", Clock)
    items = [record(seconds=1e-3 * (i + 1), when=records_module.now()) for i in range(5)]
    with RecordStore(tmp_path / "r.sqlite") as store:
        assert all(store.add(item) for item in items)
        assert [item.when[:4] for item in store.each(oldest_first=True)] == ["1970", "2020", "2026", "2026", "9999"]
        assert store.best(SPEC, **PLACE) == items[0]
        assert store.check().ok


# -- nothing is unpickled --------------------------------------------------------------------------


def test_no_module_of_the_store_can_unpickle() -> None:
    package = Path(records_module.__file__).parents[1]
    for path in (*(package / "records").rglob("*.py"), package / "cli" / "records.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        forbidden = {"pickle", "cloudpickle", "marshal", "shelve", "dill", "yaml", "importlib"}
        assert not forbidden & {module.partition(".")[0] for module in imported}
        assert not {"eval", "exec", "compile", "__import__"} & names


READ = """
import sys
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event == "pickle.find_class" else None)
from pathlib import Path
from convgen.errors import RecordError
from convgen.records.store import RecordStore
folder = Path(sys.argv[1])
with RecordStore(folder / "r.sqlite") as store:
    for record in store.trials():
        store.best(record.spec, record.target, record.hardware, record.threads)
    assert store.check().ok and store.export(folder / "r.jsonl") == len(store) == 4
with RecordStore(folder / "other.sqlite") as store:
    assert store.merge(folder / "r.sqlite") == 4 and store.import_(folder / "r.jsonl") == 0
assert RecordStore.recover(folder / "r.sqlite", folder / "third.sqlite").saved == 4
try:
    RecordStore(folder / "blobs.sqlite").trials()
except RecordError:
    RecordStore(folder / "blobs.sqlite").check()
    RecordStore.recover(folder / "blobs.sqlite", folder / "fourth.sqlite")
assert seen == [], seen
import pickle
pickle.loads(pickle.dumps(RecordError))  # it would have been seen
assert seen
"""


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_in_a_store_stay_text(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    payload = pickle.dumps(Payload(touched), protocol=0)
    pickle.loads(payload)
    touched.unlink()  # it works
    text = payload.decode("ascii")
    fields: list[dict[str, Any]] = [{"spec": text}, {"picks": {text: text}}, {"error": text}, {"note": {"p": text}}]
    fill(tmp_path / "r.sqlite", [record(**field) for field in fields])
    path = fill(tmp_path / "blobs.sqlite", some(2))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE records SET detail = ?", (pickle.dumps(Payload(touched)),))
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not touched.exists()
