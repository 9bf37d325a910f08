"""What is refused, fails or brings nothing leaves no store; what fills a new one makes it whole."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import stores
from commands import SMALL, TINY, Run, model_file

from convgen.errors import BuildError, MeasureError, RecordError
from convgen.network.tuning import ModelTuning
from convgen.records.opening import expect_writable, open_to_fill
from convgen.records.store import RecordStore


def damaged(path: Path) -> Path:
    """A store of which the last record's time was changed."""
    stores.fill(path, stores.some(3))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE records SET seconds = 2 * seconds WHERE rowid = 3")
    db.close()
    return path


def files(folder: Path) -> list[str]:
    """What is in a folder, but for the logs that reading a store makes beside it."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(("-wal", "-shm")))


def test_a_merge_makes_a_store_and_its_folder(tmp_path: Path, run: Run) -> None:
    both = [stores.fill(tmp_path / f"{start}.sqlite", stores.some(2, start)) for start in (0, 2)]
    path = tmp_path / "new" / "r.sqlite"
    assert run("records", "merge", *both, "--records", path)[0] == 0
    assert stores.contents(path) == set(stores.some(4))
    assert files(path.parent) == ["r.sqlite"]


@pytest.mark.parametrize("made", ["damaged.sqlite", "text", "nothing"])
def test_a_refused_merge_makes_no_store(made: str, tmp_path: Path, run: Run) -> None:
    """Also where an earlier one of its stores is well, and where what is wrong is in a later record."""
    good = stores.fill(tmp_path / "good.sqlite", stores.some(2))
    damaged(tmp_path / "damaged.sqlite")
    (tmp_path / "text").write_text("no store\n")
    before = files(tmp_path)
    status, out, err = run("records", "merge", good, tmp_path / made, "--records", tmp_path / "new" / "r.sqlite")
    assert (status, out) == (3, "")
    assert made in err
    assert files(tmp_path) == before


@pytest.mark.parametrize("bad", ["", "{}\n"])
def test_an_import_of_nothing_or_of_what_is_wrong_makes_no_store(bad: str, tmp_path: Path, run: Run) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(bad)
    status, out, _ = run("records", "import", lines, "--records", tmp_path / "r.sqlite")
    assert (status, out) == ((3, "") if bad else (0, f"0 added, 0 in {tmp_path / 'r.sqlite'}\n"))
    assert files(tmp_path) == ["lines.jsonl"]
    stores.fill(tmp_path / "r.sqlite", stores.some(2))
    assert run("records", "import", lines, "--records", tmp_path / "r.sqlite")[0] == (3 if bad else 0)
    assert stores.contents(tmp_path / "r.sqlite") == set(stores.some(2))


def test_a_pipe_fills_a_new_store(tmp_path: Path) -> None:
    """It can be read once."""
    items = stores.some(3)
    text = "".join(item.to_json() + "\n" for item in items)
    command = [sys.executable, "-m", "convgen", "records", "import", "/dev/stdin", "--records"]
    done = subprocess.run(
        [*command, str(tmp_path / "r.sqlite")], input=text, text=True, check=True, capture_output=True, timeout=120
    )
    assert "3 added, 3 in" in done.stdout
    assert stores.contents(tmp_path / "r.sqlite") == set(items)


def test_what_can_be_saved_of_nothing_is_no_store(tmp_path: Path, run: Run) -> None:
    with RecordStore(tmp_path / "empty.sqlite"):
        pass
    assert run("records", "recover", tmp_path / "empty.sqlite", tmp_path / "r.sqlite")[0] == 0
    assert files(tmp_path) == ["empty.sqlite"]
    assert run("records", "prune", "--yes", "--records", tmp_path / "r.sqlite")[0] == 3
    assert files(tmp_path) == ["empty.sqlite"]


def test_who_is_faster_is_added_to(tmp_path: Path) -> None:
    """Another process makes the store while one is filled."""
    first, second = stores.some(2), stores.some(4)[2:]
    path = tmp_path / "r.sqlite"
    with open_to_fill(path) as store:
        store.add_all(first)
        assert not path.exists()
        stores.fill(path, second)
    assert stores.contents(path) == {*first, *second}
    assert files(tmp_path) == ["r.sqlite"]


def test_the_log_of_a_store_is_no_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    Path(f"{path}-wal").write_bytes(b"x" * 100)
    for opened in (lambda: open_to_fill(path).__enter__(), lambda: expect_writable(path)):
        with pytest.raises(RecordError, match="no such file, but the log of one beside it"):
            opened()


def test_errors_name_the_store_that_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with pytest.raises(RecordError, match=f"^{path}: id 00000000: "), open_to_fill(path) as store:
        store.find("0" * 8)
    assert files(tmp_path) == []


@pytest.mark.parametrize("tracker", ["127.0.0.1:1", "nowhere"])
def test_tuning_without_a_tracker_makes_no_store(tracker: str, tmp_path: Path, run: Run) -> None:
    options = ["--tracker", tracker, "--device-key", "board", "--records", tmp_path / "r.sqlite"]
    assert run("tune", TINY, *options)[0] != 0
    assert files(tmp_path) == []


def test_a_failure_before_anything_is_measured_makes_no_store(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> Any:
        raise BuildError("planted")

    monkeypatch.setattr(ModelTuning, "expected", failing)
    model = model_file(tmp_path / "net.onnx")
    assert run("tune", model, "--whole", "--trials", 1, "--records", tmp_path / "r.sqlite")[0] == 1
    other = ["--target", "cpu:aarch64", "--seconds", 5, "--records", tmp_path / "r.sqlite", "--out", tmp_path / "out"]
    assert run("build", SMALL, *other)[0] == 2
    assert files(tmp_path) == ["net.onnx"]


def test_a_store_that_may_only_be_read_says_so_before_anything_starts() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = stores.fill(Path(name) / "r.sqlite", stores.some(1))
        path.chmod(0o666)
        with stores.unprivileged(Path(name)), pytest.raises(RecordError) as raised:
            expect_writable(path)
        said = f"{path}: cannot be written: its folder, where SQLite keeps a log, is read-only for this user; "
        assert str(raised.value) == said + "give another one as --records, or as CONVGEN_RECORDS"
        assert stores.contents(path) == set(stores.some(1))


def test_that_a_store_cannot_be_made_shows_before_anything_starts(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: object) -> Any:
        raise MeasureError("workers were started")

    monkeypatch.setattr("convgen.cli.tuned._pools", begun)
    (tmp_path / "file").touch()
    (tmp_path / "text.sqlite").write_text("no store\n")
    for path in (tmp_path / "file" / "r.sqlite", tmp_path / "text.sqlite", Path("/proc/r.sqlite")):
        status, _, err = run("tune", TINY, "--trials", 1, "--records", path)
        assert status == 3, err
        assert os.fspath(path) in err
