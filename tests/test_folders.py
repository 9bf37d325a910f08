"""Temporary folders: what killed processes leave is removed, and only that; what is wrong with the system's is said."""

from __future__ import annotations

import ast
import gc
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mounts import mounted
from paths import ROOT

import convgen
from convgen import folders
from convgen.errors import BuildError, FolderError
from convgen.folders import TemporaryFolder, replacing

HOLD = """
import sys
from pathlib import Path
from convgen.folders import TemporaryFolder
held = TemporaryFolder(), TemporaryFolder(Path(sys.argv[1]))
for folder in held:
    (folder.path / "file").write_text("data")
print(*(folder.path for folder in held), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, of this process and of those it starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    folders._sweep.cache_clear()
    return folder


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)]


@contextmanager
def holding(beside: Path) -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """A process with folders in both places, and these."""
    with subprocess.Popen(python(HOLD, beside), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process, [Path(path) for path in process.stdout.readline().split()]
        finally:
            process.kill()


def touch(beside: Path) -> None:
    """What the next process does: it makes folders of its own."""
    subprocess.run(python(HOLD, beside), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)


# ---- killed processes ----------------------------------------------------------------------------


def test_folders_go_with_what_has_them(root: Path, tmp_path: Path) -> None:
    with TemporaryFolder() as path:
        assert path.parent.parent == root
        assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700
    kept = TemporaryFolder()
    assert list(root.iterdir()) == [kept.path.parent]
    del kept
    gc.collect()
    with TemporaryFolder(tmp_path) as path:
        assert path.parent == tmp_path
    assert (list(root.iterdir()), list(tmp_path.iterdir())) == ([], [root])


def test_what_a_killed_process_leaves_is_removed_by_the_next_one(root: Path, tmp_path: Path) -> None:
    with holding(tmp_path) as (process, left):
        touch(tmp_path)
        assert all((path / "file").exists() for path in left)  # it lives
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert all((path / "file").exists() for path in left)
        touch(tmp_path)
    assert (list(root.iterdir()), list(tmp_path.iterdir())) == ([], [root])


def test_a_killed_build_leaves_nothing_for_long(root: Path, tmp_path: Path) -> None:
    """Its kernels' folders, the compiler's files and a half-written export."""
    code = """
    import os, signal, sys, convgen
    from convgen.kernel import export
    kernel = convgen.build("conv1d n1 ic1 oc1 i9 k3", records=False)
    export.move = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    kernel.export(sys.argv[1])
    """
    (out := tmp_path / "out").mkdir()
    assert subprocess.run(python(code, out / "kernel"), check=False).returncode == -signal.SIGKILL
    assert list(root.iterdir())
    assert list(out.iterdir())
    touch(out)
    assert (list(root.iterdir()), list(out.iterdir())) == ([], [])


def test_a_forked_child_that_ends_removes_nothing_of_its_parents(root: Path) -> None:
    folder = TemporaryFolder()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            TemporaryFolder().close()
            folder.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.path.exists()
    assert list(root.iterdir()) == [folder.path.parent]


@pytest.mark.parametrize(
    "change", ["another name", "another machine's", "a file", "a link", "others may write", "another user's"]
)
def test_what_is_no_folder_of_a_killed_process_stays(root: Path, tmp_path: Path, change: str) -> None:
    name = f"{folders._PREFIX}abcdefgh"
    left, victim = root / name, tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "file").write_text("precious")
    if change == "a link":
        left.symlink_to(victim)
    elif change == "a file":
        left.write_text("precious")
    else:
        shutil.copytree(victim, left)
        left.chmod(0o700)
    if change == "another name":
        left = left.rename(root / "convgen-results")
    elif change == "another machine's":
        left = left.rename(root / "convgen-00000000-abcdefgh")
    elif change == "others may write":
        left.chmod(0o777)
    elif change == "another user's":
        if os.geteuid():
            pytest.skip("only root can give a folder to another user")
        os.chown(left, 65534, 65534)
    TemporaryFolder().close()
    assert list(root.iterdir()) == [left]
    assert (victim / "file").read_text() == "precious"


def test_what_is_being_made_is_not_taken_for_what_is_left(root: Path) -> None:
    """Processes that make folders while others look for what was left."""
    code = """
    import os, sys
    from convgen import folders
    for number in range(150):
        folders._sweep.cache_clear()
        with folders.TemporaryFolder() as path:
            (path / "file").write_text("data")
            folders._sweep.cache_clear()
            folders._sweep(sys.argv[1], os.getpid())
            assert (path / "file").read_text() == "data"
    """
    running = [subprocess.Popen(python(code, root)) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert list(root.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as new:
        new.write_text("half\ud800", encoding="utf-8")
    assert path.read_text() == "old"
    with replacing(path) as new:
        new.write_text("new")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])


def test_of_a_link_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    link.symlink_to("elsewhere/file")
    for text in ("new", "newer"):  # at first it leads to nothing
        with replacing(link) as new:
            new.write_text(text)
        assert (link.is_symlink(), path.is_symlink(), path.read_text()) == (True, False, text)
        if text == "new":
            path.chmod(0o640)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["elsewhere", "file", "link"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = subprocess.Popen(["cat", path], stdout=subprocess.PIPE)
    with replacing(path) as new:
        new.write_text("data")
    assert (reader.communicate(timeout=60)[0], stat.S_ISFIFO(path.stat().st_mode)) == (b"data", True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "null"
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        path.write_text("")
    except OSError as error:
        pytest.skip(f"no devices can be made here: {error}")
    with replacing(path) as new:
        new.write_text("data")
    assert stat.S_ISCHR(path.stat().st_mode)


@pytest.mark.parametrize("piped", [True, False])
def test_what_is_open_is_written_to_after_what_it_has(piped: bool, tmp_path: Path) -> None:
    """As a link in ``/proc`` names it, which ``/dev/stdout`` is a link to."""
    (tmp_path / "out").symlink_to("/proc/self/fd/1")
    code = """if True:
        import sys
        from pathlib import Path
        from convgen.folders import replacing
        print("before", flush=True)
        with replacing(Path(sys.argv[1])) as new:
            new.write_text("data\\n")
        print("after")
    """
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    if piped:
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    else:
        with (tmp_path / "file").open("wb") as file:
            subprocess.run(command, check=True, stdout=file)
            assert os.path.samestat(os.fstat(file.fileno()), (tmp_path / "file").stat())
        said = (tmp_path / "file").read_bytes()
    assert said == b"before\ndata\nafter\n"


# ---- the system's folder -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("noexec", "nothing can be loaded from there: it is mounted noexec; set TMPDIR to"),
        ("size=4k", "no space left; set TMPDIR to"),
        ("size=28k", "no space left; set TMPDIR to"),  # LLVM's file does not fit
        ("size=60k", "no space left; set TMPDIR to"),  # the linker's does not
        ("ro", "set TMPDIR to a folder that can be written"),
    ],
)
def test_the_command_line_says_what_is_wrong_with_the_temporary_folder(options: str, message: str) -> None:
    code = """
    import sys, tempfile, os
    tempfile.tempdir = os.environ["TMPDIR"]  # Python would look for another one
    from convgen.cli import main
    sys.exit(main(["validate", "conv2d n1 ic16 oc16 i9x9 k3x3", "--no-records"]))
    """
    done = mounted(options, *python(code))
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("convgen: /")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_library_that_cannot_be_loaded_from_where_it_lies_says_so(tmp_path: Path) -> None:
    code = """
    import shutil, sys, convgen, os
    folder = shutil.copytree(sys.argv[1], os.environ["TMPDIR"] + "/kernel")
    try:
        convgen.load(folder)
    except convgen.ConvgenError as error:
        print(type(error).__name__, error)
    """
    convgen.build("conv1d n1 ic1 oc1 i9 k3", records=False).export(tmp_path / "kernel")
    done = mounted("noexec", *python(code, tmp_path / "kernel"))
    assert re.fullmatch(r"ExportError .*\.so: expected a library .* mounted noexec\n", done.stdout), done


def test_candidates_are_not_blamed_for_a_full_folder(tmp_path: Path) -> None:
    """A tuning run ends and says why; no record says of a candidate that it does not compile."""
    code = """
    import sys
    from convgen.cli import main
    store = ["--records", sys.argv[1]]
    status = main(["tune", "conv2d n1 ic16 oc16 i9x9 k3x3", "--trials", "4", *store])
    print(main(["records", "list", *store]))
    sys.exit(status)
    """
    done = mounted("size=60k", *python(code, tmp_path / "records.sqlite"))
    assert done.returncode == 3, done.stderr
    assert "no space left; set TMPDIR to" in done.stderr
    assert "build_error" not in done.stdout


def test_where_no_folder_can_be_written_the_error_names_those_that_were_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere", "/dev/null"])
    with pytest.raises(FolderError, match=r"No usable temporary directory found in .*/proc/nowhere.*; set TMPDIR to"):
        TemporaryFolder()


def test_a_folder_that_was_removed_is_made_again(root: Path) -> None:
    with TemporaryFolder() as first:
        shutil.rmtree(first.parent)
        with TemporaryFolder() as path:
            assert path.is_dir()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(122, "Disk quota exceeded"),
                                   BuildError("cc: error writing: No space left on device")])  # fmt: skip
def test_what_fails_for_want_of_space_says_so(root: Path, error: Exception) -> None:
    with pytest.raises(FolderError, match=f"^{root}: no space left; set TMPDIR") as raised, TemporaryFolder():
        raise error
    assert raised.value.__cause__ is error
    number = getattr(error, "errno", 28)
    with pytest.raises(OSError, match=rf"^\[Errno {number}\]"), TemporaryFolder(root):  # that is not the system's
        raise error
    with pytest.raises(BuildError, match=r"^something else$"), TemporaryFolder():
        raise BuildError("something else")


# ---- the kind ------------------------------------------------------------------------------------


def test_only_this_module_knows_where_temporary_files_lie() -> None:
    """Other modules name the folder that a temporary file is made in: one of their own."""
    for path in (
        *(ROOT / "convgen").rglob("*.py"),
        *(ROOT / "schedules").glob("*.py"),
        *(ROOT / "targets").glob("*.py"),
    ):
        if path == Path(folders.__file__):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.module == "tempfile"), path
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/tmp", "/var/tmp")), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tempfile":
                known = ("mkdtemp", "mkstemp", "TemporaryDirectory", "TemporaryFile", "SpooledTemporaryFile")
                assert node.attr in known or isinstance(node.ctx, ast.Store), (path, node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "tempfile.mkdtemp",
                "tempfile.mkstemp",
                "tempfile.TemporaryDirectory",
                "tempfile.SpooledTemporaryFile",
            ):
                assert any(keyword.arg == "dir" for keyword in node.keywords), path


def test_nothing_predictable_is_opened_in_the_shared_folder(root: Path) -> None:
    """Whatever a build, its validation and claims of CPUs open there lies in a folder of a random name that only this
    user can enter, or in the folder of claims, which is checked.
    """
    code = """
    import os, sys
    root, opened = os.environ["TMPDIR"], set()
    def hook(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.link", "os.symlink", "sqlite3.connect"):
            for path in arguments[:2]:
                if isinstance(path, str) and path.startswith(root + "/"):
                    opened.add((path[len(root) + 1:].split("/")[0], event))
    sys.addaudithook(hook)
    import convgen
    from convgen.hardware.machine import pinned
    kernel = convgen.build("conv1d n1 ic1 oc1 i9 k3", records=False)
    convgen.validate(kernel).raise_if_failed()
    with pinned(1):
        pass
    print(*{name for name, _ in opened})
    """
    done = subprocess.run(python(code), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = set(done.stdout.split()) - {f"convgen-cpus-{os.geteuid()}"}
    assert names
    tried = re.compile("[a-z0-9_]{8}")  # Python's own, to see whether the folder can be written
    assert all(folders._NAME.fullmatch(name) or tried.fullmatch(name) for name in names), names
