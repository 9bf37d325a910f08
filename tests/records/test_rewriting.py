"""Removals and compactions that end suddenly, and lose the log as well: nothing that was added is lost."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stores import contents, fill, record, some

from convgen.errors import RecordError
from convgen.records.record import TuningRecord
from convgen.records.rewriting import copy_path
from convgen.records.store import RecordStore

#: Ends at one of the steps of a removal, as kill -9 would: the arguments are the store, the step and what is done.
DIES = """
import os, sys
from pathlib import Path
from convgen.records import rewriting, store as store_module
from convgen.records.store import RecordStore
path, step, what = sys.argv[1:]
def die(*_):
    os._exit(9)
store = RecordStore(path)
if step == "before the copy":
    os.fsync = die
elif step == "before it has its name":
    Path.rename = die
elif step == "before the change":
    rewriting._sync_folder = die
elif step == "before it is in the file":
    RecordStore._flush = die
elif step == "before the copy goes":
    Path.unlink = lambda self, missing_ok=False: die() if self.suffix == ".copy" else None
ids = [record.id for record in store.trials()][::2]
store.compact() if what == "compact" else store.remove(ids, compact=what == "both")
"""
STEPS = [
    "before the copy",
    "before it has its name",
    "before the change",
    "before it is in the file",
    "before the copy goes",
]


def die_at(path: Path, step: str, what: str) -> None:
    assert subprocess.run([sys.executable, "-c", DIES, str(path), step, what], check=False).returncode == 9


def log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def left(folder: Path) -> list[str]:
    """What lies beside a store and should not."""
    return [name for name in os.listdir(folder) if ".copy" in name]


@pytest.mark.parametrize("what", ["remove", "compact", "both"])
@pytest.mark.parametrize("step", STEPS)
def test_a_sudden_end_and_a_lost_log_lose_nothing(step: str, what: str, tmp_path: Path) -> None:
    path, items = tmp_path / "r.sqlite", some(400)
    with RecordStore(path) as store:
        store.add_all(items)
    die_at(path, step, what)
    log_of(path).unlink(missing_ok=True)
    with RecordStore(path) as store:
        assert set(store.trials()) in (set(items), set(items[1::2]))
        assert what != "compact" or set(store.trials()) == set(items)
        assert store.check().ok
        assert store.add(record(seconds=9.0))
        count = len(store)
    assert left(tmp_path) == []
    found = RecordStore.recover(path, tmp_path / "new.sqlite")
    assert (found.saved, found.lost) == (count, 0)


def half_moved(path: Path, pages: int) -> None:
    """Move some pages from the log into the file, in the order in which SQLite does, and lose the log."""
    log = log_of(path).read_bytes()
    size = struct.unpack(">I", log[8:12])[0]
    frames = [log[at : at + 24 + size] for at in range(32, len(log), 24 + size)]
    newest = {int.from_bytes(frame[:4], "big"): frame[24:] for frame in frames if frame[8:16] == log[16:24]}
    with path.open("r+b") as file:
        for number in sorted(newest)[:pages]:
            file.seek((number - 1) * size)
            file.write(newest[number])
    log_of(path).unlink()
    path.with_name(path.name + "-shm").unlink(missing_ok=True)


def worn(path: Path) -> list[TuningRecord]:
    """A store whose last rows lie in pages that were used before: compacting moves them up."""
    items = some(600)
    with RecordStore(path) as store:
        store.add_all(items)
        store.remove(item.id for item in items[:450])
        store.add_all(some(400, 1000))
        return store.trials()


@pytest.mark.parametrize("what", ["compact", "both"])
def test_a_file_that_the_log_was_half_moved_into(what: str, tmp_path: Path) -> None:
    """It opens with all there was, or says that it is damaged; then recovery has all there was."""
    path, refused = tmp_path / "r.sqlite", 0
    items = worn(path)
    stays = items[1::2] if what == "both" else items
    die_at(path, "before it is in the file", what)
    whole = {each: each.read_bytes() for each in (path, log_of(path), copy_path(path))}
    for pages in (1, 8, 34, 89):
        for each, data in whole.items():
            each.write_bytes(data)
        half_moved(path, pages)
        said = ""
        try:
            with RecordStore(path) as store:
                assert set(stays) <= set(store.trials()) <= set(items)
                assert store.check().ok
        except RecordError as error:
            said = str(error)
        if said:
            refused += 1
            assert "recover" in said
            new = tmp_path / f"{pages}.sqlite"
            assert RecordStore.recover(path, new).lost == 0
            assert contents(new) == set(items)
    assert refused


def test_without_the_copy_it_would_be_lost(tmp_path: Path) -> None:
    """The tests above do attack what they say."""
    path = tmp_path / "r.sqlite"
    items = worn(path)
    die_at(path, "before it is in the file", "compact")
    copy_path(path).unlink()
    half_moved(path, 40)
    RecordStore.recover(path, tmp_path / "new.sqlite")
    assert contents(tmp_path / "new.sqlite") < set(items)


def test_an_addition_that_is_half_in_the_file_loses_nothing_from_before(tmp_path: Path) -> None:
    """Records are added at the end: whatever of the log arrives, those that were there can be recovered."""
    for count in (4, 31):
        path = tmp_path / f"{count}.sqlite"
        before = fill(path, some(count)).read_bytes()
        added = """
