"""Ctrl-C is held where it must not raise, and never lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from paths import ROOT

from convgen.interrupts import interrupts_blocked, interrupts_held


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_held_until_the_end() -> None:
    seen = []

    def work() -> None:
        with interrupts_held() as interrupts:
            seen.append(interrupts.came)
            press()
            seen.append(interrupts.came)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == [False, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("pressed", "error"), [(True, KeyboardInterrupt), (False, RuntimeError)])
def test_it_comes_before_what_else_was_raised(pressed: bool, error: type[BaseException]) -> None:
    @interrupts_held()
    def work() -> None:
        if pressed:
            press()
        raise RuntimeError("what TVM makes of it")

    with pytest.raises(error):
        work()


def test_the_outermost_block_holds() -> None:
    steps = []

    def work() -> None:
        with interrupts_held():
            with interrupts_held():
                press()
            steps.append("after the inner block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["after the inner block"]


def test_other_handlers_and_threads_are_left_alone() -> None:
    seen: list[str | bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("own"))
    try:
        with interrupts_held():
            press()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["own"]

    def work() -> None:
        with interrupts_held() as interrupts:
            seen.append(interrupts.came)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["own", False]


def test_processes_started_while_blocked_never_see_one() -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    with interrupts_blocked():
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("module", ["click", "convgen.cli", "convgen.cli.generate"])
def test_a_command_that_is_interrupted_while_it_is_loaded_says_so(module: str, tmp_path: Path) -> None:
    (script := tmp_path / "convgen").write_text(
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from convgen.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, str(script), "build", "conv2d n1 ic1 oc1 i1x1 k1x1", "--no-records"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "convgen: interrupted"  # after the ^C of a terminal, on a line of its own
