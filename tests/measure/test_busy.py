"""How busy the CPUs are with other programs: a program of another family shows, and our own work does not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convgen.measure import busy
from convgen.measure.busy import BusyWatch, busy_ticks, busy_warning, crowd_warning, family_ticks

STAT = "cpu  9 9 9 9 9 9 9 9\ncpu0 100 10 20 5000 30 4 2 7 50 60\ncpu1 1 2 3 4 5 6 7 8 0 0\ncpu10 7 7 7 7 7 7 7\nintr 1"


def stat(process: int, parent: int, *times: int, name: str = "program") -> str:
    return f"{process} ({name}) S {parent} {'0 ' * 9}{' '.join(map(str, times))} 20 0 1 0\n"


def test_what_keeps_a_cpu_busy() -> None:
    assert busy_ticks(STAT, {0}) == 100 + 10 + 20 + 4 + 2 + 7  # neither idle nor waiting for disks
    assert busy_ticks(STAT, {0, 1}) == 143 + 1 + 2 + 3 + 6 + 7 + 8
    assert busy_ticks(STAT, {4}) == 0
    assert busy_ticks("cpu0 1 2 3 4 5\n", {0}) == 6  # of an old kernel


def test_a_familys_time() -> None:
    stats = [
        stat(10, 1, 5, 6, 7, 8),
        stat(11, 10, 100, 0, 0, 0, name="a) S 1 (b"),
        stat(12, 11, 0, 1000, 0, 0),
        stat(13, 1, 9999, 0, 0, 0),
    ]
    assert family_ticks(10, stats) == 26 + 100 + 1000
    assert family_ticks(12, stats) == 1000
    assert family_ticks(99, stats) == 0


def test_the_share_is_what_others_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me, ticks, clock = os.getpid(), os.sysconf("SC_CLK_TCK"), [0.0]
    (tmp_path / str(me)).mkdir()
    monkeypatch.setattr(busy, "_PROC", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def at(seconds: float, used: int, own: int) -> None:
        clock[0] = seconds
        (tmp_path / "stat").write_text(f"cpu0 {used} 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\n")
        (tmp_path / str(me) / "stat").write_text(stat(me, 1, own, 0, 0, 0))

    at(0, 1000, 500)
    watch = BusyWatch()
    at(0.1, 1000 + ticks, 500)
    assert watch.share() is None  # too short to tell
    at(1, 1000 + ticks, 500)
    assert watch.share() == 0.5  # one of two CPUs
    at(1, 1000 + ticks, 500 + ticks)
    assert watch.share() == 0  # it was us
    at(1, 1000 + ticks, 500 + 2 * ticks)
    assert watch.share() == 0  # processes are counted more finely than CPUs
    (tmp_path / "stat").unlink()
    assert watch.share() is None
    assert BusyWatch().share() is None


def test_a_spinning_program_shows() -> None:
    """One that is no child of ours: its parent has ended."""
    spin = "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    watch = BusyWatch()
    subprocess.run(["sh", "-c", '"$0" -c "$1" &', sys.executable, spin], check=True)
    time.sleep(1.5)
    share = watch.share()
    assert share is not None
    assert share > 0.3 / len(os.sched_getaffinity(0))


def test_a_child_is_our_own() -> None:
    read = busy.family_ticks, busy._processes
    before = read[0](os.getpid(), read[1]())
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert read[0](os.getpid(), read[1]()) - before >= 0.45 * os.sysconf("SC_CLK_TCK")


def test_threads_that_share_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert crowd_warning([]) == crowd_warning([1, 2]) == ""
    assert crowd_warning([1, 3]).startswith("3 threads shared 2 CPUs, as this process may use no more")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert crowd_warning([2]).startswith("2 threads shared one CPU")


def test_what_is_said() -> None:
    assert busy_warning([]) == busy_warning([None, 0.0, 0.05]) == ""
    assert busy_warning([0.01, None, 0.374]).startswith("other programs used up to 37% of the CPUs")