import os, sys
from convgen.records.store import RecordStore
sys.path.insert(0, sys.argv[2])
from stores import some
RecordStore._flush = lambda self: os._exit(9)
RecordStore(sys.argv[1]).add_all(some(3, 1000))
"""
        support = str(Path(__file__).parents[1] / "support")
        subprocess.run([sys.executable, "-c", added, str(path), support], check=False)
        log = log_of(path).read_bytes()
        for pages in range(1, 6):
            path.write_bytes(before)
            log_of(path).write_bytes(log)
            half_moved(path, pages)
            new = tmp_path / "new.sqlite"
            new.unlink(missing_ok=True)
            found = RecordStore.recover(path, new)
            assert set(some(count)) <= contents(new) or found.lost or found.missing_pages


def test_a_living_removal_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens the store meanwhile neither takes it for dead nor reads half of it; two wait for each other."""
    path, items, seen = fill(tmp_path / "r.sqlite", some(60)), some(60), list[set[TuningRecord]]()
    real = RecordStore._flush

    def slow(self: RecordStore) -> bool:
        if left(tmp_path) == ["r.sqlite.copy"]:
            time.sleep(0.2)
        return real(self)

    monkeypatch.setattr(RecordStore, "_flush", slow)

    def remove(these: list[TuningRecord]) -> None:
        with RecordStore(path) as store:
            store.remove(item.id for item in these)
        seen.append(contents(path))

    threads = [threading.Thread(target=remove, args=(items[i : i + 10],)) for i in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 3
    assert contents(path) == set(items[30:])
    assert left(tmp_path) == []


def test_a_copy_that_was_left_since_it_was_opened_is_not_written_over(tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", some(40))
    with RecordStore(path) as store:
        die_at(path, "before the change", "compact")
        with pytest.raises(RecordError, match="ended suddenly in another process; open it again"):
            store.compact()
        assert left(tmp_path) == ["r.sqlite.copy"]
    assert contents(path) == set(some(40))
    assert left(tmp_path) == []


def test_what_may_only_be_read_is_put_right_too(tmp_path: Path) -> None:
    path = fill(tmp_path / "r.sqlite", some(40))
    die_at(path, "before it is in the file", "both")
    log_of(path).unlink()
    with RecordStore(path, readonly=True) as store:
        assert set(store.trials()) == set(some(40))
        with pytest.raises(RecordError, match="readonly"):
            store.add(record())
