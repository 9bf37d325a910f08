"""What `convgen tune` shows of a job while it runs, by the names of its layers, and what it says in the end."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from commands import Run

from convgen.cli.view import JobView
from convgen.tuning.job import Job
from convgen.tuning.job_state import JobState

LAYERS = """
layers = [
    { name = "stem", count = 3, spec = "conv1d n1 ic2 oc3 i9 k3" },
    { name = "[bold]head[/]", spec = "conv1d n1 ic4 oc3 i9 k3" },
    { spec = "conv1d n1 ic5 oc6 i7 k1" },
]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.toml"
    path.write_text(LAYERS)
    return path


@pytest.fixture
def state(file: Path) -> JobState:
    """A job of which one layer was measured, and the default beside it."""
    state = JobState(Job((str(file),), threads=(1,), seconds=60.0), None)
    first = state.layers[0].progress
    assert first is not None
    first.done, first.best, first.default = 5, 1e-3, 2e-3
    state.layers[0].state = "searching"
    return state


def test_a_terminal_shows_a_line_for_each_layer(state: JobState, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "110")
    with JobView() as view:
        view.update(state, state.layers[0])
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    lines = {
        line.split()[0]: " ".join(line.split())
        for line in shown.splitlines()
        if "waiting" in line or "searching" in line
    }
    assert lines.keys() == {"1", "stem", "[bold]head[/]", "conv1d"}
    assert lines["stem"].startswith("stem ×3 best 1 ms 2.00× – 5 searching")
    assert lines["conv1d"].startswith("conv1d n1 ic5 oc6 i7 k1 s1 p0 ")
    assert lines["1"].startswith("1 searching, 2 waiting; ")


def test_a_log_says_which_layer_it_is_about(state: JobState, capsys: pytest.CaptureFixture[str]) -> None:
    with JobView() as view:
        for layer in state.layers:
            view.update(state, layer)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "]  stem ×3  1T  searching  5 trials  best 1 ms" in lines[0]
    assert "2.00× the default" in lines[0]
    assert "]  [bold]head[/]  1T  waiting" in lines[1]
    assert "]  conv1d n1 ic5 oc6 i7 k1 s1 p0  1T  waiting" in lines[2]


def test_a_run_ends_with_what_it_brought(run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after, of the layers that have a final comparison, and the command that uses what was found."""
    monkeypatch.setattr("convgen.tuning.final.ROUNDS", 3)
    status, out, err = run("tune", file, "--threads", "1", "--trials", "6", "--records", tmp_path / "r.sqlite")
    assert status == 0, err
    said = re.search(
        r"^(\S*): (\S+ \S+) tuned, (\S+ \S+) with the defaults \(([\d.]+)×\): (\d) layers?, each", out, re.M
    )
    assert said, out
    assert said[1] == str(file)
    assert float(said[4]) > 0
    assert 1 <= int(said[5]) <= 3
    assert "next: `convgen build" in err
