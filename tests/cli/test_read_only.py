"""What needs no tuning writes to its output and to a temporary folder, and nowhere else."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import platformdirs
import pytest
from made_records import SPEC, TEXT, record
from mounts import mounted, read_only
from stores import unprivileged

import convgen
from convgen.errors import RecordError
from convgen.hardware.target import resolve
from convgen.lowering.candidates import parse_candidate
from convgen.records.opening import open_store
from convgen.records.store import RecordStore, default_path

#: Each command of the command line that needs no tuning, and Python's way, one after the other.
EVERYTHING = """
import os, sys, convgen
from convgen.cli import main
text, out = sys.argv[1], os.environ["OUT"]
print(main(["build", text, "--out", out + "/kernel"]))
print(main(["validate", text]))
print(main(["show", text]))
kernel = convgen.build(text)
convgen.validate(kernel).raise_if_failed()
kernel.export(out + "/second")
convgen.load(out + "/second")
print(sorted(os.listdir(out)))
"""


#: A writer that is killed before what is in its log is in the file.
KILLED = """
import os, signal, sqlite3, sys
from convgen.records.store import RecordStore
RecordStore(sys.argv[1]).close()
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA wal_autocheckpoint = 0")
db.execute("ATTACH ? AS made", sys.argv[2:])
db.execute("INSERT INTO records SELECT * FROM made.records")
db.commit()
os.kill(os.getpid(), signal.SIGKILL)
"""


def script(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)]


#: A disk that has been filled, before or after a store was made there.
FULL = """
here=$TMPDIR; unset TMPDIR; export XDG_CACHE_HOME=$here CONVGEN_RECORDS=
[ "$2" = new ] || "$0" -m convgen records list || exit
cat /dev/zero > "$here/filled" 2>/dev/null
cd / && exec "$0" -W ignore -m convgen build "$1" --out "$3/kernel"
"""


@pytest.mark.parametrize("store", ["new", "old"])
def test_on_a_disk_that_is_full(store: str, tmp_path: Path) -> None:
    done = mounted("size=256k", "sh", "-c", FULL, sys.executable, TEXT, store, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernel" / "manifest.json").exists()


def test_on_file_systems_that_cannot_be_written() -> None:
    done = read_only(*script(EVERYTHING, TEXT))
    lines = done.stdout.splitlines()
    assert lines.count("0") == 3, done
    assert lines[-1] == "['kernel', 'second']"


@pytest.mark.parametrize("left", ["nothing", "its log and index", "its log"])
def test_a_store_that_cannot_be_written_answers(tmp_path: Path, left: str) -> None:
    """Also one whose writer was killed, with a log that has more than the file."""
    path = tmp_path / "records.sqlite"
    with RecordStore(tmp_path / "made.sqlite") as made:
        made.add(record(parse_candidate(SPEC, resolve(), "reference"), seconds=1e-4))
    if left == "nothing":
        made.path.rename(path)
    else:
        killed = subprocess.run(script(KILLED, path, made.path), check=False)
        assert killed.returncode == -signal.SIGKILL
        assert Path(f"{path}-wal").stat().st_size
        if left == "its log":
            Path(f"{path}-shm").unlink()
    code = """
    import sys, convgen
    kernel = convgen.build(sys.argv[1], threads=2, records=sys.argv[2])
    print(kernel.schedule, kernel.record is not None)
    """
    done = read_only(*script(code, TEXT, path))
    assert done.stdout == "reference True\n", done


def test_what_tunes_says_that_the_store_cannot_be_written() -> None:
    done = read_only(sys.executable, "-W", "ignore", "-m", "convgen", "tune", TEXT, "--trials", "1")
    assert done.returncode == 3
    assert done.stderr == "convgen: /nowhere/cache/convgen/records.sqlite: Read-only file system\n"


def test_without_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: Path("~/.cache", name))
    monkeypatch.delenv("CONVGEN_RECORDS")
    monkeypatch.chdir(tmp_path)
    assert convgen.build(TEXT, threads=2).record is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecordError, match="expected a home directory, found none: name the store in CONVGEN_RECORDS"):
        default_path()


def test_a_store_that_is_named_must_be_there_or_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for the default one that is missing an empty one stands in."""
    with tempfile.TemporaryDirectory() as name, unprivileged(folder := Path(name)):
        with pytest.raises(RecordError, match=r"r\.sqlite: no such file"):
            open_store(folder / "r.sqlite", write=False).__enter__()
        monkeypatch.setenv("CONVGEN_RECORDS", str(folder / "r.sqlite"))
        with open_store(None, write=False) as store:
            assert store is not None
            assert (len(store), store.readonly) == (0, True)
