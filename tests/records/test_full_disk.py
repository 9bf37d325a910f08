"""What may not be written, or not all of it: a store stays as it was, and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from stores import contents, fill, record, some

from convgen.errors import RecordError
from convgen.records.store import RecordStore

# -- what may not be written -----------------------------------------------------------------------


def test_a_file_that_cannot_be_written() -> None:
    """Its folder can: nothing is lost, and nothing is said to be kept that is not."""
    with tempfile.TemporaryDirectory() as name:
        path = fill(Path(name) / "r.sqlite", some(3))
        Path(name).chmod(0o777)
        path.chmod(0o444)
        before = path.read_bytes()
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)  # nobody, whom modes stop
        try:
            with RecordStore(path, readonly=True) as store:
                assert set(store.trials()) == set(some(3))
                assert store.check().ok
            with (
                pytest.raises(
                    RecordError,
                    match=r"r\.sqlite: cannot be written: the file is read-only for this user",
                ),
                RecordStore(path) as store,
            ):
                store.add(record())
        finally:
            if is_root:
                os.seteuid(0)
        assert path.read_bytes() == before
        assert contents(path) == set(some(3))


# -- a full disk -----------------------------------------------------------------------------------

FULL = """
import resource, shutil, sys
from pathlib import Path
from convgen.errors import RecordError
from convgen.records.store import RecordStore
folder, what = Path(sys.argv[1]), sys.argv[2]
store = None if what in ("create", "recover") else RecordStore(folder / "small.sqlite")
if sys.argv[3:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
else:
    with open(folder / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == 28, error
try:
    if what == "merge":
        store.merge(folder / "large.sqlite")
    elif what == "import":
        store.import_(folder / "large.jsonl")
    elif what == "export":
        store.export(folder / "out.jsonl")
    elif what == "recover":
        RecordStore.recover(folder / "large.sqlite", folder / "new.sqlite")
    elif what == "create":
        RecordStore(folder / "new.sqlite")
    elif what in ("remove", "compact"):
        with RecordStore(folder / "large.sqlite") as store:
            store.compact() if what == "compact" else store.remove([r.id for r in store.trials()][1:])
except RecordError as error:
    sys.exit(f"RecordError: {error}")
"""

STORES = {"small.sqlite": some(30), "large.sqlite": some(900)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for name, items in STORES.items():
        with RecordStore(folder / name) as store:
            store._insert(items)
            store.export((folder / name).with_suffix(".jsonl"))
    return folder


def check_full(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("RecordError: "), done.stderr
    (folder / "filler").unlink(missing_ok=True)
    for name, items in STORES.items():
        assert contents(folder / name) == set(items)
        with RecordStore(folder / name) as store:
            assert store.check().ok
    assert not (folder / "out.jsonl").exists()
    assert not list(folder.glob("*.part"))
    if (folder / "new.sqlite").exists():
        assert contents(folder / "new.sqlite") == set()
    RecordStore.recover(folder / "large.sqlite", folder / "new.sqlite")  # now there is room again
    assert contents(folder / "new.sqlite") == set(STORES["large.sqlite"])


@pytest.mark.parametrize(
    ("what", "limit"),
    [
        ("merge", 60_000),
        ("import", 60_000),
        ("recover", 60_000),
        ("export", 9000),
        ("remove", 60_000),
        ("compact", 9000),
    ],
)
def test_a_write_that_is_refused_changes_nothing(what: str, limit: int, stores: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stores, tmp_path / "stores")
    command = [sys.executable, "-c", FULL, str(folder), what, str(limit)]
    check_full(folder, subprocess.run(command, capture_output=True, text=True, check=False))


@pytest.mark.parametrize("what", ["merge", "import", "recover", "export", "create", "remove", "compact"])
def test_a_full_disk_changes_nothing(what: str, stores: Path, tmp_path: Path) -> None:
    """A file system of its own, filled to the last byte; the stores come back from it."""
    script = f"""
        mount -t tmpfs -o size=3m none {tmp_path} || exit 77
        cp {stores}/* {tmp_path}
        "$@"
        status=$?
        rm -f {tmp_path}/filler
        tar -C {tmp_path} -c . >&3
        exit $status
    """
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", textwrap.dedent(script), "sh"]
    command += [sys.executable, "-c", FULL, str(tmp_path), what]
    folder = tmp_path / "after"
    folder.mkdir()
    try:
        with open(tmp_path / "after.tar", "wb") as archive:
            done = subprocess.run(
                ["sh", "-c", 'exec 3>&1 1>/dev/null; exec "$@"', "sh", *command],
                stdout=archive,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
    except FileNotFoundError as error:
        pytest.skip(f"there is no {error.filename}")
    if done.returncode not in (0, 1) or "unshare:" in done.stderr:
        pytest.skip(f"no file system can be mounted: {done.stderr}")
    subprocess.run(["tar", "-C", folder, "-xf", tmp_path / "after.tar"], check=True)
    check_full(folder, done)
